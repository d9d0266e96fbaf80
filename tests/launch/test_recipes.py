"""The recipes for containers and clusters: read by the linters of their kind, and run as far as this machine can."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import make_data
import pytest
from tiny_run import command

from jaxdit import checkpoint, metrics

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
BIN = Path(sys.executable).parent


@pytest.fixture
def path(tmp_path):
    make_data.dataset(tmp_path / "64", {"64x64": 9, "48x80": 6})
    return tmp_path / "64"


def needs(tool):
    if not (BIN / tool).exists():
        pytest.skip(f"{tool} is not installed; launch/test.sh --all installs requirements-lint.txt")
    return str(BIN / tool)


@pytest.mark.all
def test_shell_scripts_are_sound():
    scripts = [*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch"), ROOT / "bench" / "gpu.sh", ROOT / ".ci" / "run"]
    # $python and $needed hold words that are to be split; what is sourced sets them.
    done = subprocess.run(
        [needs("shellcheck"), "--shell=bash", "--external-sources", "--source-path=SCRIPTDIR", "--severity=warning", *scripts],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


@pytest.mark.all
def test_the_dockerfile_is_sound():
    done = subprocess.run([needs("hadolint"), LAUNCH / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.all
def test_the_compose_file_fits_its_schema():
    check = [needs("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", LAUNCH / "compose.yaml"]
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_image_holds_what_the_code_needs_and_nothing_that_is_made():
    text = (LAUNCH / "Dockerfile").read_text()
    everything, *allowed = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] in "*!"][:-1]
    assert everything == "*" and "COPY . ." in text  # a clone may hold its owner's photographs and checkpoints
    packages = {f"!{path.parent.name}" for path in ROOT.glob("*/__init__.py")} - {"!tests"}
    assert packages | {"!configs", "!launch"} <= set(allowed)
    assert all(list(ROOT.glob(name[1:])) for name in allowed)
    for name in ("requirements.txt", "requirements-cuda.txt"):
        assert name in text and (ROOT / name).exists()
    assert "USER 1000" in text and "STOPSIGNAL SIGTERM" in text


def test_the_compose_file_trains_by_our_command_and_shows_nothing_to_the_network():
    yaml = pytest.importorskip("yaml")
    services = yaml.safe_load((LAUNCH / "compose.yaml").read_text())["services"]
    assert services["train"]["command"][:3] == ["python", "-m", "jaxdit.main"]
    assert services["train"]["build"]["dockerfile"] == "launch/Dockerfile"
    for service in services.values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))


def test_the_job_set_gives_each_machine_its_number_and_all_the_same_first_one():
    yaml = pytest.importorskip("yaml")
    job_set = yaml.safe_load((LAUNCH / "kubernetes" / "train-jobset.yaml").read_text())
    assert (job_set["apiVersion"], job_set["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (replicated,) = job_set["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert job["completionMode"] == "Indexed" and replicated["replicas"] == 1
    assert job["completions"] == job["parallelism"]  # all at once, or none finds the others
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    words = container["command"][-1]
    name, group = job_set["metadata"]["name"], replicated["name"]
    port = container["ports"][0]["containerPort"]
    assert (
        f"--coordinator={name}-{group}-0-0.{name}:{port}" in words
    )  # JOBSET-JOB-REPLICA-INDEX.JOBSET, JobSet's DNS names
    assert f"--processes={job['completions']} " in words and "--process=$JOB_COMPLETION_INDEX" in words
    assert pod["restartPolicy"] == "Never" and job_set["spec"]["failurePolicy"]["maxRestarts"] > 0
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} <= volumes


@pytest.mark.all
def test_the_recipe_for_slurm_trains_in_two_processes_and_is_queued_again_when_asked_to_stop(path, tmp_path):
    """srun starts its command twice here, as Slurm would; the script, the processes and the signal are real."""
    (tmp_path / "bin").mkdir()
    tools = {
        "srun": """while [[ "$1" == --* ]]; do shift; done
            trap 'kill -KILL $(jobs -p) 2>/dev/null' TERM  # as the real one does
            for k in 0 1; do SLURM_PROCID=$k SLURM_LOCALID=$k "$@" & started+=($!); done
            echo "${started[@]}" > "$REQUEUED.processes"
            code=0
            for one in "${started[@]}"; do
              while kill -0 $one 2>/dev/null; do wait $one; c=$?; done; [ ${c:-0} -le $code ] || code=$c
            done
            exit $code""",
        "scancel": '[ "$*" = "--signal=TERM $SLURM_JOB_ID.0" ] && kill -TERM $(cat "$REQUEUED.processes")',
        "scontrol": 'echo "$@" >> "$REQUEUED"',
    }
    for name, text in tools.items():
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    job = 4096 * 9 + os.getpid() % 4096
    environment = os.environ | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "REQUEUED": str(tmp_path / "requeued"),
        "SLURM_JOB_ID": str(job),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_SUBMIT_DIR": str(ROOT),
    }
    workdir = tmp_path / "run"
    arguments = command(path, workdir, **{"train.total_steps": 40, "train.batch_size": 8, "train.micro_batch": 4})
    script = ["bash", str(LAUNCH / "slurm.sbatch"), *arguments[3:]]
    started = subprocess.Popen(script, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    until = time.monotonic() + 90
    while not any(row["step"] >= 3 for row in metrics.read(workdir)):
        assert time.monotonic() < until and started.poll() is None, started.communicate()[0]
        time.sleep(0.1)
    started.send_signal(signal.SIGTERM)
    words, _ = started.communicate(timeout=60)
    assert started.returncode == 3, words
    assert (tmp_path / "requeued").read_text().split() == ["requeue", str(job)]
    step = checkpoint.saved_steps(workdir, "state")[-1]
    assert 3 <= step < 40
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row["step"] for row in metrics.read(workdir)] == list(range(1, 41))
