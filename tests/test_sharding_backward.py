"""Work in the backward pass on more than one process: under FSDP2, and without DDP."""

from __future__ import annotations

import pytest
import torch
from lissom.bench import estimate

from . import jobs
from . import jobs_backward as backward
from .cases import all_slow_but
from .helpers import assert_same
from .pool import RANKS
from .ranks import assert_bytes, assert_close

pytestmark = pytest.mark.usefixtures("quantize_shards")

# Each has a projection of rows and one of columns, and refreshes by rows or of whole matrices.
PROJECTED = [
    ("galoreadamw", {"update_proj_gap": 3}), ("galoreadamw-8bit", {"update_proj_gap": 3}),
    ("galoreadamw", {"update_proj_gap": 3, "proj_type": "left", "moments": "rotate"}),
    ("galoreadamw", {"update_proj_gap": 3, "basis_bits": 4, "keep_energy": 0.9}),
    ("galoreadamw-full-svd", {}), ("galoreadamw-random", {}), ("dctadamw", {}),
    ("dctadamw", {"update_proj_gap": 3, "moments": "reset"}),
    ("galoreadamw", {"shards": "whole"}), ("gradnormlorpadamw-svd", {}),
]


@pytest.mark.parametrize("ranks", all_slow_but([3], [2, 3, (2, 2)]))
@pytest.mark.parametrize(("name", "more"), PROJECTED, ids=str)
def test_shards_are_projected_in_the_backward_pass(pool, name, more, ranks):
    """Bit for bit as by the step; and no gradient of a matrix is left."""
    plain, outs = (pool.run(backward.projected, ranks, name=name, work=on, **more)
                   for on in (False, True))
    assert_close(plain[0], outs, True)
    for a, b in zip(plain[0]["state"], outs[0]["state"], strict=True):
        assert_same(a, b)
    for out in outs:
        assert out["kept"] == [3] * 8  # biases'
    if isinstance(ranks, int):
        assert_bytes(outs, ranks)
        assert any("projected" in x for x in outs[0]["slots"])


@pytest.mark.parametrize(("name", "more", "change"), [
    ("dctadamw", {}, {"shards": "whole"}), ("dctadamw", {"shards": "whole"}, {"shards": "rows"}),
    ("galoreadamw-random", {"update_proj_gap": 1}, {"shards": "whole"}),
    ("galoreadamw", {"update_proj_gap": 3}, {"update_proj_gap": 50}),
    ("galoreadamw", {"update_proj_gap": 50}, {"update_proj_gap": 3})], ids=str)
def test_options_change_between_a_projection_and_its_step(pool, name, more, change):
    """What the hook has found stands: a basis that waits is used, and none is looked for."""
    given = {"name": name, **more, "change": change}
    outs = pool.run(backward.projected, 2, **given)
    for out in outs[1:]:
        assert_same(outs[0]["weights"], out["weights"])
    if "shards" in change:
        assert_close(pool.run(backward.projected, 2, **given, work=False)[0], outs, False, 1e-4)


@pytest.mark.parametrize("unsynced", [False, True])
@pytest.mark.parametrize("name", ["galoreadamw", "galoreadamw-8bit", "dctadamw",
                                  "gradnormlorpadamw-svd"])
def test_micro_batches_of_shards(pool, name, unsynced):
    """Reduced one by one, or summed by FSDP2; a matrix keeps its shard for a refresh alone."""
    given = {"name": name, "steps": 10, "micro": 2, "update_proj_gap": 5}
    plain = pool.run(backward.projected, 2, **given, work=False)
    outs = pool.run(backward.projected, 2, **given, unsynced=unsynced)
    assert_close(plain[0], outs, False, 1e-4)
    for out in outs:
        assert out["kept"][0] == 6
        assert max(out["kept"][1:]) == 4
        assert min(out["kept"]) == 3


@pytest.mark.parametrize("ranks", [4, (2, 2)])
@pytest.mark.parametrize("name", ["galoreadamw-8bit", "dctadamw", "gradnormlorpadamw-svd",
                                  "muon-8bit"])
