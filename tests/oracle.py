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


def cosines(n: int, kind: int) -> Tensor:
    """Q of arXiv 2505.17967: D[i, j] = sqrt(2 / n) cos(pi i (2 j + 1) / (2 n)), row 0 / sqrt 2."""
    i = torch.arange(n, dtype=torch.float64)
    d = (2 / n) ** 0.5 * torch.cos(torch.pi * torch.outer(i, 2 * i + 1) / (2 * n))
    d[0] /= 2**0.5
    return d.mT if kind == 2 else d


def _side(rows: int, columns: int, kind: str) -> str:
    return {"std": "right" if rows >= columns else "left",
            "reverse_std": "left" if rows >= columns else "right"}.get(kind, kind)


def _bases(g: Tensor, before: tuple[Tensor, Tensor] | None, r: int, side: str, o: dict[str, Any]
           ) -> tuple[Tensor, Tensor]:
    """P and Q, an identity where a side is not projected."""
    p, q = (torch.eye(k, dtype=g.dtype) for k in g.shape)
    if o.get("projection") == "dct":
        norm, kind = o.get("column_norm", 1), o.get("dct_basis", 2)
        if side in ("left", "full"):
            full = cosines(len(p), kind)
            p = full[:, (full.mT @ g).norm(norm, 1).topk(r).indices.sort().values]
        if side in ("right", "full"):
            full = cosines(len(q), kind)
            q = full[:, (g @ full).norm(norm, 0).topk(r).indices.sort().values]
        return p, q
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    p = u[:, :r] if side in ("left", "full") else p
    q = vh[:r].mT if side in ("right", "full") else q
    if before is not None:  # signs are free: those that agree with the last basis
        p = p * torch.where((p * before[0]).sum(0) < 0, -1.0, 1.0)
        q = q * torch.where((q * before[1]).sum(0) < 0, -1.0, 1.0)
    return p, q


def _inner(low: Tensor, s: dict[str, Tensor], t: int, o: dict[str, Any]) -> Tensor:
    """Direction N, and the moments in s brought up to date."""
    b1, b2 = o.get("betas", (0.9, 0.999))
    eps, inner = o.get("eps", 1e-8), o.get("inner", "adamw")
    m = s.setdefault("m", torch.zeros_like(low))
    if inner == "momentum":  # torch.optim.SGD
        s["m"] = b1 * m + low
        return s["m"]
    if inner == "lion":  # arXiv 2302.06675
        s["m"] = b2 * m + (1 - b2) * low
        return (b1 * m + (1 - b1) * low).sign()
    s["m"] = b1 * m + (1 - b1) * low
    square = low * low
    if inner == "factored":  # arXiv 1804.04235
        for name, mean in (("row", square.mean(1, True)), ("column", square.mean(0, True))):
            s[name] = b2 * s.get(name, 0) + (1 - b2) * mean
        v = s["row"] @ s["column"] / s["row"].mean()
    else:
        v = s["v"] = b2 * s.get("v", 0) + (1 - b2) * square
    return (s["m"] / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + eps)


def _turn(s: dict[str, Tensor], left: Tensor, right: Tensor, r: int) -> dict[str, Tensor]:
    """M <- Rot M, V <- (Rot o Rot) V from each side; a row mean has no right side to turn."""
    out = {}
    for name, x in s.items():
        a, b = (left, right) if name == "m" else (left**2, right**2)
        x = x if len(a) != x.shape[0] else a @ x
        out[name] = x if len(b) != x.shape[1] else x @ b
    return out


def _columns(x: Tensor, side: str) -> Tensor:
    """Norms of the columns (left), rows (right), or of the matrix (full)."""
    if side == "full":
        return x.norm().view(1, 1)
    return x.norm(dim=0 if side == "left" else 1, keepdim=True)


