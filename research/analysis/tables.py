"""The main tables of a report, from the JSON values of its analysis."""

import math
from collections.abc import Sequence
from typing import Any

from research.analysis import original
from research.analysis.decomposition import signed
from research.analysis.page import Section, Table
from research.analysis.study import shape

LEAKING = "**LEAKING**"


def main_table(analysis: dict[str, Any]) -> Table:
    """Every arm at every context it was trained at, with intervals."""
    contexts = [str(c) for c in analysis["contexts"]]
    settings = {arm["setting"] for arm in analysis["arms"]}
    rows = []
    for arm in analysis["arms"]:
        name = arm["strategy"] + (f", {arm['setting']}" if len(settings) > 1 else "")
        cells = ["–" if arm["contexts"][c]["beyond"] else _loss(arm["contexts"][c], arm) for c in contexts]
        rows.append((name, shape(arm), str(len(arm["seeds"])), *cells))
    some = analysis["arms"][0]
    note = (
        f"Held-out loss in nats per token, mean ± standard deviation over seeds, of {some['targets']:,} targets in "
        f"{some['documents']} documents. Unigram entropy: {some['unigram_entropy']:.3f}. –: longer than the strategy "
        "was trained at (see the curves)."
    )
    return Table(("strategy", "B x T", "seeds", *(f"context {int(c):,}" for c in contexts)), tuple(rows), note)


def units_table(analysis: dict[str, Any]) -> Table:
    """The same in other units, at the longest context that all share and at the longest of each strategy."""
    settings = {arm["setting"] for arm in analysis["arms"]}
    rows = []
    for arm in analysis["arms"]:
        name = arm["strategy"] + (f", {arm['setting']}" if len(settings) > 1 else "")
        own = [c for c in analysis["contexts"] if not arm["contexts"][str(c)]["beyond"]]
        for context in sorted({*analysis["shared_contexts"][-1:], *own[-1:]}):
            loss = arm["contexts"][str(context)]["mean"]
            bits, right = (arm.get(unit, {}).get(str(context)) for unit in ("bits_per_byte", "accuracy"))
            mark = f" {LEAKING}" if arm["own"]["leaking"] else ""
            cells = [f"{loss:.3f}{mark}", f"{math.exp(loss):.2f}{mark}"]
            cells += ["–" if bits is None else f"{bits:.4f}{mark}", "–" if right is None else f"{right:.2%}{mark}"]
            rows.append((name, shape(arm), f"{context:,}", *cells))
    columns = ("strategy", "B x T", "context", "nats per token", "perplexity", "bits per byte", "accuracy")
    note = (
        "Means over seeds (perplexity: e to the mean loss). Bits per byte do not depend on the tokenizer: they compare "
        "with other work on the same text."
    )
    if any("–" in row for row in rows):
        note += " –: not measured."
    return Table(columns, tuple(rows), note)


def _loss(entry: dict[str, Any], arm: dict[str, Any]) -> str:
    text = f"{entry['mean']:.3f}" + (f" ± {entry['sd']:.3f}" if entry["sd"] is not None else "")
    return f"{text} {LEAKING}" if arm["own"]["leaking"] else text


