import logging
import shutil
import subprocess
import sys
from types import SimpleNamespace

import jax
import make_data
import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags
from tiny_run import ROOT, tiny

from jaxdit import data, mesh, model, startup, trained


def screen(tmp_path, resolution="64", memory=24 * 10**9, origin=None, buckets=None, room=10**12, **changes):
    """(lines, warnings) of a tiny run on a small data set of that name."""
    root = tmp_path / resolution
    if not root.exists():
        make_data.dataset(root, buckets or {"64x64": 9, "48x80": 6, "80x48": 1})
    config = tiny(root, **changes)
    dataset = data.Dataset(root, holdout_fraction=config.data.holdout_fraction, text_lengths=config.data.text_lengths)
    settings = trained.model_settings(config.model, dataset.info["widths"])
    shapes = model.abstract(settings)[1]
    arguments = (config, dataset, settings, shapes, origin or {}, memory, room)
    return startup.describe(*arguments), startup.warnings(*arguments)


def test_one_screen_says_what_will_be_trained_on_what(tmp_path):
    lines, warnings = screen(tmp_path, **{"data.holdout_fraction": 0.3, "train.eval_every": 5, "train.eval_images": 4})
    text = "\n".join(lines)
    assert len(lines) < 24 and not warnings
    assert "40,562 parameters" in text  # the model's own count
    assert "peak_learning_rate 0.0025" in text and "total_steps 20" in text  # the resolved configuration
    dataset = data.Dataset(tmp_path / "64", holdout_fraction=0.3)
    images, held_out = sum(map(len, dataset.train.values())), sum(map(len, dataset.held_out.values()))
    assert f"{images:,} images to train on" in text and f"{held_out} held out" in text
    assert f"each image is seen {80 / images:.1f} times" in text
    assert "20 steps of 4 images (2 micro-batches of 2), 80 samples" in text
    assert "rises to 0.70000 at the end: they average over about the last 3 updates" in text  # (1 + 20) / (10 + 20)


def test_a_run_that_a_cpu_takes_weeks_for_is_named_and_a_small_one_is_not(tmp_path, monkeypatch):
    changes = {
        "model.layers": 12,
        "model.width": 384,
        "model.heads": 6,
        "train.batch_size": 64,
        "train.total_steps": 5_000,
    }
    _, (warning,) = screen(tmp_path, buckets={"512x512": 3}, **changes)
    assert warning.startswith("No card is used: a step is 1") and "This configuration is for a GPU." in warning
    monkeypatch.setattr(startup.jax, "default_backend", lambda: "gpu")
    assert not screen(tmp_path, memory=10**12, **changes)[1]


def test_a_bucket_that_repeats_within_a_micro_batch_is_named(tmp_path):
    lines, _ = screen(tmp_path)
    assert any("Buckets smaller than a micro-batch repeat within one: 80x48." in line for line in lines)


def test_many_buckets_are_counted_not_listed(tmp_path):
    buckets = {f"{64 + 16 * k}x64": k + 1 for k in range(12)}
    lines, _ = screen(tmp_path, buckets=buckets)
    (line,) = [line for line in lines if line.startswith("Data")]
    assert "in 12 buckets (240x64 12" in line and "and 4 more" in line and len(line) < 260


def test_a_run_at_1024_alone_is_warned_with_the_arithmetic_and_a_stage_is_not(tmp_path):
    changes = {"train.total_steps": 100_000, "train.batch_size": 256, "train.micro_batch": 4}
    _, (warning,) = screen(tmp_path, "1024", **changes)
    assert "100,000 steps x 256 = 25.6 million samples, 1,600,000 passes over 16 images" in warning
    assert "full.py:256" in warning and "train.init_from" in warning
    stage = {"init_from": {"workdir": "A", "step": 300_000, "weights": "ema"}, "gate": {"verdict": "pass"}}
    lines, warnings = screen(tmp_path, "1024", origin=stage, **changes)
    assert not warnings and "Weights    from step 300,000 of A, ema weights." in lines and "Gate       pass." in lines
    assert not screen(tmp_path, "256", **changes)[1]
    assert not screen(tmp_path, "1024", **changes | {"train.total_steps": 400_000})[1]


