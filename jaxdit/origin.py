"""Where a run comes from: the gate that allows it, the stage whose weights it starts from, the step that it goes back to.

Looked at once, when a working folder is created, and kept in WORKDIR/origin.json.
"""

from __future__ import annotations

import ast
import hashlib
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from encode.records import InputError, read_json
from jaxdit import checkpoint

ENCODERS = ("vae", "text", "vision")
MODEL_CODE = ("model.py", "layers.py", "attention.py", "fused.py", "flow.py")
SKIP, NEEDED, NONE = "skip", "needed", "none"


def look(config: Any, dataset: Mapping[str, Any]) -> dict[str, Any]:
    """What a new working folder keeps of where it comes from; says it in the log.

    Args:
      config: train.{gate, init_from, init_weights, restore} and model.
      dataset: dataset.json of the run to come.

    Returns:
      {"model_code", "gate" where one was looked at, "init_from" or "restore": {"workdir", "step", ...}}.

    Raises:
      InputError: the gate is missing, failed, or of other code or encoders; or the other folder does not fit.
    """
    options = config.train
    record: dict[str, Any] = {"model_code": model_code(), "holdout_fraction": config.data.holdout_fraction}
    inherited = None
    if options.restore:
        record["restore"], inherited = _restored(options.restore)
    if options.init_from:
        record["init_from"], inherited = _stage(options.init_from, options.init_weights, config, dataset)
        before = _held_out_before(Path(record["init_from"]["workdir"]))
        if before < config.data.holdout_fraction and config.train.eval_every:
            logging.warning(
                "data.holdout_fraction=%g, but the stages before held out %g: some of the held-out images have been trained "
                "on, and the held-out loss will not show what is learnt by heart.", config.data.holdout_fraction, before,
            )  # fmt: skip
        record["holdout_fraction"] = min(before, config.data.holdout_fraction)
    if inherited and options.gate in (NEEDED, NONE):
        record["gate"] = inherited
        logging.info("The gate of the run before is inherited: %s.", inherited["verdict"])
        return record
    gate, line = check_gate(options.gate, dataset, fused=bool(config.model.get("fused", False)))
    if gate:
        record["gate"] = gate
        logging.log(logging.WARNING if options.gate == SKIP else logging.INFO, line)
    return record


def model_code() -> str:
    """A hash of the syntax of MODEL_CODE: comments and layout do not count, everything else does."""
    here = Path(__file__).parent
    trees = [_spelled(_without_docstrings(ast.parse((here / name).read_bytes()))) for name in MODEL_CODE]
    return hashlib.sha256("\n".join(trees).encode()).hexdigest()[:16]


def _spelled(node: Any) -> str:
    """A syntax tree in words; ast.dump says the same tree otherwise in each version of Python."""
    if isinstance(node, list):
        return f"[{', '.join(map(_spelled, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [(name, value) for name, value in ast.iter_fields(node) if value is not None and value != []]
    return f"{type(node).__name__}({', '.join(f'{name}={_spelled(value)}' for name, value in fields)})"


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return tree


def encoders(dataset: Mapping[str, Any]) -> dict[str, Any]:
    """The fingerprints of the three encoders out of a dataset.json: what a model's conditions and pictures mean."""
    return {name: dataset["fingerprint"].get(name) for name in ENCODERS}


def check_gate(wanted: str, dataset: Mapping[str, Any], *, fused: bool) -> tuple[dict[str, Any] | None, str]:
    """What train.gate asks for.

    Args:
      wanted: "none" (a run that needs no gate: nano), "skip", "needed" (named by nobody yet), or the path of a gate.json or
        of the working folder that holds gate/gate.json.
      dataset: dataset.json of the run to come.
      fused: whether it is to run by fused kernels.

    Returns:
      (what origin.json keeps, None where no gate is needed; one line for the log).

    Raises:
      InputError: no gate, a failed one, or one of other code, other kernels or other encoders.
    """
    if wanted == NONE:
        return None, ""
    if wanted == SKIP:
        return {"verdict": SKIP}, (
            "train.gate=skip: nothing has shown that this code can learn from these encoders, remember an image, and obey "
            "a vector and a sentence; an error there shows only after weeks."
        )
    if wanted in (NEEDED, ""):
        raise InputError(
            "train.gate: the big run begins after a nano run has passed the gate. Train configs/nano.py on 100 of your "
            "images, judge it with python -m jaxdit.validate --workdir=NANO, and give --config.train.gate=NANO/gate/gate.json "
            '(README, "Your own photographs"); --config.train.gate=skip goes without.'
        )
    path = Path(wanted).expanduser()
    path = path / "gate" / "gate.json" if path.is_dir() else path
    try:
        gate = json.loads(path.read_text(encoding="utf-8"))
        verdict = gate["verdict"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"train.gate={path}: no gate.json that jaxdit.validate wrote ({error}).") from error
    if verdict != "pass":
        failed = ", ".join(gate.get("failed", ())) or gate.get("reason", "")
        newest = checkpoint.saved_steps(path.parent.parent, "ema")[-1:]
        stale = newest and newest[0] > gate.get("step", newest[0])
        again = f" It judged step {gate['step']}, and step {newest[0]} is saved: judge that one." if stale else ""
        raise InputError(
            f"train.gate={path}: its verdict is {verdict} ({failed}); look at gate.html beside it before anything bigger.{again}"
        )
    if gate.get("model_code") != model_code():
        raise InputError(
            f"train.gate={path}: {', '.join(MODEL_CODE)} are not the code that passed (hash {gate.get('model_code')}, now "
            f"{model_code()}); run nano and the gate again."
        )
    if fused and not (gate.get("model") or {}).get("fused"):
        raise InputError(
            f"train.gate={path}: it was passed without the kernels of model.fused=True; run nano and the gate with them, or "
            "take model.fused=False."
        )
    theirs, ours = gate.get("encoders") or {}, json.loads(json.dumps(encoders(dataset)))
    for name in ENCODERS:
        if theirs.get(name) != ours[name]:
            raise InputError(
                f"train.gate={path}: it was passed with another {name} encoder ({_difference(theirs.get(name), ours[name])}); "
                "run nano and the gate on images of this data set (encode.subset)."
            )
    kept = {name: gate[name] for name in ("verdict", "step", "images", "data") if name in gate} | {
        "path": str(path.resolve())
    }
    return kept, f"The gate was passed at step {gate.get('step')} with this code and these encoders ({path})."