def differences(analysis: dict[str, Any]) -> Section:
    """Every pair at its longest context, what its interval covers, and how many seeds would tell."""
    if not analysis["differences"]:
        return Section("Differences", "No two strategies were scored on the same targets: nothing is compared.")
    rows = tuple(
        (
            d["setting"],
            f"{d['context']:,}",
            f"{d['a']} - {d['b']}",
            signed(d),
            "–" if d["p_holm"] is None else f"{d['p_holm']:.2g}",
            verdict(d),
        )
        for d in analysis["differences"]
    )
    seeds, documents = (_from_to([d[name] for d in analysis["differences"]]) for name in ("seeds", "documents"))
    tested = sum(d["p_holm"] is not None for d in analysis["differences"])
    drawn = "seeds and held-out documents" if max(d["seeds"] for d in analysis["differences"]) > 1 else "documents"
    family = f"{tested} comparisons of this table"
    grow = {arm["strategy"] for arm in analysis["arms"] if arm.get("stages")}
    if apart := sum(d["p_holm"] is not None and bool({d["a"], d["b"]} & grow) for d in analysis["differences"]):
        family = f"{tested - apart} comparisons of rows of one length, and over {apart} with rows that grow apart"
    note = (
        "At the longest context that all share, and at the longest of the pair. Nats per token [95 %: "
        f"{drawn} resampled in pairs, each interval by itself]; p after Holm's correction over {family}. Seeds of a "
        f"pair: {seeds}; documents: {documents}."
    )
    tables = [Table(("order", "context", "difference", "nats per token [95 %]", "p (Holm)", "lower loss"), rows, note)]
    if analysis["power"]:
        tables.append(_power(analysis["power"]))
    return Section("Differences", "", tuple(tables))


def _from_to(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low}" if low == high else f"{low} to {high}"


def verdict(difference: dict[str, Any]) -> str:
    """The strategy with the lower loss, or that no difference is shown."""
    if not difference["shown"]:
        alone = difference["low"] is not None and difference["low"] * difference["high"] > 0
        return "not shown after Holm's correction" if alone else "no difference shown"
    return difference["a"] if difference["mean"] < 0 else difference["b"]


def _power(power: Sequence[dict[str, Any]]) -> Table:
    deltas = list(power[0]["seeds"])
    rows = tuple(
        (p["setting"], f"{p['a']} - {p['b']}", f"{p['sd']:.4f}", *(f"{p['seeds'][d]:,}" for d in deltas)) for p in power
    )
    note = (
        f"At context {power[0]['context']}. Seeds that a paired t test needs to find a difference of so many nats "
        "per token with 80 % power at the 5 % level, from the spread over seeds of the paired difference seen here, "
        "itself of few seeds. On these held-out documents: more seeds do not make their choice surer. Before Holm's "
        "correction."
    )
    columns = ("order", "difference", "sd over seeds", *(f"seeds for {d} nats" for d in deltas))
    return Table(columns, rows, note)


def context_section(analysis: dict[str, Any]) -> Section:
    """What each arm gains from context, where it ends, and learning inside a window."""
    rows = []
    for entry in analysis["context"]:
        gain = entry["gains"][-1] if entry["gains"] else None
        effective = entry["effective"]
        rows.append(
            (
                f"{entry['strategy']}, {entry['setting']}",
                "–" if gain is None else f"{signed(gain)} ({gain['from']:,} to {gain['to']:,})",
                "–" if entry["slope"] is None else signed(entry["slope"]),
                "–" if effective is None else _effective(effective),
                "; ".join(f"{signed(icl)} ({icl['late']} - {icl['early']})" for icl in entry["icl"]) or "–",
            )
        )
    note = (
        "Nats per token [95 %]. Gain: loss at the shortest context less loss at the longest within the trained length. "
        "Effective context: the shortest from which no longer one gains more than 0.01; ≥: the loss still falls at the "
        "longest. In-context learning: loss around a late place of a window less that around an early one (± 8 "
        "places; below zero: it learns inside the window); windows cross documents."
    )
    columns = ("strategy, order", "gain from context", "gain a doubling", "effective context", "in-context learning")
    return Section("What context is worth", "", (Table(columns, tuple(rows), note),))


def _effective(found: dict[str, Any]) -> str:
    ends = "" if found["low"] is None else f" [{found['low']:,.0f}, {found['high']:,.0f}]"
    return f"{'≥ ' if found['censored'] else ''}{found['mean']:,.0f}{ends}"


