"""More than one process: every class sharded, under FSDP2 and DDP, saved and loaded elsewhere."""

from __future__ import annotations

import functools
import itertools
import shutil
from typing import Any

import pytest
import torch
from lissom.bench.ranks import on_ranks
from lissom.kernels import _triton
from lissom.optim import AdamW, GradNormLoRPAdamW, SwitchLoRAAdamW, Trion
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from . import jobs
from .cases import CASES, all_slow_but, first_of_each_class
from .helpers import assert_same
from .pool import RANKS, Pool
from .ranks import assert_bytes, assert_close

pytestmark = pytest.mark.usefixtures("quantize_shards")

CLASSES = first_of_each_class()
FEW = [case.name for case in CLASSES] + [
    f"{case.name}-8bit" for case in CLASSES if case.option("state_bits") != 8]


@functools.cache
def alone(name: str, steps: int = 20) -> dict[str, Any]:
    """What one process makes of the row, with which several tests compare their ranks."""
    return jobs.trained(None, name, steps)


@pytest.mark.skipif(not _triton.INTERPRETED, reason="needs triton's interpreter")
@pytest.mark.parametrize(("name", "dtype"), [
    ("adamw8bit", torch.bfloat16), *(pytest.param(name, dtype, marks=pytest.mark.slow)
                                     for name, dtype in [
        ("adamw", torch.float32), ("adamw-16bit", torch.bfloat16), ("galoreadamw", torch.float32),
        ("galoreadamw-8bit", torch.bfloat16), ("galoreadamw-16bit", torch.bfloat16),
        ("dctadamw", torch.bfloat16), ("firaadamw-svd", torch.bfloat16),
        ("apollo", torch.bfloat16), ("frugal", torch.bfloat16)])])
def test_rows_of_several_go_together(pool, name, dtype):
    """What ranks hold of matrices that are alike, as one after the other, bit for bit.

    Seven rows are three, three and one; of one row all but one rank have nothing.
    """
    shapes = [(7, 5), (5, 7), (7, 5), (6,), (7, 5), (6,), (1, 5), (1, 5), (5, 7)]
    given = {"name": name, "dtype": dtype, "shapes": shapes}
    apart, together = (pool.run(jobs.by_kernels, 3, together=x, **given) for x in (False, True))
    for a, b in zip(apart, together, strict=True):
        assert max(a["found"]) == 1
        assert_same(a["weights"], b["weights"], "weights")
        for x, y in zip(a["state"], b["state"], strict=True):
            assert_same(x, y, "state")
    # Dense ones, and of matrices those of which rows are enough.
    case = jobs.case_of(name)
    rows = case.make.__name__ in ("GaLoreAdamW", "AdamW", "AdamW8bit")
    assert max(together[0]["found"]) >= (3 if rows else 2)


@pytest.mark.skipif(not _triton.INTERPRETED, reason="needs triton's interpreter")
def test_what_is_gathered_goes_alone(pool):
    """Ranks need not agree on who goes with whom, and all must gather."""
    given = {"name": "galoreadamw-8bit", "dtype": torch.bfloat16, "shapes": [(7, 5)] * 3,
             "spread": 1}
    apart, together = (pool.run(jobs.by_kernels, 3, together=x, **given) for x in (False, True))
    for a, b in zip(apart, together, strict=True):
        assert max(b["found"]) == 1
        assert_same([a["weights"], a["state"]], [b["weights"], b["state"]])


@pytest.mark.skipif(not _triton.INTERPRETED, reason="needs triton's interpreter")
@pytest.mark.parametrize("norm", [1, 2])
def test_ranks_choose_the_columns_of_one_process_in_one_pass(pool, norm):
    """Those of all rows, though each has some."""
    given = {"name": "dctadamw", "dtype": torch.bfloat16, "together": False,
             "shapes": [(7, 5), (5, 7), (9, 6)], "column_norm": norm}
    one = jobs.by_kernels(None, **given)
    for out in pool.run(jobs.by_kernels, 3, **given):
        for a, b in zip(one["state"], out["state"], strict=True):
            (name,) = (k for k in a if k.startswith("columns_"))
            assert a[name].tolist() == b[name].tolist()


