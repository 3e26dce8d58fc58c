"""The training module: a packed batch goes in, its loss comes out.

Shape letters: B rows (bins), T positions, N documents or rows with a target.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ms4.model.attention import packed
from ms4.model.loss import cross_entropy_sum
from ms4.model.vision import image_outputs

PAD = 11
"""The model's padding id."""
IGNORED = -100
"""Target of a position that is not trained."""


@dataclass(frozen=True)
class Batch:
    """One forward pass. Whatever sizes tensors is a number of the host: no step waits for it."""

    tokens_BT: torch.Tensor
    positions_BT: torch.Tensor
    """0 where a document begins: the query scaling depends on them. A row's padding is a document
    of its own."""
    targets_BT: torch.Tensor
    """The next token of the same document where it is trained, else -100."""
    starts_N: torch.Tensor
    """int32: where each document begins in the rows laid end to end, and where the last ends."""
    rows_N: torch.Tensor
    """The positions that have a target, in the rows laid end to end."""
    longest: int
    """Positions of the longest document."""
    images: tuple[torch.Tensor, ...] = ()
    """Distinct images, each [3, height, width], as the vision tower sees them."""
    shown: tuple[int, ...] = ()
    """Which of them stands where: one number for each image in the rows, in their order."""

    @classmethod
    def of(
        cls,
        tokens_BT: torch.Tensor,
        positions_BT: torch.Tensor,
        targets_BT: torch.Tensor,
    ) -> Batch:
        """The batch of tensors on the CPU, its boundaries found."""
        end = torch.tensor([tokens_BT.numel()])
        starts_N = torch.cat([(positions_BT.flatten() == 0).nonzero().view(-1), end])
        return cls(
            tokens_BT,
            positions_BT,
            targets_BT,
            starts_N.to(torch.int32),
            (targets_BT.view(-1) != IGNORED).nonzero().view(-1),
            int(starts_N.diff().max()),
        )

    @property
    def trained(self) -> int:
        """Positions with a target."""
        return self.rows_N.shape[0]

    @property
    def tokens(self) -> int:
        """Positions that are no padding."""
        return int((self.tokens_BT != PAD).sum())

    def to(self, device: torch.device) -> Batch:
        """The batch on another device."""
        moved: dict[str, Any] = {
            name: value.to(device)
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor)
        }
        return replace(self, images=tuple(image.to(device) for image in self.images), **moved)


class PackedLoss(nn.Module):
    """The model and its loss in one forward, so that what shards the model (its root is this
    module) also sees the head."""

    def __init__(self, model: Any, chunk: int) -> None:
        """`chunk` is the number of rows whose logits are held at once."""
        super().__init__()
        self.model, self.chunk = model, chunk

    def forward(self, batch: Batch) -> torch.Tensor:
        """Sum of the cross-entropy over a batch's targets, fp32; differentiable in the adapters."""
        hidden_BTH = self.model.model(
            input_ids=batch.tokens_BT,
            position_ids=batch.positions_BT,
            use_cache=False,
            **image_outputs(self.model.model, batch.images, batch.shown),
            **packed(batch.starts_N, batch.longest),
        ).last_hidden_state
        return cross_entropy_sum(
            hidden_BTH.flatten(0, 1),
            self.model.lm_head.weight,
            batch.rows_N,
            batch.targets_BT.view(-1)[batch.rows_N],
            self.chunk,
        )
