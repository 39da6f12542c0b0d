"""The shapes, lengths and grids of the waterfall study (experiments/waterfall.py), at each of its scales.

`cpu`        the original's ratios at a size that two cores memorise: half of its rows, half of its lengths.
`published`  the original's own shapes, model, passes and learning rate, for one GPU.
`smoke`      whether the study runs at all; its losses mean nothing.
"""

from dataclasses import dataclass, field
from typing import Any

STRATEGIES = ("large_batch", "balanced", "long_seq")


@dataclass(frozen=True)
class Scale:
    """What the stages of a study need beside the strategies' own config files.

    `shapes`: (rows, tokens per row) of each of STRATEGIES, unequal tokens per step; `equal_shapes`: equal ones.
    The small corpus of the leaking stages is config.data.max_tokens, their passes follow from config.train.steps.
    """

    config: str  # scale of the strategies' config files
    shapes: tuple[tuple[int, int], ...]
    equal_shapes: tuple[tuple[int, int], ...]
    seeds: tuple[int, ...]  # of the last stage; config.seed, which the rates are chosen on, is none of them
    max_rates: int  # learning rates tried for one strategy, at most
    overrides: dict[str, Any] = field(default_factory=dict)  # of every run's config


_SHORT = {
    "train.eval_every": 0,  # losses are read off at the end
    "train.keep_last": 1,
    "train.keep_best": False,
    "data.max_documents": 0,
    "data.max_document_chars": 0,  # whole documents: a long context needs them, and no stage may change the text
}

SCALES = {
    "cpu": Scale(
        config="cpu",
        shapes=((52, 128), (13, 512), (3, 2048)),  # 6,656, 6,656 and 6,144 tokens per step
        equal_shapes=((48, 128), (12, 512), (3, 2048)),
        seeds=(43, 44, 45),
        max_rates=6,
        overrides=_SHORT
        | {
            "model.num_layers": 2,
            "model.d_model": 64,
            "model.num_heads": 2,
            "model.d_ff": 128,
            "model.vocab_size": 1024,
            "model.moe_block": 128,
            "train.steps": 384,
            "train.checkpoint_every": 100,
            "train.log_every": 4,
            "data.max_tokens": 48_000,  # 53 passes, as the original's 26.6 M tokens of 0.5 M
            "eval.contexts": (24, 96, 384, 1536),
            "eval.num_targets": 6144,
            "eval.own_targets": 16_384,
        },
    ),
    "published": Scale(
        config="published",
        shapes=((104, 256), (26, 1024), (6, 4096)),
        equal_shapes=((96, 256), (24, 1024), (6, 4096)),
        seeds=(43, 44, 45),
        max_rates=6,
        overrides=_SHORT | {"train.steps": 1000, "train.checkpoint_every": 250, "data.max_tokens": 500_000},
    ),
    "smoke": Scale(
        config="cpu",
        shapes=((26, 32), (13, 64), (3, 256)),
        equal_shapes=((24, 32), (12, 64), (3, 256)),
        seeds=(43, 44),
        max_rates=3,
        overrides=_SHORT
        | {
            "model.num_layers": 1,
            "model.d_model": 32,
            "model.num_heads": 2,
            "model.d_ff": 32,
            "model.num_experts": 4,
            "model.vocab_size": 512,
            "model.moe_block": 64,
            "train.steps": 24,
            "train.checkpoint_every": 0,
            "train.log_every": 8,
            "data.max_tokens": 4000,
            "eval.contexts": (8, 24),  # each is compiled for
            "eval.num_targets": 240,
            "eval.run_length": 12,
            "eval.own_targets": 1024,
        },
    ),
}