def exact(name: str) -> bool:
    """Whether the class reduces nothing: element by element, or as a whole on every rank."""
    return name.startswith(("adamw", "switchlora"))


# ---- sharded by hand: the same gradients


@pytest.mark.parametrize("name", all_slow_but(FEW, [case.name for case in CASES]))
def test_three_ranks_equal_one(pool, name):
    steps = 20 if name in FEW else 8  # each class for long, its variants over two refreshes
    one = alone(name, steps)
    outs = pool.run(jobs.trained, 3, name=name, steps=steps)
    assert_close(one, outs, exact(name))
    assert_bytes(outs, 3)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("name", all_slow_but([case.name for case in CLASSES], FEW))
def test_any_number_of_ranks_equals_one(pool, name, ranks):
    one = alone(name)
    outs = pool.run(jobs.trained, ranks, name=name)
    assert_close(one, outs, exact(name) or ranks == 1)
    assert_bytes(outs, ranks)


@pytest.mark.parametrize("name", FEW)
def test_whole_shards_are_exact(pool, name):
    one = alone(name)
    assert_close(one, pool.run(jobs.trained, 3, name=name, shards="whole"), True)


@pytest.mark.parametrize(("name", "shapes", "ranks", "more"), [
    ("galoreadamw", [(2, 64)], 2, {"basis_bits": 4}),  # whose codes are one byte on each rank
    ("galoreadamw", [(3, 64)], 3, {"basis_bits": 8, "rank": 1}),
    ("galoreadamw", [(5, 9), (9, 5)], 3, {"projection": "random", "moments": "rotate"}),
    ("dctadamw", [(6, 5)], 4, {"dct_basis": 3, "similarity": "fft"}),  # no rows on the last rank
    ("dctadamw", [(6, 5), (5, 7)], 4, {"column_norm": 2, "update_proj_gap": 1}),  # of one scale
    # of whose columns some ranks transform none
    ("dctadamw", [(9, 2), (9, 1), (12, 5)], 4, {"proj_type": "left", "update_proj_gap": 1}),
    ("trion-bfloat16", [(5, 1), (1, 5), (1, 1)], 3, {}), ("muon", [(5, 1), (1, 5), (1, 1)], 3, {}),
    ("polargrad", [(5, 1), (1, 5), (1, 1)], 4, {})], ids=str)
def test_odd_cases_on_several_ranks(pool, name, shapes, ranks, more):
    given = {"name": name, "shapes": shapes, "steps": 6, **more}
    outs = pool.run(jobs.trained, ranks, **given)
    assert_close(jobs.trained(None, **given), outs, False)


@pytest.mark.parametrize("small", [0, 1 << 20])
@pytest.mark.parametrize(("ranks", "places"), [
    (3, None), ((2, 2), [Shard(0), Shard(1)]), ((2, 2), [Replicate(), Shard(0)])], ids=str)
def test_what_is_gathered_is_the_same_in_one_piece_or_with_others(pool, ranks, places, small):
    """What split weights lack too."""
    given = {"name": "galoreadamw", "steps": 5, "dtype": torch.bfloat16, "shards": "whole",
             "master_bits": 16, "state_bits": 8, "basis_bits": 8}
    outs = pool.run(jobs.trained, ranks, **given, places=places, small=small)
    one = jobs.trained(None, **given)
    assert_close(one, outs, True)
    for out in outs:
        assert_same(one["state"], out["state"])


@pytest.mark.parametrize("name", [*FEW, "galoreadamw-16bit"])
def test_stochastic_rounding_does_not_see_shards(pool, name):
    """Neither that of a weight nor that of a moment."""
    given = {"name": name, "dtype": torch.bfloat16, "shapes": [(40, 33), (33, 40), (300,)]}
    one, outs = jobs.trained(None, **given), pool.run(jobs.trained, 3, **given)
    flipped = total = 0
    for a, b in zip(one["weights"], outs[0]["weights"], strict=True):
        off = (a.view(torch.int16).int() - b.view(torch.int16).int()).abs()
        assert off.max() <= 1
        flipped, total = flipped + int(off.sum()), total + off.numel()
    assert flipped <= max(1, 1e-4 * total) * (not exact(name))


