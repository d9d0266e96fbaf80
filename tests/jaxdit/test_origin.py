import ast
import json
import shutil
from pathlib import Path

import pytest

from configs import full, nano
from encode.records import InputError
from jaxdit import origin

DATASET = {
    "fingerprint": {
        "vae": {"id": "flux", "weights": "aa"},
        "text": {"id": "t5"},
        "vision": {"id": "dinov3"},
        "rules": 1,
    },
    "widths": {"latent": 16, "text": 12, "vision": 6},
}
PASSED = {"verdict": "pass", "failed": [], "step": 5000, "images": 100, "data": "HUNDRED/512"}


@pytest.fixture
def gate(tmp_path):
    """Writes WORKDIR/gate/gate.json, with changes."""

    def write(**changes):
        content = PASSED | {"model_code": origin.model_code(), "encoders": origin.encoders(DATASET)} | changes
        path = tmp_path / "nano" / "gate" / "gate.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
        return path

    return write


def workdir(path, steps=(5, 10), model=None, origin_record=None, **dataset):
    config = full.get_config("256").to_dict()
    config["model"] |= model or {}
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config, default=str))
    (path / "dataset.json").write_text(json.dumps(DATASET | dataset))
    (path / "origin.json").write_text(json.dumps(origin_record or {}))
    for step in steps:
        (path / "checkpoints" / str(step) / "ema").mkdir(parents=True)
    (path / "checkpoints" / str(steps[-1]) / "state").mkdir()
    return path


def config(**train):
    changed = full.get_config("256")
    for name, value in train.items():
        changed.train[name] = value
    return changed


def test_a_big_run_needs_a_gate_and_says_how_to_get_one():
    with pytest.raises(
        InputError, match=r"train\.gate.*configs/nano\.py.*jaxdit\.validate.*--config\.train\.gate=skip"
    ):
        origin.look(config(), DATASET)
    assert nano.get_config().train.gate == origin.NONE
    assert all(full.get_config(stage).train.gate == origin.NEEDED for stage in (None, "256", "512", "1024"))


def test_what_is_skipped_is_said_in_one_line(caplog):
    assert origin.look(config(gate="skip"), DATASET)["gate"] == {"verdict": "skip"}
    (line,) = caplog.messages
    assert "train.gate=skip" in line and "\n" not in line


def test_a_passed_gate_of_this_code_and_these_encoders_is_taken(gate):
    path = gate()
    for named in (path, path.parents[1]):
        record = origin.look(config(gate=str(named)), DATASET)["gate"]
        assert record["verdict"] == "pass" and record["step"] == 5000 and Path(record["path"]) == path


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"verdict": "fail", "failed": ["text"]}, r"its verdict is fail \(text\)"),
        ({"verdict": "incomplete", "reason": "one image"}, r"its verdict is incomplete \(.*one image\)"),
        ({"model_code": "0123"}, r"not the code that passed \(hash 0123"),
        ({"encoders": origin.encoders(DATASET) | {"vae": {"id": "flux", "weights": "bb"}}},
         "another vae encoder .weights bb, here aa"),
        ({"encoders": {}}, "another vae encoder"),
    ],
)  # fmt: skip
def test_any_other_gate_is_refused_by_what_differs(gate, change, words):
    with pytest.raises(InputError, match=words):
        origin.look(config(gate=str(gate(**change))), DATASET)


def test_fused_kernels_want_a_gate_that_they_have_passed(gate):
    wanted = config(gate=str(gate(model={"layers": 12})))
    origin.look(wanted, DATASET)
    wanted.model.fused = True
    with pytest.raises(InputError, match=r"passed without the kernels of model\.fused=True"):
        origin.look(wanted, DATASET)
    wanted.train.gate = str(gate(model={"fused": True}))
    assert origin.look(wanted, DATASET)["gate"]["verdict"] == "pass"


def test_a_gate_that_failed_at_an_earlier_step_says_so(gate):
    path = gate(verdict="fail", failed=["text"])
    for step, said in ((5000, False), (9000, True)):
        (path.parents[1] / "checkpoints" / str(step) / "ema").mkdir(parents=True)
        with pytest.raises(InputError, match="its verdict is fail") as caught:
            origin.look(config(gate=str(path)), DATASET)
        assert ("It judged step 5000, and step 9000 is saved" in str(caught.value)) == said


