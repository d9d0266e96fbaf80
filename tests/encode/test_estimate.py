"""--dry_run: true numbers, and not a byte written."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image

from encode import estimate, pipeline, records
from tests.encode import fakes

ROOT = Path(__file__).resolve().parents[2]


def _photographs(folder):
    images = fakes.photographs(folder, 30)
    Image.new("RGB", (600, 50)).save(images / "wide.png")
    (images / "wide.txt").write_text("a line")
    (images / "bare.png").write_bytes((images / "000.png").read_bytes())
    (images / "broken.png").write_bytes(b"nothing")
    (images / "broken.txt").write_text("broken")
    return images


def test_the_estimate_is_what_the_run_then_does(tmp_path):
    images = _photographs(tmp_path / "in")
    changes = {"resolutions": (128, 256), "batch_size": 4, "shard_size": 100}
    words = estimate.estimate(fakes.config(images, tmp_path / "out", **changes), fakes.encoders())
    assert not (tmp_path / "out").exists()
    summary = pipeline.run(fakes.config(images, tmp_path / "out", **changes), fakes.encoders())
    assert (summary.encoded, summary.refused) == (30, 3)
    assert re.search(r"Pictures +30 to encode, 3 inputs refused", words)
    assert "1  aspect ratio" in words and "1  caption: no caption" in words and "1  decode: not a picture" in words
    assert "bare.png: no caption" in words
    for bucket, info in records.load_dataset(tmp_path / "out" / "256")["buckets"].items():
        assert re.search(rf"{info['count']}  {bucket}\n", words)
    told = {int(size): float(held) for held, size in re.findall(r"([\d.]+) KiB at (\d+) \(30 records\)", words)}
    for size in (128, 256):
        shards = list((tmp_path / "out" / str(size)).rglob("latents-*"))
        assert abs(told[size] * 1024 / sum(path.stat().st_size for path in shards) - 1) < 0.2
    assert re.search(r"Time +about .* for 30 pictures at [\d.]+ a second, limited by ", words)


def test_a_slow_encoder_is_named_as_the_limit_with_its_speed(tmp_path):
    images = fakes.photographs(tmp_path / "in", 9)
    words = estimate.estimate(fakes.config(images, tmp_path / "out"), fakes.encoders(pause=0.1))
    assert "limited by the encoders" in words
    speed = float(re.search(r"at ([\d.]+) a second", words)[1])
    assert 5 < speed < 10.5  # batches of 2, a VAE call each for the picture and its mirror image


def test_what_is_encoded_already_is_not_counted_again(tmp_path):
    images = fakes.photographs(tmp_path / "in", 12)
    asked = iter([False] * 6)
    try:
        pipeline.run(fakes.config(images, tmp_path / "out"), fakes.encoders(), lambda: next(asked, True))
    except pipeline.Stopped:
        before = fakes.tree(tmp_path / "out")
    words = estimate.estimate(fakes.config(images, tmp_path / "out"), fakes.encoders())
    assert re.search(r"12 to encode, 0 inputs refused so far; [24] are encoded already", words)
    assert fakes.tree(tmp_path / "out") == before
    pipeline.run(fakes.config(images, tmp_path / "out"), fakes.encoders())
    words = estimate.estimate(fakes.config(images, tmp_path / "out"), fakes.encoders())
    assert "everything is encoded already" in words


def test_the_command_prints_it(tmp_path):
    images = tmp_path / "in"
    images.mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (150, 130, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{number}.jpg")
        (images / f"{number}.txt").write_text("noise")
    command = [sys.executable, "-m", "encode.main", f"--config.images={images}", f"--config.out={tmp_path / 'out'}"]
    done = subprocess.run([*command, "--dry_run"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.match(r"Dry run: nothing was written; .*\nPictures   3 to encode", done.stdout)
    assert not (tmp_path / "out").exists()
    done = subprocess.run([*command[:3], "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--[no]dry_run" in done.stdout


def test_the_time_is_that_of_the_slower_of_reading_and_encoding():
    words = estimate._time(3_600, 0.5, 1.0)
    assert "about 60 min for 3,600 pictures at 1.0 a second, limited by the encoders" in words
    assert "(reading alone 2.0 a second, encoding alone 1.0)" in words
    assert "at 0.5 a second, limited by reading the pictures" in estimate._time(3_600, 2.0, 1.0)


def test_the_stretch_is_in_percent_of_those_that_are_stretched():
    config = SimpleNamespace(max_distortion=1.25)
    entries = [((16, 16), ("a", 100 + number, 100)) for number in range(21)] + [((16, 16), ("b", 900, 90))]
    words = estimate._stretch(config, entries)
    assert words == "10.0% in the middle, 19.0% at the 95th of a hundred, 20.0% at most; 1 padded with noise"


def test_a_disk_that_is_too_small_and_an_odd_name_are_told(tmp_path):
    context = SimpleNamespace(out=tmp_path / "new" / "out")
    assert len(estimate._disk(context, {128: 3}, {128: 1_000.0})) == 1
    assert estimate._disk(context, {128: 3}, {128: 1e18})[-1].strip() == "which is not enough."
    row = {"stage": "decode", "reason": "empty", "file": "a\n\x1b[2J.png"}
    assert len(estimate._refused([row] * 20)) == 1 + 20
    lines = estimate._refused([row] * 22 + [row | {"file": "b.png", "reason": "no caption"}])
    assert len(lines) == 2 + 2 + 1 + 1 and lines[-1].strip() == "and 20 more"  # each reason is shown
    assert "b.png: no caption" in lines[-2]
    assert lines[2].strip() == "a\\x0a\\x1b[2J.png: empty"


def test_the_first_batch_and_a_short_one_do_not_count_for_the_speed(tmp_path, monkeypatch):
    seconds = iter([0.0, 0.0, 0.0, 50.0, 50.0, 51.0, 51.0, 60.0])  # reading; batches of 2, 2 and 1
    images = fakes.photographs(tmp_path / "in", 5)
    config = fakes.config(images, tmp_path / "out", batch_size=2, resolutions=(128,), max_buckets=1, max_distortion=9.0)
    from encode.workers import Workers

    with Workers(config.decode_workers, config.decode_seconds, config.decode_memory) as workers:
        context, _, jobs = pipeline.begin(config, fakes.encoders(), workers, lambda: False, keep=False)
        monkeypatch.setattr(estimate, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
        assert estimate._measure(context, jobs)[1] == 0.5
