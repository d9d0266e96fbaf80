"""What the gate can tell: small models, sound and broken in known ways, and which checks each of them fails.

.venv/bin/python -m bench.gate_power [--steps=2400] [--seeds=5] [--only="captions shuffled"]

Trains five sound models with different seeds, which must pass, and six broken ones, each of which must fail at the check that
knows its fault: on 50 generated photographs at 64 x 64, two minutes each on two cores. Goes on where it stopped. Writes
bench/results/gate-power-DEVICE.json.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
from absl import flags

from bench import device
from configs import quickstart
from encode import commandline
from jaxdit import data, judge, train, validate

ROOT = Path(__file__).parents[1]
SIZE = {"layers": 3, "width": 192, "heads": 3}

read, records = data.Dataset.read, data.Dataset.records


def rolled(*names: str):
    """Batches whose conditions lie beside other images: rows of the named arrays one further."""

    def wrong(self, *arguments, **named):
        batch = read(self, *arguments, **named)
        return batch | {name: np.roll(batch[name], 1, axis=0) for name in names}

    return mock.patch.object(data.Dataset, "read", wrong)


def unswapped():
    """Mirror images with the caption of the image."""

    def wrong(self, *arguments, **named):
        return [{**sample, "text_flip": sample["text"]} for sample in records(self, *arguments, **named)]

    return mock.patch.object(data.Dataset, "records", wrong)


def dropped(**shares: float) -> dict[str, float]:
    return {"drop_both": 0.0, "drop_text": 0.0, "drop_vision": 0.0} | shares


# Each fault: what is wrong while the model is trained, its flow, and the checks of which at least one must fail.
FAULTS: dict[str, tuple[Any, dict[str, float], set[str]]] = {
    "captions shuffled": (lambda: rolled("text", "text_length"), {}, {"text_only_ssim", "text_composition"}),
    "vectors shuffled": (lambda: rolled("vision"), {}, {"vision_light", "vision_encoder"}),
    "text always dropped": (contextlib.nullcontext, dropped(drop_text=1.0), {"text_only_ssim", "text_composition"}),
    "vision always dropped": (contextlib.nullcontext, dropped(drop_vision=1.0), {"vision_light", "vision_encoder"}),
    "flip's caption unswapped": (unswapped, {}, {"text_composition"}),
    "untrained": (contextlib.nullcontext, {}, {"memory_latent"}),
}  # fmt: skip


def photographs(folder: Path, count: int = 50, sizes: Sequence[int] = (64,)) -> Path:
    """Generated photographs, encoded in each of the sizes; the folder of the last, beside which the others lie.

    They are square: of three shapes cut to one bucket proportions would differ, which no caption names.
    """
    for command in (
        ["encode.demo", f"--out={folder / 'photographs'}", f"--count={count}", "--side=256"],
        [
            "encode.main", "--config=configs/encode_demo.py", f"--config.images={folder / 'photographs'}",
            f"--config.out={folder / 'encoded'}", f"--config.resolutions={tuple(sizes)}", "--config.max_buckets=1",
        ],
    ):  # fmt: skip
        subprocess.run([sys.executable, "-m", *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return folder / "encoded" / str(sizes[-1])


def configured(path: Path, *, steps: int, seed: int = 0, **size: int) -> Any:
    """The quickstart's configuration for a small model on the photographs at `path`."""
    config = quickstart.get_config()
    config.data.path = str(path)
    config.model.update(SIZE | size)
    config.flow.direction = 0.0  # what these benches began with; settings of theirs may change it
    config.train.update(total_steps=steps, seed=seed)
    config.optim.warmup_steps = min(100, steps // 10)
    config.checkpoint.every = steps
    config.sample.previews = 0
    return config


def to_the_end(config: Any, workdir: Path) -> None:
    """`train.train`; a training that a signal stopped is no result, and ends the benchmark."""
    if train.train(config, workdir) != "done":
        raise KeyboardInterrupt


def judged(path: Path, workdir: Path, *, steps: int, fault: str = "", seed: int = 0, **size: int) -> dict[str, Any]:
    """gate.json of a model trained with a fault, or of a sound one."""
    wrong, changes, _ = FAULTS.get(fault, (contextlib.nullcontext, {}, set()))
    config = configured(path, steps=1 if fault == "untrained" else steps, seed=seed, **size)
    config.flow.update(changes)
    with wrong():
        to_the_end(config, workdir)
    return validate.gate(workdir, workdir / "gate")


def define_flags() -> None:
    flags.DEFINE_integer("steps", 2400, "Steps of each training.")
    flags.DEFINE_integer("seeds", 5, "Sound models.")
    flags.DEFINE_string("only", "", "Only the faults whose name holds this, and no sound models.")


def main() -> int:
    steps, seeds, only = flags.FLAGS.steps, flags.FLAGS.seeds, flags.FLAGS.only
    wanted = {fault: (fault, 0) for fault in FAULTS if only in fault}
    wanted |= {f"sound, seed {seed}": ("", seed) for seed in range(0 if only else seeds)}
    name = device.processor() if jax.default_backend() == "cpu" else jax.devices()[0].device_kind
    known = {"device": name, "steps": steps, "size": SIZE, "thresholds": judge.THRESHOLDS}
    file = device.path("gate-power", name)
    found = device.begun(file, "gate_power", known, models={})
    models = found["models"]
    with tempfile.TemporaryDirectory() as folder:
        path = photographs(Path(folder))
        for model, (fault, seed) in wanted.items():
            if model in models:
                continue
            began = time.monotonic()
            result = judged(path, Path(folder) / model, steps=steps, fault=fault, seed=seed)
            failed = set(result["failed"])
            models[model] = {
                "as it must": bool(FAULTS[fault][2] & failed) if fault else result["verdict"] == "pass",
                **{key: result[key] for key in ("verdict", "failed", "advice", "averaged", "raw")},
                "seconds": round(time.monotonic() - began, 1),
            }
            file.write_text(json.dumps(found, indent=2) + "\n")
            print(
                f"{model}: {result['verdict']} ({', '.join(result['failed'])}) {models[model]['seconds']} s", flush=True
            )
            for line in result["advice"]:
                print(f"    {line}", flush=True)
    return 0 if all(model["as it must"] for model in models.values()) else 1


if __name__ == "__main__":
    define_flags()
    commandline.run(main)
