"""Orbax checkpoints: WORKDIR/checkpoints/N/{state,ema,data}, the EMA restorable alone.

state is everything training needs to go on, ema the averaged weights that sampling uses, data the position in the data.
A step is written in the background under another name and renamed when it is complete, so a folder N is a whole
checkpoint or none. Old steps lose state and data first and keep their EMA, as a record of the run.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from encode.records import InputError
from jaxdit import processes, saved_shapes, seal
from jaxdit.orbax_log import first_line, leave_out_tracebacks

SNAPSHOTS, LONG_INTERVAL = 10, 50_000  # EMA snapshots kept: the newest ten, and one in so many steps for good
# The first save of each of the newest three half days stays resumable: trouble is often seen a day late.
HALF_DAYS, HALF_DAY = 3, 43_200
ITEMS = ("state", "ema", "data")
FAILURES = 3  # saves in a row that may fail before the run ends: a month of electricity is not spent on what is lost


class SaveFailed(RuntimeError):
    """A checkpoint could not be written; the message says why and which step is the last complete one."""


class Checkpoints:
    """The checkpoints of one working folder.

    Args:
      workdir: the working folder.
      every: distance of the EMA snapshots, in steps.
      keep: number of newest steps that stay resumable.

    Of many processes each writes and reads its part; all call alike, and what fails in one fails in all.
    """

    def __init__(self, workdir: str | Path, *, every: int, keep: int):
        self.folder = Path(workdir).resolve() / "checkpoints"
        self.every, self.keep = every, keep
        self.failures = 0  # saves in a row that did not land
        self._begun = (self.folder.parent / "config.json").exists()
        processes.lead(self._sweep)  # of a process that was killed; the folder is locked, so not in use
        self._writer, self._landing = _writer(), None
        self._sealing, self._sealed = threading.Thread(), -1

    def steps(self, item: str = "state") -> list[int]:
        """The steps at which `item` was saved completely, ascending."""
        return saved_steps(self.folder.parent, item)

    def save(self, step: int, state: Any, ema: Any, data: dict[str, Any]) -> None:
        """Start saving in the background, once the save before it has landed; the arrays are copied before this returns.

        A save that fails is told loudly and the run goes on: the caller tries again. The third in a row is an error.

        Raises:
          SaveFailed: the third save in a row could not be written.
        """
        self.wait()
        with self._telling_failures():
            needed = sum(leaf.nbytes for leaf in jax.tree.leaves((state, ema)))
            if processes.lead(functools.partial(self._make_room, step, needed)):
                self._landing = step
                items = ocp.args.Composite(
                    state=ocp.args.StandardSave(state), ema=ocp.args.StandardSave(ema), data=ocp.args.JsonSave(data)
                )
                processes.jointly(lambda: self._writer.save(self.folder / str(step), args=items))

    def _make_room(self, step: int, needed: int) -> bool:
        """Whether the step is still to be written."""
        if self._begun and not (self.folder.parent / "config.json").exists():
            raise OSError(f"{self.folder.parent} is not where this run began any more: moved, deleted, not mounted?")
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.failures:  # on a full disk, the half that was written is what this save needs
            self._sweep()
        if self._complete(step):
            return False
        # A disk may refuse while it says that there is room: before the last try, all that can go goes.
        self.give_way(math.inf if self.failures == FAILURES - 1 else needed)
        if (free := shutil.disk_usage(self.folder).free) < needed:
            raise OSError(f"it takes {needed / 1e6:,.1f} MB, the disk has {free / 1e6:,.1f} MB free")
        _remove(self.folder / str(step))  # a snapshot of an earlier pass over this step, without its state
        return True

    def give_way(self, needed: float) -> None:
        """Where the disk is short, give up what was kept to go back to, the oldest first: going on matters more."""
        spare = [self.folder / str(step) / "state" for step in self._resumable()[: -self.keep]]
        sizes = [sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) for path in spare]
        short = needed - shutil.disk_usage(self.folder).free if spare else 0
        if short > sum(sizes) and short < math.inf:
            return  # it would not be enough
        for path, size in zip(spare, sizes):
            if short > 0:
                logging.warning("The disk is short: step %s, kept to go back to, is given up.", path.parent.name)
                _remove(path)
                short -= size

    def check(self) -> None:
        """Tell a background save that has failed; raises SaveFailed at the third in a row. Of many processes, `wait` tells."""
        if jax.process_count() == 1:
            with self._telling_failures():
                self._writer.check_for_errors()
                self._seal()

    def wait(self) -> None:
        """Wait for the save in hand, then remove what is no longer kept; raises SaveFailed at the third failure in a row."""
        with self._telling_failures():
            processes.jointly(self._writer.wait_until_finished)
            if self._landing is not None and processes.lead(self._seal):
                logging.info("Step %d is saved.", self._landing)
                self.failures, self._landing = 0, None
            processes.lead(self._prune)

    def _seal(self) -> bool:
        """Whether the save in hand has landed; a thread then seals it, once."""
        step = self._landing
        if step is None or not self._complete(step):
            return False
        if step != self._sealed:
            self._sealing = threading.Thread(target=seal.finish, args=(self.folder / str(step),), daemon=True)
            self._sealing.start()
            self._sealed = step
        return True

    def landed(self, step: int) -> None:
        """Make sure that `step` has been saved, at the end of a run.

        Raises:
          SaveFailed: it has not.
        """
        self.wait()
        if not processes.lead(lambda: self._complete(step)):
            raise SaveFailed(f"{self.folder}: step {step} could not be saved. {self._last_good()}")

    @contextlib.contextmanager
    def _telling_failures(self):
        try:
            yield
        except Exception as error:  # Orbax passes on whatever its threads met
            self.failures, self._landing = self.failures + 1, None
            message = f"{self.folder}: a checkpoint could not be saved ({first_line(error)}). {self._last_good()}"
            with contextlib.suppress(Exception):
                self._writer.close()
            self._writer = _writer()
            if self.failures >= FAILURES:
                raise SaveFailed(message) from error
            logging.error("%s The run goes on and tries again.", message)

    def _last_good(self) -> str:
        last = next((f"step {step}" for step in reversed(self._resumable())), "none")
        return f"The last complete one is {last}; make room or mend the disk, and start again to go on."

    def close(self) -> None:
        try:
            self._writer.close()
        except Exception as error:  # what ends the run has been told, or is on its way
            logging.error("%s: the last save did not end well (%s).", self.folder, first_line(error))
        if self._sealing.is_alive():
            self._sealing.join()

    def restore(self, state: Any, ema: Any) -> tuple[int, Any, Any, dict[str, Any]] | None:
        """The newest complete step that can be read.

        Args:
          state, ema: trees of arrays or shapes like those saved, with the shardings wanted.

        Returns:
          (step, state, ema, data), or None where nothing has been saved yet.

        Raises:
          InputError: a checkpoint of another model, or none of the saved ones can be read.
        """
        steps = self._resumable()
        parts = sorted({*self.steps(), *self.steps("ema")})
        if parts and not steps:  # a kill leaves none or a whole one: starting anew would throw away what is left
            raise InputError(
                f"{self.folder}: none of the steps {', '.join(map(str, parts))} has all of {', '.join(ITEMS)}, so none can be "
                "gone on from; bring the missing folders back, or start a new --workdir from the averaged weights with "
                "--config.train.init_from."
            )
        if not parts and (landed := self.folder.parent / seal.LANDED).exists():
            raise InputError(
                f"{self.folder} holds no step, but {landed} says that one was saved there: is its disk mounted? To begin anew, "
                "name a new --workdir."
            )
        damaged: list[int] = []
        for step in reversed(steps):
            saved_shapes.check(self.folder / str(step) / "state", state)
            if processes.first():
                logging.info("Reading step %d and comparing it with its seal: half a second for each GB.", step)
            try:
                found = processes.jointly(functools.partial(read_step, self.folder / str(step), state, ema))
            except Exception as error:  # whatever the damage is, the step before may be whole
                if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
                    raise  # nothing is wrong with the checkpoint
                logging.warning("Step %d cannot be read (%s); trying the one before.", step, first_line(error))
                damaged.append(step)
                continue
            processes.lead(functools.partial(self._set_aside, damaged))
            if (landed := seal.landed(self.folder.parent)) > step and landed not in damaged and processes.first():
                logging.warning(
                    "Step %d had been saved here and is gone: is this the right disk? Step %d is taken.", landed, step
                )
            return step, *found
        if steps:
            raise InputError(f"{self.folder}: none of the steps {steps} can be read; restore the folder from a backup.")
        return None

    def _complete(self, step: int) -> bool:
        return all((self.folder / str(step) / item).is_dir() for item in ITEMS)

    def _resumable(self) -> list[int]:
        return [step for step in self.steps() if self._complete(step)]

    def _set_aside(self, steps: list[int]) -> None:
        """Rename what could not be read, so that the step can be saved again."""
        for step in steps:
            aside = self.folder / f"{step}.damaged-{time.time_ns()}"
            os.rename(self.folder / str(step), aside)
            logging.warning("Step %d is kept as %s; remove it when it is not wanted.", step, aside)

    def _sweep(self) -> None:
        """Remove what was never finished, written or removed."""
        for leftovers in (".*.removed", "*/.*.removed", "*.orbax-checkpoint-tmp*"):
            for leftover in self.folder.glob(leftovers):
                shutil.rmtree(leftover, ignore_errors=True)

    def _prune(self) -> None:
        resumable = self._resumable()  # one that lost a part must not push a whole one out
        # What has lost its state was a snapshot, perhaps by another checkpoint.every.
        snapshots = [step for step in self.steps("ema") if step % self.every == 0 or step not in resumable]
        first = {seal.saved_at(self.folder / str(step)) // HALF_DAY: step for step in reversed(resumable)}
        whole = {*resumable[-self.keep :], *list(first.values())[:HALF_DAYS]}  # by step, whatever the clock said
        wanted = whole.union(snapshots[-SNAPSHOTS:], (step for step in snapshots if step % LONG_INTERVAL == 0))
        for step in self.steps("ema"):
            if step not in wanted:
                _remove(self.folder / str(step))
            elif step not in whole:
                for item in ("state", "data"):
                    _remove(self.folder / str(step) / item)


def _writer() -> ocp.AsyncCheckpointer:
    leave_out_tracebacks()
    # Folders are made before save returns: a disk that refuses is then an error, not five minutes of waiting.
    options = ocp.AsyncOptions(create_directories_asynchronously=False)
    return ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(), async_options=options)


def read_step(folder: Path, state: Any, ema: Any) -> tuple[Any, Any, dict[str, Any]]:
    """(state, ema, data) of one complete step's folder, as trees like those given; raises whatever the reading meets."""
    leave_out_tracebacks()
    processes.lead(functools.partial(seal.verify, folder, ITEMS))  # before any goes into Orbax's barriers
    restored = ocp.Checkpointer(ocp.CompositeCheckpointHandler()).restore(
        folder,
        args=ocp.args.Composite(
            state=ocp.args.StandardRestore(_abstract(state)),
            ema=ocp.args.StandardRestore(_abstract(ema)),
            data=ocp.args.JsonRestore(),
        ),
    )
    return restored["state"], restored["ema"], restored["data"]


