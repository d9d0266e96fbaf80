"""No damaged file gets anything else out of encode.images than pixels of the size announced, or a named reason."""

import os
import sys
from pathlib import Path

from encode import formats, images
from tests.encode import fuzz


def test_every_format_that_is_read_has_a_sound_seed(tmp_path):
    files = fuzz.seeds()
    kinds = {
        formats.signature(data[: formats.HEAD]) or formats.WEAK[name.rsplit(".")[-1]] for name, data in files.items()
    }
    assert kinds >= {
        *formats.WEAK.values(),
        "JPEG",
        "PNG",
        "WEBP",
        "GIF",
        "TIFF",
        "AVIF",
        "HEIF",
        "JXL",
        "JPEG2000",
    } - {"PCD"}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        if name != "moving.jxl":
            assert fuzz.outcome(tmp_path / name) == "decoded", name


def test_damaged_files_give_pixels_or_a_reason(tmp_path):
    count = int(os.environ.get("FUZZ_COUNT", 6000))
    found = fuzz.run(count, seed=20, keep=tmp_path / "kept")
    assert not found.wrong
    assert sum(found.counts.values()) == count
    assert found.counts["decoded"] > count / 10 and found.counts["refused"] > count / 2
    # A decoder's own crash is contained by the worker processes; it is shown here, and may not become common.
    print(found.counts, found.deaths)
    assert len(found.deaths) <= count / 1000, found.deaths


def test_a_wrong_answer_is_told(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(fuzz.seeds()["plain.png"])
    monkeypatch.setattr(images, "size", lambda path, limit: (1, 2))
    assert "size said (1, 2), decode gave" in fuzz.outcome(tmp_path / "a.png")
    monkeypatch.setattr(images, "decode", lambda path, limit: 1 / 0)
    assert fuzz.outcome(tmp_path / "a.png").startswith("decode raised ZeroDivisionError")


def test_a_file_that_ends_its_process_is_kept_and_the_rest_goes_on(tmp_path):
    child = """
import os, signal, sys
first, end = map(int, sys.argv[2].split("=")[1].split(":"))
for number in range(first, end):
    if number in (3, 5):
        os.kill(os.getpid(), signal.SIGSEGV if number == 3 else signal.SIGALRM)
    print(f'[{number}, "decoded"]' if number != 7 else '[7, "size raised KeyError"]', flush=True)
"""
    found = fuzz.run(9, seed=1, keep=tmp_path, child=(sys.executable, "-c", child))
    assert found.counts == {"decoded": 6, "wrong": 1, "killed its process": 2}
    assert [death for _, death in found.deaths] == ["SIGSEGV", "SIGALRM"]
    for file, _ in (*found.deaths, *found.wrong):
        number = int(Path(file).name.split("-")[1])
        assert Path(file).read_bytes() == fuzz.mutated(fuzz.seeds(), 1, number)[1]


def test_the_same_seed_damages_alike():
    files = fuzz.seeds()
    again = [fuzz.mutated(files, 3, number) for number in range(300)]
    assert again == [fuzz.mutated(files, 3, number) for number in range(300)]
    assert len({data for _, data, _ in again}) > 280
    assert sum(data == files[name] for name, data, _ in again) < 20
