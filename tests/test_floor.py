"""The floor under a loss that leaks: no model falls below it, and one that has memorised the corpus reaches it."""

import functools
import math
from collections import Counter, defaultdict

import jax
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from research import evaluate, optimizer, sharding, step
from research.analysis.original import leak_floor
from research.data import stream
from research.data.tokens import Corpus, first_token_entropy
from research.model import ModelConfig, MoETransformer
from tests.small import small_config

VOCAB, TOKENS, LENGTH = 16, 200, 8
STEPS, ROWS, SCORED_EVERY = 160, 64, 40


def published_corpus(tokens_N: np.ndarray) -> Corpus:
    one = np.zeros(1, np.int64)
    return Corpus(
        train=tokens_N, heldout=tokens_N, train_starts=one, heldout_starts=one, token_bytes=np.ones(VOCAB, np.int32),
        eot=0, manifest={}, fingerprint="", protocol="published",
    )  # fmt: skip


def all_windows(tokens_N: np.ndarray, length: int) -> np.ndarray:
    """[W, length + 1]: the windows at stride 1 of both splits, each with the target of its last token."""
    return np.lib.stride_tricks.sliding_window_view(tokens_N, length + 1)


def floor_of(tokens_N: np.ndarray, length: int) -> float:
    corpus = published_corpus(tokens_N)
    return leak_floor(len(tokens_N) - length, first_token_entropy(corpus, length, VOCAB), length)


def memorise(tokens_N: np.ndarray) -> list[np.ndarray]:
    """Train on the windows that the split gives to training; losses [W, T] of all windows, as training goes on."""
    corpus, config = published_corpus(tokens_N), small_config(num_layers=1, vocab_size=VOCAB, loss_chunk=ROWS * LENGTH)
    config.batch_size, config.seq_len = ROWS, LENGTH
    config.data.update(protocol="published", heldout_fraction=0.01)  # what is held out has to be guessed
    config.model.balance_weight = 0.0
    config.optimizer.update(schedule="cosine", weight_decay=0.0, beta2=0.99)
    windows = all_windows(tokens_N, LENGTH).astype(np.int32)
    mesh = sharding.make_mesh({"data": 1, "expert": 1, "seq": 1})
    with jax.set_mesh(mesh):
        model = MoETransformer(ModelConfig(**config.model))
        tx = optimizer.make_optimizer(config.optimizer, STEPS)
        schedule = optimizer.make_schedule(config.optimizer, config.optimizer.learning_rate, STEPS)
        state = jax.jit(functools.partial(step.init_state, model, tx, config.seed, (1, 1, 1)))()
        train, score = step.make_train_step(model, tx, schedule), jax.jit(evaluate.eval_step, static_argnums=0)
        scored = sharding.put_batch(dict(inputs=windows[:, :-1], targets=windows[:, 1:]), mesh)
        losses = []
        for i in range(STEPS):
            batch = stream.batch(corpus, config, i * ROWS * LENGTH)
            state, _ = train(state, sharding.put_batch({name: x[None] for name, x in batch.items()}, mesh))
            if (i + 1) % SCORED_EVERY == 0:
                losses.append(np.asarray(score(model, state.params, scored)[0], np.float64))
    return losses


def test_a_memorised_random_corpus_reaches_the_floor_and_never_falls_below_it():
    tokens_N = np.random.default_rng(0).integers(0, VOCAB, TOKENS).astype(np.uint16)
    assert len(np.unique(all_windows(tokens_N, LENGTH), axis=0)) == TOKENS - LENGTH  # what the floor asks for
    floor, losses = floor_of(tokens_N, LENGTH), memorise(tokens_N)
    means = [loss.mean() for loss in losses]
    assert min(means) >= floor
    assert means[-1] < 1.15 * floor
    assert means[-1] < 0.15 * math.log(VOCAB)  # of random text: nothing is learnt but the corpus
    assert losses[-1][:, :2].sum() > 0.9 * losses[-1].sum()  # finding its place in it is all that costs


@pytest.mark.parametrize(("tokens", "length"), [([3, 1, 1, 2, 3, 3, 1], 2), ([0] * 5 + [1] * 5, 4), ([5, 6, 7], 2)])
def test_first_tokens_are_those_of_every_window(tokens, length):
    counts = Counter(tokens[: len(tokens) - length])
    shares = [count / counts.total() for count in counts.values()]
    found = first_token_entropy(published_corpus(np.array(tokens, np.uint16)), length, VOCAB)
    assert found == pytest.approx(-sum(p * math.log(p) for p in shares))


# Any model: a table of next-token probabilities for every prefix


def memorised_table(windows_WT: np.ndarray) -> dict[tuple, np.ndarray]:
    """What follows each prefix of a window, in shares: no table has a lower loss on these windows."""
    counts = defaultdict(lambda: np.zeros(VOCAB))
    for window in windows_WT.tolist():
        for t in range(1, len(window)):
            counts[tuple(window[:t])][window[t]] += 1
    return {prefix: count / count.sum() for prefix, count in counts.items()}


def table_loss(table: dict[tuple, np.ndarray], windows_WT: np.ndarray) -> float:
    nll = [
        -math.log(table[tuple(window[:t])][window[t]]) for window in windows_WT.tolist() for t in range(1, len(window))
    ]
    return sum(nll) / len(nll)


@settings(max_examples=100, deadline=None)
@given(
    tokens=st.lists(st.integers(0, 5), min_size=6, max_size=40),
    length=st.integers(2, 5),
    doubt=st.sampled_from([1e-6, 1e-3, 0.03, 0.3, 1.0]),
    seed=st.integers(0, 1000),
)
def test_no_table_of_probabilities_falls_below_the_floor(tokens, length, doubt, seed):
    """Random tables, most of them close to the memorised one, which has the floor for a loss."""
    tokens_N = np.array(tokens, np.uint16)
    windows = all_windows(tokens_N, length)
    assume(len(np.unique(windows, axis=0)) == len(windows) > 0)
    floor, memorised, rng = floor_of(tokens_N, length), memorised_table(windows), np.random.default_rng(seed)
    assert table_loss(memorised, windows) == pytest.approx(floor, abs=1e-12)
    table = {prefix: (1 - doubt) * p + doubt * rng.dirichlet(np.ones(VOCAB)) for prefix, p in memorised.items()}
    assert table_loss(table, windows) >= floor - 1e-12
