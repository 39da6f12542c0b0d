"""Model FLOPs by formula: what the mathematics needs, not what a program does.

Counted: matrix products of the parameters that a token uses (experts: those it chose), and causal attention. Not
counted: recomputation, padding, norms, softmax, the optimiser. Training is three times the forward pass
(Chowdhery et al. 2022, arXiv:2204.02311, appendix B).
"""

from typing import Any

PEAK_BFLOAT16 = {  # dense FLOP/s of one device, from the makers' data sheets
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}


def parameter_counts(model: Any) -> dict[str, int]:
    """{'total', 'active'} of a config.model: active leaves out the experts that a token does not choose."""
    D, V, L, E = model.d_model, model.vocab_size, model.num_layers, model.num_experts
    expert = _expert_matrices(model) * D * model.d_ff
    tables = V * D * (1 if model.tie_embeddings else 2)
    layer = 4 * D * D + D * E + 2 * D
    total = tables + D + L * (layer + E * expert)
    return dict(total=total, active=total - L * (E - model.experts_per_token) * expert)


def train_flops_per_token(model: Any, seq_len: int) -> float:
    """FLOPs a token of one training step at rows of `seq_len` tokens.

    forward = 2 x (qkv and output 4 D^2 + router D E + chosen experts) a layer + 2 V D of the head + 4 D x mean number
    of keys a layer, (T + 1) / 2 under the causal mask.
    """
    D = model.d_model
    experts = model.experts_per_token * _expert_matrices(model) * D * model.d_ff
    layer = 2 * (4 * D * D + D * model.num_experts + experts) + 4 * D * (seq_len + 1) / 2
    return 3 * (model.num_layers * layer + 2 * model.vocab_size * D)


def mfu(tokens_per_s: float, flops_per_token: float, peak: float) -> float:
    """Model FLOPs utilisation of one device: its model FLOP/s over its peak FLOP/s."""
    return tokens_per_s * flops_per_token / peak


def peak_flops(device_kind: str) -> float | None:
    """bfloat16 FLOP/s of a known accelerator, by the longest name in its kind; None where unknown."""
    names = [name for name in PEAK_BFLOAT16 if name.lower() in device_kind.lower()]
    return PEAK_BFLOAT16[max(names, key=len)] if names else None


def _expert_matrices(model: Any) -> int:
    return 3 if model.activation == "swiglu" else 2
