"""What test_ray.py runs on the nodes of its cluster and in processes of its own: the fakes, odd on nodes named by FAKE_NODE."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path

from encode import main, ray_actor, ray_engine
from encode.pipeline import Encoders
from tests.encode import fakes

NODE = os.environ.get("FAKE_NODE", "")
LOAD = "tests.encode.ray_fakes:load"
if NODE == "alone":  # stands for a machine that sees another folder under the name of OUT
    ray_actor.TOKEN = ".another-folder"


class Vae(fakes.Vae):
    """Leaves a file with its process for whoever wants to kill it, and waits while there is one called `slow`."""

    def __init__(self, notes: Path):
        super().__init__()
        self.notes = notes

    def encode(self, pixels):
        if NODE == "failing":
            (self.notes / f"{NODE}-{os.getpid()}").touch()
            raise RuntimeError("the device was lost")
        if threading.current_thread() is not threading.main_thread() or NODE:
            (self.notes / f"{NODE}-{os.getpid()}").touch()
            while (self.notes / "slow").exists():
                time.sleep(0.02)
        return super().encode(pixels)


def load(config) -> Encoders:
    vae = Vae(Path(config.out).parent / "notes")
    if NODE == "other weights":
        vae.fingerprint = {"id": "fake-vae", "weights": "1"}
    return Encoders(vae, fakes.Text(), fakes.Vision())


if (
    __name__ == "__main__"
):  # python -m tests.encode.ray_fakes IMAGES OUT CHANGES: the whole command, with these encoders
    main.load = lambda config: fakes.encoders()
    ray_engine.LOAD = LOAD
    images, out, changes = sys.argv[1:]
    configuration = fakes.config(Path(images), Path(out), **json.loads(changes))
    sys.exit(main.main(configuration))
