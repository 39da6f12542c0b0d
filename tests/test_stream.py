"""Each token is a target once an epoch, whatever the shape; all share the held-out targets."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import base
from research.config import ConfigError
from research.data import stream
from research.data.tokens import Corpus

FEW = settings(max_examples=40, deadline=None)


def make_corpus(train: int = 1000, heldout_lengths=(300, 40, 200), protocol: str = "clean") -> Corpus:
    """Token i of the train array is i: where a token came from can be read off it."""
    heldout_starts = np.cumsum([0, *heldout_lengths[:-1]], dtype=np.int64)
    train_starts = np.arange(0, train, 37, dtype=np.int64)
    tokens_N = np.arange(train, dtype=np.uint32)
    heldout_N = np.arange(sum(heldout_lengths), dtype=np.uint32)
    if protocol == "published":
        heldout_N, heldout_starts, train_starts = (
            tokens_N,
            np.zeros(1, np.int64),
            np.zeros(1, np.int64),
        )
    return Corpus(
        train=tokens_N,
        heldout=heldout_N,
        train_starts=train_starts,
        heldout_starts=heldout_starts,
        token_bytes=np.ones(train, np.int32),
        eot=0,
        manifest={},
        fingerprint="",
        protocol=protocol,
    )


def make_config(rows: int = 4, length: int = 16, block: int = 0, seed: int = 42, **data):
    config = base.get_config("cpu")
    config.seed, config.data.split_seed = seed, seed
    config.batch_size, config.seq_len = rows, length
    config.data.update(shuffle_block=block, **data)
    return config


def with_eval(contexts: tuple[int, ...], num_targets: int, seed: int = 42):
    config = make_config(seed=seed)
    config.eval.contexts, config.eval.num_targets = contexts, num_targets
    return config


def test_the_run_seed_orders_and_the_split_seed_splits():
    """Seeds of a study share their held-out text and targets, and differ in the order of the rest."""

    def drawn(protocol: str, seed: int, split_seed: int):
        corpus = make_corpus(train=2000, heldout_lengths=(200,) * 10, protocol=protocol)
        config = with_eval((4, 8), 60)
        config.seed, config.data.split_seed, config.batch_size, config.seq_len = seed, split_seed, 3, 10
        epoch = stream.epoch_tokens(corpus, config)
        rows = {int(r[0]) for c in range(0, epoch // 30 * 30, 30) for r in stream.batch(corpus, config, c)["inputs"]}
        targets = stream.heldout_targets(corpus, config) if protocol == "clean" else None
        return dict(
            first=[stream.batch(corpus, config, c)["inputs"].tolist() for c in (0, 30)],
            second=[stream.batch(corpus, config, epoch // 30 * 30 + c)["inputs"].tolist() for c in (30, 60)],
            windows=stream.validation_windows(corpus, config, 20).tolist(),
            targets=targets and [targets.documents.tolist(), targets.positions.tolist()],
            train=rows if protocol == "published" else None,
        )

    for protocol in ("clean", "published"):
        here, run, split = (drawn(protocol, *seeds) for seeds in ((1, 1), (2, 1), (1, 2)))
        assert run["first"] != here["first"] and run["second"] != here["second"]
        assert run["windows"] == here["windows"] and run["targets"] == here["targets"]
        assert split["windows"] != here["windows"]
        if protocol == "clean":
            assert split["first"] == here["first"] and split["targets"] != here["targets"]
        else:
            assert not here["train"] & {w[0] if isinstance(w, list) else w for w in here["windows"]}
            assert not run["train"] & {w[0] if isinstance(w, list) else w for w in run["windows"]}


def pairs(batch: dict[str, np.ndarray]) -> list[tuple[int, int]]:
    return list(zip(batch["inputs"].ravel().tolist(), batch["targets"].ravel().tolist(), strict=True))


def read(corpus, config, start: int, count: int) -> list[tuple[int, int]]:
    """`count` tokens of the run from `start`, by steps of the config's shape."""
    step = config.batch_size * config.seq_len
    found = []
    for cursor in range(start, start + count, step):
        found += pairs(stream.batch(corpus, config, cursor))
    return found[:count]