def test_what_is_no_gate_is_refused_by_name(tmp_path, gate):
    path = gate()
    path.write_text('{"verdict"')
    for wrong in (path, tmp_path / "nowhere.json", tmp_path):
        with pytest.raises(InputError, match=r"no gate\.json that jaxdit\.validate wrote"):
            origin.look(config(gate=str(wrong)), DATASET)


def test_the_hash_sees_formulas_and_nothing_else(tmp_path, monkeypatch):
    here = Path(origin.__file__).parent
    for name in origin.MODEL_CODE:
        shutil.copy(here / name, tmp_path / name)
    monkeypatch.setattr(origin, "__file__", str(tmp_path / "origin.py"))
    before = origin.model_code()
    text = (tmp_path / "flow.py").read_text()
    formula, note = "return (1 - t) * x0 + t * noise", "Point on the straight path"
    assert formula in text and note in text
    (tmp_path / "flow.py").write_text("# a comment\n\n" + text.replace(note, "A point on that path"))
    assert origin.model_code() == before
    (tmp_path / "flow.py").write_text(text.replace(formula, "return (1 - t) * x0 - t * noise"))
    assert origin.model_code() != before


def test_the_hash_is_the_same_in_every_version_of_python(monkeypatch):
    """Each has fields of its own: 3.12 gave a function type_params."""
    before = origin.model_code()
    for kind in (ast.FunctionDef, ast.ClassDef):
        monkeypatch.setattr(kind, "_fields", (*kind._fields, "of_a_later_version"))
        monkeypatch.setattr(kind, "of_a_later_version", [], raising=False)
    assert origin.model_code() == before


def test_a_stage_inherits_the_gate_and_takes_the_newest_or_the_named_step(tmp_path):
    passed = {"verdict": "pass", "step": 5000}
    before = workdir(tmp_path / "A", origin_record={"gate": passed})
    record = origin.look(config(init_from=str(before)), DATASET)
    assert record["gate"] == passed
    assert record["init_from"] == {"workdir": str(before), "step": 10, "weights": "ema"}
    assert origin.look(config(init_from=f"{before}@5"), DATASET)["init_from"]["step"] == 5
    with pytest.raises(InputError, match=r"train\.init_from=.*@5: no such step was saved with its state; it has 10"):
        origin.look(config(init_from=f"{before}@5", init_weights="raw"), DATASET)
    ungated = workdir(tmp_path / "B")
    with pytest.raises(InputError, match=r"train\.gate"):
        origin.look(config(init_from=str(ungated)), DATASET)


def test_held_out_images_that_a_stage_before_has_trained_on_are_told(tmp_path, caplog):
    def stage(before, holdout):
        changed = config(init_from=str(before), gate="skip")
        changed.data.holdout_fraction = holdout
        caplog.clear()
        record = origin.look(changed, DATASET)
        told = any("some of the held-out images have been trained on" in line for line in caplog.messages)
        return record["holdout_fraction"], told

    first = workdir(tmp_path / "A")  # full.py holds out 0.01
    assert stage(first, 0.01) == (0.01, False) and stage(first, 0.005) == (0.005, False)
    assert stage(first, 0.1) == (0.01, True)
    second = workdir(tmp_path / "B", origin_record={"holdout_fraction": 0.0})  # its own stage before held out none
    assert stage(second, 0.01) == (0.0, True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": {"width": 512}}, r"trained with model\.width=512, here it is 1024"),
        ({"widths": {"latent": 4, "text": 12, "vision": 6}}, "the widths .*4.*, here they are .*16"),
        ({"fingerprint": DATASET["fingerprint"] | {"text": {"id": "clip"}}}, "another text encoder .id clip, here t5"),
    ],
)
def test_a_stage_of_another_kind_is_refused(tmp_path, change, words):
    with pytest.raises(InputError, match=words):
        origin.look(config(init_from=str(workdir(tmp_path / "A", **change)), gate="skip"), DATASET)


def test_what_cannot_be_gone_back_to_is_said(tmp_path):
    before = workdir(tmp_path / "A", origin_record={"gate": {"verdict": "pass"}})
    assert origin.look(config(restore=f"{before}@10"), DATASET)["restore"] == {"workdir": str(before), "step": 10}
    with pytest.raises(InputError, match=r"@5: no such step .* it has 10\..*train\.init_from=WORKDIR@STEP"):
        origin.look(config(restore=f"{before}@5"), DATASET)
    with pytest.raises(InputError, match=r"has no config\.json, so it is not a working folder"):
        origin.look(config(restore=str(tmp_path / "nowhere")), DATASET)
