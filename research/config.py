"""One place where a config is checked, whole, before anything compiles or is written."""

import itertools
import math
from collections.abc import Iterator
from typing import Any


class ConfigError(ValueError):
    """A mistake of the user's: one line that names the field, its value and the fix."""

    def __init__(self, field: str, value: object, message: str):
        super().__init__(field, value, message)  # all three: another process may raise it, and it is made again here
        self.field = field

    def __str__(self) -> str:
        field, value, message = self.args
        return f"{field}={value!r}: {message}" if value is not None else f"{field}=unset: {message}"


CHOICES = {
    "model.activation": ("silu", "swiglu"),
    "model.dtype": ("float32", "bfloat16"),
    "model.remat": ("none", "block", "full"),
    "model.attention": ("auto", "xla", "chunked", "flash", "cudnn"),
    "model.moe": ("auto", "blocks", "tiles", "ragged"),
    "optimizer.name": ("muon", "adamw"),
    "optimizer.schedule": ("constant", "cosine", "wsd"),
    "data.source": ("stdlib", "text", "jsonl", "parquet", "hf", "recall"),
    "data.protocol": ("clean", "published"),
}
AT_LEAST_ONE = (
    "batch_size", "seq_len", "model.num_layers", "model.d_model", "model.num_heads", "model.d_ff",
    "model.num_experts", "model.experts_per_token", "model.vocab_size", "model.attention_chunk",
    "model.moe_block", "model.loss_chunk", "model.unroll", "train.accumulation", "train.log_every", "train.keep_last",
    "eval.num_targets", "eval.run_length", "eval.own_targets", "eval.batch_tokens",
)  # fmt: skip
AT_LEAST_ZERO = (
    "model.router_noise", "model.balance_weight", "optimizer.weight_decay", "optimizer.muon_weight_decay",
    "optimizer.clip_norm", "train.eval_every", "train.checkpoint_every", "data.shuffle_block",
    "data.max_documents", "data.max_document_chars", "data.max_tokens", "data.max_epochs",
)  # fmt: skip
SEEDS = ("seed", "data.split_seed")
SHARES = ("model.dropout", "optimizer.momentum", "optimizer.beta1", "optimizer.beta2")  # [0, 1)
FRACTIONS = ("optimizer.warmup_fraction", "optimizer.decay_fraction", "optimizer.final_fraction")  # [0, 1]
POSITIVE = (
    "optimizer.learning_rate", "optimizer.adamw_learning_rate", "optimizer.epsilon",
    "model.rope_base", "model.norm_epsilon", "model.init_stddev",
)  # fmt: skip
LARGEST = 2.0**128  # of float32, and a little more

# Where a run that goes on may differ from the one before: what is computed stays the same.
FREE = ("mesh", "train.log_every", "train.checkpoint_every", "train.keep_last", "train.keep_best", "data.cache_dir")


def differences(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, tuple[Any, Any]]]:
    """(field, (old value, new value)) where two configs, as dicts of JSON, compute something else."""
    if path in FREE:
        return
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted({*old, *new}):
            yield from differences(old.get(name), new.get(name), f"{path}.{name}".lstrip("."))
    elif old != new:
        yield path, (old, new)


def num_steps(config: Any) -> int:
    """Steps of a run: config.train.steps, or as many as make up config.train.tokens (rounded up)."""
    if config.train.steps is not None:
        return config.train.steps
    return math.ceil(config.train.tokens / (config.batch_size * config.seq_len))


def shorter_stages(config: Any) -> tuple[tuple[int, float], ...]:
    """config.train.stages: (tokens a row, share of the steps) of each; empty where it is unset, or of an older run."""
    return tuple(config.train.get("stages") or ())


def ends_of_stages(config: Any) -> tuple[int, ...]:
    """The step at which each of config.train.stages ends, and the last of the run."""
    steps, shares = num_steps(config), [share for _, share in shorter_stages(config)]
    return (*(round(steps * sum(shares[: i + 1])) for i in range(len(shares))), steps)


