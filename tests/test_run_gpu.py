"""The one command for a GPU session, where there is none."""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import re
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
from lissom.bench import converge, fit, step

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
                 "tiles-gpu", "recipe-one-gpu-24gib-cpu", "converge-tiny-cpu"):
        assert f"{name}: exit 0" in table, (table, done.stderr)
    assert (tmp_path / "summary.txt").read_text() == table
    rows = packed(tmp_path)
    assert rows["polar-gpu.json"][0]["skipped"] == "no CUDA device"
    assert "no CUDA device" in table
    assert [row["batch"] > 0 for row in rows["fit-tiny-cpu.json"]] == [True, True, False]
    assert rows["converge-tiny-cpu.json"][0]["valid_loss"] > 0
    assert len(rows["recipe-one-gpu-24gib-cpu.json"][0]["losses"]) == 2
    assert "tokens/s, losses" in table


def packed(folder):
    """What is in the one file that comes back: rows by name; None for what holds none."""
    with tarfile.open(folder / "results.tgz") as file:
        return {Path(x.name).name: json.load(file.extractfile(x)) if x.name.endswith(".json")
                else None for x in file.getmembers() if not x.isdir()}


#: In the place of Python, on a machine that has a GPU: notes what it is told, and does little.
STUB = """
import json, os, pathlib, signal, sys, time
argv = sys.argv[1:]
if argv[0] == "-c":
    if "torch" in argv[1]:
        print("cuda")
elif argv[0] == "-":
    sys.argv = argv
    exec(sys.stdin.read())
else:
    def note(x):
        with open(os.environ["NOTES"], "a") as file:
            file.write(json.dumps(x) + "\\n")

    note(argv)
    if os.environ.get("STUCK", "none") in argv[1]:
        if os.environ.get("DEAF"):
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        note({"pid": os.getpid()})
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            note("interrupted")
            raise
    if "--json" in argv:
        file = argv[argv.index("--json") + 1]
        share = {"kernel": "lift", "size": 4096, "share_of_roofline": 0.5}
        rows = {
            "kernels": [share | {"ratio": 0.25, "fastest_alternative": "torch"}],
            "tiles": [share | {"values": ["Tiles(1)", "4"]}],
            "fit": [{"method": "m", "in_backward": "update", "batch": 0},
                    {"method": "n", "in_backward": "update", "batch": 2, "tokens_per_s": 7.0,
                     "peak_bytes": 2**31}],
            "one_gpu_24gib": [{"tokens_per_s": 5.0, "losses": [2.0, 1.5]}],
        }.get(argv[1].rpartition(".")[2], [{"optimizer": "o", "failed": "it did"}])
        rows[0]["command"] = "--json " + file
        pathlib.Path(file).write_text(json.dumps(rows))
        if "converge" in argv[1]:
            os.makedirs(file + ".parts")
            for part in (file + ".parts/a.pt", file + ".parts/a.json", file + ".pt"):
                pathlib.Path(part).write_text("{}")
"""


