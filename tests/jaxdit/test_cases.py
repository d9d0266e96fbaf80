"""What has gone wrong for others who trained (CASES.md; the ids stand in the docstrings), each for its whole kind.

What the other test files hold is not repeated here.
"""

import functools
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import make_data
import numpy as np
import optax
import pytest
from array_record.python.array_record_module import ArrayRecordReader
from flax import nnx
from tiny_run import ROOT, WIDTHS, assert_same, command, curve, tiny, weights

from encode import records
from encode.records import InputError
from jaxdit import attention, checkpoint, data, flow, metrics, model, optim, order, progress, train, trained, update
from tests.jaxdit.test_model import inputs, trained_like

FLOW = {"mean": 0.0, "std": 1.0, "shift": 1.0, "drop_both": 0.1, "drop_text": 0.1, "drop_vision": 0.1}
ADAM = {"b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.03, "clip_norm": 1.0}
LAST = 16
SHORT = {"train.total_steps": LAST, "optim.warmup_steps": 1, "checkpoint.every": 5}
SHORT |= {"data.holdout_fraction": 0.4, "train.eval_every": 4, "train.eval_images": 4, "train.eval_budget": 1.0}
OF_TIME = {"seconds", "seconds_before", "images_per_second", "data_wait_fraction", "mfu", "eval_seconds"}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "64"
    make_data.dataset(root, {"64x64": 15})
    return root


def leaves(state):
    """A copy on the host, which a later update does not donate away."""
    return jax.tree.map(np.array, state)


@pytest.fixture(scope="module")
def undisturbed(path, tmp_path_factory):
    """(working folder of a run in one go, what the last save was given)."""
    folder, given = tmp_path_factory.mktemp("undisturbed") / "run", {}
    save = checkpoint.Checkpoints.save

    def keep(self, step, state, ema, *rest):
        given.update(state=leaves(state), ema=leaves(ema))
        save(self, step, state, ema, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "save", keep)
        assert train.train(tiny(path, **SHORT), folder) == "done"
    return folder, given


def everything(folder, step):
    """(state, EMA, position) of one step as saved: restored by the tree of a new run."""
    settings = trained.model_settings(tiny("")["model"], WIDTHS)
    optimizer = optim.make_optimizer(lambda _: 1e-3, **ADAM)
    shapes = jax.eval_shape(partial(update.new_state, settings, optimizer, 0))
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes)
    ema = shapes.pop("ema")
    return checkpoint.read_step(folder / "checkpoints" / str(step), shapes, ema)


# Going on.


def at_each_row(monkeypatch, act):
    """act(step) before each row of metrics.jsonl is written."""
    write = metrics.Metrics.write
    monkeypatch.setattr(metrics.Metrics, "write", lambda self, row: (act(row["step"]), write(self, row))[1])


def stop_at(monkeypatch, wanted):
    """SIGTERM while that step is being told."""
    at_each_row(monkeypatch, lambda step: step == wanted and signal.raise_signal(signal.SIGTERM))


def test_a_run_in_two_legs_has_every_number_of_a_run_in_one(path, undisturbed, tmp_path, monkeypatch, caplog):
    """CKP-06, CKP-10, CKP-14, EMA-05: weights, moments, counts, average, position, losses, evaluations.

    UX-01, UX-06: and its lines count the whole run from the first step on, the time left at the present leg's speed.
    """
    caplog.set_level("INFO")
    folder, _ = undisturbed
    config = tiny(path, **SHORT)
    with monkeypatch.context() as patch:
        at_each_row(patch, lambda step: time.sleep(0.5))
        stop_at(patch, 6)
        assert train.train(config, tmp_path / "run") == "stopped"
    assert next(line for line in caplog.messages if line.startswith("step ")).startswith(f"step 1/{LAST} ")
    caplog.clear()
    assert train.train(config, tmp_path / "run") == "done"

    ours, theirs = everything(tmp_path / "run", LAST), everything(folder, LAST)
    assert_same(ours[:2], theirs[:2])
    assert ours[2]["position"] == theirs[2]["position"]
    for mine, other in zip(metrics.read(tmp_path / "run"), metrics.read(folder), strict=True):
        assert mine.keys() == other.keys()
        assert {name: mine[name] for name in mine.keys() - OF_TIME} == {
            name: other[name] for name in other.keys() - OF_TIME
        }
    rows = metrics.read(tmp_path / "run")
    assert [row["step"] for row in rows if "held_out_loss" in row] == [4, 8, 12, 16]

    lines = [line for line in caplog.messages if line.startswith("step ")]
    first = int(lines[0].split("/")[0].removeprefix("step "))
    assert first in (7, 8) and f"Going on at step {first - 1} of {LAST}" in caplog.text
    assert [line.split()[1] for line in lines] == [f"{step}/{LAST}" for step in range(first, LAST + 1)]
    assert "rate not known yet" in lines[0] and "left 0 s" in lines[-1]
    rates = {row["step"]: row["images_per_second"] for row in rows}
    assert rates[6] < 16 < rates[LAST]  # half a second for four images, and then as fast as it can


def test_evaluating_and_saving_often_change_no_number(path, undisturbed, tmp_path):
    """EMA-03, MEM-06: every buffer is donated, and saved and read every other step, and nothing comes out otherwise."""
    folder, _ = undisturbed
    config = tiny(path, **SHORT | {"checkpoint.every": 2, "train.eval_every": 2})
    assert train.train(config, tmp_path / "run") == "done"
    assert_same(everything(tmp_path / "run", LAST)[:2], everything(folder, LAST)[:2])
    assert curve(tmp_path / "run", "loss", "ema_distance") == curve(folder, "loss", "ema_distance")