shapes = dict(
    rows=st.integers(1, 9),
    length=st.integers(1, 40),
    block=st.integers(1, 120),
    seed=st.integers(0, 99),
)


@FEW
@given(blocks=st.integers(1, 12), epoch=st.integers(0, 3), **shapes)
def test_every_token_is_a_target_once_an_epoch(rows, length, block, seed, blocks, epoch):
    corpus = make_corpus(blocks * block + 1)
    config = make_config(rows, length, block, seed)
    assert stream.epoch_tokens(corpus, config) == blocks * block
    found = read(corpus, config, epoch * blocks * block, blocks * block)
    assert Counter(target for _, target in found) == Counter(range(1, blocks * block + 1))
    assert all(target == source + 1 for source, target in found)


@FEW
@given(train=st.integers(150, 900), **shapes)
def test_no_token_is_a_target_twice_an_epoch_and_less_than_a_block_is_left_out(train, rows, length, block, seed):
    corpus, config = make_corpus(train), make_config(rows, length, block, seed)
    targets = [target for _, target in read(corpus, config, 0, stream.epoch_tokens(corpus, config))]
    assert len(set(targets)) == len(targets) > train - 1 - block


def test_what_an_epoch_leaves_out_changes_so_that_every_token_is_seen():
    corpus, config = make_corpus(1000), make_config(block=142)
    epoch = stream.epoch_tokens(corpus, config)
    assert epoch == 994  # 5 are left out
    seen = [{t for _, t in read(corpus, config, e * epoch, epoch)} for e in range(40)]
    assert len({frozenset(tokens) for tokens in seen}) == 6
    assert set.union(*seen) == set(range(1, 1000))


def test_epochs_and_seeds_have_orders_of_their_own():
    corpus = make_corpus(64 * 16 + 1)
    orders = set()
    for seed in range(6):
        config = make_config(seed=seed)
        orders |= {tuple(read(corpus, config, e * 1024, 1024)) for e in range(6)}
    assert len(orders) == 36


@FEW
@given(cursor=st.integers(0, 10**7), other=st.tuples(st.integers(1, 9), st.integers(1, 40)), **shapes)
def test_batch_is_pure_and_a_resume_with_another_shape_goes_on_at_the_same_token(
    cursor, other, rows, length, block, seed
):
    corpus = make_corpus(1000)
    config = make_config(rows, length, block, seed)
    count = 3 * rows * length
    found = read(corpus, config, cursor, count)
    assert read(corpus, config, cursor, count) == found
    resumed = make_config(*other, block, seed)
    assert read(corpus, resumed, cursor + rows * length, count - rows * length) == found[rows * length :]


@FEW
@given(step=st.integers(0, 40), seed=st.integers(0, 99))
def test_strategies_with_one_shuffle_block_see_the_same_pairs_each_step(step, seed):
    corpus = make_corpus(3000)
    shapes = ((2, 64), (4, 32), (16, 8), (1, 128))
    seen = [Counter(pairs(stream.batch(corpus, make_config(*shape, 64, seed), step * 128))) for shape in shapes]
    assert all(other == seen[0] for other in seen)


@FEW
@given(cursor=st.integers(0, 5000), **shapes)
def test_segments_and_positions_follow_documents_and_cuts(cursor, rows, length, block, seed):
    corpus = make_corpus(1000)
    config = make_config(rows, length, block, seed, mask_documents=True)
    batch = stream.batch(corpus, config, cursor)
    plain = stream.batch(corpus, make_config(rows, length, block, seed), cursor)
    assert set(plain) == {"inputs", "targets"} and (plain["inputs"] == batch["inputs"]).all()
    for name, array in batch.items():
        assert array.shape == (rows, length) and array.dtype == np.int32, name
    for row in range(rows):
        tokens, segments, positions = (batch[n][row].tolist() for n in ("inputs", "segments", "positions"))
        segment, position = 1, 0
        for i, token in enumerate(tokens):
            if i and (token != tokens[i - 1] + 1 or token % 37 == 0):  # another place, or document
                segment, position = segment + 1, 0
            assert (segments[i], positions[i]) == (segment, position)
            position += 1


