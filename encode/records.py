"""The record contract between `encode` and `jaxdit`: features, shard and index names, dataset.json.

A data set OUT/RES holds one TFDS data set a bucket (ArrayRecord shards, readable by TFDS without TensorFlow), one index
file a shard, and dataset.json, written last: its presence means that the data set is complete. TFDS would store a
bfloat16 tensor as nothing at all and a float16 one as float32 lists, so arrays are raw bytes (`Array`, below).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from etils import epath
from tensorflow_datasets.proto import tf_example_pb2

from encode.whole_files import whole_file

SCHEMA = 1
PLAN = 2  # of plan.json: since 2 it keeps "flips", which programs that know 1 alone would leave behind
VERSION = "1.0.0"
SPLIT = "train"
SHARD_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}"  # no total in the name: new photographs add shards
DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32), "uint8": np.dtype(np.uint8)}
INDEX_DTYPE = np.dtype([("pixel_hash", "S32"), ("text_length", "<i4"), ("text_flip_length", "<i4"), ("flags", "u1")])
CAN_FLIP, HAS_MASK = 1, 2  # bits of the index column "flags"
PRECOMPUTED = {"id": "precomputed"}  # fingerprint of vision vectors that were given: nobody knows their encoder
UNREADABLE = (RuntimeError, ValueError, IndexError, OSError)  # what ArrayRecordReader raises of a damaged shard
ARRAYS = ("latent", "latent_flip", "text", "text_flip", "vision", "vision_flip", "mask")
STRINGS = ("id", "caption", "caption_flip", "pixel_hash")


class InputError(ValueError):
    """The call or the input is wrong: the message names what, and what to do; commands end with exit code 2."""


class DatasetError(InputError):
    """A data set that is missing, unfinished, damaged or of another kind."""


class Array(tfds.features.FeatureConnector):
    """An array stored as its raw little-endian bytes.

    Args:
      shape: the shape; None stands for a length found from the number of bytes (at most one).
      dtype: "bfloat16", "float32" or "uint8".
      optional: no bytes at all are then an array of shape [0, ...].
      doc: given by TFDS alone, when it reads features.json.
    """

    def __init__(self, *, shape: Sequence[int | None], dtype: str, optional: bool = False, doc: Any = None):
        super().__init__(doc=doc)
        self._array_shape = tuple(shape)
        self._array_dtype = dtype
        self._optional = optional

    def get_tensor_info(self) -> tfds.features.TensorInfo:
        return tfds.features.TensorInfo(shape=(), dtype=np.object_)

    def encode_example(self, value: np.ndarray) -> bytes:
        value = np.asarray(value)
        dtype = DTYPES[self._array_dtype]
        if value.dtype != dtype:
            raise ValueError(f"array has dtype {value.dtype}, the record wants {dtype}")
        absent = self._optional and value.size == 0
        fits = len(value.shape) == len(self._array_shape) and all(
            want is None or want == got for want, got in zip(self._array_shape, value.shape)
        )
        if not (absent or fits):
            raise ValueError(f"array has shape {list(value.shape)}, the record wants {list(self._array_shape)}")
        return np.ascontiguousarray(value).tobytes()

    def decode_example_np(self, value: bytes) -> np.ndarray:
        flat = np.frombuffer(value, DTYPES[self._array_dtype])
        if self._optional and flat.size == 0:
            return flat.reshape([0] * len(self._array_shape))
        return flat.reshape([-1 if size is None else size for size in self._array_shape])

    decode_example = decode_example_np

    def to_json_content(self) -> dict[str, Any]:
        return {"shape": list(self._array_shape), "dtype": self._array_dtype, "optional": self._optional}


def features(latent_shape: Sequence[int], text_width: int, vision_width: int) -> tfds.features.FeaturesDict:
    """The features of one record.

    Args:
      latent_shape: [height / 8, width / 8, channels] of the bucket.
      text_width: width of a text token.
      vision_width: width of the vision vector.
    """
    latent = Array(shape=latent_shape, dtype="bfloat16")
    text = Array(shape=(None, text_width), dtype="bfloat16")
    vision = Array(shape=(vision_width,), dtype="float32")
    return tfds.features.FeaturesDict(
        {name: tfds.features.Text() for name in STRINGS}
        | {
            "latent": latent,
            "latent_flip": latent,
            "text": text,
            "text_flip": text,
            "vision": vision,
            "vision_flip": vision,
            "mask": Array(shape=latent_shape[:2], dtype="uint8", optional=True),
        }
    )


def bucket_name(width: int, height: int) -> str:
    """WIDTHxHEIGHT in pixels, the name of a bucket's folder."""
    return f"{width}x{height}"


