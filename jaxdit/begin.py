"""What a run begins with: its newest checkpoint, the step or the stage that it comes from, or new weights."""

from __future__ import annotations

import json
import logging
import shutil
from collections import deque
from pathlib import Path
from typing import Any

import jax

from encode.records import InputError
from jaxdit import checkpoint, mesh, metrics, order, origin, processes, programs
from jaxdit import workdir as folder


def begin(
    config: Any, workdir: Path, made: programs.Programs, saver: checkpoint.Checkpoints, devices: jax.sharding.Mesh
) -> tuple[int, Any, dict[str, Any]]:
    """(step, state, kept): from the newest checkpoint, from where the run comes from, or new.

    Kept is what `train.run` has saved beside the state: position in the data, metrics, config, devices, order; {} of a new run.

    Raises:
      InputError: what is there cannot be gone on from, or is of another configuration.
    """
    wanted = mesh.placed(devices, jax.eval_shape(made.fresh))  # shapes alone: two states at once would not fit
    lying = mesh.shardings(devices, wanted)
    if (restored := saver.restore(*split_ema(wanted))) is not None:
        step, rest, ema, kept = restored
        _compare(config, saver.folder / str(step), kept, devices)
        if step < config.train.total_steps:
            logging.info("Going on at step %d of %d in %s.", step, config.train.total_steps, workdir)
        else:
            logging.info("All %d steps are done already; a larger train.total_steps goes on from there.", step)
        return step, rest | {"ema": ema}, kept
    source = origin.read(workdir)
    if "restore" in source:
        other, step = Path(source["restore"]["workdir"]), source["restore"]["step"]
        rest, ema, kept = checkpoint.go_back(other, step, *split_ema(wanted))
        if processes.first() and (other / "metrics.jsonl").exists():
            shutil.copyfile(other / "metrics.jsonl", workdir / "metrics.jsonl")
        return step, rest | {"ema": ema}, kept
    _keep_rows(config, workdir, saver)
    if "init_from" in source:
        params = _weights_of_the_stage_before(source["init_from"], workdir, wanted["params"])
        return 0, jax.jit(made.state_of, out_shardings=lying, donate_argnums=0)(params), {}
    return 0, jax.jit(made.fresh, out_shardings=lying)(), {}


def _compare(config, saved, kept, devices):
    """Refuse what may not change since a checkpoint was saved, and say what makes the run another one."""
    now = folder.in_full(json.loads(config.to_json_best_effort()))
    folder.refuse_fixed(saved, folder.changed_fields(folder.in_full(kept["config"]), now))
    mesh.refuse_lost_card(kept.get("devices", ""))
    today = mesh.describe(devices, like=kept.get("devices", "1 device"))
    if kept.get("devices", today) != today:
        logging.warning(
            "Saved on %s, going on with %s: the samples and their order stay, but sums are rounded otherwise, so the run is "
            "not bit for bit what it would have been.", kept["devices"], today,
        )  # fmt: skip
    if kept.get("order", 1) != order.VERSION:
        logging.warning(
            "Saved by a version that shuffled otherwise: until the epoch ends some images come twice, some not."
        )


def _keep_rows(config, workdir, saver):
    """Set the rows of a run aside that went past its first checkpoint, and of which none is there: it begins anew."""
    last = next(iter(deque(metrics.rows(workdir), 1)), {"step": 0})
    seconds = last.get("seconds")
    overdue = last["step"] > 2 * config.checkpoint.every or (
        isinstance(seconds, float) and seconds > 2.5 * 60 * config.checkpoint.minutes
    )

    def keep():
        aside = workdir / f"metrics-until-{last['step']}.jsonl"
        shutil.copyfile(workdir / "metrics.jsonl", aside)
        logging.warning(
            "%s holds no step, though training went to step %d: is its disk mounted? It begins anew; the rows until then are "
            "kept in %s.", saver.folder, last["step"], aside.name,
        )  # fmt: skip

    if processes.of_first(overdue):
        processes.lead(keep)


def _weights_of_the_stage_before(named, workdir, shapes):
    try:
        raw = named["weights"] == "raw"
        return checkpoint.restore_weights(named["workdir"], shapes, step=named["step"], raw=raw)[1]
    except InputError as error:
        raise InputError(
            f"train.init_from: {workdir} begins from step {named['step']} of {named['workdir']}, as it has saved none of its "
            f"own. {error} Bring that step back there, or name a new --workdir and where the step is now."
        ) from error


def split_ema(state):
    return {name: value for name, value in state.items() if name != "ema"}, state["ema"]
