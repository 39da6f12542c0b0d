"""The largest batch that fits is the one that trying them all finds, with few programs compiled."""

import ast
import dataclasses
import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research import evaluate, heaps, planner, sizes, target
from research.analysis import frontier, memory, programs
from research.config import ConfigError
from research.data import heldout, tokens
from tests.small import small_config


class Counted:
    """A measure that remembers what it was asked."""

    def __init__(self, function):
        self.function, self.asked = function, []

    def __call__(self, units: int) -> int:
        self.asked.append(units)
        return self.function(units)


@given(
    fixed=st.integers(0, 10**5), slope=st.integers(100, 10**4), bend=st.integers(0, 3), step=st.integers(1, 9),
    budget=st.integers(1, 3 * 10**5), guess=st.integers(1, 500),
)  # fmt: skip
@settings(deadline=None, max_examples=200)
def test_it_is_what_trying_them_all_finds(fixed, slope, bend, step, budget, guess):
    def measure(units):  # affine, curved, and in steps as chunks make them
        return fixed + slope * math.ceil(units / step) * step + bend * units**2

    counted = Counted(measure)
    found = frontier.largest(counted, budget, guess, empty=fixed // 2)
    wanted = 0
    while measure(wanted + 1) <= budget:
        wanted += 1
    assert found.units == wanted
    assert found.next_bytes == measure(wanted + 1) > budget
    assert found.bytes == (measure(wanted) if wanted else 0)
    assert len(counted.asked) == len(set(counted.asked))  # none twice


@pytest.mark.parametrize("guess", [1, 7, 100, 4000])
def test_affine_memory_takes_five_measurements_at_most(guess):
    counted = Counted(lambda units: 1000 + 37 * units)
    assert frontier.largest(counted, 50_000, guess, empty=900).units == (50_000 - 1000) // 37
    assert len(counted.asked) <= 5


def test_a_dip_is_no_reason_to_try_a_thousand_times_more():
    counted = Counted(lambda units: 1000 + 37 * units - 300 * (units == 106))
    found = frontier.largest(counted, 5000, 100)
    assert found.units == (5000 - 1000) // 37 and max(counted.asked) < 500


def test_what_always_fits_is_said():
    with pytest.raises(frontier.TooMuch):
        frontier.largest(lambda units: 5, 10)


@given(limit=st.integers(1, 5000), guess=st.integers(1, 10_000), fits=st.integers(0, 10_000))
@settings(deadline=None, max_examples=100)
def test_no_more_is_tried_than_the_limit(limit, guess, fits):
    counted = Counted(lambda units: 100 + units)
    if fits >= limit:
        with pytest.raises(frontier.TooMuch):
            frontier.largest(counted, 100 + fits, guess, limit=limit)
    else:
        assert frontier.largest(counted, 100 + fits, guess, limit=limit).units == fits
    assert max(counted.asked) <= limit


def config_of(tmp_path, **fields):
    config = small_config(remat="none")
    config.data.cache_dir = str(tmp_path)
    config.eval.batch_tokens, config.eval.contexts = 64, (8,)
    config.train.steps = 10
    config.optimizer.name, config.model.num_layers = "adamw", 1  # quick to compile
    return frontier.with_fields(config, dict(batch_size=4, seq_len=16) | fields)


@pytest.fixture(scope="module")
def here():
    return target.at_hand()


def one_device(config):
    return frontier.with_fields(config, {"mesh.data": 1})


def test_the_planned_batch_fits_and_one_more_does_not(tmp_path, here):
    config = one_device(config_of(tmp_path))
    compiled = programs.Programs(here)
    brute = [compiled.usage(frontier.with_fields(config, dict(batch_size=b))).total for b in range(3, 8)]
    assert brute == sorted(brute)  # a larger batch never takes less
    budget = brute[2]
    cell = frontier.plan(config, budget, compiled)
    assert cell.batch == 2 + sum(b <= budget for b in brute) == 5
    assert cell.train.total == brute[2] <= budget < cell.next_bytes == brute[3]
    planned = frontier.with_fields(config, dict(batch_size=math.ceil(1.1 * cell.batch), memory_budget=f"{budget}B"))
    with pytest.raises(ConfigError, match="config.batch_size=6: a step needs"):
        planner.planned(planned)


def test_a_batch_of_minus_one_is_filled_in(tmp_path):
    config = one_device(config_of(tmp_path, batch_size=-1, memory_budget="2MiB", **{"train.accumulation": 2}))
    found = planner.planned(config)
    assert found.batch_size > 0 and found.batch_size % 2 == 0  # whole microbatches
    assert found.is_locked and planner.planned(found) is found  # and stays
    (tmp_path / "config.json").write_text(json.dumps(frontier.with_fields(found, dict(batch_size=4)).to_dict()))
    assert planner.planned(config, str(tmp_path)).batch_size == 4  # a run keeps what it began with
    larger = frontier.with_fields(config, dict(memory_budget="3MiB"))
    assert planner._begun(larger, str(tmp_path)) is None  # of another budget: planned anew


def test_a_frontier_is_what_trying_every_batch_finds(tmp_path, here):
    """Over lengths and choices: every batch from one unit up, until one does not fit."""
    config = one_device(config_of(tmp_path))
    compiled = programs.Programs(here)
    budget, choices = 482_000, [{"model.remat": "none"}, {"train.accumulation": 2}]
    cells = list(frontier.frontier(config, budget, (8, 24), choices, compiled))
    assert len(cells) == 4
    for cell in cells:
        batch, tried = 0, frontier.with_fields(config, cell.choice | dict(seq_len=cell.seq_len))
        unit = tried.train.accumulation
        while compiled.usage(frontier.with_fields(tried, dict(batch_size=batch + unit))).total <= budget:
            batch += unit
        assert (cell.batch, cell.unit) == (batch, unit)
    assert [cell.batch for cell in cells] == [4, 1, 0, 0]  # nothing of two microbatches


def refusing(limit: int, row: int):
    """A compiler that refuses what is larger than the device, as a TPU's does."""

    def usage(config, _):
        needed = 2**20 + row * config.batch_size * config.seq_len
        return memory.Usage(needed, 0, 0, 0) if needed <= limit else memory.Usage(0, 0, needed, 0, limit=limit)

    return usage


def test_what_a_compiler_refuses_does_not_fit(tmp_path, here, monkeypatch):
    monkeypatch.setitem(programs.KINDS, "train", refusing(2**23, 1000))
    config = one_device(config_of(tmp_path))
    cell = frontier.plan(config, 2**23, programs.Programs(here))
    assert cell.batch == (2**23 - 2**20) // 16_000 and cell.next_bytes > 2**23
    with pytest.raises(ConfigError, match=r"--budget='16.00 MiB': CPU has 8.00 MiB per device; give no more"):
        frontier.plan(config, 2**24, programs.Programs(here))
    given = frontier.with_fields(config, dict(batch_size=1000, memory_budget="1GiB"))
    with pytest.raises(
        ConfigError, match="config.batch_size=1000: a step needs 16.26 MiB, more than the 8.00 MiB of CPU"
    ):
        planner.planned(given)


def test_a_budget_above_an_absent_devices_memory_is_refused(tmp_path, here):
    known = programs.Programs(dataclasses.replace(here, name="a card", memory=2**30))
    with pytest.raises(ConfigError, match=r"--budget='1.00 TiB': a card has 1.00 GiB per device; give no more"):
        frontier.plan(one_device(config_of(tmp_path)), 2**40, known)
    assert known.compiled == 0


def test_as_many_tokens_are_tried_as_can_be_counted_and_no_more(tmp_path, here, monkeypatch):
    monkeypatch.setattr(frontier, "COUNTED", 1000)
    monkeypatch.setitem(programs.KINDS, "train", refusing(2**50, 1000))
    config = one_device(config_of(tmp_path))
    with pytest.raises(ConfigError, match=f"{1000 // config.seq_len} rows of {config.seq_len} fit, the most that are"):
        frontier.plan(config, 2**40, programs.Programs(here))


def test_a_refusal_is_read(here):
    """Two wordings of XLA's; any other error is not taken for one."""
    said = "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO"
    said += " temporaries (52.67G) exceeds available HBM (15.75G). HLO module: jit_train_step.\nSee https://x.org/1000"
    found = memory._refused(said)
    assert (found.limit, found.total) == (int(15.75 * 2**30), int(52.67 * 2**30))
    older = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 933.21M of 512.00M hbm. Exceeded by 421M."
    assert memory._refused(older).total == int(933.21 * 2**20)
    assert memory._refused("INTERNAL: 3G of 4G") is None and memory._refused("RESOURCE_EXHAUSTED: no") is None


def test_a_backend_without_memory_analysis_is_said(tmp_path, here, monkeypatch):
    monkeypatch.setattr(memory, "usage_of", lambda program: None)
    with pytest.raises(ConfigError, match="JAX's backend='CPU': does not say what memory a program takes"):
        programs.Programs(here).usage(one_device(config_of(tmp_path)))


def test_a_run_that_goes_on_where_less_fits_is_warned(tmp_path, here, monkeypatch, capsys):
    monkeypatch.setitem(programs.KINDS, "train", refusing(2**30, 1000))
    config = one_device(config_of(tmp_path, batch_size=-1, memory_budget="2MiB"))
    (tmp_path / "config.json").write_text(json.dumps(frontier.with_fields(config, dict(batch_size=200)).to_dict()))
    assert planner.planned(config, str(tmp_path)).batch_size == 200
    assert "warning: a step needs 4.05 MiB here, more than config.memory_budget=2MiB" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            dict(batch_size=2, memory_budget="1MiB", **{"eval.contexts": ()}),
            "config.eval.contexts=(): give rising multiples of 4 tokens",
        ),
        (dict(batch_size=-1), "config.batch_size=-1: plans the largest that fits: give config.memory_budget"),
        (
            dict(batch_size=-1, memory_budget="1KiB"),  # less than the parameters: evaluation's is not what is wrong
            "config.memory_budget='1KiB': too small for a step: 1 x 16 needs",
        ),
        (
            dict(batch_size=-1, memory_budget="700KiB", **{"eval.contexts": (8, 1536)}),
            "config.eval.batch_tokens=64: scoring windows of 1632 alone needs",
        ),
        (
            dict(batch_size=2, memory_budget="700KiB", **{"eval.contexts": (8, 1536)}),
            "config.eval.batch_tokens=64: scoring windows of 1632 alone needs",
        ),
        (
            dict(batch_size=-1, memory_budget="400KiB"),
            "config.memory_budget='400KiB': too small for a step: 1 x 16 needs",
        ),
        (dict(batch_size=-1, memory_budget="24 bananas"), "config.memory_budget='24 bananas': not a size of memory"),
    ],
)
def test_a_budget_that_cannot_be_is_one_line(tmp_path, fields, message):
    config = one_device(config_of(tmp_path, **fields))
    with pytest.raises(ConfigError) as error:
        planner.planned(config)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_a_run_is_scored_on_no_longer_windows_than_are_planned_for(tmp_path):
    config = config_of(tmp_path, **{"eval.contexts": (8, 48), "eval.run_length": 4, "eval.num_targets": 64})
    config.model.vocab_size = 257
    config.data.update(source="text", path=str(Path(__file__).parent), tokenizer="bytes")
    suites = evaluate.make_suites(tokens.open_corpus(config), config, (1, 1, 1))
    lengths = [suite.batches["inputs"].shape[-1] for suite in suites.values()]
    assert max(lengths) == heldout.longest_window(config) == 52
    recall = frontier.with_fields(config, {"data.source": "recall", "data.recall.document_length": 256})
    assert heldout.longest_window(recall) == 256


