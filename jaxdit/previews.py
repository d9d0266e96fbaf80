"""Previews: a fixed set of sentences and references, drawn from the averaged weights (EMA) at checkpoints.

What is drawn is chosen once and kept in WORKDIR/previews (previews.json, conditions.npz), each picture with noise of its
own, so the pictures of a month differ by the weights alone. The trainer samples latents and holds no image decoder: a child
process without a GPU (decode_previews.py) makes WORKDIR/previews/STEP/NN.png of them while training goes on.
"""

from __future__ import annotations

import logging
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from encode.whole_files import whole_file
from jaxdit import data, decode_previews, preview_set, sampler, trained
from jaxdit.orbax_log import first_line

# Seconds for the pictures of the last step, while nothing trains: eight of 1024 x 1024 on a desktop's cores.
PATIENCE = 300.0


class Previews:
    """The previews of one run.

    Args:
      workdir: its working folder, with dataset.json in it.
      dataset: the data set as the run sees it; looked into only where the set is chosen.
      config: sample.{previews, prompts, references, steps, text_guidance, vision_guidance, shift}, train.{seed,
        micro_batch} and data.normalize_vision are read.
      graph: the model's definition, see `model.abstract`.

    Raises:
      InputError: a sentence or a reference of one's own cannot be used; the message names it.
    """

    def __init__(self, workdir: Path, dataset: data.Dataset, config: Any, graph: Any):
        self.folder = Path(workdir).resolve() / "previews"
        self._config, self._info, self._graph = config, dataset.info, graph
        self._said: set[str] = set()
        self._child: subprocess.Popen | None = None
        self._resting = False  # the last child failed: wait for the next pictures before another one is tried
        self._closed = False
        self._fixed = preview_set.FixedSet((), (), {})
        self._awaited: set[int] = set()
        if config.sample.previews <= 0:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in [*self.folder.glob(".*.tmp"), *self.folder.glob(f"*/.{decode_previews.LATENTS}.tmp")]:
            left.unlink(missing_ok=True)
        stored = preview_set.read(self.folder, dataset.info, config)
        self._fixed = stored or preview_set.choose(self.folder, dataset, config)
        self._awaited = set(decode_previews.waiting(self.folder))
        logging.info(
            "Previews   %d pictures in %d bucket(s), of %d Euler steps each; they appear in %s.",
            len(self._fixed.pictures), len(set(self._fixed.buckets)), config.sample.steps, self.folder,
        )  # fmt: skip
        # At a new run's start too, when nothing waits: a decoder that is missing is then known on the first day.
        if self._awaited or stored is None:
            self._start_child()

    def draw(self, step: int, ema: Any) -> None:
        """Sample the latents of all pictures and leave them to the child; whatever fails is logged, never raised.

        Args:
          step: names the folder.
          ema: the averaged weights, on the device; neither changed nor kept.
        """
        if not self._fixed.pictures:
            return
        try:
            self._write(step, self._sample(step, ema))
            self._awaited.add(step)
            self._resting = False
            self._look_after_child()
        except Exception as error:  # no memory for the program, a full disk: the run is worth more than a picture
            self._say(f"no previews could be drawn ({first_line(error)}); training goes on", step)

    def finished(self) -> list[tuple[int, dict[str, np.ndarray]]]:
        """What has been decoded since the last call: [(step, {name: [height, width, 3] uint8})]."""
        done = []
        for step in sorted(self._awaited):
            if self._latents(step).exists():
                continue
            self._awaited.discard(step)
            try:
                done.append((step, _read_pictures(self.folder / str(step), self._fixed.pictures)))
            except (OSError, ValueError) as error:
                self._say(f"the decoded previews cannot be read ({first_line(error)})", step)
        self._look_after_child()
        return done

    def close(self, patience: float, stopped: Callable[[], bool] = lambda: False) -> None:
        """Wait for what is still being decoded, then end the child; the next start decodes what is left.

        Args:
          patience: seconds, at most.
          stopped: asked while waiting; true ends it.
        """
        if patience and not stopped() and (left := self._left()):
            logging.info("Waiting up to %.0f s until the previews of step %d are decoded.", patience, left[-1])
        until = time.monotonic() + patience
        while self._left() and time.monotonic() < until and not stopped():
            self._look_after_child()
            if self._child is None:
                break
            time.sleep(0.05)
        self._closed = True
        if left := self._left():
            logging.info(
                "Previews of %d steps (%d to %d) are not decoded yet; the next start in this folder decodes them.",
                len(left), left[0], left[-1],
            )  # fmt: skip
        if self._child is not None:
            self._child.kill()  # nothing it writes is ever half there
            self._child.wait()
            self._child = None

    def _sample(self, step: int, ema: Any) -> dict[str, np.ndarray]:
        """{name: [h, w, c] float32 raw latent}; pictures of a bucket go through one program, a few at a time."""
        config, given = self._config, self._fixed.conditions
        run = trained.Trained(config, self._info, self._graph, ema, step)
        weights = {"text": config.sample.text_guidance, "vision": config.sample.vision_guidance}
        # Guidance makes up to three samples of a picture: together not more than a micro-batch, which is known to fit.
        most = max(1, config.train.micro_batch // len(sampler.needed_terms(sampler.guidance_weights(**weights))))
        latents = {}
        for bucket in sorted(set(self._fixed.buckets)):
            width, height = map(int, bucket.split("x"))
            shape = (height // 8, width // 8, self._info["widths"]["latent"])
            for rows, count in _parts([k for k, name in enumerate(self._fixed.buckets) if name == bucket], most):
                with jax.transfer_guard("allow"):  # conditions up, latents down: once a checkpoint
                    drawn = trained.generate(
                        run,
                        {name: values[rows] for name, values in given.items()},
                        shape,
                        rows,
                        seed=config.train.seed,
                        steps=config.sample.steps,
                        shift=config.sample.shift,
                        **weights,
                    )
                latents |= {self._fixed.pictures[k]["name"]: latent for k, latent in zip(rows[:count], drawn)}
        if not all(np.isfinite(latent).all() for latent in latents.values()):
            raise ArithmeticError("the sampled latents are not finite")
        return latents

    def _write(self, step: int, latents: Mapping[str, np.ndarray]) -> None:
        target = self._latents(step)
        target.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(target) as temporary, open(temporary, "wb") as file:
            np.savez(file, **latents)

    def _latents(self, step: int) -> Path:
        return self.folder / str(step) / decode_previews.LATENTS

    def _left(self) -> list[int]:
        return [step for step in sorted(self._awaited) if self._latents(step).exists()]

    def _look_after_child(self) -> None:
        """Say why a child failed, and start one where latents wait and none is at work."""
        if self._child is not None and self._child.poll() is not None:
            if code := self._child.returncode:
                self._resting = True
                self._say(f"latents stay in {self.folder}, because they cannot be decoded here: {self._reason(code)}")
            self._child = None
        if self._child is None and not self._resting and not self._closed and self._left():
            self._start_child()

    def _start_child(self) -> None:
        try:
            with open(self.folder / "decoder.log", "wb") as log:
                self._child = subprocess.Popen(
                    decode_previews.command(self.folder.parent),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=decode_previews.without_gpu(),
                    start_new_session=True,  # Ctrl-C in the terminal is for the trainer
                )
        except OSError as error:
            self._resting = True
            self._say(f"the decoder of previews cannot be started ({first_line(error)})")

    def _reason(self, code: int) -> str:
        if code < 0:
            return f"it was ended by signal {-code}"
        try:
            words = (self.folder / "decoder.log").read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            words = str(error)
        return decode_previews.last_line(words) or f"it ended with code {code}"

    def _say(self, reason: str, step: int | None = None) -> None:
        """Each reason once: a full disk would repeat it at every checkpoint of the month."""
        if reason not in self._said:
            self._said.add(reason)
            logging.warning("Previews%s: %s.", "" if step is None else f" of step {step}", reason.rstrip("."))


def _parts(rows: Sequence[int], most: int) -> list[tuple[list[int], int]]:
    """Rows in equal parts of at most `most`, the last filled up with copies, each with its number of true rows."""
    parts = -(-len(rows) // most)
    size = -(-len(rows) // parts)
    cut = [list(rows[start : start + size]) for start in range(0, len(rows), size)]
    return [(part + part[:1] * (size - len(part)), len(part)) for part in cut]


def _read_pictures(folder: Path, pictures: Sequence[Mapping[str, str]]) -> dict[str, np.ndarray]:
    from PIL import Image

    names = [picture["name"] for picture in pictures]
    return {name: np.asarray(Image.open(folder / f"{name}.png").convert("RGB")) for name in names}
