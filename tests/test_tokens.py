"""The split leaks nothing, tokens are the documents exactly, a damaged cache is never used."""

import json
import logging
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, normalizers

from configs import base
from research.config import ConfigError
from research.data import build, tokens
from research.data.tokens import open_corpus, unigram_entropy

WORDS = ("def", "return", "straße", "self.value", "  ", "\n", "日本", "0123", "<|endoftext|>", "x")


def corpus_config(folder: Path, documents: int = 60, **fields):
    """A config over `documents` files with a marker of its own each."""
    (folder / "text").mkdir(exist_ok=True)
    for i in range(documents):
        path = folder / "text" / f"{i:03d}.txt"
        if not path.exists():
            text = " ".join(WORDS[(i * j) % len(WORDS)] for j in range(40 + i))
            path.write_text(f"{text} marker{i:03d}end {text}", encoding="utf-8")
    config = base.get_config("cpu")
    config.model.vocab_size = 400
    config.data.update(source="text", path=str(folder / "text"), cache_dir=str(folder / "cache"))
    config.data.update(heldout_fraction=0.3)
    config.data.update(fields)
    return config


def refuse(config) -> str:
    with pytest.raises(ConfigError) as error:
        open_corpus(config)
    assert "\n" not in str(error.value)
    return str(error.value)


def cache_folder(config) -> Path:
    (folder,) = Path(config.data.cache_dir).iterdir()
    return folder


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


def decoded(config, tokens_N, starts) -> list[str]:
    """The text of each document of a split, without its end-of-text."""
    tokenizer = Tokenizer.from_file(str(cache_folder(config) / "tokenizer.json"))
    pieces = np.split(tokens_N, starts[1:])
    assert all(piece[-1] == 0 and (piece[:-1] != 0).all() for piece in pieces)
    return [tokenizer.decode(piece[:-1].tolist()) for piece in pieces]


def test_splits_hold_each_document_once_whole_and_in_one_split(tmp_path):
    config = corpus_config(tmp_path)
    corpus = open_corpus(config)
    train = decoded(config, corpus.train, corpus.train_starts)
    heldout = decoded(config, corpus.heldout, corpus.heldout_starts)
    files = [path.read_bytes().decode() for path in sorted(Path(config.data.path).iterdir())]
    assert sorted(train + heldout) == sorted(files)
    assert 5 < len(heldout) < 35
    markers = [text.split("marker")[1][:6] for text in heldout]
    assert not [marker for marker in markers if f"marker{marker}" in "".join(train)]
    counts = corpus.manifest["heldout"]
    assert counts["documents"] == len(heldout) and counts["tokens"] == len(corpus.heldout)
    assert counts["bytes"] == sum(len(text.encode()) for text in heldout)


def test_the_tokenizer_never_sees_held_out_text(tmp_path):
    config = corpus_config(tmp_path)
    corpus = open_corpus(config)
    heldout = decoded(config, corpus.heldout, corpus.heldout_starts)
    learnt = (cache_folder(config) / "tokenizer.json").read_text()
    shutil.rmtree(config.data.cache_dir)
    for path in Path(config.data.path).iterdir():
        if path.read_bytes().decode() in heldout:
            path.write_text("qqq " * 200 + path.name)
    open_corpus(config)
    assert (cache_folder(config) / "tokenizer.json").read_text() == learnt


def test_split_depends_on_seed_and_id_not_on_the_other_documents(tmp_path):
    def heldout(documents: int, seed: int = 42) -> set[str]:
        folder = tmp_path / f"{documents}-{seed}"
        folder.mkdir()
        config = corpus_config(folder, documents, tokenizer="bytes")
        config.data.split_seed = seed
        corpus = open_corpus(config)
        texts = decoded(config, corpus.heldout, corpus.heldout_starts)
        return {text.split("marker")[1][:3] for text in texts}

    few, many = heldout(40), heldout(60)
    assert few == {name for name in many if int(name) < 40}
    assert heldout(60, seed=7) != many


def test_a_files_name_need_not_be_utf8(tmp_path):
    config = corpus_config(tmp_path)
    (tmp_path / "text" / os.fsdecode(b"caf\xe9.txt")).write_text("a name in another encoding " * 20)
    assert sum(1 for _ in build._split(config)) == 61
    assert open_corpus(config).train.size > 0


def test_copies_of_a_document_share_its_split(tmp_path):
    config = corpus_config(tmp_path, documents=30)
    for i in range(30):  # another id, the same text
        copy = Path(config.data.path, f"copy{i:03d}.txt")
        copy.write_bytes(Path(config.data.path, f"{i:03d}.txt").read_bytes())
    corpus = open_corpus(config)
    train = Counter(decoded(config, corpus.train, corpus.train_starts))
    heldout = Counter(decoded(config, corpus.heldout, corpus.heldout_starts))
    assert not train.keys() & heldout.keys()
    assert set((train + heldout).values()) == {2}


EDITED = {
    "line ends of Windows": lambda text: text.replace("\n", "\r\n"),
    "white space at line ends": lambda text: text.replace("\n", " \t\n"),
    "empty lines at the end": lambda text: text + "\n\n",
    "a byte order mark": lambda text: "\ufeff" + text,
}


