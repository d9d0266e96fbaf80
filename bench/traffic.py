"""What a training step would move through the memory of a card that need not be there: bytes of each kernel, and memory.

    pip install "jax[cuda13]==0.10.2"                                            (no card is needed, and no driver)
    python -m bench.traffic [--config=full] [--resolution=512] [--micro_batch=8] [--text=128] [--card=h100] [--fused]

XLA compiles the trainer's sum over a micro-batch for the card by its description alone, and the program's text says what each
kernel reads and writes. On a card whose memory is slow for its products bytes are time: what moved fewer of them here was
faster there each time that both were tried (docs/measured.md). Without the card XLA cannot try which of its matrix
products is the fastest, so products are Triton's here and cuBLAS's mostly there; what they read and write is the same. Memory
agreed with an H100's to a hundredth. Writes bench/results/traffic-CONFIG-RESOLUTION[-fused]-CARD.json.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import jax
from absl import flags
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.experimental import topologies

from bench import device, profile_step, train_step
from encode import commandline
from encode.records import InputError
from jaxdit import model, trained, update

SIZES = {"pred": 1, "bf16": 2, "f16": 2} | {f"{kind}{bits}": bits // 8 for kind in "fsu" for bits in (8, 16, 32, 64)}
ARRAY = re.compile(rf"\b({'|'.join(SIZES)})\[([\d,]*)\]")
# Move no bytes.
NOTHING = ("parameter", "bitcast", "tuple", "get-tuple-element", "constant", "after-all", "opt-barrier")
SAME = ("bitcast", "convert", "copy", "reshape")  # within a kernel: a part of the result needs that part of the operand
SLICES = ("slice", "dynamic-slice")
MOST = 30
# XLA's GpuTargetConfigProto of each card: openxla/xla, xla/backends/gpu/target_config/specs; the 4090's from NVIDIA's "Ada GPU
# Architecture" and "CUDA C++ Programming Guide" (compute capability 8.9).
DESCRIPTION = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 device_vendor: "NVIDIA Corporation"
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
  {card}
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }} device_description_str: "{name}"
"""
CARDS = {
    "h100": (
        "NVIDIA H100 80GB HBM3",
        9.0,
        "cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES } core_count: 132 "
        "threads_per_core_limit: 2048 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448 "
        "memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84942979072",
    ),
    "4090": (
        "NVIDIA GeForce RTX 4090",
        8.9,
        "cuda_compute_capability { major: 8 minor: 9 } core_count: 128 "
        "threads_per_core_limit: 1536 shared_memory_per_core: 102400 shared_memory_per_block_optin: 101376 "
        "memory_bandwidth: 1008096000000 l2_cache_size: 75497472 clock_rate_ghz: 2.52 device_memory_size: 25393692672",
    ),
}


@dataclass(frozen=True)
class Instruction:
    """One of a program's: its operands' names (a parameter's number), what else stands on its line."""

    name: str
    is_root: bool
    result: str
    code: str
    operands: tuple[str, ...]
    number: str
    rest: str

    @property
    def size(self) -> int:
        """Bytes of the result."""
        return _bytes(self.result)


def _bytes(result: str) -> int:
    total = 0
    for kind, sides in ARRAY.findall(result):
        count = 1
        for side in filter(None, sides.split(",")):
            count *= int(side)
        total += count * SIZES[kind]
    return total


def _closing(text: str) -> int:
    """The place of the parenthesis that closes what `text` stands in."""
    depth = 1
    for place, letter in enumerate(text):
        depth += (letter in "({") - (letter in ")}")
        if depth == 0:
            return place
    return len(text)


