"""A difference between strategies is the effect of row length and the effect of diversity, and nothing else."""

import numpy as np
import pytest

from research.analysis import decomposition
from research.analysis.bootstrap import hierarchical_bootstrap
from research.analysis.context import difference
from research.analysis.study import Arm, Key, Run

DOCUMENTS = np.arange(30).repeat(20)


def arm_of(rng, strategy: str, setting: str, offset: float, seeds=(1, 2, 3), tokens_per_step=8192) -> Arm:
    hard = np.random.default_rng(0).gamma(4, 1, DOCUMENTS.size)
    runs = []
    for seed in seeds:
        loss = hard + offset + rng.normal(0, 0.005) + rng.normal(0, 0.05, DOCUMENTS.size)
        result = dict(tokens_per_step=tokens_per_step, tokens=80 * tokens_per_step)
        arrays = {"loss_96": loss, "document": DOCUMENTS}
        runs.append(Run(Key(strategy, setting, seed), "finished", result, arrays=arrays))
    return Arm(strategy, setting, tuple(runs))


def test_length_and_diversity_are_found_and_add_up(rng):
    offsets = {"short": (0.0, 0.2), "long": (0.7, 0.6)}  # under independent, and under paired order
    independent = [arm_of(rng, name, "independent", both[0]) for name, both in offsets.items()]
    paired = [arm_of(rng, name, "paired", both[1]) for name, both in offsets.items()]
    (entry,) = decomposition.analyse(independent, paired, [96])
    for part, wanted in dict(total=-0.7, length=-0.4, diversity=-0.3).items():
        assert entry[part]["mean"] == pytest.approx(wanted, abs=0.02)
        assert entry[part]["low"] < entry[part]["mean"] < entry[part]["high"]
        assert entry[part]["high"] - entry[part]["low"] < 0.2
    assert entry["total"]["mean"] == pytest.approx(entry["length"]["mean"] + entry["diversity"]["mean"], abs=2e-6)


@pytest.mark.parametrize("trial", range(3))
def test_total_and_length_have_the_intervals_of_their_differences(rng, trial):
    """As many draws, the same ones: a report does not say two things of one number."""
    orders = [
        [arm_of(rng, name, order, offset) for name, offset in (("a", 0.0), ("b", 0.1))]
        for order in ("independent", "paired")
    ]
    (entry,) = decomposition.analyse(*orders, [96])
    for part, arms in zip(("total", "length"), orders, strict=True):
        losses = [np.stack([run.losses[96] for run in arm.runs]) for arm in arms]
        wanted = difference(hierarchical_bootstrap(*losses, DOCUMENTS, 0))
        assert entry[part] == pytest.approx({name: wanted[name] for name in ("mean", "low", "high")}, abs=2e-6)


def test_only_seeds_that_all_four_have_are_used(rng):
    independent = [arm_of(rng, "a", "independent", 0, (1, 2, 3)), arm_of(rng, "b", "independent", 1, (1, 2))]
    paired = [arm_of(rng, "a", "paired", 0, (2, 3)), arm_of(rng, "b", "paired", 1, (1, 2, 3))]
    (entry,) = decomposition.analyse(independent, paired, [96])
    assert entry["seeds"] == [2]


def test_steps_of_other_sizes_never_see_the_same_tokens_and_are_not_split(rng):
    sizes = dict(a=26_624, b=26_624, c=24_576)
    both = [
        [arm_of(rng, name, setting, 0, tokens_per_step=size) for name, size in sizes.items()]
        for setting in ("independent", "paired")
    ]
    assert [(e["a"], e["b"]) for e in decomposition.analyse(*both, [96])] == [("a", "b")]


def test_without_paired_runs_there_is_nothing_to_say(rng):
    independent = [arm_of(rng, name, "independent", 0) for name in "ab"]
    assert decomposition.analyse(independent, [], [96]) == []
    assert decomposition.section({"decomposition": []}) is None
