"""Learning per hour, which is what a person pays for: when each check of the gate first passes, setting by setting.

.venv/bin/python -m bench.listen [--settings="shift 3,drop"] [--seeds=3] [--steps=900] [--label=512]

Trains the small model of bench.gate_power on generated photographs with each setting and seed, and puts the averaged, the raw
and the guided averaged weights of every checkpoint through the gate's measures. Goes on where it stopped: a row of the
result is one training. Writes bench/results/listen-DEVICE.json and a plot beside it.
"""

from __future__ import annotations

import json
import math
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
from absl import flags

from bench import device, gate_power
from encode import commandline, encoders
from jaxdit import charts, checkpoint, data, judge, metrics, page, trained, validate

SHARES = ("flow.drop_both", "flow.drop_text", "flow.drop_vision")
SETTINGS: dict[str, dict[str, Any]] = {
    # The last two are shifts 1 and 4 of pictures eight times as large (512), whose composition shows through as much more noise.
    **{f"shift {shift}": {"flow.shift": float(shift)} for shift in (1, 2, 3, 5, 0.125, 0.5)},
    "direction": {"flow.direction": 1.0, "flow.shift": 3.0},
    "squares": {"flow.direction": 0.0, "flow.shift": 3.0},
    "drop 5%": dict.fromkeys(SHARES, 0.05),
    "drop 20%": dict.fromkeys(SHARES, 0.2),
    "drop vision 25%": {"flow.drop_vision": 0.25},
    "muon": {"optim.name": "muon"},
    "muon, rate 5e-3": {"optim.name": "muon", "optim.peak_learning_rate": 5e-3},
    "rate 5e-3": {"optim.peak_learning_rate": 5e-3},
}
LOOKS = {"averaged": (False, (1.0, 1.0)), "raw": (True, (1.0, 1.0)), "guided": (False, (2.0, 1.2))}
SHOWN = ("text_only_ssim", "text_composition", "vision_light", "memory_ssim")


