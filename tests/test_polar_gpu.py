"""The GPU benchmark of Newton-Schulz steps, where there is no GPU."""

from __future__ import annotations

import json

import pytest
import torch
from lissom.bench import polar_gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="what it says without CUDA")
def test_polar_gpu_says_that_there_is_none(tmp_path):
    file = tmp_path / "rows.json"
    assert polar_gpu.main(["--json", str(file)]) == 0
    row, = json.loads(file.read_text())
    assert row["skipped"] == "no CUDA device"
    assert row["command"].endswith(f"polar_gpu --json {file}")


def test_a_shape_that_fails_is_a_row(tmp_path, monkeypatch):
    """And the next one is measured."""
    def measure(shape, peak, repeats):
        if shape[0] == 16:
            return {"shape": list(shape), "ms": {"lissom": peak}}
        raise torch.OutOfMemoryError("CUDA out of memory\nmore")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(polar_gpu.clock, "about", lambda *_: {})
    monkeypatch.setattr(polar_gpu.clock, "product_peak", lambda *_: 7.0)
    monkeypatch.setattr(polar_gpu._triton, "triton", object())
    monkeypatch.setattr(polar_gpu, "_measure", measure)
    file = tmp_path / "rows.json"
    assert polar_gpu.main(["--json", str(file)]) == 0
    *failed, last = json.loads(file.read_text())
    assert len(failed) == 4
    assert all(row["failed"] == "CUDA out of memory" for row in failed)
    assert last["ms"] == {"lissom": 7.0}
