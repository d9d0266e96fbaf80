"""The page in a real browser: what a person does there, and what must not happen to them or to the server."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import app_run
import numpy as np
import pytest
from app_run import LATER, STEP, huge, picture
from PIL import Image

pytestmark = pytest.mark.all
pytest.importorskip("nicegui", reason="NiceGUI is not installed (requirements-app.txt)")
sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed (requirements-browser.txt)")

from jaxdit import album, app, app_files  # noqa: E402

ROOT = Path(__file__).parents[2]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = '<img src=x onerror="window.hurt=1"> {{7*7}} <script>window.hurt=1</script> "quoted" \'so\' :class=a'
HURT = "window.hurt"


class Server:
    """The command, running: where it listens, and how it ends."""

    def __init__(self, workdir, gallery, *arguments):
        self.gallery = gallery
        command = [
            sys.executable,
            "-m",
            "jaxdit.app",
            f"--workdir={workdir}",
            f"--gallery={gallery}",
            "--cache=",
            "--port=0",
        ]
        self.process = subprocess.Popen(
            [*command, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )  # fmt: skip
        self.first = self.process.stdout.readline()
        found = re.match(r"http://[^:]+:\d+", self.first)
        self.address = found[0] if found else ""

    def end(self, how=signal.SIGTERM):
        """(exit code, what it said after its first line)."""
        if how is not None:
            self.process.send_signal(how)
        code = self.process.wait(timeout=60)
        return code, self.process.stdout.read()


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return app_run.make(tmp_path_factory.mktemp("app"))


@pytest.fixture(scope="module")
def server(workdir, tmp_path_factory):
    running = Server(workdir, tmp_path_factory.mktemp("gallery"))
    assert f"step {LATER} of {workdir}" in running.first and "on the CPU" in running.first, running.first
    yield running
    code, said = running.end()
    assert code in (0, 3) and "Traceback" not in said and "Error" not in said, said


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture
def visit(server, browser):
    """visit() is a person who opens the page; at the end nobody's console may hold an error, and nobody was sent elsewhere."""
    people, errors = [], []

    def come(address=server.address, *, ends=False, **options):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}} | options)
        page = context.new_page()
        page.set_default_timeout(60_000)
        if not ends:  # or the browser will say that the server is gone
            page.on("console", lambda told: errors.append(told.text) if told.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        inside = (address, address.replace("http", "ws"), "data:", "blob:")
        page.on("request", lambda request: None if request.url.startswith(inside) else errors.append(request.url))
        page.goto(address)
        page.get_by_label("Prompt", exact=True).wait_for()
        people.append(context)
        return page

    yield come
    for context in people:
        context.close()
    assert not errors


def status(page):
    return page.get_by_role("status").first.inner_text()


def press(page, name):
    page.get_by_role("button", name=name, exact=True).click()


def slide(page, name, value):
    """Move a slider by the keyboard."""
    slider = page.get_by_role("slider", name=name, exact=True)
    slider.locator("[tabindex]").focus()
    step = float(slider.get_attribute("data-step"))
    while abs(value - (now := float(slider.get_attribute("aria-valuenow")))) > step / 2:
        page.keyboard.press("ArrowRight" if value > now else "ArrowLeft")
        page.wait_for_timeout(10)


def drawn(page, count=1):
    """The pictures of the result, [height, width, 3] as the browser shows them, once all are there."""
    page.wait_for_function(
        "count => { const all = [...document.querySelectorAll('.result img')];"
        " return all.length === count && all.every(i => i.src.includes('/picture/') && i.complete && i.naturalWidth > 1) }",
        arg=count,
    )
    rows = page.evaluate(
        "() => [...document.querySelectorAll('.result img')].map(i => { const c = document.createElement('canvas');"
        " c.width = i.naturalWidth; c.height = i.naturalHeight; const p = c.getContext('2d'); p.drawImage(i, 0, 0);"
        " return [c.width, c.height, [...p.getImageData(0, 0, c.width, c.height).data]] })"
    )
    return [np.array(data).reshape(height, width, 4)[..., :3] for width, height, data in rows]


def fits(page):
    """Nothing has to be scrolled sideways."""
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]


def ask_for_much(page, seed=0):
    """An order that takes seconds, and is begun."""
    if not page.locator(".references img").count():
        page.set_input_files("input[type=file]", {"name": "a.png", "mimeType": "image/png", "buffer": picture()})
        page.wait_for_selector(".references img")
    page.get_by_label("Prompt", exact=True).fill("much")
    page.get_by_label("Seed", exact=True).fill(str(seed))
    slide(page, "Steps", 60)
    press(page, "Weights")
    for name in ("prompt", "reference"):
        page.get_by_label(f"Weights of the {name}", exact=True).fill("1, 2, 3, 4, 5, 6")
    press(page, "Draw")
    page.wait_for_function("/^Step [0-9]+ of 60, [0-9]+ of 36/.test(document.querySelector('[role=status]').innerText)")


