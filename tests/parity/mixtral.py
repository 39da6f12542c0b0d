"""A peer: Mixtral of Hugging Face transformers (Jiang et al. 2024, arXiv:2401.04088) at our dimensions, with gated
experts, and the training step that the original takes: the same clipping, Muon for matrices, AdamW for the rest.

It differs from our swiglu variant in three things that cost next to nothing: the embedding is not scaled by sqrt(D),
its balance loss is of all layers' assignments at once, and each half of a head is rotated against the other. It has no
dropout but that of attention probabilities, where ours has four more, and no noise in its router: the two are compared
with config.model.dropout=0. Experts run as transformers chooses (`grouped_mm`), attention in PyTorch's fused kernels.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.nn.utils import parametrize

from tests.parity.original import Batch


def build(config: Any, seq_len: int) -> transformers.MixtralForCausalLM:
    """Random weights, in float32, of a `config.model` whose activation is swiglu."""
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            intermediate_size=config.d_ff,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_heads,
            max_position_embeddings=seq_len,
            num_local_experts=config.num_experts,
            num_experts_per_tok=config.experts_per_token,
            rms_norm_eps=config.norm_epsilon,
            rope_parameters=dict(rope_type="default", rope_theta=config.rope_base),
            tie_word_embeddings=config.tie_embeddings,
            initializer_range=config.init_stddev,
            attention_dropout=config.dropout,
            sliding_window=None,
            attn_implementation="sdpa",
            output_router_logits=True,
            use_cache=False,
        )
    )


class Muon(torch.optim.Optimizer):
    """Orthogonalised Nesterov momentum of weights [out, in] and of stacks of experts [E, out, in], a stack at once.

    A group's `side_by_side` says how many matrices each of its weights holds along `out`: gate and up are one weight.
    """

    def __init__(self, groups: Iterable[dict], lr: float, momentum: float, dtype: torch.dtype = torch.float32):
        super().__init__(groups, dict(lr=lr, momentum=momentum, dtype=dtype, side_by_side=1))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["mean"] = torch.zeros_like(p)
                state["mean"].lerp_(p.grad, 1 - group["momentum"])
                ahead = p.grad.lerp(state["mean"], group["momentum"])
                matrices = ahead.reshape(-1, p.shape[-2] // group["side_by_side"], p.shape[-1])
                scale = max(1, matrices.shape[1] / matrices.shape[2]) ** 0.5
                direction = newton_schulz_stack(matrices.to(group["dtype"])).to(p.dtype)
                p.add_(direction.reshape(p.shape), alpha=-group["lr"] * scale)


def newton_schulz_stack(X: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """`original.newton_schulz` of each matrix of a stack [S, out, in], in batched products."""
    tall = X.shape[1] > X.shape[2]
    if tall:
        X = X.mT
    X = X / (X.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=-4.7750, alpha=2.0315), X, beta=3.4445)
    return X.mT if tall else X


def sort_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """(matrices and stacks of them, those that are gate and up in one, all others)."""
    matrices, pairs, rest = [], [], []
    for name, p in model.named_parameters():
        table = name.endswith(("embed_tokens.weight", "lm_head.weight"))
        kind = rest if p.ndim == 1 or table else pairs if "gate_up_proj" in name else matrices
        kind.append(p)
    return matrices, pairs, rest


class Cast(nn.Module):
    """What autocast does to the weights of every linear layer, and not to those of `grouped_mm`."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.to(self.dtype)


class Trainer:
    """One step after another of a model that `build` made.

    dtype: Muon's. autocast: of forward and loss, the experts' weights included; None, the parameters' own.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Any,
        dtype: torch.dtype = torch.float32,
        autocast: torch.dtype | None = None,
    ):
        self.model, self.clip_norm, self.autocast = model, config.clip_norm, autocast
        if autocast is not None:
            stacked = [(m, n) for m in model.modules() for n, p in m.named_parameters(recurse=False) if p.ndim == 3]
            for module, name in stacked:
                parametrize.register_parametrization(module, name, Cast(autocast), unsafe=True)
        matrices, pairs, rest = sort_parameters(model)
        self.optimizers = [
            Muon(
                [dict(params=matrices), dict(params=pairs, side_by_side=2)],
                config.learning_rate,
                config.momentum,
                dtype,
            ),
            torch.optim.AdamW(
                rest,
                lr=config.adamw_learning_rate,
                betas=(config.beta1, config.beta2),
                eps=config.epsilon,
                weight_decay=config.weight_decay,
            ),
        ]

    def step(self, batch: Batch, balance_weight: float) -> float:
        """One training step on a batch (targets of -1 are not counted). Returns its cross-entropy."""
        inputs, targets = batch
        with torch.autocast(inputs.device.type, self.autocast, enabled=self.autocast is not None):
            out = self.model(inputs)
            loss = F.cross_entropy(out.logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        (loss + balance_weight * out.aux_loss).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.item()