def lowrank(start: Tensor, gradients: list[Tensor], **o: Any) -> list[Tensor]:
    """GaLore (arXiv 2403.03507, algorithm 2) with exact SVDs, and what others made of it.

    DCT-AdamW (2505.17967): projection="dct", moments="rotate", error feedback. Fira (2410.01623):
    residual="fira". APOLLO (2412.05270): scale_type. Refreshes are synchronous.
    """
    lr, wd, eps = o.get("lr", 1e-3), o.get("weight_decay", 1e-2), o.get("eps", 1e-8)
    gap, scale, gamma = o["update_proj_gap"], o.get("scale", 0.25), o.get("limiter", 1.01)
    dct_adamw = o.get("phase", 0)
    w = start.double().flatten(1)
    r = min(o["rank"], *w.shape)
    side = _side(*w.shape, o.get("proj_type", "std"))
    residual = "error_feedback" if o.get("error_feedback_bits") else o.get("residual", "none")
    bases, s, error, last, out = None, {}, torch.zeros_like(w), None, []
    since = 0  # updates before the moments began
    for t, g in enumerate(gradients, 1):
        g = g.double().flatten(1) * (-1 if o.get("maximize") else 1)
        a = g + error if residual == "error_feedback" else g
        if t == 1 or (t - 1 + dct_adamw) % gap == 0:
            before, bases = bases, _bases(a, bases, r, side, o)
            if before and o.get("moments", "keep") == "reset":
                s, since = {}, t - 1
            elif before and o.get("moments", "keep") == "rotate":
                s = _turn(s, bases[0].mT @ before[0], before[1].mT @ bases[1], r)
        p, q = bases
        low = p.mT @ a @ q
        n = _inner(low, s, t - since, o)
        lifted = p @ n @ q.mT
        rest = g - p @ low @ q.mT
        if residual == "error_feedback":
            error = a - p @ low @ q.mT
        u = scale * lifted
        if residual == "sign":
            u = u + scale * rest.sign()
        if residual == "fira" or "scale_type" in o:
            released = o.get("residual_scale") == "released"
            b1, b2 = o.get("betas", (0.9, 0.999))
            late = (1 - b2 ** (t - since)) ** 0.5 / (1 - b1 ** (t - since)) if released else 1.0
            along = "full" if o.get("scale_type") == "tensor" else side
            phi = _columns(n / late, along) / (_columns(low, along) + eps)
            if "scale_type" in o:
                rest = g
            elif released:
                rest = g - scale * p @ low @ q.mT
            residue = rest * phi
            if gamma is not None:
                if last is not None:
                    residue = residue / max(residue.norm() / (last + eps) / gamma, 1)
                last = residue.norm()
            residue = residue * late
            residue = residue if released else scale * residue
            u = residue if "scale_type" in o else u + residue
        w = (1 - lr * wd) * w - lr * u
        out.append(w.view(start.shape))
    return out


def dctadamw(start: Tensor, gradients: list[Tensor], **o: Any) -> list[Tensor]:
    """Refreshes at the 1-based steps 1 and t mod gap == 0."""
    defaults = {"projection": "dct", "moments": "rotate", "scale": 1.0, "phase": 1}
    return lowrank(start, gradients, **{**defaults, **o})


def fira(start: Tensor, gradients: list[Tensor], **o: Any) -> list[Tensor]:
    return lowrank(start, gradients, **{"residual": "fira", **o})


def apollo(start: Tensor, gradients: list[Tensor], **o: Any) -> list[Tensor]:
    return lowrank(start, gradients, **{"scale": 1.0, "scale_type": "channel", **o})


def quintic(x: Tensor, steps: int) -> Tensor:
    """Muon's Newton-Schulz iteration."""
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        s = x @ x.mT
        x = 3.4445 * x - 4.7750 * s @ x + 2.0315 * s @ s @ x
    return x


