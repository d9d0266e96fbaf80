"""The held-out loss: each kind is given what its name says, each number is its own weights'."""

import jax.numpy as jnp
import make_data
import numpy as np

from jaxdit import data, flow, heldout


def test_each_kind_of_held_out_loss_is_given_what_its_name_says(monkeypatch):
    seen = {}

    def dit(x_t, t, batch, drop_text, drop_vision):
        seen.update(text=not drop_text.any(), vision=not drop_vision.any())
        assert drop_text.all() == drop_text.any() and drop_vision.all() == drop_vision.any()
        return x_t

    monkeypatch.setattr(heldout.nnx, "merge", lambda graph, params: dit)
    numbers = jnp.arange(1, 25, dtype=jnp.uint32).reshape(8, 3) * 2**27
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


def test_both_splits_are_judged_at_the_same_timesteps_spread_as_those_of_training(tmp_path):
    make_data.dataset(tmp_path / "64", {"64x64": 30, "48x80": 20})
    dataset = data.Dataset(tmp_path / "64", holdout_fraction=0.5)
    options, seen = {"mean": 0.3, "std": 0.8, "shift": 2.0}, {}
    for split in heldout.SPLITS:
        ranks, buckets = [], []
        for batch, numbers, count in dataset.fixed_batches(split, 4, 16):
            assert numbers.dtype == np.uint32 and numbers.shape == (4, 3)
            ranks += numbers[:count, 2].tolist()
            buckets += [batch["bucket"] if "bucket" in batch else batch["latent"].shape] * count
        shares = np.array(ranks) / 2**32
        np.testing.assert_allclose(np.sort(shares), (np.arange(16) + 0.5) / 16, atol=1e-6)
        first = shares[np.array([bucket == buckets[0] for bucket in buckets])]
        assert 0.2 < first.mean() < 0.8 and first.min() < 0.4 < 0.6 < first.max()  # of each bucket, early and late ones
        t = flow.quantile_timesteps(jnp.asarray(shares, jnp.float32), **options)
        seen[split] = np.sort(t)
    np.testing.assert_array_equal(seen["held_out"], seen["training"])
    drawn = flow.draw_timesteps(flow.sample_keys(0, 0, 0, 20_000), **options)
    np.testing.assert_allclose(seen["training"], np.quantile(drawn, (np.arange(16) + 0.5) / 16), atol=0.01)


def test_an_image_is_judged_at_the_timestep_of_its_rank_with_the_noise_of_its_id(monkeypatch):
    seen, options = {}, {"mean": 0.3, "std": 0.8, "shift": 2.0}

    def dit(x_t, t, *_):
        seen["noise"] = x_t / t[:, None, None, None]  # the latents are zero
        return jnp.ones_like(x_t)

    monkeypatch.setattr(heldout.nnx, "merge", lambda graph, params: dit)
    numbers = jnp.array([[1, 2, 2**30], [1, 2, 3 * 2**30], [1, 3, 2**30], [4, 2, 2**30]], jnp.uint32)
    loss, t = heldout.losses(None, options, None, {"latent": jnp.zeros((4, 4, 4, 2))}, numbers, jnp.zeros(3))
    noise = np.asarray(seen["noise"])
    np.testing.assert_allclose(t, flow.quantile_timesteps(jnp.array([0.25, 0.75, 0.25, 0.25]), **options), rtol=1e-6)
    np.testing.assert_allclose(noise[0], noise[1], rtol=1e-4, atol=1e-5)  # of one image, whatever its rank
    assert all(np.abs(noise[0] - noise[k]).max() > 0.1 for k in (2, 3))
    np.testing.assert_allclose(loss, np.square(1 - noise).mean((1, 2, 3)), rtol=1e-4)


def test_the_tenths_of_t_are_those_of_held_out_images_by_the_average_with_both_conditions():
    class Data:
        def fixed_batches(self, split, *_):
            yield {"x": np.array([1.0, 4.0]) + 50 * (split == "training")}, np.zeros(2), 2

    def judge(weights, batch, numbers, drops):
        return weights * batch["x"] + 7 * drops.sum(), np.array([0.05, 0.95])

    same = {"place": lambda value: value, "everywhere": lambda value: value, "stopped": lambda: False}
    row = heldout.evaluate(judge, {"ema": 1.0, "raw": 10.0}, Data(), batch_size=2, images=2, **same)
    assert (row["eval/held_out/ema/t0"], row["eval/held_out/ema/t9"]) == (1.0, 4.0)
    assert (row["eval/training/ema/text_vision"], row["eval/held_out/ema/none"]) == (52.5, 9.5)
