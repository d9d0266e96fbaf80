"""config.engine=ray on a real local cluster of two nodes: the bytes of one machine, whatever happens to the nodes."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}  # or Ray makes one in the home folder
ray = pytest.importorskip("ray")

from encode import pipeline, whole_files  # noqa: E402
from encode.records import InputError  # noqa: E402
from tests.encode import fakes, ray_fakes  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.all
PICTURES = 18  # 9 shards of 2


@pytest.fixture(scope="module")
def head():
    """A cluster's head, which does no work."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    yield cluster
    cluster.shutdown()


@pytest.fixture
def cluster(head, monkeypatch):
    """add(NAME) starts a node of one CPU, on which ray_fakes knows that name; all of them go at the end."""
    monkeypatch.setenv("RAY_ADDRESS", head.address)
    monkeypatch.chdir(ROOT)
    from encode import ray_engine

    monkeypatch.setattr(ray_engine, "LOAD", ray_fakes.LOAD)
    monkeypatch.setattr(ray_engine, "LOOK_EVERY", 0.3)

    class Nodes:
        def add(self, name):
            return head.add_node(num_cpus=1, env_vars={"FAKE_NODE": name})

        kill = staticmethod(lambda node: head.remove_node(node, allow_graceful=False))

    yield Nodes()
    for node in list(head.worker_nodes):
        head.remove_node(node, allow_graceful=False)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return fakes.photographs(tmp_path_factory.mktemp("in"), PICTURES)


@pytest.fixture(scope="module")
def calm(images, tmp_path_factory):
    """What one machine writes without Ray."""
    out = tmp_path_factory.mktemp("calm") / "out"
    pipeline.run(fakes.config(images, out), fakes.encoders())
    return fakes.tree(out)


@pytest.fixture
def out(tmp_path):
    (tmp_path / "notes").mkdir()
    return tmp_path / "out"


def _run(images, out, stop=lambda: False, **changes):
    return pipeline.run(fakes.config(images, out, engine="ray", **changes), fakes.encoders(), stop)


def _until(found, seconds=60.0):
    """What `found` says as soon as it is true."""
    end = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return value


def _workers(out, *names):
    """{node: process that encodes there} as soon as all of these nodes have one."""

    def found():
        notes = [path.name.split("-") for path in (out.parent / "notes").iterdir() if "-" in path.name]
        return {name: int(pid) for name, pid in notes}

    return _until(lambda: (seen := found()).keys() >= set(names) and seen)


@contextlib.contextmanager
def _slowly(images, out):
    """A run that goes on slowly in the background, and quickly after the block; its summary comes last."""
    slow = out.parent / "notes" / "slow"
    slow.touch()
    with ThreadPoolExecutor() as pool:
        run = pool.submit(_run, images, out)
        try:
            yield
        finally:
            slow.unlink()
        assert run.result().encoded == PICTURES


def _ends(pid):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    return True


def _children(pid):
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rsplit(")", 1)[1].split()
            if int(fields[1]) == pid:
                child = int(path.parent.name)
                found += [child, *_children(child)]
    return found


def _command(images, out, **changes):
    """The command in a process of its own."""
    changes = json.dumps({"engine": "ray"} | changes)
    return subprocess.Popen(
        [sys.executable, "-m", "tests.encode.ray_fakes", str(images), str(out), changes],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_two_nodes_write_the_bytes_of_one_machine(cluster, images, calm, out):
    cluster.add("a"), cluster.add("b")
    with _slowly(images, out):
        _workers(out, "a", "b")
    assert fakes.tree(out) == calm
    found = json.loads((out / "progress.json").read_text())
    assert found["stage"] == "done" and found["done"] == found["total"] == PICTURES
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != ".lock"}
    assert _run(images, out).encoded == PICTURES  # nothing is left to do, and Ray is not started for it
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_node_that_is_lost_costs_nothing_and_a_new_one_is_taken_in(cluster, images, calm, out, caplog):
    cluster.add("a")
    lost = cluster.add("b")
    with _slowly(images, out):
        _workers(out, "a", "b")
        cluster.kill(lost)
        cluster.add("c")
        _workers(out, "c")
    assert fakes.tree(out) == calm
    assert "was lost" in caplog.text


def test_a_process_that_is_killed_is_started_again(cluster, images, calm, out, caplog):
    cluster.add("a")
    with _slowly(images, out):
        (pid,) = _workers(out, "a").values()
        decoders = _children(pid)
        os.kill(pid, signal.SIGKILL)
        (out.parent / "notes" / f"a-{pid}").unlink()
        _workers(out, "a")
    assert fakes.tree(out) == calm
    assert "an actor with its shard, which is given out again, was lost" in caplog.text
    assert decoders
    _until(lambda: all(map(_ends, decoders)), 20)


def test_encoders_that_fail_on_one_node_are_put_aside(cluster, images, calm, out, caplog):
    cluster.add("a"), cluster.add("failing")
    with _slowly(images, out):  # or the sound node might be through before the other one is up
        _workers(out, "failing")
    assert fakes.tree(out) == calm
    assert "the device was lost" in caplog.text and "tried once more, on another node" in caplog.text


