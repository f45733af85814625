"""One row per optimizer class; the contract tests walk rows x promises."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from lissom.optim import (
    APOLLO,
    FRUGAL,
    AdamW,
    AdamW8bit,
    DCTAdamW,
    FiraAdamW,
    GaLoreAdamW,
    GaLoreAdamW8bit,
    GradNormLoRPAdamW,
    Muon,
    PolarGrad,
    SwitchLoRAAdamW,
    Trion,
)
from lissom.optim.base import MatrixOptimizer

from . import helpers, oracle

#: Rank of the pairs that stand for matrices in rows with roles.
PAIR = 3


@dataclass(frozen=True)
class Case:
    """A class with options, and its float64 oracle (gradients, start, options) -> weights.

    A row with ``roles`` trains pairs: what the other rows have for a matrix with more than
    :data:`PAIR` rows and columns is three parameters there, in the order of the roles.
    """

    name: str
    make: type[MatrixOptimizer]
    options: Mapping[str, Any] = field(default_factory=dict)
    oracle: Callable[..., list[torch.Tensor]] = oracle.adamw
    bad: Mapping[str, Any] = field(default_factory=dict)
    #: What a scaled gradient does to the update: nothing down to epsilon ("adam"), nothing at all
    #: ("sign"), or the same ("linear").
    scaling: str = "adam"
    #: What stands for a matrix: ("A", "B", "base") or ("A", "B", "magnitude"); none is itself.
    roles: tuple[str, ...] = ()
    #: Options under which gradients and decay alone move a parameter.
    still: Mapping[str, Any] = field(default_factory=dict)

    def option(self, name: str) -> Any:
        """An option, given or by default."""
        return self.options.get(name, self.make.table()[name].default
                                if name in self.make.table() else None)

    def same_arithmetic(self) -> bool:
        """Neither random nor quantized, so that an oracle can follow it."""
        return (self.option("state_bits") == 32 and self.option("projection") != "random"
                and self.option("basis_bits") is None
                and self.option("error_feedback_bits") in (None, 32)
                and self.option("polar_dtype") != "bfloat16")

    def __call__(self, params: Any, **more: Any) -> MatrixOptimizer:
        return self.make(self.groups(params), **{**self.options, **more})

    def parameters(self, shapes: Iterable[tuple[int, ...]], seed: int = 0,
                   dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
        """Random parameters, those of a pair in the place of a matrix."""
        out = []
        for i, w in enumerate(helpers.parameters(shapes, seed, dtype)):
            if not self.roles or w.ndim != 2 or min(w.shape) <= PAIR:
                out.append(w)
                continue
            m, n = w.shape
            out += helpers.parameters([(PAIR, n), (m, PAIR)], 1000 * (seed + 1) + i, dtype)
            out.append(w.requires_grad_(False) if "base" in self.roles else
                       torch.nn.Parameter(w.detach().norm(dim=0)))
        return out

    def groups(self, params: Any) -> Any:
        """What ``adapter_groups`` makes of a model: pairs with their roles, then the rest.

        Args:
            params: tensors, (name, tensor) or groups of them; a pair is known by its shapes.
        """
        if not self.roles:
            return params
        entries, groups, rest = list(params), [], []
        if entries and isinstance(entries[0], dict):
            return [{**part, **{k: v for k, v in group.items() if k != "params"}}
                    for group in entries for part in self.groups(group["params"])]
        pairs: dict[tuple[str, ...], list[Any]] = {}
        while entries:
            a, b, last = (e[1] if isinstance(e, tuple) else e for e in (*entries, *[None] * 2)[:3])
            if not self._is_pair(a, b, last):
                rest.append(entries.pop(0))
                continue
            if "base" in self.roles:
                last.requires_grad_(False)
                pairs.setdefault(self.roles, []).extend(entries[:3])
            else:
                pairs.setdefault(("A", "B"), []).extend(entries[:2])
                pairs.setdefault(("magnitude",), []).append(entries[2])
            del entries[:3]
        for roles, members in pairs.items():
            groups.append({"params": members, "roles": roles})
            if "base" in roles:
                groups[-1]["scaling"] = 0.5
            if "magnitude" in roles:
                groups[-1]["algorithm"] = "adamw"
        return [*groups, {"params": rest}] if rest else groups

    def _is_pair(self, a: Any, b: Any, last: Any) -> bool:
        if last is None or not a.ndim == b.ndim == 2 or len(a) != PAIR or b.shape[1] != PAIR:
            return False
        return last.shape == ((len(b), a.shape[1]) if "base" in self.roles else (a.shape[1],))

    def effective(self, params: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        """What a model computes with: of a pair that is switched W + s B A, else the parameters."""
        params, out = list(params), []
        while params:
            if "base" in self.roles and self._is_pair(*(*params, None, None)[:3]):
                a, b, w = params[:3]
                out.append(torch.addmm(w, b, a, alpha=0.5))
                del params[:3]
            else:
                out.append(params.pop(0))
        return out


COMMON_BAD = {
    "lr": [-1.0, float("nan"), "fast", True, None],
    "betas": [(0.9, 1.0), (0.9,), (0.9, 0.9, 0.9), 0.9, (-0.1, 0.9), "ab", {0.9: 1, 0.5: 2},
              {0.5, 0.9}, b"\0\0"],
    "eps": [-1e-8, float("inf")],
    "weight_decay": [-0.1, "x"],
    "maximize": [1, None],
    "amsgrad": ["yes"],
    "state_bits": [0, 7, 2, "32", 32.0],
    "rounding": ["up", 1],
    "master_bits": [32, 4, "8", True],
    "nonfinite": ["ignore", None],
    "seed": [-1, 1.5],
    "shards": ["columns", 1, None],
    "metrics": [1, "yes"],
    "capturable": [1, None],
    "algorithm": ["sgd", 1, None],
}

LOW_RANK_BAD = {
    "rank": [0, -3, 2.0, "8", True],
    "update_proj_gap": [0, 1.5],
    "scale": [-0.25, "x"],
    "proj_type": ["sideways", 1],
    "projection": ["pca"],
    "inner": ["sgd", None],
    "moments": ["forget"],
    "residual": ["galore", None],
    "refresh": ["never"],
    "matricize": ["auto"],
    "basis_bits": [32, 3, "8"],
    "keep_energy": [0.0, 1.1, "most"],
    "error_feedback_bits": [16, "8"],
    "limiter": [0.99, "off"],
    "residual_scale": ["half"],
    "dct_basis": [1, 4, "2"],
    "column_norm": [0, 3, 1.0],
    "similarity": ["cosine"],
    "scale_type": ["row", None],
}
TRION_BAD = {
    "rank": [0, 2.0], "momentum": [0.0, 1.5], "ns_steps": [0, 2.5], "adjust_lr_fn": ["kj"],
    "polar_dtype": ["float8", torch.float32], "dct_basis": [1], "column_norm": [3],
    "matricize": ["auto"], "similarity": ["cosine"],
}
POLAR_BAD = {
    "momentum": [1.0, -0.1, "x"], "polar": ["newton", None], "polar_steps": [0, 2.5],
    "polar_dtype": ["half"], "lower_bound": [0.0, 1.5, "small"], "matricize": ["auto"],
}
MUON_BAD = {
    "nesterov": [1], "ns_coefficients": [(1.0, 2.0), "abc", (1.0, float("nan"), 0.0),
                                    {1.0: 1, 2.0: 2, 3.0: 3}, {1.0, 2.0, 3.0}],
    "ns_steps": [0, 101], "adjust_lr_fn": ["kj"],
    "split_sizes": [(0, 6), (), (3, 4), 6, (2.0, 4.0), {2, 4}, {2: 0, 4: 0}],
}
POLARGRAD_BAD = {"polar_first": [1, None], "nuclear_scaling": ["yes"]}


def low_rank(cls: type[MatrixOptimizer], rule: Callable[..., list[torch.Tensor]],
             **options: Any) -> Case:
    given = {"rank": 3, "update_proj_gap": 4, **options}
    name = "-".join([cls.__name__.lower(), *(str(v) for v in options.values())])
    bad = {k: v for k, v in LOW_RANK_BAD.items() if k in cls.options}
    scaling = {"momentum": "linear", "lion": "sign"}.get(options.get("inner", ""), "adam")
    if options.get("residual") == "sign":
        scaling = "sign"
    return Case(name, cls, given, rule, COMMON_BAD | bad, scaling)


def galore(**options: Any) -> Case:
    return low_rank(GaLoreAdamW, oracle.lowrank, **options)


def dctadamw(**options: Any) -> Case:
    return low_rank(DCTAdamW, oracle.dctadamw, **options)


def fira(**options: Any) -> Case:
    return low_rank(FiraAdamW, oracle.fira, **options)


def apollo(**options: Any) -> Case:
    return low_rank(APOLLO, oracle.apollo, **options)


def trion(**options: Any) -> Case:
    given = {"rank": 3, "polar_dtype": "float32", "lr_adamw": None, **options}
    name = "-".join(["trion", *(str(v) for v in options.values())])
    return Case(name, Trion, given, oracle.trion, COMMON_BAD | TRION_BAD, "sign")


def muon(**options: Any) -> Case:
    given = {"polar_dtype": "float32", "lr_adamw": None, **options}
    name = "-".join(["muon", *(str(v) for v in options.values())])
    return Case(name, Muon, given, oracle.muon, COMMON_BAD | POLAR_BAD | MUON_BAD, "sign")


def polargrad(**options: Any) -> Case:
    given = {"polar_dtype": "float32", "lr_adamw": None, **options}
    name = "-".join(["polargrad", *(f"{k}={v}" for k, v in options.items())])
    scaling = "linear" if options.get("nuclear_scaling", True) else "sign"
    return Case(name, PolarGrad, given, oracle.polargrad, COMMON_BAD | POLAR_BAD | POLARGRAD_BAD,
                scaling)


def gradnormlorp(**options: Any) -> Case:
    case = low_rank(GradNormLoRPAdamW, oracle.gradnormlorp, **options)
    return replace(case, bad={**case.bad, "axis": ["column", 0], "magnitude_scale": [-1.0, "x"],
                              "roles": [("A",), ("A", "B", "base"), "A", 3]})


def frugal(**options: Any) -> Case:
    case = low_rank(FRUGAL, oracle.frugal, **options)
    return replace(case, bad={**case.bad, "free_scale": [-1.0, "x"]}, scaling="sign")


def gradnormlorp_pairs(**options: Any) -> Case:
    case = gradnormlorp(rank=2, **options)
    return replace(case, name=f"{case.name}-pairs", roles=("A", "B", "magnitude"))


def switchlora(**options: Any) -> Case:
    given = {"interval": 4.0, "freeze_steps": 2, "decay_steps": 50, **options}
    name = "-".join(["switchlora", *(f"{k}={v}" for k, v in options.items())])
    return Case(name, SwitchLoRAAdamW, given, bad=COMMON_BAD | SWITCHLORA_BAD,
                roles=("A", "B", "base"), still={"interval": 1e9})


SWITCHLORA_BAD = {
    "roles": [("A", "B"), "A", 3], "scaling": [0.0, "x"], "interval": [0, "often"],
    "interval_decay": [0.0, 1.5], "decay_steps": [0, 1.5], "freeze_steps": [0, 2.0],
    "candidates": [1, 2.5], "candidate_device": ["disk", None],
}

ROWS = [
    Case("adamw", AdamW, bad=COMMON_BAD),
    Case("adamw-amsgrad", AdamW, {"amsgrad": True}, bad=COMMON_BAD),
    Case("adamw8bit", AdamW8bit, bad=COMMON_BAD),
    Case("adamw-nearest", AdamW, {"rounding": "nearest"}, bad=COMMON_BAD),
    galore(),
    *(galore(projection=x) for x in ("svd", "randomized", "random")),
    *(galore(proj_type=x, projection="svd") for x in ("reverse_std", "left", "right", "full")),
    *(galore(projection="svd", moments=x) for x in ("rotate", "reset")),
    *(galore(inner=x, moments="rotate") for x in ("momentum", "lion", "factored")),
    galore(residual="sign", projection="svd"),
    galore(residual="error_feedback"),
    galore(refresh="synchronous", moments="reset"),
    galore(basis_bits=4, error_feedback_bits=8),
    galore(keep_energy=0.9),
    galore(rounding="nearest"),
    low_rank(GaLoreAdamW8bit, oracle.lowrank),
    dctadamw(),
    dctadamw(update_proj_gap=1, error_feedback_bits=32),
    dctadamw(error_feedback_bits=4),
    dctadamw(dct_basis=3, column_norm=2, proj_type="full", similarity="fft"),
    dctadamw(inner="factored"),
    fira(projection="svd"),
    fira(residual_scale="released", projection="svd"),
    fira(projection="dct", inner="lion", proj_type="full"),
    fira(limiter=None),
    fira(basis_bits=8),
    apollo(),
    apollo(scale_type="channel", projection="svd"),
    apollo(scale_type="tensor", projection="svd", scale=1.7),
    frugal(),
    frugal(projection="svd", free_scale=0.5, scale=0.7),
    trion(),
    trion(adjust_lr_fn="match_rms_adamw", dct_basis=3, column_norm=2),
    trion(polar_dtype="bfloat16"),
    muon(),
    *(muon(polar=x) for x in ("polar-express", "qdwh", "zolo-pd")),
    muon(polar="svd", adjust_lr_fn="unscaled"),
    muon(adjust_lr_fn="match_rms_adamw", nesterov=False, matricize="batch"),
    muon(polar_dtype="bfloat16"),
    muon(adjust_lr_fn="spectral", ns_steps=3),
    polargrad(),
    polargrad(polar_first=True),
    polargrad(momentum=None, polar="svd"),
    polargrad(polar="zolo-pd", nuclear_scaling=False),
    polargrad(polar="qdwh", polar_steps=2, lower_bound="eps"),
    polargrad(polar="polar-express"),
    switchlora(),
    switchlora(candidates=4, candidate_device="cpu", amsgrad=True),
    gradnormlorp(projection="svd"),
    gradnormlorp(projection="svd", axis="output", amsgrad=True),
    gradnormlorp(projection="svd", magnitude_scale=0.25),
    gradnormlorp(projection="svd", proj_type="full"),
    gradnormlorp(projection="dct", moments="rotate", inner="factored"),
    gradnormlorp(basis_bits=8),
    gradnormlorp(matricize="batch", axis="output", projection="random"),
    gradnormlorp_pairs(projection="svd"),
    gradnormlorp_pairs(projection="svd", proj_type="full", basis_bits=8),
]


def first_of_each_class() -> list[Case]:
    """Of each class, and of each way in which it is given parameters."""
    seen: dict[tuple[type[MatrixOptimizer], tuple[str, ...]], Case] = {}
    for row in ROWS:
        seen.setdefault((row.make, row.roles), row)
    return list(seen.values())


def all_slow_but(few: Iterable[Any], rows: Iterable[Any]) -> list[Any]:
    """Rows for a parametrization, of which only these few run without ``-m slow``."""
    few = list(few)
    return [row if row in few else pytest.param(row, marks=pytest.mark.slow) for row in rows]


#: Storage of state is a column: every class meets it.
CASES = ROWS + [replace(row, name=f"{row.name}-{bits}bit",
                        options={**row.options, "state_bits": bits})
                for row in first_of_each_class() for bits in (16, 8, 4)
                if row.option("state_bits") != bits]
#: Some whose 16-bit weights have more bits in the state.
SPLIT = [replace(row, name=f"{row.name}-split", options={**row.options, "master_bits": bits})
         for row in ROWS for name, bits in (("adamw", 16), ("galoreadamw", 8),
                                            ("firaadamw-svd", 16), ("muon", 8)) if row.name == name]
#: Rows that are not slow where all are run: of 16 and 4 bits AdamW's and GaLore's.
QUICK = [row for row in CASES if row in ROWS or row.option("state_bits") == 8
         or row.name.startswith(("adamw-", "galoreadamw-"))]
#: Marks of the files of the contract, in each of which every test gets every row as ``case``.
CONTRACT = [pytest.mark.parametrize("case", all_slow_but(QUICK, CASES), ids=lambda c: c.name),
            pytest.mark.usefixtures("quantize_all")]
#: How 16-bit weights are written, the columns beside: options, and whether the result is random.
WRITING = [({"rounding": "nearest"}, False), ({"rounding": "stochastic"}, True),
           ({"rounding": None}, True), ({"rounding": None, "master_bits": 8}, True),
           ({"rounding": None, "master_bits": 16}, False),
           ({"rounding": "nearest", "master_bits": 8}, False)]
SHAPES = [(), (5,), (0, 3), (7, 5), (5, 7), (6, 6), (1, 4), (4, 1), (2, 3), (4, 3, 2), (3, 2, 2, 2)]
