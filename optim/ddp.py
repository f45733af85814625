"""DistributedDataParallel that sends projected gradients: r x n numbers instead of m x n."""

# No postponed annotations here: DDP reads those of the hook.

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from . import codec
from .base import MatrixOptimizer, checked_optimizer
from .checks import without_autocast
from .lowrank import LowRankOptimizer
from .project import Bases

__all__ = ["ProjectedAllReduce", "projected_allreduce"]

# Elements of a gradient that are written at once.
_BLOCK = 1 << 22


class ProjectedAllReduce:
    """What :func:`projected_allreduce` counts: bytes that this rank has given to reductions.

    Attributes:
        bytes_sent: so far.
        bytes_plain: what DDP without the hook would have sent.
    """

    def __init__(self, optimizer: LowRankOptimizer, group: Any) -> None:
        self.optimizer, self.group = weakref.ref(optimizer), group
        self.bytes_sent = self.bytes_plain = 0

    def bases(self, params: Sequence[Tensor]) -> dict[Tensor, tuple[Bases, tuple[int, ...]]]:
        """Of parameters whose gradients are sent projected: the bases, the shape as a matrix."""
        optimizer = self.optimizer()
        if optimizer is None:
            return {}
        found, asked = {}, {p for p in params if optimizer.state.get(p)}
        for _, p, o in optimizer._named():
            if p not in asked or not _projects(optimizer, p, o):
                continue
            s = optimizer.state[p]
            if optimizer.due(s, o, int(s["step"]) + 1):
                continue
            shape = optimizer.matrix_shape(p, o)
            like = codec.wide(p.detach().new_empty(())).expand(shape)
            decoded = codec.Decoded(s, optimizer._layouts[p], p)
            found[p] = optimizer.bases(like, decoded, o, int(s["basis_step"])), shape
        return found


def _projects(optimizer: LowRankOptimizer, p: Tensor, o: dict[str, Any]) -> bool:
    """Whether an update takes nothing of G but R = P^T G Q, between two refreshes."""
    return optimizer.own_rule(p, o) and optimizer.by_projection(o)


def _hook(state: ProjectedAllReduce, bucket: dist.GradBucket  # type: ignore[name-defined]
          ) -> torch.futures.Future[Tensor]:
    """Mean over ranks of R where R is enough, of G elsewhere."""
    buffer = bucket.buffer()
    with torch.no_grad(), without_autocast():
        parts: list[Tensor] = []
        finish: list[Callable[[Tensor], None]] = []
        projected = state.bases(bucket.parameters())
        for p, g in zip(bucket.parameters(), bucket.gradients(), strict=True):
            if p not in projected:
                parts.append(g.reshape(-1))
                finish.append(g.view(-1).copy_)
                continue
            bases, shape = projected[p]
            matrix = g.view(shape)
            low = bases.down(codec.wide(matrix))
            parts.append(low.reshape(-1).to(buffer.dtype))
            finish.append(_Lift(bases, low.shape, matrix))
        flat = torch.cat(parts).div_(dist.get_world_size(state.group))
    state.bytes_sent += flat.nbytes
    state.bytes_plain += buffer.nbytes
    sizes = [x.numel() for x in parts]

    def done(future: torch.futures.Future[list[Tensor]]) -> Tensor:
        with torch.no_grad(), without_autocast():  # another thread's mode is its own
            for put, x in zip(finish, future.value()[0].split(sizes), strict=True):
                put(x)
        return buffer  # type: ignore[no-any-return]

    work = dist.all_reduce(flat, group=state.group, async_op=True)
    reduced: torch.futures.Future[Tensor] = work.get_future().then(done)
    return reduced


class _Lift:
    """Write the gradient whose projection is R: P (P^T P)^-1 R (Q^T Q)^-1 Q^T.

    Stored bases are orthonormal up to the rounding of their storage, which the inverses take out.
    """

    def __init__(self, bases: Bases, shape: torch.Size, g: Tensor) -> None:
        self.bases, self.shape, self.g = bases, shape, g

    def __call__(self, low: Tensor) -> None:
        x = codec.wide(low).view(self.shape)
        left, right, _ = self.bases
        # solve would wait for the GPU, while the backward pass could go on, to see whether it
        # failed; that it cannot, of columns that are orthonormal up to rounding.
        if left is not None:
            x = torch.linalg.solve_ex(left.mT @ left, x)[0]
        if right is not None:
            x = torch.linalg.solve_ex(right.mT @ right, x, left=False)[0]
        a = x if left is None else left if right is None else left @ x
        b = x if right is None else right.mT
        # Each future may have a stream, and with it memory, of its own: no full-size temporary.
        rows = max(1, _BLOCK // self.g[..., :1, :].numel())
        for g, part in zip(self.g.split(rows, -2), a.split(rows, -2), strict=True):
            g.copy_(part @ b)
        if x.device.type == "cuda":
            # Of the hook's stream; this is another one, of the reduction.
            for basis in (left, right):
                if basis is not None:
                    basis.record_stream(torch.cuda.current_stream(x.device))


def projected_allreduce(optimizer: MatrixOptimizer, model: DistributedDataParallel
                        ) -> ProjectedAllReduce:
    """Let DDP average R = P^T G Q instead of G wherever a low-rank update needs no more.

    Matrices whose basis is refreshed at the coming step, all at the first one, and parameters that
    get AdamW are sent in full. After the backward pass ``p.grad`` of a projected matrix is the part
    of the mean gradient in its subspace, so that ``step()``, ``clip_grad_norm_`` (which then sees
    that part's norm), GradScaler, ``no_sync`` and schedulers go on as they are. The step equals
    that of plain DDP up to rounding; with 16-bit gradients, up to theirs.

    Args:
        optimizer: of a low-rank class, with ``residual="none"`` for at least one matrix.
        model: whose gradients are sent. Call it before the first backward pass; DDP takes one hook
            and keeps it.

    Returns:
        An object with ``bytes_sent`` and ``bytes_plain``.

    Raises:
        TypeError, ValueError: an argument, or an optimizer in which every matrix needs its full
            gradient.
    """
    where = "projected_allreduce"
    if not isinstance(model, DistributedDataParallel):
        raise TypeError(f"{where}: model is a {type(model).__name__}, but it must be a "
                        "DistributedDataParallel (FSDP2 reduces gradients by itself)")
    optimizer = checked_optimizer(optimizer, where)
    if not isinstance(optimizer, LowRankOptimizer) or not any(
            _projects(optimizer, p, o) for _, p, o in optimizer._named()):
        raise ValueError(f"{where}: {type(optimizer).__name__} has no matrix whose update takes "
                         "the projected gradient alone: use GaLoreAdamW or DCTAdamW with a rank "
                         "and residual='none', or DDP as it is")
    state = ProjectedAllReduce(optimizer, model.process_group)
    model.register_comm_hook(state, _hook)
    return state
