"""The tables of a report, in Markdown."""

from collections.abc import Sequence
from typing import Any

from research.analysis import comparison, findings
from research.analysis.original import (
    CORPUS_TOKENS,
    FIRST_TOKEN_ENTROPY,
    LEARNING_RATE,
    ORIGINAL,
    STEPS,
)
from research.analysis.study import Run

LEAKING = "**LEAKING**"


def original_table(runs: Sequence[Run]) -> str:
    """The columns of the original experiment, its rows beside ours; losses at own length."""
    rows = []
    theirs = {row.strategy: row for row in ORIGINAL}
    names = list(dict.fromkeys([*(run.strategy for run in runs), *theirs]))
    ours = {run.strategy: run for run in runs}
    for name in names:
        if (run := ours.get(name)) is not None:
            rows.append(_own_row(run))
        if (row := theirs.get(name)) is not None:
            loss = f"{row.loss:.4f} {LEAKING}, floor {row.floor:.4f}"
            rows.append(
                [
                    name,
                    "original",
                    f"{row.batch_size} x {row.seq_len}",
                    loss,
                    f"{row.accuracy:.2%} {LEAKING}",
                    f"{row.minutes:.2f} min",
                    f"{row.tokens_per_second:,.0f}",
                    f"{row.peak_gb:.2f} GB",
                ]
            )
    header = [
        "strategy",
        "experiment",
        "B x T",
        "val loss",
        "accuracy",
        "time",
        "tokens/s",
        "peak memory",
    ]
    note = (
        "Losses in nats a token at each strategy's own length: not the same task for each, and not "
        f"comparable between the two experiments. The original: 79 M parameters, {STEPS:,} steps "
        f"at learning rate {LEARNING_RATE}, windows of {CORPUS_TOKENS:,} tokens split at random, "
        f"time with its validation; floors assume H(first) = {FIRST_TOKEN_ENTROPY:g} nats. Ours: "
        "time is training alone; peak memory is the device's where it reports one, else that of "
        "the compiled step."
    )
    return _table(header, rows) + "\n\n" + note


def _own_row(run: Run) -> list[str]:
    if not run.finished:
        return [run.strategy, "this study", run.status, *["–"] * 5]
    result, own = run.result, run.result["eval"]["own"]
    memory = result["memory_bytes"]
    loss = f"{own['loss']:.4f}"
    if leaks(run):
        loss += f" {LEAKING}, floor {comparison.floor(run):.4f}"
    return [
        run.strategy,
        "this study",
        _shape(run),
        loss,
        _marked(f"{own['accuracy']:.2%}", run),
        findings.duration(result["seconds"]["train"]),
        f"{result['tokens_per_second']:,.0f}",
        _gigabytes(memory.get("device_peak") or memory["compiled_step"]),
    ]


def context_table(runs: Sequence[Run], compared: dict[str, Any]) -> str:
    """Losses by context on the same targets, bits a byte at the longest shared one, and costs."""
    contexts, shared = compared["contexts"], compared["shared_contexts"][-1:]
    header = ["strategy", "B x T", "own length", *(f"context {c:,}" for c in contexts)]
    header += [f"bits/byte at {c:,}" for c in shared]
    header += ["train time", "tokens/s", "compiled step", "process peak"]
    rows = []
    for run in runs:
        if not run.finished:
            rows.append([run.strategy, run.status, *["–"] * (len(header) - 2)])
            continue
        result, memory = run.result, run.result["memory_bytes"]
        cells = [f"{result['eval']['own']['loss']:.4f}", *(_context_cell(run, c) for c in contexts)]
        cells += [_number(result["eval"]["contexts"][str(c)]["bits_per_byte"]) for c in shared]
        rows.append(
            [
                run.strategy,
                _shape(run),
                *(_marked(cell, run) for cell in cells),
                findings.duration(result["seconds"]["train"]),
                f"{result['tokens_per_second']:,.0f}",
                _gigabytes(memory["compiled_step"]),
                _gigabytes(memory["process_peak"]),
            ]
        )
    entropies = sorted({f"{run.result['unigram_entropy']:.4f}" for run in runs if run.finished})
    note = f"Losses in nats a token; unigram entropy of the held-out text: {', '.join(entropies)}."
    if any("†" in cell for row in rows for cell in row):
        note += " † longer than the strategy was trained at."
    if any("–" in row for row in rows):
        note += " –: not scored; a context is scored where its windows fit in the trained length."
    return _table(header, rows) + "\n\n" + note


