"""Shards to batches: one bucket a micro-batch, in the order of `order.Plan`, which every process makes alike.

Grain reads ahead behind it. A disk that fails for a moment is asked again; what stays unreadable is named.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import os
import resource
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import grain
import numpy as np

from encode import records
from jaxdit import order

TEXT_MULTIPLE = 64
# Threads that read records, kept for good: array_record, asked for a batch, starts one a shard every time, and their fresh memory
# cost a quarter of the processor time at 1024 and 190 MB at 256 (bench/results/loader-*.json, "ours before").
READERS = 4
# Seconds before a record that cannot be read is asked for again. Those beyond PATIENCE only where all of the data set is away: a
# network or USB disk may come back.
AGAIN, PATIENCE = (0.1, 1.0, 10.0, 60.0, 300.0), 10.0
# What stays in memory of a record, with its row number (4 bytes more) 13 bytes; "check" is a sum over its pixel hash, by which a
# damaged index is told.
KEPT = np.dtype([("check", "<u4"), ("text_length", "<u2"), ("text_flip_length", "<u2"), ("flags", "u1")])
HELD_OUT = 128  # a bit of "flags"
MIXED = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93], np.uint64)  # odd


def held_out(pixel_hashes: np.ndarray, fraction: float) -> np.ndarray:
    """Which images belong to the held-out part: by their pixels alone, so exact copies never stand on both sides.

    Args:
      pixel_hashes: [images] bytes.
      fraction: in [0, 1].

    Returns:
      [images] bool: the first 52 bits of the hash's SHA-256, as a number in [0, 1), are below the fraction.
    """
    if not fraction:
        return np.zeros(len(pixel_hashes), bool)
    heads = b"".join([hashlib.sha256(one).digest()[:8] for one in pixel_hashes.tolist()])
    return (np.frombuffer(heads, ">u8") >> np.uint64(12)) / 2.0**52 < fraction


def kept_rows(rows: np.ndarray, holdout_fraction: float = 0.0) -> np.ndarray:
    """[records] of KEPT of [records] of records.INDEX_DTYPE; what is held out is marked in "flags"."""
    kept = np.empty(len(rows), KEPT)
    words = np.ascontiguousarray(rows["pixel_hash"]).view("<u8").reshape(-1, len(MIXED))
    kept["check"] = (words * MIXED).sum(1) >> np.uint64(32)
    for name in ("text_length", "text_flip_length"):
        kept[name] = np.clip(rows[name], 0, 65_535)
    kept["flags"] = rows["flags"] & (HELD_OUT - 1) | HELD_OUT * held_out(rows["pixel_hash"], holdout_fraction)
    return kept


def scale_vision(vision: np.ndarray, normalize: bool) -> np.ndarray:
    """[batch, width] as the model takes it: raw, or each vector scaled to length sqrt(width)."""
    if not normalize:
        return vision
    norm = np.linalg.norm(vision, axis=-1, keepdims=True)
    return vision * (np.sqrt(vision.shape[-1]) / np.maximum(norm, 1e-12)).astype(np.float32)


def pad_text(texts: Sequence[np.ndarray], length: int) -> np.ndarray:
    """[batch, length, width] of the texts' dtype: left-aligned, zeros behind."""
    padded = np.zeros((len(texts), length, texts[0].shape[1]), texts[0].dtype)
    for row, tokens in zip(padded, texts):
        row[: len(tokens)] = tokens
    return padded


