import gc
import itertools
import json
import math
import os
import re
import types
from collections import Counter

import pytest
import reference
import tiny
import torch
from peft import LoraConfig
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from trl_alp import ALPGRPOConfig, ALPGRPOTrainer, instrument
from trl_alp.alp_watching import ALPWatcher, is_first_fresh, is_monitored
from trl_alp.checks import check_server
from trl_alp.perturbation import noise_seed
from trl_alp.ratio import LEVELS


STOCK_DEFAULTS = {
    "epsilon": 0.2,
    "epsilon_high": None,
    "vllm_importance_sampling_correction": True,
    "use_bias_correction_kl": True,
}
OFF_POLICY = {"steps_per_generation": 2, "num_iterations": 2}


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def first_batch(trainer, seed=0):
    """Rollouts and all that is scored on them, from a given random state."""
    torch.manual_seed(seed)
    trainer.model.train()
    rows = [trainer.train_dataset[i // 4] for i in range(trainer.args.generation_batch_size)]
    return trainer._generate_and_score_completions(rows)


def forwards(trainer, monkeypatch):
    """Record of the scoring forwards: whether each had gradient, and whether the noise was on."""
    seen = []
    score = GRPOTrainer._get_per_token_logps_and_entropies

    def recorded(self, *args, **kwargs):
        seen.append((torch.is_grad_enabled(), self.perturbation.scoring is not None))
        return score(self, *args, **kwargs)

    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", recorded)
    return seen


# ---- What must not change ----


def test_generation_is_bit_identical_with_perturbation_configured(tmp_path):
    completions = []
    for trainer_class in (GRPOTrainer, ALPGRPOTrainer):
        trainer = tiny.trainer(tmp_path, trainer_class)
        completions.append(first_batch(trainer)["completion_ids"])
    assert torch.equal(*completions)


def test_old_and_reference_log_probs_are_bit_identical_to_the_plain_trainers(tmp_path):
    policy = tiny.saved(tmp_path / "policy")
    batches = []
    for trainer_class in (GRPOTrainer, ALPGRPOTrainer):
        trainer = tiny.trainer(tmp_path, trainer_class, policy=policy, beta=0.1, **OFF_POLICY)
        batches.append(first_batch(trainer))
    assert "old_per_token_logps" in batches[0] and "ref_per_token_logps" in batches[0]
    assert_equal(*batches)


def test_evaluation_is_bit_identical_to_the_plain_trainers(tmp_path):
    metrics = []
    for trainer_class in (GRPOTrainer, ALPGRPOTrainer):
        trainer = tiny.trainer(tmp_path, trainer_class, eval_dataset=tiny.prompts(4), num_generations_eval=2)
        torch.manual_seed(0)
        metrics.append({k: v for k, v in trainer.evaluate().items() if not any(t in k for t in ("time", "second"))})
    assert metrics[0] == metrics[1] and "eval_reward" in metrics[0]


def test_evaluation_and_saving_in_the_middle_of_training_see_no_noise(tmp_path):
    plain = tiny.trainer(tmp_path / "a")
    plain.train()
    seen = []

    class Look(TrainerCallback):
        def on_evaluate(self, args, state, control, model=None, **kwargs):
            seen.append(model(tiny.tensor([[5, 6, 7]])).logits)

    trainer = tiny.trainer(
        tmp_path / "b", eval_dataset=tiny.prompts(2), eval_strategy="steps", eval_steps=1, callbacks=[Look()]
    )
    trainer.train()
    assert len(seen) == 2
    assert torch.equal(seen[-1], trainer.model(tiny.tensor([[5, 6, 7]])).logits)


def test_state_dict_and_saved_model_are_those_of_the_plain_model(tmp_path):
    plain = tiny.model()
    trainer = tiny.trainer(tmp_path)
    assert list(trainer.model.state_dict()) == list(plain.state_dict())
    trainer.save_model(tmp_path / "saved")
    GRPOTrainer.save_model(trainer, tmp_path / "by_trl")
    assert sorted(os.listdir(tmp_path / "saved")) == sorted(os.listdir(tmp_path / "by_trl"))
    assert_equal(type(plain).from_pretrained(tmp_path / "saved").to(tiny.DEVICE).state_dict(), plain.state_dict())


def test_an_exception_inside_the_perturbed_forward_leaves_the_noise_off(tmp_path):
    trainer = tiny.trainer(tmp_path)
    ids = tiny.tensor([[5, 6, 7]])
    plain = trainer.model(ids).logits

    def fail(*args):
        if trainer.perturbation.scoring is not None:
            raise RuntimeError("planted")

    handle = trainer.model.model.norm.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="planted"):
        trainer.train()
    handle.remove()
    assert trainer.perturbation.scoring is None
    assert torch.equal(trainer.model(ids).logits, plain)
    trainer.train()  # and it still works


def test_noise_is_on_in_every_update_and_off_in_every_other_forward(tmp_path, monkeypatch):
    trainer = tiny.trainer(
        tmp_path,
        policy=tiny.saved(tmp_path / "policy"),
        beta=0.1,
        eval_dataset=tiny.prompts(2),
        eval_strategy="steps",
        eval_steps=1,
        alp_monitor_every=1,
    )
    seen = forwards(trainer, monkeypatch)
    trainer.train()
    assert all(with_gradient == noise for with_gradient, noise in seen)
    assert sum(noise for _, noise in seen) == 2


def test_two_trainers_in_one_process_do_not_disturb_each_other(tmp_path):
    alone = tiny.trainer(tmp_path / "alone")
    alone.train()
    first, second = (
        tiny.trainer(tmp_path / "first"),
        tiny.trainer(tmp_path / "second", alp_sigma_init=0.1, max_steps=1),
    )

    class Interleave(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            with torch.random.fork_rng():
                second.train()

    first.add_callback(Interleave())
    first.train()
    assert second.state.global_step == 1
    assert_equal(tiny.parameters(first.model), tiny.parameters(alone.model))
    assert torch.equal(first.perturbation.log_sigma, alone.perturbation.log_sigma)


def test_hooks_leave_no_trace_when_the_trainer_is_gone(tmp_path):
    policy = tiny.model()
    trainer = tiny.trainer(tmp_path, policy=policy)
    trainer.train()
    assert any(module._forward_pre_hooks for module in policy.modules())
    del trainer
    gc.collect()
    assert not any(module._forward_pre_hooks for module in policy.modules())


# ---- The method ----


@pytest.mark.parametrize("level", LEVELS)
def test_bypass_equals_an_independent_computation(tmp_path, level):
    trainer = tiny.trainer(tmp_path, alp_enabled=False, alp_ratio_level=level, rollout_func=tiny.rollout_func())
    trainer.current_gradient_accumulation_steps = 1
    batch = first_batch(trainer)
    trainer.compute_loss(trainer.model, batch).backward()
    gradients = [p.grad.clone() for p in trainer.model.parameters()]

    trainer.model.zero_grad()
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    width = batch["completion_ids"].shape[1]
    logits = trainer.model(ids, attention_mask=attention).logits[:, -width - 1 : -1].log_softmax(-1)
    p = logits.gather(-1, batch["completion_ids"][..., None])[..., 0]
    q, mask, advantages = (batch[n] for n in ("sampling_per_token_logps", "completion_mask", "advantages"))
    on_cpu = (each.cpu() for each in (p, q, mask, advantages))
    reference.token_mean(reference.token_losses(*on_cpu, level, 0.5, 3.0, 10.0)).backward()
    rounding = 1e-5 if tiny.DEVICE == "cpu" else 1e-3  # two orders of summation, and of ratios that multiply up
    for ours, parameter in zip(gradients, trainer.model.parameters(), strict=True):
        assert (ours - parameter.grad).norm() < rounding * parameter.grad.norm()


@pytest.mark.parametrize("off_policy", [{}, OFF_POLICY, {"gradient_accumulation_steps": 2}])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_bypass_with_trls_defaults_is_stock_grpo_bit_for_bit(tmp_path, beta, off_policy):
    runs = []
    for trainer_class, ours in ((GRPOTrainer, {}), (ALPGRPOTrainer, {"alp_enabled": False, "alp_dual_clip": None})):
        ours = ours | STOCK_DEFAULTS if ours else ours
        policy = tiny.saved(tmp_path / "policy")
        trainer = tiny.trainer(tmp_path, trainer_class, policy=policy, beta=beta, max_steps=4, **off_policy, **ours)
        trainer.train()
        logs = [{k: v for k, v in row.items() if not k.startswith("alp/")} for row in tiny.history(trainer)]
        runs.append((tiny.parameters(trainer.model), logs))
    assert runs[0][1] == runs[1][1]
    assert_equal(runs[0][0], runs[1][0])


def test_training_with_noise_differs_from_bypass(tmp_path):
    runs = []
    for enabled in (True, False):
        trainer = tiny.trainer(tmp_path, alp_enabled=enabled)
        trainer.train()
        runs.append(trainer.model.lm_head.weight.detach().clone())
    assert not torch.equal(*runs)


@pytest.mark.parametrize("reentrant", [False, True])
def test_run_is_the_same_with_and_without_gradient_checkpointing(tmp_path, reentrant):
    runs = []
    for checkpointing in (False, True):
        trainer = tiny.trainer(
            tmp_path,
            max_steps=4,
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant} if checkpointing else None,
            alp_sigma_init=0.1,
            **OFF_POLICY,
        )
        trainer.train()
        runs.append(tiny.parameters(trainer.model) | {"log_sigma": trainer.perturbation.log_sigma.detach().clone()})
    assert_equal(*runs)


def test_without_the_engines_log_probs_the_denominator_is_the_unperturbed_policy(tmp_path):
    # TRL's shortcut for on-policy batches would take the perturbed policy: ratio 1, silently not ALP.
    trainer = tiny.trainer(tmp_path, alp_sigma_init=0.1)
    batch = first_batch(trainer)
    with torch.no_grad():
        expected, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model,
            torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1),
            torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1),
            batch["completion_ids"].shape[1],
        )
    assert torch.equal(batch["old_per_token_logps"], expected)
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["alp/log_ratio/max"] > 0.01 > -0.01 > first["alp/log_ratio/min"]