@pytest.mark.parametrize("name", all_slow_but([case.name for case in CLASSES], FEW))
@pytest.mark.parametrize("places", [[Replicate(), Shard(0)], [Shard(0), Shard(1)],
                                    [Replicate(), Shard(1)], [Shard(0), Shard(0)],
                                    [_StridedShard(0, split_factor=2), Shard(0)],
                                    [_StridedShard(0, split_factor=2), Replicate()]], ids=str)
def test_two_dimensional_meshes(pool, name, places):
    shapes = [(10, 6), (6, 10), (7, 7), (1, 5)]
    one = jobs.trained(None, name, shapes=shapes, steps=5)
    outs = pool.run(jobs.trained, (2, 2), name=name, shapes=shapes, steps=5, places=places)
    assert_close(one, outs, exact(name))


@pytest.mark.parametrize(("name", "ranks", "places"), [
    ("galoreadamw", 3, None), ("firaadamw-svd", 3, None), ("muon", 3, None),
    ("adamw", (2, 2), [Replicate(), Shard(0)]), ("galoreadamw", (2, 2), [Shard(0), Shard(1)])])
def test_metrics_are_of_whole_matrices(pool, name, ranks, places):
    """Of convolutions too, whose parts cannot be flattened where they are uneven."""
    given = {"name": name, "steps": 4, "metrics": True}
    (one,) = jobs.trained(None, **given)["metrics"]
    assert one["update_ratio"].isfinite().any()
    for out in pool.run(jobs.trained, ranks, **given, places=places):
        (found,) = out["metrics"]
        assert found.keys() == one.keys()
        for key, x in one.items():
            torch.testing.assert_close(found[key], x, rtol=1e-4, atol=0, equal_nan=True)


@pytest.mark.parametrize(("name", "more", "gathers", "sums"), [
    ("galoreadamw", {"proj_type": "right"}, [8 * 3], []),  # Q
    ("galoreadamw", {"proj_type": "left"}, [3 * 8] * 2, [3 * 8]),  # moments; P^T G
    ("galoreadamw", {"proj_type": "full"}, [3 * 3] * 2 + [8 * 3], [3 * 8]),
    ("dctadamw", {"proj_type": "right", "update_proj_gap": 200}, [], []),
    ("dctadamw", {"proj_type": "left", "update_proj_gap": 200}, [3 * 8] * 2, [3 * 8]),
    ("dctadamw", {"proj_type": "left", "update_proj_gap": 1}, [3 * 8] * 2, [11]),  # of each row
    ("dctadamw", {"proj_type": "full", "update_proj_gap": 1}, [3 * 3] * 2, [11, 8]),
    ("firaadamw-svd", {"proj_type": "right"}, [8 * 3], [1, 1]),  # a mean, the residual's size
    ("firaadamw-svd", {"proj_type": "left"}, [3 * 8] * 2, [3 * 8, 8]),  # norms of G's columns
    ("frugal", {"proj_type": "left"}, [3 * 8] * 2, [3 * 8]),
    # slopes and norms of columns, a scale, products of the factors; or slopes of rows
    ("gradnormlorpadamw-svd", {"proj_type": "right"}, [8 * 3], [2 * 8, 1, 8 + 3 * 3]),
    ("gradnormlorpadamw-svd", {"proj_type": "left"}, [3 * 8] * 2, [2 * 8, 3 * 8, 1, 8 + 3 * 3]),
    ("gradnormlorpadamw-svd", {"proj_type": "right", "axis": "output"}, [8 * 3], [1, 11]),
    ("apollo", {"proj_type": "left"}, [3 * 8] * 2, [3 * 8, 8]),
    ("apollo", {"proj_type": "left", "scale_type": "tensor"}, [3 * 8] * 2, [3 * 8, 1])], ids=str)
