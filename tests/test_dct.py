"""Cosine transforms and the columns that are chosen from them."""

from __future__ import annotations

import math

import pytest
import scipy.fft
import torch
from lissom.optim import dct

from .helpers import tensors


@pytest.mark.parametrize("n", [1, 2, 3, 8, 9, 64, 65, 200])
@pytest.mark.parametrize("kind", [2, 3])
@pytest.mark.parametrize("dim", [-1, -2])
def test_transforms_are_scipys(n, kind, dim):
    """In float64 to 1e-12, by product and by FFT, and so is what is selected from them."""
    x = tensors([(7, n) if dim == -1 else (n, 7)], n)[0].double()
    expected = torch.from_numpy(scipy.fft.dct(x.numpy(), type=kind, norm="ortho", axis=dim))
    r = max(1, n // 3)
    other = -1 if dim == -2 else -2
    for similarity in ("matmul", "fft"):
        full = dct.project(x, n, kind=kind, dim=dim, norm=1, similarity=similarity)[1]
        torch.testing.assert_close(full, expected, rtol=0, atol=1e-12)
        for norm in (1, 2):
            for batch in (x, torch.stack([x, x.flip(dim), x * x])):
                index, low = dct.project(batch, r, kind=kind, dim=dim, norm=norm,
                                         similarity=similarity)
                assert index.dtype == torch.int32
                for one, i, part in zip(batch.view(-1, *x.shape), index.view(-1, r),
                                        low.view(-1, *low.shape[-2:]), strict=True):
                    scipys = torch.from_numpy(
                        scipy.fft.dct(one.numpy(), type=kind, norm="ortho", axis=dim))
                    best = scipys.norm(norm, other).topk(r).indices.sort().values
                    assert i.tolist() == best.tolist()
                    torch.testing.assert_close(part, scipys.index_select(dim, best), rtol=0,
                                               atol=1e-12)


def test_cosine_bases_are_orthonormal_in_fp32():
    for kind in (2, 3):
        q = dct.rows(1024, kind, torch.float32, torch.device("cpu")).double()
        assert (q @ q.mT - torch.eye(1024, dtype=torch.float64)).abs().max() < 5e-7
    index = torch.tensor([0, 3, 5], dtype=torch.int32)
    q = dct.columns(index, 8, 2, torch.empty(0, dtype=torch.bfloat16))
    assert q.shape == (8, 3)
    assert q.dtype == torch.bfloat16
    assert dct.columns(index, 8, 2, torch.empty(0)).dtype == torch.float32  # no stale cache


@pytest.mark.parametrize("similarity", ["matmul", "fft"])
@pytest.mark.parametrize("norm", [1, 2])
def test_one_entry_that_is_no_number_chooses_no_columns(similarity, norm):
    for value in (math.inf, -math.inf, math.nan):
        x = tensors([(6, 4)], 1)[0]
        x[2, 1] = value
        for old in ([0, 1], [2, 3]):
            index, _ = dct.project(x, 2, kind=2, dim=-1, norm=norm, similarity=similarity,
                                   old=torch.tensor(old, dtype=torch.int32))
            assert index.tolist() == old


@pytest.mark.parametrize("similarity", ["matmul", "fft", "kernel"])
@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("dim", [-1, -2])
def test_a_matrix_of_a_stack_chooses_as_if_it_stood_alone(similarity, norm, dim, monkeypatch):
    """However small it is beside the others; the kernel is given 16 bits."""
    x = torch.stack([scale * g for scale, g in zip(
        (1.0, 1e-30, 1e15), tensors([(8, 6)] * 3, 1), strict=True)])
    if similarity == "kernel":
        monkeypatch.setattr(dct, "use_triton", lambda backend, device: True)
        x, similarity = x.bfloat16(), "matmul"
    given = {"kind": 2, "dim": dim, "norm": norm, "similarity": similarity}
    index, low = dct.project(x, 3, **given)
    for i, g in enumerate(x):
        alone, its = dct.project(g, 3, **given)
        assert index[i].tolist() == alone.tolist()
        assert torch.equal(low[i], its)
    assert len({tuple(row) for row in index.tolist()}) > 1
