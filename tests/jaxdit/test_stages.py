"""Runs that begin with another run: stages, going back, and the gate in front of the big one."""

import json
import shutil

import jax
import make_data
import numpy as np
import pytest
from tiny_run import assert_same, curve, run, tiny, weights

from encode import records
from encode.records import InputError
from encode.whole_files import write_json
from jaxdit import checkpoint, facts, metrics, train


@pytest.mark.parametrize("kind", ["ema", "raw"])
def test_a_stage_starts_from_the_weights_of_the_one_before_and_from_nothing_else(
    undisturbed, tmp_path, monkeypatch, kind
):
    make_data.dataset(tmp_path / "128", {"128x128": 5, "96x160": 4}, seed=8)  # other shapes: positions carry over
    stage = tiny(tmp_path / "128", **{"train.init_from": str(undisturbed), "train.init_weights": kind})
    started = []
    begin = train.begin

    def keep(*arguments):
        found = begin(*arguments)
        started.append(jax.tree.map(np.array, found[1]))
        return found

    monkeypatch.setattr(train, "begin", keep)
    assert train.train(stage, tmp_path / "run") == "done"
    step, wanted = weights(undisturbed, raw=kind == "raw")
    state = started[-1]
    assert_same(state["params"], wanted)
    assert_same(state["ema"], wanted)  # the average starts as a copy
    assert step == 20 and int(state["updates"]) == 0
    assert all(not leaf.any() for leaf in jax.tree.leaves(state["opt_state"]))  # moments and schedule anew
    rows = metrics.read(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, 21))
    own, other = (json.loads((folder / "dataset.json").read_text()) for folder in (tmp_path / "run", tmp_path / "128"))
    assert own["latent_mean"] == other["latent_mean"]
    record = json.loads((tmp_path / "run" / "origin.json").read_text())
    assert record["init_from"] == {"workdir": str(undisturbed), "step": 20, "weights": kind}


def test_a_stage_killed_before_its_first_checkpoint_begins_with_the_same_weights(path, undisturbed, tmp_path):
    stage = {"train.init_from": str(undisturbed), "checkpoint.every": 1000, "train.total_steps": 20}
    assert train.train(tiny(path, **stage), tmp_path / "whole") == "done"
    assert train.train(tiny(path, **stage), tmp_path / "cut") == "done"
    shutil.rmtree(tmp_path / "cut" / "checkpoints")  # what a kill before the first save leaves
    (tmp_path / "cut" / "saved.json").unlink()
    assert train.train(tiny(path, **stage), tmp_path / "cut") == "done"
    assert curve(tmp_path / "cut", "loss") == curve(tmp_path / "whole", "loss")
    assert curve(tmp_path / "cut", "loss") != curve(undisturbed, "loss")
    shutil.rmtree(tmp_path / "cut" / "checkpoints")
    (tmp_path / "cut" / "saved.json").unlink()
    origin = json.loads((tmp_path / "cut" / "origin.json").read_text())
    origin["init_from"]["workdir"] = str(tmp_path / "moved")
    (tmp_path / "cut" / "origin.json").write_text(json.dumps(origin))
    with pytest.raises(InputError, match=r"train\.init_from: .*cut begins from step 20 of .*moved"):
        train.train(tiny(path, **stage), tmp_path / "cut")


def test_going_back_in_a_new_folder_is_the_same_run_from_that_step(path, undisturbed, tmp_path):
    steps = checkpoint.saved_steps(undisturbed, "state")
    back = tiny(path, **{"train.restore": f"{undisturbed}@18"})
    assert steps[-2:] == [18, 20] and train.train(back, tmp_path / "run") == "done"
    assert curve(tmp_path / "run", "loss") == curve(undisturbed, "loss")
    for raw in (False, True):
        assert_same(weights(tmp_path / "run", raw)[1], weights(undisturbed, raw)[1])
    assert checkpoint.saved_steps(tmp_path / "run") == [20]


