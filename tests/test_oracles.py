"""Models whose losses are known, through the evaluation that real models go through."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import evaluate, sharding
from research.analysis import context
from research.analysis.study import Arm, Key, Run
from research.data import heldout
from research.data.tokens import Corpus
from tests.small import small_config

VOCAB, DOCUMENT, NUM_DOCUMENTS = 32, 300, 8
CONTEXTS = (8, 16, 32, 64, 128)
SURE = 40.0  # logit of a prediction that leaves exp(-40) for the others


class Oracle:
    """Stands where a model does: from tokens to hidden states, of which the output table (one-hot) makes logits."""

    def __init__(self, logits):
        self.logits = logits  # tokens [B, T] -> [B, T, V]
        self.config = SimpleNamespace(loss_chunk=64)

    def apply(self, variables, tokens_BT, **_):
        whole = jax.reshard(tokens_BT, jax.P(None, None))
        return jax.reshard(self.logits(whole), sharding.HIDDEN), None


def corpus_of(heldout: np.ndarray) -> Corpus:
    starts = np.arange(NUM_DOCUMENTS) * DOCUMENT
    return Corpus(
        train=heldout, heldout=heldout, train_starts=starts, heldout_starts=starts,
        token_bytes=np.ones(VOCAB, np.int32), eot=0, manifest={}, fingerprint="", protocol="clean",
    )  # fmt: skip


def copied(distance: int) -> Corpus:
    """Documents in which every token is the one `distance` places before it, and nothing else can be known."""
    rng = np.random.default_rng(distance)
    documents = [np.resize(rng.integers(0, VOCAB, distance), DOCUMENT) for _ in range(NUM_DOCUMENTS)]
    return corpus_of(np.concatenate(documents).astype(np.uint16))


def copies(distance: int) -> Oracle:
    """Predicts the token that came `distance` places before the target, where the window holds it; else anything."""

    def logits(tokens_BT):
        back = distance - 1  # the target is one after the input
        source = jnp.pad(tokens_BT, ((0, 0), (back, 0)))[:, : tokens_BT.shape[1]]
        known = (jnp.arange(tokens_BT.shape[1]) >= back)[None, :, None]
        return SURE * jax.nn.one_hot(source, VOCAB) * known

    return Oracle(logits)


def evaluated(oracle: Oracle, corpus: Corpus, run_length: int = 16, batch_tokens: int = 500) -> dict[str, np.ndarray]:
    """Suite -> [targets] nats, by make_suites, compile_suites and score."""
    config = small_config(vocab_size=VOCAB)
    config.seq_len = 256
    changes = dict(
        contexts=CONTEXTS, num_targets=128, own_targets=512, run_length=run_length, batch_tokens=batch_tokens
    )
    config.eval.update(changes)
    mesh = sharding.make_mesh({"data": 1, "expert": 1, "seq": 1})
    with jax.set_mesh(mesh):
        params = dict(embedding=jnp.eye(VOCAB))
        suites = evaluate.make_suites(corpus, config, (1, 1, 1))
        compiled = evaluate.compile_suites(oracle, params, suites, mesh)
        return {name: evaluate.score(compiled[name], params, suite, mesh)[0] for name, suite in suites.items()}


def curve_of(losses: dict[str, np.ndarray]) -> dict:
    """The analysis of one run with these losses."""
    arrays = {f"loss_{c}": losses[str(c)] for c in CONTEXTS}
    arrays["document"] = np.arange(len(losses["8"])) // 16
    run = Run(Key("oracle", "independent", 0), "finished", dict(seq_len=256), {}, (), arrays)
    (entry,) = context.analyse([Arm("oracle", "independent", (run,))])
    return entry


def test_random_tokens_cost_the_logarithm_of_the_vocabulary_everywhere(rng):
    corpus = corpus_of(rng.integers(0, VOCAB, NUM_DOCUMENTS * DOCUMENT).astype(np.uint16))
    uniform = evaluated(Oracle(lambda tokens_BT: jnp.zeros((*tokens_BT.shape, VOCAB))), corpus)
    for losses in uniform.values():
        np.testing.assert_allclose(losses, math.log(VOCAB), rtol=1e-6)
    # and a model that believes something about them pays for it
    believes = evaluated(Oracle(lambda tokens_BT: 2.0 * jax.nn.one_hot(tokens_BT, VOCAB)), corpus)
    assert all(losses.mean() > math.log(VOCAB) for losses in believes.values())


@pytest.mark.parametrize("distance", [8, 20, 64, 100])
def test_a_copied_corpus_drops_exactly_at_the_copy_distance(distance):
    losses = evaluated(copies(distance), copied(distance))
    for c in CONTEXTS:
        # a target has c + 1 to c + c / 4 tokens before it; the copied one is `distance` before
        if distance <= c + 1:
            np.testing.assert_allclose(losses[str(c)], 0, atol=1e-6)
        elif distance > c + c // 4:
            np.testing.assert_allclose(losses[str(c)], math.log(VOCAB), rtol=1e-6)
    entry = curve_of(losses)
    assert entry["effective"]["mean"] == min(c for c in CONTEXTS if c + 1 >= distance)
    config = small_config(vocab_size=VOCAB)
    config.seq_len, config.eval.own_targets = 256, 512
    seen = np.tile(np.arange(1, 257), 2)
    place = heldout.own_length_places(copied(distance), config)[1].reshape(-1)
    np.testing.assert_allclose(losses["own"][seen < distance], math.log(VOCAB), rtol=1e-6)
    np.testing.assert_allclose(losses["own"][(seen >= distance) & (place >= distance)], 0, atol=1e-6)


def test_a_model_that_ignores_context_gains_nothing_from_it(rng):
    corpus = corpus_of((rng.random(NUM_DOCUMENTS * DOCUMENT) ** 2 * VOCAB).astype(np.uint16))
    log_p = np.log((np.bincount(corpus.heldout, minlength=VOCAB) + 1) / (len(corpus.heldout) + VOCAB))
    unigram = Oracle(lambda tokens_BT: jnp.broadcast_to(jnp.asarray(log_p, jnp.float32), (*tokens_BT.shape, VOCAB)))
    entry = curve_of(evaluated(unigram, corpus))
    assert len({c["mean"] for c in entry["curve"]}) == 1
    assert all(gain["mean"] == 0 and not gain["shown"] for gain in entry["gains"])
    assert entry["slope"]["mean"] == 0 and entry["effective"]["mean"] == CONTEXTS[0]


@pytest.mark.parametrize("batch_tokens", [1, 300, 5000])
def test_shared_windows_score_as_one_window_a_target_does_and_in_order(batch_tokens):
    """For a copy within the context; each loss is where its target is, whatever shares its window or its batch."""
    distance = 6
    corpus = copied(distance)
    corpus.heldout[::7] = (corpus.heldout[::7] + 1) % VOCAB  # some targets are surprises
    shared = evaluated(copies(distance), corpus, batch_tokens=batch_tokens)
    config = small_config(vocab_size=VOCAB)
    config.eval.update(dict(contexts=CONTEXTS, num_targets=128, run_length=16))
    targets = heldout.targets(corpus, config)
    right = corpus.heldout[targets.positions] == corpus.heldout[targets.positions - distance]
    wanted = np.where(right, 0, SURE)
    assert 0 < right.sum() < right.size
    for c in CONTEXTS:
        np.testing.assert_allclose(shared[str(c)], wanted, atol=1e-3)
