"""What a run's previews show: chosen once, kept in WORKDIR/previews (previews.json, conditions.npz), read back ever after.

By default images of the data set, held-out ones where there are any, spread over its fullest buckets: captions with their own
image's vector, with another's, and one of both alone. Or a person's own sentences and references, encoded as the data set was.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from encode import commandline
from encode.records import InputError
from encode.whole_files import whole_file, write_json
from jaxdit import data, decode_previews, trained
from jaxdit.orbax_log import first_line

MOST_BUCKETS = 3  # each shape of picture is one program to compile
CONDITIONS = ("text", "text_length", "vision", "drop_text", "drop_vision")


@dataclass(frozen=True)
class FixedSet:
    """What is drawn: a row of previews.json a picture, its bucket (WIDTHxHEIGHT), and the conditions of all pictures."""

    pictures: Sequence[Mapping[str, str]]
    buckets: Sequence[str]
    conditions: Mapping[str, np.ndarray]


def read(folder: Path, info: Mapping[str, Any], config: Any) -> FixedSet | None:
    """The set that this run began with; None where there is none."""
    if not (folder / "previews.json").exists():
        return None
    try:
        pictures = json.loads((folder / "previews.json").read_text(encoding="utf-8"))
        with np.load(folder / "conditions.npz", allow_pickle=False) as stored:
            arrays = dict(stored)
        buckets, run, asked = arrays["bucket"].tolist(), str(arrays["run"]), str(arrays["asked"])
        drawn = str(arrays["drawn"]) if "drawn" in arrays else _drawn(config)
        fixed = FixedSet(pictures, buckets, {name: arrays[name] for name in CONDITIONS})
        if {len(pictures)} != {len(values) for values in (buckets, *fixed.conditions.values())}:
            raise ValueError("previews.json and conditions.npz differ in length")
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        logging.warning("Previews: %s cannot be read (%s); they are chosen anew.", folder, first_line(error))
        return None
    told = _run(info), _run(info, buckets=sorted(info["buckets"]))  # the latter until November 2026
    if run not in told:  # left by a run that was given up before its first step
        return None
    if asked != _asked(config):
        logging.warning(
            "Previews: sample.previews, prompts or references have changed since this run began; its pictures stay what they "
            "were, so that they can be compared. Remove %s to choose anew.", folder / "previews.json",
        )  # fmt: skip
    if drawn != _drawn(config):
        logging.warning(
            "Previews: they were drawn with %s, now it is %s: what differs from now on is not what the model has learnt alone.",
            drawn, _drawn(config),
        )  # fmt: skip
    return fixed


def choose(folder: Path, dataset: data.Dataset, config: Any) -> FixedSet:
    """Choose what is drawn, and keep it; previews.json, written last, says that both files are there."""
    prompts, references = asked_for(config)
    given = len(prompts) or (len(references) if len(references) > 1 else 0)
    places = _places(dataset, given or config.sample.previews)
    rows = [dataset.records(bucket, [row])[0] for bucket, row, _ in places]
    if prompts or references:
        own = _encode(folder, prompts, references)
        chosen = [_own_picture(k, places, rows, prompts, references, own) for k in range(given or len(places))]
    else:
        chosen = [_picture(k, places, rows) for k in range(len(places))]
    description = trained.Trained(config, dataset.info, None, None, 0)
    fixed = FixedSet(
        [{"name": f"{k:02d}", **picture} for k, (picture, _, _) in enumerate(chosen)],
        [places[k % len(places)][0] for k in range(len(chosen))],
        trained.conditions_of([text for _, text, _ in chosen], [vision for _, _, vision in chosen], description),
    )
    with whole_file(folder / "conditions.npz") as temporary, open(temporary, "wb") as file:
        words = {"bucket": fixed.buckets, "run": _run(dataset.info), "asked": _asked(config), "drawn": _drawn(config)}
        np.savez_compressed(
            file, **fixed.conditions, **{name: np.array(value, np.str_) for name, value in words.items()}
        )
    write_json(folder / "previews.json", fixed.pictures)
    return fixed


def _places(dataset: data.Dataset, count: int) -> list[tuple[str, int, str]]:
    """Up to `count` images [(bucket, row, "held-out" or "training")], spread over the fullest buckets and their rows.

    Held-out ones, which the model has never seen, as far as there are any; neighbours come from different buckets.
    """
    sizes = {name: (len(dataset.held_out[name]), len(dataset.train[name])) for name in dataset.buckets}
    fullest = sorted(sizes, key=lambda name: sizes[name], reverse=True)[:MOST_BUCKETS]
    chosen = []
    for rows, kind in ((dataset.held_out, "held-out"), (dataset.train, "training")):
        images = [(name, int(row), kind) for name in fullest for row in rows[name]]
        wanted = min(count - len(chosen), len(images))
        chosen += [images[(2 * k + 1) * len(images) // (2 * wanted)] for k in range(wanted)]
    before = [sum(other[0] == place[0] for other in chosen[:k]) for k, place in enumerate(chosen)]
    return [chosen[k] for k in sorted(range(len(chosen)), key=lambda k: (before[k], k))]


def _picture(k: int, places, rows) -> tuple[dict[str, str], np.ndarray | None, np.ndarray | None]:
    """Picture k of the default set: (row of previews.json, text, vision).

    In turn a caption with its own image's vector and with another's; of four or more, the last two have one of both alone.
    """
    count, kind, record = len(places), places[k][2], rows[k]
    name, caption = record["id"].decode(), record["caption"].decode()
    alone = k - (count - 2) if count >= 4 else -1
    if alone == 0:
        note = f"the caption of {kind} image {name} alone"
        return {"prompt": caption, "reference": "", "note": note}, record["text"], None
    if alone == 1:
        note = f"the vector of {kind} image {name} alone"
        return {"prompt": "", "reference": name, "note": note}, None, record["vision"]
    if k % 2 == 0:
        note = f"{kind} image {name} with its own vector"
        return {"prompt": caption, "reference": name, "note": note}, record["text"], record["vision"]
    other = (k + count // 2) % count
    another = rows[other]["id"].decode()
    note = f"the caption of {kind} image {name} with the vector of {places[other][2]} image {another}"
    return {"prompt": caption, "reference": another, "note": note}, record["text"], rows[other]["vision"]


def _own_picture(k: int, places, rows, prompts, references, own):
    """Picture k where sentences or references are a person's own; what they leave open comes from the data set."""
    place, record = places[k % len(places)], rows[k % len(places)]
    name = record["id"].decode()
    prompt, text, vision, reference = record["caption"].decode(), record["text"], record["vision"], name
    notes = [f"the caption of {place[2]} image {name}", f"the vector of {place[2]} image {name}"]
    if prompts:
        prompt, text, notes[0] = prompts[k], own[f"text_{k}"], "a sentence of your own"
    if references:
        number = k if len(references) > 1 else 0
        # A file's name may be any bytes, previews.json is UTF-8.
        reference = os.fsencode(references[number]).decode(errors="replace")
        vision, notes[1] = own[f"vision_{number}"], "a reference of your own"
    return {"prompt": prompt, "reference": reference, "note": " with ".join(notes)}, text, vision