def test_checkpoints_that_are_away_stop_the_run_and_cost_no_row(path, undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    rows = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match="is its disk mounted"):
        train.train(tiny(path, **{"train.total_steps": 24}), tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == rows
    (tmp_path / "run" / "origin.json").write_text("{")
    with pytest.raises(InputError, match=r"origin\.json is damaged .* or name a new --workdir"):
        train.train(tiny(path, **{"train.total_steps": 24}), tmp_path / "run")


def test_going_back_to_a_damaged_step_names_the_others(path, undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "old")
    file = next(file for file in (tmp_path / "old/checkpoints/18/state").rglob("d/*"))
    file.write_bytes(file.read_bytes()[:10])
    with pytest.raises(
        InputError, match=r"step 18 of .*old cannot be read \(state/.*\); its other whole steps: .*20\. "
    ):
        train.train(tiny(path, **{"train.restore": f"{tmp_path / 'old'}@18"}), tmp_path / "run")
    (tmp_path / "old" / "metrics.jsonl").unlink()
    back = tiny(path, **{"train.restore": f"{tmp_path / 'old'}@6", "train.total_steps": 8, "optim.warmup_steps": 0})
    assert train.train(back, tmp_path / "anew") == "done"
    assert [row["step"] for row in metrics.read(tmp_path / "anew")] == [7, 8]


def test_what_was_paid_for_is_known_without_its_rows_and_the_pace_is_of_what_stayed(path, undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    before = json.loads((undisturbed / "checkpoints/20/data/metadata").read_text())["metrics"]["seconds"]
    assert train.train(tiny(path, **{"train.total_steps": 24}), tmp_path / "run") == "done"
    rows = metrics.read(tmp_path / "run")
    assert rows[0]["seconds"] > before and {row["seconds_before"] for row in rows} == {before}
    for number in range(len(rows)):
        rows[number] |= {"seconds": before + number}  # a second an update of 4
    earlier = [{"step": step, "seconds": step - 20.0, "seconds_before": 0.0} for step in range(10, 21)]
    (tmp_path / "run/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*earlier, *rows]))
    assert facts.look(tmp_path / "run").rate == pytest.approx(4.0)


def test_a_shard_of_nothing_is_no_other_data_set(path, undisturbed, tmp_path):
    """As a refused picture that is tried again in vain leaves it."""
    shutil.copytree(undisturbed, tmp_path / "run")
    shutil.copytree(path, tmp_path / path.name)
    info = records.load_dataset(path)
    bucket, about = next(iter(info["buckets"].items()))
    spec = records.features(about["latent"], info["widths"]["text"], info["widths"]["vision"])
    records.write_shard(tmp_path / path.name, bucket, about["shards"], [], spec)
    records.finish_bucket(tmp_path / path.name, bucket, spec)
    about["shards"] += 1
    write_json(tmp_path / path.name / "dataset.json", info)
    assert train.train(tiny(tmp_path / path.name, **{"train.total_steps": 22}), tmp_path / "run") == "done"
    assert records.load_dataset(tmp_path / "run")["buckets"] == info["buckets"]
    (tmp_path / "run" / "dataset.json").unlink()
    with pytest.raises(InputError, match=r"dataset\.json is missing; bring it back"):
        train.train(tiny(tmp_path / path.name, **{"train.total_steps": 24}), tmp_path / "run")


def test_a_home_folder_is_written_out_in_what_is_kept(path, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(path.parent))
    train.train(tiny(f"~/{path.name}", **{"train.total_steps": 1, "optim.warmup_steps": 0}), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["data"]["path"] == str(path)


def test_going_back_may_change_the_learning_rate_but_not_the_model(path, undisturbed, tmp_path):
    back = {"train.restore": f"{undisturbed}@18"}
    with pytest.raises(InputError, match=r"begun with train\.seed=0, now it is 1"):
        train.train(tiny(path, **back, **{"train.seed": 1}), tmp_path / "other")
    with pytest.raises(InputError, match=r"no such step was saved with its state; it has .*18, 20"):
        train.train(tiny(path, **{"train.restore": f"{undisturbed}@7"}), tmp_path / "none")
    rate = {"optim.peak_learning_rate": 1e-3}
    make_data.dataset(tmp_path / path.name, {"64x64": 12, "48x80": 9})
    with pytest.raises(InputError, match=r"has grown from 15 to 21 images"):
        train.train(tiny(tmp_path / path.name, **back, **rate), tmp_path / "run")
    assert not (tmp_path / "run" / "config_history.jsonl").exists()  # what is refused changes nothing
    assert train.train(tiny(path, **back, **rate), tmp_path / "run") == "done"
    history = (tmp_path / "run" / "config_history.jsonl").read_text()
    assert json.loads(history)["field"] == "optim.peak_learning_rate"
    ours, theirs = curve(tmp_path / "run", "learning_rate"), curve(undisturbed, "learning_rate")
    assert ours[:18] == theirs[:18] and ours[18] != theirs[18]


def test_where_a_run_comes_from_is_fixed(path, undisturbed, tmp_path, monkeypatch):
    monkeypatch.chdir(undisturbed.parent)
    train.train(tiny(path, **{"train.init_from": f"{undisturbed.name}/"}), tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    stage = {"train.init_from": str(undisturbed)}
    train.train(tiny(path, **stage), tmp_path / "run")  # the same folder, however it is written
    with pytest.raises(InputError, match=r"begun with train\.init_from=.*, now it is "):
        train.train(tiny(path), tmp_path / "run")
    with pytest.raises(InputError, match=r"a run starts from one of them"):
        train.train(tiny(path, **stage, **{"train.restore": f"{undisturbed}@18"}), tmp_path / "both")


def test_a_gate_is_asked_for_when_a_folder_is_begun_and_never_again(path, tmp_path, caplog):
    asked = run(path, tmp_path / "run", **{"train.gate": "needed"})
    assert asked.returncode == 2 and "train.gate" in asked.stderr and "Traceback" not in asked.stderr
    assert not (tmp_path / "run").exists()
    caplog.set_level("INFO")
    assert train.train(tiny(path, **{"train.gate": "skip"}), tmp_path / "run") == "done"
    assert sum("train.gate=skip" in line for line in caplog.messages) == 1
    caplog.clear()
    again = {"train.gate": "needed", "train.total_steps": 22}
    assert train.train(tiny(path, **again), tmp_path / "run") == "done"
    assert not any(field in caplog.text for field in ("train.gate from", "train.gate:"))
