"""Orthonormal cosine bases, the transforms onto them, and the choice of the best columns.

D is n x n, D[i, j] = sqrt(2 / n) cos(pi i (2 j + 1) / (2 n)), row 0 times sqrt(1/2); D D^T = I.
Kind 2 (DCT-II) is the basis Q = D^T, whose columns are the rows of D: x Q is the DCT-II of x.
Kind 3 is Q = D: x Q is the DCT-III, the inverse of the other.

Source: Ahmed, Natarajan, Rao 1974; the N-point algorithm: Makhoul, "A fast cosine transform in
one and two dimensions", IEEE TASSP 28 (1980); as projections: arXiv 2505.17967.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels._triton import use_triton
from ..kernels.apart import Matrices, stack
from ..kernels.fakes import table
from ..kernels.project import project as product
from . import codec
from .options import Option, choice
from .sharding import Rows

__all__ = ["OPTIONS", "by_fft", "columns", "project", "rows"]

#: Options of the classes that choose columns of a cosine basis.
OPTIONS: dict[str, Option] = {
    "dct_basis": choice(2, 2, 3),
    "column_norm": choice(1, 1, 2),
    "similarity": choice("auto", "auto", "matmul", "fft"),
}
# From which length n on the FFT is faster than the product. CPU: measured with bench.projections
# on 2 cores, also for lengths with large prime factors. CUDA in fp32: about 2048 (arXiv
# 2505.17967). CUDA in 16 bits, not measured yet: per element, 2 n operations at some 700 TFLOP/s
# take as long at n = 4700 as the FFT's 40 bytes at 3 TB/s.
_FFT_FROM = {"cpu": 129, "cuda": 2049}
_FFT_FROM_16 = {"cpu": 129, "cuda": 4673}
# Elements of a piece that is transformed at once on the CPU: 512 KiB in fp32.
_PIECE = 1 << 17


@table  # for good: CUDA graphs hold addresses of these
def rows(n: int, kind: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Q^T for one kind, n x n: row k is the k-th basis vector. Cached; not to be written to."""
    i = torch.arange(n, dtype=torch.int64, device="cpu")
    # The phase pi i (2 j + 1) / (2 n), reduced in integers: no accuracy is lost at large n.
    phase = torch.outer(i, 2 * i + 1) % (4 * n)
    steps = torch.arange(4 * n, dtype=torch.float64, device="cpu")
    d = torch.cos(steps * (math.pi / (2 * n)))[phase]
    d *= math.sqrt(2 / n)
    d[0] *= math.sqrt(0.5)
    # Made on the CPU: work on a GPU would be ordered only on the first caller's stream, but the
    # result is cached for all.
    return (d if kind == 2 else d.mT).to(dtype).contiguous().to(device)


def columns(index: Matrices, n: int, kind: int, like: Tensor) -> Tensor:
    """The chosen columns of Q: index (..., r) to (..., n, r), in the dtype and place of ``like``.

    Its transpose, the factor of the lift, is contiguous.
    """
    table = rows(n, kind, like.dtype, like.device)
    index = stack(index)
    index = index if index.device == table.device else index.to(table.device)
    # Unlike indexing with brackets, index_select takes int32 indices without a copy.
    chosen: Tensor = table.index_select(0, index) if index.ndim == 1 else table[index]
    return chosen.mT


