"""The held-out loss: each kind is given what its name says, each number is its own weights'."""

import jax.numpy as jnp
import numpy as np

from jaxdit import heldout


def test_each_kind_of_held_out_loss_is_given_what_its_name_says(monkeypatch):
    seen = {}

    def dit(x_t, t, batch, drop_text, drop_vision):
        seen.update(text=not drop_text.any(), vision=not drop_vision.any())
        assert drop_text.all() == drop_text.any() and drop_vision.all() == drop_vision.any()
        return x_t

    monkeypatch.setattr(heldout.nnx, "merge", lambda graph, params: dit)
    numbers = jnp.arange(16, dtype=jnp.uint32).reshape(8, 2)
    for name, drops in heldout.CONDITIONS.items():
        heldout.losses(
            None, {"mean": 0.0, "std": 1.0, "shift": 1.0}, None, {"latent": jnp.zeros((8, 2, 2, 1))}, numbers, drops
        )
        assert [kind for kind in ("text", "vision") if seen[kind]] == [k for k in name.split("_") if k != "none"]


def test_a_held_out_loss_is_the_mean_of_its_own_weights_without_the_copies_that_fill_a_batch():
    class Data:
        def fixed_batches(self, split, *_):
            yield {"x": np.array([1.0, 2.0])}, np.zeros(2), 2
            yield {"x": np.array([6.0, 6.0])}, np.zeros(2), 1

    def judge(weights, batch, numbers, drops):
        return weights * batch["x"], np.array([0.05, 0.95]) if batch["x"][0] == 1 else np.array([1.0, 1.0])

    same = {"place": lambda value: value, "everywhere": lambda value: value, "stopped": lambda: False}
    row = heldout.evaluate(judge, {"ema": 1.0, "raw": 10.0}, Data(), batch_size=2, images=3, **same)
    assert {row[f"eval/{split}/ema/{kind}"] for split in heldout.SPLITS for kind in heldout.CONDITIONS} == {3.0}
    assert row["eval/held_out/raw/text"] == 30.0
    assert (row["eval/held_out/ema/t0"], row["eval/held_out/ema/t9"]) == (1.0, 4.0)
