"""What can be told of one shard by reading it: every record, field by field, and what the shard adds up to.

Pure checks of records and the reading of one file; which file is wrong where several disagree is decided in dataset_check.py.
ArrayRecord keeps a hash of every record, so bytes that changed on the disk are found by reading; records that were written
wrong are found because they contradict the contract, the plan or each other.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from tensorflow_datasets.proto import tf_example_pb2

from encode import captions, records, stats
from encode.plan import Stopped
from encode.records import UNREADABLE

TOGETHER = 16  # records in memory at a time
REWRITTEN = 2**25  # bytes of a shard that is small enough to be written again for a comparison
STRANGE = 16  # bytes; a writer of another version changes the hash of every record, and so more than this


@dataclass(frozen=True)
class Rules:
    """What holds for every record of a data set.

    Attributes:
      text, vision: widths.
      flip: mirror images were encoded; without it they are copies, and caption_flip is empty.
      swap: whether caption_flip can be compared without `flips`: it was made with the rules that captions.py holds now.
      own_vectors: the vision vectors are precomputed: whatever the user gave is right, zeros too.
      inputs: {id: caption} as planned; None where there is no plan.
      unflipped: ids that must not be mirrored; None where that is not known.
      flips: of the plan (`mirrored`); None where it has none.
    """

    text: int
    vision: int
    flip: bool
    swap: bool
    own_vectors: bool
    inputs: Mapping[str, str] | None
    unflipped: frozenset[str] | None
    flips: Mapping[str, str | None] | None


@dataclass
class Found:
    """What reading a shard gave.

    Attributes:
      problems: of the file as a whole, and one a damaged record, with its id.
      ids: of the records that can be read, in their order.
      rows: what the index must say of them.
      lengths: of their text and text_flip.
      sums: of their latents; None where there are none.
    """

    problems: list[str] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    rows: np.ndarray = field(default_factory=lambda: np.zeros(0, records.INDEX_DTYPE))
    lengths: list[tuple[int, int]] = field(default_factory=list)
    sums: stats.Partial | None = None

    def hashes(self) -> list[str]:
        return [row["pixel_hash"].decode() for row in self.rows]


def look(
    path: Path, latent: Sequence[int], rules: Rules, stop: Callable[[], bool], step: Callable[[int], None]
) -> Found:
    """Read every record of a shard.

    Args:
      path: the shard.
      latent: [height, width, channels] of its bucket.
      rules: of the data set.
      stop: asked now and then; true raises Stopped.
      step: told how many records were read.
    """
    if not path.exists():
        return Found(["it is missing"])
    found, sums, rows, kept = Found(), [], [], []
    small = path.stat().st_size <= REWRITTEN
    try:
        for place, raw in enumerate(stored(path)):
            if place % TOGETHER == 0 and stop():
                raise Stopped
            step(1)
            try:
                if isinstance(raw, Exception):
                    raise raw
                record = parse(raw, latent, rules)
            except UNREADABLE as error:
                found.problems.append(f"record {place} cannot be read ({words(error)})")
                continue
            kept += [raw] if small else []
            found.ids.append(record["id"])
            found.lengths.append((len(record["text"]), len(record["text_flip"])))
            rows.append(records.index_rows([record]))
            if problem := wrong(record, rules):
                found.problems.append(f"record {place} ({record['id']}): {problem}")
            else:
                sums += stats.of_record(record)
    except UNREADABLE as error:
        found.problems.append(f"it cannot be opened ({words(error)})")
    if rows:
        found.rows = np.concatenate(rows)
    found.sums = stats.merge(sums) if sums else None
    if small and not found.problems and (strange := _strange_bytes(path, kept)):
        found.problems.append(f"{strange} bytes between its records are not what was written: the disk changed them")
    return found


def stored(path: Path) -> Iterator[bytes | Exception]:
    """The bytes of each record of a shard, or why one cannot be read.

    Raises:
      RuntimeError: the shard cannot be opened.
    """
    reader = ArrayRecordReader(str(path))
    try:
        count = reader.num_records()
        for start in range(0, count, TOGETHER):
            places = list(range(start, min(start + TOGETHER, count)))
            try:
                yield from reader.read(places)
            except UNREADABLE:
                for place in places:  # one at a time: most of them may be sound
                    yield _one(reader, place)
    finally:
        reader.close()


def one(path: Path, place: int) -> bytes:
    """The bytes of one record."""
    reader = ArrayRecordReader(str(path))
    try:
        return reader.read([place])[0]
    finally:
        reader.close()


def _one(reader: ArrayRecordReader, place: int) -> bytes | Exception:
    try:
        return reader.read([place])[0]
    except UNREADABLE as error:
        return error


def parse(raw: bytes, latent: Sequence[int], rules: Rules) -> dict[str, Any]:
    """A record's fields, arrays with the shape and dtype of the contract.

    Raises:
      ValueError: a field is missing, or holds another number of bytes than its shape needs.
    """
    try:
        values = tf_example_pb2.Example.FromString(raw).features.feature
    except Exception as error:  # protobuf's own DecodeError derives from Exception alone
        raise ValueError(f"not a record: {error}") from error
    if set(values) != {*records.STRINGS, *records.ARRAYS}:
        odd = sorted(set(values) ^ {*records.STRINGS, *records.ARRAYS})
        raise ValueError(f"it has not the fields of the contract: {', '.join(odd)}")
    contents = {name: (*value.bytes_list.value, b"")[0] for name, value in values.items()}
    record: dict[str, Any] = {name: contents[name].decode("utf-8") for name in records.STRINGS}
    shapes = {"latent": latent, "text": (None, rules.text), "vision": (rules.vision,), "mask": latent[:2]}
    for name in records.ARRAYS:
        kind = name.removesuffix("_flip")
        dtype = {"vision": "float32", "mask": "uint8"}.get(kind, "bfloat16")
        array = records.Array(shape=shapes[kind], dtype=dtype, optional=kind == "mask")
        try:
            record[name] = array.decode_example_np(contents[name])
        except ValueError as error:
            shape = [*shapes[kind]]
            raise ValueError(
                f"{record['id']}: {name} has {len(contents[name])} bytes, which is no {dtype} array of shape {shape}"
            ) from error
    return record


def wrong(record: Mapping[str, Any], rules: Rules) -> str | None:
    """What contradicts the contract in a record, or None."""
    for name in records.ARRAYS:
        value = record[name]
        if not np.isfinite(value).all():
            return f"{name} is not finite"
        if name.startswith("latent"):
            bits = value.view(np.uint16)  # comparing bfloat16 itself takes ten times as long
            if (bits == bits.flat[0]).all():
                return f"{name} is the same number everywhere"
        may_be_zero = rules.own_vectors and name.startswith("vision")
        if name.startswith(("text", "vision")) and value.size and not value.any() and not may_be_zero:
            return f"{name} is all zeros"
    mask, swapped = record["mask"], record["caption_flip"] not in ("", record["caption"])
    if mask.size and (mask.max() != 1 or not np.isin(mask, (0, 1)).all()):
        return "mask holds other values than 0 and 1, or no 1"
    if not re.fullmatch("[0-9a-f]{32}", record["pixel_hash"]):
        return f"pixel_hash is {record['pixel_hash'][:40]!r}, not 32 hexadecimal digits"
    if not record["id"] or not record["caption"].strip():
        return "id or caption is empty"
    if not len(record["text"]):
        return "text has no token"
    if swapped != bool(len(record["text_flip"])):
        return f"text_flip has {len(record['text_flip'])} tokens, but caption_flip is {record['caption_flip'][:80]!r}"
    return _wrong_words(record, rules) or _wrong_copies(record, rules)


def _wrong_words(record: Mapping[str, Any], rules: Rules) -> str | None:
    name, caption, flip = record["id"], record["caption"], record["caption_flip"]
    if rules.inputs is not None and rules.inputs.get(name) != caption:
        return f"caption is {caption[:80]!r}, the plan has {rules.inputs.get(name, '')[:80]!r}"
    right = flip
    if rules.flips is not None:
        right = rules.flips.get(name, caption) or ""
    elif rules.swap:
        right = captions.swap(caption) or ""
    if not rules.flip or name in (rules.unflipped or ()):
        right = ""
    if flip != right and (
        flip or rules.unflipped is not None
    ):  # without a plan, an image may be one not to be mirrored
        return f"caption_flip is {flip[:80]!r}, but {right[:80]!r} mirrors the caption"
    return None


def _wrong_copies(record: Mapping[str, Any], rules: Rules) -> str | None:
    for name in () if rules.flip else ("latent", "vision"):
        if record[name].tobytes() != record[f"{name}_flip"].tobytes() and not (rules.own_vectors and name == "vision"):
            return f"{name}_flip is not {name}, though nothing was mirrored"
    return None


def _strange_bytes(path: Path, raws: Sequence[bytes]) -> int:
    """Bytes that differ from what the writer makes of the same records; 0 where it writes in another way, or cannot."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            again = Path(folder) / "again"
            writer = ArrayRecordWriter(str(again), "group_size:1")
            for raw in raws:
                writer.write(raw)
            writer.close()
            ours, theirs = (np.fromfile(file, np.uint8) for file in (path, again))
    except (OSError, RuntimeError):  # the temporary folder is full, of which ArrayRecord says the latter
        return 0
    if len(ours) != len(theirs):
        return 0
    differing = int((ours != theirs).sum())
    return differing if differing <= STRANGE else 0


def difference(stored_record: Mapping[str, Any], fresh: Mapping[str, Any], limit: float) -> str | None:
    """What differs between a record and the same picture encoded again, or None.

    Arrays may differ by `limit` of their norm.
    """
    for name in records.STRINGS:
        if stored_record[name] != fresh[name]:
            return f"{name} is {stored_record[name][:80]!r}, encoded again {fresh[name][:80]!r}"
    for name in records.ARRAYS:
        old, new = (np.asarray(side[name]).astype(np.float64) for side in (stored_record, fresh))
        if old.shape != new.shape:
            return f"{name} has shape {list(old.shape)}, encoded again {list(new.shape)}"
        off = np.linalg.norm(old - new) / max(np.linalg.norm(new), 1e-12)
        if off > limit:
            return f"{name} is {off:.1%} of its norm away from what it is when encoded again"
    return None


def words(error: Exception) -> str:
    """The first line of a message, which may be very long."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