def go_back(workdir: Path, step: int, state: Any, ema: Any) -> tuple[Any, Any, dict[str, Any]]:
    """`read_step` of another run's folder; InputError where it cannot be read."""
    try:
        return processes.jointly(functools.partial(read_step, workdir / "checkpoints" / str(step), state, ema))
    except Exception as error:
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            raise
        others = _listed([other for other in saved_steps(workdir, "state") if other != step])
        raise InputError(
            f"train.restore: step {step} of {workdir} cannot be read ({first_line(error)}); its other whole steps: {others}. "
            "Name one of them, and a new --workdir."
        ) from error


def saved_steps(workdir: str | Path, item: str = "ema") -> list[int]:
    """The steps of WORKDIR at which `item` ("state" or "ema") was saved completely, ascending."""
    folder = Path(workdir) / "checkpoints"
    if not folder.is_dir():
        return []
    return sorted(int(child.name) for child in folder.iterdir() if child.name.isdigit() and (child / item).is_dir())


def save_weights(workdir: str | Path, step: int, weights: Any) -> None:
    """Write weights as the averaged ones of one step, alone: enough to be sampled and started from."""
    folder = Path(workdir).resolve() / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    items = ocp.args.Composite(ema=ocp.args.StandardSave(weights))
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
        writer.save(folder / str(step), args=items)