def test_raw_and_averaged_weights_come_back_each_as_its_own_copy(undisturbed):
    """EMA-05."""
    folder, given = undisturbed
    for raw, wanted in ((True, given["state"]["params"]), (False, given["ema"])):
        step, found = weights(folder, raw)
        assert step == LAST
        assert_same(found, wanted)
    state, ema, _ = everything(folder, LAST)
    assert_same((state, ema), (given["state"], given["ema"]))
    differ = jax.tree.map(lambda a, b: bool((a != b).any()), given["state"]["params"], given["ema"])
    assert sum(jax.tree.leaves(differ)) > 20


def test_average_moments_and_weights_never_share_a_buffer(undisturbed):
    """MEM-06: a buffer that is given away twice is an error, or worse. A new state, a stage's, and one that was restored."""
    folder, _ = undisturbed
    optimizer = optim.make_optimizer(lambda _: 1e-2, **ADAM)
    state, ema, _ = everything(folder, LAST)
    params = jax.tree.map(jnp.copy, state["params"])
    fresh = jax.jit(partial(update.state_of, optimizer), donate_argnums=0)(params)
    change = jax.jit(partial(update.apply_update, optimizer, lambda _: 1e-2, 0.9999, 4), donate_argnums=0)
    total = jax.tree.map(lambda leaf: leaf + 0.01, update.new_total(state["params"]))
    plain = update.state_of(optimizer, jax.tree.map(jnp.copy, fresh["params"]))  # without the compiler's own copies
    for begun in (plain, fresh, state | {"ema": ema}):
        for _ in range(2):
            places = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(begun)]
            assert len(places) == len(set(places))
            before = begun
            begun, row = change(begun, total)
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before["params"]))
            assert float(row["ema_distance"]) > 0 and np.isfinite(float(begun["ema"]["patch_in"]["kernel"].sum()))


def test_the_state_keeps_no_random_keys(undisturbed):
    """CKP-03: every draw is a function of (seed, step, position), so there is no key to save; and all counts are whole."""
    folder, _ = undisturbed
    state, ema, kept = everything(folder, LAST)
    for path, leaf in jax.tree_util.tree_leaves_with_path((state, ema)):
        assert not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key), path
        assert leaf.dtype == (jnp.float32 if leaf.ndim else jnp.int32), path
    assert kept["position"].keys() == {"micro_batch", "taken"}
    draws = [jax.random.key_data(flow.sample_keys(0, jnp.int32(step), 0, 4)) for step in (20, 20, 21)]
    assert (draws[0] == draws[1]).all() and (draws[0] != draws[2]).all()


# What is refused.


def state_of(layers=3, width=4, dtype=jnp.float32, count=jnp.int32, more=False):
    params = {"blocks": {"kernel": jnp.arange(layers * width, dtype=dtype).reshape(layers, width)}}
    params |= {"more": jnp.ones(3)} if more else {}
    state = {"params": params, "opt_state": optax.adamw(1e-3).init(params), "updates": count(16_777_217)}
    return state, jax.tree.map(lambda leaf: leaf + 1, params)


