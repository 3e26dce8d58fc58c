"""Matrix products of rows that are sorted by group, one group after the other.

Shape letters: S rows, E groups, M/N/I/O widths.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F

WHOLE = 16
"""Bytes: torch's kernel wants rows that are a multiple of this."""
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _for_kernel(*matrices: torch.Tensor) -> bool:
    """Whether torch's grouped product takes these; it has no float64 and no odd widths."""
    return all(
        m.dtype in KERNEL_DTYPES
        and m.stride().count(1) == 1
        and all(step == 1 or step * m.itemsize % WHOLE == 0 for step in m.stride())
        for m in matrices
    )


def product(x_SI: torch.Tensor, w_EIO: torch.Tensor, offsets_E: torch.Tensor) -> torch.Tensor:
    """Each row times the matrix of its group.

    Args:
        x_SI: rows, sorted by group.
        w_EIO: a matrix a group; either of the last two dimensions may be the contiguous one.
        offsets_E: int32, where each group's rows end; the last is S.

    Returns:
        [S, O].
    """
    if _for_kernel(x_SI, w_EIO):
        return F.grouped_mm(x_SI, w_EIO, offs=offsets_E)
    return product_plain(x_SI, w_EIO, offsets_E)


def product_plain(x_SI: torch.Tensor, w_EIO: torch.Tensor, offsets_E: torch.Tensor) -> torch.Tensor:
    """`product`, group by group."""
    ends = [0, *offsets_E.tolist()]
    return torch.cat([x_SI[a:b] @ w for (a, b), w in zip(pairwise(ends), w_EIO, strict=True)])


def outer(a_SM: torch.Tensor, b_SN: torch.Tensor, offsets_E: torch.Tensor) -> torch.Tensor:
    """aᵀ b of each group's rows: [E, M, N]; zero where a group has none.

    Args:
        a_SM: rows, sorted by group.
        b_SN: as many.
        offsets_E: int32, where each group's rows end; the last is S.
    """
    if not _for_kernel(a_SM, b_SN):
        return outer_plain(a_SM, b_SN, offsets_E)
    found = F.grouped_mm(a_SM.T, b_SN, offs=offsets_E)
    # What the kernel leaves for a group without rows is not documented.
    idle_E = offsets_E.diff(prepend=offsets_E.new_zeros(1)) == 0
    return found.masked_fill_(idle_E[:, None, None], 0)


def outer_plain(a_SM: torch.Tensor, b_SN: torch.Tensor, offsets_E: torch.Tensor) -> torch.Tensor:
    """`outer`, group by group."""
    ends = [0, *offsets_E.tolist()]
    return torch.stack([a_SM[a:b].T @ b_SN[a:b] for a, b in pairwise(ends)])
