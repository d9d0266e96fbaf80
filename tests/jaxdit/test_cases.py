"""What has gone wrong for others who trained (CASES.md; the ids stand in the docstrings), each for its whole kind.

What the other test files hold is not repeated here.
"""

import json
import shutil
import signal
import time
from functools import partial

import jax
import jax.numpy as jnp
import make_data
import numpy as np
import optax
import pytest
from tiny_run import WIDTHS, assert_same, curve, tiny, weights

from encode.records import InputError
from jaxdit import checkpoint, flow, metrics, optim, train, trained, update

FLOW = {"mean": 0.0, "std": 1.0, "shift": 1.0, "drop_both": 0.1, "drop_text": 0.1, "drop_vision": 0.1}
ADAM = {"b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.03, "clip_norm": 1.0}
LAST = 12
SHORT = {"train.total_steps": LAST, "optim.warmup_steps": 1, "checkpoint.every": 5}
SHORT |= {"data.holdout_fraction": 0.4, "train.eval_every": 4, "train.eval_images": 4, "train.eval_budget": 1.0}
OF_TIME = {"seconds", "images_per_second", "data_wait_fraction", "mfu", "eval_seconds"}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "64"
    make_data.dataset(root, {"64x48": 15})
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


def test_a_run_in_three_legs_has_every_number_of_a_run_in_one(path, undisturbed, tmp_path, monkeypatch):
    """CKP-06, CKP-10, CKP-14, EMA-05: weights, moments, counts, average, position, losses, evaluations."""
    folder, _ = undisturbed
    config = tiny(path, **SHORT)
    for step in (2, 6):
        with monkeypatch.context() as patch:
            stop_at(patch, step)
            assert train.train(config, tmp_path / "run") == "stopped"
        assert checkpoint.saved_steps(tmp_path / "run", "state")[-1] in (step, step + 1)
    assert train.train(config, tmp_path / "run") == "done"
    ours, theirs = everything(tmp_path / "run", LAST), everything(folder, LAST)
    assert_same(ours[:2], theirs[:2])
    assert ours[2]["position"] == theirs[2]["position"]
    for mine, other in zip(metrics.read(tmp_path / "run"), metrics.read(folder), strict=True):
        assert mine.keys() == other.keys()
        assert {name: mine[name] for name in mine.keys() - OF_TIME} == {
            name: other[name] for name in other.keys() - OF_TIME
        }
    assert [row["step"] for row in metrics.read(tmp_path / "run") if "held_out_loss" in row] == [4, 8, 12]


def test_evaluating_and_saving_often_change_no_number(path, undisturbed, tmp_path):
    """EMA-03, MEM-06: every buffer is donated, saved and read at each step, and nothing comes out otherwise."""
    folder, _ = undisturbed
    config = tiny(path, **SHORT | {"checkpoint.every": 1, "checkpoint.keep": 30, "train.eval_every": 1})
    assert train.train(config, tmp_path / "run") == "done"
    assert_same(everything(tmp_path / "run", LAST)[:2], everything(folder, LAST)[:2])
    assert curve(tmp_path / "run", "loss", "ema_distance") == curve(folder, "loss", "ema_distance")
    average = None
    for step in range(1, 5):  # EMA-02: it moves once an update, not once a micro-batch (two an update here)
        state, ema, _ = everything(tmp_path / "run", step)
        assert int(state["updates"]) == step == int(state["opt_state"][1][0].count)
        if average is not None:
            decay = min(0.9999, (1 + step) / (10 + step))
            wanted = jax.tree.map(lambda old, new, d=decay: d * old + (1 - d) * new, average, state["params"])
            for a, b in zip(jax.tree.leaves(ema), jax.tree.leaves(wanted), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
        average = ema


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
    for begun in (fresh, state | {"ema": ema}):
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


def test_the_line_after_a_resume_counts_the_whole_run_at_this_legs_speed(path, tmp_path, monkeypatch, caplog):
    """UX-01, UX-06: the first leg is slow, the second is not."""
    caplog.set_level("INFO")
    with monkeypatch.context() as patch:
        at_each_row(patch, lambda step: time.sleep(0.5))
        stop_at(patch, 8)
        assert train.train(tiny(path), tmp_path / "run") == "stopped"
    assert next(line for line in caplog.messages if line.startswith("step ")).startswith("step 1/20 ")
    caplog.clear()
    assert train.train(tiny(path), tmp_path / "run") == "done"
    lines = [line for line in caplog.messages if line.startswith("step ")]
    first = int(lines[0].split("/")[0].removeprefix("step "))
    assert first in (9, 10) and f"Going on at step {first - 1} of 20" in caplog.text
    assert [line.split()[1] for line in lines] == [f"{step}/20" for step in range(first, 21)]
    assert "rate not known yet" in lines[0]
    rates = {row["step"]: row["images_per_second"] for row in metrics.read(tmp_path / "run")}
    assert rates[8] < 16 < rates[20]  # half a second for four images, and then as fast as it can
    shown = [float(line.split(" images/s")[0].split()[-1]) for line in lines if "images/s" in line]
    assert min(shown) > 16 and "left 0 s" in lines[-1]


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
    with pytest.raises(InputError, match=r"checkpoints/12/state: .* has shape \[.*asks for \["):
        train.train(tiny(path, **changes), tmp_path / "run")
    assert metrics.read(tmp_path / "run") == metrics.read(folder)


@pytest.mark.parametrize("item", ["state", "ema", "data"])
def test_a_run_that_lost_a_part_of_its_checkpoints_is_not_begun_anew(path, undisturbed, tmp_path, item):
    """CKP-05: beginning anew would throw away metrics.jsonl and what is left of the weights."""
    folder, _ = undisturbed
    shutil.copytree(folder, tmp_path / "run")
    for part in (tmp_path / "run" / "checkpoints").glob(f"*/{item}"):
        shutil.rmtree(part)
    with pytest.raises(InputError, match=r"none of the steps .*10, 12 has all of state, ema, data"):
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
    with pytest.raises(InputError, match=r"checkpoints/12: its averaged weights \(the folder ema\) are missing"):
        trained.load(tmp_path / "run")
    assert trained.load(tmp_path / "run", raw=True).step == LAST