def trion(start: Tensor, gradients: list[Tensor], **o: Any) -> list[Tensor]:
    """arXiv 2505.17967: B = M + G; b = B Q_r; M = B - (1 - mu) b Q_r^T; u = s NS(b) Q_r^T."""
    lr, wd, mu = o.get("lr", 0.02), o.get("weight_decay", 1e-2), o.get("momentum", 0.95)
    w = start.double().flatten(1)
    m, out = torch.zeros_like(w), []
    rows, columns = w.shape
    side, r = _side(rows, columns, "std"), min(o["rank"], rows, columns)
    s = {"original": max(1, rows / columns) ** 0.5, "spectral": (rows / columns) ** 0.5,
         "match_rms_adamw": 0.2 * max(rows, columns) ** 0.5, "unscaled": 1.0,
         }[o.get("adjust_lr_fn", "original")]
    for g in gradients:
        b = m + g.double().flatten(1) * (-1 if o.get("maximize") else 1)
        p, q = _bases(b, None, r, side, {**o, "projection": "dct"})
        low = p.mT @ b @ q
        m = b - (1 - mu) * p @ low @ q.mT
        w = (1 - lr * wd) * w - lr * s * p @ quintic(low, o.get("ns_steps", 5)) @ q.mT
        out.append(w.view(start.shape))
    return out


# Polar Express as published (arXiv 2505.16932), l0 = 1e-3; x is divided by 1.01 in each.
POLAR_EXPRESS = [
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845749493, 0.4188073119525673),
]


def halley(s: Tensor, bound: float, low: float, steps: int) -> Tensor:
    """QDWH on singular values: s (a + b s^2) / (1 + c s^2), then one Newton step."""
    s = s / bound
    for _ in range(steps):
        d = (4 * (1 / low**2 - 1) / low**2) ** (1 / 3)
        h = (1 + d) ** 0.5
        a = h + (2 - d + 2 * (2 - low**2) / (low**2 * h)) ** 0.5
        b = (a - 1) ** 2 / 4
        c = a + b - 1
        s, low = s * (a + b * s**2) / (1 + c * s**2), low * (a + b * low**2) / (1 + c * low**2)
    return 1.5 * s - 0.5 * s**3


def polar(x: Tensor, o: dict[str, Any], default: str) -> Tensor:
    """Polar factor as the options say; the converging oracles are the SVD's definition."""
    method, steps = o.get("polar", default), o.get("polar_steps")
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    if method in ("newton-schulz", "polar-express"):
        quintics = [(3.4445, -4.7750, 2.0315)] * o.get("ns_steps", 5)
        table = quintics if method == "newton-schulz" else POLAR_EXPRESS
        s = s / s.norm() / (1.01 if method == "polar-express" else 1.0)
        if steps is None and default == "qdwh":  # to convergence
            return u @ vh
        by = 1.01 if method == "polar-express" else 1.0
        for a, b, c in table:
            s = a * (s / by) + b * (s / by) ** 3 + c * (s / by) ** 5
        return (u * s) @ vh
    if steps:
        bound = (x.abs().sum(0).max() * x.abs().sum(1).max()).sqrt().item()
        s = halley(s, bound, torch.finfo(torch.float32).eps, steps)
        return (u * s) @ vh
    return u @ vh


def _matrices(x: Tensor, o: dict[str, Any]) -> Tensor:
    """(b, m, n), one matrix unless the options say batch."""
    if o.get("matricize") == "batch" and x.ndim > 2:
        return x.flatten(0, -3)
    return x.flatten(1).unsqueeze(0)


def muon(start: Tensor, gradients: list[Tensor], **o: Any) -> list[Tensor]:
    """Jordan et al., 2024: B = mu B + (1 - mu) G; W -= lr s polar(mu B + (1 - mu) G), decay."""
    lr, wd, mu = o.get("lr", 1e-3), o.get("weight_decay", 0.1), o.get("momentum", 0.95)
    w = _matrices(start.double(), o).clone()
    m, out = torch.zeros_like(w), []
    rows, columns = w.shape[-2:]
    s = {"original": max(1, rows / columns) ** 0.5, "spectral": (rows / columns) ** 0.5,
         "match_rms_adamw": 0.2 * max(rows, columns) ** 0.5, "unscaled": 1.0,
         }[o.get("adjust_lr_fn") or "original"]
    for g in gradients:
        g = _matrices(g.double(), o) * (-1 if o.get("maximize") else 1)
        m = mu * m + (1 - mu) * g
        ahead = mu * m + (1 - mu) * g if o.get("nesterov", True) else m
        for i in range(len(w)):
            w[i] = (1 - lr * wd) * w[i] - lr * s * polar(ahead[i], o, "newton-schulz")
        out.append(w.reshape(start.shape).clone())
    return out


