"""No damaged file gets anything else out of encode.images than pixels of the size announced, or a named reason."""

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
    count = 6000
    found = fuzz.run(count, seed=20, keep=tmp_path / "kept")
    assert not found.wrong
    assert sum(found.counts.values()) == count
    assert found.counts["decoded"] > count / 10 and found.counts["refused"] > count / 2
    # A decoder's own crash is contained by the worker processes; it is shown here, and may not become common.
    print(found.counts, found.deaths)
    assert len(found.deaths) <= count / 1000, found.deaths


def test_a_crash_a_hang_and_a_wrong_answer_are_each_found(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(fuzz.seeds()["plain.png"])
    monkeypatch.setattr(images, "size", lambda path, limit: (1, 2))
    assert "size said (1, 2), decode gave" in fuzz.outcome(tmp_path / "a.png")
    monkeypatch.setattr(images, "decode", lambda path, limit: 1 / 0)
    assert fuzz.outcome(tmp_path / "a.png").startswith("decode raised ZeroDivisionError")


def test_the_same_seed_damages_alike():
    files = fuzz.seeds()
    again = [fuzz.mutated(files, 3, number) for number in range(300)]
    assert again == [fuzz.mutated(files, 3, number) for number in range(300)]
    assert len({data for _, data, _ in again}) > 280
    assert sum(data == files[name] for name, data, _ in again) < 20
