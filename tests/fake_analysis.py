"""An analysis that no run was made for, from a few numbers that a test chooses, and what claims make of it."""

import itertools

from research.analysis import claims

SHAPES = {"large_batch": (64, 128), "balanced": (16, 512), "long_seq": (4, 2048)}
REACH = {"large_batch": 96, "balanced": 384, "long_seq": 1536}
LOSSES = {"large_batch": 3.9, "balanced": 4.2, "long_seq": 4.6}
CHANCE = 0.0625


def analysis(
    losses=LOSSES,
    paired=None,  # losses in paired order
    shown=True,
    width=0.02,  # half of every interval, nats
    seeds=3,
    seconds=(0.66, 0.73, 1.05),
    memory=(446e6, 446e6, 448e6),
    device=(None, None, None),
    shapes=SHAPES,
    leaking=False,
    own=None,  # strategy -> (loss, accuracy) at its own length
    early=1.0,  # how far curves are apart at half of the tokens, in parts of the final differences
    gain=0.1,  # nats per token that every strategy gains from its context
    beyond=0.05,  # that the longest rows gain from more context than all share
    full=None,  # losses with all the context that each was trained at
    diversity=-0.4,
    recall=None,  # strategy -> accuracy at distances of 32, 256 and 1024
    spread=0.0,  # by how much seeds differ in it
    sure=0.02,  # half of the interval of its answers
) -> dict:
    """An analysis as comparison.analyse gives it, from a few numbers."""
    full = full or losses
    orders = {"independent": losses} | ({"paired": paired} if paired else {})
    found = dict(arms=[], differences=[], context=[], contexts=[96, 384, 1536], shared_contexts=[96], warnings=[])
    found |= dict(power=[], rankings=[], decomposition=[], recall=[], reach=dict(pairs=[], gains=[]))
    for setting, by in orders.items():
        for i, name in enumerate(shapes):
            loss, accuracy = (own or {}).get(name, (by[name] + 0.2, 0.25))
            at_own = dict(mean=loss, sd=0.01, accuracy=accuracy, leaking=leaking, floor=0.01 if leaking else None)
            rows, length = shapes[name]
            curve = {
                str(c): band(by[name] + (c > REACH[name]), width) | dict(beyond=c > REACH[name]) for c in (96, 1536)
            }
            found["arms"].append(
                dict(strategy=name, setting=setting, seeds=list(range(seeds)), batch_size=rows, seq_len=length)
                | dict(tokens_per_step=rows * length, tokens=80 * 8192, steps=80, flops=1e12 * (1 + i), own=at_own)
                | dict(step_seconds=seconds[i], memory_bytes=dict(compiled_step=memory[i], device_peak=device[i]))
                | dict(contexts=curve)
            )
            effective = band(48, 10) | dict(longest=REACH[name], censored=False)
            found["context"].append(
                dict(
                    strategy=name,
                    setting=setting,
                    seq_len=length,
                    gains=[{"from": 24, "to": REACH[name]} | band(gain, width)],
                )
                | dict(effective=effective, slope=None)
            )
        for a, b in itertools.combinations(by, 2):
            pair = dict(setting=setting, a=a, b=b)
            found["differences"].append(pair | dict(context=96, shown=shown) | band(by[a] - by[b], width))
            ends = dict(context_a=REACH[a], context_b=REACH[b], shown=shown)
            found["reach"]["pairs"].append(pair | ends | band(full[a] - full[b], width))
    found["reach"]["gains"] = [
        {"setting": "independent", "strategy": "long_seq", "from": 96, "to": 1536, "shown": abs(beyond) > width}
        | band(beyond, width)
    ]
    if diversity is not None:
        found["decomposition"] = [dict(at=96, a="large_batch", b="long_seq", diversity=band(diversity, width))]
    found["budgets"] = budgets(losses, seconds, seeds, early)
    for name, shares in (recall or {}).items():
        bins = [bin_of(*each, spread, sure) for each in zip((32, 256, 1024), shares, strict=True)]
        found["recall"].append(dict(strategy=name, seq_len=shapes[name][1], chance=CHANCE, raw=bins))
    return found


def band(mean: float, width: float) -> dict:
    return dict(mean=mean, low=mean - width, high=mean + width)


def bin_of(distance: int, share: float, spread: float, sure: float) -> dict:
    ends = {"from": distance, "to": 2 * distance - 1}
    by_seed = [share - spread, share, share + spread]
    return ends | dict(mean=share, low=share - sure, high=share + sure, by_seed=by_seed)


def budgets(losses: dict, seconds: tuple, seeds: int, early: float) -> dict:
    """Curves that are `early` times their final differences apart at a quarter and half of the tokens."""
    level = sum(losses.values()) / len(losses)
    curves, equal = [], {}
    for name, loss in losses.items():
        before = level + early * (loss - level)
        luck = [0.001 * seed for seed in range(seeds)]
        y = [[before + 1 + u, before + 0.5 + u, loss + 0.1 + u, loss + u] for u in luck]
        curves.append(dict(strategy=name, seeds=list(range(seeds)), x=[[25.0, 50.0, 75.0, 100.0]] * seeds, y=y))
        equal[name] = dict(mean=loss, low=loss, high=loss + luck[-1])
    return dict(context=96, curves=dict(tokens=curves), crossings=[], equal=[dict(budget="seconds", losses=equal)])


def verdict_on(words: str, found: dict) -> str:
    (verdict,) = [v.verdict for v in claims.verdicts({"analysis": found}) if words in v.claim]
    return verdict


def evidence_on(words: str, found: dict) -> str:
    (said,) = [v.evidence for v in claims.verdicts({"analysis": found}) if words in v.claim]
    return said
