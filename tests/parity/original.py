"""The original experiment's model, losses and optimisers, written a second time in plain PyTorch.

It shares no code with `research/`: test_parity.py compares the two, and experiments/benchmark.py
times them in turn. `config` is any object with the fields of config.model (or config.optimizer);
configs/base.py says what they mean.
Letters: B batch, T sequence, D width, H heads, K head width, N = B * T tokens, E experts,
V vocabulary.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

Batch = tuple[torch.Tensor, torch.Tensor]  # inputs, targets: int64 [B, T]


def rotate_pairs(x_BHTK: torch.Tensor, base: float) -> torch.Tensor:
    """Turn the pair (2i, 2i+1) at position t, a complex number, by an angle t base^(-2i/K)."""
    T, K = x_BHTK.shape[-2:]
    precise = torch.promote_types(x_BHTK.dtype, torch.float32)
    speed = base ** (-torch.arange(0, K, 2, dtype=precise, device=x_BHTK.device) / K)
    angle = torch.outer(torch.arange(T, dtype=precise, device=x_BHTK.device), speed)
    turn = torch.polar(torch.ones_like(angle), angle)
    pairs = torch.view_as_complex(x_BHTK.to(precise).reshape(*x_BHTK.shape[:-1], K // 2, 2))
    return torch.view_as_real(pairs * turn).flatten(-2).to(x_BHTK.dtype)


class Attention(nn.Module):
    """Causal softmax attention; rows of the fused `qkv.weight` go by (q, k, v), head, width."""

    def __init__(self, config: Any):
        super().__init__()
        self.num_heads, self.base, self.dropout = config.num_heads, config.rope_base, config.dropout
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model, bias=False)
        self.out = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, D = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(
            rotate_pairs(q, self.base),
            rotate_pairs(k, self.base),
            v,
            is_causal=True,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.out(mixed.transpose(1, 2).reshape(B, T, D))


class Expert(nn.Module):
    def __init__(self, config: Any):
        super().__init__()
        self.w1 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.w2 = nn.Linear(config.d_ff, config.d_model, bias=False)
        gated = config.activation == "swiglu"
        self.w3 = nn.Linear(config.d_model, config.d_ff, bias=False) if gated else None
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = F.silu(self.w1(x))
        if self.w3 is not None:
            hidden = hidden * self.w3(x)
        return self.w2(self.dropout(hidden))


class MixtureOfExperts(nn.Module):
    """Top-k routing without a capacity: (output, balance loss E * sum_e f_e P_e) of one layer."""

    def __init__(self, config: Any):
        super().__init__()
        self.num_chosen, self.noise = config.experts_per_token, config.router_noise
        self.router = nn.Linear(config.d_model, config.num_experts, bias=False)
        self.experts = nn.ModuleList(Expert(config) for _ in range(config.num_experts))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows_ND = x.flatten(0, 1)
        logits_NE = self.router(rows_ND)
        if self.training and self.noise > 0:
            logits_NE = logits_NE + self.noise * torch.randn_like(logits_NE)
        best_NK, chosen_NK = logits_NE.topk(self.num_chosen, dim=-1)
        share_NK = best_NK.softmax(dim=-1)

        out_ND = torch.zeros_like(rows_ND)
        for e, expert in enumerate(self.experts):
            mask_NK = chosen_NK == e
            mine_N = mask_NK.any(dim=-1)
            # Without tokens it runs on no rows, for a gradient of zeros: its momentum still decays.
            out_ND[mine_N] += share_NK[mask_NK][:, None] * expert(rows_ND[mine_N])

        num_experts = len(self.experts)
        load_E = torch.bincount(chosen_NK.flatten(), minlength=num_experts) / chosen_NK.numel()
        probability_E = logits_NE.softmax(dim=-1).mean(dim=0)
        return out_ND.view_as(x), num_experts * (load_E * probability_E).sum()


class Block(nn.Module):
    def __init__(self, config: Any):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.d_model, eps=config.norm_epsilon)
        self.attention = Attention(config)
        self.moe_norm = nn.RMSNorm(config.d_model, eps=config.norm_epsilon)
        self.moe = MixtureOfExperts(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        out, balance = self.moe(self.moe_norm(x))
        return x + self.dropout(out), balance


class Original(nn.Module):
    """Tokens [B, T] -> (logits [B, T, V], balance loss of each layer [L])."""

    def __init__(self, config: Any):
        super().__init__()
        self.scale = config.d_model**0.5
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_norm = nn.RMSNorm(config.d_model, eps=config.norm_epsilon)
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=config.init_stddev)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.dropout(self.embedding(tokens) * self.scale)
        balances = []
        for block in self.blocks:
            x, balance = block(x)
            balances.append(balance)
        return self.head(self.dropout(self.final_norm(x))), torch.stack(balances)


def losses(model: Original, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean cross-entropy in nats over targets other than -1, balance loss summed over layers)."""
    inputs, targets = batch
    logits, balance = model(inputs)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1), balance.sum()


