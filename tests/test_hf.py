"""Trainer and Accelerate: train on real text, save, resume, compare.

Text is the source of a module of the standard library, its bytes the tokens. "Equal" is bit for
bit, weights and state, unless a tolerance stands there.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lissom.optim import (
    AdamW,
    AdamW8bit,
    FiraAdamW,
    GaLoreAdamW,
    GaLoreAdamW8bit,
    GradNormLoRPAdamW,
    Muon,
    SwitchLoRAAdamW,
    adapter_groups,
    lora,
    param_groups,
    project_in_backward,
)

from .helpers import assert_same

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")
hf = importlib.import_module("lissom.optim.hf")

LENGTH = 32


def text(count: int) -> list[dict[str, torch.Tensor]]:
    """Rows of bytes, one after the other."""
    data = Path(argparse.__file__).read_bytes()[:count * LENGTH]
    rows = torch.frombuffer(bytearray(data), dtype=torch.uint8).long().view(-1, LENGTH)
    return [{"input_ids": row, "labels": row} for row in rows]


def llama(dtype: torch.dtype = torch.float32) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=LENGTH)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config).to(dtype)


def arguments(folder: Path, **options: Any) -> Any:
    """Eight updates; a checkpoint after the fifth, between two refreshes of most bases."""
    return transformers.TrainingArguments(**{
        "output_dir": str(folder), "use_cpu": True, "report_to": "none", "disable_tqdm": True,
        "max_steps": 8, "save_steps": 5, "logging_steps": 1, "learning_rate": 1e-2,
        "per_device_train_batch_size": 4, "max_grad_norm": 0.0, "warmup_steps": 2,
        "lr_scheduler_type": "cosine", **options})


def losses(trainer: Any) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def result(trainer: Any) -> dict[str, Any]:
    """Weights and state of the optimizer, without buffers that come and go."""
    saved = trainer.optimizer.state_dict()
    state = {i: {k: x for k, x in s.items() if not k.startswith("projected")}
             for i, s in saved["state"].items()}
    return {"weights": trainer.model.state_dict(), "state": state, "groups": saved["param_groups"]}


def trained(folder: Path, how: Any, *, dtype: torch.dtype = torch.float32, callbacks: Any = (),
            resume: Path | None = None, prepare: Any = lambda model: model,
            before: Any = lambda trainer: None, **options: Any) -> Any:
    """A Trainer after its training; ``how`` says from model and arguments how it gets ours."""
    model, args = prepare(llama(dtype)), arguments(folder, **options)
    trainer = transformers.Trainer(model, args, train_dataset=text(200),
                                   callbacks=list(callbacks), **how(model, args))
    before(trainer)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def made(cls: Any, **options: Any) -> Any:
    """By ``optimizers=``."""
    return lambda model, args: {"optimizers": (
        cls(param_groups(model, rank=8), lr=1e-2, **options), None)}


def asked(cls: Any, **options: Any) -> Any:
    """By ``optimizer_cls_and_kwargs=``."""
    return lambda model, args: {
        "optimizer_cls_and_kwargs": hf.trainer_optimizer(cls, args, rank=8, **options)}


def given(cls: Any, **options: Any) -> Any:
    """The same without help: the Trainer takes ``params`` in place of its own groups."""
    return lambda model, args: {"optimizer_cls_and_kwargs": (
        cls, {"params": param_groups(model, rank=8), "lr": args.learning_rate, **options})}


def project(**options: Any) -> Any:
    return lambda: [hf.ProjectInBackwardCallback(**options)]


def dora(model: Any) -> Any:
    """With adapters of peft."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(
        r=4, target_modules="all-linear", use_dora=True))