class Machine:
    """One with a GPU, it seems."""

    def __init__(self, folder):
        self.out, self.notes, stub = folder / "out", folder / "notes", folder / "stub.py"
        stub.write_text(STUB)
        python = folder / "python"
        python.write_text(f'#!/bin/sh\nexec {sys.executable} -S {stub} "$@"\n')
        python.chmod(0o755)
        cores = folder / "bin/nproc"  # which takes it for the number of cores
        cores.parent.mkdir()
        cores.write_text('#!/bin/sh\necho "${OMP_NUM_THREADS:-16}"\n')
        cores.chmod(0o755)
        self.environment = {**os.environ, "OUT": str(self.out), "PYTHON": str(python),
                            "NOTES": str(self.notes), "OMP_NUM_THREADS": "1",
                            "PATH": f"{cores.parent}:{os.environ['PATH']}"}

    def start(self, *options, **environment):
        return subprocess.Popen(["bash", str(SCRIPT), *options], stdout=subprocess.PIPE, text=True,
                                env=self.environment | environment, stderr=subprocess.DEVNULL)

    def table(self, *options, **environment):
        process = self.start(*options, **environment)
        table, _ = process.communicate(timeout=100)
        assert process.returncode == 0, table
        return table

    def noted(self):
        return [json.loads(x) for x in self.notes.read_text().splitlines()]

    def commands(self):
        return [x for x in self.noted() if isinstance(x, list)]


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def test_a_gpu_gets_all_parts_in_their_order(machine):
    table = machine.table()
    assert "== cuda, " in table
    names = ["gpu-tests", "kernels-gpu", "step-7b-gpu", "step-7b-rank256-gpu", "tiles-gpu",
             "recipe-one-gpu-24gib-gpu", "fit-7b-24gib-gpu", "polar-gpu", "kernels-compiled-gpu",
             "converge-60m-gpu"]
    assert [x.partition(":")[0] for x in table.splitlines() if ": exit 0" in x] == names
    said = [x.split(maxsplit=1) for x in table[table.index("converge-60m-gpu.log"):].splitlines()]
    assert {name: " ".join(x.split()) for name, x in said[1:]} == {
        "kernels-gpu": "lift 4096: 0.50 of the roofline, 0.25 x torch",
        "step-7b-gpu": "o failed: it did", "step-7b-rank256-gpu": "o failed: it did",
        "tiles-gpu": "lift 4096: 0.50 of the roofline with Tiles(1) 4",
        "recipe-one-gpu-24gib-gpu": "rows 5 tokens/s, losses 2.000 to 1.500",
        "fit-7b-24gib-gpu": "n batch 2, 7 tokens/s, peak 2.00 GiB",
        "polar-gpu": "o failed: it did", "converge-60m-gpu": "o failed: it did",
        "kernels-compiled-gpu": "lift 4096: 0.50 of the roofline, 0.25 x torch"}
    assert "m                              does not fit" in table
    # few files, without what only the next run needs
    assert {x.name for x in machine.out.iterdir()} == {"results.tgz", "summary.txt"}
    assert (machine.out / "summary.txt").read_text() == table
    files = packed(machine.out)
    assert {f"{name}.json" for name in names[1:]} | {f"{name}.log" for name in names} <= set(files)
    assert not any(x.endswith(".pt") or x == "a.json" for x in files)
    assert files["polar-gpu.json"][0]["command"] == "--json bench/results/polar-gpu.json"


def test_what_a_gpu_is_told_is_known(machine, monkeypatch):
    """Options, and names of what is timed and left out: a typing error would cost the session."""
    class Parsed(Exception):
        pass

    def parse(self, argv):
        real(self, argv)
        raise Parsed

    machine.table()
    real = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    bench = step._Bench(argparse.Namespace(size="llama-7b", rank=None, gap=200, device="meta",
                                           dtype="bf16", layers=1, whole=False, projection=None))
    seen = set()
    for _, module, *argv in machine.commands():
        if module == "pytest":
            pairs = [*itertools.pairwise(argv)]
            assert dict(pairs)["-n"] == "14"
            left_out = [b for a, b in pairs if a == "--deselect"]
            assert len(left_out) == 4
            for name in left_out:
                file, _, function = name.partition("::")
                assert f"def {function}(" in (SCRIPT.parents[1] / file).read_text()
                assert file in argv
            continue
        seen.add(module.rpartition(".")[2])
        with pytest.raises(Parsed):
            importlib.import_module(module).main(argv)
        for flag, known in (("--only", bench.contestants()),
                            ("--methods", fit.METHODS if "fit" in module else converge.METHODS)):
            if flag in argv:
                assert set(argv[argv.index(flag) + 1].split(";")) <= set(known)
    assert seen == {"kernels", "step", "tiles", "one_gpu_24gib", "fit", "polar_gpu", "converge"}
    timed = next(x for x in machine.commands() if "--layers" in x and "8" in x and
                 "--rank" not in x)
    names = timed[timed.index("--only") + 1].split(";")
    assert names[0] == "torch.optim.AdamW fused"
    assert set(bench.contestants()) - set(names) == {
        f"{x}{bits}" for x in ("SwitchLoRAAdamW", "FRUGAL", "GradNormLoRPAdamW")
        for bits in ("", ", 8 bits")}
    assert names[-3:] == ["fira", "galore-torch, 8 bits", "galore-torch"]


