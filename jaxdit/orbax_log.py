"""What Orbax and its threads say when something fails, left to the sentence of whoever asked for it."""

from __future__ import annotations

import functools
import logging
import re
import sys
import warnings


def first_line(error: Exception) -> str:
    """Both ends of a long line: TensorStore names the array first, then what the disk said, then its own settings."""
    line = re.sub(r" \[\w+(\[\d+\])?='.*", "", (str(error) or type(error).__name__).splitlines()[0])
    return line if len(line) <= 200 else f"{line[:80]} ... {line[-115:]}"


@functools.cache
def leave_out_tracebacks() -> None:
    """What fails is told in a sentence by who asked for it, not by every thread that was at it.

    Orbax closes its event loop at the first array that fails. Then TensorStore prints "Event loop is closed" for those in hand,
    asyncio "was never retrieved", Python "was never awaited" for those not begun, and each of Orbax's threads its traceback.
    """
    told = sys.unraisablehook

    def hook(unraisable):
        if str(unraisable.exc_value) != "Event loop is closed":
            told(unraisable)

    sys.unraisablehook = hook
    logging.getLogger("absl").addFilter(lambda record: not (record.exc_info and "/orbax/" in record.pathname))
    logging.getLogger("asyncio").addFilter(lambda record: "was never retrieved" not in record.getMessage())
    warnings.filterwarnings("ignore", message="coroutine '.*' was never awaited", category=RuntimeWarning)
