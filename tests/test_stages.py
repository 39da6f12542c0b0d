"""Rows that grow: as many tokens per step in every stage, each token once, and no claim takes them for one length."""

import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs import growing
from experiments import ablation
from research import planner, stages, target
from research.analysis import budgets, claims, context, findings, report, study
from research.analysis.memory import Usage
from research.analysis.study import Arm, Key, Run
from research.config import ConfigError, validate
from research.data import stream
from research.flops import train_flops_per_token
from research.stages import Stage
from tests.fake_analysis import analysis, band, evidence_on, verdict_on
from tests.fake_runs import MERITS, write_run, write_study
from tests.numbered import FEW, make_config, make_corpus, refuse


def growing_config(rows=2, length=16, shorter=((4, 0.5), (8, 0.25)), steps=8, block=0, seed=42, **data):
    config = make_config(rows, length, block, seed, **data)
    config.train.update(steps=steps, stages=shorter)
    return config


def test_stages_follow_one_another_and_hold_as_many_tokens_per_step():
    found = stages.stages_of(growing_config())
    assert found == (Stage(0, 4, 8, 4), Stage(4, 6, 4, 8), Stage(6, 8, 2, 16))
    assert [stages.stage_at(found, step).seq_len for step in range(9)] == [4] * 4 + [8] * 2 + [16] * 3
    config = make_config()
    config.train.steps = 5
    assert stages.stages_of(config) == (Stage(0, 5, 4, 16),)


def test_a_run_of_before_there_were_stages_has_one():
    config = growing_config()
    del config.train.stages
    assert stages.stages_of(config) == (Stage(0, 8, 2, 16),)
    validate(config, (1, 1, 1), "cpu")


def test_a_stage_alone_is_a_run_of_its_shape():
    config = growing_config()
    alone = [stages.alone(config, stage) for stage in stages.stages_of(config)]
    assert [(c.batch_size, c.seq_len, c.train.steps) for c in alone] == [(8, 4, 8), (4, 8, 8), (2, 16, 8)]
    assert [len(stages.stages_of(c)) for c in alone] == [1, 1, 1]
    assert config.batch_size == 2  # it is a copy


def test_flops_are_those_of_each_stage():
    config = growing_config()
    found = stages.stages_of(config)
    each = [train_flops_per_token(config.model, length) * 32 for length in (4, 4, 4, 4, 8, 8, 16, 16)]
    for now in range(9):
        assert stages.flops_until(config.model, found, now) == pytest.approx(sum(each[:now]), rel=1e-12)


# The order of the data


def batches(corpus, config, steps: int) -> list[dict[str, np.ndarray]]:
    tokens = config.batch_size * config.seq_len
    return [stream.batch(corpus, config, step * tokens) for step in range(steps)]


layouts = dict(
    rows=st.integers(1, 4),
    shares=st.sampled_from([(0.5, 0.25), (0.3, 0.3), (0.1, 0.8)]),
    lengths=st.sampled_from([(2, 8), (4, 8), (1, 2)]),
    seed=st.integers(0, 99),
)


