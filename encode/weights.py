"""Where a model's files are, and what they hold: a local folder, or a Hugging Face id in the cache or on the network.

Only safetensors are read and no code of a model folder is run; a folder that would load in part is refused. The weights'
hash is taken over what will be loaded, so that a folder and the hub's copy of it are the same encoder.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from encode.records import InputError

log = logging.getLogger(__name__)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class Wanted:
    """A kind of model, as it is published.

    Attributes:
      kind: section of the configuration: vae, text or vision.
      what: the model in words, for a person who has to find it.
      field, values: what config.json says of such a model.
      stem: name of the weights without .safetensors.
      inside: the subfolder that holds it in a larger repository, or "".
      files: further files that are read.
    """

    kind: str
    what: str
    field: str
    values: tuple[str, ...]
    stem: str
    inside: str = ""
    files: tuple[str, ...] = ()

    @property
    def patterns(self) -> list[str]:
        """What is fetched from a repository, which may hold tens of gigabytes of other models."""
        names = [
            "config.json",
            *(f"{self.stem}{end}" for end in (".safetensors", "-*.safetensors", ".safetensors.index.json")),
        ]
        return [*names, *(f"{self.inside}/{name}" for name in names if self.inside), *self.files]


def find(wanted: Wanted, path: str) -> tuple[Path, dict[str, Any]]:
    """The folder that holds config.json, and what that says.

    Args:
      wanted: the kind of model.
      path: a folder, or the id of a Hugging Face repository (owner/name).

    Raises:
      InputError: it cannot be had, or is of another kind; the sentence says what to do.
    """
    folder = _locate(wanted, path)
    if not (folder / "config.json").is_file() and (folder / wanted.inside / "config.json").is_file():
        folder = folder / wanted.inside
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{wanted.kind}.path={folder}: config.json is missing; {found(folder)}; wanted is {wanted.what}."
        )
    config = read_json(wanted.kind, folder / "config.json")
    if config.get(wanted.field) not in wanted.values:
        raise InputError(
            f"{wanted.kind}.path={folder}: config.json says {wanted.field}={config.get(wanted.field)!r}, but "
            f"{' or '.join(map(repr, wanted.values))} is wanted: {wanted.what}."
        )
    return folder, config


def weights_hash(wanted: Wanted, folder: Path) -> str:
    """SHA-256 of the safetensors files that will be loaded, in order of their names."""
    files, missing = _weight_files(wanted, folder)
    if files and not missing:
        return sha256(files)
    if files:
        raise InputError(f"{wanted.kind}.path={folder}: {', '.join(missing)} is missing; download it again.")
    name = f"{wanted.stem}.safetensors"
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickled:
        raise InputError(
            f"{wanted.kind}.path={folder}: only {', '.join(pickled)} is there, a pickle, which can run code when it is "
            f"opened; download {name}, or convert it once where you trust it."
        )
    raise InputError(f"{wanted.kind}.path={folder}: {name} is missing; {found(folder)}.")


def load(wanted: Wanted, folder: Path, model: Any, **options: Any) -> Any:
    """A module with all of its weights in float32, or a refusal: by itself the library fills gaps with random numbers."""
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()  # it reports T5's decoder, which is not wanted; gaps we refuse below
    transformers.utils.logging.disable_progress_bar()
    name = "torch_dtype" if wanted.kind == "vae" else "dtype"
    options |= {name: torch.float32, "use_safetensors": True, "local_files_only": True, "output_loading_info": True}
    try:
        module, info = model.from_pretrained(folder, **options)
    except Exception as error:
        raise InputError(f"{wanted.kind}.path={folder}: the model cannot be loaded: {error}") from error
    gaps = [*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])]
    if gaps:
        raise InputError(
            f"{wanted.kind}.path={folder}: {len(gaps)} weights are missing or have another shape, {gaps[0]} for one; "
            "config.json and the weights do not belong together."
        )
    return module


def read_json(kind: str, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{kind}.path: {path} is not readable as JSON ({error}); download it again.") from error
    if not isinstance(value, dict):
        raise InputError(f"{kind}.path: {path} holds no JSON object; download it again.")
    return value


def found(folder: Path) -> str:
    """What a folder holds, in words."""
    names = sorted(path.name for path in folder.iterdir())
    return f"found there: {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}" if names else "it is empty"


def sha256(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            while part := file.read(1 << 22):
                digest.update(part)
    return digest.hexdigest()


def _weight_files(wanted: Wanted, folder: Path) -> tuple[list[Path], list[str]]:
    """The safetensors that config.json belongs to, and the names of those that are not there."""
    whole, index = (folder / f"{wanted.stem}{end}" for end in (".safetensors", ".safetensors.index.json"))
    files = [whole] if whole.is_file() else []
    if index.is_file():
        named = read_json(wanted.kind, index).get("weight_map")
        if not isinstance(named, dict):
            raise InputError(f"{wanted.kind}.path: {index} names no weights; download it again.")
        files += [folder / Path(name).name for name in sorted(set(named.values()))]
    return files, [file.name for file in files if not file.is_file()]


def _locate(wanted: Wanted, path: str) -> Path:
    """The folder that a person's path means, fetched where it has to be."""
    if not path:
        raise InputError(
            f"{wanted.kind}.path is empty; give the folder of {wanted.what} with --config.{wanted.kind}.path=DIR, or the id "
            "of a Hugging Face repository."
        )
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if HUB_ID.fullmatch(str(path)):
        return _from_hub(wanted, str(path))
    raise InputError(
        f"{wanted.kind}.path={folder}: no such folder; give the folder that holds {wanted.what}. A data set or working folder "
        f"brought from another machine names it in its dataset.json, under encoders.{wanted.kind}.path."
    )


