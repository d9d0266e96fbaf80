"""What training costs, by arithmetic alone: operations an image, bytes of memory, the speed that a card may reach.

The model's matrix products are counted exactly. Memory counts what JAX keeps for the backward pass (exact, both are held to
the traced program by tests) and what one layer needs while it is differentiated (fitted to XLA's compiled programs).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

TIME_FREQUENCIES = 256  # as model.TIME_FREQUENCIES
FLOAT32 = 4

# Share of a card's peak, counted in all operations that it performs (what remat computes again as well), where nothing
# was measured. GPT-2 124M on a 4090 reaches 55% (karpathy/nanoGPT#182: 29% of an A100's 312 TFLOP/s); of that, a tenth goes to
# this model's float32 norms and rotations, which wait for memory. A 4090 has not been measured.
UTILISATION = 0.5
# Measured: an H100 has twice a 4090's products for each byte that its memory brings, so that it reaches a smaller share of
# its peak (full model at 512, micro-batch 8, the scores of attention counted twice:
# bench/results/train-step-full-512-8-nvidia-h100-80gb-hbm3.json).
REACHED = {"H100": 0.32, "H200": 0.32}

# Dense tensor-core peaks in TFLOP/s by JAX's device_kind: (bfloat16 with float32 sums, TF32: JAX's float32 products run in
# it, GB of memory, the least that is sold under the name, W that it draws at most, as a module where there are both). From
# NVIDIA's white papers "Ada GPU Architecture", "Ampere GA102", "A100 Tensor Core GPU", "H100 Tensor Core GPU", "RTX Blackwell GPU
# Architecture", and its data sheets of L4, L40, L40S, RTX 6000 Ada, H100 NVL, H200 and B200 (half of those with sparsity).
PEAKS = (
    (r"(GeForce )?RTX 5090", 209.5, 104.8, 32, 575),
    (r"(GeForce )?RTX 5080", 112.6, 56.3, 16, 360),
    (r"(GeForce )?RTX 4090", 165.2, 82.6, 24, 450),
    (r"(GeForce )?RTX 4080 SUPER", 104.4, 52.2, 16, 320),
    (r"(GeForce )?RTX 4080", 97.5, 48.7, 16, 320),
    (r"(GeForce )?RTX 3090 Ti", 80.0, 40.0, 24, 450),
    (r"(GeForce )?RTX 3090", 71.0, 35.6, 24, 350),
    (r"(GeForce )?RTX 3080", 59.5, 29.8, 10, 320),
    (r"RTX A6000", 154.8, 77.4, 48, 300),
    (r"RTX 6000 Ada Generation", 364.2, 182.1, 48, 300),
    (r"L40S", 362.0, 183.0, 48, 350),
    (r"L40", 181.0, 90.5, 48, 300),
    (r"L4", 121.0, 60.0, 24, 72),
    (r"A10", 125.0, 62.5, 24, 150),
    (r"A40", 149.7, 74.8, 48, 300),
    (r"A100[- ](.*[- ])?80GB( .*)?", 312.0, 156.0, 80, 400),
    (r"A100([- ].*)?", 312.0, 156.0, 40, 400),
    (r"H100 PCIe", 756.0, 378.0, 80, 350),
    (r"H100 NVL", 835.0, 417.0, 94, 400),
    (r"H100( .*)?", 989.4, 494.7, 80, 700),
    (r"H200 NVL", 835.0, 417.0, 141, 600),
    (r"H200( .*)?", 989.4, 494.7, 141, 700),
    (r"GH200.*", 989.4, 494.7, 96, 900),
    (r"B200( .*)?", 2250.0, 1125.0, 180, 1000),
)


def peak_flops(device_kind: str, dtype: str, count: int = 1) -> float | None:
    """Operations a second at the peak of `count` devices; None where it is not known (a CPU, a laptop's card).

    Args:
      device_kind: as JAX names it, e.g. "NVIDIA GeForce RTX 4090"; the maker's names may be left out.
      dtype: of the products, "bfloat16" or "float32".
      count: number of devices.
    """
    if found := _card(device_kind):
        _, bfloat16, tf32, *_ = found
        return count * 1e12 * (bfloat16 if dtype == "bfloat16" else tf32)
    return None


def card_gb(device_kind: str) -> int | None:
    """GB of a card's memory, the least that is sold under the name; None where the card is not known."""
    found = _card(device_kind)
    return found[3] if found else None


def card_watts(device_kind: str) -> float | None:
    """What a card draws at most; None where it is not known."""
    found = _card(device_kind)
    return found[4] if found else None


def utilisation(device_kind: str) -> float:
    """The share of its peak that a card is taken to reach."""
    return next((share for card, share in REACHED.items() if card in device_kind), UTILISATION)


def _card(device_kind: str) -> tuple[str, float, float, int, int] | None:
    name = device_kind.strip().removeprefix("NVIDIA ")
    return next((row for row in PEAKS if re.fullmatch(row[0], name)), None)


def tokens(settings: Mapping[str, Any], latent_shape: Sequence[int]) -> int:
    """Image tokens of a latent [height, width, channels]."""
    return (latent_shape[0] // settings["patch"]) * (latent_shape[1] // settings["patch"])


def forward_flops(settings: Mapping[str, Any], latent_shape: Sequence[int], text_length: int) -> float:
    """Operations of the forward pass for one image: two a multiply-add of every matrix product, attention included.

    Args:
      settings: of the model, as `trained.model_settings` gives them.
      latent_shape: [height, width, channels].
      text_length: tokens that the text is padded to.
    """
    n, d, into = tokens(settings, latent_shape), settings["width"], settings["patch"] ** 2 * settings["channels"]
    outside = 2 * n * into * d + d * n * into * 2  # patches in and out
    outside += 2 * d * (TIME_FREQUENCIES + d) + 2 * d * (settings["vision_width"] + d)  # time, vision
    outside += 2 * text_length * settings["text_width"] * d + 2 * d * 2 * d  # text, last modulation
    return float(outside + block_flops(settings, latent_shape, text_length))


def block_flops(settings: Mapping[str, Any], latent_shape: Sequence[int], text_length: int) -> float:
    """The part of `forward_flops` within the blocks."""
    return dense_flops(settings, latent_shape, text_length) + 2 * score_flops(settings, latent_shape, text_length)


def dense_flops(settings: Mapping[str, Any], latent_shape: Sequence[int], text_length: int) -> float:
    """The part of `block_flops` in dense layers, which remat="block" computes twice."""
    n, d = tokens(settings, latent_shape), settings["width"]
    modulation, own, cross, text, mlp = 6, 4 * n, 2 * n, 2 * text_length, 8 * n
    return float(settings["layers"] * 2 * d * d * (modulation + own + cross + text + mlp))


def score_flops(settings: Mapping[str, Any], latent_shape: Sequence[int], text_length: int) -> float:
    """Operations of all blocks' attention scores, as many as of the sums over values; every backward pass repeats them."""
    n, d = tokens(settings, latent_shape), settings["width"]
    return float(settings["layers"] * 2 * n * d * (n + text_length))


def training_flops(settings: Mapping[str, Any], latent_shape: Sequence[int], text_length: int) -> float:
    """Operations of forward and backward pass for one image, three forward passes: what the MFU counts."""
    return 3 * forward_flops(settings, latent_shape, text_length)


def hardware_flops(settings: Mapping[str, Any], latent_shape: Sequence[int], text_length: int, *, remat: str) -> float:
    """`training_flops` and what is computed again: scores by every kernel of attention, dense layers by remat."""
    again = score_flops(settings, latent_shape, text_length)
    if remat == "block":
        again += dense_flops(settings, latent_shape, text_length)
    return training_flops(settings, latent_shape, text_length) + again


def update_flops(settings: Mapping[str, Any], optimizer: str) -> float:
    """Operations of an update's products, which Muon alone has, counted twice: they are float32, at half of bfloat16's speed.

    Five turns of x <- a x + (b x x^T + c (x x^T)^2) x for each kernel of each block: for one of [m, n], the smaller first, a
    turn is 4 m^2 n + 2 m^3.
    """
    if optimizer != "muon":
        return 0.0
    longer = (1, 2, 1, 1, 2, 1, 4, 4, 6)  # n / m: query, key and value, out, twice; the MLP's; modulation
    return 2.0 * 5 * settings["layers"] * settings["width"] ** 3 * sum(4 * n + 2 for n in longer)


def images_per_second(hardware: float, peak: float, utilisation: float = UTILISATION) -> float:
    """Speed of training by estimate; hardware from `hardware_flops`, peak from `peak_flops`."""
    return peak * utilisation / hardware


# How much lives beside what is kept, fitted to compiled.memory_analysis() of the trainer's own step on XLA's CPU backend in
# float32: 11 shapes of 2-24 layers, width 64-512, 64-1,024 tokens, micro-batches of 1-8, with and without remat, all within 8%,
# and 8 more with remat off within 10% (tests/jaxdit/test_estimate.py and test_counters.py hold ten). bfloat16 is scaled by its
# size, as XLA's CPU backend computes in float32 there; XLA's programs for a 4090 need 4% less than the whole, with remat 12%
# (bench/traffic.py).
LAYER_WEIGHTS = 2  # of one layer's weights: those at hand, and their gradients before they are added


def memory(
    settings: Mapping[str, Any],
    parameters: int,
    micro_batch: int,
    latent_shape: Sequence[int],
    text_length: int,
    *,
    remat: str,
    optimizer: str = "adamw",
) -> dict[str, int]:
    """Bytes on one device when it needs most; the sum of the parts is the whole.

    Two programs alternate: gradients of a micro-batch, which are added to their sum as they come, and the update, which needs
    a copy of the parameters for its changes where the first has its activations. Muon keeps one moment of the blocks' kernels
    where AdamW keeps two, and its update needs three copies of them.

    Args:
      settings: of the model.
      parameters: how many of the model's the device holds.
      micro_batch: images of a micro-batch on this device.
      latent_shape: [height, width, channels].
      text_length: tokens that the text is padded to.
      remat: "none", "block" or "off".
      optimizer: "adamw" or "muon".
    """
    copy = FLOAT32 * parameters
    kernels = FLOAT32 * settings["layers"] * KERNELS * settings["width"] ** 2  # whole: Muon gathers them
    moments, changes = (2 * copy - min(copy, kernels), 3 * kernels) if optimizer == "muon" else (2 * copy, copy)
    activations = activation_bytes(settings, micro_batch, latent_shape, text_length, remat=remat)
    if settings["scan_unroll"] == settings["layers"] > 1 and remat != "off":
        activations += copy if settings["dtype"] == "float32" else copy // 2  # kernels as they are multiplied
    image = FLOAT32 * math.prod(latent_shape) + FLOAT32 * settings["vision_width"] + FLOAT32
    return {
        "parameters": copy,
        "moments": moments,
        "ema": copy,
        "gradients": copy + max(0, changes - activations),
        "activations": activations,
        "batch": 2 * micro_batch * (image + 2 * text_length * settings["text_width"]),  # and the next one, on its way
    }


def largest_micro_batch(
    settings: Mapping[str, Any],
    parameters: int,
    budget: float,
    latent_shape: Sequence[int],
    text_length: int,
    *,
    remat: str,
    optimizer: str = "adamw",
) -> int:
    """The most images at a time whose `memory` is at most `budget` bytes; 0 where not even one fits."""

    def fits(micro_batch):
        parts = memory(settings, parameters, micro_batch, latent_shape, text_length, remat=remat, optimizer=optimizer)
        return sum(parts.values()) <= budget

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def in_words(settings: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    """How a step of the model runs, for people; options are the configuration's "model"."""
    fused = ", fused" if settings["fused"] else ""
    if options.get("fused", False) and not fused:
        fused = ", not fused (model.fused wants a GPU, model.scan_unroll=0 and fsdp=1)"
    return f"attention {settings['attention']}, remat {settings['remat']}{fused}"


def choices(settings: Mapping[str, Any]) -> tuple[str, str]:
    """What remat can be on the device of these settings, the one that keeps more first."""
    return ("off" if settings["remat"] == "off" else "none"), "block"


def activation_bytes(
    settings: Mapping[str, Any], micro_batch: int, latent_shape: Sequence[int], text_length: int, *, remat: str
) -> int:
    """Bytes of a micro-batch's forward and backward pass beside parameters and their gradients."""
    at_work = micro_batch * _in_layer(settings, latent_shape, text_length)
    weights = FLOAT32 * KERNELS * settings["width"] ** 2
    outside = micro_batch * _outside(settings, latent_shape, text_length)
    if remat == "off":
        return round(settings["layers"] * (at_work + weights) + outside)
    kept = kept_in_layer(settings, micro_batch, latent_shape, text_length, remat=remat)
    return round((settings["layers"] - 1) * kept + at_work + LAYER_WEIGHTS * weights + outside)


KERNELS = 22  # d^2 a layer: modulation 6, self-attention 4, cross-attention 4, MLP 8


def kept_in_layer(
    settings: Mapping[str, Any], micro_batch: int, latent_shape: Sequence[int], text_length: int, *, remat: str
) -> int:
    """Bytes that one layer keeps for the backward pass, exactly as JAX differentiates `model.Block`.

    The layer's input and both attentions' outputs, with what softmax and norms know of each row; without remat the dense
    layers' results and what cuDNN's self-attention is given.
    """
    b, n, l = micro_batch, tokens(settings, latent_shape), text_length
    d, k = settings["width"], settings["heads"]
    item = FLOAT32 if settings["dtype"] == "float32" else 2
    # 4 of self, 2 of cross, 5 of the MLP; text; modulation.
    dense = 0 if remat == "block" else 11 * n * d + 2 * l * d + 6 * d
    if remat == "none" and settings["attention"] == "cudnn":
        dense += 3 * n * d
    # Sums of softmax; means and deviations; root mean squares of queries and keys.
    rows = 2 * n * k + 4 * n + (3 * n + l) * k
    if settings.get("fused"):
        # The sums that norms are given, which need what was added last no more; two numbers for each norm.
        dense += n * d if remat == "none" else 0
        rows = 2 * n * k + 6 * n
    return b * (item * (3 * n * d + dense) + FLOAT32 * rows)


def _in_layer(settings, latent_shape, text_length) -> int:
    """Bytes an image of all that one layer computes, alive while it is differentiated: norms and rotations are float32."""
    n, l, d, k = tokens(settings, latent_shape), text_length, settings["width"], settings["heads"]
    item = FLOAT32 if settings["dtype"] == "float32" else 2
    wide = (8 * FLOAT32 + (11 + 24) * item) * n * d + (3 * FLOAT32 + 2 * item) * l * d  # 24: the MLP, 4 d wide
    return wide + FLOAT32 * (6 * n + (8 * n + 2 * l) * k)  # thin: one over the root mean square, of tokens and of heads


def _outside(settings, latent_shape, text_length) -> int:
    """Bytes an image outside the blocks: noise, x_t, target, prediction; the text's projection; first and last layer."""
    n, d = tokens(settings, latent_shape), settings["width"]
    text = text_length * FLOAT32 * (settings["text_width"] + 3 * d)
    return 5 * FLOAT32 * math.prod(latent_shape) + text + 4 * FLOAT32 * n * d
