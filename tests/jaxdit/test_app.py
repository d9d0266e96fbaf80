"""The orders behind the page, its gallery and its limits; the page itself is tested in a browser: test_app_browser.py."""

import asyncio
import functools
import importlib.util
import io
import os
import re
import shlex
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import app_run
import numpy as np
import pytest
from absl import flags
from app_run import LATER, STEP, huge, picture
from PIL import Image

from encode.records import InputError
from jaxdit import album, app, app_files, app_jobs, render, trained
from jaxdit.cache import Cache

ROOT = Path(__file__).parents[2]
ORDER = app_jobs.Order(prompt="a kite on the left", steps=3, size="64x64", text=(2.0,), vision=(1.5,))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return app_run.make(tmp_path_factory.mktemp("app"))


@pytest.fixture
def at(workdir, tmp_path):
    gallery = tmp_path / "gallery"
    gallery.mkdir()
    found = app_jobs.Jobs(workdir, gallery, Cache(tmp_path / "cache"))
    yield found
    found.close(30)


def ended(job, seconds=60):
    until = time.monotonic() + seconds
    while not job.ended:
        assert time.monotonic() < until, job.phase
        time.sleep(0.02)
    return job


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


# Orders and jobs.


def test_an_order_becomes_the_picture_that_its_command_draws_again(at, tmp_path):
    names = tuple(at.files.take_in(f"{k}.png", picture((k, 90, 60))) for k in (10, 240))
    job = ended(at.take_order(replace(ORDER, references=names, mix=0.3, seed=5, solver="heun", at=(STEP,))))
    assert not job.problems and job.done == 1 and job.phase.startswith("Done")
    ((name,),) = job.names
    said = album.read_settings(at.gallery / name)
    assert said["prompt"] == ORDER.prompt and said["mix"] == "0.3,0.7" and said["step"] == str(STEP)
    words = shlex.split(said["command"])[1:]
    again = [sys.executable, *words, f"--cache={tmp_path / 'cache'}"]
    subprocess.run(again, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, capture_output=True)
    (drawn,) = (tmp_path / "again").glob("*.png")
    assert album.read_settings(drawn) == said
    assert np.abs(pixels(drawn) - pixels(at.gallery / name)).max() <= 1
    assert np.ptp(pixels(drawn)) > 30


@pytest.mark.parametrize("options", [{"solver": "heun"}, {"solver": "adams", "interval": (0.2, 0.8)}, {"init": True}])
def test_a_watched_drawing_is_the_unwatched_one_and_shows_where_it_goes(workdir, options):
    run = trained.load(workdir)
    rng = np.random.default_rng(0)
    texts = [rng.standard_normal((3, 128)).astype(np.float32)] * 2
    given = trained.conditions_of(texts, [rng.standard_normal(16).astype(np.float32), None], run)
    if options.pop("init", None):
        options = {"init": rng.standard_normal((2, 8, 8, 16)), "strength": 0.6}
    options = {"seed": [1, 2], "steps": 5, "shift": 3.0, "text": 2.0, "vision": 1.5} | options
    seen = []

    def watch(done, total, view):
        seen.append((done, total, view()))

    plain = trained.generate(run, given, (8, 8, 16), [0, 0], **options)
    watched = trained.generate(run, given, (8, 8, 16), [0, 0], watch=watch, **options)
    np.testing.assert_allclose(watched, plain, atol=1e-4)
    count = 9 if options.get("solver") == "heun" else 5
    assert [row[:2] for row in seen] == [(k, count) for k in range(1, count + 1)]
    far = [np.abs(view - plain).mean() for _, _, view in seen]
    assert far[-1] < 1e-4
    # The first view goes on along the first velocity to the end, and so does a single step.
    once = trained.generate(run, given, (8, 8, 16), [0, 0], **options | {"steps": 1, "solver": "euler"})
    np.testing.assert_allclose(seen[0][2], once, atol=1e-4)