def test_what_ranks_exchange_between_refreshes(pool, name, more, gathers, sums):
    """Of an 11 x 8 gradient at rank 3 no more than P^T G."""
    for found in pool.run(jobs.exchanged, 3, name=name, shape=(11, 8), steps=4, **more):
        # All is gathered for the first bases, unless they are drawn or cosine columns of rows.
        drawn = name in ("frugal", "apollo", "dctadamw")
        assert (11 * 8 in found[0][0]) == (not drawn)
        assert found[1:] == [(gathers, sums)] * 3


# Cuts along two dimensions of a mesh, and of columns.
CUTS = [[Shard(0), Shard(1)], [Shard(0), Shard(0)], [Shard(1), Shard(0)], [Shard(1), Shard(1)],
        [_StridedShard(0, split_factor=2), Shard(0)], [Replicate(), Shard(1)]]


@pytest.mark.parametrize("places", CUTS, ids=str)
def test_rows_are_found_and_put_back_however_a_matrix_is_cut(pool, places):
    """With fewer rows than ranks too."""
    sizes = [8, 9, 7, 5, 3, 1]
    outs = pool.run(jobs.rows_and_back, (2, 2), places=places, sizes=sizes)
    for size, *found in zip(sizes, *outs, strict=True):
        for out in found:
            right = [out.pop(k) for k in ("right", "whole", "back", "owned", "sum", "columns")]
            assert right == [True] * 6
        counts = found[0]["counts"]
        assert all(out["counts"] == counts for out in found)
        assert sum(counts) == size
        starts = sorted({(out["start"], counts[out["rank"]]) for out in found})
        assert sum(count for _, count in starts) == size
        if Replicate() not in places:
            assert [out["rank"] for out in found] == [0, 1, 2, 3]
            assert max(counts) <= -(-size // 2) if size < 4 else max(counts) <= -(-size // 4) + 1


@pytest.mark.parametrize("places", CUTS[:5], ids=str)
@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "galoreadamw", "trion", "muon"])
def test_no_rank_gathers_what_two_dimensions_cut(pool, name, places):
    """The basis of a right side at most, between refreshes."""
    most = 8 * 3 if name == "galoreadamw" else 0
    given = {"name": name, "shape": (11, 8), "steps": 4, "places": places}
    for found in pool.run(jobs.exchanged, (2, 2), **given):
        for gathers, sums in found[1:]:
            assert sum(gathers) == most
            assert sum(sums) <= 11


@pytest.mark.parametrize("places", [CUTS[0], CUTS[4]], ids=str)
@pytest.mark.parametrize("name", ["adamw", "galoreadamw", "muon"])
def test_ranks_without_a_group_of_their_own_gather(pool, name, places):
    """Those that two dimensions of a larger mesh hold: every one does all, bit for bit."""
    given = {"name": name, "shapes": [(10, 6), (6, 10), (1, 5)], "steps": 5}
    outs = pool.run(jobs.trained, (2, 2), **given, places=places, others=True)
    assert_close(jobs.trained(None, **given), outs, True)


@pytest.mark.parametrize("places", [CUTS[0], pytest.param(CUTS[4], marks=pytest.mark.slow)],
                         ids=str)
def test_ranks_of_a_larger_mesh_work_by_rows_once_they_have_a_group(places):
    """As of a mesh of three dimensions, the first of which has replicas."""
    shapes, names = [(10, 6), (6, 10), (1, 5)], ["adamw", "galoreadamw", "muon"]
    ranks = on_ranks(8, jobs.eight, names, places, shapes)
    for name, *outs in zip(names, *ranks, strict=True):
        one = jobs.trained(None, name, 5, shapes=shapes)
        without, with_ = zip(*outs, strict=True)
        assert_close(one, list(without), True)
        assert_close(one, list(with_), exact(name))
        assert min(out["gathers"] for out in without) >= 11 * 8
        for outs, told in ((without, True), (with_, False)):
            assert all(("have no group" in x) == told for out in outs for x in out["reasons"])
        assert max(out["gathers"] for out in with_) <= 8 * 3 * (name == "galoreadamw")


