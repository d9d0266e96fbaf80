"""The pieces of HTML that the pages about a run are made of, and their style; every foreign string passes `escape`.

No scripts, no network: one file, light or dark as the reader's machine is, from a telephone's width up.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from encode.page import table as rich_table
from encode.page import text as escape
from encode.page import whole

SIDE = 320  # pixels of a strip's pictures, at most: twice what they take on the screen


def page(title: str, body: str, head: str | None = None) -> str:
    """A whole HTML page; head is its first piece, by default the title as a heading."""
    head = f"<h1>{escape(title)}</h1>" if head is None else head
    return whole(title, f"{head}<!--body-->{body}<!--end-->", STYLE)


def inside(html: str) -> str | None:
    """What stands below the heading of a page that `page` made, or None."""
    start, end = html.find("<!--body-->"), html.rfind("<!--end-->")
    return html[start + len("<!--body-->") : end] if 0 <= start < end else None


def section(title: str, body: str, note: str = "", wide: bool = True) -> str:
    """A part of the page under a heading; nothing where it has no content. The body and the note are HTML already."""
    if not body:
        return ""
    words = f"<p>{note}</p>" if note else ""
    kind = ' class="across"' if wide else ""
    return f"<section{kind}><header><h2>{escape(title)}</h2>{words}</header><div>{body}</div></section>"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], numbers: Iterable[int] = ()) -> str:
    """A table of plain text; the columns in `numbers` stand to the right."""
    return rich_table([escape(name) for name in head], ([escape(cell) for cell in row] for row in rows), numbers)


def small(pixels: Any, side: int) -> bytes:
    """A JPEG of an image (Pillow's), its longer side at most `side` pixels."""
    from PIL import Image

    shown = pixels.convert("RGB")
    shown.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=3.0)
    buffer = io.BytesIO()
    shown.save(buffer, "JPEG", quality=86)
    return buffer.getvalue()


def picture(pixels: np.ndarray | bytes) -> str:
    """A data URI of a [height, width, 3] uint8 picture (a JPEG), or of the bytes of a PNG file; a large one is made smaller."""
    from PIL import Image

    if not isinstance(pixels, bytes):
        return jpeg(small(Image.fromarray(pixels), SIDE))
    image = Image.open(io.BytesIO(pixels))
    if max(image.size) > SIDE:
        return jpeg(small(image, SIDE))
    return "data:image/png;base64," + base64.b64encode(pixels).decode()


def jpeg(data: bytes) -> str:
    """A data URI of the bytes of a JPEG."""
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()


def figure(pixels: np.ndarray | bytes, caption: str) -> str:
    return f'<figure><img alt="" src="{picture(pixels)}"><figcaption>{escape(caption)}</figcaption></figure>'


def strip(title: str, pictures: Sequence[tuple[str, np.ndarray]]) -> str:
    """A row of captioned pictures under a title."""
    row = "".join(figure(pixels, words) for words, pixels in pictures)
    return f'<div class="strip"><p>{escape(title)}</p><div>{row}</div></div>'


