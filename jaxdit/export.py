"""python -m jaxdit.export --workdir=DIR --out=FOLDER [--step=N] [--raw] [--copy_encoders] [--format=diffusers|comfyui]
python -m jaxdit.export --import=FOLDER --workdir=NEW

A folder that draws without JAX and without this repository: safetensors in the layout of diffusers, the model's module and
pipeline in PyTorch (torch_dit), and a model card out of the run's records. comfyui wraps it into a custom node. --import makes a
working folder out of such a folder again. Absolute paths of this machine stay out of it, but for encoders named by one.
"""

from __future__ import annotations

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing is computed, and the card may be training
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import contextlib
import errno
import shlex
import shutil
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from absl import flags
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from encode import commandline
from encode.records import InputError, read_json
from encode.whole_files import write_json
from jaxdit import card, checkpoint, model, seal, state_dict, trained

ROOT = Path(__file__).parents[1]
MARK = "export.json"  # what makes a folder ours
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
TRAINING = ("config.json", "dataset.json", "origin.json")  # what a working folder needs, in training/
SIZES = ("layers", "width", "heads", "patch", "channels", "text_width", "vision_width")
SOURCES = ("__init__.py", "model.py", "encoders.py", "pipeline.py")
COMPONENTS = {"vae": ("vae",), "text": ("text_encoder", "tokenizer"), "vision": ("image_encoder",)}


def export(
    workdir: Path, out: Path, *, step: int | None = None, raw: bool = False, form: str = "diffusers", copy: bool = False
) -> dict[str, Any]:
    """Write the folder; one that is there and is an untouched export of ours is replaced when the new one is whole.

    Args:
      workdir: a working folder.
      out: the folder to be.
      step: which saved step; None: the newest.
      raw: the raw weights instead of the averaged ones.
      form: "diffusers", or "comfyui": a custom node that holds the former in model/.
      copy: take the encoders along, where they are models on disk.

    Returns:
      What export.json says.

    Raises:
      InputError: nothing to export, an encoder that is not there, or a folder at `out` that is not ours to replace.
    """
    refuse_strangers(out)
    run = trained.load(workdir, step=step, raw=raw)
    with _replacing(out) as new:
        folder = new / "model" if form == "comfyui" else new
        folder.mkdir(exist_ok=True)
        _write_model(folder, run)
        copied = _copy_encoders(folder, run.dataset) if copy else {}
        write_json(folder / "model_index.json", _pipeline_config(run, copied))
        _copy_sources(folder, run.dataset)
        _write_training(folder / "training", workdir)
        parameters = model.count_parameters(run.params)
        problems = card.write(
            workdir, folder, title=out.resolve().name, step=run.step, raw=raw, parameters=parameters, copied=[*copied]
        )
        record = {
            "made_by": "jaxdit.export",
            "step": run.step,
            "weights": "raw" if raw else "averaged",
            "parameters": parameters,
        }
        _mark(folder, record | {"format": "diffusers"})
        if form == "comfyui":
            shutil.copyfile(ROOT / "torch_dit" / "comfyui.py", new / "__init__.py")
            (new / "README.md").write_text(COMFYUI.format(name=out.resolve().name), encoding="utf-8")
            _mark(new, record | {"format": form})
    for problem in problems:
        print(f"The model card leaves out a record: {problem}")
    return record