def validate(config: Any, mesh_shape: tuple[int, int, int], platform: str) -> None:
    """Every check that needs no data, for a mesh of (data, expert, seq) devices on 'cpu', 'gpu' or 'tpu'.

    Raises: ConfigError, of the first mistake found.
    """
    _validate_ranges(config)
    _validate_model(config.model)
    _validate_length(config)
    _validate_stages(config, mesh_shape[2])
    _validate_shards(config, mesh_shape)
    _validate_backends(config, mesh_shape, platform)
    _validate_eval(config)


def _field(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = config[part]
    return config


def _require(config: Any, names: tuple[str, ...], holds: Any, rule: str) -> None:
    for name in names:
        value = _field(config, name)
        if not holds(value):
            raise ConfigError(f"config.{name}", value, rule)


def _validate_ranges(config: Any) -> None:
    for name, choices in CHOICES.items():
        if _field(config, name) not in choices:
            raise ConfigError(f"config.{name}", _field(config, name), f"choose one of {', '.join(choices)}")
    _require(config, AT_LEAST_ONE, lambda v: v >= 1, "must be 1 or more")
    _require(config, AT_LEAST_ZERO, lambda v: 0 <= v < LARGEST, "must be 0 or more, and finite in float32")
    _require(config, SEEDS, lambda v: 0 <= v < 2**63, "must lie between 0 and 2^63 - 1")
    _require(config, SHARES, lambda v: 0 <= v < 1, "must be 0 or more, and less than 1")
    _require(config, FRACTIONS, lambda v: 0 <= v <= 1, "must lie between 0 and 1")
    _require(config, POSITIVE, lambda v: 0 < v < LARGEST, "must be more than 0, and finite in float32")
    _require(config, ("data.heldout_fraction",), lambda v: 0 < v < 1, "must lie between 0 and 1, both excluded")


def _validate_model(model: Any) -> None:
    if model.d_model % model.num_heads:
        raise ConfigError(
            "config.model.d_model", model.d_model,
            f"not divisible by config.model.num_heads={model.num_heads}; choose a multiple",
        )  # fmt: skip
    if (model.d_model // model.num_heads) % 2:
        raise ConfigError(
            "config.model.num_heads", model.num_heads,
            f"gives heads of {model.d_model // model.num_heads}; rotary pairs need an even width",
        )  # fmt: skip
    if model.experts_per_token > model.num_experts:
        raise ConfigError(
            "config.model.experts_per_token", model.experts_per_token,
            f"more than config.model.num_experts={model.num_experts}; a token cannot choose an expert twice",
        )  # fmt: skip


def _validate_length(config: Any) -> None:
    steps, tokens = config.train.steps, config.train.tokens
    if steps is not None and tokens is not None:
        raise ConfigError(
            "config.train.steps", steps,
            f"config.train.tokens={tokens} is set too; set one of them",
        )  # fmt: skip
    if steps is None and tokens is None:
        raise ConfigError("config.train.steps", None, "set config.train.steps or config.train.tokens")
    name, value = ("steps", steps) if steps is not None else ("tokens", tokens)
    if value < 1:
        raise ConfigError(f"config.train.{name}", value, "must be 1 or more")
    if config.batch_size * config.seq_len >= 2**31:
        message = f"times config.batch_size={config.batch_size} tokens per step are 2^31 or more; give less"
        raise ConfigError("config.seq_len", config.seq_len, message)
    optimizer = config.optimizer
    if optimizer.schedule == "wsd" and optimizer.warmup_fraction + optimizer.decay_fraction > 1:
        raise ConfigError(
            "config.optimizer.decay_fraction", optimizer.decay_fraction,
            f"and config.optimizer.warmup_fraction={optimizer.warmup_fraction} are more than the run; give less",
        )  # fmt: skip


def _validate_stages(config: Any, seq: int) -> None:
    stages = config.train.get("stages")
    if not stages:
        return

    def refuse(message: str) -> None:
        raise ConfigError("config.train.stages", stages, message)

    if not all(_is_stage(stage) for stage in stages):
        refuse("give pairs of tokens per row and share of the steps, such as ((128, 0.5), (512, 0.25)), or ()")
    lengths, shares = zip(*stages, strict=True)
    for length, longer in itertools.pairwise((*lengths, config.seq_len)):
        if length >= longer or config.seq_len % length:
            refuse(f"{length} before {longer}: give rising lengths that divide config.seq_len={config.seq_len}")
        if length % seq:
            refuse(f"rows of {length} are not divisible by the seq axis of {seq}; choose multiples")
    if sum(shares) >= 1:
        refuse(f"its shares make {sum(shares):g}, and leave nothing for rows of config.seq_len={config.seq_len}")
    if config.data.protocol == "published":
        refuse("the published protocol has windows of one length; use config.data.protocol=clean")
    ends = ends_of_stages(config)
    if any(end <= first for first, end in zip((0, *ends), ends, strict=False)):
        refuse(f"a share of the {ends[-1]} steps is no whole step; train for more, or give larger ones")


def _is_stage(stage: Any) -> bool:
    """Whether it is (tokens a row, share of the steps)."""
    if not isinstance(stage, (tuple, list)) or len(stage) != 2:
        return False
    length, share = stage
    return type(length) is int and length >= 1 and isinstance(share, float) and 0 < share < 1


def _validate_shards(config: Any, mesh_shape: tuple[int, int, int]) -> None:
    data, _, seq = mesh_shape
    rows = data * config.train.accumulation
    if config.batch_size % rows:
        raise ConfigError(
            "config.batch_size", config.batch_size,
            f"not divisible by the data axis times accumulation, {data} x {config.train.accumulation}"
            f" = {rows}; the nearest that is: {max(1, round(config.batch_size / rows)) * rows}",
        )  # fmt: skip
    if config.seq_len % seq:
        raise ConfigError(
            "config.seq_len", config.seq_len, f"not divisible by the seq axis of {seq}; choose a multiple"
        )
    if config.mesh.fsdp and config.model.d_model % (data * seq):
        raise ConfigError(
            "config.model.d_model", config.model.d_model,
            f"config.mesh.fsdp shards it over {data * seq} devices, which do not divide it",
        )  # fmt: skip


def _validate_backends(config: Any, mesh_shape: tuple[int, int, int], platform: str) -> None:
    backend, head_dim = config.model.attention, config.model.d_model // config.model.num_heads
    if backend not in ("flash", "cudnn"):
        return
    problem = None
    if platform != "gpu":
        problem = f"runs on NVIDIA GPUs, and this is {platform}"
    elif config.model.dtype != "bfloat16":
        problem = f"computes in bfloat16, not config.model.dtype={config.model.dtype}"
    elif head_dim > 128:
        problem = f"wants head widths of 128 at most, not {head_dim} (config.model.d_model / num_heads)"
    elif backend == "cudnn":
        problem = _cudnn_problem(config, mesh_shape, head_dim)
    if problem:
        raise ConfigError("config.model.attention", backend, f"{problem}; use chunked, xla or auto")


def _cudnn_problem(config: Any, mesh_shape: tuple[int, int, int], head_dim: int) -> str | None:
    if config.data.mask_documents:
        return "cannot mask documents (config.data.mask_documents)"
    if config.model.dropout > 0:
        return f"cannot drop attention probabilities (config.model.dropout={config.model.dropout})"
    if mesh_shape[2] > 1:
        return "cannot divide positions (config.mesh.seq)"
    if head_dim % 8:
        return f"wants head widths by eights, not {head_dim} (config.model.d_model / num_heads)"
    return None


def _validate_eval(config: Any) -> None:
    contexts = config.eval.contexts
    if (
        not contexts
        or any(not isinstance(c, int) or c < 4 or c % 4 for c in contexts)
        or list(contexts) != sorted(set(contexts))
    ):
        raise ConfigError(
            "config.eval.contexts", tuple(contexts), "give rising multiples of 4 tokens, such as (24, 96)"
        )
    if config.data.shuffle_block and config.data.protocol == "published":
        raise ConfigError(
            "config.data.shuffle_block", config.data.shuffle_block,
            "the published protocol knows one order alone; give 0, or config.data.protocol=clean",
        )  # fmt: skip
    if config.data.shuffle_block % config.seq_len:
        raise ConfigError(
            "config.data.shuffle_block", config.data.shuffle_block,
            f"not a multiple of config.seq_len={config.seq_len}; rows would be cut at its borders",
        )  # fmt: skip
