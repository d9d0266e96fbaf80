"""A working folder with random weights at two steps and two buckets, and pictures to bring, for tests of the page."""

import io
import struct
import zlib

import exported_run
import jax
from PIL import Image

from jaxdit import checkpoint, model, trained

STEP = exported_run.STEP
LATER = STEP + 20


def make(root):
    run = exported_run.make(root / "run", exported_run.demo_dataset(root / "64"))
    config, dataset = trained.describe(run)
    _, shapes = model.abstract(trained.model_settings(config["model"], dataset["widths"]))
    _, params = checkpoint.restore_weights(run, shapes)
    later = jax.tree.map(lambda leaf: 1.2 * leaf, params)
    saver = checkpoint.Checkpoints(run, every=1, keep=2)
    saver.save(LATER, {"params": jax.tree.map(lambda leaf: 2 * leaf, later)}, later, {})
    saver.wait()
    saver.close()
    assert checkpoint.saved_steps(run) == [STEP, LATER]
    return run


def picture(colour=(200, 30, 60), size=(40, 60), kind="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, kind)
    return buffer.getvalue()


def huge():
    """A PNG whose header claims more pixels than are taken."""
    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + picture()[33:]