def amount(value: float) -> str:
    """15.7 million; 614,400; 3.25."""
    if value >= 1e6:
        return f"{value / 1e6:,.3g} million" if value < 1e9 else f"{value / 1e9:,.3g} billion"
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def size(count: int) -> str:
    """3.40 GB or 12.5 MB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


STYLE = """
:root{--card:#fff;--good:#2f7d4f;--watch:#a8740f;--act:#b3261e;
--a:var(--rust);--b:var(--teal);--c:#a67c12;--d:#5a5fb0;--e:#96528a;--f:#4f7d3a;--g:#7a7f8a}
@media(prefers-color-scheme:dark){:root{--card:#1d2027;--good:#6fc28f;--watch:#e0b04c;--act:#ff8a80;
--c:#d9b24c;--d:#a1a6ee;--e:#d394c5;--f:#93c37b;--g:#9aa0ab}}
p{max-width:46rem}
h1{max-width:24em;text-wrap:balance}
.faint,.over{color:var(--soft);font-size:.875rem}
.over{margin:0 0 .5rem;overflow-wrap:anywhere}
.lead{font-size:1.05rem;max-width:52rem}
.now,.plot{font-variant-numeric:tabular-nums}
.progress{height:.45rem;border-radius:1rem;background:var(--line);margin:1.4rem 0 1.1rem;overflow:hidden}
.progress i{display:block;height:100%;background:var(--a);border-radius:1rem;min-width:.45rem}
.health{display:flex;gap:.7rem;align-items:baseline;margin:.9rem 0 0;max-width:52rem}
.health p{margin:0;overflow-wrap:anywhere;min-width:0}
.tag{display:inline-block;border-radius:1rem;padding:.05rem .7rem;font-weight:600;font-size:.85rem;border:1.5px solid;
white-space:nowrap;color:var(--soft)}
.tag.good,.verdict.pass{color:var(--good)}.tag.watch{color:var(--watch)}.tag.act,.verdict.fail{color:var(--act)}
.verdict{display:inline-block;border-radius:2rem;padding:.15rem 1rem;font-weight:600;border:2px solid;color:var(--soft)}
.charts{display:grid;gap:2.4rem 2.6rem;grid-template-columns:repeat(auto-fill,minmax(min(100%,25rem),1fr))}
.bins{display:grid;gap:1.5rem 1.4rem;grid-template-columns:repeat(auto-fill,minmax(min(45%,11.5rem),1fr))}
figure.chart figcaption{display:flex;justify-content:space-between;gap:.4rem 1rem;align-items:baseline;color:var(--ink);
font-weight:600;font-size:.95rem;margin-bottom:.6rem}
.now{font-weight:400;color:var(--soft);font-size:.875rem;text-align:right}
.plot{position:relative;height:11rem;margin:0 0 1.5rem 3.1rem}
.bins .plot{height:4.6rem;margin:0 0 .3rem 2.2rem}.bins figcaption{font-size:.84rem!important;margin-bottom:.35rem!important}
.plot svg{position:absolute;inset:0;width:100%;height:100%;display:block;overflow:hidden}
.plot i{position:absolute;right:100%;margin-right:.55rem;transform:translateY(-50%);font-style:normal;font-size:.74rem;
line-height:1;color:var(--soft);white-space:nowrap}
.plot u{position:absolute;top:100%;margin-top:.5rem;transform:translateX(-50%);font-size:.74rem;line-height:1;color:var(--soft);
text-decoration:none;white-space:nowrap}
.plot u.last{transform:translateX(-100%)}.plot u.first{transform:none}
.plot path{vector-effect:non-scaling-stroke;fill:none;stroke-width:1.8;stroke-linejoin:round;stroke-linecap:round}
.plot .grid{stroke:var(--line);stroke-width:1}
.plot .band{opacity:.2;stroke-width:1}
.plot .dash{stroke-dasharray:5 4}.plot .dots{stroke-width:5}
.plot .rug{stroke:var(--act);stroke-width:2;stroke-linecap:butt}
.ca{stroke:var(--a)}.cb{stroke:var(--b)}.cc{stroke:var(--c)}.cd{stroke:var(--d)}.ce{stroke:var(--e)}.cf{stroke:var(--f)}.cg{stroke:var(--g)}
.band.ca{fill:var(--a)}.band.cb{fill:var(--b)}.band.cc{fill:var(--c)}
.legend{gap:.15rem 1.2rem;font-size:.84rem;margin:.3rem 0 0}
.legend b{color:var(--ink);font-weight:400}
.legend svg{width:1.3rem;height:.6rem;margin-right:.4rem;display:inline-block}.legend svg path{stroke-width:2.4;fill:none}
.legend .dash{stroke-dasharray:4 3}
.aside{color:var(--soft);font-size:.8rem;margin:.3rem 0 0}
.times{height:1.1rem;border-radius:4px;overflow:hidden;margin:0 0 1.4rem}
.times svg{width:100%;height:100%;display:block}
.times .good{fill:var(--good);opacity:.45}.times .watch{fill:var(--watch)}.times .act{fill:var(--act)}
.times .unknown{fill:var(--line)}
.newest{columns:4 13rem;column-gap:1.2rem}.newest figure{break-inside:avoid;padding-bottom:1.4rem}
@media(max-width:600px){.newest{columns:2}}
.newest p,.row p{font-size:.875rem;line-height:1.4;margin:.35rem 0 0;overflow-wrap:anywhere;display:-webkit-box;
-webkit-box-orient:vertical;-webkit-line-clamp:4;overflow:hidden}
.newest p.faint{font-size:.78rem}
.row{display:grid;gap:.3rem .5rem;grid-template-columns:repeat(4,1fr);margin:0 0 1.4rem;align-items:end}
.row>p{grid-column:1/-1;margin:0;-webkit-line-clamp:2}
.row figcaption{font-size:.74rem;line-height:1.2;margin:.2rem 0 0;font-variant-numeric:tabular-nums}
.none{display:grid;place-items:center;aspect-ratio:1;border:1px dashed var(--line);border-radius:5px;color:var(--soft);
font-size:.76rem;text-align:center;line-height:1.25;padding:.2rem}
@media(min-width:760px){.row{grid-template-columns:10.5rem repeat(var(--steps),minmax(0,1fr));margin:0 0 .5rem;align-items:start}
.row>p{grid-column:1;font-size:.82rem;-webkit-line-clamp:4;padding-right:.6rem}
.row figure{display:flex;flex-direction:column-reverse}.row figcaption{margin:0 0 .35rem}
.row~.row figcaption{position:absolute;clip-path:inset(50%)}
.row img{max-height:7.4rem;object-fit:contain;object-position:0 0}.row:not(.row~.row)>p{padding-top:1.2rem}}
.strip{margin:1.2rem 0}.strip>div{display:flex;gap:.6rem;flex-wrap:wrap}.strip figure{width:9.3rem}
.strip p{overflow-wrap:anywhere}
.strip figcaption,.cards figcaption{line-height:1.3;padding-top:.25rem;font-size:.8rem;overflow-wrap:anywhere}
.cards{gap:1.2rem;grid-template-columns:repeat(auto-fill,minmax(min(46%,15rem),1fr))}
table{margin:.2rem 0}
td,th{vertical-align:baseline;overflow-wrap:break-word}
td:last-child:not(.n){overflow-wrap:anywhere;min-width:8rem}
td:not(.n) .tag{margin:.05rem 0}
@media(min-width:600px){.prose td:last-child{width:70%}}
code{font:.85em ui-monospace,SFMono-Regular,Menlo,monospace;overflow-wrap:anywhere}
pre{background:var(--card);border:1px solid var(--line);border-radius:.5rem;padding:1rem;overflow-x:auto;font-size:.8rem}
iframe{width:100%;height:46rem;border:1px solid var(--line);border-radius:.5rem}
details{margin:.4rem 0}
@media(max-width:600px){.prose thead{display:none}.prose tr{display:flex;flex-wrap:wrap;align-items:baseline;
border-bottom:1px solid var(--line);padding:.35rem 0}.prose td{border:0;padding:.1rem .8rem .1rem 0}
.prose td:last-child{flex-basis:100%}.prose td:empty{display:none}
.health{flex-direction:column;gap:.4rem}.strip figure{width:calc(33.3% - .4rem)}}
@media print{.row{break-inside:avoid}}
"""
