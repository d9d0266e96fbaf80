"""The training loop, from the configuration to the last checkpoint, readable from top to bottom.

A step is one attempted optimizer update over train.batch_size samples, gathered from micro-batches that may come from
different buckets. Everything random is a function of (train.seed, step), so a run that was killed goes on bit for bit.
"""

from __future__ import annotations

import logging
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from encode.records import InputError, only_one
from jaxdit import checkpoint, data, flow, mesh, metrics, model, optim, trained
from jaxdit import workdir as folder

VOIDED_LIMIT = 10
SAY_EVERY = 30.0  # seconds between progress lines, at the most
HELD_OUT = 2**31 - 1  # stands where a step stands in the keys of training, and no step reaches it


class TrainingStopped(RuntimeError):
    """The run cannot go on; the message names the last good checkpoint. Exit code 1."""


def train(config: Any, workdir: str | Path) -> str:
    """Train, or go on training, in a working folder.

    Args:
      config: as in configs/quickstart.py.
      workdir: created where missing; resumed from its newest complete checkpoint otherwise.

    Returns:
      "done", or "stopped" after SIGTERM or SIGINT with everything saved.

    Raises:
      InputError: the configuration, the data set or the working folder is wrong; nothing was changed.
      TrainingStopped: too many updates in a row were not finite.
    """
    workdir = Path(workdir)
    folder.check(config, jax.device_count())
    try:
        mesh.compute_dtype(config.model.dtype)
        warmup = optim.warmup_updates(config.optim.warmup_steps, config.train.total_steps)
    except ValueError as error:
        raise InputError(str(error)) from error
    dataset = data.Dataset(
        config.data.path,
        holdout_fraction=config.data.holdout_fraction,
        text_lengths=config.data.text_lengths,
        normalize_vision=config.data.normalize_vision,
    )
    with only_one(workdir):
        dataset.describe(folder.claim(workdir, config, dataset.path, dataset.info))
        return run(config, workdir, dataset, warmup)


