"""The mixture: routing, its balancing loss, and expert MLPs computed group by group.

(token, slot) pairs are sorted by expert, so every expert multiplies one contiguous block of rows.
CUDA hands all blocks to one grouped product where torch has it; elsewhere a loop keeps each
block's intermediates in the cache and writes its own backward pass.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .shape import Shape


def compute_dtype(x: Tensor) -> torch.dtype:
    """What matrix products of x are computed in: autocast's dtype where it is on, else x's."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class Gather(torch.autograd.Function):
    """Rows of x [tokens, H] for the sorted pairs; the gradient is a sum over a token's slots.

    Plain indexing would scatter-add in its backward pass, which is slow and on CUDA not
    reproducible.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, slots: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.slots = slots
        return x.index_select(0, order // slots)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        back = grad.index_select(0, inverse).view(-1, ctx.slots, grad.shape[-1])
        return back.sum(1), None, None, None


class Combine(torch.autograd.Function):
    """Weighted sum over slots: y [pairs, H] in expert order, weight [tokens, slots] -> [tokens, H].

    As `Gather`, it knows that `inverse` is a permutation, so nothing is scattered.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, weight: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(y, weight, order, inverse)
        pairs = y.index_select(0, inverse).view(*weight.shape, y.shape[-1])
        return torch.bmm(weight.to(y.dtype).unsqueeze(1), pairs).squeeze(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        y, weight, order, inverse = ctx.saved_tensors
        slots = weight.shape[1]
        rows = grad.index_select(0, order // slots)
        d_weight = (rows.float() * y.float()).sum(-1).index_select(0, inverse).view_as(weight)
        d_y = rows * weight.to(rows.dtype).flatten().index_select(0, order).unsqueeze(1)
        return d_y, d_weight.to(weight.dtype), None, None


class LoopedExperts(torch.autograd.Function):
    """down(silu(gate(x)) * up(x)) of each expert on its own rows.

    x [pairs, H] sorted by expert, gate_up [E, 2I, H], down [E, H, I], counts: rows per expert.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate_up: Tensor, down: Tensor, counts: tuple[int, ...]
    ) -> Tensor:
        h = x.new_empty(x.shape[0], gate_up.shape[1])
        y = torch.empty_like(x)
        for rows, gu, dn in zip(_blocks(counts), gate_up, down, strict=True):
            torch.mm(x[rows], gu.t(), out=h[rows])
            gate, up = h[rows].chunk(2, dim=1)
            torch.mm(F.silu(gate).mul_(up), dn.t(), out=y[rows])
        ctx.save_for_backward(x, h, gate_up, down)
        ctx.counts = counts
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, h, gate_up, down = ctx.saved_tensors
        dx, d_gate_up, d_down = (torch.empty_like(t) for t in (x, gate_up, down))
        for e, rows in enumerate(_blocks(ctx.counts)):
            gate, up = h[rows].chunk(2, dim=1)
            sigmoid = torch.sigmoid(gate)
            silu = gate * sigmoid
            torch.mm(grad[rows].t(), silu * up, out=d_down[e])
            d_act = grad[rows] @ down[e]
            # silu' = sigmoid * (1 + gate * (1 - sigmoid)) = sigmoid + silu * (1 - sigmoid)
            slope = torch.addcmul(sigmoid + silu, silu, sigmoid, value=-1)
            d_h = torch.cat([slope.mul_(up).mul_(d_act), silu.mul_(d_act)], dim=1)
            torch.mm(d_h.t(), x[rows], out=d_gate_up[e])
            torch.mm(d_h, gate_up[e], out=dx[rows])
        return dx, d_gate_up, d_down, None


def _blocks(counts: tuple[int, ...]) -> list[slice]:
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + count)
    return [slice(a, b) for a, b in pairwise(starts)]


def grouped_experts(x: Tensor, gate_up: Tensor, down: Tensor, counts: Tensor) -> Tensor:
    """The same as `LoopedExperts` in two grouped products, without a host synchronisation."""
    ends = counts.cumsum(0).to(torch.int32)
    x, gate_up, down = (t.to(torch.bfloat16) for t in (x, gate_up, down))
    h = torch._grouped_mm(x, gate_up.transpose(1, 2), offs=ends)
    gate, up = h.chunk(2, dim=1)
    return torch._grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=ends)


class Experts(nn.Module):
    """Weights of all experts of a layer, packed as transformers 5 packs them."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        e, h, i = shape.experts, shape.hidden, shape.moe_intermediate
        self.gate_up_proj = nn.Parameter(torch.empty(e, 2 * i, h))
        self.down_proj = nn.Parameter(torch.empty(e, h, i))

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """x [pairs, H] sorted by expert; counts int64 [E]; returns [pairs, H]."""
        if x.is_cuda and hasattr(torch, "_grouped_mm"):
            return grouped_experts(x, self.gate_up_proj, self.down_proj, counts)
        gate_up, down = self.gate_up_proj.to(x.dtype), self.down_proj.to(x.dtype)
        out: Tensor = LoopedExperts.apply(x, gate_up, down, tuple(counts.tolist()))
        return out


class Mixture(nn.Module):
    """Router and experts of a layer (Qwen3MoeSparseMoeBlock)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.top_k = shape.top_k
        self.gate = nn.Linear(shape.hidden, shape.experts, bias=False)
        self.experts = Experts(shape)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [tokens, H] -> (output [tokens, H], balancing loss: a float32 scalar)."""
        with torch.autocast(x.device.type, enabled=False):
            probs = F.linear(x.float(), self.gate.weight).softmax(-1)
        weight, chosen = probs.topk(self.top_k, dim=-1)
        weight = weight / weight.sum(-1, keepdim=True)
        pair_expert = chosen.flatten()
        order = pair_expert.argsort(stable=True)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order), device=order.device)
        labels = torch.arange(probs.shape[1], device=x.device)
        counts = (pair_expert[:, None] == labels).sum(0)
        rows: Tensor = Gather.apply(x.to(compute_dtype(x)), order, inverse, self.top_k)
        out: Tensor = Combine.apply(self.experts(rows, counts), weight, order, inverse)
        return out, balance_loss(probs, counts)


def balance_loss(probs: Tensor, counts: Tensor) -> Tensor:
    """E * sum_e(share of tokens that chose e * mean probability of e); top_k when balanced.

    Switch Transformers (Fedus et al. 2021), equation 4, scaled as transformers'
    load_balancing_loss_func does for top-k; here a layer at a time, so that one layer's
    imbalance cannot cancel another's.
    """
    share = counts.to(probs.dtype) / probs.shape[0]
    return probs.shape[1] * (share * probs.mean(0)).sum()