def test_encoders_that_fail_everywhere_end_the_run_by_name(cluster, images, out):
    nodes = [cluster.add("failing"), cluster.add("failing")]
    with pytest.raises(
        pipeline.WorkFailed, match=r"node \S+: bucket .* the VAE at 128 failed: RuntimeError: the device"
    ):
        _run(images, out)
    assert not (out / "128" / "dataset.json").exists() and not list(out.rglob(".*.tmp"))
    for node in nodes:
        cluster.kill(node)
    cluster.add("a")
    assert _run(images, out).encoded == PICTURES


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("other weights", r"node \S+ has other encoders than .*encoders\.vae\.weights was '0', is '1'"),
        ("alone", r"node \S+ does not see what was written into config\.out="),
    ],
)
def test_a_node_that_is_not_set_up_is_named(cluster, images, out, name, words):
    cluster.add("a"), cluster.add(name)
    with pytest.raises(InputError, match=words):
        _run(images, out)
    assert not (out / "128" / "dataset.json").exists()


def test_the_same_command_goes_on_after_the_driver_was_killed(cluster, images, calm, out):
    cluster.add("a"), cluster.add("b")
    slow = out.parent / "notes" / "slow"
    process = _command(images, out)
    _until(lambda: list(out.rglob("index-*")))  # a shard is finished
    slow.touch()
    workers = _workers(out, "a", "b")
    process.kill()
    process.communicate()
    _until(lambda: all(map(_ends, workers.values())))
    slow.unlink()
    done = {path: path.stat().st_mtime_ns for path in out.rglob("index-*")}
    process = _command(images, out)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert done and done == {path: path.stat().st_mtime_ns for path in done}
    assert fakes.tree(out) == calm


def test_a_stop_that_is_asked_for_drops_the_shards_in_hand(cluster, images, calm, out):
    cluster.add("a"), cluster.add("b")
    slow = out.parent / "notes" / "slow"
    slow.touch()
    process = _command(images, out)
    workers = _workers(out, "a", "b")
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 3, said
    assert "stopped as asked; finished shards are on disk" in said
    _until(lambda: all(map(_ends, workers.values())))
    assert not (out / ".ray-token").exists()
    slow.unlink()
    assert _run(images, out).encoded == PICTURES
    assert fakes.tree(out) == calm


def test_without_an_address_a_local_cluster_does_it_and_says_little(images, calm, out, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    process = _command(images, out)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert fakes.tree(out) == calm
    lines = [line for line in said.splitlines() if not line.startswith("Latent channels [3] never change")]
    assert lines[0].startswith(f"{PICTURES} pictures encoded, 0 inputs refused, ") and len(lines) == 3, said


def test_a_local_cluster_ends_with_its_driver(images, calm, out, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    slow = out.parent / "notes" / "slow"
    slow.touch()
    process = _command(images, out)
    (pid,) = _workers(out, "").values()
    started = [pid, *_children(pid)]
    assert len(started) > 3  # the decoders as well; helpers of Ray's own take a minute to notice
    process.kill()
    process.communicate()
    _until(lambda: all(map(_ends, started)))
    slow.unlink()
    process = _command(images, out)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert fakes.tree(out) == calm


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("ray://10.0.0.1:10001", "start the command on a machine of the cluster"),
        ("127.0.0.1:1", r"no cluster answers there \(Connection refused\)"),
    ],
)
def test_an_address_where_no_cluster_is_is_one_sentence(images, out, monkeypatch, address, words):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(InputError, match=words):
        _run(images, out)
    assert not (out / ".ray-token").exists()


def test_a_folder_that_is_no_longer_mounted_refuses_no_picture(images, calm, out, tmp_path, monkeypatch):
    """On a node of its own the test cannot unmount: the actor is used without Ray."""
    import dataclasses

    from encode import ray_actor

    elsewhere = tmp_path / "in"
    elsewhere.mkdir()
    config = fakes.config(images, out)
    with pipeline.Workers(1, 60, 4096) as workers:
        out.mkdir()
        context, plan, jobs = pipeline.begin(config, fakes.encoders(), workers, lambda: False)
    (out / ray_actor.TOKEN).write_text("x")
    probe = next(iter(context.items.values())).path
    order = ray_actor.Order(
        config.to_dict(), images, out, "x", probe, plan["fingerprint"], context.cells, 4, ray_fakes.LOAD
    )
    monkeypatch.setattr(whole_files, "_writer", "")
    actor = ray_actor.Actor(order, 1)
    try:
        assert actor.start().kind == "done"
        items = {
            name: dataclasses.replace(item, path=elsewhere / item.path.name) for name, item in context.items.items()
        }
        actor.order = dataclasses.replace(order, folder=elsewhere)
        outcome = actor.encode(jobs[0], items)
        assert outcome.kind == "work" and "does not see the photographs" in outcome.words
        assert not list(out.rglob("index-*"))
    finally:
        actor.context.workers.__exit__(None, None, None)