def run(config: Any, workdir: Path, dataset: data.Dataset, warmup: int) -> str:
    """The run itself, in a working folder that is ours; see `train`."""
    # One axis of devices: parameters on each, micro-batches divided over them.
    devices = mesh.make_mesh()
    everywhere, divided = mesh.replicated(devices), mesh.over_batch(devices)
    settings = trained.model_settings(config.model, dataset.info["widths"])
    graph, shapes = model.abstract(settings)
    announce(config, dataset, shapes, warmup)
    schedule = optim.learning_rate(
        peak=config.optim.peak_learning_rate,
        end=config.optim.end_learning_rate,
        warmup=warmup,
        total=config.train.total_steps,
    )
    optimizer = optim.make_optimizer(
        schedule, **{name: config.optim[name] for name in ("b1", "b2", "eps", "weight_decay", "clip_norm")}
    )
    initial = jax.jit(partial(new_state, settings, optimizer, config.train.seed), out_shardings=everywhere)
    zeros = jax.jit(partial(new_total, shapes), out_shardings=everywhere)
    accumulate = jax.jit(partial(accumulate_gradients, graph, dict(config.flow), config.train.seed), donate_argnums=1)
    update = jax.jit(
        partial(apply_update, optimizer, schedule, config.optim.ema_decay, config.train.batch_size),
        donate_argnums=0,
    )

    judge = jax.jit(partial(held_out_losses, graph, dict(config.flow), config.train.seed))

    batches = data.training_batches(
        dataset, seed=config.train.seed, micro_batch=config.train.micro_batch, flip=config.flow.flip
    )
    saver = checkpoint.Checkpoints(workdir, every=config.checkpoint.every, keep=config.checkpoint.keep)
    state, step = initial(), 0
    restored = saver.restore(*_split_ema(state))
    if restored is not None:
        step, rest, ema, position = restored
        state = rest | {"ema": ema}
        batches.set_state(position)
        logging.info("Going on at step %d of %d in %s.", step, config.train.total_steps, workdir)
    folder.check_space(workdir, 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
    log = metrics.Metrics(workdir, step)
    clock, stop, saved_at = metrics.Clock(), StopOnSignal(), time.monotonic()
    micro_batches = config.train.batch_size // config.train.micro_batch
    compiled: set[Any] = set()
    pending, position = None, batches.get_state()
    try:
        while step < config.train.total_steps and not stop.requested:
            total = zeros()
            for micro_batch in range(micro_batches):
                began = time.monotonic()
                batch = next(batches)
                clock.waited(time.monotonic() - began)
                kind = (batch.pop("bucket"), batch["text"].shape[1])
                batch.pop("rows")
                arrays = jax.device_put(batch, divided)
                where = jax.device_put(np.array([step, micro_batch * config.train.micro_batch], np.int32), everywhere)
                total = accumulate(state["params"], total, arrays, where)
                if kind not in compiled:  # the first call of each shape compiles: not a rate to report
                    jax.block_until_ready(total)
                    compiled.add(kind)
                    clock.skip(time.monotonic() - began)
                if stop.requested:
                    break
            if stop.requested:
                break  # the update in hand is dropped: a resumed run makes it again, bit for bit
            state, row = update(state, total)
            step, position = step + 1, batches.get_state()
            if update not in compiled:
                jax.block_until_ready(state)
                compiled.add(update)
                clock = metrics.Clock()
            clock.trained(config.train.batch_size)
            if pending is not None:  # one step late, so that the device never waits for this line
                report(pending, log, clock, config, saver)
            pending = {"step": step, **row}
            if config.train.eval_every and step % config.train.eval_every == 0:
                began = time.monotonic()
                pending["held_out_loss"] = evaluate(judge, state["ema"], dataset, config.train, everywhere, divided)
                clock.skip(time.monotonic() - began)
            due = step % config.checkpoint.every == 0 or step == config.train.total_steps
            if due or time.monotonic() - saved_at > 60 * config.checkpoint.minutes:
                report(pending, log, clock, config, saver)
                pending = None
                began = time.monotonic()
                saver.wait()
                saver.save(step, *_split_ema(state), position)
                saved_at = time.monotonic()
                clock.skip(saved_at - began)
        if pending is not None:
            report(pending, log, clock, config, saver)
        if step not in saver.steps() and step > 0:
            saver.wait()
            saver.save(step, *_split_ema(state), position)
        saver.wait()
    finally:
        stop.close()
        log.close()
        batches.close()
        saver.close()
    return "stopped" if step < config.train.total_steps else "done"


def announce(config: Any, dataset: data.Dataset, shapes: Any, warmup: int) -> None:
    counts = {name: len(rows) for name, rows in dataset.train.items()}
    logging.info(
        "%s parameters, %s on %d x %s.",
        f"{model.count_parameters(shapes):,}",
        mesh.compute_dtype(config.model.dtype),
        jax.device_count(),
        jax.devices()[0].device_kind,
    )
    logging.info("%d images to train on in %d buckets: %s.", sum(counts.values()), len(counts), counts)
    logging.info(
        "%d steps of %d images (%d at a time), warm-up over %d; the decay of the averaged weights rises to %.5f at the end.",
        config.train.total_steps, config.train.batch_size, config.train.micro_batch, warmup,
        min(config.optim.ema_decay, (1 + config.train.total_steps) / (10 + config.train.total_steps)),
    )  # fmt: skip


def new_state(settings, optimizer, seed):
    """params, ema (a copy: an alias could not be donated), opt_state, and the counts of updates."""
    params = model.initial_parameters(settings, seed)
    zero = jnp.zeros((), jnp.int32)
    return {
        "params": params,
        "ema": jax.tree.map(jnp.copy, params),
        "opt_state": optimizer.init(params),
        "updates": zero,
        "voided": zero,
        "voided_in_row": zero,
    }


def new_total(shapes):
    """Accumulators of one update, float32: a bfloat16 sum would lose the small gradients."""
    gradients = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), shapes)
    return {"gradients": gradients, "loss": jnp.zeros((), jnp.float32)}


def accumulate_gradients(graph, options, seed, params, total, batch, where):
    """Add one micro-batch's sums of losses and gradients to `total`; where is [step, first sample of the update]."""
    flow_options = {name: options[name] for name in ("mean", "std", "shift", "drop_both", "drop_text", "drop_vision")}
    keys = flow.sample_keys(seed, where[0], where[1], batch["latent"].shape[0])

    def summed_loss(params):
        return flow.losses(nnx.merge(graph, params), batch, keys, **flow_options).sum()

    loss, gradients = jax.value_and_grad(summed_loss)(params)
    return {"gradients": jax.tree.map(jnp.add, total["gradients"], gradients), "loss": total["loss"] + loss}


