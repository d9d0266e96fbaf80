"""Many processes: how they find each other, agree on what only one of them knows, and end together.

JAX's own runtime connects them. All run the same program over the same plan, each on its own devices; what depends on a
clock, a signal or a disk is one process's, and is made everybody's here before anybody acts on it:

    same(value)      is refused where two do not see the same
    of_first(value)  what process 0 says
    anyone(value)    whether any says so
    jointly(act)     each acts; where one fails, all do
    lead(act)        process 0 acts; its answer and its failure are everybody's
    Requests         what any has asked for, without waiting for the devices

All but the last wait for the slowest. Alone, each costs nothing.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from encode.records import InputError

VARIABLES = {"coordinator": "JAX_COORDINATOR_ADDRESS", "processes": "JAX_NUM_PROCESSES", "process": "JAX_PROCESS_ID"}
LAUNCHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")  # how many processes Slurm's srun or mpirun has started
INDEXED_JOB = "JOB_COMPLETION_INDEX"  # of a Kubernetes Job, or of a JobSet's
HEARTBEAT = 30  # seconds without a sign of life until a process counts as dead, and all others end
PATIENCE = 900  # seconds that the processes of a run may take to leave one after the other


def start(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Join the other processes of a run, before anything asks JAX for devices; alone, nothing happens.

    Args:
      coordinator: HOST:PORT of process 0; None: JAX_COORDINATOR_ADDRESS, or what Slurm, Open MPI or Kubernetes says.
      processes: how many there are; None: JAX_NUM_PROCESSES, or the same.
      process: the number of this one, from 0; None: JAX_PROCESS_ID, the index in a Kubernetes Job, or the same.

    Raises:
      InputError: they cannot find each other; the message says what was known.
    """
    given = {"coordinator": coordinator, "processes": processes, "process": process}
    known = {name: os.environ.get(VARIABLES[name]) if value is None else value for name, value in given.items()}
    if known["process"] is None:
        known["process"] = os.environ.get(INDEXED_JOB)
    if str(known["processes"]) == "1":
        return
    launched = any(int(os.environ.get(name) or 1) > 1 for name in LAUNCHERS) or INDEXED_JOB in os.environ
    explicit = [name for name, value in known.items() if value is not None]
    if not explicit and not launched:
        return
    if not launched and len(explicit) < len(known):
        raise InputError(
            f"--{', --'.join(explicit)} given, but a run of many processes needs --{', --'.join(known)} (or in the environment "
            f"{', '.join(VARIABLES.values())})."
        )
    try:
        numbers = {name: None if known[name] is None else int(known[name]) for name in ("processes", "process")}
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        # Programs that overlap on the CPU would send their sums in another order in each process, and wait for ever.
        jax.config.update("jax_cpu_enable_async_dispatch", False)
        jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM away from the training loop
        jax.distributed.initialize(
            known["coordinator"],
            numbers["processes"],
            numbers["process"],
            cluster_detection_method="deactivate" if len(explicit) == len(known) else None,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=PATIENCE,
        )
    except (ValueError, RuntimeError) as error:
        words = ", ".join(f"{name} {value if value is not None else 'not known'}" for name, value in known.items())
        raise InputError(
            f"The processes of this run cannot find each other ({words}): {str(error).splitlines()[0]} Give each of them "
            "--coordinator=HOST:PORT, --processes=N and --process=I, or --processes=1 to run alone."
        ) from error


def first() -> bool:
    """Whether this is the process that writes the log, the metrics and the pages."""
    return jax.process_index() == 0


def number() -> int:
    return jax.process_index()


def many() -> bool:
    return jax.process_count() > 1


def everyone(value: int) -> np.ndarray:
    """[processes] int32: what each of them has given, to all; waits for the slowest."""
    if not many():
        return np.array([value], np.int32)
    with jax.transfer_guard("allow"):
        return multihost_utils.process_allgather(np.int32(value))


def of_first(value: bool) -> bool:
    """What process 0 says, to all."""
    return bool(everyone(value)[0])


def anyone(value: bool) -> bool:
    """Whether any process says so, to all."""
    return bool(everyone(value).any())


def jointly(act: Callable[[], Any]) -> Any:
    """act() in every process, each with its own result; where it fails in one, all fail.

    Raises:
      whatever act raises; in the others InputError where it was one, else OSError.
    """
    if not many():
        return act()
    result, failure = None, None
    try:
        result = act()
    except Exception as error:
        failure = error
    codes = everyone(0 if failure is None else 1 + isinstance(failure, InputError))
    if failure is not None:
        raise failure
    if codes.any():
        kind = InputError if codes.max() == 2 else OSError
        raise kind(f"process {int(codes.argmax())} of {len(codes)} could not go on; its own words say why.")
    return result


