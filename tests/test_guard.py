"""ALP cannot come loose: a run in which ALP silently does nothing does not start, or stops before the policy steps."""

import copy
import re
from pathlib import Path

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl.experimental.gmpo import GMPOTrainer

from trl_alp import ALPGRPOTrainer, instrument


OFF_POLICY = {"steps_per_generation": 2, "num_iterations": 2}


def trl_style_loss(self, model, inputs):
    """A loss of one's own, as the class docstring asks for it: it scores, then reads the denominator."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    width = inputs["completion_ids"].shape[1]
    logps, _, _ = self._get_per_token_logps_and_entropies(model, ids, mask, width)
    ratio = (logps - inputs["old_per_token_logps"]).exp()
    return -(ratio * inputs["advantages"][:, None] * inputs["completion_mask"]).sum() / inputs["completion_mask"].sum()


class OwnInnerLoss(ALPGRPOTrainer):
    _compute_loss = trl_style_loss


class GMPOFirst(GMPOTrainer, ALPGRPOTrainer):
    pass


class GMPOLast(ALPGRPOTrainer, GMPOTrainer):
    pass


class InHalves(ALPGRPOTrainer):
    def _compute_loss(self, model, inputs):
        rows = len(inputs["completion_ids"])
        halves = [
            {k: v[part] if torch.is_tensor(v) and v.dim() > 0 else v for k, v in inputs.items()}
            for part in (slice(None, rows // 2), slice(rows // 2, None))
        ]
        return sum(super(InHalves, self)._compute_loss(model, half) for half in halves)


class WithAnSFTTerm(ALPGRPOTrainer):
    def compute_loss(self, model, inputs, **kwargs):
        loss = super().compute_loss(model, inputs, **kwargs)
        self.plain = model(inputs["completion_ids"], labels=inputs["completion_ids"]).loss
        return loss + 0.1 * self.plain


class OwnTrainingStep(ALPGRPOTrainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        loss = self.compute_loss(model, self._prepare_inputs(inputs))
        self.accelerator.backward(loss)
        self._step += 1
        return loss.detach()


class ScoresTwice(ALPGRPOTrainer):
    def _compute_loss(self, model, inputs):
        return super()._compute_loss(model, inputs) + 0.5 * super()._compute_loss(model, inputs)


@pytest.mark.parametrize(
    "trainer_class",
    [OwnInnerLoss, GMPOFirst, GMPOLast, InHalves, WithAnSFTTerm, OwnTrainingStep, ScoresTwice],
    ids=lambda c: c.__name__,
)
def test_losses_of_ones_own_train_with_the_noise_in_the_ratio(tmp_path, trainer_class):
    # A ratio of exactly 1 in stale updates, worse than stock, is what each of these could have without a word.
    trainer = tiny.trainer(tmp_path, trainer_class, alp_sigma_init=0.1, max_steps=4, **OFF_POLICY)
    sigma = trainer.perturbation.sigma
    trainer.train()
    assert trainer.state.global_step == 4
    assert not torch.equal(trainer.perturbation.sigma, sigma)
    for row in trainer.state.log_history[:-1]:
        if trainer_class is not InHalves or "alp/log_ratio/max" in row:
            assert row["alp/log_ratio/max"] > 0.01 > -0.01 > row["alp/log_ratio/min"]


def test_the_loss_of_the_docs_trains_as_printed(tmp_path):
    text = (Path(__file__).parent.parent / "docs" / "method.md").read_text()
    (block,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "OwnLossTrainer" in block]
    names = {}
    exec(block, names)
    for level in ("token", "sequence"):
        trainer = tiny.trainer(
            tmp_path, names["OwnLossTrainer"], alp_ratio_level=level, alp_sigma_init=0.1, max_steps=4, **OFF_POLICY
        )
        trainer.train()
        row = trainer.state.log_history[0]
        assert row["alp/log_ratio/max"] - row["alp/log_ratio/min"] > 0.01


def test_a_loss_in_halves_has_the_denominators_of_its_halves(tmp_path, monkeypatch):
    batches = []
    compute_loss = GRPOTrainer._compute_loss

    def recorded(self, model, inputs):
        loss = compute_loss(self, model, inputs)
        batches.append((inputs["sampling_per_token_logps"], inputs["old_per_token_logps"].detach()))
        return loss

    monkeypatch.setattr(GRPOTrainer, "_compute_loss", recorded)
    trainer = tiny.trainer(tmp_path, InHalves, rollout_func=tiny.rollout_func(), max_steps=1)
    trainer.train()
    (whole,) = trainer._buffered_inputs
    assert torch.equal(torch.cat([engine for engine, _ in batches]), whole["sampling_per_token_logps"])
    mask = whole["completion_mask"].bool()
    denominator = torch.cat([old for _, old in batches])
    torch.testing.assert_close(denominator[mask], whole["sampling_per_token_logps"][mask], rtol=0, atol=1e-6)
    # The two halves are two scoring passes, with noise of their own.
    assert trainer.micro_batches == 2


def test_a_plain_forward_inside_the_loss_meets_no_noise(tmp_path):
    class Compare(WithAnSFTTerm):
        def compute_loss(self, model, inputs, **kwargs):
            loss = super().compute_loss(model, inputs, **kwargs)
            ids = inputs["completion_ids"]
            with torch.no_grad():
                again = model(ids, labels=ids).loss
            assert torch.equal(self.plain.detach(), again)
            return loss

    for checkpointing in (False, True):
        tiny.trainer(tmp_path, Compare, alp_sigma_init=0.5, gradient_checkpointing=checkpointing).train()


# ---- What the classes tell ----


class OwnScoring(ALPGRPOTrainer):
    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, **kwargs):
        logits = model(input_ids, attention_mask=attention_mask).logits[:, -logits_to_keep - 1 : -1].log_softmax(-1)
        logps = logits.gather(-1, input_ids[:, -logits_to_keep:, None])[..., 0]
        return logps, torch.zeros_like(logps), None


class OwnLoss(ALPGRPOTrainer):
    def compute_loss(self, model, inputs, **kwargs):
        return trl_style_loss(self, model, {**inputs, "old_per_token_logps": torch.zeros(())})


class TRLsLossTwice(ALPGRPOTrainer):
    def compute_loss(self, model, inputs, **kwargs):  # as TRL's own: it reaches ours only by the inner one
        return self._compute_loss(model, inputs)

    _compute_loss = trl_style_loss


def decorated(function):
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


class Decorated(ALPGRPOTrainer):
    @decorated
    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs)

    @decorated
    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        return super()._get_per_token_logps_and_entropies(*args, **kwargs)


@pytest.mark.parametrize(
    ("trainer_class", "method"),
    [
        (OwnScoring, "_get_per_token_logps_and_entropies"),
        (OwnLoss, "compute_loss"),
        (TRLsLossTwice, "_compute_loss"),
    ],
    ids=["scoring", "loss", "both losses"],
)
def test_an_override_that_cannot_reach_ours_is_an_error_at_construction_with_two_ways_out(
    tmp_path, trainer_class, method
):
    name = trainer_class.__name__
    with pytest.raises(ValueError, match=rf"{name}\.{method} does not reach ALPGRPOTrainer\.{method}") as error:
        tiny.trainer(tmp_path, trainer_class)
    assert f"Call `super().{method}(...)`" in str(error.value) and "come before" in str(error.value)


def test_overrides_that_reach_ours_through_decorators_are_no_error(tmp_path):
    tiny.trainer(tmp_path, Decorated).train()


# ---- What only the run tells ----


class BypassesOnceInAWhile(ALPGRPOTrainer):
    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        if torch.is_grad_enabled():
            return GRPOTrainer._get_per_token_logps_and_entropies(self, model, *args, **kwargs)
        return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)


class LossThatMayReach(ALPGRPOTrainer):
    def compute_loss(self, model, inputs, **kwargs):
        if not torch.is_grad_enabled():
            return super().compute_loss(model, inputs, **kwargs)
        return model(inputs["completion_ids"], labels=inputs["completion_ids"]).loss


class StepOfItsOwn(ALPGRPOTrainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        inputs = self._prepare_inputs(inputs)
        loss = model(inputs["completion_ids"], labels=inputs["completion_ids"]).loss
        self.accelerator.backward(loss)
        return loss.detach()


class NoDenominator(ALPGRPOTrainer):
    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        output.pop("old_per_token_logps")
        return output


class AnotherModel(ALPGRPOTrainer):
    def compute_loss(self, model, inputs, **kwargs):
        return super().compute_loss(self.a_copy, inputs, **kwargs)


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize(
    ("trainer_class", "message"),
    [
        (BypassesOnceInAWhile, "did not go through ALPGRPOTrainer's `_get_per_token_logps_and_entropies`"),
        (LossThatMayReach, "no scoring pass went through the loss of ALPGRPOTrainer"),
        (StepOfItsOwn, "no scoring pass went through the loss of ALPGRPOTrainer"),
        (NoDenominator, "with a ratio of exactly 1"),
        (AnotherModel, "the noise reached no decoder layer"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_step_without_alp_is_an_error_before_the_policy_moves(tmp_path, trainer_class, message, enabled):
    if not enabled and trainer_class in (NoDenominator, AnotherModel):
        pytest.skip("a fault of the noise alone")
    trainer = tiny.trainer(tmp_path, trainer_class, alp_enabled=enabled)
    trainer.a_copy = copy.deepcopy(trainer.model)
    before = tiny.parameters(trainer.model)
    with pytest.raises(RuntimeError, match=message) as error:
        trainer.train()
    assert trainer_class.__name__ in str(error.value) and "use `GRPOTrainer`" in str(error.value)
    assert trainer.state.global_step == 0
    for name, value in tiny.parameters(trainer.model).items():
        assert torch.equal(value, before[name])


def test_a_loss_without_any_forward_is_no_fault(tmp_path):
    class NothingThisTime(ALPGRPOTrainer):
        def compute_loss(self, model, inputs, **kwargs):
            if self.state.global_step == 1:  # as where every group is filtered out; DDP wants every parameter in it
                return 0.0 * sum(p.sum() for p in model.parameters())
            return super().compute_loss(model, inputs, **kwargs)

    trainer = tiny.trainer(tmp_path, NothingThisTime, max_steps=3)
    trainer.train()
    assert trainer.state.global_step == 3


def test_evaluation_and_looks_at_other_policies_are_no_fault(tmp_path):
    class WithATeacher(ALPGRPOTrainer):
        def _compute_loss(self, model, inputs):
            ids, mask = inputs["completion_ids"], inputs["completion_mask"]
            with torch.no_grad():
                self._get_per_token_logps_and_entropies(self.ref_model, ids, mask, 1)
            return super()._compute_loss(model, inputs)

    settings = {"eval_dataset": tiny.prompts(2), "eval_strategy": "steps", "eval_steps": 1, "beta": 0.1}
    settings |= {"per_device_eval_batch_size": 4, "policy": tiny.saved(tmp_path / "policy"), "alp_monitor_every": 1}
    tiny.trainer(tmp_path, WithATeacher, **settings).train()


# ---- The mode of the model ----


@pytest.mark.parametrize("settings", [{}, OFF_POLICY])
def test_a_rollout_func_that_leaves_the_model_in_eval_mode_is_put_right_with_one_warning(tmp_path, caplog, settings):
    def rollout(batch, trainer):
        output = tiny.rollout_func()(batch, trainer)
        trainer.model.eval()
        return output

    trainer = tiny.trainer(tmp_path, rollout_func=rollout, alp_sigma_init=0.1, max_steps=4, **settings)
    trainer.train()
    assert trainer.micro_batches == 4  # the noise was on in each
    assert trainer.state.log_history[0]["alp/noise/effective/mean"] == pytest.approx(1, abs=0.2)
    assert "reward" in trainer.state.log_history[0]  # TRL's training metrics, not those of an evaluation
    assert caplog.text.count("rollout_func left the model in evaluation mode; it was put back") == 1


def test_the_noise_is_on_in_an_update_whatever_the_mode_of_the_model(tmp_path):
    class EvalMode(ALPGRPOTrainer):
        def compute_loss(self, model, inputs, **kwargs):
            model.eval()
            return super().compute_loss(model, inputs, **kwargs)

    trainer = tiny.trainer(tmp_path, EvalMode)
    trainer.train()
    assert trainer.micro_batches == 2


# ---- Nothing to train ----


def frozen(policy):
    return policy.requires_grad_(False)


@pytest.mark.parametrize("kind", ["frozen", "adapter"])
@pytest.mark.parametrize("enabled", [True, False])
def test_a_policy_without_a_trainable_parameter_is_an_error_when_training_begins(tmp_path, kind, enabled):
    policy = tiny.model()
    if kind == "adapter":  # as loaded with `is_trainable=False`
        policy = get_peft_model(policy, LoraConfig(target_modules=["q_proj"], inference_mode=True))
    policy = frozen(policy)
    settings = {"eval_dataset": tiny.prompts(2), "per_device_eval_batch_size": 4, "num_generations_eval": 2}
    trainer = tiny.trainer(tmp_path, policy=policy, alp_enabled=enabled, **settings)
    assert "eval_reward" in trainer.evaluate()  # which needs nothing to train
    with pytest.raises(ValueError, match=r"no trainable parameter.*`is_trainable=True`"):
        trainer.train()


# ---- instrument ----


def test_instrument_warns_of_every_way_of_having_nothing_to_measure(tmp_path, caplog):
    def loss_alone(model, inputs, **kwargs):
        return model(inputs["completion_ids"], labels=inputs["completion_ids"]).loss

    class Outer(GRPOTrainer):
        def compute_loss(self, model, inputs, **kwargs):
            return loss_alone(model, inputs)

    class Inner(GRPOTrainer):
        def _compute_loss(self, model, inputs):
            return loss_alone(model, inputs)

    class Step(GRPOTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = loss_alone(model, self._prepare_inputs(inputs))
            self.accelerator.backward(loss)
            return loss.detach()

    for trainer_class in (Outer, Inner, Step):
        caplog.clear()
        trainer = instrument(tiny.trainer(tmp_path, trainer_class, config_class=GRPOConfig))
        trainer.train()
        assert caplog.text.count("the instruments have nothing to measure") == 1, trainer_class
        assert not any("alp/kl/k3" in row for row in trainer.state.log_history)


def test_a_callback_that_raises_in_the_middle_leaves_the_trainer_usable(tmp_path):
    class Raise(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    trainer = tiny.trainer(tmp_path, callbacks=[Raise()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(Raise)
    trainer.train()
    assert trainer.state.global_step == 2
