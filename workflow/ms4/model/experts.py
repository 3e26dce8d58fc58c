"""Routed experts over packed, frozen weights, with LoRA as thin grouped products.

transformers' own expert modules keep their place and their call; what is registered here through
ExpertsInterface is how they compute. It is one autograd function: weights are dequantized a slice
of experts at a time, again in the backward pass, and never get a gradient; W + ΔW is nowhere built.

Of the activations only gate and up before their product are kept: making them again would take
another dequantization. Rows, thin products and the experts' outputs are not: the first two are
cheap, and the last is not needed, since the gradient of a route's weight, y·g, is a·(Wᵀg) as well,
which the backward pass has anyway.

Shape letters: T tokens, K routes of a token, S = T·K routed rows sorted by expert, E experts,
H hidden, I expert width, O out, R rank. In names of a slice, S and E are its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ms4.memory import slice_rows
from ms4.model.grouped import outer, product
from ms4.model.stores import ExpertStore, Which, Workspace

IMPLEMENTATION = "ms4"
"""The name under which transformers' configuration asks for these experts."""
RANK_STEP = 8
"""Ranks are padded to a multiple of this: 16 bytes in BF16."""
SELECT_SHARE = 0.7
"""Where at most this share of a slice's experts has rows, only those are dequantized. Their packed
weights are gathered first. In NF4 that moves half a byte a weight in and out, and dequantizing half
a byte in and two out: n of N experts take 3.5·n with gathering and 2.5·N without, the same at 0.71.
With 128 experts and four a token that share is passed at about 40 tokens: it is for generation."""


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


@dataclass(frozen=True)
class _Slice:
    """Some experts and the rows that come to them, or a part of those rows."""

    which: Which
    rows: slice
    offsets_E: torch.Tensor
    """int32: where each expert's rows end, from the slice's first row on."""