def test_nothing_is_planned_where_a_folder_or_a_cache_cannot_be_written(tmp_path, here):
    config = one_device(config_of(tmp_path))
    (tmp_path / "memory").write_text("a file")
    with pytest.raises(ConfigError, match="config.data.cache_dir=.*cannot be written"):
        programs.Programs(here).usage(config)
    (tmp_path / "config.json").write_text("[]")
    assert planner._begun(config, str(tmp_path)) is None and planner._begun(config, "x" * 300) is None


def test_a_compiled_program_is_kept_and_a_changed_one_compiled_again(tmp_path, here, monkeypatch):
    config = one_device(config_of(tmp_path))
    first = programs.Programs(here)
    wanted = first.usage(config)
    again = programs.Programs(here)
    assert again.usage(config) == wanted and again.compiled == 0
    changes = [
        {"train.steps": heaps.LONG}, dict(batch_size=8), dict(seq_len=32), {"model.d_ff": 128},
        {"model.remat": "block"}, {"train.accumulation": 2},
        {"optimizer.name": "muon"}, {"mesh.fsdp": True}, {"data.mask_documents": True},
    ]  # fmt: skip
    keys = {programs.key(frontier.with_fields(config, change), "train", here) for change in changes}
    keys |= {programs.key(config, "train", here), programs.key(config, "eval", here)}
    assert len(keys) == len(changes) + 2
    assert programs.key(frontier.with_fields(config, {"train.steps": 7, "seed": 1}), "train", here) == programs.key(
        config, "train", here
    )
    for changed in (dict(name="another"), dict(devices=2 * here.devices)):
        assert programs.key(config, "train", dataclasses.replace(here, **changed)) not in keys
    for of_the_compiler in ("versions", "compiler_options"):
        with monkeypatch.context() as patch:
            patch.setattr(target.Target, of_the_compiler, property(lambda _: {"jaxlib": "0.0"}))
            assert programs.key(config, "train", here) not in keys, of_the_compiler
    monkeypatch.setattr(programs.metadata, "version", lambda name: "0.0")  # of Flax and Optax
    assert programs.key(config, "train", here) not in keys
    monkeypatch.undo()
    damaged = next((tmp_path / "memory").glob("*.json"))
    damaged.write_text("{")
    assert again.usage(config) == wanted and again.compiled == 1


