"""Evaluation: each held-out target once, the same for every strategy, with the context it is said to have."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import evaluate, result, sharding
from research.data import heldout
from research.data.tokens import Corpus
from research.model import MoETransformer
from tests.small import bigger, model_config, small_config

VOCAB = 61
DOCUMENTS = (70, 9, 130, 45, 220, 64, 38, 90)  # tokens of each held-out document
TARGETS = 88
SHAPES = [(48, 400, (1, 1, 1)), (48, 64, (8, 1, 1)), (40, 1000, (2, 1, 4)), (160, 170, (1, 1, 8)), (42, 1, (4, 1, 2))]


def corpus_of(heldout: np.ndarray) -> Corpus:
    starts = np.cumsum((0, *DOCUMENTS[:-1]))
    return Corpus(
        train=heldout, heldout=heldout, train_starts=starts, heldout_starts=starts,
        token_bytes=np.arange(VOCAB, dtype=np.int32) % 5, eot=0, manifest={}, fingerprint="", protocol="clean",
    )  # fmt: skip


# tokens that say where they are, and tokens of the small model's vocabulary
PLACES = corpus_of(np.arange(sum(DOCUMENTS), dtype=np.uint32))
TEXT = corpus_of(np.random.default_rng(3).integers(0, VOCAB, sum(DOCUMENTS)).astype(np.uint16))


def config_of(seq_len: int = 48, batch_tokens: int = 400, contexts=(8, 16, 32)):
    config = small_config()
    config.seq_len = seq_len
    config.eval.update(dict(contexts=contexts, num_targets=TARGETS, own_targets=200, batch_tokens=batch_tokens))
    return config


def rows_of(suite: evaluate.Suite) -> dict[str, np.ndarray]:
    return {name: x.reshape(-1, x.shape[-1]) for name, x in suite.batches.items()}


@pytest.mark.parametrize(("seq_len", "batch_tokens", "mesh_shape"), SHAPES)
def test_every_suite_scores_the_same_targets_once_in_one_order(seq_len, batch_tokens, mesh_shape):
    wanted = heldout.targets(PLACES, config_of()).positions
    assert len(np.unique(wanted)) == len(wanted) == TARGETS
    suites = evaluate.make_suites(PLACES, config_of(seq_len, batch_tokens), mesh_shape)
    assert list(suites) == ["8", "16", "32", "own"]
    for name in ("8", "16", "32"):
        rows = rows_of(suites[name])
        np.testing.assert_array_equal(rows["targets"][rows["targets"] >= 0], wanted)


@pytest.mark.parametrize(("seq_len", "batch_tokens", "mesh_shape"), SHAPES)
def test_a_target_has_its_context_and_no_other_document(seq_len, batch_tokens, mesh_shape):
    targets = heldout.targets(PLACES, config_of())
    suites = evaluate.make_suites(PLACES, config_of(seq_len, batch_tokens, (8, 32)), mesh_shape)
    for context in (8, 32):
        rows = rows_of(suites[str(context)])
        scored = rows["targets"] >= 0
        np.testing.assert_array_equal(rows["inputs"][scored] + 1, rows["targets"][scored])
        seen = np.nonzero(scored)[1] + 1  # tokens up to and with the target's own input
        assert seen.min() > context and seen.max() <= 1.25 * context
        first = rows["inputs"][np.nonzero(scored)[0], 0]
        assert (first >= PLACES.heldout_starts[targets.documents]).all()


@pytest.mark.parametrize(("seq_len", "batch_tokens", "mesh_shape"), SHAPES)
def test_batches_fit_the_mesh_and_the_tokens_allowed(seq_len, batch_tokens, mesh_shape):
    suites = evaluate.make_suites(PLACES, config_of(seq_len, batch_tokens), mesh_shape)
    data, _, seq = mesh_shape
    for suite in suites.values():
        _, rows, length = suite.batches["inputs"].shape
        assert rows % data == 0 and length % seq == 0
        assert rows == data or rows * (length - seq + 1) <= batch_tokens


def test_own_windows_score_every_position_of_whole_windows_once():
    suites = evaluate.make_suites(PLACES, config_of(48, 100), (1, 1, 1))
    rows = rows_of(suites["own"])
    scored = rows["targets"][rows["targets"] >= 0]
    assert len(scored) == 4 * 48 == len(np.unique(scored))


@pytest.mark.parametrize(("seq_len", "within"), [(40, ["8", "16", "32"]), (39, ["8", "16"]), (10, ["8"]), (9, [])])
def test_windows_longer_than_the_training_length_are_beyond_it(seq_len, within):
    suites = evaluate.make_suites(PLACES, config_of(seq_len), (1, 1, 8))
    assert list(suites) == ["8", "16", "32", "own"]
    assert [name for name, suite in suites.items() if not suite.beyond] == [*within, "own"]


def test_places_of_own_windows_are_those_of_their_targets():
    """The token at (document, place) is the target, and every window crosses documents as running text does."""
    documents_WT, places_WT = heldout.own_length_places(PLACES, config_of(48))
    rows = rows_of(evaluate.make_suites(PLACES, config_of(48), (1, 1, 1))["own"])
    np.testing.assert_array_equal(PLACES.heldout_starts[documents_WT] + places_WT, rows["targets"][: len(places_WT)])
    assert (places_WT < np.array(DOCUMENTS)[documents_WT]).all() and (places_WT >= 0).all()


@functools.cache
def weights():
    """The model and its weights on the host."""
    model = MoETransformer(model_config())
    with jax.set_mesh(sharding.make_mesh({"data": 1, "expert": 1, "seq": 1})):
        params = jax.jit(lambda: model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32)))()["params"]
    return model, bigger(params, np.random.default_rng(1))


@functools.cache
def scores(mesh_shape: tuple[int, int, int], batch_tokens: int, uniform: bool = False):
    """What each suite of contexts 8 and 16 scores on TEXT: name -> (nll, right, ids)."""
    model, params = weights()
    if uniform:
        params = params | {"final_norm": np.zeros_like(params["final_norm"])}
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, mesh_shape, strict=True)))
    suites = evaluate.make_suites(TEXT, config_of(24, batch_tokens, (8, 16)), mesh_shape)
    with jax.set_mesh(mesh):
        params = jax.device_put(params, jax.NamedSharding(mesh, jax.P()))
        compiled = evaluate.compile_suites(model, params, suites, mesh)
        return {name: evaluate.score(compiled[name], params, s, mesh) for name, s in suites.items()}


@functools.cache
def one_window_a_target(context: int) -> tuple[np.ndarray, np.ndarray]:
    """(-log p, predicted right) of each target from a row of its own: the tokens before it, then noise."""
    model, params = weights()
    places = heldout.targets(PLACES, config_of(24, 1, (8, 16)))
    rows = rows_of(evaluate.make_suites(PLACES, config_of(24, 400, (8, 16)), (1, 1, 1))[str(context)])
    which, columns = np.nonzero(rows["targets"] >= 0)
    first, last = rows["inputs"][which, 0], places.positions  # [first, last) is seen
    length = context + context // 4
    inputs = np.random.default_rng(2).integers(0, VOCAB, (len(last), length)).astype(np.int32)
    for row, (begin, end) in enumerate(zip(first, last, strict=True)):
        inputs[row, : end - begin] = TEXT.heldout[begin:end]

    with jax.set_mesh(sharding.make_mesh({"data": 1, "expert": 1, "seq": 1})):
        hidden_NTD, _ = jax.jit(lambda x: model.apply({"params": params}, x))(inputs)
    hidden_ND = np.asarray(hidden_NTD)[np.arange(len(last)), last - first - 1]
    logits = hidden_ND.astype(np.float64) @ params["embedding"].T
    ids = TEXT.heldout[last]
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return -log_p[np.arange(len(ids)), ids], logits.argmax(axis=1) == ids


@pytest.mark.parametrize(("mesh_shape", "batch_tokens"), [((1, 1, 1), 150), ((4, 1, 2), 90)])
@pytest.mark.parametrize("context", [8, 16])
def test_scores_are_those_of_one_window_a_target(mesh_shape, batch_tokens, context):
    nll, right, ids = scores(mesh_shape, batch_tokens)[str(context)]
    wanted_nll, wanted_right = one_window_a_target(context)
    assert nll.dtype == np.float32 and len(nll) == TARGETS
    np.testing.assert_allclose(nll, wanted_nll, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(right, wanted_right)
    wanted_ids = TEXT.heldout[heldout.targets(TEXT, config_of(contexts=(8, 16))).positions]
    np.testing.assert_array_equal(ids, wanted_ids)
    assert wanted_nll.std() > 0.1  # a model that says something


def test_padding_is_not_scored():
    """Windows that do not fill the last batch, on any mesh: exactly the targets, with the same losses."""
    one, many = scores((1, 1, 1), 150), scores((4, 1, 2), 90)
    for name, wanted in one.items():
        assert len(many[name][0]) == len(wanted[0]) == (192 if name == "own" else TARGETS)
        np.testing.assert_allclose(many[name][0], wanted[0], rtol=1e-5, atol=1e-5)


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary():
    for nll, right, ids in scores((1, 1, 1), 150, uniform=True).values():
        summary = result.Scores.of(nll, right, ids, TEXT.token_bytes, evaluate.Suite(8, {})).summary
        assert summary["loss"] == pytest.approx(math.log(VOCAB), rel=1e-6)
        assert summary["perplexity"] == pytest.approx(VOCAB, rel=1e-5)


def test_a_stop_gives_no_scores():
    suite = evaluate.make_suites(TEXT, config_of(24, 90, (8, 16)), (1, 1, 1))["own"]
    asked = iter((False, True))
    mesh = sharding.make_mesh({"data": 1, "expert": 1, "seq": 1})

    def compiled(params, batch):
        return jnp.zeros(batch["targets"].shape), batch["targets"] > 0

    assert len(suite.batches["inputs"]) > 1
    assert evaluate.score(compiled, None, suite, mesh, lambda: next(asked)) is None


SUITE = evaluate.Suite(8, {}, beyond=True)


def test_summary_by_hand():
    """3 and 5 bits for tokens of 2 and 6 bytes: one bit a byte, though the mean over tokens is 4 bits."""
    nll = np.array([3, 5], np.float32) * np.float32(math.log(2))
    found = result.Scores.of(nll, np.array([True, False]), np.array([0, 1]), np.array([2, 6]), SUITE).summary
    assert found["bits_per_byte"] == pytest.approx(1.0)
    assert found["loss"] == pytest.approx(4 * math.log(2)) and found["perplexity"] == pytest.approx(16)
    assert found["accuracy"] == 0.5 and found["targets"] == 2 and found["context"] == 8
    assert found["beyond"]
    nothing = result.Scores.of(nll, np.array([True, False]), np.array([0, 1]), np.array([0, 0]), SUITE).summary
    assert nothing["bits_per_byte"] is None


def test_best_means_the_longest_context_within_the_training_length():
    def of(loss: float, beyond: bool = False) -> result.Scores:
        return result.Scores(np.zeros(1), np.zeros(1), dict(loss=loss, beyond=beyond))

    assert result.heldout_loss({"96": of(2.0), "384": of(1.0), "1536": of(5.0, True), "own": of(3.0)}) == 1.0
    assert result.heldout_loss({"96": of(2.0, True), "own": of(3.0)}) == 3.0
    assert result.heldout_loss({"2048": of(2.0, True), "window": of(3.0)}) == 3.0
