"""Attention over packed documents, with the softmax scale that the configuration names.

Two ways, of which `choose` takes one for a run: torch's variable-length kernel, which is told where
each document begins and needs no mask, and scaled dot-product attention under a block mask.

Shape letters: B rows, T positions, A heads, D head dimension, N documents.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import varlen
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

BLOCK_MASK, VARIABLE_LENGTH = "ms4_block_mask", "ms4_variable_length"
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
        return BLOCK_MASK, "block mask: torch's variable-length attention is for CUDA"
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
            return BLOCK_MASK, f"block mask and not torch's variable-length attention: {fault}"
    return VARIABLE_LENGTH, "variable-length, torch.nn.attention.varlen"


def block_mask_attention(
    module: Any,
    query_BATD: torch.Tensor,
    key_BATD: torch.Tensor,
    value_BATD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Scaled dot-product attention; returns [B, T, A, D] and no weights.

    The scale that transformers hands over is not used: whether it holds yarn's factor depends on
    the version. The configured one stands in the base's config.json as `softmax_scale`.
    """
    out_BATD = F.scaled_dot_product_attention(
        query_BATD,
        key_BATD,
        value_BATD,
        attn_mask=attention_mask,
        dropout_p=dropout,
        is_causal=attention_mask is None and query_BATD.shape[2] > 1,
        scale=module.config.softmax_scale,
    )
    return out_BATD.transpose(1, 2).contiguous(), None


def variable_length_attention(
    module: Any,
    query_BATD: torch.Tensor,
    key_BATD: torch.Tensor,
    value_BATD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    max_length_q: int | None = None,
    **other: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of each document by itself; returns [B, T, A, D] and no weights.

    `attention_mask` is what `packed_mask` makes, and `max_length_q` comes with it. Without them the
    model generates: that has a cache and padding, and goes by a mask.
    """
    if max_length_q is None or attention_mask is None:
        return block_mask_attention(
            module, query_BATD, key_BATD, value_BATD, attention_mask, dropout, **other
        )
    B, _, T, _ = query_BATD.shape
    query, key, value = (
        t.transpose(1, 2).flatten(0, 1) for t in (query_BATD, key_BATD, value_BATD)
    )
    starts_N, longest = attention_mask.view(-1), max_length_q
    # How causal attention is asked for changed between the versions of torch that this runs on.
    options: dict[str, Any] = {"scale": module.config.softmax_scale, **_CAUSAL}
    out: Any = varlen.varlen_attn(
        query, key, value, starts_N, starts_N, longest, longest, **options
    )
    return out.unflatten(0, (B, T)), None


def document_mask(documents_BT: torch.Tensor) -> torch.Tensor:
    """True where a position may look: at itself and what stands before it in its own document.

    Args:
        documents_BT: the number of the document that each position belongs to.

    Returns:
        bool [B, 1, T, T].
    """
    T = documents_BT.shape[1]
    same_BTT = documents_BT[:, :, None] == documents_BT[:, None, :]
    causal_TT = torch.ones(T, T, dtype=torch.bool, device=documents_BT.device).tril()
    return (same_BTT & causal_TT)[:, None]


def packed_mask(
    way: str, documents_BT: torch.Tensor, starts_N: torch.Tensor, longest: int
) -> dict[str, Any]:
    """What the text model is called with beside tokens and positions.

    transformers hands a mask of four dimensions on to the attention as it is. So where the
    documents begin can take its place.

    Args:
        way: as `choose` gave it.
        documents_BT: the number of the document that each position belongs to.
        starts_N: int32, where each document begins in the rows laid end to end, and their end.
        longest: positions of the longest document.
    """
    if way == VARIABLE_LENGTH:
        return {"attention_mask": starts_N.view(1, 1, 1, -1), "max_length_q": longest}
    return {"attention_mask": document_mask(documents_BT)}


for _name, _function in (
    (BLOCK_MASK, block_mask_attention),
    (VARIABLE_LENGTH, variable_length_attention),
):
    AttentionInterface.register(_name, _function)
    # Generation pads on the left; transformers then builds the mask as it does for its own SDPA.
    AttentionMaskInterface.register(_name, sdpa_mask)
