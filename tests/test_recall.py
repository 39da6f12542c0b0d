"""The recall task: nothing but recall helps, every answer is scored once, and the analysis counts them."""

import numpy as np
import pytest

from configs import balanced, large_batch, long_seq
from research import evaluate
from research.analysis import recall
from research.analysis.statistics import wilson
from research.analysis.study import Arm, Key, Run
from research.config import ConfigError
from research.data import stream, synthetic
from research.data.tokens import open_corpus


def config_of(seq_len: int = 64, **fields):
    config = balanced.get_config("recall")
    config.seq_len = seq_len
    small = dict(documents=6, heldout_documents=40, document_length=256, shortest=4, longest=128)
    config.data.recall.update(small | fields)
    return config


CORPUS = open_corpus(config_of())
TASK = config_of().data.recall


def kinds(tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Which tokens are filler, keys and values."""
    fillers, keys = 1 + TASK.num_fillers, 1 + TASK.num_fillers + TASK.num_keys
    return dict(
        filler=(tokens > 0) & (tokens < fillers), key=(tokens >= fillers) & (tokens < keys), value=tokens >= keys
    )


def documents_of(corpus):
    for start in corpus.heldout_starts:
        yield (
            corpus.heldout[start : start + TASK.document_length],
            corpus.heldout_scored[start : start + TASK.document_length],
        )


def test_a_document_is_records_and_filler():
    for tokens, scored in documents_of(CORPUS):
        kind = kinds(tokens)
        assert tokens[-1] == synthetic.EOT and sum(k.sum() for k in kind.values()) == len(tokens) - 1
        places = np.nonzero(kind["key"])[0]
        assert kind["value"][places + 1].all() and kind["value"].sum() == len(places)  # each key is followed by a value
        assert np.diff(places).min() == 2 and np.diff(places).max() > 2
        pairs = [(int(tokens[p]), int(tokens[p + 1])) for p in places]
        assert len(set(pairs)) == len(dict(pairs))  # a key keeps its value
        for place, (key, _) in zip(places, pairs, strict=True):
            assert scored[place + 1] == (key in tokens[:place] and place >= TASK.longest)  # said before: this asks
        assert not scored[~np.isin(np.arange(len(tokens)), places + 1)].any()


def test_to_train_on_every_answer_is_scored_and_documents_differ_in_reach():
    corpus = open_corpus(config_of(documents=60))
    farthest = []
    for start in corpus.train_starts:
        tokens, scored = (array[start : start + 256] for array in (corpus.train, corpus.train_scored))
        said, ages = {}, []
        for place in np.nonzero(kinds(tokens)["key"])[0]:
            key = int(tokens[place])
            assert scored[place + 1] == (key in said)
            ages += [place - said[key]] if key in said else []
            said[key] = place
        farthest.append(max(ages))
    octaves = set(np.log2(np.array(farthest) / TASK.shortest).astype(int))
    assert min(ages) >= TASK.shortest and max(farthest) < TASK.longest and octaves == {0, 1, 2, 3, 4}


def test_only_answers_are_targets():
    config = config_of()
    config.batch_size = 8
    steps = [stream.batch(CORPUS, config, cursor)["targets"] for cursor in range(0, 6 * 256, 8 * 64)]
    targets = np.concatenate(steps)
    assert kinds(targets[targets >= 0])["value"].all()
    assert (targets >= 0).sum() == CORPUS.train_scored.sum()  # once an epoch, none lost at a border


def test_a_row_holds_one_document():
    config = config_of(seq_len=256)
    config.batch_size = 2
    for row in stream.batch(CORPUS, config, 0)["inputs"]:
        assert (row == synthetic.EOT).nonzero()[0].tolist() == [255]


def test_distances_are_those_of_the_pairs_and_fill_every_octave():
    positions, documents, distances = synthetic.answers(CORPUS)
    assert len(positions) == CORPUS.heldout_scored.sum() and (np.diff(positions) > 0).all()
    np.testing.assert_array_equal(CORPUS.heldout[positions], CORPUS.heldout[positions - distances])
    np.testing.assert_array_equal(CORPUS.heldout[positions - 1], CORPUS.heldout[positions - distances - 1])
    for position, distance in zip(positions[:200], distances[:200], strict=True):  # not said in between
        assert CORPUS.heldout[position - 1] not in CORPUS.heldout[position - distance : position - 1]
    assert (positions - distances >= CORPUS.heldout_starts[documents]).all()
    octaves = np.bincount(np.log2(distances / TASK.shortest).astype(int))
    assert len(octaves) == 5 and (np.abs(octaves / len(distances) - 1 / 5) < 0.04).all()


def test_the_distance_says_nothing_about_the_place_or_the_value():
    corpus = open_corpus(config_of(heldout_documents=300))
    positions, documents, distances = synthetic.answers(corpus)
    places = positions - corpus.heldout_starts[documents]
    assert abs(np.corrcoef(np.log2(distances), places)[0, 1]) < 0.05
    assert abs(np.corrcoef(np.log2(distances), corpus.heldout[positions])[0, 1]) < 0.05
    values = np.bincount(corpus.heldout[positions] - (1 + TASK.num_fillers + TASK.num_keys), minlength=TASK.num_values)
    assert len(values) == TASK.num_values
    assert (values / values.sum()).max() < 2 / TASK.num_values  # no constant answer beats chance by much


def test_the_corpus_follows_from_its_fields_and_the_split_seed():
    again, other = open_corpus(config_of()), config_of()
    np.testing.assert_array_equal(CORPUS.train, again.train)
    assert CORPUS.fingerprint == again.fingerprint
    other.seed += 1
    assert open_corpus(other).fingerprint == CORPUS.fingerprint  # seeds of runs share the answers
    other.data.split_seed += 1
    assert open_corpus(other).fingerprint != CORPUS.fingerprint
    assert not np.array_equal(CORPUS.train[: len(CORPUS.heldout)], CORPUS.heldout[: len(CORPUS.train)])


@pytest.mark.parametrize("seq_len", [16, 64, 128, 256])
def test_both_suites_score_the_same_answers_in_one_order(seq_len):
    config = config_of(seq_len)
    positions, _, _ = synthetic.answers(CORPUS)
    suites = evaluate.make_suites(CORPUS, config, (1, 1, 1))
    assert {name: suite.beyond for name, suite in suites.items()} == {"256": seq_len < 256, "window": False}
    for suite in suites.values():
        targets = suite.batches["targets"].reshape(-1, suite.batches["targets"].shape[-1])
        np.testing.assert_array_equal(targets[targets >= 0], CORPUS.heldout[positions])


def test_an_answer_in_a_window_has_three_quarters_of_it_before_it():
    config, T = config_of(64), 64
    _, rows = synthetic.recall_windows(CORPUS, config)["window"]
    starts = np.arange(0, 256 - T + 1, T // 4)
    for row, (targets, inputs) in enumerate(zip(rows["targets"], rows["inputs"], strict=True)):
        document, start = row // len(starts), starts[row % len(starts)]
        np.testing.assert_array_equal(inputs, CORPUS.heldout[document * 256 + start :][:T])
        seen = np.nonzero(targets >= 0)[0] + 1
        assert start == 0 or (seen > 3 * T // 4).all()


def test_the_three_strategies_of_the_scale_train_on_the_same_task():
    fingerprints = set()
    for module in (large_batch, balanced, long_seq):
        config = module.get_config("recall")
        config.data.recall.update(dict(documents=32, heldout_documents=2))
        corpus = open_corpus(config)
        stream.check(corpus, config, config.batch_size * config.seq_len)
        fingerprints.add(corpus.fingerprint)
        real = module.get_config("recall")
        assert real.train.tokens <= real.data.recall.documents * real.data.recall.document_length  # one epoch
    assert len(fingerprints) == 1


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        (dict(num_keys=0), "config.data.recall.num_keys=0"),
        (dict(new_share=0.0), "config.data.recall.new_share=0.0"),
        (dict(max_gap=-1), "config.data.recall.max_gap=-1"),
        (dict(longest=100), "config.data.recall.longest=100"),
        (dict(shortest=1), "config.data.recall.longest=128"),
        (dict(document_length=128), "config.data.recall.document_length=128"),
        (dict(num_values=4000), "config.model.vocab_size=128"),
        (dict(heldout_documents=1, max_gap=120), "config.data.recall.heldout_documents=1"),
        (dict(documents=1, new_share=0.999), "config.data.recall.documents=1"),
        (dict(document_length=320), "config.data.recall.document_length=320"),
    ],
)
def test_a_task_that_cannot_be_is_one_line(fields, named):
    config = config_of(128, **fields)
    with pytest.raises(ConfigError) as error:
        open_corpus(config)
    assert str(error.value).startswith(named) and "\n" not in str(error.value)


def arm_of(right: np.ndarray, distances: np.ndarray, seeds: int) -> Arm:
    config = {"data": {"recall": {"num_values": 32}}}
    arrays = {"right_256": right, "right_window": ~right, "distance": distances}
    runs = [Run(Key("a", "recall", s), "finished", dict(seq_len=64), config, (), arrays) for s in range(seeds)]
    return Arm("a", "recall", tuple(runs))


def test_accuracy_is_counted_by_octaves_of_distance_over_all_seeds():
    distances = np.array([4, 5, 7, 8, 15, 16, 31, 20], np.int32)
    right = np.array([1, 1, 0, 0, 1, 0, 0, 0], bool)
    (entry,) = recall.analyse([arm_of(right, distances, seeds=2)])
    assert entry["chance"] == 1 / 32
    assert [(b["from"], b["to"], b["right"], b["answers"]) for b in entry["raw"]] == [
        (4, 7, 4, 6), (8, 15, 2, 4), (16, 31, 0, 6),
    ]  # fmt: skip
    assert entry["raw"][2]["low"] == 0 < entry["raw"][2]["high"] < 0.6  # Wilson's: of three, seeds answer the same
    assert entry["raw"][2]["high"] == pytest.approx(wilson(0, 3)[1])
    assert [b["right"] for b in entry["window"]] == [2, 2, 6]
    assert entry["raw"][0]["sd"] == 0 and entry["raw"][0]["by_seed"] == [pytest.approx(2 / 3, abs=1e-6)] * 2
    assert recall.share(entry["raw"][1]) == "50% (50%, 50%)"
    (alone,) = recall.analyse([arm_of(right, distances, seeds=1)])
    assert recall.share(alone["raw"][1]) == "50.0% [9.5%, 90.5%]"  # of two answers


def bin_of(low: float, high: float, *by_seed: float) -> dict:
    return dict(mean=np.mean(by_seed), low=low, high=high, by_seed=list(by_seed))


def test_more_is_shown_by_every_seed_and_by_the_answers():
    a = bin_of(0.48, 0.52, 0.45, 0.55)
    assert recall.above(bin_of(0.58, 0.62, 0.56, 0.64), a)
    assert not recall.above(bin_of(0.58, 0.62, 0.54, 0.66), a)  # one seed is below one of the other's
    assert not recall.above(bin_of(0.51, 0.69, 0.56, 0.64), a)  # so few answers that it may be chance


def test_no_more_is_shown_by_every_seed_and_by_the_answers():
    assert recall.no_more(bin_of(0.48, 0.54, 0.49, 0.53), 0.5)
    assert not recall.no_more(bin_of(0.48, 0.56, 0.49, 0.53), 0.5)
    assert not recall.no_more(bin_of(0.48, 0.54, 0.45, 0.57), 0.5)
    assert recall.least(bin_of(0.48, 0.54, 0.45, 0.57)) == 0.45 and recall.least(bin_of(0.4, 0.6, 0.45, 0.55)) == 0.4
