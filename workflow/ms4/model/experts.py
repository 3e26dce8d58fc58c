"""Routed experts over packed, frozen weights, with LoRA as thin grouped products.

transformers' own expert modules keep their place and their call; what is registered here through
ExpertsInterface is how they compute. Weights are dequantized a slice of experts at a time, again
in the backward pass, and never get a gradient; W + ΔW is nowhere built.

Shape letters: T tokens, K routes of a token, S = T·K routed rows sorted by expert, E experts,
H hidden, O out, I in, R rank.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ms4.weights import nf4
from ms4.weights.tables import packed_shapes

IMPLEMENTATION = "ms4"
"""The name under which transformers' configuration asks for these experts."""


RANK_STEP = 8
"""Ranks are padded to a multiple of this: 16 bytes in BF16."""


class ExpertStore(nn.Module, ABC):
    """One projection of all experts, [E, O, I], frozen; every tensor has E as dimension 0."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.shape = shape

    @abstractmethod
    def dequantize(self, first: int, last: int, dtype: torch.dtype) -> torch.Tensor:
        """Experts `first` to `last` (exclusive) as [last - first, O, I] in `dtype`."""


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


class BF16Store(ExpertStore):
    """Weights as they are."""

    def __init__(self, shape: tuple[int, int, int], device: torch.device | str = "meta") -> None:
        super().__init__(shape)
        self.weight = _frozen(torch.empty(shape, dtype=torch.bfloat16, device=device))

    def dequantize(self, first: int, last: int, dtype: torch.dtype) -> torch.Tensor:
        return self.weight[first:last].to(dtype)


class NF4Store(ExpertStore):
    """Weights in NF4 with double quantization (see `ms4.weights.nf4`)."""

    def __init__(self, shape: tuple[int, int, int], device: torch.device | str = "meta") -> None:
        super().__init__(shape)
        sizes = packed_shapes(shape[0], shape[1] * shape[2])
        for suffix, (dtype, size) in sizes.items():
            kind = torch.uint8 if dtype == "U8" else torch.float32
            setattr(self, suffix[1:], _frozen(torch.empty(size, dtype=kind, device=device)))

    def dequantize(self, first: int, last: int, dtype: torch.dtype) -> torch.Tensor:
        parts = [getattr(self, suffix[1:])[first:last] for suffix in nf4.SUFFIXES]
        return nf4.dequantize(nf4.Packed(*parts), (last - first, *self.shape[1:]), dtype)


class ExpertLora(nn.Module):
    """LoRA of one projection of all experts: ΔW_e = scaling · B_e A_e."""

    def __init__(self, shape: tuple[int, int, int], rank: int, scaling: float) -> None:
        super().__init__()
        experts, out, inner = shape
        self.scaling = scaling
        self.enabled = True
        self.A = nn.Parameter(torch.empty(experts, rank, inner))
        self.B = nn.Parameter(torch.zeros(experts, out, rank))
        # As for a dense LoRA: uniform in ±1/sqrt(in), which kaiming_uniform(a=√5) comes to.
        nn.init.uniform_(self.A, -1 / math.sqrt(inner), 1 / math.sqrt(inner))

    def forward(self, x_SI: torch.Tensor, offsets_E: torch.Tensor) -> torch.Tensor:
        """scaling · (x A_eᵀ) B_eᵀ for each row's expert: [S, O]."""
        A_ERI, B_EOR = self.A.to(x_SI.dtype), self.B.to(x_SI.dtype)
        # Grouped products want rows of whole 16 bytes; zero ranks add nothing.
        short = -A_ERI.shape[1] % RANK_STEP
        if short:
            A_ERI, B_EOR = F.pad(A_ERI, (0, 0, 0, short)), F.pad(B_EOR, (0, short))
        thin_SR = F.grouped_mm(x_SI, A_ERI.transpose(1, 2), offs=offsets_E)
        return F.grouped_mm(thin_SR, B_EOR.transpose(1, 2), offs=offsets_E) * self.scaling


def _slices(store: ExpertStore, ends: list[int]) -> Iterator[tuple[int, int, int, int]]:
    """(first expert, last expert, first row, last row) of each slice that has rows."""
    experts = store.shape[0]
    for first in range(0, experts, nf4.MAX_EXPERTS):
        last = min(first + nf4.MAX_EXPERTS, experts)
        start, end = (ends[first - 1] if first else 0), ends[last - 1]
        if end > start:
            yield first, last, start, end


