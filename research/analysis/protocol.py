"""What was run, and what was held equal between strategies: from the runs of results.json."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from research.analysis.page import Table
from research.analysis.study import shape
from research.config import differences

Run = Mapping[str, Any]
RECALL = "recall"
_MANY = 12  # runs; a longer list is not read
# Fields of a config that make a strategy, or that another line of the comparison speaks of.
_SAID = frozenset(
    {
        "strategy",
        "scale",
        "seed",
        "batch_size",
        "seq_len",
        "fingerprint",
        "train.steps",
        "train.tokens",
        "data.protocol",
    }
    | {f"optimizer.{name}" for name in ("name", "learning_rate", "adamw_learning_rate", "schedule")}
)


def finished(results: Mapping[str, Any]) -> list[Run]:
    return [run for run in results["runs"] if run["result"]]


def text_runs(results: Mapping[str, Any]) -> list[Run]:
    return [run for run in finished(results) if run["setting"] != RECALL]


def kicker(results: Mapping[str, Any]) -> str:
    """Scale, text and device in a line."""
    found = finished(results)
    scales = dict.fromkeys(run["result"]["scale"] for run in text_runs(results) or found)
    corpora = dict.fromkeys(corpus(run) for run in text_runs(results))
    return " · ".join([*(f"{scale} scale" for scale in scales), *corpora]) or "no run finished"


def corpus(run: Run) -> str:
    """A text as a reader knows it; other files by their name."""
    name = run["result"]["corpus"]
    known = {"stdlib": "source of Python's standard library", "books.jsonl.gz": "public-domain English books"}
    return known.get(name, name)


def facts(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The head of a report: what, on what, how much."""
    found = finished(results)
    if not found:
        return [("runs", f"0 of {len(results['runs'])} finished")]
    text = text_runs(results)
    shapes = {run["strategy"]: shape(run["result"]) for run in text or found}
    facts_ = [
        ("strategies (rows x tokens)", ", ".join(f"{name} {said}" for name, said in shapes.items())),
        ("runs", f"{len(found)} of {len(results['runs'])} finished"),
        ("seeds", ", ".join(map(str, sorted({run["seed"] for run in found})))),
    ]
    if text:
        facts_.append(("text", ", ".join(dict.fromkeys(corpus(run) for run in text))))
        counts = sorted({run["result"]["parameters"]["total"] for run in text})
        facts_.append(("parameters", ", ".join(f"{count / 1e6:.1f} M" for count in counts)))
        facts_.append(("tokens a run", ", ".join(f"{n:,}" for n in sorted({run["result"]["tokens"] for run in text}))))
    facts_.append(("device", ", ".join(dict.fromkeys(run["result"]["device"] for run in found))))
    if any(run.get("environment") for run in found):
        facts_.append(("code", ", ".join(dict.fromkeys(map(code, found)))))
    facts_.append(("last run", max(run["result"]["date"] for run in found)))
    return facts_


def code(run: Run) -> str:
    environment = run.get("environment")
    if not environment:
        return "not kept"
    changed = ", changed since" if environment.get("changed") else ""
    commit = f"commit {environment['commit'][:12]}{changed}" if environment.get("commit") else "no commit"
    return f"{commit} (Python {environment['python']}, jax {environment['packages']['jax']})"


def text(results: Mapping[str, Any]) -> str:
    """What was held equal between the finished strategies on text, and what was not; which runs there are."""
    found = text_runs(results)
    paragraphs = [_runs(results)]
    if found:
        equal, unequal = _compared(found)
        paragraphs.append("**Held equal:** " + "; ".join(equal) + ".")
        if unequal:
            paragraphs.append("**Not equal:** " + "; ".join(unequal) + ".")
        if any(run["result"]["protocol"] == "published" for run in found):
            paragraphs.append(
                "**LEAKING:** under the published protocol held-out windows overlap training windows, so its losses "
                "measure memorisation."
            )
    return "\n\n".join(paragraphs)


def _runs(results: Mapping[str, Any]) -> str:
    settings: dict[str, list[str]] = {}
    for run in finished(results):
        settings.setdefault(run["setting"], []).append(f"{run['strategy']} (seed {run['seed']})")
    says = {
        "independent": "independent order, each row from its own place of the corpus",
        "paired": "paired order, " + _paired(results),
        RECALL: "the synthetic recall task",
    }
    parts = []
    for setting, names in settings.items():
        listed = ": " + ", ".join(names) if len(names) <= 4 else ""
        parts.append(f"{len(names)} in {says.get(setting, setting)}{listed}")
    missing = [f"{r['strategy']}-{r['setting']}-{r['seed']} {r['status']}" for r in results["runs"] if not r["result"]]
    said = f"{len(finished(results))} runs: {'; '.join(parts)}." if parts else "No run is finished."
    if missing:
        more = f" and {len(missing) - _MANY} more" if len(missing) > _MANY else ""
        said += f" **Not finished:** {', '.join(missing[:_MANY])}{more}."
    return said


