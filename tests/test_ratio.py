import math

import pytest
import reference
import torch

from trl_alp.ratio import (
    LEVELS,
    log_importance_ratio,
    log_probability_gap,
    turns_from_mask,
)


MASKS = {
    "full": [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]],
    "ragged": [[1, 1, 1, 1, 1, 0], [1, 0, 0, 0, 0, 0]],
    "holes": [[1, 1, 0, 0, 1, 1], [0, 1, 0, 1, 0, 1]],
    "one_row_empty": [[0, 0, 0, 0, 0, 0], [1, 1, 0, 1, 0, 0]],
}


def logps(seed=0, spread=1.0):
    torch.manual_seed(seed)
    p = (-3 * torch.rand(2, 6, dtype=torch.float64)).requires_grad_()
    q = p.detach() - spread * torch.randn(2, 6, dtype=torch.float64)
    return p, q


def total(rows, weights):
    return sum(
        u * w for row, ws in zip(rows, weights, strict=True) for u, w in zip(row, ws, strict=True) if u is not None
    )


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("level", LEVELS)
def test_log_ratio_equals_the_loop_reference_in_value_and_gradient(level, mask):
    mask = torch.tensor(MASKS[mask])
    p, q = logps()
    q[1, 1] = math.nan
    u = log_importance_ratio(p, q, mask, level)
    rows = reference.log_ratio(p, q, mask, level)
    for b in range(2):
        for t in range(6):
            expected = 0.0 if rows[b][t] is None else float(rows[b][t].detach())
            assert float(u[b, t].detach()) == pytest.approx(expected, abs=1e-12)
    weights = torch.randn(2, 6, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((u * weights).sum(), p)
    (expected,) = torch.autograd.grad(total(rows, weights), p)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("level", LEVELS)
def test_every_token_has_unit_slope_through_its_own_log_prob_only(level):
    p, q = logps()
    mask = torch.tensor(MASKS["holes"])
    jacobian = torch.autograd.functional.jacobian(lambda x: log_importance_ratio(x, q, mask, level).flatten(), p)
    torch.testing.assert_close(jacobian.view(12, 12), torch.diag(mask.flatten().double()))


@pytest.mark.parametrize("level", LEVELS)
def test_log_ratio_is_clamped_at_20_with_zero_gradient_outside(level):
    p = torch.zeros(2, 3, requires_grad=True)
    q = torch.tensor([[1e4, 1e4, 1e4], [-1e4, -1e4, -1e4]])
    u = log_importance_ratio(p, q, torch.ones(2, 3), level)
    assert u[0].tolist() == [-20.0] * 3 and u[1].tolist() == [20.0] * 3
    u.exp().sum().backward()
    assert p.grad.tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("level", LEVELS)
def test_non_finite_behaviour_log_prob_is_ratio_one_with_unit_slope(level, value):
    p = torch.tensor([[-1.0]], requires_grad=True)
    u = log_importance_ratio(p, torch.tensor([[value]]), torch.ones(1, 1), level)
    u.exp().sum().backward()
    assert u.item() == 0.0 and p.grad.item() == 1.0


def test_garbage_outside_the_mask_reaches_neither_value_nor_gradient():
    p = torch.tensor([[-1.0, -math.inf, -2.0]], requires_grad=True)
    q = torch.tensor([[-1.5, 0.0, -2.5]])
    for level in LEVELS:
        u = log_importance_ratio(p, q, torch.tensor([[1, 0, 1]]), level)
        (gradient,) = torch.autograd.grad(u.sum(), p)
        assert torch.isfinite(u).all() and gradient.tolist() == [[1.0, 0.0, 1.0]]


def test_turns_are_maximal_runs_of_the_mask():
    mask = torch.tensor([[0, 1, 1, 0, 0, 1, 0, 1, 1]])
    assert turns_from_mask(mask).tolist() == [[0, 0, 0, 0, 0, 1, 1, 2, 2]]


def test_given_turns_replace_those_of_the_mask():
    p, q = logps()
    mask = torch.ones(2, 6)
    turns = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 1, 2, 3, 4, 5]])
    u = log_importance_ratio(p, q, mask, "cumulative_turn", turns)
    rows = reference.log_ratio(p, q, mask, "cumulative_turn", turns)
    torch.testing.assert_close(u, torch.stack([torch.stack(row) for row in rows]))


def test_unknown_level_names_the_known_ones():
    p, q = logps()
    with pytest.raises(ValueError, match=r"^level='sentence' is unknown.*'sequence_geometric'"):
        log_importance_ratio(p, q, torch.ones(2, 6), "sentence")


def test_gap_is_zero_outside_the_mask():
    p, q = logps()
    gap = log_probability_gap(p, q, torch.tensor(MASKS["ragged"]))
    assert gap[1, 1:].tolist() == [0.0] * 5
