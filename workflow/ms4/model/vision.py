"""The frozen vision tower and projector: pixels → what stands in the place of the [IMG] tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ms4.errors import Ms4Error


@torch.no_grad()
def image_outputs(
    model: Any, images: Sequence[torch.Tensor], shown: Sequence[int]
) -> dict[str, Any]:
    """What transformers' multimodal model is called with beside the tokens.

    Images go through the tower one at a time: given several, it pads them to one size and keeps a
    mask of all patches by all patches. transformers' own `get_image_features` does the same, but
    also keeps what every layer gives, and stops at an image of a single token.

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
        patches = model.vision_tower(pixels[None], image_sizes=sizes, return_dict=True)
        features.append(model.multi_modal_projector(patches.last_hidden_state.squeeze(0), sizes))
    placed = tuple(features[number] for number in shown)
    return {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=placed)}}
