"""Past the machines at hand: the full model on 8, 64 and 512 cards, and data sets of up to a billion images, on paper.

    .venv/bin/python -m bench.scale_model [--devices=8,64,512] [--stage=512] [--data_only]

The trainer's own functions are compiled ahead of time for as many devices as are asked for, which need not be there; memory a
device and every collective, with its bytes and how often it runs, are read from the compiled program. Times follow from the
constants of CLUSTERS and from estimate.UTILISATION: **assumed**, not measured, until somebody has the cards. A collective of
S bytes over g cards takes S (g - 1) / g a card on a ring, an all-reduce twice that (Thakur et al. 2005; NCCL's bus bandwidth).
What a data set asks for follows from bench/results/scaling-records-*.json and loader-*.json, which are measured. Writes
bench/results/scale-model-STAGE.json.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags

from encode import commandline
from encode.records import INDEX_DTYPE

RESULTS = Path(__file__).parent / "results"
WIDTHS = {"latent": 16, "text": 1024, "vision": 1024}
TEXT, BATCHES, LATENCY = 128, (256, 2048), 3e-5  # seconds that a collective takes even for no bytes
# Bytes a second and card in one direction: within a machine, and between machines. H100: NVLink 4 has 450 GB/s in one direction,
# ConnectX-7 400 Gb/s a card (NVIDIA's data sheets); 80% of it is what NCCL's own tests reach. 4090: no peer-to-peer, through
# the host's memory over PCIe 4.0 x16 (31.5 GB/s, twice crossed); 100 Gb/s Ethernet for the eight cards of a machine.
CLUSTERS: dict[str, dict[str, Any]] = {
    "H100": {"card": "H100", "a machine": 8, "within": 0.8 * 450e9, "between": 0.8 * 50e9, "memory": 80e9},
    "RTX 4090": {"card": "RTX 4090", "a machine": 8, "within": 12e9, "between": 12.5e9 / 8, "memory": 24e9},
}
DISK = 2e9  # bytes a second that a machine writes its part of a checkpoint with
RECORDS = (10**5, 10**6, 10**7, 10**8, 10**9)
COLLECTIVE = re.compile(r" = (.+?) (all-gather|reduce-scatter|all-reduce)(?:-start)?\(.*?replica_groups=(.+)")
SIZES = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "f16": 2, "pred": 1}


def collectives(text: str) -> list[dict[str, Any]]:
    """What a compiled program sends: [{"kind", "cards", "bytes", "times"}], bytes of the whole array, times from loops' counts.

    Args:
      text: compiled.as_text().
    """
    found, callers, computation = [], {}, ""
    for line in text.splitlines():
        if line and not line.startswith((" ", "}")) and line.rstrip().endswith("{"):
            computation = line.removeprefix("ENTRY ").split()[0].lstrip("%")
            continue
        count = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
        for called in re.findall(r"(?:body|calls|to_apply)=%?([\w.\-]+)", line):
            callers[called] = (computation, int(count[1]) if count and " while(" in line else 1)
        match = COLLECTIVE.search(line)
        if match:
            shape, kind, groups = match.groups()
            cards = _group_size(groups)
            arrays = re.findall(r"(\w+)\[([\d,]*)\]", shape)
            size = sum(
                SIZES[dtype] * math.prod(int(side) for side in sides.split(",") if side) for dtype, sides in arrays
            )
            found.append(
                {
                    "in": computation,
                    "kind": kind,
                    "cards": cards,
                    "bytes": size * (cards if kind == "reduce-scatter" else 1),
                }
            )
    for one in found:
        times, where = 1, one.pop("in")
        while where in callers:
            where, count = callers[where]
            times *= count
        one["times"] = times
    return found


def _group_size(groups: str) -> int:
    """Cards of a group, from one of the three ways in which XLA writes groups."""
    if groups.startswith("{{"):
        return len(groups.partition("}")[0].split(","))
    if groups.startswith("mesh["):  # mesh['axis_0'=8,'axis_1'=8] {'axis_0'}, ...: over the axes that are named behind
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", groups.partition("]")[0]))
        over = re.search(r"\{([^}]*)\}", groups)[1]
        return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", over))
    return int(re.match(r"\[\d+,(\d+)\]", groups)[1])  # [groups,cards]<=[all]


def compiled(devices: int, fsdp: int, stage: str, micro_batch: int) -> dict[str, Any]:
    """Memory a device and collectives of the full model's micro-batch and update, compiled in this process."""
    import jax
    import jax.numpy as jnp

    from configs import full
    from jaxdit import mesh, model, programs

    config = full.get_config(stage)
    config.model.dtype = "bfloat16"
    grid = mesh.make_mesh(-1, fsdp)
    made = programs.of(config, WIDTHS, grid)
    state = jax.eval_shape(made.fresh)
    rows, side = micro_batch * devices, int(stage) // 8
    parts = {
        "latent": ((rows, side, side, WIDTHS["latent"]), jnp.float32),
        "text": ((rows, TEXT, WIDTHS["text"]), jnp.bfloat16),
        "text_length": ((rows,), jnp.int32),
        "vision": ((rows, WIDTHS["vision"]), jnp.float32),
    }
    batch = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=mesh.over_batch(grid))
        for name, (shape, dtype) in parts.items()
    }
    where = jax.ShapeDtypeStruct((2,), jnp.int32, sharding=mesh.replicated(grid))
    placed = mesh.placed(grid, state)
    total = jax.eval_shape(made.zeros, placed["params"])
    found: dict[str, Any] = {"devices": devices, "fsdp": fsdp, "micro-batch a card": micro_batch}
    for name, function, arguments in (
        ("micro-batch", made.accumulate, (placed["params"], total, batch, where)),
        ("update", made.change, (placed, total)),
    ):
        lowered = function.lower(*arguments)
        program = lowered.compile()
        sizes, rows = program.memory_analysis(), _summed(collectives(program.as_text()))
        if re.search(r"all_gather.*xbf16>", lowered.as_text()):
            rows = [_as_on_a_gpu(row) for row in rows]
        found[name] = {
            "GB of arguments": round(sizes.argument_size_in_bytes / 1e9, 3),
            "GB of temporaries": round(sizes.temp_size_in_bytes / 1e9, 3),
            "collectives": rows,
        }
    found["parameters"] = model.count_parameters(made.shapes)
    return found


