"""A file is written whole or not at all, and nothing is left beside it."""

import os
import resource
import signal

import pytest

from research import files


def test_who_reads_a_file_sees_the_old_or_the_new_never_a_part(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"old": 1})
    with open(path) as reader:  # opened before, read after
        files.write_json(path, {"new": 2})
        assert reader.read() == '{\n "old": 1\n}\n'
    assert path.read_text() == '{\n "new": 2\n}\n' and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    files.write_text(path, "old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            files.write_bytes(path, b"x" * 9999)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_file_that_cannot_be_renamed_is_removed(tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(error):
        files.write_bytes(tmp_path / "a", b"new")
    assert not list(tmp_path.iterdir())
