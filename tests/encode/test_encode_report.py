"""The page about an encoded data set: complete, safe, one file, small, and its numbers are those of the records."""

import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from encode import facts, mirrored, page, pipeline, readback, records, report
from encode.source import Problem
from tests.encode import fakes

EVIL = '<img src=x onerror=alert(1)> & "q" \u202eleft'
VOID = {"meta", "img", "br"}
HOSTILE = 'a<b>&"c"\u202egnp.\n.png'


class _Balanced(HTMLParser):
    """The tags, what each encloses as text, and every attribute; closes must match."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.words, self.isolated = [], [], [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)
        if "bdi" in self.open:
            self.isolated.append(data)


def _words(html):
    """What a reader sees, one space between words."""
    return re.sub(r"[ \u00a0\n]+", " ", "".join(_Balanced(html).words))


def _part(html, title):
    """One section of the page."""
    return re.search(rf"<section[^>]*><header><h2>{title}</h2>.*?</section>", html, re.DOTALL).group()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder, out, page) of a small folder with one of everything."""
    images = fakes.photographs(tmp_path_factory.mktemp("in"), 6)  # 3 shapes, sides named
    Image.new("RGB", (90, 60), "red").save(images / HOSTILE)
    (images / HOSTILE).with_suffix(".txt").write_text(EVIL, encoding="utf-8")
    Image.new("RGB", (90, 60), "blue").save(images / "kept.png")
    (images / "kept.txt").write_text("cake left on a plate")
    Image.new("RGB", (90, 60), "blue").save(images / "same.bmp")
    (images / "same.txt").write_text("one two three four five six seven eight nine ten")
    (images / "<script>.png").write_bytes(b"nothing")
    (images / "<script>.txt").write_text("nothing")
    Image.new("RGB", (640, 40), "green").save(images / "wide.png")  # refused, but it can be looked at
    (images / "wide.txt").write_text("a panorama")
    Image.new("RGB", (60, 60), "green").save(images / "mute.png")
    (images / "metadata.jsonl").write_text('{"file_name": "gone.png", "text": "x"}\n')
    (images / "lonely.txt").write_text("a caption without its picture")
    (images / "clip.srt").write_bytes(b"words")
    (images / "scene").write_bytes(b"words")
    out = tmp_path_factory.mktemp("out") / "out"
    config = fakes.config(images, out, resolutions=(128, 256), max_distortion=1.3, max_upscale=4.0)
    pipeline.run(config, fakes.encoders())
    return images, out, (out / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def html(run):
    return run[2]


def test_the_page_is_well_formed_and_needs_no_network_and_no_script(html):
    found = _Balanced(html)
    assert not found.open
    assert not {"script", "link", "iframe", "object", "base", "form", "a"} & {tag for tag, _ in found.tags}
    names = {name for _, attributes in found.tags for name in attributes}
    assert not [name for name in names if name.startswith("on") or name in ("href", "xlink:href", "srcset", "action")]
    sources = [attributes["src"] for tag, attributes in found.tags if tag == "img"]
    assert sources
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert not re.search(r"https?:|//|url\(|@import", re.sub(r"base64,[^\"]*", "", html))
    assert "prefers-color-scheme:dark" in html
    assert 'name="viewport"' in html


def test_what_users_wrote_is_shown_as_text_and_keeps_to_its_place(html):
    assert "<img src=x" not in html
    assert "&lt;img src=x onerror=alert(1)&gt; &amp; &quot;q&quot; [U+202E]" in html
    assert "&lt;script&gt;.png" in html
    shown = 'a<b>&"c"[U+202E]gnp.␊.png'
    isolated = "".join(_Balanced(html).isolated)
    assert shown in isolated
    assert "<script>.png" in isolated
    assert "cake left on a plate" in isolated
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", html)


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("a\x00b", "a␀b"),
        ("a\r\nb", "a␍␊b"),
        ("\u202egpj.exe", "[U+202E]gpj.exe"),
        ("\u2067x\u2069", "[U+2067]x[U+2069]"),
        ("\ud800", "[U+D800]"),
        ("x\x85\ufeff\x7f", "x[U+0085][U+FEFF]␡"),
        ("'\"<&>", "&#x27;&quot;&lt;&amp;&gt;"),
        ("שלום مرحبا 猫 👩‍🚀", "שלום مرحبا 猫 👩‍🚀"),
    ],
)
def test_text_is_shown_letter_by_letter(given, shown):
    assert page.text(given) == shown
    shown.encode("utf-8")


