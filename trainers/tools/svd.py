"""Low rank by singular values: of a matrix, and of two factors without ever multiplying them out."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Singular values below this part of the largest are what rounding left.
_ROUNDING = 1e-6


def kept(values: torch.Tensor, rank: int, energy: float) -> int:
    """How many singular values are kept, at least one.

    Args:
        values: [n], the largest first.
        rank: at most so many; 0 for all.
        energy: in 0..1, of the sum of their squares (kohya's sv_fro is its root); 1 for all.
    """
    count = len(values)
    if energy < 1:
        squares = values.double().square().cumsum(0)
        count = int((squares < energy * squares[-1]).sum()) + 1
    return max(1, min(count, rank or count, len(values)))


def significant(values: torch.Tensor) -> int:
    """How many singular values are more than rounding, at least one."""
    return max(1, int((values > _ROUNDING * values[0]).sum()))


def factor(matrix: torch.Tensor, rank: int, energy: float, trim: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """The best (up [out, k], down [k, in]) of a matrix [out, in] (Eckart and Young 1936), alike in size.

    Args:
        trim: whether singular values that are only rounding go too.
    """
    import torch

    u, s, v = torch.linalg.svd(matrix.float(), full_matrices=False)
    return _balanced(u, s, v, rank, energy, trim)


def refactor(
    up: torch.Tensor, down: torch.Tensor, rank: int, energy: float, trim: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for up @ down of [out, r] and [r, in], at the cost of the factors: no [out, in] is made."""
    import torch

    if up.shape[1] >= min(up.shape[0], down.shape[1]):
        return factor(up @ down, rank, energy, trim)
    # In double: what two adapters have in common is then told from rounding.
    left, upper = torch.linalg.qr(up.double())
    right, lower = torch.linalg.qr(down.double().t())
    u, s, v = torch.linalg.svd(upper @ lower.t())
    return _balanced(left @ u, s, v @ right.t(), rank, energy, trim)


def _balanced(u, s, v, rank: int, energy: float, trim: bool) -> tuple[torch.Tensor, torch.Tensor]:
    count = kept(s, rank, energy)
    if trim:
        count = min(count, significant(s))
    root = s[:count].sqrt()
    return (u[:, :count] * root).float(), (root[:, None] * v[:count]).float()