def test_parts_are_chosen(machine):
    table = machine.table("--only", "polar,recipe", "--seconds", "60")
    assert [x[1].rpartition(".")[2] for x in machine.commands()] == ["one_gpu_24gib", "polar_gpu"]
    given = machine.commands()[1]
    assert given[given.index("--seconds") + 1] == str(60 * 5 // 11)
    assert "gpu-tests" not in table


def test_a_run_that_could_not_end_is_left_out(machine):
    table = machine.table("--only", "converge", "--seconds", "99")
    assert "converge-60m-gpu: left out, a run takes about 70 s and 6" in table
    assert not machine.notes.exists()


def test_what_is_stuck_is_interrupted(machine):
    """So that tests say what failed, where shells have background jobs ignore an interrupt."""
    begin = time.monotonic()
    table = machine.table("--only", "polar,kernels", "--seconds", "16", STUCK="kernels")
    assert time.monotonic() - begin < 16
    assert "interrupted" in machine.noted()
    assert "kernels-gpu: exit 124 after " in table
    assert "polar-gpu: skipped, no time left" in table


@pytest.mark.slow
def test_what_does_not_listen_is_killed(machine):
    begin = time.monotonic()
    table = machine.table("--only", "kernels", "--seconds", "16", STUCK="kernels", DEAF="1")
    assert time.monotonic() - begin < 16
    assert "interrupted" not in machine.noted()
    assert "kernels-gpu: exit 137 after 1" in table


def test_what_was_done_outlives_a_cut(machine):
    process = machine.start("--only", "tests,kernels,step", STUCK="step")
    pids = []
    for _ in range(300):
        time.sleep(0.1)
        noted = machine.noted() if machine.notes.exists() else []
        pids = [x["pid"] for x in noted if isinstance(x, dict)]
        if len(pids) == 1 and any("-q" in x for x in machine.commands()):
            break
    process.terminate()
    table, _ = process.communicate(timeout=20)
    assert process.returncode == 143
    assert "cut off" in table
    assert (machine.out / "summary.txt").read_text() == table
    assert "gpu-tests.log" in packed(machine.out)
    for _ in range(50):  # the compiler beside the tests is gone too
        if not Path(f"/proc/{pids[0]}").exists():
            break
        time.sleep(0.1)
    assert not Path(f"/proc/{pids[0]}").exists()


def test_it_says_how_it_is_called():
    for options, said in (
            (["--fast"], "usage: bench/run_gpu.sh [--seconds N] [--only PART,PART...]"),
            (["--only", "test"], "--only 'test' must be of tests kernels step"),
            (["--seconds", "5m"], "--seconds must be a whole number, got '5m'"),
            (["--seconds"], "--seconds must be a whole number, got ''")):
        done = subprocess.run(["bash", str(SCRIPT), *options], check=False, capture_output=True,
                              text=True)
        assert done.returncode == 2
        assert said in done.stderr
    done = subprocess.run(["bash", str(SCRIPT), "--help"], check=True, capture_output=True,
                          text=True)
    text = SCRIPT.read_text()
    for part in re.search(r"^parts=\((.*)\)$", text, re.MULTILINE)[1].split():
        share = re.search(rf"\[{part}\]=(\d+)", text)[1].removeprefix("0")
        assert re.search(rf"^  {part} +{share} ", done.stdout, re.MULTILINE), part
    assert "set -uo" not in done.stdout