def test_every_file_is_accounted_for(run):
    images, out, html = run
    files = [path for path in images.iterdir() if path.suffix not in (".txt", ".jsonl")] + [images / "lonely.txt"]
    encoded = records.load_dataset(out / "128")["count"]
    others = 2
    words = _words(html)
    assert f"{len(files)} files={encoded} encoded+{len(files) - encoded - others} refused+{others} others" in words
    assert encoded == 9
    assert "1 line of caption lists could not be used." in words
    assert "9 pictures at 128" in words


def test_other_files_are_listed_by_suffix(html):
    part = _part(html, "Other files")
    rows = re.findall(r"<tr><td><bdi>(.*?)</bdi></td>.*?<td class=n>(\d+)</td></tr>", part)
    assert rows == [("no suffix", "1"), ("srt", "1")]
    assert "<bdi>x&lt;y</bdi>" in report._others({"x<y": 2})


def test_refused_pictures_stand_by_reason_with_a_thumbnail_or_a_placeholder(html):
    part = _part(html, "Left out")
    blocks = re.split(r"<h3", part)[1:]
    of = {
        name: next(block for block in blocks if name in block)
        for name in ("wide.png", "mute.png", "&lt;script&gt;.png")
    }
    assert 'src="data:image/jpeg;base64,' in of["wide.png"]
    assert 'src="data:image/jpeg;base64,' in of["mute.png"]
    assert 'class="lost"' in of["&lt;script&gt;.png"]
    assert "<img" not in of["&lt;script&gt;.png"]
    for name in ("metadata.jsonl:1", "lonely.txt"):
        assert next(block for block in blocks if name in block).count('class="lost"') == 0
    table = part[: part.index("</table>")]
    assert sum(map(int, re.findall(r"<td class=n>(\d+)</td>", table))) == 5


def test_the_stretch_is_that_of_numpy(run):
    images, out, html = run
    factors = []
    for bucket in records.load_dataset(out / "256")["buckets"]:
        width, height = map(int, bucket.split("x"))
        for record in records.open_bucket(out / "256", bucket):
            with Image.open(images / record["id"].decode()) as image:
                factors.append(max(ratio := image.width * height / image.height / width, 1 / ratio))
    percents = 100 * (np.array(factors) - 1)
    assert percents.max() > 1
    part = _words(_part(html, "Stretch"))
    assert f"median {np.median(percents):.1f}%" in part
    assert f"95% below {np.quantile(percents, 0.95):.1f}%" in part
    assert f"largest {percents.max():.1f}%" in part


def test_caption_lengths_and_cuts_are_named(html):
    part = _part(html, "Caption lengths")
    assert "1 caption longer than the limit of 8 tokens" in part
    assert "<h3>Cut to the limit</h3><ul><li><bdi>same.bmp</bdi>" in part
    assert "10 tokens" in part
    counts = dict(re.findall(r"<title>(\d+) to \d+ tokens: (\d+)</title>", part))
    assert counts == {"5": "1", "6": "7", "8": "1"}


def test_the_swap_is_shown_with_examples(html):
    part = _part(html, "Left and right")
    assert "<b>6</b> sides swapped" in part
    assert "<b>1</b> left or right in another sense: kept" in part
    assert 'cake <mark class="kept">left</mark> on a plate' in part
    assert "dark on the <mark>left</mark></bdi><br><bdi>picture" in part


