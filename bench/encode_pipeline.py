"""What the pipeline costs around the encoders: its images/s over those of the three encoders alone on ready arrays.

    .venv/bin/python -m bench.encode_pipeline [--pictures=192] [--rounds=3]

Small models of the real classes (AutoencoderKL, T5EncoderModel, DINOv3ViTModel) with random weights, float32, on one thread
of the CPU; one worker process reads JPEGs of 1.2 megapixels beside it, as the other cores do beside a GPU. Both sides encode
the same pictures, captions and mirror images in the same batches at 256; the pipeline also reads, resizes, hashes, writes its
shards and reads them back. Writes bench/results/encode-pipeline-DEVICE.json.
"""

from __future__ import annotations

import logging
import tempfile
import time
from pathlib import Path

import numpy as np
import skimage
import torch
from absl import flags
from PIL import Image

from bench import device
from configs import encode_flux
from encode import captions, commandline, images, main, pipeline, prepare
from encode.progress import Speed
from encode.workers import Workers
from tests.encode import tiny_models

PICTURES = flags.DEFINE_integer("pictures", 192, "Photographs.")
ROUNDS = flags.DEFINE_integer("rounds", 3, "Times that each side encodes all of them, in turn.")


def photographs(folder: Path, count: int) -> None:
    """Crops of scikit-image's photographs at 1280 x 960, in three shapes, with captions that name a side."""
    sources = [getattr(skimage.data, name)() for name in ("astronaut", "coffee", "chelsea", "rocket")]
    rng = np.random.default_rng(0)
    for number in range(count):
        source = Image.fromarray(sources[number % len(sources)])
        left, top = (int(rng.integers(0, side // 3)) for side in source.size)
        crop = source.crop((left, top, left + source.width // 2, top + source.height // 2))
        crop.resize(((1280, 960), (960, 1280), (1100, 1100))[number % 3]).save(folder / f"{number:04d}.jpg", quality=92)
        side = ("left", "right")[number % 2]
        (folder / f"{number:04d}.txt").write_text(f"A dog on the {side} of the picture looks at two birds on the wire.")


def models(folder: Path):
    """The configuration with small models in the place of the real ones."""
    config = encode_flux.get_config()
    tiny_models.save_vae(folder / "vae", block_out_channels=(16, 32, 64, 64), norm_num_groups=8)
    tiny_models.save_t5(folder / "t5")
    tiny_models.save_dinov3(folder / "dinov3")
    for name in ("vae", "text", "vision"):
        config[name].path = str(folder / {"vae": "vae", "text": "t5", "vision": "dinov3"}[name])
        config[name].dtype = "float32"
    config.update({"resolutions": (256,), "batch_size": 8, "shard_size": 32, "decode_workers": 1, "max_buckets": 3})
    config.vision.area = 256 * 256
    return config


def ready(config, encoders) -> list[tuple]:
    """Every batch of the plan as the encoders take it: pixels, captions, whole pictures."""
    with Workers(config.decode_workers, config.decode_seconds, config.decode_memory) as workers:
        context, _, jobs = pipeline.begin(config, encoders, workers, lambda: False, keep=False)
        batches = []
        for job in jobs:
            for start in range(0, len(job.entries), config.batch_size):
                entries = job.entries[start : start + config.batch_size]
                tasks = [context.task(job, entry) for entry in entries]
                found = [result for _, result in workers.map(prepare.prepare, tasks, 8)]
                texts = [context.items[entry[0]].caption(config.seed) for entry in entries]
                texts += sorted({captions.swap(text) for text in texts})
                batches.append((np.stack([one.pixels[256] for one in found]), texts, [one.whole for one in found]))
        return batches


def encoders_alone(encoders, batches: list[tuple]) -> float:
    began = time.monotonic()
    for pixels, texts, whole in batches:
        encoders.text.encode(texts)
        encoders.vision.encode_resized(whole)
        encoders.vision.encode_resized([images.mirrored(picture) for picture in whole])
        encoders.vae.encode(pixels)
        encoders.vae.encode(images.mirrored(pixels))
    return time.monotonic() - began


def whole_pipeline(config, encoders, out: Path) -> tuple[float, float, float]:
    """Seconds of encoding shards, of them waiting for pictures, and of the whole run with its scan and its page."""
    config.out = str(out)
    began = time.monotonic()
    pipeline.run(config, encoders)
    whole = time.monotonic() - began
    legs = Speed.read(out)
    return sum(leg["seconds"] for leg in legs), sum(leg["waited"] for leg in legs), whole


def bench() -> int:
    torch.set_num_threads(1)
    for noisy in ("encode", "absl"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "photographs").mkdir()
        photographs(folder / "photographs", PICTURES.value)
        config = models(folder)
        config.images, config.out = str(folder / "photographs"), str(folder / "none")
        encoders = main.load(config)
        batches = ready(config, encoders)
        encoders_alone(encoders, batches[:2])
        rows = []
        for number in range(ROUNDS.value):
            alone = encoders_alone(encoders, batches)
            shards, waited, whole = whole_pipeline(config, encoders, folder / f"out{number}")
            rows.append({"alone": alone, "shards": shards, "waited": waited, "whole run": whole})
            print({name: round(value, 2) for name, value in rows[-1].items()})
    best = {name: min(row[name] for row in rows) for name in rows[0]}
    result = {
        "device": f"{device.processor()}, one thread for the encoders, one process that reads",
        "versions": {"torch": torch.__version__},
        "command": f"python -m bench.encode_pipeline --pictures={PICTURES.value} --rounds={ROUNDS.value}",
        "pictures": PICTURES.value,
        "encoders alone, pictures a second": round(PICTURES.value / best["alone"], 3),
        "pipeline, pictures a second": round(PICTURES.value / best["shards"], 3),
        "pipeline over encoders": round(best["alone"] / best["shards"], 4),
        "share of the time that the encoders waited": round(best["waited"] / best["shards"], 4),
        "whole run with scan and page, pictures a second": round(PICTURES.value / best["whole run"], 3),
        "rounds, seconds": [{name: round(value, 3) for name, value in row.items()} for row in rows],
    }
    device.write("encode-pipeline", device.processor(), result)
    return 0


if __name__ == "__main__":
    commandline.run(bench)