def test_a_stage_that_is_given_the_data_of_another_is_warned_of_both(tmp_path, monkeypatch, caplog):
    make_data.dataset(tmp_path / "64", {"64x64": 4})
    config, dataset = tiny(tmp_path / "64"), data.Dataset(tmp_path / "64")
    settings = trained.model_settings(config.model, dataset.info["widths"])
    for file, warned in (("configs/full.py:256", True), ("configs/full.py", False), ("configs/quickstart.py", False)):
        values = flags.FlagValues()
        config_flags.DEFINE_config_file("config", flag_values=values)
        values(["main", f"--config={file}"])
        monkeypatch.setattr(flags, "FLAGS", values)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            startup.announce(config, dataset, settings, model.abstract(settings)[1], {}, tmp_path, mesh.make_mesh())
        assert ("configs/full.py:256 is the stage for 256" in caplog.text) == warned
        assert ("a data set of 64:" in caplog.text) == warned
    assert startup.another_resolution("configs/full.py:512", 512) == []


def test_what_does_not_fit_is_said_before_it_fails(tmp_path):
    lines, (warning,) = screen(tmp_path, memory=10**6)
    assert "GB are needed and the device has 0.0 GB" in warning and "jaxdit.plan" in warning
    (line,) = [line for line in lines if line.startswith("Memory")]
    assert "by estimate" in line and "parameters" in line and "activations" in line


def test_the_disk_of_the_whole_run_is_told_and_missed_before_it_is_full(tmp_path):
    lines, warnings = screen(tmp_path, **{"train.total_steps": 450_000, "checkpoint.every": 5_000})
    # Whole: two, one in writing, the first of three half-days. Averages alone: the newest ten, and one in 50,000.
    size = 40_562 * 4 * (4 * 6 + 10 + 9)
    assert not warnings and any(f"{size / 1e9:,.1f} GB of checkpoints" in line for line in lines)
    long = {"train.total_steps": 450_000, "checkpoint.every": 5_000}
    assert not screen(tmp_path, room=size, **long)[1]
    (warning,) = screen(tmp_path, room=size - 1, **long)[1]
    assert "make room" in warning and "checkpoint.every" in warning


def test_the_time_that_is_left_and_its_energy_are_told_once_they_are_measured(tmp_path):
    config = tiny(tmp_path, **{"train.total_steps": 1000, "train.batch_size": 36, "metrics.watts": 500.0})
    line = startup.remaining(config, step=0, rate=10.0)  # 3,600 seconds
    assert "10.0 images/s" in line and "in 1 h 00 min (" in line and "0.5 kWh at metrics.watts=500" in line