def take_in(folder: Path, workdir: Path) -> dict[str, Any]:
    """Make a working folder out of an exported one: it can be sampled, and started from with train.init_from.

    Args:
      folder: what `export` wrote, in the layout of diffusers.
      workdir: a folder that does not exist yet, or is empty.

    Returns:
      What its export.json says: step, weights and more.

    Raises:
      InputError: not an exported folder, a damaged one, or a workdir that is in use.
    """
    if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
        raise InputError(f"--workdir={workdir} is there already; name a new folder for what is imported.")
    record = _record(folder)
    if record["format"] != "diffusers":
        raise InputError(f"--import={folder} is a node for ComfyUI; its model is in {folder / 'model'}: import that.")
    for name in (WEIGHTS, "training/config.json", "training/dataset.json"):
        path = folder / name
        if not path.is_file():
            raise InputError(f"--import={folder}: {name} is missing; export the model again.")
        if seal.sha256(path) != record["files"].get(name):
            raise InputError(f"--import={folder}: {name} is not what was exported (its SHA-256 differs); export again.")
    config, dataset = trained.describe(folder / "training")
    _, shapes = model.abstract(trained.model_settings(config["model"], dataset["widths"]))
    try:
        params = state_dict.to_tree(load_file(folder / WEIGHTS))
        state_dict.check(params, shapes)
    except (SafetensorError, ValueError) as error:
        raise InputError(
            f"--import={folder}: {WEIGHTS} does not hold this model ({error}); export it again."
        ) from error
    for kind, names in COMPONENTS.items():
        if (folder / names[0]).is_dir():
            dataset["encoders"][kind]["path"] = str((folder / names[0]).resolve())
    with _replacing(workdir) as new:
        write_json(new / "dataset.json", dataset)
        for name in ("config.json", "origin.json"):
            if (folder / "training" / name).is_file():
                shutil.copyfile(folder / "training" / name, new / name)
        checkpoint.save_weights(new, record["step"], params)
    return record


def refuse_strangers(out: Path) -> None:
    """Replacing a folder must lose nothing that we did not write.

    Raises:
      InputError: something is at `out` that is no export of ours, or one that somebody has changed; the message names it.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not out.is_dir():
        raise InputError(f"--out={out} is a file; name a folder.")
    if not (out / MARK).is_file():
        names = ", ".join(sorted(path.name for path in out.iterdir())[:3])
        raise InputError(
            f"--out={out} holds {names} and no {MARK}, so it is no export of ours; name a new or empty folder."
        )
    files = read_json(out / MARK, "remove the folder, or name another").get("files", {})
    changed = []
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if path.is_dir() or "__pycache__" in path.parts or name in (MARK, f"model/{MARK}"):
            continue
        if name not in files or seal.sha256(path) != files[name]:
            changed.append(name)
    if changed:
        raise InputError(
            f"--out={out}: {', '.join(changed[:3])}{' ...' if len(changed) > 3 else ''} would be lost: not written by us, or "
            "changed since; move it away, or name another folder."
        )


def _write_model(folder: Path, run: trained.Trained) -> None:
    settings = trained.model_settings(run.config["model"], run.dataset["widths"])
    version = metadata.version("diffusers")
    for name in ("transformer", "scheduler"):
        (folder / name).mkdir()
    try:
        save_file(state_dict.to_state_dict(run.params), folder / WEIGHTS, metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk, most of the time
        raise OSError(errno.ENOSPC, f"the weights cannot be written ({error})", str(folder)) from error
    header = {"_class_name": "DiTModel", "_diffusers_version": version}
    write_json(folder / "transformer" / "config.json", header | {name: settings[name] for name in SIZES})
    header = {"_class_name": "FlowMatchEulerDiscreteScheduler", "_diffusers_version": version}
    scheduler = {"num_train_timesteps": 1000, "shift": run.config["sample"]["shift"], "use_dynamic_shifting": False}
    write_json(folder / "scheduler" / "scheduler_config.json", header | scheduler)


def _pipeline_config(run: trained.Trained, copied: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """model_index.json: the components, and what the pipeline needs to know."""
    sample, dataset = run.config["sample"], run.dataset
    classes = {name: cls for found in copied.values() for name, cls in found.items()}
    parts = {name: ["diffusers" if name == "vae" else "transformers", classes[name]] if name in classes else [None, None]
             for names in COMPONENTS.values() for name in names}  # fmt: skip
    fullest = max(dataset["buckets"], key=lambda name: dataset["buckets"][name]["count"])
    return {
        "_class_name": "JaxditPipeline",
        "_diffusers_version": metadata.version("diffusers"),
        "transformer": ["torch_dit.pipeline", "DiTModel"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        **parts,
        "encoders": {kind: _section(dataset, kind, kind in copied) for kind in COMPONENTS},
        "latent_mean": dataset["latent_mean"],
        "latent_std": dataset["latent_std"],
        "normalize_vision": run.config["data"].get("normalize_vision", False),
        "size": [int(side) for side in fullest.split("x")],
        "steps": sample["steps"],
        "guidance_text": sample["text_guidance"],
        "guidance_vision": sample["vision_guidance"],
    }


def _section(dataset: Mapping[str, Any], kind: str, copied: bool) -> dict[str, Any]:
    """What the pipeline knows of an encoder; a folder's path is made absolute, so that it is found from anywhere."""
    section = dict(dataset["encoders"][kind])
    fingerprint = dataset["fingerprint"].get(kind) or {}
    path = Path(section.get("path") or "").expanduser()
    if copied or fingerprint.get("id") == "precomputed":  # of which nobody knows the encoder
        section["path"] = ""
    elif section.get("path") and path.is_dir():
        section["path"] = str(path.resolve())
        print(f"The {kind} encoder is named by its path, {section['path']}; --copy_encoders takes it along.")
    return section | {"fingerprint": fingerprint}