def bucket_folder(root: Path, bucket: str) -> Path:
    return Path(root) / bucket / VERSION


def shard_path(root: Path, bucket: str, shard: int) -> Path:
    return bucket_folder(root, bucket) / f"latents-{SPLIT}.array_record-{shard:05d}"


def index_path(root: Path, bucket: str, shard: int) -> Path:
    """The index of one shard; written after the shard, so its presence means that the shard is complete."""
    return Path(root) / f"index-{bucket}-{shard:05d}.npy"


def index_rows(records: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """[records] of INDEX_DTYPE: what a reader must know of each record without reading it."""
    rows = np.zeros(len(records), INDEX_DTYPE)
    for row, record in zip(rows, records):
        row["pixel_hash"] = record["pixel_hash"].encode()
        row["text_length"] = len(record["text"])
        row["text_flip_length"] = len(record["text_flip"]) or len(record["text"])
        row["flags"] = CAN_FLIP * bool(record["caption_flip"]) + HAS_MASK * bool(np.size(record["mask"]))
    return rows


def write_shard(root: Path, bucket: str, shard: int, records: Sequence[Mapping[str, Any]], spec) -> None:
    """Write one shard and then its index, each whole or not at all.

    Args:
      root: OUT/RES.
      bucket: WIDTHxHEIGHT.
      shard: number of the shard within the bucket.
      records: fields as in `features`.
      spec: the result of `features` for this bucket.

    Raises:
      ValueError: a field has another shape or dtype than the contract; the message names the sample.
      OSError: the disk refused; nothing of this shard is published.
    """
    target = shard_path(root, bucket, shard)
    target.parent.mkdir(parents=True, exist_ok=True)
    serialized = []
    for record in records:
        try:
            serialized.append(_serialize(record, spec))
        except Exception as error:
            raise ValueError(f"{record['id']}: cannot be stored in bucket {bucket}: {error}") from error
    with whole_file(target) as temporary:
        try:
            writer = ArrayRecordWriter(str(temporary), "group_size:1")
            try:
                for example in serialized:
                    writer.write(example)
            finally:
                writer.close()
        except RuntimeError as error:  # a full disk, most of the time; the writer has no other word for it
            raise OSError(errno.ENOSPC, f"the shard cannot be written ({error})", str(temporary)) from error
        if not _holds(temporary, serialized):  # nor does it always report one
            raise OSError(errno.ENOSPC, "the shard does not read back as written; is the disk full?", str(temporary))
    with whole_file(index_path(root, bucket, shard)) as temporary, open(temporary, "wb") as file:
        np.save(file, index_rows(records), allow_pickle=False)


def _serialize(record: Mapping[str, Any], spec) -> bytes:
    """The bytes of one record, the same in every process: protobuf orders the keys of a map by a seed of the process."""
    example = tf_example_pb2.Example.FromString(spec.serialize_example(record))
    return example.SerializeToString(deterministic=True)


def _count(path: Path) -> int | None:
    """Number of records of a shard; None where it cannot be opened."""
    try:
        reader = ArrayRecordReader(str(path))
        try:
            return reader.num_records()
        finally:
            reader.close()
    except (RuntimeError, ValueError, IndexError, OSError):
        return None


def _holds(path: Path, serialized: Sequence[bytes]) -> bool:
    try:
        reader = ArrayRecordReader(str(path))
        try:
            return reader.num_records() == len(serialized) and list(reader.read_all()) == list(serialized)
        finally:
            reader.close()
    except (RuntimeError, ValueError, IndexError):
        return False


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Hold a folder's lock, so that two processes never write into it; it ends with the process, however that ends.

    Raises:
      InputError: another process holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        if not folder.is_symlink():
            raise
        raise InputError(
            f"{folder} is a link to {os.readlink(folder)}, which is not there; is its disk mounted?"
        ) from error
    try:
        lock = open(folder / ".lock", "w")  # noqa: SIM115
    except OSError as error:
        error.filename = str(folder)
        raise
    with lock as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"{folder}: another process is writing into it; wait for it, or name another folder."
            ) from error
        yield


