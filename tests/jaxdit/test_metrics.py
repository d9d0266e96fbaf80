"""Rows are exact and stand once whatever was killed; TensorBoard and Weights & Biases get them and never stop a run."""

import json
import logging
import os
import re
import resource
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing import event_accumulator

from encode.records import InputError
from jaxdit import metrics, trackers

ROOT = Path(__file__).parents[2]


def row(step, **more):
    return {"step": step, "loss": 1 / step, "grad_norm": 0.5, "learning_rate": 1e-4, "seconds": 2.0 * step} | more


def written(workdir, steps, start=0, **options):
    log = metrics.Metrics(workdir, start, **options)
    for step in steps:
        log.write(row(step))
    log.close()
    return log


def board(workdir):
    found = event_accumulator.EventAccumulator(str(workdir / "tensorboard"), {"scalars": 0, "images": 0, "tensors": 0})
    return found.Reload()


def test_values_come_back_exactly_and_what_is_not_finite_is_null(tmp_path):
    log = metrics.Metrics(tmp_path, 0)
    log.write({"step": np.int32(1), "loss": np.float32(0.1), "grad_norm": float("nan"), "mfu": None, "health": "fine"})
    log.write({"step": 2, "loss": np.array(0.25), "grad_norm": np.inf, "health": "fine"})
    log.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_constant=pytest.fail) for line in lines] == metrics.read(tmp_path)
    first, second = metrics.read(tmp_path)
    assert np.float32(first["loss"]) == np.float32(0.1) and isinstance(first["step"], int)
    assert first["grad_norm"] is second["grad_norm"] is first["mfu"] is None
    assert second == {"step": 2, "loss": 0.25, "grad_norm": None, "health": "fine"}


def test_a_step_that_is_no_number_is_no_row(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "loss": 1}\n{"step": true, "loss": 2}\n')
    assert [row["step"] for row in metrics.rows(tmp_path)] == [3]


def test_rows_after_the_restored_step_and_half_lines_are_removed(tmp_path):
    written(tmp_path, range(1, 11))
    path = tmp_path / "metrics.jsonl"
    before = path.read_bytes()
    lines = before.splitlines(keepends=True)
    lines[2] = b"\0\0\0\0\n"  # a power cut
    path.write_bytes(b"".join(lines)[:-7])  # a kill
    log = metrics.Metrics(tmp_path, 8)
    assert [r["step"] for r in metrics.read(tmp_path)] == [1, 2, 4, 5, 6, 7, 8]
    assert log.last == row(8) and log.seconds == 18.0  # step 9 is done again, and was paid for
    log.close()
    assert path.read_bytes() == b"".join(lines[:2] + lines[3:8])
    assert written(tmp_path, range(9, 11), 8).seconds == 16.0
    written(tmp_path, [], 100)
    path.write_bytes(path.read_bytes()[:-1])  # cut between the row and the end of its line
    written(tmp_path, [11], 100)
    assert [r["step"] for r in metrics.read(tmp_path)] == [1, 2, 4, 5, 6, 7, 8, 9, 10, 11]
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_file_that_is_whole_is_not_written_again(tmp_path):
    written(tmp_path, range(1, 4))
    before = (tmp_path / "metrics.jsonl").stat()
    written(tmp_path, [], 3)
    after = (tmp_path / "metrics.jsonl").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_a_step_is_never_written_twice(tmp_path, caplog):
    written(tmp_path, [1, 2, 2, 1, 3])
    assert [r["step"] for r in metrics.read(tmp_path)] == [1, 2, 3] and "not written again" in caplog.text


KILLS = """
import os, random, signal, sys, time
from jaxdit import metrics
workdir, start, path = sys.argv[1], 0, sys.argv[1] + "/metrics.jsonl"
open(path, "w").close()
for kill in range(8):
    child = os.fork()
    if child == 0:
        log = metrics.Metrics(workdir, start)
        for step in range(start + 1, 10**6):
            log.write({"step": step, "loss": 1 / step, "long": "x" * 5000})
    before = os.path.getsize(path)
    while os.path.getsize(path) < before + 30_000:
        time.sleep(0.001)
    time.sleep(random.uniform(0, 0.01))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    start = metrics.read(workdir)[-1]["step"] - 2  # the newest checkpoint is a little older
log = metrics.Metrics(workdir, start)
log.write({"step": start + 1, "loss": 1 / (start + 1)})
log.close()
"""