def test_weights_seeds_and_checkpoints_stand_side_by_side(at):
    reference = at.files.take_in("a.png", picture())
    asked = replace(ORDER, references=(reference,))
    weights = ended(at.take_order(replace(asked, text=(2.0, 3.0), vision=(1.5, 4.0))))
    assert weights.rows == ["prompt 2", "prompt 3"] and weights.columns == ["reference 1.5", "reference 4"]
    for row, text in zip(weights.names, ("2", "3")):
        for name, vision in zip(row, ("1.5", "4")):
            said = album.read_settings(at.gallery / name)
            assert (said["guidance_text"], said["guidance_vision"], said["seed"]) == (text, vision, "0")
    through = ended(at.take_order(replace(asked, at=(STEP, LATER), count=2, seed=7)))
    assert through.rows == ["seed 7", "seed 8"] and through.columns == [f"step {STEP}", f"step {LATER}"]
    for row, seed in zip(through.names, ("7", "8")):
        for name, step in zip(row, (STEP, LATER)):
            said = album.read_settings(at.gallery / name)
            assert (said["seed"], said["step"], said["weights"]) == (seed, str(step), "averaged")
    raw = ended(at.take_order(replace(asked, raw=True)))
    seeds = ended(at.take_order(replace(asked, count=2, size="48x80")))
    assert seeds.columns == ["seed 0", "seed 1"] and pixels(at.gallery / seeds.names[0][1]).shape == (80, 48, 3)
    every = [name for job in (weights, through, raw, seeds) for row in job.names for name in row]
    assert not any(job.problems for job in (weights, through, raw, seeds)) and len({*every}) == 11
    assert len({pixels(at.gallery / name).tobytes() for name in every}) == 11
    assert set(at.files.names(100)) == {*every} and len(at.files.names(5)) == 5


def test_what_is_there_is_not_drawn_again(at, monkeypatch):
    first = ended(at.take_order(replace(ORDER, count=2)))
    monkeypatch.setattr(trained, "generate", None)
    again = ended(at.take_order(replace(ORDER, count=2)))
    assert again.names == first.names and not again.problems


def test_one_is_drawn_at_a_time_and_the_others_know_their_place(at, monkeypatch):
    going, threads = threading.Event(), set()

    def generate(run, given, shape, positions, *, watch, **options):
        threads.add(threading.get_ident())
        for done in range(1, 4):
            watch(done, 3, lambda: np.zeros((len(positions), *shape), np.float32))
            going.wait(30)
        return np.zeros((len(positions), *shape), np.float32)

    monkeypatch.setattr(trained, "generate", generate)
    jobs = [at.take_order(replace(ORDER, seed=k)) for k in range(5)]
    while not (jobs[0].phase.startswith("Step 1 of 3") and jobs[0].views[0][0]):
        time.sleep(0.01)
    assert [at.ahead(job) for job in jobs] == [0, 1, 2, 3, 4] and jobs[0].done == pytest.approx(1 / 3)
    assert jobs[0].views[0][0][:2] == b"\xff\xd8"  # the first is seen early
    at.cancel(jobs[1])
    assert jobs[1].ended and [at.ahead(job) for job in jobs[2:]] == [1, 2, 3]
    at.cancel(jobs[0])
    going.set()
    assert ended(jobs[0]).phase.startswith("Stopped") and jobs[0].names == [[None]]
    assert all(ended(job).names != [[None]] and not job.problems for job in jobs[2:]) and len(threads) == 1
    going.clear()
    many = [at.take_order(replace(ORDER, seed=10 + k)) for k in range(app_jobs.WAITING)]
    with pytest.raises(InputError, match="are waiting already"):
        for k in range(2):
            many.append(at.take_order(replace(ORDER, seed=50 + k)))
    for job in many:
        at.cancel(job)
    going.set()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"prompt": "x" * (app_jobs.LETTERS + 1)}, "2,001 letters"),
        ({"prompt": "\ud800"}, "not Unicode"),
        ({"steps": 0}, "from 1 to 200"),
        ({"steps": app_jobs.STEPS + 1}, "from 1 to 200"),
        ({"seed": -1}, "seeds go from 0"),
        ({"seed": 2**32}, "seeds go from 0"),
        ({"count": 0}, "at least 1 picture"),
        ({"count": 37}, "more than 36 pictures"),
        ({"text": (1.0,) * 7, "vision": (1.0,) * 7}, "more than 36 pictures"),
        ({"text": ()}, "numbers from -100 to 100"),
        ({"vision": (float("nan"),)}, "numbers from -100 to 100"),
        ({"text": (1.0, float("inf"))}, "numbers from -100 to 100"),
        ({"size": "65x64"}, "multiples of 16"),
        ({"solver": "magic"}, "'magic' is unknown"),
        ({"at": (7,)}, r"step 7 has no averaged weights \(any more\); there are 40, 60"),
        ({"references": ("../../outside.png",)}, "no longer in the gallery"),
        ({"references": (".hidden",)}, "no longer in the gallery"),
        ({"mix": 1.5}, "from 0 to 1"),
    ],
)
def test_what_cannot_be_drawn_is_a_sentence(at, change, words):
    (at.gallery / "references").mkdir()
    for name in ("references/.hidden", "../outside.png"):
        (at.gallery / name).write_bytes(picture())
    with pytest.raises(InputError, match=words):
        at.take_order(replace(ORDER, **change))