def restore_weights(workdir: str | Path, shapes: Any, *, step: int | None = None, raw: bool = False) -> tuple[int, Any]:
    """The weights of one step, alone: the EMA, or the raw parameters.

    Args:
      workdir: a working folder.
      shapes: tree of shapes of the parameters, with the shardings wanted; without: all on the first device.
      step: which; None: the newest that is complete and can be read, and newer ones are named in the log.
      raw: take the raw parameters instead of the EMA.

    Returns:
      (step, parameters).

    Raises:
      InputError: no such step, it cannot be read, or it belongs to another model.
    """
    leave_out_tracebacks()
    item, kind, other = ("state", "raw", "averaged") if raw else ("ema", "averaged", "raw")
    folder, steps = Path(workdir).resolve() / "checkpoints", saved_steps(workdir, item)
    if not steps or (step is not None and step not in steps):
        others = saved_steps(workdir, "ema" if raw else "state")
        if others and (step is None or step in others):
            raise InputError(
                f"{workdir}/checkpoints/{others[-1] if step is None else step}: its {kind} weights (the folder {item}) are "
                f"missing; steps that have them: {_listed(steps)}; steps with {other} ones "
                f"({'without --raw' if raw else '--raw'}): {_listed(others)}."
            )
        if not steps:
            raise InputError(f"{workdir}: no checkpoint has been saved yet; train first, with the same --workdir.")
        raise InputError(f"{workdir}: step {step} wanted, found steps {_listed(steps)}; name one of them.")
    if step is None and (newer := _incomplete(folder, after=steps[-1])):
        logging.warning(
            "%s: the %s weights of step %s are not complete (a save in hand, one that was cut off, or a part that was lost); "
            "step %d is taken.", folder, kind, _listed(newer), steps[-1],
        )  # fmt: skip
    for wanted in [step] if step is not None else reversed(steps):
        path = folder / str(wanted) / item
        try:
            seal.verify(path.parent, (item,))
            return wanted, _weights(path, shapes, raw)
        except InputError:
            raise
        except Exception as error:  # whatever the damage is, the person needs the folder's name
            if "RESOURCE_EXHAUSTED" in str(error):
                raise InputError(
                    f"{path}: the device's memory does not hold these weights; where a training has it, draw on another card, "
                    "or with JAX_PLATFORMS=cpu CUDA_VISIBLE_DEVICES= before the command (slow), or stop the training first."
                ) from error
            if step is not None:
                others = [other for other in steps if other != wanted]
                another = f"name another step of {_listed(others)}, or " if others else ""
                raise InputError(
                    f"{path} cannot be read ({first_line(error)}); {another}train on to save a new one."
                ) from error
            logging.warning("%s cannot be read (%s); trying the step before.", path, first_line(error))
    raise InputError(f"{folder}: none of the steps {_listed(steps)} can be read; restore the folder from a backup.")


