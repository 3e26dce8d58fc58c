"""Attention over packed documents, with the softmax scale that the configuration names.

Shape letters: B rows, T positions, A heads, D head dimension.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

IMPLEMENTATION = "ms4"
"""The name under which transformers' configuration asks for this attention."""


def attention(
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


AttentionInterface.register(IMPLEMENTATION, attention)
# Generation pads on the left; transformers then builds the mask as it does for its own SDPA.
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