def polargrad(start: Tensor, gradients: list[Tensor], **o: Any) -> list[Tensor]:
    """arXiv 2505.21799: M = beta M + (1 - beta) G, W -= lr <M, U> U; or M of U, lr <G, U> M."""
    lr, wd, beta = o.get("lr", 0.02), o.get("weight_decay", 1e-2), o.get("momentum", 0.95) or 0.0
    w = start.double().flatten(1)
    m, out = torch.zeros_like(w), []
    for g in gradients:
        g = g.double().flatten(1) * (-1 if o.get("maximize") else 1)
        if o.get("polar_first"):
            u = polar(g, o, "qdwh")
            nuclear = (g * u).sum()
            m = beta * m + (1 - beta) * u
            u = m
        else:
            m = beta * m + (1 - beta) * g
            u = polar(m, o, "qdwh")
            nuclear = (m * u).sum()
        w = (1 - lr * wd) * w - lr * (nuclear if o.get("nuclear_scaling", True) else 1.0) * u
        out.append(w.view(start.shape))
    return out


def gradnormlorp(start: Tensor, gradients: list[Tensor], **o: Any) -> list[Tensor]:
    """arXiv 2412.19616, W = V diag(mu / c): Adam on mu, GaLore on V, in full size.

    After a step V is scaled to V diag(mu / c), which leaves W; zero columns are not tested.
    """
    lr, wd, eps = o.get("lr", 1e-3), o.get("weight_decay", 1e-2), o.get("eps", 1e-8)
    b1, b2 = o.get("betas", (0.9, 0.999))
    gap, scale, dim = o["update_proj_gap"], o.get("scale", 0.25), int(o.get("axis") == "output")
    v = start.double().flatten(1)
    r = min(o["rank"], *v.shape)
    side = _side(*v.shape, o.get("proj_type", "std"))
    mu = v.norm(dim=dim, keepdim=True)
    m_mu, v_mu, top_mu = (torch.zeros_like(mu) for _ in range(3))
    bases, s, top, out = None, {}, None, []
    for t, g in enumerate(gradients, 1):
        g = g.double().flatten(1) * (-1 if o.get("maximize") else 1)
        c = v.norm(dim=dim, keepdim=True)
        unit = v / c
        slope = (unit * g).sum(dim, keepdim=True)  # N3
        d = (g - unit * slope) * mu / c  # N4
        if t == 1 or (t - 1) % gap == 0:
            before, bases = bases, _bases(d, bases, r, side, o)
            if before and o.get("moments", "keep") == "rotate":
                s = _turn(s, bases[0].mT @ before[0], before[1].mT @ bases[1], r)
        p, q = bases
        if o.get("amsgrad"):
            low = p.mT @ d @ q
            _inner(low, s, t, o)
            top = s["v"] if top is None else torch.maximum(top, s["v"])
            n = (s["m"] / (1 - b1**t)) / ((top / (1 - b2**t)).sqrt() + eps)
        else:
            n = _inner(p.mT @ d @ q, s, t, o)
        v = v - lr * scale * p @ n @ q.mT  # N6
        m_mu = b1 * m_mu + (1 - b1) * slope
        v_mu = b2 * v_mu + (1 - b2) * slope**2
        top_mu = torch.maximum(top_mu, v_mu)
        second = top_mu if o.get("amsgrad") else v_mu
        n_mu = (m_mu / (1 - b1**t)) / ((second / (1 - b2**t)).sqrt() + eps)
        mu = (1 - lr * wd) * mu - lr * o.get("magnitude_scale", 1.0) * n_mu
        v = v * mu / v.norm(dim=dim, keepdim=True)
        mu = v.norm(dim=dim, keepdim=True) * mu.sign()
        out.append(v.view(start.shape))
    return out


