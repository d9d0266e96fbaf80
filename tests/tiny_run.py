"""The quickstart's configuration made tiny, and how tests run it."""

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from configs import quickstart
from jaxdit import checkpoint, metrics, model, trained

ROOT = Path(__file__).parents[1]
WIDTHS = {"latent": 16, "text": 12, "vision": 6}


def tiny(path, **changes):
    config = quickstart.get_config()
    small = {
        "data.path": str(path),
        "data.text_lengths": (16,),
        "model.layers": 1,
        "model.width": 32,
        "model.heads": 2,
        "optim.warmup_steps": 2,
        "train.total_steps": 20,
        "train.batch_size": 4,
        "train.micro_batch": 2,
        "train.log_every": 1,
        "checkpoint.every": 6,
        "sample.previews": 0,
    }
    for name, value in (small | changes).items():
        section, field = name.split(".")
        config[section][field] = value
    return config


def command(path, workdir, **changes):
    """The real command line of the tiny configuration."""
    config, base = tiny(path, **changes), quickstart.get_config()
    overrides = [
        f"--config.{section}.{name}={value}"
        for section in base
        for name, value in config[section].items()
        if value != base[section][name]
    ]
    return [sys.executable, "-m", "jaxdit.main", "--config=configs/quickstart.py", f"--workdir={workdir}", *overrides]


def run(*arguments, **changes):
    return subprocess.run(command(*arguments, **changes), cwd=ROOT, capture_output=True, text=True)


def weights(workdir, raw=False):
    _, shapes = model.abstract(trained.model_settings(tiny("")["model"], WIDTHS))
    return checkpoint.restore_weights(workdir, shapes, raw=raw)


def whole_state(workdir, step=20):
    """Parameters, moments and counts of a saved step, as they lie on the disk; and its averaged weights."""
    folder = workdir.resolve() / "checkpoints" / str(step)
    reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    return [jax.tree.map(np.asarray, reader.restore(folder / item)) for item in ("state", "ema")]


def assert_same(ours, theirs):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)


def curve(workdir, *names):
    return [tuple(row[name] for name in ("step", *names)) for row in metrics.read(workdir)]
