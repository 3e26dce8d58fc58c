"""What a decoder layer keeps for its backward pass, and where.

- `full`: its input alone; the layer runs again in the backward pass.
- `selective`: beside that, what costs more to compute than to hold: results of dense products that
  are no wider than what they are made of (q_a, kv_a, o, the shared experts' gate and up, the
  router, A of each adapter), and attention's own. Each of their elements takes as many
  multiplications as the input is wide. Attention's queries, keys and values, norms, and all of the
  routed experts run again.
- `none`: everything; nothing runs again.

At the model's real size, in BF16, a layer holds for each token: `full` 8 KiB; `selective` another
27 KiB (q_a 2, kv_a 0.6, attention 8.1, o 8, gate and up 4 each, router 0.3) and 2 bytes times the
ranks of the A's, which spares 39 of the 53 million multiplications of its dense products, and
attention; `none` some 200 KiB, 32 of them the routed experts' gate and up.

Losses and gradients are the same under each: what runs again runs with the same random numbers.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    create_selective_checkpoint_contexts,
)

from ms4.config import Checkpointing

ATTENTION = ("scaled_dot_product", "varlen_attn")
"""What the names of operations that compute attention hold."""


class _Policy:
    """Which results a layer keeps; the routed experts' part of it keeps none."""

    def __init__(self) -> None:
        self._inside = 0

    def enter(self, *_: Any) -> None:
        """The experts begin."""
        self._inside += 1

    def leave(self, *_: Any) -> None:
        """The experts end."""
        self._inside -= 1

    def __call__(
        self, _: SelectiveCheckpointContext, operation: Any, *args: Any, **__: Any
    ) -> CheckpointPolicy:
        name = operation.name()
        if self._inside:
            return CheckpointPolicy.PREFER_RECOMPUTE
        if any(part in name for part in ATTENTION) and "backward" not in name:
            return CheckpointPolicy.MUST_SAVE
        if name == "aten::mm" and args[1].shape[1] <= args[1].shape[0]:
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    def contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """The contexts of a layer's first and second run."""
        made: tuple[AbstractContextManager[Any], AbstractContextManager[Any]]
        made = create_selective_checkpoint_contexts(self)
        return made


def apply(model: Any, policy: Checkpointing, offload: bool) -> None:
    """Set what the decoder layers of a model keep when they train.

    Args:
        model: transformers' model, its experts in place.
        policy: `full`, `selective` or `none`.
        offload: hold the layers' inputs in host memory; not with `none`.
    """
    if policy == "none":
        return
    settings: dict[str, Any] = {"use_reentrant": False}
    if policy == "selective":
        chosen = _Policy()
        settings["context_fn"] = chosen.contexts
        for name, module in model.named_modules():
            if name.endswith(".mlp.experts"):
                module.register_forward_pre_hook(chosen.enter)
                module.register_forward_hook(chosen.leave, always_call=True)
    model.activation_checkpointing_enable(settings)
    if offload:
        for layer in model.model.language_model.layers:
            Offload().attach(layer)


class Offload:
    """Holds what a checkpointed layer saves, its input, in pinned host memory.

    Module hooks stay outside of the checkpoint, so they see its input and nothing of the layer's
    inside. Copies run on the computation's stream, in order with what writes and reads the tensor,
    and nothing waits for them on the host.
    """

    def __init__(self) -> None:
        self._hooks: list[AbstractContextManager[Any]] = []
        self.bytes = 0
        """What went to the host so far."""

    def attach(self, layer: nn.Module) -> None:
        """Offload from now on what `layer` saves in each forward pass."""
        layer.register_forward_pre_hook(self._enter)
        layer.register_forward_hook(self._leave, always_call=True)

    def _enter(self, *_: Any) -> None:
        hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)
        hooks.__enter__()
        self._hooks.append(hooks)

    def _leave(self, *_: Any) -> None:
        self._hooks.pop().__exit__(None, None, None)

    def _pack(self, tensor: torch.Tensor) -> tuple[torch.device, torch.Tensor]:
        pinned = tensor.is_cuda
        host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pinned)
        host.copy_(tensor, non_blocking=pinned)
        self.bytes += host.nbytes
        return tensor.device, host


def _unpack(packed: tuple[torch.device, torch.Tensor]) -> torch.Tensor:
    device, host = packed
    return host.to(device, non_blocking=host.is_pinned()) if device.type != "cpu" else host
