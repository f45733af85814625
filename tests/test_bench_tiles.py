"""The sweep over tiles."""

from __future__ import annotations

import json

import pytest
import torch
from lissom.bench import clock, kernels
from lissom.bench import tiles as bench
from lissom.kernels import _triton, tiles
from lissom.kernels.adam import adamw8, adamw8_ref
from lissom.kernels.lift import lift, lift_ref

from .helpers import assert_same, tensors

BETAS = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8}


def test_choices_are_put_back():
    for choice in bench.CHOICES.values():
        before = choice.present()
        assert before in choice.values
        assert len(set(choice.values)) == len(choice.values)
        other = next(x for x in choice.values if x != before)
        with pytest.raises(ZeroDivisionError), choice.taken(other):
            assert choice.present() == other
            raise ZeroDivisionError
        assert choice.present() == before


@pytest.mark.skipif(not _triton.INTERPRETED, reason="needs Triton's interpreter")
@pytest.mark.parametrize("values", bench.CHOICES["lift"].values, ids=str)
def test_any_tiles_lift_alike(values, monkeypatch):
    monkeypatch.setattr(tiles, "_ENOUGH", 0)
    p, left, right = (x.bfloat16() for x in tensors([(30, 70), (30, 5), (5, 70)], 3))
    expected = p.clone()
    lift_ref(expected, left, right, alpha=0.5, keep=0.75)
    with bench.CHOICES["lift"].taken(values):
        lift(p, left, right, alpha=0.5, keep=0.75, backend="triton")
    torch.testing.assert_close(p, expected)


@pytest.mark.skipif(not _triton.INTERPRETED, reason="needs Triton's interpreter")
@pytest.mark.parametrize("values", bench.CHOICES["adam"].values, ids=str)
def test_any_tiles_step_alike(values):
    p, g = tensors([(9, 300), (9, 300)], 2)
    q, results = p.clone(), []
    for x, step, backend in ((p, adamw8, {"backend": "triton"}), (q, adamw8_ref, {})):
        state = [torch.zeros(9, 300, dtype=torch.uint8) for _ in range(2)] + [
            torch.zeros(9, 2) for _ in range(2)]
        with bench.CHOICES["adam"].taken(values):
            step(x, g, *state, bits=8, lr=1e-2, weight_decay=0.1, t=1, **BETAS, **backend)
        results.append(state)
    torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    assert_same(*results)


def test_choices_take_turns(monkeypatch):
    """Lissom's kernel alone, the present tiles first; one that fails is a row."""
    choice = bench.CHOICES["adam"]
    present = choice.present()
    broken = next(x for x in choice.values if x != present)
    seen = []

    def run(backend):
        assert backend == "triton"
        seen.append(choice.present())
        if seen[-1] == broken:
            raise RuntimeError("out of registers\nmore")

    def times(calls, repeats, device, ahead):
        seen.clear()
        for call in list(calls.values()) * 2:
            call()
        return {k: [i, i, 9 + i] for i, k in enumerate(calls, 1)}

    work = kernels.Work(run, 8e6)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(kernels, "CASES", {"adamw8, 8 bits": ("memory", lambda *_: work)})
    monkeypatch.setattr(clock, "times", times)
    rows = bench._rows(choice, "adamw8, 8 bits", 64, 1e9, 1e9, 3, clock.Deadline(None))
    assert len(rows) == len(choice.values)
    assert [row["present"] for row in rows] == [True] + [False] * (len(rows) - 1)
    assert choice.present() == present
    sound = [x for x in choice.values if x not in (present, broken)]
    assert seen == [present, *sound] * 2
    assert [row.get("failed") for row in rows].count("out of registers") == 1
    assert [row["ms"] for row in rows if "ms" in row] == [*range(1, len(rows))]
    assert rows[0]["share_of_roofline"] == 8.0  # 8 MB at 1 GB/s in a millisecond

    rows = bench._rows(choice, "adamw8, 8 bits", 64, 1e9, 1e9, 3, clock.Deadline(0))
    assert {row["skipped"] for row in rows} == {"no time left"}


def test_without_a_gpu_a_row_says_so(tmp_path, capsys):
    file = tmp_path / "tiles.json"
    assert bench.main(["--device", "cpu", "--json", str(file)]) == 0
    assert "no CUDA device" in json.loads(file.read_text())[0]["skipped"]
    assert "nothing to time" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        bench.main(["--choices", "lifts"])
    assert "'lifts' must be of 'lift', 'adam'" in capsys.readouterr().err
