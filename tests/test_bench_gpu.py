"""The scripts that measure a GPU, at their smallest on the CPU, and what they say without one."""

from __future__ import annotations

import importlib.metadata
import json
from types import SimpleNamespace

import pytest
import torch
from lissom.bench import clock, fit, kernels, step
from lissom.bench.shapes import MODELS
from lissom.bench.sources import from_name
from lissom.optim.base import PartialStepError


def test_every_kernel_has_a_row(tmp_path):
    file = tmp_path / "rows.json"
    assert kernels.main(["--device", "cpu", "--repeats", "1", "--sizes", "16384", "--json",
                         str(file), "--kernels", ";".join(
                             k for k, (bound, _) in kernels.CASES.items() if bound == "memory")]
                        ) == 0
    assert kernels.main(["--device", "cpu", "--repeats", "1", "--sizes", "32", "--json",
                         str(tmp_path / "more.json"), "--kernels", ";".join(
                             k for k, (bound, _) in kernels.CASES.items() if bound == "product")]
                        ) == 0
    rows = json.loads(file.read_text()) + json.loads((tmp_path / "more.json").read_text())
    assert {row["kernel"] for row in rows} == set(kernels.CASES)
    for row in rows:
        assert row["ms"]["torch"] > 0
        assert row["share_of_roofline"] == pytest.approx(row["roofline_ms"] / row["ms"]["torch"])
        assert row["commit"] is None or len(row["commit"]) == 40
        assert "bench.kernels --device cpu" in row["command"]
    of = {row["kernel"]: row for row in rows}
    # p and g in fp32 here, two moments in fp32 each way, of a matrix of 2 x 4096
    assert of["adamw8, 32 bits"]["bytes"] == 8192 * (3 * 4 + 2 * 8)
    assert of["adamw8, 8 bits"]["bytes"] == 8192 * (3 * 4 + 2 * 2) + 2 * 2 * 4 * 32
    assert of["lift, residual"]["operations"] == 2 * 32 * 32 * 8


def test_time_that_is_over_is_said(tmp_path):
    file = tmp_path / "rows.json"
    kernels.main(["--device", "cpu", "--seconds", "0", "--kernels", "row_norms", "--json",
                  str(file)])
    row, = json.loads(file.read_text())
    assert row["skipped"] == "no time left"


def test_names_are_checked(capsys):
    for main, flag in ((kernels.main, "--kernels"), (step.main, "--only"), (fit.main, "--methods")):
        with pytest.raises(SystemExit):
            main([flag, "galor"])
        assert f"{flag} 'galor' must be of " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        fit.main(["--cap", "lots"])
    assert "--cap 'lots' must be a size" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="what they say without CUDA")
def test_a_device_that_is_not_there_is_refused(capsys):
    for main in (kernels.main, step.main, fit.main):
        with pytest.raises(SystemExit):
            main(["--device", "cuda"])
        assert "CUDA device" in capsys.readouterr().err


# -------------------------------------------------------------------- steps


