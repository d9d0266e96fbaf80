import json
import math
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from jaxdit import estimate, model, optim, trained, update

ROOT = Path(__file__).parents[2]
FLOW = {"mean": 0.0, "std": 1.0, "shift": 1.0, "drop_both": 0.1, "drop_text": 0.1, "drop_vision": 0.1}
SETTINGS = {
    "layers": 4,
    "width": 128,
    "heads": 4,
    "patch": 2,
    "channels": 16,
    "text_width": 96,
    "vision_width": 64,
    "dtype": "float32",
    "remat": "none",
    "scan_unroll": 1,
    "attention": "xla",
}


def arguments(settings, count, latent, text):
    """The trainer's accumulate step and the shapes that it takes, nothing allocated."""
    graph, shapes = model.abstract(settings)
    shape = jax.ShapeDtypeStruct
    batch = {
        "latent": shape((count, *latent), jnp.float32),
        "text": shape((count, text, settings["text_width"]), jnp.bfloat16),
        "text_length": shape((count,), jnp.int32),
        "vision": shape((count, settings["vision_width"]), jnp.float32),
    }
    total = jax.eval_shape(partial(update.new_total, shapes, separate=trained.separate(settings)))
    step = partial(update.accumulate_gradients, graph, FLOW, 0)
    return step, (shapes, total, batch, shape((2,), jnp.int32))


def equations(jaxpr, times=1):
    """(equation, how often it runs) of a traced program and all within it."""
    for equation in jaxpr.eqns:
        yield equation, times
        inner = times * (equation.params["length"] if equation.primitive.name == "scan" else 1)
        for value in equation.params.values():
            for part in value if isinstance(value, (list, tuple)) else [value]:
                part = getattr(part, "jaxpr", part)
                if hasattr(part, "eqns"):
                    yield from equations(part, inner)


def product_flops(jaxpr):
    """Two operations a multiply-add of every matrix product."""
    found = 0
    for equation, times in equations(jaxpr):
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            sides = [equation.invars[0].aval.shape[axis] for axis in contracted]
            found += 2 * times * math.prod(equation.outvars[0].aval.shape) * math.prod(sides)
    return found


@pytest.mark.parametrize("latent, text", [((16, 24, 16), 40), ((10, 6, 16), 7)])
def test_forward_operations_are_those_of_the_traced_model(latent, text):
    from flax import nnx

    graph, shapes = model.abstract(SETTINGS)
    _, (_, _, batch, _) = arguments(SETTINGS, 1, latent, text)
    flags = jax.ShapeDtypeStruct((1,), bool)
    forward = jax.make_jaxpr(lambda params, x, t, *rest: nnx.merge(graph, params)(x, t, *rest))(
        shapes, batch["latent"], jax.ShapeDtypeStruct((1,), jnp.float32), batch, flags, flags
    )
    assert estimate.forward_flops(SETTINGS, latent, text) == product_flops(forward.jaxpr)


@pytest.mark.parametrize("remat", ["none", "block"])
def test_training_operations_are_those_of_the_traced_update(remat):
    settings = SETTINGS | {"remat": remat}
    step, shapes = arguments(settings, 3, (16, 24, 16), 40)
    counted = product_flops(jax.make_jaxpr(step)(*shapes).jaxpr)
    by_hand = 3 * estimate.hardware_flops(settings, (16, 24, 16), 40, remat=remat)
    assert counted == pytest.approx(by_hand, rel=0.01)  # the first layer's gradient to its input is not needed
    assert by_hand > 3 * estimate.training_flops(settings, (16, 24, 16), 40)


def test_operations_agree_with_those_of_the_compiled_program():
    settings = SETTINGS | {"layers": 2, "width": 256, "scan_unroll": 2}  # without a loop, whose body XLA counts once
    step, shapes = arguments(settings, 2, (16, 24, 16), 64)
    compiled = jax.jit(step, donate_argnums=1).lower(*shapes).compile()
    by_hand = 2 * estimate.training_flops(settings, (16, 24, 16), 64)
    assert compiled.cost_analysis()["flops"] == pytest.approx(by_hand, rel=0.1)


KINDS = [
    ("float32", "none", "xla"),
    ("bfloat16", "none", "xla"),
    ("bfloat16", "none", "cudnn"),
    ("bfloat16", "block", "cudnn"),
    ("float32", "block", "xla"),
]


