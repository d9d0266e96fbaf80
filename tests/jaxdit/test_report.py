"""The page about a run: right numbers, safe, one small file, quick, and nothing in the folder can make it fail."""

import base64
import json
import os
import re
import subprocess
import sys
import time
from datetime import datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from work import calls

from encode import whole_files
from encode.records import InputError
from jaxdit import facts, health, page, report, report_pictures, seal

ROOT = Path(__file__).parents[2]
EVIL = '<img src=x onerror=alert(1)> & "q" \u202eleft \ud800'
VOID = {"meta", "img", "br"}
EVERY, ROWS, BATCH, TOTAL, IMAGES = 20, 40_000, 256, 1_000_000, 100_000
VOIDED, MISSING, RATE = range(13_300, 13_305), range(22_000, 22_200), 50.0
SECONDS = EVERY * BATCH / RATE  # a row


class Balanced(HTMLParser):
    """The tags with their attributes and the words of a page; closes must match."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.words = [], [], []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)


def words(html):
    return re.sub(r"\s+", " ", " ".join(Balanced(html).words))


def safe(html):
    """It parses, runs nothing, and asks no network for anything."""
    for tag, attributes in Balanced(html).tags:
        assert tag not in ("script", "link", "object")
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.get("src", "data:").startswith("data:"), attributes
        assert ":" not in attributes.get("href", "")
    assert "http" not in html and "url(" not in html
    return html


def folder(workdir, rows=(), **config):
    """A working folder with these rows."""
    workdir.mkdir(parents=True, exist_ok=True)
    base = {
        "data": {"path": "/photographs/256", "holdout_fraction": 0.01},
        "train": {"total_steps": TOTAL, "batch_size": BATCH},
        "metrics": {"watts": 450.0},
        "health": {},
    }
    (workdir / "config.json").write_text(json.dumps(base | config))
    (workdir / "dataset.json").write_text(json.dumps({"count": IMAGES, "buckets": {"256x256": {}, "192x320": {}}}))
    if rows:
        (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return workdir


def checkpoint(workdir, step, *items):
    for item in items:
        (workdir / "checkpoints" / str(step) / item).mkdir(parents=True)
        (workdir / "checkpoints" / str(step) / item / "array").write_bytes(b"0" * 1_500_000)


def preview(workdir, step, name, size=(64, 48)):
    target = workdir / "previews" / str(step)
    target.mkdir(parents=True, exist_ok=True)
    shade = (step % 251, 90, 40)
    Image.new("RGB", size, shade).save(target / f"{name}.png")


def month():
    """The rows of a month: every column, voided updates, rows that are missing, a resume, evaluations."""
    chance = np.random.default_rng(0)
    steps = np.arange(1, ROWS + 1) * EVERY
    trend = 0.5 + 1.5 * np.exp(-steps / 900) + 0.3 * (steps / 900 + 1) ** -0.35
    noise = np.exp(chance.normal(0, 0.02, (ROWS, 40)))
    norm = (0.25 + np.exp(-steps / 3000)) * noise[:, 1] ** 8
    norm[30_000] *= 40
    projections = health.CONDITIONS
    for i, step in enumerate(steps.tolist()):
        if i in MISSING:
            continue
        lost = i in VOIDED
        row = {
            "step": step,
            "samples_seen": step * BATCH,
            "voided": sum(v <= i for v in VOIDED),
            "voided_in_row": int(lost),
            "loss": None if lost else trend[i] * noise[i, 0],
            "grad_norm": None if lost else norm[i],
            "learning_rate": 3e-4 * (1 - step / TOTAL),
            "images_per_second": None if i in (0, 15_000) else 1.1 * RATE * noise[i, 2],
            "data_wait_fraction": 0.002 * noise[i, 3],
            "mfu": None,
            "seconds": SECONDS * (i + 1),
            "velocity_rms": 1.2,
            "target_rms": 1.41,
            "ema_distance": 0.01,
            "health": "young" if i < 12 else "voided" if 0 <= i - VOIDED[0] < 40 else "sound",
        }
        row |= {f"loss_t/{k}": None if lost else trend[i] * noise[i, 4 + k] for k in range(10)}
        row |= {f"grad/{name}": norm[i] * noise[i, 14 + k] for k, name in enumerate(projections)}
        row |= {f"move/{name}": 1e-4 * noise[i, 21 + k] for k, name in enumerate(projections)}
        if step % 5000 == 0:
            row["held_out_loss"] = row["eval/held_out/ema/text_vision"] = float(trend[i])
            row |= {"eval/held_out/raw/text_vision": trend[i] + 0.01, "eval/training/ema/text_vision": trend[i] - 0.02}
            row |= {f"eval/held_out/ema/{name}": trend[i] + 0.1 for name in ("text", "vision", "none")}
            row |= {f"eval/held_out/ema/t{k}": trend[i] for k in range(10)}
        yield row


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    workdir = folder(tmp_path_factory.mktemp("month") / "run", month())
    for step in range(50_000, 800_001, 50_000):
        checkpoint(workdir, step, "ema", *(("state", "data") if step > 700_000 else ()))
        for name in ("00", "01", "02"):
            preview(workdir, step, name, (1024, 1024) if name == "00" else (512, 768))
    listed = [
        {"name": "00", "prompt": EVIL[:-1], "reference": "a.jpg", "note": "held-out image a.jpg with its own vector"},
        {"name": "01", "prompt": "a red bicycle", "reference": "", "note": "a sentence of your own"},
        {"name": "02", "prompt": "", "reference": "b.jpg", "note": "the vector alone"},
    ]
    (workdir / "previews" / "previews.json").write_text(json.dumps(listed))
    changes = [{"time": 1.7e9, "field": "optim.peak_learning_rate", "from": 3e-4, "to": 2e-4}]
    (workdir / "config_history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changes))
    (workdir / "origin.json").write_text(json.dumps({"gate": {"verdict": "pass", "step": 5000}}))
    work = calls(report.write, workdir)
    return workdir, (workdir / "report.html").read_text(encoding="utf-8"), work


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (3.25, "3.25"),
        (99.7, "99.7"),
        (7, "7"),
        (614_400.0, "614,400"),
        (15_700_000, "15.7 million"),
        (2e9, "2 billion"),
    ],
)
def test_an_amount_is_told_with_three_digits(value, words):
    assert page.amount(value) == words


def test_a_months_page_is_safe_small_and_quick(long):
    workdir, html, work = long
    safe(html)
    assert len(html) < 3_000_000
    assert work < 130 * ROWS  # 2 s on an idle core, of which three quarters are reading JSON
    assert not list(workdir.glob(".*.tmp"))
    for title in ("Loss", "Previews", "Health", "Loss by timestep", "Pace", "Inside the model", "Cost", "Checkpoints"):
        assert f"<h2>{title}</h2>" in html, title
    assert "cannot be shown" not in html


def test_the_headline_says_where_the_run_stands(long):
    workdir, html, _ = long
    run = facts.look(workdir)
    left = (TOTAL - 800_000) * BATCH / RATE
    assert run.left == pytest.approx(left) and run.rate == pytest.approx(RATE)
    said = words(html)
    assert "Step 800,000 of 1,000,000: 205 million samples seen, 2,069 passes over the data." in said
    end = run.as_of + timedelta(seconds=left)
    assert f"At 50 images a second, all pauses counted, it ends {end:%a} {end.day} {end:%b}" in said
    assert f"{end:%H:%M}, in 11 d 20 h." in said
    assert re.search(r"sound loss 0\.\d+, gradient norm 0\.\d+", said)  # health.judge in its own words
    seconds = SECONDS * ROWS
    kwh = seconds / 3600 * 0.45
    assert f"so far {seconds / 3600:,.1f} h 205 million {kwh:,.0f} kWh" in said
    assert f"to the end {left / 3600:,.1f} h 51.2 million {left / 3600 * 0.45:,.0f} kWh" in said
    assert f"altogether {(seconds + left) / 3600:,.1f} h 256 million" in said
    assert "Energy is an estimate: hours times metrics.watts, 450 W. Nothing was measured." in said
    assert "5 updates voided" in said


def test_curves_tell_gaps_and_what_is_beyond_the_frame(long):
    _, html, _ = long
    assert words(html).count("Marked below: updates that were not finite") == 2
    assert "Held-out images lie 0.0200 (" in words(html) and "above training images" in words(html)
    assert html.count('<div class="bins">') == 1 and len(re.findall(r"<figcaption>0\.\d to [01]\.\d<", html)) == 10


def test_health_checkpoints_changes_and_origin_are_told(long):
    _, html, _ = long
    said = words(html)
    first = (VOIDED[0] + 1) * EVERY
    assert f"{first + 800:,} sound {ROWS * EVERY - first - 800:,} steps" in said
    assert f"{first:,} voided 800 steps Look at the data" in said
    assert "20 young 240 steps Too few rows" in said
    assert "800,000 to go on, to sample 4.5 MB" in said and "700,000 to sample 1.5 MB" in said
    assert "optim.peak_learning_rate 0.0003 0.0002" in said
    assert "Gate pass, step 5,000" in said and "100,000 images in 2 buckets, /photographs/256" in said


def test_pictures_of_a_set_before_are_not_shown_as_those_of_this_one(tmp_path):
    for step, prompt in ((4, "a boat"), (8, "another boat"), (12, "another boat")):
        said = PngInfo()
        for key, value in {"step": str(step), "prompt": prompt, "reference": "", "note": "own"}.items():
            said.add_itxt(key, value)
        (tmp_path / "previews" / str(step)).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "previews" / str(step) / "00.png", pnginfo=said)
    rows = [{"name": "00", "prompt": "another boat", "reference": "", "note": "own"}]
    (tmp_path / "previews" / "previews.json").write_text(json.dumps(rows))
    html = report_pictures.previews(tmp_path, tmp_path)
    assert html.count("<img") == 3 and html.count("of another set") == 1 and "4/00.png" not in html


def test_previews_are_a_grid_that_leads_to_the_full_pictures(long):
    workdir, html, _ = long
    tags = Balanced(html).tags
    assert sum(tag == "img" for tag, _ in tags) == 3 + 3 * report_pictures.SHOWN
    links = [attributes["href"] for tag, attributes in tags if tag == "a"]
    assert len(links) == 27 and all((workdir / link).is_file() for link in links)
    assert links[0] == "previews/800000/00.png" and links[3] == "previews/50000/00.png" and links[-1] == links[2]
    assert "Not shown: 8 more steps" in words(html)
    small = list((workdir / "previews" / ".small").iterdir())
    sides = sorted({max(Image.open(path).size) for path in small})
    assert sides == [report_pictures.OLD, report_pictures.NEWEST] and len(small) == 27
    before = {path: path.stat().st_mtime_ns for path in small}
    assert report.write(workdir).read_text() and before == {path: path.stat().st_mtime_ns for path in small}


def test_foreign_words_are_shown_and_not_obeyed(long):
    assert '<img src=x onerror=alert(1)> & "q" [U+202E]left' in words(long[1])
    assert page.escape(EVIL).isascii() and "<" not in page.escape(EVIL) and "[U+D800]" in page.escape(EVIL)


def test_foreign_words_everywhere(tmp_path):
    rows = [{"step": 20, "loss": 0.5, "grad_norm": 1.0, "learning_rate": 1e-4, "health": EVIL[:-1]}]
    workdir = folder(tmp_path / "a<b>&", rows, data={"path": EVIL[:-1]}, train={"total_steps": 40, "batch_size": 4})
    (workdir / "config_history.jsonl").write_text(json.dumps({"field": "<b>", "from": EVIL[:-1], "to": None}) + "\n")
    preview(workdir, 20, "00")
    (workdir / "previews" / "previews.json").write_text(json.dumps([{"name": "00", "prompt": EVIL, "note": ["<i>"]}]))
    html = safe(report.write(workdir).read_text(encoding="utf-8"))
    assert words(html).count("onerror=alert(1)") >= 5


def test_a_run_without_a_row_and_a_run_of_one(tmp_path):
    html = safe(report.write(folder(tmp_path / "none")).read_text())
    assert "Nothing has been trained yet." in html and "None is saved yet." in html
    row = {"step": 1, "loss": 2.0, "grad_norm": 1.0, "learning_rate": 1e-5, "samples_seen": BATCH, "seconds": 40.0}
    said = words(safe(report.write(folder(tmp_path / "one", [row])).read_text()))
    assert "Step 1 of 1,000,000: 256 samples seen, 0.00259 passes over the data." in said
    assert "Its rate is not known yet." in said and "so far 40 s 256 5 Wh" in said


def test_rows_of_older_runs_without_most_names(tmp_path):
    rows = [{"step": k, "loss": 1 / k, "grad_norm": 1.0, "learning_rate": 1e-4} for k in range(1, 300)]
    html = safe(report.write(folder(tmp_path / "run", rows, metrics={})).read_text())
    assert "Step 299 of 1,000,000" in html and "Loss by timestep" not in html and "cannot be shown" not in html
    rows[-1]["images_per_second"], rows[-1]["held_out_loss"] = 8.0, 0.3
    said = words(report.write(folder(tmp_path / "run", rows)).read_text())
    assert "At 8 images a second" in said and "0.3000 held-out loss" in said


def test_a_finished_run_and_one_that_has_gone_quiet(tmp_path):
    rows = [
        {"step": k, "loss": 1.0, "grad_norm": 1.0, "learning_rate": 1e-4, "seconds": 60.0 * k} for k in range(1, 101)
    ]
    train = {"total_steps": 100, "batch_size": 4}
    said = words(report.write(folder(tmp_path / "run", rows, train=train)).read_text())
    assert "Done: all 100 steps, 400 samples seen" in said and "it ends" not in said and "to the end" not in said
    workdir = folder(tmp_path / "run", rows, train=train | {"total_steps": 200})
    checkpoint(workdir, 90, "ema", "state", "data")
    checkpoint(workdir, 95, "ema")
    (workdir / "checkpoints" / "97.damaged-12").mkdir()
    then = time.time() - 3 * 86_400
    os.utime(workdir / "metrics.jsonl", (then, then))
    said = words(report.write(workdir).read_text())
    day = datetime.fromtimestamp(then)
    assert "1 h 40 min of training are left at its last rate of 0.0667 images a second." in said
    assert f"Its newest row is of {day:%a} {day.day} {day:%b}" in said
    assert "The same command goes on from step 90." in said


def test_the_verdict_is_healths_own_and_an_unknown_one_is_shown_as_it_is(tmp_path):
    rows = [{"step": k, "loss": 1.0, "grad_norm": 1.0, "learning_rate": 1e-4} for k in range(1, 400)]
    for row in rows[-40:]:
        row["grad_norm"] = 300.0
    rows[-1]["health"] = health.judge(rows).name
    assert health.VERDICTS[rows[-1]["health"]] == "act"
    html = report.write(folder(tmp_path / "run", rows)).read_text()
    assert f'<span class="tag act">{rows[-1]["health"]}</span><p>{page.escape(health.judge(rows).words)}</p>' in html
    rows[-1]["health"] = "spike"  # what the trainer said counts, not what would be said now
    html = report.write(folder(tmp_path / "run", rows)).read_text()
    assert '<div class="health"><span class="tag watch">spike</span><p>' in html
    rows[-1]["health"] = "of another version"
    assert (
        '<span class="tag unknown">of another version</span>'
        in report.write(folder(tmp_path / "run", rows)).read_text()
    )


def test_spans_show_the_worst_of_each_place(tmp_path):
    rows = [{"step": k, "loss": 1.0, "health": "sound"} for k in range(1, 1001)]
    rows[500]["health"] = "diverged"
    rows[501]["health"] = "spike"
    spans = facts.look(folder(tmp_path / "run", rows)).spans(health.VERDICTS, columns=10)
    assert spans == [(0.0, 500.0, "good"), (500.0, 600.0, "act"), (600.0, 1000.0, "good")]


def test_steps_of_previews_are_even_with_the_first_and_the_newest():
    assert report_pictures.evenly([5, 10, 15], 8) == [5, 10, 15]
    chosen = report_pictures.evenly([*range(10), 100, 500, *range(1000, 2001, 50)], 8)
    assert chosen[0] == 0 and chosen[-1] == 2000 and len(chosen) <= 8 and 500 in chosen
    assert max(np.diff(chosen)) <= 600


@pytest.mark.parametrize("odd", ["junk", "shapes", "nested"])
def test_nothing_in_the_folder_makes_the_page_fail(tmp_path, odd):
    rows = [{"step": k, "loss": 1.0, "grad_norm": 1.0, "learning_rate": 1e-4} for k in range(1, 30)]
    workdir = folder(tmp_path / "run", rows)
    preview(workdir, 10, "00")
    preview(workdir, 20, "00")
    preview(workdir, 20, "01")
    (workdir / "previews" / "20" / "00.png").write_bytes((workdir / "previews" / "10" / "00.png").read_bytes()[:60])
    (workdir / "previews" / "30").mkdir()  # latents that wait to be decoded
    (workdir / "checkpoints").mkdir()
    (workdir / "gate").mkdir()
    junk = b"\xff\xfe{\0\n{}\n[1]\n3\nnull\n"
    shapes = json.dumps({"train": 3, "health": {"window": "x"}, "metrics": [], "count": "x", "buckets": 4, "gate": 1})
    if odd == "nested":
        junk, shapes = b"[" * 100_000 + b"\n", json.dumps({"train": {"total_steps": 10**400}, "count": 10**400})
    for name in (
        "config.json",
        "dataset.json",
        "origin.json",
        "previews/previews.json",
        "gate/gate.json",
        "gate/gate.html",
    ):
        (workdir / name).write_bytes(junk if odd == "junk" else shapes.encode())
    (workdir / "config_history.jsonl").write_bytes(junk + b'{"time": "x", "field": [1], "from": {}}\n')
    with open(workdir / "metrics.jsonl", "ab") as file:
        file.write(junk + b'{"step": 99999999999999999999999}\n{"step": "x"}\n{"step": 40, "loss": [1], "health": 3}\n')
    html = safe(report.update(workdir).read_text(encoding="utf-8"))
    said = words(html)
    assert "Step 40:" in said and ("damaged" in said and "not drawn" in said)
    if odd == "junk":
        assert "config.json cannot be read" in said and "config_history.jsonl has" in said


def test_the_page_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch, caplog):
    workdir = folder(tmp_path / "run")
    before = report.write(workdir).read_text()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(whole_files, "publish", full)
    assert report.update(workdir) is None and "No space left" in caplog.text
    with pytest.raises(OSError):
        report.write(workdir)
    assert (workdir / "report.html").read_text() == before and not list(workdir.glob(".*.tmp"))
    monkeypatch.undo()
    monkeypatch.setattr(report, "losses", lambda run: 1 / 0)
    html = safe(report.write(workdir).read_text())
    assert "It cannot be shown: division by zero" in html and "<h2>Configuration</h2>" in html


def test_no_working_folder_is_a_clear_error(tmp_path):
    with pytest.raises(InputError, match=r"config\.json is missing"):
        report.write(tmp_path)
    with pytest.raises(InputError, match=r"samples\.json is missing"):
        report.write(folder(tmp_path / "run"), samples=tmp_path)


def test_the_gate_is_taken_in_and_a_large_one_is_led_to(tmp_path):
    workdir = folder(tmp_path / "run")
    (workdir / "gate").mkdir()
    pixels = np.zeros((900, 700, 3), np.uint8)
    body = "<p class='verdict pass'>pass</p>" + page.table(["check"], [["a<b"]]) + page.strip("x & y", [("it", pixels)])
    (workdir / "gate" / "gate.html").write_text(page.page("The gate", body))
    (workdir / "gate" / "gate.json").write_text('{"verdict": "pass"}')
    html = safe(report.write(workdir).read_text())
    assert body in html and html.count("<h1>") == 1 and "a&lt;b" in html
    (workdir / "gate" / "gate.html").write_text(page.page("The gate", body + "x" * report_pictures.LARGE))
    out = tmp_path / "elsewhere" / "page.html"
    html = safe(report.write(workdir, out=out).read_text())
    assert 'href="../run/gate/gate.html"' in html and '<p class="verdict pass">pass</p>' in html and len(html) < 30_000


def test_large_pictures_are_made_small_and_small_files_stay_exact(tmp_path):
    large = page.picture(np.zeros((900, 700, 3), np.uint8))
    assert large.startswith("data:image/jpeg") and len(large) < 6_000
    exact = np.random.default_rng(0).integers(0, 255, (128, 128, 3), np.uint8)
    Image.fromarray(exact).save(tmp_path / "a.png")
    file = (tmp_path / "a.png").read_bytes()
    assert page.picture(file) == "data:image/png;base64," + base64.b64encode(file).decode()
    assert len(page.picture(exact)) < len(page.picture(file)) / 2  # of many pictures on a page: a JPEG


def test_the_command_writes_the_page_with_samples_and_the_encoded_data(tmp_path):
    row = {"step": 1, "loss": 2.0, "grad_norm": 1.0, "learning_rate": 1e-5}
    workdir = folder(tmp_path / "run", [row])
    (tmp_path / "samples").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "samples" / "0.png")
    rows = [{"file": "0.png", "prompt": "a <cat>", "reference": "x.png"}]
    (tmp_path / "samples" / "samples.json").write_text(json.dumps(rows))
    (tmp_path / "encoded.html").write_text('<!doctype html><p class="x">5 &amp; 6</p>')
    command = [sys.executable, "-m", "jaxdit.report", f"--workdir={workdir}", f"--samples={tmp_path / 'samples'}"]
    command += [f"--encoded={tmp_path / 'encoded.html'}", f"--out={tmp_path / 'index.html'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "index.html")
    tags = Balanced((tmp_path / "index.html").read_text()).tags
    (frame,) = [attributes for tag, attributes in tags if tag == "iframe"]
    assert frame["srcdoc"] == (tmp_path / "encoded.html").read_text()
    assert "a &lt;cat&gt; — in the light of x.png" in (tmp_path / "index.html").read_text()


def test_the_images_are_those_that_are_not_held_out_or_what_the_passes_say(tmp_path):
    row = {"step": 10, "loss": 1.0, "samples_seen": 9_000}
    run = facts.look(folder(tmp_path / "a", [row], data={"path": "", "holdout_fraction": 0.25}))
    assert run.images == 75_000 and run.passes == pytest.approx(9_000 / 75_000)
    run = facts.look(folder(tmp_path / "b", [row | {"passes": 2.0}]))
    assert run.images == 4_500


def test_what_a_leg_lost_is_no_part_of_the_pace(tmp_path):
    rows = [{"step": k, "loss": 1.0, "seconds": 10.0 * k, "seconds_before": 0.0} for k in range(1, 21)]
    rows += [{"step": k, "loss": 1.0, "seconds": 10.0 * k + 5_000, "seconds_before": 5_200.0} for k in range(21, 41)]
    run = facts.look(folder(tmp_path / "run", rows, train={"total_steps": 100, "batch_size": 4}))
    assert run.rate == pytest.approx(4 / 10)


def test_a_run_of_slow_rows_is_not_stale_before_ten_of_them(tmp_path):
    rows = [{"step": k, "loss": 1.0, "seconds": 600.0 * k} for k in range(1, 21)]
    workdir = folder(tmp_path / "run", rows)
    for minutes, stale in ((31, False), (99, False), (101, True)):
        then = time.time() - 60 * minutes
        os.utime(workdir / "metrics.jsonl", (then, then))
        assert facts.look(workdir).stale == stale


def test_a_voided_update_among_others_of_its_row_is_counted_with_its_step(tmp_path):
    rows = [{"step": k, "loss": 1.0, "voided_in_row": int(k == 3)} for k in range(1, 6)]
    rows[3]["loss"] = None
    assert facts.look(folder(tmp_path / "run", rows)).voided_steps.tolist() == [3, 4]


def test_one_can_go_on_only_from_a_step_with_its_place_in_the_data(tmp_path):
    workdir = folder(tmp_path / "run", [{"step": 40, "loss": 1.0}])
    for step, items in ((10, ("ema", "state", "data")), (20, ("ema", "state")), (30, ("ema", "data")), (40, ("ema",))):
        checkpoint(workdir, step, *items)
    assert facts.look(workdir).resumable == [10]


def test_the_advice_names_a_step_that_can_be_gone_back_to(tmp_path):
    rows = [{"step": k, "loss": 1.0, "grad_norm": 1.0, "learning_rate": 1e-4} for k in range(1, 400)]
    for row in rows[-40:]:
        row["grad_norm"] = 300.0
    workdir = folder(tmp_path / "run", rows)
    checkpoint(workdir, 200, "ema", "state", "data")
    checkpoint(workdir, 300, "ema")
    assert "--config.train.restore=WORKDIR@200" in facts.look(workdir).verdict.words


def test_the_pace_is_that_of_the_last_rows_and_a_run_beyond_its_end_has_nothing_left(tmp_path):
    seconds = np.cumsum([100.0] * 300 + [1.0, 3.0] * 100)
    rows = [{"step": k, "loss": 1.0, "seconds": s} for k, s in enumerate(seconds.tolist(), 1)]
    rows[-5]["seconds"] = None
    run = facts.look(folder(tmp_path / "run", rows, train={"total_steps": 600, "batch_size": 4}))
    assert run.rate == pytest.approx(4 / 2, rel=0.02) and run.left == pytest.approx(100 * 4 / run.rate)
    run = facts.look(folder(tmp_path / "run", rows, train={"total_steps": 400, "batch_size": 4}))
    assert run.done and run.left == 0


def test_quick_rows_do_not_make_a_run_stale_before_half_an_hour_and_one_pause_does_not_hide_it(tmp_path):
    seconds = [float(k) for k in range(1, 41)] + [50_000.0 + k for k in range(40)]
    rows = [{"step": k, "loss": 1.0, "seconds": s} for k, s in enumerate(seconds, 1)]
    workdir = folder(tmp_path / "run", rows)
    for minutes, stale in ((29, False), (31, True)):
        then = time.time() - 60 * minutes
        os.utime(workdir / "metrics.jsonl", (then, then))
        assert facts.look(workdir).stale == stale


def test_the_losses_are_means_of_the_newest_rows_and_the_average_with_all_conditions(tmp_path):
    rows = [{"step": k, "loss": 5.0 if k <= 50 else k % 2} for k in range(1, 101)]
    rows[-1] |= {"held_out_loss": 0.9, "eval/held_out/ema/text_vision": 0.7, "voided": 4, "voided_in_row": 1}
    run = facts.look(folder(tmp_path / "run", rows))
    assert run.loss == pytest.approx(0.5) and run.held_out == 0.7 and run.voided == 4


def test_more_verdicts_than_places_each_have_one_to_the_end(tmp_path):
    rows = [{"step": k, "loss": 1.0, "health": "sound"} for k in range(1, 8)]
    rows[-1]["health"] = "diverged"
    run = facts.look(folder(tmp_path / "run", rows))
    assert run.spans(health.VERDICTS, columns=2) == [(0.0, 3.5, "good"), (3.5, 7.0, "act")]
    rows[2]["health"] = "spike"
    run = facts.look(folder(tmp_path / "run", rows))
    assert [level for *_, level in run.spans(health.VERDICTS, columns=70)] == [
        "unknown",
        "good",
        "watch",
        "good",
        "act",
    ]


def test_rows_that_say_nothing_of_health_are_judged_now(tmp_path):
    rows = [{"step": k, "loss": 1.0, "grad_norm": 1.0, "learning_rate": 1e-4} for k in range(1, 400)]
    for row in rows[-40:]:
        row["grad_norm"] = 300.0
    verdict = facts.look(folder(tmp_path / "run", rows)).verdict
    assert verdict == health.judge(rows) and verdict.level == "act"
    rows[-1]["health"] = "young"  # of the trainer, without words of now
    verdict = facts.look(folder(tmp_path / "run", rows)).verdict
    assert (verdict.name, verdict.level) == ("young", health.VERDICTS["young"])


def test_checkpoints_ascend_and_what_was_never_finished_is_none(tmp_path):
    workdir = folder(tmp_path / "run", [{"step": 100, "loss": 1.0}])
    for step in (100, 9, 20):
        checkpoint(workdir, step, "ema")
    checkpoint(workdir, 110, "state", "data")
    assert [saved.step for saved in facts.look(workdir).saved] == [9, 20, 100]


def test_a_folder_without_rows_is_as_new_as_the_look_and_damaged_lines_are_counted(tmp_path):
    workdir = folder(tmp_path / "run", train={"total_steps": True, "batch_size": 4})
    (workdir / "config_history.jsonl").write_text('{"field": "a"}\n[1]\n{\n{"field": "b"}\n')
    run = facts.look(workdir)
    assert run.as_of == run.now and run.total == 0 and not run.stale
    assert [row["field"] for row in run.changes] == ["a", "b"]
    assert run.problems == ["config_history.jsonl has 2 lines that cannot be read."]
    (workdir / "origin.json").write_text("[1]")
    assert facts.look(workdir).origin == {}


def test_a_checkpoint_is_as_old_as_its_seal_says_though_its_folder_is_a_copy(tmp_path):
    step = tmp_path / "checkpoints" / "5"
    (step / "ema").mkdir(parents=True)
    os.utime(step, (2_000.0, 2_000.0))
    for said, at in (
        (1_000.0, 1_000.0),
        (float("inf"), 2_000.0),
        (float("nan"), 2_000.0),
        (1e20, 2_000.0),
        (-1.0, 2_000.0),
    ):
        (step / seal.NAME).write_text(json.dumps({"saved": said, "files": None}))
        os.utime(step, (2_000.0, 2_000.0))
        (saved,) = facts.look(tmp_path).saved
        assert saved.at == datetime.fromtimestamp(at)
    seal.verify(step, ["ema"])  # what says nothing of files holds none to account


def test_a_place_that_a_trouble_fills_in_part_shows_it(tmp_path):
    rows = [{"step": k, "loss": 1.0, "health": "diverged" if k <= 5 else "sound"} for k in range(1, 11)]
    spans = facts.look(folder(tmp_path / "run", rows)).spans(health.VERDICTS, columns=4)
    assert spans == [(0.0, 7.5, "act"), (7.5, 10.0, "good")]  # from 5 to 7.5 it was there until 6
