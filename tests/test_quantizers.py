"""Codes of 8 and 4 bits, linear and by a table: how far off they are, and odd input."""

from __future__ import annotations

import pytest
import torch
from lissom.kernels.blocks import code_shapes
from lissom.kernels.dynamic import codebook, dequantize_dynamic_ref, quantize_dynamic_ref
from lissom.kernels.linear import dequantize_linear_ref, quantize_linear_ref

from .helpers import tensors

CPU = torch.device("cpu")


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(3, 256), (5, 257), (4, 7), (1, 1), (2, 3, 300), (0, 5), (3, 0)])
def test_linear_quantizer_errs_by_half_a_step(bits, shape):
    for scale in (1e-30, 1.0, 1e30):
        (x,) = tensors([shape], 3, scale)
        codes, scales = quantize_linear_ref(x, bits)
        assert (tuple(codes.shape), tuple(scales.shape)) == code_shapes(shape, bits)
        back = dequantize_linear_ref(codes, scales, shape[-1], bits)
        levels = 127 if bits == 8 else 7
        for part, other in zip(x.split(256, -1), back.split(256, -1), strict=True):
            if part.numel():
                step = part.abs().amax(-1, keepdim=True) / levels
                assert ((part - other).abs() <= 0.5001 * step).all()
                assert torch.equal(part.abs().amax(-1), other.abs().amax(-1)) or bits == 8 or (
                    other.abs().amax(-1) / part.abs().amax(-1) - 1).abs().max() < 1e-6


@pytest.mark.parametrize("bits", [8, 4])
def test_linear_quantizer_on_constants_zeros_and_outliers(bits):
    x = torch.zeros(4, 300)
    x[1] = -2.5
    x[2, 7] = 1e4
    x[3, ::2] = 3.0
    back = dequantize_linear_ref(*quantize_linear_ref(x, bits), 300, bits)
    torch.testing.assert_close(back, x, rtol=1e-6, atol=0)
    odd = torch.tensor([[float("nan"), 1.0, *[0.0] * 254, 2.0]])
    back = dequantize_linear_ref(*quantize_linear_ref(odd, bits), 257, bits)
    assert back[0, 256] == 2.0
    assert back[0, :256].isnan().all()


def test_codebooks():
    """The 8-bit ones are bitsandbytes' (values recorded from its 0.50.2)."""
    signed, unsigned = codebook(8, True, CPU), codebook(8, False, CPU)
    for book, ends in ((signed, [-0.9929687, -0.9789062, 0.9789062, 0.9929687, 1.0]),
                       (unsigned, [0.0, 3.25e-7, 0.9894531, 0.9964844, 1.0])):
        assert len(book) == 256
        assert torch.equal(book, book.sort().values)
        torch.testing.assert_close(book[[0, 1, -3, -2, -1]], torch.tensor(ends), rtol=1e-5, atol=0)
    assert (len(codebook(4, True, CPU)), len(codebook(4, False, CPU))) == (16, 16)
    assert codebook(4, False, CPU)[0] == 1 / 16


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", [(3, 256), (5, 257), (4, 7), (1, 1), (2, 3, 300), (9,), (0, 5),
                                   (3, 0), (2, 1030)])
def test_dynamic_quantizer_takes_the_nearest(bits, signed, shape):
    for scale in (1e-30, 1.0, 1e30):
        x = tensors([shape], 3, scale)[0].pow(3 if scale == 1 else 1)
        x = x if signed else x.abs()
        codes, scales = quantize_dynamic_ref(x, bits, signed)
        assert (tuple(codes.shape), tuple(scales.shape)) == code_shapes(shape, bits)
        back = dequantize_dynamic_ref(codes, scales, shape[-1], bits, signed)
        book = codebook(bits, signed, CPU).double()
        for part, other in zip(x.split(256, -1), back.split(256, -1), strict=True):
            if part.numel():
                top = part.abs().amax(-1, keepdim=True).double()
                best = (part.double() / top).unsqueeze(-1).sub(book).abs().amin(-1)
                error = (part.double() - other.double()).abs() / top
                assert (error <= best + 1e-6).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_dynamic_quantizer_on_constants_zeros_outliers_and_nan(bits):
    x = torch.zeros(4, 300)
    x[1] = 2.5
    x[2, 7] = 1e4
    for signed in (True, False):
        back = dequantize_dynamic_ref(*quantize_dynamic_ref(x, bits, signed), 300, bits, signed)
        assert torch.equal(back[:2], x[:2])
        assert back[2, 7] == 1e4
        assert torch.equal(back[3], x[3])
        odd = torch.tensor([[float("nan"), 1.0, *[0.0] * 254, 2.0]])
        back = dequantize_dynamic_ref(*quantize_dynamic_ref(odd, bits, signed), 257, bits, signed)
        assert back[0, 256] == 2.0
        assert back[0, :256].isnan().all()


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_read_alike_wherever_they_lie(signed):
    """Two at a time where memory allows it, one by one elsewhere."""
    codes = torch.randint(0, 256, (5, 9), dtype=torch.uint8,
                          generator=torch.Generator().manual_seed(2))
    scale = torch.rand(5, 1)
    expected = codebook(8, signed, CPU)[codes.long()] * scale
    for place in (codes, codes[1:], codes[:4], codes[1:4], codes[3:3], codes[:, :4], codes.mT[:5]):
        rows = place.shape[0]
        back = dequantize_dynamic_ref(place, scale[:1].expand(rows, 1), place.shape[1], 8, signed)
        assert torch.equal(back, codebook(8, signed, CPU)[place.long()] * scale[0])
    assert torch.equal(dequantize_dynamic_ref(codes, scale, 9, 8, signed), expected)