def test_each_step_stands_once_after_kills(tmp_path):
    subprocess.run([sys.executable, "-c", KILLS, str(tmp_path)], cwd=ROOT, check=True, timeout=120)
    rows = metrics.read(tmp_path)
    assert len(rows) > 8 and [r["step"] for r in rows] == list(range(1, len(rows) + 1))
    assert all(r["loss"] == 1 / r["step"] for r in rows)


def test_a_full_disk_loses_no_row_and_stops_nothing(tmp_path, caplog):
    log = metrics.Metrics(tmp_path, 0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # no file grows beyond it
        for step in range(1, 401):
            log.write(row(step))
        log.sync()
        assert (tmp_path / "metrics.jsonl").stat().st_size == 20_000
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    log.sync()
    log.write(row(401))
    log.close()
    assert metrics.read(tmp_path) == [row(step) for step in range(1, 402)]
    assert caplog.text.count("metrics.jsonl cannot be written") == 1 and caplog.text.count("TensorBoard misses") == 1
    steps = [event.step for event in board(tmp_path).Scalars("loss")]
    assert steps[:100] == list(range(1, 101)) and steps[-1] == 401


def test_tensorboard_shows_numbers_changes_of_words_and_pictures(tmp_path):
    log = metrics.Metrics(tmp_path, 0)
    for step, verdict in ((10, "fine"), (20, "fine"), (30, "spike")):
        log.write(row(step, health=verdict, **{"eval/held_out/ema/text": None if step < 30 else 0.75}))
    log.close()
    for file in (tmp_path / "tensorboard").glob("events*"):  # of a leg whose clock stood ahead
        file.rename(file.with_name(re.sub(r"tfevents\.\d", "tfevents.9", file.name)))
    log = metrics.Metrics(tmp_path, 30)
    log.write(row(40, health="spike"))
    log.pictures(20, {"previews/00": np.full((24, 40, 3), (200, 30, 30), np.uint8)})
    log.close()
    found = board(tmp_path)
    assert [(event.step, event.value) for event in found.Scalars("grad_norm")] == [
        (10, 0.5),
        (20, 0.5),
        (30, 0.5),
        (40, 0.5),
    ]
    assert [(event.step, event.value) for event in found.Scalars("eval/held_out/ema/text")] == [(30, 0.75)]
    words = [(e.step, e.tensor_proto.string_val[0].decode()) for e in found.Tensors("health/text_summary")]
    assert words == [(10, "fine"), (30, "spike")]
    (image,) = found.Images("previews/00")
    assert (image.step, image.width, image.height) == (20, 40, 24)


def test_tensorboard_forgets_what_a_killed_leg_wrote_after_the_checkpoint(tmp_path):
    killed = metrics.Metrics(tmp_path, 0)  # never closed
    for step in (1, 2, 3, 4):
        killed.write(row(step))
    log = metrics.Metrics(tmp_path, 2)
    log.write(row(3, loss=7.0))
    log.close()
    assert [(event.step, event.value) for event in board(tmp_path).Scalars("loss")] == [(1, 1.0), (2, 0.5), (3, 7.0)]


def test_columns_hold_what_the_rows_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "CHUNK", 4)
    rows = [row(step) for step in range(1, 11)]
    rows[1]["loss"] = None
    rows[6] |= {"late": 3, "health": "spike"}
    rows[2] |= {"health": "fine", "odd": [1, 2], "loss": "much"}
    rows[3] |= {"odd": {"a": 1}, "health": "fine"}
    rows[8]["huge"] = 10**400
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"step": 11, "lo')
    found = metrics.columns(tmp_path)
    assert len(found) == 10 and found["step"].tolist() == list(range(1, 11))
    np.testing.assert_array_equal(found["loss"], [1, np.nan, np.nan] + [1 / k for k in range(4, 11)])
    np.testing.assert_array_equal(found["late"], [np.nan] * 6 + [3] + [np.nan] * 3)
    assert np.isnan(found["odd"]).all() and np.isnan(found["nothing"]).all() and np.isnan(found["huge"]).all()
    assert found.texts["health"] == [(3, "fine"), (7, "spike")]
    assert found.last("late") == 3 and found.last("nothing") is None
    assert len(metrics.columns(tmp_path / "none")) == 0