def test_no_command_loads_torch_before_it_needs_it():
    """Two seconds and 180 MB; a library that jaxdit imports may do so by itself."""
    code = (
        "import sys; from jaxdit import evaluate, export, plan, report, sample, train, validate; "
        "print([name for name in ('torch', 'diffusers', 'transformers', 'tensorflow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_decay_of_the_average_rises_no_higher_than_is_asked_for(tmp_path):
    lines, _ = screen(tmp_path, **{"optim.ema_decay": 0.5, "train.total_steps": 100_000})
    assert any("rises to 0.50000 at the end: they average over about the last 2 updates" in line for line in lines)


def test_an_epoch_is_counted_in_steps_and_no_more_images_are_judged_than_there_are(tmp_path):
    options = {"data.holdout_fraction": 0.3, "train.eval_every": 5}
    lines, _ = screen(tmp_path, **options, **{"train.eval_images": 4})
    dataset = data.Dataset(tmp_path / "64", holdout_fraction=0.3)
    images, held_out = sum(map(len, dataset.train.values())), sum(map(len, dataset.held_out.values()))
    assert any(
        f"{images:,} samples, {images / 4:,.1f} steps; each" in line for line in lines
    )  # of 4, in micro-batches of 2
    assert any(f"judged on {min(held_out, 4)} held-out images every 5 steps" in line for line in lines)
    lines, _ = screen(tmp_path, **options, **{"train.eval_images": 1_000})
    assert any(f"judged on {held_out} held-out images" in line for line in lines)


def test_a_bucket_of_just_one_micro_batch_repeats_nothing(tmp_path):
    lines, _ = screen(tmp_path, buckets={"64x64": 9, "48x80": 2})
    assert not any("repeat within one" in line for line in lines)


def test_the_estimate_is_of_the_largest_bucket_the_longest_text_and_the_optimizer(tmp_path):
    def needed(name, buckets, text_lengths=(16,), optimizer="adamw"):
        make_data.dataset(tmp_path / name, buckets)
        config = tiny(tmp_path / name, **{"optim.name": optimizer, "data.text_lengths": text_lengths})
        dataset = data.Dataset(tmp_path / name, text_lengths=text_lengths)
        settings = trained.model_settings(config.model, dataset.info["widths"])
        return startup.worst(config, dataset, settings, model.abstract(settings)[1])

    large = needed("a", {"128x128": 2})
    assert needed("b", {"64x64": 9, "128x128": 2}) == needed("c", {"128x128": 2, "64x64": 9}) == large
    assert needed("d", {"128x128": 2}, (16, 48)) == needed("e", {"128x128": 2}, (48,)) != large
    assert needed("f", {"128x128": 2}, optimizer="muon")["moments"] < large["moments"]


def test_what_is_saved_already_counts_as_room_for_checkpoints(tmp_path, monkeypatch, caplog):
    make_data.dataset(tmp_path / "64", {"64x64": 4})
    config, dataset = tiny(tmp_path / "64"), data.Dataset(tmp_path / "64")
    settings = trained.model_settings(config.model, dataset.info["widths"])
    shapes = model.abstract(settings)[1]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 0}))
    monkeypatch.setattr(flags, "FLAGS", flags.FlagValues())
    for written, warned in ((startup.disk(config, shapes), False), (startup.disk(config, shapes) - 1, True)):
        (tmp_path / "checkpoints").mkdir(exist_ok=True)
        (tmp_path / "checkpoints" / "array").write_bytes(bytes(written))
        caplog.clear()
        startup.announce(config, dataset, settings, shapes, {}, tmp_path, mesh.make_mesh())
        assert ("Disk: the checkpoints of the whole run take" in caplog.text) == warned


def test_only_the_steps_that_are_left_take_time(tmp_path):
    config = tiny(tmp_path, **{"train.total_steps": 1000, "train.batch_size": 36, "metrics.watts": 500.0})
    assert "in 30 min 00 s (" in startup.remaining(config, step=500, rate=10.0)
    assert "0.2 kWh" in startup.remaining(config, step=500, rate=10.0)


def test_what_just_fits_is_not_warned_of_and_a_byte_more_is(tmp_path):
    make_data.dataset(tmp_path / "64", {"64x64": 9})
    config, dataset = tiny(tmp_path / "64"), data.Dataset(tmp_path / "64", text_lengths=(16,))
    settings = trained.model_settings(config.model, dataset.info["widths"])
    needed = startup.largest(config, dataset, settings, model.abstract(settings)[1])
    assert not screen(tmp_path, memory=needed)[1] and len(screen(tmp_path, memory=needed - 1)[1]) == 1


def test_a_run_that_goes_back_is_named_and_not_warned_of_its_resolution(tmp_path):
    changes = {"train.batch_size": 256, "train.micro_batch": 4}
    back = {"restore": {"workdir": "B", "step": 2_000}}
    lines, warnings = screen(tmp_path, "1024", origin=back, **changes)
    assert not warnings and "Goes back  from step 2,000 of B." in lines
    enough = startup.ENOUGH_SAMPLES // 256  # steps
    assert not screen(tmp_path, "1024", **changes, **{"train.total_steps": enough})[1]
    assert len(screen(tmp_path, "1024", **changes, **{"train.total_steps": enough - 1})[1]) == 1


