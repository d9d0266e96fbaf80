"""The small pieces of HTML that all pages are made of, and the style of the one about a data set; foreign strings pass `text`.

No scripts, no network: one file, light or dark as the reader's machine is, from a telephone's width up.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterable, Sequence
from typing import Any

LISTED = 100  # lines of a long list that the page shows

# What would break the page, or turn its text around, is shown as a sign instead of being obeyed.
_HIDDEN = (*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x2028, 0x2029, 0xFEFF, 0xFFFE, 0xFFFF)
_SIGNS = {code: chr(0x2400 + code) for code in range(0x20)} | {0x7F: "\u2421"}
_SIGNS |= {code: f"[U+{code:04X}]" for code in (*_HIDDEN, *range(0xD800, 0xE000))}


def text(value: Any) -> str:
    """Any value as text that a page shows letter by letter."""
    return html.escape(str(value).translate(_SIGNS), quote=True)


def own(value: Any) -> str:
    """A string of the user's: its direction of writing does not reach its neighbours."""
    return f"<bdi>{text(value)}</bdi>"


def number(value: float) -> str:
    return f"{value:,}"


def many(count: int, one: str) -> str:
    return f"{count:,} {one}{'' if count == 1 else 's'}"


def size(width: int, height: int) -> str:
    return f"{width}\u00a0×\u00a0{height}"


def percent(share: float) -> str:
    """0.1234 -> 12.3%, and what is not zero never reads as zero."""
    return "under 0.1%" if 0 < share < 0.0005 else f"{100 * share:.1f}%"


def section(title: str, body: str, note: str = "", wide: bool = False) -> str:
    words = f"<p>{text(note)}</p>" if note else ""
    kind = ' class="across"' if wide else ""
    return f"<section{kind}><header><h2>{text(title)}</h2>{words}</header><div>{body}</div></section>"


def tiles(pairs: Iterable[tuple[Any, str]]) -> str:
    inner = "".join(f"<div><b>{text(value)}</b><span>{text(name)}</span></div>" for value, name in pairs)
    return f'<div class="tiles">{inner}</div>' if inner else ""


def items(lines: Sequence[str], where: str = "") -> str:
    """A list of lines that are HTML already, cut at LISTED."""
    return "<ul>" + "".join(f"<li>{line}</li>" for line in lines[:LISTED]) + "</ul>" + more(len(lines) - LISTED, where)


def more(left: int, where: str = "", what: str = "") -> str:
    return f'<p class="soft">and {left:,} more{what}{f" in {where}" if where else ""}</p>' if left > 0 else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Iterable[int] = (), kind: str = "") -> str:
    """A table of cells that are HTML already; the columns in `numbers` stand to the right, `kind` is one more class."""
    right = set(numbers)

    def line(cells: Iterable[str], tag: str) -> str:
        return "".join(f"<{tag}{' class=n' if k in right else ''}>{cell}</{tag}>" for k, cell in enumerate(cells))

    top = f"<thead><tr>{line(head, 'th')}</tr></thead>" if any(head) else ""
    body = "".join(f"<tr>{line(cells, 'td')}</tr>" for cells in rows)
    return f'<div class="scroll {kind}"><table>{top}<tbody>{body}</tbody></table></div>'


def fold(summary: str, body: str) -> str:
    """Something that opens when it is clicked."""
    return f"<details><summary>{text(summary)}</summary>{body}</details>"


def picture(jpeg: bytes | None) -> str:
    """A picture in the page; where there is none, a sheet with a corner torn off."""
    if jpeg is None:
        return '<span class="lost"><svg viewBox="0 0 40 40" role="img" aria-label="cannot be shown">' + _TORN
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}">'


_TORN = '<path d="M10 5h14l6 6v10l-5 4-4-4-5 5-6-4z"/><path d="M10 27l6 4 5-5 4 4 5-4v9H10z"/><path d="M24 5v6h6"/></svg></span>'


def changes(old: str, new: str) -> tuple[str, str]:
    """Both captions as HTML, the words in which they differ marked."""
    words = [re.findall(r"\w+|\W+", value) for value in (old, new)]
    if len(words[0]) != len(words[1]):
        return text(old), text(new)
    return tuple(
        "".join(text(a) if a == b else f"<mark>{text(a)}</mark>" for a, b in zip(mine, other))
        for mine, other in (words, words[::-1])
    )


def whole(title: str, body: str, style: str) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, '
        f'initial-scale=1"><title>{text(title)}</title><style>{BASE}{style}</style></head><body><main>{body}</main></body></html>\n'
    )


