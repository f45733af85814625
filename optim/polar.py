"""Polar oracles: the factor U of A = U H, with orthonormal columns (rows, where A is wide).

U = A (A^T A)^(-1/2) for m >= n, and H = (A^T A)^(1/2) is positive semidefinite; for m < n it is
A = H U. Iterations differ in what they cost and in what they make of small singular values s:

==================  ======================================================================
``newton-schulz``   odd quintics; Muon's brings 1e-3 < s/|A| < 1 to 0.5 .. 1.2 in 5 steps
``polar-express``   odd quintics, each the best for the interval that the last one left
``qdwh``            rational, by QR and Cholesky; to rounding whatever the condition number
``zolo-pd``         rational of high degree, two steps in float64
``svd``             the definition: singular values below rounding become 0, others 1
==================  ======================================================================

Those to rounding are as exact as torch's products: where TF32 is switched on for fp32 on a GPU, in
all but ``zolo-pd``, they have three digits.

The polynomial ones leave tiny singular values tiny, the rational ones bring even rounding noise
to 1, the SVD cuts it off: on matrices without full rank they differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor

from . import codec
from .checks import without_autocast
from .options import Option, choice, either, integer, optional, real, several
from .polar_polynomial import QUINTIC, Triple, newton_schulz, polar_express
from .polar_rational import qdwh, svd, zolo
from .whole import Whole

__all__ = ["check_options", "COEFFICIENTS", "METHODS", "OPTIONS", "QUINTIC", "Oracle",
           "input_dtype", "polar", "request"]

_FLOATS = {torch.float64: "float64", torch.float32: "float32", torch.bfloat16: "bfloat16",
           torch.float16: "float16"}


@dataclass(frozen=True)
class Oracle:
    """Which polar factor: hashable, so that equal requests are answered together.

    Args:
        method: a key of :data:`METHODS`.
        steps: of the iteration; None is to convergence.
        dtype: of the products of the polynomial methods, by name; None is the input's precision,
            at least fp32.
        coefficients: of ``"newton-schulz"``.
        lower_bound: smallest singular value over the norm; None is the method's own.
    """

    method: str = "qdwh"
    steps: int | None = None
    dtype: str | None = None
    coefficients: Triple | None = None
    lower_bound: float | str | None = None

    def __call__(self, a: Tensor) -> Tensor:
        """The factor of (..., m, n), in the precision it was computed in."""
        if a.numel() == 0:
            return a.clone()
        if a.ndim > 3:
            return self(a.flatten(0, -3)).view(a.shape)
        if a.shape[-2] < a.shape[-1]:
            return self(a.mT).mT
        if self.method in _POLYNOMIAL:  # zero stays zero and NaN spreads
            return METHODS[self.method](a, self)
        x = codec.wide(a)
        largest = torch.linalg.vector_norm(x, math.inf, dim=(-2, -1), keepdim=True)
        usable = largest.isfinite()
        x = x / torch.where(usable & (largest > 0), largest, 1.0)
        x = torch.where(usable, x, 0.0)  # LAPACK may hang on a NaN
        u = METHODS[self.method](x, self)
        out: Tensor = torch.where(usable & (largest > 0), u,
                                  torch.where(usable, 0.0, torch.nan).to(u))
        return out


@overload
def polar(
    a: Tensor, method: str = ..., steps: int | None = ..., *, dtype: torch.dtype | None = ...,
    coefficients: Triple | None = ..., lower_bound: float | str | None = ...,
    hermitian: Literal[False] = ...,
) -> Tensor: ...


@overload
def polar(
    a: Tensor, method: str = ..., steps: int | None = ..., *, dtype: torch.dtype | None = ...,
    coefficients: Triple | None = ..., lower_bound: float | str | None = ...,
    hermitian: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def polar(
    a: Tensor, method: str = "qdwh", steps: int | None = None, *, dtype: torch.dtype | None = None,
    coefficients: Triple | None = None, lower_bound: float | str | None = None,
    hermitian: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The polar factor U of each matrix, and on request the Hermitian factor H.

    Zero gives zero. A matrix with a NaN or Inf gives NaN. polar(c A) = sign(c) polar(A), as long
    as the norm is finite and not denormal. In a batch the rational methods take the same steps for
    all matrices, which changes only the rounding.

    Args:
        a: (..., m, n), any floating dtype and device.
        method: ``"newton-schulz"``, ``"polar-express"``, ``"qdwh"`` (default), ``"zolo-pd"``,
            ``"svd"``; see the module's text.
        steps: of the iteration, an int >= 1; ``"svd"`` has none. None (default) is to convergence;
            the polynomial methods assume singular values above 1e-3 of the norm (``lower_bound``).
        dtype: of the products of ``"newton-schulz"`` and ``"polar-express"``. Default: a's own,
            at least fp32. In bf16 and fp16 singular values stay within about 1 % of the schedule's.
        coefficients: (a, b, c) of ``"newton-schulz"``: X <- a X + (b S + c S^2) X, S = X X^T.
            Default: Muon's, followed by convergent ones where ``steps`` is None.
        lower_bound: for ``"polar-express"`` and ``"qdwh"`` alone: the smallest singular value over
            the largest, in (0, 1]. ``"qdwh"`` estimates it (default None), or assumes the dtype's
            ``"eps"``; with a number that is too large it converges too, in more steps.
        hermitian: return (U, H).

    Returns:
        U in a's shape and dtype; H is (..., k, k) with k = min(m, n).

    Raises:
        TypeError, ValueError: an argument that breaks its rule, by name and value.
    """
    if not isinstance(a, Tensor) or not a.is_floating_point():
        raise TypeError(f"polar: a is {getattr(a, 'dtype', type(a).__name__)}, but it must be a "
                        "real floating tensor")
    if a.ndim < 2:
        raise ValueError(f"polar: a has shape {tuple(a.shape)}, but it must have 2 or more "
                         "dimensions")
    if dtype is not None and dtype not in _FLOATS:
        raise ValueError(f"polar: dtype={dtype}, but it must be one of "
                         f"{', '.join(map(str, _FLOATS))}")
    if coefficients is not None:
        coefficients = COEFFICIENTS.check("coefficients", coefficients, "polar")
        if method != "newton-schulz":
            raise ValueError(f"polar: coefficients={coefficients}, but it must be None with "
                             f"method={method!r}: only 'newton-schulz' has them")
    checked = {name: OPTIONS[name].check(name, value, "polar") for name, value in
               (("polar", method), ("polar_steps", steps), ("lower_bound", lower_bound))}
    _check_used(checked, "polar")
    oracle = Oracle(checked["polar"], checked["polar_steps"], None if dtype is None else
                    _FLOATS[dtype], coefficients, checked["lower_bound"])
    with without_autocast():
        u = oracle(a)
        if not hermitian:
            return u.to(a.dtype)
        u, wide = u.to(codec.wide(a).dtype), codec.wide(a)
        h = wide @ u.mT if a.shape[-2] < a.shape[-1] else u.mT @ wide
    return u.to(a.dtype), ((h + h.mT) / 2).to(a.dtype)