# name: how the Trainer gets the optimizer, its arguments, callbacks
RUNS: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "adamw": (asked(AdamW), {}, list),
    "galore": (made(GaLoreAdamW, update_proj_gap=3), {}, list),
    "galore-8bit": (asked(GaLoreAdamW8bit, update_proj_gap=3), {"weight_decay": 0.1}, list),
    "fira-accumulation-clipping": (
        asked(FiraAdamW, update_proj_gap=3),
        {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5}, list),
    "muon-kwargs": (given(Muon, lr_adamw=1e-2), {"max_grad_norm": 1.0}, list),
    "bf16": (asked(GaLoreAdamW, update_proj_gap=3), {"bf16": True}, list),
    "bf16-weights-8bit": (asked(AdamW8bit), {"bf16": True, "dtype": torch.bfloat16}, list),
    "project": (made(GaLoreAdamW, update_proj_gap=3), {}, project()),
    "project-accumulation-clipping": (
        asked(GaLoreAdamW8bit, update_proj_gap=4), {"gradient_accumulation_steps": 2},
        project(max_grad_norm=0.5)),
    "update": (asked(Muon), {}, lambda: [hf.UpdateInBackwardCallback()]),
    "dora": (asked(GradNormLoRPAdamW, groups=lambda model: adapter_groups(model, rank=2)),
             {"prepare": dora, "learning_rate": 0.1}, list),
    "pairs": (asked(SwitchLoRAAdamW, groups=adapter_groups, decay_steps=4),
              {"prepare": lambda model: lora(model, rank=4)}, list),
}


@pytest.mark.parametrize("name", RUNS)
def test_resumed_training_is_the_uninterrupted_one(name, tmp_path):
    how, options, callbacks = RUNS[name]
    straight = trained(tmp_path / "a", how, callbacks=callbacks(), **options)
    assert losses(straight)[-1] < losses(straight)[0]
    assert type(straight.optimizer.optimizer).__module__.startswith("lissom")
    if "8bit" in name:  # codes, of low-rank matrices where there are some
        states = list(result(straight)["state"].values())
        states = [s for s in states if "basis_step" in s] or states
        assert any(x.dtype == torch.uint8 for s in states for x in s.values())
    resumed = trained(tmp_path / "b", how, callbacks=callbacks(),
                      resume=tmp_path / "a/checkpoint-5", **options)
    assert len(losses(resumed)) == 8
    assert losses(resumed) == losses(straight)
    assert_same(result(resumed), result(straight))


class Watch(transformers.TrainerCallback):
    """Gradients that are there before each step."""

    def __init__(self) -> None:
        self.matrices: list[int] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, *, model: Any = None,
                              **kwargs: Any) -> None:
        self.matrices.append(sum(p.grad is not None for name, p in model.named_parameters()
                                 if "proj" in name))


def test_projected_in_backward_is_the_ordinary_step(tmp_path):
    """Bit for bit; so a checkpoint may be resumed with and without the callback."""
    how, watch = asked(GaLoreAdamW, update_proj_gap=3), Watch()
    plain = trained(tmp_path / "a", how)
    callback = hf.ProjectInBackwardCallback()
    projected = trained(tmp_path / "b", how, callbacks=[callback, watch])
    assert watch.matrices == [0] * 8
    assert callback.handle is None
    assert not projected.optimizer.optimizer._gradients.in_backward
    assert_same(result(projected), result(plain))
    for callbacks, folder in ((project()(), "a"), ([], "b")):
        resumed = trained(tmp_path / "c", how, callbacks=callbacks,
                          resume=tmp_path / folder / "checkpoint-5")
        assert_same(result(resumed), result(plain))


def test_projected_in_backward_with_accumulation(tmp_path):
    """Two micro-batches are summed before or after the projection, so rounding differs: in eight
    steps by less than 1e-4. Only matrices that are refreshed keep their gradients.
    """
    how, watch = asked(GaLoreAdamW, update_proj_gap=4), Watch()
    plain = trained(tmp_path / "a", how, gradient_accumulation_steps=2)
    projected = trained(tmp_path / "b", how, gradient_accumulation_steps=2,
                        callbacks=[hf.ProjectInBackwardCallback(), watch])
    assert watch.matrices[0] == 14
    assert max(watch.matrices[1:]) <= 4  # ceil(14 / 4)
    torch.testing.assert_close(projected.model.state_dict(), plain.model.state_dict(),
                               rtol=0, atol=1e-4)


