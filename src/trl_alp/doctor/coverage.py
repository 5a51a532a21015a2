# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""Coverage: how much nearer the noise-averaged policy is to the engine than the policy is.

    coverage = 1 - KL(q || E_delta p_delta) / KL(q || p)

with the engine's policy q, the training policy p and its perturbed self p_delta: 1 where the engine is what noise
makes of the policy on average, 0 where noise brings it no nearer, below 0 where it takes the policy further away.
"""

import math

import torch


class NoiseAverage:
    """
    The mean of probabilities over draws of the noise, and its divergence from an engine.

    The divergence from a mean over n draws is above that from the expectation by about 1 / n of the divergence of the
    noise, which is as large as the mismatch that is asked about. Two things take most of it away: draws come in pairs
    of opposite sign, and what two means over half of the draws are above the mean over all of them is taken off once
    more.

    Args:
        draws (`int`):
            How many there will be, a multiple of 4.
    """

    def __init__(self, draws: int) -> None:
        self.draws, self._added = draws, 0
        self._halves: list[torch.Tensor | float] = [0.0, 0.0]

    def add(self, logps: torch.Tensor) -> None:
        """Add a draw, log-probs over the vocabulary; the second of each two is the first's opposite.  # (N, V)"""
        half = self._added // 2 % 2
        self._halves[half] = self._halves[half] + logps.exp()
        self._added += 1

    def divergence_from(self, engine: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """KL(engine || E p_delta) at each token; arguments as in [`divergence`], and the sampled tokens (N, 1).
        # (N,)"""
        first, second = self._halves
        sums = ((first + second, self.draws), (first, self.draws / 2), (second, self.draws / 2))
        logarithms = [(each / count).clamp(min=torch.finfo(torch.float32).tiny).log() for each, count in sums]
        if engine.dim() == 1:
            logarithms = [each.gather(-1, tokens)[:, 0] for each in logarithms]
        whole, *halves = (divergence(engine, each) for each in logarithms)
        return 2 * whole - sum(halves) / 2


def divergence(engine: torch.Tensor, policy: torch.Tensor) -> torch.Tensor:
    """
    KL(engine || policy) at each token, in nats.

    Args:
        engine, policy (`torch.Tensor` of shape `(N, V)` or `(N,)`):
            Log-probs of the whole vocabulary, or of the tokens that the engine sampled, of which k3 is taken: in
            expectation the same, and never below 0.

    Returns:
        `torch.Tensor` of shape `(N,)`, fp64.
    """
    if engine.dim() == 2:
        return (engine.exp() * (engine - policy)).double().nan_to_num(0.0, 0.0, 0.0).sum(-1)
    gap = (policy - engine).double().clamp(-20, 20)
    return gap.expm1() - gap


def coverage(averaged: list[float], plain: list[float]) -> tuple[float, float] | None:
    """
    Coverage and its standard error.

    Args:
        averaged, plain (`list[float]`):
            Of each completion, the sums over its tokens of KL(q || E p_delta) and of KL(q || p). Completions are
            independent of each other, tokens of one are not.

    Returns:
        `tuple[float, float]`: The ratio of the sums taken from 1, and its standard error over completions. `None`
            where KL(q || p) is nothing.
    """
    above, below = torch.tensor(averaged, dtype=torch.float64), torch.tensor(plain, dtype=torch.float64)
    total = below.sum()
    if total <= 0:
        return None
    ratio = above.sum() / total
    rows = len(plain)
    spread = (above - ratio * below).square().sum() * rows / max(rows - 1, 1)
    return 1 - ratio.item(), (spread.sqrt() / total).item() if rows > 1 else math.inf
