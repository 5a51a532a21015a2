# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""The importance ratio, the second half of ALP (arXiv 2603.19470, section 3).

One ratio, of the (perturbed) policy against the behaviour policy that sampled the tokens:

    g_t = p_t - q_t,      p = log-prob under the policy (has gradient),      q = log-prob under the behaviour policy

and its logarithm `u` by level, with `m` the loss mask and `sg` the stop-gradient:

    token                        g_t
    sequence                     sg(sum_s m_s g_s)                         + p_t - sg(p_t)
    sequence_geometric           sg(sum_s m_s g_s / max(sum_s m_s, 1))     + p_t - sg(p_t)
    cumulative_token             sg(sum_{s<=t} m_s g_s)                    + p_t - sg(p_t)
    cumulative_token_geometric   sg(sum_{s<=t} m_s g_s / sum_{s<=t} m_s)   + p_t - sg(p_t)
    cumulative_turn              sg(sum_{s<=end of t's turn} m_s g_s)      + p_t - sg(p_t)

so that every token receives gradient through its own `p_t` only, with unit slope. This module is made of pure tensor
functions and knows nothing of TRL.
"""

import torch


LEVELS: tuple[str, ...] = (
    "token",
    "sequence",
    "sequence_geometric",
    "cumulative_token",
    "cumulative_token_geometric",
    "cumulative_turn",
)
# Bound on |log ratio|, applied before the exponential; the gradient is 0 outside (reference code of the paper).
MAX_LOG_RATIO = 20.0


def log_probability_gap(logps: torch.Tensor, behaviour_logps: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    Per-token log-prob gap `g = p - q`.

    Args:
        logps (`torch.Tensor` of shape `(B, T)`):
            Log-probs of the sampled tokens under the policy, in nats.
        behaviour_logps (`torch.Tensor` of shape `(B, T)`):
            Log-probs under the behaviour policy. Where they are not finite (vLLM reports NaN for some tokens), the gap
            is `p - sg(p)`: ratio 1 with unit slope.
        mask (`torch.Tensor` of shape `(B, T)`):
            Loss mask, nonzero where the policy is trained.

    Returns:
        `torch.Tensor` of shape `(B, T)`: The gap, 0 outside the mask.
    """
    behaviour_logps = torch.where(torch.isfinite(behaviour_logps), behaviour_logps, logps.detach())
    return torch.where(mask.bool(), logps - behaviour_logps, 0.0)


def turns_from_mask(mask: torch.Tensor) -> torch.Tensor:
    """
    Number the turns of each sequence; a turn is a maximal run of loss-mask 1.

    Args:
        mask (`torch.Tensor` of shape `(B, T)`):
            Loss mask.

    Returns:
        `torch.Tensor` of shape `(B, T)`, int64: Turn index from 0; positions outside the mask carry the index of the
            turn before them (0 before the first).
    """
    mask = mask.bool()
    before = torch.nn.functional.pad(mask[:, :-1], (1, 0), value=False)
    return ((mask & ~before).cumsum(-1) - 1).clamp(min=0)


def raw_log_ratio(
    gap: torch.Tensor, mask: torch.Tensor, level: str = "token", turn_ids: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Logarithm of the importance ratio at `level`, before the clamp.

    Args:
        gap (`torch.Tensor` of shape `(B, T)`):
            Log-prob gap from [`log_probability_gap`].
        mask (`torch.Tensor` of shape `(B, T)`):
            Loss mask.
        level (`str`, *optional*, defaults to `"token"`):
            One of [`LEVELS`]; the table at the top of this module defines them. `"sequence"` is the true product of
            the token ratios, not their geometric mean as in TRL's `importance_sampling_level="sequence"`.
        turn_ids (`torch.Tensor` of shape `(B, T)`, int64, *optional*):
            Turn of each token, from 0 and never decreasing along a sequence; read by `"cumulative_turn"`. Defaults to
            [`turns_from_mask`].

    Returns:
        `torch.Tensor` of shape `(B, T)`: The log ratio, 0 outside the mask.

    Raises:
        `ValueError`: If `level` is unknown.
    """
    check_level(level)
    if level == "token":
        return gap
    mask = mask.bool()
    value = gap.detach()
    if level == "sequence":
        aggregate = value.sum(-1, keepdim=True)
    elif level == "sequence_geometric":
        aggregate = value.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    elif level == "cumulative_token":
        aggregate = value.cumsum(-1)
    elif level == "cumulative_token_geometric":
        aggregate = value.cumsum(-1) / mask.cumsum(-1).clamp(min=1)
    else:
        turn_ids = turns_from_mask(mask) if turn_ids is None else turn_ids
        per_turn = value.new_zeros(value.size(0), value.size(1)).scatter_add_(-1, turn_ids, value)
        aggregate = per_turn.cumsum(-1).gather(-1, turn_ids)
    return torch.where(mask, aggregate + (gap - value), 0.0)


def log_importance_ratio(
    logps: torch.Tensor,
    behaviour_logps: torch.Tensor,
    mask: torch.Tensor,
    level: str = "token",
    turn_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Logarithm of the importance ratio at `level`, clamped to `[-20, 20]`.

    Args:
        logps (`torch.Tensor` of shape `(B, T)`):
            Log-probs of the sampled tokens under the policy, in nats.
        behaviour_logps (`torch.Tensor` of shape `(B, T)`):
            Log-probs under the behaviour policy; where not finite, the token's own ratio is 1 with unit slope.
        mask (`torch.Tensor` of shape `(B, T)`):
            Loss mask: completion tokens minus tool output.
        level (`str`, *optional*, defaults to `"token"`):
            One of [`LEVELS`].
        turn_ids (`torch.Tensor` of shape `(B, T)`, int64, *optional*):
            Turn of each token, for `"cumulative_turn"`; defaults to the runs of the mask.

    Returns:
        `torch.Tensor` of shape `(B, T)`: `u`, 0 outside the mask. `du_t/dp_t` is 1 inside the clamp and 0 outside it.
    """
    gap = log_probability_gap(logps, behaviour_logps, mask)
    return raw_log_ratio(gap, mask, level, turn_ids).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def dual_clip(
    advantages: torch.Tensor, epsilon_low: float, epsilon_high: float, bound: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Clip range of each sequence that bounds the ratio by `bound` where the advantage is negative, and only there.

    The clipped surrogate `max(-A r', -A clip(r, 1 - low, 1 + high))` with `r' = min(r, ceiling)` is then
    `min(-A bound, max(-A r, -A clip(r, 1 - epsilon_low, 1 + epsilon_high)))` for `A < 0`, also where `bound` is below
    `1 + epsilon_high`, and unchanged elsewhere.

    Args:
        advantages (`torch.Tensor` of shape `(B,)` or `(B, T)`):
            Advantages.
        epsilon_low (`float`):
            Lower clip range.
        epsilon_high (`float`):
            Upper clip range.
        bound (`float`):
            The bound, above 1 (the paper's dual clip `c`).

    Returns:
        `tuple` of three `torch.Tensor` of shape `(B, 1)` or `(B, T)`: `low`, `high` and `ceiling`.
    """
    advantages = advantages if advantages.dim() > 1 else advantages.unsqueeze(1)
    ceiling = torch.full_like(advantages, torch.inf).masked_fill(advantages < 0, bound)
    return torch.full_like(ceiling, epsilon_low), (ceiling - 1).clamp(max=epsilon_high), ceiling


def check_level(level: str, name: str = "level") -> None:
    """Raise a `ValueError`, which calls it `name`, unless `level` is one of [`LEVELS`]."""
    if level not in LEVELS:
        raise ValueError(f"{name}={level!r} is unknown. Use one of {list(LEVELS)}.")
