"""A folder as people have it -> pictures with captions, and every problem by name."""

import hashlib
import json
import os
import unicodedata

import numpy as np
import pytest
from PIL import Image

from encode.records import InputError
from encode.source import walk


def _picture(path, caption=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32), (220, 30, 30)).save(path, "PNG" if path.suffix == ".PNG" else None)
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


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le-bom"])
def test_captions_are_read_in_any_unicode_and_stripped(tmp_path, encoding):
    _picture(tmp_path / "a.png")
    text = " café 猫 \r\n\r\n"
    data = b"\xff\xfe" + text.encode("utf-16-le") if encoding == "utf-16-le-bom" else text.encode(encoding)
    (tmp_path / "a.txt").write_bytes(data)
    assert _found(tmp_path) == {"a.png": ("café 猫",)}


def test_bad_captions_are_refused_by_name(tmp_path):
    _picture(tmp_path / "good.png", "good")
    for name, data in {
        "windows.txt": b"the dog\x92s ball",
        "empty.txt": b"",
        "lines.txt": b"\n\n\n",
        "odd.txt": b"\xff\xfea",
        "list.json": b"[1]",
        "number.json": b'{"caption": 3}',
    }.items():
        _picture(tmp_path / f"{name.split('.')[0]}.png")
        (tmp_path / name).write_bytes(data)
    _picture(tmp_path / "none.png")
    reasons = _reasons(tmp_path)
    assert "windows.txt" in reasons["windows.png"]
    assert "not UTF-8" in reasons["windows.png"]
    assert "empty" in reasons["empty.png"]
    assert "empty" in reasons["lines.png"]
    assert "not UTF-16" in reasons["odd.png"]
    assert "not a JSON object" in reasons["list.png"]
    assert "not text" in reasons["number.png"]
    assert "no caption" in reasons["none.png"]
    assert list(_found(tmp_path)) == ["good.png"]


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
    for name in (".DS_Store", "._cat.png", "Thumbs.db", "__MACOSX/cat.png", "notes.pdf", "cat.html"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"\x00\x05\x16\x07")
    np.save(tmp_path / "cat.dino.npy", np.ones(3, np.float32))
    _picture(tmp_path / "out/thumbnail.png", "mine")
    collection = walk(tmp_path, tmp_path / "out")
    assert [item.id for item in collection.items] == ["cat.png"]
    assert collection.items[0].vision == tmp_path / "cat.dino.npy"
    assert not collection.problems


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
    _picture(tmp_path / "b.png", "b")
    assert list(_found(tmp_path)) == ["b.png"]
    assert _reasons(tmp_path) == {"\\xe9.png": "the file name is not UTF-8; rename it"}


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