STACKS = [case.name for case in CLASSES if case.option("matricize")]


@pytest.mark.parametrize("places", [None, *CUTS[:5]], ids=str)
@pytest.mark.parametrize("name", all_slow_but(["galoreadamw", "dctadamw", "muon", "frugal"],
                                               STACKS))
def test_matrices_of_a_stack_are_updated_where_they_are(pool, name, places):
    """As one process does it, with measurements of all; some ranks have none, and one matrix has no
    gradient. A product's rounding may depend on how many matrices there are.
    """
    given = {"name": name, "shapes": [(5, 6, 4), (2, 4, 6), (1, 5, 5), (2, 2, 5, 3), (7, 7)],
             "steps": 6, "matricize": "batch", "metrics": True, "still": True}
    one = jobs.trained(None, **given)
    outs = pool.run(jobs.trained, 3 if places is None else (2, 2), **given, places=places)
    assert_close(one, outs, False)
    for out in outs:
        for key, x in one["metrics"][0].items():
            torch.testing.assert_close(out["metrics"][0][key], x, rtol=1e-4, atol=0, equal_nan=True)


@pytest.mark.parametrize(("name", "more"), [
    ("galoreadamw", {"keep_energy": 0.7, "update_proj_gap": 1, "projection": "svd"}),
    ("galoreadamw", {"projection": "randomized", "moments": "rotate", "update_proj_gap": 2}),
    ("galoreadamw", {"dtype": torch.bfloat16, "state_bits": 8, "basis_bits": 4}),
    ("galoreadamw", {"dtype": torch.bfloat16, "state_bits": 16, "master_bits": 16,
                     "basis_bits": 8}),
    ("firaadamw-svd", {"projection": "dct", "residual_scale": "released"}),
    ("gradnormlorpadamw-svd", {"axis": "output", "proj_type": "full"}),
    ("apollo", {"scale_type": "tensor"})], ids=str)
def test_stacks_with_options_are_the_same_on_any_ranks(pool, name, more):
    given = {"name": name, "shapes": [(4, 24, 20), (2, 4, 6)], "steps": 6, "matricize": "batch",
             "still": True, **more}
    one = jobs.trained(None, **given)
    for ranks in (2, 3):
        outs = pool.run(jobs.trained, ranks, **given)
        assert_close(one, outs, "basis_bits" in more)
        for out in outs:
            for a, b in zip(one["state"], out["state"], strict=True):
                assert a["basis_step"] == b["basis_step"]


@pytest.mark.parametrize("name", STACKS)
def test_of_stacks_nothing_is_gathered(pool, name):
    """At refreshes ranks agree that there is a gradient, and that a basis was found: few numbers.
    """
    for found in pool.run(jobs.exchanged, 2, name=name, shape=(4, 11, 8), steps=4,
                          matricize="batch"):
        for gathers, sums in found:
            assert gathers == []
            assert sum(sums) <= 2 * 3


@pytest.mark.skipif(not _triton.INTERPRETED, reason="needs triton's interpreter")
@pytest.mark.parametrize("name", all_slow_but(["galoreadamw-8bit", "dctadamw"], [
    "galoreadamw-8bit", "dctadamw", "firaadamw-svd", "muon-8bit"]))
def test_kernels_take_the_matrices_of_a_rank(pool, name):
    """Which may be none."""
    given = {"name": name, "dtype": torch.bfloat16, "together": True, "matricize": "batch",
             "shapes": [(3, 7, 5), (2, 5, 7), (1, 6, 6)]}
    one = jobs.by_kernels(None, **given)
    for out in pool.run(jobs.by_kernels, 3, **given):
        assert_same([one["weights"], one["state"]], [out["weights"], out["state"]])


def test_temporaries_of_shards_are_bounded_by_the_largest_matrix(pool):
    """R is whole on each rank, so few of these may wait for their polar factors at once."""
    peaks = pool.run(jobs.temporaries, 4, make=functools.partial(Trion, rank=128),
                     shape=(256, 1024))
    assert all(0 < peak <= 3.5 * 256 * 1024 * 4 for peak in peaks)


