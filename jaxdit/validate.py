"""python -m jaxdit.validate --workdir=DIR --out=DIR: the gate that a nano run must pass before the big one.

The model draws every training image from its caption and vector, from its caption alone, from its caption with another
image's vector, and with an exchanged caption; `judge.py` says what must come. Images, noise, solver and weights are the same
at every call. OUT/gate.json holds every number, gate.html shows the pictures that decided, worst first. Exit code 0 pass,
1 fail, 2 could not run or could not be judged, 3 stopped.
"""

from __future__ import annotations

import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch's encoders need room on the same card

import hashlib
import json
import logging
import platform
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from encode import commandline
from encode.records import InputError
from encode.whole_files import write_json
from jaxdit import advice, data, gate_page, judge, judged_images, mesh, model, origin, trained, update

IMAGES, BATCH, GRADIENT_IMAGES = 100, 20, 32
# Unguided: what the model itself has learnt.
SAMPLING = {"solver": "euler", "steps": 12, "guidance": [1.0, 1.0], "seed": 0}
STILL = 1e-4  # relative change of a projection's parameters below which it has not moved


def gather(dataset: data.Dataset, run: trained.Trained, vae: Any) -> list[judge.Example]:
    """At most 100 images of the training data, spread evenly; see `judged_images.gather`."""
    return judged_images.gather(dataset, run, vae, judged_images.spread(dataset.train, IMAGES))


def draw_all(
    run: trained.Trained,
    vae: Any,
    examples: Sequence[judge.Example],
    texts: list,
    visions: list,
    vision_encoder: Any = None,
) -> judge.Drawn:
    """A picture for each example's shape from the given conditions (None is an absent one), and what the encoder sees."""
    pictures: list[Any] = [None] * len(examples)
    latents = np.zeros((len(examples), *judged_images.common_shape(run), run.dataset["widths"]["latent"]), np.float32)
    for bucket in sorted({example.bucket for example in examples}):
        members = [i for i, example in enumerate(examples) if example.bucket == bucket]
        for start in range(0, len(members), BATCH):
            part = members[start : start + BATCH]
            filled = part + part[:1] * (BATCH - len(part))  # one batch size, one compilation
            drawn = trained.generate(
                run,
                trained.conditions_of([texts[i] for i in filled], [visions[i] for i in filled], run),
                run.dataset["buckets"][bucket]["latent"],
                filled,
                seed=SAMPLING["seed"],
                steps=SAMPLING["steps"],
                solver=SAMPLING["solver"],
                shift=run.config["sample"]["shift"],
                text=SAMPLING["guidance"][0],
                vision=SAMPLING["guidance"][1],
            )[: len(part)]
            for i, found in zip(part, drawn):
                record = examples[i].record
                outside = judged_images.padding(record, found.shape)
                found[outside] = record["latent"].astype(np.float32)[outside]
            latents[part] = judged_images.compared(drawn, run, latents.shape[1:3])
            for i, pixels in zip(part, vae.decode(drawn)):
                pictures[i] = pixels
    return judge.Drawn(pictures, latents, None if vision_encoder is None else vision_encoder.encode(pictures))


def score(run, vae, vision_encoder, examples: Sequence[judge.Example], asked: judge.Questions, rule: str):
    """(numbers, ratios, nexts, drawn) of one set of weights; see `judge.measure`."""
    texts = [example.record["text"] for example in examples]
    visions = [example.record["vision"] for example in examples]
    wanted = {  # texts, vectors, and whether the vision encoder looks at the pictures
        "own": (texts, visions, True),
        "text_only": (texts, [None] * len(texts), False),
        "vision": (texts, [visions[i] for i in asked.pairs], True),
        "text": (asked.exchanged, visions, False),
    }
    if rule == judge.OWN:
        wanted["control"] = (texts, [visions[i] for i in asked.thirds], True)
    drawn, began = {}, time.monotonic()
    for count, (name, (text, vision, seen)) in enumerate(wanted.items(), 1):
        drawn[name] = draw_all(run, vae, examples, text, vision, vision_encoder if seen else None)
        seconds = time.monotonic() - began
        logging.info(
            "Drew %d pictures (%s), %d of %d drawings; %.1f pictures/s, about %.0f s left for these weights.",
            len(examples), name, count, len(wanted), count * len(examples) / seconds, seconds / count * (len(wanted) - count),
        )  # fmt: skip
    logging.info("Judging what was drawn ...")
    return *judge.measure(examples, asked, drawn), drawn


