"""A study of shapes whose runs are fakes in this process, with losses by a law that tests know."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from experiments import ledger
from experiments import shapes as script
from experiments.child import Interrupted
from research.analysis import shapes
from research.analysis.study import Key
from tests.fake_runs import write_run

GRID = ("--lengths=128,512", "--tokens_per_step=1024,4096,16384", "--config.train.tokens=65536")
SHAPES = ("8x128", "32x128", "128x128", "2x512", "8x512", "32x512")
ROWS, LENGTH, FEW_STEPS = 0.3, 0.5, 0.2  # nats a factor of 4: of rows, of length at as many rows, of the steps
STEPS = 4  # of 16,384 tokens in 65,536


def merit(shape: str, tokens: int) -> float:
    """More rows help by ROWS, longer ones harm by LENGTH, fewer steps harm by FEW_STEPS, each a factor of four."""
    rows, length = shapes.sizes(shape)
    steps = tokens / rows / length
    return 0.5 * (-ROWS * math.log2(rows) + LENGTH * math.log2(length) - FEW_STEPS * math.log2(steps)) - 1.0


def best_rate(shape: str, budget: str = "tokens") -> float:
    rows, length = shapes.sizes(shape)
    return {1024: 0.02, 2048: 0.04, 4096: 0.04, 16384: 0.16}[rows * length] * (2 if budget == "steps" else 1)


def name_of(shape: str, budget: str, seed: int) -> str:
    """Of a run that compares; the largest steps have no runs at equal steps."""
    return f"{shape}-{budget}-rate{best_rate(shape, budget):g}-seed{seed}"


def fields_of(command: Sequence[str]) -> dict[str, str]:
    return dict(part.removeprefix("--config.").split("=", 1) for part in command[2:])


def study(
    workdir: Path,
    *arguments: str,
    exits: dict[str, int] | None = None,
    stops: str = "",
    stopped_after: bool = False,
    checked: int = 0,
) -> int:
    """The exit code of a study; its runs are told to `<workdir>/calls`, a JSON list of (name, command) a line.

    exits: run -> exit code; stops: the run that a signal stops, `stopped_after` its end; checked: the exit code of
    the check.
    """

    def run_child(command: Sequence[str]) -> int:
        if command[0] == "check":
            return checked
        fields = fields_of(command)
        folder = Path(fields["--workdir"])
        name = str(folder.relative_to(workdir))
        with open(workdir / "calls", "a") as file:
            file.write(json.dumps([name, list(command)]) + "\n")
        if name == stops:
            if stopped_after:
                _write(folder, fields)
            raise Interrupted(130)
        if code := (exits or {}).get(name):
            return code
        _write(folder, fields)
        return 0

    with pytest.MonkeyPatch.context() as patch:
        for module in (script, ledger):
            patch.setattr(module, "run_child", run_child)
        return script.main([f"--workdir={workdir}", *GRID, *arguments], train=("train",), check=("check",))


def _write(folder: Path, fields: dict[str, str]) -> None:
    shape, rate = fields["strategy"], float(fields["optimizer.learning_rate"])
    rows, length = shapes.sizes(shape)
    budget = "steps" if "train.steps" in fields else "tokens"
    tokens = int(fields["train.steps"]) * rows * length if budget == "steps" else int(fields["train.tokens"])
    loss = merit(shape, tokens) + 0.02 * math.log2(rate / best_rate(shape, budget)) ** 2
    key = Key(shape, folder.name, int(fields.get("seed", 42)))
    result = write_run(folder, key, offset=loss, noise=0.02, spread=0.01)
    result |= {"tokens": tokens, "steps": tokens // (rows * length)}
    result |= {"mesh": {"data": 1 if rows < 8 else 2, "expert": 1, "seq": 1}}
    result["memory_bytes"]["compiled_step"] = 1e8 + 2e4 * rows * length
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "data_manifest.json").write_text(json.dumps({"files": {"heldout.npy": {"sha256": "the same"}}}))
    (folder / "checkpoints").mkdir()


def commands(workdir: Path) -> list[tuple[str, list[str]]]:
    """(run, command) in the order in which they were given."""
    path = workdir / "calls"
    return [tuple(json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def calls(workdir: Path) -> list[str]:
    return [name for name, _ in commands(workdir)]


def results_of(workdir: Path) -> dict:
    return json.loads((workdir / "report" / "results.json").read_text())
