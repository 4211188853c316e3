"""Low-rank approximation by singular values, of a matrix or of two factors without their product."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Singular values below this fraction of the largest are rounding errors.
_ROUNDING = 1e-6


def kept(values: torch.Tensor, rank: int, energy: float) -> int:
    """Return the number of singular values to keep, at least one.

    Args:
        values: [n], the largest first.
        rank: maximum number, 0 for all.
        energy: fraction of the sum of their squares to keep, in 0..1 (kohya's sv_fro is its root). 1 for all.
    """
    count = len(values)
    if energy < 1:
        squares = values.double().square().cumsum(0)
        count = int((squares < energy * squares[-1]).sum()) + 1
    return max(1, min(count, rank or count, len(values)))


def significant(values: torch.Tensor) -> int:
    """Return the number of singular values that exceed rounding errors, at least one."""
    return max(1, int((values > _ROUNDING * values[0]).sum()))


def factor(matrix: torch.Tensor, rank: int, energy: float, trim: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the best factors (up [out, k], down [k, in]) of a matrix [out, in] (Eckart and Young 1936).

    Both factors have the square roots of the singular values.

    Args:
        trim: whether to drop singular values that are only rounding errors too.
    """
    import torch

    u, s, v = torch.linalg.svd(matrix.float(), full_matrices=False)
    return _balanced(u, s, v, rank, energy, trim)


def refactor(
    up: torch.Tensor, down: torch.Tensor, rank: int, energy: float, trim: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the same for up @ down of [out, r] and [r, in], at the cost of the factors: no [out, in] is built."""
    import torch

    if up.shape[1] >= min(up.shape[0], down.shape[1]):
        return factor(up @ down, rank, energy, trim)
    # Double precision separates shared directions of two adapters from rounding errors.
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