def _from_hub(wanted: Wanted, name: str) -> Path:
    """The snapshot of a repository: from the cache, where that has all that is needed, without a word to the network."""
    import huggingface_hub
    from huggingface_hub import constants, errors

    try:
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted.patterns, local_files_only=True))
        if _complete(wanted, folder):
            return folder
    except errors.LocalEntryNotFoundError:
        pass
    cache = Path(constants.HF_HUB_CACHE)
    try:
        files = huggingface_hub.snapshot_download(name, allow_patterns=wanted.patterns, dry_run=True)
        size = sum(file.file_size or 0 for file in files if file.will_download)
        if size > (free := _free(cache)):
            raise OSError(errno.ENOSPC, f"{size / 1e6:,.0f} MB are needed, {free / 1e6:,.0f} MB are free")
        words = "%s.path=%s: downloading %s MB from %s into %s."
        log.info(words, wanted.kind, name, f"{size / 1e6:,.0f}", constants.ENDPOINT, cache)
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted.patterns))
    except Exception as error:
        raise InputError(f"{wanted.kind}.path={name}: {_refusal(wanted, name, error)}") from error
    if not _complete(wanted, folder):
        raise InputError(
            f"{wanted.kind}.path={name}: this repository has no {wanted.stem}.safetensors with its config.json, and no "
            f"other weights are loaded; wanted is {wanted.what}."
        )
    return folder


def _complete(wanted: Wanted, folder: Path) -> bool:
    for candidate in (folder, folder / wanted.inside):
        if (candidate / "config.json").is_file():
            files, missing = _weight_files(wanted, candidate)
            return bool(files) and not missing
    return False


def _free(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _refusal(wanted: Wanted, name: str, error: Exception) -> str:
    """Why a repository cannot be had, and what to do, in one sentence without its end."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.DryRunError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    page = f"{constants.ENDPOINT}/{name}"
    only = "".join(f"--include '{pattern}' " for pattern in wanted.patterns)
    elsewhere = (
        f"download it elsewhere (hf download {name} {only}--local-dir DIR) and set --config.{wanted.kind}.path=DIR"
    )
    if isinstance(error, errors.GatedRepoError):
        return (
            f"its owner asks for consent first: accept the terms at {page}, then run `hf auth login` (or set HF_TOKEN); "
            f"or {elsewhere}."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"no folder of this name is here, and no such repository is at {page} (or it is private, and `hf auth login` "
            f"opens it); wanted is {wanted.what}."
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"the disk of {constants.HF_HUB_CACHE} is full ({error.strerror}); make room, or set HF_HOME to a folder on "
            "another disk."
        )
    if isinstance(error, errors.HfHubHTTPError):
        return (
            f"{constants.ENDPOINT} answers with status {error.response.status_code}; try again later, or {elsewhere}."
        )
    reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{type(error).__name__}: {_first_line(error)}"
    return (
        f"no folder of this name is here, {constants.HF_HUB_CACHE} does not hold it, and {constants.ENDPOINT} cannot be "
        f"reached ({reason}); connect to the network, or {elsewhere}."
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0].rstrip(".")