def asked_for(config: Any) -> tuple[list[str], list[str]]:
    """The person's own sentences and references, or an InputError that names what is wrong."""
    prompts, references = [prompt.strip() for prompt in config.sample.prompts], list(config.sample.references)
    for number, prompt in enumerate(prompts):
        if not prompt or any("\ud800" <= letter <= "\udfff" for letter in prompt):
            wrong = "is not UTF-8; set the terminal to UTF-8" if prompt else "is empty"
            raise InputError(f"sample.prompts: sentence {number + 1}, {prompt!a}, {wrong}.")
    if len(references) > 1 and prompts and len(references) != len(prompts):
        raise InputError(
            f"sample.prompts has {len(prompts)} sentences and sample.references {len(references)} pictures: give one picture "
            "for all, or one a sentence."
        )
    for reference in references:
        if not commandline.path_of(reference).is_file():
            raise InputError(f"sample.references: {reference}: there is no such file.")
    wanted = max(len(prompts), len(references))
    if wanted > config.sample.previews:
        raise InputError(
            f"sample.prompts and sample.references make {wanted} pictures, but sample.previews={config.sample.previews}; "
            f"set --config.sample.previews={wanted}."
        )
    return prompts, references


def _encode(folder: Path, prompts: Sequence[str], references: Sequence[str]) -> dict[str, np.ndarray]:
    """text_K and vision_K, see `decode_previews.encode`, made in a child process that sees no GPU."""
    logging.info(
        "Encoding %d sentences and %d references of sample.prompts and sample.references on the CPU; loading the encoders "
        "can take a minute.", len(prompts), len(references),
    )  # fmt: skip
    done = subprocess.run(
        [*decode_previews.command(folder.parent), "--encode"],
        input=json.dumps({"prompts": prompts, "references": references}),
        capture_output=True,
        text=True,
        env=decode_previews.without_gpu(),
    )
    if done.returncode:
        words = decode_previews.last_line(done.stderr) or f"the encoding process ended with code {done.returncode}"
        raise InputError(words if words.startswith("sample.") else f"sample.prompts, sample.references: {words}")
    path = folder / decode_previews.ENCODED
    with np.load(path, allow_pickle=False) as found:
        encoded = dict(found)
    path.unlink()
    for number in encoded.pop("cut"):
        logging.warning(
            "sample.prompts: sentence %d is longer than the text encoder takes; its end is cut.", number + 1
        )
    return encoded


def _run(info: Mapping[str, Any], **more: Any) -> str:
    """What is fixed for the life of a working folder, growth of the data included, which may bring a bucket."""
    fixed = {name: info[name] for name in ("fingerprint", "widths", "latent_mean", "latent_std")}
    return hashlib.sha256(json.dumps(fixed | more, sort_keys=True).encode()).hexdigest()


def _drawn(config: Any) -> str:
    names = ("steps", "text_guidance", "vision_guidance", "shift")
    return ", ".join(f"sample.{name}={config.sample[name]:g}" for name in names)


def _asked(config: Any) -> str:
    sample = config.sample
    return json.dumps([sample.previews, list(sample.prompts), list(sample.references)])
