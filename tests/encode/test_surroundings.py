"""Terminals and folders that are not UTF-8: said before anything is done, or no matter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from encode import commandline
from encode.records import InputError

ROOT = Path(__file__).parents[2]


def demo(out, **environment):
    command = [sys.executable, "-m", "encode.demo", "--count=1", "--side=64", f"--out={out}"]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True)


def test_a_folder_whose_name_is_not_utf8_is_refused_by_name(tmp_path):
    old = tmp_path / os.fsdecode(b"Fotos M\xfcller")
    for folder in (str(old), str(old / "2019")):
        with pytest.raises(InputError, match=r"^config\.images='.*Fotos M\\udcfcller.*is not UTF-8 .* rename it\.$"):
            commandline.check_folder("config.images", folder)
    commandline.check_folder("config.images", str(tmp_path / "Fotos Müller"))


def test_in_a_locale_without_utf8_names_are_read_and_written_as_they_are(tmp_path):
    done = demo(tmp_path / "Bilder für 日本", LC_ALL="C", PYTHONUTF8="0")
    assert done.returncode == 0, done.stderr
    assert os.listdir(os.fsencode(tmp_path)) == ["Bilder für 日本".encode()]
    assert list((tmp_path / "Bilder für 日本").glob("*.png"))


def test_a_name_that_the_terminal_lacks_ends_no_work(tmp_path):
    done = demo(tmp_path / "日本", PYTHONIOENCODING="latin-1")
    assert done.returncode == 0, done.stderr
    assert rb"\u65e5\u672c" in done.stdout
