"""The comparison of optimizers on one token budget, which may be made in pieces."""

from __future__ import annotations

import json

import pytest
from lissom.bench import converge

FLAGS = ["--size", "tiny", "--rank", "4", "--tokens", "512", "--batch", "2", "--length", "64",
         "--piece", "2", "--seeds", "2", "--device", "cpu"]


def rows_of(file):
    return {(r["method"], r["lr"], r["seed"]): (r["valid_loss"], r["losses"])
            for r in json.loads(file.read_text())}


@pytest.mark.slow
def test_pieces_give_what_one_command_gives(tmp_path, monkeypatch, capsys):
    methods = "AdamW;GaLore, 8 bits;SwitchLoRA"
    monkeypatch.setattr(converge, "tuned", lambda loss, usual: min((usual, usual / 2), key=loss))
    whole, pieces = tmp_path / "whole.json", tmp_path / "pieces.json"
    assert converge.main([*FLAGS, "--methods", methods, "--json", str(whole), "--plot",
                          str(tmp_path / "curves.png")]) == 0
    out = capsys.readouterr().out
    assert "not done" not in out
    assert "of AdamW's" in out
    assert (tmp_path / "curves.png").stat().st_size > 1000
    monkeypatch.setattr(converge.clock.Deadline, "over", one_piece())
    for _ in range(60):
        converge.main([*FLAGS, "--methods", methods, "--json", str(pieces)])
        if "not done" not in capsys.readouterr().out:
            break
    assert rows_of(pieces) == rows_of(whole)
    assert not list((tmp_path / "pieces.json.parts").iterdir())
    assert len(rows_of(whole)) == 3 * 3
    rows = json.loads(whole.read_text())
    assert all(row["wall_s"] > 0 and row["steps"] == 4 and len(row["losses"]) == 4 for row in rows)


def one_piece():
    """Time is over after every second question."""
    asked = [0]

    def over(self):
        asked[0] += 1
        return asked[0] % 2 == 0

    return over


@pytest.mark.parametrize("best", [0.25, 1.0, 8.0])
def test_a_valley_is_found_from_its_side(best):
    tried = []

    def loss(rate):
        tried.append(rate)
        return max(rate / best, best / rate)

    assert converge.tuned(loss, 1.0) == best
    assert len(tried) == len(set(tried)) <= 6


def test_a_rate_that_diverges_is_never_the_best():
    assert converge.tuned(lambda rate: float("nan") if rate >= 1 else 1 / rate, 1.0) == 0.5


def test_rows_of_another_comparison_are_not_taken(tmp_path, monkeypatch):
    """Other text, other weights: the rows of the first are kept and none is reused."""
    monkeypatch.setattr(converge, "tuned", lambda loss, usual: (loss(usual), usual)[1])
    monkeypatch.setattr(converge.train, "train", fake)
    file, other = tmp_path / "rows.json", tmp_path / "other.txt"
    other.write_bytes(b"another text " * 4000)
    flags = [*FLAGS, "--seeds", "1", "--methods", "AdamW", "--json", str(file)]
    for more, count in (([], 1), ([], 1), (["--dtype", "bf16"], 2), (["--data", str(other)], 3)):
        assert converge.main([*flags, *more]) == 0
        assert len(json.loads(file.read_text())) == count


def fake(name, data, run, report, save, resume):
    save.write_bytes(b"")
    return {"valid_loss": 1.0, "losses": [1.0] * run.until, "state_bytes": 1, "peak_bytes": 1}


def test_refusals(tmp_path, capsys):
    for flags, message in ((["--methods", "Galore"], "--methods 'Galore' must be of"),
                           (["--data", str(tmp_path / "none.txt")], "No such file")):
        with pytest.raises(SystemExit):
            converge.main([*flags, "--json", str(tmp_path / "x.json")])
        assert message in capsys.readouterr().err