def lead(act: Callable[[], Any]) -> Any:
    """The first process acts, the others wait; its answer, a number or nothing, is everybody's, and so is its failure."""
    if not many():
        return act()
    answer = jointly(lambda: act() if first() else None)
    return int(everyone(int(answer or 0))[0])


def same(value: int, words: str) -> None:
    """Refuse a run whose processes do not see the same.

    Raises:
      InputError: `value` differs between processes; `words` say what it stands for.
    """
    values = everyone(value)
    if (values != values[0]).any():
        other = int(np.flatnonzero(values != values[0])[0])
        raise InputError(f"Process {other} of {len(values)} has {words} than process 0; all must see the same.")


def own_rows(sharding: jax.sharding.Sharding, count: int) -> np.ndarray:
    """The places of a batch of `count` rows that lie on this process's devices, ascending."""
    places = np.arange(count)
    return np.unique(
        np.concatenate([places[where] for where in sharding.addressable_devices_indices_map((count,)).values()])
    )


def place(values: Any, sharding: jax.sharding.Sharding) -> Any:
    """A tree of host arrays on the devices; where they are divided, each process gives its `own_rows`."""
    if not many():
        return jax.device_put(values, sharding)
    with jax.transfer_guard_host_to_device("allow"):
        return jax.tree.map(lambda value: jax.make_array_from_process_local_data(sharding, value), values)


class StopOnSignal:
    """`requested` becomes true at SIGTERM, SIGINT or SIGHUP; Ctrl-C more than a second later ends the process at once.

    All else is the same wish: Ctrl-C reaches a script and its child, and the script passes it on as well; so does a scheduler
    that preempts; a terminal that is closed takes both along (SIGHUP, unless nohup keeps it off).
    """

    def __init__(self, event: threading.Event):
        self.requested, self._at, self._event = False, 0.0, event  # the event is set with it
        heard = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            heard.append(signal.SIGHUP)
        self._before = {number: signal.signal(number, self._stop) for number in heard}

    def _stop(self, number, frame):
        if not self.requested:
            logging.info("Asked to stop: saving. (Once more ends the process without saving.)")
            self.requested, self._at = True, time.monotonic()
            self._event.set()
        elif number == signal.SIGINT and time.monotonic() - self._at > 1:
            self.close()
            signal.raise_signal(number)

    def close(self):
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Requests:
    """What each process asks for by itself (after a signal, by a clock) as what all know, without waiting for the devices.

    With many processes an answer is that to the question before: it has been on its way while the devices worked.
    """

    def __init__(self, divided: jax.sharding.Sharding, everywhere: jax.sharding.Sharding):
        self._divided, self._on_its_way = divided, None
        self._any = jax.jit(lambda requests: requests.max(0), out_shardings=everywhere)

    def agree(self, *requests: bool) -> tuple[bool, ...]:
        """Whether any process has each of these requests; called by all of them alike."""
        if not many():
            return requests
        answer = self._on_its_way
        rows = np.tile(np.array(requests, np.int32), (jax.local_device_count(), 1))
        self._on_its_way = self._any(place(rows, self._divided))
        return (False,) * len(requests) if answer is None else tuple(map(bool, jax.device_get(answer)))

    def forget(self) -> None:
        """What is on its way has been fulfilled."""
        self._on_its_way = None


def why(error: Exception) -> str:
    """A sentence about what ended this process of many: where JAX's runtime failed, mostly the end of another one.

    The runtime's errors come as several kinds of exception; their words begin with a status such as UNAVAILABLE.
    """
    ends = f"Process {number()} of {jax.process_count()} ends"
    if not re.match("[A-Z_]{5,}: ", str(error)):
        return f"{''.join(traceback.format_exception(error))}{ends} by this error, and all others with it."
    return (
        f"{ends}: {str(error).splitlines()[0][:300]} Most likely another process has ended or cannot be reached; look for its "
        "last words. Start all of them again: they go on from the last complete checkpoint."
    )


def leave(words: str, code: int) -> None:
    """End this process at once, without waiting for others or for threads; process 0 of many, whose end ends all, goes last."""
    print(words, file=sys.stderr, flush=True)
    time.sleep(3.0 if many() and first() else 0.0)
    os._exit(code)
