"""A whole training step beside its peers: images a second, MFU, memory and compile time of the same work on the same device.

    .venv/bin/python -m bench.train_step [--config=nano] [--resolutions=256,512] [--micro_batches=8] [--rounds=5]
    .venv/bin/python -m bench.train_step --config=full --resolutions=512 --micro_batches=16 --memory_gb=24     (a GPU)

Forward and backward pass, clip, AdamW and the average of the weights, each side in a process of its own: ours by the
trainer's own functions, once for each --remat, --scan_unroll and --fused; the same architecture in PyTorch (torch_dit with
scaled_dot_product_attention, fused AdamW), eager and under torch.compile; and diffusers' PixArt of the same depth, width and
heads. On the CPU all are float32, with huge pages, and take their turn in every round; on a GPU they are
bfloat16, each with the memory that --memory_gb allows, and take turns where the card holds all of them, else come one after
the other. MFU counts our model's products
once (jaxdit/estimate.py), against the card's peak, or a CPU's best plain product. Writes
bench/results/train-step-CONFIG-DEVICE.json.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np
from absl import flags

from bench import device
from encode import commandline
from encode.records import InputError

WIDTHS = {"latent": 16, "text": 1024, "vision": 1024}  # Flux, T5-Large, DINOv3 ViT-L
SAME = ("torch_dit eager", "torch_dit compiled")  # our architecture in PyTorch
PEERS = (*SAME, "diffusers pixart eager", "diffusers pixart compiled")
VERSIONS = ("jax", "jaxlib", "flax", "optax", "torch", "diffusers")
WORD = "MEASURED "  # begins the lines of a side's process that are meant for us


def noise(resolution: int, micro_batch: int, text: int) -> dict[str, np.ndarray]:
    """A micro-batch as the trainer gets it, captions of 8 tokens and more."""
    from jaxdit import measure

    bucket = measure.Bucket("noise", 1, (resolution // 8, resolution // 8, WIDTHS["latent"]), text)
    batch = measure.noise(bucket, WIDTHS, micro_batch)
    return batch | {"text_length": np.random.default_rng(1).integers(8, text + 1, micro_batch).astype(np.int32)}


def ours(
    config: Any, batch: dict[str, np.ndarray], accumulation: int
) -> tuple[Callable[[int], None], dict[str, Any], tuple[Any, ...]]:
    """(run so many updates and wait, what is known, its three programs): the trainer's functions, compiled as it does."""
    import jax

    from jaxdit import estimate, mesh, model, programs

    config, devices = config.copy_and_resolve_references(), mesh.make_mesh()
    config.train.batch_size = accumulation * len(batch["latent"])
    made, everywhere = programs.of(config, WIDTHS, devices), mesh.replicated(devices)
    settings, shapes = made.settings, made.shapes
    state = jax.jit(made.fresh, out_shardings=everywhere)()
    placed = jax.device_put(batch, mesh.over_batch(devices))
    where = jax.device_put(np.zeros(2, np.int32), everywhere)
    began = time.perf_counter()
    zeros = made.zeros.lower(state["params"]).compile()
    accumulate = made.accumulate.lower(state["params"], zeros(state["params"]), placed, where).compile()
    change = made.change.lower(state, zeros(state["params"])).compile()
    compiled = time.perf_counter() - began

    def run(updates: int) -> None:
        nonlocal state
        for _ in range(updates):
            total = zeros(state["params"])
            for _ in range(accumulation):
                total = accumulate(state["params"], total, placed, where)
            state, row = change(state, total)
        if not np.isfinite(row["loss"]):  # waits for the device
            raise FloatingPointError(f"the loss is {row['loss']}")
        jax.block_until_ready(state)

    began = time.perf_counter()
    run(1)
    sizes, kind = accumulate.memory_analysis(), jax.devices()[0].device_kind
    beside = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) - sum(
        leaf.nbytes for leaf in jax.tree.leaves(state["params"])
    )
    needs = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    facts = {
        "seconds to compile": round(compiled, 1),
        "seconds of the first update": round(time.perf_counter() - began, 2),
        "GB by the compiled program": _gigabytes(needs + sizes.temp_size_in_bytes + beside),
        "GB of temporaries": _gigabytes(sizes.temp_size_in_bytes),
        "parameters": model.count_parameters(shapes),
        "threads": len(os.sched_getaffinity(0)) if jax.default_backend() == "cpu" else 0,
        "device": kind if jax.default_backend() != "cpu" else "",
        "products": settings["dtype"],
        "attention": settings["attention"],
        "XLA flags": os.environ["XLA_FLAGS"],
        "flops an image": estimate.training_flops(settings, batch["latent"].shape[1:], batch["text"].shape[1]),
        "peak flops": estimate.peak_flops(kind, settings["dtype"], jax.device_count())
        or _product_flops(settings["dtype"]),
    }
    return run, facts, (zeros, accumulate, change)