def test_a_prompt_is_typed_and_a_picture_is_seen_kept_and_taken_home(visit, server, tmp_path):
    page = visit()
    assert f"step {LATER}, averaged weights" in page.inner_text("header") and "on the CPU" in page.inner_text("header")
    page.get_by_label("Prompt", exact=True).fill("a kite on the left")
    page.set_input_files("input[type=file]", {"name": "evening.png", "mimeType": "image/png", "buffer": picture()})
    page.wait_for_selector(".references img")
    press(page, "Draw")
    (found,) = drawn(page)
    colours = found.reshape(-1, 3).astype(float)
    assert np.ptp(colours, axis=0).min() > 30 and np.abs(colours - colours.mean(1, keepdims=True)).mean() > 3
    page.locator(".result img").click()
    with page.expect_download() as download:
        page.get_by_role("link", name="Download PNG").or_(page.get_by_role("button", name="Download PNG")).click()
    download.value.save_as(tmp_path / "home.png")
    said = album.read_settings(tmp_path / "home.png")
    assert (
        said["prompt"] == "a kite on the left"
        and said["steps"] == "24"
        and "-m jaxdit.sample --workdir" in said["command"]
    )
    name = download.value.suggested_filename
    assert (server.gallery / name).read_bytes() == (tmp_path / "home.png").read_bytes()
    np.testing.assert_array_equal(found, np.asarray(Image.open(tmp_path / "home.png")))
    press(page, "Close")
    page.wait_for_selector(f'.gallery img[src*="{name}"]')
    page.screenshot(path=tmp_path / "page.png")


def test_a_reference_is_dropped_a_second_is_mixed_and_settings_come_back(visit):
    page = visit()
    transfer = page.evaluate_handle(
        "bytes => { const t = new DataTransfer(); t.items.add(new File([new Uint8Array(bytes)], 'a.png')); return t }",
        list(picture((10, 20, 200))),
    )
    page.dispatch_event(".drop", "dragover", {"dataTransfer": transfer})
    page.wait_for_selector(".q-uploader__dnd")
    page.dispatch_event(".q-uploader__dnd", "drop", {"dataTransfer": transfer})
    page.wait_for_selector(".references img")
    page.set_input_files(
        "input[type=file]", {"name": "b.webp", "mimeType": "", "buffer": picture((9, 200, 9), kind="WEBP")}
    )
    page.wait_for_function("document.querySelectorAll('.references img').length === 2")
    slide(page, "Mix of the two references", 0.3)
    slide(page, "Weight of the prompt", 2.5)
    slide(page, "Steps", 2)
    page.get_by_label("Prompt", exact=True).fill("two lights")
    page.get_by_label("Seed", exact=True).fill("12")
    press(page, "Draw")
    drawn(page)
    other = visit()  # somebody else takes the settings up
    other.locator(".gallery img").first.click()
    assert "0.3,0.7" in other.inner_text(".said")
    press(other, "Use these settings")
    other.wait_for_function("document.querySelectorAll('.references img').length === 2")
    assert other.get_by_label("Prompt", exact=True).input_value() == "two lights"
    assert other.get_by_label("Seed", exact=True).input_value() == "12"
    told = " ".join(other.locator(".slider .value").all_inner_texts())
    assert "30% : 70%" in told and "2.5" in told and "3" in told
    press(other, "Remove reference 1")
    other.wait_for_function("document.querySelectorAll('.references img').length === 1")


def test_settings_stand_side_by_side(visit):
    page = visit()
    slide(page, "Steps", 2)
    page.get_by_label("Prompt", exact=True).fill("side by side")
    press(page, "Weights")
    page.get_by_label("Weights of the prompt", exact=True).fill("1, 2; 4")
    press(page, "Draw")
    assert len({found.tobytes() for found in drawn(page, 3)}) == 3  # without a reference its weights change nothing
    assert page.locator(".result .side").all_inner_texts() == ["prompt 1", "prompt 2", "prompt 4"]
    page.get_by_label("Weights of the prompt", exact=True).fill("1, many")
    press(page, "Draw")
    page.get_by_text("is not numbers with commas").wait_for()
    press(page, "Checkpoints")
    press(page, "Draw")
    assert len({found.tobytes() for found in drawn(page, 2)}) == 2
    assert page.locator(".result .head").all_inner_texts() == [f"step {STEP}", f"step {LATER}"]


def test_two_people_at_once_are_served_in_turn_and_one_may_stop(visit):
    first, second, third = visit(), visit(), visit()
    for person, name in ((second, "second"), (third, "third")):
        person.get_by_label("Prompt", exact=True).fill(name)
    ask_for_much(first)
    press(second, "Draw")
    press(third, "Draw")
    second.get_by_text("Waiting: 1 drawing is before yours.").wait_for()
    third.get_by_text("Waiting: 2 drawings are before yours.").wait_for()
    press(third, "Stop")
    third.get_by_text("Stopped before it was begun.").wait_for()
    assert not np.array_equal(drawn(first, 36)[0], drawn(second)[0])
    ask_for_much(first, seed=1)
    press(first, "Stop")
    first.get_by_text("Stopped; what was drawn stays.").wait_for()


