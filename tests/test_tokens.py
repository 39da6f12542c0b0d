"""The split leaks nothing, and tokens are the documents exactly."""

import json
import math
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, normalizers

from configs import base
from research.config import ConfigError
from research.data import build
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


CUT = EDITED | {"another end, after the cut": lambda text: text[:20] + "six"}


@pytest.mark.parametrize("how", CUT)
def test_copies_are_found_where_texts_are_cut(tmp_path, how):
    """What editors add moves the cut, so cut texts may differ; texts that differ may be equal once they are cut."""
    config = corpus_config(tmp_path, 0, max_document_chars=20)
    for i in range(20):
        text = f"{i:02d}\nzero\none\ntwo\nthree\nfour\nfive\n"
        (tmp_path / "text" / f"{i:02d}.txt").write_bytes(text.encode())
        (tmp_path / "text" / f"{i:02d}-copy.txt").write_bytes(CUT[how](text).encode())
    found = {document.id: (document.text, split) for document, split in build._split(config)}
    assert all(len(text) == 20 for text, _ in found.values())
    assert [found[f"{i:02d}-copy.txt"][1] for i in range(20)] == [found[f"{i:02d}.txt"][1] for i in range(20)]
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


# The manifest


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
