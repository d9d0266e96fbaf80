"""launch/setup_strix_halo.sh on acted machines: the kernel's folder is a temporary one, Python and pip only take notes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "launch" / "setup_strix_halo.sh"
PYTHON = """#!/bin/bash
case "$*" in
  "-c import sys, venv"*) exit 0 ;;
  "-m venv .venv") mkdir -p .venv/bin; cp "$0" .venv/bin/python; cp "$0" .venv/bin/pip ;;
  *importlib.metadata*) cat .venv/torch 2>/dev/null ;;
  "-m encode.selftest") echo "selftest, override=$HSA_OVERRIDE_GFX_VERSION" >> log; exit ${PROOF:-0} ;;
  install*) echo "pip $*" >> log; words="$*"; case "$words" in *torch*==*) echo "${words##*==}" > .venv/torch ;; esac ;;
esac
"""


@pytest.fixture
def machine(tmp_path):
    """A folder with the script and a pinned PyTorch; calls it with a GPU of that code, or none."""
    (tmp_path / "launch").mkdir()
    (tmp_path / "bin").mkdir()
    words = SCRIPT.read_text().replace("/sys/class/kfd", f"{tmp_path}/kfd").replace("/dev/kfd", f"{tmp_path}/device")
    (tmp_path / "launch" / SCRIPT.name).write_text(words)
    (tmp_path / "requirements.txt").write_text("torch==2.13.0\nnumpy==2.4.6\n")
    for name in ("python3.12", "python3.11", "python3.13", "python3"):
        (tmp_path / "bin" / name).write_text(PYTHON)
        (tmp_path / "bin" / name).chmod(0o755)

    def run(code=110501, device=True, **settings):
        for number, value in enumerate([0, code] if code else [0]):
            node = tmp_path / "kfd" / "kfd" / "topology" / "nodes" / str(number)
            node.mkdir(parents=True, exist_ok=True)
            (node / "properties").write_text(f"cpu_cores_count 16\ngfx_target_version {value}\n")
        if device:
            (tmp_path / "device").touch()
        settings = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"} | settings
        return subprocess.run(
            ["bash", str(tmp_path / "launch" / SCRIPT.name)], env=settings, capture_output=True, text=True
        )

    run.folder = tmp_path
    return run


def _notes(machine):
    log = machine.folder / "log"
    return log.read_text().splitlines() if log.exists() else []


@pytest.mark.parametrize(
    "given, words",
    [
        ({"code": 0}, "the kernel shows no AMD GPU that can compute"),
        ({"code": 110000}, "the AMD GPU here is of target 110000, not 110501 (gfx1151, Strix Halo)"),
        ({"device": False}, "run: sudo usermod -aG render,video"),
    ],
)
def test_another_machine_is_told_so_and_left_as_it_is(given, words, machine):
    done = machine(**given)
    assert done.returncode == 2 and words in done.stderr and "othing was changed." in done.stderr
    assert not (machine.folder / ".venv").exists() and not _notes(machine)


@pytest.mark.skipif(
    sys.platform != "linux" or Path("/sys/class/kfd").exists(), reason="this machine may have such a GPU"
)
def test_this_machine_has_no_such_gpu():
    done = subprocess.run([str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 2 and "no AMD GPU" in done.stderr


def test_it_installs_once_and_proves_every_time(machine):
    first, second = machine(HSA_OVERRIDE_GFX_VERSION="11.0.0"), machine()
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert "HSA_OVERRIDE_GFX_VERSION=11.0.0 is left out here" in first.stdout
    index = "--index-url https://stable.repo.amd.com/rocm/whl-next/"
    quiet = "pip install --quiet --disable-pip-version-check"
    proof = "selftest, override="
    assert _notes(machine) == [
        f"{quiet} {index} torch[device-gfx1151]==2.13.0+rocm10.0.0",
        f"{quiet} -r requirements.txt",
        proof,
        proof,
    ]
    assert "PyTorch 2.13.0+rocm10.0.0 is installed." in second.stdout and "This GPU may encode" in second.stdout
    wanted = subprocess.run(
        ["sha256sum", "requirements.txt"], cwd=machine.folder, capture_output=True, text=True
    ).stdout
    assert (machine.folder / ".venv" / "installed").read_text() == wanted  # what launch/environment.sh looks for


def test_a_build_for_the_cpu_is_exchanged_and_another_build_can_be_named(machine):
    machine()
    (machine.folder / ".venv" / "torch").write_text("2.13.0+cpu\n")
    machine()
    machine(ROCM_TORCH="2.12.0+rocm7.14.0", ROCM_INDEX="https://elsewhere/")
    torch = [line for line in _notes(machine) if "torch[" in line]
    assert [line.split("==")[1] for line in torch] == ["2.13.0+rocm10.0.0", "2.13.0+rocm10.0.0", "2.12.0+rocm7.14.0"]
    assert "https://elsewhere/" in torch[-1]
    assert "-r requirements.txt" not in _notes(machine)[-2]  # which would bring the pinned version back


def test_a_newer_pin_does_not_exchange_the_build_for_rocm_behind_ones_back(machine):
    assert machine().returncode == 0
    shutil.copy(SCRIPT.parent / "environment.sh", machine.folder / "launch")

    def source():
        search = {"PATH": f"{machine.folder}/bin:{os.environ['PATH']}"}
        command = ["bash", "-c", "source launch/environment.sh"]
        return subprocess.run(command, cwd=machine.folder, env=search, capture_output=True, text=True)

    requirements, before = machine.folder / "requirements.txt", _notes(machine)
    requirements.write_text(requirements.read_text().replace("torch==2.13.0", "torch==2.14.0"))
    refused = source()
    assert refused.returncode == 2 and "run launch/setup_strix_halo.sh" in refused.stderr
    assert _notes(machine) == before
    requirements.write_text("torch==2.13.0\nnumpy==2.4.7\n")  # the same PyTorch, something else is newer
    assert source().returncode == 0
    assert _notes(machine)[-1].endswith("-r requirements.txt")


def test_a_gpu_that_fails_the_proof_is_exit_code_1(machine):
    done = machine(PROOF="1")
    assert done.returncode == 1 and "did not prove itself; docs/strix_halo.md" in done.stderr