def _copy_encoders(folder: Path, dataset: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """{kind: {component: its class}} of the encoders copied."""
    from encode import torch_encoders, weights

    wanted = {"vae": torch_encoders.VAE, "text": torch_encoders.TEXT, "vision": torch_encoders.VISION}
    copied: dict[str, dict[str, str]] = {}
    for kind, names in COMPONENTS.items():
        fingerprint = dataset["fingerprint"].get(kind) or {}
        if dataset["encoders"][kind]["name"] == "demo" or "weights" not in fingerprint:
            continue
        source, config = weights.find(wanted[kind], dataset["encoders"][kind]["path"])
        if weights.weights_hash(wanted[kind], source) != fingerprint["weights"]:
            raise InputError(f"{kind}.path={source}: these are not the weights that the data set was encoded with.")
        target = folder / names[0]
        target.mkdir()
        stem = wanted[kind].stem
        for path in [
            source / "config.json",
            source / "preprocessor_config.json",
            *source.glob(f"{stem}*.safetensors*"),
        ]:
            if path.is_file():
                shutil.copyfile(path, target / path.name)
        classes = {"vae": "AutoencoderKL", "text_encoder": "T5EncoderModel", "tokenizer": "T5Tokenizer"}
        vision = "DINOv3ViTModel" if config.get("model_type") == "dinov3_vit" else "DINOv3ConvNextModel"
        copied[kind] = {name: classes.get(name, vision) for name in names}
        if kind == "text":
            places = [place for place in (source, source.parent / "tokenizer_2") if place.is_dir()]
            own = next(place for place in places if any((place / name).is_file() for name in torch_encoders.TOKENIZER))
            (folder / "tokenizer").mkdir()
            for name in (*torch_encoders.TOKENIZER, "tokenizer_config.json", "special_tokens_map.json"):
                if (own / name).is_file():  # twice: encode looks for it beside the weights, diffusers in its own folder
                    shutil.copyfile(own / name, folder / "tokenizer" / name)
                    shutil.copyfile(own / name, target / name)
    return copied


def _copy_sources(folder: Path, dataset: Mapping[str, Any]) -> None:
    (folder / "torch_dit").mkdir()
    for name in SOURCES:
        shutil.copyfile(ROOT / "torch_dit" / name, folder / "torch_dit" / name)
    if any(section["name"] == "demo" for section in dataset["encoders"].values()):
        shutil.copyfile(ROOT / "encode" / "demo_encoders.py", folder / "torch_dit" / "demo_encoders.py")
    shutil.copyfile(ROOT / "torch_dit" / "command.py", folder / "pipeline.py")


def _write_training(folder: Path, workdir: Path) -> None:
    """Copies of what --import needs; absolute paths lose all but their last part, except those of encoders."""
    folder.mkdir()
    for name in TRAINING:
        if (workdir / name).is_file():
            value = read_json(workdir / name, "restore it")
            kept = {"encoders": value.pop("encoders")} if name == "dataset.json" else {}
            write_json(folder / name, _without_paths(value) | kept)


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_paths(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_without_paths(part) for part in value]
    return Path(value).name if isinstance(value, str) and value[:1] in ("/", "~") else value


def _mark(folder: Path, record: Mapping[str, Any]) -> None:
    """export.json, written last: the record, and the SHA-256 of every file."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    write_json(
        folder / MARK, {**record, "files": {path.relative_to(folder).as_posix(): seal.sha256(path) for path in paths}}
    )


def _record(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise InputError(f"--import={folder}: no such folder.")
    if not (folder / MARK).is_file():
        raise InputError(
            f"--import={folder}: {MARK} is missing, so jaxdit.export did not write this folder; name one that it wrote."
        )
    record = read_json(folder / MARK, "export the model again")
    wanted = {"format": str, "step": int, "files": dict}
    if wrong := [name for name, kind in wanted.items() if not isinstance(record.get(name), kind)]:
        raise InputError(
            f"{folder / MARK}: {wrong[0]} is missing or not a {wanted[wrong[0]].__name__}; export the model again."
        )
    return record


@contextlib.contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """An empty folder beside `target` that takes its place when the block ends, and is removed if it fails."""
    target = target.resolve()
    new, old = (target.with_name(f".{target.name}.{word}") for word in ("new", "old"))
    if old.exists() and not target.exists():  # a kill between the two renames below
        os.rename(old, target)
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        if target.exists():
            os.rename(target, old)
        os.rename(new, target)
    finally:
        if old.exists() and not target.exists():  # stopped between the two
            os.rename(old, target)
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


COMFYUI = """# {name}: a node for ComfyUI

Copy this folder into `ComfyUI/custom_nodes/`, install diffusers, transformers and sentencepiece beside ComfyUI's PyTorch, and
start ComfyUI again. Under "jaxdit" there are then four nodes: load, conditions (a sentence and up to two references), sample
(a LATENT, raw, as ComfyUI's own VAE Decode takes Flux's), and decode (an IMAGE, by the VAE that the model was trained with).

The nodes' classes are tested by loading this folder as ComfyUI does and calling them in order. Not tested: ComfyUI itself, its
browser page, its memory management (the model stays where it is loaded), previews and interruption while a picture is drawn.

`model/` is the model in the layout of diffusers; its README.md is the model card.
"""


def main() -> int:
    try:
        return _run()
    except KeyboardInterrupt:
        print("Stopped.")
        return commandline.STOPPED


def _run() -> int:
    given = flags.FLAGS
    workdir, source = commandline.path_of(given.workdir), given["import"].value
    if bool(source) == bool(given.out):
        raise InputError("give --out=FOLDER to export --workdir, or --import=FOLDER to make a new --workdir of it.")
    if source:
        record = take_in(commandline.path_of(source), workdir)
        print(
            f"{workdir}: step {record['step']:,}, {record.get('weights', 'averaged')} weights, in the place of averaged ones. "
            f"Sample it with python -m jaxdit.sample --workdir={shlex.quote(str(workdir))} "
            '--prompt="..." --out=PICTURES'
        )
        return 0
    out = commandline.path_of(given.out)
    record = export(workdir, out, step=given.step, raw=given.raw, form=given.format, copy=given.copy_encoders)
    print(f"{out}: step {record['step']:,}, {record['weights']} weights, {record['parameters']:,} parameters.")
    if given.format == "comfyui":
        print(f"Copy it into ComfyUI/custom_nodes; {out / 'README.md'} says what was not tested.")
    else:
        print(
            f'Draw with it: python {shlex.quote(str(out.absolute() / "pipeline.py"))} --prompt="..." --out=PICTURES. Its card: '
            f"{out / 'README.md'}"
        )
    return 0


def define_flags() -> None:
    flags.DEFINE_string("workdir", None, "Working folder of a training run; with --import, the new one.", required=True)
    flags.DEFINE_string("out", None, "Folder to write.")
    flags.DEFINE_integer("step", None, "Which saved step; by default the newest.")
    flags.DEFINE_bool("raw", False, "The raw weights instead of the averaged ones.")
    flags.DEFINE_enum("format", "diffusers", ("diffusers", "comfyui"), "What the folder is for.")
    flags.DEFINE_bool("copy_encoders", False, "Copy the encoders into the folder, where they are on this disk.")
    flags.DEFINE_string("import", None, "Exported folder to make a working folder of.")


if __name__ == "__main__":
    define_flags()
    commandline.run(main, interrupted=True)