def test_exact_duplicates_are_named(html):
    part = _part(html, "Exact duplicates")
    assert "kept.png = same.bmp" in part
    assert "1 picture too many, in 1 group" in part


def test_samples_are_decoded_beside_the_original_and_the_mirror_image(html):
    part = _part(html, "What the model will see")
    cards = part.split('<div class="sample">')[1:]
    assert len(cards) == 9
    assert part.count("<details>") == 1
    for card in cards:
        assert card.count("<img") == (3 if "mirrored" in card and "never" not in card else 2)
    evil = next(card for card in cards if "onerror" in card)
    assert "never<br>flipped" in evil


def test_histograms_count_the_true_latents(run):
    _, out, html = run
    dataset = records.load_dataset(out / "128")
    rows = [row for bucket in dataset["buckets"] for row in records.open_bucket(out / "128", bucket)]
    mean, std = dataset["latent_mean"], dataset["latent_std"]
    found = facts.latents(rows, mean, std)
    values = np.concatenate([row["latent"].astype(np.float64).reshape(-1, 4) for row in rows])
    assert found.total == len(values)
    assert found.pictures == 9
    for channel in range(4):
        low, high = (mean[channel] + sign * facts.SPREAD * std[channel] for sign in (-1, 1))
        assert found.counts[channel].tolist() == np.histogram(values[:, channel], facts.BINS, (low, high))[0].tolist()
        assert found.beyond[channel] == (abs(values[:, channel] - mean[channel]) > 3 * std[channel]).sum()
        assert f"{mean[channel]:+.3f} ± {std[channel]:.3f}" in html
    assert f"Drawn from {len(values):,} values a channel, of 9 latents" in html


def test_a_padded_sample_is_shown_without_its_padding():
    pixels = np.arange(32 * 16 * 3).reshape(32, 16, 3)
    mask = np.array([[0, 0], [1, 1], [1, 1], [0, 0]], np.uint8)
    assert np.array_equal(readback._unpadded(pixels, mask), pixels[8:24])
    assert readback._unpadded(pixels, np.zeros((0, 0))) is pixels


def test_pictures_left_out_at_a_resolution_are_counted_and_found(tmp_path):
    """A record's place in its bucket differs between resolutions once a picture is left out of one."""
    images = fakes.photographs(tmp_path / "in", 5)
    for number in range(3):
        Image.new("RGB", (384, 256), (90 * number, 40, 200)).save(images / f"large-{number}.png")
        (images / f"large-{number}.txt").write_text(f"large {number}")
    config = fakes.config(images, tmp_path / "out", resolutions=(128, 512), max_upscale=2.0)
    pipeline.run(config, fakes.encoders())
    html = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert "<h1>8 pictures at 128, 3 at 512</h1>" in html
    assert "5 pictures left out at 512" in html
    rows = re.findall(r"<td><b>(\d+)</b></td><td class=n>(\d+)</td><td class=n>(\d+)</td>", _part(html, "Resolutions"))
    assert rows == [("128", "8", "0"), ("512", "3", "5")]


def test_how_long_the_encoders_waited_is_said():
    legs = [{"pictures": 30, "seconds": 10.0, "waited": 1.0}, {"pictures": 10, "seconds": 10.0, "waited": 4.0}]
    words = _words(report._time([*legs, {"pictures": 0, "seconds": 0.0, "waited": 0.0}]))
    assert "40 pictures in 20 s, 2.0 a second" in words
    assert "25.0% of the time" in words


def test_the_title_groups_resolutions_with_as_many_pictures():
    assert report._title({256: 1200, 512: 1200, 1024: 7}) == "1,200 pictures at 256 and 512, 7 at 1024"
    assert report._title({128: 1, 256: 1, 512: 1}) == "1 picture at 128, 256 and 512"


