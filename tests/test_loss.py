"""The loss that TRL computes from ALP's denominator and bounds, against the loop reference."""

import math

import pytest
import reference
import tiny
import torch
from trl import GRPOTrainer

from trl_alp.ratio import LEVELS


B, T = 4, 6
ADVANTAGES = tiny.tensor([1.3, -0.7, 0.0, -2.1], dtype=torch.float64)
MASK = tiny.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0]])
TOOL_MASK = tiny.tensor([[1, 1, 0, 0, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 1, 0, 1, 1], [1, 0, 1, 1, 1, 1]])


def scored_batch(monkeypatch, spread, tools=False, seed=0):
    """A micro-batch and the log-probs `p` that the model is made to return for it."""
    generator = torch.Generator().manual_seed(seed)
    p = (-3 * torch.rand(B, T, generator=generator, dtype=torch.float64)).to(tiny.DEVICE).requires_grad_()
    q = p.detach() - spread * torch.randn(B, T, generator=generator, dtype=torch.float64).to(tiny.DEVICE)
    inputs = {
        "prompt_ids": torch.full((B, 2), 5, device=tiny.DEVICE),
        "prompt_mask": torch.ones(B, 2, dtype=torch.long, device=tiny.DEVICE),
        "completion_ids": torch.full((B, T), 6, device=tiny.DEVICE),
        "completion_mask": MASK,
        "advantages": ADVANTAGES,
        "sampling_per_token_logps": q,
        "num_items_in_batch": (MASK * TOOL_MASK if tools else MASK).sum(),
    }
    if tools:
        inputs["tool_mask"] = TOOL_MASK
    monkeypatch.setattr(
        GRPOTrainer,
        "_get_per_token_logps_and_entropies",
        lambda self, model, *args, **kwargs: (p, torch.zeros_like(p), None),
    )
    return p, q, inputs


def trained(tmp_path, **config):
    trainer = tiny.trainer(tmp_path, per_device_train_batch_size=B, **config)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


@pytest.mark.parametrize("tools", [False, True])
@pytest.mark.parametrize(
    ("low", "high", "dual_clip"), [(0.5, 3.0, 10.0), (0.5, 3.0, 3.0), (0.2, 0.28, None), (0.5, 3.0, 1.2)]
)
@pytest.mark.parametrize("level", LEVELS)
def test_loss_and_gradient_equal_the_reference(tmp_path, monkeypatch, level, low, high, dual_clip, tools):
    trainer = trained(tmp_path, alp_ratio_level=level, epsilon=low, epsilon_high=high, alp_dual_clip=dual_clip)
    mask = MASK * TOOL_MASK if tools else MASK
    for spread in (0.1, 1.0, 8.0):  # inside the clip range, across it, beyond the clamp
        p, q, inputs = scored_batch(monkeypatch, spread, tools)
        loss = trainer.compute_loss(trainer.model, inputs)
        (gradient,) = torch.autograd.grad(loss, p)
        on_cpu = (each.cpu() for each in (p, q, mask, ADVANTAGES))
        expected = reference.token_mean(reference.token_losses(*on_cpu, level, low, high, dual_clip)).to(p.device)
        (expected_gradient,) = torch.autograd.grad(expected, p)
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-9)


def test_reference_covers_every_branch_of_the_loss(monkeypatch):
    # Otherwise the test above could pass without meeting a bound: count the branches its data reaches.
    p, q, _ = scored_batch(monkeypatch, 8.0)
    rows = reference.log_ratio(p, q, MASK, "token")
    pairs = [(float(ADVANTAGES[b]), float(u.detach())) for b, row in enumerate(rows) for u in row if u is not None]
    assert any(a > 0 and u > math.log(4) for a, u in pairs)
    assert any(a < 0 and u < math.log(0.5) for a, u in pairs)
    assert any(a < 0 and u > math.log(10) for a, u in pairs)
    rows = reference.log_ratio(p, q, MASK, "sequence")
    assert any(abs(float(u.detach())) > 20 for row in rows for u in row if u is not None)


