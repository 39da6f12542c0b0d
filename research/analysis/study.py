"""What a study is made of: runs, and the arms that they form.

A run is one (strategy, setting, seed), in the folder `<strategy>-<setting>-<seed>`. Settings: `independent` (each row
from its own place of the corpus), `paired` (every strategy sees the same tokens at each step), `recall` (the synthetic
recall task).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

FINISHED, MISSING = "finished", "missing"
SETTINGS = ("independent", "paired", "recall")
TARGETS = ("document", "position", "distance")  # arrays of the targets, not of a run's losses


@dataclass(frozen=True)
class Key:
    """Which run of a study."""

    strategy: str
    setting: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.strategy}-{self.setting}-{self.seed}"


@dataclass(frozen=True)
class Run:
    """One run; `result` and what follows are empty unless it is finished."""

    key: Key
    status: str  # 'finished', 'missing' or 'failed: exit code N'
    result: dict[str, Any] | None = None  # result.json
    config: dict[str, Any] | None = None  # config.json, without folders of the machine
    curve: tuple[dict[str, float], ...] = ()  # rows of metrics.jsonl by step
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)  # of heldout_losses.npz, own windows binned
    environment: dict[str, Any] | None = None  # environment.json: versions, and the commit of the code

    @property
    def finished(self) -> bool:
        return self.status == FINISHED

    @property
    def losses(self) -> dict[int, np.ndarray]:
        """Context -> [targets] nats."""
        found = {name[5:]: array for name, array in self.arrays.items() if name.startswith("loss_")}
        return {int(name): array for name, array in found.items() if name.isdecimal()}


@dataclass(frozen=True)
class Arm:
    """The finished runs of one strategy in one setting, by seed."""

    strategy: str
    setting: str
    runs: tuple[Run, ...]

    @property
    def seeds(self) -> list[int]:
        return [run.key.seed for run in self.runs]

    @property
    def first(self) -> dict[str, Any]:
        """The result of the first run: what does not differ between seeds can be read off it."""
        return self.runs[0].result

    @property
    def grows(self) -> bool:
        """Whether its rows grow longer during a run (config.train.stages)."""
        return len(self.first.get("stages") or ()) > 1

    @property
    def contexts(self) -> list[int]:
        """Contexts (tokens) that every run was scored at, rising."""
        return sorted(set.intersection(*(set(run.losses) for run in self.runs)))

    def losses(self, context: int, seeds: Collection[int]) -> np.ndarray:
        """[seeds, targets] nats of the runs with these seeds, in float64."""
        return np.stack([run.losses[context].astype(np.float64) for run in self.runs if run.key.seed in seeds])

    @property
    def reach(self) -> int | None:
        """The longest context (tokens) within the trained length that every run was scored at."""
        return max((c for c in self.contexts if self.within(c)), default=None)

    def within(self, context: int) -> bool:
        """Whether windows of a context fit in the trained length: as evaluated; else if 1.25 times the context does."""
        scored = self.first.get("eval", {}).get("contexts", {}).get(str(context))
        return not scored["beyond"] if scored else 5 * context // 4 <= self.first["seq_len"]


def arms(runs: Sequence[Run], setting: str) -> list[Arm]:
    """The arms of a setting that have a finished run, in the order of the runs.

    Where blocks are as long as a strategy's rows, paired and independent order are one: its independent runs serve
    as its paired ones, of seeds that it has no paired run of. (Not of rows that grow: the shorter ones differ.)
    """
    finished = [run for run in runs if run.finished]
    chosen = [run for run in finished if run.key.setting == setting]
    if setting == "paired" and chosen:
        block = chosen[0].config["data"]["shuffle_block"]
        there = {(run.key.strategy, run.key.seed) for run in chosen}
        independent = [run for run in finished if run.key.setting == "independent"]
        whole = [run for run in independent if shapes_of(run.result) == [(run.result["batch_size"], block)]]
        alike = [run for run in whole if run.result["protocol"] == "clean"]
        chosen += [run for run in alike if (run.key.strategy, run.key.seed) not in there]
    found: dict[str, list[Run]] = {}
    for run in chosen:
        found.setdefault(run.key.strategy, []).append(run)
    return [Arm(name, setting, tuple(sorted(own, key=lambda r: r.key.seed))) for name, own in found.items()]


def shapes_of(about: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Rows and tokens of a row, of each stage of what a result, or an arm of an analysis, is about."""
    return [(stage["batch_size"], stage["seq_len"]) for stage in about.get("stages") or [about]]


def lengths_of(about: Mapping[str, Any]) -> list[int]:
    """Tokens of a row, in each stage."""
    return [stage["seq_len"] for stage in about.get("stages") or [about]]


def shape(about: Mapping[str, Any]) -> str:
    """Such as '4 x 2048', or '64 x 128 to 4 x 2048' where rows grow."""
    ends = dict.fromkeys((shapes_of(about)[0], shapes_of(about)[-1]))
    return " to ".join(f"{rows} x {length}" for rows, length in ends)


def same_targets(a: Run, b: Run) -> bool:
    """Whether two runs were scored on the same held-out tokens of the same corpus."""
    if not a.finished or not b.finished or a.result["fingerprint"] != b.result["fingerprint"]:
        return False
    return all(
        np.array_equal(a.arrays[name], b.arrays[name]) for name in TARGETS if name in a.arrays or name in b.arrays
    )
