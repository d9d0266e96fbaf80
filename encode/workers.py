"""Processes that read pictures ahead of the encoders, each file within limits of time and memory.

Foreign bytes may hang a decoder, kill its process or eat the memory; here that costs one process and one file, which is
refused by name. A file is blamed only if it fails twice: a sleeping machine, a changed clock or the kernel's choice of a
victim when memory is short hits whatever file is in hand.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import resource
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import TimeoutError
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import forkserver
from typing import Any

import pebble

from encode.images import ImageProblem
from encode.records import InputError

TRIES = 2
GRACE = 10.0  # seconds after which a process ends itself whose file takes too long, and whose parent has died
TOO_LARGE = 77  # exit code of a process whose file takes more memory than it may
half = 0  # bytes of addresses, in a process that decodes: half of what it may take is taken
last = 0  # seconds that a call may take before the kernel ends the process
STARTING = 60.0  # seconds until the first process must be ready
AT_ONCE = 5.0  # seconds that a process which is still starting is given to end by itself


class CannotStart(RuntimeError):
    """The processes do not come up."""


class Workers:
    """A pool of decoding processes; a context manager.

    Args:
      count: processes; 0 means one a core.
      seconds: a call that takes longer is stopped (config.decode_seconds).
      memory: MiB that a call may take beyond what the process has at its start (config.decode_memory).
    """

    def __init__(self, count: int, seconds: float, memory: int):
        self.count = count or len(os.sched_getaffinity(0))
        self.seconds, self.memory = seconds, memory
        # A server without threads or PyTorch forks the processes, and has imported what they need: one starts in 10 ms.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["encode.prepare", "encode.workers"])
        main = sys.modules["__main__"]
        if not os.path.exists(getattr(main, "__file__", os.curdir)):
            del main.__file__  # a program read from a pipe: the processes would look for it and die
        with _unheard(signal.SIGTERM, signal.SIGHUP):
            forkserver.ensure_running()
        self._pool = self._start()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if kind is not None and issubclass(kind, InputError):  # early: a process that is still starting would cry out
            self._pool.close()
            with contextlib.suppress(TimeoutError):
                self._pool.join(AT_ONCE)
        self._pool.stop()
        self._pool.join()

    def map(self, function: Callable, work: Iterable, depth: int) -> Iterator[tuple[Any, Any]]:
        """(input, function(input)) in the order of the inputs, computed up to `depth` inputs ahead.

        Args:
          function: importable by name; an ImageProblem that it raises is its result.
          work: inputs, taken as they are needed.
          depth: how many inputs may be under way.

        Yields:
          the result, or an ImageProblem where the file took too long, too much memory, or its process with it.

        Raises:
          CannotStart: the processes died and did not come up again.
        """
        pending: deque = deque()
        try:
            for value in work:
                pending.append((value, *self._submit(function, value)))
                if len(pending) >= depth:
                    yield self._result(function, *pending.popleft())
            while pending:
                yield self._result(function, *pending.popleft())
        finally:
            for _, future, _ in pending:
                future.cancel()

    def _start(self) -> pebble.ProcessPool:
        pool = pebble.ProcessPool(
            self.count, context=self._context, initializer=_limit, initargs=(self.memory * 2**20, self.seconds + GRACE)
        )
        try:
            pool.schedule(os.getpid).result(timeout=STARTING)
        except (TimeoutError, BrokenProcessPool, pebble.ProcessExpired) as error:
            pool.stop()
            how = (
                f"not one was ready after {STARTING:.0f} s" if isinstance(error, TimeoutError) else "they died at once"
            )
            raise CannotStart(
                f"the processes that read pictures cannot be started ({how}); what they said stands above"
            ) from error
        return pool

    def _submit(self, function: Callable, value: Any) -> tuple[Any, pebble.ProcessPool]:
        return self._pool.schedule(_call, (function, value), timeout=self.seconds), self._pool

    def _result(self, function: Callable, value: Any, future, pool: pebble.ProcessPool) -> tuple[Any, Any]:
        for _ in range(TRIES):
            try:
                return value, future.result()
            except TimeoutError:
                problem = f"takes longer than config.decode_seconds={self.seconds:g} to decode"
            except pebble.ProcessExpired as error:
                problem = f"the decoder died of it ({_cause(error.exitcode)})"
                if error.exitcode == TOO_LARGE:
                    problem = f"takes more than config.decode_memory={self.memory} MiB to decode"
            except BrokenProcessPool:
                problem = "the processes that read pictures died with it"
                if pool is self._pool:  # the first to notice starts them anew
                    self._pool = self._start()
            future, pool = self._submit(function, value)
        future.cancel()
        return value, ImageProblem(problem)


@contextlib.contextmanager
def _unheard(*numbers: int) -> Iterator[None]:
    """Processes begun in here are deaf to these signals, and we ourselves for the while.

    A signal to all processes of a terminal or a service is for us, who then end the others when their work is taken.
    """
    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _cause(exitcode: int | None) -> str:
    try:
        return signal.Signals(-(exitcode or 0)).name
    except ValueError:
        return f"exit code {exitcode}"


def _limit(memory: int, seconds: float) -> None:
    """Runs once in each process."""
    global half, last
    os.setpgrp()  # a signal to the whole group is not for us (see `_unheard`)
    last = math.ceil(seconds)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a decoder stuck in C code would never see Python's handler
    try:
        with open("/proc/self/statm") as file:
            present = int(file.read().split()[0]) * resource.getpagesize()
    except OSError:  # not Linux
        present = 2**30
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit, half = present + memory, present + memory // 2
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a folder full of core files helps nobody


def _call(function: Callable, value: Any) -> Any:
    """Runs in the process: the result, or why there is none."""
    before = _peak()
    signal.alarm(last)  # deaf decoders are not to outlive a killed parent
    try:
        return function(value)
    except ImageProblem as problem:
        if not _lacked_memory(problem, before):
            return problem
        os._exit(TOO_LARGE)
    except MemoryError:
        os._exit(TOO_LARGE)  # what is kept here of files before counts, too: another process tries again
    finally:
        signal.alarm(0)


def _lacked_memory(problem: ImageProblem, before: int) -> bool:
    """Whether a picture seems damaged because its decoder had too little memory: few of them say so by MemoryError.

    libjpeg's "broken data stream" is either; it is taken for want of memory where the process grew past half of its limit.
    """
    words = str(problem.__cause__ or "").lower()
    if any(word in words for word in ("memory", "alloc")):
        return True
    return str(problem).startswith(("damaged", "truncated")) and _peak() > max(before, half)


def _peak() -> int:
    """The most bytes of addresses that this process has had; 0 where Linux does not say."""
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmPeak"))
    except (OSError, StopIteration):
        return 0