def _as_on_a_gpu(row: dict[str, Any]) -> dict[str, Any]:
    """Kernels are gathered in bfloat16; XLA's CPU backend has no such collective and widens it to float32."""
    return row | {"GB": round(row["GB"] / 2, 4)} if row["kind"] == "all-gather" else row


def _summed(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a kind and group size."""
    rows: dict[tuple, dict[str, Any]] = {}
    for one in found:
        row = rows.setdefault(
            (one["kind"], one["cards"]), {"kind": one["kind"], "cards": one["cards"], "times": 0, "GB": 0.0}
        )
        row["times"] += one["times"]
        row["GB"] += one["times"] * one["bytes"] / 1e9
    return [row | {"GB": round(row["GB"], 4)} for row in rows.values()]


def seconds(rows: list[Mapping[str, Any]], cluster: Mapping[str, Any], devices: int, fsdp: int) -> float:
    """Time that collectives take one after the other, on rings.

    Args:
      rows: of `compiled`: kind, cards of a group, times, GB.
      cluster: one of CLUSTERS.
      devices, fsdp: of the mesh. A group of fsdp is made of neighbours; one of all cards goes within each machine first and
        then between machines, over the links of all its cards; any other has one card in each machine.
    """
    total, machine = 0.0, min(cluster["a machine"], devices)
    for row in rows:
        cards, size = row["cards"], row["GB"] * 1e9 * (2 if row["kind"] == "all-reduce" else 1)
        if cards == fsdp <= machine:
            total += size * (cards - 1) / cards / cluster["within"]
        elif cards == devices:
            machines = devices // machine
            total += size * (machine - 1) / machine / cluster["within"]
            total += size / machine * (machines - 1) / machines / cluster["between"]
        else:
            total += size * (cards - 1) / cards / cluster["between"]
        total += LATENCY * row["times"]
    return total


def predict(found: Mapping[str, Any], cluster: Mapping[str, Any], batch: int, stage: str) -> dict[str, Any]:
    """A step of `batch` images: computing, communication, images a second; against as many cards that need not talk."""
    from configs import full
    from jaxdit import estimate, trained

    config = full.get_config(stage)
    config.model.dtype = "bfloat16"
    settings = trained.model_settings(config.model, WIDTHS)
    latent = (int(stage) // 8, int(stage) // 8, WIDTHS["latent"])
    each = found["micro-batch a card"]
    micro_batches = max(1, batch // (found["devices"] * each))
    images = micro_batches * found["devices"] * each
    flops = estimate.hardware_flops(settings, latent, TEXT, remat=settings["remat"])
    computing = micro_batches * each * flops / (estimate.UTILISATION * estimate.peak_flops(cluster["card"], "bfloat16"))
    inside = micro_batches * seconds(found["micro-batch"]["collectives"], cluster, found["devices"], found["fsdp"])
    once = seconds(found["update"]["collectives"], cluster, found["devices"], found["fsdp"])
    hidden = max(computing, inside) + once  # a layer is gathered while the one before computes
    return {
        "images an update": images,
        "micro-batches": micro_batches,
        "seconds of computing": round(computing, 4),
        "of collectives in micro-batches": round(inside, 4),
        "of collectives in the update": round(once, 4),
        "images a second, overlapped": round(images / hidden, 1),
        "images a second, one after the other": round(images / (computing + inside + once), 1),
        "of perfect scaling": round(computing / hidden, 3),
    }


def data_rows() -> list[dict[str, Any]]:
    """What data sets of RECORDS images at 512 pixels ask for: measured a record, multiplied."""
    scaling = json.loads(next(RESULTS.glob("scaling-records-*.json")).read_text())["found"]["records"]
    loader = json.loads(next(RESULTS.glob("loader-512-*.json")).read_text())["resolutions"]["512"]
    counts = sorted(map(int, scaling))
    few, many = scaling[str(counts[0])], scaling[str(counts[-1])]
    apart = counts[-1] - counts[0]
    memory = (many["memory of it, MB"] - few["memory of it, MB"]) * 1e6 / apart
    opening = (many["open, s"] - few["open, s"]) / apart
    rows = []
    for count in RECORDS:
        rows.append(
            {
                "images": count,
                "shards": count // 1000,
                "TB at 512": round(count * loader["bytes a sample"]["ours"] / 1e12, 3),
                "GB of index on disk": round(count * INDEX_DTYPE.itemsize / 1e9, 3),
                "GB of index in memory": round(count * memory / 1e9, 3),
                "seconds to open": round(few["open, s"] + count * opening, 1),
                "seconds to the first batch after a resume": many["resume: first batch, s"],
            }
        )
    return rows


def main() -> int:
    options = flags.FLAGS
    if options.compile:
        print(json.dumps(compiled(options.compile, options.fsdp, options.stage, options.micro_batch)))
        return 0
    result: dict[str, Any] = {
        "what": "estimates: compiled programs are real, times follow from assumed constants",
        "command": "python -m bench.scale_model " + " ".join(sys.argv[1:]),
        "stage": options.stage,
        "clusters": CLUSTERS,
        "programs": [],
        "steps": [],
        "data": data_rows(),
    }
    for devices in () if options.data_only else map(int, options.devices):
        for fsdp in (1, 8):
            if fsdp > devices:
                continue
            environment = os.environ | {
                "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            }
            command = [
                sys.executable, "-m", "bench.scale_model", f"--compile={devices}", f"--fsdp={fsdp}",
                f"--stage={options.stage}", f"--micro_batch={options.micro_batch}",
            ]  # fmt: skip
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            result["programs"].append(found)
            for name, cluster in CLUSTERS.items():
                for batch in BATCHES:
                    row = {"cluster": name, "cards": devices, "fsdp": fsdp, "batch": batch} | predict(
                        found, cluster, batch, options.stage
                    )
                    parameters = found["parameters"]
                    row["seconds to save"] = round(
                        16 * parameters / (DISK * max(1, devices // cluster["a machine"])), 1
                    )
                    result["steps"].append(row)
                    print(row, flush=True)
            _write(options.stage, result)
    _write(options.stage, result)
    for row in result["data"]:
        print(row)
    return 0


def _write(stage: str, result: dict[str, Any]) -> None:
    (RESULTS / f"scale-model-{stage}.json").write_text(json.dumps(result, indent=1) + "\n")


def define_flags() -> None:
    flags.DEFINE_list("devices", ["8", "64", "512"], "Cards to compile for.")
    flags.DEFINE_string("stage", "512", "Of configs/full.py.")
    flags.DEFINE_integer("micro_batch", 4, "Images a card and micro-batch.")
    flags.DEFINE_bool("data_only", False, "Only what data sets ask for.")
    flags.DEFINE_integer("compile", 0, "Of a child: devices.")
    flags.DEFINE_integer("fsdp", 1, "Of a child: cards that a model is cut over.")


if __name__ == "__main__":
    define_flags()
    commandline.run(main)