# The published protocol


def test_published_windows_are_split_at_random_and_each_is_seen_once_an_epoch():
    corpus = make_corpus(500, protocol="published")
    config = make_config(rows=3, length=10, heldout_fraction=0.1)
    epoch = stream.epoch_tokens(corpus, config)
    assert epoch == 441 * 10  # 490 windows, 49 held out
    rows = [row for c in range(0, epoch, 30) for row in stream.batch(corpus, config, c)["inputs"]]
    starts = [int(row[0]) for row in rows]
    assert all((row == row[0] + np.arange(10)).all() for row in rows)
    heldout = stream.validation_windows(corpus, config, 1000)
    assert Counter(starts) == Counter(set(range(490)) - set(heldout.tolist()))
    assert len(set(heldout.tolist())) == 49
    firsts = [stream.batch(corpus, config, epoch + c)["inputs"][:, 0] for c in range(0, epoch, 30)]
    second = np.concatenate(firsts).tolist()
    assert sorted(second) == sorted(starts) and second != starts
    again = stream.batch(corpus, make_config(rows=3, length=10, seed=43), 0)
    assert (again["inputs"] != stream.batch(corpus, config, 0)["inputs"]).any()
    np.testing.assert_array_equal(stream.validation_windows(corpus, config, 7), heldout[:7])


def test_published_cursor_counts_windows_so_a_resume_with_more_rows_goes_on():
    corpus = make_corpus(500, protocol="published")
    whole = stream.batch(corpus, make_config(rows=6, length=10), 120)["targets"]
    parts = [stream.batch(corpus, make_config(rows=2, length=10), c)["targets"] for c in (120, 140, 160)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))
    assert whole.dtype == np.int32 and whole.shape == (6, 10)


@pytest.mark.parametrize("protocol", ["clean", "published"])
def test_own_length_windows_are_held_out_rows_of_the_training_length(protocol):
    corpus = make_corpus(protocol=protocol)
    config = make_config(length=20, mask_documents=protocol == "clean")
    config.eval.own_targets = 200
    rows = stream.own_length_windows(corpus, config)
    assert rows["inputs"].shape == rows["targets"].shape == (10, 20)
    np.testing.assert_array_equal(rows["targets"], rows["inputs"] + 1)
    assert ("segments" in rows) == (protocol == "clean")
    if protocol == "clean":  # no overlap
        assert len(np.unique(rows["targets"])) == 200
        cuts = np.diff(rows["segments"], axis=1) != 0
        assert (cuts == np.isin(rows["inputs"][:, 1:], [300, 340])).all()


# What does not fit


