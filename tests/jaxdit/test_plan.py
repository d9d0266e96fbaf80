import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import make_data
import pytest

from configs import encode_demo, full, nano, quickstart
from encode.records import InputError
from jaxdit import data, estimate, forecast, measure, model, plan, startup, workdir

ROOT = Path(__file__).parents[2]
FULL = "configs/full.py"


def tiny():
    config = quickstart.get_config()
    config.model.update({"layers": 1, "width": 32, "heads": 2})
    config.train.update({"batch_size": 4, "micro_batch": 2})
    config.data.text_lengths = (16,)
    return config


def rows_of(text, title):
    """The rows of one table of the screen as lists of words, by their first word."""
    lines = text.split(title, 1)[1].split("\n\n")[0].splitlines()[2:]
    return {line.split()[0]: line.split() for line in lines}


def test_the_command_of_the_readme_answers_on_one_screen():
    command = [sys.executable, "-m", "jaxdit.plan", f"--config={FULL}:1024", "--memory_gb=24", "--watts=300"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 160
    for words in ("560,841,792 parameters", "full.py:256", "full.py:512", "full.py:1024", "1024x1024", "kWh at 300 W"):
        assert words in ended.stdout
    assert all("estimate" in line for line in lines if line.startswith(("Buckets", "Memory", "Stages", FULL)))


def test_an_impossible_call_ends_with_2_and_one_sentence():
    command = [sys.executable, "-m", "jaxdit.plan", "--config=configs/nano.py", "--config.data.path=nowhere"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.strip().splitlines()[-1].startswith("Error: nowhere: no such folder")


@pytest.mark.parametrize(
    "changes, options, words",
    [
        ({}, {"watts": -1.0}, "--watts=-1"),
        ({}, {"memory_gb": 0.0}, "--memory_gb=0"),
        ({}, {"device": "RTX 4090", "real": True}, "--measure"),
        ({"model.dtype": "float16"}, {}, "float16"),
        ({"train.micro_batch": 7}, {}, "train.micro_batch=7"),
        ({}, {"cards": 4}, "train.micro_batch=2 must be divisible by the 4 devices"),
        ({"mesh.fsdp": 3}, {"cards": 2}, "mesh.fsdp=3 do not make up 2 devices"),
        ({}, {"cards": 2, "real": True}, "leave --cards=2 out"),
        ({"mesh.fsdp": 2}, {"real": True}, "mesh.fsdp=2 do not make up 1 device"),
        ({}, {"cards": 0}, "--cards=0"),
        ({}, {"resolution": 100}, "--resolution=100 must be a multiple of 16"),
        ({"data.path": "s3://bucket/1024"}, {}, "URL"),
    ],
)
def test_contradictions_are_refused(changes, options, words):
    config = full.get_config("1024")
    for name, value in changes.items():
        section, field = name.split(".")
        config[section][field] = value
    with pytest.raises(InputError, match=words):
        plan.plan(config, f"{FULL}:1024", **options)


def test_a_configuration_of_encode_is_refused():
    with pytest.raises(InputError, match="training run"):
        plan.plan(encode_demo.get_config(), "configs/encode_demo.py")


def test_stages_are_those_of_the_file_with_the_model_that_was_given():
    config = full.get_config("512")
    config.model.layers = 20
    stages = plan.read_stages(config, f"{FULL}:512", None)
    assert [stage.resolution for stage in stages] == [256, 512, 1024]
    assert {stage.config.model.layers for stage in stages} == {20}
    assert [stage.config.train.micro_batch for stage in stages] == [
        full.get_config(arg).train.micro_batch for arg in ("256", "512", "1024")
    ]
    for stage in stages:
        assert sum(bucket.images for bucket in stage.buckets) == 100_000
    assert [bucket.name for bucket in stages[0].buckets] == ["256x256", "208x304", "304x208"]
    assert stages[2].buckets[1] == plan.Bucket("832x1216", 33_333, (152, 104, 16), 128)
    assert [stage.resolution for stage in plan.read_stages(full.get_config(), FULL, None)] == [1024]
    assert [stage.resolution for stage in plan.read_stages(nano.get_config(), "configs/nano.py", 768)] == [768]


def test_a_data_set_gives_its_own_buckets_widths_and_counts(tmp_path):
    make_data.dataset(tmp_path / "256", {"256x256": 12, "192x320": 20}, text=12, vision=6)
    config = full.get_config("256")
    config.data.update({"path": str(tmp_path / "256"), "holdout_fraction": 0.3})
    train = data.Dataset(tmp_path / "256", holdout_fraction=0.3).train
    low, middle, high = plan.read_stages(config, f"{FULL}:256", None)
    assert {bucket.name: bucket.images for bucket in low.buckets} == {name: len(rows) for name, rows in train.items()}
    assert {bucket.text for bucket in low.buckets} == {64} and low.widths["text"] == 12
    assert sorted(bucket.name for bucket in high.buckets) == ["1024x1024", "768x1280"]
    assert [bucket.latent for bucket in middle.buckets] == [(80, 48, 16), (64, 64, 16)]
    with pytest.raises(InputError, match="--resolution=512"):
        plan.read_stages(config, f"{FULL}:256", 512)


def test_days_and_energy_follow_from_the_operations():
    config = full.get_config("1024")
    stages = plan.read_stages(config, f"{FULL}:1024", None)
    given, device = stages[2], plan.look_at("RTX 4090", 24, config, False)
    settings = forecast.settings_for(given, device)
    assert (settings["dtype"], settings["attention"]) == ("bfloat16", "cudnn")  # though this machine has no card
    text = forecast.screen(stages, given, device, 400.0, {})
    found = rows_of(text, "Stages")
    seconds = sum(
        bucket.images
        / 100_000
        * estimate.hardware_flops(settings, bucket.latent, bucket.text, remat=config.model.remat)
        / (165.2e12 * estimate.UTILISATION)
        for bucket in given.buckets
    )
    days = config.train.total_steps * config.train.batch_size * seconds / 86_400
    assert float(found[f"{FULL}:1024"][5]) == pytest.approx(days, rel=0.01)
    assert float(found[f"{FULL}:1024"][6]) == pytest.approx(days * 24 * 0.4, rel=0.01)
    assert float(found["all"][2]) == pytest.approx(
        sum(float(found[f"{FULL}:{n}"][5]) for n in (256, 512, 1024)), rel=0.01
    )
    memory = rows_of(text, "Memory")
    parts = [float(cell) for cell in memory["block"][1:8]]
    assert sum(parts[:-1]) == pytest.approx(parts[-1], abs=0.03)
    count = model.count_parameters(model.abstract(settings)[1])
    assert parts[0] == pytest.approx(4 * count / 1e9, abs=0.01)
    assert " ".join(memory["none"]).endswith("fits, as configured")
    config.train.micro_batch = 4
    given = plan.read_stages(config, f"{FULL}:1024", None)[2]
    memory = rows_of(forecast.screen(stages, given, device, 400.0, {}), "Memory")
    assert " ".join(memory["none"]).endswith("does not fit, as configured")


def test_muon_keeps_one_moment_less_and_its_products_take_their_time():
    found = {}
    for name in ("adamw", "muon"):
        config = full.get_config("256")
        config.optim.name = name
        stages = plan.read_stages(config, f"{FULL}:256", None)
        assert all(stage.config.optim.name == name for stage in stages)
        device = plan.look_at("RTX 4090", 24, config, False)
        text = forecast.screen(stages, stages[0], device, 400.0, {})
        memory, days = rows_of(text, "Memory"), rows_of(text, "Stages")
        moments, total = (float(memory["none"][column]) for column in (2, 7))
        found[name] = moments, total, [float(days[f"{FULL}:{size}"][5]) for size in (256, 512, 1024)]
    (twice, most, days), (once, less, slower) = found["adamw"], found["muon"]
    assert once == pytest.approx(twice / 2, rel=0.03) and most - less == pytest.approx(twice - once, abs=0.02)
    shares = [slow / day - 1 for slow, day in zip(slower, days)]
    assert 0.1 < shares[0] < 0.25 and shares[0] > 3 * shares[1] > 9 * shares[2] > 0


def test_many_cards_divide_the_images_and_with_fsdp_the_model():
    def screen(fsdp, cards, micro_batch, **changes):
        config = full.get_config("512")
        config.mesh.fsdp, config.train.micro_batch = fsdp, micro_batch
        config.update_from_flattened_dict(changes)
        return plan.plan(config, f"{FULL}:512", device="H100", cards=cards, watts=100.0)

    one, eight, cut = screen(1, 1, 8), screen(1, 8, 64), screen(8, 8, 64)
    assert "72.0 GB to use" in one and "Device  8 x H100 " in eight  # of 80
    held = [[float(cell) for cell in rows_of(text, "Memory")["none"][1:8]] for text in (one, eight, cut)]
    assert held[0] == held[1]  # eight images on each
    assert [part * 8 for part in held[2][:3]] == pytest.approx(held[0][:3], rel=0.02)
    assert held[2][4] < held[0][4] and held[2][5] == held[0][5]  # a layer's kernels at a time; its own images
    most = [int(rows_of(text, "Buckets")["512x512"][8]) for text in (one, eight, cut)]
    assert most[1] == 8 * most[0] and most[2] > most[1]
    (days, energy), (shared, as_much), _ = (
        map(float, rows_of(text, "Stages")[f"{FULL}:512"][5:7]) for text in (one, eight, cut)
    )
    assert days == pytest.approx(8 * shared, rel=0.01) and energy == pytest.approx(as_much, rel=0.01)
    # Six do not divide 1024 rows: each holds nearly all.
    whole = rows_of(screen(6, 6, 48, **{"train.batch_size": 240}), "Memory")["none"]
    assert float(whole[1]) > 0.8 * held[0][0]
    # Muon gathers what is cut, and its update is made again by each group that holds a model.
    muon = [screen(fsdp, 8, 64, **{"optim.name": "muon"}) for fsdp in (1, 8)]
    needed = [sum(map(float, rows_of(text, "Memory")["none"][4:6])) for text in muon]
    assert needed[1] > 3 * 4 * 0.9 * 0.5608
    slow, quick = (float(rows_of(text, "Stages")[f"{FULL}:512"][5]) for text in muon)
    assert slow > 1.2 * quick
    assert quick == pytest.approx(shared, rel=0.05)


@pytest.mark.parametrize(
    ("flags", "watts"), [({}, 450), ({"device": "RTX 3090"}, 350), ({"device": "L4", "cards": 2}, 144)]
)
def test_energy_is_that_of_the_card_that_is_named(flags, watts):
    config = full.get_config("256")
    config.train.micro_batch = 2
    assert f"kWh at {watts} W" in plan.plan(config, f"{FULL}:256", **flags)


def test_the_micro_batch_that_is_named_is_one_that_a_run_takes():
    config = full.get_config("256")
    config.train.update({"batch_size": 90, "micro_batch": 18})
    text = plan.plan(config, f"{FULL}:256", device="RTX 4090", cards=2)  # 45 fit, but are not to be halved
    config.train.micro_batch, config.data.path = int(text.split("at most ")[1].split()[0]), "somewhere"
    workdir.check(config, 2)
    assert config.train.micro_batch == 30


def test_without_a_peak_there_is_memory_but_no_time():
    text = plan.plan(nano.get_config(), "configs/nano.py", device="cpu", memory_gb=16)
    assert "peak not known" in text and "14.4 GB" in text
    assert rows_of(text, "Stages")["configs/nano.py"][4:7] == ["-", "-", "-"]


@pytest.mark.parametrize(
    ("device", "nearest"), [("rtx 4090", "RTX 4090"), ("NVIDIA GeForce RTX 4900", "RTX 4090"), ("H1000", "H100")]
)
def test_a_misspelt_card_is_refused_with_the_nearest_ones(device, nearest):
    with pytest.raises(InputError, match=f"^--device={device}: .* nearest are {nearest}, ") as refused:
        plan.plan(nano.get_config(), "configs/nano.py", device=device)
    named = str(refused.value).split("nearest are ")[1].split(";")[0].split(", ")
    assert len(named) == 3
    for card in named:  # what is named is known
        assert "peak not known" not in plan.plan(nano.get_config(), "configs/nano.py", device=card)


def test_a_stage_with_the_data_of_another_is_named(tmp_path):
    make_data.dataset(tmp_path / "64", {"64x64": 4}, text=12, vision=6)
    config = full.get_config("256")
    config.data.path = str(tmp_path / "64")
    assert "is the stage for 256, and config.data.path is a data set of 64" in plan.plan(config, f"{FULL}:256")
    assert "is the stage for" not in plan.plan(full.get_config("256"), f"{FULL}:256", resolution=512)


def test_measuring_runs_the_real_updates(monkeypatch):
    monkeypatch.setattr(plan, "SHAPES", ((1024, 1024),))
    monkeypatch.setattr(plan, "WIDTHS", {"latent": 16, "text": 24, "vision": 12})
    monkeypatch.setattr(measure, "UPDATES", 4)
    config = tiny()
    config.model.update({"layers": 2, "width": 64})
    given = plan.read_stages(config, "configs/quickstart.py", 128)[0]
    found = measure.measure(config, given.buckets, given.widths)
    (bucket,) = given.buckets
    assert found[bucket.name].updates == 4 and found[bucket.name].rate > 0
    device = plan.look_at("", None, config, True)
    assert device.kind == jax.devices()[0].device_kind
    settings = forecast.settings_for(given, device)
    count = model.count_parameters(model.abstract(settings)[1])
    parts = estimate.memory(settings, count, 2, bucket.latent, bucket.text, remat="none")
    assert found[bucket.name].memory == pytest.approx(sum(parts.values()), rel=0.25)
    text = forecast.screen([given], given, device, 60.0, found)
    assert rows_of(text, "Stages")["configs/quickstart.py"][-1] == "measured"
    assert float(rows_of(text, "Buckets")["128x128"][5]) == pytest.approx(found[bucket.name].rate, rel=0.01)


def test_a_bucket_that_memory_refuses_is_named_and_the_next_is_measured(monkeypatch):
    calls = []

    def run(made, initial, batch, where, train):
        calls.append(batch["latent"].shape)
        if len(calls) == 1:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.")
        return measure.Measured(rate=3.0, memory=10**9, updates=20)

    monkeypatch.setattr(measure, "_measure", run)
    config = tiny()
    text = plan.plan(config, "configs/quickstart.py", resolution=256, real=True)
    found = rows_of(text, "Buckets")
    assert len(calls) == 3
    assert " ".join(found["256x256"]).endswith("out of memory") and found["208x304"][5] == "3"


def test_a_warm_up_that_no_run_would_take_is_refused_here_too():
    config = quickstart.get_config()
    config.train.total_steps = 500
    with pytest.raises(InputError, match=r"optim\.warmup_steps=100"):
        plan.plan(config, "configs/quickstart.py", resolution=64)


def test_another_failure_of_the_device_is_not_swallowed(monkeypatch):
    def run(*_):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(measure, "_measure", run)
    with pytest.raises(jax.errors.JaxRuntimeError):
        plan.plan(tiny(), "configs/quickstart.py", resolution=128, real=True)


def test_samples_and_passes_a_day_follow_from_the_speed_and_the_peak_from_its_share():
    assert forecast._speed(2.5, 1_000) == ["2.5", "216,000", "216"]
    config = full.get_config("256")
    config.data.text_lengths = config.data.text_lengths[-1:]
    given = plan.read_stages(config, f"{FULL}:256", None)[0]
    device = plan.look_at("H100", 72, config, False)
    settings, bucket = forecast.settings_for(given, device), given.buckets[0]
    flops = estimate.training_flops(settings, bucket.latent, bucket.text)
    found = {one.name: measure.Measured(0.25 * device.peak / flops, 10**9, 20) for one in given.buckets}
    text = forecast.screen([given], given, device, 60.0, found)
    assert rows_of(text, "Buckets")[bucket.name][-2] == "25%"
    text = forecast.screen([given], given, device, 60.0, {})
    hardware = forecast._hardware(config, settings, bucket, device)
    rate = estimate.images_per_second(hardware, device.peak, estimate.utilisation("H100"))
    assert float(rows_of(text, "Buckets")[bucket.name][4 + 1]) == pytest.approx(rate, rel=0.01)


def test_what_was_measured_of_one_bucket_tells_the_time_of_the_others_and_of_the_next_stage():
    config = full.get_config("256")
    stages = plan.read_stages(config, f"{FULL}:256", None)
    given, device = stages[0], plan.look_at("RTX 4090", 24, config, False)
    settings = forecast.settings_for(given, device)
    first, *others = given.buckets

    def days(measured):
        rows = rows_of(forecast.screen(stages, given, device, 60.0, measured), "Stages")
        return [float(rows[f"{FULL}:{size}"][5]) for size in (256, 512)]

    rate = forecast._rate(config, settings, first, device)
    lost = {bucket.name: measure.Measured(problem="out of memory") for bucket in others}
    assert days(lost | {first.name: measure.Measured(rate, 1, 20)}) == pytest.approx(days({}), rel=0.01)
    twice = days(lost | {first.name: measure.Measured(2 * rate, 1, 20)})
    assert twice == pytest.approx([day / 2 for day in days({})], rel=0.01)
    # One that goes slower than the rest of them is taken as it is.
    slow = {b.name: measure.Measured(forecast._rate(config, settings, b, device), 1, 20) for b in given.buckets}
    slow[first.name] = measure.Measured(rate / 3, 1, 20)
    images = sum(b.images for b in given.buckets)
    seconds = sum(b.images / slow[b.name].rate for b in given.buckets) / images
    assert days(slow)[0] == pytest.approx(
        config.train.total_steps * config.train.batch_size * seconds / 86_400, rel=0.01
    )


def test_float32_on_a_card_has_no_cudnn_and_every_bucket_must_fit():
    config = full.get_config("256")
    config.model.dtype = "float32"
    given = plan.read_stages(config, f"{FULL}:256", None)[0]
    device = plan.look_at("RTX 4090", 24, config, False)
    settings = forecast.settings_for(given, device)
    assert (settings["dtype"], settings["attention"]) == ("float32", "xla")
    config.model.fused = True
    assert "attention xla, remat none, fused\n" in forecast.screen([given], given, device, 60.0, {})
    config.model.fused = False
    text = forecast.screen([given], given, device, 60.0, {})
    assert "attention xla, remat none\n" in text
    config.model.update({"fused": True, "scan_unroll": 1})
    assert "not fused (model.fused wants a GPU" in forecast.screen([given], given, device, 60.0, {})
    config.model.update({"fused": False, "scan_unroll": 0})
    largest = [int(row[8]) for row in rows_of(text, "Buckets").values()]
    assert len(set(largest)) > 1 and int(text.split("at most ")[1].split()[0]) <= min(largest)


def test_the_memory_that_is_given_counts_before_what_a_card_of_that_name_has():
    config = full.get_config("256")
    assert plan.look_at("H100", 24, config, False).memory == pytest.approx(0.9 * 24e9)
    assert plan.look_at("H100", None, config, False).memory == pytest.approx(0.9 * 80e9)
    assert plan.look_at("cpu", None, config, False).memory == pytest.approx(0.9 * 24e9)  # nobody knows
    assert plan.look_at("H100", 10, config, True).memory == pytest.approx(0.9 * 10e9)
    assert plan.look_at("H100", None, config, True).memory == startup.device_memory()


def test_buckets_are_rounded_to_sixteen_pixels_and_captions_are_as_long_as_the_configuration_says():
    buckets = plan.read_stages(nano.get_config(), "configs/nano.py", 304)[0].buckets
    assert [bucket.name for bucket in buckets] == ["304x304", "240x368", "368x240"]  # of 247 x 361
    config = nano.get_config()
    config.data.text_lengths = (64, 256)
    assert {bucket.text for bucket in plan.read_stages(config, "configs/nano.py", 64)[0].buckets} == {256}
    assert "64x64" in plan.plan(config, "configs/nano.py", resolution=64)


def test_of_a_data_set_only_buckets_with_training_images_count_and_its_own_resolution_may_be_said(tmp_path):
    counts = {"64x64": 9, "48x80": 1, "80x48": 1, "48x96": 1}
    make_data.dataset(tmp_path / "64", counts, text=12, vision=6)
    config = nano.get_config()
    config.data.update({"path": str(tmp_path / "64"), "holdout_fraction": 0.3, "text_lengths": (16, 48)})
    train = data.Dataset(tmp_path / "64", holdout_fraction=0.3).train
    assert not len(train["80x48"])  # its one image is held out
    (stage,) = plan.read_stages(config, "configs/nano.py", 64)
    assert {bucket.name: bucket.text for bucket in stage.buckets} == {"64x64": 48, "48x80": 48, "48x96": 48}


def test_a_processor_takes_float32_without_cudnn_and_a_card_at_hand_its_own_dtype(monkeypatch):
    config = full.get_config("256")
    given = plan.read_stages(config, f"{FULL}:256", None)[0]
    settings = forecast.settings_for(given, plan.look_at("cpu", 24, config, False))
    assert (settings["dtype"], settings["attention"]) == ("float32", "xla")
    peaks = []
    monkeypatch.setattr(estimate, "peak_flops", lambda kind, dtype, count: peaks.append(dtype))
    for at_hand in (True, False):
        plan.look_at("RTX 4090", 24, config, at_hand)
    assert peaks == ["float32", "bfloat16"]


def test_the_heading_says_what_was_assumed_and_what_was_measured():
    def heading(card, cards=1, measured=()):
        config = full.get_config("256")
        given = plan.read_stages(config, f"{FULL}:256", None)[0]
        device = plan.look_at(card, 24, config, False, cards)
        return "\n".join(forecast._heading(given, forecast.settings_for(given, device), 1, device, measured))

    assert "of which 50% are assumed, counting" in heading("RTX 4090") and "network" not in heading("RTX 4090")
    assert "of which 32% are taken, as an H100 was measured to reach" in heading("H100")
    assert "the network is not counted" in heading("H100", 8)
    assert "nothing was measured; every number of memory" in heading("RTX 4090")
    said = heading("H100", 8, {"256x256": measure.Measured(rate=3.0)})
    assert "speed is measured where it says so" in said and "network" not in said and "of which" not in said


def test_memory_is_that_of_the_largest_bucket_and_a_micro_batch_fits_to_the_last_image():
    config = full.get_config("1024")
    config.train.update({"batch_size": 30, "micro_batch": 2})
    stages = plan.read_stages(config, f"{FULL}:1024", None)
    given, device = stages[2], plan.look_at("RTX 4090", 24, config, False)
    settings = forecast.settings_for(given, device)
    held = model.count_parameters(model.abstract(settings)[1])
    text = forecast.screen([given], given, device, 60.0, {})
    assert "with 2 images of 1024x1024 at a time" in text
    assert "all" not in rows_of(text, "Stages")  # of one stage there is no sum
    fits = [[int(row[column]) for row in rows_of(text, "Buckets").values()] for column in (8, 9)]
    config.train.batch_size = math.lcm(*map(min, fits))
    told = forecast.screen([given], given, device, 60.0, {}).split("at most ")[1]
    assert told.startswith(f"{min(fits[0])} with remat none, {min(fits[1])} with block (estimate)")
    parts = estimate.memory(settings, held, 2, given.buckets[0].latent, 128, remat="none")
    assert float(rows_of(text, "Memory")["none"][7]) == pytest.approx(sum(parts.values()) / 1e9, abs=0.01)
    exact = replace(device, memory=10)
    assert [forecast._verdict(total, exact, "")[1] for total in (10, 11)] == ["fits", "does not fit"]
    compiled = {bucket.name: measure.Measured(1.0, 12_340_000_000, 20) for bucket in given.buckets}
    assert rows_of(forecast.screen([given], given, device, 60.0, compiled), "Memory")["compiled"][1:3] == [
        "12.34",
        "fits,",
    ]


def test_passes_are_samples_over_images_and_what_was_not_measured_is_called_an_estimate():
    config = full.get_config("256")
    stages = plan.read_stages(config, f"{FULL}:256", None)
    device = plan.look_at("RTX 4090", 24, config, False)
    found = {bucket.name: measure.Measured(rate=50.0, memory=1, updates=20) for bucket in stages[0].buckets}
    rows = rows_of(forecast.screen(stages, stages[0], device, 60.0, found), "Stages")
    samples = config.train.total_steps * config.train.batch_size
    assert float(rows[f"{FULL}:256"][3]) == pytest.approx(samples / 100_000, rel=0.01)
    assert rows[f"{FULL}:256"][7:] == ["measured"]
    assert rows[f"{FULL}:512"][7:] == ["estimate", "from", "that", "speed"]


def test_the_micro_batch_that_is_named_is_that_of_the_bucket_which_fits_least():
    config = full.get_config("256")
    given, device = plan.read_stages(config, f"{FULL}:256", None)[0], plan.look_at("RTX 4090", 24, config, False)
    text = forecast.screen([given], given, device, 60.0, {})
    fits = [int(row[8]) for row in rows_of(text, "Buckets").values()]
    config.train.batch_size = math.lcm(*fits)
    told = forecast.screen([given], given, device, 60.0, {}).split("at most ")[1]
    assert told.startswith(f"{min(fits)} with remat none") and min(fits) < max(fits)


def test_days_weigh_each_bucket_by_its_images():
    config = full.get_config("256")
    (stage,), device = plan.read_stages(config, f"{FULL}:256", None)[:1], plan.look_at("RTX 4090", 24, config, False)
    small = stage.buckets[0]
    large = replace(small, name="large", latent=(2 * small.latent[0], 2 * small.latent[1], 16))

    def days(*images):
        each = [replace(bucket, images=count) for bucket, count in zip((small, large), images) if count]
        given = replace(stage, buckets=each)
        return float(rows_of(forecast.screen([given], given, device, 400.0, {}), "Stages")[f"{FULL}:256"][5])

    assert days(900, 100) == pytest.approx(0.9 * days(900, 0) + 0.1 * days(0, 100), rel=0.02)