@pytest.mark.parametrize("level", LEVELS)
def test_what_is_set_for_the_loss_is_put_back_also_after_an_exception(tmp_path, monkeypatch, level):
    trainer = trained(tmp_path, alp_ratio_level=level)
    _, _, inputs = scored_batch(monkeypatch, 1.0)
    before = dict(inputs)
    trainer.compute_loss(trainer.model, inputs)
    assert inputs.keys() == before.keys() and all(inputs[name] is before[name] for name in before)
    assert (trainer.epsilon_low, trainer.epsilon_high, trainer.args.delta) == (0.5, 3.0, None)

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", fail)
    with pytest.raises(KeyboardInterrupt):
        trainer.compute_loss(trainer.model, inputs)
    assert (trainer.epsilon_low, trainer.epsilon_high, trainer.args.delta) == (0.5, 3.0, None)
    assert trainer.perturbation.scoring is None and trainer._update is None


def test_dual_clip_bounds_negative_advantages_only_below_the_upper_clip(tmp_path, monkeypatch):
    # c = 1.2 < 1 + epsilon_high: TRL's `delta` would bound positive advantages too, and negative ones not at all.
    trainer = trained(tmp_path, alp_dual_clip=1.2, epsilon_high=3.0)
    p, _, inputs = scored_batch(monkeypatch, 0.0)
    inputs["sampling_per_token_logps"] = p.detach() - math.log(2)  # ratio 2 everywhere
    inputs["completion_mask"] = torch.ones_like(MASK)
    inputs["num_items_in_batch"] = tiny.tensor(B * T)
    (gradient,) = torch.autograd.grad(trainer.compute_loss(trainer.model, inputs), p)
    assert (gradient[0] != 0).all()  # A > 0: 2 < 4, not clipped
    assert (gradient[1] == 0).all() and (gradient[3] == 0).all()  # A < 0: 2 > 1.2


def test_users_delta_takes_the_place_of_the_dual_clip(tmp_path, monkeypatch, caplog):
    trainer = trained(tmp_path, delta=1.5)
    assert "delta=1.5 takes the place of alp_dual_clip=10.0" in caplog.text
    stock = tiny.trainer(
        tmp_path, GRPOTrainer, per_device_train_batch_size=B,
        epsilon=0.5, epsilon_high=3.0, delta=1.5, use_bias_correction_kl=False,
    )  # fmt: skip
    stock.model.train()
    stock.current_gradient_accumulation_steps = 1
    _, q, inputs = scored_batch(monkeypatch, 1.0)
    loss = trainer.compute_loss(trainer.model, dict(inputs))
    assert torch.equal(loss, stock.compute_loss(stock.model, inputs | {"old_per_token_logps": q}))


def test_off_policy_mask_sees_the_behaviour_policy_at_every_level(tmp_path, monkeypatch):
    # With the aggregated denominator in its place, the sequence's KL would count T times.
    kept = {}
    monkeypatch.setattr(
        GRPOTrainer, "get_off_policy_mask", staticmethod(lambda **kw: kept.update(kw) or tiny.tensor([[1.0]] * B))
    )
    trainer = trained(tmp_path, alp_ratio_level="sequence", off_policy_mask_threshold=0.5)
    _, q, inputs = scored_batch(monkeypatch, 1.0)
    del inputs["sampling_per_token_logps"]
    trainer.compute_loss(trainer.model, inputs | {"old_per_token_logps": q})
    assert torch.equal(kept["sampling_per_token_logps"], q)


def test_kl_term_uses_the_perturbed_policy_and_reaches_sigma(tmp_path):
    trainer = tiny.trainer(tmp_path, policy=tiny.saved(tmp_path / "policy"), beta=0.5, alp_sigma_init=0.1)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    batch = trainer._prepare_inputs([trainer.train_dataset[i // 4] for i in range(8)])
    batch["advantages"] = torch.zeros(8, device=tiny.DEVICE)  # leaves the KL term alone
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    assert loss.item() > 1e-4  # the policy is the reference policy: without noise the KL would be 0
    assert (trainer.perturbation.log_sigma.grad > 0).all()
