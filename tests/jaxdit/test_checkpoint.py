import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from encode.records import InputError
from jaxdit import checkpoint


def state_of(value, layers=3):
    params = {"blocks": {"kernel": jnp.full((layers, 4), value, jnp.float32)}}
    optimizer = optax.adamw(1e-3)
    state = {"params": params, "opt_state": optimizer.init(params), "updates": jnp.int32(16_777_217)}
    return state, jax.tree.map(lambda leaf: leaf + 0.5, params)


def save_all(workdir, steps, every=10, keep=2):
    saver = checkpoint.Checkpoints(workdir, every=every, keep=keep)
    for step in steps:
        saver.save(step, *state_of(float(step)), {"micro_batch": step, "taken": {"a": step}})
        saver.wait()
    return saver


def test_everything_comes_back_exactly(tmp_path):
    saver = save_all(tmp_path, [10])
    step, state, ema, data = saver.restore(*state_of(0.0))
    saver.close()
    want, want_ema = state_of(10.0)
    assert step == 10 and data == {"micro_batch": 10, "taken": {"a": 10}}
    for ours, theirs in zip(jax.tree.leaves((state, ema)), jax.tree.leaves((want, want_ema)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert ours.dtype == theirs.dtype  # the counter stays an integer: 16,777,217 is no float32
    assert jax.tree.structure(state) == jax.tree.structure(want)


def test_the_average_is_restored_alone(tmp_path):
    save_all(tmp_path, [10]).close()
    shutil.rmtree(tmp_path / "checkpoints" / "10" / "state")
    step, ema = checkpoint.restore_weights(tmp_path, state_of(0.0)[1])
    assert step == 10
    np.testing.assert_array_equal(ema["blocks"]["kernel"], 10.5)


def test_raw_weights_can_be_asked_for(tmp_path):
    save_all(tmp_path, [10]).close()
    _, raw = checkpoint.restore_weights(tmp_path, state_of(0.0)[1], raw=True)
    np.testing.assert_array_equal(raw["blocks"]["kernel"], 10.0)
    with pytest.raises(InputError, match="step 7 wanted, found steps 10"):
        checkpoint.restore_weights(tmp_path, state_of(0.0)[1], step=7)


def test_another_depth_is_refused_with_both_shapes(tmp_path):
    saver = save_all(tmp_path, [10])
    with pytest.raises(InputError, match=r"blocks\.kernel has shape \[3, 4\].*asks for \[5, 4\]"):
        saver.restore(*state_of(0.0, layers=5))
    saver.close()
    with pytest.raises(InputError, match=r"blocks\.kernel has shape \[3, 4\].*asks for \[5, 4\]"):
        checkpoint.restore_weights(tmp_path, state_of(0.0, layers=5)[1])


@pytest.mark.parametrize("damage", ["truncated", "item missing", "unfinished"])
def test_the_newest_complete_step_is_taken_and_named(tmp_path, caplog, damage):
    saver = save_all(tmp_path, [10, 20])
    newest = tmp_path / "checkpoints" / "20"
    if damage == "truncated":
        for file in (newest / "state").rglob("*"):
            if file.is_file() and "manifest" not in file.name and not file.name.startswith("_"):
                file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif damage == "item missing":
        shutil.rmtree(newest / "data")
    else:
        newest.rename(newest.with_name("20.orbax-checkpoint-tmp"))
    with caplog.at_level(logging.WARNING):
        assert saver.restore(*state_of(0.0))[0] == 10
    if damage == "truncated":
        assert "Step 20 cannot be read" in caplog.text
    saver.save(20, *state_of(20.0), {"micro_batch": 20})  # the run goes on and saves the step again
    saver.wait()
    assert saver.restore(*state_of(0.0))[0] == 20
    saver.close()


def test_snapshots_outlive_the_resumable_steps(tmp_path):
    steps = list(range(5, 155, 5))
    saver = save_all(tmp_path, steps, every=10, keep=2)
    saver.close()
    assert checkpoint.saved_steps(tmp_path, "state") == [145, 150]
    assert checkpoint.saved_steps(tmp_path, "ema") == [60, 70, 80, 90, 100, 110, 120, 130, 140, 145, 150]
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert all(name.isdigit() for name in names)


def test_a_save_that_fails_at_once_is_told_and_the_third_in_a_row_is_an_error(tmp_path, caplog):
    saver = checkpoint.Checkpoints(tmp_path, every=10, keep=2)
    (tmp_path / "checkpoints").write_text("in the way")
    for _ in range(checkpoint.FAILURES - 1):
        saver.save(10, *state_of(1.0), {})
        assert "The last complete one is none" in caplog.messages[-1]
    with pytest.raises(checkpoint.SaveFailed, match="The last complete one is none"):
        saver.save(10, *state_of(1.0), {})
    saver.close()


def test_nothing_saved_is_said(tmp_path):
    with pytest.raises(InputError, match="no checkpoint has been saved yet"):
        checkpoint.restore_weights(tmp_path, state_of(0.0)[1])