def test_projected_in_backward_clips_by_the_norm_of_all(tmp_path):
    """By the exact norm it is what the Trainer does; its sum is of other parts, hence 1e-4."""
    how = asked(GaLoreAdamW, update_proj_gap=4)
    plain = trained(tmp_path / "a", how, max_grad_norm=0.5)
    free = trained(tmp_path / "b", how)
    callback = hf.ProjectInBackwardCallback(max_grad_norm=0.5, exact_norm=True)
    projected = trained(tmp_path / "c", how, callbacks=[callback])
    weights = projected.model.state_dict()
    torch.testing.assert_close(weights, plain.model.state_dict(), rtol=0, atol=1e-4)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(weights, free.model.state_dict(), rtol=0, atol=1e-3)


def test_updated_in_backward_is_the_ordinary_step(tmp_path):
    plain, watch = trained(tmp_path / "a", asked(Muon)), Watch()
    updated = trained(tmp_path / "b", asked(Muon), callbacks=[hf.UpdateInBackwardCallback(), watch])
    assert watch.matrices == [0] * 8
    assert_same(result(updated), result(plain))


@pytest.mark.parametrize(("callback", "how", "options", "message"), [
    (hf.ProjectInBackwardCallback, asked(GaLoreAdamW), {"max_grad_norm": 1.0},
     r"max_grad_norm=1\.0, but it must be 0.*ProjectInBackwardCallback\(max_grad_norm=1\.0\)"),
    (hf.UpdateInBackwardCallback, asked(GaLoreAdamW), {"max_grad_norm": 1.0},
     r"UpdateInBackwardCallback\(max_grad_norm=1\.0\)"),
    (hf.UpdateInBackwardCallback, asked(GaLoreAdamW), {"gradient_accumulation_steps": 2},
     r"gradient_accumulation_steps=2, but it must be 1.*ProjectInBackwardCallback"),
    (hf.ProjectInBackwardCallback, asked(FiraAdamW), {}, "residual='fira', which needs the full"),
    (hf.ProjectInBackwardCallback, lambda model, args: {}, {}, "must be one of lissom.optim"),
])
def test_what_a_callback_refuses(callback, how, options, message, tmp_path):
    with pytest.raises((ValueError, TypeError), match=message):
        trained(tmp_path, how, callbacks=[callback()], **options)


def test_arguments_are_checked_at_the_door(tmp_path):
    with pytest.raises(ValueError, match=r"max_grad_norm=-1\.0, but it must be .* number > 0"):
        hf.ProjectInBackwardCallback(max_grad_norm=-1.0)
    with pytest.raises(TypeError, match="UpdateInBackwardCallback: max_grad_norm='1'"):
        hf.UpdateInBackwardCallback(max_grad_norm="1")
    with pytest.raises(TypeError, match=r"cls=.*must be a class of lissom\.optim"):
        hf.trainer_optimizer(torch.optim.AdamW, arguments(tmp_path))


def test_a_training_that_failed_can_be_repeated(tmp_path):
    """An error leaves the handle on; the next training takes it off first."""
    class Stop(transformers.TrainerCallback):
        def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
            raise ZeroDivisionError

    model, args = llama(), arguments(tmp_path, gradient_accumulation_steps=2, max_steps=2)
    trainer = transformers.Trainer(
        model, args, train_dataset=text(20), callbacks=[hf.ProjectInBackwardCallback(), Stop()],
        **asked(GaLoreAdamW)(model, args))
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    trainer.remove_callback(Stop)
    trainer.train()
    assert trainer.state.global_step == 2
    assert not trainer.optimizer.optimizer._gradients.in_backward


