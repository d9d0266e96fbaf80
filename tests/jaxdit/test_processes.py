"""Real processes on this machine, joined by JAX's runtime (gloo): the losses of one, agreed stops, and no end in silence."""

import os
import signal
import socket
import subprocess
import time

import jax
import make_data
import numpy as np
import pytest
from tiny_run import ROOT, command, curve, tiny

from encode.records import InputError
from jaxdit import checkpoint, data, mesh, metrics, processes, train

RUN = {
    "train.total_steps": 40,
    "train.batch_size": 8,
    "train.micro_batch": 4,
    "data.holdout_fraction": 0.4,
    "train.eval_every": 20,
    "train.eval_images": 6,
    "train.eval_budget": 1.0,
    "checkpoint.every": 10,
}


@pytest.fixture(scope="module")
def one(path, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("one") / "run"
    assert train.train(tiny(path, **RUN), workdir) == "done"
    return workdir


def begin(path, workdir, count, slurm=False, **changes):
    """`count` processes of one run, joined by flags, or by what Slurm's srun would tell them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = []
    for k in range(count):
        environment, arguments = dict(os.environ), command(path, workdir, **RUN | changes)
        if slurm:
            job = 4096 * 7 + port % 4096
            environment |= {"SLURM_JOB_ID": str(job), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": str(count)}
            environment |= {"SLURM_STEP_NUM_TASKS": str(count), "SLURM_PROCID": str(k), "SLURM_LOCALID": str(k)}
        else:
            arguments += [f"--coordinator=localhost:{port}", f"--processes={count}", f"--process={k}"]
        started.append(
            subprocess.Popen(
                arguments, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    return started


def ends(started, within=60.0):
    """[(exit code, words)] of processes that end in time."""
    until, found = time.monotonic() + within, []
    for process in started:
        try:
            words, _ = process.communicate(timeout=max(until - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            for left in started:
                left.kill()
            pytest.fail(f"still running after {within} s: {process.communicate()[0]}")
        found.append((process.returncode, words))
    return found


def wait_for(workdir, step, started):
    until = time.monotonic() + 240  # four processes that compile at once on two busy cores
    while time.monotonic() < until and all(process.poll() is None for process in started):
        rows = metrics.read(workdir)
        if rows and rows[-1]["step"] >= step:
            return
        time.sleep(0.05)
    pytest.fail(f"step {step} was not reached: {ends(started, 1)}")


def assert_like_one(workdir, one, steps):
    assert [row["step"] for row in metrics.read(workdir)] == list(range(1, steps + 1))
    for name in ("loss", "grad_norm"):
        ours, theirs = ([row[1] for row in curve(folder, name)][:steps] for folder in (workdir, one))
        np.testing.assert_allclose(ours, theirs, rtol=2e-3)
    judged = [
        {row["step"]: row["held_out_loss"] for row in metrics.read(folder) if row.get("held_out_loss") is not None}
        for folder in (workdir, one)
    ]
    assert 20 in judged[0]
    for step, loss in judged[0].items():
        assert loss == pytest.approx(judged[1][step], rel=1e-3)


def test_two_processes_are_one_run_through_a_kill_and_a_stop(path, one, tmp_path):
    """SIGKILL of one ends the other with a sentence; started again, SIGTERM to one stops both with everything saved."""
    workdir = tmp_path / "run"
    started = begin(path, workdir, 2, slurm=True, **{"mesh.fsdp": 2})
    wait_for(workdir, 14, started)
    started[1].send_signal(signal.SIGKILL)
    started[1].wait()
    killed = time.monotonic()
    (code, words), (_, quiet) = ends(started)
    assert code not in (0, 2, 3) and time.monotonic() - killed < 60
    assert "another process has ended" in words or "another task died" in words, words
    assert "2 x cpu (data 1 x fsdp 2) in 2 processes" in words
    assert "step 1/40" in words and "step 1/40" not in quiet  # one log

    started = begin(path, workdir, 2, **{"mesh.fsdp": 2})
    wait_for(workdir, 21, started)
    started[1].send_signal(signal.SIGTERM)
    (code, words), (other, quiet) = ends(started)
    assert code == other == 3, words + quiet
    assert "Going on at step 10 of 40" in words and "everything saved" in words
    stopped = checkpoint.saved_steps(workdir, "state")[-1]
    assert 21 <= stopped < 40
    assert_like_one(workdir, one, stopped)


@pytest.mark.all
def test_four_processes_and_the_death_of_the_first(path, one, tmp_path):
    workdir = tmp_path / "run"
    started = begin(path, workdir, 4, **{"mesh.fsdp": 2})
    wait_for(workdir, 15, started)
    started[0].send_signal(signal.SIGKILL)  # the one that the others are joined by
    for code, words in ends(started)[1:]:
        assert code not in (0, 2, 3) and ("another process has ended" in words or "another task died" in words), words
    started = begin(path, workdir, 4, **{"mesh.fsdp": 2})
    wait_for(workdir, 20, started)
    for process in started:
        process.send_signal(signal.SIGTERM)
    assert [code for code, _ in ends(started)] == [3] * 4
    newest = workdir / "checkpoints" / str(checkpoint.saved_steps(workdir, "state")[-1])
    file = max((newest / "state").rglob("d/*"), key=lambda file: file.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    found = ends(begin(path, workdir, 4, **{"mesh.fsdp": 2}), 300)
    assert [code for code, _ in found] == [0] * 4, found
    assert f"Step {newest.name} cannot be read (state/" in found[0][1] and "Going on at step" in found[0][1]
    assert_like_one(workdir, one, 40)


@pytest.mark.all
def test_processes_that_see_other_data_are_refused(path, tmp_path):
    make_data.dataset(tmp_path / "64", {"64x64": 9, "48x80": 6}, seed=5)
    started = begin(path, tmp_path / "run", 1 + 1)
    started[1].kill()
    started[1].wait()
    with open(tmp_path / "other.log", "w") as log:
        arguments = [*started[0].args[:-1], "--process=1", f"--config.data.path={tmp_path / '64'}"]
        other = subprocess.Popen(arguments, cwd=ROOT, stdout=log, stderr=log)
        (code, words) = ends(started[:1])[0]
        assert other.wait(60) == code == 2, words
    assert "Process 1 of 2 has another data set" in words
    assert not (tmp_path / "run").exists()


def test_the_rows_of_the_processes_make_up_the_batch(path):
    dataset = data.Dataset(path, holdout_fraction=0.4)
    options = {"seed": 3, "micro_batch": 4, "flip": 0.5}
    whole = data.training_batches(dataset, **options)
    parts = [data.training_batches(dataset, **options, places=np.array(places)) for places in ([0, 1], [2, 3])]
    try:
        for _ in range(12):
            batch, shares = next(whole), [next(part) for part in parts]
            assert batch.pop("bucket") == shares[0].pop("bucket") == shares[1].pop("bucket")
            for name, value in batch.items():
                np.testing.assert_array_equal(value, np.concatenate([share[name] for share in shares]), name)
        assert whole.get_state() == parts[0].get_state() == parts[1].get_state()
    finally:
        for reader in (whole, *parts):
            reader.close()
    for (batch, numbers, count), (half, own, same) in zip(
        dataset.fixed_batches("held_out", 4, 9), dataset.fixed_batches("held_out", 4, 9, np.array([2, 3])), strict=True
    ):
        assert count == same
        np.testing.assert_array_equal(batch["latent"][2:], half["latent"])
        np.testing.assert_array_equal(numbers[2:], own)


@pytest.mark.parametrize(
    ("environment", "given", "expected"),
    [
        ({}, (None, None, None), None),
        ({"SLURM_STEP_NUM_TASKS": "1"}, (None, None, None), None),
        ({"SLURM_STEP_NUM_TASKS": "8"}, (None, None, None), (None, None, None, None)),
        ({"SLURM_STEP_NUM_TASKS": "8"}, (None, 1, None), None),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, (None, None, None), (None, None, None, None)),
        ({"JOB_COMPLETION_INDEX": "3"}, (None, None, None), (None, None, 3, None)),
        ({"JOB_COMPLETION_INDEX": "3"}, ("host:1", 4, None), ("host:1", 4, 3, "deactivate")),
        ({}, ("host:1", 2, 1), ("host:1", 2, 1, "deactivate")),
        (
            {
                "JAX_COORDINATOR_ADDRESS": "host:1",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": "0",
                "JOB_COMPLETION_INDEX": "0",
            },
            (None, None, None),
            ("host:1", 2, 0, "deactivate"),
        ),
    ],
)
def test_who_is_joined_by_whom(monkeypatch, environment, given, expected):
    called = []

    def initialize(*arguments, cluster_detection_method, **options):
        called.append((*arguments, cluster_detection_method))

    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "JOB_COMPLETION_INDEX", *processes.VARIABLES.values()):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    processes.start(*given)
    assert called == ([expected] if expected else [])


def test_half_of_an_address_is_refused():
    with pytest.raises(
        InputError, match=r"--processes given, but .* --coordinator, --processes, --process .*JAX_PROCESS_ID"
    ):
        processes.start(None, 2, None)
    with pytest.raises(InputError, match=r"cannot find each other .*process 2"):
        processes.start("localhost:1", 2, 2)


def said_by(monkeypatch, *others, first=True):
    """This process is one of several; the list of what it says to them, who answer with `others`."""
    given = []
    monkeypatch.setattr(processes, "many", lambda: True)
    monkeypatch.setattr(processes, "first", lambda: first)

    def everyone(value):
        given.append(int(value))
        return np.array([value, *others] if first else [*others, value], np.int32)

    monkeypatch.setattr(processes, "everyone", everyone)
    return given


def test_what_fails_in_one_process_fails_in_all_with_its_number(monkeypatch):
    def refuse():
        raise InputError("it is wrong")

    given = said_by(monkeypatch, 1, 2)
    with pytest.raises(InputError, match="process 2 of 3 could not go on"):
        processes.jointly(lambda: 5)
    given = said_by(monkeypatch, 0, 1)
    with pytest.raises(OSError, match="process 2 of 3 could not go on"):
        processes.jointly(lambda: 5)
    with pytest.raises(InputError, match="it is wrong"):
        processes.jointly(refuse)
    with pytest.raises(ZeroDivisionError):
        processes.jointly(lambda: 1 / 0)
    assert given == [0, 2, 1]
    said_by(monkeypatch, 0, 0)
    assert processes.jointly(lambda: 5) == 5


def test_the_first_process_acts_for_all_and_the_others_take_its_answer(monkeypatch):
    acted = []
    given = said_by(monkeypatch, 0)
    assert processes.lead(lambda: acted.append("first") or 7) == 7 and given == [0, 7]
    monkeypatch.setattr(processes, "jointly", lambda act: act())
    given = said_by(monkeypatch, 7, first=False)
    assert processes.lead(lambda: acted.append("other") or 3) == 7 and given == [0] and acted == ["first"]


def test_who_sees_something_else_is_named_and_a_wish_of_one_is_everybodys(monkeypatch):
    said_by(monkeypatch, 3, 5)
    with pytest.raises(InputError, match=r"^Process 2 of 3 has another data set than process 0"):
        processes.same(3, "another data set")
    said_by(monkeypatch, 3, 3)
    processes.same(3, "another data set")
    said_by(monkeypatch, True)
    assert not processes.of_first(False) and processes.anyone(False)
    said_by(monkeypatch, False)
    assert processes.of_first(True) and processes.anyone(True) and not processes.anyone(False)


def test_a_wish_is_known_to_all_at_the_question_after_and_until_it_is_forgotten(monkeypatch):
    one = mesh.make_mesh()
    agreed = processes.Requests(mesh.over_batch(one), mesh.replicated(one))
    assert agreed.agree(True, False) == (True, False)  # alone
    monkeypatch.setattr(processes, "many", lambda: True)
    monkeypatch.setattr(processes, "place", lambda rows, _: np.stack([rows[0], np.array([0, 1], np.int32)]))
    assert agreed.agree(True, False) == (False, False)
    assert agreed.agree(False, False) == (True, True)
    assert agreed.agree(False, False) == (False, True)
    agreed.forget()
    assert agreed.agree(False, False) == (False, False)


def test_the_end_of_another_process_is_told_apart_from_an_error_of_this_one():
    words = processes.why(RuntimeError("UNAVAILABLE: failed to connect\nmore"))
    assert words.startswith("Process 0 of 1 ends: UNAVAILABLE: failed to connect Most likely another process has ended")
    try:
        raise ValueError("the field TOTAL_STEPS: is wrong")
    except ValueError as error:
        words = processes.why(error)
    assert "Traceback" in words and "the field TOTAL_STEPS: is wrong" in words
    assert words.endswith("Process 0 of 1 ends by this error, and all others with it.")


def test_the_process_whose_end_ends_all_goes_last(monkeypatch, capsys):
    done = []
    monkeypatch.setattr(processes.time, "sleep", done.append)
    monkeypatch.setattr(processes.os, "_exit", done.append)
    for many, first, waits in ((True, True, True), (True, False, False), (False, True, False)):
        monkeypatch.setattr(processes, "many", lambda many=many: many)
        monkeypatch.setattr(processes, "first", lambda first=first: first)
        done.clear()
        processes.leave("the end", 3)
        assert (done[0] > 0) == waits and done[-1] == 3 and capsys.readouterr().err == "the end\n"
