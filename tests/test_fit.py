"""Sigma by measurement: the noise is as far from the policy as the policy is from the one that sampled."""

import copy
import math

import pytest
import tiny
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model

from trl_alp import LayerwisePerturbation
from trl_alp.channels import ChannelScale
from trl_alp.fit import SigmaFit


FITTED = {"alp_noise_target": 1.0, "alp_monitor_every": 1}


def logps_of(model, ids):
    """Of each token but the first.  # (B, T - 1)"""
    logits = model(input_ids=ids).logits[:, :-1].float()
    return logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]


def rounded(model, bits):
    """A copy as an engine may hold it: in bf16, or its matrices rounded to so many bits a row."""
    engine = copy.deepcopy(model)
    for weight in engine.parameters():
        if bits == "bf16":
            weight.data = weight.data.bfloat16().float()
        elif weight.dim() == 2:
            step = weight.data.abs().amax(1, keepdim=True).clamp(min=1e-9) / (2 ** (bits - 1) - 1)
            weight.data = (weight.data / step).round() * step
    return engine


def mean_k3(log_ratio):
    return (log_ratio.expm1() - log_ratio).mean().item()


@pytest.mark.parametrize("noise_scale", ["rms", "absolute", "channel"])
@pytest.mark.parametrize("bits", ["bf16", 8, 5])
@pytest.mark.parametrize("lora", [False, True])
@torch.no_grad()
def test_the_fitted_sigma_is_that_of_bisection(bits, lora, noise_scale):
    model = tiny.model(layers=4)
    if lora:
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(3, 40, (256, 4), generator=generator).to(tiny.DEVICE)
    torch.manual_seed(0)
    engine = rounded(model, bits)
    # Noise makes a random direction of the padding token's embedding, which is zero, however small it is.
    ids = engine.generate(
        input_ids=prompt, max_new_tokens=12, min_new_tokens=12, do_sample=True, top_k=0, suppress_tokens=[0, 1, 2]
    )
    behaviour, plain = logps_of(engine, ids)[:, 3:], logps_of(model, ids)[:, 3:]
    perturbation = LayerwisePerturbation(model, sigma_init=0.01, noise_scale=noise_scale).to(tiny.DEVICE)
    scale = ChannelScale(perturbation)
    with scale.measured():
        logps_of(model, ids)
    scale.update()

    def noisy(seed):
        with perturbation.applied(seed):
            return logps_of(model, ids)[:, 3:]

    fit = SigmaFit(perturbation, Accelerator(cpu=tiny.DEVICE == "cpu"), target=1.0)
    fit.record(noisy(0), plain, behaviour, torch.ones_like(plain))
    fit.on_optimizer_step(None, None, None)
    low, high = math.log(1e-6), math.log(0.5)
    for _ in range(12):
        perturbation.log_sigma.fill_((low + high) / 2)
        noise = sum(mean_k3(noisy(seed) - plain) for seed in range(1, 6)) / 5
        low, high = (low, (low + high) / 2) if noise > mean_k3(plain - behaviour) else ((low + high) / 2, high)
    assert fit.metrics()["alp/noise/fit/sigma"] == pytest.approx(math.exp(low), rel=0.2)


def test_a_run_fits_sigma_logs_both_divergences_and_says_so_unasked(tmp_path, caplog):
    settings = {"max_steps": 8, "per_device_train_batch_size": 64, "learning_rate": 1e-5, **FITTED}
    trainer = tiny.trainer(tmp_path, rollout_func=tiny.rollout_func(0.1), **settings)
    trainer.train()
    rows = [row for row in tiny.history(trainer) if "alp/noise/fit/sigma" in row]
    assert len(rows) == 8 and all(row["alp/noise/fit/target"] == 1 for row in rows)
    first, last = rows[0], rows[-1]
    asked = 0.01 * math.sqrt(first["alp/noise/fit/k3_mismatch"] / first["alp/noise/fit/k3_noise"])
    assert first["alp/noise/fit/sigma"] == pytest.approx(asked, rel=1e-4)
    assert first["alp/noise/fit/k3_mismatch"] == pytest.approx(first["alp/noise_off/fresh/kl/k3"], rel=1e-3)
    assert first["alp/noise/fit/k3_noise"] == pytest.approx(first["alp/noise/kl/k3"], rel=1e-3)
    assert 0.5 < last["alp/noise/fit/k3_noise"] / last["alp/noise/fit/k3_mismatch"] < 2
    (said,) = [line for line in caplog.messages if "alp_noise_target=1" in line]
    assert "nats (k3)" in said and f"Sigma is now {first['alp/noise/fit/sigma']:.2g}" in said
    assert not any("It is too small to act" in line or "larger than what" in line for line in caplog.messages)


