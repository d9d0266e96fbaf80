"""A problem that can be learnt is learnt: two captions, two latents, and nothing but the text to tell them apart."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxdit import flow, model, optim

SETTINGS = {"layers": 2, "width": 32, "heads": 2, "patch": 2, "channels": 4, "text_width": 8, "vision_width": 6}
SETTINGS |= {"dtype": "float32", "remat": "none", "scan_unroll": 1, "attention": "xla"}
FLOW = {"mean": 0.0, "std": 1.0, "shift": 3.0, "drop_both": 0.1, "drop_text": 0.1, "drop_vision": 0.1}
BATCH, UPDATES = 32, 60


def captioned(rng, caption):
    """A batch whose latents are +1 for caption 1 and -1 for caption 0; the vision vectors say nothing."""
    words = np.random.default_rng(7).standard_normal((2, 3, SETTINGS["text_width"]))
    return {
        "latent": np.broadcast_to(2.0 * caption[:, None, None, None] - 1, (len(caption), 8, 4, 4)).astype(np.float32),
        "text": words[caption].astype(np.float32),
        "text_length": np.array([2, 3], np.int32)[caption],
        "vision": rng.standard_normal((len(caption), SETTINGS["vision_width"])).astype(np.float32),
    }


def test_a_problem_that_the_text_decides_is_learnt():
    rng = np.random.default_rng(0)
    graph, _ = model.abstract(SETTINGS)
    params = jax.jit(lambda: model.initial_parameters(SETTINGS, 0))()
    schedule = optim.learning_rate(peak=1e-2, end=1e-3, warmup=optim.warmup_updates(None, UPDATES), total=UPDATES)
    optimizer = optim.make_optimizer(schedule, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.03, clip_norm=1.0)
    state = optimizer.init(params)

    @jax.jit
    def update(params, state, batch, step):
        def loss(params):
            found = flow.losses(nnx.merge(graph, params), batch, flow.sample_keys(0, step, 0, BATCH), **FLOW)
            return found["loss"].mean()

        value, gradients = jax.value_and_grad(loss)(params)
        changes, state = optimizer.update(gradients, state, params)
        return jax.tree.map(jnp.add, params, changes), state, value

    losses = []
    for step in range(UPDATES):
        params, state, loss = update(params, state, captioned(rng, rng.integers(0, 2, BATCH)), jnp.int32(step))
        losses.append(float(loss))

    # At t = 1 the input is noise alone, so x0 is known from the text or not at all: a model without it can do no better
    # than v = noise - mean(x0), whose error is the variance of x0, 1. One with the wrong text is off by 2: an error of 4.
    caption = np.arange(BATCH) % 2
    batch = captioned(rng, caption)
    noise = rng.standard_normal(batch["latent"].shape).astype(np.float32)

    @jax.jit
    def error(text, length, drop_text):
        conditions = batch | {"text": text, "text_length": length}
        drop = jnp.full(BATCH, drop_text)
        v = nnx.merge(graph, params)(noise, jnp.ones(BATCH), conditions, drop, jnp.zeros(BATCH, bool))
        return flow.mean_square(v - flow.velocity_target(batch["latent"], noise)).mean()

    right = error(batch["text"], batch["text_length"], False)
    wrong = error(batch["text"][::-1], batch["text_length"][::-1], False)
    absent = error(batch["text"], batch["text_length"], True)
    assert losses[0] > 1.8 and np.mean(losses[-5:]) < 0.5
    assert right < 0.4  # 0.12 to 0.24 over five seeds
    assert wrong > 3
    assert absent > 0.9