def _instructions(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """({computation: {name: instruction}}, the entry's name) of the text of a compiled program."""
    found: dict[str, dict[str, Instruction]] = {}
    entry, inside = "", None
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            inside = found[head[2]] = {}
            entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            inside = None
        elif inside is not None and (parts := re.match(r"\s+(ROOT )?%?([\w.\-]+) = (.*)$", line)):
            whole = parts[3]
            end = 1 + _closing(whole[1:]) + 1 if whole.startswith("(") else whole.index(" ")
            code, _, after = whole[end:].lstrip().partition("(")
            given = after[: _closing(after)]
            operands = tuple(re.findall(r"%([\w.\-]+)", given))
            rest = after[len(given) + 1 :]
            inside[parts[2]] = Instruction(parts[2], bool(parts[1]), whole[:end], code, operands, given, rest)
    return found, entry


def moved(text: str) -> dict[str, tuple[int, int]]:
    """{kernel of the entry: (bytes read, bytes written)} of the text of a compiled program; loops are not looked into.

    A kernel that takes slices of an operand alone reads those; one that writes a part of its operand in place writes that.
    """
    computations, entry = _instructions(text)
    here = computations[entry]
    found = {}
    for kernel in here.values():
        if kernel.code in NOTHING:
            continue
        read, written = sum(here[name].size for name in kernel.operands if name in here), kernel.size
        called = re.search(r"calls=%?([\w.\-]+)", kernel.rest)
        if kernel.code == "fusion" and called:
            body = computations[called[1]]
            read = sum(_read(part, body) for part in body.values() if part.code == "parameter")
            written = _written(next(part for part in body.values() if part.is_root), body)
        elif kernel.code == "dynamic-update-slice":
            read = written = here[kernel.operands[1]].size
        found[kernel.name] = read, written
    return found


def _read(parameter: Instruction, body: Mapping[str, Instruction]) -> int:
    """Bytes of a fusion's operand that it needs."""

    def parts(name: str) -> Iterator[float]:  # shares of the parameter's elements
        for user in body.values():
            if name in user.operands:
                if user.code in SLICES:
                    yield _elements(user) / _elements(parameter)
                elif user.code == "dynamic-update-slice" and user.operands[0] == name:
                    yield 0.0
                elif user.code in SAME and not user.is_root:
                    yield from parts(user.name)
                else:
                    yield 1.0

    return round(parameter.size * min(1.0, sum(parts(parameter.name))))


def _elements(instruction: Instruction) -> int:
    kind = ARRAY.search(instruction.result)
    return max(1, instruction.size // SIZES[kind[1]]) if kind else 1


def _written(instruction: Instruction, body: Mapping[str, Instruction]) -> int:
    """Bytes that a fusion writes, from its root."""
    if instruction.code == "tuple":
        return sum(_written(body[name], body) for name in instruction.operands)
    if instruction.code == "bitcast":
        return _written(body[instruction.operands[0]], body)
    if instruction.code == "dynamic-update-slice":
        return body[instruction.operands[1]].size
    return instruction.size


def compiled(card: str, config: Any, resolution: int, micro_batch: int, text: int) -> Any:
    """(XLA's program of `update.accumulate_gradients` for a card that need not be there, parameters of the model)."""
    name, capability, about = CARDS[card]
    description = DESCRIPTION.format(card=f'name: "{name}" {about}', name=name)
    try:
        there = topologies.get_topology_desc(
            platform="cuda", topology_name="1x1x1", topology="1x1x1", target_config=description
        )
    except NotImplementedError as error:
        raise InputError(
            f"--card={card}: JAX has no CUDA plugin here, by which XLA compiles for it; pip install "
            f'"jax[cuda13]=={jax.__version__}" brings it, and neither card nor driver is needed.'
        ) from error
    place = jax.sharding.SingleDeviceSharding(there.devices[0])

    def shapes(tree):
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree)

    # What asks for the card at hand is told of the other one.
    with (
        mock.patch.object(jax, "default_backend", lambda: "gpu"),
        mock.patch.object(cudnn, "check_cudnn_version", lambda: 91000),
        mock.patch.object(cudnn, "check_compute_capability", lambda wanted: float(wanted) <= capability),
        mock.patch.object(cudnn, "is_cuda_compute_capability_equal", lambda wanted: False),
        mock.patch("jaxdit.mesh.compute_dtype", lambda wanted: "bfloat16"),
        mock.patch("jaxdit.mesh.attention_implementation", lambda *_: "cudnn"),
    ):
        settings = trained.model_settings(config.model, train_step.WIDTHS)
        graph, params = model.abstract(settings)
        zeros = partial(update.new_total, separate=trained.separate(settings), dtype=settings["dtype"])
        given = params, jax.eval_shape(zeros, params), train_step.noise(resolution, micro_batch, text)
        where = jax.ShapeDtypeStruct((2,), "int32")
        step = jax.jit(
            partial(update.accumulate_gradients, graph, dict(config.flow), 0), donate_argnums=1, keep_unused=True
        )
        traced = step.trace(*map(shapes, (*given, where)))
        return traced.lower(lowering_platforms=("cuda",)).compile(), model.count_parameters(params)


def summary(program: Any, parameters: int) -> dict[str, Any]:
    """What the kernels move, in all and by the lines that they come from, and the memory of a run."""
    text, sizes = program.as_text(), program.memory_analysis()
    known, bytes_of = profile_step.operations(text), moved(text)
    rows: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0, 0])
    for kernel, (read, written) in bytes_of.items():
        operation = known.get(kernel, profile_step.Operation("", kernel))
        direction = "backward" if "transpose(" in operation.name else "forward"
        row = rows[operation.lines or operation.name or kernel, direction]
        row[0], row[1], row[2] = row[0] + 1, row[1] + read, row[2] + written
    needs = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    total = sum(map(sum, bytes_of.values()))
    most = sorted(rows.items(), key=lambda item: -item[1][1] - item[1][2])[:MOST]
    return {
        "GB moved": round(total / 1e9, 2),
        "kernels": len(bytes_of),
        "GB of temporaries": round(sizes.temp_size_in_bytes / 1e9, 3),
        "GB with moments and average": round((needs + sizes.temp_size_in_bytes + 3 * 4 * parameters) / 1e9, 3),
        "lines": [
            {"share": round((read + written) / total, 4), "GB read": round(read / 1e9, 3), "GB written": round(written / 1e9, 3),
             "kernels": count, "pass": direction, "lines": lines}
            for (lines, direction), (count, read, written) in most
        ],
    }  # fmt: skip


