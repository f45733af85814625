"""The papers' update rules for one matrix, in float64 and plain torch. Imports nothing of ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def adamw(start: Tensor, gradients: list[Tensor], **o: Any) -> list[Tensor]:
    """arXiv 1711.05101, algorithm 2, with the decay of torch.optim.AdamW."""
    b1, b2 = o.get("betas", (0.9, 0.999))
    lr, wd, eps = o.get("lr", 1e-3), o.get("weight_decay", 1e-2), o.get("eps", 1e-8)
    w = start.double()
    m, v, top = torch.zeros_like(w), torch.zeros_like(w), torch.zeros_like(w)
    out = []
    for t, g in enumerate(gradients, 1):
        g = g.double() * (-1 if o.get("maximize") else 1)
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g * g
        top = torch.maximum(top, v)
        second = top if o.get("amsgrad") else v
        n = (m / (1 - b1**t)) / ((second / (1 - b2**t)).sqrt() + eps)
        w = (1 - lr * wd) * w - lr * n
        out.append(w)
    return out


def galore(start: Tensor, gradients: list[Tensor], **o: Any) -> list[Tensor]:
    """arXiv 2403.03507, algorithm 2, with an exact SVD; all refreshes at k mod T == 0."""
    b1, b2 = o.get("betas", (0.9, 0.999))
    lr, wd, eps = o.get("lr", 1e-3), o.get("weight_decay", 1e-2), o.get("eps", 1e-8)
    gap, scale = o.get("update_proj_gap", 200), o.get("scale", 0.25)
    kind = o.get("proj_type", "std")
    w = start.double().flatten(1)
    rows, columns = w.shape
    r = min(o["rank"], rows, columns)
    side = {"std": "right" if rows >= columns else "left",
            "reverse_std": "left" if rows >= columns else "right"}.get(kind, kind)
    p, q = torch.eye(rows, dtype=w.dtype), torch.eye(columns, dtype=w.dtype)
    m = v = None
    out = []
    for t, g in enumerate(gradients, 1):
        g = g.double().flatten(1) * (-1 if o.get("maximize") else 1)
        if (t - 1) % gap == 0:
            before = p, q
            u, _, vh = torch.linalg.svd(g, full_matrices=False)
            p = u[:, :r] if side in ("left", "full") else p
            q = vh[:r].mT if side in ("right", "full") else q
            if m is not None:  # signs are free: those that agree with the last basis
                p = p * torch.where((p * before[0]).sum(0) < 0, -1.0, 1.0)
                q = q * torch.where((q * before[1]).sum(0) < 0, -1.0, 1.0)
            if m is not None and o.get("moments") == "reset":
                m, v = torch.zeros_like(m), torch.zeros_like(v)
            if m is not None and o.get("moments") == "rotate":
                left, right = p.mT @ before[0], before[1].mT @ q
                m, v = left @ m @ right, left**2 @ v @ right**2
        low = p.mT @ g @ q
        m = (1 - b1) * low + (0 if m is None else b1 * m)
        v = (1 - b2) * low * low + (0 if v is None else b2 * v)
        n = (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + eps)
        w = (1 - lr * wd) * w - lr * scale * p @ n @ q.mT
        out.append(w.view(start.shape))
    return out
