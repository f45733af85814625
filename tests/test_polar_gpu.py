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
