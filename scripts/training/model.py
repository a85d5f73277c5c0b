"""A compact Qwen3-MoE to train; its state_dict has the names transformers 5 gives the same model.

Source of the arithmetic: transformers, models/qwen3_moe/modeling_qwen3_moe.py.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .experts import Mixture, compute_dtype
from .shape import Shape

INIT_STD = 0.02


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps).to(x.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention with an RMSNorm on each head of q and k."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.shape = shape
        self.q_proj = nn.Linear(shape.hidden, q, bias=False)
        self.k_proj = nn.Linear(shape.hidden, kv, bias=False)
        self.v_proj = nn.Linear(shape.hidden, kv, bias=False)
        self.o_proj = nn.Linear(q, shape.hidden, bias=False)
        self.q_norm = RMSNorm(shape.head_dim, shape.norm_eps)
        self.k_norm = RMSNorm(shape.head_dim, shape.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [batch, time, H]; cos, sin [time, 1, head_dim]."""
        batch, time, _ = x.shape
        heads = (batch, time, -1, self.shape.head_dim)
        q = rotate(self.q_norm(self.q_proj(x).view(heads)), cos, sin).transpose(1, 2)
        k = rotate(self.k_norm(self.k_proj(x).view(heads)), cos, sin).transpose(1, 2)
        v = self.v_proj(x).view(heads).transpose(1, 2)
        shared = self.shape.heads // self.shape.kv_heads
        if shared > 1:
            k, v = (t.repeat_interleave(shared, dim=1) for t in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).reshape(batch, time, -1))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x [..., time, heads, head_dim], halves paired.

    `sin` carries the sign of the first half, so one roll replaces transformers' rotate_half.
    """
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


class Layer(nn.Module):
    """Attention, then the mixture, each on a normalised input and added to the stream."""

    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.self_attn = Attention(shape)
        self.mlp = Mixture(shape)
        self.input_layernorm = RMSNorm(shape.hidden, shape.norm_eps)
        self.post_attention_layernorm = RMSNorm(shape.hidden, shape.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        attended = self.self_attn(self.input_layernorm(x), cos, sin)
        x = x + F.dropout(attended, self.dropout, self.training)
        mixed, balance = self.mlp(self.post_attention_layernorm(x).flatten(0, 1))
        return x + F.dropout(mixed.view_as(x), self.dropout, self.training), balance


class Backbone(nn.Module):
    """Embedding, layers, last norm: transformers' Qwen3MoeModel."""

    frequency: Tensor

    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape, dropout) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.hidden, shape.norm_eps)
        half = torch.arange(0, shape.head_dim, 2, dtype=torch.float64) / shape.head_dim
        self.register_buffer("frequency", shape.rope_theta**-half, persistent=False)

    def rotary(self, time: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and signed sin [time, 1, head_dim] for `rotate`."""
        position = torch.arange(time, device=self.frequency.device)
        angle = position[:, None, None] * self.frequency
        cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
        return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """ids int64 [batch, time] -> (hidden [batch, time, H], mean balancing loss)."""
        x = F.dropout(self.embed_tokens(ids), self.dropout, self.training)
        cos, sin = self.rotary(ids.shape[1], compute_dtype(x))
        balance = []
        for layer in self.layers:
            x, loss = layer(x, cos, sin)
            balance.append(loss)
        return self.norm(x), torch.stack(balance).mean()


class CausalLM(nn.Module):
    """The model: `model` is its backbone, the head is the embedding."""

    def __init__(self, shape: Shape, dropout: float = 0.0) -> None:
        super().__init__()
        self.shape = shape
        self.model = Backbone(shape, dropout)

    def initialise(self, generator: torch.Generator) -> None:
        """Normal weights of deviation 0.02; what writes into the stream is scaled by depth."""
        into_stream = INIT_STD / (2 * self.shape.layers) ** 0.5
        for name, p in self.named_parameters():
            if p.dim() > 1:
                writes = name.endswith(("o_proj.weight", "down_proj"))
                std = into_stream if writes else INIT_STD
                nn.init.normal_(p, std=std, generator=generator)

    def logits(self, ids: Tensor) -> Tensor:
        """float32 [batch, time, vocab] of ids int64 [batch, time]."""
        hidden, _ = self.model(ids)
        return F.linear(hidden, self.model.embed_tokens.weight).float()

    def forward(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """ids, targets int64 [batch, time] -> (mean cross entropy in nats, balancing loss)."""
        hidden, balance = self.model(ids)
        rows = hidden.flatten(0, 1).to(compute_dtype(hidden))
        loss: Tensor = HeadLoss.apply(rows, self.model.embed_tokens.weight, targets.flatten())
        return loss, balance


class HeadLoss(torch.autograd.Function):
    """Mean cross entropy of hidden [n, H] @ weight.T [H, V] against targets [n].

    Works in chunks of rows and takes the gradient on the way, so the [n, V] logits never exist
    as a whole.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        rows = 8192 if hidden.is_cuda else 512
        w = weight.to(hidden.dtype)
        total = torch.zeros((), device=hidden.device)
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight)
        for i in range(0, len(hidden), rows):
            part, target = hidden[i : i + rows], targets[i : i + rows, None]
            logits = (part @ w.t()).float()
            high = logits.amax(-1, keepdim=True)
            total -= (logits.gather(1, target) - high).sum()
            p = logits.sub_(high).exp_()
            norm = p.sum(-1, keepdim=True)
            total += norm.log().sum()
            p.div_(norm)
            p.scatter_add_(1, target, p.new_full((), -1.0).expand_as(target))
            p = p.to(hidden.dtype)
            torch.mm(p, w, out=d_hidden[i : i + rows])
            if d_weight.dtype == p.dtype:
                d_weight.addmm_(p.t(), part)
            else:
                d_weight += p.t() @ part
        ctx.save_for_backward(d_hidden.div_(len(hidden)), d_weight.div_(len(hidden)))
        return total / len(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * grad.to(d_hidden.dtype), d_weight * grad, None
