"""What bench/scale_model.py reads from compiled programs, and the arithmetic on it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import scale_model

ROOT = Path(__file__).parents[2]
PROGRAM = """
import json
import jax, jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from bench import scale_model
mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
def layers(weights, x):  # [5, 16, 64] cut over fsdp: five gathers of [16, 64], five scatters of their gradients
    def layer(x, weight):
        return jnp.tanh(x @ jax.lax.all_gather(weight, "fsdp", axis=1, tiled=True)), None
    return jax.lax.scan(layer, x, weights)[0].sum()
def step(weights, x):
    gradients = jax.grad(lambda w: layers(w, x))(weights)
    return jax.lax.psum(gradients, "data")
cut = P(None, None, "fsdp")
run = jax.shard_map(step, mesh=mesh, in_specs=(cut, P(("data", "fsdp"))), out_specs=cut, check_vma=False)
text = jax.jit(run).lower(jnp.ones((5, 64, 64)), jnp.ones((8, 64))).compile().as_text()
print(json.dumps(scale_model._summed(scale_model.collectives(text))))
"""


def test_collectives_of_a_real_program_are_counted_with_their_loops():
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {row["kind"]: row for row in json.loads(done.stdout)}
    layer = 64 * 64 * 4 / 1e9
    assert found["all-gather"]["cards"] == 4 and found["all-gather"]["times"] in (5, 10)  # forward, and again backward
    assert found["all-gather"]["GB"] == pytest.approx(found["all-gather"]["times"] * layer, abs=1e-4)
    assert (found["reduce-scatter"]["cards"], found["reduce-scatter"]["times"]) == (4, 5)
    assert found["reduce-scatter"]["GB"] == pytest.approx(5 * layer, abs=1e-4)
    assert found["all-reduce"]["cards"] == 2


@pytest.mark.parametrize(
    "groups, cards",
    [
        ("{{0,1,2,3},{4,5,6,7}}, use_global_device_ids=true", 4),
        ("[2,8]<=[16]", 8),
        ("mesh['axis_0'=8,'axis_1'=4] {'axis_0'}, use_global", 8),
        ("mesh['axis_0'=8,'axis_1'=4], device_ids=([4,8]T(1,0)) {'axis_0','axis_1'}, use", 32),
    ],
)
def test_groups_are_read_in_all_of_their_forms(groups, cards):
    assert scale_model._group_size(groups) == cards


def test_a_ring_of_eight_sends_seven_eighths_and_an_all_reduce_twice_that():
    cluster = {"a machine": 8, "within": 100e9, "between": 10e9}
    gather = {"kind": "all-gather", "cards": 8, "times": 1, "GB": 8.0}
    assert scale_model.seconds([gather], cluster, 64, 8) == pytest.approx(0.07 + scale_model.LATENCY)
    apart = {"kind": "all-reduce", "cards": 8, "times": 1, "GB": 8.0}  # a card in each of eight machines
    assert scale_model.seconds([apart], cluster, 64, 1) == pytest.approx(1.4 + scale_model.LATENCY)
    every = {
        "kind": "all-reduce",
        "cards": 64,
        "times": 1,
        "GB": 8.0,
    }  # within machines, and an eighth of it between them
    assert scale_model.seconds([every], cluster, 64, 1) == pytest.approx(0.14 + 0.175 + scale_model.LATENCY)
    assert scale_model.seconds([every | {"cards": 8}], cluster, 8, 1) == pytest.approx(0.14 + scale_model.LATENCY)


def test_more_communication_never_makes_a_step_faster():
    rows = [{"kind": "all-gather", "cards": 8, "times": 10, "GB": gigabytes} for gigabytes in (0.1, 10.0)]
    rates = []
    for row in rows:
        found = {"devices": 8, "fsdp": 8, "micro-batch a card": 4}
        found |= {"micro-batch": {"collectives": [row]}, "update": {"collectives": []}}
        rates.append(scale_model.predict(found, scale_model.CLUSTERS["H100"], 256, "512"))
    assert rates[0]["images a second, one after the other"] > rates[1]["images a second, one after the other"]
    assert all(row["of perfect scaling"] <= 1 for row in rates)


def test_what_a_data_set_asks_for_grows_with_it_and_resuming_does_not():
    rows = scale_model.data_rows()
    assert [row["images"] for row in rows] == list(scale_model.RECORDS)
    assert rows[-1]["GB of index in memory"] > 100 * rows[0]["GB of index in memory"]
    assert len({row["seconds to the first batch after a resume"] for row in rows}) == 1