def test_what_is_too_large_or_no_picture_is_refused_in_a_sentence(visit, server, tmp_path):
    page = visit()

    def bring(name, data, words):
        page.set_input_files("input[type=file]", {"name": name, "mimeType": "image/png", "buffer": data})
        page.get_by_text(words).wait_for()

    with open(tmp_path / "large.png", "wb") as large:
        large.truncate(app_files.UPLOAD_BYTES + 1)
    page.set_input_files("input[type=file]", tmp_path / "large.png")
    page.get_by_text("That file is too large: at most 40 MiB.").wait_for()
    bring("wide.png", huge(), "too many pixels: 50000 x 50000")
    bring('<b onmouseover="window.hurt=1">.png', b"no picture", "not a picture in a format that can be read")
    bring("cut.png", picture(size=(300, 300))[:200], "truncated")
    assert page.evaluate(HURT) is None and page.locator(".references img").count() == 0
    headers = {"Content-Length": str(app.BODY + 1)}
    request = urllib.request.Request(f"{server.address}/_nicegui/client/x/upload/1", data=b"\0" * 100, headers=headers)
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request)
    assert refused.value.code == 413 and b"at most 40 MiB are taken" in refused.value.read()
    page.set_input_files("input[type=file]", {"name": "good.png", "mimeType": "image/png", "buffer": picture()})
    page.wait_for_selector(".references img")  # and the page goes on


def test_what_people_write_is_shown_letter_by_letter(visit, server):
    page = visit()
    slide(page, "Steps", 2)
    page.get_by_label("Prompt", exact=True).fill(HOSTILE)
    press(page, "Draw")
    drawn(page)
    other = visit()
    entry = other.locator(".gallery img").first
    assert entry.get_attribute("alt") == HOSTILE and entry.get_attribute("title") == HOSTILE
    entry.click()
    other.get_by_text(HOSTILE, exact=True).last.wait_for()
    press(other, "Use these settings")
    assert other.get_by_label("Prompt", exact=True).input_value() == HOSTILE
    assert page.evaluate(HURT) is None and other.evaluate(HURT) is None


def test_a_telephone_shows_all_of_it_without_scrolling_sideways(visit):
    page = visit(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    fits(page)
    slide(page, "Steps", 2)
    page.get_by_label("Prompt", exact=True).fill("a" * 300)
    page.set_input_files("input[type=file]", {"name": "a.png", "mimeType": "image/png", "buffer": picture()})
    page.wait_for_selector(".references img")
    press(page, "Weights")
    press(page, "Draw")
    drawn(page, 9)
    fits(page)
    page.locator(".result img").first.click()
    page.get_by_role("button", name="Use these settings").wait_for()
    fits(page)
    assert page.evaluate("document.querySelector('.large').getBoundingClientRect().right <= 390")


def test_the_edge_of_the_server(server, workdir):
    def ask(path, host=None):
        request = urllib.request.Request(server.address + path, headers={"Host": host} if host else {})
        try:
            with urllib.request.urlopen(request) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    assert ask("/")[0] == 200
    assert ask("/", host="evil.example")[0] == 400  # another name for this address
    for path in (
        "/picture/..%2F..%2Frun%2Fconfig.json",
        "/picture/nothing.png",
        "/small/.lock",
        "/reference/x",
        "/reference/..%2F.lock",
    ):
        code, body = ask(path)
        assert code == 404 and b"widths" not in body, path
    assert ask("/docs")[0] == ask("/openapi.json")[0] == 404
    again = Server(workdir, server.gallery)
    code, said = again.end(None)  # by itself
    assert code == 2 and "another process is writing into it" in again.first + said


def test_it_ends_when_asked_and_says_when_a_drawing_was_cut_off(visit, workdir, tmp_path):
    idle = Server(workdir, tmp_path / "idle", "--host=0.0.0.0")
    visit(idle.address.replace("0.0.0.0", "127.0.0.1"), ends=True)
    code, said = idle.end(signal.SIGINT)
    assert code == 0 and "Stopped." in said and "Traceback" not in said and "there is no password" in idle.first + said
    busy = Server(workdir, tmp_path / "busy")
    page = visit(busy.address, ends=True)
    ask_for_much(page)
    began = time.monotonic()
    code, said = busy.end()
    assert code == 3 and "cut off" in said and "Traceback" not in said and time.monotonic() - began < 15
    assert len([*Path(busy.gallery).glob("*.png")]) < 36 and not os.path.exists(ROOT / ".nicegui")
