"""A working folder: is the configuration possible, and was the folder begun with it and with this data set?"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

from encode.records import InputError, read_json
from encode.whole_files import write_json

FIXED = (
    *("model.layers", "model.width", "model.heads", "model.patch", "model.dtype", "flow", "optim.name"),
    *("train.seed", "train.batch_size", "train.micro_batch"),
    *("train.init_from", "train.init_weights", "train.restore"),
    *("data.holdout_fraction", "data.text_lengths", "data.normalize_vision"),
)

STARTS = ("gate", "init_from", "init_weights", "restore")  # of train: where a run comes from
BRING_BACK = (
    "bring it back from a copy (OUT/RES/dataset.json, where the data have not grown since), or name a new --workdir"
)
WRITTEN = ("dataset.json", "origin.json", "config_history.jsonl")
STATISTICS = ("latent_mean", "latent_std", "latent_count")

POSITIVE = {
    "model": ("layers", "width", "heads", "patch"),
    "flow": ("std", "shift"),
    "optim": ("peak_learning_rate", "eps", "clip_norm"),
    "train": ("total_steps", "batch_size", "micro_batch", "log_every"),
    "checkpoint": ("every", "minutes", "keep"),
    "sample": ("steps", "shift"),
    "metrics": ("watts",),
}


def check(config: Any, devices: int) -> None:
    """Refuse contradictions before anything is touched.

    Raises:
      InputError: names the field, what was found and what is possible.
    """
    c = config
    if "name" not in c.optim:
        raise InputError(
            'optim.name is missing: this configuration is from before there was a choice; add "name": "adamw" to optim.'
        )
    for section, names in POSITIVE.items():
        for name in names:
            if not c[section][name] > 0:
                raise InputError(f"{section}.{name}={c[section][name]} must be above 0.")
    for section in ("flow", "optim", "sample", "metrics"):
        for name, value in c[section].items():
            if isinstance(value, float) and not math.isfinite(value):
                raise InputError(f"{section}.{name}={value} is not a finite number.")
    shares = {name: c.flow[name] for name in ("drop_both", "drop_text", "drop_vision")}
    rules = [
        (bool(c.data.path), "data.path is empty; set --config.data.path=OUT/RES, a folder that encode.main wrote."),
        (
            c.train.batch_size % c.train.micro_batch == 0,
            f"train.batch_size={c.train.batch_size} must be a multiple of train.micro_batch={c.train.micro_batch}.",
        ),
        (
            c.train.micro_batch % devices == 0,
            f"train.micro_batch={c.train.micro_batch} must be divisible by the {devices} devices, whose images at a time "
            f"it counts together; take a multiple of {devices}.",
        ),
        (
            c.model.width % c.model.heads == 0 and (c.model.width // c.model.heads) % 8 == 0,
            f"model.width={c.model.width} over model.heads={c.model.heads}: the head size must be a whole multiple of 8.",
        ),
        (
            c.model.width // c.model.heads <= 128,
            f"model.width={c.model.width} over model.heads={c.model.heads}: the head size may be at most 128.",
        ),
        (
            c.model.scan_unroll == 0 or (c.model.scan_unroll > 0 and c.model.layers % c.model.scan_unroll == 0),
            f"model.scan_unroll={c.model.scan_unroll} must divide model.layers={c.model.layers}, or be 0 (GPU: all).",
        ),
        (c.model.remat in ("none", "block"), f"model.remat={c.model.remat}: choose none or block."),
        (
            min(shares.values()) >= 0 and sum(shares.values()) <= 1,
            f"flow.drop_both, drop_text and drop_vision are {list(shares.values())}: shares of the samples, none may be below 0, "
            "nor all together above 1.",
        ),
        (0 <= c.flow.flip <= 1, f"flow.flip={c.flow.flip} is a probability."),
        (
            0 <= c.flow.get("direction", 0.0) < math.inf,
            f"flow.direction={c.flow.get('direction')}: a weight of 0 (squares alone) or more is wanted.",
        ),
        (0 <= c.data.holdout_fraction < 1, f"data.holdout_fraction={c.data.holdout_fraction} must lie in [0, 1)."),
        (
            all(isinstance(length, int) and length > 0 for length in c.data.text_lengths or ()),
            f"data.text_lengths={tuple(c.data.text_lengths or ())}: whole numbers above 0 as in (64,128), or () for one length.",
        ),
        (0 <= c.train.seed < 2**32, f"train.seed={c.train.seed} must lie in [0, 2**32)."),
        (c.train.eval_every >= 0, f"train.eval_every={c.train.eval_every} must not be below 0; 0 means never."),
        (
            not c.train.eval_every or c.data.holdout_fraction > 0,
            f"train.eval_every={c.train.eval_every} needs data.holdout_fraction above 0: there is nothing to evaluate on.",
        ),
        (
            not c.train.eval_every or c.train.eval_images > 0,
            f"train.eval_images={c.train.eval_images} must be above 0 with train.eval_every={c.train.eval_every}.",
        ),
        (
            0 < c.train.eval_budget <= 1,
            f"train.eval_budget={c.train.eval_budget} is a share of the time: above 0, at most 1 (0.05 is 5%).",
        ),
        (c.train.init_weights in ("ema", "raw"), f"train.init_weights={c.train.init_weights}: choose ema or raw."),
        (
            not (c.train.init_from and c.train.restore),
            f"train.init_from={c.train.init_from} and train.restore={c.train.restore}: a run starts from one of them.",
        ),
        (c.sample.previews >= 0, f"sample.previews={c.sample.previews} must not be below 0."),
        (c.optim.name in ("adamw", "muon"), f"optim.name={c.optim.name}: choose adamw or muon."),
        (0 <= c.optim.ema_decay < 1, f"optim.ema_decay={c.optim.ema_decay} must lie in [0, 1)."),
        (
            0 <= c.optim.end_learning_rate <= c.optim.peak_learning_rate,
            f"optim.end_learning_rate={c.optim.end_learning_rate} must lie between 0 and "
            f"optim.peak_learning_rate={c.optim.peak_learning_rate}: the learning rate falls.",
        ),
        (0 <= c.optim.b1 < 1 and 0 <= c.optim.b2 < 1, f"optim.b1={c.optim.b1} and optim.b2={c.optim.b2} must lie in [0, 1)."),
        (c.optim.weight_decay >= 0, f"optim.weight_decay={c.optim.weight_decay} must not be below 0."),
    ]  # fmt: skip
    for holds, message in rules:
        if not holds:
            raise InputError(message)


def is_new(workdir: Path) -> bool:
    """Whether nothing has been trained in the folder yet."""
    files = workdir / "metrics.jsonl", workdir / "saved.json"
    rows = any(path.exists() and path.stat().st_size for path in files)
    # An empty folder of checkpoints may be where their disk is to be mounted: the first save makes it.
    return not (workdir / "config.json").exists() or not (rows or (workdir / "checkpoints").exists())


def refuse_strangers(workdir: Path) -> None:
    """A folder of something else is not written into.

    Raises:
      InputError: it holds files, and they are no run's.
    """
    if not workdir.is_dir() or (workdir / "config.json").exists():
        return
    # What a kill between the files of a new folder leaves.
    strangers = [child.name for child in workdir.iterdir() if child.name[0] != "." and child.name not in WRITTEN]
    if strangers:
        raise InputError(
            f"{workdir} holds {', '.join(sorted(strangers)[:3])} but no config.json, so it is not a working folder; "
            "name a new or empty one."
        )


def claim(workdir: Path, config: Any, data_path: Path, dataset: dict[str, Any], start: dict[str, Any] | None) -> None:
    """Take a new working folder, or make sure that an old one was begun with this configuration and data.

    Writes config.json, dataset.json (copies, so that the folder can be sampled alone) and origin.json; changes of the
    fields that may change go to config_history.jsonl. Of grown data the copy has the statistics that the run's checkpoints
    were trained with.

    Args:
      workdir: the folder, locked.
      config: the run's.
      data_path: OUT/RES.
      dataset: its dataset.json.
      start: of `origin.look`, for a new folder.
    """
    for name, info in dataset["buckets"].items():
        if any(side % config.model.patch for side in info["latent"][:2]):
            raise InputError(
                f"model.patch={config.model.patch} does not divide the latent {info['latent']} of the bucket {name}."
            )
    now = in_full(json.loads(config.to_json_best_effort()))
    now["data"]["path"] = os.path.abspath(os.path.expanduser(config.data.path))
    dataset = json.loads(json.dumps(dataset))
    if is_new(workdir):
        _begin(workdir, now, data_path, dataset, start or {})
    else:
        _go_on(workdir, now, data_path, dataset)


def _begin(workdir, now, data_path, dataset, start):
    path = workdir / "config.json"
    if "restore" in start:  # a new folder, but the run that another one began
        other = Path(start["restore"]["workdir"])
        before = _begun_with(other / "config.json")
        for name in STARTS:
            before["train"][name] = now["train"][name]
        differences, _, dataset = _compared(other, before, now, data_path, dataset)
        _record(workdir, differences)
    # Previews that were chosen for what was given up before its first step.
    (workdir / "previews" / "previews.json").unlink(missing_ok=True)
    write_json(workdir / "dataset.json", dataset)
    write_json(workdir / "origin.json", start)
    write_json(path, now)


def _go_on(workdir, now, data_path, dataset):
    before = _begun_with(workdir / "config.json")
    now["train"]["gate"] = before["train"]["gate"]  # looked at when the folder was begun, and never again
    differences, kept, dataset = _compared(workdir, before, now, data_path, dataset)
    if differences:
        _record(workdir, differences)
        write_json(workdir / "config.json", now)
    if dataset != kept:
        write_json(workdir / "dataset.json", dataset)


def _compared(folder, before, now, data_path, dataset):
    """(what differs in the configuration, the folder's dataset.json, what it is to be from now on), or InputError."""
    differences = changed_fields(before, now)
    refuse_fixed(folder, differences)
    kept = _kept_dataset(folder)
    return differences, kept, _data_or_refuse(folder, kept, data_path, dataset, now["data"]["accept_growth"])


def _kept_dataset(workdir: Path) -> dict[str, Any]:
    try:
        return read_json(workdir / "dataset.json", BRING_BACK)
    except FileNotFoundError as error:
        raise InputError(f"{workdir / 'dataset.json'} is missing; {BRING_BACK}.") from error


def _begun_with(path: Path) -> dict[str, Any]:
    try:
        return in_full(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise InputError(f"{path} cannot be read as JSON ({error}); restore it, or name a new --workdir.") from error


def in_full(config: dict[str, Any]) -> dict[str, Any]:
    """A run's configuration with whole paths; from before there was a choice: AdamW, no fused kernels, squares alone."""
    config["optim"].setdefault("name", "adamw")
    config["model"].setdefault("fused", False)
    config["flow"].setdefault("direction", 0.0)
    for name in ("init_from", "restore"):
        if named := config["train"].get(name):
            config["train"][name] = os.path.abspath(os.path.expanduser(named))
    return config


def _record(workdir: Path, differences: list[tuple[str, Any, Any]]) -> None:
    with open(workdir / "config_history.jsonl", "a") as file:
        for name, old, new in differences:
            file.write(json.dumps({"time": time.time(), "field": name, "from": old, "to": new}) + "\n")
            logging.info("Changed since the last start: %s from %s to %s.", name, old, new)


def refuse_fixed(workdir: Path, differences: list[tuple[str, Any, Any]]) -> None:
    """InputError that names the first of `changed_fields` that is fixed for the life of a working folder."""
    for name, old, new in differences:
        if any(name == fixed or name.startswith(fixed + ".") for fixed in FIXED):
            shown = [value if value != "" else "nothing" for value in (old, new)]
            gone = ", whether or not it is still there" if name.removeprefix("train.") in STARTS else ""
            raise InputError(
                f"{workdir} was begun with {name}={shown[0]}, now it is {shown[1]}; it is fixed for the life of a working "
                f"folder: take the old value{gone} (--config.{name}={old}), or a new --workdir."
            )


def _data_or_refuse(workdir: Path, copy: dict, data_path: Path, dataset: dict, accept_growth: bool) -> dict:
    """The folder's copy of dataset.json, or the grown data set with the copy's statistics.

    A copy of grown data keeps under "own" the statistics that the data set itself has.
    """
    own = copy.get("own", {name: copy[name] for name in STATISTICS})
    differing = [key for key in ("fingerprint", "widths") if copy[key] != dataset[key]]
    differing += ["buckets"] if _without_shards(copy) != _without_shards(dataset) else []
    differing += [name for name in STATISTICS if own[name] != dataset[name]]
    if not differing:
        return copy | {"buckets": dataset["buckets"]}
    # Mended captions change which pictures are mirrored, and with that the statistics of the latents.
    mended = set(differing) <= {*STATISTICS} and own in dataset.get("mended_from", [])
    if not mended and (copy["count"] >= dataset["count"] or not _is_growth(copy, dataset)):
        raise InputError(
            f"{workdir} was begun with another data set: {differing[0]} of {data_path}/dataset.json differs from its copy; "
            "name the first data set, or a new --workdir."
        )
    if mended and not accept_growth:
        raise InputError(
            f"captions of {data_path} were mended since {workdir} was begun; take them with --config.data.accept_growth=True "
            "(normalisation stays what the checkpoints know)."
        )
    if not accept_growth:
        raise InputError(
            f"{data_path} has grown from {copy['count']} to {dataset['count']} images since {workdir} was begun; take the "
            "new ones in with --config.data.accept_growth=True (normalisation stays what the checkpoints know)."
        )
    if mended:
        logging.info("The captions of the data set were mended; normalisation stays what the checkpoints know.")
    else:
        logging.info("The data set has grown from %d to %d images; all are taken.", copy["count"], dataset["count"])
    start = {name: copy[name] for name in STATISTICS}
    return dataset | start | {"own": {name: dataset[name] for name in STATISTICS}}


def _without_shards(dataset: dict) -> dict[str, dict]:
    """The buckets; a refused picture that is tried again in vain leaves a shard of nothing."""
    return {name: bucket | {"shards": 0} for name, bucket in dataset["buckets"].items()}


def _is_growth(copy: dict, dataset: dict) -> bool:
    """The same encoders, and the same buckets or more, each with as many images as before or more."""
    old, new = copy["buckets"], dataset["buckets"]
    same = all(copy[key] == dataset[key] for key in ("fingerprint", "widths")) and old.keys() <= new.keys()
    return same and all(
        new[name]["latent"] == old[name]["latent"] and new[name]["count"] >= old[name]["count"] for name in old
    )


def changed_fields(before: Any, now: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """[(dotted name, old value, new value)] of two nested dicts."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = sorted(before.keys() | now.keys())
        dotted = [(name, f"{prefix}.{name}" if prefix else name) for name in names]
        return [row for name, full in dotted for row in changed_fields(before.get(name), now.get(name), full)]
    return [] if before == now else [(prefix, before, now)]


def check_space(workdir: Path, count: int, size: int) -> None:
    """Refuse to begin where the disk does not hold so many checkpoints of so many bytes: those that come next."""
    free, needed = shutil.disk_usage(workdir).free, count * size
    if free < needed:
        raise InputError(
            f"{workdir}: the next {'checkpoint needs' if count == 1 else f'{count} checkpoints need'} {needed / 1e9:.2f} GB, the "
            f"disk has {free / 1e9:.2f} GB free; make room."
        )