def main() -> int:
    options = flags.FLAGS
    jax.config.update("jax_platforms", "cpu")
    config = importlib.import_module(f"configs.{options.config}").get_config()
    config.model.layers = options.layers or config.model.layers
    config.model.remat = options.remat or config.model.remat
    config.model.scan_unroll, config.model.fused = options.scan_unroll, options.fused
    program, parameters = compiled(options.card, config, options.resolution, options.micro_batch, options.text)
    found = summary(program, parameters)
    for row in found["lines"][:10]:
        print(
            f"{row['share']:6.1%} {row['GB read']:7.2f} GB read, {row['GB written']:6.2f} written, {row['pass']}, {row['lines']}"
        )
    about = {
        "device": f"compiled for {CARDS[options.card][0]}, which was not there",
        "work": f"configs/{options.config}.py, {config.model.layers} layers, one micro-batch of {options.micro_batch} of "
        f"{options.resolution} pixels a side, text of {options.text} tokens, remat {config.model.remat}, scan_unroll "
        f"{config.model.scan_unroll}{', fused' if options.fused else ''}",
        "jax": jax.__version__,
        "command": "python -m bench.traffic " + " ".join(sys.argv[1:]),
    }
    label = ["traffic", options.config, str(options.resolution), *(["fused"] if options.fused else [])]
    device.write("-".join(label), options.card, about | found)
    return 0


if __name__ == "__main__":
    flags.DEFINE_enum("config", "full", ["nano", "full"], "Which of configs/.")
    flags.DEFINE_integer("resolution", 512, "Pixels a side.")
    flags.DEFINE_integer("micro_batch", 8, "Images at a time.")
    flags.DEFINE_integer("text", 128, "Tokens that captions are padded to.")
    flags.DEFINE_integer("layers", 0, "Of the model; 0: the configuration's.")
    flags.DEFINE_enum("remat", None, ["none", "block"], "By default that of the configuration.")
    flags.DEFINE_integer("scan_unroll", 0, "As model.scan_unroll.")
    flags.DEFINE_bool("fused", False, "As model.fused.")
    flags.DEFINE_enum("card", "h100", list(CARDS), "Which card.")
    commandline.run(main)
