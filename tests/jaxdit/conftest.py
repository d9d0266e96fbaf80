"""A small data set, and the tiny run on it that nothing disturbed: made once a file of tests. Programs traced once a process."""

import functools
import json

import jax
import jax.numpy as jnp
import make_data
import numpy as np
import pytest
from tiny_run import tiny

from jaxdit import data, mesh, model, optim, train, update


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "64"
    make_data.dataset(root, {"64x64": 9, "48x80": 6})
    return root


@pytest.fixture(scope="module")
def undisturbed(path, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    assert train.train(tiny(path), workdir) == "done"
    return workdir


@pytest.fixture(scope="session", autouse=True)
def damage_is_soon_believed():
    """A record that cannot be read is asked for once more, without waiting."""
    before, data.AGAIN = data.AGAIN, (0.0,)
    yield
    data.AGAIN = before


@pytest.fixture(scope="session", autouse=True)
def traced_once():
    """A training of the same model, flow and optimizer as one before in this process takes its compiled functions, its
    definition and its first state: a third of its time.

    Tests that count compilations use `mesh.compiled.__wrapped__` and `update.new_state.__wrapped__`.
    """
    compiled, of_config, learning_rate = mesh.compiled, optim.of_config, optim.learning_rate
    abstract, new_state, known = model.abstract, update.new_state, {}

    def key(function):
        values = (json.dumps(value, default=list) if isinstance(value, dict) else value for value in function.args)
        return function.func, *values

    @functools.wraps(compiled)
    def share(devices, state, **functions):
        zeros, *found = compiled(devices, state, **functions)
        if devices.size == 1:
            names = ("accumulate", "change", "judge")
            found = [known.setdefault(key(functions[name]), one) for name, one in zip(names, found, strict=True)]
        return zeros, *found

    def same_optimizer(section, schedule):
        return known.setdefault(("optimizer", section.to_json(), schedule), of_config(section, schedule))

    def same_model(settings):
        name = ("model", json.dumps(dict(settings)))
        if name not in known:
            known[name] = abstract(settings)
        graph, shapes = known[name]
        return graph, jax.tree.map(lambda leaf: leaf, shapes)  # dicts of its own

    @functools.wraps(new_state)
    def same_state(settings, optimizer, seed):
        name = ("state", json.dumps(dict(settings)), optimizer, seed)
        fresh = functools.partial(new_state, settings, optimizer, seed)
        if name not in known:
            if sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(fresh))) > 1_000_000:
                return fresh()  # too large to be kept; often one whose shapes alone are wanted
            with jax.ensure_compile_time_eval():
                known[name] = jax.tree.map(np.asarray, jax.jit(fresh)())
        return jax.tree.map(jnp.asarray, known[name])

    mesh.compiled, optim.of_config, optim.learning_rate = share, same_optimizer, functools.cache(learning_rate)
    model.abstract, update.new_state = same_model, same_state
    yield
    mesh.compiled, optim.of_config, optim.learning_rate = compiled, of_config, learning_rate
    model.abstract, update.new_state = abstract, new_state