# What all pages share.
BASE = """
:root{color-scheme:light dark;--paper:#fbfaf8;--ink:#1d2330;--soft:#667085;--line:#e4e1da;--grey:#b9b5ab;--rust:#b4552d;
--teal:#2f7585}
@media(prefers-color-scheme:dark){:root{--paper:#15171c;--ink:#e9e6df;--soft:#9aa0ab;--line:#30343d;--grey:#5b606b;
--rust:#e08a5f;--teal:#6db5c4}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Inter,sans-serif}
main{max-width:1180px;margin:0 auto;padding:3rem 1.5rem 5rem}
p{margin:.4rem 0}
h1{font-size:clamp(1.6rem,4.2vw,2.4rem);line-height:1.18;letter-spacing:-.025em;font-weight:650;margin:0 0 .8rem}
h2{font-size:1.15rem;line-height:1.3;letter-spacing:-.01em;font-weight:650;margin:0 0 .4rem}
h3{font-size:.92rem;font-weight:600;margin:1.8rem 0 .5rem}
b{font-weight:600}
section>header p,figcaption{color:var(--soft);font-size:.875rem}
section{border-top:1px solid var(--line);padding-top:1.6rem;margin-top:3.2rem;display:grid;gap:1rem 3rem}
section>*{min-width:0}
@media(min-width:900px){section{grid-template-columns:13.5rem 1fr}section.across{grid-template-columns:1fr}}
section>div>:first-child,section>div>h3:first-child{margin-top:0}
.tiles b,.n,td,.legend{font-variant-numeric:tabular-nums}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(7rem,1fr));gap:1.4rem 1.3rem;margin-top:2.2rem}
.tiles b{display:block;font-size:1.35rem;line-height:1.2;letter-spacing:-.02em}
.tiles span{color:var(--soft);font-size:.84rem;line-height:1.35;display:block}
figure{margin:0;min-width:0}
figure img{width:100%;display:block;border-radius:5px}
.cards{display:grid}
.legend{display:flex;flex-wrap:wrap;color:var(--soft)}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.9rem}
th{text-align:left;font-weight:500;color:var(--soft);font-size:.82rem;white-space:nowrap}
td,th{padding:.4rem 1.2rem .4rem 0;border-bottom:1px solid var(--line)}
.n{text-align:right;white-space:nowrap}td.n:last-child,th.n:last-child{padding-right:0}
summary{cursor:pointer;font-size:.9rem;color:var(--teal);width:fit-content}
@media(max-width:600px){main{padding:1.6rem 1rem 3rem}section{margin-top:2.4rem}td,th{padding-right:.8rem}
th,th.n{white-space:normal}}
@media print{section{break-inside:auto}figure{break-inside:avoid}}
"""

