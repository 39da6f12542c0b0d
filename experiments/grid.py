"""Values of one field, such as a learning rate, tried outwards until the lowest loss has a higher one on either side.

`loss` is a function of a value: nats per token, inf where the run diverged, None where it failed or was not made.
"""

from collections.abc import Callable, Iterator, Mapping

from research.analysis.runs import lowest

Loss = Callable[[float], float | None]
STEP = 2.0  # between neighbours


def first(middle: float) -> list[float]:
    return [middle, middle / STEP, middle * STEP]


def grow(loss: Loss, middle: float, limit: int) -> Iterator[float]:
    """The values of a grid: three, then outwards while the best lies on the edge.

    Each is yielded before the losses are read that decide on the next. At most `limit`; where one failed for another
    reason than divergence, none is added.
    """
    values, tried = first(middle), set()
    while values:
        yield from values
        tried.update(values)
        losses = known(loss, middle)  # those of an earlier command too
        found = [*losses, *following(losses, middle, limit)]
        values = [value for value in found if value not in tried]  # one that failed is not tried again


def following(losses: Mapping[float, float | None], middle: float, limit: int) -> list[float]:
    """The value beyond the edge that the lowest loss lies on, one or none; none while a loss is not known (None).

    Where all diverged: the value below.
    """
    best = lowest(losses, middle)
    if None in losses.values() or len(losses) >= limit:
        return []
    if best == max(losses):
        return [best * STEP]
    return [min(losses) / STEP] if best in (None, min(losses)) else []


def known(loss: Loss, middle: float) -> dict[float, float | None]:
    """Value -> loss of the grid so far. Values grow outwards without a gap, and are found so."""
    found = {value: loss(value) for value in first(middle)}
    for factor in (1 / STEP, STEP):
        value = middle * factor * factor
        while (there := loss(value)) is not None:
            found[value] = there
            value *= factor
    return found
