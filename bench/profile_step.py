"""Where a training step spends its time: the ten costliest operations, with the lines that they come from.

    .venv/bin/python -m bench.profile_step [--config=nano] [--resolution=256] [--micro_batch=8] [--updates=3]
    .venv/bin/python -m bench.profile_step --config=full --resolution=512 --micro_batch=8 [--fused]          (a GPU)

A few updates of the step that bench/train_step.py races are traced by jax.profiler; the compiled programs' text tells what each
operation is. A share is that of the time of all operations: on a GPU that of its kernels and copies, of which some run beside
others; on the CPU that of all threads, without what an operation waits for others. On a GPU the kernels are launched one by
one: those of a CUDA graph, as in training, have no names. Writes
bench/results/profile-CONFIG-RESOLUTION[-fused]-DEVICE.json.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from absl import flags
from jax.profiler import ProfileData

from bench import device, train_step
from encode import commandline

MOST = 10
WAITING = ("while", "conditional", "call")  # their time is that of the operations within
PLACE = ("file_name_id", "function_name_id", "line")
FRAMES = 3  # lines of ours that lead to an operation, the innermost first


@dataclass(frozen=True)
class Operation:
    """An instruction of a compiled program: what it gives, its code, JAX's name of it, our lines that lead to it."""

    result: str
    code: str
    name: str = ""
    lines: str = ""


def trace(run: Callable[[int], None], updates: int) -> tuple[ProfileData, float]:
    """(what the profiler saw of so many updates, seconds that they took)."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level, options.enable_hlo_proto = 0, False
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            began = time.perf_counter()
            run(updates)
            seconds = time.perf_counter() - began
        return ProfileData.from_file(str(next(Path(folder).rglob("*.xplane.pb")))), seconds


def times(profile: ProfileData) -> dict[tuple[str, str], tuple[float, int]]:
    """{(module, operation): (seconds of its own, how often)}; of a GPU all that its streams ran, of the CPU XLA's operations."""
    streams = [
        line
        for plane in profile.planes
        if plane.name.startswith("/device:")
        for line in plane.lines
        if line.name.startswith("Stream")
    ]
    found: dict[tuple[str, str], tuple[float, int]] = defaultdict(lambda: (0.0, 0))
    for line in streams or [line for plane in profile.planes for line in plane.lines]:
        # A stream's kernels begin a little before the last one ends; only a thread's events lie within others.
        timed = ((event, event.duration_ns) for event in line.events) if streams else own_times(line.events)
        for event, own in timed:
            stats = {name: value for name, value in event.stats if name}
            if streams or "hlo_op" in stats:
                key = str(stats.get("hlo_module", "")), str(stats.get("hlo_op", event.name))
                seconds, often = found[key]
                found[key] = seconds + own / 1e9, often + 1
    return dict(found)


def own_times(events: Iterable[Any]) -> Iterator[tuple[Any, float]]:
    """(event, its nanoseconds without those of the events within it) of one thread."""
    stack: list[list[Any]] = []
    for event in sorted(events, key=lambda event: (event.start_ns, -event.duration_ns)):
        while stack and stack[-1][0].end_ns <= event.start_ns:
            yield tuple(stack.pop())
        if stack:
            stack[-1][1] -= event.duration_ns
        stack.append([event, event.duration_ns])
    yield from map(tuple, stack)


def operations(text: str) -> dict[str, Operation]:
    """{name: Operation} of the text of a compiled program (jax.stages.Compiled.as_text)."""
    lines = _lines(text)
    found = {}
    for match in re.finditer(r"^ *(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$", text, re.MULTILINE):
        name, result, code, rest = match.groups()
        called = re.search(r'op_name="([^"]*)"', rest)
        frame = re.search(r"stack_frame_id=(\d+)", rest)
        result = "several" if result.startswith("(") else re.sub(r"\{.*", "", result)
        target = re.search(r'custom_call_target="([^"]*)"', rest)
        found[name] = Operation(
            result, target[1] if target else code, called[1] if called else "", lines(int(frame[1])) if frame else ""
        )
    return found


def _lines(text: str) -> Callable[[int], str]:
    """A function of a stack frame's number: the lines of jaxdit/ that lead to it, from the tables at the head of the text."""
    tables = {}
    for title in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
        part = re.search(rf"^{title}\n((?:\d+ .*\n)*)", text, re.MULTILINE)
        rows = part[1].splitlines() if part else []
        tables[title] = {int(number): row for number, row in (row.split(" ", 1) for row in rows)}
    files, functions, places, frames = tables.values()
    parents = {number: int(re.search(r"parent_frame_id=(\d+)", row)[1]) for number, row in frames.items()}
    above = parents.get(1, 0)  # parents are written one too high, where the first frame is its own

    def lines(frame: int) -> str:
        found: list[str] = []
        while frame in frames and len(found) < FRAMES:
            place = places[int(re.search(r"file_location_id=(\d+)", frames[frame])[1])]
            file, function, line = (int(re.search(rf"\b{name}=(\d+)", place)[1]) for name in PLACE)
            path, name = Path(files[file].strip('"')), functions[function].strip('"').split(".<locals>")[0]
            if path.parent.name == "jaxdit":  # a kept program may have been compiled in another checkout
                found.append(f"jaxdit/{path.name}:{line} {name}")
            frame = parents[frame] - above
        return " < ".join(found)

    return lines


