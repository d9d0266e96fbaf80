"""Where the numbers of a run go besides metrics.jsonl: TensorBoard events, and Weights & Biases where it is asked for.

Both are for looking at a run. Neither may stop it: what fails is said once, and the run goes on without.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.record_writer import masked_crc32c

from encode.records import InputError
from encode.whole_files import write_json

FINISH_SECONDS = 20.0  # what the end of a run waits for uploads; a stopped run must be gone within a minute
START_SECONDS = 30.0  # what the start waits for an answer: of the network, and of a person asked for an API key


class TensorBoard:
    """Events in WORKDIR/tensorboard; one file a leg of the run, one event a row.

    Written here: tensorboardX.SummaryWriter's thread ends at the first full disk, and the run then waits for ever on a queue
    that nobody empties; and it imports torch: a second or two and 180 MB of every command.

    Args:
      workdir: the working folder.
      step: the step that the run starts from; TensorBoard forgets what stands after it.
    """

    def __init__(self, workdir: Path, step: int):
        self._folder, self._file, self._complained = Path(workdir) / "tensorboard", None, False
        self._open(step)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        found = [summary_pb2.Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._put(step, summary=summary_pb2.Summary(value=found))

    def words(self, step: int, name: str, value: str) -> None:
        self._put(step, summary=text_pb(f"{name}/text_summary", value))

    def pictures(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """{name: [height, width, 3] uint8}; kept as JPEG, as the exact ones stand in WORKDIR/previews."""
        for name, pixels in pictures.items():
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
            height, width = pixels.shape[:2]
            image = summary_pb2.Summary.Image(
                height=height, width=width, colorspace=3, encoded_image_string=buffer.getvalue()
            )
            self._put(step, summary=summary_pb2.Summary(value=[summary_pb2.Summary.Value(tag=name, image=image)]))

    def sync(self, step: int) -> None:
        """Put what was written on the disk; begin a new file where the last one could not be written to its end."""
        if self._file is None:
            self._open(step)
        try:
            if self._file is not None:
                os.fsync(self._file.fileno())
        except OSError as error:
            self._complain(error)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _open(self, step: int) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            # TensorBoard reads the files of a folder in the order of their names, and the clock may have stood ahead.
            stamps = [path.name.split(".")[3] for path in self._folder.glob("events.out.tfevents.*.*")]
            when = max([time.time(), *(int(stamp) + 1 for stamp in stamps if stamp.isdecimal())])
            name = f"events.out.tfevents.{when:.6f}.{socket.gethostname()}.{os.getpid()}"
            self._file = open(self._folder / name, "ab", buffering=0)  # noqa: SIM115 held open for the length of the run
        except OSError as error:
            self._complain(error)
            return
        self._put(0, file_version="brain.Event:2")
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._put(step + 1, session_log=start)

    def _put(self, step: int, **content: Any) -> None:
        if self._file is None:
            return
        event = event_pb2.Event(wall_time=time.time(), step=step, **content).SerializeToString()
        head = struct.pack("<Q", len(event))
        record = head + struct.pack("<I", masked_crc32c(head)) + event + struct.pack("<I", masked_crc32c(event))
        try:
            while record:  # a full disk takes a part of it first
                record = record[self._file.write(record) :]
        except OSError as error:
            self._complain(error)

    def _complain(self, error: OSError) -> None:
        """Nothing can follow a record that was cut: the file is given up, `sync` begins another."""
        if not self._complained:
            logging.warning("%s cannot be written (%s); TensorBoard misses what comes now.", self._folder, error)
        self._complained = True
        if self._file is not None:
            self._file.close()
            self._file = None


class WandB:
    """One run in Weights & Biases, the same one for all legs: its id is kept in WORKDIR/wandb.json.

    Args:
      workdir: the working folder; the library's own files go to WORKDIR/wandb.
      project: "project", or "entity/project".
      config: the configuration, shown beside the run.

    Raises:
      InputError: the library is not installed.
    """

    def __init__(self, workdir: Path, project: str, config: Mapping[str, Any] | None = None):
        library = wandb_library(project)
        self._image, self._run = library.Image, None
        os.environ.setdefault("WANDB_LOGIN_TIMEOUT", f"{START_SECONDS:.0f}")  # Settings do not reach the question
        entity, _, short = project.rpartition("/")
        wanted = {
            "project": short,
            "entity": entity or None,
            "id": _run_id(Path(workdir), project),
            "name": Path(workdir).resolve().name,
            "config": dict(config or {}),
            "dir": str(workdir),
            "resume": "allow",
        }
        for mode in ({}, {"mode": "offline"}):
            try:
                self._run = library.init(**wanted, **mode, settings=_settings(library))
                if config:
                    self._run.config.update(dict(config), allow_val_change=True)
                return
            except Exception as error:  # whatever the library and the network come up with
                where = (
                    "Nothing goes there" if mode else f"Its files go to {workdir}/wandb; send them with `wandb sync`"
                )
                logging.warning("Weights & Biases cannot be reached (%s). %s.", _first_line(error), where)
                self._run = None
                with contextlib.suppress(Exception):
                    library.teardown()  # it still holds the run's id

    def row(self, values: Mapping[str, Any]) -> None:
        """The row of a step. A step that the killed leg before this one has sent is not sent again: it is the same."""
        known = {name: value for name, value in values.items() if value is not None}
        self._try(lambda run: values["step"] < run.step or run.log(known, step=values["step"]))

    def pictures(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Pictures of a step. They may come late, and Weights & Biases never goes back: they stand at its present step."""

        def log(run):
            run.log(
                {
                    name: self._image(Image.fromarray(pixels), caption=f"step {step}", file_type="jpg")
                    for name, pixels in pictures.items()
                },
                step=max(step, run.step),
            )

        self._try(log)

    def close(self) -> None:
        """Wait for uploads, but not for ever: what is missing can be sent with `wandb sync`."""
        if self._run is not None:
            thread = threading.Thread(target=self._finish, daemon=True)
            thread.start()
            thread.join(FINISH_SECONDS + 5)
            self._run = None

    def _try(self, work: Callable[[Any], Any]) -> None:
        try:
            if self._run is not None:
                work(self._run)
        except Exception as error:
            logging.warning("Weights & Biases failed (%s); the run goes on without it.", _first_line(error))
            self._run = None

    def _finish(self) -> None:
        try:
            self._run.finish()
        except Exception as error:
            logging.warning("Weights & Biases could not be closed (%s).", _first_line(error))