def refuse(function, *args) -> str:
    with pytest.raises(ConfigError) as error:
        function(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_check_names_what_does_not_fit():
    corpus, leaking = make_corpus(1000), make_corpus(1000, protocol="published")
    stream.check(corpus, make_config(), 992)
    message = refuse(stream.check, corpus, make_config(), 1489)
    assert message.startswith("config.data.max_epochs=1:")
    assert "1.50 epochs" in message and "992" in message
    stream.check(corpus, make_config(max_epochs=2), 1489)
    stream.check(corpus, make_config(max_epochs=0), 10**9)
    assert refuse(stream.check, corpus, make_config(rows=63), 1).startswith("config.batch_size=63")
    message = refuse(stream.check, corpus, make_config(block=24), 1)
    assert message.startswith("config.data.shuffle_block=24") and "config.seq_len=16" in message
    assert refuse(stream.check, corpus, make_config(block=1600), 1).startswith("config.data.shuffle_block")
    assert refuse(stream.check, corpus, make_config(length=1000), 1).startswith("config.seq_len=1000")
    assert refuse(stream.check, leaking, make_config(length=999), 1).startswith("config.seq_len=999")
    masked = make_config(mask_documents=True)
    assert refuse(stream.check, leaking, masked, 1).startswith("config.data.mask_documents")
    with pytest.raises(ConfigError):
        stream.validation_windows(corpus, make_config(length=540), 1)


# Held-out targets


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
            stream.heldout_targets(corpus, config)
        return
    targets = stream.heldout_targets(corpus, config)
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
    again = stream.heldout_targets(corpus, config)
    np.testing.assert_array_equal(again.positions, targets.positions)


def test_targets_do_not_depend_on_the_strategy_but_on_the_seed():
    corpus = make_corpus(heldout_lengths=(900, 700, 800))
    config = with_eval((8, 32), 128)
    targets = stream.heldout_targets(corpus, config)
    config.batch_size, config.seq_len, config.data.shuffle_block = 1, 64, 256
    np.testing.assert_array_equal(stream.heldout_targets(corpus, config).positions, targets.positions)
    other = stream.heldout_targets(corpus, with_eval((8, 32), 128, seed=7))
    assert (other.positions != targets.positions).any()


@FEW
@given(longest=st.integers(1, 16), fours=st.integers(1, 16), seed=st.integers(0, 99))
def test_windows_score_each_target_once_in_order_with_context_to_a_quarter_more(longest, fours, seed):
    fours, longest = min(fours, longest), max(fours, longest)
    corpus, context = make_corpus(heldout_lengths=(300, 40, 200, 129)), 4 * fours
    targets = stream.heldout_targets(corpus, with_eval((4 * longest,), 3 * longest, seed))
    windows = stream.context_windows(targets, corpus, context)
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
    targets = stream.heldout_targets(corpus, with_eval((8, 32), 100))
    assert len(targets.positions) == 96 and not targets.documents.any()
    assert targets.positions.min() > 32


def test_too_few_targets_say_how_many_there_are_and_what_works():
    corpus = make_corpus(heldout_lengths=(300, 40, 200))
    message = refuse(stream.heldout_targets, corpus, with_eval((8, 256), 100))
    assert message.startswith("config.eval.contexts=(8, 256)") and "have 0 targets" in message
    works = int(message.split("lower the longest to ")[1].split()[0])
    assert len(stream.heldout_targets(corpus, with_eval((works,), 100)).positions) > 100 - works // 4
    refuse(stream.heldout_targets, corpus, with_eval((works + 4,), 100))
    message = refuse(stream.heldout_targets, corpus, with_eval((8,), 10**6))
    assert message.startswith("config.eval.num_targets=1000000") and "have 510 targets" in message
    message = refuse(stream.heldout_targets, corpus, with_eval((32,), 7))
    assert message.startswith("config.eval.num_targets=7")
    for contexts in ((), (2,), (24, 30), (0,)):
        message = refuse(stream.heldout_targets, corpus, with_eval(contexts, 100))
        assert message.startswith("config.eval.contexts")
    targets = stream.heldout_targets(corpus, with_eval((32,), 64))
    refuse(stream.context_windows, targets, corpus, 240)
    refuse(stream.context_windows, targets, corpus, 6)


def test_shorter_runs_come_from_more_documents_and_keep_their_context():
    corpus = make_corpus(heldout_lengths=[300] * 12)
    config = with_eval((8, 128), 96)
    long = stream.heldout_targets(corpus, config)
    config.eval.run_length = 8
    short = stream.heldout_targets(corpus, config)
    assert len(set(long.documents.tolist())) == 3 and len(set(short.documents.tolist())) == 12
    for context in (8, 128):
        windows = stream.context_windows(short, corpus, context)
        before = np.nonzero(windows["targets"] >= 0)[1] + 1
        assert before.min() > context and before.max() <= 1.25 * context
        scored = windows["targets"][windows["targets"] >= 0]
        np.testing.assert_array_equal(scored, corpus.heldout[short.positions])
