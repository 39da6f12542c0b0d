"""The leak detector: held-out n-grams that occur in train, no more and no fewer."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.data import overlap as module
from research.data.build import fingerprint
from research.data.overlap import overlap
from research.data.tokens import open_corpus
from tests.test_tokens import corpus_config


def brute(train, heldout, starts, n) -> dict | None:
    known = {tuple(train[i : i + n]) for i in range(len(train) - n + 1)}
    hits = []
    for begin, end in zip(starts, [*starts[1:], len(heldout)], strict=True):
        hits.append([tuple(heldout[i : i + n]) in known for i in range(begin, end - n + 1)])
    hits = [document for document in hits if document]
    if not hits:
        return None
    flat = [hit for document in hits for hit in document]
    documents = np.mean([2 * sum(document) > len(document) for document in hits])
    return dict(ngrams=np.mean(flat), documents=documents)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_it_is_what_sets_of_tuples_say(data):
    train = np.array(data.draw(st.lists(st.integers(0, 3), max_size=60)), np.uint16)
    lengths = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=6))
    heldout = np.array(data.draw(st.lists(st.integers(0, 3), min_size=sum(lengths), max_size=sum(lengths))), np.uint16)
    starts = np.cumsum([0, *lengths[:-1]])
    sizes = (1, 2, 3, 5, 8)
    found = overlap(train, heldout, starts, sizes)
    for n in sizes:
        wanted = brute(train.tolist(), heldout.tolist(), starts.tolist(), n)
        assert found[str(n)] == (wanted and pytest.approx(wanted))


def test_planted_overlap_is_found_exactly(rng):
    train = rng.integers(0, 1000, 20_000).astype(np.uint16)
    heldout = rng.integers(1000, 2000, 4000).astype(np.uint16)  # of another vocabulary
    heldout[500:600] = train[7000:7100]
    found = overlap(train, heldout, np.array([0, 2000]))
    for n in (8, 13, 50):
        assert found[str(n)]["ngrams"] == pytest.approx((100 - n + 1) / (2 * (2000 - n + 1)))
        assert found[str(n)]["documents"] == 0
    heldout[2000:3200] = train[100:1300]  # more than half of the second document
    assert overlap(train, heldout, np.array([0, 2000]))["13"]["documents"] == 0.5


def test_a_copy_across_chunks_of_the_train_array_is_found(rng, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 64)
    train = rng.integers(0, 60_000, 1000).astype(np.uint16)
    assert overlap(train, train[30:230], np.array([0]))["50"] == dict(ngrams=1.0, documents=1.0)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_equal_hashes_of_different_ngrams_are_not_taken_for_equal(data):
    """All tokens hash alike: what is found is still there."""
    tokens = st.lists(st.integers(0, 3), min_size=2, max_size=20).map(np.array)
    train, heldout = data.draw(tokens), data.draw(tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_random", lambda size: np.ones(size, np.uint64))
        found = overlap(train, heldout, np.array([0]), sizes=(2,))["2"]
    assert found["ngrams"] <= brute(train.tolist(), heldout.tolist(), [0], 2)["ngrams"]


def test_no_ngram_crosses_documents():
    train = np.arange(20, dtype=np.uint16)
    found = overlap(train, np.array([5, 6, 7, 8], np.uint16), np.array([0, 2]), sizes=(2, 3))
    assert found["2"] == dict(ngrams=1.0, documents=1.0) and found["3"] is None


def test_order_and_place_matter():
    train = np.array([1, 2, 3, 4], np.uint16)
    found = overlap(train, np.array([2, 1, 4, 3], np.uint16), np.array([0]), sizes=(1, 2))
    assert found["1"]["ngrams"] == 1.0 and found["2"]["ngrams"] == 0.0


def test_the_manifest_holds_it_and_the_fingerprint_does_not(tmp_path):
    corpus = open_corpus(corpus_config(tmp_path, tokenizer="bytes"))
    found = corpus.manifest["overlap"]
    assert found == overlap(corpus.train, corpus.heldout, corpus.heldout_starts)
    assert found["8"]["ngrams"] > found["50"]["ngrams"] > 0  # the documents are made of few words
    assert fingerprint(corpus.manifest | {"overlap": None}) == corpus.fingerprint


def test_the_published_protocol_has_one_text_and_no_overlap(tmp_path):
    corpus = open_corpus(corpus_config(tmp_path, protocol="published", tokenizer="bytes"))
    assert corpus.manifest["overlap"] is None