def test_whatever_happens_the_next_order_is_drawn(at, monkeypatch, caplog):
    def draw(self, *arguments, **options):
        raise RuntimeError("the card is gone\nand more")

    with monkeypatch.context() as broken:
        broken.setattr(render.Renderer, "draw", draw)
        assert ended(at.take_order(ORDER)).problems == ["RuntimeError: the card is gone"]
    kept = at.files.take_in("a.png", picture())
    (at.gallery / "references" / kept).write_bytes(picture()[:50])  # damaged since
    job = ended(at.take_order(replace(ORDER, references=(kept,), seed=1)))
    assert len(job.problems) == 1 and "truncated" in job.problems[0] and job.names == [[None]]
    job = ended(at.take_order(ORDER))
    assert not job.problems and job.names != [[None]]


def test_control_characters_and_lines_of_a_prompt_become_spaces(at):
    job = ended(at.take_order(replace(ORDER, prompt="a kite\n\ton\x00 the\x85 left 🪁‍🔥 ")))
    assert not job.problems
    assert album.read_settings(at.gallery / job.names[0][0])["prompt"] == "a kite on the left 🪁‍🔥"


def test_a_prompt_that_the_text_encoder_cuts_is_named_beside_its_picture(at):
    job = ended(at.take_order(replace(ORDER, prompt="a kite on the left " * 100)))
    assert job.names != [[None]] and len(job.problems) == 1
    assert job.problems[0].startswith("A prompt is longer than the") and "are cut: " in job.problems[0]


def test_settings_come_back_from_an_entry(at):
    kept = tuple(at.files.take_in(f"{k}.jpg", picture((k, 0, 0), kind="JPEG")) for k in (1, 200))
    asked = replace(ORDER, references=kept, mix=0.25, seed=3, size="48x80", solver="euler", at=(STEP,), raw=True)
    ((name,),) = ended(at.take_order(asked)).names
    assert at.order_of(name) == (asked, [])
    (at.gallery / "references" / kept[1]).unlink()
    order, notes = at.order_of(name)
    assert order == replace(asked, references=kept[:1], mix=0.5) and "is not in this gallery" in notes[0]
    settings = album.read_settings(at.gallery / name)
    with Image.open(at.gallery / name) as image:
        hurt = settings | {
            "step": "7",
            "reference_hash": "../* + ",
            "guidance_text": "nan",
            "size": "9x9",
            "solver": "?",
        }
        at_album = album.Album(at.gallery)
        at_album.save("hurt.png", image.copy(), hurt | {"init": "sketch.png", "mix": "x", "seed": "inf"})
    order, notes = at.order_of("hurt.png")
    assert (order.at, order.raw, order.references, order.size, order.seed) == ((LATER,), False, (), "", 0)
    assert len(notes) == 4 and order.text == (at.config["sample"]["text_guidance"],)
    assert f"Its checkpoint, step 7, is no longer there; step {LATER:,} is taken." in notes
    at.step = 1  # the newest when the page was started; a training that goes on has given it up since
    assert at.order_of("hurt.png")[0].at == (LATER,)


def test_another_picture_of_the_same_name_has_another_address(at):
    at_album = album.Album(at.gallery)
    at_album.save("a b.png", Image.new("RGB", (32, 32)), {"seed": "0"})
    before = at.files.address("small", "a b.png")
    assert before.startswith("/small/a%20b.png?v=") and before == at.files.address("small", "a b.png")
    (at.gallery / "a b.png").unlink()
    assert at.files.address("small", "a b.png") == "/small/a%20b.png?v=0"
    at_album.save("a b.png", Image.new("RGB", (32, 32), "red"), {"seed": "0"})
    assert at.files.address("small", "a b.png") not in (before, "/small/a%20b.png?v=0")


