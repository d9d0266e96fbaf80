"""What a run tells while it goes: the row of a finished step, the progress line, its health, and why it cannot go on."""

from __future__ import annotations

import logging
from typing import Any

import jax
import numpy as np

from jaxdit import health, metrics, startup

VOIDED_LIMIT = 10  # updates in a row
SAY_EVERY = 30.0  # seconds between progress lines, at the most
JUDGED = 2_000  # rows that health looks at


class TrainingStopped(RuntimeError):
    """The run cannot go on; the message names the last good checkpoint. Exit code 1."""


class Progress:
    """Writes a finished step where it is due, says when the run's health changes, and ends a run that cannot go on.

    Without a log (None, in all processes but the first) it only does the last.
    """

    def __init__(self, config, log, clock, rows, saver, images):
        self.config, self.log, self.clock, self.rows, self.saver = config, log, clock, rows, saver
        self.images = images
        self.verdict = rows[-1].get("health") if rows else None
        self.estimated = False

    def tell(self, row: dict[str, Any]) -> None:
        """One row of `update.apply_update`, with its "step" and what an evaluation found."""
        self.saver.check()
        voided_in_row = int(jax.device_get(row["voided_in_row"]))
        if self.log is not None:
            self._write(row, voided_in_row)
        if voided_in_row >= VOIDED_LIMIT:
            self.saver.wait()  # the save in hand may be the last good one
            saved = self.saver.steps()
            raise TrainingStopped(
                f"{voided_in_row} updates in a row up to step {row['step']} were not finite. The last good checkpoint is "
                f"{f'step {saved[-1]}' if saved else 'none'} in {self.saver.folder}; lower optim.peak_learning_rate and go on."
            )

    def _write(self, row: dict[str, Any], voided_in_row: int) -> None:
        options, step = self.config.train, row["step"]
        due = (
            step % options.log_every == 0 or step in (1, options.total_steps) or voided_in_row or "eval_seconds" in row
        )
        if due or self.clock.silent_for() > SAY_EVERY:  # at 1024 twenty updates take twenty minutes: too long a silence
            values = _numbers(jax.device_get(row))
            values["samples_seen"] = step * options.batch_size
            values["passes"] = values["samples_seen"] / self.images
            values |= self.clock.look()
            if "eval/held_out/ema/text_vision" in values:
                values["held_out_loss"] = values["eval/held_out/ema/text_vision"]
            if due:
                self._judge(values)
                self.log.write(values)
            self.clock.said()
            if voided_in_row:
                logging.warning("Step %d was voided: its loss or gradient is not finite; nothing moved.", step)
            else:
                logging.info(metrics.progress_line(values, options.total_steps, options.batch_size))
            if values["images_per_second"] and not self.estimated:
                self.estimated = True
                logging.info(startup.remaining(self.config, step, values["images_per_second"]))

    def _judge(self, values: dict[str, Any]) -> None:
        self.rows = [*self.rows[-JUDGED:], values]
        saved = {"saved": self.saver.steps(), "averages": self.saver.steps("ema")}
        verdict = health.judge(self.rows, **saved, **self.config.health)
        values["health"] = verdict.name
        if verdict.name != self.verdict:
            say = logging.warning if verdict.level == "act" else logging.info
            say("Health: %s", verdict.words)
            self.verdict = verdict.name


def _numbers(row):
    """Python numbers by name, an array's as NAME/0, NAME/1, ...; None where not finite, as JSON has no NaN."""
    values = {}
    for name, value in row.items():
        parts = np.asarray(value)
        named = [(name, parts)] if parts.ndim == 0 else [(f"{name}/{k}", part) for k, part in enumerate(parts)]
        values |= {key: part.item() if np.isfinite(part) else None for key, part in named}
    return values
