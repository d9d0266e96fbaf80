"""python -m jaxdit.validate --workdir=DIR --out=DIR: the gate, three checks that a nano run must pass before the big one.

memory: with its own caption and vector, an image comes back (nearest to itself among all); with its caption alone, its
composition does. vision: the caption of A with the vector of B gives A's composition in B's light. text: the caption with
left and right exchanged gives the mirrored composition. Composition is standardised luminance, light the mean colour in
OKLab: neither uses the encoders that the model was trained with. Exit code 0 pass, 1 fail, 2 could not run.
"""

from __future__ import annotations

import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch's encoders need room on the same card

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from encode import commandline
from encode.records import InputError, write_json
from jaxdit import data, origin, report, trained

THRESHOLDS = {"memory": 0.95, "memory_text_only": 0.80, "vision_light": 0.80, "vision_composition": 0.80, "text": 0.80}
IMAGES, BATCH, SIDE, STEPS = 100, 20, 32, 12
FEWEST_SIDES = 20  # captions with a side needed for the left/right exchange; with fewer, whole captions are exchanged
SHOWN = 8


@dataclass
class Example:
    """One image of the gate: its record, its pixels as the decoder gives them back, and those of its flip."""

    record: dict[str, Any]
    bucket: str
    pixels: np.ndarray
    flipped: np.ndarray


def composition(pixels: np.ndarray) -> np.ndarray:
    """What stands where, whatever the light: [1024] standardised luminance of the picture at 32 x 32.

    Args:
      pixels: [height, width, 3] uint8.
    """
    from PIL import Image

    grey = np.asarray(Image.fromarray(pixels).convert("L").resize((SIDE, SIDE), Image.Resampling.BOX), np.float32)
    grey -= grey.mean()
    return (grey / max(float(grey.std()), 1e-3)).ravel()


def light(pixels: np.ndarray) -> np.ndarray:
    """How it feels, wherever things stand: [3] mean lightness and colour (OKLab) of a [height, width, 3] uint8 picture."""
    from encode.demo_encoders import oklab

    return oklab(pixels).reshape(-1, 3).mean(0)


def own_is_nearest(queries: Sequence[np.ndarray], keys: Sequence[np.ndarray]) -> np.ndarray:
    """[queries] bool: no key is nearer (Euclidean) than the one at the query's own place; an exact copy of it may be."""
    keys = np.stack(keys)
    distance = np.stack([np.linalg.norm(keys - query, axis=1) for query in queries])
    return np.diagonal(distance) <= distance.min(1)


