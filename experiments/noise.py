"""How noisy is the gradient of a step, in many short rows or in few long ones? Measures it for a study's models.

    python -m experiments.ablation --workdir=runs/study
    python -m experiments.noise --workdir=runs/study
    python -m experiments.noise --workdir=runs/study --runs=balanced-independent-43 --batches=256

At the weights of each run's newest checkpoint the gradient is taken over micro-batches of as many tokens as the longest
rows have, cut into rows of every length of the study up to the run's own: each from a place of its own, and all of a
micro-batch from one. The numbers go into noise.json of the study's folder, and into its report, which is made again.
--runs: folders of the study; the first seed of each strategy in independent order if not given. The same command goes
on where it was stopped.
Exit codes: 0, measured; 2, a mistake, nothing measured; 4, no checkpoint can be read; 130 or 143, stopped.
"""

import argparse
import hashlib
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from experiments import ablation
from experiments.flags import Parser, as_folder
from research import cores, files, signals
from research.analysis import archive
from research.analysis import noise as analysis
from research.analysis.tables import duration
from research.config import ConfigError

SEED = 1_000_003  # of the micro-batches' order: of no run, whose own text would come in its own order


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code."""
    from research import checkpoint

    try:
        arguments = parse(sys.argv[1:] if argv is None else argv)
        with signals.at_once():
            measure_all(arguments.workdir, choose(arguments.workdir, arguments.runs), arguments.batches)
        return ablation.report_only(arguments.workdir)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except checkpoint.DamagedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 4
    except signals.Interrupted as stopped:
        print("stopped; the same command goes on from there", file=sys.stderr)
        return 128 + stopped.signal


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser("noise", __doc__)
    parser.add_argument("--workdir", type=as_folder, required=True, help="of a study that experiments.ablation made")
    parser.add_argument("--runs", type=ablation.names, default=[], help="folders in it, divided by commas")
    parser.add_argument("--batches", type=int, default=128, help="micro-batches per order and length; default 128")
    return parser.parse_args(argv)


def choose(workdir: Path, given: Sequence[str]) -> list[str]:
    """The names of the runs to measure. Raises: ConfigError for one that is not there, not on text, or leaks."""
    there = text_runs(workdir)
    first = {key["strategy"]: name for name, key in reversed(there.items()) if key["setting"] == "independent"}
    chosen = list(given) or [name for name in there if name in first.values()]
    if not chosen:
        raise ConfigError("--workdir", str(workdir), "holds no finished run in independent order")
    for name in chosen:
        if name not in there:
            raise ConfigError("--runs", name, f"is no finished run on text of this study; choose of {', '.join(there)}")
        if archive.read_json(workdir / name / "result.json")["protocol"] != "clean":
            raise ConfigError("--runs", name, "LEAKING: the published protocol; measure a run of the clean one")
        if not any((workdir / name / "checkpoints").glob("*")):
            raise ConfigError("--runs", name, "its checkpoints are gone; train it again, in another folder")
    return chosen


def text_runs(workdir: Path) -> dict[str, dict[str, Any]]:
    """name -> strategy, setting and seed of the study's finished runs on text. Raises: ConfigError where none is."""
    if not (workdir / "ablation.json").exists():
        raise ConfigError(
            "--workdir", str(workdir), "holds no study (no ablation.json); experiments.ablation makes one"
        )
    keys, exit_codes = ablation.recorded(workdir)
    named = {key.name: asdict(key) for key in keys if key.setting != "recall" and not exit_codes.get(key.name)}
    return {name: run for name, run in named.items() if (workdir / name / "result.json").exists()}


def measure_all(workdir: Path, chosen: Sequence[str], batches: int) -> None:
    """Adds what is missing of the runs' measurements to noise.json, each as soon as it is there.

    Raises: ConfigError where the text is too short for them, or noise.json holds those of another size.
    """
    cores.set_options()
    from research import load, noise, train  # JAX starts here
    from research.data import tokens

    configs = {name: load.read_config(workdir / name) for name in text_runs(workdir)}
    lengths = sorted({config.seq_len for config in configs.values()})
    if uneven := [length for length in lengths if lengths[-1] % length]:
        said = ", ".join(map(str, uneven))
        print(f"rows of {said} are left out: they do not divide the longest, {lengths[-1]}", file=sys.stderr)
        lengths = [length for length in lengths if length not in uneven]
    state = _begun(workdir, lengths[-1], batches)
    cells = [("independent", length) for length in lengths] + [("paired", length) for length in lengths[:-1]]
    todo = [(run, *cell) for run in chosen for cell in cells if cell[1] <= configs[run].seq_len]
    marks = {run: hashlib.sha256((workdir / run / "result.json").read_bytes()).hexdigest()[:16] for run in chosen}
    fresh = [e for e in state["measured"] if e.get("result") == marks.get(e["run"], e.get("result"))]
    state["measured"] = fresh  # a run that was trained again is measured again
    done = {(entry["run"], entry["order"], entry["length"]) for entry in fresh}
    todo = [entry for entry in todo if entry not in done]
    began, loaded = time.monotonic(), None
    for number, (run, order, length) in enumerate(todo):
        mean = (time.monotonic() - began) / max(1, number)
        left = f", about {duration(mean * (len(todo) - number))} left" if number else ""
        said = f"{run}: {order}, rows of {length} ({number + 1} of {len(todo)}{left})"
        print(said, file=sys.stderr, flush=True)
        if loaded is None or loaded[0] != run:
            loaded = None  # its memory, before the next takes its own
            train.keep_compiled(configs[run])
            loaded = run, load.load(workdir / run), tokens.open_corpus(configs[run])
        config = noise.layout(configs[run], order, length, lengths[-1], SEED)
        found = noise.measure(loaded[1], loaded[2], config, batches)
        about = text_runs(workdir)[run] | {"step": loaded[1].step, "order": order, "length": length}
        consumed = loaded[1].step * configs[run].batch_size * configs[run].seq_len
        about |= {"run": run, "result": marks[run], "seq_len": configs[run].seq_len, "consumed": consumed}
        state["measured"].append(about | found)
        files.write_json(workdir / analysis.FILE, state)


def _begun(workdir: Path, tokens: int, batches: int) -> dict[str, Any]:
    """noise.json as far as it goes. Raises: ConfigError where its measurements are of another size."""
    from research import metrics, noise

    identity = {"tokens": tokens, "batches": batches, "seed": SEED, "groups": list(noise.NAMES)}
    state = analysis.read(workdir) or identity | {"measured": []}
    for name, value in identity.items():
        if state.get(name) != value:
            message = f"{analysis.FILE} there is of {name} {state.get(name)}; remove it to measure anew"
            raise ConfigError(f"--{name}" if name == "batches" else name, value, message)
    return state | {"environment": metrics.environment()}


if __name__ == "__main__":
    sys.exit(main())