def test_averages_that_stay_for_good_are_those_of_steps_that_are_saved(tmp_path):
    shapes = model.abstract(trained.model_settings(tiny("").model, {"latent": 16, "text": 12, "vision": 6}))[1]
    # Of 20,000 and 50,000 both are multiples of 100,000 alone; 150,000 is saved three times, and each time kept.
    for every, snapshots in ((20_000, 10 + 4), (150_000, 3 + 3)):
        config = tiny("", **{"train.total_steps": 450_000, "checkpoint.every": every})
        assert startup.disk(config, shapes) == 40_562 * 4 * (4 * 6 + snapshots)


def test_many_devices_divide_the_micro_batch_and_with_fsdp_the_model(tmp_path, monkeypatch):
    make_data.dataset(tmp_path / "64", {"64x64": 9})
    dataset = data.Dataset(tmp_path / "64", text_lengths=(16,))

    def needed(count, fsdp):
        monkeypatch.setattr(jax, "device_count", lambda: count)
        config = tiny(tmp_path / "64", **{"train.micro_batch": 8, "train.batch_size": 8, "mesh.fsdp": fsdp})
        settings = trained.model_settings(config.model, dataset.info["widths"])
        return startup.worst(config, dataset, settings, model.abstract(settings)[1])

    one, four, cut = needed(1, 1), needed(4, 1), needed(4, 2)
    assert four["batch"] == one["batch"] / 4 and cut["batch"] == four["batch"]
    assert four["parameters"] == one["parameters"] > 1.5 * cut["parameters"] > one["parameters"] / 2


def test_several_devices_are_told_with_what_each_of_them_holds_whole(tmp_path, monkeypatch, caplog):
    make_data.dataset(tmp_path / "64", {"64x64": 4})
    config, dataset = tiny(tmp_path / "64"), data.Dataset(tmp_path / "64")
    settings = trained.model_settings(config.model, dataset.info["widths"])
    shapes, caplog_level = model.abstract(settings)[1], caplog.at_level(logging.INFO)
    monkeypatch.setattr(flags, "FLAGS", flags.FlagValues())
    many = SimpleNamespace(size=24, shape={"data": 3, "fsdp": 8}, devices=np.array(jax.devices()))
    with caplog_level:
        startup.announce(config, dataset, settings, shapes, {}, tmp_path, mesh.make_mesh())
        assert "Devices" not in caplog.text and "Every device" not in caplog.text
        startup.announce(config, dataset, settings, shapes, {}, tmp_path, many)
    assert "Devices    24 x cpu (data 3 x fsdp 8)." in caplog.text
    whole = "text_in/kernel, vision_in/kernel"  # 12 and 6 rows
    assert f"Every device holds {whole} whole, because fsdp=8 does not divide their rows." in caplog.text


def test_the_memory_is_the_cards_pool_or_the_machines(monkeypatch):
    with open("/proc/meminfo") as file:
        total = 1024 * int(file.readline().split()[1])
    assert startup.device_memory() == pytest.approx(total, rel=0.01)
    card = SimpleNamespace(memory_stats=lambda: {"bytes_limit": 21_600_000_000})
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [card])
    assert startup.device_memory() == 21_600_000_000


def test_the_largest_bucket_is_that_of_most_pixels_not_the_tallest(tmp_path):
    found = []
    for name, buckets in (("a", {"112x112": 2}), ("b", {"64x128": 2, "112x112": 2})):
        make_data.dataset(tmp_path / name, buckets)
        config, dataset = tiny(tmp_path / name), data.Dataset(tmp_path / name, text_lengths=(16,))
        settings = trained.model_settings(config.model, dataset.info["widths"])
        found.append(startup.worst(config, dataset, settings, model.abstract(settings)[1]))
    assert found[0] == found[1]


def test_a_run_that_judges_nothing_says_so(tmp_path):
    lines, _ = screen(tmp_path, **{"train.eval_every": 0, "train.eval_images": 4})
    assert any(line.startswith("Saved ") and line.endswith("; no held-out evaluation.") for line in lines)