def _slices(
    offsets_E: torch.Tensor,
    ends: list[int],
    projections: tuple[_Projection, _Projection],
    like: torch.Tensor,
) -> Iterator[_Slice]:
    """The slices that have rows, one with too many in parts; experts without any at either end of
    a slice are left out, and where they are many, all of them.

    Args:
        offsets_E: where each expert's rows end, on the device of the rows.
        ends: the same on the host.
        projections: of the layer.
        like: a tensor of the dtype and device of the computation.
    """
    largest = max(p.store.shape[1] * p.store.shape[2] for p in projections)
    size = projections[0].workspace.size(largest, like.dtype)
    starts = [0, *ends[:-1]]
    most = slice_rows(ends[-1], size, len(ends))
    for low in range(0, len(ends), size):
        high = min(low + size, len(ends))
        rows = ends[high - 1] - starts[low]
        parts = math.ceil(rows / most)
        for part in range(parts):
            begin, end = (starts[low] + rows * n // parts for n in (part, part + 1))
            used = [e for e in range(low, high) if min(ends[e], end) > max(starts[e], begin)]
            first, last = used[0], used[-1] + 1
            which: Which = slice(first, last)
            if len(used) <= SELECT_SHARE * (last - first):
                which = torch.tensor(used, device=like.device)
            offsets = (offsets_E[which] - begin).clamp_(max=end - begin)
            yield _Slice(which, slice(begin, end), offsets.to(torch.int32))


@dataclass(frozen=True)
class _Lora:
    """The factors of a slice's experts in the dtype of the computation, the rank padded."""

    A_ERI: torch.Tensor
    B_EOR: torch.Tensor
    scaling: float

    def thin(self, x_SI: torch.Tensor, part: _Slice) -> torch.Tensor:
        """scaling · x Aᵀ: [S, R]."""
        return product(x_SI, self.A_ERI.mT, part.offsets_E).mul_(self.scaling)

    def thin_gradient(self, g_SO: torch.Tensor, part: _Slice) -> torch.Tensor:
        """scaling · g B, the gradient of x Aᵀ: [S, R]."""
        return product(g_SO, self.B_EOR, part.offsets_E).mul_(self.scaling)


Factors = Sequence[torch.Tensor | None]
"""A [E, R, I] and B [E, O, R] of all experts."""


@dataclass(frozen=True)
class _Projection:
    """One projection of a layer's experts."""

    store: ExpertStore
    scaling: float
    workspace: Workspace

    def lora(self, factors: Factors, part: _Slice, dtype: torch.dtype) -> _Lora | None:
        """The slice's share of the factors."""
        A, B = factors
        if A is None or B is None:
            return None
        A, B = (f[part.which].to(dtype) for f in (A, B))
        # Grouped products want rows of whole 16 bytes; zero ranks add nothing.
        short = -A.shape[1] % RANK_STEP
        if short:
            A, B = F.pad(A, (0, 0, 0, short)), F.pad(B, (0, short))
        return _Lora(A, B, self.scaling)

    def forward(self, x_SI: torch.Tensor, lora: _Lora | None, part: _Slice) -> torch.Tensor:
        """x Wᵀ and the adapter's share: [S, O]."""
        W_EOI = self.store.take(part.which, x_SI.dtype, self.workspace)
        y_SO = product(x_SI, W_EOI.mT, part.offsets_E)
        if lora is not None:
            y_SO += product(lora.thin(x_SI, part), lora.B_EOR.mT, part.offsets_E)
        return y_SO

    def backward(
        self, g_SO: torch.Tensor, lora: _Lora | None, thin_SR: torch.Tensor | None, part: _Slice
    ) -> torch.Tensor:
        """The gradient of x; `thin_SR` is `thin_gradient` of g."""
        W_EOI = self.store.take(part.which, g_SO.dtype, self.workspace)
        result_SI = product(g_SO, W_EOI, part.offsets_E)
        if lora is not None and thin_SR is not None:
            result_SI += product(thin_SR, lora.A_ERI, part.offsets_E)
        return result_SI


class _Gradients:
    """Of the factors of one projection, added up slice by slice; of idle experts they are zero."""

    def __init__(self, factors: Factors, wanted: bool) -> None:
        self.A, self.B = (
            torch.zeros_like(f) if wanted and f is not None else None for f in factors
        )

    def put(
        self,
        part: _Slice,
        x_SI: torch.Tensor,
        thin_SR: torch.Tensor,
        g_SO: torch.Tensor,
        thin_g_SR: torch.Tensor,
    ) -> None:
        """Those of a slice; one of g and each thin tensor holds the weight of a route."""
        if self.A is None or self.B is None:
            return
        rank = self.A.shape[1]
        self.A[part.which] += outer(thin_g_SR, x_SI, part.offsets_E)[:, :rank].to(self.A.dtype)
        self.B[part.which] += outer(g_SO, thin_SR, part.offsets_E)[..., :rank].to(self.B.dtype)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: torch.Tensor,
        weights_TK: torch.Tensor,
        order_S: torch.Tensor,
        offsets_E: torch.Tensor,
        projections: tuple[_Projection, _Projection],
        keep: bool,
        *factors: torch.Tensor | None,
    ) -> torch.Tensor:
        gate_up, down = projections
        T, K = weights_TK.shape
        ends = gate_up.workspace.read(offsets_E)
        gate_up.workspace.count(ends)
        y_SH = hidden_TH.new_empty(T * K, hidden_TH.shape[1])
        kept = []
        for part in _slices(offsets_E, ends, projections, hidden_TH):
            x_SH = hidden_TH.index_select(0, order_S[part.rows] // K)
            lora = gate_up.lora(factors[:2], part, x_SH.dtype)
            both = gate_up.forward(x_SH, lora, part)
            del x_SH, lora
            gate, up = both.chunk(2, dim=-1)
            a_SI = F.silu(gate).mul_(up)
            if keep:
                kept.append(both)
            del both, gate, up
            lora = down.lora(factors[2:], part, a_SI.dtype)
            y_SH[part.rows] = down.forward(a_SI, lora, part)
        ctx.projections, ctx.ends = projections, ends
        ctx.save_for_backward(hidden_TH, weights_TK, order_S, offsets_E, *factors, *kept)
        return _to_tokens(y_SH, order_S, weights_TK).to(hidden_TH.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_TH: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_TH, weights_TK, order_S, offsets_E, *rest = ctx.saved_tensors
        factors, kept = rest[:4], rest[4:]
        gate_up, down = ctx.projections
        K = weights_TK.shape[1]
        of_gate_up = _Gradients(factors[:2], any(ctx.needs_input_grad[6:8]))
        of_down = _Gradients(factors[2:], any(ctx.needs_input_grad[8:]))
        weights_S = weights_TK.reshape(-1)
        of_weights_S = torch.zeros_like(weights_S)
        rows = len(order_S) if ctx.needs_input_grad[0] else 0
        of_x_SH = hidden_TH.new_empty(rows, hidden_TH.shape[1])
        for part, both in zip(
            _slices(offsets_E, ctx.ends, ctx.projections, hidden_TH), kept, strict=True
        ):
            routes = order_S[part.rows]
            w_S1 = weights_S[routes, None].to(hidden_TH.dtype)
            gate, up = both.chunk(2, dim=-1)
            silu = F.silu(gate)
            a_SI = silu * up
            # The gradients of y and of a are first taken without the route's weight, whose own
            # gradient is a product of the two.
            g_SH = g_TH.index_select(0, routes // K)
            lora = down.lora(factors[2:], part, g_SH.dtype)
            thin_g = lora.thin_gradient(g_SH, part) if lora is not None else None
            of_a_SI = down.backward(g_SH, lora, thin_g, part)
            of_weights_S[routes] = (
                (a_SI * of_a_SI).sum(dim=-1, dtype=_wide(a_SI)).to(of_weights_S.dtype)
            )
            if lora is not None and thin_g is not None:
                of_down.put(part, a_SI, lora.thin(a_SI, part) * w_S1, g_SH, thin_g * w_S1)
            del g_SH, a_SI, lora, thin_g
            of_a_SI *= w_S1
            of_both = torch.empty_like(both)
            of_gate, of_up = of_both.chunk(2, dim=-1)
            torch.mul(of_a_SI, silu, out=of_up)
            of_gate.copy_(torch.ops.aten.silu_backward(of_a_SI.mul_(up), gate))
            del of_a_SI, silu, of_gate, of_up
            lora = gate_up.lora(factors[:2], part, hidden_TH.dtype)
            thin_g = lora.thin_gradient(of_both, part) if lora is not None else None
            if rows:
                of_x_SH[part.rows] = gate_up.backward(of_both, lora, thin_g, part)
            if lora is not None and thin_g is not None:
                x_SH = hidden_TH.index_select(0, routes // K)
                of_gate_up.put(part, x_SH, lora.thin(x_SH, part), of_both, thin_g)
                del x_SH
        of_hidden = None
        if ctx.needs_input_grad[0]:
            of_hidden = _to_tokens(of_x_SH, order_S, torch.ones_like(weights_TK))
            of_hidden = of_hidden.to(hidden_TH.dtype)
        return (
            of_hidden,
            of_weights_S.view_as(weights_TK),
            *(None,) * 4,
            of_gate_up.A,
            of_gate_up.B,
            of_down.A,
            of_down.B,
        )


def _wide(tensor: torch.Tensor) -> torch.dtype:
    """What sums are taken in: fp32 at least."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _to_tokens(
    rows_SH: torch.Tensor, order_S: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """Each token's weighted sum over its routes, in fp32 at least: [T, H].

    By the inverse permutation, a route after the other: unlike a scatter-add that is deterministic
    everywhere, and no second tensor of S rows is made.
    """
    T, K = weights_TK.shape
    inverse_TK = torch.argsort(order_S).view(T, K)
    total_TH = torch.zeros(T, rows_SH.shape[1], dtype=_wide(rows_SH), device=rows_SH.device)
    for k in range(K):
        row_TH = rows_SH.index_select(0, inverse_TK[:, k])
        total_TH.addcmul_(row_TH, weights_TK[:, k, None].to(row_TH.dtype))
    return total_TH


def experts_forward(
    module: Any, hidden_TH: torch.Tensor, routes_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """The experts' weighted sum for each token: [T, H].

    Args:
        module: transformers' expert module after `install`.
        hidden_TH: the tokens.
        routes_TK: the experts of each token.
        weights_TK: their weights.
    """
    experts_S, order_S = routes_TK.reshape(-1).sort(stable=True)
    numbers_E = torch.arange(module.gate_up_proj.shape[0], device=routes_TK.device)
    offsets_E = torch.searchsorted(experts_S, numbers_E, right=True, out_int32=True)
    projections, factors = [], []
    for store, lora in (
        (module.gate_up_proj, module.gate_up_lora),
        (module.down_proj, module.down_lora),
    ):
        active = lora is not None and lora.enabled
        scaling = lora.scaling if active else 1.0
        projections.append(_Projection(store, scaling, module.workspace))
        factors += [lora.A, lora.B] if active else [None, None]
    result: torch.Tensor = _Experts.apply(  # type: ignore[no-untyped-call]
        hidden_TH,
        weights_TK,
        order_S,
        offsets_E,
        tuple(projections),
        torch.is_grad_enabled(),
        *factors,
    )
    return result


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
        share = weights_TK[rows, route][:, None].to(x.dtype)
        result_TH = result_TH.index_add(0, rows, x * share)
    return result_TH


def install(
    module: nn.Module, gate_up: ExpertStore, down: ExpertStore, workspace: Workspace
) -> None:
    """Give transformers' expert module packed weights in place of its parameters.

    Args:
        module: with SiLU as its activation.
        gate_up: the weights [E, 2·I, H], gate rows first.
        down: the weights [E, H, I].
        workspace: the model's.
    """
    for name, store in (("gate_up_proj", gate_up), ("down_proj", down)):
        delattr(module, name)
        module.add_module(name, store)
    module.register_module("gate_up_lora", None)
    module.register_module("down_lora", None)
    module.workspace = workspace  # type: ignore[assignment]


def take_load(model: nn.Module) -> list[float]:
    """Each routed expert's share of the rows since the last call, over all layers of the model."""
    for module in model.modules():
        if isinstance(workspace := getattr(module, "workspace", None), Workspace):
            return workspace.take_load()
    return []


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
