"""Which samples come next: an order that is a function of (seed, micro-batch) alone.

Each bucket is an endless chain of permutations seeded by (seed, bucket, epoch), cut into micro-batches across the ends of
epochs; buckets are drawn in proportion to their size by (seed, micro-batch). So the whole position is how many samples
have been taken from each bucket: resume is O(1), nothing is dropped, and no bucket is too small.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import grain
import numpy as np

from encode import records

VERSION = 2  # of the order; kept with each checkpoint
FEW = 2**16  # numbers whose order is an array, made within 10 ms


def generator(*parts: int | str) -> np.random.Generator:
    """A random generator that is a function of its arguments, on every machine and in every process."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def permutation(count: int, rng: np.random.Generator) -> np.ndarray | grain.MapDataset:
    """0 .. count - 1 in a random order.

    That of many is by arithmetic (Grain's index shuffle): no array of it, no pass over the data when an epoch begins. With few
    its arithmetic tries long for each number below the count: 20 ms of ten numbers, 1 ms of a hundred.
    """
    if count <= FEW:
        return rng.random(count).argsort(kind="stable")
    return grain.MapDataset.range(count).shuffle(seed=int(rng.integers(2**32)))


class Plan(grain.IterDataset):
    """Endless requests (bucket, rows, flips).

    Args:
      train: row numbers by bucket; what is empty is left out.
      seed, micro_batch, flip: train.seed, train.micro_batch and flow.flip.
    """

    def __init__(self, train: Mapping[str, np.ndarray], *, seed: int, micro_batch: int, flip: float):
        super().__init__()
        self.train = {name: rows for name, rows in sorted(train.items()) if len(rows)}
        self.seed, self.micro_batch, self.flip = seed, micro_batch, flip

    def __iter__(self) -> PlanIterator:
        return PlanIterator(self)


class PlanIterator(grain.DatasetIterator):
    """State: the number of the next micro-batch and the samples taken from each bucket."""

    def __init__(self, plan: Plan):
        super().__init__()
        self._plan = plan
        self._micro_batch = 0
        self._taken = dict.fromkeys(plan.train, 0)
        self._permutations: dict[str, tuple[int, np.ndarray | grain.MapDataset]] = {}

    def __next__(self) -> dict[str, Any]:
        plan = self._plan
        names = list(plan.train)
        sizes = np.array([len(plan.train[name]) for name in names])
        rng = generator(plan.seed, "bucket", self._micro_batch)
        name = names[int(np.searchsorted(np.cumsum(sizes), rng.integers(sizes.sum()), side="right"))]
        rows = np.array([self._row(name, self._taken[name] + i) for i in range(plan.micro_batch)])
        flips = generator(plan.seed, "flip", self._micro_batch).random(plan.micro_batch) < plan.flip
        self._taken[name] += plan.micro_batch
        self._micro_batch += 1
        return {"bucket": name, "rows": rows, "flips": flips}

    def _row(self, name: str, position: int) -> int:
        rows = self._plan.train[name]
        epoch, place = divmod(position, len(rows))
        if self._permutations.get(name, (-1,))[0] != epoch:
            self._permutations[name] = epoch, permutation(len(rows), generator(self._plan.seed, name, epoch))
        return int(rows[self._permutations[name][1][place]])

    def get_state(self) -> dict[str, Any]:
        return {"micro_batch": self._micro_batch, "taken": dict(self._taken)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on behind a state; nothing has been taken yet of a bucket that was not there, or held no image to train on."""
        if not set(state["taken"]) <= set(self._taken):
            raise records.DatasetError(
                f"the checkpoint was reading the buckets {sorted(state['taken'])}, the data set has "
                f"{sorted(self._taken)}; resume with the data set that the run began with."
            )
        self._micro_batch = int(state["micro_batch"])
        self._taken = {name: int(state["taken"].get(name, 0)) for name in self._taken}