@pytest.mark.parametrize(("shape", "length"), [((11, 8), 8), ((8, 11), 8)])
def test_columns_for_trion_are_found_without_gathering_its_matrix(pool, shape, length):
    """Added up are the sizes of the coefficients alone, for either side."""
    for found in pool.run(jobs.exchanged, 3, name="trion", shape=shape, steps=3):
        assert found == [([], [length])] * 3


@pytest.mark.parametrize("name", ["adamw", "galoreadamw", "muon"])
def test_a_nan_on_one_rank_stops_all(pool, name):
    for nonfinite, ranks in (("skip", 3), ("raise", 3), ("skip", (2, 2))):
        for out in pool.run(jobs.with_nan, ranks, name=name, nonfinite=nonfinite):
            assert_same(out["before"], out["after"])
            assert out["skipped"] == (nonfinite == "skip")
            assert ("'p0' has a NaN" in out["error"]) == (nonfinite == "raise")


def test_what_cannot_be_is_refused_by_name(pool):
    for messages in pool.run(jobs.refusals, 2, name="galoreadamw"):
        assert "w has placements (Partial" in messages[0]
        assert "Replicate" in messages[0]
        assert "the gradient of 'w' has placements (Replicate" in messages[1]
        assert "but it must have its parameter's (Shard" in messages[1]
        assert "saved with placements (Shard(dim=1),)" in messages[2]
        assert "saved as a DTensor" in messages[3]


# ---- engines


@pytest.mark.parametrize("ranks", all_slow_but([4], [2, 4]))
@pytest.mark.parametrize("name", [case.name for case in CLASSES])
def test_fsdp2_and_ddp_train_as_one_process(pool, name, ranks):
    one = jobs.fsdp(None, name)
    # gradients are means over the ranks, in another order
    for job in (jobs.fsdp, jobs.ddp):
        assert_close(one, pool.run(job, ranks, name=name), False, 1e-4)


@pytest.mark.parametrize(("name", "way"), [
    *((name, "step") for name in ("adamw", "adamw8bit", "galoreadamw", "firaadamw-svd", "dctadamw",
                                  "muon", "trion", "gradnormlorpadamw-svd")),
    ("muon", "update"), ("galoreadamw", "project"), ("galoreadamw", "clip"),
    ("gradnormlorpadamw-svd", "project")])
@pytest.mark.parametrize("ranks", [2, (2, 2)], ids=["alone", "under FSDP2"])
def test_tensor_parallelism_trains_as_one_process(pool, name, way, ranks):
    """With gradients that it leaves placed otherwise than their parameters; under FSDP2, with
    shards of shards.

    Clipped so far that their size shows beside eps.
    """
    given = {"name": name, "limit": 0.01, "eps": 0.1, "lr": 0.1}
    one = jobs.tensor_parallel(None, **given, way=way)
    outs = pool.run(jobs.tensor_parallel, ranks, **given, way=way)
    assert_close(one, outs, False, 1e-4)
    for out in outs:
        torch.testing.assert_close(out["norms"], one["norms"], rtol=1e-5, atol=0)
    if way != "update":
        assert_close(one, [jobs.tensor_parallel(None, **given)], False, 1e-4)


@pytest.mark.parametrize("views", [False, True])
def test_state_of_what_fsdp1_has_flattened_goes_on(pool, views):
    """With its original parameters as views a rank has nothing of some."""
    for out in pool.run(jobs.fsdp1, 2, cls=AdamW, views=views):
        assert_same(out["straight"], out["resumed"])


def test_groups_of_what_fsdp1_has_flattened_are_refused(pool):
    for messages in pool.run(jobs.flattened, 2):
        assert len(messages) == 2
        assert "'0.weight' of a Linear has shape" in messages[0]
        assert "_flat_param' of a Sequential has shape" in messages[1]