def wandb_library(project: str) -> Any:
    """The module wandb.

    Raises:
      InputError: it is not installed.
    """
    try:
        import wandb
    except ImportError as error:
        raise InputError(
            f"metrics.wandb={project} needs the library of Weights & Biases ({error}); pip install wandb, or leave "
            "metrics.wandb empty."
        ) from error
    return wandb


def _run_id(workdir: Path, project: str) -> str:
    """Of the folder and the moment it was first asked for: a folder begun anew under an old name is another run."""
    path = workdir / "wandb.json"
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["project"] == project:
            return str(kept["id"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    slug = re.sub(r"[^A-Za-z0-9-]+", "-", workdir.resolve().name).strip("-")[:40] or "run"
    digest = hashlib.sha256(f"{socket.gethostname()}:{workdir.resolve()}:{time.time_ns()}".encode()).hexdigest()
    made = f"{slug}-{digest[:8]}"
    write_json(path, {"project": project, "id": made})
    return made


def _settings(library: Any) -> Any:
    """Our log lines stay ours; a missing key or a dead network holds the run for seconds only."""
    known = {"console": "off", "init_timeout": START_SECONDS}
    try:
        return library.Settings(**known, finish_timeout=FINISH_SECONDS)
    except Exception:  # a library older than finish_timeout
        return library.Settings(**known)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
