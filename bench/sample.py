"""Pictures a second: our sampler against the loop that diffusers' users write, the same weights, noise and device.

    .venv/bin/python -m bench.sample [--rounds=5] [--batch=4] [--side=256] [--steps=8]

A model of configs/nano.py's size draws latents under guidance by two conditions, its three evaluations as one batch. The
peer is FlowMatchEulerDiscreteScheduler around torch_dit's DiT, as it is and under torch.compile, with all threads; both
sides take their turn in every round, and their latents must agree. Writes bench/results/sample-DEVICE.json.
"""

from __future__ import annotations

import logging
import os
import statistics
import time
from collections.abc import Callable

import diffusers
import jax
import numpy as np
import torch
from absl import flags

from bench import device
from configs import nano
from encode import commandline
from jaxdit import model, sampler, state_dict, trained
from torch_dit import DiT

ROUNDS = flags.DEFINE_integer("rounds", 5, "Times that each side draws the batch; the median counts.")
BATCH = flags.DEFINE_integer("batch", 4, "Pictures in a batch.")
SIDE = flags.DEFINE_integer("side", 256, "Pixels of a picture's side.")
STEPS = flags.DEFINE_integer("steps", 8, "Euler steps.")
WIDTHS = {"latent": 16, "text": 1024, "vision": 1024}  # Flux, T5-Large, DINOv3 ViT-L
TOKENS, TEXT, VISION, SHIFT = 64, 3.0, 1.5, 3.0
SETTINGS = ("layers", "width", "heads", "patch")


def main() -> int:
    logging.getLogger("torch").setLevel(logging.ERROR)
    load = os.getloadavg()  # of others: nothing of ours runs yet
    options = nano.get_config().model
    settings = trained.model_settings(options, WIDTHS)
    graph, _ = model.abstract(settings)
    params = _moved(jax.jit(lambda: model.initial_parameters(settings, 0))())
    rng, shape = np.random.default_rng(0), (SIDE.value // 8, SIDE.value // 8, WIDTHS["latent"])
    conditions = {
        "text": rng.standard_normal((BATCH.value, TOKENS, WIDTHS["text"])).astype(np.float32),
        "text_length": rng.integers(8, TOKENS, BATCH.value).astype(np.int32),
        "vision": rng.standard_normal((BATCH.value, WIDTHS["vision"])).astype(np.float32),
    }
    sides = {
        "jaxdit": _ours(graph, params, conditions, shape),
        "diffusers' loop around torch_dit": _theirs(options, params, conditions, shape, compiled=False),
        "the same, torch.compile": _theirs(options, params, conditions, shape, compiled=True),
    }
    latents, left_out = {}, {}
    for name in list(sides):
        try:
            latents[name] = sides[name]()  # compiles
        except Exception as error:  # no C++ compiler, most of the time
            left_out[name] = str(error).splitlines()[0][:200]
            del sides[name]
    for name, found in latents.items():
        error = float(np.sqrt(np.mean((found - latents["jaxdit"]) ** 2)) / latents["jaxdit"].std())
        assert error < (1e-3 if settings["dtype"] == "float32" else 5e-2), f"{name} draws other pictures: {error:.2g}"
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(ROUNDS.value):
        for name in sorted(sides, reverse=bool(number % 2)):
            began = time.perf_counter()
            sides[name]()
            seconds[name].append(time.perf_counter() - began)
    where = _where()
    result = {
        "device": f"{where}, {torch.get_num_threads()} threads, {settings['dtype']}",
        "load before (1, 5, 15 minutes)": [round(value, 2) for value in load],
        "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", ""),
        "versions": {"jax": jax.__version__, "torch": torch.__version__, "diffusers": diffusers.__version__},
        "command": f"python -m bench.sample --rounds={ROUNDS.value} --batch={BATCH.value} --side={SIDE.value} "
        f"--steps={STEPS.value}",
        "model": {name: options[name] for name in SETTINGS} | {"parameters": model.count_parameters(params)},
        "work": f"{BATCH.value} pictures of {SIDE.value}x{SIDE.value}, {STEPS.value} Euler steps of three evaluations each",
        "pictures a second (median round)": {
            name: round(BATCH.value / statistics.median(times), 4) for name, times in seconds.items()
        },
        "seconds of each round": {name: [round(value, 3) for value in times] for name, times in seconds.items()},
    } | ({"left out": left_out} if left_out else {})
    device.write("sample", where, result)
    return 0


def _where() -> str:
    return device.processor() if jax.default_backend() == "cpu" else jax.devices()[0].device_kind


def _moved(params):
    """Away from zero: a model that was never trained adds nothing of its blocks."""
    keys = iter(jax.random.split(jax.random.key(1), 1000))
    return jax.tree.map(lambda leaf: leaf + 0.02 * jax.random.normal(next(keys), leaf.shape), params)


def _ours(graph, params, conditions, shape) -> Callable[[], np.ndarray]:
    dataset = {"latent_mean": [0.0] * shape[-1], "latent_std": [1.0] * shape[-1]}
    run = trained.Trained({}, dataset, graph, params, 0)

    def draw() -> np.ndarray:
        return trained.generate(
            run, conditions, shape, [0] * BATCH.value, seed=range(BATCH.value), steps=STEPS.value, shift=SHIFT,
            text=TEXT, vision=VISION,
        )  # fmt: skip

    return draw


def _theirs(options, params, conditions, shape, *, compiled: bool) -> Callable[[], np.ndarray]:
    """The loop as one writes it: conditions repeated, scheduler.step, guidance by hand."""
    on = "cpu" if jax.default_backend() == "cpu" else "cuda"
    module = DiT(
        **{name: options[name] for name in SETTINGS},
        channels=WIDTHS["latent"], text_width=WIDTHS["text"], vision_width=WIDTHS["vision"],
    )  # fmt: skip
    module.load_state_dict({name: torch.from_numpy(value) for name, value in state_dict.to_state_dict(params).items()})
    module = module.eval().to(on)
    forward = torch.compile(module) if compiled else module
    seeds = np.arange(BATCH.value, dtype=np.uint32)
    noise = torch.tensor(np.asarray(sampler.initial_noise(seeds, np.zeros_like(seeds, np.int32), shape))).to(on)
    text, length, vision = (torch.tensor(value).to(on) for value in conditions.values())
    drop_text, drop_vision = (
        torch.tensor(drops).repeat_interleave(BATCH.value).to(on) for drops in zip(*sampler.TERMS)
    )

    @torch.inference_mode()
    def draw() -> np.ndarray:
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=SHIFT)
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / STEPS.value, STEPS.value), device=on)
        x = noise.permute(0, 3, 1, 2).contiguous()
        texts, lengths, visions = text.repeat(3, 1, 1), length.repeat(3), vision.repeat(3, 1)
        for t in scheduler.timesteps:
            times = (t / 1000).expand(3 * BATCH.value)
            with torch.autocast(on, torch.bfloat16, enabled=on == "cuda"):
                v = forward(x.repeat(3, 1, 1, 1), times, texts, lengths, visions, drop_text, drop_vision)
            none, seen, both = v.float().chunk(3)
            x = scheduler.step(none + VISION * (seen - none) + TEXT * (both - seen), t, x).prev_sample
        return x.permute(0, 2, 3, 1).cpu().numpy()

    return draw


if __name__ == "__main__":
    commandline.run(main)
