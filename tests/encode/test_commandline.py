"""What all commands share, apart from what their own tests show of it."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from encode import commandline

ROOT = Path(commandline.__file__).parents[1]


def test_a_command_names_the_python_of_this_folder_and_else_the_one_of_the_path(monkeypatch, tmp_path):
    (tmp_path / "link").symlink_to(ROOT)
    for python, word in (
        (ROOT / ".venv/bin/python", ".venv/bin/python"),
        (tmp_path / "link/.venv/bin/python", ".venv/bin/python"),
        ("/usr/bin/python3.12", "python"),
        ("", "python"),
        (None, "python"),
    ):
        monkeypatch.setattr(sys, "executable", python and str(python))
        assert commandline.command("jaxdit.sample", ["--prompt=a cat"]) == f"{word} -m jaxdit.sample '--prompt=a cat'"


def test_what_a_file_did_not_do_is_said_with_its_name_and_what_helps():
    full = OSError(errno.ENOSPC, "No space left on device", "page.html")
    assert commandline.file_problem(full) == (
        "page.html: No space left on device. Make room, and give the same command again."
    )
    assert commandline.file_problem(PermissionError(errno.EACCES, "Permission denied")) == "a file: Permission denied."


def test_the_first_signal_asks_the_second_stops_at_once_and_nohup_is_heeded():
    heard = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in heard}
    try:
        for number in heard:
            for other in heard:
                signal.signal(other, signal.SIG_DFL)
            asked = commandline.stop_on_signal()
            signal.raise_signal(number)
            assert asked.is_set()
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGTERM)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        asked = commandline.stop_on_signal()
        signal.raise_signal(signal.SIGHUP)
        assert not asked.is_set()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize(("words", "code"), [("--help", 0), ("--data=/nowhere", 2)])
def test_an_output_that_is_closed_or_read_by_nobody_changes_no_exit_code(words, code):
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    for closed in (">&-", "<&- >&-", "2>&-", ">&- 2>&-", "| true", "2>&1 | true"):
        line = f"{sys.executable} -m encode.doctor {words} {closed}; exit ${{PIPESTATUS[0]}}"
        for environment in (buffered, buffered | {"PYTHONUNBUFFERED": "1"}):
            done = subprocess.run(["bash", "-c", line], cwd=ROOT, env=environment, capture_output=True, text=True)
            assert (done.returncode, "Traceback" in done.stderr + done.stdout) == (code, False), closed


def test_a_reader_who_leaves_ends_no_work_and_changes_no_exit_code(tmp_path):
    program = """
import sys
from encode import commandline
def main():
    for _ in range(20_000):
        print("words " * 5)
    print("the last", flush=True)
    open("done", "w").write("done")
    return 3
commandline.run(main)
"""
    (tmp_path / "program.py").write_text(program)
    line = f"{sys.executable} program.py | head -1; exit ${{PIPESTATUS[0]}}"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, (tmp_path / "done").read_text(), done.stderr) == (3, "done", "")