@table  # for good: CUDA graphs hold addresses of these
def _twiddles(n: int, kind: int, dtype: torch.dtype, device: torch.device
              ) -> tuple[Tensor, Tensor]:
    """Order in which the algorithm reads its input, and its complex factors (Makhoul)."""
    k = torch.arange(n // 2 + 1, dtype=torch.float64, device="cpu")
    index = torch.arange(n, device="cpu")
    order = torch.cat([index[::2], index[1::2].flip(0)])
    scale = torch.full_like(k, math.sqrt(2 / n))
    scale[0] = math.sqrt(1 / n)
    phase = math.pi * k / (2 * n)
    # Kind 3 is the inverse: conjugate phases, and what torch's irfft divides by.
    turn = torch.polar(scale, -phase) if kind == 2 else torch.polar(1 / scale, phase)
    complex_dtype = torch.complex128 if dtype == torch.float64 else torch.complex64
    return order.to(device), turn.to(device, complex_dtype)


@table  # for good: CUDA graphs hold addresses of these
def _packing(n: int, kind: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Position of coefficient k in the packed result of the FFT, and its sign there."""
    k = torch.arange(n, device="cpu")
    if kind == 3:
        order, _ = _twiddles(n, kind, dtype, torch.device("cpu"))
        return order.argsort().to(device), torch.ones(n, dtype=dtype, device="cpu").to(device)
    upper = k > n // 2
    place = torch.where(upper, 2 * (n - k) + 1, 2 * k)
    return place.to(device), (1 - 2 * upper.to(dtype)).to(device)


def _forward_fft(x: Tensor, dim: int) -> Tensor:
    """DCT-II along dim, packed: coefficient k at 2 k, and minus coefficient n - k at 2 k + 1.

    Returns:
        x with dim of n replaced by two: n // 2 + 1, and 2 at the very end.
    """
    n = x.shape[dim]
    order, turn = _twiddles(n, 2, x.dtype, x.device)
    spectrum = torch.fft.rfft(x.index_select(dim, order), dim=dim)
    spectrum *= turn.view(-1, *[1] * (-dim - 1))
    return torch.view_as_real(spectrum)


def _inverse_fft(x: Tensor, dim: int) -> Tensor:
    """DCT-III along dim, which undoes :func:`_forward_fft`, in the order of Makhoul's input."""
    n = x.shape[dim]
    _, turn = _twiddles(n, 3, x.dtype, x.device)
    half = n // 2 + 1
    real = x.narrow(dim, 0, half)
    # X_n stands for zero, X_{n - k} for the imaginary part
    imaginary = torch.zeros_like(real)
    imaginary.narrow(dim, 1, half - 1).copy_(x.flip(dim).narrow(dim, 0, half - 1)).neg_()
    spectrum = torch.complex(real, imaginary)
    spectrum *= turn.view(-1, *[1] * (-dim - 1))
    out: Tensor = torch.fft.irfft(spectrum, n=n, dim=dim)
    return out


def by_fft(n: int, x: Matrices, similarity: str) -> bool:
    """Whether a transform of length n is done by FFT; ``"auto"`` follows device and dtype of x."""
    if similarity == "auto":
        table = _FFT_FROM_16 if x.element_size() == 2 else _FFT_FROM
        return n >= table.get(x.device.type, table["cuda"])
    return similarity == "fft"


def project(x: Matrices, r: int, *, kind: int, dim: int, norm: int, similarity: str,
            old: Tensor | None = None, held: Rows | None = None) -> tuple[Tensor, Tensor]:
    """The r basis vectors with the largest coefficients of x along dim, and x projected on them.

    Both from one transform.

    Args:
        x: (..., m, n), or an ``Apart``. Arithmetic is in x's dtype for fp32 and float64, else in
            fp32, except for the product of 16-bit x with a basis on CUDA.
        r: how many.
        kind: 2 or 3; see the module's text.
        dim: -1 for a right basis, -2 for a left one.
        norm: 1 or 2, the norm of a column of x Q (a row of Q^T x) that ranks it. With 2 the
            choice minimizes what is left of x.
        similarity: ``"matmul"``, ``"fft"`` or ``"auto"``, how x Q is computed.
        old: the last choice, kept where x is zero or not finite.
        held: which rows of a sharded matrix x is, if not all; norms are those of the whole one.

    Returns:
        Indices (..., r), int32, in ascending order, and R = x Q or Q^T x on them: this rank's rows
        of x Q, or all of Q^T x.
    """
    if held is not None and dim == -2:
        # A transform along rows needs whole columns: exchange row shards for column shards.
        index, low = _project(held.columns(stack(x)), r, kind, dim, norm, similarity, old, held)
        return index, held.joined(low, x.shape[-1])
    return _project(x, r, kind, dim, norm, similarity, old, held)


def _project(x: Matrices, r: int, kind: int, dim: int, norm: int, similarity: str,
             old: Tensor | None, cut: Rows | None) -> tuple[Tensor, Tensor]:
    """:func:`project` of x, or of a share of it: some rows, or with ``dim=-2`` some columns."""
    n, other = x.shape[dim], -1 if dim == -2 else -2
    # MKL fails on empty input, which a rank without rows may have.
    fast = by_fft(n, x, similarity) and x.numel() > 0
    if not fast and x.element_size() == 2 and use_triton(None, x.device):
        return _in_one_pass(x, r, kind, dim, norm, old, cut)
    x = stack(x)
    dtype = codec.wide(x[..., :0]).dtype
    kept: list[Tensor] = []
    scores: Tensor | float = 0.0
    largest = _largest(x, cut).to(dtype) if norm == 2 else x.new_ones(())
    place, sign = _packing(n, kind, dtype, x.device) if fast else (None, None)
    for part in map(codec.wide, _parts(x, other, fast)):
        if fast:
            full = _forward_fft(part, dim) if kind == 2 else _inverse_fft(part, dim).unsqueeze(-1)
        else:
            # Where it is short, in float64: the same bits for the rows of a rank as for all.
            short = x.device.type == "cpu" and n < _FFT_FROM["cpu"]
            q = rows(n, kind, torch.float64 if short else dtype, x.device)
            part = part.to(q.dtype)
            full = (part @ q.mT if dim == -1 else q @ part).to(dtype).unsqueeze(-1)
        # (..., m, n, 1), or (..., m, n, 2) with n or m halved where the FFT has packed pairs
        sizes = full.abs() if norm == 1 else (full / largest.unsqueeze(-1)).square_()
        scores = scores + sizes.sum(other - 1).flatten(-2)
        kept.append(full)
    assert isinstance(scores, Tensor)
    scores = scores if place is None else scores[..., place]
    if cut is not None:
        scores = cut.sum(scores.double()).to(dtype)
    index = _best(scores, r, old)
    at = index if place is None else place[index]
    low = torch.cat([_take(full, at, dim) for full in kept], other)
    if sign is not None:
        low *= sign[index].unsqueeze(-2 if dim == -1 else -1)
    return index.int(), low


def _in_one_pass(x: Matrices, r: int, kind: int, dim: int, norm: int, old: Tensor | None,
                 cut: Rows | None) -> tuple[Tensor, Tensor]:
    """The product with the basis and the norms of its columns from one kernel, in x's dtype."""
    n = x.shape[dim]
    q = rows(n, kind, x.dtype, x.device)
    largest = _largest(stack(x), cut).float() if norm == 2 else None
    left = dim == -2
    full, scores = product(x.mT if left else x, q.mT, dtype=x.dtype, scores=norm,
                           largest=largest, transposed=left)
    assert scores is not None
    if cut is not None:
        scores = cut.sum(scores.double()).float()
    index = _best(scores, r, old)
    full = full.mT if left else full
    return index.int(), _take(full.unsqueeze(-1), index, dim)


def _parts(x: Tensor, other: int, fast: bool) -> Sequence[Tensor]:
    """Pieces that stay in a CPU's cache through all passes; the whole elsewhere."""
    if x.device.type != "cpu":
        return [x]
    each = x.numel() // max(1, x.shape[other])
    size = _PIECE if fast else 4 * _PIECE
    pieces: Sequence[Tensor] = x.split(max(1, size // max(1, each)), other)
    return pieces


def _largest(x: Tensor, cut: Rows | None) -> Tensor:
    """Each matrix's largest magnitude (..., 1, 1), to divide by so that squares of 1e30 or 1e-30
    stay in range.
    """
    x = x if x.numel() else x.new_zeros(*x.shape[:-2], 1, 1)
    if x.ndim == 2:  # in one pass
        low, high = (end.view(1, 1) for end in torch.aminmax(x))
    else:
        low, high = x.amin((-2, -1), keepdim=True), x.amax((-2, -1), keepdim=True)
    largest = torch.maximum(-low, high).clamp_min(torch.finfo(x.dtype).tiny)
    return largest if cut is None else cut.max(largest)


def _best(scores: Tensor, r: int, old: Tensor | None) -> Tensor:
    """Indices of the r largest scores, ascending; the old ones if all are 0 or one not finite."""
    best = scores.topk(r, dim=-1, sorted=False).indices.sort(-1).values
    if old is None:
        return best
    largest = scores.amax(-1, keepdim=True)
    return torch.where((largest > 0) & largest.isfinite(), best, old)


def _take(full: Tensor, index: Tensor, dim: int) -> Tensor:
    """The chosen columns (dim -1) or rows (dim -2) of each matrix, unpacked if by FFT."""
    packed = full.shape[-1]
    if dim == -1:
        x = full.flatten(-2)
        return x.index_select(-1, index) if index.ndim == 1 else (
            x.take_along_dim(index.unsqueeze(-2), -1))
    if index.ndim == 1:
        chosen: Tensor = full[index // packed, :, index % packed]
        return chosen
    return full.movedim(-1, -2).flatten(-3, -2).take_along_dim(index.unsqueeze(-1), -2)