def test_sigma_learns_how_it_differs_between_layers_and_the_fit_its_mean(tmp_path):
    settings = {"alp_sigma_lr": 0.5, "max_steps": 4, "per_device_train_batch_size": 64, **FITTED}
    trainer = tiny.trainer(tmp_path, rollout_func=tiny.rollout_func(0.1), **settings)
    trainer.train()
    rows = [row["alp/noise/fit/sigma"] for row in tiny.history(trainer) if "alp/noise/fit/sigma" in row]
    log_sigma = trainer.perturbation.log_sigma.detach()
    assert log_sigma.max() - log_sigma.min() > 0.1
    assert log_sigma.mean().exp().item() == pytest.approx(rows[-1], rel=1e-5)


def test_stale_rollouts_do_not_enter(tmp_path):
    settings = {"steps_per_generation": 4, "num_iterations": 2, "max_steps": 16, "per_device_train_batch_size": 16}
    settings["max_completion_length"] = 16
    trainer = tiny.trainer(tmp_path, rollout_func=tiny.rollout_func(0.1), **settings | FITTED)
    fits, fit = [], trainer.sigma_fit.fit
    trainer.sigma_fit.fit = lambda *sums: fits.append(trainer.state.global_step) or fit(*sums)
    trainer.train()
    assert fits == [0, 8]


def test_without_a_mismatch_sigma_goes_to_its_lower_bound_and_says_so_once(tmp_path, caplog):
    """As without an engine, where the behaviour policy is the policy itself."""
    settings = {"max_steps": 3, "per_device_train_batch_size": 64, "learning_rate": 1e-8, **FITTED}
    trainer = tiny.trainer(tmp_path, **settings)
    trainer.train()
    assert trainer.perturbation.sigma.tolist() == pytest.approx([1e-6] * 2, rel=1e-3)
    assert sum("nothing for the noise to cover" in line for line in caplog.messages) == 1


def test_without_an_engine_the_arithmetic_of_16_bits_is_no_mismatch(tmp_path, caplog):
    """Scored in another batch shape, bf16 log-probs of the same policy differ by far more than the floor."""
    settings = {"max_steps": 2, "per_device_train_batch_size": 64, "learning_rate": 1e-8, "bf16": True, **FITTED}
    trainer = tiny.trainer(tmp_path, alp_sigma_min=1e-4, **settings)
    trainer.train()
    assert trainer.perturbation.sigma.tolist() == pytest.approx([1e-4] * 2, rel=1e-3)
    assert sum("nothing for the noise to cover" in line for line in caplog.messages) == 1


def test_tokens_of_tools_do_not_enter(tmp_path):
    """Their log-probs are 100 nats off, in every second token."""
    inner = tiny.rollout_func(0.1)

    def rollout(batch, trainer):
        out = inner(batch, trainer)
        out["env_mask"] = [[1 - i % 2 for i in range(len(ids))] for ids in out["completion_ids"]]
        out["logprobs"] = [[value - 100 * (i % 2) for i, value in enumerate(row)] for row in out["logprobs"]]
        return out

    trainer = tiny.trainer(tmp_path, rollout_func=rollout, max_steps=1, per_device_train_batch_size=64, **FITTED)
    trainer.train()
    row = tiny.history(trainer)[0]
    assert row["alp/noise/fit/k3_mismatch"] == pytest.approx(row["alp/noise_off/fresh/kl/k3"], rel=1e-3)
    assert row["alp/noise/fit/k3_mismatch"] < 0.02 and row["alp/noise/fit/sigma"] < 0.1