# The gallery's files and what people bring.


@pytest.mark.parametrize(
    "name, data, words",
    [
        ("a.png", lambda: b"\0" * (app_files.UPLOAD_BYTES + 1), "at most 40 MiB"),
        ("a.png", lambda: b"", "the file is empty"),
        ("a.png", lambda: b"hello", "not a picture in a format that can be read"),
        ("a.svg", lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "drawing of lines"),
        ("a.png", huge, "too many pixels: 50000 x 50000, the limit is 100000000"),
        ("a.jpg", lambda: picture(size=(400, 400), kind="JPEG")[:600], "truncated"),
        ("a.png", lambda: picture(size=(9, 9)), "too small"),
    ],
)
def test_what_is_no_usable_picture_is_refused_and_leaves_nothing(at, name, data, words):
    with pytest.raises(InputError, match=words):
        at.files.take_in(name, data())
    assert not [*at.gallery.rglob("*.*")]


def test_a_decoder_that_dies_takes_nobody_with_it(at, monkeypatch):
    monkeypatch.setattr(app_files, "UPLOAD_SECONDS", 1.0)
    monkeypatch.setattr(app_files, "UPLOAD_MEMORY", 64)
    with pytest.raises(InputError, match=r"decode_memory|died of it"):
        at.files.take_in("a.png", picture(size=(9_900, 9_900)))
    assert at.files.take_in("a.png", picture()).endswith(".png")


@pytest.mark.parametrize("name", ["a.png", "a", "../../a.png", "a.p/../ng", ".png", "a." + "x" * 300, "a.é", "a.png\0"])
def test_only_the_suffix_of_a_name_counts(at, name):
    kept = at.files.take_in(name, picture())
    assert re.fullmatch(r"[0-9a-f]{16}(\.\w{1,5})?", kept) and kept == at.files.take_in(name, picture())
    assert [path.name for path in (at.gallery / "references").iterdir()] == [kept]
    assert Image.open(io.BytesIO(at.files.look(kept))).format == "JPEG"


def test_only_pictures_of_the_gallery_are_given_out(at):
    (at.gallery / "secret.txt").write_text("x")
    (at.gallery / "references").mkdir()
    (at.gallery.parent / "outside.png").write_bytes(picture())
    (at.gallery / "broken.png").write_bytes(b"x")
    (at.gallery / "sheet.png").write_bytes(picture())
    album.Album(at.gallery).save("grid-a.png", Image.new("RGB", (8, 8)), {"seed": "0", "guidance_text": "1,2"})
    album.Album(at.gallery).save("grid-of-streets-s0.png", Image.new("RGB", (32, 32)), {"seed": "0"})
    assert at.files.names(9) == ["grid-of-streets-s0.png"]
    for name in (
        "secret.txt",
        "../outside.png",
        "references/../../outside.png",
        "nothing.png",
        ".a.png",
        "",
        "/etc/passwd",
        "b" * 252 + ".png",  # longer than a name can be
    ):
        assert at.files.path(name) is None and at.files.small(name) is None and at.files.settings(name) == {}
    assert at.files.small("broken.png") is None
    assert at.files.small("grid-of-streets-s0.png")[:2] == b"\xff\xd8"


# The server's edge, without the page.


def ask(body, headers=(), limit=app.BODY):
    """What Bounded answers to a request in chunks: (status, what the application read)."""
    chunks, sent, read = iter(body), [], []

    async def inner(scope, receive, send):
        while (message := await receive())["body"]:
            read.append(len(message["body"]))
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive():
        return {"type": "http.request", "body": next(chunks, b"")}

    async def send(message):
        sent.append(message)

    asyncio.run(app.Bounded(inner)({"type": "http", "headers": list(headers)}, receive, send))
    return sent[0]["status"], sum(read)


