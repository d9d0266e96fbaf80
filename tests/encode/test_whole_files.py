import errno
import os

import pytest

from encode import whole_files


def test_an_error_names_the_file_and_leaves_what_it_held(tmp_path):
    path = tmp_path / "page.html"
    whole_files.write_text(path, "before")
    with pytest.raises(OSError) as caught, whole_files.whole_file(path) as temporary:
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")  # as a file's write says it, without a name
    assert caught.value.filename == str(path) and path.read_text() == "before"
    assert [left.name for left in tmp_path.iterdir()] == ["page.html"]
    missing = tmp_path / "nowhere" / "page.html"
    with pytest.raises(FileNotFoundError) as caught:
        whole_files.write_text(missing, "")
    assert caught.value.filename == str(missing)
    with pytest.raises(FileNotFoundError) as caught, whole_files.whole_file(path):
        (tmp_path / "another").read_text()
    assert str(caught.value.filename) == str(tmp_path / "another")


def test_two_processes_that_share_a_file_have_one_of_their_own_to_write_to(tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    with whole_files.whole_file(path, shared=True) as first:
        monkeypatch.setattr(os, "getpid", lambda: 1)
        whole_files.write_text(path, "second", shared=True)
        first.write_text("first")
    assert path.read_text() == "first" and [left.name for left in tmp_path.iterdir()] == ["page.html"]
