"""A small data set, and the tiny run on it that nothing disturbed: made once a file of tests."""

import make_data
import pytest
from tiny_run import tiny

from jaxdit import train


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
