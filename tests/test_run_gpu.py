"""The one command for a GPU session, where there is none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "bench" / "run_gpu.sh"


@pytest.mark.skipif(torch.cuda.is_available(), reason="what it does without CUDA")
@pytest.mark.slow
def test_it_runs_to_its_table_without_a_gpu(tmp_path):
    """From a folder of links, as on a machine where nothing can be installed."""
    environment = {**os.environ, "OUT": str(tmp_path), "PYTHON": sys.executable,
                   "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", str(SCRIPT), "--seconds", "800"], env=environment, check=False,
                          capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    table = done.stdout
    for name in ("gpu-tests", "polar-gpu", "kernels-cpu", "step-tiny-cpu", "fit-tiny-cpu",
                 "converge-tiny-cpu"):
        assert f"{name}: exit 0" in table, (table, done.stderr)
    assert json.loads((tmp_path / "polar-gpu.json").read_text())[0]["skipped"] == "no CUDA device"
    assert "no CUDA device" in table
    rows = json.loads((tmp_path / "fit-tiny-cpu.json").read_text())
    assert [row["batch"] > 0 for row in rows] == [True, True, False]
    assert json.loads((tmp_path / "converge-tiny-cpu.json").read_text())[0]["valid_loss"] > 0


def test_it_says_how_it_is_called():
    done = subprocess.run(["bash", str(SCRIPT), "--fast"], check=False, capture_output=True,
                          text=True)
    assert done.returncode == 2
    assert "usage: bench/run_gpu.sh [--seconds" in done.stderr