@pytest.mark.parametrize("settings", [{}, OFF_POLICY, {"gradient_accumulation_steps": 2, "steps_per_generation": 1}])
def test_no_old_policy_forward_with_the_engines_log_probs_at_hand(tmp_path, monkeypatch, settings):
    settings = {"rollout_func": tiny.rollout_func(), "max_steps": 4, "alp_monitor_every": 0} | settings
    trainer = tiny.trainer(tmp_path, **settings)
    seen = forwards(trainer, monkeypatch)
    trainer.train()
    assert seen == [(True, True)] * 4 * settings.get("gradient_accumulation_steps", 1)


def test_reference_forward_is_made_where_the_old_policys_is_not(tmp_path, monkeypatch):
    # With LoRA both passes run the same modules, so the wrong one could be left out unseen.
    trainer = tiny.trainer(
        tmp_path,
        rollout_func=tiny.rollout_func(),
        beta=0.1,
        peft_config=LoraConfig(target_modules=["q_proj"]),
        **OFF_POLICY,
    )
    seen = forwards(trainer, monkeypatch)
    batch = first_batch(trainer)
    assert seen == [(False, False)]
    assert "old_per_token_logps" not in batch
    assert torch.isfinite(batch["ref_per_token_logps"]).all() and batch["ref_per_token_logps"].min() < -1


def test_the_engines_log_probs_are_the_denominator_in_every_iteration(tmp_path, monkeypatch):
    batches = []
    compute_loss = GRPOTrainer._compute_loss
    trainer = tiny.trainer(
        tmp_path, rollout_func=tiny.rollout_func(), max_steps=4, alp_ratio_level="sequence", **OFF_POLICY
    )

    def recorded(self, model, inputs):
        loss = compute_loss(self, model, inputs)
        batches.append(inputs["sampling_per_token_logps"].clone())
        return loss

    monkeypatch.setattr(GRPOTrainer, "_compute_loss", recorded)
    trainer.train()
    buffered = [batch["sampling_per_token_logps"] for batch in trainer._buffered_inputs]
    assert len(batches) == 4  # 2 slices x 2 iterations
    for i in range(4):
        assert torch.equal(batches[i], buffered[i % 2])


def test_rollouts_without_log_probs_are_scored_by_the_unperturbed_policy(tmp_path, monkeypatch):
    for settings in ({}, OFF_POLICY):
        no_logprobs = tiny.rollout_func()
        trainer = tiny.trainer(
            tmp_path, rollout_func=lambda p, t, f=no_logprobs: f(p, t) | {"logprobs": None}, **settings
        )
        seen = forwards(trainer, monkeypatch)
        batch = first_batch(trainer)
        assert batch["old_per_token_logps"].min() < -1
        assert all(not noise for _, noise in seen)


@pytest.mark.parametrize("dtype", ["fp32", "bf16_autocast", "bf16_weights"])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_trains_policy_and_sigma_in_every_precision(tmp_path, dtype, lora, checkpointing):
    policy = tiny.model(dtype=torch.bfloat16 if dtype == "bf16_weights" else torch.float32)
    before = tiny.parameters(policy)
    trainer = tiny.trainer(
        tmp_path,
        policy=policy,
        bf16=dtype != "fp32",
        gradient_checkpointing=checkpointing,
        learning_rate=1e-2,
        peft_config=LoraConfig(target_modules=["q_proj", "v_proj"]) if lora else None,
    )
    sigma = trainer.perturbation.sigma
    trainer.train()
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert all(torch.isfinite(p).all() for p in trained.values())
    assert all("lora" in name for name in trained) == lora
    if lora:
        assert any((p != 0).any() for name, p in trained.items() if "lora_B" in name)
    else:
        assert any(not torch.equal(before[name], p) for name, p in trained.items())
    assert not torch.equal(trainer.perturbation.sigma, sigma)
    assert trainer.perturbation.log_sigma.dtype == torch.float32
    assert trainer.state.log_history[0]["alp/noise/effective/mean"] == pytest.approx(1, abs=0.2)


