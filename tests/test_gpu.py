"""What a CPU cannot show: mixed precision with its loss scale, Inductor, sharding, and waits for the device.

The rest of the method is tested on a GPU by the tests of the other modules (`make test-gpu`).
"""

import traceback
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny
import torch
from peft import LoraConfig
from test_backends import launch, needs_deepspeed
from test_instruments import gaps, instruments_at, record
from test_noise import IDS, backends, gradients, perturbed_model
from test_trainer import STOCK_DEFAULTS, assert_equal
from trl import GRPOTrainer

import trl_alp
from trl_alp import ALPGRPOTrainer, LayerwisePerturbation
from trl_alp.perturbation import noise_seed


SOURCE, TORCH = str(Path(trl_alp.__file__).parent), str(Path(torch.__file__).parent)
pytestmark = pytest.mark.skipif(tiny.DEVICE != "cuda", reason="needs a GPU, see `make test-gpu`")


# ---- Precision ----


@pytest.mark.parametrize("settings", [{}, {"steps_per_generation": 2, "num_iterations": 2}], ids=["fresh", "reused"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_bypass_with_trls_defaults_is_stock_grpo_bit_for_bit_under_bf16_autocast(tmp_path, settings, checkpointing):
    runs = []
    for trainer_class, ours in ((GRPOTrainer, {}), (ALPGRPOTrainer, {"alp_enabled": False, "alp_dual_clip": None})):
        ours = ours | STOCK_DEFAULTS if ours else ours
        settings = settings | {"bf16": True, "gradient_checkpointing": checkpointing, "max_steps": 4}
        trainer = tiny.trainer(tmp_path, trainer_class, **settings, **ours)
        trainer.train()
        runs.append(tiny.parameters(trainer.model))
    assert_equal(*runs)


def test_under_fp16_sigma_skips_the_steps_that_the_scaler_skips_and_sees_no_loss_scale(tmp_path):
    trainer = tiny.trainer(tmp_path, fp16=True, bf16=None, max_steps=12, alp_sigma_lr=0.05)
    steps = []
    trainer.sigma_optimizer.adam.register_step_post_hook(lambda *args: steps.append(1))
    trainer.train()
    # The scaler begins at 2**16 and halves its scale at each step it skips.
    skipped = round(16 - torch.tensor(trainer.accelerator.scaler.get_scale()).log2().item())
    assert len(steps) == 12 - skipped > 0
    norms = [row["alp/sigma/grad_norm"] for row in trainer.state.log_history if "alp/sigma/grad_norm" in row]
    assert min(norms) < 1  # about 0.01 here; with the loss scale in it, hundreds


@pytest.mark.parametrize("lora", [False, True])
def test_a_run_under_fp16_resumes_exactly(tmp_path, lora):
    settings = {"fp16": True, "bf16": None, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    settings |= {"alp_sigma_lr": 0.05, "steps_per_generation": 4, "gradient_checkpointing": True}
    if lora:
        settings["peft_config"] = LoraConfig(target_modules=["q_proj", "v_proj"])
    whole = tiny.trainer(tmp_path / "whole", **settings)
    whole.train()
    resumed = tiny.trainer(tmp_path / "resumed", policy=tiny.model(), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_equal(tiny.parameters(whole.model), tiny.parameters(resumed.model))
    assert torch.equal(whole.perturbation.log_sigma, resumed.perturbation.log_sigma)


# ---- torch.compile ----


def distance(one: list[torch.Tensor], other: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([(a - b).norm() for a, b in zip(one, other, strict=True)]).norm()


@backends
def test_a_model_compiled_by_inductor_meets_the_noise_of_the_eager_one(backend):
    torch.compiler.reset()
    model, perturbation = perturbed_model(backend)
    compiled = torch.compile(model)
    eager, other_noise = gradients(model, perturbation, 0), gradients(model, perturbation, 1)
    # Inductor adds in another order and takes other kernels for the attention, which is little beside other noise.
    assert distance(gradients(compiled, perturbation, 0), eager) < 0.05 * distance(other_noise, eager)


def test_a_compiled_run_trains_policy_and_sigma_and_generates_without_noise(tmp_path):
    torch.compiler.reset()
    trainer = tiny.trainer(tmp_path, torch_compile=True, bf16=True, alp_sigma_lr=0.05, alp_monitor_every=1)
    before, sigma = tiny.parameters(trainer.model), trainer.perturbation.sigma
    trainer.train()
    assert any(not torch.equal(before[name], value) for name, value in tiny.parameters(trainer.model).items())
    assert not torch.equal(sigma, trainer.perturbation.sigma)
    row = trainer.state.log_history[0]
    assert row["alp/noise/effective/mean"] == pytest.approx(1, abs=0.2) and row["alp/noise/kl/k3"] > 0


# ---- Waits for the device ----


@contextmanager
def waits():
    """Collects the lines of this package at which the host waits for the device."""
    found = []

    def show(message, *args, **kwargs):
        frames = [frame for frame in traceback.extract_stack()[:-1] if "/warnings.py" not in frame.filename]
        caller = next(frame for frame in reversed(frames) if not frame.filename.startswith(TORCH))
        if "synchroniz" in str(message) and caller.filename.startswith(SOURCE):
            found.append(f"{caller.filename}:{caller.lineno} {caller.line}")

    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = show
            yield found
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("checkpointing", [False, True])
@backends
def test_no_line_of_the_package_waits_for_the_device_within_a_micro_batch(tmp_path, backend, checkpointing):
    trainer = tiny.trainer(
        tmp_path, rollout_func=tiny.rollout_func(0.1), steps_per_generation=2, gradient_accumulation_steps=2,
        alp_monitor_every=1, max_steps=2, alp_noise_backend=backend, gradient_checkpointing=checkpointing, bf16=True,
    )  # fmt: skip
    seen = []

    def watched(function):
        def inner(*args, **kwargs):
            with waits() as found:
                result = function(*args, **kwargs)
            seen.append(found)
            return result

        return inner

    trainer._compute_loss = watched(trainer._compute_loss)
    trainer.accelerator.backward = watched(trainer.accelerator.backward)
    trainer.train()
    assert seen == [[]] * 8


def test_a_wait_for_the_device_would_be_seen(tmp_path):
    instruments = record(instruments_at(tmp_path), gaps(0.02))
    with waits() as found:
        instruments.flush(1)
    assert any("mismatch.py" in line for line in found)


# ---- Sharding ----


def test_under_fsdp2_through_accelerate_sigma_is_trained_saved_and_shared(tmp_path):
    processes = min(2, torch.cuda.device_count())
    ranks = launch(tmp_path, processes, gpu=True, fsdp2=1, gradient_checkpointing=1)
    assert all(state["sharded"] and state["sigma_steps"] == 2 for state in ranks)
    assert [seed for pair in zip(*[r["seeds"] for r in ranks], strict=True) for seed in pair] == [
        noise_seed(3, i) for i in range(2 * processes)
    ]
    assert ranks[0]["log_sigma"].std() > 0 and torch.equal(ranks[0]["log_sigma"], ranks[-1]["log_sigma"])
    assert (tmp_path / "checkpoint-2" / "alp_state.pt").is_file()


@needs_deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_under_deepspeed_sigma_steps_with_the_policy_and_resumes(tmp_path, stage):
    processes = min(2, torch.cuda.device_count())
    whole = launch(tmp_path / "whole", processes, gpu=True, zero=stage, max_steps=4)
    assert [state["wrapper"] for state in whole] == ["DeepSpeedEngine"] * processes
    assert [(state["policy_steps"], state["sigma_steps"]) for state in whole] == [(4, 4)] * processes
    assert whole[0]["log_sigma"].std() > 0 and torch.equal(whole[0]["log_sigma"], whole[-1]["log_sigma"])
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    resumed = launch(tmp_path / "resumed", processes, gpu=True, zero=stage, max_steps=4, resume=checkpoint)
    assert [state["seeds"] for state in resumed] == [state["seeds"][2:] for state in whole]
    assert [state["sigma_steps"] for state in resumed] == [2] * processes


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_spread_over_two_gpus_trains_sigma_on_both(tmp_path):
    from accelerate import dispatch_model

    model = tiny.model(layers=4).train()
    places = {"lm_head": 0} | {f"model.{name}": 0 for name in ("embed_tokens", "norm", "rotary_emb")}
    places |= {f"model.layers.{i}": i // 2 for i in range(4)}
    perturbation = LayerwisePerturbation(dispatch_model(model, places), sigma_init=0.1).to(tiny.DEVICE)
    with perturbation.applied(3):
        model(IDS, labels=IDS, use_cache=False).loss.backward()
    assert (perturbation.log_sigma.grad != 0).all()