def test_the_clock_knows_rate_waiting_mfu_and_all_seconds(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    clock = metrics.Clock(window=10, start_seconds=1000.0, peak=400.0)
    assert clock.look() == {
        "images_per_second": None,
        "data_wait_fraction": None,
        "mfu": None,
        "seconds": 1000.0,
        "seconds_before": 1000.0,
    }
    for step in range(30):
        slow = step < 15  # the window forgets it
        now[0] += 8.0 if slow else 2.0
        clock.waited(4.0 if slow else 0.5)
        clock.trained(16, flops=320.0)
        if step == 25:
            now[0] += 60.0
            clock.skip(60.0)
    seen = clock.look()
    assert seen["images_per_second"] == pytest.approx(8.0) and seen["data_wait_fraction"] == pytest.approx(0.25)
    assert seen["mfu"] == pytest.approx(320 / 2 / 400) and seen["seconds"] == clock.seconds == 1000 + 15 * 8 + 30 + 60
    clock.said()
    now[0] += 5
    assert clock.silent_for() == 5
    assert metrics.Clock(peak=None).look()["mfu"] is None


def test_the_progress_line_has_the_total_and_the_end_at_this_legs_speed():
    values = row(50, images_per_second=8.0, data_wait_fraction=0.004, mfu=0.413)
    line = metrics.progress_line(values, 100, 16)
    assert line.startswith("step 50/100  loss 0.0200  grad norm 0.5  lr 1.00e-04  8.0 images/s")
    assert line.endswith("waiting for data 0%  mfu 41%  left 1 min 40 s")
    day = datetime(2026, 11, 25, 12, 10)
    assert metrics.progress_line(values, 46_850, 16, day).endswith("left 1 d 02 h  ends Thu 26 Nov 14:10")
    assert metrics.progress_line(values, 10**6, 1024, day).endswith("ends Sun 15 Dec 2030 21:56")
    assert "ends" not in metrics.progress_line(values, 5_000, 16, day)
    fresh = metrics.progress_line(row(1, images_per_second=None, mfu=None, held_out_loss=0.71234), 100, 16)
    assert fresh.endswith("held-out loss 0.7123  rate not known yet")
    assert "loss not finite  grad norm not finite" in metrics.progress_line(row(3, loss=None, grad_norm=None), 9, 1)


WANDB = """
import json, os
calls = open(os.environ["CALLS"], "a")
def say(*what):
    calls.write(json.dumps(what) + "\\n")
    calls.flush()
def Settings(**values):
    if "finish_timeout" in values and os.environ.get("OLD"): raise ValueError("extra")
    return sorted(values)
class Image:
    def __init__(self, picture, caption, file_type): self.size, self.caption = picture.size, caption
class Run:
    step = int(os.environ.get("STEP", 0))
    class config:
        update = staticmethod(lambda values, allow_val_change: None)
    def log(self, values, step):
        if os.environ.get("BREAKS"): raise RuntimeError("the service is gone")
        self.step = step
        say("log", step, {n: [v.size, v.caption] if isinstance(v, Image) else v for n, v in values.items()})
    def finish(self): say("finish")
def init(**values):
    say("init", values)
    if os.environ.get("UNREACHABLE") and "mode" not in values: raise RuntimeError("no network\\nno\\nnet")
    return Run()
"""


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """A module wandb that keeps what it is told; returns a function that reads it."""
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "wandb.py").write_text(WANDB)
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.syspath_prepend(str(tmp_path / "library"))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    yield lambda: [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    sys.modules.pop("wandb", None)


def test_weights_and_biases_continues_its_run_over_the_legs(wandb, tmp_path, monkeypatch):
    workdir = tmp_path / "my run"
    workdir.mkdir()
    log = metrics.Metrics(workdir, 0, wandb="team/photos", config={"train": {"seed": 0}})
    log.write(row(1, health="fine", mfu=None))
    log.pictures(1, {"previews/00": np.zeros((4, 6, 3), np.uint8)})
    log.close()
    (_, first), (_, step, values), (_, at, pictures), end = wandb()
    assert first["project"] == "photos" and first["entity"] == "team" and first["name"] == "my run"
    assert first["config"] == {"train": {"seed": 0}} and first["resume"] == "allow" and first["dir"] == str(workdir)
    assert re.fullmatch(r"my-run-[0-9a-f]{8}", first["id"])
    assert step == 1 and values == row(1, health="fine")  # null is left out
    assert (at, pictures) == (1, {"previews/00": [[6, 4], "step 1"]}) and end == ["finish"]
    monkeypatch.setattr(sys.modules["wandb"].Run, "step", 3)  # what a killed leg had sent
    log = metrics.Metrics(workdir, 1, wandb="team/photos")
    for step in (2, 3, 4):
        log.write(row(step))
    log.pictures(2, {"previews/00": np.zeros((4, 6, 3), np.uint8)})  # decoded when training is further on
    log.close()
    kind, again = wandb()[4]
    assert kind == "init" and again["id"] == first["id"] and again["name"] == first["name"]
    assert [call[1] for call in wandb() if call[0] == "log"][2:] == [3, 4, 4]
    assert wandb()[-2][2] == {"previews/00": [[6, 4], "step 2"]}
    written(workdir, [], 4, wandb="elsewhere")
    assert wandb()[-2][1]["id"] != first["id"]


def test_no_failure_of_weights_and_biases_stops_a_run(wandb, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.WARNING)
    monkeypatch.setenv("UNREACHABLE", "1")
    monkeypatch.setenv("OLD", "1")
    written(tmp_path, [1], wandb="photos")
    assert [call[0] for call in wandb()] == ["init", "init", "log", "finish"] and wandb()[1][1]["mode"] == "offline"
    assert wandb()[1][1]["settings"] == ["console", "init_timeout"]
    assert caplog.text.count("cannot be reached (no network)") == 1
    monkeypatch.setenv("BREAKS", "1")
    written(tmp_path, [2, 3, 4], 1, wandb="photos")
    assert caplog.text.count("the service is gone") == 1
    assert [r["step"] for r in metrics.read(tmp_path)] == [1, 2, 3, 4]


def test_an_upload_that_hangs_does_not_hold_the_end(wandb, tmp_path, monkeypatch):
    log = metrics.Metrics(tmp_path, 0, wandb="photos")
    monkeypatch.setattr(sys.modules["wandb"].Run, "finish", lambda self: time.sleep(60))
    monkeypatch.setattr(trackers, "FINISH_SECONDS", -4.8)
    began = time.monotonic()
    log.close()
    assert time.monotonic() - began < 5


def test_weights_and_biases_asked_for_and_missing_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match="pip install wandb"):
        metrics.Metrics(tmp_path, 0, wandb="photos")
    assert not os.listdir(tmp_path)


def test_rows_are_put_on_the_disk_when_asked(tmp_path, monkeypatch):
    told = []
    log = metrics.Metrics(tmp_path, 0)
    log.write({"step": 1, "loss": 1.0})
    monkeypatch.setattr(os, "fsync", lambda number: told.append(Path(os.readlink(f"/proc/self/fd/{number}")).name))
    log.sync()
    assert "metrics.jsonl" in told
    log.close()


def test_a_row_out_of_order_costs_itself(tmp_path, caplog):
    steps = [1, 2, 7, 4, 5, 6, 2, 7, 8, 9]  # 3 with a digit changed, and 2 once more
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(row(step)) + "\n" for step in steps) + '{"step": 10, "lo'
    )
    log = metrics.Metrics(tmp_path, 8)
    log.close()
    assert [row["step"] for row in metrics.read(tmp_path)] == [1, 2, 4, 5, 6, 7, 8]
    assert "3 damaged lines are left out" in caplog.text
    caplog.clear()
    metrics.Metrics(tmp_path, 8).close()
    assert "damaged" not in caplog.text
