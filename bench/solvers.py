"""How near each solver comes to the exact path with the same number of evaluations of a trained model.

    .venv/bin/python -m bench.solvers --workdir=quickstart/run

The exact path is Heun's of 128 steps; the error is the root mean square of the latents' difference, in deviations of the
data, for captions with another image's vector. DPM-Solver++(2M) (Lu et al. 2022, in the form for straight paths) is the one
that is not in jaxdit.sampler: Adams' second-order formula is nearer from twelve evaluations on, or within a tenth. Writes
bench/results/solvers-DEVICE.json.
"""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path

import jax
import numpy as np
from absl import flags
from flax import nnx

from bench import device
from encode import commandline
from jaxdit import data, sampler, trained

WORKDIR = flags.DEFINE_string("workdir", None, "A trained model and its data.", required=True)
IMAGES = flags.DEFINE_integer("images", 6, "Pictures drawn.")
EVALUATIONS, SCALES = (6, 8, 12, 16, 24, 32), ((1.0, 1.0), (1.5, 1.2), (4.0, 1.5), (2.5, 2.5))


def dpm(velocity, x: np.ndarray, times: np.ndarray) -> np.ndarray:
    """DPM-Solver++(2M) on x_t = (1 - t) x0 + t noise; first order where the logarithm of the ratio is infinite."""
    past, before = None, None

    def log_ratio(t):
        return np.log((1 - t) / t)

    for t, following in itertools.pairwise(times):
        v = velocity(x, t)
        clean = x - t * v
        x = x + (following - t) * v
        if past is not None and before < 1 and following > 0:
            h, h_before = log_ratio(following) - log_ratio(t), log_ratio(t) - log_ratio(before)
            x = x - (1 - following) * np.expm1(-h) * h / (2 * h_before) * (clean - past)
        past, before = clean, t
    return x


def main() -> int:
    run = trained.load(commandline.path_of(WORKDIR.value))
    dataset = data.Dataset(run.config["data"]["path"])
    bucket = max(dataset.buckets, key=lambda name: len(dataset.index[name]))
    records = dataset.records(bucket, range(IMAGES.value))
    others = records[IMAGES.value // 2 :] + records[: IMAGES.value // 2]
    conditions = trained.conditions_of([r["text"] for r in records], [r["vision"] for r in others], run)
    seeds = np.arange(IMAGES.value, dtype=np.uint32)
    shape = tuple(run.dataset["buckets"][bucket]["latent"])
    noise = np.asarray(sampler.initial_noise(seeds, np.zeros(IMAGES.value, np.int32), shape))
    shift = run.config["sample"]["shift"]

    @partial(jax.jit, static_argnames="terms")
    def drawn(params, table, weights, terms):
        model = nnx.merge(run.graph, params)
        return sampler.advance(model, sampler.start(noise), conditions, table=table, terms=terms, weights=weights)[1]

    @partial(jax.jit, static_argnames="terms")
    def velocity(params, x, t, weights, terms):
        model = nnx.merge(run.graph, params)
        return sampler.guided_velocity(model, x, t, conditions, terms=terms, weights=weights)

    table = {}
    for text, vision in SCALES:
        weights = np.broadcast_to(sampler.guidance_weights(text, vision), (3, IMAGES.value))
        terms = sampler.needed_terms(weights)

        def draw(solver, steps, weights=weights, terms=terms):
            rows = sampler.solver_table(solver, sampler.time_grid(steps, shift))
            return np.asarray(drawn(run.params, rows, weights, terms))

        def at(x, t, weights=weights, terms=terms):
            return np.asarray(velocity(run.params, x, np.float32(t), weights, terms))

        exact = draw("heun", 128)
        for count in EVALUATIONS:
            found = {
                "euler": draw("euler", count),
                "heun": draw("heun", (count + 1) // 2),
                "adams": draw("adams", count),
                "DPM-Solver++(2M)": dpm(at, noise, sampler.time_grid(count, shift)),
            }
            errors = {name: round(float(np.sqrt(np.mean((x - exact) ** 2))), 4) for name, x in found.items()}
            table[f"text {text:g}, vision {vision:g}, {count} evaluations"] = errors
            print(text, vision, count, errors, flush=True)
    result = {
        "device": device.processor(),
        "command": f"python -m bench.solvers --workdir={Path(WORKDIR.value).name} --images={IMAGES.value}",
        "model": {name: run.config["model"][name] for name in ("layers", "width")} | {"step": run.step, "shift": shift},
        "error by solver": table,
    }
    device.write("solvers", device.processor(), result)
    return 0


if __name__ == "__main__":
    commandline.run(main)
