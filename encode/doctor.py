"""python -m encode.doctor --data=OUT/RES [--repair]: read a data set back, name every damaged file, and mend it.

Every record is read and checked against the contract, the plan and the statistics, and a few pictures are encoded again to
be compared. With --repair the damaged shards, and only those, are encoded again from the photographs; an index, TFDS
metadata or dataset.json that is wrong beside sound shards is computed from them. A damaged shard stays where it is until the
new one takes its name, so a repair can be killed at any moment and started again. Nothing else is touched: neither other
shards nor other resolutions. Exit code 0: all is sound, 1: damage was found or could not be mended, 2: the call is wrong,
3: stopped as asked.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from absl import flags

from encode import commandline, dataset_check, expected, images, pipeline, prepare, records, repair, shard_check
from encode import main as encode_main
from encode.dataset_check import Damage
from encode.expected import Data, Shard
from encode.progress import Progress, disk_full
from encode.records import InputError
from encode.shard_check import Found
from encode.whole_files import DISK_FULL
from encode.workers import Workers

log = logging.getLogger(__name__)
# How far an array may be from the same picture's encoded again, as a share of its norm: 0.05 is a cosine of about 0.999. Storing
# in bfloat16 costs 0.002, another batch or card with bfloat16 inside 0.01 to 0.02; another picture or caption gives 0.3 and more.
CLOSE = 0.05


@dataclass
class Verdict:
    """What an examination found.

    Attributes:
      damages: by file; empty is sound.
      notes: sentences about what was left out, and about photographs that have changed.
      mended: files that a repair wrote or removed.
      records, shards, rate: records read, of how many shards, and how many a second.
    """

    damages: list[Damage] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    mended: list[str] = field(default_factory=list)
    records: int = 0
    shards: int = 0
    rate: float = 0.0


@dataclass(frozen=True)
class Call:
    """What is asked for.

    Attributes:
      data: OUT/RES.
      reencode: how many records are compared with their pictures encoded again; 0: none.
      images: folder of the photographs, where it is no longer the one they were encoded from.
      repair: mend what is damaged.
      seed: which records are compared.
    """

    data: Path
    reencode: int = 8
    images: Path | None = None
    repair: bool = False
    seed: int = 0


Load = Callable[[Any], pipeline.Encoders]


def examine(call: Call, load: Load = encode_main.load, stop: Callable[[], bool] = lambda: False) -> Verdict:
    """Read everything, compare some of it, and mend it where that is asked for.

    Args:
      call: what is asked for.
      load: gives the encoders that a configuration names.
      stop: true ends it between two records.

    Raises:
      InputError: the folder is no data set, or cannot be repaired from what is there.
      pipeline.WorkFailed: an encoder failed while a shard was encoded again.
      pipeline.Stopped: as asked.
    """
    if not call.data.is_dir():
        records.load_dataset(call.data)
    data, verdict = expected.load(call.data), Verdict()
    if call.repair and data.plan is None:
        raise InputError(
            f"{data.out / 'plan.json'} is missing, so nothing says which pictures belong into a shard; a copy is repaired by "
            "copying the damaged files again from where they were encoded, a subset by making it again (encode.subset), anything "
            "else by encoding into a new folder."
        )
    # Judging what another process is writing would blame it for what it has not done yet.
    locked = call.repair or ((data.out / ".lock").exists() and os.access(data.out / ".lock", os.W_OK))
    with records.only_one(data.out) if locked else contextlib.nullcontext():
        started = time.monotonic()
        found = _read(data, data.shards, stop)
        verdict.damages = dataset_check.judge(data, found)
        verdict.records, verdict.shards = sum(len(one.ids) for one in found.values()), len(found)
        verdict.rate = verdict.records / max(time.monotonic() - started, 1e-9)
        with contextlib.ExitStack() as stack:
            session = _Session(data, call, load, stop, stack)
            if call.reencode:
                _compare(session, found, verdict)
            if call.repair and verdict.damages:
                _repair(session, found, verdict)
    return verdict


def _read(data: Data, shards: Sequence[Shard], stop: Callable[[], bool]) -> dict[Shard, Found]:
    promised = sum(len(shard.job.entries) if shard.job else 0 for shard in shards)
    if len(shards) == len(data.shards) and isinstance((data.own or {}).get("count"), int):
        promised = data.own["count"]  # without those that could not be decoded
    progress = Progress("records read", promised, promised)
    return {
        shard: shard_check.look(data.path(shard), data.latent(shard.bucket), data.rules, stop, progress.step)
        for shard in shards
    }


class _Session:
    """The encoders and the photographs, loaded when they are first needed; why they cannot be had, else."""

    def __init__(self, data: Data, call: Call, load: Load, stop: Callable[[], bool], stack: contextlib.ExitStack):
        self.data, self.call, self.stop, self._load, self._stack = data, call, stop, load, stack
        self._context: pipeline.Context | None = None
        self._why = ""

    def context(self) -> pipeline.Context:
        """What encoding needs.

        Raises:
          InputError: encoders or photographs are missing, or are not those that the data set was made with.
        """
        if self._why:
            raise InputError(self._why)
        if self._context is None:
            try:
                self._context = self._begin()
            except (InputError, ImportError, OSError, RuntimeError) as error:
                self._why = str(error).rstrip(".")
                raise InputError(self._why) from error
        return self._context

    def _begin(self) -> pipeline.Context:
        data = self.data
        given = {"images": str(self.call.images)} if self.call.images else {}
        config = encode_main.stored(data.config, **given, out=str(data.out), accept_captions=False)
        folder = Path(config.images).expanduser()
        if not folder.is_dir():
            raise InputError(f"the photographs' folder {folder} is not there; give --images=DIR if it has moved")
        workers = self._stack.enter_context(Workers(config.decode_workers, config.decode_seconds, config.decode_memory))
        only = frozenset(data.plan["inputs"])  # photographs that came later are nothing to the records that there are
        context, _, _ = pipeline.begin(config, self._load(config), workers, self.stop, only, keep=False)
        return context


def _compare(session: _Session, found: Mapping[Shard, Found], verdict: Verdict) -> None:
    """Encode some pictures again, each alone; records that differ are damage of their shards."""
    data, call = session.data, session.call
    damaged = {damage.shard for damage in verdict.damages if damage.mend == "shard"}
    places = [
        (shard, place, entry)
        for shard in data.shards
        if shard.job and shard not in damaged
        for entries in [{entry[0]: entry for entry in shard.job.entries}]
        for place, name in enumerate(found[shard].ids)
        for entry in [entries[name]]
    ]
    drawn = random.Random(call.seed).sample(places, min(call.reencode, len(places)))
    try:
        if data.plan is None:
            raise InputError(f"{data.out / 'plan.json'} is missing")
        context = session.context()
    except InputError as error:
        verdict.notes.append(f"Comparing with pictures encoded again was left out: {error}.")
        return
    try:
        changed, differing, compared = _compared(session, context, found, drawn)
    except pipeline.WorkFailed as error:
        verdict.notes.append(f"Comparing with pictures encoded again ended early: {error}")
        return
    if changed:
        verdict.notes.append(
            f"{len(changed)} of {len(drawn)} photographs looked at are no longer what was encoded, the first: {changed[0]}. "
            "Their records stay as they are; that is no damage."
        )
    log.info("%d records compared with their pictures encoded again, %d differ.", compared, len(differing))
    if compared >= 3 and len(differing) == compared:
        what = f"all {compared} records compared differ from their pictures encoded again ({differing[0][1]}): these encoders "
        what += "do not give here what they gave then, or every shard is wrong; nothing can be repaired with them"
        verdict.damages.append(Damage(data.name(data.root), what, ""))
        return
    for shard in dict.fromkeys(shard for shard, _ in differing):
        first = next(problem for other, problem in differing if other == shard)
        verdict.damages.append(Damage(data.name(data.path(shard)), first, "shard", shard))


def _compared(session: _Session, context: pipeline.Context, found: Mapping[Shard, Found], drawn: Sequence):
    """(photographs that have changed, (shard, what) of each record that differs, how many were compared)."""
    data = session.data
    changed, differing, compared = [], [], 0
    tasks = [_only(context.task(shard.job, entry), data.resolution) for shard, _, entry in drawn]
    read = context.workers.map(prepare.prepare, tasks, 2 * context.workers.count)
    with contextlib.closing(read):
        for (shard, place, _), (task, prepared) in zip(drawn, read):
            if session.stop():
                raise pipeline.Stopped
            row = found[shard].rows[place]
            if isinstance(prepared, images.ImageProblem):
                changed.append(f"{task.id} ({prepared})")
            elif prepared.pixel_hash != row["pixel_hash"].decode():
                changed.append(f"{task.id} (other pixels)")
            else:
                problem = _difference(context, data, shard, place, prepared)
                if problem and problem.startswith("vision") and data.rules.own_vectors:
                    changed.append(f"{task.id} (another precomputed vector)")
                    continue
                compared += 1
                if problem:
                    differing.append((shard, f"record {place} ({task.id}): {problem}"))
    return changed, differing, compared


def _only(task: prepare.Task, resolution: int) -> prepare.Task:
    return replace(task, targets={size: target for size, target in task.targets.items() if size == resolution})


def _difference(
    context: pipeline.Context, data: Data, shard: Shard, place: int, prepared: prepare.Prepared
) -> str | None:
    raw = shard_check.one(data.path(shard), place)
    record = shard_check.parse(raw, data.latent(shard.bucket), data.rules)
    made = pipeline.Encoded.nothing(context.config.resolutions)
    pipeline.encode_batch(context, shard.job, 0, [(context.items[record["id"]], prepared)], made)
    return shard_check.difference(record, made.rows[data.resolution][0], CLOSE)


def _repair(session: _Session, found: dict[Shard, Found], verdict: Verdict) -> None:
    """Mend in the order in which things depend on each other, and judge again."""
    data, damages, mended = session.data, verdict.damages, verdict.mended
    for damage in damages:
        log.warning("%s", damage)
        if damage.mend == "remove":
            (data.out / damage.file).unlink(missing_ok=True)
            mended.append(damage.file)
    broken = {name: {damage.shard for damage in damages if damage.mend == name} for name in ("shard", "part", "index")}
    _encode_again(session, found, verdict, broken["shard"], broken["part"])
    found |= _read(data, [shard for shard in data.shards if shard in broken["shard"]], session.stop)
    for shard in data.shards:
        if shard in broken["index"]:
            mended.append(repair.write_index(data, shard, found[shard]))
    left = dataset_check.judge(data, found)
    unsound = {damage.shard.bucket for damage in left if damage.mend in ("shard", "index")}
    for bucket in dict.fromkeys(damage.bucket for damage in left if damage.mend == "metadata"):
        if bucket not in unsound:
            dataset_check.write_metadata(data, bucket, data.root)
            mended += [data.name(records.bucket_folder(data.root, bucket) / name) for name in dataset_check.METADATA]
    kinds = {damage.mend for damage in left}
    if "dataset" in kinds and not kinds & {"shard", "part", "index"}:
        mended.append(repair.write_dataset(data, found))
    left = dataset_check.judge(expected.load(data.root), found)
    # What only a comparison with the photographs shows is not seen by judging again.
    named = {damage.file for damage in left} | set(mended)
    verdict.damages = left + [damage for damage in damages if damage.mend in ("", "shard") and damage.file not in named]


def _encode_again(
    session: _Session, found: Mapping[Shard, Found], verdict: Verdict, shards: set[Shard], parts: set[Shard]
) -> None:
    data, again = session.data, [shard for shard in session.data.shards if shard in shards | parts]
    if not again:
        return
    pictures = sum(len(shard.job.entries) for shard in again)
    log.info("%d shards with %d pictures are encoded again.", len(again), pictures)
    progress = Progress("pictures encoded again", pictures, pictures)
    for shard in again:
        try:
            if any(not damage.mend for damage in verdict.damages):
                raise InputError("the encoders are not to be trusted, as said above")
            verdict.mended += repair.encode_again(
                session.context(), data, shard, found[shard], shard in shards, shard in parts, progress.step
            )
        except (InputError, repair.Changed) as error:
            file = data.path(shard) if shard in shards else shard.part
            verdict.notes.append(f"{data.name(file)} cannot be mended: {str(error).rstrip('.')}.")


def sentences(call: Call, verdict: Verdict) -> Iterator[str]:
    """What is said at the end: a line a damaged file, the notes, and last what to do."""
    yield from map(str, verdict.damages)
    yield from verdict.notes
    yield f"{verdict.records} records in {_many(verdict.shards, 'shard')} read, {verdict.rate:.0f} a second."
    if verdict.mended:
        listed = ", ".join(verdict.mended[:8]) + (" ..." if verdict.mended[8:] else "")
        yield f"{_many(len(verdict.mended), 'file')} mended: {listed}."
    mendable = [damage for damage in verdict.damages if damage.mend]
    shards = len({damage.shard for damage in verdict.damages if damage.mend in ("shard", "part")})
    count = _many(len(verdict.damages), "damaged file")
    if not verdict.damages:
        yield f"{call.data} is sound{' now' if verdict.mended else ''}; there is nothing to do."
    elif not mendable:
        yield f"{call.data} is damaged, and cannot be mended here: encode the photographs into a new folder, or see above."
    elif call.repair:
        yield f"{count} left; what keeps them from being mended is said above."
    elif not (call.data.absolute().parent / "plan.json").exists():
        yield f"{count}, and no plan.json to repair by: copy them again where this is a copy, or make the subset again."
    else:
        yield (
            f"{count}: call the same with --repair, which encodes {_many(shards, 'shard')} again and leaves all others alone."
        )


def _many(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def define_flags() -> None:
    flags.DEFINE_string("data", None, "Data set OUT/RES to examine.", required=True)
    flags.DEFINE_bool("repair", False, "Mend what is damaged; only damaged shards are encoded again.")
    flags.DEFINE_integer("reencode", 8, "Records to compare with their pictures encoded again; 0: none.")
    flags.DEFINE_string(
        "images", None, "Folder of the photographs, where it is no longer the one they were encoded from."
    )
    flags.DEFINE_integer("seed", 0, "Which records are compared.")


def main() -> int:
    options, asked = flags.FLAGS, commandline.stop_on_signal()
    if options.reencode < 0:
        raise InputError(f"--reencode={options.reencode}: 0 or more is wanted.")
    originals = commandline.path_of(options.images) if options.images else None
    data = commandline.path_of(options.data)
    call = Call(data, options.reencode, originals, options.repair, options.seed)
    try:
        verdict = examine(call, stop=asked.is_set)
    except pipeline.Stopped:
        return commandline.fail("stopped as asked; the same command starts the examination again.", 3)
    except pipeline.WorkFailed as error:
        return commandline.fail(str(error), 1)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        return commandline.fail(disk_full(data.absolute().parent), 1)
    print("\n".join(sentences(call, verdict)))
    return 1 if verdict.damages else 0


if __name__ == "__main__":
    define_flags()
    commandline.run(main)
