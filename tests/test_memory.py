"""The memory profiler: what it estimates is what is held, and what the papers' tables print."""

from __future__ import annotations

import json

import pytest
import torch
from lissom import optim
from lissom.bench import backward, budget, estimate, measure, memory, names, sharding, sources
from lissom.bench.llama import Llama
from lissom.bench.shapes import LLAMA, MODELS, PAPER_RANK, Shape
from lissom.optim import codec
from lissom.optim.codec import Slot
from torch import nn

from .cases import CASES

SMALL = Shape(64, 168, 4, 2, 300)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setitem(MODELS, "small", SMALL)
    monkeypatch.setitem(LLAMA, "small", SMALL)


def empty(name="small", dtype=torch.float32):
    with torch.device("meta"):
        return Llama(MODELS[name]).to(dtype)


# ---- what is held


def test_released_sizes():
    for name, count in (("llama-3-8b", 8030261248), ("qwen2.5-7b", 7615616512)):
        assert sum(p.numel() for p in empty(name).parameters()) == count


@pytest.mark.parametrize("name", ["torch-adamw", "torch-adamw-fp32", "adamw", "galore", "dct-adamw",
                                  "gradnormlorp", "muon", "lora", "switchlora"])
@pytest.mark.parametrize("bits", [32, 8])
def test_estimate_is_what_steps_hold(name, bits):
    dtype = torch.float32 if bits == 32 else torch.bfloat16
    options = {"state_bits": bits}
    of = sources.from_name("small")
    own = torch.float32 if name == "torch-adamw-fp32" else dtype
    for mode in estimate.modes(name, empty(dtype=own), 8, **options):
        (row,) = memory.estimate(of, name, 8, dtype=dtype, batch=2, length=48, in_backward=mode,
                                 **options)
        runs = [measure.measure(of, name, 8, dtype=dtype, device="cpu", batch=2, length=48,
                                in_backward=mode, **options) for _ in range(2)]
        held = runs[1]  # in the first one the tables of a cosine transform are made
        assert held["weights"] == row["weights"]
        # torch makes its counters where no operation is seen
        unseen = row["host"] if name.startswith("torch") else 0
        assert held["optimizer_state"] == row["optimizer_state"] - unseen
        # the CPU's attention lays its output out otherwise than other devices': a copy a layer
        copies = SMALL.layers * 2 * 48 * SMALL.hidden * own.itemsize
        assert held["activations"] == row["activations"] + copies + 4  # 4: the loss
        if mode == "none":
            assert held["gradients"] == row["gradients"]
        else:
            assert held["gradients"] <= row["gradients"]
        assert held["peak"] >= held["weights"] + held["optimizer_state"] + held["activations"]
        assert held["resident"] > held["peak"]


def test_temporaries_are_those_of_a_step():
    of = sources.from_name("small")
    row = measure.measure(of, "torch-adamw", None, dtype=torch.float32, device="cpu", batch=1,
                          length=8)
    ours = measure.measure(of, "adamw", None, dtype=torch.float32, device="cpu", batch=1, length=8)
    assert row["temporaries"] >= max(p.nbytes for p in empty().parameters())
    assert ours["temporaries"] < row["temporaries"]
    assert row["step"] >= row["weights"] + row["optimizer_state"] + row["gradients"]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("gap", [3, 200])
def test_gradients_in_the_backward_pass(tied, gap):
    """Estimated gradients bound those that bench/backward.py counts, by little."""
    with torch.device("meta"):
        model = Llama(SMALL, tied)
    largest = max(p.nbytes for p in model.parameters())
    held = estimate.holdings("galore", model, 8, update_proj_gap=gap)
    shared = 2 * SMALL.vocabulary * SMALL.hidden * 4 * tied
    for name, mode in (("ordinary", "none"), ("project_in_backward", "project"),
                       ("update_in_backward", "update")):
        rows = backward.measure(name, "small", SMALL.vocabulary, 8, 6, tied, gap)
        counted = max(row["gradient_bytes"] for row in rows)
        bound = estimate.count(held, mode)["gradients"] - shared
        assert counted <= bound <= counted * 1.01 + (largest if mode == "project" else 0) + (
            5 * 64 * 8 * 4 if gap == 3 else 0)  # new bases that the bound allows
        if mode != "project":
            assert counted == bound


def test_a_shared_weights_gradient_is_summed_in_a_third():
    model = Llama(SMALL, tied=True)
    model.initialize(torch.Generator().manual_seed(0))
    from lissom.bench.livebytes import LiveBytes

    loss = sources.loss_of(model, torch.zeros(1, 4, dtype=torch.long))
    with LiveBytes() as live:
        loss.backward()
    bound = estimate.count(estimate.holdings("adamw", model, None))["gradients"]
    plain = sum(p.nbytes for p in model.parameters())
    assert plain < bound <= live.peak < bound * 1.01