def test_lora_adapter_is_saved_without_anything_of_ours(tmp_path):
    trainer = tiny.trainer(tmp_path, peft_config=LoraConfig(target_modules=["q_proj"]))
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    from safetensors.torch import load_file

    assert all("lora_" in name for name in load_file(tmp_path / "saved" / "adapter_model.safetensors"))


def test_a_rollout_func_may_score_with_the_trainer(tmp_path):
    scored = []

    def rollout(batch, trainer):
        ids = tiny.tensor([[5, 6, 7]])
        scored.append(trainer._get_per_token_logps_and_entropies(trainer.model, ids, torch.ones_like(ids), 2)[0])
        return tiny.rollout_func()(batch, trainer)

    trainer = tiny.trainer(tmp_path, rollout_func=rollout, **OFF_POLICY)
    assert "old_per_token_logps" not in first_batch(trainer)
    assert torch.isfinite(scored[0]).all()


# ---- Sigma ----


def record_seeds(trainer):
    seeds = []
    applied = trainer.perturbation.applied
    trainer.perturbation.applied = lambda seed: seeds.append(seed) or applied(seed)
    return seeds


def test_every_micro_batch_of_a_run_has_its_own_seed(tmp_path):
    trainer = tiny.trainer(tmp_path, gradient_accumulation_steps=3, max_steps=2, seed=7)
    seeds = record_seeds(trainer)
    trainer.train()
    assert seeds == [noise_seed(7, i) for i in range(6)]


def test_sigma_steps_exactly_when_the_policy_steps(tmp_path):
    trainer = tiny.trainer(tmp_path, gradient_accumulation_steps=2, max_steps=3)
    steps = []
    step = trainer.sigma_optimizer.adam.step
    trainer.sigma_optimizer.adam.step = lambda: steps.append(trainer.state.global_step) or step()
    trainer.train()
    assert steps == [0, 1, 2]


def test_sigma_stays_when_the_policys_step_is_skipped(tmp_path, monkeypatch):
    trainer = tiny.trainer(tmp_path)
    monkeypatch.setattr(type(trainer.accelerator), "optimizer_step_was_skipped", True)
    before = trainer.perturbation.log_sigma.detach().clone()
    trainer.train()
    assert torch.equal(trainer.perturbation.log_sigma, before)
    assert trainer.perturbation.log_sigma.grad is None  # and the gradient does not leak into the next step


def test_sigmas_gradient_is_freed_of_the_loss_scale(tmp_path):
    gradients = []
    for scale in (1.0, 1024.0):
        trainer = tiny.trainer(tmp_path)
        trainer.accelerator.scaler = types.SimpleNamespace(get_scale=lambda s=scale: s)
        trainer.perturbation.log_sigma.grad = tiny.tensor([0.25, 0.5]) * scale
        trainer.sigma_optimizer.reduce_gradient()
        gradients.append(trainer.perturbation.log_sigma.grad)
    assert torch.equal(*gradients)


def test_sigma_has_no_weight_decay_a_constant_rate_and_bounds(tmp_path):
    trainer = tiny.trainer(
        tmp_path, max_steps=6, weight_decay=0.5, learning_rate=1e-3, alp_sigma_lr=0.3, alp_sigma_min=0.008,
        alp_sigma_max=0.012, gradient_accumulation_steps=1,
    )  # fmt: skip
    trainer.train()
    (group,) = trainer.sigma_optimizer.adam.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.3, 0)
    sigma = torch.tensor([[row["alp/sigma/min"], row["alp/sigma/max"]] for row in trainer.state.log_history[:-1]])
    assert sigma.min() >= 0.008 * (1 - 1e-5) and sigma.max() <= 0.012 * (1 + 1e-5)
    assert sigma[-1].tolist() != sigma[0].tolist()


def test_gradient_left_by_an_interrupted_run_does_not_reach_the_next(tmp_path):
    trainer = tiny.trainer(tmp_path)
    trainer.perturbation.log_sigma.grad = tiny.tensor([1e3, 1e3])
    trainer.train()
    clean = tiny.trainer(tmp_path)
    clean.train()
    assert torch.equal(trainer.perturbation.log_sigma, clean.perturbation.log_sigma)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_sigma_sits_out_a_step_whose_gradient_is_not_finite(tmp_path, caplog, bad):
    trainer = tiny.trainer(tmp_path)
    before = trainer.perturbation.log_sigma.detach().clone()
    trainer.perturbation.log_sigma.grad = tiny.tensor([bad, 1.0])
    trainer.sigma_optimizer.reduce_gradient()
    trainer.sigma_optimizer.step()
    assert torch.equal(trainer.perturbation.log_sigma, before)
    assert trainer.sigma_optimizer.metrics() == {}  # nothing that is no number reaches the log
    assert caplog.text.count("The gradient of sigma is not finite") == 1


def test_fixed_sigma_stays_fixed(tmp_path):
    trainer = tiny.trainer(tmp_path, alp_learn_sigma=False)
    before = trainer.perturbation.sigma
    trainer.train()
    assert torch.equal(trainer.perturbation.sigma, before) and trainer.sigma_optimizer is None


def test_only_the_chosen_layers_are_perturbed(tmp_path):
    trainer = tiny.trainer(tmp_path, policy=tiny.model(layers=4), alp_layers="last:2", alp_log_layers=True)
    trainer.train()
    assert trainer.perturbation.layer_indices == [2, 3]
    logged = [name for name in trainer.state.log_history[0] if name.startswith("alp/sigma/layer_")]
    assert logged == ["alp/sigma/layer_02", "alp/sigma/layer_03"]