def switchlora(weight: Tensor, a: Tensor, b: Tensor, pool_a: Tensor, pool_b: Tensor,
               gradients: list[Tensor], switches: list[Any], **o: Any
               ) -> list[tuple[Tensor, Tensor, Tensor]]:
    """arXiv 2406.06564, one pair: L9 to L12, with the choices that were made at each step.

    ``gradients`` are of W + s B A; a switch is (rows of A, their candidates, columns of B, theirs).
    """
    lr, wd, eps = o.get("lr", 1e-3), o.get("weight_decay", 0.0), o.get("eps", 1e-8)
    (b1, b2), s, rest = o.get("betas", (0.9, 0.999)), o["scaling"], o["freeze_steps"]
    weight, a, b, pool_a, pool_b = (x.double().clone() for x in (weight, a, b, pool_a, pool_b))
    r = len(a)
    b, out = b.mT.clone(), []
    state = {k: {"m": torch.zeros_like(x), "v": torch.zeros_like(x), "active": list(range(r)),
                 "count": [0] * r, "frozen": [0] * r} for k, x in (("a", a), ("b", b))}
    for g, (rows, to_rows, columns, to_columns) in zip(gradients, switches, strict=True):
        g = g.double()
        grad = {"a": s * b @ g, "b": s * a @ g.mT}  # at the factors before the switch
        for x, y, side, other, pool, chosen, places in (
                (a, b, "a", "b", pool_a, rows, to_rows),
                (b, a, "b", "a", pool_b, columns, to_columns)):
            before = weight + s * b.mT @ a
            for i in chosen:  # all go back first
                pool[state[side]["active"][i]] = x[i]
            for i, place in zip(chosen, places, strict=True):
                change = torch.outer(y[i], x[i] - pool[place])
                weight = weight + s * (change if side == "a" else change.mT)
                x[i] = pool[place]
                state[side]["active"][i] = place
                state[other]["m"][i] = state[other]["v"][i] = 0
                state[other]["count"][i] = 0
                state[other]["frozen"][i] = rest
            assert (weight + s * b.mT @ a - before).abs().max() < 1e-12
        for side, x in (("a", a), ("b", b)):
            z = state[side]
            for i in range(r):
                if z["frozen"][i]:
                    z["frozen"][i] -= 1
                    continue
                z["count"][i] += 1
                k = z["count"][i]
                z["m"][i] = b1 * z["m"][i] + (1 - b1) * grad[side][i]
                z["v"][i] = b2 * z["v"][i] + (1 - b2) * grad[side][i] ** 2
                n = (z["m"][i] / (1 - b1**k)) / ((z["v"][i] / (1 - b2**k)).sqrt() + eps)
                x[i] = (1 - lr * wd) * x[i] - lr * n
        out.append((weight.clone(), a.clone(), b.mT.clone()))
    return out


def frugal(start: Tensor, gradients: list[Tensor], **o: Any) -> list[Tensor]:
    """arXiv 2411.07837, algorithm 1, with GaLore's subspaces, Adam and signSGD."""
    b1, b2 = o.get("betas", (0.9, 0.999))
    lr, wd, eps = o.get("lr", 1e-3), o.get("weight_decay", 1e-2), o.get("eps", 1e-8)
    w = start.double().flatten(1)
    r, wide = min(o["rank"], *w.shape), w.shape[0] < w.shape[1]
    out = []
    for k, g in enumerate(gradients):
        g = g.double().flatten(1) * (-1 if o.get("maximize") else 1)
        if k % o["update_proj_gap"] == 0:
            u, _, vh = torch.linalg.svd(g, full_matrices=False)
            inside = u[:, :r] @ u[:, :r].mT if wide else vh[:r].mT @ vh[:r]
            down = (lambda x, u=u: u[:, :r].mT @ x) if wide else (lambda x, vh=vh: x @ vh[:r].mT)
            up = (lambda x, u=u: u[:, :r] @ x) if wide else (lambda x, vh=vh: x @ vh[:r])
            m, v, t = torch.zeros_like(down(g)), torch.zeros_like(down(g)), 0
        low, free = down(g), g - (inside @ g if wide else g @ inside)
        m, v = b1 * m + (1 - b1) * low, b2 * v + (1 - b2) * low * low
        t += 1  # of this subspace: the authors' code restarts the count with the moments
        n = (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + eps)
        w = (1 - lr * wd) * w - lr * (o.get("scale", 1) * up(n)
                                      + o.get("free_scale", 1) * free.sign())
        out.append(w.view(start.shape))
    return out