def _product_flops(dtype: str) -> float:
    """Operations a second of a plain product of [2048, 2048], the best of twenty: what this device can."""
    import jax
    import jax.numpy as jnp

    x = jnp.ones((2048, 2048), dtype)
    multiply = jax.jit(jnp.matmul)
    jax.block_until_ready(multiply(x, x))
    times = []
    for _ in range(20):
        began = time.perf_counter()
        jax.block_until_ready(multiply(x, x))
        times.append(time.perf_counter() - began)
    return 2 * 2048**3 / min(times)


def _gigabytes(count: float | None) -> float | None:
    return None if count is None else round(count / 1e9, 3)


def serve(side: str) -> None:
    """One side, in a process of its own: prepares itself, then runs as many updates as each line of its input says."""
    options = flags.FLAGS
    if options.cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])  # before any library counts them
    config = importlib.import_module(f"configs.{options.config}").get_config()
    config.model.layers = options.layers or config.model.layers
    (resolution,), (micro_batch,) = map(int, options.resolutions), map(int, options.micro_batches)
    batch = noise(resolution, micro_batch, options.text)
    if side in PEERS:
        from bench import peers

        run, facts = peers.prepare(side, config.model, config.optim, WIDTHS, batch, options.accumulation)
        peak = peers.peak_bytes
    else:
        import jax

        _, config.model.remat, _, unroll, *fused = side.split()
        config.model.scan_unroll, config.model.fused = int(unroll), bool(fused)
        run, facts, _ = ours(config, batch, options.accumulation)
        peak = lambda: (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")  # noqa: E731
    print(WORD + json.dumps(facts), flush=True)
    for line in sys.stdin:
        run(1)  # while the others ran, the system took memory and caches away: training knows no such pause
        began, used = time.perf_counter(), time.process_time()
        run(int(line))
        seconds, used = time.perf_counter() - began, time.process_time() - used
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        found = {"seconds": seconds, "used": used, "resident": _gigabytes(resident), "device": _gigabytes(peak())}
        print(WORD + json.dumps(found), flush=True)


class Side:
    """A process that runs one side of a case; `problem` says why it cannot."""

    def __init__(self, name: str, resolution: int, micro_batch: int, environment: dict[str, str]):
        options = flags.FLAGS
        self.name, self.rounds, self.problem = name, [], ""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.train_step", f"--side={name}", f"--config={options.config}",
             f"--resolutions={resolution}", f"--micro_batches={micro_batch}", f"--text={options.text}",
             f"--accumulation={options.accumulation}", f"--cores={options.cores}", f"--layers={options.layers}"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        )  # fmt: skip
        self.facts: dict[str, Any] = {}

    def get_ready(self) -> None:
        """Waits until it is prepared, and lets it touch its memory for the first time."""
        self.facts = self._answer()
        print(f"{self.name}: {self.problem or self.facts}", flush=True)
        self.take_turn(1)

    def _answer(self) -> dict[str, Any]:
        last = "ended without a word"
        for line in self.process.stdout:
            if line.startswith(WORD):
                return json.loads(line.removeprefix(WORD))
            last = line.strip() or last
        self.problem = last[:300]
        return {}

    def take_turn(self, updates: int) -> None:
        if not self.problem:
            self.process.stdin.write(f"{updates}\n")
            self.process.stdin.flush()
            self.rounds.append(self._answer())

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.stdin.close()
            self.process.wait()