# ---- Checkpoints ----


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"steps_per_generation": 2},
        {"gradient_accumulation_steps": 2},
        # In the middle of the buffered rollouts, where TRL alone samples anew.
        {"steps_per_generation": 4},
        {"steps_per_generation": 3, "num_iterations": 2, "max_steps": 8},
        {"gradient_accumulation_steps": 2, "steps_per_generation": 6, "max_steps": 6},
        {"rollout_func": tiny.rollout_func(), "steps_per_generation": 4},
        {"steps_per_generation": 4, "alp_enabled": False, "max_steps": 6},
    ],
)
def test_stopping_and_resuming_equals_an_uninterrupted_run(tmp_path, settings):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "alp_sigma_lr": 0.05, **settings}
    whole = tiny.trainer(tmp_path / "whole", **settings)
    whole.train()
    resumed = tiny.trainer(tmp_path / "resumed", policy=tiny.model(seed=1), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_equal(tiny.parameters(whole.model), tiny.parameters(resumed.model))
    assert torch.equal(whole.perturbation.log_sigma, resumed.perturbation.log_sigma)
    assert tiny.history(whole)[:-1] == tiny.history(resumed)[:-1]
    if not whole.args.alp_enabled:
        return
    ours, theirs = (torch.load(tmp_path / run / "checkpoint-4" / "alp_state.pt") for run in ("whole", "resumed"))
    assert ours["micro_batches"] == theirs["micro_batches"]
    assert_equal(ours["optimizer"]["state"][0], theirs["optimizer"]["state"][0])


@pytest.mark.parametrize(
    "change",
    [
        {"steps_per_generation": 8},
        {"steps_per_generation": 2},
        {"num_iterations": 2},
        {"gradient_accumulation_steps": 2},
        {"per_device_train_batch_size": 4, "steps_per_generation": 8},
    ],
)
def test_resuming_with_other_batches_of_rollouts_samples_anew_with_a_warning(tmp_path, monkeypatch, caplog, change):
    settings = {"save_strategy": "steps", "save_steps": 4, "steps_per_generation": 4}
    tiny.trainer(tmp_path, max_steps=4, **settings).train()  # all updates of its rollouts are done
    generated = []
    generate = ALPGRPOTrainer._generate_and_score_completions
    monkeypatch.setattr(
        ALPGRPOTrainer,
        "_generate_and_score_completions",
        lambda self, inputs: generated.append(self.state.global_step) or generate(self, inputs),
    )
    resumed = tiny.trainer(tmp_path, max_steps=6, **settings | change)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert generated[0] == 4 and resumed.state.log_history[-2]["alp/staleness"] > 0
    name, value = next(iter(change.items()))
    assert f"{name}={value}" in re.search(r"No buffered rollouts of (.*): the run goes on", caplog.text)[1]


def test_resuming_with_a_kl_term_does_not_use_rollouts_that_have_no_reference(tmp_path, caplog):
    settings = {"save_strategy": "steps", "save_steps": 2, "steps_per_generation": 4}
    settings["peft_config"] = LoraConfig(target_modules=["q_proj"])
    tiny.trainer(tmp_path, max_steps=2, **settings).train()
    resumed = tiny.trainer(tmp_path, max_steps=4, beta=0.1, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 4 and "with_reference=True" in caplog.text


def test_state_is_in_each_checkpoint_and_survives_rotation(tmp_path):
    trainer = tiny.trainer(tmp_path, save_strategy="steps", save_steps=1, max_steps=3, save_total_limit=1)
    trainer.train()
    assert [name for name in os.listdir(tmp_path) if name.startswith("checkpoint")] == ["checkpoint-3"]
    state = torch.load(tmp_path / "checkpoint-3" / "alp_state.pt")
    assert torch.equal(state["log_sigma"], trainer.perturbation.log_sigma.cpu())
    assert state["micro_batches"] == 3
    assert not [name for name in os.listdir(tmp_path / "checkpoint-3") if name.endswith(".tmp")]


def checkpoint(tmp_path, **kwargs):
    tiny.trainer(tmp_path / "first", save_strategy="steps", save_steps=1, max_steps=1, **kwargs).train()
    return tmp_path / "first" / "checkpoint-1"


@pytest.mark.parametrize(
    ("name", "otherwise"), [("alp_state.pt", "alp_sigma_init=0.01"), ("alp_rollouts_0.pt", "freshly sampled")]
)
def test_half_written_state_is_an_error_that_names_the_file(tmp_path, name, otherwise):
    path = checkpoint(tmp_path)
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf"{name} cannot be read \(\w+\): it is damaged.*{otherwise}"):
        tiny.trainer(tmp_path).train(resume_from_checkpoint=str(path))


@pytest.mark.parametrize("change", [{"alp_layers": "last:1"}, {"alp_noise_scale": "absolute"}])
def test_state_of_another_perturbation_is_an_error(tmp_path, change):
    path = checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"its sigma does not fit\. Resume with"):
        tiny.trainer(tmp_path, **change).train(resume_from_checkpoint=str(path))


def test_checkpoint_of_stock_grpo_starts_sigma_with_a_warning(tmp_path, caplog):
    tiny.trainer(tmp_path / "stock", GRPOTrainer, save_strategy="steps", save_steps=1, max_steps=1).train()
    trainer = tiny.trainer(tmp_path)
    trainer.train(resume_from_checkpoint=str(tmp_path / "stock" / "checkpoint-1"))
    assert "has no alp_state.pt" in caplog.text and "start sigma from alp_sigma_init=0.01" in caplog.text
    assert "freshly sampled" in caplog.text
    assert trainer.state.global_step == 2


# ---- Hard input ----


def edited(edit):
    return tiny.rollout_func(edit=edit)


def with_logprobs(value):
    return edited(lambda ids, logps: (ids, [[value] * len(row) for row in logps]))


ROLLOUTS = {
    "nan": with_logprobs(math.nan),
    "none": with_logprobs(None),
    "minus_inf": with_logprobs(-math.inf),
    "gap_1e4": with_logprobs(-1e4),
    "gap_minus_1e4": with_logprobs(1e4),
    "some_nan": edited(lambda ids, logps: (ids, [[math.nan, *row[1:]] for row in logps])),
    "eos_only": edited(lambda ids, logps: ([[1] for _ in ids], [[-1.0] for _ in ids])),
    "one_token": edited(lambda ids, logps: ([[row[0]] for row in ids], [row[:1] for row in logps])),
}


# Every rollout at the level that multiplies ratios up, and every level at the rollout that does so farthest.
@pytest.mark.parametrize(
    "rollouts, level",
    [
        *((rollouts, "sequence") for rollouts in ROLLOUTS),
        *(("gap_1e4", each) for each in LEVELS if each != "sequence"),
    ],
)
def test_hard_rollouts_leave_every_parameter_finite(tmp_path, rollouts, level):
    trainer = tiny.trainer(tmp_path, alp_ratio_level=level, rollout_func=ROLLOUTS[rollouts], alp_monitor_every=1)
    trainer.train()
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    assert torch.isfinite(trainer.perturbation.log_sigma).all()
    for row in trainer.state.log_history:
        assert all(value is None or math.isfinite(value) for value in row.values()), row
    unscored = trainer.state.log_history[0]["alp/unscored_tokens"]
    assert (unscored > 0) == (rollouts in ("nan", "none", "minus_inf", "some_nan"))


def test_all_equal_rewards_leave_the_policy_unmoved_and_finite(tmp_path):
    trainer = tiny.trainer(tmp_path, reward=lambda completions, **kwargs: [1.0] * len(completions), weight_decay=0)
    before = tiny.parameters(trainer.model)
    trainer.train()
    assert_equal(tiny.parameters(trainer.model), before)
    assert torch.isfinite(trainer.perturbation.log_sigma).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, None])
