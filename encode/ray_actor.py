"""What runs on a node of a Ray cluster: the encoders, the processes that read pictures, and the shard in hand.

Nothing here knows Ray: ray_engine.py makes the actor of it, and hands out the shards.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import logging
import os
import socket
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from encode import fingerprint, prepare
from encode.images import ImageProblem
from encode.progress import disk_full
from encode.records import InputError
from encode.shard import Context, Job, WorkFailed, encode_shard
from encode.whole_files import DISK_FULL, name_writer
from encode.workers import CannotStart, Workers

TOKEN = ".ray-token"  # in OUT: an actor that reads what the driver wrote shares the folder
Key = tuple[tuple[int, int], int]  # of a shard: its bucket's shape in cells, and its number there


@dataclass(frozen=True)
class Order:
    """What an actor has to know to encode shards of a run."""

    config: dict[str, Any]
    folder: Path
    out: Path
    token: str
    probe: Path  # a photograph that must be there, or their folder
    fingerprint: Mapping[str, Any]
    cells: int
    vision_width: int
    load: str
    gpus: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """How a call ended: "done"; or why not, in a sentence: "input" (the machine is not set up), "work", "disk"."""

    kind: str
    words: str = ""
    refused: int = 0  # pictures, of a shard that is done


@dataclass(frozen=True)
class Report:
    """How far an actor is in its shard, and the warnings since it was last asked."""

    shard: Key | None = None
    count: int = 0
    waited: float = 0.0
    refused: int = 0
    warnings: tuple[str, ...] = ()


class Actor:
    """Runs on a node of the cluster: the encoders, the processes that read pictures, and the shard in hand."""

    def __init__(self, order: Order, cpus: int):
        self.order, self.cpus = order, cpus
        self.tally, self.warnings = _Tally(None), _Warnings()
        logging.getLogger("encode").addHandler(self.warnings)
        self.context: Context | None = None

    def start(self) -> Outcome:
        """Prove that this machine can do the work, and load the encoders."""
        order, node = self.order, socket.gethostname()
        name_writer(f"{node}-{os.getpid()}")  # a node that was given up for lost may still be writing
        vars(sys.modules["__main__"]).pop("__file__", None)  # Ray's own program: the decoders would run it
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # for the server that forks them
        if not order.gpus:  # Ray would let it see all of them
            os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        module, name = order.load.split(":")
        load = getattr(importlib.import_module(module), name)
        if problem := shares(order, node):
            return Outcome("input", problem)
        config = ConfigDict(order.config)
        try:
            encoders = load(config)
            found = json.loads(json.dumps(fingerprint.of(config, encoders)))
        except InputError as error:
            return Outcome("input", f"node {node}: {error}")
        except Exception as error:
            return Outcome("work", f"node {node}: the encoders cannot be loaded: {type(error).__name__}: {error}")
        if differing := fingerprint.differences(order.fingerprint, found):
            return Outcome(
                "input",
                f"node {node} has other encoders than {order.out} was begun with: {differing}. Give every node the same "
                "weights and the same version of this program.",
            )
        try:
            workers = Workers(config.decode_workers or self.cpus, config.decode_seconds, config.decode_memory)
        except CannotStart as error:
            return Outcome("work", f"node {node}: {error}.")
        self.context = Context(
            config, order.folder, order.out, encoders, workers, {}, {}, order.cells, order.vision_width, lambda: False
        )
        return Outcome("done")

    def encode(self, job: Job, items: Mapping[str, Any]) -> Outcome:
        """Encode one shard and publish it."""
        node, self.tally = socket.gethostname(), _Tally(key(job))
        context = dataclasses.replace(self.context, items=items)
        config, count = context.config, context.workers.count
        tasks = (context.task(job, entry) for entry in job.entries)
        read = context.workers.map(prepare.prepare, tasks, 2 * config.batch_size + 2 * count)
        try:
            with contextlib.closing(read):
                encode_shard(context, job, self._present(read), self.tally)
        except OSError as error:
            if error.errno in DISK_FULL:
                return Outcome("disk", disk_full(context.out))
            return Outcome("work", f"node {node}: {type(error).__name__}: {error}")
        except Exception as error:
            words = str(error) if isinstance(error, WorkFailed) else f"{type(error).__name__}: {error}"
            return Outcome("work", f"node {node}: {words}")
        return Outcome("done", refused=self.tally.refused)

    def report(self) -> Report:
        """Asked while `encode` runs, in another thread."""
        return Report(self.tally.shard, self.tally.count, self.tally.waited, self.tally.refused, self.warnings.take())

    def _present(self, read: Iterator) -> Iterator:
        """The same pictures; a folder that is no longer mounted here must not refuse them all."""
        for task, found in read:
            if isinstance(found, ImageProblem) and (problem := shares(self.order, socket.gethostname(), probe=False)):
                raise WorkFailed(problem)
            yield task, found


def shares(order: Order, node: str, probe: bool = True) -> str | None:
    """Why this machine does not share OUT and the photographs with the driver; None if it does."""
    try:
        found = (order.out / TOKEN).read_text()
    except OSError:
        found = None
    if found != order.token:
        return (
            f"node {node} does not see what was written into config.out={order.out} on the machine that runs the command; OUT "
            "has to be one folder that all machines share under the same path."
        )
    try:
        there = order.probe.exists() if probe else next(os.scandir(order.folder), None) is not None
    except OSError:
        there = False
    if not there:
        what = order.probe if probe else order.folder
        return (
            f"node {node} does not see the photographs ({what}); config.images has to be a folder that all machines "
            "share under the same path."
        )
    return None


class _Tally:
    """Stands for progress.Progress in an actor."""

    def __init__(self, shard: Key | None):
        self.shard, self.count, self.waited, self.refused = shard, 0, 0.0, 0

    def step(self, count: int, waited: float = 0.0, refused: int = 0) -> None:
        self.count, self.waited, self.refused = self.count + count, waited, refused


class _Warnings(logging.Handler):
    """Keeps what the encoders warn of until the driver asks: Ray's own way to it is a flood."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.kept: deque[str] = deque(maxlen=20)

    def emit(self, record: logging.LogRecord) -> None:
        self.kept.append(f"node {socket.gethostname()}: {record.getMessage()}")

    def take(self) -> tuple[str, ...]:
        return tuple(self.kept.popleft() for _ in range(len(self.kept)))


def key(job: Job) -> Key:
    return job.shape, job.number
