"""Products that are symmetric: X X^T, alpha A + beta A A, and Muon's Newton-Schulz step over them.

Only tiles that touch the lower triangle are computed, and stored twice: half the operations of a
general product. Sums are in fp32 and rounded once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._triton import cdiv, define, jit, launch, tensor_cores, tl, use_triton
from .narrow import slow
from .philox import nearest
from .tiles import by_registers, dot_tile, fits, precision, stacked, widened

__all__ = ["newton_schulz_step", "newton_schulz_step_ref", "symm_muladd", "symm_muladd_ref", "syrk",
           "syrk_ref"]

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# With fewer rows, launches and idle processors cost more than half a product saves.
_ROWS = 256
# From this many rows on, an fp32 product on a CPU is split into two halves of rows, at 3/4 of the
# operations: 0.8 of the time with MKL at 768 to 1376 rows. bf16 on AMX gains nothing.
_HALVES = 768
# Programs of the large tile that keep an H100's or H200's 132 processors busy.
_BUSY = 132


class SquareTiles(NamedTuple):
    """How a product is cut: square tiles of ``size`` rows, ``depth`` terms of their sums at once.

    Tiles run in squares of ``side`` rows: 8 x 8 tiles read 16 panels where a row of 64 tiles would
    read 65, and 16 panels stay in the cache.
    """

    size: int
    depth: int
    side: int
    warps: int
    stages: int


# The fastest of several on an H100: three stages of two 128 x 64 panels of 16 bits are 96 KiB, so
# that two programs share the 227 KiB of a processor and one's stores overlap the other's products.
# With four warps alpha A would not fit in the registers beside the sums.
_LARGE = SquareTiles(128, 64, 1024, 4, 3)
_ADDING = SquareTiles(128, 64, 1024, 8, 4)
_SMALL = SquareTiles(64, 64, 512, 4, 4)
_WIDE = SquareTiles(64, 32, 512, 4, 3)  # fp32: twice the bytes
_OLD = SquareTiles(64, 16, 512, 4, 2)  # without tensor cores


def _tiles(left: Tensor, adds: bool) -> SquareTiles:
    """Large tiles where they fit and fill the GPU; ``adds``: alpha A is added, other sizes."""
    if left.dtype == torch.float32:
        return _WIDE
    large = _suited(_ADDING if adds else _LARGE, left.device)
    side = cdiv(left.shape[1], large.size)
    if len(left) * side * (side + 1) // 2 >= _BUSY and fits(
            left.device, 4 * large.stages * large.depth * large.size):
        return large
    return _suited(_SMALL, left.device)


def _suited(tiles: SquareTiles, device: torch.device) -> SquareTiles:
    """As :func:`lissom.kernels.tiles.suited`."""
    if not by_registers(device):
        return tiles
    if not tensor_cores(device):
        return _OLD
    return tiles._replace(depth=tiles.depth // 2, stages=tiles.stages + 1)


def _mirrored(lower: Tensor) -> Tensor:
    """The symmetric matrix with this lower triangle."""
    return lower.tril() + lower.tril(-1).mT


def syrk_ref(x: Tensor) -> Tensor:
    """Define :func:`syrk`."""
    wide = x if x.dtype == torch.float64 else x.float()
    return _mirrored(wide @ wide.mT).to(x.dtype)


def symm_muladd_ref(a: Tensor, alpha: float, beta: float) -> Tensor:
    """Define :func:`symm_muladd`."""
    wide = a if a.dtype == torch.float64 else a.float()
    return _mirrored(alpha * wide + beta * (wide @ wide)).to(a.dtype)


def newton_schulz_step_ref(x: Tensor, a: float, b: float, c: float) -> Tensor:
    """Define :func:`newton_schulz_step`; rounds as often as it does."""
    z = symm_muladd_ref(syrk_ref(x), b, c)
    wide = x if x.dtype == torch.float64 else x.float()
    return (a * wide + z.to(wide.dtype) @ wide).to(x.dtype)


@jit
def _symmul_kernel(left_ptr: tl.tensor, right_ptr: tl.tensor, out_ptr: tl.tensor, m: tl.tensor,
                   k: tl.tensor, left_batch: tl.tensor, left_row: tl.tensor,
                   left_column: tl.tensor, right_batch: tl.tensor, right_row: tl.tensor,
                   right_column: tl.tensor, alpha: tl.tensor, beta: tl.tensor,
                   programs: tl.tensor, ADD: tl.constexpr, B: tl.constexpr, K: tl.constexpr,
                   TILES: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr) -> None:
    # out = beta L R, and with ADD alpha L more; L (m, k), R (k, m)
    batch = (tl.program_id(0) // programs).to(tl.int64)
    place = tl.program_id(0) % programs
    # Squares of TILES x TILES tiles cover the lower triangle. They are numbered along its rows:
    # s (s + 1) / 2 + h is the h-th square of row s. The square root is exact for square numbers.
    square = place // (TILES * TILES)
    s = ((tl.sqrt_rn((8 * square + 1).to(tl.float32)) - 1) / 2).to(tl.int32)
    h = square - s * (s + 1) // 2
    first_row = B * (s * TILES + place % TILES)
    first_column = B * (h * TILES + place // TILES % TILES)
    if (first_row < m) & (first_row >= first_column):
        row = first_row.to(tl.int64) + tl.arange(0, B)  # [B]
        column = first_column.to(tl.int64) + tl.arange(0, B)  # [B]
        left_ptr += batch * left_batch
        total = dot_tile(left_ptr, right_ptr + batch * right_batch, row, column, m, m, k, left_row,
                         left_column, right_row, right_column, B, B, K, PRECISION, WIDEN)
        mask = (row < m)[:, None] & (column < m)[None, :]
        total *= beta
        if ADD:
            old = left_ptr + row[:, None] * left_row + column[None, :] * left_column
            total += alpha * tl.load(old, mask=mask, other=0.0).to(tl.float32)
        if first_row == first_column:
            total = tl.where(row[:, None] >= column[None, :], total, tl.trans(total))
        rounded = nearest(total, out_ptr)
        out_ptr += batch * m * m
        tl.store(out_ptr + row[:, None] * m + column[None, :], rounded, mask=mask)
        if first_row != first_column:
            tl.store(out_ptr + column[None, :] * m + row[:, None], rounded, mask=mask)


def _symmul(left: Tensor, right: Tensor, alpha: float | None, beta: float, out: Tensor) -> None:
    batch, m, k = left.shape
    if not out.numel():
        return
    t = _tiles(left, alpha is not None)
    # A small matrix is one square with just the tiles it needs.
    tiles = min(t.side // t.size, 1 << (cdiv(m, t.size) - 1).bit_length())
    squares = cdiv(m, tiles * t.size)
    programs = squares * (squares + 1) // 2 * tiles * tiles
    launch(_symmul_kernel, batch * programs, left.device, left, right, out, m, k, *left.stride(),
           *right.stride(), alpha or 0.0, beta, programs, ADD=alpha is not None, B=t.size,
           K=t.depth, TILES=tiles, PRECISION=precision(), WIDEN=widened(left),
           num_warps=t.warps, num_stages=t.stages)
    torch.autograd.graph.increment_version(out)


_op = define("symmul(Tensor left, Tensor right, float? alpha, float beta, Tensor(a!) out) -> ()",
             _symmul)


def _check(name: str, x: Tensor) -> None:
    if x.ndim < 2:
        raise ValueError(f"{name}: expected (..., rows, columns), got shape {tuple(x.shape)}")
    if x.dtype not in _FLOATS:
        raise TypeError(f"{name}: expected {' or '.join(map(str, _FLOATS))}, got {x.dtype}")


def _use_triton(x: Tensor, backend: str | None) -> bool:
    able = use_triton(backend, x.device)
    if backend == "triton" and x.dtype == torch.float64:
        raise TypeError("backend: 'triton' has no float64, which sums in fp32 would not be")
    if backend is not None:
        return able
    if (not able or x.element_size() != 2 or min(x.shape[-2:]) < _ROWS
            or not tensor_cores(x.device)):
        return False
    # For loads of 16 bytes: stride 1 along one dimension, a multiple of 8 along the other.
    along = sorted(x.stride()[-2:])
    return along[0] == 1 and along[1] % 8 == 0


def _muladd(c: Tensor | None, a: Tensor, b: Tensor, beta: float, alpha: float) -> Tensor:
    """Beta C + alpha A B."""
    if slow(a):
        wide = None if c is None else c.float()
        return _muladd(wide, a.float(), b.float(), beta, alpha).to(a.dtype)
    if c is None:
        return a @ b
    if c.ndim == 2:
        return torch.addmm(c, a, b, beta=beta, alpha=alpha)
    return torch.baddbmm(stacked(c), stacked(a), stacked(b), beta=beta, alpha=alpha
                         ).view(c.shape)


def _product(x: Tensor, y: Tensor, alpha: float | None, beta: float, triton: bool) -> Tensor:
    """Beta X Y, plus alpha X if alpha is given, for Y = X^T or a symmetric Y = X."""
    m = x.shape[-2]
    if triton:
        out = torch.empty(*x.shape[:-1], m, dtype=x.dtype, device=x.device)
        _op(stacked(x), stacked(y), alpha, beta, stacked(out))
        return out
    if slow(x):
        wide = x.float()
        return _product(wide, wide if y is x else wide.mT, alpha, beta, False).to(x.dtype)
    c = None if alpha is None else x
    if x.dtype != torch.float32 or x.device.type != "cpu" or m < _HALVES:
        return _muladd(c, x, y, alpha or 0.0, beta)
    half = m // 2
    out = torch.empty(*x.shape[:-1], m, dtype=x.dtype)
    for rows, columns in ((slice(half), slice(half)), (slice(half, m), slice(m))):
        out[..., rows, columns] = _muladd(None if c is None else c[..., rows, columns],
                                          x[..., rows, :], y[..., columns], alpha or 0.0, beta)
    out[..., :half, half:] = out[..., half:, :half].mT
    return out


def syrk(x: Tensor, *, backend: str | None = None) -> Tensor:
    """S = X X^T.

    From Triton S is symmetric to the bit, from torch as far as its products are.

    Args:
        x: (..., m, n), fp32, bf16, fp16 or (torch only) float64, any strides: ``x.mT`` is not
            copied.
        backend: "torch", "triton", or None for Triton where it pays: on CUDA, 16 bits, 256 rows
            and columns or more, addresses in multiples of 16 bytes.

    Returns:
        (..., m, m) in x's dtype. fp32 products on CUDA follow
        torch.set_float32_matmul_precision.

    Raises:
        TypeError: x is of another dtype.
        ValueError: x has fewer than two dimensions, or there is no such backend.
        RuntimeError: "triton" was asked for and cannot run there.
    """
    _check("x", x)
    return _product(x, x.mT, None, 1.0, _use_triton(x, backend))


def symm_muladd(a: Tensor, alpha: float, beta: float, *, backend: str | None = None) -> Tensor:
    """Z = alpha A + beta A A, for symmetric A.

    From Triton Z is symmetric to the bit, from torch as far as its products are.

    Args:
        a: (..., m, m), fp32, bf16, fp16 or (torch only) float64, any strides. That it is symmetric
            is not checked; if it is not, the result is neither.
        alpha: factor of A.
        beta: factor of A A.
        backend: as for :func:`syrk`.

    Returns:
        (..., m, m) in a's dtype.

    Raises:
        TypeError: a is of another dtype.
        ValueError: a is not square, or there is no such backend.
        RuntimeError: "triton" was asked for and cannot run there.
    """
    _check("a", a)
    if a.shape[-2] != a.shape[-1]:
        raise ValueError(f"a: expected (..., m, m), got shape {tuple(a.shape)}")
    return _product(a, a, alpha, beta, _use_triton(a, backend))


def newton_schulz_step(x: Tensor, a: float, b: float, c: float, *, backend: str | None = None
                       ) -> Tensor:
    """X <- a X + (b S + c S^2) X with S = X X^T; tall matrices by S = X^T X, which is the same.

    Two of its three products are symmetric.

    Args:
        x: (..., m, n), fp32, bf16, fp16 or (torch only) float64, any strides.
        a: coefficient of the singular values s.
        b: of s^3.
        c: of s^5.
        backend: as for :func:`syrk`.

    Returns:
        x's shape and dtype.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`syrk`.

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024.
    """
    _check("x", x)
    if x.shape[-2] > x.shape[-1]:
        return newton_schulz_step(x.mT, a, b, c, backend=backend).mT
    z = symm_muladd(syrk(x, backend=backend), b, c, backend=backend)
    return _muladd(x, z, x, a, 1.0)
