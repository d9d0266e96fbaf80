"""bench/gpu.sh with an acted Python and card, then its parts in their smallest form for real."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench import table

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "bench" / "gpu.sh"
ACTED = """#!/bin/bash
echo "$* [$JAX_PLATFORMS]" >> "$LOG"
case "$*" in
  *device_count*) echo "${DEVICES:-1}" ;;
  *"$FAILS"*) [ -z "$FAILS" ] || { echo "first words"; echo "no such kernel"; exit 3; } ;;
esac
"""


@pytest.fixture
def acted(tmp_path):
    """Calls the script with a Python that only takes notes, and with or without a card; returns (ended, notes)."""
    (tmp_path / "bin").mkdir()
    for name, words in (("acted", ACTED), ("nvidia-smi", "#!/bin/bash\necho GPU 0\n")):
        (tmp_path / "bin" / name).write_text(words)
        (tmp_path / "bin" / name).chmod(0o755)

    def run(*arguments, card=True, **settings):
        if not card:
            (tmp_path / "bin" / "nvidia-smi").write_text("#!/bin/bash\nexit 9\n")
        environment = os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "LOG": str(tmp_path / "log")}
        environment |= {"TMPDIR": str(tmp_path), "FAILS": ""} | settings
        command = [SCRIPT, f"--python={tmp_path}/bin/acted", f"--out={tmp_path}/out", *arguments]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        log = tmp_path / "log"
        return ended, log.read_text() if log.exists() else ""

    return run


def test_every_part_runs_on_the_card_and_the_models_steps_are_capped(acted):
    ended, notes = acted("--minutes=60", "--memory_gb=16")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    for module in ("bench.attention", "bench.profile_step", "bench.loader", "jaxdit.plan --measure", "bench.table"):
        assert f"-m {module}" in notes
    steps = [line for line in notes.splitlines() if "bench.train_step" in line]
    cases = {re.search(r"--config=(\w+) --resolutions=(\d+)", line).groups() for line in steps}
    assert cases == {(config, size) for config in ("nano", "full") for size in ("256", "512", "1024")}
    assert all("--memory_gb=16" in line and line.endswith("[cuda]") for line in steps)
    assert len({re.search(r"--config=\S+.*--label=\S+", line)[0] for line in steps}) == len(steps)  # a file each
    assert "encode.demo" not in notes  # one card: nothing to compare


def test_a_part_that_fails_is_named_and_the_others_run(acted):
    ended, notes = acted("--minutes=60", FAILS="bench.attention")
    assert ended.returncode == 1
    assert re.search(r"^attention .* FAILED with exit code 3: no such kernel$", ended.stdout, re.MULTILINE)
    assert "bench.profile_step" in notes and "The results are in" in ended.stdout.splitlines()[-1]


def test_what_does_not_fit_into_the_time_is_skipped_and_named(acted):
    ended, notes = acted("--minutes=2", "--only=step-full,profile")
    assert ended.returncode == 1
    assert re.search(r"^step-full-512-8 +skipped: it takes about 180 s, and \d+ s are left", ended.stdout, re.MULTILINE)
    assert "--resolutions=512 --micro_batches=8" not in notes and "--config=full --resolution=512" in notes
    assert "bench.attention" not in notes  # not asked for


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--minutes=0"], "--minutes=0: a whole number"),
        (["--memory_gb=24GB"], "--memory_gb=24GB"),
        (["--quick"], "--quick is not understood"),
        (["--python=nowhere/python"], "no such program"),
    ],
)
def test_a_wrong_call_ends_with_2(acted, arguments, words):
    ended, notes = acted(*arguments)
    assert ended.returncode == 2 and words in ended.stderr and not notes


def test_without_a_card_it_says_so(acted):
    ended, notes = acted(card=False)
    assert ended.returncode == 2 and "--smallest" in ended.stderr and not notes


def test_the_smallest_attention_runs_for_real(tmp_path):
    command = [SCRIPT, "--smallest", f"--python={sys.executable}", f"--out={tmp_path}", "--only=attention"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (file,) = tmp_path.glob("attention-*.json")
    rows = json.loads(file.read_text())["rows"]
    assert {row["model"] for row in rows} == {"nano"}
    assert all(0 < row["by heads"]["error of the gradients"] < 1e-4 for row in rows)


@pytest.mark.all
def test_all_parts_run_in_their_smallest_form(tmp_path):
    command = [SCRIPT, "--smallest", "--nano", f"--python={sys.executable}", f"--out={tmp_path}"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    for name in ("attention", "train-step-nano-32-1", "train-step-full-32-1", "profile-nano-32", "loader-256"):
        assert len(list(tmp_path.glob(f"{name}-*.json"))) == 1, name
    assert "images/s measured" in (tmp_path / "plan-nano.txt").read_text()
    assert json.loads((tmp_path / "nano" / "gate.json").read_text())["verdict"] == "fail"
    assert re.search(r"^\| .* \| full \| 32 \| 1 \| ", ended.stdout, re.MULTILINE)


def test_a_row_of_the_table_has_our_best_side_and_theirs():
    sides = {
        "jaxdit none unroll 1": {"images a second": 3.0, "mfu": 0.5, "GB resident at most": 2.5},
        "jaxdit block unroll 1": {"images a second": 2.0, "mfu": 0.4, "GB resident at most": 1.5},
        "torch_dit eager": {"images a second": 2.0},
        "torch_dit compiled": {"problem": "no compiler"},
    }
    case = {"resolution": 256, "micro-batch": 8, "sides": sides}
    result = {"device": "a card", "work": "configs/full.py, 1 micro-batches", "cases": [case]}
    (row,) = table.rows(result)
    assert row == ["a card", "full", "256", "8", "3", "50%", "2.5", "2", "-", "1.50"]
    assert len(row) == len(table.HEADER)


PYTHON = """#!/bin/bash
case "$*" in
  "-c import sys, venv"*) exit 0 ;;
  "-m venv .venv") mkdir -p .venv/bin; cp "$0" .venv/bin/python; cp "$0" .venv/bin/pip ;;
  *importlib.metadata*) echo 2.13.0+cpu ;;
  *urlopen*) exit 0 ;;
  install* | uninstall*) echo "pip $*" >> log ;;
esac
"""


def test_the_environment_for_cuda_takes_no_cpu_build_and_stays(tmp_path, monkeypatch):
    (tmp_path / "launch").mkdir()
    (tmp_path / "bin").mkdir()
    shutil.copy(ROOT / "launch" / "environment.sh", tmp_path / "launch")
    for name in ("requirements.txt", "requirements-cuda.txt"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("python3.12", "python3.11", "python3.13", "python3"):
        (tmp_path / "bin" / name).write_text(PYTHON)
        (tmp_path / "bin" / name).chmod(0o755)

    def installed(**settings):
        (tmp_path / "log").write_text("")
        environment = os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"} | settings
        command = ["bash", "-c", "source launch/environment.sh"]
        subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
        return (tmp_path / "log").read_text()

    monkeypatch.delenv("JAXDIT_CUDA", raising=False)
    plain = installed()
    assert "whl/cpu" in plain and "requirements-cuda.txt" not in plain
    cuda = installed(JAXDIT_CUDA="yes")
    assert "uninstall" in cuda and "requirements-cuda.txt" in cuda and "whl/cpu" not in cuda
    assert installed() == installed(JAXDIT_CUDA="yes") == ""  # the same environment, called from either


def test_jax_for_cuda_is_the_jax_of_all():
    (version,) = re.findall(r"^jax==(\S+)$", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert f"jax[cuda13]=={version}\n" in (ROOT / "requirements-cuda.txt").read_text()