def case(names: list[str], resolution: int, micro_batch: int, environment: dict[str, str], rounds: int, updates: int):
    """{side: result} of one resolution and micro-batch."""
    on_cpu = "cpu" in environment["JAX_PLATFORMS"]
    together = on_cpu or len(names) * float(environment["XLA_PYTHON_CLIENT_MEM_FRACTION"]) < 0.95
    sides: list[Side] = []
    print(f"{resolution} x {micro_batch}{', taking turns' if together else ''}", flush=True)
    try:
        for name in names:
            sides.append(Side(name, resolution, micro_batch, environment))
            if on_cpu or not together:  # else all prepare themselves at once: most of that is compiling, on the host
                sides[-1].get_ready()
            if not together:
                for _ in range(rounds):
                    sides[-1].take_turn(updates)
                sides[-1].close()
        if together and not on_cpu:
            for side in sides:
                side.get_ready()
        for number in range(rounds if together else 0):
            for side in sides[:: -1 if number % 2 else 1]:
                side.take_turn(updates)
    finally:
        for side in sides:
            side.close()
    images = updates * micro_batch * flags.FLAGS.accumulation
    return {side.name: _result(side, images, sides[0].facts) for side in sides}


def _result(side: Side, images: int, first: dict[str, Any]) -> dict[str, Any]:
    if side.problem:
        return side.facts | {"problem": side.problem}
    seconds = [turn["seconds"] for turn in side.rounds[1:]]
    rate = images / statistics.median(seconds)
    known = {
        "images a second": round(rate, 3),
        "at best": round(images / min(seconds), 3),
        "images a CPU second, at best": round(images / min(turn["used"] for turn in side.rounds[1:]), 3),
        "GB resident at most": side.rounds[-1]["resident"],
        "GB of the device at most": side.rounds[-1]["device"],
    }
    if "pixart" not in side.name and "flops an image" in first:
        known["mfu"] = round(rate * first["flops an image"] / first["peak flops"], 3)
    known |= side.facts | {"seconds of each round": [round(value, 3) for value in seconds]}
    return {name: value for name, value in known.items() if value not in (None, "", 0)}


