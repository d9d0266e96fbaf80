from hypothesis import given
from hypothesis import strategies as st
from PIL import ImageFont

from encode import writing


def test_letters_that_pillow_s_font_lacks_take_one_that_is_installed(monkeypatch):
    class Font:
        """Draws the letters it is given, a box for others."""

        def __init__(self, letters):
            self.letters = letters

        def getmask(self, letter):
            return letter.encode() if letter in self.letters else b"box"

    own, wide, widest = Font("kite "), Font("kiteü "), Font("kiteüЖ ")
    monkeypatch.setattr(writing, "_fonts", lambda size: [own, wide, widest])
    assert writing.font(11, ["kite", "tike"]) is own
    assert writing.font(11, ["kite", "kütei"]) is wide
    assert writing.font(11, ["Жü"]) is widest
    assert writing.font(11, ["中"]) is own  # none has it


def test_pillow_s_own_font_is_the_first_and_lacks_an_umlaut():
    first = writing._fonts(12)[0]
    assert [writing._missing(first, letter) for letter in "aZ,…ü"] == [False] * 4 + [True]


@given(st.text(st.sampled_from("abWil. \n"), max_size=200), st.integers(20, 300))
def test_lines_fit_and_say_where_they_were_cut(text, width):
    font = ImageFont.load_default(12)
    lines = writing.lines(text, font, width)
    assert len(lines) <= 3 and all(font.getlength(line.removesuffix("…")) <= width for line in lines)
    whole = "".join(text.split())
    if "".join("".join(lines).split()) != whole:
        assert lines[-1].endswith("…") and whole.startswith("".join("".join(lines)[:-1].split()))