@pytest.mark.parametrize(
    ("saved", "wanted", "words"),
    [
        ({}, {"layers": 4}, r"blocks\.kernel has shape \[3, 4\] .* asks for \[4, 4\]"),
        ({"layers": 4}, {}, r"blocks\.kernel has shape \[4, 4\] .* asks for \[3, 4\]"),
        ({}, {"width": 5}, r"blocks\.kernel has shape \[3, 4\] .* asks for \[3, 5\]"),
        ({}, {"dtype": jnp.bfloat16}, r"blocks\.kernel .*\(float32\), .*\(bfloat16\)"),
        ({"dtype": jnp.bfloat16}, {}, r"blocks\.kernel .*\(bfloat16\), .*\(float32\)"),
        ({}, {"count": jnp.float32}, r"updates .*\(int32\), .*\(float32\)"),
        ({"count": jnp.float32}, {}, r"updates .*\(float32\), .*\(int32\)"),
        ({"more": True}, {}, r"more is one too many"),
        ({}, {"more": True}, r"more is missing"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_by_its_first_array(tmp_path, saved, wanted, words):
    """CKP-01, CKP-02: whatever differs; and the checkpoint is not set aside as if it were damaged."""
    saver = checkpoint.Checkpoints(tmp_path, every=10, keep=2)
    saver.save(10, *state_of(**saved), {})
    saver.wait()
    with pytest.raises(InputError, match=words):
        saver.restore(*state_of(**wanted))
    saver.close()
    assert [child.name for child in (tmp_path / "checkpoints").iterdir()] == ["10"]
    if "count" not in saved | wanted:
        for raw in (False, True):
            with pytest.raises(InputError, match=words):
                checkpoint.restore_weights(tmp_path, state_of(**wanted)[1], raw=raw)


@pytest.mark.parametrize("change", [{"layers": 2}, {"width": 48}, {"width": 16}])
def test_another_depth_or_width_is_refused_even_where_config_json_agrees(path, undisturbed, tmp_path, change):
    """CKP-01: by the arrays' own shapes, not only by what the folder says about itself."""
    folder, _ = undisturbed
    shutil.copytree(folder, tmp_path / "run")
    config = json.loads((folder / "config.json").read_text())
    config["model"] |= change
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    changes = SHORT | {f"model.{name}": value for name, value in change.items()}
    with pytest.raises(InputError, match=r"checkpoints/16/state: .* has shape \[.*asks for \["):
        train.train(tiny(path, **changes), tmp_path / "run")
    assert metrics.read(tmp_path / "run") == metrics.read(folder)


@pytest.mark.parametrize("item", ["state", "ema", "data"])
def test_a_run_that_lost_a_part_of_its_checkpoints_is_not_begun_anew(path, undisturbed, tmp_path, item):
    """CKP-05: beginning anew would throw away metrics.jsonl and what is left of the weights."""
    folder, _ = undisturbed
    shutil.copytree(folder, tmp_path / "run")
    for part in (tmp_path / "run" / "checkpoints").glob(f"*/{item}"):
        shutil.rmtree(part)
    with pytest.raises(InputError, match=r"none of the steps .*15, 16 has all of state, ema, data"):
        train.train(tiny(path, **SHORT | {"train.total_steps": 24}), tmp_path / "run")
    assert metrics.read(tmp_path / "run") == metrics.read(folder)


def test_a_checkpoint_that_lost_a_part_does_not_push_a_whole_one_out(tmp_path):
    """CKP-05: the newest whole steps are kept, whatever lies beside them."""
    saver = checkpoint.Checkpoints(tmp_path, every=1000, keep=1)
    for step in (1, 9):
        saver.keep = 2 if step == 9 else 1
        saver.save(step, *state_of(), {})
        saver.wait()
    shutil.rmtree(tmp_path / "checkpoints" / "9" / "data")
    saver.keep = 1
    saver.save(5, *state_of(), {})
    saver.wait()
    assert saver.restore(*state_of())[0] == 5
    saver.close()


def test_weights_that_are_missing_are_said_and_never_replaced(undisturbed, tmp_path):
    """EMA-08."""
    folder, _ = undisturbed
    shutil.copytree(folder, tmp_path / "run")
    for part in (tmp_path / "run" / "checkpoints").glob("*/ema"):
        shutil.rmtree(part)
    with pytest.raises(InputError, match=r"checkpoints/16: its averaged weights \(the folder ema\) are missing"):
        trained.load(tmp_path / "run")
    assert trained.load(tmp_path / "run", raw=True).step == LAST


# Processes and disks.


def test_a_folder_that_refuses_files_in_the_middle_of_a_run_ends_it_by_name(path, tmp_path):
    """CKP-04: told before the next save, exit code 1, the last good step named. Two trainers: one works."""
    arguments = {"train.total_steps": 20, "checkpoint.every": 3, "checkpoint.keep": 9}
    process = subprocess.Popen(
        command(path, tmp_path / "run", **arguments), cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and not checkpoint.saved_steps(tmp_path / "run", "data"):
        time.sleep(0.002)
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(InputError, match="another process is writing into it"):
        train.train(tiny(path, **arguments), tmp_path / "run")
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (60_000, 60_000))  # half of a checkpoint
    process.send_signal(signal.SIGCONT)
    said = process.communicate(timeout=120)[1]
    good = checkpoint.saved_steps(tmp_path / "run", "data")
    assert process.returncode == 1 and good[-1] < 20, said
    before, after = said.split("a checkpoint could not be saved", 1)
    assert f"The last complete one is step {good[-1]}" in after.splitlines()[0] and "The run goes on" in after
    # A thread of the writer may speak after the last error, and within its line.
    last = re.findall(r"Error: /.*", said)[-1]
    assert f"The last complete one is step {good[-1]}" in last, said[-2000:]
    steps = [int(step) for step in re.findall(r"step (\d+)/20 ", before)]
    assert steps[-1] <= good[-1] + 2 * 3  # the save after the last good one is told before the next begins
    assert [row["step"] for row in metrics.read(tmp_path / "run")] == list(range(1, 21))


def test_a_last_save_that_never_lands_is_an_error(path, tmp_path, monkeypatch):
    """CKP-04: what was trained is not called done."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    save = checkpoint.Checkpoints.save

    def limited(self, step, *rest):
        self.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000 if step == LAST else soft, hard))
        save(self, step, *rest)

    try:
        with (
            monkeypatch.context() as patch,
            pytest.raises(checkpoint.SaveFailed, match=r"step 16 .* complete one is step 15"),
        ):
            patch.setattr(checkpoint.Checkpoints, "save", limited)
            train.train(tiny(path, **SHORT), tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpoint.saved_steps(tmp_path / "run", "state") == [5, 10, 15]


SAVES = """
import logging, os, random, signal, sys, time
import jax, jax.numpy as jnp, numpy as np
from pathlib import Path
from jaxdit import checkpoint
logging.basicConfig(level=logging.ERROR)
folder, kills, draw = Path(sys.argv[1]), int(sys.argv[2]), random.Random(time.time())

def state(step):
    return {"weights": jax.random.normal(jax.random.key(step), (300, 1000)), "updates": jnp.int32(step)}

def whole():
    return [step for step in checkpoint.saved_steps(folder, "state")
            if all((folder / "checkpoints" / str(step) / item).is_dir() for item in ("ema", "data"))]

def child():
    saver = checkpoint.Checkpoints(folder, every=10**6, keep=1)
    newest = (whole() or [None])[-1]
    found = saver.restore(state(0), state(0))
    step = found[0] if found else 0
    if newest is not None:
        assert step == newest and found[3] == {"step": step}, (step, newest)
        for tree in found[1:3]:
            assert int(tree["updates"]) == step and (tree["weights"] == state(step)["weights"]).all()
    left = [child.name for child in (folder / "checkpoints").iterdir()] if found else []
    assert all(name.isdigit() for name in left), left
    if len(sys.argv) > 3:
        return print("newest", step)
    while True:
        step += 1
        saver.save(step, state(step), state(step), {"step": step})

for kill in range(kills):
    pid = os.fork()
    if pid == 0:
        try:
            child()
        except BaseException as error:
            print("child", kill, repr(error), flush=True)
        os._exit(9)
    start = (whole() or [0])[-1]
    while (whole() or [0])[-1] < start + 1 + kill % 2 and os.waitpid(pid, os.WNOHANG) == (0, 0):
        time.sleep(0.001)
    time.sleep(draw.uniform(0, 0.3))
    os.kill(pid, signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    assert whole(), os.listdir(folder / "checkpoints")
sys.argv.append("last")
child()
"""


@pytest.mark.parametrize("kills", [3, pytest.param(int(os.environ.get("JAXDIT_KILLS", 20)), marks=pytest.mark.all)])
def test_a_kill_during_a_save_leaves_a_whole_step_that_is_taken(tmp_path, kills):
    """CKP-05: with one step kept, the hardest; each start checks that it restores the newest whole step, number by number."""
    done = subprocess.run([sys.executable, "-c", SAVES, tmp_path, str(kills)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "child" not in done.stdout and int(done.stdout.split()[-1]) >= kills


FULL = """
import logging, os, shutil, subprocess, sys
from pathlib import Path
folder = Path(sys.argv[1])
if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", folder]).returncode:
    sys.exit(77)
import jax
from jaxdit import checkpoint
logging.basicConfig(level=logging.ERROR)

def trees(step):
    keys = jax.random.split(jax.random.key(step))
    return tuple({"weights": jax.random.bits(key, (300, 1000))} for key in keys)  # what nothing makes smaller

def attempt(step):
    saver.save(step, *trees(step), {})
    saver.wait()
    return saver.steps(), saver.failures

saver = checkpoint.Checkpoints(folder, every=10**6, keep=2)
needed = sum(tree["weights"].nbytes for tree in trees(1))
assert attempt(1) == ([1], 0)
saver._sealing.join()
free = shutil.disk_usage(folder).free
with open(folder / "filler", "wb") as filler:
    filler.write(bytes((free - needed) // 4096 * 4096))
assert shutil.disk_usage(folder).free >= needed  # it seems to fit, and does not
assert attempt(2) == ([1], 1)
assert attempt(3) == ([1], 2)
names = sorted(child.name for child in (folder / "checkpoints").iterdir())
assert names[0] == "1" and not any(name.startswith("2") for name in names)  # what failed is not in the way of the next
step, state, ema, _ = saver.restore(*trees(0))
assert step == 1 and all((a["weights"] == b["weights"]).all() for a, b in zip((state, ema), trees(1)))
(folder / "filler").unlink()
assert attempt(4) == ([1, 4], 0) and len(list((folder / "checkpoints").iterdir())) == 2
assert (saver.restore(*trees(0))[1]["weights"] == trees(4)[0]["weights"]).all()
saver.close()
"""


def test_a_disk_that_fills_keeps_the_checkpoint_before_and_takes_the_next_when_there_is_room(tmp_path):
    """CKP-08, on a real disk of 12 MB."""
    full = ["unshare", "-rm", sys.executable, "-c", FULL, tmp_path]
    done = subprocess.run(full, cwd=ROOT, capture_output=True, text=True) if shutil.which("unshare") else None
    if done is None or done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("no small disk can be mounted here")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("The last complete one is step 1") == 2 and "No space left" in done.stderr


ENTRY = """
import importlib, os, sys
import encode.commandline, encode.records
assert "jax" not in sys.modules

class Watch:
    def find_spec(self, name, *rest):
        if name == "jax":
            tell("jax")

def tell(what):
    names = ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE")
    print(module, what, *(os.environ.get(name, "-") for name in names), flush=True)
    os._exit(0)

for module in sys.argv[1:]:
    if os.fork() == 0:
        sys.meta_path.insert(0, Watch())
        importlib.import_module(f"jaxdit.{module}")
        tell("-")
    os.wait()
"""


def test_commands_say_how_much_of_the_card_they_take_before_jax_is_imported():
    """MEM-02, MEM-03: set later, the variables do nothing. What loads PyTorch beside JAX takes memory as it needs it."""
    files = sorted((ROOT / "jaxdit").glob("*.py"))
    commands = [file.stem for file in files if 'if __name__ == "__main__":' in file.read_text()]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("XLA_PYTHON")}

    def look(names, **more):
        call = [sys.executable, "-c", ENTRY, *names]
        done = subprocess.run(call, cwd=ROOT, env=environment | more, capture_output=True, text=True, check=True)
        return {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()}

    found = look(commands)
    assert found.keys() == set(commands) >= {"main", "plan", "sample", "validate"}
    assert found["main"] == ["-", "0.9", "-"] and found["plan"] == ["jax", "0.9", "-"]  # main imports jax when it runs
    for name in commands:
        if found[name][0] == "jax":
            assert found[name][1:] in (["0.9", "-"], ["-", "false"]), name
    assert found["sample"][2] == found["validate"][2] == "false"
    assert look(["main"], XLA_PYTHON_CLIENT_MEM_FRACTION="0.5") == {"main": ["-", "0.5", "-"]}  # a person's word holds


# Numbers.


def scaled(params, factor):
    """Queries and keys `factor` times as large, values as they are."""

    def scale(path, leaf):
        names = {part.key for part in path}
        if "query" in names:
            return leaf * factor
        half = jnp.arange(leaf.shape[-1]) < leaf.shape[-1] // 2
        return leaf * jnp.where(half, factor, 1.0) if "key_value" in names else leaf

    return jax.tree_util.tree_map_with_path(scale, params)


def test_queries_and_keys_a_hundred_times_too_large_do_no_harm_in_bfloat16(monkeypatch):
    """NUM-05: the loss stays finite and falls over 200 updates; logits are bounded by the gains, whatever comes in."""
    graph, params = trained_like(dtype="bfloat16")
    optimizer = optim.make_optimizer(lambda _: 1e-3, **ADAM)
    x, _, conditions, _, _ = inputs(batch=2, height=4, width=6)
    batch = conditions | {"latent": x}

    accumulate = jax.jit(partial(update.accumulate_gradients, graph, FLOW, 0))
    apply = jax.jit(partial(update.apply_update, optimizer, lambda _: 1e-3, 0.9999, 2))
    state, rows, zeros = update.state_of(optimizer, scaled(params, 100.0)), [], update.new_total(params)
    for step in range(200):
        state, row = apply(state, accumulate(state["params"], zeros, batch, jnp.array([step, 0])))
        rows.append((row["loss"], row["grad_norm"]))
    rows = np.array(rows)
    assert int(state["voided"]) == 0 and np.isfinite(rows).all()
    assert rows[-20:, 0].mean() < rows[:20, 0].mean()

    seen = []
    attend = attention.attend
    monkeypatch.setattr(attention, "attend", lambda q, k, *rest: (seen.append((q, k)), attend(q, k, *rest))[1])
    layer, _ = nnx.split(model.Attention(32, 2, zero=False, dtype=jnp.bfloat16, implementation="xla", rngs=nnx.Rngs(0)))
    for name, angles in (("self_attention", model.rotary_angles(2, 3, 16)), ("cross_attention", None)):
        weights = jax.tree.map(lambda leaf: leaf[0], state["params"]["blocks"][name])
        for size in (1.0, 1e4):
            h = size * jax.random.normal(jax.random.key(0), (2, 6, 32))
            nnx.merge(layer, weights)(h, h, angles=angles)
            q, k = (part.astype(jnp.float32) for part in seen.pop())
            logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) / 16**0.5
            gains = [jnp.abs(weights[norm]["scale"]).max() for norm in ("query_norm", "key_norm")]
            assert jnp.abs(logits).max() <= 16**0.5 * gains[0] * gains[1] * 1.02


def test_padding_has_no_influence_in_bfloat16_at_the_shortest_and_the_longest_text():
    """NUM-06: not on the output, not on any gradient; and each text counts as it does without padding."""
    graph, params = trained_like(dtype="bfloat16")
    x, t, conditions, keep, _ = inputs(tokens=16)
    conditions |= {"text_length": jnp.array([1, 16, 5], jnp.int32)}

    @jax.jit
    def run(params, text, lengths):
        def loss(params, text):
            out = nnx.merge(graph, params)(x, t, conditions | {"text": text, "text_length": lengths}, keep, keep)
            return jnp.square(out).mean(), out

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(params, text)

    text = np.array(conditions["text"])
    poisoned = text.copy()
    for row, length in zip(poisoned, conditions["text_length"]):
        row[length:] = 1e4
    clean, other = (run(params, jnp.asarray(part), conditions["text_length"]) for part in (text, poisoned))
    assert_same(clean, other)
    (_, out), (gradients, to_text) = clean
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((out, gradients)))
    for row, length in zip(np.asarray(to_text), conditions["text_length"]):
        assert not row[length:].any() and np.abs(row[:length]).max(-1).all()
    forward = jax.jit(
        lambda text, lengths: nnx.merge(graph, params)(
            x, t, conditions | {"text": text, "text_length": lengths}, keep, keep
        )
    )
    for length, sample in ((1, 0), (5, 2)):
        alone = forward(jnp.asarray(text[:, :length]), jnp.full(3, length, jnp.int32))
        np.testing.assert_allclose(alone[sample], out[sample], atol=2e-2 * float(jnp.abs(out).max()))


class Poisoned:
    """The batches of a run, with one NaN in a latent where `bad` (update, micro-batch of it) says so."""

    def __init__(self, batches, micro_batches, bad):
        self.batches, self.micro_batches, self.bad, self.taken = batches, micro_batches, bad, 0

    def __next__(self):
        batch = next(self.batches)
        if self.bad(*divmod(self.taken, self.micro_batches)):
            batch["latent"] = batch["latent"].copy()
            batch["latent"][1, 2, 0, 3] = np.nan
        self.taken += 1
        return batch

    def __getattr__(self, name):
        return getattr(self.batches, name)


def test_one_nan_voids_its_whole_update_and_ten_in_a_row_end_the_run_with_sound_weights(path, tmp_path, monkeypatch):
    """NUM-07, NUM-09, EMA-02: one in the third of four micro-batches of step 5; then in each step from 9 on."""
    states, save, batches = {}, checkpoint.Checkpoints.save, data.training_batches

    def keep(self, step, state, ema, *rest):
        states[step] = leaves(state | {"ema": ema})
        if step in (4, 12):
            save(self, step, state, ema, *rest)

    def poisoned(*arguments, **options):
        return Poisoned(batches(*arguments, **options), 4, lambda step, part: (step == 4 and part == 2) or step > 7)

    monkeypatch.setattr(checkpoint.Checkpoints, "save", keep)
    monkeypatch.setattr(data, "training_batches", poisoned)
    config = tiny(path, **{"train.batch_size": 8, "train.total_steps": 40, "checkpoint.every": 1})
    with pytest.raises(
        progress.TrainingStopped, match=r"10 updates in a row up to step 18 .* good checkpoint is step 12 in"
    ):
        train.train(config, tmp_path / "run")
    rows = {row["step"]: row for row in metrics.read(tmp_path / "run")}
    moving = ("params", "opt_state", "ema", "updates")
    for still, before in ((5, 4), (12, 8)):
        assert_same([states[still][name] for name in moving], [states[before][name] for name in moving])
    for step in (
        1,
        2,
        3,
        4,
        6,
        7,
        8,
    ):  # EMA-02: the average moves once an update, not once a micro-batch, nor when voided
        state, updates = states[step], step - (step > 5)
        assert int(state["updates"]) == updates == int(state["opt_state"][1][0].count)
        decay = min(0.9999, (1 + updates) / (10 + updates))
        if step > 1:
            wanted = jax.tree.map(
                lambda old, new, d=decay: d * old + (1 - d) * new, states[step - 1]["ema"], state["params"]
            )
            for ours, theirs in zip(jax.tree.leaves(state["ema"]), jax.tree.leaves(wanted), strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)
        assert (state["ema"]["patch_out"]["kernel"] != state["params"]["patch_out"]["kernel"]).any()
    assert rows[5]["loss"] is None and rows[5]["voided"] == rows[5]["voided_in_row"] == 1 and rows[5]["updates"] == 4
    assert (
        rows[6]["loss"] and rows[6]["voided_in_row"] == 0 and rows[6]["updates"] == 5 and rows[6]["samples_seen"] == 48
    )
    assert rows[5]["learning_rate"] == rows[6]["learning_rate"] != rows[7]["learning_rate"]  # the schedule waits too
    assert [rows[step]["voided_in_row"] for step in range(9, 19)] == list(range(1, 11)) and max(rows) == 18
    step, found = weights(tmp_path / "run", raw=True)
    assert step == 12 and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))


def test_gradients_of_unequal_buckets_are_the_mean_over_all_samples():
    """NUM-12: four micro-batches of four, of two buckets, one of them padded, against sixteen of one sample."""
    graph, params = trained_like()
    optimizer = optim.make_optimizer(lambda _: 1e-3, **ADAM)
    accumulate = jax.jit(partial(update.accumulate_gradients, graph, FLOW, 0))
    apply = jax.jit(partial(update.apply_update, optimizer, lambda _: 1e-3, 0.9999, 16))
    parts = []
    for k, (height, width) in enumerate(((8, 12), (4, 6), (8, 12), (8, 12))):
        x, _, conditions, _, _ = inputs(batch=4, height=height, width=width, tokens=7, seed=k)
        parts.append(conditions | {"latent": x * (1 + k)})
    mask = np.ones((4, 4, 6), np.uint8)
    mask[:, :, 4:] = 0
    parts[1]["mask"] = jnp.asarray(mask)
    zeros = update.new_total(params)
    whole, single = zeros, zeros
    for k, part in enumerate(parts):
        whole = accumulate(params, whole, part, jnp.array([5, 4 * k]))
        for j in range(4):
            one = {name: value[j : j + 1] for name, value in part.items()}
            single = accumulate(params, single, one, jnp.array([5, 4 * k + j]))
    whole, single = jax.device_get((whole, single))
    for ours, theirs in zip(*map(jax.tree.leaves, (whole, single)), strict=True):  # gradients, losses, counts
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max() + 1e-7)
    assert whole["count_by_t"].sum() == 16
    state = update.state_of(optimizer, params)
    (_, ours), (_, theirs) = (apply(state, total) for total in (whole, single))
    for name in ("loss", "grad_norm", "velocity_rms", "loss_t"):
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5)
    norm = np.sqrt(sum(np.square(leaf / 16, dtype=np.float64).sum() for leaf in jax.tree.leaves(single["gradients"])))
    np.testing.assert_allclose(ours["grad_norm"], norm, rtol=1e-5)
    # NUM-13: no size alone voids an update; NUM-10: sums are float32 whatever the model computes in.
    huge = jax.tree.map(lambda leaf: leaf * 1e6, whole)
    after, row = apply(state, huge)
    assert int(after["updates"]) == 1 and int(after["voided"]) == 0 and row["grad_norm"] > 1e4
    halves = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(update.new_total(halves))} == {np.dtype("float32")}


def test_conditions_are_dropped_once_a_sample_whatever_is_flipped():
    """SMP-06, SMP-09: at the defaults of every configuration, over 100,000 samples as the trainer draws them."""
    from configs import full, nano, quickstart

    steps, count = 100, 1000

    @jax.jit
    def draw(step, mean, std, shift, both, text, vision):
        keys = flow.sample_keys(0, step, 0, count)
        keys = [jax.vmap(jax.random.fold_in, (0, None))(keys, purpose) for purpose in range(2)]
        t = flow.draw_timesteps(keys[0], mean=mean, std=std, shift=shift)
        return t, *flow.draw_dropout(keys[1], both=both, text=text, vision=vision)

    @functools.cache
    def flipped(share):
        plan = iter(order.Plan({"a": np.arange(1000)}, seed=0, micro_batch=count, flip=share))
        return np.concatenate([next(plan)["flips"] for _ in range(steps)])

    for config in (full.get_config("256"), nano.get_config(), quickstart.get_config()):
        options = config.flow
        drawn = [options[name] for name in ("mean", "std", "shift", "drop_both", "drop_text", "drop_vision")]
        t, text, vision = (np.concatenate(parts) for parts in zip(*(draw(step, *drawn) for step in range(steps))))
        flips = flipped(options.flip)
        shares = [(text & vision).mean(), (text & ~vision).mean(), (~text & vision).mean(), (~text & ~vision).mean()]
        np.testing.assert_allclose(shares, [0.1, 0.1, 0.1, 0.7], atol=0.005)
        assert abs(flips.mean() - 0.5) < 0.005
        related = np.corrcoef([flips, text, vision, t])
        assert abs(related[0, 1:]).max() < 0.015 and abs(related[3, :3]).max() < 0.015
        assert abs(t.mean() - 0.5) < 0.005 or (options.shift > 1 and t.mean() > 0.6)


# Data.


def position_after(batches, count):
    taken = [next(batches) for _ in range(count)]
    return [(batch["bucket"], batch["rows"].tolist()) for batch in taken], batches.get_state()


POSITIONS = """
import json, sys
from jaxdit import data
dataset = data.Dataset(sys.argv[1])
found = []
for state in json.loads(sys.argv[2]):
    batches = data.training_batches(dataset, seed=3, micro_batch=2, flip=0.5)
    batches.set_state(state)
    taken = [next(batches) for _ in range(20)]
    found.append([[b["bucket"], b["rows"].tolist(), b["latent"].astype(float).sum()] for b in taken])
    batches.close()
print(json.dumps(found))
"""


def test_a_position_is_the_same_place_in_a_new_process(tmp_path):
    """DAT-03, DAT-05: in the first epoch, at the edge of one, in the third; id for id, and the values too."""
    root = tmp_path / "64"
    make_data.dataset(root, {"24x16": 8, "16x32": 5})
    batches = data.training_batches(data.Dataset(root), seed=3, micro_batch=2, flip=0.5)
    states, taken = [], []
    for _ in range(50):
        states.append(batches.get_state())
        batch = next(batches)
        taken.append([batch["bucket"], batch["rows"].tolist(), batch["latent"].astype(float).sum()])
    batches.close()
    large = [state["taken"]["24x16"] for state in states]
    stops = [0, 7, large.index(8), large.index(16), next(k for k, count in enumerate(large) if count > 16)]
    call = [sys.executable, "-c", POSITIONS, root, json.dumps([states[stop] for stop in stops])]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=True)
    for stop, found in zip(stops, json.loads(done.stdout), strict=True):
        assert found == taken[stop : stop + 20]


def test_five_epochs_hold_every_training_image_once_and_no_held_out_one(tmp_path):
    """DAT-01, DAT-04: whatever the seed, and stopped at any point."""
    make_data.dataset(tmp_path / "64", {"16x16": 100}, shard=50)
    dataset = data.Dataset(tmp_path / "64", holdout_fraction=0.1)
    train_rows, held_out = set(dataset.train["16x16"].tolist()), set(dataset.held_out["16x16"].tolist())
    count = len(train_rows)
    assert len(held_out) + count == 100 and 3 <= len(held_out) <= 20 and not train_rows & held_out
    for seed in (0, 1):
        plan = order.Plan(dataset.train, seed=seed, micro_batch=7, flip=0.5)
        rows, batches = [], iter(plan)
        while len(rows) < 5 * count:
            rows += next(batches)["rows"].tolist()
            state, batches = batches.get_state(), iter(plan)
            batches.set_state(json.loads(json.dumps(state)))  # a resume after each micro-batch
        epochs = [rows[start : start + count] for start in range(0, 5 * count, count)]
        assert all(set(epoch) == train_rows and len(epoch) == count for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == 5


@pytest.mark.parametrize("change", [{"flip": 0.0}, {"normalize_vision": True}, {"text_lengths": (8, 16)}])
def test_options_of_reading_do_not_move_the_order(tmp_path, change):
    """DAT-07."""
    make_data.dataset(tmp_path / "64", {"24x16": 8, "16x32": 5})

    def order(flip=0.5, **options):
        batches = data.training_batches(data.Dataset(tmp_path / "64", **options), seed=3, micro_batch=3, flip=flip)
        try:
            return position_after(batches, 15)
        finally:
            batches.close()

    assert order(**change) == order()


def test_a_flipped_bit_anywhere_in_the_data_is_named_or_changes_nothing(tmp_path):
    """DAT-08: never other numbers, never NaN; in a shard or in its index."""
    root = tmp_path / "64"
    make_data.dataset(root, {"16x16": 8})
    rng = random.Random(time.time())

    def read():
        dataset = data.Dataset(root)
        return dataset.read("16x16", np.arange(8), np.arange(8) % 2 == 0)

    clean = read()
    rows = 4 * records.INDEX_DTYPE.itemsize
    for file, part in ((records.shard_path(root, "16x16", 1), 0), (records.index_path(root, "16x16", 1), rows)):
        good, named = file.read_bytes(), 0
        first = len(good) - part if part else 0
        content = [place for place, byte in enumerate(good) if byte and place >= first]  # a shard is mostly room
        for place in [*rng.sample(content, 50), *(rng.randrange(first, len(good)) for _ in range(10))]:
            bad = bytearray(good)
            bad[place] ^= 1 << rng.randrange(8)
            file.write_bytes(bytes(bad))
            try:
                found = read()
            except records.DatasetError as error:
                named += 1
                assert file.name in str(error) or records.shard_path(root, "16x16", 1).name in str(error), place
            else:
                assert_same(found, clean)
        assert named > 10
        file.write_bytes(good)


def test_records_are_read_singly_and_fast_enough(tmp_path):
    """DAT-10: one record a group, so that a shuffled read takes no neighbour along; 3,900 records a second when written."""
    root = tmp_path / "64"
    make_data.dataset(root, {"16x16": 500}, shard=250)
    reader = ArrayRecordReader(str(records.shard_path(root, "16x16", 1)))
    assert reader.writer_options_string().startswith("group_size:1,")
    reader.close()
    batches = data.training_batches(data.Dataset(root), seed=0, micro_batch=256, flip=0.5)
    next(batches)
    began = time.monotonic()
    for _ in range(8):
        next(batches)
    batches.close()
    assert 8 * 256 / (time.monotonic() - began) > 500


def test_a_reader_that_dies_says_so_at_once_and_nothing_hangs(path, monkeypatch):
    """DAT-12: readers are threads, so nothing outside kills one; whatever one meets reaches the loop."""
    pad, calls = data.pad_text, []

    def dying(*arguments):
        calls.append(0)
        if len(calls) == 9:
            raise MemoryError("no room for a batch")
        return pad(*arguments)

    monkeypatch.setattr(data, "pad_text", dying)
    batches = data.training_batches(data.Dataset(path), seed=0, micro_batch=2, flip=0.5)
    began = time.monotonic()
    with pytest.raises(MemoryError, match="no room for a batch"):
        for _ in range(50):
            next(batches)
    batches.close()
    assert time.monotonic() - began < 10
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    assert not [child for child in children if "grain" in Path(f"/proc/{child}/cmdline").read_text()]


# Configuration.

PARSE = """
import json, os, sys
from encode import commandline
for arguments in json.load(sys.stdin):
    reader, writer = os.pipe()
    if os.fork() == 0:
        sys.argv = ["jaxdit", *arguments]
        try:
            config = commandline._parse("configs/nano.py")
            answer = ["taken", config.to_dict()]
        except commandline.InputError as error:
            answer = ["refused", str(error)]
        except BaseException as error:
            answer = ["fell", repr(error)]
        os.write(writer, json.dumps(answer).encode())
        os._exit(0)
    os.close(writer)
    answer = b""
    while part := os.read(reader, 65536):
        answer += part
    os.close(reader)
    os.wait()
    print(answer.decode())
"""


def parsed(calls):
    """[(taken, configuration) or (refused, sentence)] of command lines."""
    call = [sys.executable, "-c", PARSE]
    done = subprocess.run(call, cwd=ROOT, input=json.dumps(calls), capture_output=True, text=True, check=True)
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def test_every_misspelt_field_is_refused_with_the_nearest_one():
    """CFG-01: a letter too few anywhere, and a field in the wrong section."""
    from configs import nano

    fields = [(section, name) for section, values in nano.get_config().items() for name in values]
    rng, calls, wanted = random.Random(0), [], []
    names = {name for _, name in fields}
    for section, name in fields:
        right = f"{section}.{name}"
        if len(name) > 2:
            cut = rng.randrange(1, len(name) - 1)
            short = name[:cut] + name[cut + 1 :]
            if short not in names:  # patch without its c is a path, which stands in another section
                calls.append([f"--config.{section}.{short}=1"])
                wanted.append(right)
        calls.append([f"--config.{section[:1]}{section[2:]}.{name}=1"])
        wanted.append(right)
    calls += [
        ["--config.train.layers=4"],
        ["--config.seed=4"],
        ["--config.train.total_step=200"],
        ["--config.modle.layers=2"],
    ]
    wanted += ["model.layers", "train.seed", "train.total_steps", "model.layers"]
    found = parsed(calls)
    assert len(found) == len(calls) > 100
    for (verdict, words), (argument,), right in zip(found, calls, wanted):
        assert verdict == "refused" and words.startswith(f"{argument}: "), (argument, words)
        assert right.split(".")[-1] in words.split("nearest is")[-1], (argument, words)
    exact = sum(f"the nearest is '{right}'" in words for (_, words), right in zip(found, wanted))
    assert exact > 0.95 * len(calls)


def test_tuples_flag_files_and_repeated_flags(tmp_path):
    """CFG-03, CFG-04: a pair stays a pair, a flag file counts like the command line, nothing silently wins."""
    flagfile = tmp_path / "flags"
    flagfile.write_text("--config=configs/full.py:256\n--config.train.total_steps=77\n--config.data.path=there\n")
    right = {
        "(64,)": [64], "(64,128)": [64, 128], "64,128": [64, 128], "64": [64], "()": [],
    }  # fmt: skip
    calls = [[f"--config.data.text_lengths={text}"] for text in right]
    calls += [[f"--flagfile={flagfile}"], [f"--flagfile={flagfile}", "--config.train.total_steps=88"]]
    found = parsed(calls)
    assert [config["data"]["text_lengths"] for _, config in found[: len(right)]] == list(right.values())
    for (verdict, config), steps in zip(found[len(right) :], (77, 88)):
        assert verdict == "taken" and config["model"]["layers"] == 24 and config["data"]["path"] == "there"
        assert config["train"]["total_steps"] == steps
    broken = tmp_path / "broken.py"
    broken.write_text("def get_config(arg=None):\n    return arg.nothing\n")
    refused = {
        "--config.train.total_steps=1e3": "total_steps=1e3",
        "--config.model.layers=2.5": "layers=2.5",
        "--config.model.layers=": "layers=",
        "--config.train.deterministic=perhaps": "deterministic=perhaps",
        "--config.train=5": "--config.train=5",
        "--config.train.seed.x=1": "'train.seed'",
        "--config.sample.prompts=a dog": "as tuple",
        f"--flagfile={tmp_path / 'none'}": "none",
        f"--config={broken}": r"broken.py: this file is no configuration (AttributeError",
    }
    for (verdict, words), wanted in zip(parsed([[argument] for argument in refused]), refused.values(), strict=True):
        assert verdict == "refused" and wanted in words and "Traceback" not in words, words
    twice = ["--config=configs/nano.py", "--config=configs/full.py:256"]
    assert parsed([twice]) == [("refused", f"{' '.join(twice)}: --config is given twice; leave one.")]


def test_a_configuration_from_before_the_choice_of_optimizers_is_told_what_to_add(path, tmp_path):
    config = tiny(path)
    del config.optim.name
    with pytest.raises(InputError, match=r'optim\.name is missing: .* add "name": "adamw"'):
        train.train(config, tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data.text_lengths": ((64, 128),)}, r"data\.text_lengths=\(\(64, 128\),\)"),
        ({"data.text_lengths": (64.5,)}, "data.text_lengths"),
        ({"data.text_lengths": ("",)}, "data.text_lengths"),
        ({"data.text_lengths": (0, 16)}, "data.text_lengths"),
        ({"train.seed": 2**70}, r"train\.seed=\d+ must lie"),
        ({"train.seed": -1}, r"train\.seed=-1 must lie"),
        ({"train.eval_every": -5}, r"train\.eval_every=-5"),
        ({"optim.peak_learning_rate": float("nan")}, r"optim\.peak_learning_rate=nan"),
        ({"optim.peak_learning_rate": float("inf")}, r"optim\.peak_learning_rate=inf is not a finite number"),
        ({"optim.clip_norm": float("nan")}, r"optim\.clip_norm=nan"),
        ({"optim.end_learning_rate": 1.0}, r"optim\.end_learning_rate=1\.0 .* optim\.peak_learning_rate=0\.0025"),
        ({"optim.weight_decay": -1.0}, r"optim\.weight_decay=-1\.0"),
        ({"optim.name": "sgd"}, r"optim\.name=sgd: choose adamw or muon"),
        ({"optim.b1": 1.0}, r"optim\.b1=1\.0"),
        ({"optim.b2": 1.5}, r"optim\.b2=1\.5"),
        ({"optim.warmup_steps": -3}, r"optim\.warmup_steps=-3"),
        ({"flow.mean": float("nan")}, r"flow\.mean=nan"),
        ({"flow.std": float("nan")}, r"flow\.std=nan"),
        ({"flow.drop_both": -0.1, "flow.drop_text": 0.3}, r"flow\.drop_both, drop_text and drop_vision are \[-0\.1"),
        ({"checkpoint.minutes": float("nan")}, r"checkpoint\.minutes=nan"),
        ({"sample.text_guidance": float("nan")}, r"sample\.text_guidance=nan is not a finite number"),
        ({"metrics.watts": float("inf")}, r"metrics\.watts=inf is not a finite number"),
        ({"sample.previews": 1, "sample.references": ("none.png",)}, r"none\.png: there is no such file"),
    ],
)
def test_numbers_that_contradict_or_mean_nothing_are_refused_before_anything_is_written(path, tmp_path, change, words):
    """CFG-06."""
    with pytest.raises(InputError, match=words):
        train.train(tiny(path, **change), tmp_path / "run")
    assert not (tmp_path / "run").exists()
