"""What the model is given for a wish: text tokens, a vision vector, the latent of a picture to start from.

Each distinct sentence or picture goes through its encoder once and is then kept on disk, by the encoder's fingerprint and a
hash of the content, so that the next call loads no encoder at all. Text and vision encoders leave the memory before this
returns. What cannot be read is a problem of the wishes that want it, not of the others.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from encode import commandline, records
from encode.records import InputError
from jaxdit import data
from jaxdit.cache import Cache
from jaxdit.orbax_log import first_line
from jaxdit.wishes import ID, Wish

MAX_PIXELS = 500_000_000  # of a reference
TEXTS = 32  # sentences in one go


@dataclass(frozen=True)
class Given:
    """The conditions of one wish: text [tokens, width], vision [width], init [h, w, c] raw latent; None is none."""

    text: np.ndarray | None
    vision: np.ndarray | None
    init: np.ndarray | None


def identify(wishes: Sequence[Wish]) -> dict[str, str]:
    """16 hexadecimal characters of the content of each file that the wishes name; no entry for what is no file."""
    names = {name for wish in wishes for name in wish.references if not name.startswith(ID)}
    names |= {wish.init for wish in wishes if wish.init}
    hashes = {}
    for name in sorted(names):
        if (path := commandline.path_of(name)).is_file():
            with contextlib.suppress(OSError):  # told when it is to be encoded
                hashes[name] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return hashes


def spelled(wish: Wish) -> Wish:
    """The wish with "id:" before each reference that is no file, so that no file which comes later is taken for it."""
    names = (
        name if name.startswith(ID) or commandline.path_of(name).is_file() else ID + name for name in wish.references
    )
    return replace(wish, references=tuple(names))


def encode(
    wishes: Sequence[Wish],
    config: Mapping[str, Any],
    dataset: Mapping[str, Any],
    *,
    hashes: Mapping[str, str],
    cache: Cache,
    vae: Any,
    known: Mapping[tuple[str, str], np.ndarray],
    tell: Callable[[str], None] = print,
) -> tuple[list[Given | None], list[str]]:
    """The conditions of all wishes.

    Args:
      wishes: what is to be drawn, `spelled`.
      config, dataset: of the working folder.
      hashes: from `identify`.
      cache: where to look first.
      vae: the image encoder, for pictures to start from.
      known: ("text", prompt) and ("vision", name): arrays that need no encoding.
      tell: takes a sentence about what is drawn otherwise than it was asked for.

    Returns:
      (conditions, one a wish, None where something of it cannot be had; a sentence for each problem).

    Raises:
      InputError: an encoder is missing, or is not the one that the data set was encoded with.
    """
    work = _Work(config, dataset, hashes, cache, dict(known), tell)
    if texts := sorted({wish.prompt for wish in wishes if wish.prompt and ("text", wish.prompt) not in known}):
        work.texts(texts)
    work.visions([(name, wish.where) for wish in wishes for name in wish.references if ("vision", name) not in known])
    _leave_memory()
    if inits := [(wish.init, wish.size, wish.where) for wish in wishes if wish.init]:
        work.inits(inits, vae)
    return [work.given(wish) for wish in wishes], work.problems


class _Work:
    """Arrays found so far, by kind and name, and what went wrong."""

    def __init__(self, config, dataset, hashes, cache, found, tell):
        self.tell = tell
        self.config, self.dataset, self.hashes, self.cache, self.found = config, dataset, hashes, cache, found
        self.problems: list[str] = []
        self.failed: set[tuple[str, str]] = set()

    def given(self, wish: Wish) -> Given | None:
        wanted = [("vision", name) for name in wish.references]
        wanted += [("init", f"{wish.init} {wish.size}")] if wish.init else []
        if self.failed & set(wanted):
            return None
        vectors = [self.found["vision", name] for name in wish.references]
        mixed = sum(weight * vector for weight, vector in zip(wish.mix, vectors)) if wish.mix else None
        return Given(
            self.found["text", wish.prompt] if wish.prompt else None,
            mixed if mixed is not None else vectors[0] if vectors else None,
            self.found["init", f"{wish.init} {wish.size}"] if wish.init else None,
        )

    def texts(self, prompts: Sequence[str]) -> None:
        fingerprint = self.dataset["fingerprint"]["text"]
        keys = {prompt: self.cache.key("text", fingerprint, prompt) for prompt in prompts}
        stored = {prompt: self.cache.get(key, "text", "cut") for prompt, key in keys.items()}
        missing = [prompt for prompt in prompts if stored[prompt] is None]
        if missing:
            encoder = self._load("text")
            for start in range(0, len(missing), TEXTS):
                part = missing[start : start + TEXTS]
                for prompt, tokens in zip(part, encoder.encode(part)):
                    # Rounded as in the records, which is what the model was trained on.
                    tokens = tokens.astype(records.DTYPES["bfloat16"]).astype(np.float32)
                    cut = np.array(_cut(prompt, encoder), np.str_)
                    stored[prompt] = self.cache.put(keys[prompt], text=tokens, cut=cut)
        for prompt in prompts:
            self.found["text", prompt] = stored[prompt]["text"]
            if cut := str(stored[prompt]["cut"]):
                limit = self.dataset["encoders"]["text"]["max_tokens"]
                self.tell(
                    f"A prompt is longer than the {limit} tokens that the text encoder takes; its last {len(cut):,} characters "
                    f"are cut: {_ends(cut)!r}"
                )

    def visions(self, references: Sequence[tuple[str, str]]) -> None:
        pictures, ids, wheres = [], [], {}
        for name, where in references:
            if wheres.setdefault(name, where) is not where or name in pictures + ids:
                continue
            path = commandline.path_of(name)
            if name.startswith(ID):
                ids.append(name)
            elif path.suffix == ".npy":
                self._try("vision", name, where, lambda path=path: self._vector(path))
            else:
                pictures.append(name)
        if pictures:
            self._pictures(pictures, wheres)
        if ids:
            self._ids(ids, wheres)

    def _pictures(self, names: Sequence[str], wheres: Mapping[str, str]) -> None:
        from encode import images

        fingerprint, encoder = self.dataset["fingerprint"].get("vision", records.PRECOMPUTED), None
        cache = self.cache if fingerprint != records.PRECOMPUTED else Cache(None)
        for name in names:
            key = cache.key("vision", fingerprint, self.hashes.get(name, ""))
            if (stored := cache.get(key, "vision")) is not None:
                self.found["vision", name] = stored["vision"]
                continue
            if encoder is None:
                encoder = self._load("vision")

            def look(name=name, key=key, encoder=encoder):
                pixels = images.decode(commandline.path_of(name), MAX_PIXELS)
                return cache.put(key, vision=np.asarray(encoder.encode([pixels])[0], np.float32))["vision"]

            self._try("vision", name, wheres[name], look)

    def _ids(self, names: Sequence[str], wheres: Mapping[str, str]) -> None:
        """Images of the data set."""
        path = self.config["data"]["path"]
        try:
            source = data.Dataset(path)
            places = find_ids(source, self.cache)
        except InputError as error:
            source, places = None, {}
            why = f"the data set {path} cannot be asked for an image of this name ({error})"
        else:
            why = f"no image of this name in the data set {path}"
        by_file = {image.rsplit("/", 1)[-1]: image for image in places}
        for name in names:
            if name.removeprefix(ID) in places:
                bucket, row = places[name.removeprefix(ID)]
                self.found["vision", name] = np.asarray(source.records(bucket, [row])[0]["vision"], np.float32)
            else:
                given = commandline.path_of(name.removeprefix(ID))
                file = "" if given.is_file() else "that is a folder, and " if given.is_dir() else "no such file, and "
                near = f"; is it {by_file[given.name]}?" if given.name in by_file else ""
                self._fail("vision", name, wheres[name], file + why + near)

    def _vector(self, path: Path) -> np.ndarray:
        try:
            vector = np.load(path, allow_pickle=False)
            if not isinstance(vector, np.ndarray):
                raise ValueError("an archive of several arrays")
        except (Exception, MemoryError) as error:  # its header is read as Python, its shape may be any
            raise ValueError(f"not a file of numbers that NumPy reads without pickle ({first_line(error)})") from error
        width = self.dataset["widths"]["vision"]
        if vector.size != width or vector.shape not in ((width,), (1, width)) or vector.dtype.kind not in "fiu":
            raise ValueError(
                f"an array {list(vector.shape)} of {vector.dtype}; the model takes a vector of {width} numbers"
            )
        if not np.isfinite(vector).all():
            raise ValueError("not all of its numbers are finite")
        return vector.reshape(width).astype(np.float32)

    def inits(self, wanted: Sequence[tuple[str, tuple[int, int], str]], vae: Any) -> None:
        from encode import encoders, images

        fingerprint = self.dataset["fingerprint"]["vae"]
        for name, size, where in wanted:
            place = f"{name} {size}"
            if ("init", place) in self.found or ("init", place) in self.failed:
                continue
            key = self.cache.key("init", fingerprint, self.hashes.get(name, ""), size)
            if (stored := self.cache.get(key, "init")) is not None:
                self.found["init", place] = stored["init"]
                continue
            encoders.refuse_another("vae", vae, self.dataset["fingerprint"])

            def look(name=name, size=size, key=key):
                pixels = images.resize(images.decode(commandline.path_of(name), MAX_PIXELS), *size)
                return self.cache.put(key, init=vae.encode(pixels[None])[0])["init"]

            self._try("init", place, f"--init={name}" if where.startswith("--") else f"{where}: init={name}", look)

    def _try(self, kind: str, name: str, where: str, look: Callable[[], np.ndarray]) -> None:
        from encode import images

        try:
            self.found[kind, name] = look()
        except (images.ImageProblem, OSError, ValueError) as error:
            self._fail(kind, name, where, str(error).replace("config.max_pixels", "the limit"))

    def _fail(self, kind: str, name: str, where: str, why: str) -> None:
        self.failed.add((kind, name))
        named = where if name.removeprefix(ID) in where or kind == "init" else f"{where}: {name.removeprefix(ID)}"
        self.problems.append(f"{named}: {why}")

    def _load(self, kind: str) -> Any:
        from encode import encoders

        load = {"text": encoders.load_text, "vision": encoders.load_vision}[kind]
        section = self.dataset["encoders"][kind]
        if section["name"] != "demo":  # gigabytes from a disk
            print(f"Loading the {kind} encoder from {section['path']} ...", flush=True)
        encoder = load(section)
        encoders.refuse_another(kind, encoder, self.dataset["fingerprint"])
        return encoder


def find_ids(source: data.Dataset, cache: Cache) -> dict[str, tuple[str, int]]:
    """{id: (bucket, row)} of a data set; read from its records once, since its index has no names."""
    key = cache.key("ids", str(source.path.resolve()), hashlib.sha256(json.dumps(source.info).encode()).hexdigest())
    stored = cache.get(key, "ids", "places")
    if stored is None:
        count = sum(len(rows) for rows in source.index.values())
        if count > 2000:
            print(f"Looking for names among the {count:,} images of {source.path}, once.")
        ids, places = [], []
        for bucket in source.buckets:
            for start in range(0, len(source.index[bucket]), 64):
                rows = range(start, min(start + 64, len(source.index[bucket])))
                ids += [record["id"].decode() for record in source.records(bucket, rows)]
                places += [(bucket, str(row)) for row in rows]
        stored = cache.put(key, ids=np.array(ids, np.str_), places=np.array(places, np.str_))
    return {str(name): (str(bucket), int(row)) for name, (bucket, row) in zip(stored["ids"], stored["places"])}


def _cut(prompt: str, encoder: Any) -> str:
    """What of a prompt the encoder never sees; "" where it takes the whole."""
    if encoder.count_tokens(prompt) <= encoder.max_tokens:
        return ""
    low, high = 0, len(prompt)  # the longest beginning that fits
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if encoder.count_tokens(prompt[:middle]) <= encoder.max_tokens else (low, middle - 1)
    return prompt[low:].strip()


def _ends(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:80]} ... {text[-35:]}"


def _leave_memory() -> None:
    """Give back what the encoders held, on the card too."""
    gc.collect()
    torch = sys.modules.get("torch")  # there only if a real encoder has been loaded
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