def apply_update(optimizer, schedule, maximum_decay, batch_size, state, total):
    """One update from the mean over all samples; where anything is not finite, nothing moves but the counts of voided."""
    gradients = jax.tree.map(lambda leaf: leaf / batch_size, total["gradients"])
    loss, norm = total["loss"] / batch_size, optax.global_norm(gradients)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    changes, opt_state = optimizer.update(gradients, state["opt_state"], state["params"])
    params = optax.apply_updates(state["params"], changes)
    updates = state["updates"] + 1
    moved = {
        "params": params,
        "ema": optim.update_ema(state["ema"], params, optim.ema_decay(updates, maximum_decay)),
        "opt_state": opt_state,
        "updates": updates,
    }
    kept = {name: state[name] for name in moved}
    voided = (~finite).astype(jnp.int32)
    new = jax.tree.map(lambda new, old: jnp.where(finite, new, old), moved, kept) | {
        "voided": state["voided"] + voided,
        "voided_in_row": (state["voided_in_row"] + 1) * voided,
    }
    row = {
        "loss": loss,
        "grad_norm": norm,
        "learning_rate": schedule(state["updates"]),
        "updates": new["updates"],
        "voided": new["voided"],
        "voided_in_row": new["voided_in_row"],
    }
    return new, row


def held_out_losses(graph, options, seed, params, batch, first):
    """[batch] losses with every condition present; the draws depend on the number of the image alone, never on the step."""
    keys = flow.sample_keys(seed, HELD_OUT, first, batch["latent"].shape[0])
    drawn = {name: options[name] for name in ("mean", "std", "shift")}
    return flow.losses(nnx.merge(graph, params), batch, keys, **drawn, drop_both=0.0, drop_text=0.0, drop_vision=0.0)


def evaluate(judge, ema, dataset, options, everywhere, divided) -> float | None:
    """Mean loss of the averaged weights over the held-out images; None where there are none."""
    losses = []
    for batch, first, count in dataset.held_out_batches(options.micro_batch, options.eval_budget):
        number = jax.device_put(np.int32(first), everywhere)
        losses.append(np.asarray(jax.device_get(judge(ema, jax.device_put(batch, divided), number)))[:count])
    return float(np.concatenate(losses).astype(np.float64).mean()) if losses else None


def report(row, log, clock, config, saver) -> None:
    """Write a finished step where it is due, and stop a run whose updates are all voided or whose saves fail."""
    saver.check()
    step = row["step"]
    voided_in_row = int(jax.device_get(row["voided_in_row"]))
    last = step in (1, config.train.total_steps)
    due = step % config.train.log_every == 0 or last or voided_in_row > 0 or "held_out_loss" in row
    if due or clock.silent_for() > SAY_EVERY:  # at 1024 twenty updates take twenty minutes: too long without a word
        values = {name: np.asarray(value).item() for name, value in jax.device_get(row).items()}
        for name in ("loss", "grad_norm"):  # JSON has no NaN
            values[name] = values[name] if np.isfinite(values[name]) else None
        values["samples_seen"] = step * config.train.batch_size
        values |= clock.look()
        if due:
            log.write(values)
        clock.said()
        if voided_in_row:
            logging.warning("Step %d was voided: its loss or gradient is not finite; nothing moved.", step)
        else:
            logging.info(metrics.progress_line(values, config.train.total_steps, config.train.batch_size))
    if voided_in_row >= VOIDED_LIMIT:
        saved = saver.steps()
        raise TrainingStopped(
            f"{voided_in_row} updates in a row up to step {step} were not finite. The last good checkpoint is "
            f"{f'step {saved[-1]}' if saved else 'none'} in {saver.folder}; lower optim.peak_learning_rate and go on."
        )


class StopOnSignal:
    """`requested` becomes true at SIGTERM or SIGINT; another one, more than a second later, ends the process at once.

    Within that second it is the same wish: Ctrl-C reaches a script and its child, and the script passes it on as well.
    """

    def __init__(self):
        self.requested, self._at = False, 0.0
        self._before = {number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT)}

    def _stop(self, number, frame):
        if not self.requested:
            logging.info("Asked to stop: saving. (Once more ends the process without saving.)")
            self.requested, self._at = True, time.monotonic()
        elif time.monotonic() - self._at > 1:
            self.close()
            signal.raise_signal(number)

    def close(self):
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _split_ema(state):
    return {name: value for name, value in state.items() if name != "ema"}, state["ema"]
