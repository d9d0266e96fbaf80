"""plan -> encode shard k -> finish: from a folder of photographs to one data set a resolution.

A shard is the unit of work, of resume and of distribution. The plan (OUT/plan.json) fixes which picture goes into which
shard; a shard is finished when its index file stands at every resolution; everything known about a finished shard that the
end needs (sums for the statistics, pictures refused, lengths) lies beside the plan in OUT/parts. Killed anywhere and
started again, a run writes the bytes that an undisturbed one writes, and leaves finished shards alone. Pictures are read
ahead by worker processes through all shards that are left, so that the encoders do not wait.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from encode import fingerprint, images, mirrored, prepare, recaption, records
from encode import plan as plan_rules
from encode.finish import finish, is_finished
from encode.plan import Stopped
from encode.progress import Progress, disk_full, say_need, say_problems
from encode.records import InputError
from encode.shard import Context, Encoded, Encoders, Job, WorkFailed, batches, encode_batch, encode_shard
from encode.sidecars import shown
from encode.source import Collection, Item, Problem, walk
from encode.whole_files import DISK_FULL, sweep, write_json
from encode.workers import CannotStart, Workers

__all__ = [
    "Context", "Encoded", "Encoders", "Job", "Stopped", "Summary", "WorkFailed", "batches", "begin", "encode_batch", "run",
]  # fmt: skip
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Summary:
    """What a run has to say at its end."""

    encoded: int
    copies: int  # of them, of the pixels of another one
    refused: int
    report: Path
    roots: tuple[Path, ...]
    rate: float  # pictures a second of this leg; 0 where none was left to encode


def run(
    config: Any, encoders: Encoders, stop: Callable[[], bool] = lambda: False, only: frozenset | None = None
) -> Summary:
    """Encode config.images into config.out, going on where an earlier run stopped.

    Args:
      config: the configuration of configs/encode_*.py.
      encoders: the loaded models.
      stop: asked between batches; true ends the run with `Stopped`.
      only: ids of the pictures to take; None takes all. The same at every run into one config.out.

    Raises:
      InputError: the folder, the configuration or an earlier output does not allow it.
      WorkFailed: an encoder failed or the disk is full; finished shards stay.
      Stopped: as asked.
    """
    out = Path(config.out).expanduser()
    if out.exists() and not out.is_dir():
        raise InputError(f"config.out={out} is a file; name a folder, which is made if it is not there.")
    _stay_apart(config)
    try:
        with (
            records.only_one(out),
            Workers(config.decode_workers, config.decode_seconds, config.decode_memory) as workers,
        ):
            return _run(config, out, encoders, workers, stop, only)
    except CannotStart as error:
        raise WorkFailed(f"{error}.") from error
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise WorkFailed(disk_full(out)) from error


def begin(
    config: Any, encoders: Encoders, workers: Workers, stop, only=None, keep=True
) -> tuple[Context, dict, list[Job]]:
    """Scan the photographs and plan the work, or take up the plan that OUT holds; with `keep`, what is new is stored.

    Returns:
      what all shards share; the plan with "quarantine", the inputs refused so far; the shards.
    """
    _stay_apart(config)
    folder, out = Path(config.images).expanduser(), Path(config.out).expanduser()
    collection = walk(folder, out)
    if only is not None:
        collection = Collection(tuple(item for item in collection.items if item.id in only), (), {})
    plan = _plan(config, folder, out, collection, encoders, workers, stop, keep)
    planned = {entry[0] for job in plan["shards"] for entry in job["items"]}
    refused = [asdict(problem) for problem in collection.problems if problem.file not in planned]
    there = {item.id for item in collection.items}
    plan["quarantine"] = refused + [row for row in plan["unfit"] if row["file"] in there]
    # A planned picture that lost its caption or its file is still encoded as planned, or refused by name.
    inputs, unflipped = plan["inputs"], set(plan["unflipped"])
    items = {name: Item(name, folder / name, (inputs[name],), flip=name not in unflipped) for name in planned}
    items |= {item.id: item for item in collection.items}
    for name in planned:
        mirror = plan["flips"].get(name, inputs[name]) if items[name].flip else None
        items[name] = replace(items[name], captions=(inputs[name],), mirror=mirror)
    others, cells, width = collection.others, plan["cells"], plan["vision_width"]
    context = Context(config, folder, out, encoders, workers, items, others, cells, width, stop)
    jobs = [Job(tuple(job["bucket"]), job["shard"], tuple(map(tuple, job["items"]))) for job in plan["shards"]]
    return context, plan, jobs


def _stay_apart(config: Any) -> None:
    out = Path(config.out).expanduser()
    if Path(config.images).expanduser().resolve().is_relative_to(out.resolve()):
        raise InputError(
            f"config.out={out} holds the photographs themselves; choose a folder of its own for the output."
        )


def _run(config: Any, out: Path, encoders: Encoders, workers: Workers, stop, only) -> Summary:
    sweep(out)
    context, plan, jobs = begin(config, encoders, workers, stop, only)
    say_problems("before encoding", plan["quarantine"])
    largest, pictures = max(config.resolutions), Counter()
    for job in jobs:
        pictures[context.bucket(job.shape, largest)] += len(job.entries)
    listed = ", ".join(f"{name} ({count})" for name, count in pictures.items())
    log.info("%d buckets at %d, with their pictures: %s.", len(pictures), largest, listed)
    todo = [job for job in jobs if context.missing(job) or not context.part(job).exists()]
    say_need(out, bytes_to_write(context, todo))
    progress = Progress("pictures encoded", pictures.total(), sum(len(job.entries) for job in todo), out)
    progress.refused = len(plan["quarantine"])
    if todo and config.get("engine") == "ray":  # a configuration that dataset.json kept has none
        from encode import ray_engine  # Ray need not be installed where nothing is distributed

        ray_engine.encode(context, plan, todo, progress)
    else:
        _encode_here(context, todo, progress)
    parts = [read_part(context.part(job)) for job in jobs]
    known = {row[0] for part in parts for row in part["records"]}
    known |= {row["file"] for row in plan["unfit"]}
    broken = {row["file"]: row for part in parts for row in part["quarantine"] if row["file"] not in known}
    broken = [row for row in broken.values() if _still_stands(context, row)]  # of what was tried again, the last word
    say_problems("while encoding", broken)
    refused = [Problem(**row) for row in plan["quarantine"] + broken]
    refused.sort(key=lambda row: (row.file, row.stage, row.reason))
    if todo or not is_finished(context, jobs, refused):
        finish(context, plan, jobs, parts, refused)
        progress.end(len(refused))
    hashes = [row[1] for part in parts for row in part["records"]]
    roots = tuple(context.root(size) for size in config.resolutions)
    return Summary(
        len(hashes), len(hashes) - len(set(hashes)), len(refused), out / "report.html", roots, progress.rate()
    )


def _still_stands(context: Context, row: dict[str, str]) -> bool:
    """Whether a refusal is of a picture that is there, or had left before it could be read."""
    return row["reason"].startswith(images.ImageProblem.unread) or context.items[row["file"]].path.exists()


def _encode_here(context: Context, jobs: Sequence[Job], progress: Progress) -> None:
    config, workers = context.config, context.workers
    tasks = (context.task(job, entry) for job in jobs for entry in job.entries)
    read = workers.map(prepare.prepare, tasks, 2 * config.batch_size + 2 * workers.count)
    with contextlib.closing(read):
        there = plan_rules.present(context.folder, read)
        for job in jobs:
            encode_shard(context, job, there, progress)
            progress.next_shard()


def _plan(config, folder: Path, out: Path, collection: Collection, encoders, workers, stop, keep) -> dict[str, Any]:
    """The stored plan, with shards added for photographs that are new; or a new one."""
    wanted = json.loads(json.dumps(fingerprint.of(config, encoders)))
    path = out / "plan.json"
    if path.exists():
        advice = "remove it and run again: the same photographs give the same plan"
        plan = records.read_json(path, advice)
        if plan.get("schema") not in (records.SCHEMA, records.PLAN):
            raise InputError(
                f"{path}: schema version {plan.get('schema')} found, this program writes version {records.PLAN}; "
                "go on with the version of it that was there last, or encode into a new folder."
            )
        fingerprint.refuse_difference(out, plan, wanted)
        parts = []
        for part in sorted((out / "parts").glob("[!.]*.json")):
            with contextlib.suppress(InputError):  # a damaged one is named when its turn comes
                parts.append(read_part(part) | {"written": part.stat().st_mtime_ns})
        undecided = not mirrored.kept(plan)
        if undecided:  # a plan of before they were kept
            if plan["fingerprint"]["rules"] != wanted["rules"]:  # older ones
                plan["flips"] = mirrored.taken_up(config, out, plan, parts, partial(_going_on, stop))
            else:
                plan["flips"] = mirrored.decide(plan["inputs"])
        known = plan | {"written": path.stat().st_mtime_ns}
        again = plan_rules.retried(config, known, parts, collection)
        refused = plan_rules.refusals(known, parts)
        changed = recaption.changed(config, plan, collection, refused)
        unfinished: list[Path] = []
        if changed:
            changes, unfinished = recaption.accept(config, out, plan, collection, changed, refused)
            plan |= changes
        new = plan_rules.added(folder, out, plan, collection, refused, again)
        if not new and not changed and not undecided:
            return plan
        before = plan["inputs"].keys() - set(changed)
        if new:
            plan |= plan_rules.grow(config, plan, new, workers, stop)
    else:
        before, unfinished, plan = (), [], {"fingerprint": wanted}
        plan |= plan_rules.make_plan(config, collection, workers, stop)
        _take_up_what_is_encoded(config, out, plan, stop)
        plan["vision_width"] = plan["vision_width"] or encoders.vision.width
    # Before the plan is stored: from then on captions must stay what they are.
    added = {entry[0] for shard in plan["shards"] for entry in shard["items"]}.difference(before)
    _check_words(config, encoders, [item for item in collection.items if item.id in added])
    if not keep:
        plan["unfinished"] = unfinished
    else:
        for file in unfinished:  # before the plan: killed in between, the same call begins them again
            file.unlink(missing_ok=True)
        (out / "parts").mkdir(exist_ok=True)
        write_json(path, plan | {"schema": records.PLAN})
        for size in config.resolutions if unfinished else ():
            (out / str(size) / "dataset.json").unlink(missing_ok=True)
    return plan


def _going_on(stop: Callable[[], bool]) -> None:
    if stop():
        raise Stopped


def _take_up_what_is_encoded(config: Any, out: Path, plan: dict[str, Any], stop: Callable[[], bool]) -> None:
    """A plan that was lost is made again with the mirrored captions of its records, and the name of their rules."""
    if any((out / str(size)).is_dir() for size in config.resolutions):
        plan["flips"] = mirrored.taken_up(config, out, plan, (), partial(_going_on, stop))
    for size in config.resolutions:
        with contextlib.suppress(InputError, FileNotFoundError, KeyError, TypeError):
            begun = records.read_json(out / str(size) / "dataset.json", "")["fingerprint"]["captions"]
            plan["fingerprint"]["rules"]["captions"] = begun


def read_part(path: Path) -> dict[str, Any]:
    """What a finished shard left for the end."""
    return records.read_json(path, "remove it and run again: its shard is then encoded again")


def _some(things: Sequence) -> Sequence:
    """About 200, spread over all."""
    return things[:: max(1, len(things) // 200)]


def _check_words(config: Any, encoders: Encoders, items: Sequence[Item]) -> None:
    """Captions of which the text encoder has no words are all alike to the model: said, and refused where they are the rule.

    Raises:
      InputError: most captions are largely such signs.
    """
    some = [(item.id, item.caption(config.seed)) for item in _some(items)]
    shares = {name: encoders.text.unknown(text) for name, text in some}
    strange = [(name, text) for name, text in some if shares[name] >= 0.25]
    if not any(shares.values()):
        return
    name, text = strange[0] if strange else next((name, text) for name, text in some if shares[name])
    words = f"such as that of {shown(name)}: {shown(text[:60])}"
    if len(strange) > len(some) / 2:
        raise InputError(
            f"{len(strange)} of {len(some)} captions looked at are in signs that the text encoder has no tokens for, {words}. "
            "To the model they would all be the same. Translate them: T5 reads English, and some French, German and Romanian."
        )
    some_unknown = sum(share > 0 for share in shares.values())
    log.warning(
        "%d of %d captions looked at hold signs that the text encoder does not know, %d of them little else, %s.",
        some_unknown, len(some), len(strange), words,
    )  # fmt: skip


def bytes_to_write(context: Context, jobs: Sequence[Job]) -> int:
    """About how much disk some shards need: latents by their shapes, text by the tokens of a few captions."""
    encoders, config, total = context.encoders, context.config, 0
    names = _some([entry[0] for job in jobs for entry in job.entries])
    tokens = [encoders.text.count_tokens(context.items[name].caption(config.seed)) for name in names]
    tokens = [min(count, encoders.text.max_tokens) for count in tokens]
    rest = 4 * encoders.text.width * sum(tokens) / max(1, len(tokens)) + 8 * context.vision_width
    for job in jobs:
        for entry in job.entries:
            targets, _ = plan_rules.targets(config, context.cells, job.shape, entry[1:])
            total += sum(2 * 2 * (w // 8) * (h // 8) * encoders.vae.channels + rest for w, h in targets.values())
    return round(total)
