"""The HTML page about an encoded data set: what went in, what came out, and what it looks like when decoded again.

One file without scripts or network (page.py has its pieces, charts.py its drawings, facts.py its numbers). No file of the
user's is decoded here: pictures come as thumbnails out of the run's worker processes. But for how long the run took, the
same data set gives the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from encode import buckets, captions, charts, facts, readback
from encode.page import (
    CSS,
    LISTED,
    changes,
    fold,
    items,
    many,
    more,
    number,
    own,
    percent,
    picture,
    section,
    size,
    table,
    text,
    tiles,
    whole,
)
from encode.progress import bare, span

REFUSED, REFUSED_EACH, REFUSED_SIDE = 48, 8, 144  # thumbnails of refused pictures: in all, a reason, pixels
WORST = 8
COPIES = 24  # duplicates shown as pictures
QUARANTINE = "quarantine.jsonl"


def build(
    context: Any, plan: Mapping, jobs: Sequence, parts: Sequence[Mapping], refused: Sequence, datasets: Mapping
) -> str:
    """The page.

    Args:
      context: pipeline.Context.
      plan: content of plan.json.
      jobs: the shards of the plan.
      parts: what each shard left behind, in the order of jobs.
      refused: source.Problem of every input not encoded.
      datasets: {resolution: content of dataset.json}.
    """
    found = facts.pictures(jobs, parts, context.config.max_distortion)
    sizes = sorted(datasets)
    texts = {row.name: plan["inputs"][row.name] for row in found}
    truncated = [name for part in parts for name in part["truncated"]]
    copies = facts.duplicates(found)
    off = [row.name for row in found if not context.config.flip or not context.items[row.name].flip]
    swaps = facts.swap_decisions(texts, plan["flips"], off)
    title = _title({one: datasets[one]["count"] for one in sizes})
    body = [
        f"<h1>{text(title)}</h1>",
        _account(facts.account(texts, refused, context.others)),
        tiles(_headline(found, truncated, copies, swaps, context.legs)),
        section("What the model will see", readback.samples(context, jobs, parts, min(sizes)), SAMPLES_NOTE, wide=True),
        section("Left out", _refused(context, refused), REFUSED_NOTE) if refused else "",
        section("Sizes and buckets", _buckets(context, found, sizes), BUCKETS_NOTE, wide=True),
        section("Stretch", _stretch(context, found, max(sizes)), STRETCH_NOTE),
        section("Resolutions", _resolutions(context, found, datasets), RESOLUTIONS_NOTE),
        section("Caption lengths", _lengths(context, found, texts, truncated), LENGTHS_NOTE),
        section("Left and right", _swaps(swaps, texts, plan["flips"], context.config.seed), SWAP_NOTE),
        section("Latent channels", readback.channels(context, jobs, parts, datasets), LATENT_NOTE),
        section("Exact duplicates", _duplicates(context, copies), DUPLICATES_NOTE),
        section("Other files", _others(context.others), OTHERS_NOTE) if context.others else "",
        section("Time", _time(context.legs), TIME_NOTE) if _busy(context.legs) else "",
        section("Encoders", _encoders(datasets[max(sizes)])),
    ]
    return whole(title, "".join(body), CSS)


SAMPLES_NOTE = (
    "Drawn at random by config.seed: the original, its latent decoded again, and the latent of its mirror "
    "image decoded, with the caption that belongs to each. Words that the mirror changes are marked."
)
REFUSED_NOTE = f"Every input that was not encoded, with its reason, stands in {QUARANTINE} beside this page."
BUCKETS_NOTE = (
    "Each dot is a size, as large as it is frequent. A diagonal is one shape: the lines are the buckets, the bands are what "
    "goes into each. Dashed: as many pixels as a resolution has; a picture to the lower left of it is enlarged, or left out."
)
STRETCH_NOTE = (
    "Nothing is cropped. A picture is stretched to its bucket's shape, one side against the other by this much."
)
RESOLUTIONS_NOTE = (
    "A picture too small for a resolution is left out there. One with fewer pixels than its bucket is enlarged."
)
LENGTHS_NOTE = "In tokens of the text encoder. What is longer than its limit is cut, and the model never sees the rest."
SWAP_NOTE = (
    "Half of the samples are shown mirrored in training, with left and right exchanged in the caption. Where a word could "
    "mean something else, or the picture may show writing, the sample is never mirrored."
)
LATENT_NOTE = (
    "Each channel in units of its deviation: the line is the mean, the shade one deviation, the curve a normal distribution of "
    "the two. Training normalises with these numbers. A normal distribution has 0.3% beyond three deviations."
)
DUPLICATES_NOTE = (
    "Pictures whose pixels are the same, whatever the file. They are never split over training and held-out."
)
OTHERS_NOTE = "Neither pictures nor captions, by suffix; they were not looked at."
TIME_NOTE = (
    "Where the encoders wait much, reading and decoding the pictures is what limits: more processor cores would help, a "
    "faster graphics card would not."
)


def _title(counts: Mapping[int, int]) -> str:
    """202 pictures at 256 and 512, 168 at 1024."""
    sizes = {count: [str(one) for one in counts if counts[one] == count] for count in counts.values()}
    words = [
        f"{number(count)} at {' and '.join(filter(None, (', '.join(alike[:-1]), alike[-1])))}"
        for count, alike in sizes.items()
    ]
    first = "picture" if next(iter(sizes)) == 1 else "pictures"
    return ", ".join([words[0].replace(" at", f" {first} at", 1), *words[1:]])


def _account(sums: facts.Account) -> str:
    """Every file in one equation, and as one bar."""
    kinds = [("encoded", sums.encoded, "bar"), ("refused", sums.refused, "rust")]
    kinds += [("other" if sums.others == 1 else "others", sums.others, "grey")] if sums.others else []
    words = [f'<span><u class="{kind}"></u><b>{number(count)}</b> {name}</span>' for name, count, kind in kinds]
    total = f"<b>{number(sums.files)}</b> {'file' if sums.files == 1 else 'files'}"
    words_below = "Captions that belong to a picture are not counted."
    words_below += f" {many(sums.lines, 'line')} of caption lists could not be used." if sums.lines else ""
    equation = f'<p class="sum">{total}<i>=</i>{"<i>+</i>".join(words)}</p>'
    return f'{equation}{charts.strip(kinds)}<p class="soft">{words_below}</p>'


def _headline(found, truncated, copies, swaps, legs) -> list[tuple[Any, str]]:
    pairs = [
        (number(len({row.shape for row in found})), "buckets"),
        (percent(max(row.stretch for row in found) - 1), "largest stretch"),
        (number(sum(row.padded for row in found)), "padded instead"),
        (number(len(truncated)), "captions cut"),
        (number(len(swaps[facts.DOUBT])), "in doubt, never flipped"),
        (number(sum(len(group) - 1 for group in copies)), "exact duplicates"),
    ]
    if legs := _busy(legs):
        seconds = sum(leg["seconds"] for leg in legs)
        pairs.append((f"{sum(leg['pictures'] for leg in legs) / seconds:.1f}", "pictures a second"))
        pairs.append((percent(sum(leg["waited"] for leg in legs) / seconds), "of the time the encoders waited"))
    return pairs


def _busy(legs: Sequence[Mapping]) -> list[Mapping]:
    return [leg for leg in legs if leg["pictures"] and leg["seconds"] > 0]


def _refused(context: Any, refused: Sequence) -> str:
    """By reason: some as pictures, more as a list, the rest as a number."""
    groups = facts.reasons(refused)
    bars = [
        [text(stage), text(kind), charts.bar(len(rows) / len(groups[0][2]), "rust"), number(len(rows))]
        for stage, kind, rows in groups
    ]
    parts, left = [f'<div class="bars">{table(("stage", "reason", "", "inputs"), bars, numbers=[3])}</div>'], REFUSED
    for stage, kind, rows in groups:
        details = {bare(row.reason) for row in rows}
        common = details.pop() if len(details) == 1 else ""
        tag = f" <small>{text(stage)}</small>" if stage != kind else ""
        parts.append(f'<h3 class="reason">{text(kind)}{tag}</h3>')
        parts.append(f'<p class="soft">{own(common)}</p>' if common not in ("", kind) else "")
        shown = [row for row in rows if not facts.is_text(row.file)][: min(REFUSED_EACH, left)]
        left -= len(shown)
        thumbnails = context.thumbnails([context.folder / row.file for row in shown], REFUSED_SIDE) if shown else []
        figures = "".join(
            f"<figure>{picture(jpeg)}<figcaption>{_problem(row, not common)}</figcaption></figure>"
            for row, jpeg in zip(shown, thumbnails)
        )
        parts.append(f'<div class="cards">{figures}</div>' if shown else "")
        others = items([_problem(row, not common) for row in rows if row not in shown], QUARANTINE)
        count = len(rows) - len(shown)
        parts.append((fold(f"{count:,} more", others) if shown else others) if count else "")
    return "".join(parts)


def _problem(row: Any, detailed: bool) -> str:
    return own(row.file) + (f'<br><span class="soft">{own(bare(row.reason))}</span>' if detailed else "")


def _bucket(context: Any, shape: tuple[int, int], resolution: int) -> str:
    return size(*buckets.pixels(shape, context.cells, resolution))


def _buckets(context: Any, found: Sequence[facts.Picture], sizes: Sequence[int]) -> str:
    largest, groups = max(sizes), {}
    for row in found:
        groups.setdefault(row.shape, []).append(row)
    order = sorted(groups, key=lambda shape: shape[0] / shape[1])
    names = {shape: _bucket(context, shape, largest) for shape in order}
    most = max(map(len, groups.values()))
    rows = []
    for shape in order:
        members = groups[shape]
        rows.append(
            [
                charts.shape(shape),
                names[shape],
                charts.bar(len(members) / most),
                number(len(members)),
                percent(max(row.stretch for row in members) - 1),
            ]
        )
    head = ("", f"bucket at {largest}", "", "pictures", "largest stretch")
    drawing = charts.plane(
        facts.dots(row.size for row in found),
        [(names[shape], shape[0] / shape[1]) for shape in order],
        sizes,
        context.config.max_distortion,
    )
    return f'<div class="pair"><div>{drawing}</div><div class="bars">{table(head, rows, numbers=[3, 4])}</div></div>'


def _stretch(context: Any, found: Sequence[facts.Picture], largest: int) -> str:
    values = [100 * (row.stretch - 1) for row in found]
    median, high, worst = facts.spread(values)
    end = max(worst, 1.0) * 1.0001
    marks = [(median, f"median {median:.1f}%"), (high, f"95% below {high:.1f}%"), (worst, f"largest {worst:.1f}%")]
    drawing = charts.columns(facts.classes(values, 0, end, 46).tolist(), (0, end), "picture", marks, suffix="%")
    ranked = sorted((row for row in found if row.stretch > 1.0005), key=lambda row: (-row.stretch, row.name))[:WORST]
    rows = [
        [
            charts.overlay(row.size, row.shape),
            own(row.name),
            size(*row.size),
            _bucket(context, row.shape, largest),
            percent(row.stretch - 1),
        ]
        for row in ranked
    ]
    head = ("", "stretched most", "size", f"bucket at {largest}", "stretch")
    listed = table(head, rows, numbers=[2, 3, 4]) if rows else "<p>No picture is stretched.</p>"
    padded = [own(row.name) for row in found if row.padded]
    extra = (
        f"<h3>Padded instead of stretched: {number(len(padded))}</h3>{fold('names', items(padded))}" if padded else ""
    )
    return f'{drawing}<div class="bars worst">{listed}</div>{extra}'


def _resolutions(context: Any, found: Sequence[facts.Picture], datasets: Mapping) -> str:
    rows, lists = [], []
    for one in sorted(datasets):
        written = [row for row in found if one in row.resolutions]
        left = [own(row.name) for row in found if one not in row.resolutions]
        areas = {shape: np.prod(buckets.pixels(shape, context.cells, one)) for shape in {row.shape for row in written}}
        enlarged = sum(row.size[0] * row.size[1] < areas[row.shape] for row in written)
        rows.append(
            [
                f"<b>{one}</b>",
                *map(number, (len(written), len(left), enlarged)),
                number(datasets[one]["latent_count"]),
            ]
        )
        if left:
            lists.append(fold(f"{many(len(left), 'picture')} left out at {one}", items(left)))
    head = ("resolution", "pictures", "left out, too small", "enlarged", "latent positions")
    return table(head, rows, numbers=[1, 2, 3, 4]) + "".join(lists)


def _lengths(context: Any, found: Sequence, texts: Mapping[str, str], truncated: Sequence[str]) -> str:
    lengths, limit = [row.tokens for row in found], context.encoders.text.max_tokens
    counts, width = facts.token_classes(lengths)
    median, high, longest = facts.spread(lengths)
    titles = [f"{place * width + 1} to {(place + 1) * width} tokens: {count:,}" for place, count in enumerate(counts)]
    marks = [(median, f"median {median:.0f}"), (high, f"95% below {high:.0f}"), (longest, f"longest {longest:.0f}")]
    ends = (0.5, len(counts) * width + 0.5)
    drawing = charts.columns(counts.tolist(), ends, "caption", marks, titles)
    if not truncated:
        return f"{drawing}<p>No caption was longer than the limit of {number(limit)} tokens.</p>"
    count = context.encoders.text.count_tokens
    lines = [
        f'{own(name)} <span class="soft">{many(count(texts[name]), "token")}</span>' for name in truncated[:LISTED]
    ]
    lines += [""] * (len(truncated) - len(lines))
    summary = f"<p>{many(len(truncated), 'caption')} longer than the limit of {number(limit)} tokens.</p>"
    return f"{drawing}{summary}<h3>Cut to the limit</h3>{items(lines)}"


def _swaps(
    kinds: Mapping[str, Sequence[str]], texts: Mapping[str, str], flips: Mapping[str, str | None], seed: int
) -> str:
    colours = {facts.SWAPPED: "bar", facts.KEPT: "pale", facts.PLAIN: "grey", facts.DOUBT: "rust", facts.OFF: "mark"}
    shown = [(name, len(found), colours[name]) for name, found in kinds.items() if found or name != facts.OFF]
    parts = [charts.strip(shown), charts.legend(shown)]
    for kind in (facts.SWAPPED, facts.KEPT, facts.DOUBT):
        unique = {texts[name]: flips.get(name) for name in kinds[kind]}
        lines = [_example(value, unique[value], kind) for value in facts.drawn(unique, seed, 6, "swap")]
        if lines:
            rest = more(len(unique) - len(lines), what=" such captions")
            rest += "<p class=soft>All of them stand in unflipped.jsonl.</p>" if kind == facts.DOUBT else ""
            parts.append(f'<h3>{text(kind)}</h3><div class="examples">{items(lines)}</div>{rest}')
    return "".join(parts)


def _example(caption: str, flip: str | None, kind: str) -> str:
    if kind == facts.SWAPPED:
        old, new = changes(caption, flip)
        return f"<bdi>{old}</bdi><br><bdi>{new}</bdi>"
    parts, place = [], 0
    why = re.search(re.escape(captions.doubt(caption)), caption, re.IGNORECASE) if kind == facts.DOUBT else None
    if why and why.group() not in [word for word, _ in captions.senses(caption)]:
        before, after = caption[: why.start()], caption[why.end() :]
        return f'<bdi>{text(before)}<mark class="doubt">{text(why.group())}</mark>{text(after)}</bdi>'
    for word, sense in captions.senses(caption):
        start = re.compile(rf"(?<![^\W\d_]){re.escape(word)}(?![^\W\d_])").search(caption, place).start()
        style = "doubt" if sense is captions.Sense.DOUBT else "kept"
        parts.append(f'{text(caption[place:start])}<mark class="{style}">{text(word)}</mark>')
        place = start + len(word)
    return f"<bdi>{''.join(parts)}{text(caption[place:])}</bdi>"


def _duplicates(context: Any, copies: Sequence[Sequence[str]]) -> str:
    if not copies:
        return "<p>None.</p>"
    thumbnails = context.thumbnails([context.items[group[0]].path for group in copies[:COPIES]], REFUSED_SIDE)
    lines = [own(" = ".join(group)) for group in copies]
    lines = [f"{picture(jpeg)}{line}" for jpeg, line in zip(thumbnails, lines)] + lines[len(thumbnails) :]
    count = sum(len(group) - 1 for group in copies)
    return f"<p>{many(count, 'picture')} too many, in {many(len(copies), 'group')}.</p>{items(lines)}"


def _others(others: Mapping[str, int]) -> str:
    order = sorted(others.items(), key=lambda pair: (-pair[1], pair[0]))
    rows = [
        [own(name or "no suffix"), charts.bar(count / order[0][1], "grey"), number(count)] for name, count in order[:20]
    ]
    return f'<div class="bars">{table(("suffix", "", "files"), rows, numbers=[2])}</div>{more(len(order) - 20)}'


def _time(legs: Sequence[Mapping]) -> str:
    legs = _busy(legs)
    pictures, seconds, waited = (sum(leg[name] for leg in legs) for name in ("pictures", "seconds", "waited"))
    words = (
        f"<p>{many(pictures, 'picture')} in {span(seconds)}, {pictures / seconds:.1f} a second; the encoders waited for pictures "
        f"{percent(waited / seconds)} of the time.</p>"
    )
    shares = [("encoding", 1 - waited / seconds, "bar"), ("waiting for pictures", waited / seconds, "rust")]
    parts = charts.strip(shares) + charts.legend(shares)
    rows = [
        [
            number(leg["pictures"]),
            span(leg["seconds"]),
            f"{leg['pictures'] / leg['seconds']:.1f}",
            charts.bar(leg["waited"] / leg["seconds"], "rust"),
            percent(leg["waited"] / leg["seconds"]),
        ]
        for leg in legs
    ]
    head = ("pictures", "time", "pictures a second", "", "waited")
    listed = f'<div class="bars">{table(head, rows[-LISTED:], numbers=[0, 1, 2, 4])}</div>'
    last = (
        f"The last {LISTED} of {len(rows):,} parts" if len(rows) > LISTED else f"{many(len(rows), 'part')} of the run"
    )
    return words + parts + (fold(last, listed) if len(rows) > 1 else "")


def _encoders(dataset: Mapping[str, Any]) -> str:
    return table(("", ""), [[text(part), _fields(value)] for part, value in dataset["fingerprint"].items()])


def _fields(value: Any) -> str:
    if not isinstance(value, Mapping):
        return own(value)
    return "<br>".join(f'<span class="soft">{text(name)}</span> {_fields(inner)}' for name, inner in value.items())
