"""What our commands share: a configuration file with overrides, one clear sentence for wrong input, exit codes.

0 done, 1 the work failed, 2 the call or the input is wrong, 3 stopped on request with everything saved.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import io
import logging
import os
import re
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from absl import logging as absl_logging
from ml_collections import config_flags

from encode.records import InputError
from encode.whole_files import DISK_FULL

WRONG_PATH = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EACCES, errno.EPERM)


_asked_to_stop = threading.Event()
STOPPED = 3  # exit code of what a signal ended, with everything kept that was made


def command(module: str, words: Sequence[str]) -> str:
    """What a shell takes, in the folder of this code, to run one of our modules with the Python that runs this one."""
    root, python = Path(__file__).resolve().parents[1], Path(sys.executable or "python")
    python = python.parent.resolve() / python.name  # the file itself may be a link out of the environment
    name = python.relative_to(root) if python.is_relative_to(root) else "python"
    return shlex.join([str(name), "-m", module, *words])


def run(main: Callable[..., int], *, config: str | None = None, interrupted: bool = False) -> None:
    """Parse the command line, call main, and leave the process with its exit code.

    Args:
      main: takes the configuration (or nothing where `config` is None), returns an exit code.
      config: default of --config, a Python file with get_config(arg), given as FILE or FILE:ARG.
      interrupted: whether SIGTERM, as Ctrl-C, ends main wherever it is, by KeyboardInterrupt (see `go_on`). In the midst of a
        compilation that leaves JAX in a state in which the interpreter's own end can crash: such a process is left at once.
    """
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:  # closed by who started us (>&-)
            setattr(sys, stream, open(os.devnull, "w"))  # noqa: SIM115 - it stays open
    if interrupted:
        signal.signal(signal.SIGINT, _interrupt)
        signal.signal(signal.SIGTERM, _interrupt)
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        # File names are UTF-8 to the libraries that write; Python alone would read them in the locale's encoding.
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {"PYTHONUTF8": "1"})
    if isinstance(sys.stdout, io.TextIOWrapper):
        given, raw = sys.stdout, _Output(sys.stdout.fileno(), "w", closefd=False)
        sys.stdout = io.TextIOWrapper(
            raw if given.write_through else io.BufferedWriter(raw),
            given.encoding,
            errors="backslashreplace",  # a picture's name that the terminal lacks ends no work
            line_buffering=given.line_buffering,
            write_through=given.write_through,
        )
    absl_logging.use_absl_handler()
    absl_logging.get_absl_handler().setFormatter(logging.Formatter("%(message)s"))
    absl_logging.set_verbosity(absl_logging.INFO)
    absl_logging.set_stderrthreshold(absl_logging.INFO)
    logging.getLogger("absl").setLevel(logging.WARNING)
    for noisy in ("orbax", "jax", "tensorflow_datasets", "grain"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        if {"--help", "-help", "-h"} & set(sys.argv[1:]):
            print(_help(config))
            code = 0
        else:
            options = _parse(config)
            code = main(options) if config else main()
        sys.stdout.flush()
    except InputError as error:
        code = fail(str(error), 2)
    except KeyboardInterrupt:
        fail("interrupted before everything was saved; the same command goes on from what was saved last.")
        os._exit(1)  # threads that are still writing would fill pages when the interpreter ends them
    except OSError as error:
        if error.errno is None:
            raise
        code = fail(file_problem(error), 2 if error.errno in WRONG_PATH else 1)
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            stream.flush()
        except OSError:  # full, or read by nobody: the interpreter would try again, and give an exit code of its own
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    if interrupted and code == STOPPED:
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


class _Output(io.FileIO):
    """The standard output; where its reader has seen enough (| head), the work goes on unheard to its own exit code."""

    def write(self, data):
        try:
            return super().write(data)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            return len(data)


def file_problem(error: OSError) -> str:
    """What a file did not do, and what helps where its disk is full."""
    words = f"{error.filename or 'a file'}: {error.strerror}."
    return f"{words} Make room, and give the same command again." if error.errno in DISK_FULL else words


def stop_on_signal() -> threading.Event:
    """Set by the first signal, for who asks between two pictures; a second one stops at once, which loses nothing either."""
    asked = threading.Event()

    def handle(number, frame):
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup leaves it
            signal.signal(number, handle)
    return asked


def _interrupt(_, frame) -> None:
    _asked_to_stop.set()
    # JAX's callback, run by the garbage collector: it would be lost there.
    if frame is None or frame.f_code.co_name != "_xla_gc_callback":
        raise KeyboardInterrupt


def go_on() -> None:
    """Raise KeyboardInterrupt where a signal came that raised none, or one that was lost in a library's callback."""
    if _asked_to_stop.is_set():
        raise KeyboardInterrupt


def _help(config: str | None) -> str:
    words = [sys.modules["__main__"].__doc__ or "", flags.FLAGS.main_module_help().strip()]
    if config:
        words.append(
            f"Fields that --config.FIELD=VALUE overrides, with what each is for: the file of --config ({config})."
        )
    return "\n\n".join(words)


def fail(message: str, code: int = 1) -> int:
    """Say what is wrong in one sentence on the standard error stream, and give the exit code."""
    with contextlib.suppress(OSError):  # nobody reads it
        print(message if code == STOPPED else f"Error: {message}", file=sys.stderr, flush=True)
    return code


