from types import SimpleNamespace

import numpy as np
import pytest

from bench import loader
from encode import records
from jaxdit import data

COUNT = 24


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("race")
    return root, loader.write(root, 64, COUNT, ["ours", loader.PLAIN])


@pytest.mark.parametrize("flip", [False, True])
def test_peers_must_make_the_batch_that_we_make(written, flip):
    torch = pytest.importorskip("torch")
    root, _ = written
    rows = np.arange(0, COUNT, 3)
    ours = data.Dataset(root / "ours").read("64x64", rows, np.full(len(rows), flip))
    stored = [
        {name: value.tobytes() if name in records.ARRAYS else value.encode() for name, value in sample.items()}
        for number, sample in enumerate(loader.samples(64, COUNT))
        if number in rows
    ]
    collate = loader.Collate(64)
    collate.rng = SimpleNamespace(random=lambda size: np.full(size, 0.0 if flip else 1.0))
    theirs = collate(stored)
    for name in ("latent", "text_length", "vision"):
        np.testing.assert_array_equal(theirs[name].numpy(), ours[name])
    np.testing.assert_array_equal(theirs["text"].view(torch.int16).numpy(), ours["text"].view(np.int16))


@pytest.mark.parametrize("name", ["ours", loader.PLAIN])
def test_a_reader_takes_every_sample_once(written, name):
    root, sizes = written
    found = loader.read("ours", 0, root / name, 64, COUNT)
    assert found["different samples"] == COUNT
    assert found["samples a second"] > 0 and found["peak memory of the process, MB"] > 50
    assert sizes[loader.PLAIN] > 1.1 * sizes["ours"]  # random numbers in bfloat16 lose a quarter
    assert 0 <= loader.drop(root / name) <= 1
