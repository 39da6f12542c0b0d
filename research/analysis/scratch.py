"""Memory that the CPU's fused kernels take for themselves while they run, which no compiled program counts.

XLA hands groups of operations to a library of kernels (YNNPACK: `__ynn_fusion` in a program's text). Before jaxlib 0.11
a group keeps the result of a matrix product whole, on the heap, and works off what follows in slices of the outermost
axis: seen by recording the allocations of steps, with jaxlib 0.10.2; 0.11.2 and 0.12.0.1 take nothing. The backward
pass of kept attention scores is such a group: beside what is planned it takes an array [B, H, T, T] and two slices
[H, T, T]; where B is 1 that is three whole arrays.
"""

import re
from collections.abc import Sequence

import jaxlib

from research.analysis import hlo

KEPT = tuple(int(part) for part in jaxlib.__version__.split(".")[:2]) < (0, 11)
KERNELS = re.compile(r' fusion\(.*calls=%?([\w.\-]+),.*"kind":"__ynn_fusion"')
INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (\w+)\[([\d,]*)\]\S* ([\w\-]+)\(([^)]*)\)")
OPERAND = re.compile(r"%([\w.\-]+)")
SAME = ("bitcast", "reshape", "broadcast")  # another view of their operand
GIVEN = ("parameter", "constant")


def scratch_bytes(text: str) -> int:
    """Of the group that takes most, in a compiled program's `as_text()`; 0 where there is none.

    A bound: all values of a group that are still needed are counted, none as written over another, and slices may be
    thinner than one of the outermost axis.
    """
    bodies = {name: lines for name, (_, lines) in hlo.computations(text)}
    return max((_most_alive(bodies[name]) for name in KERNELS.findall(text)), default=0)


def _most_alive(lines: Sequence[str]) -> int:
    """Bytes of the values of a group between its operations, at the operation where they are most."""
    sizes, last, views, product = {}, {}, {}, False
    born = {}
    for place, line in enumerate(lines):
        found = INSTRUCTION.match(line)
        if not found:
            continue
        root, name, dtype, dims, operation, operands = found.groups()
        names = [views.get(operand, operand) for operand in OPERAND.findall(operands)]
        last |= dict.fromkeys(names, place)
        product |= operation == "dot"
        if operation in SAME and names:
            views[name] = names[0]
            if root:  # what it is a view of is the result, and no scratch
                sizes.pop(names[0], None)
        elif operation not in (*SAME, *GIVEN) and not root:
            slices = 1 if operation == "dot" or not dims else int(dims.partition(",")[0])
            sizes[name], born[name] = -(-hlo.array_bytes(dtype, dims) // slices), place
    if not product:
        return 0
    alive = (sum(sizes[n] for n in sizes if born[n] <= place <= last.get(n, -1)) for place in range(len(lines)))
    return max(alive, default=0)
