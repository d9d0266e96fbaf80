"""The training loop, from the configuration to the last checkpoint, readable from top to bottom.

A step is one attempted optimizer update over train.batch_size samples, gathered from micro-batches that may come from
different buckets. Everything random is a function of (train.seed, step), so a run that was killed goes on bit for bit.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
import zlib
from collections import deque
from pathlib import Path
from typing import Any

import jax
import numpy as np

from encode.records import DatasetError, InputError, only_one
from jaxdit import (
    checkpoint,
    data,
    estimate,
    health,
    heldout,
    mesh,
    metrics,
    optim,
    order,
    origin,
    preview_set,
    previews,
    processes,
    programs,
    report,
    startup,
    trackers,
)
from jaxdit import workdir as folder
from jaxdit.begin import begin, split_ema
from jaxdit.progress import JUDGED, Progress

TRY_AGAIN = 300.0  # seconds after a save that failed
FREE_SECONDS = 60.0  # of evaluation and previews, before train.eval_budget is looked at


def train(config: Any, workdir: str | Path) -> str:
    """Train, or go on training, in a working folder.

    Args:
      config: as in configs/quickstart.py.
      workdir: created where missing; resumed from its newest complete checkpoint otherwise.

    Returns:
      "done", or "stopped" after SIGTERM, SIGINT or SIGHUP with everything saved.

    Raises:
      InputError: the configuration, the data set or the working folder is wrong; nothing was changed.
      data.ReadFailed: a record cannot be read; everything until then is saved.
      progress.TrainingStopped: too many updates in a row were not finite.
      checkpoint.SaveFailed: too many saves in a row, or the last one, could not be written.
    """
    workdir = Path(workdir)
    folder.check(config, jax.device_count())
    devices = mesh.make_mesh(config.mesh.data, config.mesh.fsdp)
    try:
        mesh.compute_dtype(config.model.dtype)
        optim.warmup_updates(config.optim.warmup_steps, config.train.total_steps)
        health.judge([], **config.health)
    except ValueError as error:
        raise InputError(str(error)) from error
    if config.metrics.wandb:
        trackers.wandb_library(config.metrics.wandb)  # that it is missing is said now
    dataset = data.Dataset(
        config.data.path,
        holdout_fraction=config.data.holdout_fraction,
        text_lengths=config.data.text_lengths,
        normalize_vision=config.data.normalize_vision,
    )
    done = (checkpoint.saved_steps(workdir, "state") or [0])[-1]
    if done > config.train.total_steps:
        raise InputError(f"train.total_steps={config.train.total_steps}: {workdir} has done {done} steps already.")
    if processes.many():
        settings = config.to_json_best_effort().replace(json.dumps(config.data.path), "")
        processes.same(zlib.crc32(settings.encode()) >> 1, "another configuration")
        processes.same(dataset.digest(), f"another data set in {dataset.path}")
    with contextlib.ExitStack() as held:

        def claim():
            start = None
            folder.refuse_strangers(workdir)
            if folder.is_new(workdir):
                if config.sample.previews > 0:
                    preview_set.asked_for(config)  # what is wrong with it is said before anything is written
                start = origin.look(config, dataset.info)
            held.enter_context(only_one(workdir))
            folder.claim(workdir, config, dataset.path, dataset.info, start)

        processes.lead(claim)
        processes.jointly(lambda: dataset.describe(json.loads((workdir / "dataset.json").read_text(encoding="utf-8"))))
        return run(config, workdir, dataset, devices)


def run(config: Any, workdir: Path, dataset: data.Dataset, devices: jax.sharding.Mesh) -> str:
    """The run itself, in a working folder that is ours; see `train`."""
    # Micro-batches are divided over all devices, the state is cut over those of the axis fsdp.
    everywhere, divided = mesh.replicated(devices), mesh.over_batch(devices)
    made = programs.of(config, dataset.info["widths"], devices)
    if processes.first():
        startup.announce(config, dataset, made.settings, made.shapes, origin.read(workdir), workdir, devices)

    # Every process plans the same micro-batches, and reads the rows that lie on its devices.
    places = processes.own_rows(divided, config.train.micro_batch)
    batches = data.training_batches(
        dataset, seed=config.train.seed, micro_batch=config.train.micro_batch, flip=config.flow.flip, places=places
    )  # fmt: skip
    saver = checkpoint.Checkpoints(workdir, every=config.checkpoint.every, keep=config.checkpoint.keep)
    step, state, kept = begin(config, workdir, made, saver, devices)
    if kept:
        batches.set_state(kept["position"])
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))  # with one saved already, the next takes its place
    processes.lead(lambda: saver.give_way(needed))
    processes.lead(lambda: folder.check_space(workdir, 1 if saver.steps() else 2, needed))

    known = folder.in_full(json.loads(config.to_json_best_effort()))
    log = metrics.Metrics(workdir, step, wandb=config.metrics.wandb, config=known) if processes.first() else None
    rows = list(deque(metrics.rows(workdir), JUDGED))
    clock = metrics.Clock(
        start_seconds=max(log.seconds if log else 0.0, kept.get("metrics", {}).get("seconds", 0.0)),
        peak=estimate.peak_flops(jax.devices()[0].device_kind, made.settings["dtype"], jax.device_count()),
    )
    progress = Progress(config, log, clock, rows, saver, sum(map(len, dataset.train.values())))
    previewing = config.sample.previews > 0
    began = time.monotonic()  # a person's own sentences are encoded first, which is not training
    pictures = previews.Previews(workdir, dataset, config, made.graph) if previewing and log else None
    clock.skip(time.monotonic() - began)
    budget, stop, saved_at = Budget(config.train.eval_budget), processes.StopOnSignal(dataset.closing), time.monotonic()
    requests, stopping = processes.Requests(divided, everywhere), False
    micro_batches = config.train.batch_size // config.train.micro_batch
    compiled: set[Any] = set()
    owed = processes.of_first(_owes_evaluation(config.train.eval_every, step, rows))
    pending, position = None, batches.get_state()

    def save():
        """Everything that going on needs, in the background; the page is written anew."""
        nonlocal pending
        jax.block_until_ready(state)  # the update in hand is training, not saving
        began = time.monotonic()
        if pending is not None:
            progress.tell(pending)
            pending = None
        if log:
            log.sync()
        with jax.transfer_guard("allow"):  # the copy to the host is what saving is
            beside = {"position": position, "metrics": {"step": step, "seconds": clock.seconds}, "config": known}
            beside |= {"devices": mesh.describe(devices), "order": order.VERSION}
            saver.save(step, *split_ema(state), beside)
        if log:
            report.update(workdir)
        requests.forget()
        clock.skip(time.monotonic() - began)

    def late():
        """Whether it is time to save by the clock of the first process; one that failed is tried again after a while."""
        since = time.monotonic() - saved_at
        return processes.first() and since > (TRY_AGAIN if saver.failures else 60 * config.checkpoint.minutes)

    def evaluate():
        """The losses on held-out images and the seconds that they took, for this step's row; {} where a stop ended it."""
        jax.block_until_ready(state)
        began = time.monotonic()
        found = heldout.evaluate(
            made.judge,
            {"ema": state["ema"], "raw": state["params"]},
            dataset,
            batch_size=config.train.micro_batch,
            images=config.train.eval_images,
            places=places,
            place=lambda value: processes.place(value, divided),
            everywhere=lambda value: processes.place(value, everywhere),
            stopped=lambda: processes.anyone(stop.requested),
        )
        seconds = budget.spent("evaluation", time.monotonic() - began)
        clock.skip(seconds)
        return {} if found is None else found | {"eval_seconds": seconds}

    def preview():
        """Draw the previews: every process gives its part of the averaged weights, the first one draws."""
        began = time.monotonic()
        with jax.transfer_guard("allow"):
            averaged = mesh.on_one(devices, state["ema"])
            if pictures:
                pictures.draw(step, averaged)
        clock.skip(budget.spent("previews", time.monotonic() - began))

    def show_finished():
        """Put the previews that the child has decoded into the log."""
        for drawn_at, found in pictures.finished() if pictures else ():
            log.pictures(drawn_at, found)

    try:
        with jax.transfer_guard("disallow"):  # an implicit copy between host and device is an error, not a slow run
            while step < config.train.total_steps:
                total = made.zeros(state["params"])
                flops = 0.0
                for micro_batch in range(micro_batches):
                    stopping, saving = requests.agree(stop.requested, late())
                    if stopping:
                        break
                    began = time.monotonic()
                    batch = next(batches)
                    clock.waited(time.monotonic() - began)
                    bucket, _ = batch.pop("bucket"), batch.pop("rows")  # what is left goes to the devices
                    tokens = batch["text"].shape[1]
                    flops += config.train.micro_batch * estimate.training_flops(
                        made.settings, batch["latent"].shape[1:], tokens
                    )
                    where = processes.place(
                        np.array([step, micro_batch * config.train.micro_batch], np.int32), everywhere
                    )
                    if log and (bucket, tokens) not in compiled:
                        logging.info(
                            "Compiling the step for %s, captions of %d tokens: up to two minutes, once.", bucket, tokens
                        )
                    total = made.accumulate(state["params"], total, processes.place(batch, divided), where)
                    if (bucket, tokens) not in compiled:  # the first call of each shape compiles: not a rate to report
                        jax.block_until_ready(total)
                        compiled.add((bucket, tokens))
                        clock.skip(time.monotonic() - began)
                if stopping:
                    break  # the update in hand is dropped: a resumed run makes it again, bit for bit
                began = time.monotonic()
                state, row = made.change(state, total)
                step, position = step + 1, batches.get_state()
                if made.change not in compiled:
                    jax.block_until_ready(state)
                    compiled.add(made.change)
                    clock.skip(time.monotonic() - began)
                clock.trained(config.train.batch_size, flops)
                if pending is not None:  # one step late, so that the device never waits for this line
                    progress.tell(pending)
                pending = {"step": step, **row}

                last = step == config.train.total_steps
                judged = owed or (config.train.eval_every and (step % config.train.eval_every == 0 or last))
                if judged and processes.of_first(budget.allows("evaluation", last)):
                    found = evaluate()
                    pending |= found
                    owed = owed and not found
                due = step % config.checkpoint.every == 0 or last
                if saving or (due and not saver.failures) or last:
                    save()
                    saved_at = time.monotonic()
                if due and previewing and processes.of_first(not stop.requested and budget.allows("previews", last)):
                    preview()
                show_finished()
    except DatasetError as error:
        if step > 0 and not processes.many():  # of many, one knows of it, and none can save alone
            save()  # the data are damaged, not the run
            try:
                saver.landed(step)
            except checkpoint.SaveFailed as failed:
                raise checkpoint.SaveFailed(f"{failed} The data cannot be read either: {error}") from error
        if processes.many() or not stop.requested:  # else it waited for a disk that is away
            raise
    else:
        if step > 0 and processes.of_first(step not in saver.steps()):
            save()
        if step > 0:
            saver.landed(step)
        if pictures:
            pictures.close(0.0 if stopping else previews.PATIENCE, lambda: stop.requested)
        show_finished()
        processes.everyone(0)  # none leaves before the last is ready to
    finally:
        dataset.closing.set()
        if log:
            log.close()
        batches.close()
        saver.close()
        stop.close()
    if log:
        report.update(workdir)
    if step < config.train.total_steps:
        kept = "with everything saved" if step else "before anything was trained"
        logging.info("Stopped at step %d of %d %s; the same command goes on.", step, config.train.total_steps, kept)
        return "stopped"
    return "done"


class Budget:
    """Evaluation and previews together take at most a share of the time; the first minute is free, the last step's too."""

    def __init__(self, share: float):
        self.share, self.total, self.began, self.told = share, 0.0, time.monotonic(), False
        self.latest: dict[str, float] = {}  # what each took the last time

    def allows(self, what: str, last: bool) -> bool:
        limit = max(FREE_SECONDS, self.share * (time.monotonic() - self.began))
        allowed = last or self.total + self.latest.get(what, 0.0) <= limit
        if not allowed and not self.told:
            self.told = True
            logging.info(
                "Evaluation and previews have taken %.0f s, and would take more than train.eval_budget=%g of the time: they are "
                "made less often than asked.", self.total, self.share,
            )  # fmt: skip
        return allowed

    def spent(self, what: str, seconds: float) -> float:
        self.total += seconds
        self.latest[what] = seconds
        return seconds


def _owes_evaluation(every, step, rows):
    """Whether the evaluation that was due last is missing, as a stop has met it: it is made up for after the next step."""
    due = step - step % every if every else 0
    reaches = step == due or (bool(rows) and rows[0]["step"] <= due)  # of a row that is not looked at nothing is known
    return due > 0 and reaches and not any("eval_seconds" in row for row in rows if row["step"] >= due)
