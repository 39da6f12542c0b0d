"""What a step's memory is made of, told apart by differences of compiled variants; the parts add up to the whole."""

from typing import Any

from research.analysis import memory
from research.analysis.frontier import with_fields
from research.analysis.programs import Programs

PARTS = {
    "parameters": "float32, from their shapes",
    "optimizer state": "from its shapes",
    "gradients": "float32, as large as the parameters, where the rest that does not grow with the batch holds them",
    "logits": "twice what half of config.model.loss_chunk saves",
    "attention scores": "what a backend that keeps none saves (xla); four thirds of what half a chunk saves (chunked)",
    "activations": "the rest that grows with the batch: the change from half of it, twice",
    "other": "updates, weights cast or gathered, tokens",
}


def parts(config: Any, programs: Programs) -> dict[str, int]:
    """Bytes of one device by the names of PARTS, summing to the step's total. A part that is not there when memory is
    at its peak counts as 0: only what would be saved counts."""
    total = programs.usage(config).total
    state = memory.state_bytes(config, programs.target)

    def saved(**fields: Any) -> int:
        changed = {name.replace("__", "."): value for name, value in fields.items()}
        return max(0, total - programs.usage(with_fields(config, changed)).total)

    logits = 2 * saved(model__loss_chunk=max(1, config.model.loss_chunk // 2))
    scores = _scores(config, programs, saved)
    growing = min(_growing(config, programs, total), total - sum(state.values()))  # where rows divide better at half
    fixed = total - growing - sum(state.values())
    chunked_logits = config.model.loss_chunk < config.batch_size * config.seq_len
    fixed -= logits if chunked_logits else 0
    gradients = min(state["parameters"], max(0, fixed))
    found = {
        "parameters": state["parameters"],
        "optimizer state": state["optimizer"],
        "gradients": gradients,
        "logits": logits,
        "attention scores": scores,
        "activations": growing - scores - (0 if chunked_logits else logits),
    }
    return found | {"other": total - sum(found.values())}


def _scores(config: Any, programs: Programs, saved: Any) -> int:
    backend = memory.attention_of(config, programs.target)
    if backend == "xla":
        return saved(model__attention="chunked")
    if backend == "chunked":
        return 4 * saved(model__attention_chunk=max(1, config.model.attention_chunk // 2)) // 3  # a block is square
    return 0


def _growing(config: Any, programs: Programs, total: int) -> int:
    """Bytes that grow with the batch, at this batch."""
    unit = memory.mesh_of(config, programs.target).shape["data"] * config.train.accumulation
    units = config.batch_size // unit
    other = units // 2 if units > 1 else 2
    measured = programs.usage(with_fields(config, dict(batch_size=other * unit))).total
    return round((total - measured) / (units - other) * units)
