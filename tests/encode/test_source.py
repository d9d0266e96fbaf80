"""A folder as people have it -> pictures with captions, and every problem by name."""

import codecs
import hashlib
import io
import json
import logging
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from encode import folder, formats, sidecars
from encode.records import InputError
from encode.source import Item, Problem, walk

PNG = (lambda file: (Image.new("RGB", (32, 32), (220, 30, 30)).save(file, "PNG"), file.getvalue())[1])(io.BytesIO())


def _picture(path, caption=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(PNG)  # whatever its suffix: the content is the decoder's affair
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")


def _found(folder, **more):
    return {item.id: item.captions for item in walk(folder, **more).items}


def _reasons(folder):
    return {problem.file: problem.reason for problem in walk(folder).problems}


def test_captions_come_from_each_of_the_three_places(tmp_path):
    for name in ("a.png", "b.png", "c.png", "sub/d.png", "sub/e.png"):
        _picture(tmp_path / name)
    rows = [{"file_name": "a.png", "text": "from the list"}, {"file_name": "sub/d.png", "text": ["one", "two"]}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "sub" / "metadata.jsonl").write_text(json.dumps({"file_name": "e.png", "text": "beside"}))
    (tmp_path / "b.json").write_text(json.dumps({"caption": "from json"}))
    (tmp_path / "c.txt").write_text("from text")
    assert _found(tmp_path) == {
        "a.png": ("from the list",),
        "b.png": ("from json",),
        "c.png": ("from text",),
        "sub/d.png": ("one", "two"),
        "sub/e.png": ("beside",),
    }


def test_one_of_several_captions_is_chosen_by_seed_and_id(tmp_path):
    for number in range(40):
        _picture(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.json").write_text(json.dumps({"text": ["one", "two"]}))
    items = walk(tmp_path).items
    first = [item.caption(0) for item in items]
    assert first == [item.caption(0) for item in walk(tmp_path).items]
    assert set(first) == {"one", "two"}
    assert first != [item.caption(1) for item in items]


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\r", "\r\n\r\n", " \t\n", "\u2028", "\u00a0"])
@pytest.mark.parametrize(
    ("mark", "encoding"),
    [
        (b"", "utf-8"),
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF8 * 2, "utf-8"),  # saved twice by an editor
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
    ],
)
def test_captions_are_read_in_any_unicode_and_stripped(tmp_path, mark, encoding, end):
    _picture(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(mark + f" café 猫 🐈{end}".encode(encoding))
    assert _found(tmp_path) == {"a.png": ("café 猫 🐈",)}


def test_a_json_without_the_key_and_one_that_is_none_say_what_is_there(tmp_path):
    for name, text in (("a", '{"captions": "a cat", "tags": 3}'), ("b", '{"caption": "a cat",}')):
        Image.new("RGB", (64, 64)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.json").write_text(text)
    Image.new("RGB", (64, 64)).save(tmp_path / "c.png")
    (tmp_path / "c.txt").write_text("a dog")
    reasons = {problem.file: problem.reason for problem in walk(tmp_path).problems}
    assert (
        reasons["a.png"]
        == "a.json: no caption: neither the key \"caption\" nor \"text\" is in it, but 'captions', 'tags'"
    )
    assert reasons["b.png"].startswith("b.json: not a JSON object (") and ", line 1, column " in reasons["b.png"]


def test_entities_of_web_pages_are_the_signs_that_they_mean(tmp_path):
    for name, text in (
        ("a", "&quot;OPEN&quot; above a door"),
        ("b", "R&amp;B, AT&T; 5 &lt; 7 &copy 2020 &#39;so&#x27; &notit; &#0;"),
        ("c", f"&#{5_000 * '9'}; &#00000038; "),
    ):
        _picture(tmp_path / f"{name}.png", text)
    assert _found(tmp_path) == {
        "a.png": ('"OPEN" above a door',),
        "b.png": ("R&B, AT&T; 5 < 7 &copy 2020 'so' &notit; &#0;",),
        "c.png": (f"&#{5_000 * '9'}; &",),
    }


BAD_TEXTS = {
    "windows": (b"the dog\x92s ball", "not UTF-8 (byte 7)"),
    "latin": ("Café".encode("latin-1"), "not UTF-8"),
    "japanese": ("猫と犬".encode("cp932"), "not UTF-8"),
    "odd": (b"\xff\xfea", "not UTF-16"),
    "half": (codecs.BOM_UTF16_LE + b"\x00\xd8a\x00", "not UTF-16"),
    "wide": ("a cat".encode("utf-32"), "UTF-32"),
    "wide-be": (codecs.BOM_UTF32_BE + "a cat".encode("utf-32-be"), "UTF-32"),
    "markless": ("a cat".encode("utf-16-le"), "NUL"),
    "nul": (b"a\0cat", "NUL"),
    "surrogate": (b"a\xed\xa0\x80cat", "not UTF-8"),
    "overlong": (b"\xc0\xaf", "not UTF-8"),
    "empty": (b"", "the caption is empty"),
    "lines": (b"\n\n\n", "the caption is empty"),
    "mark": (codecs.BOM_UTF8, "the caption is empty"),
    "unseen": ("\u200b\ufeff".encode(), "the caption is empty"),
    "blank": ("\u2067\u3164\ufe0f \u2800\u00ad".encode(), "the caption is empty"),
    "huge": (b"cat " * 300_000, "too large for a caption (over 1 MiB)"),
}


def test_each_bad_text_is_refused_by_name_and_the_good_ones_stay(tmp_path):
    for number in range(10):
        _picture(tmp_path / f"good{number}.png", "good")
    for name, (data, _) in BAD_TEXTS.items():
        _picture(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_bytes(data)
    reasons = _reasons(tmp_path)
    assert len(_found(tmp_path)) == 10
    for name, (_, reason) in BAD_TEXTS.items():
        assert f"{name}.txt: " in reasons[f"{name}.png"]
        assert reason in reasons[f"{name}.png"]
    assert len(reasons) == len(BAD_TEXTS)


DEEP = "[" * 100_000
BAD_JSON = {
    "": "not a JSON object",
    "null": "not a JSON object",
    "[1]": "not a JSON object",
    '"a cat"': "not a JSON object",
    "{": "not a JSON object",
    DEEP: "not a JSON object",
    f'{{"caption": {DEEP}': "not a JSON object",
    '{"caption": ' + "9" * 5000 + "}": "not a JSON object",
    '{"caption": 3}': "not text",
    '{"caption": null}': "not text",
    '{"caption": {"en": "a cat"}}': "not text",
    '{"caption": ["a cat", 3]}': "not text",
    '{"caption": [["a cat"]]}': "not text",
    '{"caption": []}': "empty",
    '{"caption": ["", " "]}': "empty",
    '{"caption": "a \\ud800 cat"}': "half a character",
    '{"caption": "a \\u0000 cat"}': "NUL",
    "{}": "no caption",
    '{"Caption": "a cat"}': "no caption",
    '{"caption": "a cat", "flip": "no"}': 'flip is neither true nor false: "no"',
    '{"caption": "a cat", "flip": 0}': "flip is neither true nor false: 0",
    '{"caption": "a cat", "flip": null}': "flip is neither true nor false: null",
}


def test_each_bad_json_is_refused_by_name(tmp_path):
    _picture(tmp_path / "good.png", "good")
    for number, text in enumerate(BAD_JSON):
        _picture(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.json").write_text(text)
    reasons = _reasons(tmp_path)
    for number, (text, reason) in enumerate(BAD_JSON.items()):
        assert reason in reasons[f"{number}.png"], text[:80]
        assert reason == "no caption" or f"{number}.json" in reasons[f"{number}.png"]
    assert list(_found(tmp_path)) == ["good.png"]


def test_of_a_key_that_is_there_twice_the_last_counts_and_several_captions_are_each_kept_once(tmp_path):
    _picture(tmp_path / "a.png")
    _picture(tmp_path / "b.png")
    (tmp_path / "a.json").write_text('{"caption": "first", "caption": "last"}')
    (tmp_path / "b.json").write_text('{"caption": ["one", " one ", "two", ""]}')
    assert _found(tmp_path) == {"a.png": ("last",), "b.png": ("one", "two")}


def test_pictures_may_be_kept_from_being_mirrored(tmp_path):
    for name in "abcdef":
        _picture(tmp_path / f"{name}.png", "text")
    (tmp_path / "b.json").write_text('{"flip": false}')
    (tmp_path / "c.json").write_text('{"caption": "c", "flip": false}')
    rows = [
        {"file_name": "d.png", "text": "d", "flip": False},
        {"file_name": "e.png", "flip": False},
        {"file_name": "f.png", "text": "f", "flip": True},
    ]
    (tmp_path / "f.json").write_text('{"flip": false}')
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert {item.id[0]: item.flip for item in walk(tmp_path).items} == dict(zip("abcdef", [True] + [False] * 5))
    assert _found(tmp_path)["e.png"] == ("text",)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "d.png", "text": "d", "flip": "false"}')
    assert _reasons(tmp_path) == {"d.png": 'metadata.jsonl: flip is neither true nor false: "false" (line 1)'}


def test_rows_without_picture_and_pictures_without_row_are_told_apart(tmp_path):
    _picture(tmp_path / "a.png")
    _picture(tmp_path / "b.png")
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "a.png", "text": "a"}\n{"file_name": "gone.png", "text": "x"}\nnonsense\n'
    )
    reasons = _reasons(tmp_path)
    assert "names gone.png" in reasons["metadata.jsonl:2"]
    assert "not a JSON object" in reasons["metadata.jsonl:3"]
    assert "no caption" in reasons["b.png"]
    assert len(reasons) == 3


def test_the_same_stem_is_two_samples_and_folders_keep_their_own(tmp_path):
    _picture(tmp_path / "cat.png", "a cat")
    _picture(tmp_path / "cat.jpg")
    _picture(tmp_path / "a/1.png", "first")
    _picture(tmp_path / "b/1.png", "second")
    assert _found(tmp_path) == {
        "cat.png": ("a cat",),
        "cat.jpg": ("a cat",),
        "a/1.png": ("first",),
        "b/1.png": ("second",),
    }


@pytest.mark.parametrize(("listed", "stored"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_accented_names_match_composed_or_decomposed(tmp_path, listed, stored):
    _picture(tmp_path / unicodedata.normalize(stored, "Dalí.png"))
    row = {"file_name": unicodedata.normalize(listed, "Dalí.png"), "text": "a painter"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    assert list(_found(tmp_path).values()) == [("a painter",)]
    assert not walk(tmp_path).problems
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / unicodedata.normalize(listed, "Dalí.txt")).write_text("beside")
    assert list(_found(tmp_path).values()) == [("beside",)]
    _picture(tmp_path / unicodedata.normalize(listed, "Dalí.png"))
    assert len(_found(tmp_path)) == 2


def test_litter_and_our_own_files_are_no_inputs(tmp_path):
    _picture(tmp_path / "cat.png", "a cat")
    litter = (
        ".DS_Store",
        "._cat.png",
        "Thumbs.db",
        "desktop.ini",
        "Icon\r",
        "__MACOSX/cat.png",
        "@eaDir/cat.png/SYNO.jpg",
        ".a/b.png",
    )
    for name in litter:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(b"\x00\x05\x16\x07" * 1024)
    np.save(tmp_path / "cat.dino.npy", np.ones(3, np.float32))
    _picture(tmp_path / "out/thumbnail.png", "mine")
    collection = walk(tmp_path, tmp_path / "out")
    assert [item.id for item in collection.items] == ["cat.png"]
    assert collection.items[0].vision == tmp_path / "cat.dino.npy"
    assert not collection.problems
    assert not collection.others


@pytest.mark.parametrize(
    "marks",
    [
        ["plan.json", "parts/832x1216-00000.json"],  # OUT of a run that was stopped
        ["quarantine.jsonl", "report.html", "plan.json"],
        ["dataset.json", "index-832x1216-00000.npy"],  # one resolution, copied
        ["config.json", "checkpoints/1/x", "samples/000100.png"],  # of the training
    ],
)
def test_the_output_of_an_earlier_run_is_no_input(tmp_path, marks):
    _picture(tmp_path / "cat.png", "a cat")
    before = walk(tmp_path)
    for mark in [*marks, "thumbnail.png", "thumbnail.txt"]:
        (tmp_path / "old run" / mark).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "old run" / mark).write_bytes(PNG if mark.endswith(".png") else b"x")
    assert walk(tmp_path) == before


def test_a_picture_called_plan_or_config_is_a_picture(tmp_path):
    for name in ("plan", "config", "dataset", "report", "index-1"):
        _picture(tmp_path / "house" / f"{name}.png")
        (tmp_path / "house" / f"{name}.json").write_text(json.dumps({"caption": name}))
    assert len(_found(tmp_path)) == 5


def test_spaces_capitals_and_missing_suffixes_do_not_matter(tmp_path):
    _picture(tmp_path / "my photos/IMG 1.PNG", "one")
    _picture(tmp_path / "x.png")
    os.rename(tmp_path / "x.png", tmp_path / "bare")
    (tmp_path / "bare.txt").write_text("two")
    assert _found(tmp_path) == {"my photos/IMG 1.PNG": ("one",), "bare": ("two",)}


def test_linked_folders_are_followed_once(tmp_path):
    _picture(tmp_path / "store/a.png", "a")
    os.symlink(tmp_path / "store", tmp_path / "store" / "loop")
    (tmp_path / "in").mkdir()
    os.symlink(tmp_path / "store", tmp_path / "in" / "linked")
    assert _found(tmp_path / "in") == {"linked/a.png": ("a",)}


def test_a_name_that_is_no_utf8_is_refused(tmp_path):
    _picture(tmp_path / "a.png", "a")
    os.rename(os.fsencode(tmp_path / "a.png"), os.fsencode(tmp_path) + b"/\xe9.png")
    os.rename(os.fsencode(tmp_path / "a.txt"), os.fsencode(tmp_path) + b"/\xe9.txt")
    _picture(tmp_path / "b.png", "b")
    assert list(_found(tmp_path)) == ["b.png"]
    assert _reasons(tmp_path) == {
        f"\\xe9.{suffix}": "the file name is not UTF-8; rename it" for suffix in ("png", "txt")
    }


def test_four_mistakes_have_four_sentences(tmp_path):
    (tmp_path / "empty").mkdir()
    _picture(tmp_path / "bare/a.png")
    _picture(tmp_path / "bad/a.png", " ")
    said = []
    for name, words in {
        "gone": "does not exist",
        "empty": "is empty",
        "bare": "no captions at all",
        "bad": "every input",
    }.items():
        with pytest.raises(InputError, match=words) as error:
            walk(tmp_path / name)
        said.append(str(error.value))
    assert len(set(said)) == 4


def test_nothing_of_the_users_is_changed(tmp_path):
    _picture(tmp_path / "a.png", "a")
    before = {path: hashlib.sha256(path.read_bytes()).digest() for path in tmp_path.iterdir()}
    walk(tmp_path)
    assert before == {path: hashlib.sha256(path.read_bytes()).digest() for path in tmp_path.iterdir()}


ROWS = [
    ('{"file_name": "gone.png", "text": "x"}', "names gone.png, which is not among the pictures"),
    ('{"file_name": "../secret.png", "text": "x"}', "outside the folder"),
    ('{"file_name": "sub/../../secret.png", "text": "x"}', "outside the folder"),
    ('{"file_name": "/etc/passwd", "text": "x"}', "outside the folder"),
    ('{"file_name": "..\\\\secret.png", "text": "x"}', "outside the folder"),
    ('{"file_name": "a.png\\u0000.png", "text": "x"}', "outside the folder"),
    ('{"file_name": "", "text": "x"}', "not among the pictures"),
    ('{"file_name": "sub", "text": "x"}', "not among the pictures"),
    ('{"file_name": "a.txt", "text": "x"}', "not among the pictures"),
    ('{"file_name": "\\ud800\\n.png", "text": "x"}', "names \\ud800\\n.png"),
    ('{"file_name": 3, "text": "x"}', "not a JSON object with file_name and text"),
    ('{"text": "x"}', "not a JSON object with file_name and text"),
    ("a.png,x", "not a JSON object with file_name and text"),
    ('["a.png", "x"]', "not a JSON object with file_name and text"),
]


def test_each_bad_row_is_refused_by_its_line_and_the_good_ones_stay(tmp_path):
    _picture(tmp_path / "secret.png", "not to be read")
    home = tmp_path / "images"
    _picture(home / "sub/a.png")
    _picture(home / "a.png")
    lines = [line.encode() for line, _ in ROWS]
    lines += [b"", b"   ", b'{"file_name": "a.png", "text": "it\x92s"}', b'{"file_name": "a.png", "text": "good"}\r']
    lines += [b'{"file_name": "sub\\\\a.png", "text": "made on Windows"}']
    (home / "metadata.jsonl").write_bytes(b"\n".join(lines))
    assert _found(home) == {"a.png": ("good",), "sub/a.png": ("made on Windows",)}
    reasons = _reasons(home)
    for number, (line, reason) in enumerate(ROWS, 1):
        assert reason in reasons[f"metadata.jsonl:{number}"], line
        json.dumps(reasons[f"metadata.jsonl:{number}"], ensure_ascii=False).encode("utf-8")
        assert "\n" not in reasons[f"metadata.jsonl:{number}"]
    assert "not UTF-8" in reasons[f"metadata.jsonl:{len(ROWS) + 3}"]
    assert len(reasons) == len(ROWS) + 1


def test_rows_may_name_a_picture_by_its_whole_path_or_from_a_folder_beside(tmp_path):
    _picture(tmp_path / "a.png")
    _picture(tmp_path / "b.png")
    (tmp_path / "lists").mkdir()
    rows = [{"file_name": str(tmp_path / "a.png"), "text": "a"}, {"file_name": "../b.png", "text": "b"}]
    (tmp_path / "lists/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert _found(tmp_path) == {"a.png": ("a",), "b.png": ("b",)}


def test_rows_with_whole_paths_hold_through_a_link_and_a_roundabout_way(tmp_path):
    root = tmp_path / "photographs"
    _picture(root / "a.png")
    os.symlink(root, tmp_path / "link")
    for images, named in (
        ("photographs/../link", "link"),
        ("link", "photographs"),
        ("link/../photographs", "photographs"),
    ):
        row = {"file_name": str(tmp_path / named / "a.png"), "text": "a"}
        (root / "metadata.jsonl").write_text(json.dumps(row))
        assert _found(tmp_path / images) == {"a.png": ("a",)}, (images, named)


def test_rows_of_which_none_fits_are_named_where_no_picture_has_a_caption(tmp_path):
    _picture(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "images/a.png", "text": "a"}))
    with pytest.raises(InputError, match=r"no row of a metadata.jsonl .* metadata.jsonl:1, names images/a.png"):
        walk(tmp_path)


def test_a_caption_that_a_row_overrules_is_told(tmp_path, caplog):
    _picture(tmp_path / "a.png", "new words")
    _picture(tmp_path / "b.png", "b")
    rows = [{"file_name": "a.png", "text": "old words"}, {"file_name": "b.png", "text": "b"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert _found(tmp_path) == {"a.png": ("old words",), "b.png": ("b",)}
    assert "1 pictures have another caption in NAME.txt" in caplog.text and "a.png" in caplog.text


@pytest.mark.parametrize("broken", ['{"flip": false,}', '{"flip": false, "by": "René"}'])
def test_a_broken_file_that_speaks_of_mirroring_is_not_overlooked(tmp_path, broken):
    _picture(tmp_path / "sign.png", "a sign")
    (tmp_path / "sign.json").write_bytes(broken.encode("latin-1"))
    _picture(tmp_path / "other.png", "another")
    (tmp_path / "other.json").write_text("[1, 2]")
    assert _found(tmp_path) == {"other.png": ("another",)}
    assert "sign.json: " in _reasons(tmp_path)["sign.png"]


def test_backups_and_previews_of_a_picture_are_no_samples_of_their_own(tmp_path):
    _picture(tmp_path / "edit.jpg", "after")
    for name in ("edit.jpg_original", "edit.jpg~", "edit.THM", "edit.jpg.bak", "lone.backup", "edit", "edit.v2"):
        _picture(tmp_path / name)
    (tmp_path / "lone.txt").write_text("alone")
    for name in ("@Recycle", "#snapshot", "lost+found"):
        _picture(tmp_path / name / "edit.jpg", "before")
    collection = walk(tmp_path)
    assert [item.id for item in collection.items] == ["edit", "edit.jpg", "edit.v2", "lone.backup"]
    assert collection.others == {"bak": 1, "jpg_original": 1, "jpg~": 1, "thm": 1}


def test_several_rows_for_one_picture_are_several_captions_and_a_bad_one_costs_itself(tmp_path):
    _picture(tmp_path / "a.png")
    _picture(tmp_path / "b.png")
    rows = [("a.png", "one"), ("a.png", ["two", "one"]), ("a.png", " "), ("./a.png", "three"), ("b.png", 3)]
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in rows]
    (tmp_path / "metadata.jsonl").write_text("\r\n".join(lines))
    assert _found(tmp_path) == {"a.png": ("one", "two", "three")}
    assert _reasons(tmp_path) == {
        "metadata.jsonl:3": "the caption is empty",
        "b.png": "metadata.jsonl: the caption is not text (line 5)",
    }


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_list_of_captions_may_carry_a_mark(tmp_path, encoding):
    _picture(tmp_path / "猫.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "猫.png", "text": "一匹の猫"}\n', encoding=encoding)
    assert _found(tmp_path) == {"猫.png": ("一匹の猫",)}


def test_forty_pictures_without_caption_are_forty_problems(tmp_path):
    for number in range(100):
        _picture(tmp_path / f"{number}.png", "a cat" if number >= 40 else None)
    collection = walk(tmp_path)
    assert len(collection.items) == 60
    assert {problem.file for problem in collection.problems} == {f"{number}.png" for number in range(40)}


def test_formats_that_are_not_read_are_refused_with_their_reason(tmp_path):
    _picture(tmp_path / "a.jpg", "a")
    for name in ("a.CR2", "b.nef", "c.svg", "d.pdf", "e.mp4", "f.exr"):
        (tmp_path / name).write_bytes(b"\x01\x02\x03")
    _picture(tmp_path / "really a picture.pdf", "by its content")
    (tmp_path / "b.txt").write_text("of the raw picture")
    reasons = _reasons(tmp_path)
    assert reasons == {
        name: formats.REFUSED[name[-3:].lower()] for name in ("a.CR2", "b.nef", "c.svg", "d.pdf", "e.mp4", "f.exr")
    }
    assert {problem.stage for problem in walk(tmp_path).problems} == {"format"}
    assert sorted(_found(tmp_path)) == ["a.jpg", "really a picture.pdf"]


def test_every_other_file_is_counted(tmp_path):
    _picture(tmp_path / "IMG_1.heic", "live")
    for name in ("IMG_1.MOV", "IMG_1.AAE", "sub/list.csv", "sub/b.csv", "Makefile", "x.npy", "README.txt", "a.b c"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    os.mkfifo(tmp_path / "pipe.jpg")
    collection = walk(tmp_path)
    assert not collection.problems
    assert collection.others == {"": 2, "aae": 1, "csv": 2, "jpg": 1, "mov": 1, "npy": 1, "txt": 1}
    assert list(collection.others) == sorted(collection.others)


def test_a_caption_without_its_picture_is_a_problem_where_captions_are_kept(tmp_path):
    _picture(tmp_path / "a.png", "a")
    _picture(tmp_path / "c.png")
    (tmp_path / "c.json").write_text('{"caption": "c"}')
    (tmp_path / "papers").mkdir()
    notes = ["README.txt", "LICENSE.txt", "readme-first.txt", "classes.txt", "papers/article.txt", "papers/data.json"]
    for name in [*notes, "renamed.txt", "renamed.json"]:
        (tmp_path / name).write_text("{}")
    collection = walk(tmp_path)
    assert {problem.file for problem in collection.problems} == {"renamed.txt", "renamed.json"}
    assert all("without its picture" in problem.reason for problem in collection.problems)
    assert collection.others == {"json": 1, "txt": 5}


def test_names_with_any_signs_keep_to_one_sample(tmp_path):
    names = [
        "a\nb",
        "tab\t",
        "bell\x07",
        "quote'\"",
        "back\\slash",
        "per%20cent",
        "-rf",
        "🐈",
        "a.b.c",
        " lead",
        "trail ",
        "*?",
        "$HOME",
    ]
    for name in names:
        _picture(tmp_path / f"{name}.png", name)
    assert sorted(_found(tmp_path)) == sorted(f"{name}.png" for name in names)
    assert walk(tmp_path).problems == ()


def test_capital_suffixes_of_captions_do_not_matter(tmp_path):
    _picture(tmp_path / "IMG 1.JPG")
    (tmp_path / "IMG 1.TXT").write_text("one")
    _picture(tmp_path / "IMG 2.JPG")
    (tmp_path / "IMG 2.Json").write_text('{"text": "two"}')
    assert _found(tmp_path) == {"IMG 1.JPG": ("one",), "IMG 2.JPG": ("two",)}


def test_both_composed_and_decomposed_names_keep_their_own_caption(tmp_path):
    both = [unicodedata.normalize(form, "Dalí") for form in ("NFC", "NFD")]
    for name in both:
        _picture(tmp_path / f"{name}.png", f"{len(name)}")
    assert _found(tmp_path) == {f"{name}.png": (str(len(name)),) for name in both}
    rows = [json.dumps({"file_name": f"{name}.png", "text": f"row {len(name)}"}) for name in both]
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    assert _found(tmp_path) == {f"{name}.png": (f"row {len(name)}",) for name in both}


def test_links_to_nothing_and_in_circles_are_named_or_skipped(tmp_path):
    _picture(tmp_path / "a.png", "a")
    _picture(tmp_path / "b.png")
    os.symlink("gone.txt", tmp_path / "b.txt")
    os.symlink("circle", tmp_path / "circle")
    os.symlink("circle.png", tmp_path / "circle.png")
    os.symlink(".", tmp_path / "up")
    os.symlink("gone", tmp_path / "2019")
    (tmp_path / "c").mkdir()
    os.symlink("../c", tmp_path / "c" / "self")
    assert _found(tmp_path) == {"a.png": ("a",)}
    reasons = _reasons(tmp_path)
    assert "b.txt: cannot be read (No such file" in reasons["b.png"]
    assert "no caption" in reasons["circle.png"]
    assert "leads to nothing" in reasons["2019"] and "circle" not in reasons


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_named(tmp_path):
    _picture(tmp_path / "a.png", "a")
    _picture(tmp_path / "b.png", "b")
    (tmp_path / "b.txt").chmod(0)
    (tmp_path / "closed").mkdir(mode=0)
    assert "cannot be read" in _reasons(tmp_path)["b.png"]
    assert "cannot be read" in _reasons(tmp_path)["closed"]


@pytest.mark.parametrize(
    "machine",
    [
        {"LC_ALL": "C"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},  # file names come as surrogates
        {"LC_ALL": "ja_JP.SJIS", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"LC_ALL": "C.UTF-8"},
    ],
)
def test_the_machines_locale_does_not_matter(tmp_path, machine):
    _picture(tmp_path / "café 猫.png", "赤い猫")
    _picture(tmp_path / "café/猫.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "café/猫.png", "text": "白い猫"}\n', encoding="utf-8")
    code = (
        "import json, sys; from encode.source import walk; found = walk(sys.argv[1]);"
        "print(json.dumps([[i.id, i.captions, len(i.path.read_bytes())] for i in found.items] + list(found.problems)))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, tmp_path],
        env={"PATH": os.environ["PATH"], **machine},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        check=True,
    )
    assert json.loads(ran.stdout) == [
        ["café 猫.png", ["赤い猫"], len(PNG)],
        ["café/猫.png", ["白い猫"], len(PNG)],
    ]


def test_a_folder_without_pictures_says_what_it_holds(tmp_path):
    (tmp_path / "films.csv").write_text("x")
    with pytest.raises(InputError, match=r"none of its files is a picture \(1 .csv\)"):
        walk(tmp_path)
    with pytest.raises(InputError, match="is no folder"):
        walk(tmp_path / "films.csv")
    (tmp_path / "a.dng").write_bytes(b"II*\0")
    with pytest.raises(InputError, match=r"every input was refused .*a.dng: camera raw"):
        walk(tmp_path)


def test_a_large_folder_says_where_it_stands(tmp_path, monkeypatch, caplog):
    for number in range(600):
        (tmp_path / f"{number}.png").write_bytes(PNG)
        (tmp_path / f"{number}.txt").write_text("a cat")
    monkeypatch.setattr(folder, "SAY_EVERY", 0.0)
    with caplog.at_level(logging.INFO):
        walk(tmp_path)
    assert "256 of 600 pictures" in caplog.text
    caplog.clear()
    monkeypatch.undo()
    walk(tmp_path)
    assert not caplog.text


BYTES = st.one_of(
    st.binary(max_size=60),
    st.text(max_size=30).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.sampled_from([data for data, _ in BAD_TEXTS.values() if len(data) < 100]),
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=10)
    | st.sampled_from(["a.png", "b.png", "a cat"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["caption", "text", "file_name", "flip", "dino"]), inner, max_size=5)
    ),
    max_leaves=8,
)
JSON = st.one_of(BYTES, VALUES.map(lambda value: json.dumps(value).encode()))
ROW = st.fixed_dictionaries({"file_name": st.sampled_from(["a.png", "b.png", "../a.png"]) | VALUES, "text": VALUES})
LINES = st.lists(st.one_of(JSON, ROW.map(lambda row: json.dumps(row).encode())), max_size=4).map(b"\n".join)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=BYTES, record=JSON, rows=LINES)
def test_whatever_the_files_hold_there_are_items_or_problems(tmp_path, text, record, rows):
    _picture(tmp_path / "good.png", "good")
    for name in ("a.png", "b.png"):
        _picture(tmp_path / name)
    (tmp_path / "a.txt").write_bytes(text)
    (tmp_path / "b.json").write_bytes(record)
    (tmp_path / "metadata.jsonl").write_bytes(rows)
    collection = walk(tmp_path)
    told = {item.id for item in collection.items} | {problem.file for problem in collection.problems}
    assert {"a.png", "b.png", "good.png"} <= told
    for item in collection.items:
        assert isinstance(item, Item)
        assert item.captions
        for caption in item.captions:
            assert caption.encode("utf-8").decode() == caption.strip() != ""
            assert "\0" not in caption
    for problem in collection.problems:
        assert isinstance(problem, Problem)
        assert f"{problem.file}{problem.reason}".encode()


@given(st.binary(max_size=40))
def test_any_bytes_are_text_or_a_reason(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any.txt"
    path.write_bytes(data)
    try:
        text = sidecars.read_text(path)
    except sidecars.Unusable as problem:
        assert str(problem)
    else:
        assert "\r" not in text
        text.encode("utf-8")
