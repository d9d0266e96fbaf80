"""The page about an encoded data set: complete, safe, and one file."""

import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from encode import pipeline
from tests.encode import fakes

EVIL = '<img src=x onerror=alert(1)> & "q" \u202eleft'
VOID = {"meta", "img", "rect", "line"}


class _Balanced(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.tags = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    images = fakes.photographs(tmp_path_factory.mktemp("in"), 6)
    Image.new("RGB", (90, 60), "red").save(images / "a<b>&.png")
    (images / "a<b>&.txt").write_text(EVIL, encoding="utf-8")
    (images / "kept.txt").write_text("cake left on a plate")
    Image.new("RGB", (90, 60), "blue").save(images / "kept.png")
    (images / "<script>.png").write_bytes(b"nothing")
    (images / "<script>.txt").write_text("nothing")
    out = tmp_path_factory.mktemp("out") / "out"
    pipeline.run(fakes.config(images, out, resolutions=(128, 256)), fakes.encoders())
    return (out / "report.html").read_text(encoding="utf-8")


def test_the_page_is_well_formed_and_needs_no_network(page):
    parser = _Balanced()
    parser.feed(page)
    assert not parser.open
    assert not {"script", "link", "iframe"} & {tag for tag, _ in parser.tags}
    sources = [attributes["src"] for tag, attributes in parser.tags if tag == "img"]
    assert sources
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert not re.search(r"https?://|url\(", page)
    assert "prefers-color-scheme:dark" in page


def test_what_users_wrote_is_shown_as_text(page):
    assert "<img src=x" not in page
    assert "&lt;img src=x onerror=alert(1)&gt; &amp; &quot;q&quot;" in page
    assert "a&lt;b&gt;&amp;.png" in page
    assert "&lt;script&gt;.png" in page


def test_the_counts_are_right(page):
    assert "<b>8</b><span>pictures encoded</span>" in page
    assert "<b>1</b><span>inputs refused</span>" in page
    assert "<b>0</b><span>exact duplicates</span>" in page
    assert page.count('class="sample"') == 8
    assert "left or right in another sense: kept" in page
    assert "never flipped" in page
    assert "dark on the left  →  picture 0, dark on the right" in page


def test_channels_are_drawn_at_each_resolution(page):
    assert page.count("<title>channel 0: mean") == 2
    assert page.count('class="wide"') == 2


def test_a_repeated_build_gives_the_same_bytes(tmp_path):
    images = fakes.photographs(tmp_path / "in", 4)
    config = fakes.config(images, tmp_path / "out")
    pipeline.run(config, fakes.encoders())
    first = (tmp_path / "out" / "report.html").read_bytes()
    (tmp_path / "out" / "report.html").unlink()
    pipeline.run(config, fakes.encoders())
    assert (tmp_path / "out" / "report.html").read_bytes() == first