def test_a_request_beyond_the_limit_ends_whether_it_says_so_or_not():
    piece = b"\0" * 2**20
    assert ask([piece] * 3) == (200, 3 * 2**20)
    assert ask([piece], [(b"content-length", str(app.BODY + 1).encode())]) == (413, 0)
    status, read = ask([piece] * 1000)
    assert status == 413 and app.BODY - 2**20 <= read <= app.BODY
    status, read = ask([piece] * 1000, [(b"content-length", b"5")])  # a lie
    assert status == 413 and read <= app.BODY


@pytest.fixture
def call(monkeypatch):
    """The command's main with flags of its own."""

    real = {name: getattr(flags, name) for name in ("DEFINE_string", "DEFINE_integer")}

    def run(*arguments):
        values = flags.FlagValues()
        monkeypatch.setattr(flags, "FLAGS", values)
        for name, define in real.items():
            monkeypatch.setattr(flags, name, functools.partial(define, flag_values=values))
        app.define_flags()
        values(["app", *arguments])
        return app.main()

    return run


def test_without_nicegui_the_command_says_how_to_get_it(call, monkeypatch, workdir):
    monkeypatch.setitem(sys.modules, "nicegui", None)
    with pytest.raises(InputError, match=r"needs nicegui, .*pip install -r .*requirements-app\.txt$"):
        call(f"--workdir={workdir}")
    assert re.fullmatch(r"(#.*\n)*nicegui==\S+\n", app.NEEDED.read_text())


def test_a_wrong_folder_is_named_and_gets_no_gallery(call, monkeypatch, workdir, tmp_path):
    monkeypatch.setitem(sys.modules, "nicegui", ModuleType("nicegui"))
    with pytest.raises(InputError, match=r"config\.json is missing, so this is not a working folder"):
        call(f"--workdir={tmp_path / 'none'}", "--port=0")
    assert not (tmp_path / "none").exists()
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"--gallery=.*: this folder cannot be made or written to"):
        call(f"--workdir={workdir}", f"--gallery={tmp_path / 'file'}", "--port=0")


def test_a_port_that_is_taken_and_an_address_that_is_not_ours_are_named():
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(InputError, match=r"--port=\d+: this port is taken"),
    ):
        app._listen("127.0.0.1", taken.getsockname()[1])
    for host in ("192.0.2.1", "no.such.host.invalid"):
        with pytest.raises(InputError, match=f"--host={host}: nothing can listen there"):
            app._listen(host, 0)
    with app._listen("127.0.0.1", 0) as free:
        assert free.getsockname()[1] > 0