def _difference(theirs: Any, ours: Any) -> str:
    if not isinstance(theirs, dict) or not isinstance(ours, dict):
        return f"{theirs}, here {ours}"
    name = next(name for name in sorted(theirs.keys() | ours.keys()) if theirs.get(name) != ours.get(name))
    return f"{name} {theirs.get(name)}, here {ours.get(name)}"


def read(workdir: Path) -> dict[str, Any]:
    """WORKDIR/origin.json; {} where there is none."""
    path = Path(workdir) / "origin.json"
    return read_json(path, "bring it back from a copy, or name a new --workdir") if path.exists() else {}


def parse(field: str, value: str, item: str) -> tuple[Path, int]:
    """(working folder, step) of WORKDIR or WORKDIR@STEP; without a step, the newest at which `item` was saved.

    Raises:
      InputError: there is no such working folder, or no such step in it.
    """
    match = re.fullmatch(r"(.*?)(?:@(\d+))?", value)
    folder = Path(match.group(1)).expanduser().resolve()
    for name in ("config.json", "dataset.json"):
        if not (folder / name).is_file():
            advice = ""
            if (folder / "export.json").is_file():
                advice = f" It is an export: python -m jaxdit.export --import={folder} --workdir=NEW makes one of it."
            raise InputError(
                f"{field}={value}: {folder} has no {name}, so it is not a working folder of a training run.{advice}"
            )
    steps = checkpoint.saved_steps(folder, item)
    step = int(match.group(2)) if match.group(2) else (steps or [None])[-1]
    if step not in steps:
        found = f"it has {', '.join(map(str, steps))}" if steps else "it has none"
        raise InputError(f"{field}={value}: no such step was saved with its {item}; {found}.")
    return folder, step


def _held_out_before(folder: Path) -> float:
    """The share of the images that neither a run nor the stages before it have trained on."""
    own = json.loads((folder / "config.json").read_text(encoding="utf-8"))["data"]["holdout_fraction"]
    return min(own, read(folder).get("holdout_fraction", own))


def _restored(value: str) -> tuple[dict[str, Any], dict[str, Any] | None]:
    try:
        folder, step = parse("train.restore", value, "state")
    except InputError as error:
        raise InputError(
            f"{error} Older steps hold their averaged weights alone: train.init_from=WORKDIR@STEP starts from those."
        ) from error
    return {"workdir": str(folder), "step": step}, read(folder).get("gate")


def _stage(value: str, weights: str, config: Any, dataset: Mapping[str, Any]) -> tuple[dict[str, Any], dict | None]:
    """The stage before, whose weights fit: another shape, other widths or encoders would give them another meaning."""
    folder, step = parse("train.init_from", value, "ema" if weights == "ema" else "state")
    theirs = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model"]
    for name in ("layers", "width", "heads", "patch"):
        if theirs[name] != config.model[name]:
            raise InputError(
                f"train.init_from={value}: it was trained with model.{name}={theirs[name]}, here it is "
                f"{config.model[name]}; a stage goes on with the model of the one before."
            )
    data = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    if data["widths"] != dataset["widths"]:
        raise InputError(
            f"train.init_from={value}: its data have the widths {data['widths']}, here they are {dataset['widths']}."
        )
    before, now = encoders(data), json.loads(json.dumps(encoders(dataset)))
    for name in ENCODERS:
        if before[name] != now[name]:
            raise InputError(
                f"train.init_from={value}: its data come from another {name} encoder ({_difference(before[name], now[name])})."
            )
    return {"workdir": str(folder), "step": step, "weights": weights}, read(folder).get("gate")
