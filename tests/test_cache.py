"""A cache is used where all is as it was when it was built, rebuilt where it is damaged, and never half written."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from research.data import build, tokens
from research.data.tokens import open_corpus
from tests.test_tokens import cache_folder, corpus_config, refuse


def test_cache_is_used_while_nothing_changes(tmp_path, monkeypatch):
    config = corpus_config(tmp_path)
    first = open_corpus(config)
    monkeypatch.setattr(tokens, "build", None)
    again = open_corpus(config)
    assert again.fingerprint == first.fingerprint
    np.testing.assert_array_equal(again.train, first.train)
    assert [path.name[0] != "." for path in Path(config.data.cache_dir).iterdir()] == [True]


@pytest.mark.parametrize("name", ["train.npy", "heldout.npy", "heldout_starts.npy", "token_bytes.npy", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damaged_cache_is_rebuilt_with_a_warning(tmp_path, caplog, name, damage):
    config = corpus_config(tmp_path, documents=20, tokenizer="bytes")
    good = open_corpus(config)
    train = good.train.copy()
    path = cache_folder(config) / name
    raw = path.read_bytes()
    path.unlink()
    if damage != "remove":
        path.write_bytes(raw[:-9] if damage == "cut" else raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:])
    with caplog.at_level(logging.WARNING):
        rebuilt = open_corpus(config)
    assert "is damaged and rebuilt" in caplog.text
    assert rebuilt.fingerprint == good.fingerprint
    np.testing.assert_array_equal(rebuilt.train, train)


def test_cache_follows_a_source_file_whose_size_and_time_stay(tmp_path):
    config = corpus_config(tmp_path)
    before = open_corpus(config)
    path = Path(config.data.path, "007.txt")
    times = path.stat()
    path.write_bytes(path.read_bytes().replace(b"marker007", b"marker7OO"))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert open_corpus(config).fingerprint != before.fingerprint


@pytest.mark.parametrize("field", ["eot", "overlap", "train", "fingerprint", "protocol", "sha256"])
def test_a_cache_whose_manifest_says_something_else_is_rebuilt(tmp_path, caplog, field):
    config = corpus_config(tmp_path, documents=20, tokenizer="bytes")
    good = open_corpus(config).manifest
    path = cache_folder(config) / "manifest.json"
    path.write_text(json.dumps(good | {field: good["heldout"]}))
    assert open_corpus(config).manifest == good and "is damaged and rebuilt" in caplog.text


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["text/007.txt", "text/new.txt", "tokenizer.json"])
def test_files_that_change_while_they_are_read_are_refused_and_nothing_is_kept(tmp_path, monkeypatch, name, when):
    config = corpus_config(tmp_path, tokenizer="bytes")
    open_corpus(config)
    shutil.copy(cache_folder(config) / "tokenizer.json", tmp_path)
    shutil.rmtree(config.data.cache_dir)
    config.data.tokenizer = str(tmp_path / "tokenizer.json")
    real = build.build

    def edited(folder, config):
        if when == "after":
            real(folder, config)
        with open(tmp_path / name, "a") as file:
            file.write(" \n")
        if when == "before":
            real(folder, config)

    monkeypatch.setattr(tokens, "build", edited)
    assert "changed while they were read; run again" in refuse(config)
    assert not list(Path(config.data.cache_dir).iterdir())
    monkeypatch.setattr(tokens, "build", real)
    assert open_corpus(config).train.size


def test_each_file_is_in_the_key_by_name_and_contents_and_so_is_the_field_of_the_text(tmp_path):
    config = corpus_config(tmp_path, tokenizer=str(tmp_path))
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    keys = [tokens._cache_key(config)]
    (tmp_path / "text" / "007.txt").rename(tmp_path / "text" / "007a.txt")  # another id, maybe in the other split
    keys.append(tokens._cache_key(config))
    tokenizer.write_text("[]")  # of a folder that is named
    keys.append(tokens._cache_key(config))
    config.data.tokenizer = str(tokenizer)
    tokenizer.write_text("()")
    keys.append(tokens._cache_key(config))
    config.data.text_field = "body"
    keys.append(tokens._cache_key(config))
    assert len(set(keys)) == 5


def test_everything_that_determines_the_corpus_is_in_the_key(tmp_path):
    changes = dict(
        protocol="published", max_documents=50, max_document_chars=20, max_tokens=500,
        heldout_fraction=0.4, tokenizer="bytes",
    )  # fmt: skip
    prints = {open_corpus(corpus_config(tmp_path)).fingerprint}
    for name, value in changes.items():
        prints.add(open_corpus(corpus_config(tmp_path, **{name: value})).fingerprint)
    config = corpus_config(tmp_path)
    config.data.split_seed = 1
    prints.add(open_corpus(config).fingerprint)
    config.model.vocab_size = 300
    prints.add(open_corpus(config).fingerprint)
    assert len(prints) == len(changes) + 3


def test_two_processes_building_at_once_agree_and_so_does_another_folder(tmp_path):
    config = corpus_config(tmp_path)
    (tmp_path / "config.json").write_text(config.to_json_best_effort())
    code = (
        "import json, sys; from ml_collections import ConfigDict; from research.data import tokens;"
        "config = ConfigDict(json.load(open(sys.argv[1])));"
        "print(tokens.open_corpus(config).fingerprint)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "config.json")]
    root = Path(__file__).parents[1]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) for _ in range(2)]
    prints = [process.communicate(timeout=120)[0].strip() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    moved = tmp_path / "moved"
    moved.mkdir()
    os.rename(tmp_path / "text", moved / "text")
    assert {*prints, open_corpus(corpus_config(moved)).fingerprint} == {prints[0]}
    assert [path.name[0] != "." for path in Path(config.data.cache_dir).iterdir()] == [True]


def test_build_that_loses_the_race_takes_the_winners_folder(tmp_path, monkeypatch):
    config = corpus_config(tmp_path, documents=20, tokenizer="bytes")
    real = build.build

    def raced(folder, config):
        monkeypatch.setattr(tokens, "build", real)
        open_corpus(config)  # the other process, quicker
        real(folder, config)

    monkeypatch.setattr(tokens, "build", raced)
    assert len(open_corpus(config).train)
    assert [path.name[0] != "." for path in Path(config.data.cache_dir).iterdir()] == [True]


def test_build_that_fails_leaves_nothing(tmp_path, monkeypatch):
    config = corpus_config(tmp_path, documents=20, tokenizer="bytes")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(build, "_write_split", full)
    assert "config.data.cache_dir" in refuse(config) and "No space" in refuse(config)
    assert not list(Path(config.data.cache_dir).iterdir())


def test_a_disk_that_is_full_for_a_moment_is_refused(tmp_path):
    """Documents of less than a file's buffer: what is written late, on closing or seeking, fails too."""
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))"
    script = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})