def _weights(folder: Path, shapes: Any, raw: bool) -> Any:
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = _abstract({"params": shapes} if raw else shapes, device)
    saved_shapes.check(folder, target, whole=not raw)
    args = ocp.checkpoint_utils.construct_restore_args(target)
    args = ocp.args.PyTreeRestore(item=target, restore_args=args, partial_restore=True)
    weights = ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).restore(folder, args=args)
    return weights["params"] if raw else weights


def _incomplete(folder: Path, after: int) -> list[int]:
    """Steps newer than `after` of which something lies in the folder, under their own name or that of a save in hand."""
    numbers = {child.name.removesuffix(child.suffix if "orbax-checkpoint-tmp" in child.suffix else "")
               for child in folder.iterdir()}  # fmt: skip
    return sorted(int(number) for number in numbers if number.isdigit() and int(number) > after)


def _listed(steps: list[int]) -> str:
    return ", ".join(map(str, steps)) or "none"


def _abstract(tree: Any, device: Any = None) -> Any:
    def shape(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or device)

    return jax.tree.map(shape, tree)


def _remove(folder: Path) -> None:
    """Remove a folder so that a kill in between leaves nothing that looks complete."""
    if folder.exists():
        doomed = folder.with_name(f".{folder.name}.removed")
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(folder, doomed)
        shutil.rmtree(doomed, ignore_errors=True)