def test_the_arguments_of_the_trainer_are_the_optimizers(tmp_path):
    args = arguments(tmp_path, learning_rate=3e-3, weight_decay=0.2, adam_beta1=0.8,
                     adam_beta2=0.95, adam_epsilon=1e-7)
    trainer = transformers.Trainer(
        args=args, model_init=llama, optimizer_cls_and_kwargs=hf.trainer_optimizer(
            GaLoreAdamW, args, rank=0.25, scale=1.0, eps=1e-9))
    optimizer = trainer.create_optimizer()
    plan = {row.name: row for row in optimizer.plan()}
    assert plan["model.layers.0.mlp.up_proj.weight"].rank == 8
    assert plan["lm_head.weight"].rule == plan["model.embed_tokens.weight"].rule == "adamw"
    groups = {name: g for g in optimizer.param_groups for name in g["param_names"]}
    assert groups["model.norm.weight"]["weight_decay"] == 0
    wide = groups["model.layers.0.mlp.up_proj.weight"]
    assert (wide["lr"], wide["betas"], wide["eps"], wide["weight_decay"], wide["scale"]) == (
        3e-3, (0.8, 0.95), 1e-9, 0.2, 1.0)
    # each trial of a search for hyperparameters has a model of its own
    trainer.optimizer, first = None, optimizer
    trainer.model = trainer.call_model_init()
    assert not {*first.state} & {*trainer.create_optimizer().state}


@pytest.mark.parametrize(("options", "rest"), [({}, 3e-4), ({"lr_adamw": None}, 1e-2)])
def test_the_rate_of_the_arguments_is_the_matrices(options, rest, tmp_path):
    """Of classes whose rest has a rate of its own, which is what the Trainer logs: it is first."""
    args = arguments(tmp_path, learning_rate=1e-2)
    optimizer = transformers.Trainer(
        llama(), args, optimizer_cls_and_kwargs=hf.trainer_optimizer(Muon, args, **options)
    ).create_optimizer()
    rates = {name: g["lr"] for g in optimizer.param_groups for name in g["param_names"]}
    assert {x for name, x in rates.items() if "proj" in name} == {1e-2}
    assert {x for name, x in rates.items() if "proj" not in name} == {rest}
    assert "model.embed_tokens.weight" in optimizer.param_groups[0]["param_names"]


def test_the_grad_scaler_of_fp16_reaches_the_buffers(tmp_path):
    """Accelerate has no fp16 on the CPU: its wrapper and a scaler as the Trainer drives them."""
    args = arguments(tmp_path)
    accelerate.Accelerator(cpu=True)
    batch = {k: x[None] for k, x in text(1)[0].items()}
    weights = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=256.0)):
        model = llama()
        optimizer = GaLoreAdamW(param_groups(model, rank=8), lr=1e-2)
        wrapped = accelerate.optimizer.AcceleratedOptimizer(optimizer, scaler=scaler)
        callback = hf.ProjectInBackwardCallback(max_grad_norm=0.5)
        callback.on_train_begin(args, None, None, optimizer=wrapped)
        for _ in range(3):
            loss = model(**batch).loss
            (loss if scaler is None else scaler.scale(loss)).backward()
            if scaler is not None:
                scaler.unscale_(optimizer)  # for the norm that the Trainer logs
            wrapped.step()
            model.zero_grad()
        callback.on_train_end(args, None, None)
        weights.append(model.state_dict())
    assert_same(*weights)
    with pytest.raises(ValueError, match="fp16=True, but it must be False"):
        hf.UpdateInBackwardCallback().on_train_begin(args, None, None, optimizer=wrapped)


def test_gradient_checkpointing_is_the_same_training(tmp_path):
    """Activations that are computed again give the hooks one gradient each."""
    found = []
    for i, (again, callbacks) in enumerate(((False, []), (True, []), (
            True, [hf.ProjectInBackwardCallback()]), (True, [hf.UpdateInBackwardCallback()]))):
        trainer = trained(tmp_path / str(i), asked(GaLoreAdamW, update_proj_gap=3),
                          callbacks=callbacks, gradient_checkpointing=again)
        found.append(dict(trainer.model.state_dict()))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-5)


