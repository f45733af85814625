"""Sharded parameters (DTensor): which rows a rank holds, and how sums and whole matrices are made.

A parameter of FSDP2 is cut along its first dimension: rank i of W holds rows i c to (i + 1) c,
c = ceil(m / W), the last ranks fewer or none. Along several dimensions of a mesh each cut cuts the
pieces of another. Two ways to update it:

- **by rows**: the arithmetic runs on this rank's rows, and sums over all rows (:meth:`Rows.sum`)
  are the only thing that is exchanged. Element-wise rules, and projections: R = G Q is a product of
  rows, R = P^T G a sum over them. The rows of a stack of matrices are matrices. Where columns are
  cut too, as by tensor parallelism, gradient and weight are exchanged for as many elements in rows,
  and the weight is sent back.
- **whole**: gradient, weight and the sharded state are gathered, every rank does what one process
  would do, bit for bit, and keeps its rows of the result. Any rule and any placement.

State is sharded by one rule: a slot whose rows are the parameter's (:attr:`Slot.rows`) is a
DTensor of the rows on which a rank works; another large one (:attr:`Slot.spread`: moments of r
rows, the basis of a right side) is a DTensor of which each rank has some rows, and is gathered for
the update of its parameter; all else is a plain tensor that is equal on all ranks.

Without ``torch.distributed`` nothing here does anything.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..kernels import fakes

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement

    from .codec import Slot

__all__ = ["Rows", "agreed", "as_parameter", "bytes_of", "check_placements", "gathered", "held",
           "in_rows", "is_sharded", "keep", "like", "local", "new", "norm_of", "offloaded",
           "part_of", "placed", "put", "put_rows", "rows_of", "settled", "share", "summed", "whole"]

# Tensors of more bytes are gathered alone, without the copies of a common buffer.
_SMALL = 1 << 20

T = TypeVar("T")


class Rows(NamedTuple):
    """The rows of a matrix that this rank holds.

    Args:
        start: number of the first one.
        total: rows of the whole matrix.
        counts: rows of each rank.
        rank: this rank's number among them.
        group: the ranks among which the matrix is cut.
        order: the ranks in the order of their rows; () where that is the group's.
        stack: they are matrices of a stack, each of which is updated alone: nothing is summed.
    """

    start: int
    total: int
    counts: tuple[int, ...]
    rank: int
    group: ProcessGroup
    order: tuple[int, ...] = ()
    stack: bool = False

    def sorted(self, pieces: Sequence[T]) -> list[T]:
        """What each rank has, from top to bottom."""
        return [pieces[i] for i in self.order or range(len(pieces))]

    def sum(self, x: Tensor) -> Tensor:
        """The sum of x over all ranks, equal on each; x itself is not changed."""
        total = x.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=self.group)
        return total

    def sums(self, *tensors: Tensor) -> list[Tensor]:
        """:meth:`sum` of each, in one exchange."""
        total = self.sum(torch.cat([x.flatten() for x in tensors]))
        parts = total.split([x.numel() for x in tensors])
        return [part.view(x.shape).to(x.dtype) for x, part in zip(tensors, parts, strict=True)]

    def own(self, x: Tensor) -> Tensor:
        """Cut the rows of this rank out of a whole matrix."""
        return x[self.start:self.start + self.counts[self.rank]]

    def all(self, x: Tensor) -> Tensor:
        """All rows on every rank, from this rank's rows x, of few numbers."""
        whole = x.new_zeros((self.total, *x.shape[1:]))
        self.own(whole).copy_(x)
        return self.sum(whole)

    def columns(self, x: Tensor) -> Tensor:
        """From row shards x (m_i, n) to column shards: all rows of this rank's columns, (m, c) with
        c = ceil(n / W), padded with zeros.
        """
        ranks = len(self.counts)
        each = math.ceil(x.shape[1] / ranks)
        padded = torch.nn.functional.pad(x, (0, ranks * each - x.shape[1]))
        sent = padded.unflatten(1, (ranks, each)).movedim(1, 0)
        found = x.new_empty((self.total, each))
        row = each * x.element_size()
        come, gone = [row * count for count in self.counts], [row * len(x)] * ranks
        torch.distributed.all_to_all_single(found.view(-1).view(torch.uint8), bytes_of(sent),
                                            come, gone, group=self.group)
        return torch.cat(self.sorted(found.split(self.counts))) if self.order else found

    def joined(self, x: Tensor, n: int) -> Tensor:
        """All n columns on every rank, from the shares x of :meth:`columns`."""
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in self.counts]
        torch.distributed.all_gather(parts, x.contiguous(), group=self.group)
        return torch.cat(parts, -1)[..., :n].contiguous()

    def max(self, x: Tensor) -> Tensor:
        """The largest x of all ranks, entry by entry."""
        most = x.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX, group=self.group)
        return most


