# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""Numbers of a gap `p - q` in nats, one value for each token: its size, the published bounds, and where it is."""

import math
from itertools import pairwise

import torch

from ..mismatch import kl_estimates, percentiles


# Healthy, as published: Tinker's documentation calls training stable with KL(sampler || learner) below 0.01 nats
# per token, by either estimate; prime-rl asks for less than 0.015 of a new architecture.
MAX_KL = 0.01
# NeMo-RL's guide to new models: mean(exp(|p - q|)) above 1.05 needs a look.
MAX_PROBABILITY_ERROR = 1.05
# Nats per token. Two fp32 implementations agree to 1e-5 (docs/compatibility.md); no gap below this is looked into.
FLOOR = 1e-4
# Rounding differs between kernels: up to this many times the rounding of transformers in the engine's dtype counts as
# precision. Measured with vLLM in bf16, with and without an fp8 KV cache: 0.9 to 1.5 times.
ROUNDING_FACTOR = 3.0
# A hypothesis is believed if what it removes is this many standard errors of the mean above 0, over tokens.
MIN_T = 5.0
# TRL's default `epsilon`: outside of 1 - epsilon to 1 + epsilon a token's gradient may be clipped.
CLIP_RANGE = (0.8, 1.2)
PROBABILITY_EDGES = (0.0, 1e-4, 1e-3, 1e-2, 0.1, 0.5, 0.9, 0.99, 1.0)


def magnitude(gap: torch.Tensor) -> float:
    """Mean |gap| in nats, each token counting at most 1 (NaN too), so that a few wild tokens do not decide."""
    gap = torch.nan_to_num(gap.double(), nan=1.0, posinf=1.0, neginf=-1.0)
    return float(gap.abs().clamp(max=1).mean()) if gap.numel() else 0.0


def gap_statistics(gap: torch.Tensor) -> dict[str, float]:
    """Mean, mean and median |gap|, KL estimates and NeMo-RL's probability error of a gap `p - q` of shape `(N,)`."""
    gap = torch.nan_to_num(gap.double(), posinf=20.0, neginf=-20.0)
    kl = kl_estimates(gap)
    return {
        "mean": float(gap.mean()),
        "abs_mean": magnitude(gap),
        "median_abs": float(gap.abs().median()),
        "kl_k1": float(kl["kl/k1"]),
        "kl_k3": float(kl["kl/k3"]),
        "probability_error": float(gap.abs().clamp(max=20).exp().mean()),
    }


def share_outside(gap: torch.Tensor, low: float, high: float) -> float:
    """Share of the tokens whose ratio `exp(p - q)` is outside of `[low, high]`."""
    ratio = gap.double().exp()
    return float(((ratio < low) | (ratio > high)).double().mean()) if gap.numel() else 0.0


def within_published(statistics: dict[str, float]) -> bool:
    """Whether the gap is within the thresholds that Tinker and NeMo-RL publish."""
    kl = max(statistics["kl_k3"], abs(statistics["kl_k1"]))
    return kl < MAX_KL and statistics["probability_error"] < MAX_PROBABILITY_ERROR


def by_position(gap: torch.Tensor, position: torch.Tensor) -> list[dict]:
    """The gap by position in the completion, in bins that double."""
    edges = [0]
    while len(position) and edges[-1] <= int(position.max()):
        edges.append(max(1, 2 * edges[-1]))
    rows = []
    for low, high in pairwise(edges):
        values = gap[(position >= low) & (position < high)]
        if len(values):
            rows.append({"from": low, "to": high - 1} | _bin(values))
    return rows


def by_probability(gap: torch.Tensor, q: torch.Tensor) -> list[dict]:
    """The gap by the probability the engine gave the token."""
    probability = q.exp()
    rows = []
    for low, high in pairwise(PROBABILITY_EDGES):
        values = gap[((probability > low) | (low == 0)) & ((probability <= high) | (high == 1))]
        if len(values):
            rows.append({"above": low, "to": high} | _bin(values))
    return rows


def _bin(gap: torch.Tensor) -> dict:
    p02, _, p50, _, p98 = percentiles(gap).tolist()
    return {
        "tokens": len(gap),
        "mean": float(gap.mean()),
        "abs_mean": magnitude(gap),
        "p02": p02,
        "p50": p50,
        "p98": p98,
    }


def t_statistic(gain: torch.Tensor) -> float:
    """Mean over its standard error, of one value for each token, shape `(N,)`."""
    gain = gain.double()
    return float(gain.mean() / (gain.std() / math.sqrt(len(gain))).clamp(min=1e-12)) if len(gain) > 1 else 0.0