def test_what_is_just_still_possible_is_taken(at):
    for change in (
        {"prompt": "x" * app_jobs.LETTERS},
        {"steps": 1},
        {"steps": app_jobs.STEPS},
        {"mix": 0.0},
        {"mix": 1.0},
        {"count": app_jobs.PICTURES},
        {"text": tuple(map(float, range(6))), "vision": tuple(map(float, range(6)))},
        {"count": app_jobs.PICTURES // 2, "at": (STEP, LATER)},
        {"text": (100.0,), "vision": (-100.0,)},
    ):
        assert at._job(replace(ORDER, **change)).wishes
    with pytest.raises(InputError, match="more than 36 pictures"):
        at._job(replace(ORDER, count=app_jobs.PICTURES // 2 + 1, at=(STEP, LATER)))
    assert at._job(replace(ORDER, prompt="a\x7fkite")).wishes[0].prompt == "a kite"


def test_so_many_wait_and_no_more_and_what_is_in_hand_counts_as_cut_off(at, monkeypatch):
    going = threading.Event()
    monkeypatch.setattr(at, "_draw", lambda job: going.wait(5))
    first = at.take_order(ORDER)
    until = time.monotonic() + 30
    while at._in_hand is not first and time.monotonic() < until:
        time.sleep(0.01)
    many = [at.take_order(ORDER) for _ in range(app_jobs.WAITING)]
    with pytest.raises(InputError, match=f"^{app_jobs.WAITING} orders are waiting already"):
        at.take_order(ORDER)
    assert at.ahead(many[0]) == 1 and at.ahead(many[-1]) == app_jobs.WAITING and at.ahead(first) == 0
    for job in many:
        at.cancel(job)
        assert job.ended and job.phase == "Stopped before it was begun."
    assert at.close(0.0) == (True, False)
    with pytest.raises(InputError, match="is being closed"):
        at.take_order(ORDER)
    going.set()
    assert ended(first).phase.startswith("Done in") and first.phase.endswith(" s.")


class Drawing:
    """A renderer that draws the wishes of a plan one after the other, in four evaluations each."""

    def __init__(self, step):
        self.run = SimpleNamespace(step=step)

    def there(self, plan):
        return []

    def draw(self, plan, vae, cache, *, watch):
        for place in plan.todo:
            for done in range(1, 5):
                watch([place], done, 4, lambda: np.zeros((1, 8, 8, 16), np.float32))
                yield "work", None
            yield "picture", place


def test_what_is_done_grows_over_pictures_and_checkpoints_to_the_whole(at, monkeypatch):
    job = at._job(replace(ORDER, count=2, at=(STEP, LATER)))
    seen, shown, plan = [], [], SimpleNamespace(todo=[0, 1], names=["a.png", "b.png"])
    monkeypatch.setattr(at, "_view", lambda job, number, part, view: shown.append((number, part[0])))
    watched = property(
        lambda self: self.__dict__["done"], lambda self, value: (seen.append(value), self.__dict__.update(done=value))
    )
    monkeypatch.setattr(app_jobs.Job, "done", watched, raising=False)
    for number, step in enumerate((STEP, LATER)):
        at._draw_round(job, Drawing(step), plan, number, 2)
    assert seen == [k / 16 for k in range(1, 17)]
    assert shown == [
        (number, place) for number in range(2) for place in range(2) for _ in range(3)
    ]  # the last is the picture
    assert job.names == [["a.png", "a.png"], ["b.png", "b.png"]] and job.changes == 4


def test_one_picture_stands_wherever_it_was_asked_for(at):
    job = at._job(replace(ORDER, count=2))
    at._draw_round(job, Drawing(STEP), SimpleNamespace(todo=[0], names=["a.png", "a.png"]), 0, 1)
    assert job.names == [["a.png", "a.png"]]


def test_early_views_take_a_fifth_of_the_time_at_most(at, monkeypatch):
    job, view = at._job(ORDER), lambda: np.zeros((1, 8, 8, 16), np.float32)
    for since, seen in ((4.0, False), (6.0, True)):
        at._view_cost, at._viewed = 1.0, time.monotonic() - since
        at._view(job, 0, [0], view)
        assert (job.views[0][0] is not None) == seen
    assert 0 < at._view_cost < 1.0


def test_what_the_page_cannot_do_again_is_said_of_each_setting(at):
    at_album, shift = album.Album(at.gallery), album.numbers([at.config["sample"]["shift"]])
    step = {"step": str(LATER), "weights": "averaged"}
    for name, settings, words in (
        ("plain.png", {}, ()),
        ("usual.png", {"shift": shift, "guidance_interval": ""}, ()),
        ("shift.png", {"shift": "9"}, ("drawn with shift 9, as jaxdit.sample --shift does",)),
        ("part.png", {"guidance_interval": "0.2,0.8"}, ("drawn with guidance_interval 0.2,0.8",)),
        ("named.png", {"reference": "street.png"}, (r"The reference (street.png) is not in this gallery.",)),
    ):
        at_album.save(name, Image.new("RGB", (32, 32)), step | settings)
        order, notes = at.order_of(name)
        assert len(notes) == len(words) and all(word in note for word, note in zip(words, notes)), (name, notes)
        assert order.at == (LATER,) and not order.raw
    at_album.save("raw.png", Image.new("RGB", (32, 32)), {"step": "7", "weights": "raw"})
    order, _ = at.order_of("raw.png")
    assert order.at == (LATER,) and not order.raw


# The page's own words and numbers, without a browser.


@pytest.fixture(scope="module")
def app_page():
    """The module of the page; where NiceGUI is not installed, nothing stands in its place."""
    spec = importlib.util.spec_from_file_location("page_alone", ROOT / "jaxdit" / "app_page.py")
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, {"nicegui": mock.MagicMock()}):
        spec.loader.exec_module(module)
    return module


def test_a_shape_is_named_by_the_nearest_aspect(app_page):
    assert app_page._shape("832x1216") == "about 2:3 · 832 × 1216"
    assert app_page._shape("1216x832") == "about 3:2 · 1216 × 832"
    assert app_page._shape("512x512") == "1:1 · 512 × 512"
    assert app_page._shape("768x1024") == "3:4 · 768 × 1024" and app_page._shape("1024x768") == "4:3 · 1024 × 768"
    assert app_page._shape("1344x768") == "about 16:9 · 1344 × 768"


def test_numbers_that_people_write_are_read_or_refused(app_page):
    def box(value):
        return SimpleNamespace(value=value, props={"label": "Weights"})

    assert app_page._weights(box("1, 1.5; 3,1,")) == (1.0, 1.5, 3.0)
    for words, why in (
        ("1, many", "'1, many' is not numbers"),
        ("", "are wanted"),
        (None, "are wanted"),
        ("1, nan", "are wanted"),
    ):
        with pytest.raises(InputError, match=f"^Weights: .*{why}"):
            app_page._weights(box(words))
    assert app_page._whole(box(12.0)) == 12
    for value in (None, 1.5, float("inf"), float("nan")):
        with pytest.raises(InputError, match="a whole number is wanted"):
            app_page._whole(box(value))


def test_checkpoints_to_compare_are_spread_over_the_run(app_page):
    def spread(*saved):
        page = app_page.AppPage.__new__(app_page.AppPage)
        page.jobs = SimpleNamespace(steps=lambda raw: list(saved))
        return page._spread()

    assert spread() == [] and spread(5) == [5] and spread(5, 10) == [5, 10]
    assert spread(*range(10, 110, 10)) == [10, 30, 50, 80, 100]


def page_of(app_page, at, /, **values):
    """A page whose fields have these values, and whose other elements are nothing."""
    usual = {
        "compare": "one", "at": [LATER, STEP], "step": LATER, "prompt": None, "mix": 0.3, "size": "64x64", "text": 2, "vision": 3,
        "seed": 7.0, "count": 4, "steps": 9.0, "solver": "euler", "raw": False, "texts": "1, 2", "visions": "3",
    }  # fmt: skip
    page = app_page.AppPage.__new__(app_page.AppPage)
    page.jobs, page.references, page.job, page.changes, page.seen = at, ["a.png"], None, 0, None
    for name, value in (usual | values).items():
        setattr(page, name, SimpleNamespace(value=value, props={"label": name}))
    for name in ("button", "stop", "bar", "status", "problems", "pinned", "result", "gallery", "more", "runs"):
        setattr(page, name, mock.MagicMock())
    return page


def test_an_order_is_what_the_page_shows(app_page, at):
    one = app_jobs.Order("", ("a.png",), 0.3, "64x64", (2.0,), (3.0,), 7, 4, 9, "euler", (LATER,), False)
    assert page_of(app_page, at)._order() == one
    weights = replace(one, text=(1.0, 2.0), vision=(3.0,), count=1)
    assert page_of(app_page, at, compare="weights")._order() == weights
    assert page_of(app_page, at, compare="time")._order() == replace(one, at=(STEP, LATER))
    assert page_of(app_page, at, compare="time", step=None, raw=True)._order().at == (STEP, LATER)
    with pytest.raises(InputError, match="at least two checkpoints"):
        page_of(app_page, at, compare="time", at=[STEP])._order()
    with pytest.raises(InputError, match="This run keeps no raw weights"):
        page_of(app_page, at, step=None, raw=True)._order()


def test_who_waits_is_told_how_many_are_before_them_and_then_what_is_done(app_page, at, monkeypatch):
    page = page_of(app_page, at)
    page.job = at._job(ORDER)
    page._show, page._fill_gallery = mock.MagicMock(), mock.MagicMock()
    for ahead, words in (
        (1, "Waiting: 1 drawing is before yours."),
        (2, "Waiting: 2 drawings are before yours."),
        (0, "Step 1"),
    ):
        monkeypatch.setattr(at, "ahead", lambda job, ahead=ahead: ahead)
        page.job.phase = "Step 1"
        page._tick()
        assert page.status.text == words
    assert not page._show.called and page._fill_gallery.call_count == 1
    page.job.changes = 1
    page._tick()
    page._tick()
    assert page._show.call_count == 1 and not page.button.enable.called
    page.job.ended = True
    page._tick()
    page._show.assert_called_with(page.job, last=True)
    assert page.button.enable.called and page._fill_gallery.call_count == 1