def test_experts_train_as_on_one_device(pool, name, ranks):
    """In the backward pass too, bit for bit as by the step; of four ranks one has no expert.

    With as many ranks as a power of two, a mean of equal gradients is exact.
    """
    low = not name.startswith("muon")
    more = {"update_proj_gap": 2} if low else {}
    outs = pool.run(backward.stacked, ranks, name=name, **more)
    assert_close(backward.stacked(None, name, **more), outs, False)
    if isinstance(ranks, int):
        assert_bytes(outs, ranks)
    for way in ("project", "update") if low else ("update",):
        same = pool.run(backward.stacked, ranks, name=name, way=way, **more)
        for a, b in zip(outs, same, strict=True):
            assert_same(a["weights"], b["weights"])
        if isinstance(ranks, int):
            assert_bytes(same, ranks)


@pytest.mark.parametrize("name", ["galoreadamw-8bit", "dctadamw", "firaadamw-svd", "muon-8bit"])
def test_experts_go_on_with_fewer_ranks(pool, name, tmp_path):
    given = {"name": name, "folder": str(tmp_path)}
    straight = pool.run(backward.stacked, 3, **given)
    outs = pool.run(backward.stacked, 2, **given, resume=True)
    assert_close(straight[0], outs, False, 1e-5)


@pytest.mark.parametrize("given", [{}, {"exact_norm": True}], ids=str)
@pytest.mark.parametrize("name", ["galoreadamw", "dctadamw", "gradnormlorpadamw-svd"])
def test_shards_are_clipped_by_the_norm_of_all(pool, name, given):
    one, outs = (pool.run(backward.projected, ranks, name=name, given=given, limit=0.02)
                 for ranks in (1, 3))
    assert_close(one[0], outs, False, 1e-4)
    for out in outs:
        torch.testing.assert_close(out["norms"], one[0]["norms"], rtol=1e-5, atol=0)
    free = pool.run(backward.projected, 3, name=name)
    assert any((a - b).abs().max() > 1e-3
               for a, b in zip(free[0]["weights"], outs[0]["weights"], strict=True))


def test_shards_of_mixed_precision(pool):
    plain, outs = (pool.run(backward.projected, 3, name="galoreadamw", half=True, work=on)
                   for on in (False, True))
    assert_close(plain[0], outs, True)


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("explicit", [False, True])
def test_an_overflow_in_one_shard_is_one_on_all(pool, explicit, alone):
    outs = pool.run(backward.projected_scaled, 2, explicit=explicit, alone=alone)
    assert_same(outs[0]["weights"], outs[1]["weights"])
    for out in outs:
        assert out["skipped"] == [i == 3 for i in range(8)]
        assert out["scales"] == [1024.0, 1024.0, 2048.0, 1024.0, 1024.0, 1024.0, 2048.0, 2048.0]


@pytest.mark.parametrize("name", ["galoreadamw-8bit", "dctadamw", "gradnormlorpadamw-svd"])
def test_saved_in_the_middle_of_an_accumulation(pool, name, tmp_path):
    """On three ranks, and gone on with on two."""
    straight = pool.run(backward.projected_saved, 3, name=name, folder=str(tmp_path), save=True)
    outs = pool.run(backward.projected_saved, 2, name=name, folder=str(tmp_path), save=False)
    assert_same(straight[0]["waiting"], outs[0]["waiting"])
    assert all(x.any() for x in outs[0]["waiting"])
    assert_close(straight[0], outs, False, 1e-5)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("way", estimate.IN_BACKWARD)
def test_gradients_of_shards_take_what_the_memory_profiler_says(pool, way, ranks):
    """A norm that stays does not keep its layer, which FSDP2 reduces in one buffer."""
    with torch.device("meta"):
        held = estimate.holdings("galore", backward.small_llama(), 8)
    expected = estimate.count(held, way, ranks)["gradients"]
    for peak in pool.run(backward.gradient_bytes, ranks, way=way):
        # The tables' gradients come last, and then no layer's buffer is there.
        assert (0.8 if way == "project" else 1) * expected <= peak <= expected


@pytest.mark.parametrize("name", ["adamw8bit", "galoreadamw", "muon", "gradnormlorpadamw-svd"])
def test_update_in_backward_under_fsdp2(pool, name):
    assert_close(pool.run(jobs.fsdp, 3, name=name)[0],
                 pool.run(jobs.fsdp, 3, name=name, in_backward=True), True)