def read_json(path: Path, advice: str) -> dict[str, Any]:
    """A JSON file of our own.

    Raises:
      InputError: it is damaged; the message ends with the advice.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({error}); {advice}.") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} is damaged (no JSON object); {advice}.")
    return value


def finish_bucket(root: Path, bucket: str, spec) -> None:
    """Write features.json and dataset_info.json, so that TFDS reads the bucket's shards."""
    folder = bucket_folder(root, bucket)
    shards = sorted(folder.glob(f"latents-{SPLIT}.array_record-*"))
    lengths = [len(read_index(root, bucket, shard)) for shard in range(len(shards))]
    template = tfds.core.ShardedFileTemplate(
        data_dir=epath.Path(folder), template=SHARD_TEMPLATE, dataset_name="latents", filetype_suffix="array_record"
    )
    split = tfds.core.SplitInfo(
        name=SPLIT,
        shard_lengths=lengths,
        num_bytes=sum(shard.stat().st_size for shard in shards),
        filename_template=template,
    )
    tfds.folder_dataset.write_metadata(
        data_dir=os.fspath(folder),
        features=spec,
        split_infos=[split],
        filename_template=SHARD_TEMPLATE,
        check_data=False,
        description=f"Latents, text tokens and vision vectors of the bucket {bucket} (width x height in pixels).",
    )


def load_dataset(root: Path) -> dict[str, Any]:
    """dataset.json of a finished data set.

    Raises:
      DatasetError: the folder is missing, is not OUT/RES, is not finished, or has another schema version.
    """
    root = Path(root)
    path = root / "dataset.json"
    if not root.is_dir():
        raise DatasetError(f"{root}: no such folder; a data set is the folder OUT/RES that encode.main wrote.")
    if not path.exists():
        inside = sorted(child.parent.name for child in root.glob("*/dataset.json"))
        if inside:
            raise DatasetError(f"{root} holds data sets but is none; name one of them: {', '.join(inside)}.")
        if not (root.parent / "plan.json").exists() and not any(root.glob("index-*.npy")):
            raise DatasetError(
                f"{root}: no dataset.json, so this is no data set; it is the folder OUT/RES of encode.main."
            )
        raise DatasetError(
            f"{root}: dataset.json is missing, so this data set is not finished; run encode.main again with the same "
            "configuration and it will go on where it stopped."
        )
    try:
        dataset = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DatasetError(f"{path}: not readable as JSON ({error}); run encode.main again to rewrite it.") from error
    if dataset.get("schema") != SCHEMA:
        raise DatasetError(
            f"{path}: schema version {dataset.get('schema')} found, this program reads version {SCHEMA}; encode the "
            "photographs again into a new folder, or use the program that wrote it."
        )
    return dataset


def read_index(root: Path, bucket: str, shard: int) -> np.ndarray:
    """[records] of INDEX_DTYPE of one shard."""
    path = index_path(root, bucket, shard)
    try:
        rows = np.load(path, allow_pickle=False)
    except Exception as error:  # NumPy parses the header as Python: a flipped bit there can raise anything
        raise DatasetError(f"{path}: the index cannot be read ({error}); run encode.main again to mend it.") from error
    if rows.dtype != INDEX_DTYPE:
        raise DatasetError(f"{path}: columns {rows.dtype.names} found, {INDEX_DTYPE.names} expected; encode again.")
    return rows


def read_bucket_index(
    root: Path, dataset: Mapping[str, Any], bucket: str, keep: Callable[[np.ndarray], np.ndarray] = np.asarray
) -> np.ndarray:
    """[samples] of INDEX_DTYPE of one bucket, in record order; or of what `keep` makes of each shard's rows."""
    info = dataset["buckets"][bucket]
    rows = np.concatenate([keep(read_index(root, bucket, shard)) for shard in range(info["shards"])])
    if len(rows) != info["count"]:
        raise DatasetError(f"{root}/index-{bucket}-*: {len(rows)} rows found, dataset.json says {info['count']}.")
    return rows


def open_bucket(root: Path, bucket: str):
    """The records of one bucket as a random-access sequence (a TFDS data source; no TensorFlow).

    Raises:
      DatasetError: a shard is missing, cut or holds another number of records than its index; the message names it.
    """
    folder = bucket_folder(root, bucket)
    try:
        shards = len(list(Path(root).glob(f"index-{bucket}-*.npy")))
    except OSError as error:
        raise DatasetError(f"{root}: the folder cannot be read ({error.strerror}).") from error
    for shard in range(shards):
        path, wanted = shard_path(root, bucket, shard), len(read_index(root, bucket, shard))
        found = _count(path)
        if found != wanted:
            raise DatasetError(
                f"{path}: {'cannot be opened' if found is None else f'{found} records found'}, its index "
                f"{index_path(root, bucket, shard).name} says {wanted}; if this is a copy, copy both again, else remove them and "
                "dataset.json, and run encode.main again."
            )
    try:
        source = tfds.builder_from_directory(folder).as_data_source(SPLIT)
        len(source)
        return source
    except Exception as error:
        raise DatasetError(f"{folder}: the shards cannot be opened: {error}") from error
