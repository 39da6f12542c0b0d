"""All strategies share the held-out targets, each with its context in its own document before it."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from research.config import ConfigError
from research.data import heldout
from tests.numbered import FEW, make_config, make_corpus, refuse, with_eval


@pytest.mark.parametrize("protocol", ["clean", "published"])
def test_own_length_windows_are_held_out_rows_of_the_training_length(protocol):
    corpus = make_corpus(protocol=protocol)
    config = make_config(length=20, mask_documents=protocol == "clean")
    config.eval.own_targets = 200
    rows = heldout.own_length_windows(corpus, config)
    assert rows["inputs"].shape == rows["targets"].shape == (10, 20)
    np.testing.assert_array_equal(rows["targets"], rows["inputs"] + 1)
    assert ("segments" in rows) == (protocol == "clean")
    if protocol == "clean":  # no overlap
        assert len(np.unique(rows["targets"])) == 200
        cuts = np.diff(rows["segments"], axis=1) != 0
        assert (cuts == np.isin(rows["inputs"][:, 1:], [300, 340])).all()


# What does not fit


@FEW
@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=12),
    fours=st.integers(1, 12),
    runs=st.integers(1, 30),
    seed=st.integers(0, 99),
)
def test_targets_are_runs_of_one_document_with_the_longest_context_before_them(lengths, fours, runs, seed):
    corpus, context = make_corpus(heldout_lengths=lengths), 4 * fours
    config = with_eval((4, context), runs * fours + fours - 1, seed)
    there = [max(0, (length - context - 1) // fours) for length in lengths]
    if sum(there) < (runs * fours + fours - 1) // fours:
        with pytest.raises(ConfigError):
            heldout.targets(corpus, config)
        return
    targets = heldout.targets(corpus, config)
    assert len(targets.positions) == len(set(targets.positions.tolist())) == runs * fours
    assert (np.diff(targets.positions) > 0).all() and targets.run_length == fours
    starts = corpus.heldout_starts[targets.documents]
    ends = starts + np.array(lengths)[targets.documents]
    assert (targets.positions - starts >= context).all() and (targets.positions < ends).all()
    by_run = targets.positions.reshape(-1, fours)
    assert (np.diff(by_run, axis=1) == 1).all()
    taken = Counter(targets.documents[::fours].tolist())
    for document, room in enumerate(there):  # one gives another run only when each has given one less
        assert taken[document] == room or taken[document] >= max(taken.values()) - 1
    again = heldout.targets(corpus, config)
    np.testing.assert_array_equal(again.positions, targets.positions)


def test_targets_do_not_depend_on_the_strategy_but_on_the_seed():
    corpus = make_corpus(heldout_lengths=(900, 700, 800))
    config = with_eval((8, 32), 128)
    targets = heldout.targets(corpus, config)
    config.batch_size, config.seq_len, config.data.shuffle_block = 1, 64, 256
    np.testing.assert_array_equal(heldout.targets(corpus, config).positions, targets.positions)
    other = heldout.targets(corpus, with_eval((8, 32), 128, seed=7))
    assert (other.positions != targets.positions).any()


@FEW
@given(longest=st.integers(1, 16), fours=st.integers(1, 16), seed=st.integers(0, 99))
def test_windows_score_each_target_once_in_order_with_context_to_a_quarter_more(longest, fours, seed):
    fours, longest = min(fours, longest), max(fours, longest)
    corpus, context = make_corpus(heldout_lengths=(300, 40, 200, 129)), 4 * fours
    targets = heldout.targets(corpus, with_eval((4 * longest,), 3 * longest, seed))
    windows = heldout.context_windows(targets, corpus, context)
    inputs, wanted = windows["inputs"], windows["targets"]
    assert inputs.dtype == wanted.dtype == np.int32
    assert inputs.shape == wanted.shape and inputs.shape[1] == context + fours
    scored = wanted >= 0
    np.testing.assert_array_equal(wanted[scored], corpus.heldout[targets.positions])
    assert (wanted[scored] == inputs[scored] + 1).all() and (wanted[~scored] == -1).all()
    before = np.nonzero(scored)[1] + 1  # inputs that a scored target has before it
    assert before.min() > context - 1 and before.max() <= 1.25 * context
    owners = np.searchsorted(corpus.heldout_starts, inputs, side="right")
    assert (owners == owners[:, -1:]).all()  # all of a window is of one document


def test_published_targets_come_from_the_array_as_one_document():
    corpus = make_corpus(600, protocol="published")
    targets = heldout.targets(corpus, with_eval((8, 32), 100))
    assert len(targets.positions) == 96 and not targets.documents.any()
    assert targets.positions.min() > 32


def test_too_few_targets_say_how_many_there_are_and_what_works():
    corpus = make_corpus(heldout_lengths=(300, 40, 200))
    message = refuse(heldout.targets, corpus, with_eval((8, 256), 100))
    assert message.startswith("config.eval.contexts=(8, 256)") and "have 0 targets" in message
    works = int(message.split("lower the longest to ")[1].split()[0])
    assert len(heldout.targets(corpus, with_eval((works,), 100)).positions) > 100 - works // 4
    refuse(heldout.targets, corpus, with_eval((works + 4,), 100))
    message = refuse(heldout.targets, corpus, with_eval((8,), 10**6))
    assert message.startswith("config.eval.num_targets=1000000") and "have 510 targets" in message
    message = refuse(heldout.targets, corpus, with_eval((32,), 7))
    assert message.startswith("config.eval.num_targets=7")
    for contexts in ((), (2,), (24, 30), (0,)):
        message = refuse(heldout.targets, corpus, with_eval(contexts, 100))
        assert message.startswith("config.eval.contexts")
    targets = heldout.targets(corpus, with_eval((32,), 64))
    refuse(heldout.context_windows, targets, corpus, 240)
    refuse(heldout.context_windows, targets, corpus, 6)


def test_shorter_runs_come_from_more_documents_and_keep_their_context():
    corpus = make_corpus(heldout_lengths=[300] * 12)
    config = with_eval((8, 128), 96)
    long = heldout.targets(corpus, config)
    config.eval.run_length = 8
    short = heldout.targets(corpus, config)
    assert len(set(long.documents.tolist())) == 3 and len(set(short.documents.tolist())) == 12
    for context in (8, 128):
        windows = heldout.context_windows(short, corpus, context)
        before = np.nonzero(windows["targets"] >= 0)[1] + 1
        assert before.min() > context and before.max() <= 1.25 * context
        scored = windows["targets"][windows["targets"] >= 0]
        np.testing.assert_array_equal(scored, corpus.heldout[short.positions])