def test_rewards_are_left_as_stock_leaves_them_and_infinite_ones_are_warned_of(tmp_path, caplog, bad):
    def reward(completions, **kwargs):
        return [bad if i % 3 == 0 else float(i) for i in range(len(completions))]

    runs = []
    for trainer_class, ours in ((GRPOTrainer, {}), (ALPGRPOTrainer, {"alp_enabled": False, "alp_dual_clip": None})):
        settings = ours | STOCK_DEFAULTS if ours else ours
        trainer = tiny.trainer(tmp_path, trainer_class, reward=reward, **settings)
        trainer.train()
        runs.append(tiny.parameters(trainer.model))
    assert_equal(*runs)
    infinite = bad is not None and math.isinf(bad)
    assert trainer.state.log_history[0]["alp/unscored_rewards"] == (0 if infinite else 3)
    assert caplog.text.count("rewards are infinite") == infinite


@pytest.mark.parametrize("watched", [ALPGRPOTrainer, GRPOTrainer])
@pytest.mark.parametrize("bad", [math.nan, None, torch.tensor(math.nan)], ids=["nan", "none", "tensor"])
def test_rewards_that_are_all_nan_are_not_said_to_be_none(tmp_path, caplog, watched, bad):
    def reward(completions, **kwargs):
        return [bad] * len(completions)

    trainer = tiny.trainer(tmp_path, watched, reward=reward)
    instrument(trainer).train()
    assert ("All reward functions returned None for the following" in caplog.text) == (bad is None)
    assert ("All reward functions returned NaN (or None) for the following" in caplog.text) == (bad is not None)
    assert trainer.state.log_history[0]["alp/unscored_rewards"] == 8
    assert trainer.reward_funcs == [reward]


@pytest.mark.parametrize("watched", [ALPGRPOTrainer, GRPOTrainer])
def test_asynchronous_rewards_are_left_as_they_are(tmp_path, watched):
    async def reward(completions, **kwargs):
        return tiny.count_digits(completions)

    class Reward:
        __name__ = "callable"

        async def __call__(self, completions, **kwargs):
            return tiny.count_digits(completions)

    trainer = tiny.trainer(tmp_path, watched, reward=[reward, Reward(), tiny.count_digits])
    instrument(trainer).train()
    assert trainer.state.log_history[0]["rewards/callable/mean"] == trainer.state.log_history[0]["rewards/reward/mean"]


def test_a_reward_function_that_does_not_apply_leaves_no_completion_unscored(tmp_path):
    def only(parity):
        def reward(completions, **kwargs):
            return [float(i) if i % 2 == parity else None for i in range(len(completions))]

        reward.__name__ = f"only_{parity}"
        return reward

    trainer = tiny.trainer(tmp_path, reward=[only(0), only(1)])
    trainer.train()
    assert trainer.state.log_history[0]["alp/unscored_rewards"] == 0


def test_fully_masked_batch_is_survived(tmp_path):
    trainer = tiny.trainer(tmp_path, mask_truncated_completions=True, max_completion_length=1, alp_monitor_every=1)
    trainer.train()
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    assert torch.isfinite(trainer.perturbation.log_sigma).all()


def test_empty_completion_from_a_rollout_func_is_a_value_error(tmp_path):
    trainer = tiny.trainer(tmp_path, rollout_func=edited(lambda ids, logps: ([[], *ids[1:]], [[], *logps[1:]])))
    with pytest.raises(ValueError, match=r"empty completion \(`completion_ids\[0\]`\)"):
        trainer.train()


def test_a_rollout_func_may_return_tensors(tmp_path):
    def rollout(batch, trainer):
        output = tiny.rollout_func()(["1+1="] * len(batch), trainer)
        length = min(map(len, output["completion_ids"]))
        return {
            "prompt_ids": torch.tensor(output["prompt_ids"]),
            "completion_ids": torch.tensor([row[:length] for row in output["completion_ids"]]),
            "logprobs": [row[:length] for row in output["logprobs"]],
        }

    trainer = tiny.trainer(tmp_path, rollout_func=rollout)
    trainer.train()
    assert trainer.state.global_step == 2


def test_empty_prompt_from_a_rollout_func_is_a_value_error(tmp_path):
    def rollout(batch, trainer):
        return tiny.rollout_func()(batch, trainer) | {"prompt_ids": [[] for _ in batch]}

    with pytest.raises(ValueError, match=r"empty prompt \(in `prompt_ids`\)"):
        tiny.trainer(tmp_path, rollout_func=rollout).train()


def test_too_few_log_probs_from_a_rollout_func_are_a_value_error(tmp_path):
    trainer = tiny.trainer(tmp_path, rollout_func=edited(lambda ids, logps: (ids, [row[:-1] for row in logps])))
    with pytest.raises(ValueError, match=r"returned \d `logprobs` for the \d tokens of `completion_ids"):
        trainer.train()


# ---- Construction ----


def test_plain_grpo_config_is_an_error_that_names_ours(tmp_path):
    args = tiny.config(tmp_path, GRPOConfig)
    with pytest.raises(ValueError, match=r"args is a GRPOConfig; .*`ALPGRPOConfig`"):
        tiny.trainer(tmp_path, args=args)


def test_no_args_builds_our_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = {}

    class Stop(Exception):
        pass

    def init(self, model, reward_funcs, args, *other, **kwargs):
        seen["args"] = args
        raise Stop

    monkeypatch.setattr(GRPOTrainer, "__init__", init)

    class OnCPU(ALPGRPOConfig):
        def __init__(self, output_dir):
            super().__init__(output_dir, use_cpu=tiny.DEVICE == "cpu")

    monkeypatch.setattr("trl_alp.trainer.ALPGRPOConfig", OnCPU)
    with pytest.raises(Stop):
        ALPGRPOTrainer("org/some-model", reward_funcs=tiny.count_digits)
    assert isinstance(seen["args"], ALPGRPOConfig) and seen["args"].output_dir == "some-model-ALP"


def test_constructor_is_that_of_the_base_class():
    import inspect

    assert inspect.signature(ALPGRPOTrainer.__init__) == inspect.signature(GRPOTrainer.__init__)


def test_positional_arguments_pass_through(tmp_path):
    args = tiny.config(tmp_path)
    trainer = ALPGRPOTrainer(tiny.model(), tiny.count_digits, args, tiny.prompts(), None, tiny.tokenizer())
    assert trainer.args is args and len(trainer.train_dataset) == 16


def test_callers_list_of_rewards_is_not_shared(tmp_path):
    rewards = [tiny.count_digits]
    trainer = tiny.trainer(tmp_path, reward=rewards)
    assert trainer.reward_funcs == rewards and trainer.reward_funcs is not rewards


def test_layers_outside_the_model_are_an_error_at_construction(tmp_path):
    with pytest.raises(ValueError, match=r"alp_layers='0-9' .*2 layers"):
        tiny.trainer(tmp_path, alp_layers="0-9")


