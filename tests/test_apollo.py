"""APOLLO: along the gradient, by the factors of its equation."""

from __future__ import annotations

import math

import pytest
import torch
from lissom.optim import APOLLO, project

from .helpers import feed, parameters


@pytest.mark.parametrize("options", [{}, {"rank": 1, "scale_type": "tensor", "scale": 128**0.5}])
def test_apollo_moves_along_the_gradient(options):
    """Each channel is a multiple of the gradient's; its state has no basis."""
    for shape in ((9, 6), (6, 9)):
        (p,) = parameters([shape])
        optimizer = APOLLO([p], **{"lr": 1e-2, "rank": 2, "weight_decay": 0.0, **options})
        assert not any(k.startswith("basis_") and k != "basis_step" for k in optimizer.state[p])
        for i in range(3):
            start = p.detach().clone()
            feed([p], i)
            g = p.grad.clone()
            optimizer.step()
            ratio = (start - p.detach()) / g
            across = 0 if shape[0] < shape[1] else 1
            if options:
                ratio = ratio.flatten()
                across = 0
            assert (ratio > 0).all()
            spread = ratio.std(across) / ratio.mean(across)
            assert spread.max() < 1e-3


def test_apollo_scales_like_its_equation():
    """s_j = |N_j| / |R_j| with the P that the seed gives."""
    (p,) = parameters([(5, 8)])
    start = p.detach().clone()
    optimizer = APOLLO([p], lr=1.0, rank=2, weight_decay=0.0, seed=11)
    feed([p], 3)
    optimizer.step()
    basis = project.gaussian_basis(5, 2, (), (11, 0), 2, p.grad)
    low = basis.mT @ p.grad
    # At the first step N is the sign of R.
    s = math.sqrt(2) / low.norm(dim=0)
    torch.testing.assert_close(p.detach(), start - p.grad * s, rtol=1e-5, atol=1e-6)
    norms = torch.stack([project.gaussian_basis(400, 5, (), (i, 0), 2, p.grad).square().sum(1)
                         for i in range(20)])
    assert abs(norms.mean() - 1) < 0.03
