"""Bytes that a program's kernels move, from its text."""

import jax
import jax.numpy as jnp
import pytest

from bench import traffic
from encode.records import InputError

# A fusion that reads one layer of three and writes it in place into another stack, one with two results, a product.
TEXT = """HloModule jit_step, is_scheduled=true

%fused_computation (param_0.1: f32[3,8,16], param_1.1: f32[3,8,16]) -> f32[3,8,16] {
  %param_1.1 = f32[3,8,16]{2,1,0} parameter(1)
  %param_0.1 = f32[3,8,16]{2,1,0} parameter(0)
  %constant.1 = s32[] constant(1)
  %zero.1 = s32[] constant(0)
  %convert.1 = bf16[3,8,16]{2,1,0} convert(%param_0.1)
  %slice.1 = bf16[1,8,16]{2,1,0} slice(%convert.1), slice={[1:2], [0:8], [0:16]}
  %wide.1 = f32[1,8,16]{2,1,0} convert(%slice.1)
  ROOT %dynamic-update-slice.1 = f32[3,8,16]{2,1,0} dynamic-update-slice(%param_1.1, %wide.1, %constant.1, %zero.1, %zero.1)
}

%fused_computation.2 (param_0.2: bf16[8,16]) -> (f32[8], bf16[8,16]) {
  %param_0.2 = bf16[8,16]{1,0} parameter(0)
  %negate.2 = bf16[8,16]{1,0} negate(%param_0.2)
  %sum.2 = f32[8]{0} reduce(%param_0.2, %param_0.2), dimensions={1}, to_apply=%add
  ROOT %tuple.2 = (f32[8]{0}, bf16[8,16]{1,0}) tuple(%sum.2, %negate.2)
}

ENTRY %main.9 (weights: f32[3,8,16], sums: f32[3,8,16], x: bf16[8,16]) -> (f32[3,8,16], bf16[8,8]) {
  %weights = f32[3,8,16]{2,1,0} parameter(0)
  %sums = f32[3,8,16]{2,1,0} parameter(1)
  %x = bf16[8,16]{1,0} parameter(2)
  %in_place = f32[3,8,16]{2,1,0} fusion(%weights, %sums), kind=kLoop, calls=%fused_computation
  %two = (f32[8]{0}, bf16[8,16]{1,0}) fusion(%x), kind=kInput, calls=%fused_computation.2
  %second = bf16[8,16]{1,0} get-tuple-element(%two), index=1
  %product = bf16[8,8]{1,0} custom-call(%x, %second), custom_call_target="__cublas$gemm", backend_config={"a":{"b":[]}}
  ROOT %tuple.9 = (f32[3,8,16]{2,1,0}, bf16[8,8]{1,0}) tuple(%in_place, %product)
}
"""


def test_slices_are_read_alone_and_updates_in_place_write_what_they_change():
    assert traffic.moved(TEXT) == {
        "in_place": (4 * 8 * 16, 4 * 8 * 16),
        "two": (2 * 8 * 16, 4 * 8 + 2 * 8 * 16),
        "product": (2 * 2 * 8 * 16, 2 * 8 * 8),
    }


@pytest.mark.parametrize(
    ("function", "read", "written"), [(lambda x: jnp.sin(x) * 2, 4, 4), (lambda x: x[5] + 1, 4 / 64, 4 / 64)]
)
def test_a_program_compiled_here_is_understood(function, read, written):
    x = jax.ShapeDtypeStruct((64, 128), jnp.float32)
    moved = traffic.moved(jax.jit(function).lower(x).compile().as_text())
    assert sum(row[0] for row in moved.values()) == read * 64 * 128
    assert sum(row[1] for row in moved.values()) == written * 64 * 128


def test_without_the_plugin_it_says_what_to_install(monkeypatch):
    def missing(*_, **__):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(traffic.topologies, "get_topology_desc", missing)
    with pytest.raises(InputError, match=r"--card=4090: JAX has no CUDA plugin here.*pip install"):
        traffic.compiled("4090", None, 512, 8, 128)
