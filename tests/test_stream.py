"""Each token is a target once an epoch, whatever the shape; paired strategies see the same ones each step."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from research.config import ConfigError
from research.data import heldout, stream
from tests.numbered import FEW, make_config, make_corpus, refuse, with_eval


def test_the_run_seed_orders_and_the_split_seed_splits():
    """Seeds of a study share their held-out text and targets, and differ in the order of the rest."""

    def drawn(protocol: str, seed: int, split_seed: int):
        corpus = make_corpus(train=2000, heldout_lengths=(200,) * 10, protocol=protocol)
        config = with_eval((4, 8), 60)
        config.seed, config.data.split_seed, config.batch_size, config.seq_len = seed, split_seed, 3, 10
        epoch = stream.epoch_tokens(corpus, config)
        rows = {int(r[0]) for c in range(0, epoch // 30 * 30, 30) for r in stream.batch(corpus, config, c)["inputs"]}
        targets = heldout.targets(corpus, config) if protocol == "clean" else None
        return dict(
            first=[stream.batch(corpus, config, c)["inputs"].tolist() for c in (0, 30)],
            second=[stream.batch(corpus, config, epoch // 30 * 30 + c)["inputs"].tolist() for c in (30, 60)],
            windows=heldout.validation_windows(corpus, config, 20).tolist(),
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
    kept = heldout.validation_windows(corpus, config, 1000)
    assert Counter(starts) == Counter(set(range(490)) - set(kept.tolist()))
    assert len(set(kept.tolist())) == 49
    firsts = [stream.batch(corpus, config, epoch + c)["inputs"][:, 0] for c in range(0, epoch, 30)]
    second = np.concatenate(firsts).tolist()
    assert sorted(second) == sorted(starts) and second != starts
    again = stream.batch(corpus, make_config(rows=3, length=10, seed=43), 0)
    assert (again["inputs"] != stream.batch(corpus, config, 0)["inputs"]).any()
    np.testing.assert_array_equal(heldout.validation_windows(corpus, config, 7), kept[:7])


def test_published_cursor_counts_windows_so_a_resume_with_more_rows_goes_on():
    corpus = make_corpus(500, protocol="published")
    whole = stream.batch(corpus, make_config(rows=6, length=10), 120)["targets"]
    parts = [stream.batch(corpus, make_config(rows=2, length=10), c)["targets"] for c in (120, 140, 160)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))
    assert whole.dtype == np.int32 and whole.shape == (6, 10)


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
        heldout.validation_windows(corpus, make_config(length=540), 1)