def ratios(found: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Our best side's images a second over those of the best PyTorch of the same architecture, and over PixArt's."""
    result = {}
    for column in ("images a second", "at best", "images a CPU second, at best"):
        rates = {name: side[column] for name, side in found.items() if column in side}
        best = max((rate for name, rate in rates.items() if name.startswith("jaxdit")), default=None)
        for label, names in (("the same in PyTorch", SAME), ("PixArt", PEERS[2:])):
            theirs = max((rates[name] for name in names if name in rates), default=None)
            if best and theirs:
                result[f"{column}, jaxdit over {label}"] = round(best / theirs, 3)
    return result


def environment_of_sides(memory_gb: float | None) -> tuple[dict[str, str], int | None]:
    """(environment, bytes of the card or None on the CPU): that of launch/environment.sh; the share of the card's memory allowed.

    Raises:
      InputError: --memory_gb without a card.
    """
    found = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} | dict(os.environ)
    try:
        lines = subprocess.run(
            ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"],
            capture_output=True, text=True, check=True,
        ).stdout.split()  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        lines = []
    if not lines:
        if memory_gb:
            raise InputError("--memory_gb caps a card's memory, and nvidia-smi finds no card here.")
        return found | {"JAX_PLATFORMS": "cpu"}, None
    total = int(lines[0]) * 2**20
    share = min(memory_gb * 1e9 / total, 0.95) if memory_gb else 0.9
    return found | {"JAX_PLATFORMS": "cuda", "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{share:.4f}"}, total


def main() -> int:
    options = flags.FLAGS
    if options.side:
        serve(options.side)
        return 0
    load = os.getloadavg()
    environment, card = environment_of_sides(options.memory_gb)
    if unknown := [word for word in options.fused if word not in ("no", "yes") or (word == "yes" and not card)]:
        raise InputError(f"--fused={unknown[0]}: choose no and, with a card, yes.")
    names = [
        f"jaxdit {remat} unroll {unroll}{' fused' if fused == 'yes' else ''}"
        for remat, unroll, fused in itertools.product(options.remat, options.scan_unroll, options.fused)
    ]
    names += [name for name in PEERS if any(name.startswith(wanted) for wanted in options.peers)]
    cases, kind = [], ""
    for resolution, micro_batch in itertools.product(options.resolutions, options.micro_batches):
        found = case(names, int(resolution), int(micro_batch), environment, options.rounds, options.updates)
        kind = kind or next((side["device"] for side in found.values() if "device" in side), "")
        cases.append(
            {"resolution": int(resolution), "micro-batch": int(micro_batch)} | ratios(found) | {"sides": found}
        )
    where = kind or device.processor()
    result = {
        "device": where if card else f"{where}, {options.cores or os.cpu_count()} cores",
        "work": f"configs/{options.config}.py, {f'{options.layers} layers, ' if options.layers else ''}"
        f"{options.accumulation} micro-batches an update, text of {options.text} tokens: forward, backward, clip, AdamW, average",
        "products": "bfloat16 on every side" if card else "float32 on every side",
        "load before (1, 5, 15 minutes)": [round(value, 2) for value in load],
        "load after": [round(value, 2) for value in os.getloadavg()],
        "environment": {
            name: environment.get(name, "") for name in ("GLIBC_TUNABLES", "XLA_PYTHON_CLIENT_MEM_FRACTION")
        },
        "versions": {name: version(name) for name in VERSIONS},
        "command": "python -m bench.train_step " + " ".join(sys.argv[1:]),
        "cases": cases,
    }
    device.write("-".join(filter(None, ["train-step", options.config, options.label])), where, result)
    return 0


if __name__ == "__main__":
    flags.DEFINE_enum("config", "nano", ["nano", "full"], "Which of configs/.")
    flags.DEFINE_list("resolutions", ["256", "512"], "Pixels a side.")
    flags.DEFINE_list("micro_batches", ["8"], "Images at a time.")
    flags.DEFINE_integer("accumulation", 1, "Micro-batches an update.")
    flags.DEFINE_integer("text", 64, "Tokens that captions are padded to.")
    flags.DEFINE_list("remat", ["none"], "Choices of model.remat.")
    flags.DEFINE_list("scan_unroll", ["0"], "Choices of model.scan_unroll.")
    flags.DEFINE_list("fused", ["no"], "Choices of model.fused: no, yes; a GPU's alone.")
    flags.DEFINE_list("peers", ["torch_dit", "diffusers pixart eager"], "Beginnings of the peers' names.")
    flags.DEFINE_integer("rounds", 5, "Times that each side takes its turn; the median counts.")
    flags.DEFINE_integer("updates", 1, "Updates a turn.")
    flags.DEFINE_integer(
        "cores", 0, "Cores of the CPU for each side; 0: all. With one, CPU seconds compare on a busy machine."
    )
    flags.DEFINE_integer("layers", 0, "Of every side's model; 0: the configuration's.")
    flags.DEFINE_string("label", "", "In the result's name, to keep it beside others.")
    flags.DEFINE_float("memory_gb", None, "Memory of the card that every side may use, in 1e9 bytes.")
    flags.DEFINE_string("side", "", "Of a side's process: its name.")
    commandline.run(main)