def test_other_packages(monkeypatch):
    bnb = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(nn.Embedding(70, 100), nn.Linear(100, 3))
    held = estimate.holdings("bnb-adamw8bit", model, None)
    optimizer = bnb.optim.AdamW8bit(model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert estimate.count(held)["optimizer_state"] == names.state_bytes(optimizer)
    optimizer = torch.optim.AdamW(model.bfloat16().parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    held = estimate.count(estimate.holdings("torch-adamw", model, None))
    optimizer.step()
    assert held["optimizer_state"] == names.state_bytes(optimizer)


def test_models_without_tokens_have_no_activations():
    with pytest.raises(ValueError, match="takes no tokens"):
        estimate.activations(nn.Linear(3, 3), 1, 4)
    with pytest.raises(ValueError, match="does not run without values"):
        estimate.activations(nn.Sequential(nn.Embedding(4, 3), nn.Linear(5, 2)).to("meta"), 1, 4)


# ---- ranks


def test_chunks_are_those_of_torch():
    for rows in range(12):
        for ranks in range(1, 9):
            chunks = [len(x) for x in torch.chunk(torch.empty(rows, 2), ranks)] if rows else []
            want = chunks + [0] * (ranks - len(chunks))
            assert sharding.chunk_rows(rows, ranks) == want


def test_what_is_sharded(monkeypatch):
    def galore(*shape, **more):
        p = torch.nn.Parameter(torch.empty(shape))
        optimizer = optim.GaLoreAdamW([p], rank=3, **more)
        return sharding.rank_bytes(shape, optimizer.stored_slots(p, optimizer.param_groups[0]), 4)

    small = 4 + 8 + 8 + 4  # step, index, key, basis_step
    # 10 rows of 6: moments (10, 3) of 3, 3, 3, 1 rows, a right basis (6, 3) that is too small
    assert galore(10, 6) == [2 * 4 * 3 * n + 4 * 6 * 3 + small for n in (3, 3, 3, 1)]
    # 6 rows of 10: a left basis (6, 3) of 2, 2, 2, 0 rows, moments (3, 10) that are too small
    assert galore(6, 10) == [4 * 3 * n + 2 * 4 * 3 * 10 + small for n in (2, 2, 2, 0)]
    # a square matrix: its right basis is of columns, as many as they are
    assert galore(8, 8) == [2 * 4 * 3 * 2 + 4 * 8 * 3 + small] * 4
    # error feedback in 8 bits: codes and scales have rows
    assert galore(10, 6, error_feedback_bits=8) == [
        2 * 4 * 3 * n + (6 + 4) * n + 4 * 6 * 3 + small for n in (3, 3, 3, 1)]
    # what is large is cut by rows of its own: a right basis of 2, 2, 2, 0, moments of 1, 1, 1, 0
    monkeypatch.setattr(codec, "SPREAD", 18)
    assert galore(10, 6) == [2 * 4 * 3 * n + 4 * 3 * k + small
                             for n, k in ((3, 2), (3, 2), (3, 2), (1, 0))]
    assert galore(6, 10) == [4 * 3 * n + 2 * 4 * 10 * k + small
                             for n, k in ((2, 1), (2, 1), (2, 1), (0, 0))]
    monkeypatch.undo()
    p = torch.nn.Parameter(torch.empty(5000))
    optimizer = optim.AdamW8bit([p])
    slots = optimizer.stored_slots(p, optimizer.param_groups[0])
    assert sharding.rank_bytes((5000,), slots, 2) == [2 * (5000 + 4 * 20) + 20] * 2
    # codes of a vector that is as long as a square matrix
    cpu = torch.device("cpu")
    vector = {"magnitude_exp_avg": Slot((8,), torch.uint8, cpu),
              "magnitude_exp_avg.scale": Slot((1,), torch.float32, cpu)}
    assert sharding.rank_bytes((8, 8), vector, 2) == [12, 12]
    number = Slot((), torch.float32, cpu)
    assert sharding.rank_bytes((), {"exp_avg": number}, 3) == [4, 4, 4]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_one_rank_holds_what_the_plan_says(case):
    """Every slot of every class is counted once; on more ranks none gets more than on one."""
    optimizer = case(case.parameters([(10, 6), (6, 10), (7, 7), (5,), (), (4, 3, 2)]))
    of = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    for (p, group), row in zip(of, optimizer.plan(), strict=True):
        slots = optimizer.stored_slots(p, group) if p in optimizer.state else {}
        assert sharding.rank_bytes(p.shape, slots, 1) == [row.state_bytes]
        each = sharding.rank_bytes(p.shape, slots, 4)
        assert each == sorted(each, reverse=True)
        assert each[0] <= row.state_bytes <= sum(each)


def test_llama_7b_on_many_ranks(capsys):
    """GB per GPU of weights and state, bf16: 1, 8, 64, 512 ranks; by hand for AdamW."""
    assert memory.main(["--model", "llama-7b", "--ranks", "1,8,64,512", "--json", "-",
                        "--optimizers", "torch-adamw,galore,dct-adamw"]) == 0
    rows = json.loads(capsys.readouterr().out)
    for row in rows[:4]:
        n = row["ranks"]
        elements = sum(-(-p.shape[0] // n) * p.shape[1:].numel()
                       for p in empty("llama-7b").parameters())
        assert row["weights"] == row["gradients"] == 2 * elements
        assert row["optimizer_state"] == 4 * elements + 4 * 291  # a counter for each parameter
    got = [round(row["optimizer_state"] / 1e9, 2) for row in rows]
    assert got == [26.95, 3.37, 0.42, 0.05, 9.40, 1.18, 0.15, 0.02, 7.53, 0.94, 0.12, 0.02]
    assert rows[0]["gathered"] == 0
    # embedding, head and last norm whole with their gradients, two layers, a gradient of one
    layer = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096
    assert rows[1]["gathered"] == 2 * (2 * (2 * 32000 * 4096 + 4096) + 3 * layer)
    # rows of the rank are nowhere if all is projected on the right with columns of cosines
    assert memory.main(["--model", "llama-7b", "--ranks", "64", "--json", "-", "--optimizers",
                        "dct-adamw", "--proj-type", "right"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["optimizer_state"] < rows[2]["optimizer_state"] / 4


# ---- budget


def test_sizes():
    assert budget.parse_size("24GiB") == 24 * 2**30
    assert budget.parse_size("1.5 gb") == 15 * 10**8
    assert budget.parse_size("800 B") == 800
    for text in ("", "24", "24 apples", "-3GB", "0GiB", "GiB"):
        with pytest.raises(ValueError, match="must be a size"):
            budget.parse_size(text)


def find(size, **more):
    return budget.choices(sources.from_name("small"), size, **{
        "dtype": torch.bfloat16, "reserve": 1000, "batch": 1, "length": 8, **more})


def test_budget_lines_give_what_they_say():
    everything = {**{name: getattr(optim, name) for name in optim.__all__}, "lr": 1e-3}
    modes, sizes = set(), (1_500_000, 780_000)
    for most, x in [(size, x) for size in sizes for x in find(size)]:
        assert x.fits == (x.total <= most)
        modes |= {(x.optimizer, x.in_backward)} if x.fits else set()
        scope = {**everything, "model": Llama(SMALL).bfloat16()}
        exec(x.line, scope)
        optimizer = scope["optimizer"]
        buffers = sum(v.nbytes for s in optimizer.state.values() for k, v in s.items()
                      if k.startswith("projected"))
        assert optimizer.plan().state_bytes - buffers == x.figures["optimizer_state"]
        assert sum(p.nbytes for p in scope["model"].parameters()) == x.figures["weights"]
    assert {x for x, _ in modes} == set(budget.CANDIDATES)
    assert {x for _, x in modes} == {"none", "project", "update"}


def test_budget_gives_the_most_that_fits():
    (best,) = find(10**9, optimizers=("galore",))
    assert (best.in_backward, best.rank, best.bits, best.fits) == ("none", 16, 32, True)
    exact = find(best.total, optimizers=("galore",))
    assert exact[0] == best
    less = find(best.total - 1, optimizers=("galore",))[0]
    assert (less.rank, less.bits) < (16, 32)
    assert less.total < best.total
    (none,) = find(10_000, optimizers=("galore",))
    assert not none.fits
    assert (none.rank, none.bits, none.in_backward) == (1, 4, "update")
    assert "state_bits=4, basis_bits=4" in none.line
    fixed = find(10**9, optimizers=("galore",), rank=8, state_bits=16, in_backward="update")
    assert [(x.rank, x.bits, x.in_backward) for x in fixed] == [(8, 16, "update")]
    assert find(10**9, optimizers=("galore",), ranks=4)[0].figures["ranks"] == 4
    (pools,) = find(10**9, optimizers=("switchlora",))
    assert pools.figures["host"] > pools.figures["candidates"] > 0


# ---- the papers' tables

# Weights and states of GaLore's table 2 (arXiv 2403.03507) as printed: 60M, 130M, 350M, 1B.
PRINTED = {
    "full": ((.12, .25, .68, 2.60), (.23, .51, 1.37, 5.20)),
    "low-rank": ((.08, .18, .36, 1.19), (.17, .37, .72, 2.38)),
    "lora": ((.20, .44, 1.04, 3.79), (.17, .37, .72, 2.38)),
}
GALORE_STATES = (.13, .28, .54, 1.78)
SIZES = ("llama-60m", "llama-130m", "llama-350m", "llama-1b")


def test_galores_table():
    """The accounting of GaLore's table 2: 2 bytes for each weight and each number of the state.

    No gradients, no activations; embedding and head on full Adam; vocabulary of 32000, untied.
    The table's unit is not told, and its sizes are nominal: every printed figure lies between
    what is counted in GiB (2**30 bytes) and in GB (1e9), half a digit apart at most. Its LoRA
    counts what LoRA trains beside the whole model, so embedding and head twice. The printed
    states of GaLore itself follow no count that we know; they are 14 to 21 % below r (m + 2 n)
    for each matrix and full Adam for the rest, which is what the paper's table 1 says.
    """
    for i, size in enumerate(SIZES):
        rank = PAPER_RANK[size]
        full = memory.account(empty(size, torch.bfloat16), "torch-adamw", rank)
        pairs = memory.account(empty(size, torch.bfloat16), "lora", rank, state_bits=16)
        counted = {
            "full": (full["weights"], full["optimizer_state"]),
            "low-rank": (2 * pairs["trainable"], pairs["optimizer_state"]),
            "lora": (full["weights"] + 2 * pairs["trainable"], pairs["optimizer_state"]),
        }
        for name, columns in PRINTED.items():
            for printed, count in zip(columns, counted[name], strict=True):
                assert count / 2**30 - .006 <= printed[i] <= count / 1e9 + .006
        galore = memory.account(empty(size, torch.bfloat16), "galore", rank, state_bits=16)
        assert .78 < GALORE_STATES[i] / (galore["optimizer_state"] / 1e9) < .87
        # table 1: m r for the basis, 2 n r for the moments, m <= n
        width, mlp = MODELS[size].hidden, MODELS[size].mlp
        low = MODELS[size].layers * rank * (4 * 3 * width + 3 * (width + 2 * mlp))
        counters = 4 + 8 + 8 + 4  # step, index, key, basis_step
        matrices = 7 * MODELS[size].layers
        assert galore["by_kind"]["low-rank matrices"]["optimizer_state"] == (
            2 * low + counters * matrices)


def test_galores_7b():
    """Its section on 7B, GB cut to whole ones: 8-bit Adam 26, 8-bit GaLore 18 (rank 1024).

    Weights and states, codes without their scales, no gradients. The gradients that updates in
    the backward pass save are 13.5 there.
    """
    totals = {}
    for name, options in (("adamw", {}), ("galore", {"basis_bits": 8})):
        held = estimate.holdings(name, empty("llama-7b", torch.bfloat16), 1024, state_bits=8,
                                 **options)
        codes = sum(x.nbytes for h in held for k, x in h.slots.items() if not k.endswith(".scale"))
        totals[name] = codes + sum(h.weight.nbytes for h in held)
        assert round(estimate.count(held)["gradients"] / 1e9, 1) == 13.5
        assert estimate.count(held, "update")["gradients"] < 0.3e9
    assert {k: int(x / 1e9) for k, x in totals.items()} == {"adamw": 26, "galore": 18}


def test_gradnormlorps_claim():
    """LLaMA-7B pre-trains on an RTX 4090 (24 GB), with 89.5 % less optimizer memory than Adam's.

    Of the paper only these claims could be read. Weights bf16, state and bases 8 bits with their
    scales, gradients used up in the backward pass, one sequence of 256 tokens, 1 GiB in reserve.
    """
    (best,) = budget.choices(sources.from_name("llama-7b"), 24 * 10**9, dtype=torch.bfloat16,
                             reserve=2**30, batch=1, length=256, rank=512, state_bits=8,
                             basis_bits=8, in_backward="update", optimizers=("gradnormlorp",))
    full = memory.account(empty("llama-7b", torch.bfloat16), "torch-adamw", None)
    assert best.fits
    assert 1 - best.figures["optimizer_state"] / full["optimizer_state"] > 0.895


# ---- command line


def factory():
    return nn.Sequential(nn.Linear(16, 40), nn.Linear(40, 16))


def test_all_optimizers_in_one_table(tmp_path, capsys):
    picture, file = tmp_path / "bars.png", tmp_path / "rows.json"
    assert memory.main(["--model", "small", "--plot", str(picture), "--json", str(file)]) == 0
    out = capsys.readouterr().out
    rows = json.loads(file.read_text())
    assert [row["optimizer"] for row in rows] == [*memory._ALL]
    for row in rows:
        assert row["command"] == (f"python -m lissom.bench.memory --model small --plot {picture} "
                                  f"--json {file}")
        assert row["optimizer"] in out
        assert row["total"] == sum(row[k] for k in ("weights", "gradients", "optimizer_state",
                                                    "activations")) - row["host"]
    assert picture.read_bytes()[:4] == b"\x89PNG"
    by = {row["optimizer"]: row for row in rows}
    assert by["torch-adamw-fp32"]["weights"] == 2 * by["torch-adamw"]["weights"]
    assert by["adamw8bit"]["optimizer_state"] < 0.6 * by["adamw"]["optimizer_state"]
    assert memory.main(["--module", "tests.test_memory:factory", "--json", "-",
                        "--optimizers", "galore,muon", "--in-backward", "project"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["in_backward"], row["activations"]) for row in rows] == [("project", None),
                                                                          ("none", None)]


def test_budget_on_the_command_line(tmp_path, capsys):
    picture = tmp_path / "bars.png"
    assert memory.main(["--model", "small", "--budget", "3MB", "--reserve", "1kB", "--plot",
                        str(picture), "--optimizers", "adamw,galore"]) == 0
    out = capsys.readouterr().out
    scope: dict[str, object] = {"model": Llama(SMALL).bfloat16(), "lr": 1e-3}
    exec(out[out.index("from lissom.optim import AdamW, GaLoreAdamW, param_groups"):], scope)
    assert isinstance(scope["optimizer"], optim.GaLoreAdamW)
    assert "optimizer = GaLoreAdamW(param_groups(model, rank=16), lr=lr" in out
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert memory.main(["--model", "small", "--budget", "10kB", "--optimizers", "galore"]) == 0
    assert "galore does not fit" in capsys.readouterr().out


def test_configurations_of_hugging_face(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen2Config(
        hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=90, tie_word_embeddings=True,
        architectures=["Qwen2ForCausalLM"])
    config.save_pretrained(tmp_path)
    model = transformers.Qwen2ForCausalLM(config)
    for place in (tmp_path, tmp_path / "config.json"):
        assert memory.main(["--config", str(place), "--optimizer", "galore", "--json", "-"]) == 0
        (row,) = json.loads(capsys.readouterr().out)
        assert row["rank"] == 16
        assert row["parameters"] == sum(p.numel() for p in model.parameters())
        assert row["activations"] > 0
        # the tied table, while its two gradients are summed
        assert row["gradients"] == 2 * row["parameters"] + 2 * 2 * 90 * 64


def test_sharded_gradients_are_projected():
    """In a row and in a line of code, with a layer's gradients in one buffer."""
    source = sources.from_name("tiny")
    given = {"dtype": torch.float32, "batch": 1, "length": 16}
    (plain, *_), (one, two) = (
        memory.estimate(source, "galore", 16, ranks=(1, 2), in_backward=mode, **given)
        for mode in ("none", "project"))
    assert one["gradients"] < two["gradients"] + one["gradients"] / 2 < plain["gradients"]
    for ranks in (1, 2):
        found = budget.choices(source, 1 << 30, reserve=0, ranks=ranks, optimizers=("galore",),
                               in_backward="project", **given)
        assert {x.in_backward for x in found} == {"project"}


def test_measuring_on_the_command_line(capsys):
    assert memory.main(["--model", "tiny", "--measure", "--device", "cpu", "--optimizers", "galore",
                        "--length", "8", "--steps", "2", "--in-backward", "update",
                        "--json", "-"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["weights"] == 2 * sum(p.numel() for p in empty("tiny").parameters())
    assert row["in_backward"] == "update"
    assert row["gradients"] == 0


def test_refusals(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nobody knows it"}))
    for argv in (["--optimizers", "adam"], ["--ranks", "0"], ["--ranks", "two"], ["--batch", "0"],
                 ["--budget", "much"], ["--config", "absent"], ["--config", str(tmp_path)],
                 ["--module", "absent:factory"], ["--module", "tests.test_memory:absent"],
                 ["--budget", "1GB", "--ranks", "1,2"], ["--rank", "0"], ["--rank", "-3"],
                 ["--budget", "1GB", "--optimizers", "torch-adamw"], ["--steps", "1"]):
        with pytest.raises(SystemExit):
            memory.main(argv)
        assert "must be" in capsys.readouterr().err