def normalize(latents: Sequence[np.ndarray], mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """(latent - mean) / std, [batch, height, width, channels] float32, of [height, width, channels] each in any float type."""
    batch = np.empty((len(latents), *latents[0].shape), np.float32)
    for place, latent in zip(batch, latents):
        place[...] = latent
    # NumPy is three times as fast over whole rows as over 16 channels at a time.
    rows = batch.reshape(*batch.shape[:2], -1)
    rows -= np.tile(mean, batch.shape[2])
    rows /= np.tile(std, batch.shape[2])
    return batch


def parse(record: bytes, arrays: Mapping[str, records.Array]) -> dict[str, Any]:
    """The fields of one stored record as TFDS gives them, but arrays are views of its bytes, where TFDS copies them thrice.

    That took 0.15 to 0.23 ms a record, and is 0.03: time under the interpreter's lock, which no second thread can share. A
    record is a tf.train.Example, a map of names to lists of one value: messages in messages, each behind a tag and its length.
    """
    (features,) = _messages(memoryview(record))
    fields = {}
    for entry in _messages(features):
        key, feature = _messages(entry)
        (values,) = _messages(feature)
        (value,) = _messages(values)
        name = str(key, "utf-8")
        fields[name] = arrays[name].decode_example_np(value) if name in arrays else bytes(value)
    return fields


def _messages(view: memoryview) -> Iterator[memoryview]:
    """What each field of a protobuf message holds, all of them fields 1 or 2 with a length (wire type 2)."""
    at = 0
    while at < len(view):
        if view[at] not in (0x0A, 0x12):
            raise ValueError(f"a record has a field with the tag {view[at]}, which none of ours has")
        size = shift = 0
        more = True
        while more:  # seven bits a byte, the lowest first
            at += 1
            size |= (view[at] & 127) << shift
            shift, more = shift + 7, view[at] > 127
        at += 1 + size
        yield view[at - size : at]


def normalized(latents: Any, dataset: Mapping[str, Any]) -> np.ndarray:
    """[..., channels] float32: raw latents by the statistics of a dataset.json."""
    mean, std = (np.asarray(dataset[name], np.float32) for name in ("latent_mean", "latent_std"))
    return (np.asarray(latents, np.float32) - mean) / std


def denormalize(latent: np.ndarray, dataset: Mapping[str, Any]) -> np.ndarray:
    """Undo the normalisation of `Dataset.read`: what the image decoder takes."""
    return latent * np.asarray(dataset["latent_std"], np.float32) + np.asarray(dataset["latent_mean"], np.float32)


class ReadFailed(records.DatasetError):
    """A record of a data set that was opened cannot be read: the disk failed or is away, which is no wrong call."""


class Dataset:
    """A finished data set OUT/RES: its index, its statistics and its records.

    Args:
      path: OUT/RES.
      holdout_fraction: share of the images kept out of training.
      text_lengths: lengths that text is padded to; None: the longest caption rounded up to 64.
      normalize_vision: scale each vision vector to length sqrt(width).

    Raises:
      records.DatasetError: missing, unfinished, damaged, or nothing left to train on.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        holdout_fraction: float = 0.0,
        text_lengths: Sequence[int] | None = None,
        normalize_vision: bool = False,
    ):
        self.path = Path(path).expanduser()
        self.describe(records.load_dataset(self.path))
        self.normalize_vision = normalize_vision
        self.buckets = sorted(self.info["buckets"])
        keep = partial(kept_rows, holdout_fraction=holdout_fraction)
        self.index = {name: records.read_bucket_index(self.path, self.info, name, keep) for name in self.buckets}
        self.train, self.held_out, self._masked = {}, {}, {}
        for name, rows in self.index.items():
            held = (rows["flags"] & HELD_OUT).astype(bool)
            self.train[name], self.held_out[name] = (np.flatnonzero(part).astype(np.uint32) for part in (~held, held))
            self._masked[name] = bool((rows["flags"] & records.HAS_MASK).any())
        self.text_lengths = self._text_lengths(text_lengths)
        _allow_open_files(sum(info["shards"] for info in self.info["buckets"].values()))
        self._sources = {name: records.open_bucket(self.path, name) for name in self.buckets}
        self.closing = threading.Event()  # ends the waiting for a disk
        self._readers = ThreadPoolExecutor(READERS, "jaxdit-read")
        if not sum(map(len, self.train.values())):
            raise records.DatasetError(
                f"{path}: data.holdout_fraction={holdout_fraction} leaves none of its {self.info['count']} images to "
                "train on; make it smaller."
            )

    def digest(self) -> int:
        """31 bits of what decides the plan, the same in every process that sees the same data set."""
        digest = hashlib.sha256(repr(self.info["fingerprint"]).encode())
        for name in self.buckets:
            digest.update(name.encode())
            digest.update(self.index[name].tobytes())
        return int.from_bytes(digest.digest()[:4], "little") >> 1

    def describe(self, info: dict[str, Any]) -> None:
        """Take the content of dataset.json, or a run's copy of it, which keeps the statistics that the run began with."""
        self.info = info
        self.mean, self.std = (np.asarray(info[name], np.float32) for name in ("latent_mean", "latent_std"))

    def _text_lengths(self, wanted: Sequence[int] | None) -> tuple[int, ...]:
        longest, most = 0, self.info["text_longest"]
        for name, rows in self.index.items():
            lengths = np.maximum(rows["text_length"], rows["text_flip_length"])
            longest = max(longest, int(lengths.max()))
            if longest > most:
                (shard,) = self._shards(name, [int(lengths.argmax())])
                raise records.DatasetError(
                    f"{records.index_path(self.path, name, shard)} has a caption of {longest} tokens, dataset.json says {most} "
                    "at most; python -m encode.doctor tells which is damaged."
                )
        if not wanted:
            return (math.ceil(longest / TEXT_MULTIPLE) * TEXT_MULTIPLE,)
        if max(wanted) < longest:
            raise records.DatasetError(
                f"data.text_lengths={tuple(wanted)}: the longest caption of {self.path} has {longest} tokens; the "
                "largest length must hold it."
            )
        return tuple(sorted(wanted))

    def read(self, bucket: str, rows: np.ndarray, flips: np.ndarray) -> dict[str, np.ndarray]:
        """One batch of one bucket.

        Args:
          bucket: WIDTHxHEIGHT.
          rows: [batch] record numbers within the bucket.
          flips: [batch] bool; a sample that must not be flipped ignores it.

        Returns:
          latent [batch, h, w, c] float32, normalised (once, here); text [batch, length, width] bfloat16, left-aligned and
          zero-padded; text_length [batch] int32; vision [batch, width] float32; mask [batch, h, w] uint8 only where the
          bucket holds padded pictures.
        """
        index, samples = self.index[bucket][rows], self.records(bucket, rows)
        self._agree(bucket, rows, samples)
        flips = np.asarray(flips, bool) & (index["flags"] & records.CAN_FLIP).astype(bool)
        suffix = np.where(flips, "_flip", "")
        latents = [sample["latent" + end] for sample, end in zip(samples, suffix)]
        texts = [
            sample["text_flip"] if flip and len(sample["text_flip"]) else sample["text"]
            for sample, flip in zip(samples, flips)
        ]
        lengths = np.array([len(text) for text in texts], np.int32)
        bound = int(np.maximum(index["text_length"], index["text_flip_length"]).max())
        batch = {
            "latent": normalize(latents, self.mean, self.std),
            "text": pad_text(texts, next(length for length in self.text_lengths if length >= bound)),
            "text_length": lengths,
            "vision": scale_vision(
                np.stack([sample["vision" + end] for sample, end in zip(samples, suffix)]), self.normalize_vision
            ),
        }
        if self._masked[bucket]:
            whole = np.ones(latents[0].shape[:2], np.uint8)
            masks = [sample["mask"] if sample["mask"].size else whole for sample in samples]
            batch["mask"] = np.stack([mask[:, ::-1] if flip else mask for mask, flip in zip(masks, flips)])
        return batch

    def records(self, bucket: str, rows: Sequence[int] | np.ndarray) -> Sequence[Mapping[str, Any]]:
        """The raw records, as in encode.records; where they cannot be read, the files are opened anew and asked again.

        Raises:
          ReadFailed: in vain; after seconds where a file is damaged, after minutes where the disk is away, or when `closing`.
        """
        waits = iter(AGAIN)
        while True:
            try:
                return self._parsed(bucket, rows)
            except Exception as error:
                wait = next(waits, None)
                if wait is None or (wait > PATIENCE and os.path.exists(self.path / "dataset.json")):
                    raise ReadFailed(self._name_damage(bucket, rows, error)) from error
                logging.warning("%s: a record cannot be read (%s); asked again in %g s.", self.path, error, wait)
            if self.closing.wait(wait):
                raise ReadFailed(f"{self.path}: not waited for any longer, because the run is to end.")
            with contextlib.suppress(records.DatasetError):
                self._sources[bucket] = records.open_bucket(self.path, bucket)

    def _parsed(self, bucket: str, rows: Sequence[int] | np.ndarray) -> Sequence[Mapping[str, Any]]:
        source = self._sources[bucket]
        arrays = {name: source.dataset_info.features[name] for name in records.ARRAYS}
        return list(self._readers.map(lambda row: parse(source.data_source[int(row)], arrays), rows))

    def _agree(self, bucket: str, rows: np.ndarray, samples: Sequence[Mapping[str, Any]]) -> None:
        """An index has no checksum as a record has: a damaged one would flip what must not be, or hold out another image."""
        found = records.index_rows([{**sample, "pixel_hash": sample["pixel_hash"].decode()} for sample in samples])
        stored = self.index[bucket][rows]
        stored["flags"] &= HELD_OUT - 1
        wrong = np.flatnonzero(kept_rows(found) != stored)
        if len(wrong):
            (shard,) = self._shards(bucket, [int(np.asarray(rows)[wrong[0]])])
            raise records.DatasetError(
                f"{records.index_path(self.path, bucket, shard)} says otherwise than the record of {samples[wrong[0]]['id']} in "
                f"{records.shard_path(self.path, bucket, shard).name}; python -m encode.doctor tells which is damaged."
            )

    def _shards(self, bucket: str, rows: Sequence[int] | np.ndarray) -> list[int]:
        """The shards that hold these records, ascending."""
        ends = np.cumsum(
            [len(records.read_index(self.path, bucket, k)) for k in range(self.info["buckets"][bucket]["shards"])]
        )
        return sorted({int(np.searchsorted(ends, row, side="right")) for row in rows})

    def _name_damage(self, bucket: str, rows: np.ndarray, error: Exception) -> str:
        try:
            names = ", ".join(str(records.shard_path(self.path, bucket, shard)) for shard in self._shards(bucket, rows))
        except records.DatasetError:  # the whole folder is away
            names = str(records.bucket_folder(self.path, bucket))
        return (
            f"cannot read a record of {names}: {error}. If its disk was away, the same command goes on; if this is a copy, copy "
            f"the file again; python -m encode.doctor --data={self.path} --repair mends it where it was encoded."
        )

    def fixed_batches(
        self, split: str, batch_size: int, count: int, places: np.ndarray | None = None
    ) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray, int]]:
        """Images to measure on, unflipped, at most `count` of them, spread evenly over all.

        Args:
          split: "held_out" or "training".
          batch_size: of the batches.
          count: at most so many images.
          places: the rows of each batch that are wanted here; None: all.

        Yields:
          (batch, [batch, 3] uint32 numbers, how many of its rows are images): two numbers are a function of the image's id
          alone, the third is its rank among them by a hash of its pixels, from 0 to 2^32: evenly spread, alike in both splits.
          A short batch is filled up with copies, so that each bucket has one shape.
        """
        chosen = self.train if split == "training" else self.held_out
        total = sum(map(len, chosen.values()))
        count, end = min(count, total), 0
        chosen_of_all = np.array([k * total // count for k in range(count)], np.int64)  # in the row of all buckets
        picked: dict[str, np.ndarray] = {}
        for name in self.buckets:
            begin, end = end, end + len(chosen[name])
            inside = chosen_of_all[(begin <= chosen_of_all) & (chosen_of_all < end)]
            picked[name] = chosen[name][inside - begin]
        hashes = np.concatenate([self.index[name]["check"][rows] for name, rows in picked.items()])
        ranks = np.empty(count, np.int64)
        ranks[np.argsort(hashes, kind="stable")] = np.arange(count)
        ranks = ((ranks + 0.5) / count * 2**32).astype(np.uint32)
        for name, rows in picked.items():
            own, ranks = ranks[: len(rows)], ranks[len(rows) :]
            for start in range(0, len(rows), batch_size):
                part = np.arange(start, min(start + batch_size, len(rows)))
                filled = np.concatenate([part, np.full(batch_size - len(part), start)])
                filled = filled if places is None else filled[places]
                digests = [hashlib.sha256(sample["id"]).digest()[:8] for sample in self.records(name, rows[filled])]
                numbers = np.stack([np.frombuffer(digest, "<u4") for digest in digests])
                numbers = np.column_stack([numbers, own[filled]])
                yield self.read(name, rows[filled], np.zeros(len(filled), bool)), numbers, len(part)


def _allow_open_files(shards: int) -> None:
    """Each shard stays open once it was read, and by default a process may open 1,024 files: not enough for a million records."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = shards + 512
    if soft != resource.RLIM_INFINITY and soft < wanted:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def training_batches(
    dataset: Dataset, *, seed: int, micro_batch: int, flip: float, places: np.ndarray | None = None, ahead: int = 8
):
    """The endless training batches of `Dataset.read`, each with its "bucket", read ahead by a thread.

    Args:
      dataset, seed, micro_batch, flip: decide the plan, alike in every process.
      places: the rows of each micro-batch that are read here; None: all.
      ahead: micro-batches read before they are asked for.

    Returns:
      A grain.DatasetIterator; get_state/set_state give and take the position after the last batch handed out.
    """
    plan = order.Plan(dataset.train, seed=seed, micro_batch=micro_batch, flip=flip)

    def read(request):
        name, rows, flips = request["bucket"], request["rows"], request["flips"]
        if places is not None:
            rows, flips = rows[places], flips[places]
        return dataset.read(name, rows, flips) | {"bucket": name, "rows": rows}

    return iter(grain.experimental.ThreadPrefetchIterDataset(plan.map(read), prefetch_buffer_size=ahead))