def test_fp16_with_deepspeed_is_an_error_at_construction(tmp_path):
    args = tiny.config(tmp_path, fp16=True, bf16=None)
    args.deepspeed_plugin = object()
    with pytest.raises(ValueError, match=r"fp16=True with DeepSpeed is not supported.*bf16=True"):
        tiny.trainer(tmp_path, args=args)


def test_deterministic_cumulative_ratios_on_a_gpu_are_an_error_at_construction(tmp_path, monkeypatch):
    args = tiny.config(tmp_path, alp_ratio_level="cumulative_token")
    args.full_determinism = True
    monkeypatch.setattr(ALPGRPOConfig, "device", torch.device("cuda", 0))
    with pytest.raises(ValueError, match=r"full_determinism=True with alp_ratio_level='cumulative_token'"):
        tiny.trainer(tmp_path, args=args)


@tiny.cpu_only("there fp16 trains")
def test_fp16_on_a_cpu_is_an_error_at_construction(tmp_path):
    with pytest.raises(ValueError, match=r"fp16=True on a cpu is not supported.*bf16=True"):
        tiny.trainer(tmp_path, fp16=True, bf16=None)


@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logprobs"])
def test_vllm_server_must_return_processed_log_probs(tmp_path, mode):
    trainer = tiny.trainer(tmp_path)
    client = types.SimpleNamespace(get_server_info=lambda: {"model_config": {"logprobs_mode": mode}})
    trainer.use_vllm, trainer.vllm_mode = True, "server"
    trainer.vllm_generation = types.SimpleNamespace(vllm_client=client)
    if mode == "processed_logprobs":
        check_server(trainer)
    else:
        with pytest.raises(ValueError, match="--logprobs-mode processed_logprobs"):
            check_server(trainer)


def test_dropout_is_warned_about_once_and_only_where_it_acts(tmp_path, caplog):
    from transformers import GPT2Config, GPT2LMHeadModel

    policy = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_layer=1, n_embd=8, n_head=1, eos_token_id=1, bos_token_id=1))
    tiny.trainer(tmp_path, policy=policy)
    assert caplog.text.count("The policy has dropout (p=0.1)") == 1
    assert "Set `disable_dropout=True`" in caplog.text
    caplog.clear()
    policy_with_attention_dropout = tiny.model()
    policy_with_attention_dropout.config.attention_dropout = 0.3
    tiny.trainer(tmp_path, policy=policy_with_attention_dropout, disable_dropout=True)
    assert "(p=0.3)" in caplog.text and "`attention_dropout=0` in the model's config" in caplog.text
    caplog.clear()
    tiny.trainer(tmp_path, policy=policy, disable_dropout=True)
    tiny.trainer(tmp_path)
    assert "dropout" not in caplog.text


# ---- Metrics ----

SHAPES = ("p02", "p25", "p50", "p75", "p98", "min", "max")
RATIOS = ("ratio", "log_ratio", "token/log_ratio", "sequence/log_ratio")
MONITORED = [f"{n}/{s}" for n in RATIOS for s in SHAPES]
MONITORED += [f"{level}{name}" for level in ("", "token/", "sequence/") for name in ("ess", "chi2")]
MONITORED += [f"token/{name}" for name in ("above_0.1", "above_1", "above_5", "mult_prob_error")]
MONITORED += [
    "perplexity/policy",
    "perplexity/behaviour",
    "perplexity/log_gap",
    "kl/k1",
    "kl/k3",
    "unscored_tokens",
    "unscored_share",
]
MONITORED += ["clip/low", "clip/high", "clip/dual", "clip/fresh"]
MONITORED += ["fresh/kl/k1", "fresh/kl/k3", "fresh/token/mult_prob_error"]
METRICS = [f"alp/{name}" for name in MONITORED] + ["alp/staleness", "alp/sigma/grad_norm", "alp/noise_off/entropy"]
METRICS += [f"alp/{n}/{s}" for n in ("sigma", "noise/effective") for s in ("mean", "min", "max")]
METRICS += ["alp/noise/kl/k3"]
BY_LAYER = {f"alp/sigma/{name}layer_0{layer}" for name in ("", "grad/") for layer in (0, 1)}
PER_ROLLOUT = ["alp/unscored_rewards"]


def test_metrics_are_logged_and_redefine_none_of_trls(tmp_path):
    stock = tiny.trainer(tmp_path, GRPOTrainer)
    stock.train()
    for by_layer in (False, True):
        trainer = tiny.trainer(tmp_path, alp_monitor_every=1, alp_log_layers=by_layer)
        trainer.train()
        row = trainer.state.log_history[0]
        ours = set(METRICS + PER_ROLLOUT) | {f"alp/noise_off/{name}" for name in MONITORED}
        ours |= BY_LAYER if by_layer else set()
        assert ours == {name for name in row if name.startswith("alp/")}
        assert set(row) - ours == set(stock.state.log_history[0])


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_metrics_equal_those_computed_by_hand(tmp_path, monkeypatch, level):
    scored = []
    score = GRPOTrainer._get_per_token_logps_and_entropies

    def recorded(self, *args, **kwargs):
        out = score(self, *args, **kwargs)
        scored.append(out[0].detach().clone())
        return out

    settings = {"rollout_func": tiny.rollout_func(0.5), "alp_ratio_level": level, "alp_monitor_every": 0}
    trainer = tiny.trainer(tmp_path, max_steps=1, **settings)
    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", recorded)
    trainer.train()
    (batch,), (p,), row = trainer._buffered_inputs, scored, trainer.state.log_history[0]
    mask = batch["completion_mask"].bool()
    gap = (p - batch["sampling_per_token_logps"]) * mask
    log_ratio = gap[mask] if level == "token" else gap.sum(1)
    ratio = log_ratio.exp()
    for percentile in (2, 25, 50, 75, 98):
        expected = torch.quantile(log_ratio, percentile / 100).item()
        assert row[f"alp/log_ratio/p{percentile:02d}"] == pytest.approx(expected, rel=0.02, abs=5e-3)
    assert row["alp/log_ratio/min"] == pytest.approx(log_ratio.min().item(), abs=1e-5)
    assert row["alp/kl/k1"] == pytest.approx(-gap[mask].mean().item(), abs=1e-5)
    assert row["alp/kl/k3"] == pytest.approx((gap[mask].exp() - 1 - gap[mask]).mean().item(), rel=1e-3)
    assert row["alp/ess"] == pytest.approx((ratio.sum() ** 2 / ratio.square().sum() / len(ratio)).item(), rel=1e-4)
    per_token = (ratio if level == "token" else ratio[:, None].expand_as(gap)[mask]).detach()
    advantage = batch["advantages"][:, None].expand_as(gap)[mask]
    assert row["alp/clip/low"] == pytest.approx(((per_token < 0.5) & (advantage < 0)).float().mean().item(), abs=1e-6)
    assert row["alp/clip/high"] == pytest.approx(((per_token > 4) & (advantage > 0)).float().mean().item(), abs=1e-6)