@pytest.mark.parametrize("name", ["galoreadamw-8bit", "muon"])
def test_accumulation_in_update_in_backward_under_fsdp2(pool, name):
    """FSDP2 sums gradients that it does not reduce: the hook sees the sum, once."""
    plain = pool.run(backward.accumulated, 2, name=name, in_backward=False)
    outs = pool.run(backward.accumulated, 2, name=name, in_backward=True)
    assert_close(plain[0][0], [result for result, _ in outs], True)
    for _, message in outs:
        assert "second gradient" in message
        assert "set_requires_gradient_sync(False)" in message


@pytest.mark.parametrize("name", ["adamw", "polargrad"])
def test_clipping_in_the_backward_pass_takes_the_norm_of_all_shards(pool, name):
    given = {"name": name, "in_backward": True, "limit": 0.02, "lr": 0.1}
    one = jobs.fsdp(None, **given)
    assert_close(one, pool.run(jobs.fsdp, 3, **given), False, 1e-4)
    free = jobs.fsdp(None, **{**given, "limit": None})
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(one["weights"], free["weights"],
                                                          strict=True))


def test_work_in_the_backward_pass_is_refused_where_gradients_are_not_complete(pool):
    for messages in pool.run(backward.in_backward_refused, 2):
        assert "project_in_backward: '0.weight' is no DTensor, but there are 4" in messages[0]
        assert "update_in_backward: '0.weight' is no DTensor, but there are 4" in messages[1]


@pytest.mark.parametrize(("name", "ranks"), [
    ("galoreadamw", 3), *((name, 2) for name in (
        "galoreadamw-8bit", "galoreadamw-right-svd", "galoreadamw-full-svd", "galoreadamw-random",
        "dctadamw"))])
def test_projected_gradients_are_averaged_in_the_backward_pass(pool, name, ranks):
    """Without DDP: the same step on all ranks, and that of DDP."""
    plain = pool.run(jobs.ddp, ranks, name=name, steps=10)
    outs = pool.run(backward.replicas, ranks, name=name, steps=10)
    assert_close(plain[0], outs, False, 1e-4)
    for out in outs[1:]:
        assert_same(outs[0]["state"], out["state"])
    # Of six gradients those of three biases; 10 steps of 383 numbers in fp32.
    assert outs[0]["at_once"] == 3
    assert outs[0]["sent"] < 0.6 * 10 * 383 * 4


