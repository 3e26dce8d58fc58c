"""Attention over packed documents, with the softmax scale that the configuration names.

Two ways, of which `choose` takes one for a run: torch's variable-length kernel, and scaled
dot-product attention of one document after the other. Both are told where each document begins;
neither needs a mask.

Shape letters: B rows, T positions, A heads, D head dimension, N documents.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch.nn.attention import varlen
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

ONE_BY_ONE, VARIABLE_LENGTH = "ms4_one_by_one", "ms4_variable_length"
"""The names under which transformers' configuration asks for one or the other."""
_OPTIONS = inspect.signature(varlen.varlen_attn).parameters
_CAUSAL: dict[str, Any] = (
    {"window_size": (-1, 0)} if "window_size" in _OPTIONS else {"is_causal": True}
)


def choose(device: torch.device, dtype: torch.dtype, heads: tuple[int, int]) -> tuple[str, str]:
    """The way of a run, and why.

    Args:
        device: that computes.
        dtype: of queries, keys and values.
        heads: dimension of a head's queries and keys, and of its values.
    """
    if device.type != "cuda":
        return ONE_BY_ONE, "a document at a time: torch's variable-length attention is for CUDA"
    major, minor = torch.cuda.get_device_capability(device)
    for fault, wrong in {
        f"it is for bf16 and fp16, not {dtype}": dtype not in (torch.bfloat16, torch.float16),
        f"it is for compute capability 8.0 and above, not {major}.{minor}": major < 8,
        f"it wants heads of one dimension up to 256, not {heads}": len({*heads}) > 1
        or heads[0] > 256
        or heads[0] % 8 != 0,
        "this torch's has no softmax scale": "scale" not in _OPTIONS,
    }.items():
        if wrong:
            return ONE_BY_ONE, f"a document at a time, not torch's variable-length: {fault}"
    return VARIABLE_LENGTH, "variable-length, torch.nn.attention.varlen"


def _masked(
    module: Any,
    query_BATD: torch.Tensor,
    key_BATD: torch.Tensor,
    value_BATD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float,
) -> torch.Tensor:
    """Attention as transformers asks for it outside of training: one document a row, or a mask."""
    out_BATD = F.scaled_dot_product_attention(
        query_BATD,
        key_BATD,
        value_BATD,
        attn_mask=attention_mask,
        dropout_p=dropout,
        is_causal=attention_mask is None and query_BATD.shape[2] > 1,
        scale=module.config.softmax_scale,
    )
    return out_BATD.transpose(1, 2).contiguous()


def _one_by_one(
    module: Any,
    query_SAD: torch.Tensor,
    key_SAD: torch.Tensor,
    value_SAD: torch.Tensor,
    starts_N: torch.Tensor,
    longest: int,
) -> torch.Tensor:
    """Causal attention of each document, S = B·T: [S, A, D]."""
    out_SAD = []
    for start, end in pairwise(starts_N.tolist()):
        query, key, value = (
            t[start:end].transpose(0, 1)[None] for t in (query_SAD, key_SAD, value_SAD)
        )
        out_1AtD = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=module.config.softmax_scale
        )
        out_SAD.append(out_1AtD[0].transpose(0, 1))
    return torch.cat(out_SAD)


def _variable_length(
    module: Any,
    query_SAD: torch.Tensor,
    key_SAD: torch.Tensor,
    value_SAD: torch.Tensor,
    starts_N: torch.Tensor,
    longest: int,
) -> torch.Tensor:
    """The same by one kernel."""
    # How causal attention is asked for changed between the versions of torch that this runs on.
    options: dict[str, Any] = {"scale": module.config.softmax_scale, **_CAUSAL}
    out_SAD: Any = varlen.varlen_attn(
        query_SAD, key_SAD, value_SAD, starts_N, starts_N, longest, longest, **options
    )
    return cast(torch.Tensor, out_SAD)


def _packed(own: Callable[..., torch.Tensor]) -> Callable[..., tuple[torch.Tensor, None]]:
    """What transformers calls: `own` where `packed` says that the rows hold documents."""

    def attention(
        module: Any,
        query_BATD: torch.Tensor,
        key_BATD: torch.Tensor,
        value_BATD: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        max_length_q: int | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """Returns [B, T, A, D] and no weights.

        The scale that transformers hands over is not used: whether it holds yarn's factor depends
        on the version. The configured one stands in the base's config.json as `softmax_scale`.
        """
        if max_length_q is None or attention_mask is None:  # the model generates: cache and padding
            inputs = query_BATD, key_BATD, value_BATD
            return _masked(module, *inputs, attention_mask, dropout), None
        B, _A, T, _D = query_BATD.shape
        rows = (t.transpose(1, 2).flatten(0, 1) for t in (query_BATD, key_BATD, value_BATD))
        return own(module, *rows, attention_mask.view(-1), max_length_q).unflatten(0, (B, T)), None

    return attention


one_by_one_attention = _packed(_one_by_one)
variable_length_attention = _packed(_variable_length)


def packed(starts_N: torch.Tensor, longest: int) -> dict[str, Any]:
    """What the text model is called with beside tokens and positions.

    transformers hands a mask of four dimensions on to the attention as it is. So where the
    documents begin can take its place.

    Args:
        starts_N: int32, where each document begins in the rows laid end to end, and their end.
        longest: positions of the longest document.
    """
    return {"attention_mask": starts_N.view(1, 1, 1, -1), "max_length_q": longest}


for _name, _function in (
    (ONE_BY_ONE, one_by_one_attention),
    (VARIABLE_LENGTH, variable_length_attention),
):
    AttentionInterface.register(_name, _function)
    # Generation pads on the left; transformers then builds the mask as it does for its own SDPA.
    AttentionMaskInterface.register(_name, sdpa_mask)
