"""Claims about the size of the batch by itself, which strategies of equal tokens per step cannot decide: what would."""

from research.analysis import evidence
from research.analysis.evidence import UNTESTED, Analysis, Judged, arms


def noise(analysis: Analysis) -> Judged:
    return UNTESTED, _not_varied(analysis) + (
        " The noise of the gradient was not measured: gradients of single rows at fixed weights, for several numbers "
        "of rows of one length, would tell."
    )


def progress(analysis: Analysis) -> Judged:
    return UNTESTED, _not_varied(analysis) + (
        " Runs at B, 2 B and 4 B rows of one length, each at its best learning rate, compared at equal steps and at "
        "equal tokens, would tell."
    )


def explores(analysis: Analysis) -> Judged:
    return UNTESTED, _not_varied(analysis) + (
        " Where runs of unlike B end, at equal loss or equal tokens and each at its best learning rate, would tell "
        "whether noise leads to better minima."
    )


def _not_varied(analysis: Analysis) -> str:
    found = list(arms(analysis).values())
    if pairs := evidence.rows_alone(analysis):
        a, b = pairs[0]
        return (
            f"{a['strategy']} and {b['strategy']} have rows of one length, {a['seq_len']:,} tokens, and "
            f"{a['batch_size']} and {b['batch_size']} of them; no rule judges that pair."
        )
    sizes = {arm["tokens_per_step"] for arm in found}
    if len(sizes) == 1 and len({arm["seq_len"] for arm in found}) > 1:
        rows = ", ".join(str(arm["batch_size"]) for arm in found)
        each = f"Every step holds {sizes.pop():,} tokens"
        return f"{each}: the number of rows ({rows}) changes with their length, never alone."
    return "No two strategies differ in their number of rows alone."