def _paired(results: Mapping[str, Any]) -> str:
    sizes = {run["result"]["tokens_per_step"] for run in finished(results) if run["setting"] == "paired"}
    if len(sizes) > 1:
        return "the same tokens one after another for every strategy, in steps of unlike size"
    return "the same tokens each step for every strategy"


def _compared(found: Sequence[Run]) -> tuple[list[str], list[str]]:
    """(facts that all runs share, facts in which strategies differ)."""
    checks: tuple[tuple[str, Callable[[Run], str]], ...] = (
        ("protocol", lambda r: r["result"]["protocol"]),
        ("tokens", lambda r: f"{r['result']['tokens']:,}"),
        ("tokens per step", lambda r: f"{r['result']['tokens_per_step']:,}"),
        ("passes over the text", lambda r: f"{r['result']['tokens'] / r['result']['train_tokens']:.2f}"),
        ("parameters", _parameters),
        ("optimiser", _optimizer),
        ("text", lambda r: f"{corpus(r)} `{r['result']['fingerprint'][:12]}`"),
        ("unigram entropy", lambda r: f"{r['result']['unigram_entropy']:.3f} nats"),
        ("held-out targets", _targets),
        ("training FLOPs", lambda r: f"{r['result']['flops']:.3g}"),
        ("device", lambda r: r["result"]["device"]),
    )
    if any(run.get("environment") for run in found):
        checks += (("code", code),)
    equal, unequal = [], []
    for name, show in checks:
        by_strategy = {run["strategy"]: dict.fromkeys([]) for run in found}
        for run in found:
            by_strategy[run["strategy"]][show(run)] = None
        values = {value for shown in by_strategy.values() for value in shown}
        if len(values) == 1:
            equal.append(f"{name} {values.pop()}")
        else:
            each = (f"{strategy} {' and '.join(shown)}" for strategy, shown in by_strategy.items())
            unequal.append(f"{name} ({', '.join(each)})")
    fields = _unlike_fields(found)
    unequal += fields
    if not fields:
        equal.append("every other field of the config that changes what is computed")
    return equal, unequal


def _unlike_fields(found: Sequence[Run]) -> list[str]:
    """Fields of the configs in which strategies of one setting differ, but for those of `_SAID`."""
    first: dict[str, dict[str, Any]] = {}
    for run in found:
        first.setdefault(run["setting"], {}).setdefault(run["strategy"], run["config"])
    shown: dict[str, dict[str, Any]] = {}  # of each field the strategies' values, of all settings together
    for configs in first.values():
        base, *others = configs.values()
        names = {name for other in others for name, _ in differences(base, other)} - _SAID
        for name in sorted(names):
            each = {strategy: _value(config, name) for strategy, config in configs.items()}
            shown[name] = shown.get(name, {}) | each
    return [
        f"config.{name} ({', '.join(f'{strategy} {value}' for strategy, value in each.items())})"
        for name, each in shown.items()
    ]


def _value(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = config.get(part) if isinstance(config, Mapping) else None
    return config


def _parameters(run: Run) -> str:
    counts = run["result"]["parameters"]
    return f"{counts['total']:,} ({counts['active']:,} active per token)"


def _optimizer(run: Run) -> str:
    chosen = run["config"]["optimizer"]
    rates = f"learning rate {chosen['learning_rate']:g}"
    if chosen["name"] == "muon":
        rates += f", {chosen['adamw_learning_rate']:g} for its AdamW group"
    return f"{chosen['name']} ({rates}, {chosen['schedule']} schedule)"


def _targets(run: Run) -> str:
    counts = {score["targets"] for score in run["result"]["eval"]["contexts"].values()}
    return " or ".join(f"{count:,}" for count in sorted(counts)) or "none"


def tables(results: Mapping[str, Any]) -> tuple[Table, ...]:
    """How much of the held-out text occurs in the train split, by n-gram; nothing where it was not measured."""
    measured = {}
    for run in text_runs(results):
        if run["result"].get("overlap"):
            measured.setdefault(run["result"]["fingerprint"], run)
    rows = []
    for run in measured.values():
        for size, share in run["result"]["overlap"].items():
            if share is None:
                rows.append((corpus(run), size, "no document is so long", "–"))
            else:
                rows.append((corpus(run), size, f"{share['ngrams']:.2%}", f"{share['documents']:.2%}"))
    if not rows:
        return ()
    note = (
        "Held-out n-grams of tokens, each inside one document, that occur anywhere in the train split; and held-out "
        "documents of which more than half of the n-grams do. Documents were split before they were cut into windows; "
        "what is left is text that documents share."
    )
    return (Table(("text", "n", "n-grams seen in train", "documents mostly seen"), tuple(rows), note),)