#: (a, b, c) of ``newton-schulz``, as an option.
COEFFICIENTS = several(QUINTIC, real(None, -math.inf), 3)
#: Options of the classes that ask an oracle.
OPTIONS: dict[str, Option] = {
    "polar": choice("qdwh", "newton-schulz", "polar-express", "qdwh", "zolo-pd", "svd"),
    "polar_steps": optional(integer(None, 1, 100)),
    "polar_dtype": choice("bfloat16", "bfloat16", "float16", "float32"),
    "lower_bound": optional(either(real(None, 0.0, 1.0, above=True), choice("eps", "eps"))),
}


def check_options(o: Mapping[str, Any], where: str) -> None:
    """Refuse options that the oracle of a group has no use for, and one that cannot be captured.

    Args:
        o: all options of the group.
        where: beginning of a message.
    """
    if o["algorithm"] == "adamw":
        return
    _check_used(o, where)
    if o["capturable"] and o["polar"] not in _POLYNOMIAL:
        raise ValueError(f"{where}: polar={o['polar']!r}, but it must be one of "
                         f"{', '.join(map(repr, sorted(_POLYNOMIAL)))} with capturable=True: the "
                         "others look at their numbers on the host")


def _check_used(o: Mapping[str, Any], where: str) -> None:
    if o["lower_bound"] is not None and o["polar"] not in _BOUNDED:
        raise ValueError(f"{where}: lower_bound={o['lower_bound']!r}, but it must be None with "
                         f"{o['polar']!r}: only {' and '.join(map(repr, _BOUNDED))} have it")


def request(o: Mapping[str, Any], *matrices: Tensor, steps: int | None = None,
            coefficients: Triple | None = None) -> Whole:
    """Ask for the polar factors of matrices, as the options of a group say.

    Args:
        o: ``polar``, ``polar_steps``, ``polar_dtype``, ``lower_bound``.
        matrices: (..., m, n) each.
        steps: of the polynomial methods where ``polar_steps`` is None.
        coefficients: of ``"newton-schulz"``.
    """
    method = o["polar"]
    polynomial = method in _POLYNOMIAL
    return Whole(matrices, Oracle(
        method, o["polar_steps"] or (steps if polynomial else None),
        o["polar_dtype"] if polynomial else None,
        coefficients if method == "newton-schulz" else None, o["lower_bound"]))


def input_dtype(o: Mapping[str, Any], g: Tensor) -> torch.dtype:
    """The dtype to hand an oracle: bf16 where its products are bf16, else the arithmetic's."""
    if o["polar"] in _POLYNOMIAL and o["polar_dtype"] == "bfloat16":
        return torch.bfloat16
    return codec.wide(g[:0]).dtype


# These scale their input themselves; the others get it with a largest entry of 1.
_POLYNOMIAL = ("newton-schulz", "polar-express")
# These take a lower bound of the singular values.
_BOUNDED = ("polar-express", "qdwh")
#: Factor of a tall matrix, by name.
METHODS: dict[str, Callable[[Tensor, Oracle], Tensor]] = {
    "newton-schulz": newton_schulz, "polar-express": polar_express, "qdwh": qdwh,
    "zolo-pd": zolo, "svd": svd,
}