def listen(
    path: Path, workdir: Path, setting: dict[str, Any], *, steps: int, every: int, seed: int
) -> list[dict[str, Any]]:
    """Train one model, and look at each of its checkpoints: [{step, samples, seconds, averaged, raw, guided}]."""
    config = gate_power.configured(path, steps=steps, seed=seed)
    config.update_from_flattened_dict(setting)
    config.train.log_every = math.gcd(every, config.train.log_every)  # each look needs its seconds
    # At the looks alone, however slow it is.
    config.checkpoint.update(every=every, keep=steps // every + 1, minutes=1e6)
    gate_power.to_the_end(config, workdir)
    dataset = data.Dataset(path)
    vae, vision = (
        load(dataset.info["encoders"][name])
        for load, name in ((encoders.load_vae, "vae"), (encoders.load_vision, "vision"))
    )
    seconds = {row["step"]: row["seconds"] for row in metrics.read(workdir)}
    rows = []
    for step in checkpoint.saved_steps(workdir):
        row: dict[str, Any] = {"step": step, "samples": step * config.train.batch_size, "seconds": seconds[step]}
        for name, (raw, guidance) in LOOKS.items():
            run = trained.load(workdir, step=step, raw=raw)
            examples = validate.gather(dataset, run, vae)
            with mock.patch.dict(validate.SAMPLING, guidance=guidance):
                numbers, *_ = validate.score(run, vae, vision, examples, judge.questions(examples), judge.GENERATED)
            row[name] = {key: round(numbers[key], 4) for key in (*judge.THRESHOLDS, "psnr")}
        rows.append(row)
    return rows


def first_passes(rows: list[dict[str, Any]], name: str, rate: float) -> dict[str, dict[str, float] | None]:
    """For each check the samples at the first look from which on it passes, and their seconds at `rate`; None: never."""
    found = {}
    for check, needed in judge.THRESHOLDS.items():
        passes = [row[name][check] <= needed if check in judge.AT_MOST else row[name][check] >= needed for row in rows]
        since = len(passes) - (passes[::-1].index(False) if False in passes else len(passes))
        row = rows[since] if since < len(rows) else None
        found[check] = row and {"samples": row["samples"], "seconds": round(row["samples"] / rate, 1)}
    return found


def fastest(seeds: dict[str, list[dict[str, Any]]]) -> float:
    """Samples a second between two looks, the best of a setting's trainings: other work may have slowed some."""
    return max(
        (after["samples"] - before["samples"]) / (after["seconds"] - before["seconds"])
        for rows in seeds.values()
        for before, after in pairwise(rows)
    )


def firsts(curves: dict[str, dict[str, list[dict[str, Any]]]]) -> dict[str, Any]:
    """{setting: {seed: {weights: `first_passes`}}}."""
    return {
        setting: {
            seed: {look: first_passes(rows, look, fastest(seeds)) for look in LOOKS} for seed, rows in seeds.items()
        }
        for setting, seeds in curves.items()
    }


def plot(result: dict[str, Any]) -> str:
    """One frame a check: its share by step, a line a setting, the mean of its seeds."""
    drawn = []
    for check in SHOWN:
        lines, steps = [], np.array([])
        for place, (name, seeds) in enumerate(result["curves"].items()):
            steps = np.array([row["step"] for row in next(iter(seeds.values()))])
            values = np.mean([[row["averaged"][check] for row in rows] for rows in seeds.values()], 0)
            lines.append(charts.Line(name, values, charts.COLOURS[place % len(charts.COLOURS)]))
        drawn.append(charts.chart(judge.WORDS[check], steps, lines, percent=True, zero=True))
    return page.page("When the model begins to listen", charts.grid(*drawn))


def define_flags() -> None:
    flags.DEFINE_list(
        "settings",
        ["shift 1", "shift 2", "shift 3", "shift 5", "drop", "rate", "muon"],
        "Those whose name holds one of these.",
    )
    flags.DEFINE_integer("seeds", 3, "Trainings of each setting.")
    flags.DEFINE_integer("steps", 900, "Steps of each training.")
    flags.DEFINE_integer("every", 100, "Steps between two looks.")
    flags.DEFINE_string("label", "", "In the result's name, to keep it beside others.")


def main() -> int:
    options = flags.FLAGS
    name = device.processor() if jax.default_backend() == "cpu" else jax.devices()[0].device_kind
    path = device.path("-".join(filter(None, ["listen", options.label])), name)
    known = {
        "device": name,
        "steps": options.steps,
        "every": options.every,
        "size": gate_power.SIZE,
        "guided": LOOKS["guided"][1],
    }
    result = device.begun(path, "listen", known, first={}, curves={})
    wanted = [
        (s, seed) for seed in range(options.seeds) for s in SETTINGS if any(part in s for part in options.settings)
    ]
    with tempfile.TemporaryDirectory() as folder:
        photographs = gate_power.photographs(Path(folder))
        for setting, seed in wanted:
            curves = result["curves"].setdefault(setting, {})
            if str(seed) in curves:
                continue
            rows = listen(
                photographs,
                Path(folder) / f"{setting} {seed}",
                SETTINGS[setting],
                steps=options.steps,
                every=options.every,
                seed=seed,
            )
            curves[str(seed)] = rows
            rates = {name: round(fastest(seeds), 1) for name, seeds in result["curves"].items()}
            result |= {"samples a second, at best": rates}
            result["first"] = firsts(result["curves"])
            path.write_text(json.dumps(result, indent=1) + "\n")
            path.with_suffix(".html").write_text(plot(result))
            first = result["first"][setting][str(seed)]
            passed = {check: at and at["samples"] for check, at in first["averaged"].items()}
            print(f"{setting}, seed {seed}: samples until it passes {passed}", flush=True)
    return 0


if __name__ == "__main__":
    define_flags()
    commandline.run(main)
