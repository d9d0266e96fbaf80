from unittest import mock

import pytest
from jax.profiler import ProfileData

from bench import profile_step
from configs import nano

# Two streams of a GPU as its profiler records them (operations named by reference; a kernel begins before the one before it
# ends), beside a thread of the host.
CARD = """
planes {
  name: "/device:GPU:0"
  event_metadata { key: 1 value { id: 1 name: "sm90_xmma_gemm_bf16" } }
  event_metadata { key: 2 value { id: 2 name: "loop_add_fusion" } }
  event_metadata { key: 3 value { id: 3 name: "MemcpyH2D" } }
  stat_metadata { key: 1 value { id: 1 name: "hlo_op" } }
  stat_metadata { key: 2 value { id: 2 name: "hlo_module" } }
  stat_metadata { key: 3 value { id: 3 name: "jit_step" } }
  lines {
    name: "Stream #16(Compute)"
    events { metadata_id: 1 offset_ps: 0 duration_ps: 3000000
             stats { metadata_id: 1 str_value: "gemm.1" } stats { metadata_id: 2 ref_value: 3 } }
    events { metadata_id: 1 offset_ps: 2900000 duration_ps: 3000000
             stats { metadata_id: 1 str_value: "gemm.1" } stats { metadata_id: 2 ref_value: 3 } }
    events { metadata_id: 2 offset_ps: 5800000 duration_ps: 2000000
             stats { metadata_id: 1 str_value: "loop_add_fusion" } stats { metadata_id: 2 ref_value: 3 } }
  }
  lines { name: "Stream #20(MemcpyH2D)" events { metadata_id: 3 offset_ps: 0 duration_ps: 1000000 } }
  lines { name: "XLA Ops" events { metadata_id: 2 offset_ps: 0 duration_ps: 9000000 } }
}
planes {
  name: "/host:CPU"
  event_metadata { key: 1 value { id: 1 name: "dispatch" } }
  lines { name: "python" events { metadata_id: 1 offset_ps: 0 duration_ps: 9000000 } }
}
"""
# A program as XLA writes it, cut down: parents of frames are written one too high.
PROGRAM = """HloModule jit_step, is_scheduled=true

FileNames
1 "/elsewhere/jaxdit/update.py"
2 "/elsewhere/.venv/lib/python3.11/site-packages/flax/nnx/nn/normalization.py"
3 "/elsewhere/jaxdit/model.py"

FunctionNames
1 "accumulate_gradients.<locals>.summed_loss"
2 "RMSNorm.__call__"
3 "Block.__call__"

FileLocations
1 {file_name_id=1 function_name_id=1 line=72 end_line=72 column=16 end_column=109}
2 {file_name_id=3 function_name_id=3 line=178 end_line=178 column=8 end_column=9}
3 {file_name_id=2 function_name_id=2 line=47 end_line=47 column=8 end_column=9}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=3}

ENTRY %main {
  %gemm.1 = (bf16[8,16]{1,0}, s8[64]{0}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul", \
metadata={op_name="jit(step)/transpose(jvp())/dot_general" stack_frame_id=2}
  ROOT %loop_add_fusion = f32[8,16]{1,0} fusion(%c), kind=kLoop, calls=%f, \
metadata={op_name="jit(step)/jvp()/add" stack_frame_id=3}
}
"""


def test_a_cards_operations_are_named_from_the_program():
    times = profile_step.times(ProfileData.from_serialized_xspace(ProfileData.text_proto_to_serialized_xspace(CARD)))
    assert times == {
        ("jit_step", "gemm.1"): (pytest.approx(6e-6), 2),
        ("jit_step", "loop_add_fusion"): (pytest.approx(2e-6), 1),
        ("", "MemcpyH2D"): (pytest.approx(1e-6), 1),
    }
    found = profile_step.costliest(times, {"jit_step": profile_step.operations(PROGRAM)}, 2)
    first, second, third = found["operations"]
    assert (first["share"], first["operation"], first["times an update"]) == (0.6667, "gemm.1", 1)
    assert first["code"] == "__cublas$lt$matmul" and first["name"] == "jit(step)/transpose(jvp())/dot_general"
    lines = "jaxdit/model.py:178 Block.__call__ < jaxdit/update.py:72 accumulate_gradients"
    assert first["lines"] == second["lines"] == lines  # the library's own lines are left out
    assert (second["gives"], third["operation"], third["program"]) == ("f32[8,16]", "MemcpyH2D", "")
    assert [(row["pass"], row["share"]) for row in found["lines"]] == [
        ("backward", 0.6667),
        ("forward", 0.2222),
        ("forward", 0.1111),
    ]
    kinds = found["milliseconds of each kind, an update"]
    assert kinds == {"products": 0.003, "the rest": 0.002}  # microseconds 3 and 1.5, rounded
    kernel = profile_step.Operation("bf16[8,16]", "__cudnn$fmhaSoftmax", "jit(step)/jvp()/dot_product_attention_fwd")
    assert profile_step.kind("custom-call.3", kernel) == "attention"


@pytest.fixture(scope="module")
def found():
    config = nano.get_config()
    config.model.update({"layers": 2, "width": 64, "heads": 2})
    with mock.patch.object(profile_step, "MOST", 200):  # all of them: which ten cost most differs from run to run
        return profile_step.profile(config, 64, 4, 16, 2)


def test_ten_operations_of_a_real_step_are_named_with_their_lines(found):
    rows = found["operations"]
    assert len(rows) > 100 and rows == sorted(rows, key=lambda row: -row["share"])
    assert 0.5 < found["share of the ten"] <= 1
    assert found["share of the ten"] == pytest.approx(sum(row["share"] for row in rows), abs=0.02)
    programs = ["jit_new_total", "jit_accumulate_gradients", "jit_apply_update"]
    for row in rows:
        assert row["program"] in programs and row["code"] and row["code"] not in profile_step.WAITING, row
        assert row["name"].startswith(f"jit({row['program'].removeprefix('jit_')})") or not row["name"], row
    unnamed = sum(row["share"] for row in rows if not row["name"])  # inserted by XLA, which has no name for them
    assert unnamed < 0.1
    assert any("Block.__call__" in row["lines"] for row in found["lines"])