def test_a_repeated_build_gives_the_same_bytes(tmp_path):
    images = fakes.photographs(tmp_path / "in", 4)
    config = fakes.config(images, tmp_path / "out")
    pipeline.run(config, fakes.encoders())
    first = (tmp_path / "out" / "report.html").read_bytes()
    (tmp_path / "out" / "report.html").unlink()
    pipeline.run(config, fakes.encoders())
    assert (tmp_path / "out" / "report.html").read_bytes() == first


def test_a_page_about_twenty_thousand_pictures_stays_small(monkeypatch):
    rng = np.random.default_rng(0)
    names = [f"folder {number % 40}/photo-{number:05d} <&>.jpg" for number in range(20_000)]
    wide = rng.integers(200, 6000, 20_000).tolist()
    jobs, parts = [], []
    for start in range(0, 20_000, 1000):
        shape = ((8, 8), (8, 6), (6, 8))[start // 1000 % 3]
        entries = [(names[i], wide[i], round(wide[i] * shape[1] / shape[0] * 1.05)) for i in range(start, start + 1000)]
        jobs.append(SimpleNamespace(shape=shape, number=start // 1000, entries=tuple(entries)))
        rows = [
            [name, f"{i % 9000}", 1 + i % 300, 0, [128] if i % 3 else [128, 256]]
            for i, (name, *_) in enumerate(entries)
        ]
        parts.append({"records": rows, "truncated": [name for name, *_ in entries[::2]]})
    slope = np.linspace(40, 200, 256)[:, None, None]
    grain = np.clip(slope + rng.normal(0, 12, (256, 256, 3)), 0, 255).astype(np.uint8)  # a grainy photograph
    record = {"latent": np.zeros((4, 4, 4)), "latent_flip": np.zeros((4, 4, 4)), "mask": np.zeros((0, 0))}
    record |= {"caption": "left " * 400, "caption_flip": "right " * 400}
    context = SimpleNamespace(
        config=ConfigDict({"seed": 0, "flip": True, "max_distortion": 1.5}),
        folder=pipeline.Path("/photographs"),
        items={name: SimpleNamespace(path=pipeline.Path(name), flip=True) for name in names},
        cells=8,
        others={f"suffix{number}": number + 1 for number in range(500)},
        legs=[{"pictures": 1000, "seconds": 60.0, "waited": 6.0}] * 400,
        encoders=fakes.encoders(),
        bucket=lambda shape, size: f"{shape[0]}x{shape[1]}",
        root=lambda size: pipeline.Path(str(size)),
        thumbnails=lambda paths, side: [readback.images.thumbnail(grain, side) for _ in paths],
    )
    context.encoders.vae.decode = lambda latents: np.stack([grain, grain])
    opened = []
    monkeypatch.setattr(records, "open_bucket", lambda root, name: opened.append(name) or [record] * 20_000)
    refused = [Problem(f"{i}.jpg", "decode", f"reason {chr(97 + i % 26)}: detail {i}") for i in range(20_000)]
    dataset = {
        "latent_mean": [0.0] * 4,
        "latent_std": [1.0] * 4,
        "latent_count": 9,
        "fingerprint": {"vae": {"id": "x"}},
    }
    datasets = {128: dataset | {"count": 20_000}, 256: dataset | {"count": 6_680}}
    plan = {"inputs": {name: f"picture {i % 5000}, dark on the left" for i, name in enumerate(names)}}
    plan["flips"] = mirrored.decide(plan["inputs"])
    html = report.build(context, plan, jobs, parts, refused, datasets)
    assert not _Balanced(html).open
    assert opened
    assert len(html) < 5_000_000
    assert _part(html, "Left out").count("<img") == 48
    assert "more in quarantine.jsonl" in html
    assert "165,250 files=20,000 encoded+20,000 refused+125,250 others" in _words(html)
