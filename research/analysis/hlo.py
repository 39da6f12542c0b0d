"""The text of a compiled program: its computations, and the bytes of its arrays."""

import math
import re
from collections.abc import Iterator

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8,
         "s64": 8, "u64": 8}  # fmt: skip
HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
ARRAY = re.compile(r"\b(\w+)\[([\d,]*)\]")


def computations(text: str) -> Iterator[tuple[str, tuple[bool, list[str]]]]:
    """(name, (whether the program begins there, lines)) of each computation of a program's `as_text()`."""
    name, is_entry, lines = "", False, []
    for line in text.splitlines():
        header = HEADER.match(line)
        if header:
            is_entry, name, lines = bool(header[1]), header[2], []
        elif line.startswith("}"):
            yield name, (is_entry, lines)
        else:
            lines.append(line)


def array_bytes(dtype: str, dims: str) -> int:
    """Of an array as ARRAY finds it: 'f32' and '4,128'."""
    return BYTES[dtype] * math.prod(int(dim) for dim in dims.split(",") if dim)