CSS = """
:root{--tint:#2f758514;--mark:#f6e3c4}
@media(prefers-color-scheme:dark){:root{--tint:#6db5c41c;--mark:#57431f}}
h1{margin:0 0 1.4rem}
.soft{color:var(--soft);font-size:.875rem}
@media(min-width:900px){section.across>header p{max-width:44rem}}
.sum{font-size:1.02rem;margin:0 0 .7rem}
.sum b,.tabular{font-variant-numeric:tabular-nums}
.sum b{font-size:1.15em}
.sum u{display:inline-block;width:.7rem;height:.7rem;border-radius:2px;margin-right:.4rem}
.sum i{font-style:normal;color:var(--soft);padding:0 .3em}
.tiles b{font-size:1.65rem}
.samples{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,27rem),1fr));gap:2rem 2.4rem}
.sample .three{display:grid;grid-template-columns:repeat(3,1fr);gap:.5rem}
.sample figure{display:grid;grid-template-rows:auto 1fr;align-items:start}
.sample figure span.none{display:grid;place-items:center;height:100%;border:1px dashed var(--line);border-radius:5px;
padding:.5rem;color:var(--soft);font-size:.8rem;text-align:center;line-height:1.3}
.sample p{font-size:.875rem;line-height:1.45;margin:.3rem 0;max-height:7.3em;overflow:auto}
figcaption{font-size:.78rem;margin-bottom:.25rem}
.name{font-size:.8rem;color:var(--soft)}
.name,bdi{overflow-wrap:anywhere}
mark{background:var(--mark);color:inherit;border-radius:3px;padding:0 .15em}
mark.doubt{background:none;border-bottom:2px dotted var(--rust);border-radius:0;padding:0}
mark.kept{background:none;border-bottom:1px solid var(--grey);border-radius:0;padding:0}
.cards{grid-template-columns:repeat(auto-fill,minmax(min(100%,15rem),1fr));gap:1rem 1.6rem;margin:.7rem 0}
.cards figure{display:grid;grid-template-columns:5.6rem 1fr;gap:.8rem;align-items:start}
.cards figure>img{width:auto;max-width:100%;max-height:4.2rem;border-radius:4px}.lost{height:4.2rem;border-radius:4px}
.cards figcaption{margin:-.15rem 0 0;line-height:1.4;max-height:11.2em;overflow:auto}
.cards figcaption>bdi{color:var(--ink)}.cards figcaption .soft{font-size:inherit}
.lost{border:1px dashed var(--line);display:grid;place-items:center}
.lost svg{width:1.7rem;fill:none;stroke:var(--grey);stroke-width:1.6;stroke-linejoin:round}
.reason{display:flex;gap:.7rem;align-items:baseline;flex-wrap:wrap}
.reason small{color:var(--soft);font-weight:400;font-size:.8rem;border:1px solid var(--line);
border-radius:1rem;padding:0 .55rem}
.pair{display:grid;gap:1.5rem 2.5rem;align-items:start}
@media(min-width:1040px){.pair{grid-template-columns:minmax(0,33rem) minmax(0,1fr)}}
svg{display:block}
svg text{fill:var(--soft);font-size:11.5px;font-variant-numeric:tabular-nums}
.chart{width:100%;max-width:34rem;height:auto;overflow:visible}
.bar{fill:var(--teal)}.rust{fill:var(--rust)}.grey{fill:var(--grey)}
.grid{stroke:var(--line);stroke-width:1}
.axis{stroke:var(--grey);stroke-width:1}
.band{fill:var(--tint);stroke:var(--paper);stroke-width:2}
.ray{stroke:var(--teal);stroke-width:1;opacity:.75}
.area{stroke:var(--rust);stroke-width:1.2;stroke-dasharray:4 4}
.dot{fill:var(--ink);fill-opacity:.42;stroke:var(--paper);stroke-width:.4}
.rust-text{fill:var(--rust)}
.mark{stroke:var(--rust);stroke-width:1.4}
.normal{fill:none;stroke:var(--rust);stroke-width:1}
.within{fill:var(--tint)}
.own{fill:none;stroke:var(--rust);stroke-width:1.6}.its{fill:var(--tint);stroke:var(--teal);stroke-width:1.6}
.icon{width:1.9rem;height:1.9rem}
.strip{width:100%;height:.75rem;border-radius:3px;overflow:hidden}
.legend{gap:.2rem 1.4rem;font-size:.875rem;margin:.5rem 0}
.legend i{display:inline-block;width:.65rem;height:.65rem;border-radius:2px;margin-right:.45rem;vertical-align:-.02rem}
.legend b{color:var(--ink)}
i.bar,u.bar{background:var(--teal)}i.rust,u.rust{background:var(--rust)}i.grey,u.grey{background:var(--grey)}
i.mark{background:var(--mark)}i.pale{background:var(--teal);opacity:.45}rect.mark{fill:var(--mark);stroke:none}.pale{fill:var(--teal);opacity:.45}
.bars td{padding:.3rem 1.2rem .3rem 0;border:0}.bars td.n:last-child{padding-right:0}
.worst .icon{width:2.3rem;height:2.3rem}
.bars svg:not(.icon){height:.6rem;width:100%;min-width:4rem;border-radius:2px}
.chart+.bars{margin-top:1.8rem}
td,th{vertical-align:middle}
.channels{display:grid;grid-template-columns:repeat(2,1fr);gap:1.4rem 1.6rem;margin-top:1rem}
@media(min-width:620px){.channels{grid-template-columns:repeat(4,1fr)}}
.channels svg{width:100%;height:auto}
.channels figcaption{margin:.15rem 0 0;line-height:1.4}.channels b{color:var(--ink)}
ul{padding:0;margin:.4rem 0;list-style:none;font-size:.9rem}
li{margin:.3rem 0}
li img{height:2.6rem;width:3.4rem;object-fit:cover;border-radius:4px;flex:none;margin-right:.7rem}
.examples li{border-left:2px solid var(--line);padding-left:.8rem;margin:.6rem 0}
details{margin:1rem 0}
details[open]>summary{margin-bottom:.9rem}
li:has(img){display:flex;align-items:center}
@media(max-width:600px){.bars td,.bars th{padding-right:.7rem}td bdi{display:inline-block;min-width:6.5rem}
.chart text{font-size:14.5px}
.plane text{font-size:13px}}
@media print{details::details-content{content-visibility:visible;block-size:auto}
.sample p,.cards figcaption{max-height:none}.sample{break-inside:avoid}}
"""