def test_staleness_counts_optimiser_steps_since_generation(tmp_path):
    trainer = tiny.trainer(tmp_path, max_steps=6, **OFF_POLICY)
    trainer.train()
    assert [row["alp/staleness"] for row in trainer.state.log_history[:-1]] == [0, 1, 2, 3, 0, 1]


def test_staleness_goes_on_when_train_is_called_again(tmp_path):
    trainer = tiny.trainer(tmp_path, max_steps=2, **OFF_POLICY)
    trainer.train()
    trainer.train()  # TRL goes on with its buffered rollouts
    assert [row["alp/staleness"] for row in trainer.state.log_history[:-1]] == [2, 3]


def test_under_trls_sequence_level_the_ratio_is_its_geometric_mean(tmp_path):
    settings = {"max_steps": 1, "rollout_func": tiny.rollout_func(0.5), "loss_type": "grpo", "seed": 5}
    rows = []
    for level in ({"importance_sampling_level": "sequence"}, {"alp_ratio_level": "sequence_geometric"}):
        trainer = tiny.trainer(tmp_path, **settings, **level)
        trainer.train()
        rows.append(trainer.state.log_history[0])
    assert rows[0]["alp/ratio/p98"] == pytest.approx(rows[1]["alp/ratio/p98"], rel=1e-6)
    assert rows[0]["alp/clip/low"] == pytest.approx(rows[1]["alp/clip/low"], rel=1e-6)


def test_a_logging_window_is_measured_as_a_whole(tmp_path):
    rows = {}
    for window in (1, 4):
        settings = {"logging_steps": window, "steps_per_generation": 2, "alp_sigma_lr": 0.1, "alp_log_layers": True}
        trainer = tiny.trainer(tmp_path, max_steps=4, **settings)
        trainer.train()
        rows[window] = trainer.state.log_history[:-1]
    (whole,) = rows[4]
    for name in ("ratio", "token/log_ratio", "sequence/log_ratio", "sigma"):
        for kind in (min, max):
            values = [row[f"alp/{name}/{kind.__name__}"] for row in rows[1]]
            assert (
                whole[f"alp/{name}/{kind.__name__}"] == pytest.approx(kind(values), rel=1e-6) and len(set(values)) > 1
            )
    for name in ("kl/k1", "kl/k3", "token/above_0.1", "ess", "perplexity/policy", "staleness", "sigma/layer_01"):
        values = [row[f"alp/{name}"] for row in rows[1]]
        assert min(values) < whole[f"alp/{name}"] < max(values), name


# Rows of the log: at the same steps and with the same keys as stock, whatever ends the run.
LAST_ROWS = {
    "a window that is not full": {"max_steps": 3, "logging_steps": 2},
    "full windows": {"max_steps": 4, "logging_steps": 2},
    "an evaluation comes last": {"max_steps": 3, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 3},
    "an evaluation each epoch": {"num_train_epochs": 2, "max_steps": -1, "logging_steps": 3, "eval_strategy": "epoch"},
    "logging each epoch": {"num_train_epochs": 2, "max_steps": -1, "logging_strategy": "epoch"},
    "no logging": {"max_steps": 3, "logging_strategy": "no"},
    "a log that a callback asks for": {"max_steps": 4, "logging_steps": 10, "late": True},
    "an evaluation that stops the run": {"max_steps": 8, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 3,
                                         "stop": True},
}  # fmt: skip


