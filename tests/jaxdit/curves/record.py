"""Makes the recorded curves beside this file: real training of a small model (2 layers of 64), some of it led astray.

python tests/jaxdit/curves/record.py --out=DIR [NAME ...]     from the repository's root; about ten minutes on two cores

The data are the generated photographs (`encode.demo`), a fifth of them held out; `memorising` has forty latents of white
noise, in which there is nothing to learn but the images themselves. Each row of a run is logged; the file keeps one in a few,
its numbers to four digits, and the columns that its test is about.
"""

import argparse
import json
import logging
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp

ROOT = Path(__file__).parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import make_data  # noqa: E402

from configs import quickstart  # noqa: E402
from jaxdit import metrics, train, update  # noqa: E402

CORE = ("step", "loss", "grad_norm", "learning_rate", "velocity_rms", "target_rms", "ema_distance", "updates", "voided")
SPEED = (
    "samples_seen",
    "images_per_second",
    "data_wait_fraction",
    "mfu",
    "seconds",
    "eval_seconds",
    "health",
)  # left out
RATE = "optim.peak_learning_rate"
RUNS = {  # name: (options, (first step, end, factor of its latents) or None, one row in, steps kept, prefixes of columns)
    "healthy": ({"train.total_steps": 3000}, None, 20, (0, 3000), ("eval/",)),
    "healthy_all": ({"train.total_steps": 2400, "train.seed": 1}, None, 50, (0, 2400), ("",)),
    "high_rate": ({"train.total_steps": 1000, RATE: 0.5}, None, 5, (0, 1000), ()),
    "too_high_rate": ({"train.total_steps": 1000, RATE: 0.05}, None, 5, (0, 1000), ()),
    "spike": ({"train.total_steps": 1000}, (600, 601, 30.0), 1, (450, 680), ()),
    "wrong_data": ({"train.total_steps": 1200}, (600, 900, 10.0), 5, (0, 1200), ()),
    "memorising": ({"train.total_steps": 2000, RATE: 1e-3, "train.seed": 1}, None, 20, (0, 2000), ("eval/",)),
}


def record(name, data, out):
    """Train one of RUNS in out/NAME (or take what is there) and write its curve beside this file."""
    options, wrong, every, (first, last), prefixes = RUNS[name]
    config = quickstart.get_config()
    common = {
        "data.path": str(data),
        "data.holdout_fraction": 0.2,
        "model.layers": 2,
        "model.width": 64,
        "model.heads": 2,
        "train.log_every": 1,
        "train.eval_every": 100,
        "train.eval_images": 64,
        "train.eval_budget": 0.5,
        "checkpoint.every": 10**6,
        "checkpoint.minutes": 10**6,
        "sample.previews": 0,
    }
    for field, value in (common | options).items():
        section, field = field.split(".")
        config[section][field] = value
    true = update.accumulate_gradients

    def accumulate(graph, flow, seed, params, total, batch, where):
        begin, end, factor = wrong
        scale = jnp.where((where[0] >= begin) & (where[0] < end), factor, 1.0)
        return true(graph, flow, seed, params, total, batch | {"latent": batch["latent"] * scale}, where)

    try:
        update.accumulate_gradients = accumulate if wrong else true
        train.train(config, out / name)
    finally:
        update.accumulate_gradients = true
    rows = []
    for row in metrics.read(out / name):
        if first < row["step"] <= last and (row["step"] % every == 0 or row["step"] == 1):
            named = {key: value for key, value in row.items() if key in CORE or any(map(key.startswith, prefixes))}
            kept = {key: value for key, value in named.items() if key not in SPEED}
            rows.append({key: float(f"{v:.4g}") if isinstance(v, float) else v for key, v in kept.items()})
    (Path(__file__).parent / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("names", nargs="*", default=list(RUNS))
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    photographs, noise = arguments.out / "encoded" / "128", arguments.out / "noise" / "64"
    if not photographs.exists():
        images = f"{arguments.out}/images"
        subprocess.run([sys.executable, "-m", "encode.demo", f"--out={images}"], cwd=ROOT, check=True)
        encode = ["--config=configs/encode_demo.py", f"--config.images={images}", f"--config.out={photographs.parent}"]
        subprocess.run([sys.executable, "-m", "encode.main", *encode], cwd=ROOT, check=True)
    if not noise.exists():
        make_data.dataset(noise, {"64x64": 24, "48x80": 16})
    for name in arguments.names:
        record(name, noise if name == "memorising" else photographs, arguments.out)


if __name__ == "__main__":
    main()