def dead_projections(run: trained.Trained, raw: trained.Trained, dataset: data.Dataset) -> list[list[str]]:
    """Of both sets of weights, the layers of a condition that stand where they started or have no gradient (32 images).

    Weight decay moves a layer that nothing is learnt through: both are asked.
    """
    settings = trained.model_settings(run.config["model"], run.dataset["widths"])
    flow, seed = dict(run.config["flow"]), run.config["train"]["seed"]
    bucket = max(dataset.buckets, key=lambda name: len(dataset.train[name]))
    rows = np.resize(dataset.train[bucket], GRADIENT_IMAGES)
    batch = dataset.read(bucket, rows, np.zeros(len(rows), bool))

    @jax.jit
    def norms(params, batch):
        initial, where = model.initial_parameters(settings, seed), np.zeros(2, np.int32)
        total = update.accumulate_gradients(run.graph, flow, seed, params, update.new_total(params), batch, where)
        trees = total["gradients"], jax.tree.map(jax.numpy.subtract, params, initial), params, initial
        paths = [path for paths in update.CONDITIONING.values() for path in paths]
        return {"/".join(path): [update.norm_of(tree, [path]) for tree in trees] for path in paths}

    found: list[list[str]] = []
    for params in (run.params, raw.params):
        found.append([])
        for name, (gradient, moved, now, then) in jax.device_get(norms(params, batch)).items():
            if not moved > STILL * max(now, then):
                found[-1].append(f"{name} has not moved")
            elif not (gradient > 0 and np.isfinite(gradient)):
                found[-1].append(f"{name} has no gradient")
    return found


def gate(workdir: str | Path, out: str | Path, data_path: str | Path | None = None) -> dict[str, Any]:
    """Judge the averaged and the raw weights, and write out/gate.json and out/gate.html.

    Args:
      workdir: working folder of a training run.
      out: folder of the verdict.
      data_path: OUT/RES to judge on; by default that of the training.

    Returns:
      What gate.json holds; "verdict" is "pass", "fail" or "incomplete" (cannot be judged), and it judges the averaged weights.

    Raises:
      InputError: nothing trained yet, or data that were encoded in another way.
    """
    from encode import demo, encoders

    began = time.monotonic()
    averaged = trained.load(workdir)
    raw = trained.load(workdir, step=averaged.step, raw=True)  # now: a training beside this removes them
    dataset = judged_images.open_data(averaged.config, averaged.dataset, data_path)
    judged_images.refuse_other_data(workdir, averaged, dataset)
    vae = encoders.load_vae(dataset.info["encoders"]["vae"])
    vision_encoder = judged_images.load_vision(dataset)
    examples = gather(dataset, averaged, vae)
    rule = judge.GENERATED if {e.record["caption"].decode() for e in examples} <= demo.captions() else judge.OWN
    asked = judge.questions(examples) if len(examples) >= judge.FEWEST else None
    result = {
        "verdict": "incomplete",
        "failed": [],
        "advice": [],
        "rule": rule,
        "step": averaged.step,
        "total_steps": averaged.config["train"]["total_steps"],
        "images": len(examples),
        "exchange": asked.by if asked else "",
    }
    record = describe(averaged, dataset, examples) | {
        "thresholds": judge.THRESHOLDS | {"smallest_effect": judge.SMALLEST_EFFECT}
    }
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    if not os.access(out, os.W_OK):
        raise InputError(f"{out}: this folder cannot be written into; name another with --out.")
    shown: tuple[Any, ...] = ()
    if reason := judge.cannot(examples, asked):
        result |= {"reason": f"{dataset.path}: {reason}"} | record
    else:
        logging.info("The gate: step %d on %d images.", averaged.step, len(examples))
        found, shown = _verdict(averaged, raw, dataset, vae, vision_encoder, examples, asked, rule)
        result = rounded(result | found | record | {"seconds": round(time.monotonic() - began, 1)})
        failed = f" ({', '.join(result['failed'])})" if result["failed"] else ""
        logging.info("Judged: %s%s.", result["verdict"], failed)
    write_json(out / "gate.json", result)
    gate_page.write(out, result, *shown)
    return result


def _verdict(averaged, raw, dataset, vae, vision_encoder, examples, asked, rule):
    """(what gate.json says of the averaged and the raw weights, what the page shows of the averaged ones)."""
    numbers, ratios, nexts, drawn = score(averaged, vae, vision_encoder, examples, asked, rule)
    logging.info("The averaged weights are judged; now the raw ones.")
    raw_numbers = score(raw, vae, vision_encoder, examples, asked, rule)[0]
    dead, raw_dead = dead_projections(averaged, raw, dataset)
    known = vision_encoder is not None
    checks = judge.checks(numbers, dead, rule, encoder=known)
    raw_checks = judge.checks(raw_numbers, raw_dead, rule, encoder=known)
    failed = [name for name, check in checks.items() if not check["passed"]]
    found = {
        "verdict": "fail" if failed else "pass",
        "failed": failed,
        "checks": checks,
        "raw_checks": raw_checks,
        "advice": advice.words(checks, raw_checks, numbers, averaged.config),
        "averaged": numbers,
        "raw": raw_numbers,
        "weights": {"averaged": fingerprint(averaged.params), "raw": fingerprint(raw.params)},
        "examples": listed(examples, asked, ratios),
    }
    return found, (examples, asked, drawn, ratios, nexts)


