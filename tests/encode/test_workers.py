"""Worker processes: results in order, and a file that hangs, grows or kills its process costs that file and no other."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from encode import images
from encode.images import ImageProblem
from encode.workers import Workers

ROOT = Path(__file__).resolve().parents[2]
KEPT = []


def act(word):
    """What one 'file' does to the process that reads it."""
    if word == "hang":
        time.sleep(60)
    if word == "spin":  # in C, deaf to Python's signal handlers
        return sum(range(10**12))
    if word == "grow":
        return len(bytearray(2 * 2**30))
    if word.startswith("keep"):  # 300 MiB, as a library's cache does
        KEPT.append(bytearray(300 * 2**20))
    if word == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if word == "exit":
        os._exit(7)
    if word == "refuse":
        raise ImageProblem("as it is")
    if word.startswith("once:"):  # fails the first time only, as when the kernel kills a process for want of memory
        path = Path(word.removeprefix("once:"))
        if not path.exists():
            path.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    return word * 2


def pixels(path):
    return images.decode(path, 10**9).shape


@pytest.fixture(scope="module")
def workers():
    with Workers(2, seconds=1.5, memory=512) as pool:
        yield pool


def _one(workers, word):
    ((_, found),) = workers.map(act, [word], 4)
    return found


def test_results_come_in_order_whatever_the_depth(workers):
    words = [str(number) for number in range(50)]
    for depth in (1, 3, 100):
        assert list(workers.map(act, words, depth)) == [(word, word * 2) for word in words]


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("hang", "takes longer than config.decode_seconds=1.5"),
        ("spin", "takes longer than config.decode_seconds=1.5"),
        ("grow", "takes more than config.decode_memory=512 MiB"),
        ("crash", "the decoder died of it (SIGSEGV)"),
        ("exit", "the decoder died of it (exit code 7)"),
        ("refuse", "as it is"),
    ],
)
def test_a_bad_file_is_named_and_the_others_go_on(workers, word, reason):
    words = ["a", "b", word, "c", "d", "e", "f"]
    found = dict(workers.map(act, words, 5))
    assert isinstance(found[word], ImageProblem)
    assert str(found[word]).startswith(reason)
    assert all(found[other] == other * 2 for other in words if other != word)


def test_what_a_process_kept_of_files_before_is_not_the_next_ones_fault():
    with Workers(1, seconds=30, memory=512) as alone:
        words = ["keep1", "keep2", "keep3"]
        assert list(alone.map(act, words, 1)) == [(word, word * 2) for word in words]


@pytest.mark.parametrize(("name", "options"), [("a.jpg", {"progressive": True}), ("a.jp2", {})])
def test_too_little_memory_is_not_called_damage_whatever_the_decoder_says(tmp_path, name, options):
    noise = np.random.default_rng(0).integers(0, 256, (75, 100, 3), np.uint8)
    Image.fromarray(noise).resize((2400, 1800), Image.Resampling.NEAREST).save(tmp_path / name, **options)
    (tmp_path / f"cut-{name}").write_bytes((tmp_path / name).read_bytes()[:20_000])
    for memory, reason in (30, "takes more than config.decode_memory=30 MiB"), (1000, ""):
        with Workers(1, seconds=30, memory=memory) as alone:
            whole, cut = (found for _, found in alone.map(pixels, [tmp_path / name, tmp_path / f"cut-{name}"], 1))
            assert str(whole).startswith(reason) if reason else whole == (1800, 2400, 3)
            assert reason or str(cut).startswith(("truncated", "damaged")), cut


def test_many_bad_files_in_a_row(workers):
    words = ["crash", "exit"] * 6 + ["a"]
    found = [result for _, result in workers.map(act, words, 8)]
    assert all(isinstance(result, ImageProblem) for result in found[:-1])
    assert found[-1] == "aa"


def test_a_process_killed_by_chance_blames_no_file(workers, tmp_path):
    word = f"once:{tmp_path / 'died'}"
    assert _one(workers, word) == word * 2


def test_inputs_are_taken_as_they_are_needed(workers):
    taken = []

    def words():
        for number in range(100):
            taken.append(number)
            yield str(number)

    stream = workers.map(act, words(), 6)
    for _ in range(3):
        next(stream)
    assert len(taken) < 12
    stream.close()


def test_no_process_outlives_a_killed_parent():
    code = (
        "import os, time\nfrom encode import workers\nworkers.GRACE = 0.5\nfrom tests.encode.test_workers import act\n"
        "pool = workers.Workers(2, 1, 512)\nlist(pool.map(act, ['a'] * 8, 8))\n"
        "kept = [pool._submit(act, 'hang') for _ in range(2)]\ntime.sleep(0.3)\n"
        "print(*pool._pool._pool_manager.worker_manager.workers, flush=True)\ntime.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and any(Path(f"/proc/{pid}").exists() for pid in pids):
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_a_program_from_a_pipe_can_use_them():
    code = "from encode.workers import Workers\nfrom encode import images\nwith Workers(1, 5, 512) as pool:\n"
    code += "    print(list(pool.map(images.pixel_hash, [], 1)), flush=True)"
    done = subprocess.run([sys.executable, "-"], input=code, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_processes_that_never_come_up_are_an_error_and_not_a_wait(tmp_path):
    (tmp_path / "broken.py").write_text(
        "import sys\nsys.path.insert(0, sys.argv[1] if len(sys.argv) > 1 else '')\n"
        "if __name__ != '__main__':\n    raise SystemExit(3)\n"
        "from encode import workers\nworkers.STARTING = 2.0\n"
        "try:\n    workers.Workers(2, 5, 512)\nexcept workers.CannotStart as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, tmp_path / "broken.py", ROOT], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    said = "cannot be started (not one was ready after 2 s)", "cannot be started (they died at once)"
    assert any(words in done.stdout for words in said), done.stderr