def closer(queries: Sequence[np.ndarray], wanted: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> np.ndarray:
    """[queries] bool: nearer to the wanted one than to the other one."""
    return np.array([np.linalg.norm(q - w) < np.linalg.norm(q - o) for q, w, o in zip(queries, wanted, other)])


def partners(examples: Sequence[Example]) -> list[int]:
    """For each image another one whose light is clearly different: a rotation of the order of their light by half."""
    lights = np.stack([light(example.pixels) for example in examples])
    centred = lights - lights.mean(0)
    order = np.argsort(centred @ np.linalg.svd(centred, full_matrices=False)[2][0], kind="stable")
    place = np.argsort(order)
    return [int(order[(place[i] + len(order) // 2) % len(order)]) for i in range(len(order))]


def gather(dataset: data.Dataset, vae: Any) -> list[Example]:
    """At most 100 images of the training data, spread evenly, decoded from their latents."""
    places = [(name, int(row)) for name in dataset.buckets for row in dataset.train[name]]
    step = max(len(places) / IMAGES, 1)
    examples = []
    for name, row in [places[int(k * step)] for k in range(min(IMAGES, len(places)))]:
        record = dataset.records(name, [row])[0]
        pixels = vae.decode(np.stack([record["latent"], record["latent_flip"]]).astype(np.float32))
        examples.append(Example(record, name, *pixels))
    return examples


def draw_all(run: trained.Trained, vae: Any, examples: Sequence[Example], texts: list, visions: list) -> list:
    """A picture for each example's shape from the given conditions, unguided: what the model itself has learned."""
    pictures: list[Any] = [None] * len(examples)
    for bucket in sorted({example.bucket for example in examples}):
        members = [i for i, example in enumerate(examples) if example.bucket == bucket]
        for start in range(0, len(members), BATCH):
            part = members[start : start + BATCH]
            filled = part + part[:1] * (BATCH - len(part))  # one batch size, one compilation
            latents = trained.generate(
                run,
                trained.conditions_of([texts[i] for i in filled], [visions[i] for i in filled], run),
                run.dataset["buckets"][bucket]["latent"],
                filled,
                seed=0,
                steps=STEPS,
                shift=run.config["sample"]["shift"],
                text=1.0,
                vision=1.0,
            )
            for i, pixels in zip(part, vae.decode(latents[: len(part)])):
                pictures[i] = pixels
    return pictures


def run_checks(
    examples: Sequence[Example], draw: Callable[[list, list], list]
) -> tuple[dict[str, Any], dict[str, list]]:
    """The three checks.

    Args:
      examples: the images.
      draw: (texts, visions) -> one picture an example; None is an absent condition.

    Returns:
      (shares of the images that pass each part, and how they were judged; the pictures drawn).
    """
    texts = [example.record["text"] for example in examples]
    visions = [example.record["vision"] for example in examples]
    originals = [example.pixels for example in examples]
    compositions = [composition(pixels) for pixels in originals]
    lights = [light(pixels) for pixels in originals]
    other = partners(examples)

    pictures = {"own": draw(texts, visions), "text_only": draw(texts, [None] * len(texts))}
    small = [_small(pixels) for pixels in originals]
    result: dict[str, Any] = {
        "memory": own_is_nearest([_small(p) for p in pictures["own"]], small).mean(),
        "memory_text_only": own_is_nearest([composition(p) for p in pictures["text_only"]], compositions).mean(),
        "psnr": float(np.mean([_psnr(p, q) for p, q in zip(pictures["own"], originals)])),
    }

    pictures["vision"] = draw(texts, [visions[i] for i in other])
    drawn = [composition(p) for p in pictures["vision"]]
    result["vision_light"] = closer([light(p) for p in pictures["vision"]], [lights[i] for i in other], lights).mean()
    result["vision_composition"] = closer(drawn, compositions, [compositions[i] for i in other]).mean()

    sided = [i for i, example in enumerate(examples) if len(example.record["text_flip"])]
    if len(sided) >= FEWEST_SIDES:
        result["text_by"] = f"left and right exchanged in {len(sided)} captions"
        swapped = [example.record["text_flip"] if i in set(sided) else texts[i] for i, example in enumerate(examples)]
        wanted = [composition(example.flipped) for example in examples]
    else:
        result["text_by"] = f"whole captions exchanged, because only {len(sided)} name a side"
        sided = list(range(len(examples)))
        swapped, wanted = [texts[i] for i in other], [compositions[i] for i in other]
    pictures["text"] = draw(swapped, visions)
    followed = closer([composition(p) for p in pictures["text"]], wanted, compositions)
    result["text"] = followed[sided].mean()
    pictures["partner"] = [originals[i] for i in other]
    return {name: round(float(v), 4) if not isinstance(v, str) else v for name, v in result.items()}, pictures


def gate(workdir: str | Path, out: str | Path, data_path: str | Path | None = None) -> dict[str, Any]:
    """Run the checks on the averaged and on the raw weights, and write out/gate.json and out/gate.html.

    Args:
      workdir: working folder of a training run.
      out: folder of the verdict.
      data_path: OUT/RES to judge on; by default that of the training.

    Returns:
      What gate.json holds; "verdict" is "pass", "fail" or "incomplete" (too few images), and it judges the averaged weights.

    Raises:
      InputError: nothing trained yet, or data that were encoded in another way.
    """
    from encode import encoders

    began = time.monotonic()
    averaged = trained.load(workdir)
    options = averaged.config["data"]
    dataset = data.Dataset(data_path or options["path"], holdout_fraction=options["holdout_fraction"])
    if dataset.info["fingerprint"] != averaged.dataset["fingerprint"]:
        raise InputError(
            f"{dataset.path} was encoded in another way than the data of {workdir}; judge on data of its kind."
        )
    shapes = {name: info["latent"] for name, info in averaged.dataset["buckets"].items()}
    for name, info in dataset.info["buckets"].items():
        if shapes.get(name) != info["latent"]:
            raise InputError(
                f"{dataset.path} has a bucket {name} that the data of {workdir} have not ({', '.join(shapes)}); judge on data "
                "of the same resolution."
            )
    vae = encoders.load_vae(dataset.info["encoders"]["vae"])
    examples = gather(dataset, vae)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    if len(examples) < 2:
        reason = f"{dataset.path} has {len(examples)} image to train on; the gate needs at least 2, better 100."
        write_json(out / "gate.json", {"verdict": "incomplete", "reason": reason, "step": averaged.step})
        body = f"<p class='verdict'>incomplete</p><p>{report.escape(reason)}</p>"
        (out / "gate.html").write_text(report.page("The gate", body), encoding="utf-8")
        return {"verdict": "incomplete", "failed": [reason]}
    logging.info("The gate: step %d on %d images.", averaged.step, len(examples))
    checks, pictures = run_checks(
        examples, lambda texts, visions: draw_all(averaged, vae, examples, texts, visions)
    )  # fmt: skip
    logging.info("Averaged weights: %s", checks)
    raw = trained.load(workdir, step=averaged.step, raw=True)
    raw_checks, _ = run_checks(examples, lambda texts, visions: draw_all(raw, vae, examples, texts, visions))
    logging.info("Raw weights: %s", raw_checks)
    failed = [name for name, threshold in THRESHOLDS.items() if checks[name] < threshold]
    result = {
        "verdict": "fail" if failed else "pass",
        "failed": failed,
        "step": averaged.step,
        "images": len(examples),
        "thresholds": THRESHOLDS,
        "averaged": checks,
        "raw": raw_checks,
        "sampling": {"steps": STEPS, "shift": averaged.config["sample"]["shift"], "guidance": [1.0, 1.0]},
        "data": str(dataset.path),
        "model_code": origin.model_code(),  # a big run asks for the same code and the same encoders
        "encoders": origin.encoders(dataset.info),
        "seconds": round(time.monotonic() - began, 1),
    }
    (out / "gate.html").write_text(report.page("The gate", section(result, examples, pictures)), encoding="utf-8")
    write_json(out / "gate.json", result)
    return result


def section(result: dict[str, Any], examples: Sequence[Example], pictures: dict[str, list]) -> str:
    """The gate's verdict and pictures as a piece of HTML."""
    names = {
        "memory": "its own image comes back from caption and vector",
        "memory_text_only": "its own composition comes back from the caption alone",
        "vision_light": "the light follows the vector of another image",
        "vision_composition": "the composition stays with the caption",
        "text": "the composition follows the exchanged caption",
    }
    rows = [
        [
            words,
            f"{result['averaged'][name]:.0%}",
            f"{threshold:.0%}",
            f"{result['raw'][name]:.0%}",
            "pass" if result["averaged"][name] >= threshold else "FAIL",
        ]
        for (name, words), threshold in zip(names.items(), THRESHOLDS.values())
    ]
    table = report.table(["check", "averaged weights", "needed", "raw weights", "verdict"], rows)
    shown = [round(k * (len(examples) - 1) / (SHOWN - 1)) for k in range(SHOWN)] if len(examples) >= SHOWN else range(
        len(examples)
    )  # fmt: skip
    strips = []
    for i in shown:
        example = examples[i]
        strips.append(
            report.strip(
                example.record["caption"].decode(),
                [
                    ("the image", example.pixels),
                    ("caption + vector", pictures["own"][i]),
                    ("caption alone", pictures["text_only"][i]),
                    ("light wanted", pictures["partner"][i]),
                    ("caption in that light", pictures["vision"][i]),
                    ("mirror image", example.flipped),
                    ("exchanged caption", pictures["text"][i]),
                ],
            )
        )
    head = (
        f"<p class='verdict {result['verdict']}'>{result['verdict']}</p><p>Step {result['step']:,}, {result['images']} "
        f"images, PSNR of the memory {result['averaged']['psnr']:.1f} dB (raw {result['raw']['psnr']:.1f} dB). Text check: "
        f"{report.escape(result['averaged']['text_by'])}.</p>"
    )
    return head + table + "".join(strips)


def _small(pixels: np.ndarray) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BOX), np.float32).ravel() / 255


def _psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(-10 * np.log10(np.mean((a.astype(np.float32) - b) ** 2) / 255**2 + 1e-10))


def define_flags() -> None:
    flags.DEFINE_string("workdir", None, "Working folder of a training run.", required=True)
    flags.DEFINE_string("out", None, "Folder for gate.json and gate.html; by default WORKDIR/gate.")
    flags.DEFINE_string("data", None, "Data set OUT/RES to judge on; by default that of the training.")


def main() -> int:
    workdir = commandline.path_of(flags.FLAGS.workdir)
    out = commandline.path_of(flags.FLAGS.out or str(workdir / "gate"))
    result = gate(workdir, out, flags.FLAGS.data)
    words = result["failed"]
    if result["verdict"] == "fail":
        words = [f"{name} {result['averaged'][name]:.0%} of {THRESHOLDS[name]:.0%} needed" for name in words]
    print(
        f"The gate: {result['verdict']}"
        + (f" ({', '.join(words)})" if words else "")
        + f". Look at {out / 'gate.html'}"
    )
    return {"pass": 0, "fail": 1, "incomplete": 2}[result["verdict"]]


if __name__ == "__main__":
    define_flags()
    commandline.run(main)
