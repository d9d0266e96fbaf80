"""--dry_run: true numbers, and not a byte written."""

import re
import subprocess
import sys
from pathlib import Path

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
    assert done.stdout.startswith("Dry run: nothing was written.\nPictures   3 to encode")
    assert not (tmp_path / "out").exists()
    done = subprocess.run([*command[:3], "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--[no]dry_run" in done.stdout