def test_every_class_steps_and_missing_packages_are_rows(tmp_path, monkeypatch):
    def found(name):
        if name in ("torchao.optim", "flashoptim"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return importlib.import_module(name)

    monkeypatch.setattr(step, "importlib", SimpleNamespace(
        import_module=found, metadata=importlib.metadata))
    bench = step._Bench(step.argparse.Namespace(
        size="tiny", rank=4, gap=2, device="cpu", dtype="fp32", layers=1, whole=True))
    names = [x for x in bench.contestants() if "galore-torch" not in x]
    file = tmp_path / "rows.json"
    step.main(["--size", "tiny", "--rank", "4", "--layers", "1", "--whole", "--steps", "3", "--gap",
               "2", "--only", ";".join(names), "--json", str(file)])
    rows = {row["optimizer"]: row for row in json.loads(file.read_text())}
    assert rows.keys() == set(names)
    for name, row in rows.items():
        if name.startswith(("torchao", "flashoptim")):
            assert "No module named" in row["missing"]
            continue
        assert "failed" not in row, (name, row.get("failed"))
        assert row["step_ms"] > 0
        assert row["state_bytes"] > 0 or name == "products alone"
    assert rows["GaLoreAdamW, 8 bits"]["state_bytes"] < rows["GaLoreAdamW"]["state_bytes"]
    assert rows["bitsandbytes AdamW8bit"]["version"]
    elements = sum(torch.Size(x).numel() for x in [*bench.matrices, *bench.rest])
    assert rows["AdamW"]["bytes"] == elements * (3 * 4 + 4 * 4)


def test_a_contestant_that_fails_is_a_row():
    def broken():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB\nmore")

    row = step._missing("x", torch.OutOfMemoryError("CUDA out of memory\nmore"))
    assert row == {"optimizer": "x", "failed": "CUDA out of memory"}
    bench = step._Bench(step.argparse.Namespace(
        size="tiny", rank=4, gap=2, device="cpu", dtype="fp32", layers=1, whole=False))
    chosen = {"broken": step.Contestant(broken), "AdamW": bench.contestants()["AdamW"]}
    rows, taken = step._alternating(chosen, bench, 3, clock.Deadline(None))
    assert [row["optimizer"] for row in rows] == ["broken", "AdamW"]
    assert len(taken["AdamW"]) == 3


def test_shapes_and_rooflines():
    matrices, rest = step.shapes_of(MODELS["llama-3-8b"], None, True)
    assert len(matrices) == 7 * 32
    assert matrices[:7] == [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096),
                            (14336, 4096), (4096, 14336)]
    assert sum(torch.Size(x).numel() for x in [*matrices, *rest]) == 8030261248
    one = [(30, 20)]
    moved, operations = step.roofline("galore", one, [], 5, 32, 2)
    # G, P read and written; R and N written and read; two moments; the basis twice
    assert moved == 2 * 3 * 600 + 2 * 4 * 150 + 4 * 4 * 150 + 2 * 2 * 100
    assert operations == 4 * 600 * 5
    assert step.roofline("fira", one, [], 5, 32, 2) == (moved + 2 * 600, operations)
    assert step.roofline("adamw", one, [(7,)], 5, 8, 2) == (607 * (6 + 4 * (1 + 4 / 256)), 0)
    assert step.roofline("dct", one, [], 5, 32, 2)[1] == 2 * 600 * 20 + 2 * 600 * 5
    assert step.roofline("muon", one, [], 5, 32, 2)[1] == 5 * (3 * 400 * 30 + 8000)


# -------------------------------------------------------------------- what fits


@pytest.mark.parametrize("most", [0, 1, 2, 3, 7, 8, 31, 32])
def test_the_largest_batch_is_found(most):
    tried = []

    def attempt(batch):
        tried.append(batch)
        return batch <= most

    assert fit.largest(attempt, 32) == most
    assert max(tried) <= 32
    assert len(tried) <= 11


def test_a_lack_of_memory_is_known_by_its_cause():
    lack = torch.OutOfMemoryError("CUDA out of memory")
    wrapped = PartialStepError("step() failed at 'w'")
    wrapped.__cause__ = lack
    assert fit._out_of_memory(lack)
    assert fit._out_of_memory(wrapped)
    assert not fit._out_of_memory(ValueError("no"))


def test_a_cap_is_held_and_the_peak_is_as_expected(tmp_path):
    """Live bytes are what the simulated passes, weights and state give, to half a per cent."""
    file = tmp_path / "rows.json"
    methods = "galore 8 bits, project;adamw 8 bits, update;torch AdamW"
    fit.main(["--model", "tiny", "--length", "16", "--cap", "101MB", "--dtype", "fp32", "--limit",
              "8", "--steps", "1", "--device", "cpu", "--rank", "8", "--methods", methods, "--json",
              str(file)])
    rows = {row["method"]: row for row in json.loads(file.read_text())}
    for name in methods.split(";")[:2]:
        row = rows[name]
        assert 1 <= row["batch"] < 8, row
        assert row["peak_bytes"] <= 101e6
        assert row["peak_of_expected"] == pytest.approx(1, abs=0.005)
        bigger = fit.expected(from_name("tiny"), fit.METHODS[name], 8, torch.float32,
                              row["batch"] + 1, 16, False)
        assert bigger["total"] > 100e6
    assert rows["torch AdamW"]["batch"] == 0


def test_checkpointing_is_expected_too(tmp_path):
    file = tmp_path / "rows.json"
    fit.main(["--model", "tiny", "--length", "48", "--cap", "1GB", "--dtype", "fp32", "--limit",
              "2", "--steps", "1", "--device", "cpu", "--rank", "8", "--methods",
              "dct-adamw 8 bits, update", "--checkpoint", "--json", str(file)])
    row, = json.loads(file.read_text())
    assert row["batch"] == 2
    assert row["peak_of_expected"] == pytest.approx(1, abs=0.005)
