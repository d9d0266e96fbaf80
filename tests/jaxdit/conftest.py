"""A small data set, and the tiny run on it that nothing disturbed: made once a file of tests. Programs traced once a process."""

import functools
import json

import make_data
import pytest
from tiny_run import tiny

from jaxdit import mesh, train


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
def traced_once():
    """A training of the same model and flow as one before in this process takes its compiled functions: half of its time.

    Tests that count compilations use `mesh.compiled.__wrapped__`.
    """
    compiled, known = mesh.compiled, {}

    def key(function):
        graph, *values = function.args
        return function.func, graph, json.dumps(values, sort_keys=True, default=list)

    @functools.wraps(compiled)
    def share(devices, state, **functions):
        zeros, accumulate, change, judge = compiled(devices, state, **functions)
        if devices.size == 1:
            accumulate = known.setdefault(key(functions["accumulate"]), accumulate)
            judge = known.setdefault(key(functions["judge"]), judge)
        return zeros, accumulate, change, judge

    mesh.compiled = share
    yield
    mesh.compiled = compiled