def describe(run: trained.Trained, dataset: data.Dataset, examples: Sequence[judge.Example]) -> dict[str, Any]:
    """What was judged, and how: enough to do it again."""
    hashes = [example.record["pixel_hash"].decode() for example in examples]
    content = json.dumps([dataset.info["fingerprint"], hashes], sort_keys=True)
    return {
        "command": commandline.command("jaxdit.validate", sys.argv[1:]),
        "sampling": SAMPLING | {"shift": run.config["sample"]["shift"]},
        "data": str(dataset.path),
        "data_fingerprint": hashlib.sha256(content.encode()).hexdigest()[:16],
        "copies": len(hashes) - len(set(hashes)),
        "model": dict(run.config["model"]),
        "model_code": origin.model_code(),  # a big run asks for the same code and the same encoders
        "encoders": origin.encoders(dataset.info),
        "versions": {name: version(name) for name in ("jax", "flax", "numpy")} | {"python": platform.python_version()},
        "device": jax.devices()[0].device_kind,
    }  # fmt: skip


def fingerprint(params: Any) -> str:
    """16 hexadecimal characters of the weights' names and bytes."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()[:16]


def listed(
    examples: Sequence[judge.Example], asked: judge.Questions, ratios: Mapping[str, np.ndarray]
) -> list[dict[str, Any]]:
    """Each image with what was asked of it; `noise` is its place in the seed's noise, ratios below 1 pass."""
    ids = [example.record["id"].decode() for example in examples]
    return [
        {
            "id": ids[i],
            "bucket": example.bucket,
            "caption": example.record["caption"].decode(),
            "pixel_hash": example.record["pixel_hash"].decode(),
            "noise": i,
            "vector_of": ids[asked.pairs[i]],
            "caption_of": "itself, left and right exchanged" if asked.partners[i] < 0 else ids[asked.partners[i]],
            "ratios": {name: None if np.isnan(values[i]) else float(values[i]) for name, values in ratios.items()},
        }
        for i, example in enumerate(examples)
    ]


def rounded(value: Any) -> Any:
    """JSON with four decimals: what is read by people and compared by tests. What is not finite is null, as JSON has it."""
    if isinstance(value, Mapping):
        return {name: rounded(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(part) for part in value]
    if isinstance(value, (float, np.floating)):
        return round(float(value), 4) if np.isfinite(value) else None
    return value


def define_flags() -> None:
    flags.DEFINE_string("workdir", None, "Working folder of a training run.", required=True)
    flags.DEFINE_string("out", None, "Folder for gate.json and gate.html; by default WORKDIR/gate.")
    flags.DEFINE_string("data", None, "Data set OUT/RES to judge on; by default that of the training.")


def main() -> int:
    mesh.keep_programs()
    workdir = commandline.path_of(flags.FLAGS.workdir)
    out = commandline.path_of(flags.FLAGS.out or str(workdir / "gate"))
    try:
        result = gate(workdir, out, flags.FLAGS.data)
    except KeyboardInterrupt:
        print("Stopped.")
        return commandline.STOPPED
    except InputError:
        raise
    except Exception as error:  # Python's own code, 1, would say that the model failed
        if isinstance(error, OSError) and error.errno is not None:
            return commandline.fail(commandline.file_problem(error), 2)
        traceback.print_exc()
        return commandline.fail(
            f"the gate could not judge ({type(error).__name__}); of the model that says nothing.", 2
        )
    print(f"The gate: {result['verdict']}. {gate_page.reached(result)}. Look at {out / 'gate.html'}")
    if "reason" in result:
        print(result["reason"])
    for name in result["failed"]:
        check = result["checks"][name]
        print(f"  {name}: {gate_page.shown(check['value'])}, needed {check['needed']} ({judge.WORDS[name]})")
    for line in result["advice"]:
        print(f"  {line}")
    return {"pass": 0, "fail": 1, "incomplete": 2}[result["verdict"]]


if __name__ == "__main__":
    define_flags()
    commandline.run(main, interrupted=True)