class LogAtThree(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_log = control.should_log or state.global_step == 3


class Stop(TrainerCallback):  # as `EarlyStoppingCallback`
    def on_evaluate(self, args, state, control, **kwargs):
        control.should_training_stop = True


ALSO_WATCHED = ["a window that is not full", "an evaluation that stops the run"]


@pytest.mark.parametrize(
    ("case", "watched"),
    [*((case, "alp") for case in LAST_ROWS), *((c, w) for c in ALSO_WATCHED for w in ("bypass", "instrument"))],
)
def test_the_log_has_stocks_rows_and_keys_and_the_last_window_is_in_it(tmp_path, case, watched):
    settings = dict(LAST_ROWS[case])
    late, stop = settings.pop("late", False), settings.pop("stop", False)
    if "eval_strategy" in settings:
        settings |= {"eval_dataset": tiny.prompts(4), "per_device_eval_batch_size": 4}
    settings["train_dataset"] = tiny.prompts(6)  # 3 steps an epoch
    runs = []
    for ours in (False, True):
        trainer_class = GRPOTrainer if not ours or watched == "instrument" else ALPGRPOTrainer
        more = {"alp_enabled": watched == "alp"} if trainer_class is ALPGRPOTrainer else {}
        trainer = tiny.trainer(tmp_path, trainer_class, **settings, **more)
        if ours:
            instrument(trainer)
        for callback in [LogAtThree()] * late + [Stop()] * stop:
            trainer.add_callback(callback)
        output = trainer.train()
        runs.append((trainer, output))
    (stock, stock_output), (trainer, output) = runs
    rows = [[{k for k in row if not k.startswith("alp/")} for row in t.state.log_history] for t in (stock, trainer)]
    assert rows[0] == rows[1]
    assert [r["step"] for r in stock.state.log_history] == [r["step"] for r in trainer.state.log_history]
    assert {k for k in output.metrics if not k.startswith("alp/")} == stock_output.metrics.keys()
    assert trainer.model.training == stock.model.training
    # Every step is in one row: the steps since the last flush are in the summary, if there are any.
    measured = [row["step"] for row in trainer.state.log_history if "alp/kl/k3" in row]
    assert measured[-1] == trainer.state.global_step
    assert not any("alp/kl/k3" in row for row in trainer.state.log_history if any(k.startswith("eval_") for k in row))


def test_the_rows_that_log_an_update_are_those_that_measure_it(tmp_path):
    trainer = tiny.trainer(tmp_path, max_steps=3, logging_steps=2)
    trainer.train()
    window, summary = trainer.state.log_history
    assert window["step"] == 2 and "loss" in window and "alp/kl/k3" in window
    # As stock, whose summary has the rewards of the last, partial window.
    assert "train_runtime" in summary and "reward" in summary and "alp/kl/k3" in summary


def test_monitor_scores_once_every_so_many_steps_and_leaves_the_run_unchanged(tmp_path, monkeypatch):
    runs = []
    for every in (0, 2):
        trainer = tiny.trainer(tmp_path, max_steps=4, gradient_accumulation_steps=2, alp_monitor_every=every)
        trainer.train()
        runs.append(tiny.parameters(trainer.model))
        logged = ["alp/noise_off/kl/k3" in row for row in trainer.state.log_history[:-1]]
        assert logged == ([False] * 4 if every == 0 else [True, False, False, True])
    assert_equal(*runs)


@pytest.mark.parametrize("every", [1, 2, 4, 5, 10, 16])
@pytest.mark.parametrize("updates_per_batch", [1, 2, 3, 8, 10, 16, 40])
def test_monitor_looks_at_rollouts_of_every_age_and_at_fresh_ones_soon_again(every, updates_per_batch):
    steps = [
        step
        for step in range(1000 * every)
        if is_monitored(step, every)
        or (step % updates_per_batch == 0 and is_first_fresh(step, every, updates_per_batch))
    ]
    assert 1000 <= len(steps) <= 1500
    assert all(any(step // every == window for step in steps) for window in range(0, 1000, 10))
    seen = Counter(step % updates_per_batch for step in steps)
    assert all(seen[age] * updates_per_batch / 1000 > 0.5 for age in range(updates_per_batch))
    fresh = [step for step in steps if step % updates_per_batch == 0]
    assert fresh[0] == 0
    assert max(later - step for step, later in itertools.pairwise(fresh)) <= 2 * (2 * every + updates_per_batch)


def test_the_noise_is_measured_by_itself_on_the_tokens_that_are_monitored(tmp_path, monkeypatch):
    seen = {}
    original = ALPWatcher.measure

    def spy(watcher, loss, logps, noise_off):
        seen["gap"], seen["mask"] = logps - noise_off[0], loss.mask.bool()
        return original(watcher, loss, logps, noise_off)

    monkeypatch.setattr(ALPWatcher, "measure", spy)
    trainer = tiny.trainer(tmp_path, alp_monitor_every=1, max_steps=1, alp_sigma_init=0.1)
    trainer.train()
    gap = seen["gap"][seen["mask"]]
    row = trainer.state.log_history[0]
    assert row["alp/noise/kl/k3"] == pytest.approx((gap.exp() - 1 - gap).mean().item(), rel=1e-4)
    assert row["alp/noise/kl/k3"] > 1e-6


def test_the_size_of_the_noise_is_not_reported_where_it_was_not_measured(tmp_path):
    for settings in ({"alp_monitor_every": 0}, {"alp_enabled": False}):
        trainer = tiny.trainer(tmp_path, max_steps=1, **settings)
        trainer.train()
        assert "alp/noise/kl/k3" not in trainer.state.log_history[0]


def test_monitor_of_an_on_policy_batch_sees_ratio_one(tmp_path):
    trainer = tiny.trainer(tmp_path, alp_monitor_every=1, max_steps=1, alp_sigma_init=0.1)
    trainer.train()
    row = trainer.state.log_history[0]
    assert row["alp/noise_off/log_ratio/max"] == pytest.approx(0, abs=1e-5)
    assert row["alp/log_ratio/max"] > 0.01


def test_inert_noise_is_warned_about_once_with_dtype_sigma_and_way_out(tmp_path, caplog):
    policy = tiny.model(dtype=torch.bfloat16)
    trainer = tiny.trainer(
        tmp_path, policy=policy, bf16=True, alp_sigma_init=1e-6, alp_noise_scale="absolute", max_steps=3
    )
    trainer.train()
    (warning,) = re.findall(r"Noise is lost in rounding: .*", caplog.text)
    assert "in bfloat16, with sigma between 1e-06 and 1e-06" in warning and "alp_noise_scale='rms'" in warning
    assert "only 0% of its standard deviation" in warning
    assert trainer.state.log_history[0]["alp/noise/effective/max"] < 0.1
    caplog.clear()
    tiny.trainer(tmp_path, max_steps=1).train()
    assert "lost in rounding" not in caplog.text


def test_clipped_mismatch_is_warned_about_once_with_a_narrow_clip_range(tmp_path, caplog):
    settings = {"rollout_func": tiny.rollout_func(2.0), "max_steps": 4, "epsilon": 0.1}
    tiny.trainer(tmp_path, epsilon_high=0.1, **settings).train()
    assert len(re.findall(r"of the tokens are clipped before any update since their generation", caplog.text)) == 1
    caplog.clear()
    tiny.trainer(tmp_path, epsilon_high=3.0, **settings).train()
    assert "clipped before any update" not in caplog.text


def test_metrics_reach_wandb_offline_and_tensorboard(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    trainer = tiny.trainer(tmp_path, report_to=["wandb", "tensorboard"])
    trainer.train()
    summary = dict(wandb.run.summary)
    wandb.finish()
    assert summary["train/alp/ratio/p98"] == pytest.approx(trainer.state.log_history[1]["alp/ratio/p98"])
    (folder,) = {p.parent for p in tmp_path.rglob("events.out.tfevents*")}
    events = EventAccumulator(str(folder)).Reload()
    assert "train/alp/sigma/mean" in events.Tags()["scalars"]


def test_model_card_is_of_alp(tmp_path):
    trainer = tiny.trainer(tmp_path)
    trainer.create_model_card(model_name="x")
    card = (tmp_path / "README.md").read_text()
    assert "2603.19470" in card and "Adaptive Layerwise Perturbation" in card and "- alp" in card
    assert "DeepSeekMath" not in card and "Chenlu" in card
    assert {"trl", "grpo", "alp"} <= set(trainer.model.model_tags)


def test_the_model_card_has_the_settings_sigma_and_the_measured_mismatch(tmp_path):
    trainer = tiny.trainer(tmp_path, rollout_func=tiny.rollout_func(0.1), alp_monitor_every=1, alp_noise_target=1.0)
    trainer.train()
    trainer.create_model_card(model_name="x")
    card = (tmp_path / "README.md").read_text()
    sigma = trainer.perturbation.sigma
    assert f"| sigma, smallest to largest of 2 layers | {sigma.min():.3g} to {sigma.max():.3g} |" in card
    assert "| `alp_ratio_level` | token |" in card and "| `alp_noise_target` | 1.0 |" in card
    log = [row for row in trainer.state.log_history if "alp/noise_off/fresh/kl/k3" in row]
    assert f"on fresh rollouts | {log[-1]['alp/noise_off/fresh/kl/k3']:.3g} |" in card
    assert "[None]" not in card and "a fine-tuned version of a local model" in card
    assert card.index("### Adaptive Layerwise") < card.index("### Framework versions")


def test_the_card_of_a_run_without_noise_says_so(tmp_path):
    trainer = tiny.trainer(tmp_path, alp_enabled=False)
    trainer.create_model_card(model_name="x")
    card = (tmp_path / "README.md").read_text()
    assert "Bypass baseline" in card and "| sigma" not in card


def test_config_survives_the_checkpoint_as_json(tmp_path):
    tiny.trainer(tmp_path, save_strategy="steps", save_steps=1, max_steps=1, alp_layers=[0]).train()
    args = torch.load(tmp_path / "checkpoint-1" / "training_args.bin", weights_only=False)
    assert args.alp_layers == [0] and args.delta is None
    json.dumps(args.to_dict())