def test_sigma_rises_tenfold_at_most_in_one_measurement_and_goes_on_in_the_next():
    perturbation = LayerwisePerturbation(tiny.model(), sigma_init=1e-5)
    fit = SigmaFit(perturbation, Accelerator(cpu=True), target=1.0)
    levels = []
    for noise in (0.0, 1e-9, 1e-4):  # at first it is lost in rounding
        fit.fit(100 * noise, 100 * 9e-4, 100)
        levels.append(fit.level)
    assert levels == pytest.approx([1e-4, 1e-3, 3e-3], rel=1e-4)
    fit.fit(100 * 4e-3, 100 * 1e-3, 100)  # twice too large: a quarter of the way, in log space
    assert fit.level == pytest.approx(3e-3 * 0.5**0.25, rel=1e-4)


def test_too_few_tokens_are_kept_for_the_next_measurement_and_a_run_that_had_no_more_says_so(tmp_path, caplog):
    trainer = tiny.trainer(
        tmp_path, rollout_func=tiny.rollout_func(0.1), max_completion_length=2, max_steps=1, **FITTED
    )
    trainer.train()
    kept = trainer.sigma_fit.state_dict()["kept"][2]
    assert trainer.sigma_fit.level == pytest.approx(0.01) and 0 < kept <= 16
    (said,) = [line for line in caplog.messages if "sigma was never fitted" in line]
    assert f"{kept:.0f} tokens were measured, and 64 are needed" in said


def test_it_works_for_noise_that_is_not_learned(tmp_path):
    settings = {"alp_learn_sigma": False, "per_device_train_batch_size": 64, "max_steps": 1}
    trainer = tiny.trainer(tmp_path, rollout_func=tiny.rollout_func(0.1), **settings, **FITTED)
    trainer.train()
    assert trainer.perturbation.sigma.tolist() == pytest.approx([trainer.sigma_fit.level] * 2) != [0.01] * 2


@pytest.mark.parametrize("settings", [{}, {"alp_learn_sigma": False}, {"gradient_accumulation_steps": 2}])
def test_a_fitted_run_resumes_exactly(tmp_path, settings):
    settings = (
        {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "max_completion_length": 4} | settings | FITTED
    )
    torch.manual_seed(0)
    whole = tiny.trainer(tmp_path / "whole", rollout_func=tiny.rollout_func(0.1), **settings)
    whole.train()
    resumed = tiny.trainer(tmp_path / "resumed", rollout_func=tiny.rollout_func(0.1), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert torch.equal(whole.perturbation.log_sigma, resumed.perturbation.log_sigma)
    assert whole.sigma_fit.state_dict() == resumed.sigma_fit.state_dict() and whole.sigma_fit.state_dict()["fitted"]


def test_a_checkpoint_of_fixed_noise_goes_on_fitted(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "per_device_train_batch_size": 64}
    tiny.trainer(tmp_path, rollout_func=tiny.rollout_func(0.1), **settings).train()
    resumed = tiny.trainer(tmp_path / "resumed", rollout_func=tiny.rollout_func(0.1), **settings, **FITTED)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert resumed.sigma_fit.state_dict()["fitted"] == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alp_noise_target": 0}, "alp_noise_target=0 must be a finite, positive number"),
        ({"alp_noise_target": math.inf}, "alp_noise_target=inf must be"),
        ({"alp_noise_target": True}, "alp_noise_target=True must be"),
        ({"alp_noise_target": 1.0, "alp_monitor_every": 0}, "alp_monitor_every=0 turns that off"),
    ],
)
def test_a_target_that_cannot_be_met_is_an_error(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        tiny.config(tmp_path, **settings)