def _parse(default: str | None) -> Any:
    """The configuration with its overrides; what cannot be understood is an InputError that names the nearest field."""
    arguments = list(sys.argv)
    try:
        arguments = flags.FLAGS.read_flags_from_files(arguments, force_gnu=False)
        given = [argument for argument in arguments if re.match(r"--?config(=|$)", argument)]
        if len(given) > 1:
            raise InputError(f"{' '.join(given)}: --config is given twice; leave one.")
        if default and not given:
            given = [f"--config={default}"]
            arguments.insert(1, given[0])  # as the flag's default, overrides would be judged while it is defined
        holder = config_flags.DEFINE_config_file("config", lock_config=True) if default else None
        rest = flags.FLAGS(arguments)
        config = holder.value if holder is not None else None
        if holder is not None:
            _ = config.is_locked  # a file that could not be loaded says so only when it is used
    except flags.Error as error:
        words = str(error).strip().removeprefix("ERROR:: ")
        if missing := re.match(r"flag (--\w+)=None: ", words):
            words = f"{missing[1]} is missing; --help says what it is for."
        if unknown := re.match(r"Unknown command line flag '([^']+)'(?:\. Did you mean: (\S+) ?\?)?", words):
            near = [f"--{unknown[2]}"] if unknown[2] else _fields_for(arguments, unknown[1]) if default else []
            meant = f" (did you mean {' or '.join(near)}?)" if near else ""
            words = f"--{unknown[1]} is not known here{meant}; --help says what is."
        if "Traceback" in words:  # a configuration file that refuses its argument, as in FILE:ARG, or that is broken
            words = words.splitlines()[-1].split(": ", 1)[-1]
        raise InputError(words) from error
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{given[0]}: no such configuration file, or it cannot be read.") from error
    except Exception as error:  # an unknown field, or whatever a configuration file of one's own meets
        raise InputError(_unknown_field(arguments)) from error
    if rest[1:]:
        fields = "; fields are given as --config.section.field=value" if default else ""
        raise InputError(f"{' '.join(rest[1:])}: not understood{fields}; what holds spaces is put into quotes.")
    return config


def _fields_for(arguments: list[str], name: str) -> list[str]:
    """At most three fields that somebody may have meant who gave a last name alone."""
    try:
        fields = {field: field.split(".")[-1] for field in _fields_of(arguments)}
    except Exception:  # a file that is no configuration is told another time
        return []
    meant = [field for field, last in fields.items() if last == name]
    meant += [field for field, last in fields.items() if last != name and name in last.split("_")]
    return [f"--config.{field}" for field in meant[:3]]


def _unknown_field(arguments: list[str]) -> str:
    """The first override of a field that the configuration file has not, and the field that it is nearest to.

    Or, where the file alone cannot be loaded either, what it fails with.
    """
    file = next(k for k, argument in enumerate(arguments) if re.match(r"--?config(=|$)", argument))
    alone = [arguments[0], *arguments[file : file + 1 + ("=" not in arguments[file])]]
    try:
        fields = _fields_of(arguments)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        words = f"{type(error).__name__}: {error}; {Path(place.filename).name}, line {place.lineno}"
        return f"{' '.join(alone[1:])}: this file is no configuration ({words})."
    for argument in arguments:
        override = re.match(r"--?(?:no)?config\.([^=]+)", argument)
        name = override[1] if override else ""
        if name and not any(f"{field}.".startswith(f"{name}.") for field in fields):
            section, _, last = name.rpartition(".")
            beside = [field for field in fields if field.rpartition(".")[0] == section]
            longer = [field for field in beside if last in field.rpartition(".")[2].split("_")]
            namesakes = longer or [field for field in fields if field.split(".")[-1] == last]
            near = difflib.get_close_matches(name, namesakes, 1, 0.0) or difflib.get_close_matches(name, fields, 1)
            advice = f"; the nearest is {near[0]!r}" if near else ", nor anything like it"
            return f"{argument}: {alone[-1].removeprefix('--config=')} has no such field{advice}."
    return f"{' '.join(arguments[1:])}: the configuration cannot be overridden like this."


def _fields_of(arguments: list[str]) -> list[str]:
    """All fields of the configuration file that these arguments name; raises whatever its loading meets."""
    file = next(k for k, argument in enumerate(arguments) if re.match(r"--?config(=|$)", argument))
    alone = [arguments[0], *arguments[file : file + 1 + ("=" not in arguments[file])]]
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=alone)
    values(alone)
    return _fields(holder.value.to_dict())


def _fields(values: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of all that can be overridden."""
    names = []
    for name, value in values.items():
        names += _fields(value, f"{prefix}{name}.") if isinstance(value, dict) and value else [prefix + name]
    return names


def check_folder(field: str, value: str) -> None:
    """A bucket is read and written as a folder or not at all, and shards and checkpoints by libraries that know UTF-8 alone.

    Raises:
      InputError: the value is a URL, or its whole path is not UTF-8; the message says what to do.
    """
    try:
        os.path.abspath(os.path.expanduser(value)).encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{field}={os.path.abspath(value)!a}: the name of this folder, or of one that it is in, is not UTF-8 (an old "
            "archive or disk?); rename it."
        ) from error
    if "://" in value:
        raise InputError(
            f"{field}={value}: a folder is wanted, not a URL (ArrayRecord writes to files alone); mount the bucket as one "
            "(JuiceFS, gcsfuse, rclone mount; mountpoint-s3 for photographs), or copy it: docs/many_machines.md says what works."
        )


def path_of(folder: str) -> Path:
    """A path as a person writes it, ~ included.

    Raises:
      InputError: an empty word, which would mean the folder one stands in.
    """
    if not folder:
        raise InputError("the name of a folder or file is empty; is a variable of the shell not set?")
    return Path(folder).expanduser()
