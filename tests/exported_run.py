"""A working folder with random weights and every record that a model card is made from, for tests of what is exported."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import make_data
import numpy as np
from PIL import Image

from configs import quickstart
from encode import demo_encoders
from encode.whole_files import write_json
from jaxdit import checkpoint, model, trained

STEP = 40
HOSTILE = "a `kite` | <b>left</b> of\n# a *house*"  # what a caption may hold, and Markdown must not understand


def demo_dataset(root: Path) -> dict:
    """dataset.json of a few random records, as if the demo encoders had made them."""
    make_data.dataset(root, {"64x64": 5, "48x80": 3}, text=128, vision=16)
    dataset = json.loads((root / "dataset.json").read_text())
    dataset["encoders"] = {
        "vae": {"name": "demo", "path": "", "dtype": "float32"},
        "text": {"name": "demo", "path": "", "dtype": "float32", "max_tokens": 12},
        "vision": {"name": "demo", "path": "", "area": 4096, "precomputed": False},
    }
    dataset["fingerprint"] = {
        "vae": demo_encoders.DemoVAE().fingerprint,
        "text": demo_encoders.DemoText(12).fingerprint,
        "vision": demo_encoders.DemoVision(4096).fingerprint,
    }
    dataset["config"] = {"images": "/home/somebody/photographs"}
    return dataset


def make(workdir: Path, dataset: dict, *, normalize_vision: bool = True) -> Path:
    """A trained run's files: averaged weights at STEP, raw ones that are twice as large."""
    config = quickstart.get_config()
    config.data.path = "/home/somebody/encoded/64"
    config.data.normalize_vision = normalize_vision
    config.data.holdout_fraction = 0.125
    config.model.update(layers=2, width=32, heads=2)
    config.train.total_steps = STEP
    workdir.mkdir(parents=True)
    write_json(workdir / "config.json", json.loads(config.to_json_best_effort()))
    write_json(workdir / "dataset.json", dataset)
    write_json(workdir / "origin.json", {"init_from": {"workdir": "/home/somebody/run256", "step": 7}})
    settings = trained.model_settings(config.model, dataset["widths"])
    _, shapes = model.abstract(settings)
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        scale = np.sqrt(1 / leaf.shape[-2]) if path[-1].key == "kernel" else 0.3
        return ((path[-1].key == "scale") + scale * rng.standard_normal(leaf.shape)).astype(np.float32)

    params = jax.tree_util.tree_map_with_path(fill, shapes)
    saver = checkpoint.Checkpoints(workdir, every=1, keep=1)
    saver.save(
        STEP, {"params": jax.tree.map(lambda leaf: 2 * leaf, params)}, jax.tree.map(jax.numpy.asarray, params), {}
    )
    saver.wait()
    saver.close()
    _records(workdir)
    return workdir


def _records(workdir: Path) -> None:
    names = ("eval/held_out/ema/text_vision", "eval/held_out/raw/text_vision", "eval/training/ema/text_vision")
    with open(workdir / "metrics.jsonl", "w") as file:
        for step in range(10, STEP + 1, 10):
            row = {
                "step": step,
                "loss": 1 / step,
                "samples_seen": 8 * step,
                "seconds": 90.0 * step,
                "passes": step / 10,
            }
            row |= {name: k + 1 / step for k, name in enumerate(names)} if step > 10 else {}
            file.write(json.dumps(row | {"health": "young" if step < 30 else "sound"}) + "\n")
    change = {"time": 0, "field": "optim.peak_learning_rate", "from": 0.1, "to": 0.01}
    (workdir / "config_history.jsonl").write_text(json.dumps(change) + "\n")
    checks = {"memory_ssim": {"value": 0.98765, "needed": "at least 0.95", "passed": True}}
    (workdir / "gate").mkdir()
    write_json(workdir / "gate" / "gate.json", {"verdict": "pass", "step": 30, "images": 9, "checks": checks})
    folder = workdir / "previews"
    for step in (20, STEP):
        (folder / str(step)).mkdir(parents=True)
        Image.new("RGB", (64, 64), (step, 0, 0)).save(folder / str(step) / "00.png")
    write_json(
        folder / "previews.json", [{"name": "00", "prompt": HOSTILE, "reference": "/home/somebody/a.jpg", "note": "n"}]
    )