@pytest.mark.parametrize("name", ["galoreadamw", "galoreadamw-8bit", "dctadamw"])
def test_micro_batches_are_averaged_once(pool, name):
    """With the last one, or where a step comes early by the step."""
    given = {"name": name, "steps": 10, "micro": 2, "update_proj_gap": 5}
    plain = pool.run(jobs.ddp, 2, **given)
    outs, early = (pool.run(backward.replicas, 2, **given, cut=cut) for cut in (0, 1))
    assert_close(plain[0], outs, False, 1e-4)
    for a, b in zip(outs, early, strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("name", ["adamw8bit", "galoreadamw", "firaadamw-svd", "muon",
                                  "gradnormlorpadamw-svd"])
def test_updates_by_means_that_are_taken_in_the_backward_pass(pool, name):
    given = {"name": name, "steps": 10}
    outs = pool.run(backward.replicas, 2, **given, way="update")
    assert_close(pool.run(jobs.ddp, 2, **given)[0], outs, True)
    assert outs[0]["at_once"] == 0  # beside the mean that is on its way
    assert outs[0]["sent"] == 10 * 383 * 4


@pytest.mark.parametrize("way", ["project", "update"])
def test_means_are_taken_of_gradients_in_any_layout(pool, way):
    outs, turned = (pool.run(backward.replicas, 2, name="galoreadamw", way=way, turned=turned)
                    for turned in (False, True))
    assert_close(outs[0], turned, False)


@pytest.mark.parametrize("way", ["project", "update"])
def test_means_of_gradients_that_share_memory(pool, way):
    """And of a parameter that is unfrozen late; when the backward pass ends nothing is on its way.
    """
    for out in pool.run(backward.replicas_of_views, 2, way=way):
        for a, b in zip(out["plain"], out["weights"], strict=True):
            torch.testing.assert_close(b, a, rtol=0, atol=1e-5)


@pytest.mark.parametrize("way", ["project", "update"])
def test_means_after_a_backward_pass_that_failed(pool, way):
    """Of which nothing is left after zero_grad(): neither a gradient nor that it would end."""
    for out in pool.run(backward.replicas_after_failure, 2, way=way):
        assert_same(out["plain"], out["weights"])


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("way", ["project", "update"])
def test_means_of_gradients_of_different_parameters_are_noticed(pool, way, late):
    """At the end of that backward pass; on a GPU by the next one, or before a state is saved."""
    for out in pool.run(backward.replicas_of_experts, RANKS, way=way, used=[[0], [0], [1], [0]],
                        empty=False, late=late):
        assert ("number 3 is 'experts.0.bias' on rank 0 of the group and 'experts.1.bias' on rank "
                "2;") in out["error"]
        assert out["moved"] == (late or way == "update")
        assert len(out["saving"]) == late
        assert all("some differ" in error for error in out["saving"])


@pytest.mark.parametrize("way", ["project", "update"])
def test_means_that_were_wrong_are_told_once(pool, way):
    for messages in pool.run(backward.replicas_noticed_late, RANKS, way=way):
        assert len(messages) == 2
        assert all("some differ" in message for message in messages)


@pytest.mark.parametrize("way", ["project", "update"])
def test_an_expert_without_tokens_takes_part_in_means(pool, way):
    given = {"used": [[0, 2], [1, 2], [2], [1]], "empty": True}
    plain, outs = (pool.run(backward.replicas_of_experts, RANKS, way=w, **given)
                   for w in ("", way))
    for a, b in zip(plain, outs, strict=True):
        assert not b["error"]
        assert b["moved"]
        for x, y in zip(a["weights"], b["weights"], strict=True):
            torch.testing.assert_close(y, x, rtol=0, atol=1e-6)


@pytest.mark.parametrize("view", [False, True])
def test_projected_gradients_of_experts_under_ddp(pool, view):
    """Some have a gradient on one rank, some on none."""
    plain, outs = (pool.run(backward.experts_under_ddp, 2, projected=projected,
                            gradient_as_bucket_view=view) for projected in (False, True))
    assert_close(plain[0], outs, False, 1e-4)
    assert all(out["less"] for out in outs)


@pytest.mark.parametrize("way", ["project", "update"])
def test_means_over_ranks_are_clipped_as_one_gradient(pool, way):
    limit = {"max_grad_norm": 0.02}
    free, *others = (pool.run(backward.replicas, ranks, name="galoreadamw", way=way, given=given)
                     for ranks, given in ((2, {}), (1, limit), (2, limit)))
    assert_close(others[0][0], others[1], False, 1e-4)
    assert any((a - b).abs().max() > 1e-3
               for a, b in zip(free[0]["weights"], others[1][0]["weights"], strict=True))


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("explicit", [False, True])
def test_an_overflow_on_one_rank_is_one_on_all(pool, explicit, accumulation):
    outs = pool.run(backward.replicas_scaled, 2, explicit=explicit, accumulation=accumulation)
    assert_same(outs[0], outs[1])
    assert outs[0]["skipped"] == [i == 3 for i in range(8)]
    assert outs[0]["scales"] == [1024.0, 1024.0, 2048.0, 1024.0, 1024.0, 1024.0, 2048.0, 2048.0]


@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_a_nan_on_one_rank_is_one_on_all(pool, nonfinite):
    outs = pool.run(backward.replicas_spoilt, 2, nonfinite=nonfinite)
    assert_same(outs[0], outs[1])
    assert_same(outs[0]["before"], outs[0]["after"])
    assert outs[0]["skipped"] == (nonfinite == "skip")
    assert ("has a NaN" in outs[0]["error"]) == (nonfinite == "raise")


def test_what_ranks_cannot_average_is_refused(pool):
    words = ["project_in_backward: '2.weight' differs between ranks",
             "update_in_backward: '2.weight' differs between ranks", "from 3 to 4 parameters",
             "0.weight' differs between ranks in its name",
             "is sharded (DTensor), but with a process_group", "process_group is a DeviceMesh",
             "exact_norm=True", "cannot be saved between", "after the mean over ranks",
             "micro-batch 3", "call unscale_() of this handle", "second gradient",
             "second gradient", "must not be wrapped in DistributedDataParallel"]
    last = ("capturable=True, but it must be False", "another rank refuses, and says why")
    for messages, end in zip(pool.run(backward.replicas_refusals, 2), last, strict=True):
        assert len(messages) == len(words) + 1
        for word, message in zip([*words, end], messages, strict=True):
            assert word in message
