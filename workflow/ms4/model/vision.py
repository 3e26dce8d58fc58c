"""The frozen vision tower and projector: pixels → what stands in the place of the [IMG] tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ms4.errors import Ms4Error

ATTENTION = "ms4_image"
"""The name under which transformers' configuration of the tower asks for `_attention`."""


def _attention(
    module: Any,
    query_BAPD: torch.Tensor,
    key_BAPD: torch.Tensor,
    value_BAPD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    one_image: bool = False,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Every patch looks at every patch of its image; returns [B, P, A, D] and no weights.

    transformers makes a mask for one image, too. It hides nothing, and with it kernels that need no
    memory for the pairs of patches are out of reach: 12,100 patches have 146 M pairs a head.
    """
    mask = None if one_image else attention_mask
    out_BAPD = F.scaled_dot_product_attention(
        query_BAPD, key_BAPD, value_BAPD, attn_mask=mask, scale=module.scaling
    )
    return out_BAPD.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, _attention)


@torch.no_grad()
def image_outputs(
    model: Any, images: Sequence[torch.Tensor], shown: Sequence[int]
) -> dict[str, Any]:
    """What transformers' multimodal model is called with beside the tokens.

    Images go through the tower one at a time: given several, it pads them to one size and attends
    under a mask of all patches by all patches. transformers' own `get_image_features` does the
    same, but also keeps what every layer gives, and stops at an image of a single token.

    Args:
        model: the multimodal model without its head.
        images: distinct ones, each [3, height, width] on the model's device.
        shown: which of them stands where, in the order of the tokens.

    Returns:
        Nothing for a batch without images; else the features, which the model puts where token ids
        are [IMG].

    Raises:
        Ms4Error: the configuration takes the features of another layer than the last.
    """
    if not images:
        return {}
    if model.config.vision_feature_layer != -1:
        raise Ms4Error(
            f"config.json: vision_feature_layer is {model.config.vision_feature_layer}; this "
            "model's is -1. Take the published config.json."
        )
    features = []
    for pixels in images:
        sizes = [tuple(pixels.shape[1:])]
        patches = model.vision_tower(pixels[None], image_sizes=sizes, one_image=True)[0]
        features.append(model.multi_modal_projector(patches.squeeze(0), sizes))
        del patches
    placed = tuple(features[number] for number in shown)
    return {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=placed)}}