def is_sharded(x: Tensor) -> bool:
    """Whether x is a DTensor. A process that made one has imported their class."""
    if type(x) is Tensor or type(x) is torch.nn.Parameter:
        return False
    return isinstance(x, _classes())


def offloaded(x: Tensor) -> bool:
    """Whether x is sharded over GPUs, but its rows are on the host (FSDP2's CPUOffloadPolicy)."""
    return is_sharded(x) and local(x).device.type == "cpu" and (
        _dtensor(x).device_mesh.device_type == "cuda")


@functools.cache
def _classes() -> tuple[type, ...]:
    """DTensor's class, if it is available; cached, as an import statement is slow when repeated."""
    if not torch.distributed.is_available():
        return ()
    from torch.distributed.tensor import DTensor

    return (DTensor,)


def local(x: Tensor) -> Tensor:
    """Return this rank's part of x, not a copy. To be called without gradients."""
    return _dtensor(x).to_local() if is_sharded(x) else x


def whole(x: Tensor) -> Tensor:
    """All of x, gathered if it is sharded; a collective operation."""
    # torch 2.9 returns unevenly cut columns as a view that skips the padding, but codes must be
    # contiguous.
    return _dtensor(x).full_tensor().contiguous() if is_sharded(x) else x


def bytes_of(x: Tensor) -> Tensor:
    """The bytes of x in one dimension: a view, or a copy where x is not contiguous."""
    x = x.reshape(-1)
    if x.stride(0) != 1:  # a single element may have any stride
        x = x.clone(memory_format=torch.contiguous_format)
    return x.view(torch.uint8)