@pytest.mark.parametrize("dtype, remat, attention", KINDS)
def test_what_a_layer_keeps_is_exact(monkeypatch, dtype, remat, attention):
    # Tracing cuDNN's attention asks for the library and the card; compiling would need them.
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda capability: False)
    settings = SETTINGS | {"dtype": dtype, "remat": remat, "attention": attention, "layers": 3, "width": 192}
    step, shapes = arguments(settings, 5, (22, 28, 16), 12)
    traced = jax.make_jaxpr(step)(*shapes).jaxpr
    scan = next(e for e, _ in equations(traced) if e.primitive.name == "scan" and e.params["length"] == 3)
    kept = [out.aval for out in scan.outvars[scan.params["num_carry"] :]]
    by_hand = 3 * estimate.kept_in_layer(settings, 5, (22, 28, 16), 12, remat=remat)
    assert sum(math.prod(aval.shape) * aval.dtype.itemsize for aval in kept) == by_hand


@pytest.mark.parametrize(
    "remat, layers, width, count, latent, text",
    [
        ("none", 4, 128, 2, (16, 24, 16), 40),
        ("block", 4, 256, 4, (32, 32, 16), 64),
        ("off", 2, 384, 4, (32, 32, 16), 64),
        ("off", 8, 256, 2, (48, 32, 16), 64),
    ],
)
def test_memory_is_near_that_of_the_compiled_program(remat, layers, width, count, latent, text):
    settings = SETTINGS | {"remat": remat, "layers": layers, "width": width}
    settings["scan_unroll"] = layers if remat == "off" else 1
    step, shapes = arguments(settings, count, latent, text)
    compiled = jax.jit(step, donate_argnums=1).lower(*shapes).compile().memory_analysis()
    by_hand = estimate.activation_bytes(settings, count, latent, text, remat=remat)
    assert compiled.temp_size_in_bytes == pytest.approx(by_hand, rel=0.15)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_memory_and_operations_of_the_update_are_near_those_of_the_compiled_program(name):
    schedule = optim.learning_rate(peak=1e-3, end=1e-5, warmup=1, total=100)
    optimizer = optim.make_optimizer(schedule, name=name, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.03, clip_norm=1.0)
    state = jax.eval_shape(partial(update.new_state, SETTINGS, optimizer, 0))
    total = jax.eval_shape(partial(update.new_total, state["params"]))
    change = jax.jit(partial(update.apply_update, optimizer, schedule, 0.999, 8), donate_argnums=0)
    compiled = change.lower(state, total).compile()
    sizes = compiled.memory_analysis()
    parameters = model.count_parameters(state["params"])
    parts = estimate.memory(
        SETTINGS, parameters, 1, (2, 2, 16), 1, remat="block", optimizer=name
    )  # hardly an activation
    without_batch = sum(parts.values()) - parts["batch"]
    assert sizes.argument_size_in_bytes + sizes.temp_size_in_bytes == pytest.approx(without_batch, rel=0.1)
    products = product_flops(jax.make_jaxpr(change)(state, total).jaxpr)
    assert estimate.update_flops(SETTINGS, name) == pytest.approx(2 * products, rel=1e-6)  # counted twice, for float32


def test_the_largest_micro_batch_fits_and_one_more_does_not():
    full = SETTINGS | {"layers": 24, "width": 1024, "heads": 16, "dtype": "bfloat16", "attention": "cudnn"}
    parameters, latent = 560_000_000, (64, 64, 16)
    for remat in ("none", "block"):
        most = estimate.largest_micro_batch(full, parameters, 21.6e9, latent, 128, remat=remat)
        needs = [
            sum(estimate.memory(full, parameters, count, latent, 128, remat=remat).values())
            for count in (most, most + 1)
        ]
        assert most > 0 and needs[0] <= 21.6e9 < needs[1]
    assert estimate.largest_micro_batch(full, parameters, 5e9, latent, 128, remat="block") == 0


