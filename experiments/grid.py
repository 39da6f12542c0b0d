"""Values of one field, such as a learning rate, tried outwards until the lowest loss has a higher one on either side.

`loss` is a function of a value: nats per token, inf where the run diverged, None where it failed or was not made.
"""

import math
from collections.abc import Callable, Iterator, Mapping

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
        found = [*losses, *following(losses, limit)]
        values = [value for value in found if value not in tried]  # one that failed is not tried again


def following(losses: Mapping[float, float | None], limit: int) -> list[float]:
    """The value beyond the edge that the lowest loss lies on, one or none; none while a loss is not known (None)."""
    lowest = best(losses)
    if lowest is None or None in losses.values() or len(losses) >= limit:
        return []
    if lowest == max(losses):
        return [lowest * STEP]
    return [lowest / STEP] if lowest == min(losses) else []


def best(losses: Mapping[float, float | None]) -> float | None:
    """The value of the lowest loss; None where none is known."""
    finite = {value: loss for value, loss in losses.items() if loss is not None and math.isfinite(loss)}
    return min(finite, key=finite.__getitem__) if finite else None


def known(loss: Loss, middle: float) -> dict[float, float | None]:
    """Value -> loss of the grid so far. Values grow outwards without a gap, and are found so."""
    found = {value: loss(value) for value in first(middle)}
    for factor in (1 / STEP, STEP):
        value = middle * factor * factor
        while (there := loss(value)) is not None:
            found[value] = there
            value *= factor
    return found