class _FrozenGroupedLinear(torch.autograd.Function):
    """y = x W_eᵀ for rows sorted by expert; saves no weight, dequantizes again in backward."""

    @staticmethod
    def forward(
        ctx: Any, x_SI: torch.Tensor, offsets_E: torch.Tensor, store: ExpertStore
    ) -> torch.Tensor:
        ends = offsets_E.tolist()
        y_SO = x_SI.new_empty(x_SI.shape[0], store.shape[1])
        for first, last, start, end in _slices(store, ends):
            W_EOI = store.dequantize(first, last, x_SI.dtype)
            offsets = offsets_E[first:last] - start
            y_SO[start:end] = F.grouped_mm(x_SI[start:end], W_EOI.transpose(1, 2), offs=offsets)
            del W_EOI  # or the next slice would stand beside it
        ctx.store, ctx.ends = store, ends
        ctx.save_for_backward(offsets_E)
        return y_SO

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        gradient_SO = gradients[0].contiguous()
        (offsets_E,) = ctx.saved_tensors
        store = ctx.store
        result_SI = gradient_SO.new_empty(gradient_SO.shape[0], store.shape[2])
        for first, last, start, end in _slices(store, ctx.ends):
            W_EOI = store.dequantize(first, last, gradient_SO.dtype)
            offsets = offsets_E[first:last] - start
            result_SI[start:end] = F.grouped_mm(gradient_SO[start:end], W_EOI, offs=offsets)
            del W_EOI
        return result_SI, None, None


def _project(
    x_SI: torch.Tensor, offsets_E: torch.Tensor, store: ExpertStore, lora: ExpertLora | None
) -> torch.Tensor:
    y_SO: torch.Tensor = _FrozenGroupedLinear.apply(  # type: ignore[no-untyped-call]
        x_SI, offsets_E, store
    )
    if lora is not None and lora.enabled:
        y_SO = y_SO + lora(x_SI, offsets_E)
    return y_SO


def experts_forward(
    module: Any, hidden_TH: torch.Tensor, routes_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """The experts' weighted sum for each token: [T, H].

    Args:
        module: transformers' expert module, its two projections replaced by an `ExpertStore`,
            with an `ExpertLora` or None as `gate_up_lora` and `down_lora`.
        hidden_TH: the tokens.
        routes_TK: the experts of each token.
        weights_TK: their weights.
    """
    T, K = routes_TK.shape
    experts_S = routes_TK.reshape(-1)
    order_S = torch.argsort(experts_S, stable=True)
    counts_E = torch.bincount(experts_S, minlength=module.gate_up_proj.shape[0])
    offsets_E = counts_E.cumsum(0).to(torch.int32)
    x_SH = hidden_TH.index_select(0, order_S // K)
    gate_up = _project(x_SH, offsets_E, module.gate_up_proj, module.gate_up_lora)
    gate, up = gate_up.chunk(2, dim=-1)
    y_SH = _project(module.act_fn(gate) * up, offsets_E, module.down_proj, module.down_lora)
    y_SH = y_SH * weights_TK.reshape(-1)[order_S][:, None].to(y_SH.dtype)
    # Back to the tokens' order by the inverse permutation and a sum over the routes: unlike a
    # scatter-add, that is deterministic everywhere.
    inverse_S = torch.argsort(order_S)
    return y_SH.index_select(0, inverse_S).view(T, K, -1).sum(dim=1).to(hidden_TH.dtype)


def experts_forward_plain(
    module: Any, hidden_TH: torch.Tensor, routes_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """`experts_forward` one expert at a time, with W + ΔW built: the readable reference."""
    result_TH = torch.zeros_like(hidden_TH)
    for e in range(module.gate_up_proj.shape[0]):
        rows, route = torch.where(routes_TK == e)
        x = hidden_TH[rows]
        for store, lora in (
            (module.gate_up_proj, module.gate_up_lora),
            (module.down_proj, module.down_lora),
        ):
            weight = store.dequantize(e, e + 1, x.dtype)[0]
            if lora is not None and lora.enabled:
                weight = weight + lora.scaling * (lora.B[e] @ lora.A[e]).to(x.dtype)
            x = F.linear(x, weight)
            if store is module.gate_up_proj:
                gate, up = x.chunk(2, dim=-1)
                x = module.act_fn(gate) * up
        result_TH = result_TH.index_add(0, rows, x * weights_TK[rows, route][:, None])
    return result_TH


def install(module: nn.Module, gate_up: ExpertStore, down: ExpertStore) -> None:
    """Give transformers' expert module packed weights in place of its parameters."""
    for name, store in (("gate_up_proj", gate_up), ("down_proj", down)):
        delattr(module, name)
        module.add_module(name, store)
    module.register_module("gate_up_lora", None)
    module.register_module("down_lora", None)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