def newton_schulz(matrix: torch.Tensor, steps: int = 5, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Muon's quintic iteration (Jordan et al. 2024) in `dtype`: singular values go to about 1."""
    X = matrix.to(dtype)
    tall = X.shape[0] > X.shape[1]
    if tall:
        X = X.T
    X = X / (X.norm() + 1e-7)
    for _ in range(steps):
        A = X @ X.T
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return X.T if tall else X


class Muon(torch.optim.Optimizer):
    """Orthogonalised Nesterov momentum of weights [out, in]; momentum is a running mean."""

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__(parameters, dict(lr=lr, momentum=momentum, dtype=dtype))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            beta = group["momentum"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["mean"] = torch.zeros_like(p)
                state["mean"].lerp_(p.grad, 1 - beta)
                ahead = p.grad.lerp(state["mean"], beta)
                direction = newton_schulz(ahead, dtype=group["dtype"]).to(p.dtype)
                p.add_(direction, alpha=-group["lr"] * max(1, p.shape[0] / p.shape[1]) ** 0.5)


class Trainer:
    """Clip, then Muon for the matrices, AdamW for embedding, head and norms; both warm up.

    dtype: Muon's. autocast: of forward and loss; None, the parameters' own.
    """

    def __init__(
        self,
        model: Original,
        config: Any,
        num_steps: int,
        dtype: torch.dtype = torch.float32,
        autocast: torch.dtype | None = None,
    ):
        self.model, self.clip_norm, self.autocast = model, config.clip_norm, autocast
        tables = {id(model.embedding.weight), id(model.head.weight)}
        is_matrix = {p: p.ndim == 2 and id(p) not in tables for p in model.parameters()}
        muon = [p for p, matrix in is_matrix.items() if matrix]
        rest = [p for p, matrix in is_matrix.items() if not matrix]
        self.optimizers = [
            Muon(muon, config.learning_rate, config.momentum, dtype),
            torch.optim.AdamW(
                rest,
                lr=config.adamw_learning_rate,
                betas=(config.beta1, config.beta2),
                eps=config.epsilon,
                weight_decay=config.weight_decay,
            ),
        ]
        warmup = max(1, round(config.warmup_fraction * num_steps))
        self.schedules = [
            torch.optim.lr_scheduler.LambdaLR(o, lambda step: min(1.0, (step + 1) / warmup)) for o in self.optimizers
        ]

    def step(self, batch: Batch, balance_weight: float) -> float:
        """One training step on a batch. Returns its cross-entropy."""
        with torch.autocast(batch[0].device.type, self.autocast, enabled=self.autocast is not None):
            cross_entropy, balance = losses(self.model, batch)
        (cross_entropy + balance_weight * balance).backward()
        self.apply_gradients()
        return cross_entropy.item()

    def apply_gradients(self) -> None:
        """Clip the gradients that the parameters hold, update, and let go of them."""
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