def costs(analysis: dict[str, Any]) -> Section:
    """What a step of each strategy costs."""
    rows = tuple(
        (
            arm["strategy"],
            shape(arm),
            f"{arm['step_seconds']:.3g} s ({arm['step_spread'][0]:.3g} to {arm['step_spread'][1]:.3g})",
            f"{arm['tokens_per_second']:,.0f}",
            f"{arm['flops'] / arm['tokens'] / 1e6:.1f}",
            gigabytes(arm["memory_bytes"].get("compiled_step")),
            gigabytes(arm["memory_bytes"].get("process_peak")),
            gigabytes(arm["memory_bytes"].get("device_peak")),
        )
        for arm in analysis["arms"]
        if arm["setting"] == analysis["arms"][0]["setting"]
    )
    columns = (
        "strategy", "B x T", "step (p10 to p90)", "tokens/s", "MFLOP per token",
        "compiled step", "process peak", "device peak",
    )  # fmt: skip
    note = (
        "Of the least disturbed run of each strategy. Where rows grow, the mean step, and p10 and p90 of all. FLOPs: 6 "
        "a active parameter and causal attention, analytic. Memory: the compiled training step (arguments, outputs, "
        "temporaries), of the longest rows; the most the process held, with compilation; the device's allocator where "
        "it reports one."
    )
    return Section("What a step costs", "", (Table(columns, rows, note),))


def original_section(analysis: dict[str, Any]) -> Section:
    """The columns of the original experiment, its rows beside ours; losses at own length, floors beside what leaks."""
    rows = []
    ours = {arm["strategy"]: arm for arm in reversed(analysis["arms"])}
    theirs = {row.strategy: row for row in original.ORIGINAL}
    for name in dict.fromkeys([*(arm["strategy"] for arm in analysis["arms"]), *theirs]):
        if arm := ours.get(name):
            rows.append(_own_row(arm))
        if row := theirs.get(name):
            memory = f"{row.peak_gb:.2f} GB"
            costs_ = (f"{row.minutes:.2f} min", f"{row.tokens_per_second:,.0f}", memory)
            loss = f"{row.loss:.4f} {LEAKING}"
            accuracy = f"{row.accuracy:.2%} {LEAKING}"
            shape_ = f"{row.batch_size} x {row.seq_len}"
            rows.append((name, "original", shape_, loss, f"{row.floor:.4f}", accuracy, *costs_))
    columns = ("strategy", "experiment", "B x T", "val loss", "floor", "accuracy", "time", "tokens/s", "peak memory")
    note = (
        "Losses in nats per token at each strategy's own length: not the same task for each, and not comparable "
        "between the two experiments. The floor under a loss that leaks is (ln N - H(first token)) / T, with N "
        "windows: what is left for a model that has memorised them all (for the original, H is assumed to be "
        f"{original.FIRST_TOKEN_ENTROPY:g} nats). The original: 79 M parameters, {original.STEPS:,} steps at learning "
        f"rate {original.LEARNING_RATE}, windows of {original.CORPUS_TOKENS:,} tokens split at random, time with its "
        "validation. Ours: time of training alone."
    )
    return Section("The original's table, and ours", "", (Table(columns, tuple(rows), note),))


def _own_row(arm: dict[str, Any]) -> tuple[str, ...]:
    own, memory = arm["own"], arm["memory_bytes"]
    mark = f" {LEAKING}" if own["leaking"] else ""
    return (
        arm["strategy"],
        "this study",
        shape(arm),
        f"{own['mean']:.4f}{mark}",
        f"{own['floor']:.4f}" if own["leaking"] else "–",
        f"{own['accuracy']:.2%}{mark}",
        duration(arm["steps"] * arm["step_seconds"]),
        f"{arm['tokens_per_second']:,.0f}",
        gigabytes(memory.get("device_peak") or memory.get("compiled_step")),
    )


def gigabytes(count: float | None) -> str:
    return "–" if count is None else f"{count / 1e9:.2f} GB"


def duration(seconds: float) -> str:
    """Seconds as a reader says them."""
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