def test_without_ddp_refuses_what_it_cannot_do(tmp_path, monkeypatch):
    model = llama()
    how = asked(GaLoreAdamW)(model, arguments(tmp_path))
    build = functools.partial(transformers.Trainer, model, train_dataset=text(8), **how)
    with pytest.raises(ValueError, match=r"without_ddp: the Trainer has no callback"):
        hf.without_ddp(build(arguments(tmp_path)))
    callbacks = [hf.UpdateInBackwardCallback()]
    with pytest.raises(ValueError, match=r"auto_find_batch_size=True, but it must be False"):
        hf.without_ddp(build(arguments(tmp_path, auto_find_batch_size=True), callbacks=callbacks))
    trainer = build(arguments(tmp_path), callbacks=callbacks)
    monkeypatch.setattr(trainer, "is_fsdp_enabled", True)
    with pytest.raises(ValueError, match=r"is_fsdp_enabled is True, but it must be False"):
        hf.without_ddp(trainer)


def test_without_ddp_changes_nothing_in_one_process(tmp_path):
    how, found = asked(Muon), []
    for before in (hf.without_ddp, lambda trainer: None):
        callbacks = [hf.UpdateInBackwardCallback()]
        trainer = trained(tmp_path / str(len(found)), how, callbacks=callbacks, before=before)
        assert not callbacks[0].replicated
        found.append(result(trainer))
    assert_same(*found)


