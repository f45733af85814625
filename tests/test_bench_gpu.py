"""The scripts that measure a GPU, at their smallest on the CPU, and what they say without one."""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.metadata
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from lissom.bench import clock, fit, kernels, step
from lissom.bench.names import state_bytes
from lissom.bench.shapes import MODELS
from lissom.bench.sources import from_name
from lissom.kernels import philox
from lissom.optim.base import PartialStepError
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack


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


@pytest.mark.parametrize("name", [name for name in kernels.CASES if "row_norms" not in name])
def test_compilers_get_each_kernel_in_one_piece(name, monkeypatch):
    """With torch's own random bits: ours are made piece by piece, which no compiler fuses."""
    monkeypatch.setattr(philox, "_random_pieces", None)
    bound, make = kernels.CASES[name]
    work = make(16384 if bound == "memory" else 32, "cpu", torch.bfloat16)
    torch.compiler.reset()
    with kernels._fair("cpu"):
        torch.compile(work.definition or (lambda: work.run("torch")), backend="eager",
                      dynamic=False, fullgraph=True)()
        if name != "stochastic_round":  # which on CUDA has its definition's
            work.run("torch")


@pytest.mark.parametrize("bits", [8, 4])
def test_compilers_get_the_same_arithmetic(bits):
    g = torch.randn(8, 4096, generator=torch.Generator().manual_seed(0))
    options = {"bits": bits, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "t": 2}
    results = []
    for context in (contextlib.nullcontext(), kernels._fair("cpu")):
        with context:
            state = kernels._moments(g, bits)
            found = [kernels.adam8_ref(x, **state, **options) for x in (g, g * g)]
        results.append([*found, *state.values()])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    assert results[0][2].unique().numel() > 8


def test_torch_rounds_stochastically_too():
    x = torch.full((1000, 100), 1 + 2**-9)  # a quarter of bf16's step at 1
    x[0, :4] = torch.tensor([torch.inf, -torch.inf, torch.nan, torch.finfo(torch.float32).max])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        rounded = kernels._rounded(x)
    assert rounded.dtype == torch.bfloat16
    assert rounded[0, :4].tolist()[:2] == [torch.inf, -torch.inf]
    assert rounded[0, 2].isnan()
    assert rounded[0, 3] == torch.finfo(torch.bfloat16).max
    assert rounded[1:].unique().tolist() == [1, 1 + 2**-7]
    assert rounded[1:].float().mean() == pytest.approx(1 + 2**-9, abs=1e-4)


def test_products_come_first():
    bounds = [bound for bound, _ in kernels.CASES.values()]
    assert bounds == sorted(bounds, reverse=True)


def test_a_kernel_that_fails_is_a_row(tmp_path, monkeypatch, capsys):
    def make(*_):
        raise RuntimeError("out of resource: shared memory\nmore")

    monkeypatch.setitem(kernels.CASES, "syrk", ("product", make))
    file = tmp_path / "rows.json"
    options = ["--device", "cpu", "--sizes", "32", "--kernels", "syrk;symm_muladd"]
    assert kernels.main([*options, "--repeats", "1", "--json", str(file)]) == 0
    failed, done = json.loads(file.read_text())
    assert failed["failed"] == "out of resource: shared memory"
    assert done["ms"]["torch"] > 0
    file.unlink()
    assert kernels.main([*options, "--warm-up", "--json", str(file)]) == 0
    assert "syrk, 256: out of resource" in capsys.readouterr().out
    assert not file.exists()


def test_slow_contestants_have_fewer_rounds():
    calls = {"a": 0, "b": 0}

    def call(name):
        calls[name] += 1

    taken = clock.times({k: functools.partial(call, k) for k in calls}, 5, "cpu", warm=2,
                        fewer={"b": 1})
    assert calls == {"a": 7, "b": 3}
    assert [len(taken[k]) for k in "ab"] == [5, 1]


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


def _bench(**options):
    return step._Bench(argparse.Namespace(**{
        "size": "tiny", "rank": 4, "gap": 2, "device": "cpu", "dtype": "fp32", "layers": 1,
        "whole": False, "projection": None} | options))


