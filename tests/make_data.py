"""A small finished data set written through the record contract, for tests that need no pictures."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np

from encode import records
from encode.whole_files import write_json

BF16 = ml_dtypes.bfloat16


def record(rng, bucket: str, number: int, channels: int, text: int, vision: int, flip: bool = True, mask=None) -> dict:
    """One random record of a bucket named WIDTHxHEIGHT; its latent and flip differ, so that a mix-up shows."""
    width, height = map(int, bucket.split("x"))
    shape = (height // 8, width // 8, channels)
    length = int(rng.integers(3, 9))
    return {
        "id": f"{bucket}/{number}.png",
        "caption": f"{number} on the left",
        "caption_flip": f"{number} on the right" if flip else "",
        "latent": (3 + 2 * rng.standard_normal(shape)).astype(BF16),
        "latent_flip": (3 + 2 * rng.standard_normal(shape)).astype(BF16),
        "text": rng.standard_normal((length, text)).astype(BF16),
        "text_flip": rng.standard_normal((length + 1, text)).astype(BF16) if flip else np.zeros((0, text), BF16),
        "vision": rng.standard_normal(vision).astype(np.float32),
        "vision_flip": rng.standard_normal(vision).astype(np.float32),
        "mask": np.zeros((0, 0), np.uint8) if mask is None else mask,
        "pixel_hash": f"{rng.integers(2**63):032x}",
    }


def dataset(root: Path, counts: dict[str, int], *, channels=16, text=12, vision=6, shard=4, seed=0, **record_options):
    """Write a finished data set with `counts` samples a bucket into root and return its records by bucket."""
    rng = np.random.default_rng(seed)
    root.mkdir(parents=True)
    written, latents = {}, []
    for bucket, count in counts.items():
        rows = [record(rng, bucket, n, channels, text, vision, **record_options) for n in range(count)]
        width, height = map(int, bucket.split("x"))
        spec = records.features((height // 8, width // 8, channels), text, vision)
        for number, start in enumerate(range(0, count, shard)):
            records.write_shard(root, bucket, number, rows[start : start + shard], spec)
        records.finish_bucket(root, bucket, spec)
        written[bucket] = rows
        latents += [
            row[name].astype(np.float64).reshape(-1, channels) for row in rows for name in ("latent", "latent_flip")
        ]
    flat = np.concatenate(latents)
    write_json(
        root / "dataset.json",
        {
            "schema": records.SCHEMA,
            "resolution": int(root.name) if root.name.isdigit() else 64,
            "count": sum(counts.values()),
            "fields": {},
            "fingerprint": {"vae": {"id": "random"}},
            "encoders": {name: {"name": "demo"} for name in ("vae", "text", "vision")},
            "latent_mean": flat.mean(0).tolist(),
            "latent_std": flat.std(0).tolist(),
            "latent_count": len(flat),
            "buckets": {
                bucket: {
                    "count": count,
                    "shards": -(-count // shard),
                    "latent": [int(bucket.split("x")[1]) // 8, int(bucket.split("x")[0]) // 8, channels],
                }
                for bucket, count in counts.items()
            },
            "widths": {"latent": channels, "text": text, "vision": vision},
            "text_longest": 9,
            "duplicates": 0,
            "config": {},
        },
    )
    return written