@pytest.mark.parametrize("engine", ["fsdp", "ddp"])
@pytest.mark.parametrize("cls", [SwitchLoRAAdamW, GradNormLoRPAdamW])
def test_pairs_in_a_real_model_train_as_in_one_process(pool, cls, engine):
    """Switches included, which write to the frozen weights wherever their rows are."""
    given = {"cls": cls, "magnitude": cls is GradNormLoRPAdamW}
    if cls is SwitchLoRAAdamW:
        given |= {"interval": 6, "freeze_steps": 2, "decay_steps": 10}
    start, one = jobs.adapted(None, **given, steps=0), jobs.adapted(None, **given)
    outs = pool.run(jobs.adapted, 3, **given, engine=engine)
    for name, a in one.items():
        for out in outs:
            assert (a - out[name]).abs().max() <= 1e-4 * a.abs().max(), name
    moved = {name for name in one if not torch.equal(one[name], start[name])}
    assert ("0.weight" in moved) == (cls is SwitchLoRAAdamW)
    assert {"0.lora_A", "0.lora_B", "2.lora_A", "2.lora_B", "4.weight"} <= moved
    assert ("2.magnitude" in moved) == (cls is GradNormLoRPAdamW)


def test_vectors_that_are_switched_have_no_bits_of_those_before(pool):
    """A candidate is bf16, and has nothing below."""
    one = jobs.switched_bits(None)
    for dim, factor in enumerate("AB"):
        values = set()
        for layer, name in itertools.product("02", ("master", "master_low")):
            vectors = one[f"{layer}.lora_{factor}.{name}"].unbind(dim)
            assert all(len(set(x.tolist())) == 1 for x in vectors)
            values |= {int(x[0]) for x in vectors}
        assert values == {0, 3}
    for out in pool.run(jobs.switched_bits, 3):
        assert_same(one, out)


@pytest.mark.parametrize(("name", "more"), [
    *((name, {}) for name in ("galoreadamw", "galoreadamw-8bit", "galoreadamw-right-svd",
                              "galoreadamw-full-svd", "galoreadamw-random", "dctadamw")),
    # whose columns are a tenth off orthonormal ones
    ("galoreadamw", {"basis_bits": 4}), ("galoreadamw-full-svd", {"basis_bits": 4}),
    ("galoreadamw", {"autocast": True})], ids=str)
def test_ddp_that_sends_projected_gradients(pool, name, more):
    given = {"name": name, "steps": 10, **more}
    plain = pool.run(jobs.ddp, 2, **given)
    outs = pool.run(jobs.ddp, 2, **given, projected=True)
    assert_close(plain[0], outs, False, 1e-4)
    assert 0 < outs[0]["sent"] < outs[0]["plain"]


def test_projected_gradients_of_micro_batches(pool):
    """In no_sync nothing is sent; what has piled up goes with the last."""
    given = {"name": "galoreadamw", "steps": 6}
    once = pool.run(jobs.ddp, 2, **given, projected=True)
    outs = pool.run(jobs.ddp, 2, **given, projected=True, micro=2)
    assert_close(once[0], outs, False, 1e-4)
    assert outs[0]["sent"] == once[0]["sent"]


def test_projected_reductions_are_refused_where_the_full_gradient_is_needed(pool):
    for name, cls in (("firaadamw-svd", "FiraAdamW"), ("muon", "Muon"),
                      ("gradnormlorpadamw-svd", "GradNormLoRPAdamW")):
        with pytest.raises(AssertionError, match=f"{cls} has no matrix whose"):
            pool.run(jobs.ddp, 2, name=name, projected=True)


@pytest.mark.parametrize("name", ["adamw", "galoreadamw", "muon"])
def test_mixed_precision(pool, name):
    one = jobs.fsdp(None, name)
    outs = pool.run(jobs.fsdp, 3, name=name, half=True)
    for a, b in zip(one["weights"], outs[0]["weights"], strict=True):
        assert b.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0, atol=0.05)


# ---- checkpoints


@pytest.fixture(scope="module")
def straight(pool, tmp_path_factory) -> Any:
    """What a row gives on some ranks without a break, which no way of saving changes."""
    @functools.cache
    def run(name: str, ranks: int) -> list[dict[str, Any]]:
        folder = str(tmp_path_factory.mktemp("straight"))
        return pool.run(jobs.saved, ranks, name=name, folder=folder, steps=range(6), resume=False)
    return run