def _context_cell(run: Run, context: int) -> str:
    beyond = not comparison.within_length(context, run)
    loss = comparison.loss_at(run, context)
    return _number(loss) + ("†" if beyond and loss is not None else "")


def difference_table(compared: dict[str, Any]) -> str:
    """Every pair at every context that both were scored at, and what the intervals cover."""
    if not compared["differences"]:
        return "No two finished runs were scored on the same held-out targets: nothing is compared."
    rows = [
        [
            f"{d['context']:,}",
            f"{d['a']} - {d['b']}",
            _interval(d),
            findings.verdict(d),
            f"{d['documents']:,}",
        ]
        for d in compared["differences"]
    ]
    header = ["context", "difference", "nats a token [95 %]", "lower loss", "documents"]
    note = (
        "Paired bootstrap over held-out documents, weighted by tokens. There is one run of each "
        "strategy: an interval covers the choice of held-out documents, not the seed, and is not "
        "corrected for the number of comparisons. Repeat with other `config.seed` before believing "
        "a small difference."
    )
    for a, b in compared["not_compared"]:
        note += f" {a} and {b} are not compared: their held-out targets differ."
    return _table(header, rows) + "\n\n" + note


def longer_context_table(compared: dict[str, Any]) -> str:
    if not compared["longer_context"]:
        return "No strategy was scored at two contexts within its own length."
    rows = [
        [
            d["strategy"],
            f"{d['from']:,} to {d['to']:,}",
            _interval(d),
            ("yes" if d["mean"] < 0 else "no, it hurts") if d["shown"] else findings.verdict(d),
        ]
        for d in compared["longer_context"]
    ]
    note = "Loss at the longest context within the strategy's length minus loss at the shortest shared one."
    header = ["strategy", "context", "change, nats a token [95 %]", "helps"]
    return _table(header, rows) + "\n\n" + note


def equal_seconds_table(compared: dict[str, Any]) -> str:
    equal = compared["equal_seconds"]
    if equal["at"] is None or not equal["losses"]:
        return "The runs share no evaluation on the same targets: nothing is compared."
    names = list(next(iter(equal["losses"].values())))
    rows = [
        [f"{int(context):,}", *(_number(losses[name]) for name in names)] for context, losses in equal["losses"].items()
    ]
    note = (
        f"Held-out loss after {findings.duration(equal['at'])} of training, where the fastest run "
        "ends. Read off the evaluations by linear interpolation, without an interval."
    )
    return _table(["context", *names], rows) + "\n\n" + note


def leaks(run: Run) -> bool:
    """Whether a run's losses measure memorisation."""
    return run.result["protocol"] == "published"


def _marked(cell: str, run: Run) -> str:
    return f"{cell} {LEAKING}" if leaks(run) and cell != "–" else cell


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _shape(run: Run) -> str:
    return f"{run.result['batch_size']} x {run.result['seq_len']}"


def _interval(difference: dict[str, Any]) -> str:
    if difference["low"] is None:
        return f"{difference['mean']:+.4f} [too few documents]"
    return f"{difference['mean']:+.4f} [{difference['low']:+.4f}, {difference['high']:+.4f}]"


def _gigabytes(count: float | None) -> str:
    return "–" if count is None else f"{count / 1e9:.2f} GB"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows]]
    return "\n".join(lines)