def gathered(tensors: Sequence[Tensor]) -> list[Tensor]:
    """:func:`whole` of each; small ones that are cut by rows among the same ranks go together."""
    out: list[Any] = [None] * len(tensors)
    together: dict[tuple[Any, int | None], list[tuple[int, Tensor, Rows, int]]] = {}
    for i, x in enumerate(tensors):
        rows = rows_of(x)
        if rows is None:
            out[i] = whole(x)
            continue
        part = in_rows(x)
        # bytes of one row, and of the most rows that a rank has
        each = math.prod(x.shape[1:]) * x.element_size()
        large = max(rows.counts) * each * len(rows.counts) > _SMALL
        if large and len(_cuts(_dtensor(x))) == 1 and held(x):
            out[i] = whole(x)
        else:
            alone = i if large else None
            together.setdefault((rows.group, alone), []).append((i, part, rows, each))
    for (group, _), members in together.items():
        # Each begins at an aligned address.
        starts = [*itertools.accumulate((-(-max(rows.counts) * each // 16) * 16
                                         for _, _, rows, each in members), initial=0)]
        device = members[0][1].device
        sent = torch.zeros(starts[-1], dtype=torch.uint8, device=device)
        for (_, part, *_), start in zip(members, starts, strict=False):
            sent[start:start + part.nbytes] = bytes_of(part)
        ranks = torch.distributed.get_world_size(group)
        found = torch.empty((ranks, len(sent)), dtype=torch.uint8, device=device)
        if len(sent):
            torch.distributed.all_gather([*found], sent, group=group)
        for (i, part, rows, each), start in zip(members, starts, strict=False):
            pieces = [x[start:start + count * each]
                      for x, count in zip(found, rows.counts, strict=True)]
            out[i] = torch.cat(rows.sorted(pieces)).view(part.dtype).view(tensors[i].shape)
    return out


def keep(x: Tensor, value: Tensor) -> None:
    """Write a whole value to x: this rank's part of it if x is sharded. Sends nothing."""
    local(x).copy_(part_of(x, value))


def part_of(x: Tensor, value: Tensor) -> Tensor:
    """What this rank holds of a whole value that is placed as x is. Sends nothing."""
    if not is_sharded(x):
        return value
    rows = rows_of(x)
    if rows is not None and held(x):
        return rows.own(value)
    from torch.distributed.tensor import distribute_tensor

    d = _dtensor(x)
    part = distribute_tensor(value, d.device_mesh, d.placements, src_data_rank=None)
    return part.to_local().to(local(x).device)  # which may be offloaded


def put(x: Tensor, value: Tensor) -> None:
    """Write a saved value to x, a DTensor placed like x or a whole tensor; else ValueError."""
    if not is_sharded(value):
        keep(x, value)
        return
    places = (_dtensor(value).device_mesh, tuple(_dtensor(value).placements))
    if not is_sharded(x):
        raise ValueError(f"saved as a DTensor with placements {places[1]}, expected a plain tensor")
    if places != (_dtensor(x).device_mesh, tuple(_dtensor(x).placements)):
        raise ValueError(f"saved with placements {places[1]} on {places[0]}, expected "
                         f"{tuple(_dtensor(x).placements)} on {_dtensor(x).device_mesh} (load a "
                         "state of other ranks through torch.distributed.checkpoint)")
    local(x).copy_(local(value))


@torch.inference_mode(False)  # inference tensors could not be written to later
def new(slot: Slot, p: Tensor) -> Tensor:
    """The first value of a slot of p: zeros, sharded where p is and the slot says so."""
    if not (slot.rows or slot.spread) or not is_sharded(p):
        return slot.empty()
    from torch.distributed.tensor import DTensor, distribute_tensor

    d = _dtensor(p)
    places = _places(slot, d)
    # A tensor without storage, from which torch derives the shape of this rank's part. It is on the
    # mesh's devices: from the host, where FSDP2 may offload, it would be copied there in full.
    device = slot.device if slot.device.type == "meta" else d.device_mesh.device_type
    model = torch.empty((), dtype=slot.dtype, device=device).expand(slot.shape)
    shape = distribute_tensor(model, d.device_mesh, places, src_data_rank=None).to_local().shape
    part = slot._replace(shape=tuple(shape)).empty()
    stride = torch.empty(slot.shape, device="meta").stride()
    return DTensor.from_local(part, d.device_mesh, places, run_check=False,
                              shape=torch.Size(slot.shape), stride=stride)


def _places(slot: Slot, p: DTensor) -> Sequence[Placement]:
    """Placements of a slot: those of p's rows; where there are none those of p, and only its row
    cuts where other dimensions differ; and where the slot's rows are not p's (``spread``), cut by
    rows wherever p is cut.
    """
    from torch.distributed.tensor import Replicate, Shard

    if slot.spread:
        return [x if x.is_replicate() else Shard(0) for x in p.placements]
    places = _by_rows(p) or p.placements
    if tuple(slot.shape) == tuple(p.shape):
        return places
    return [x if _cuts_rows(x) else Replicate() for x in places]


def _cuts_rows(place: Placement) -> bool:
    """Whether the first dimension is cut; ``is_shard`` does not tell of cuts of a cut."""
    return getattr(place, "dim", None) == 0


def _cuts(d: DTensor) -> list[int]:
    """The dimensions of its mesh along which d is cut.

    Cuts in one part, along dimensions of one rank, do not count beside others.
    """
    cut = [i for i, x in enumerate(d.placements) if not x.is_replicate()]
    return [i for i in cut if d.device_mesh.size(i) > 1] or cut[:1]


def _in_turn(d: DTensor) -> list[int] | None:
    """The dimensions of its mesh in the order in which they cut d, of which each rank has some
    consecutive rows; None where it is cut in another way.

    A cut comes before those of the dimensions behind it; one of torch's cuts of cuts, in as many
    pieces as these make together, comes after them.
    """
    turn: list[int] = []
    for i in reversed(_cuts(d)):
        place = d.placements[i]
        pieces = getattr(place, "split_factor", 1)
        if not _cuts_rows(place) or pieces not in (1, math.prod(map(d.device_mesh.size, turn))):
            return None
        turn = [*turn, i] if pieces > 1 else [i, *turn]
    return turn


def _by_rows(d: DTensor) -> tuple[Placement, ...] | None:
    """Placements of which each rank has some consecutive rows of d: d's own, or others with as many
    cuts. None where nothing is cut, where torch has no exchange of the two, or where the ranks have
    no group of their own.
    """
    from torch.distributed.tensor import Replicate, Shard

    cut = _cuts(d)
    if not cut or _group_of(d.device_mesh, cut) is None:
        return None
    if _in_turn(d) is not None:
        return tuple(d.placements)
    if any(type(x) not in (Replicate, Shard) for x in d.placements):
        return None
    return tuple(Shard(0) if i in cut else Replicate() for i in range(d.device_mesh.ndim))


def lacks_group(p: Tensor, settled: bool) -> bool:
    """Whether the ranks that share p have no group of their own.

    Args:
        p: any parameter.
        settled: there is state, with which that was settled; else a group may yet be made.
    """
    if not is_sharded(p):
        return False
    d = _dtensor(p)
    cut = _cuts(d)
    return bool(cut) and _group_of(d.device_mesh, cut, settled) is None


def held(p: Tensor) -> bool:
    """Whether :func:`in_rows` is what this rank holds of p, without an exchange."""
    return not is_sharded(p) or _by_rows(_dtensor(p)) in (None, tuple(_dtensor(p).placements))


def rows_of(p: Tensor) -> Rows | None:
    """The rows of p on which this rank works, those of :func:`in_rows`; None where it has all or
    where they are not to be had.
    """
    if not is_sharded(p):
        return None
    d = _dtensor(p)
    if _by_rows(d) is None:
        return None
    mesh, turn = d.device_mesh, _in_turn(d) or _cuts(d)
    dims, here = sorted(turn), mesh.get_coordinate()
    assert here is not None
    ranks = _line(mesh, tuple(-1 if i in dims else place for i, place in enumerate(here)))
    group = _group_of(mesh, dims)
    assert group is not None
    pieces = _pieces(int(d.shape[0]), tuple(mesh.size(i) for i in dims),
                     tuple(dims.index(i) for i in turn))
    of = dict(zip(ranks, pieces, strict=True))
    starts, counts = zip(*(of[k] for k in torch.distributed.get_process_group_ranks(group)),
                         strict=True)
    order = tuple(sorted(range(len(counts)), key=lambda k: (starts[k], counts[k])))
    rank = torch.distributed.get_rank(group)
    return Rows(starts[rank], int(d.shape[0]), counts, rank, group,
                () if order == tuple(range(len(order))) else order)


@functools.lru_cache(64)
def _line(mesh: DeviceMesh, at: tuple[int, ...]) -> list[int]:
    """The ranks of a mesh at some coordinates, of which -1 is any."""
    with fakes.real():
        some = mesh.mesh[tuple(slice(None) if i < 0 else i for i in at)]
        return [*map(int, some.flatten().tolist())]


@functools.lru_cache(1024)
def _pieces(total: int, sizes: tuple[int, ...], turn: tuple[int, ...]) -> list[tuple[int, int]]:
    """First row and number of rows of each rank.

    Args:
        total: rows.
        sizes: ranks along each of the dimensions that cut them.
        turn: numbers of these dimensions in the order of their cuts.
    """
    found = []
    for cell in itertools.product(*map(range, sizes)):
        first, last = 0, total
        for i in turn:
            each = math.ceil((last - first) / sizes[i])
            first = min(first + cell[i] * each, last)
            last = min(first + each, last)
        found.append((first, last - first))
    return found


def _group_of(mesh: DeviceMesh, dims: Sequence[int], settled: bool = True) -> ProcessGroup | None:
    """The ranks that differ from this one in some dimensions of a mesh: the group of one dimension,
    or a group of just these ranks that the job has, as that of all.

    None where there is none. A new one would need all ranks of the job at once, or, with
    ``use_local_synchronization``, ranks that have been in equally many groups before (torch 2.13
    names it after that number, and hangs).
    """
    if len(dims) == 1:
        return mesh.get_group(dims[0])
    here = mesh.get_coordinate()
    assert here is not None
    ranks = _line(mesh, tuple(-1 if i in dims else place for i, place in enumerate(here)))
    look: Any = _group_among if settled else _group_among.__wrapped__
    found: ProcessGroup | None = look(tuple(sorted(ranks)), mesh.device_type,
                                      torch.distributed.group.WORLD)
    return found


@functools.lru_cache(64)
def _group_among(ranks: tuple[int, ...], device: str, job: ProcessGroup) -> ProcessGroup | None:
    """A group of these ranks, the first that was made with the job's backend for a kind of device:
    torchtitan makes others, of a backend that sends nothing.

    Cached, as state is placed accordingly: one that is made later is passed over.
    """
    from torch.distributed.distributed_c10d import _world

    def backend(group: ProcessGroup) -> list[str]:
        kinds = torch.distributed.get_backend_config(group).split(",")
        return [x for x in kinds if x.startswith(f"{device}:")]

    for group, places in _world.pg_group_ranks.items():
        if tuple(sorted(places)) == ranks and backend(group) == backend(job) != []:
            return group
    return None


def in_rows(p: Tensor) -> Tensor:
    """The rows of :func:`rows_of`: what this rank holds, not a copy, or what is exchanged for it; a
    collective operation.
    """
    if held(p):
        return local(p)
    with torch.no_grad():
        x = local(_dtensor(p).redistribute(placements=_by_rows(_dtensor(p)))).contiguous()
    # gloo gathers and cuts, which leaves a view of all
    return x if x.untyped_storage().nbytes() <= x.nbytes else x.clone()


def put_rows(p: Tensor, x: Tensor) -> None:
    """Write rows of :func:`in_rows` back to p, where they are copies; a collective operation."""
    if not held(p):
        local(p).copy_(local(like(p, x)))


def as_parameter(x: Tensor, p: Tensor) -> bool:
    """Whether x is placed as p, but p is updated by other rows: states of torch.optim's are."""
    return not held(p) and is_sharded(x) and (
        _dtensor(x).device_mesh, tuple(_dtensor(x).placements)) == (
        _dtensor(p).device_mesh, tuple(_dtensor(p).placements))


def settled(x: Tensor, p: Tensor) -> Tensor:
    """x as a slot of p is placed; a collective operation where it is placed as p itself."""
    return _of_rows(x, in_rows(x)) if as_parameter(x, p) else x


def share(p: Tensor, rows: Rows | None) -> int:
    """Elements of p that a rank works on, as a number that is equal on all ranks."""
    return p.numel() if rows is None else max(rows.counts) * math.prod(p.shape[1:])


def like(p: Tensor, part: Tensor) -> Tensor:
    """A tensor placed as p is, of which ``part`` is this rank's :func:`in_rows`; collective where
    these are not what it holds.
    """
    if not is_sharded(p):
        return part
    rows = _of_rows(p, part)
    return rows if held(p) else placed(rows, p)


def _of_rows(p: Tensor, part: Tensor) -> Tensor:
    """A DTensor of p's shape and mesh, of which ``part`` is what :func:`in_rows` gives."""
    from torch.distributed.tensor import DTensor

    d = _dtensor(p)
    return DTensor.from_local(part, d.device_mesh, _by_rows(d) or d.placements, run_check=False,
                              shape=d.shape, stride=d.stride())


def placed(x: Tensor, p: Tensor) -> Tensor:
    """A DTensor on p's mesh, placed as p is; a collective operation."""
    with torch.no_grad():
        return _dtensor(x).redistribute(placements=_dtensor(p).placements)


def summed(p: Tensor, x: Tensor) -> Tensor:
    """The sum over all ranks of x, a value of each rank's part of p; collective.

    Unlike :meth:`Rows.sum`, for any placements of p.
    """
    if (rows := rows_of(p)) is not None and not offloaded(p):
        return rows.sum(x)
    if not is_sharded(p):
        return x
    from torch.distributed.tensor import DTensor, Partial, Replicate

    d = _dtensor(p)
    places = [Replicate() if place.is_replicate() else Partial() for place in d.placements]
    return DTensor.from_local(x, d.device_mesh, places, run_check=False).full_tensor()


def norm_of(tensors: Sequence[Tensor]) -> Tensor:
    """The joint 2-norm of tensors, sharded or not, equal on all ranks; a 0-d tensor, collective."""
    plain: list[Tensor] = []
    cut: dict[Any, list[Tensor]] = {}
    for x in tensors:
        if is_sharded(x) and any(place.is_partial() for place in _dtensor(x).placements):
            plain.append(whole(x))
        elif is_sharded(x):
            cut.setdefault((_dtensor(x).device_mesh, tuple(_dtensor(x).placements)), []).append(x)
        else:
            plain.append(x)
    if not cut:
        return torch.nn.utils.get_total_norm(plain)
    for some in cut.values():
        # Squares in float64, whose range holds those of fp32.
        norm = torch.nn.utils.get_total_norm([local(x) for x in some])
        plain.append(summed(some[0], norm.double().square()).sqrt().to(norm.dtype))
    return torch.nn.utils.get_total_norm(plain)


def check_placements(p: Tensor, name: str, where: str) -> None:
    """Refuse a DTensor that is not placed by Shard and Replicate alone: TypeError by name.

    Shards of shards, as FSDP2 makes them of tensor parallelism's, are a class of torch's own.
    """
    if not is_sharded(p):
        return
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    places = _dtensor(p).placements
    if any(type(x) not in (Replicate, Shard, _StridedShard) for x in places):
        raise TypeError(f"{where}: {name} has placements {tuple(places)}, but each must be Shard "
                        "or Replicate")


def agreed(flags: Tensor, params: Sequence[Tensor]) -> Tensor:
    """The OR of flags (0 or 1) over all ranks that share a parameter.

    Args:
        flags: equal in length on all ranks; may be written to.
        params: their meshes give the ranks; without a DTensor among them nothing is sent.
    """
    done: set[Any] = set()
    for p in params:
        if not is_sharded(p):
            continue
        mesh = _dtensor(p).device_mesh
        for i in range(mesh.ndim):
            group = mesh.get_group(i)
            if group not in done:
                done.add(group)
                there = flags.to(mesh.device_type)  # offloaded parameters are elsewhere
                torch.distributed.all_reduce(there, torch.distributed.ReduceOp.MAX, group=group)
                flags = there.to(flags.device)
    return flags


def _dtensor(x: Any) -> DTensor:
    return x  # type: ignore[no-any-return]