def imported(module: str) -> set[str]:
    """The files of research/ (as SOURCES names them) that one of them imports."""
    root = Path(programs.__file__).resolve().parents[1]
    found = set()
    for node in ast.walk(ast.parse((root / f"{module}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "research":
            folder = node.module.split(".")[1:]
            names = ["/".join([*folder, alias.name]) for alias in node.names] + ["/".join(folder)]
            found |= {name for name in names if name and (root / f"{name}.py").exists()}
    return found


def test_every_file_that_a_program_is_traced_from_is_in_its_key():
    """All that the programs' modules import, but for what only reads text, files and configs on the host."""
    reached, ahead = set(), {"analysis/memory"}
    while ahead:
        module = ahead.pop()
        reached.add(module)
        ahead |= imported(module) - reached
    host = {name for name in reached if name.startswith("data/")}
    host |= {"checkpoint", "config", "flops", "sizes", "stages", "target"}
    assert set(programs.SOURCES) == reached - host


def test_evaluation_counts_the_optimizer_state_and_not_remat(tmp_path, here):
    config = one_device(config_of(tmp_path))
    found = memory.eval_usage(config, here)
    state = memory.state_bytes(config, here)
    assert found.total > sum(state.values())
    assert programs.key(frontier.with_fields(config, {"model.remat": "block"}), "eval", here) == programs.key(
        config, "eval", here
    )


@pytest.mark.parametrize(
    ("text", "size"),
    [("24G", 24 * 2**30), ("24GiB", 24 * 2**30), ("24GB", 24 * 10**9), ("1.5 MiB", 3 * 2**19), ("1048576", 2**20),
     ("64b", 64), ("2tib", 2**41)],
)  # fmt: skip
def test_sizes_are_read_as_coreutils_reads_them(text, size):
    assert sizes.parse(text, "--budget") == size


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1GiB", "0", "24GiBs", "1e3", "24 G B", "0.2B", "9" * 400 + "GiB", "9999999TiB", "\u0662GiB"]
)
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ConfigError, match="--budget=.*not a size of memory"):
        sizes.parse(text, "--budget")


@pytest.mark.parametrize("text", ["2", "1.5", " 800 "])
def test_a_size_whose_unit_was_forgotten_is_refused(text):
    with pytest.raises(ConfigError, match=f"--memory=.* is {int(float(text))} bytes; write a unit"):
        sizes.parse(text, "--memory")


@pytest.mark.parametrize(
    ("size", "text"), [(512, "512 B"), (1536, "1.50 KiB"), (24 * 2**30, "24.00 GiB"), (2**30 * 200, "200 GiB")]
)
def test_sizes_are_shown_with_three_digits(size, text):
    assert sizes.show(size) == text
