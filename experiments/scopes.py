"""Which part of the model an instruction belongs to, by the name that JAX gave it (its scope), such as
'jit(train_step)/transpose(jvp(MoETransformer))/while/body/.../layers.think/layers.experts/nrd,nrf->ndf/dot_general'.

A trace holds the programs that ran, as protocol buffers (hlo.proto and xplane.proto of XLA). They are read by hand, for
JAX has no public reader of them: a message is (number, value) pairs, and few of its numbers are needed.
"""

import re
from collections.abc import Iterator
from typing import Any

PARTS = (
    "embedding",
    "projections of attention",
    "attention",
    "router and dispatch",
    "experts",
    "head and loss",
    "optimizer",
    "collectives",  # what devices send each other, and their waiting for each other there
    "rest",  # norms, residual stream, what is kept for the backward pass, random keys
    "not named",  # kernels that no instruction is known of
)
# By the instruction, or a GPU's kernel. Its scope does not tell: a reshard may be a copy, and the gradients of many
# parts are added up at once.
COLLECTIVE = re.compile(r"\b(all-reduce|all-gather|all-to-all|reduce-scatter|collective-\w+)|nccl", re.IGNORECASE)
SILENT = ("constant", "parameter")  # opcodes; one constant serves many places, and has the scope of one of them
# Of the others the first that is found decides. (part, pattern, how sure: 2, the operation itself says so; 1, where it
# is does.) Queries, keys and values are made in a checkpoint, so what their backward pass has beside it is attention's.
RULES = [
    (part, re.compile(pattern), sure)
    for part, pattern, sure in (
        ("rest", r"/reduce_precision$", 0),
        ("attention", r"layers\.attention.*(while|qk,|qs,|bhts|/exp$|reduce_max|_where|flash|pallas|dot_product)", 2),
        ("attention", r"fmha|flash|dot_product_attention", 2),
        ("projections of attention", r"layers\.attention.*dot_general", 2),
        ("attention", r"transpose\((?!.*rematted).*layers\.attention/(?!checkpoint|layers|reshape|reshard)", 1),
        ("attention", r"layers\.attention(/shard_map)?(/closed_call|/eval_jaxpr|/broadcast|$)", 1),
        ("projections of attention", r"layers\.attention", 1),
        ("experts", r"layers\.experts.*(nrd|nrf|ndf|silu|ragged|pallas|while|layers\.use|experts/expert\b)", 2),
        ("router and dispatch", r"layers\.experts.*(bte|nkd|top_k|cumsum|erf_inv|_normal|gather|scatter)", 2),
        ("router and dispatch", r"layers\.experts", 1),
        ("head and loss", r"jvp\(\).*(cd,vd|cv,vd|dc,cv)", 2),
        ("rest", r"threefry_(split|fold_in)", 0),
        ("head and loss", r"jvp\(\)", 1),
        ("embedding", r"jvp\(MoETransformer\)+/((jit\(\w+\)/)?(gather|scatter-add|scatter)|embed)", 1),
        ("rest", r"jvp\(|layers\.(mix|think)|/layers\b", 0),
        ("optimizer", r"^jit\(train_step\)/", 1),
    )
]


def part_of(scope: str, names: str = "") -> tuple[str, bool]:
    """(the part that a kernel is of, whether it is of the backward pass), by its scope; a collective's by its names.

    The gradients of the head are computed with the loss, in the forward pass.
    """
    part = "collectives" if COLLECTIVE.search(names) else _part(scope)[0]
    return part, "transpose(" in scope


def _part(scope: str) -> tuple[str, int]:
    if not scope:
        return "not named", -1
    for part, pattern, sure in RULES:
        if pattern.search(scope):
            return part, sure
    return "rest", 0


def telling(scopes: list[str]) -> str:
    """Of a fused kernel's scopes, its result's first, the one that says the most surely which part it is of."""
    return max(scopes, key=lambda scope: _part(scope)[1], default="")  # the first of those that are as sure


def scopes_of_programs(xplane: bytes) -> dict[str, dict[str, str]]:
    """{program id: {kernel: scope}} of a *.xplane.pb: by instruction, and by the name that its kernel has on a GPU."""
    found = {}
    for plane in _values(memoryview(xplane), 1):
        if [bytes(name) for name in _values(plane, 2)] != [b"/host:metadata"]:
            continue
        for entry in _values(plane, 4):
            (event,) = _values(entry, 2)
            name = b"".join(map(bytes, _values(event, 2))).decode()  # such as jit_train_step(688)
            for statistic in _values(event, 5):
                for hlo in _values(statistic, 6):
                    for module in _values(hlo, 1):
                        found[name.rpartition("(")[2].rstrip(")")] = _scopes(module)
    return found


def _scopes(module: memoryview) -> dict[str, str]:
    computations = {_values(c, 5)[0]: [_instruction(i) for i in _values(c, 2)] for c in _values(module, 3)}
    own = {}
    for instructions in computations.values():
        for name, scope, opcode, called in instructions:
            inner = called if opcode == "fusion" else ()
            within = (i for c in inner for i in reversed(computations.get(c, [])))
            scopes = [scope, *(s for _, s, code, _ in within if code not in SILENT)]
            own[name] = telling([s for s in scopes if s])
    return {_kernel(name): scope for name, scope in own.items()} | own


def _kernel(instruction: str) -> str:
    return re.sub(r"[.\-]", "_", instruction)


def _instruction(message: memoryview) -> tuple[str, str, str, list[int]]:
    """(name, scope, opcode, the computations that it calls)."""
    name, opcode, scope, called = "", "", "", []
    for number, value in _fields(message):
        if number == 1:
            name = bytes(value).decode()
        elif number == 2:
            opcode = bytes(value).decode()
        elif number == 7:
            scope = b"".join(map(bytes, _values(value, 2))).decode()
        elif number == 38:
            called += [value] if isinstance(value, int) else list(_varints(value))
    return name, scope, opcode, called


def _values(message: memoryview, number: int) -> list[Any]:
    return [value for found, value in _fields(message) if found == number]


def _fields(message: memoryview) -> Iterator[tuple[int, Any]]:
    """(number, int or bytes) of a message; of fixed width: left out."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            value, at = _varint(message, at)
            yield number, value
        elif kind == 2:
            length, at = _varint(message, at)
            yield number, message[at : at + length]
            at += length
        else:
            at += {1: 8, 5: 4}[kind]


def _varints(message: memoryview) -> Iterator[int]:
    at = 0
    while at < len(message):
        value, at = _varint(message, at)
        yield value


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
