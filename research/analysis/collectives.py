"""What devices send each other in a step: the collectives of a compiled program, read from its text.

A program is one device's. Its computations form a tree: a collective inside a loop happens once for every turn, and the
compiler writes how many turns there are. Which mesh axes a collective crosses follows from the devices of its groups.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence

import numpy as np

from research.analysis import hlo
from research.sharding import AXES

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """`times` a step, among `group` (the numbers of the first group's devices), which differ in `axes` of the mesh:
    `bytes` that one device holds of what is reduced, or of what was gathered."""

    kind: str
    bytes: int
    group: tuple[int, ...]
    axes: tuple[str, ...]
    times: int

    @property
    def passes(self) -> int:
        """How often the bytes go around: an all-reduce is a reduce-scatter and an all-gather."""
        return 2 if self.kind == "all-reduce" else 1

    @property
    def sent(self) -> float:
        """Bytes that each device sends in a step by the ring algorithm, the least there is: 2 (n-1)/n of an all-reduce,
        (n-1)/n of the others (Patarasuk and Yuan 2009, doi:10.1016/j.jpdc.2008.09.002)."""
        share = 1.0 if self.kind == "collective-permute" else (len(self.group) - 1) / len(self.group)
        return self.times * self.bytes * self.passes * share


def collectives(text: str, mesh_shape: Sequence[int]) -> list[Collective]:
    """Those of a compiled program (its `as_text()`) over a mesh of this shape, (data, expert, seq), but for groups of
    one device, which send nothing.

    Raises: ValueError at a collective in a loop whose number of turns is not known.
    """
    computations = dict(hlo.computations(text))
    entry = next(name for name, (is_entry, _) in computations.items() if is_entry)
    return list(_walk(entry, 1, computations, tuple(mesh_shape)))


def _walk(name: str, times: int | None, computations: dict, mesh_shape: tuple[int, ...]) -> Iterator[Collective]:
    """The collectives of a computation that happens `times` a step (None: not known), and of what it calls."""
    for line in computations[name][1]:
        found = _collective(line, mesh_shape)
        if found and len(found.group) > 1:
            if times is None:
                raise ValueError(f"a collective in a loop of unknown length: {line.strip()[:120]}")
            yield dataclasses.replace(found, times=times)
            continue
        inner = times
        if " while(" in line:
            turns = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
            inner = times * int(turns[1]) if turns and times is not None else None
        branches = BRANCHES.search(line)
        called = CALLED.findall(line) + (re.findall(r"[\w.\-]+", branches[1]) if branches else [])
        for other in called:
            if other in computations:
                yield from _walk(other, inner, computations, mesh_shape)


def _collective(line: str, mesh_shape: tuple[int, ...]) -> Collective | None:
    """The collective that a line of a program is, once, or None; of a begun and an awaited half, the first."""
    match = re.search(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(", line)
    if not match:
        return None
    shapes, kind, begun = match[1], match[2], match[3]
    sizes = [hlo.array_bytes(dtype, dims) for dtype, dims in hlo.ARRAY.findall(shapes)]
    total = max(sizes) if begun and kind != "all-reduce" else sum(sizes)  # begun: (what goes in, what comes out)
    groups = _groups(line, math.prod(mesh_shape))
    if kind == "reduce-scatter":
        total *= groups.shape[1]  # what goes in; the line says what comes out
    return Collective(kind, total, tuple(groups[0].tolist()), _axes(groups, mesh_shape), 1)


def _groups(line: str, devices: int) -> np.ndarray:
    """[groups, devices of a group] of a line, in any of the ways that the compiler writes them."""
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}", line)
    if listed:
        return np.array([[int(i) for i in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])])
    counted = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    if counted:
        ids = np.arange(devices).reshape([int(i) for i in counted[3].split(",")])
        if counted[4]:
            ids = ids.transpose([int(i) for i in counted[4].split(",")])
        return ids.reshape(int(counted[1]), int(counted[2]))
    named = re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", line)
    if named:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        names, crossed = list(sizes), re.findall(r"'(\w+)'", named[2])
        ids = np.arange(devices).reshape([int(size) for size in sizes.values()])
        order = [names.index(n) for n in names if n not in crossed] + [names.index(n) for n in crossed]
        return ids.transpose(order).reshape(-1, math.prod(int(sizes[n]) for n in crossed))
    return np.arange(devices)[None]  # no groups are written: all devices are one


def _axes(groups: np.ndarray, mesh_shape: tuple[int, ...]) -> tuple[str, ...]:
    """The mesh axes in which the devices of a group differ."""
    places = np.array(np.unravel_index(groups, mesh_shape))  # [axes, groups, devices]
    differs = (places != places[:, :, :1]).any(axis=(1, 2))
    return tuple(axis for axis, different in zip(AXES, differs, strict=True) if different)
