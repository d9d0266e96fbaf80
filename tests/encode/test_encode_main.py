"""The command as a person runs it: real processes, the embedded encoders, exit codes and one clear sentence."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from encode import encoders, main, records
from encode.records import InputError
from tests.encode import fakes

ROOT = Path(__file__).resolve().parents[2]


def _command(images, out, *more):
    flags = ["--config=configs/encode_demo.py", f"--config.images={images}", f"--config.out={out}", *more]
    return [sys.executable, "-m", "encode.main", *flags]


def _call(images, out, *more):
    return subprocess.run(_command(images, out, *more), cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    return fakes.photographs(tmp_path_factory.mktemp("main") / "in", 24)


def test_a_folder_becomes_a_data_set_that_decodes_to_its_pictures(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    colours = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (30, 60, 210), "white": (250, 250, 250)}
    for number in range(20):
        name = list(colours)[number * 7 % 4]
        Image.new("RGB", ((150, 100), (100, 150), (90, 90))[number % 3], colours[name]).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(name)
    done = _call(folder, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "20 pictures encoded (8 of them exact copies of others), 0 inputs refused" in done.stdout
    assert str(tmp_path / "out" / "128") in done.stdout
    assert str(tmp_path / "out" / "report.html") in done.stdout
    root = tmp_path / "out" / "128"
    dataset = records.load_dataset(root)
    vae = encoders.load_vae(dataset["encoders"]["vae"])
    assert dataset["fingerprint"]["vae"] == vae.fingerprint
    seen = 0
    for bucket in dataset["buckets"]:
        for record in records.open_bucket(root, bucket):
            pixels = vae.decode(np.stack([record["latent"], record["latent_flip"]]).astype(np.float32))
            difference = pixels.astype(int) - colours[record["caption"].decode()]
            assert np.abs(difference.mean((1, 2))).max() < 6
            seen += 1
    assert seen == 20


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--config.shard_sise=3", "shard_size"),
        ("--config.vae.nme=x", "name"),
        ("--config.seed=many", "seed"),
        ("--config.batch_size=0", "config.batch_size=0: at least 1"),
        ("--config.resolutions=(100,)", "not a multiple of 16"),
        ("--config.max_distortion=0.5", "max_distortion"),
        ("--config.max_upscale=0.0", "max_upscale"),
        ("--config.decode_seconds=0.0", "decode_seconds"),
        ("--config.decode_memory=1", "decode_memory=1: at least 64"),
        ("--config.decode_workers=-1", "decode_workers=-1: at least 0"),
        ("--config.buckets=((100,128),)", "config.buckets=((100, 128),): 100x128: both sides must be multiples of 16"),
        ("--config.buckets=((128,),)", "is not a pair"),
        ("--config.buckets=((1024,1024),)", "not near"),
        ("--config.vae.name=nothing", "nothing"),
        ("--config.images=/does/not/exist", "does not exist"),
        ("surplus", "surplus: not understood; fields are given as --config.section.field=value; what holds spaces"),
        ("--images=x", "--images is not known here (did you mean --config.images?); --help"),
        ("--pixels=9", "(did you mean --config.max_pixels?)"),
        ("--dry_rn", "(did you mean --dry_run?)"),
        ("--dry-rub=1", "--dry-rub is not known here"),
        ("--colour=red", "--colour is not known here; --help says what is."),
    ],
)
def test_a_wrong_call_is_one_sentence_and_exit_code_2(photographs, tmp_path, flag, words):
    done = _call(photographs, tmp_path / "out", flag)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out" / "128").exists()


@pytest.mark.parametrize("program", ["encode.main", "jaxdit.main"])
def test_a_configuration_of_the_other_program_is_said_to_be_one(tmp_path, program):
    other = {"encode.main": "configs/nano.py", "jaxdit.main": "configs/encode_demo.py"}[program]
    command = [sys.executable, "-m", program, f"--config={other}"]
    command += [f"--workdir={tmp_path}"] if program == "jaxdit.main" else []
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--config names no configuration of" in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_missing_folders_are_named():
    config = fakes.config("", "x")
    with pytest.raises(InputError, match=r"config\.images is empty"):
        main.check(config)


def test_another_configuration_exits_with_2_and_both_values(photographs, tmp_path):
    assert _call(photographs, tmp_path / "out").returncode == 0
    before = fakes.tree(tmp_path / "out")
    done = _call(photographs, tmp_path / "out", "--config.shard_size=9")
    assert done.returncode == 2
    assert "config.shard_size was 1000, is 9" in done.stderr
    assert fakes.tree(tmp_path / "out") == before


def test_sigkill_at_random_points_gives_the_same_bytes(photographs, tmp_path):
    small = ("--config.shard_size=1", "--config.resolutions=(128,256)", "--config.max_upscale=9.0")
    assert _call(photographs, tmp_path / "calm", *small).returncode == 0
    draw, kills, finished = random.Random(1), 0, {}
    for attempt in range(30):
        process = subprocess.Popen(_command(photographs, tmp_path / "out", *small), cwd=ROOT, stderr=-3, stdout=-3)
        wanted = len(list((tmp_path / "out").rglob("index-*"))) + draw.randint(2, 20)
        while process.poll() is None and len(list((tmp_path / "out").rglob("index-*"))) < wanted:
            time.sleep(0.002)
        process.kill() if attempt < 29 else None
        if process.wait() == 0:
            break
        kills += 1
        assert finished == {path: path.stat().st_mtime_ns for path in finished}
        finished = {
            path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("index-*.npy") if path.name[0] != "."
        }
    assert process.returncode == 0
    assert kills >= 2
    assert finished == {path: path.stat().st_mtime_ns for path in finished}
    assert fakes.tree(tmp_path / "out") == fakes.tree(tmp_path / "calm")


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(number, marks=pytest.mark.all) for number in (signal.SIGINT, signal.SIGHUP))],
)
def test_a_signal_stops_with_3_and_the_next_call_goes_on(photographs, tmp_path, number):
    small = ("--config.shard_size=1", "--config.resolutions=(128,256)", "--config.max_upscale=9.0")
    process = subprocess.Popen(
        _command(photographs, tmp_path / "out", *small),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # the tests themselves may run under nohup
    )
    while process.poll() is None and not list((tmp_path / "out").rglob("index-*.npy")):
        time.sleep(0.002)
    os.killpg(process.pid, number)  # as a terminal, a service manager or timeout send it
    _, words = process.communicate()
    assert process.returncode == 3, words
    assert "Traceback" not in words
    assert "stopped as asked" in words
    assert not (tmp_path / "out" / "128" / "dataset.json").exists()
    assert _call(photographs, tmp_path / "out", *small).returncode == 0


def test_a_bare_environment_is_enough(photographs, tmp_path):
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C"}
    done = subprocess.run(
        _command(photographs, tmp_path / "out"), cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