def under_torchrun(folder: Path, engine: str) -> Any:
    """What two ranks of :mod:`tests.trainer_job` have found."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "-m", "tests.trainer_job", str(folder), engine],
        cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False,
        timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"})
    assert not done.returncode, done.stderr
    return torch.load(folder / "results.pt", weights_only=True)


def test_two_ranks_under_torchrun(tmp_path):
    """They resume bit for bit, and differ from one process by less than 1e-5: gradients are
    averaged over ranks.
    """
    straight, resumed, *loops, runs = under_torchrun(tmp_path, "ddp")
    assert_same(resumed, straight)
    torch.testing.assert_close(loops[1], loops[0], rtol=0, atol=1e-5)
    assert len(runs) == 3
    for name, (plain, unwrapped, resumed) in runs.items():
        torch.testing.assert_close(unwrapped["weights"], plain["weights"], rtol=0, atol=1e-5,
                                   msg=lambda text, name=name: f"{name}: {text}")
        assert_same(resumed, unwrapped, name)
    one = trained(tmp_path / "one", asked(GaLoreAdamW, update_proj_gap=3), max_grad_norm=0.5)
    torch.testing.assert_close(straight["weights"], dict(one.model.state_dict()), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_two_ranks_with_fsdp2(tmp_path):
    """They resume, and go where DDP goes; the Trainer makes the optimizer before it shards, and no
    whole weight is left.
    """
    found = under_torchrun(tmp_path, "fsdp2")
    assert len(found) == 6
    for name, run in found.items():
        assert run["left"] == 0, name
        assert_same(run["resumed"], run["straight"], name)
        if name != "bf16":  # whose forward pass is not that of autocast
            ours, theirs = (run[x]["weights"] for x in ("straight", "ddp"))
            codes = sum(x.numel() for one in run["ddp"]["state"].values() for x in one.values()
                        if x.dtype == torch.uint8)
            # Gradients are summed in another order, so that one code in ten thousand may be rounded
            # otherwise: that is seen in one row of a weight, or one column, and nowhere else.
            lines = 0
            for weight, x in ours.items():
                torch.testing.assert_close(x, theirs[weight], rtol=0, atol=3e-5 if codes else 1e-6,
                                           msg=lambda text, at=(name, weight): f"{at}: {text}")
                far = ((x - theirs[weight]).abs() > 1e-6).view(len(x), -1)
                lines += min(int(far.any(dim).sum()) for dim in (0, 1))
            assert lines <= codes // 10_000, name


# -------------------------------------------------------------------- Accelerate


def looped(cls: Any, steps: int, *, save: Path | None = None, load: Path | None = None,
           in_backward: bool = False, precision: str = "no", start: int = 0, ddp: bool = True,
           limit: float = 0.5, **options: Any) -> dict[str, Any]:
    """A loop as Accelerate's pages have it: two micro-batches a step, clipped, on a schedule.

    Without ``ddp`` ranks have their gradients averaged in the backward pass.
    """
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2,
                                         mixed_precision=precision)
    model = llama()
    optimizer = cls(param_groups(model, rank=8), lr=1e-2, **options)
    group = None if ddp else torch.distributed.group.WORLD
    handle = (project_in_backward(optimizer, accumulation=2, process_group=group)
              if in_backward else None)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 / (1 + k))
    loader = torch.utils.data.DataLoader(
        text(4 * 2 * steps * accelerator.num_processes), batch_size=4)
    model = accelerator.prepare_model(model, evaluation_mode=not ddp)
    wrapped, loader, schedule = accelerator.prepare(optimizer, loader, schedule)
    if load is not None:
        accelerator.load_state(str(load))
    losses = []
    rest = accelerator.skip_first_batches(loader, 2 * start) if start else loader
    for step, batch in enumerate(rest, 2 * start):
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                (accelerator.clip_grad_norm_(model.parameters(), limit) if handle is None else
                 handle.clip_grad_norm_(limit))
            wrapped.step()
            schedule.step()
            wrapped.zero_grad()
        losses.append(loss.item())
        if save is not None and step == 2 * 3 - 1:
            accelerator.save_state(str(save))
    assert optimizer is wrapped.optimizer
    return {"losses": losses, "weights": accelerator.unwrap_model(model).state_dict(),
            "state": optimizer.state_dict(), "rates": schedule.get_last_lr()}


@pytest.mark.parametrize(("cls", "options"), [
    (AdamW, {}), (GaLoreAdamW8bit, {"update_proj_gap": 3}), (Muon, {"lr_adamw": 1e-2}),
    (FiraAdamW, {"update_proj_gap": 3, "nonfinite": "skip", "precision": "bf16"}),
    (GaLoreAdamW, {"update_proj_gap": 4, "in_backward": True}),
])
def test_a_loop_of_accelerate_resumes(cls, options, tmp_path):
    straight = looped(cls, 6, save=tmp_path, **options)
    assert straight["losses"][-1] < straight["losses"][0]
    resumed = looped(cls, 6, load=tmp_path, start=3, **options)
    assert resumed["losses"] == straight["losses"][6:]
    for part in ("weights", "state", "rates"):
        assert_same(resumed[part], straight[part], part)


def test_accumulating_with_accelerate_is_accumulating_by_hand():
    """Six steps, weights equal bit for bit; a step in between would be another optimizer."""
    found = looped(GaLoreAdamW, 6)
    model = llama()
    optimizer = GaLoreAdamW(param_groups(model, rank=8), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 / (1 + k))
    batches = list(torch.utils.data.DataLoader(text(48), batch_size=4))
    for first, second in zip(batches[::2], batches[1::2], strict=True):
        for batch in (first, second):
            (model(**batch).loss / 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    assert_same(found["weights"], model.state_dict())


# -------------------------------------------------------------------- docs/integrations.md


def test_code_of_the_page(tmp_path, monkeypatch, capsys):
    """Each block, on a new model, moves it; nothing is projected that should not be."""
    pytest.importorskip("lightning")
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parent.parent / "docs/integrations.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 7
    start = llama().state_dict()
    names: dict[str, Any] = {"data": text(32)}
    for block in blocks:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        model = names["model"] = llama()
        names["loader"] = torch.utils.data.DataLoader(names["data"], batch_size=8)
        exec(block, names)
        moved = {name for name, p in model.named_parameters() if "lora" in name or
                 not torch.equal(p.cpu(), start[name.replace(".base_layer", "")])}
        assert any("q_proj" in name for name in moved), block
        assert all(p.isfinite().all() for p in model.parameters())
    assert "lm_head.weight" in capsys.readouterr().out
    assert list(tmp_path.glob("out/checkpoint-*/optimizer.pt"))
    assert list(tmp_path.glob("saved/optimizer.bin"))