import pathlib, signal, pytest
from tests.test_tokens import corpus_config, refuse
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
config = corpus_config(pathlib.Path({str(tmp_path)!r}), documents=200, tokenizer="bytes")
{limited}
print(refuse(config))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "config.data.cache_dir" in done.stdout and "File too large" in done.stdout


def test_cache_folder_defaults_to_xdg(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    open_corpus(corpus_config(tmp_path, documents=20, tokenizer="bytes", cache_dir=""))
    assert len(list((tmp_path / "xdg" / "batch-or-length").iterdir())) == 1


def test_what_killed_builds_left_is_removed_and_builds_at_work_are_not(tmp_path):
    config = corpus_config(tmp_path)
    open_corpus(config)
    cache = cache_folder(config)
    shutil.rmtree(cache)
    left, works = cache.with_name(f".{cache.name}-left"), cache.with_name(f".{cache.name}-works")
    for folder in (left, works):
        (folder / "new").mkdir(parents=True)
        (folder / "lock").touch()
        os.utime(folder, (1e9, 1e9))
    discarded = cache.with_name(f".{cache.name}-discarded")  # by a process that held no lock
    (discarded / "damaged").mkdir(parents=True)
    os.utime(discarded, (1e9, 1e9))
    begins = cache.with_name(f".{cache.name}-begins")  # its process does not hold the lock yet
    begins.mkdir()
    (begins / "lock").touch()
    with tokens._lock(works):
        open_corpus(config)
        assert sorted(cache.parent.iterdir()) == sorted([cache, works, begins])