def kind(name: str, operation: Operation) -> str:
    """ "attention" of one kernel, "products", or "the rest", which on a GPU waits for memory."""
    if "dot_product_attention" in operation.name:
        return "attention"
    products = (
        name.startswith("gemm") or operation.code.startswith(("__cublas", "dot")) or "dot_general" in operation.name
    )
    return "products" if products else "the rest"


def costliest(
    found: Mapping[tuple[str, str], tuple[float, int]], programs: Mapping[str, Mapping[str, Operation]], updates: int
) -> dict[str, Any]:
    """Seconds of all operations and of each kind, and the rows of the costliest ones and of the costliest lines.

    Args:
      found: of `times`.
      programs: `operations` of each module by its name.
      updates: that were traced.
    """
    known = {
        (module, name): programs.get(module, {}).get(name, Operation("", name if not module else ""))
        for module, name in found
    }
    found = {key: value for key, value in found.items() if known[key].code not in WAITING}
    total = sum(seconds for seconds, _ in found.values())
    by_line: dict[tuple[str, str], float] = defaultdict(float)
    by_kind: dict[str, float] = defaultdict(float)
    for key, (seconds, _) in found.items():
        direction = "backward" if "transpose(" in known[key].name else "forward"
        by_line[known[key].lines or known[key].name or key[1], direction] += seconds
        by_kind[kind(key[1], known[key])] += seconds
    most = sorted(found, key=lambda key: -found[key][0])[:MOST]
    return {
        "seconds of all operations, an update": round(total / updates, 6),
        "milliseconds of each kind, an update": {
            name: round(1e3 * seconds / updates, 3) for name, seconds in sorted(by_kind.items())
        },
        "share of the ten": round(sum(found[key][0] for key in most) / total, 4),
        "operations": [
            {
                "share": round(found[key][0] / total, 4),
                "milliseconds an update": round(1e3 * found[key][0] / updates, 3),
                "times an update": round(found[key][1] / updates, 1),
                "operation": key[1],
                "program": key[0],
                "code": known[key].code,
                "gives": known[key].result,
                "name": known[key].name,
                "lines": known[key].lines,
            }
            for key in most
        ],
        "lines": [
            {"share": round(seconds / total, 4), "pass": direction, "lines": lines}
            for (lines, direction), seconds in sorted(by_line.items(), key=lambda item: -item[1])[:MOST]
        ],
    }


def profile(config: Any, resolution: int, micro_batch: int, text: int, updates: int) -> dict[str, Any]:
    """What `costliest` says of the training step, and what is known of it."""
    run, facts, compiled = train_step.ours(config, train_step.noise(resolution, micro_batch, text), 1)
    run(1)
    seen, seconds = trace(run, updates)
    programs = {}
    for program in compiled:
        text = program.as_text()
        programs[re.match(r"HloModule ([^,\s]+)", text)[1]] = operations(text)
    return {"seconds an update": round(seconds / updates, 6)} | costliest(times(seen), programs, updates) | facts


def table(found: Mapping[str, Any]) -> str:
    """The costliest operations and the time of each kind, for people."""
    rows = [
        f"{row['share']:6.1%}  {row['milliseconds an update']:9.2f} ms  {row['times an update']:5.0f} x  {row['operation']} "
        f"({row['code']} {row['gives']})\n{'':31}{row['name']}\n{'':31}{row['lines'] or row['program']}"
        for row in found["operations"]
    ]
    kinds = [f"{value:9.2f} ms  {name}" for name, value in found["milliseconds of each kind, an update"].items()]
    return "\n".join([*rows, *kinds])


def main() -> int:
    options = flags.FLAGS
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_command_buffer=".strip()
    config = importlib.import_module(f"configs.{options.config}").get_config()
    config.model.layers = options.layers or config.model.layers
    config.model.fused = options.fused
    if options.remat:
        config.model.remat = options.remat
    found = profile(config, options.resolution, options.micro_batch, options.text, options.updates)
    where = found.pop("device") or device.processor()
    print(table(found))
    about = {
        "device": where,
        "work": f"configs/{options.config}.py, {config.model.layers} layers, {options.resolution} pixels a side, micro-batch "
        f"{options.micro_batch}, text of {options.text} tokens, remat {config.model.remat}, "
        f"{'fused, ' if options.fused else ''}{options.updates} updates",
        "jax": jax.__version__,
        "command": "python -m bench.profile_step " + " ".join(sys.argv[1:]),
    }
    label = ["profile", options.config, str(options.resolution), *(["fused"] if options.fused else [])]
    device.write("-".join(label), where, about | found)
    return 0


if __name__ == "__main__":
    flags.DEFINE_enum("config", "nano", ["nano", "full"], "Which of configs/.")
    flags.DEFINE_integer("resolution", 256, "Pixels a side.")
    flags.DEFINE_integer("micro_batch", 8, "Images at a time.")
    flags.DEFINE_integer("text", 64, "Tokens that captions are padded to.")
    flags.DEFINE_enum("remat", None, ["none", "block"], "By default that of the configuration.")
    flags.DEFINE_bool("fused", False, "As model.fused.")
    flags.DEFINE_integer("layers", 0, "Of the model; 0: the configuration's.")
    flags.DEFINE_integer("updates", 3, "Updates that are traced.")
    commandline.run(main)
