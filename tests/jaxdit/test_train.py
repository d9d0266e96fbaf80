import gc
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import make_data
import numpy as np
import pytest
from tiny_run import ROOT, WIDTHS, assert_same, command, curve, tiny, weights, whole_state

from configs import full, nano, quickstart
from encode.records import InputError, only_one
from jaxdit import (
    checkpoint,
    data,
    judged_images,
    mesh,
    metrics,
    model,
    optim,
    progress,
    train,
    trained,
    update,
    workdir,
)


def test_resume_is_bit_identical_after_sigkill_at_random_points(path, undisturbed, tmp_path):
    workdir, chance = tmp_path / "run", random.Random(time.time())
    for kill in range(int(os.environ.get("JAXDIT_KILLS", 3))):
        process = subprocess.Popen(
            command(path, workdir), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        steps_before = len(metrics.read(workdir))
        for _ in range(600):  # wait until it trains, then a little longer
            if process.poll() is not None or len(metrics.read(workdir)) != steps_before:
                break
            time.sleep(0.1)
        time.sleep(chance.uniform(0, 0.6))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert kill > 0 or not (workdir / "checkpoints" / "20").exists()
    assert train.train(tiny(path), workdir) == "done"
    assert curve(workdir, "loss", "grad_norm", "learning_rate") == curve(
        undisturbed, "loss", "grad_norm", "learning_rate"
    )
    assert_same(whole_state(workdir), whole_state(undisturbed))  # parameters, moments, counts, averaged weights


def stop_after_telling(patch, step):
    """SIGTERM once that step has been told, which is when the next has begun."""
    tell = train.Progress.tell

    def stop(self, values):
        tell(self, values)
        if values["step"] == step:
            signal.raise_signal(signal.SIGTERM)

    patch.setattr(train.Progress, "tell", stop)


def test_a_run_by_muon_goes_on_where_it_stopped_and_keeps_its_optimizer(path, undisturbed, tmp_path, monkeypatch):
    options = {"optim.name": "muon", "train.total_steps": 10, "optim.warmup_steps": 1}
    assert train.train(tiny(path, **options), tmp_path / "whole") == "done"

    with monkeypatch.context() as patch:
        stop_after_telling(patch, 3)
        assert train.train(tiny(path, **options), tmp_path / "halves") == "stopped"
    assert train.train(tiny(path, **options), tmp_path / "halves") == "done"
    assert_same(whole_state(tmp_path / "halves", 10), whole_state(tmp_path / "whole", 10))
    with pytest.raises(InputError, match=r"begun with optim\.name=muon, now it is adamw; it is fixed"):
        train.train(tiny(path, **options | {"optim.name": "adamw"}), tmp_path / "whole")
    shutil.copytree(undisturbed, tmp_path / "adamw")
    for file in [tmp_path / "adamw" / "config.json", *tmp_path.glob("adamw/checkpoints/*/data/metadata")]:
        words = file.read_text()  # as it was written before there was a choice
        assert words.count('"name": "adamw"') == 1
        file.write_text(re.sub(r'"name": "adamw",?', "", words))
    for file in tmp_path.glob("adamw/checkpoints/*/seal.json"):
        file.unlink()
    with pytest.raises(InputError, match=r"begun with optim\.name=adamw, now it is muon"):
        train.train(tiny(path, **{"optim.name": "muon"}), tmp_path / "adamw")
    assert train.train(tiny(path), tmp_path / "adamw") == "done"


def test_an_evaluation_that_a_stop_met_is_made_up_for(path, tmp_path, monkeypatch):
    options = {"data.holdout_fraction": 0.3, "train.eval_every": 4, "train.eval_images": 4}

    with monkeypatch.context() as patch:
        stop_after_telling(patch, 3)  # told when step 4 has been made: its evaluation is due and meets the stop
        assert train.train(tiny(path, **options), tmp_path / "run") == "stopped"
    assert checkpoint.saved_steps(tmp_path / "run", "state") == [4]
    assert train.train(tiny(path, **options), tmp_path / "run") == "done"
    assert [row["step"] for row in metrics.read(tmp_path / "run") if "eval_seconds" in row] == [5, 8, 12, 16, 20]


def test_sigterm_saves_and_the_rest_of_the_run_is_the_same(path, undisturbed, tmp_path):
    process = subprocess.Popen(
        command(path, tmp_path / "run", **{"checkpoint.every": 1000}), cwd=ROOT, stderr=subprocess.DEVNULL
    )
    while len(metrics.read(tmp_path / "run")) < 3 and process.poll() is None:
        time.sleep(0.05)
    process.terminate()
    assert process.wait() in (0, 3)
    first = checkpoint.saved_steps(tmp_path / "run")[-1]
    assert train.train(tiny(path), tmp_path / "run") == "done"
    assert 3 <= first <= 20
    assert curve(tmp_path / "run", "loss") == curve(undisturbed, "loss")


def test_a_closed_terminal_stops_it_with_everything_saved(path, tmp_path):
    workdir, (ours, theirs) = tmp_path / "run", os.openpty()
    # The tests themselves may run under nohup, which the trainer would heed.
    alone = ["env", "--default-signal=HUP", "setsid", "--ctty"]
    arguments = alone + command(path, workdir, **{"checkpoint.every": 1000, "train.total_steps": 10_000})
    process = subprocess.Popen(arguments, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    while len(metrics.read(workdir)) < 3 and process.poll() is None:
        if select.select([ours], [], [], 0.05)[0]:
            os.read(ours, 4096)
    os.close(ours)
    assert process.wait() == 3
    assert checkpoint.saved_steps(workdir, "state") == [metrics.read(workdir)[-1]["step"]]


def test_asked_to_stop_it_does_not_wait_for_a_disk_that_is_away(tmp_path, monkeypatch):
    root, workdir, calls, parsed = tmp_path / "64", tmp_path / "run", [], data.Dataset._parsed
    make_data.dataset(root, {"64x64": 9})

    def away(self, bucket, rows):
        calls.append(True)
        if len(calls) == 20:
            root.rename(tmp_path / "away")
            threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
        if len(calls) >= 20:
            raise OSError(5, "Input/output error")
        return parsed(self, bucket, rows)

    monkeypatch.setattr(data.Dataset, "_parsed", away)
    monkeypatch.setattr(data, "AGAIN", (0.0, 600.0))
    assert train.train(tiny(root, **{"train.total_steps": 1000}), workdir) == "stopped"
    assert checkpoint.saved_steps(workdir, "state")[-1] == metrics.read(workdir)[-1]["step"] > 1


def test_a_finished_run_started_again_does_nothing(path, undisturbed):
    before = (undisturbed / "metrics.jsonl").read_bytes()
    assert train.train(tiny(path), undisturbed) == "done"
    assert (undisturbed / "metrics.jsonl").read_bytes() == before


def test_fewer_steps_than_are_done_are_refused_and_change_nothing(path, undisturbed):
    before = {name: (undisturbed / name).read_bytes() for name in ("config.json", "metrics.jsonl")}
    with pytest.raises(InputError, match=r"train\.total_steps=12: .* has done 20 steps already"):
        train.train(tiny(path, **{"train.total_steps": 12, "optim.warmup_steps": 1}), undisturbed)
    assert before == {name: (undisturbed / name).read_bytes() for name in before}
    assert not (undisturbed / "config_history.jsonl").exists()


def test_loss_falls_and_every_step_is_logged_once(undisturbed):
    rows = metrics.read(undisturbed)
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert abs(rows[0]["loss"] - 2) < 0.4  # zero-initialised: E|noise - x0|^2
    assert np.mean([row["loss"] for row in rows[-5:]]) < rows[0]["loss"]
    assert {"samples_seen", "images_per_second", "data_wait_fraction", "updates"} <= rows[-1].keys()
    assert rows[-1]["samples_seen"] == 80
    assert any((undisturbed / "tensorboard").iterdir())


def test_a_slow_run_speaks_between_its_logged_steps(path, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(progress, "SAY_EVERY", 0.0)
    with caplog.at_level("INFO"):
        train.train(tiny(path, **{"train.log_every": 10}), tmp_path / "run")
    assert sum(line.startswith("step ") for line in caplog.messages) == 20
    said = [line for line in caplog.messages if line.startswith("Compiling the step for ")]
    assert len(said) == len(set(said)) == 2  # once a bucket
    assert [row["step"] for row in metrics.read(tmp_path / "run")] == [1, 10, 20]


def test_ema_and_raw_weights_are_both_kept_and_differ(undisturbed):
    (_, averaged), (_, raw) = weights(undisturbed), weights(undisturbed, raw=True)
    kernel = averaged["blocks"]["mlp_in"]["kernel"], raw["blocks"]["mlp_in"]["kernel"]
    assert kernel[0].dtype == jnp.float32 and (kernel[0] != kernel[1]).any()


def test_held_out_loss_does_not_depend_on_batches_devices_or_resume(path, undisturbed, tmp_path):
    """Equal weights are needed, so the learning rate is next to nothing; one run ends at 7 and goes on."""
    found = {}
    for name, micro, legs in (("two", 2, (10,)), ("four", 4, (10,)), ("resumed", 2, (7, 10))):
        for steps in legs:
            changes = {
                "data.holdout_fraction": 0.4,
                "train.micro_batch": micro,
                "train.total_steps": steps,
                "train.eval_every": 5,
                "train.eval_images": 100,
                "optim.warmup_steps": 0,
                "optim.peak_learning_rate": 1e-12,
                "optim.end_learning_rate": 0.0,
            }
            train.train(tiny(path, **changes), tmp_path / name)
        found[name] = [row["held_out_loss"] for row in metrics.read(tmp_path / name) if row["step"] % 5 == 0]
    np.testing.assert_allclose(found["two"], found["four"], rtol=1e-5)
    np.testing.assert_allclose(found["two"], found["resumed"], rtol=1e-5)
    assert len(found["two"]) == 2 and np.ptp(found["two"]) < 1e-5  # the draws do not depend on the step
    dataset = data.Dataset(path, holdout_fraction=0.4)
    counts = [count for _, _, count in dataset.fixed_batches("held_out", 2, 100)]
    assert sum(counts) == sum(map(len, dataset.held_out.values())) > 0
    assert sum(count for _, _, count in dataset.fixed_batches("training", 2, 3)) == 3


def test_micro_batches_change_nothing_but_rounding(path, tmp_path):
    """The same bucket draws are needed, so one bucket only: 4 samples at once, or 2 and 2."""
    make_data.dataset(tmp_path / "64", {"64x64": 8})
    losses = []
    for micro in (4, 2):
        workdir = tmp_path / f"run{micro}"
        config = tiny(tmp_path / "64", **{"train.micro_batch": micro, "train.total_steps": 20, "flow.flip": 0.0})
        config.train.total_steps = 20
        train.train(config, workdir)
        losses.append([row["loss"] for row in metrics.read(workdir)])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model.width": 48}, "model.width=32, now it is 48"),
        ({"train.seed": 1}, "train.seed=0, now it is 1"),
        ({"flow.shift": 1.0}, "flow.shift=3.0, now it is 1.0"),
    ],
)
def test_a_folder_begun_with_another_configuration_is_refused(path, undisturbed, change, words):
    before = sorted(p.name for p in undisturbed.rglob("*"))
    with pytest.raises(InputError, match=words):
        train.train(tiny(path, **change), undisturbed)
    assert sorted(p.name for p in undisturbed.rglob("*")) == before


def test_a_folder_begun_with_other_data_is_refused(undisturbed, tmp_path):
    make_data.dataset(tmp_path / "64", {"64x64": 9, "48x80": 6}, seed=5)
    with pytest.raises(InputError, match="another data set: latent_mean"):
        train.train(tiny(tmp_path / "64"), undisturbed)


def test_grown_data_is_taken_only_when_asked_and_keeps_the_statistics_of_the_start(tmp_path):
    root, workdir = tmp_path / "64", tmp_path / "run"
    make_data.dataset(root, {"64x64": 6, "48x80": 4}, shard=2)
    train.train(tiny(root, **{"train.total_steps": 20}), workdir)
    start = json.loads((workdir / "dataset.json").read_text())
    shutil.rmtree(root)
    make_data.dataset(root, {"64x64": 9, "48x80": 4, "80x48": 2}, shard=2)  # a bucket, too, that was empty
    grown = json.loads((root / "dataset.json").read_text())
    with pytest.raises(InputError, match=r"has grown from 10 to 15 images .* --config\.data\.accept_growth=True"):
        train.train(tiny(root), workdir)
    assert json.loads((workdir / "dataset.json").read_text()) == start
    more = tiny(root, **{"train.total_steps": 26, "data.accept_growth": True})
    assert train.train(more, workdir) == "done"
    copy = json.loads((workdir / "dataset.json").read_text())
    assert copy["count"] == 15 and copy["buckets"] == grown["buckets"]
    assert copy["latent_mean"] == start["latent_mean"] != grown["latent_mean"]
    assert train.train(tiny(root, **{"train.total_steps": 28}), workdir) == "done"  # taken once, known from then on
    assert metrics.read(workdir)[-1]["step"] == 28
    mended = json.loads((root / "dataset.json").read_text())  # other captions, and so other pictures mirrored
    mended["mended_from"] = [{name: mended[name] for name in ("latent_mean", "latent_std", "latent_count")}]
    mended["latent_mean"] = [value + 0.01 for value in mended["latent_mean"]]
    (root / "dataset.json").write_text(json.dumps(mended))
    with pytest.raises(InputError, match=r"captions of .* were mended since .* --config\.data\.accept_growth=True"):
        train.train(tiny(root, **{"train.total_steps": 29}), workdir)
    more = tiny(root, **{"train.total_steps": 29, "data.accept_growth": True})
    assert train.train(more, workdir) == "done"
    assert json.loads((workdir / "dataset.json").read_text())["latent_mean"] == start["latent_mean"]
    assert train.train(tiny(root, **{"train.total_steps": 30}), workdir) == "done"
    shutil.rmtree(root)
    make_data.dataset(root, {"64x64": 9, "48x80": 4, "80x48": 2}, shard=2, seed=3)
    with pytest.raises(InputError, match="another data set: latent_mean"):
        train.train(tiny(root, **{"data.accept_growth": True, "train.total_steps": 30}), workdir)


def test_normalisation_of_a_run_on_grown_data_is_that_of_the_start(tmp_path):
    root = tmp_path / "64"
    make_data.dataset(root, {"64x64": 6})
    dataset = data.Dataset(root)
    before = dataset.read("64x64", np.array([0]), np.array([False]))["latent"]
    dataset.describe(dataset.info | {"latent_mean": [0.0] * 16, "latent_std": [1.0] * 16})
    raw = dataset.read("64x64", np.array([0]), np.array([False]))["latent"]
    assert abs(before.mean()) < 0.5 and abs(raw.mean() - 3) < 0.5
    as_of_run = {"latent_mean": [1.0] * 16, "latent_std": [2.0] * 16}
    judged = judged_images.open_data(tiny(root).to_dict(), as_of_run, None).read(
        "64x64", np.array([0]), np.array([False])
    )
    np.testing.assert_allclose(judged["latent"], (raw - 1) / 2, rtol=1e-6)


def test_a_folder_that_is_no_working_folder_is_refused(path, tmp_path):
    (tmp_path / "holiday.jpg").touch()
    with pytest.raises(InputError, match=r"holds holiday\.jpg but no config\.json"):
        train.train(tiny(path), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["holiday.jpg"]


def test_a_second_training_in_the_same_folder_is_refused(path, tmp_path):
    with only_one(tmp_path / "run"), pytest.raises(InputError, match="another process is writing into it"):
        train.train(tiny(path), tmp_path / "run")


def test_a_kill_between_the_first_two_files_is_no_obstacle(path, undisturbed, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "dataset.json").write_bytes((undisturbed / "dataset.json").read_bytes())
    assert train.train(tiny(path), tmp_path / "run") == "done"


def test_what_may_change_is_recorded(path, tmp_path):
    train.train(tiny(path), tmp_path / "run")
    train.train(tiny(path, **{"train.total_steps": 24}), tmp_path / "run")
    history = [json.loads(line) for line in (tmp_path / "run" / "config_history.jsonl").read_text().splitlines()]
    assert [(row["field"], row["from"], row["to"]) for row in history] == [("train.total_steps", 20, 24)]
    assert metrics.read(tmp_path / "run")[-1]["step"] == 24


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model.dtype": "float16"}, "float16 is refused"),
        ({"optim.warmup_steps": 15}, r"optim.warmup_steps=15 .*train.total_steps=20"),
        ({"train.micro_batch": 3}, r"train.batch_size=4 .*train.micro_batch=3"),
        ({"model.heads": 3}, r"model.width=32 .*model.heads=3"),
        ({"flow.drop_both": 0.9}, "flow.drop_both"),
        ({"train.eval_every": 5}, r"train.eval_every=5 .*data.holdout_fraction"),
        ({"data.path": ""}, "data.path is empty"),
        ({"data.path": "/nowhere"}, "no such folder"),
    ],
)
def test_contradictions_are_refused_before_anything_is_written(path, tmp_path, change, words):
    with pytest.raises(InputError, match=words):
        train.train(tiny(path, **change), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--config.train.total_step=200", "total_steps"),
        ("--config.modle.layers=2", "configs/quickstart.py has no such field; the nearest is 'model"),
        ("--workdir=", "name of a folder or file is empty"),
        ("--config.train.total_steps=many", "total_steps"),
        ("--config=configs/nothing.py", "configs/nothing.py"),
        ("--config=configs/full.py:99", "choose 256, 512, 1024"),
        ("--confg=1", "confg"),
    ],
)
def test_what_the_command_line_does_not_know_is_one_sentence_and_exit_code_2(tmp_path, argument, words):
    done = subprocess.run(
        [sys.executable, "-m", "jaxdit.main", f"--workdir={tmp_path / 'run'}", argument],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert words in done.stderr and "Traceback" not in done.stderr and done.stderr.count("\n") <= 3


def test_a_flag_that_is_missing_is_named():
    done = subprocess.run([sys.executable, "-m", "jaxdit.main"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "Error: --workdir is missing; --help says what it is for.\n"


@pytest.fixture(scope="module")
def settled():
    """(one compiled update at a constant rate, its state after three good ones, a good sum of four samples)."""
    settings = trained.model_settings(tiny("")["model"], WIDTHS)
    optimizer = optim.make_optimizer(lambda _: 1e-2, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.03, clip_norm=1.0)
    change = jax.jit(partial(update.apply_update, optimizer, lambda _: 1e-2, 0.9999, 4))
    state = update.new_state(settings, optimizer, 0)
    good = update.new_total(state["params"])
    good |= {"gradients": jax.tree.map(lambda leaf: leaf + 0.01, good["gradients"]), "loss": jnp.float32(4.0)}
    for _ in range(3):
        state, _ = change(state, good)
    return change, state, good


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["gradient", "loss"])
def test_a_poisoned_update_moves_nothing_and_the_next_is_normal(settled, poison, where):
    change, start, good = settled
    bad = dict(good)
    if where == "loss":
        bad["loss"] = jnp.float32(poison)
    else:
        kernel = good["gradients"]["patch_in"]["kernel"].at[1, 1].set(poison)
        bad["gradients"] = good["gradients"] | {"patch_in": good["gradients"]["patch_in"] | {"kernel": kernel}}
    voided, row = change(start, bad)
    moving = ("params", "ema", "opt_state", "updates")
    assert_same({name: voided[name] for name in moving}, {name: start[name] for name in moving})
    assert int(voided["voided"]) == int(voided["voided_in_row"]) == 1
    assert not np.isfinite(row["grad_norm"]) or not np.isfinite(row["loss"])
    assert float(row["move/vision"]) == 0
    after, row = change(voided, good)
    direct, _ = change(start, good)
    assert_same(after["params"], direct["params"])
    assert int(after["updates"]) == 4 and int(after["voided_in_row"]) == 0 and float(row["loss"]) == 1.0
    count = model.count_parameters(start["params"])
    assert float(row["grad_norm"]) == pytest.approx(0.01 / 4 * count**0.5, rel=1e-4)  # the mean over four samples


def test_a_small_gradient_is_not_lost_in_the_sum(settled):
    total = {"kernel": jnp.zeros(1, update.new_total(settled[1]["params"])["gradients"]["patch_in"]["kernel"].dtype)}
    for value in [1.0] + 256 * [1e-4]:
        total = jax.tree.map(jnp.add, total, {"kernel": jnp.full(1, value, jnp.float32)})
    np.testing.assert_allclose(total["kernel"], 1.0256, atol=2e-5)


def test_a_run_of_poison_stops_and_names_the_last_good_checkpoint(tmp_path):
    written = make_data.dataset(tmp_path / "64", {"64x64": 4})
    dataset = json.loads((tmp_path / "64" / "dataset.json").read_text())
    dataset["latent_std"] = [0.0] * 16  # every normalised latent is infinite
    (tmp_path / "64" / "dataset.json").write_text(json.dumps(dataset))
    assert written
    with pytest.raises(progress.TrainingStopped, match=r"10 updates in a row up to step 1\d .*none in"):
        train.train(tiny(tmp_path / "64", **{"train.total_steps": 40, "checkpoint.every": 1000}), tmp_path / "run")
    assert metrics.read(tmp_path / "run")[-1]["loss"] is None


@pytest.mark.all
def test_eight_devices_compute_what_one_does(path, undisturbed, tmp_path):
    config = {"train.batch_size": 8, "train.micro_batch": 8, "train.total_steps": 20, "checkpoint.every": 1000}
    config |= {"data.holdout_fraction": 0.4, "train.eval_every": 1, "train.eval_images": 12, "train.eval_budget": 1.0}
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    environment = os.environ | {"XLA_FLAGS": flags}
    done = subprocess.run(
        command(path, tmp_path / "eight", **config), cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "8 x cpu" in done.stderr
    train.train(tiny(path, **config), tmp_path / "one")
    for name, tolerance in (("loss", 1e-4), ("learning_rate", 0), ("held_out_loss", 1e-4), ("grad_norm", 1e-3)):
        ours, theirs = ([row[1] for row in curve(tmp_path / part, name)] for part in ("eight", "one"))
        np.testing.assert_allclose(ours, theirs, rtol=tolerance)
    first = [metrics.read(tmp_path / part)[0] for part in ("eight", "one")]  # the weights have hardly parted yet
    judged = [name for name in first[0] if name.startswith("eval/")]
    assert len(judged) > 16
    np.testing.assert_allclose(*([row[name] for name in judged] for row in first), rtol=1e-5)
    assert weights(tmp_path / "eight")[0] == 20  # written by eight, read by one


def test_the_full_model_has_its_size_in_every_stage():
    for stage in ("256", "512", "1024"):
        config = full.get_config(stage)
        settings = trained.model_settings(config.model, {"latent": 16, "text": 1024, "vision": 1024})
        count = model.count_parameters(model.abstract(settings)[1])
        assert 400e6 < count < 600e6
        config.data.path = "somewhere"
        train.folder.check(config, devices=1)
    with pytest.raises(ValueError, match="choose 256, 512, 1024"):
        full.get_config("2048")


def test_the_configurations_have_the_same_fields():
    def fields(config):
        return {(section, name) for section in config for name in config[section]}

    assert fields(nano.get_config()) == fields(full.get_config("256")) == fields(quickstart.get_config())


def test_a_full_disk_ends_the_run_with_the_last_complete_step_and_going_on_works(path, undisturbed, tmp_path):
    workdir = tmp_path / "run"
    arguments = " ".join(map(repr, command(path, workdir)))
    limited = f"ulimit -f 60; exec {arguments}"  # no file over 60 KiB: half a checkpoint
    done = subprocess.run(["bash", "-c", limited], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "could not be saved" in done.stderr and "last complete one is none" in done.stderr
    assert train.train(tiny(path), workdir) == "done"
    assert curve(workdir, "loss") == curve(undisturbed, "loss")


def test_a_save_that_fails_is_told_and_the_run_goes_on_with_the_next(path, undisturbed, tmp_path, monkeypatch, caplog):
    """The disk refuses at step 6 and takes files again from step 12 on."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    save = checkpoint.Checkpoints.save

    def limited(self, step, *rest):
        if step != 12:
            self.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000 if step == 6 else soft, hard))
        save(self, step, *rest)
        if step == 6:
            time.sleep(2)  # until the background has met the limit

    monkeypatch.setattr(checkpoint.Checkpoints, "save", limited)
    monkeypatch.setattr(train, "TRY_AGAIN", 0.0)
    assert train.train(tiny(path), tmp_path / "run") == "done"
    told = [line for line in caplog.messages if "could not be saved" in line]
    assert len(told) == 1 and "The last complete one is none" in told[0] and "goes on and tries again" in told[0]
    assert checkpoint.saved_steps(tmp_path / "run", "state")[-2:] == [18, 20]
    assert_same(weights(tmp_path / "run", True)[1], weights(undisturbed, True)[1])


def test_a_full_disk_is_seen_before_anything_is_written(path, tmp_path, monkeypatch, caplog):
    usage, full = shutil.disk_usage, []

    def reported(folder):
        return usage(folder)._replace(free=1000) if full else usage(folder)

    monkeypatch.setattr(shutil, "disk_usage", reported)
    monkeypatch.setattr(train, "TRY_AGAIN", 0.0)
    monkeypatch.setattr(train.health, "judge", _after(train.health.judge, 5, lambda: full.append(True)))
    with pytest.raises(checkpoint.SaveFailed, match=r"it takes 0\.\d MB, the disk has 0\.0 MB free"):
        train.train(tiny(path), tmp_path / "run")
    assert sum("goes on and tries again" in line for line in caplog.messages) == 2  # the third ends the run
    assert not any((tmp_path / "run" / "checkpoints").iterdir())
    full.clear()
    assert train.train(tiny(path), tmp_path / "run") == "done"
    full.append(True)
    with pytest.raises(InputError, match="the next checkpoint needs"):
        train.train(tiny(path, **{"train.total_steps": 22}), tmp_path / "run")
    with pytest.raises(InputError, match="the next 2 checkpoints need"):
        train.train(tiny(path), tmp_path / "new")


def _after(function, calls, act):
    left = [calls]

    def counting(*arguments, **options):
        left[0] -= 1
        if left[0] == 0:
            act()
        return function(*arguments, **options)

    return counting


def test_encoding_sentences_of_one_s_own_is_not_a_rate_of_training(path, tmp_path, monkeypatch):
    skipped, before = [], metrics.Clock.skip
    monkeypatch.setattr(metrics.Clock, "skip", lambda clock, seconds: skipped.append(seconds) or before(clock, seconds))
    monkeypatch.setattr(train.previews, "Previews", lambda *_: time.sleep(0.5))
    train.train(tiny(path, **{"sample.previews": 1, "train.total_steps": 1, "optim.warmup_steps": 0}), tmp_path / "run")
    assert skipped[0] >= 0.5


def test_an_implicit_copy_between_host_and_device_is_an_error(path, tmp_path, monkeypatch):
    double = jax.jit(lambda x: 2 * x)
    judge = train.health.judge
    monkeypatch.setattr(train.health, "judge", lambda *a, **k: (double(np.ones(3)), judge(*a, **k))[1])
    with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"):
        train.train(tiny(path), tmp_path / "run")


def test_evaluation_is_made_less_often_where_it_costs_more_than_its_share(path, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(train, "FREE_SECONDS", 0.0)
    options = {"data.holdout_fraction": 0.4, "train.eval_every": 2, "train.eval_images": 8, "train.eval_budget": 1e-6}
    with caplog.at_level("INFO"):
        train.train(tiny(path, **options), tmp_path / "run")
    evaluated = [row["step"] for row in metrics.read(tmp_path / "run") if "held_out_loss" in row]
    assert (
        evaluated[0] == 2 and evaluated[-1] == 20 and len(evaluated) == 2
    )  # the first is measured, the last is wanted
    assert sum("more than train.eval_budget=1e-06" in line for line in caplog.messages) == 1


def test_damaged_data_end_the_run_with_everything_saved(tmp_path):
    root = tmp_path / "64"
    make_data.dataset(root, {"64x64": 40}, shard=4)
    shard = sorted((root / "64x64" / "1.0.0").glob("*array_record*"))[-1]
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(InputError, match=shard.name):
        train.train(tiny(root, **{"checkpoint.every": 1000, "train.total_steps": 40}), tmp_path / "run")
    rows = metrics.read(tmp_path / "run")
    if rows:
        assert checkpoint.saved_steps(tmp_path / "run", "state") == [rows[-1]["step"]]


def data_that_go_away(patch, after, then=lambda: None):
    """Of data sets, so many reads succeed."""
    reads, records_of = [], data.Dataset.records

    def read(self, bucket, rows):
        reads.append(bucket)
        if len(reads) > after:
            then()
            raise data.ReadFailed("cannot read a record: its disk is away")
        return records_of(self, bucket, rows)

    patch.setattr(data.Dataset, "records", read)


def test_nobody_is_told_that_everything_is_saved_where_data_and_checkpoints_are_away(tmp_path, monkeypatch):
    make_data.dataset(tmp_path / "64", {"64x64": 40})
    data_that_go_away(monkeypatch, 20, lambda: signal.raise_signal(signal.SIGTERM))  # whoever waits for it gives up

    def refuse(self, step, needed):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoint.Checkpoints, "_make_room", refuse)
    with pytest.raises(checkpoint.SaveFailed, match=r"step \d+ could not be saved"):
        train.train(tiny(tmp_path / "64", **{"checkpoint.every": 1000, "train.total_steps": 40}), tmp_path / "run")
    assert checkpoint.saved_steps(tmp_path / "run") == []


def test_damaged_data_are_named_where_the_save_fails_too(tmp_path, monkeypatch):
    make_data.dataset(tmp_path / "64", {"64x64": 40})
    data_that_go_away(monkeypatch, 20)

    def refuse(self, step, needed):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoint.Checkpoints, "_make_room", refuse)
    with pytest.raises(checkpoint.SaveFailed, match=r"could not be saved.* cannot read a record: its disk is away"):
        train.train(tiny(tmp_path / "64", **{"checkpoint.every": 1000, "train.total_steps": 40}), tmp_path / "run")


def test_a_folder_is_new_until_something_was_trained_or_saved_in_it(tmp_path):
    assert workdir.is_new(tmp_path)
    for name in ("config.json", "metrics.jsonl", "saved.json"):
        (tmp_path / name).touch()
    assert workdir.is_new(tmp_path)  # killed before its first row
    (tmp_path / "checkpoints").mkdir()
    assert not workdir.is_new(tmp_path)  # which the first save makes: their disk may be away
    (tmp_path / "checkpoints").rmdir()
    (tmp_path / "saved.json").write_text('{"step": 5}')
    assert not workdir.is_new(tmp_path)  # its checkpoints may lie on a disk that is away
    (tmp_path / "saved.json").unlink()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    assert not workdir.is_new(tmp_path)


def test_rows_without_the_steps_that_must_have_been_saved_are_kept(tmp_path, caplog):
    make_data.dataset(tmp_path / "64", {"64x64": 8})
    config, run = tiny(tmp_path / "64", **{"checkpoint.every": 4}), tmp_path / "run"
    train.train(config, run)
    rows = (run / "metrics.jsonl").read_bytes()
    shutil.rmtree(run / "checkpoints" / "20")
    train.train(config, run)
    assert "Step 20 had been saved here and is gone: is this the right disk? Step 16 is taken." in caplog.text
    shutil.rmtree(run / "checkpoints")
    (run / "saved.json").unlink()  # a run from before there was one, or a disk that refused it
    train.train(config, run)
    assert "holds no step, though training went to step 20: is its disk mounted? It begins anew" in caplog.text
    kept = (run / "metrics-until-20.jsonl").read_bytes()
    assert len(kept.splitlines()) == len(rows.splitlines()) == len(metrics.read(run)) == 20


@pytest.mark.parametrize(
    ("step", "judged", "owed"),
    [(7, [], True), (7, [7], False), (8, [], True), (8, [8], False), (13, [7], False), (14, [7], True), (6, [], False)],
)
def test_an_evaluation_that_a_stop_met_is_owed_until_it_is_there(step, judged, owed):
    rows = [{"step": k} | ({"eval_seconds": 1.0} if k in judged else {}) for k in range(1, step + 1)]
    assert not train._owes_evaluation(
        7, 20, [{"step": k} for k in range(16, 21)]
    )  # its row is further back than is read
    assert train._owes_evaluation(7, step, rows) == owed and not train._owes_evaluation(0, step, rows)


def test_of_data_that_never_came_no_step_is_saved(tmp_path, monkeypatch):
    make_data.dataset(tmp_path / "64", {"64x64": 40})
    data_that_go_away(monkeypatch, 0)
    with pytest.raises(data.ReadFailed):
        train.train(tiny(tmp_path / "64"), tmp_path / "run")
    assert checkpoint.saved_steps(tmp_path / "run") == []


def test_one_program_a_bucket_and_text_length(tmp_path, monkeypatch):
    make_data.dataset(tmp_path / "64", {"64x64": 9, "48x80": 6, "80x48": 5})
    traced, losses = [], update.flow.losses

    def counting(model, batch, *rest, **options):
        traced.append((batch["latent"].shape, batch["text"].shape))
        return losses(model, batch, *rest, **options)

    monkeypatch.setattr(update.flow, "losses", counting)
    monkeypatch.setattr(mesh, "compiled", mesh.compiled.__wrapped__)
    train.train(tiny(tmp_path / "64", **{"train.total_steps": 30, "data.text_lengths": (8, 16)}), tmp_path / "run")
    assert len(traced) == len(set(traced)) and 3 <= len(traced) <= 6


def test_memory_is_flat_over_three_epochs_of_six_buckets(tmp_path, monkeypatch):
    """What the first epoch has compiled and allocated is all that there will be."""
    counts = {f"{48 + 16 * (k % 3)}x{48 + 16 * (k // 3)}": 12 + k for k in range(6)}
    make_data.dataset(tmp_path / "64", counts)
    images, seen = sum(counts.values()), []
    judge = train.health.judge

    def watched(rows, **options):
        if rows and rows[-1]["step"] % (images // 4) == 0:
            gc.collect()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            seen.append((pages * os.sysconf("SC_PAGE_SIZE"), len(jax.live_arrays())))
        return judge(rows, **options)

    monkeypatch.setattr(train.health, "judge", watched)
    options = {"train.total_steps": 3 * images // 4, "checkpoint.every": 100_000}
    train.train(tiny(tmp_path / "64", **options), tmp_path / "run")
    assert len(seen) == 3
    (first, arrays), *_, (last, arrays_last) = seen
    assert arrays_last <= arrays
    assert last < 1.05 * first


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model.heads": 0}, "model.heads=0 must be above 0"),
        ({"train.batch_size": 0}, "train.batch_size=0 must be above 0"),
        ({"optim.warmup_steps": -1}, "optim.warmup_steps=-1 must not be below 0"),
        ({"health.window": 2}, "health.window=2"),
        ({"train.eval_budget": 512.0}, "train.eval_budget=512.0 is a share of the time"),
        ({"train.init_weights": "best"}, "train.init_weights=best: choose ema or raw"),
        ({"optim.ema_decay": 1.0}, r"optim.ema_decay=1.0 must lie in \[0, 1\)"),
        ({"optim.peak_learning_rate": 0.0}, "optim.peak_learning_rate=0.0 must be above 0"),
    ],
)
def test_numbers_that_cannot_be_are_refused(path, tmp_path, change, words):
    with pytest.raises(InputError, match=words):
        train.train(tiny(path, **change), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_cut_config_is_named_and_a_folder_that_never_trained_is_free(path, undisturbed, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.json", "dataset.json"):
        (run / name).write_bytes((undisturbed / name).read_bytes())
    assert train.train(tiny(path, **{"train.batch_size": 2}), run) == "done"  # nothing was trained with the old size
    (run / "config.json").write_text('{"data"')
    with pytest.raises(InputError, match=r"config\.json cannot be read as JSON"):
        train.train(tiny(path), run)