@pytest.mark.parametrize("how", EDITED)
def test_a_document_that_differs_in_what_editors_add_is_a_copy(tmp_path, how):
    (tmp_path / "text").mkdir()
    texts = [f"zero\none\n\n  two {i}\n" for i in range(20)]
    for i, text in enumerate(texts):
        (tmp_path / "text" / f"{i:02d}.txt").write_bytes(text.encode())
        (tmp_path / "text" / f"{i:02d}-copy.txt").write_bytes(EDITED[how](text).encode())
    found = {document.id: (document.text, split) for document, split in build._split(corpus_config(tmp_path, 0))}
    for i, text in enumerate(texts):
        (one, split), (other, others_split) = found[f"{i:02d}.txt"], found[f"{i:02d}-copy.txt"]
        assert (one, other, others_split) == (text, EDITED[how](text), split)
    assert len({split for _, split in found.values()}) == 2


def test_a_document_that_differs_within_a_line_is_no_copy(tmp_path):
    assert len({build._plain(text) for text in ("a b", "a  b", " a b", "a\nb", "a\n\nb", "ab")}) == 6


def test_max_tokens_cuts_the_train_split_only(tmp_path):
    whole = open_corpus(corpus_config(tmp_path, tokenizer="bytes"))
    cut = open_corpus(corpus_config(tmp_path, tokenizer="bytes", max_tokens=1000))
    np.testing.assert_array_equal(cut.train, whole.train[:1000])
    np.testing.assert_array_equal(cut.train_starts, whole.train_starts[whole.train_starts < 1000])
    np.testing.assert_array_equal(cut.heldout, whole.heldout)


def test_published_protocol_concatenates_without_separators_and_cuts(tmp_path):
    config = corpus_config(tmp_path, protocol="published", tokenizer="bytes", max_tokens=900)
    config.data.update(max_documents=20, max_document_chars=50)
    corpus = open_corpus(config)
    files = sorted(Path(config.data.path).iterdir())[:20]
    text = "".join(path.read_bytes().decode()[:50] for path in files)
    tokenizer = Tokenizer.from_file(str(cache_folder(config) / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    assert corpus.train.tolist() == tokenizer.encode(text).ids[:900]
    np.testing.assert_array_equal(corpus.heldout, corpus.train)
    assert corpus.train_starts.tolist() == corpus.heldout_starts.tolist() == [0]
    assert corpus.protocol == "published" and len(corpus.train) == 900


# The cache


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


def test_manifest_says_what_the_corpus_is_without_the_machine(tmp_path):
    config = corpus_config(tmp_path)
    corpus = open_corpus(config)
    manifest = json.loads((cache_folder(config) / "manifest.json").read_text())
    assert manifest == corpus.manifest
    assert manifest["source"] == "text" and manifest["protocol"] == "clean" and manifest["eot"] == 0
    assert manifest["tokenizer"]["name"] == "bpe" and manifest["tokenizer"]["size"] <= 400
    assert set(manifest["files"]) == {p.name for p in cache_folder(config).iterdir()} - {"manifest.json"}
    assert corpus.train.dtype == np.uint16 and corpus.train_starts.dtype == np.int64


def test_documents_that_a_normaliser_changes_are_counted_and_their_bytes_are_those_it_keeps(tmp_path, caplog):
    config = corpus_config(tmp_path, documents=20, tokenizer="bytes")
    open_corpus(config)
    tokenizer = Tokenizer.from_file(str(cache_folder(config) / "tokenizer.json"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for i in range(3):
        (tmp_path / "text" / f"{i:03d}.txt").write_text("e\u0301 " * 40 + str(i))
    config.data.tokenizer = str(tmp_path / "tokenizer.json")
    assert "documents are changed" not in caplog.text
    counts = [open_corpus(config).manifest[split]["bytes"] for split in ("train", "heldout")]
    assert "3 documents are changed by the tokenizer's normaliser" in caplog.text
    assert sum(counts) == sum(path.stat().st_size for path in Path(config.data.path).iterdir()) - 3 * 40


# What else is refused, and the entropy


def test_bad_splits_and_folders_are_refused(tmp_path):
    assert "none fell into the held-out split" in refuse(corpus_config(tmp_path, heldout_fraction=1e-9))
    assert "none fell into the train split" in refuse(
        corpus_config(tmp_path, heldout_fraction=1 - 1e-9, tokenizer="bytes")
    )
    for fraction in (0.0, 1.0):
        assert refuse(corpus_config(tmp_path, heldout_fraction=fraction)).startswith("config.data.heldout_fraction")
    assert refuse(corpus_config(tmp_path, protocol="new")).startswith("config.data.protocol='new'")
    assert refuse(corpus_config(tmp_path, max_tokens=-1)).startswith("config.data.max_tokens=-1")
    (tmp_path / "file").write_text("")
    assert refuse(corpus_config(tmp_path, cache_dir=str(tmp_path / "file"))).startswith(
        f"config.data.cache_dir='{tmp_path}/file'"
    )
    assert "no such file" in refuse(corpus_config(tmp_path, path=str(tmp_path / "none")))


def test_unigram_entropy_is_the_mean_surprise_of_held_out_tokens(tmp_path):
    corpus = open_corpus(corpus_config(tmp_path))
    counts = Counter(corpus.train.tolist())
    total = len(corpus.train) + 400
    expected = [-math.log((counts[token] + 1) / total) for token in corpus.heldout.tolist()]
    assert unigram_entropy(corpus, 400) == pytest.approx(sum(expected) / len(expected))