@pytest.mark.parametrize(
    "kind, teraflops",
    [
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 3090 Ti", 80.0),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-40GB", 312.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L4", 121.0),
        ("cpu", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
    ],
)
def test_peaks_are_known_by_the_whole_name(kind, teraflops):
    assert estimate.peak_flops(kind, "bfloat16") == (teraflops and teraflops * 1e12)
    if teraflops:
        assert estimate.peak_flops(kind, "bfloat16", 4) == 4 * estimate.peak_flops(kind, "bfloat16")
        assert estimate.peak_flops(kind, "float32") < estimate.peak_flops(kind, "bfloat16")


@pytest.mark.parametrize(
    ("kind", "gb"),
    [
        ("NVIDIA GeForce RTX 5090", 32),
        ("NVIDIA A100-SXM4-80GB", 80),
        ("NVIDIA A100-SXM4-40GB", 40),
        ("NVIDIA A100 80GB PCIe", 80),
        ("cpu", None),
    ],
)
def test_memory_is_known_by_the_name(kind, gb):
    assert estimate.card_gb(kind) == gb


def test_what_was_measured_on_a_card_is_taken_in_place_of_the_assumed_share():
    measured = json.loads((ROOT / "bench/results/train-step-full-512-8-nvidia-h100-80gb-hbm3.json").read_text())
    (case,) = measured["cases"]
    mfu = case["sides"]["jaxdit none unroll 0"]["mfu"]
    settings = SETTINGS | {"layers": 24, "width": 1024, "heads": 16, "remat": "none"}
    again = estimate.hardware_flops(settings, (64, 64, 16), 128, remat="none")
    again /= estimate.training_flops(settings, (64, 64, 16), 128)
    assert estimate.utilisation(measured["device"]) == pytest.approx(mfu * again, abs=0.01)
    assert estimate.utilisation("NVIDIA GeForce RTX 4090") == estimate.UTILISATION


def test_speed_is_the_assumed_share_of_the_peak():
    assert estimate.images_per_second(10e12, 165e12) == pytest.approx(165 / 10 * estimate.UTILISATION)


def test_an_h200_reaches_what_an_h100_does():
    assert estimate.utilisation("NVIDIA H200") == estimate.utilisation("NVIDIA H100 80GB HBM3") < estimate.UTILISATION


def test_tokens_of_a_bucket_that_is_no_square():
    assert estimate.tokens({"patch": 2}, (26, 38, 16)) == 13 * 19


def test_the_batch_is_there_twice_and_its_text_in_bfloat16():
    parts = estimate.memory(SETTINGS, 10**6, 3, (8, 6, 16), 32, remat="block")
    image = 4 * 8 * 6 * 16 + 4 * SETTINGS["vision_width"] + 4  # latent, vision, t
    assert parts["batch"] == 2 * 3 * (image + 2 * 32 * SETTINGS["text_width"])


def test_muons_three_copies_share_the_room_of_the_activations_and_its_moments_are_never_fewer_than_one():
    width, kernels = SETTINGS["width"], 4 * SETTINGS["layers"] * estimate.KERNELS * SETTINGS["width"] ** 2
    few = estimate.memory(SETTINGS, 1_000, 1, (2, 2, 16), 1, remat="block", optimizer="muon")  # cut over many devices
    assert few["moments"] == 4 * 1_000 and width > 1
    small, large = (
        estimate.memory(SETTINGS, kernels, count, (64, 64, 16), 1, remat="block", optimizer="muon") for count in (1, 64)
    )
    assert small["gradients"] == 4 * kernels + max(0, 3 * kernels - small["activations"])
    assert large["activations"] > 3 * kernels and large["gradients"] == 4 * kernels


def test_bfloat16_halves_the_kernels_as_they_are_multiplied_and_what_is_not_float32_of_a_layer():
    half, whole = ({**SETTINGS, "dtype": dtype, "scan_unroll": 1} for dtype in ("bfloat16", "float32"))
    for settings in (half, whole):
        apart = settings | {"scan_unroll": settings["layers"]}
        more = [estimate.memory(s, 10**6, 1, (16, 16, 16), 16, remat="block")["activations"] for s in (apart, settings)]
        assert more[0] - more[1] == (2 if settings is half else 4) * 10**6
    n, l, d = 64, 16, SETTINGS["width"]
    differing = estimate._in_layer(whole, (16, 16, 16), l) - estimate._in_layer(half, (16, 16, 16), l)
    assert differing == 2 * (35 * n * d + 2 * l * d)


def test_where_nothing_is_computed_again_the_choice_is_off_or_block():
    assert [estimate.choices({"remat": remat})[0] for remat in ("off", "none", "block")] == ["off", "none", "none"]