@FEW
@given(
    blocks=st.integers(20, 60), slack=st.integers(0, 15), epochs=st.sampled_from([0.3, 0.8, 1.0, 1.5, 2.0]), **layouts
)
def test_no_token_is_a_target_twice_an_epoch_whatever_the_stages(rows, shares, lengths, seed, blocks, slack, epochs):
    """An epoch ends in the middle of a stage and of a step; what the run reads of it is counted by the cursor."""
    corpus = make_corpus(blocks * 16 + 1 + slack)
    steps = int(epochs * blocks) // rows
    config = growing_config(rows, 16, tuple(zip(lengths, shares, strict=True)), steps, seed=seed)
    if steps < 10:
        return
    found = batches(corpus, config, steps)
    for batch, step in zip(found, range(steps), strict=True):
        stage = stages.stage_at(stages.stages_of(config), step)
        assert batch["inputs"].shape == (stage.batch_size, stage.seq_len)
        assert (np.diff(batch["inputs"], axis=1) == 1).all() and (batch["targets"] == batch["inputs"] + 1).all()
    targets = np.concatenate([batch["targets"].ravel() for batch in found])
    for epoch in range(len(targets) // (blocks * 16) + 1):
        seen = Counter(targets[epoch * blocks * 16 : (epoch + 1) * blocks * 16].tolist())
        assert max(seen.values(), default=1) == 1
        if len(targets) >= (epoch + 1) * blocks * 16:
            assert max(seen) - min(seen) == blocks * 16 - 1  # all of it


def places_a_step(corpus, config, steps: int, block: int) -> tuple[float, int]:
    """(blocks that a step's rows begin in, in the mean; blocks that all of these steps read from)."""
    starts = [batch["inputs"][:, 0] // block for batch in batches(corpus, config, steps)]
    return float(np.mean([len(set(s.tolist())) for s in starts])), len(set(np.concatenate(starts).tolist()))


def test_short_rows_of_a_stage_come_from_places_of_their_own_and_from_all_of_the_text():
    """64 steps of a quarter of the corpus; half of them, in rows of 4, draw from half of its 4,096 blocks."""
    corpus = make_corpus(4 * 64 * 16 * 64 + 1)
    step, run = places_a_step(corpus, growing_config(16, 64, ((4, 0.5),), steps=64), 32, 64)
    assert step == pytest.approx(2048 * (1 - np.exp(-256 / 2048)), rel=0.02)
    assert run == pytest.approx(2048 * (1 - (1 - 0.25) ** 16), rel=0.02)  # of a block's 16 rows a quarter is read
    longer = [set(), set()]
    for i, batch in enumerate(batches(corpus, growing_config(16, 64, ((4, 0.5),), steps=64), 64)):
        longer[i >= 32] |= set((batch["inputs"][:, 0] // 64).tolist())
    assert not longer[0] & longer[1] and len(longer[1]) == 512
    first, again = (batches(corpus, growing_config(16, 64, ((4, 0.5),), 64, seed=s), 1)[0] for s in (1, 2))
    assert (first["inputs"] != again["inputs"]).any()


@FEW
@given(**layouts)
def test_in_paired_order_rows_that_grow_see_the_tokens_of_every_other_strategy(rows, shares, lengths, seed):
    corpus = make_corpus(1200)
    shorter = tuple(zip(lengths, shares, strict=True))
    grows = batches(corpus, growing_config(rows, 16, shorter, 10, block=48, seed=seed), 10)
    whole = batches(corpus, make_config(rows, 16, 48, seed), 10)
    for a, b in zip(grows, whole, strict=True):
        assert a["inputs"].ravel().tolist() == b["inputs"].ravel().tolist()


def test_documents_are_masked_in_every_stage():
    corpus = make_corpus(600)
    for batch in batches(corpus, growing_config(mask_documents=True), 8):
        starts = batch["inputs"] % 37 == 0
        assert (batch["positions"][:, 0] == 0).all() and (batch["positions"][starts] == 0).all()
        assert batch["segments"].shape == batch["inputs"].shape


# Mistakes


@pytest.mark.parametrize(
    ("shorter", "said"),
    [
        ((4, 0.5), "give pairs of tokens per row and share of the steps"),
        (((4, 1),), "give pairs"),
        (((4.0, 0.5),), "give pairs"),
        (((True, 0.5),), "give pairs"),
        (((4, 1.0),), "give pairs"),
        (((0, 0.5),), "give pairs"),
        (((5, 0.5),), "5 before 16: give rising lengths that divide config.seq_len=16"),
        (((16, 0.5),), "16 before 16: give rising lengths"),
        (((8, 0.5), (4, 0.25)), "8 before 4: give rising lengths"),
        (((4, 0.5), (4, 0.25)), "4 before 4: give rising lengths"),
        (((4, 0.5), (8, 0.5)), "its shares make 1, and leave nothing for rows of config.seq_len=16"),
        (((4, 0.01),), "a share of the 8 steps is no whole step"),
        (((4, 0.99),), "a share of the 8 steps is no whole step"),
    ],
)
def test_stages_that_cannot_be_are_refused(shorter, said):
    message = refuse(validate, growing_config(shorter=shorter), (1, 1, 1), "cpu")
    assert message.startswith("config.train.stages=") and said in message


def test_stages_need_the_clean_protocol_and_rows_that_the_mesh_divides():
    config = growing_config(protocol="published")
    assert "windows of one length; use config.data.protocol=clean" in refuse(validate, config, (1, 1, 1), "cpu")
    assert "rows of 4 are not divisible by the seq axis of 8" in refuse(validate, growing_config(), (1, 1, 8), "cpu")
    for shorter in ((), None):
        validate(growing_config(shorter=shorter), (1, 1, 1), "cpu")


def test_the_strategy_that_grows_has_the_lengths_of_the_others():
    for scale in ("cpu", "recall"):
        config = growing.get_config(scale)
        validate(config, (2, 1, 1), "cpu")
        found = stages.stages_of(config)
        assert len({stage.batch_size * stage.seq_len for stage in found}) == 1 and len(found) == 3
        assert found[-1].seq_len == config.seq_len and found[-1].steps == found[-1].end // 4


# Memory


class FakePrograms:
    """Bytes of a step: its tokens, times `factor` in rows of `dear` tokens."""

    target = target.at_hand()

    def __init__(self, dear: int = 0, factor: float = 1.0):
        self.dear, self.factor, self.asked = dear, factor, []

    def usage(self, config, kind="train"):
        self.asked.append((config.batch_size, config.seq_len, config.train.steps))
        tokens = config.batch_size * config.seq_len
        return Usage(int(tokens * self.factor) if config.seq_len == self.dear else tokens, 0, 0, 0)


def test_a_budget_is_of_the_stage_that_needs_most():
    config = growing_config()
    programs = FakePrograms()
    assert planner._largest(config, programs).total == 32
    assert programs.asked == [(8, 4, 8), (4, 8, 8), (2, 16, 8)]
    assert planner._largest(config, FakePrograms(dear=4, factor=3)).total == 96


def test_a_planned_batch_is_lowered_until_every_stage_fits():
    cell = SimpleNamespace(batch=10, unit=2)
    config = growing_config(rows=-1)
    config.mesh.data = 1
    assert planner._fitting(config, cell, 160, FakePrograms()).batch_size == 10
    programs = FakePrograms(dear=4, factor=1.3)  # rows of 4 take more: 8 rows are 166 bytes, 6 are 124
    assert planner._fitting(config, cell, 160, programs).batch_size == 6
    with pytest.raises(ConfigError, match="config.memory_budget.*a step of shorter rows needs"):
        planner._fitting(config, cell, 40, FakePrograms(dear=4, factor=1.3))


# Reports


def grown_run(folder, key, **merit):
    """A run of rows that grew: 64 x 128 for half of the steps, then 4 x 2048."""
    write_run(folder, key, **merit)
    config, result = (json.loads((folder / name).read_text()) for name in ("config.json", "result.json"))
    config.update(batch_size=4, seq_len=2048, train=dict(stages=[[128, 0.5]]))
    half = dict(steps=40, batch_size=64, seq_len=128, step_seconds=0.5)
    result.update(batch_size=4, seq_len=2048, stages=[half, half | dict(batch_size=4, seq_len=2048, step_seconds=1.5)])
    for score in result["eval"]["contexts"].values():
        score["beyond"] = False
    for name, content in (("config.json", config), ("result.json", result)):
        (folder / name).write_text(json.dumps(content))


@pytest.fixture
def grown_study(tmp_path):
    """Three strategies in both orders, and one that grows: as good as the best, and it gains from context."""
    keys = write_study(tmp_path, settings=("independent", "paired"))
    for seed in (42, 43, 44):
        for setting in ("independent", "paired"):
            key = Key("growing", setting, seed)
            grown_run(tmp_path / key.name, key, **MERITS["large_batch"] | dict(gain=0.05))
            if setting == "paired":
                config = json.loads((tmp_path / key.name / "config.json").read_text())
                config["data"]["shuffle_block"] = 2048
                (tmp_path / key.name / "config.json").write_text(json.dumps(config))
            keys.append(key)
    (tmp_path / "ablation.json").write_text(json.dumps({"runs": [vars(key) for key in keys], "exit_codes": {}}))
    return tmp_path


def test_a_report_shows_rows_that_grow_and_keeps_them_out_of_claims_about_length(grown_study, tmp_path):
    assert ablation.main(["--report_only", f"--workdir={grown_study}"]) == 0
    written = json.loads((grown_study / "report" / "results.json").read_text())
    text = (grown_study / "report" / "report.md").read_text()
    assert "growing 64 x 128 to 4 x 2048" in text and "| growing, independent | 64 x 128 to 4 x 2048 |" in text
    assert "With all the context that each was trained at, growing, in rows of 128, then 2,048 tokens, is" in text
    assert text.count("config.train (") == 1  # of both orders together
    arms = {(a["strategy"], a["setting"]): a for a in written["analysis"]["arms"]}
    assert arms["growing", "independent"]["stages"] and arms["long_seq", "independent"]["stages"] is None
    assert arms["growing", "independent"]["step_seconds"] == 1.0  # the mean of 0.5 and 1.5
    against = {e["strategy"]: e["against"] for e in written["analysis"]["context"] if e["setting"] == "independent"}
    assert against["growing"]["strategy"] == "long_seq" and against["long_seq"] is None
    assert all("growing" not in ranking["order"] for ranking in written["analysis"]["rankings"])
    assert "growing" in str(written["analysis"]["decomposition"])
    assert "growing" not in findings.why(written["analysis"])[0]  # it has no one row length
    assert "comparisons of rows of one length, and over" in text
    said = claims.verdicts(written)
    assert [v for v in said if "growing" in v.evidence] == [v for v in said if "extension training" in v.claim]
    assert any("long_seq" in v.evidence for v in said)
    for name in ("curves", "matrix", "costs", "budgets", "decomposition"):
        assert (grown_study / "report" / "figures" / f"{name}.png").stat().st_size > 10_000


def test_claims_are_those_of_the_study_without_rows_that_grow(grown_study, tmp_path):
    ablation.main(["--report_only", f"--workdir={grown_study}"])
    grown = json.loads((grown_study / "report" / "results.json").read_text())
    runs = [r for r in report.archive.load(grown_study / "report") if r.key.strategy != "growing"]
    alone = {"analysis": report.analyse(runs)}
    # what a correction for more comparisons moves apart, verdict by verdict they agree
    pairs = zip(claims.verdicts(grown), claims.verdicts(alone), strict=True)
    assert all(a.verdict == b.verdict for a, b in pairs if "extension training" not in a.claim)


def with_growing(to_long, to_short, shown=True, **changes):
    """An analysis with a strategy that grows from rows of 128 to 2,048, so much above the long rows and the short."""
    found = analysis(**changes)
    long = next(arm for arm in found["arms"] if arm["strategy"] == "long_seq")
    stages = [dict(batch_size=64, seq_len=128), dict(batch_size=4, seq_len=2048)]
    found["arms"].append(long | dict(strategy="growing", stages=stages))
    for other, gap, reach in (("long_seq", to_long, 1536), ("large_batch", to_short, 96)):
        pair = dict(setting="independent", a=other, b="growing", shown=shown, context_a=reach, context_b=1536)
        found["reach"]["pairs"].append(pair | band(-gap, 0.02))
    return found


@pytest.mark.parametrize(
    ("to_long", "to_short", "shown", "verdict"),
    [
        (-0.2, -0.1, True, "holds under conditions"),
        (-0.2, 0.1, True, "does not hold"),  # below long rows, as the short rows were that it had half as long
        (0.2, -0.1, True, "does not hold"),
        (-0.01, -0.01, False, "not tested"),
    ],
)
def test_extension_has_to_beat_long_rows_and_the_short_ones_that_it_extends(to_long, to_short, shown, verdict):
    found = with_growing(to_long, to_short, shown)
    assert verdict_on("extension training", found) == verdict
    said = evidence_on("extension training", found)
    assert f"growing minus long_seq {to_long:+.3f}" in said and f"growing minus large_batch {to_short:+.3f}" in said
    for left_out in (-1, -2):
        found = with_growing(-0.2, -0.1)
        del found["reach"]["pairs"][left_out]
        assert verdict_on("extension training", found) == "not tested"


def test_claims_that_have_too_few_strategies_of_one_length_say_so():
    found = with_growing(-0.2, -0.1)
    alone = found | dict(arms=[a for a in found["arms"] if a["strategy"] in ("long_seq", "growing")])
    assert "one strategy alone besides growing, whose rows grow" in evidence_on("whole story", alone)
    none = found | dict(arms=found["arms"][-1:])
    assert "no finished run in independent order besides growing" in evidence_on("whole story", none)


def test_leaking_runs_and_runs_of_one_length_say_nothing_of_extension():
    assert "none extended later" in evidence_on("extension training", analysis())
    assert verdict_on("extension training", with_growing(-0.2, -0.1, leaking=True)) == "not tested"


def grown_arm(seconds, losses=(5.0, 4.0, 3.0, 2.0), name="growing") -> Arm:
    """Runs of two steps in rows of 64 and two in rows of 256, evaluated after each; seconds: of each, by seed."""
    runs = []
    for seed, times in enumerate(seconds):
        both = [
            dict(steps=2, batch_size=256 // n, seq_len=n, step_seconds=t) for t, n in zip(times, (64, 256), strict=True)
        ]
        result = dict(
            steps=4, seq_len=256, stages=both, step_seconds=dict(median=9.0), memory_bytes=dict(compiled_step=1)
        )
        curve = [
            {"step": i, "tokens": i, "flops": i, "eval/loss@96": loss, "eval/loss@48": loss}
            for i, loss in enumerate(losses, 1)
        ]
        runs.append(Run(Key(name, "independent", seed), "finished", result, {}, tuple(curve)))
    return Arm(name, "independent", tuple(runs))


def test_train_seconds_are_those_of_the_least_disturbed_run_stage_by_stage():
    found = grown_arm([(1.0, 4.0), (2.0, 2.5)])  # the second: 9 seconds in all, the first 10
    assert budgets.step_seconds(found) == 2.25
    assert budgets._curve(found, "seconds", 48)["x"] == [[2.0, 4.0, 6.5, 9.0]] * 2


def test_a_curve_begins_where_the_rows_hold_its_context():
    """Windows of context 96 have 120 tokens: rows of 64 never held them, so their losses there are of another thing."""
    found = budgets.analyse([grown_arm([(1.0, 1.0)]), grown_arm([(1.0, 1.0)], name="other")], [48, 96])
    assert [curve["x"] for curve in found["curves"]["tokens"]] == [[[3, 4]], [[3, 4]]]
    found = budgets.analyse([grown_arm([(1.0, 1.0)]), grown_arm([(1.0, 1.0)], name="other")], [48])
    assert [curve["x"] for curve in found["curves"]["tokens"]] == [[[1, 2, 3, 4]], [[1, 2, 3, 4]]]
    assert "had the learning rates and the rows of a longer run" in budgets.section({"budgets": found}).text


def test_a_strategy_that_grows_takes_nothing_from_what_is_shown_of_the_others():
    """Holm's correction is over the comparisons of one length, and apart over those with rows that grow."""
    alone = [dict(a="large_batch", b=b, p=p) for b, p in (("balanced", 0.02), ("long_seq", 0.024))]
    grown = [dict(a="growing", b=b, p=p) for b, p in (("balanced", 0.9), ("long_seq", 0.001), ("large_batch", None))]
    both = [dict(entry) for entry in (*alone, *grown)]
    context.corrected(both, {"growing"})
    context.corrected(alone, ())
    assert both[:2] == alone and all(entry["shown"] for entry in alone)
    assert [entry["shown"] for entry in both[2:]] == [False, True, False] and both[3]["p_holm"] == 0.002


def test_paired_rows_that_grow_are_runs_of_their_own(tmp_path):
    arguments = ablation.parse(
        [f"--workdir={tmp_path}", "--strategies=long_seq,growing", "--settings=independent,paired"]
    )
    assert [run.key.name for run in ablation.plan(arguments)] == [
        "long_seq-independent-42", "growing-independent-42", "growing-paired-42",
    ]  # fmt: skip
    result = dict(protocol="clean", batch_size=4, seq_len=2048, stages=[dict(batch_size=64, seq_len=128), {}])
    result["stages"][1] = dict(batch_size=4, seq_len=2048)
    grown = Run(Key("growing", "independent", 1), "finished", result, {})
    plain = Run(Key("balanced", "paired", 1), "finished", result, {"data": {"shuffle_block": 2048}})
    assert [arm.strategy for arm in study.arms([grown, plain], "paired")] == ["balanced"]


def test_a_finding_says_on_which_side_and_what_is_not_shown():
    arm = dict(strategy="growing", setting="independent", batch_size=4, seq_len=2048)
    arm["stages"] = [dict(batch_size=64, seq_len=128), dict(batch_size=4, seq_len=2048)]
    pair = dict(setting="independent", a="growing", context_a=1536)
    pairs = [
        pair | dict(b="long_seq", shown=True) | band(-0.3, 0.1),
        dict(setting="independent", a="large_batch", b="growing", shown=True) | band(-0.2, 0.1),
        pair | dict(b="balanced", shown=False) | band(0.01, 0.1),
    ]
    (said,) = findings.grown(dict(arms=[arm], reach=dict(pairs=pairs)))
    assert said.endswith(
        "is 0.300 below long_seq [0.200, 0.400], 0.200 above large_batch [0.100, 0.300] and not shown to differ from"
        " balanced."
    )
    assert findings.grown(dict(arms=[arm | dict(stages=None)], reach=dict(pairs=pairs))) == []


def test_a_frontier_is_of_rows_of_one_length():
    from research.analysis import memory_plan

    with pytest.raises(ConfigError, match=r"add --config.train.stages=\(\)"):
        memory_plan.make(growing_config(), None, "1GiB", [16], [{}])