@pytest.mark.parametrize("way", all_slow_but(["dcp"], ["dcp", "full"]))
@pytest.mark.parametrize("name", all_slow_but(
    [*(case.name for case in CLASSES), "galoreadamw-8bit"], FEW))
def test_saved_on_three_ranks_continues_on_two(pool, straight, name, way, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    given = {"name": name, "way": way}
    pool.run(jobs.saved, 3, **given, folder=str(first), steps=range(3), resume=False)
    shutil.copytree(first, second)  # each continuation overwrites the checkpoint it came from
    given |= {"steps": range(3, 6), "resume": True}
    outs = pool.run(jobs.saved, 2, **given, folder=str(first))
    assert_close(straight(name, 2)[0], outs, False, 1e-5)
    again, same = straight(name, 3), pool.run(jobs.saved, 3, **given, folder=str(second))
    assert_same([x["weights"] for x in again], [x["weights"] for x in same])
    assert_same([x["state"] for x in again], [x["state"] for x in same])


@pytest.mark.parametrize("name", ["galoreadamw-8bit", *all_slow_but(
    ["adamw", "muon", "dctadamw", "gradnormlorpadamw-svd"], ["muon"])])
def test_fsdp2_over_tensor_parallelism_goes_on(pool, straight, name, tmp_path):
    """On as many ranks, and on fewer without tensor parallelism."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    given = {"name": name, "resume": False}
    straightly = pool.run(jobs.saved, (2, 2), **given, folder=str(second), steps=range(6))
    shutil.rmtree(second)
    pool.run(jobs.saved, (2, 2), **given, folder=str(first), steps=range(3))
    shutil.copytree(first, second)
    given |= {"steps": range(3, 6), "resume": True}
    same = pool.run(jobs.saved, (2, 2), **given, folder=str(second))
    assert_same([x["weights"] for x in straightly], [x["weights"] for x in same])
    assert_same([x["state"] for x in straightly], [x["state"] for x in same])
    outs = pool.run(jobs.saved, 2, **given, folder=str(first))
    assert_close(straight(name, 2)[0], outs, False, 1e-4)


@pytest.mark.parametrize("places", [[Shard(0), Shard(1)], [Shard(1), Shard(1)],
                                    [Shard(0), Shard(0)]], ids=str)
def test_a_state_of_torch_is_loaded_wherever_its_columns_are(pool, places):
    for theirs, ours in pool.run(jobs.from_torch, (2, 2), places=places):
        for a, b in zip(theirs, ours, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_what_split_weights_lack_is_in_a_whole_state(pool):
    for straight, resumed in pool.run(jobs.masters_in_a_whole_state, 2):
        assert_same(straight, resumed)
        assert any((x != x.bfloat16()).any() for x in straight)


def test_a_damaged_shard_is_refused_on_every_rank(pool):
    (here, same), (there, same_there) = pool.run(jobs.damaged, 2, name="adamw")
    assert "another rank refuses its part" in here
    assert "has a negative entry" in there
    assert same
    assert same_there


def test_a_state_that_has_begun_on_some_ranks_is_refused(pool):
    for message, step in pool.run(jobs.begun_on_some, 2, name="galoreadamw"):
        assert "some ranks have got a state that has not begun" in message
        assert step == 3


def test_a_killed_rank_costs_the_steps_since_the_checkpoint(pool, straight, tmp_path):
    given = {"name": "galoreadamw-8bit", "folder": str(tmp_path)}
    doomed = Pool()
    with pytest.raises(AssertionError, match="died, exit code 1"):
        doomed.run(jobs.saved, RANKS, **given, steps=range(6), resume=False, die_at=3)
    doomed.close()
    losses = pool.run(jobs.saved, 2, **given, steps=range(3, 6), resume=True)[0]["losses"]
    expected = straight(given["name"], 2)[0]["losses"][3:]
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=0)