def test_every_class_steps_and_missing_packages_are_rows(tmp_path, monkeypatch):
    def found(name):
        if name in ("torchao.optim", "flashoptim"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return importlib.import_module(name)

    monkeypatch.setattr(step, "importlib", SimpleNamespace(
        import_module=found))
    # with its own vocabulary 27 models and their states would take 4 GB
    monkeypatch.setitem(MODELS, "tiny", replace(MODELS["tiny"], vocabulary=300))
    bench = _bench(whole=True)
    names = [x for x in bench.contestants() if "galore-torch" not in x]
    file = tmp_path / "rows.json"
    step.main(["--size", "tiny", "--rank", "4", "--layers", "1", "--whole", "--steps", "3", "--gap",
               "2", "--only", ";".join(names), "--json", str(file)])
    rows = {row["optimizer"]: row for row in json.loads(file.read_text())}
    assert rows.keys() == set(names)
    for name, row in rows.items():
        assert {"provider", "version", "device", "torch", "triton", "commit", "command"} <= set(row)
        if name.startswith(("torchao", "flashoptim")):
            assert "No module named" in row["missing"]
            assert row["provider"] == name.split()[0]
            assert row["version"] is None
            continue
        if name.endswith("of weights"):
            assert row["failed"].startswith("only bf16 weights have bits")
            continue
        assert "failed" not in row, (name, row.get("failed"))
        if name.startswith("fira") and "missing" in row:  # it is no dependency of the tests
            continue
        assert row["step_ms"] > 0
        assert row["state_bytes"] > 0 or name == "products alone"
    assert rows["GaLoreAdamW, 8 bits"]["state_bytes"] < rows["GaLoreAdamW"]["state_bytes"]
    assert rows["bitsandbytes AdamW8bit"]["version"]
    elements = sum(torch.Size(x).numel() for x in [*bench.matrices, *bench.rest])
    assert rows["AdamW"]["bytes"] == elements * (3 * 4 + 4 * 4)


def test_a_contestant_that_fails_is_a_row():
    def broken():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB\nmore")

    row = step._missing("x", step.Contestant(broken, package="torch"),
                        torch.OutOfMemoryError("CUDA out of memory\nmore"))
    version = importlib.metadata.version("torch")  # which may lack what torch.__version__ ends in
    assert row == {"optimizer": "x", "provider": "torch", "version": version,
                   "failed": "CUDA out of memory"}
    bench = _bench()
    chosen = {"broken": step.Contestant(broken), "AdamW": bench.contestants()["AdamW"]}
    rows, taken = step._alternating(chosen, bench, 3, clock.Deadline(None))
    assert [row["optimizer"] for row in rows] == ["broken", "AdamW"]
    assert len(taken["AdamW"]) == 3


def test_contestants_are_chosen_by_provider_and_bits(tmp_path, capsys):
    file = tmp_path / "rows.json"
    names = "torch.optim.Muon;AdamW;AdamW8bit;GaLoreAdamW;GaLoreAdamW, 8 bits;fira"
    base = ["--size", "tiny", "--rank", "4", "--layers", "1", "--steps", "2", "--only", names]
    step.main([*base, "--providers", "torch,lissom", "--bits", "8", "--projection", "randomized",
               "--json", str(file)])
    rows = json.loads(file.read_text())
    assert [row["optimizer"] for row in rows] == ["torch.optim.Muon", "AdamW8bit",
                                                  "GaLoreAdamW, 8 bits"]
    assert {row["projection"] for row in rows} == {"randomized"}
    made = _bench(projection="randomized").contestants()
    for name, projection in (("GaLoreAdamW", "randomized"), ("DCTAdamW, every step", "dct")):
        group = made[name].make().optimizers[0].param_groups[0]
        assert group["projection"] == projection
    made = _bench(dtype="bf16").contestants()
    for name in ("AdamW8bit", "GaLoreAdamW, 8 bits"):
        split = made[f"{name}, 8 bits of weights"]
        (one,), (other,) = split.make().optimizers, made[name].make().optimizers
        assert (split.below, split.bits, split.kind) == (8, 8, made[name].kind)
        differ = {k for k, x in one.param_groups[0].items()
                  if k != "params" and x != other.param_groups[0][k]}
        assert differ == {"master_bits"}
        assert all("master" in s for s in one.state.values())
    for flag, value in (("--providers", "galore"), ("--bits", "4")):
        with pytest.raises(SystemExit):
            step.main([*base, flag, value])
        assert f"{flag} '{value}' must be of " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        step.main([*base, "--providers", "bitsandbytes"])
    assert "leave no contestant" in capsys.readouterr().err


def test_state_of_tensors_made_of_others_is_counted_inside():
    codes, scale = torch.zeros(100, dtype=torch.uint8), torch.zeros(4)
    p = torch.nn.Parameter(torch.zeros(100))
    optimizer = torch.optim.SGD([p])
    # nothing of its own has the bytes of 100 numbers in fp32
    optimizer.state[p] = {"a": TwoTensor(codes, codes.clone()), "b": TwoTensor(scale, scale + 1)}
    assert state_bytes(optimizer) == 2 * 100 + 2 * 16


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
    assert step.roofline("frugal", one, [], 5, 32, 2) == (2 * 3 * 600 + 4 * 5 * 30 * 4, 0)
    assert step.roofline("fira", one, [], 5, 32, 2) == (moved + 2 * 600, operations)
    assert step.roofline("adamw", one, [(7,)], 5, 8, 2) == (607 * (6 + 4 * (1 + 4 / 256)), 0)
    assert step.roofline("adamw", one, [(7,)], 5, 8, 2, 8) == (
        607 * (8 + 4 * (1 + 4 / 256)), 0)
    assert step.roofline("galore", one, [], 5, 32, 2, 16) == (moved + 4 * 600, operations)
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


@pytest.mark.parametrize("method", ["galore 8 bits, update", "galore 8 bits, project",
                                    "galore 8 bits"])
def test_batches_go_on_after_one_that_ran_out_of_memory(method):
    """In the middle of the backward pass, when some gradients have been used up."""
    run = fit._Run(argparse.Namespace(device="cpu", model="tiny", dtype="fp32", rank=8, length=4,
                                      checkpoint=False), fit.METHODS[method], 10**10)
    sizes = []

    def refuse(_):
        if sizes[-1] > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")

    run.model.layers[1].gate_proj.weight.register_hook(refuse)

    def attempt(batch):
        sizes.append(batch)
        return run.attempt(batch, steps=1)

    with run.stack:
        assert attempt(1)
        before = run.live.live
        assert fit.largest(attempt, 16) == 5
        assert sizes[1:] == [1, 2, 4, 8, 6, 5]
        assert run.live.live == before


def test_a_package_that_is_missing_leaves_nothing_behind(tmp_path, monkeypatch):
    def missing(name, model):
        raise ModuleNotFoundError("No module named 'bitsandbytes'")

    monkeypatch.setattr(fit, "rival", missing)
    file = tmp_path / "rows.json"
    fit.main(["--model", "tiny", "--length", "4", "--device", "cpu", "--cap", "1GB", "--rank", "8",
              "--methods", "bitsandbytes AdamW8bit", "--json", str(file)])
    row, = json.loads(file.read_text())
    assert row["missing"] == "No module named 'bitsandbytes'"
    assert {"provider", "version", "device", "torch", "triton", "commit", "command"} <= set(row)
    assert row["provider"] == "bitsandbytes"
    assert not _get_current_dispatch_mode_stack()


def test_a_package_is_looked_for_before_a_model_is_built(tmp_path, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(fit, "importlib", SimpleNamespace(import_module=missing))
    monkeypatch.setattr(fit, "from_name", None)
    file = tmp_path / "rows.json"
    fit.main(["--model", "tiny", "--device", "cpu", "--cap", "1GB", "--methods",
              "bitsandbytes AdamW8bit", "--json", str(file)])
    row, = json.loads(file.read_text())
    assert row["missing"] == "No module named 'bitsandbytes'"


def test_what_is_expected_is_counted_when_all_is_measured(tmp_path, monkeypatch):
    done = []
    step, expected = fit._Run.step, fit.expected
    monkeypatch.setattr(fit._Run, "step", lambda *x: done.append("step") or step(*x))
    monkeypatch.setattr(fit, "expected", lambda *x: done.append("expected") or expected(*x))
    file = tmp_path / "rows.json"
    fit.main(["--model", "tiny", "--length", "4", "--cap", "1GB", "--dtype", "fp32", "--limit",
              "1", "--steps", "1", "--device", "cpu", "--rank", "8", "--methods",
              "galore 8 bits, update;adamw 8 bits, update", "--json", str(file)])
    assert done == ["step"] * 6 + ["expected"] * 2
    for row in json.loads(file.read_text()):
        assert row["peak_of_expected"] == row["peak_bytes"] / row["expected"]["total"]


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
