# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""What separates a policy from the behaviour policy, measured over many micro-batches and processes.

`MismatchMeter` pools log-prob gaps as sums, extremes and histograms, all of fixed size. So nothing is kept of the
micro-batches, nothing waits for the device until the pooled values are asked for, and however many micro-batches and
processes there are, one sum and one maximum over processes bring them together. Sums, extremes and shares are exact;
percentiles are read off histograms with logarithmic buckets, in which each value is off by at most 1 % of itself.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from .ratio import MAX_LOG_RATIO, raw_log_ratio


PERCENTILES = (2, 25, 50, 75, 98)  # the paper's Figure 2 draws the envelope from 2 to 98
# Edges between the bins of behaviour-policy token probability. Improbable tokens are where ratios get heavy-tailed
# (paper, Figure 2); most tokens are near 1.
PROBABILITY_EDGES = (0.0, 1e-4, 1e-3, 1e-2, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999, 1.0)
SHARES_ABOVE = (0.1, 1.0, 5.0)  # of |log ratio|

# Histogram of signed log ratios: bucket i > 0 holds (SMALLEST * GROWTH^(i-1), SMALLEST * GROWTH^i], bucket -i the
# same below 0, bucket 0 what is smaller. Its value is within 1 % of each of its members.
_ACCURACY = 0.01
_GROWTH = (1 + _ACCURACY) / (1 - _ACCURACY)
_SMALLEST, _LARGEST = 1e-7, 1e6
_BUCKETS = math.ceil(math.log(_LARGEST / _SMALLEST) / math.log(_GROWTH))  # on each side of 0
_WIDTH = 2 * _BUCKETS + 1
_TOKEN_BINS = len(PROBABILITY_EDGES) - 1
_VIEWS = ("token", "sequence", "loss")
_SUMS = (
    *("tokens", "k1", "k3", "token/ratio", "token/ratio_squared", "multiplicative_error"),
    *(f"above_{bound:g}" for bound in SHARES_ABOVE),
    *("sequences", "sequence/ratio", "sequence/ratio_squared", "policy_nll", "behaviour_nll"),
    *("units", "loss/ratio", "loss/ratio_squared"),
    "unscored_tokens",
)


class MismatchMeter:
    """
    Pools the log-prob gaps between a policy and the behaviour policy, and turns them into metrics.

    Args:
        level (`str`, *optional*, defaults to `"token"`):
            Level of the importance ratio that is in the loss, one of [`~trl_alp.ratio.LEVELS`].
    """

    def __init__(self, level: str = "token") -> None:
        self.level = level
        self.reset()

    def reset(self) -> None:
        """Forget everything pooled so far."""
        self._sums: torch.Tensor | None = None  # of `_SUMS`, then a (sum, weight) pair for each of `_names`
        self._extremes: torch.Tensor | None = None  # largest g and -g in each of `_VIEWS`
        self._counts: torch.Tensor | None = None  # histograms: a row per probability bin, then sequences, then loss
        self._names: list[str] = []

    @property
    def empty(self) -> bool:
        """Whether nothing has been pooled since the last reset."""
        return self._sums is None

    @torch.no_grad()
    def update(
        self,
        logps: torch.Tensor,
        behaviour_logps: torch.Tensor,
        mask: torch.Tensor,
        means: dict[str, tuple[torch.Tensor, torch.Tensor]] | None = None,
    ) -> None:
        """
        Pool one micro-batch.

        Args:
            logps (`torch.Tensor` of shape `(B, T)`):
                Log-probs of the sampled tokens under the policy, in nats.
            behaviour_logps (`torch.Tensor` of shape `(B, T)`):
                Log-probs under the behaviour policy. Tokens where either is not finite are counted as unscored and
                left out of the rest; over a sequence they contribute a log ratio of 0, as in the loss.
            mask (`torch.Tensor` of shape `(B, T)`):
                Loss mask.
            means (`dict[str, tuple[torch.Tensor, torch.Tensor]]`, *optional*):
                Further quantities by name, each as values and weights of shape `(B, T)`, whose weighted mean over the
                finite values is reported under that name. The same names at every update.
        """
        mask = mask.bool()
        p, q = logps.detach().float(), behaviour_logps.detach().float()
        scored = mask & torch.isfinite(p - q)
        g = torch.where(scored, p - q, 0.0)  # (B, T)
        sequence = g.sum(-1)  # (B,)
        lengths = scored.sum(-1)
        loss = raw_log_ratio(g, mask, self.level)
        units = scored
        if self.level in ("sequence", "sequence_geometric"):
            units = scored & (scored.cumsum(-1) == 1)  # one for each sequence

        clamped = g.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        per_sequence = scored.to(p) / lengths.clamp(min=1).unsqueeze(-1)
        sums = [
            scored,
            _where(scored, -clamped),
            _where(scored, clamped.expm1() - clamped),
            *_ratio_moments(g, scored),
            _where(scored, clamped.abs().exp()),
            *(scored & (g.abs() > bound) for bound in SHARES_ABOVE),
            lengths > 0,
            *_ratio_moments(sequence, lengths > 0),
            _where(scored, -p) * per_sequence,
            _where(scored, -q) * per_sequence,
            units,
            *_ratio_moments(loss, units),
            mask & ~scored,
        ]
        means = means or {}
        for values, weights in means.values():
            weights = _where(torch.isfinite(values), weights)
            sums += [_where(weights > 0, values) * weights, weights]
        wide = torch.float32 if g.device.type == "mps" else torch.float64  # mps has no float64
        sums = torch.stack([value.sum(dtype=wide) for value in sums])
        views = ((g, scored), (sequence, lengths > 0), (loss, units))
        extremes = torch.stack(
            [torch.where(kept, sign * value, -torch.inf).amax() for value, kept in views for sign in (1, -1)]
        )
        if self.empty:
            self._names = list(means)
            self._sums, self._extremes = torch.zeros_like(sums), torch.full_like(extremes, -torch.inf)
            self._counts = torch.zeros((_TOKEN_BINS + 2) * _WIDTH, dtype=wide, device=g.device)
            # Filled on the device: a copy from the host would wait for it.
            self._edges = torch.stack([g.new_full((), math.log(edge)) for edge in PROBABILITY_EDGES[1:-1]])
        self._sums += sums
        self._extremes = torch.maximum(self._extremes, extremes)
        rows = (torch.bucketize(q, self._edges), _TOKEN_BINS, _TOKEN_BINS + 1)
        for row, (value, kept) in zip(rows, views, strict=True):
            self._counts.index_add_(0, (row * _WIDTH + _bucket(value)).flatten(), kept.flatten().to(wide))

    def compute(
        self,
        total: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
        maximum: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
    ) -> "Mismatch":
        """
        What was pooled since the last reset; waits for the device.

        Args:
            total (`Callable`, *optional*):
                Sums a tensor over processes. Defaults to this process alone.
            maximum (`Callable`, *optional*):
                Elementwise maximum over processes.

        Returns:
            [`Mismatch`]
        """
        pooled = total(torch.cat([self._sums, self._counts])).cpu().double()
        extremes = maximum(self._extremes).tolist()
        sums, counts = pooled[: len(self._sums)].tolist(), pooled[len(self._sums) :].view(-1, _WIDTH)
        pairs = sums[len(_SUMS) :]
        means = {name: _divide(*pairs[2 * i : 2 * i + 2]) for i, name in enumerate(self._names)}
        s = dict(zip(_SUMS, sums[: len(_SUMS)], strict=True))
        weights = dict(zip(self._names, pairs[1::2], strict=True))
        weights["unscored_share"] = s["unscored_tokens"] + s["tokens"]
        weights |= dict.fromkeys(("kl/k1", "token/ess", "token/chi2"), s["tokens"])
        histograms = (counts[:_TOKEN_BINS].sum(0), *counts[_TOKEN_BINS:])
        shapes = {
            view: _shape(histogram, -extremes[2 * i + 1], extremes[2 * i])
            for i, (view, histogram) in enumerate(zip(_VIEWS, histograms, strict=True))
        }
        metrics = {}
        for name, value in shapes["loss"].items():
            metrics[f"ratio/{name}"] = math.exp(min(max(value, -MAX_LOG_RATIO), MAX_LOG_RATIO))
        metrics |= {f"log_ratio/{name}": value for name, value in shapes["loss"].items()}
        for view, count in (("loss", "units"), ("token", "tokens"), ("sequence", "sequences")):
            prefix = "" if view == "loss" else f"{view}/"
            first, second = s[f"{view}/ratio"], s[f"{view}/ratio_squared"]
            if view != "loss":
                metrics |= {f"{prefix}log_ratio/{name}": value for name, value in shapes[view].items()}
            metrics[f"{prefix}ess"] = _divide(first**2, s[count] * second)
            metrics[f"{prefix}chi2"] = _divide(second, s[count]) - 1
        for bound in SHARES_ABOVE:
            metrics[f"token/above_{bound:g}"] = _divide(s[f"above_{bound:g}"], s["tokens"])
        metrics["token/mult_prob_error"] = _divide(s["multiplicative_error"], s["tokens"])
        metrics["kl/k1"] = _divide(s["k1"], s["tokens"])
        metrics["kl/k3"] = _divide(s["k3"], s["tokens"])
        policy, behaviour = (_divide(s[f"{who}_nll"], s["sequences"]) for who in ("policy", "behaviour"))
        metrics["perplexity/policy"] = math.exp(min(policy, MAX_LOG_RATIO))
        metrics["perplexity/behaviour"] = math.exp(min(behaviour, MAX_LOG_RATIO))
        metrics["perplexity/log_gap"] = policy - behaviour
        metrics["unscored_tokens"] = s["unscored_tokens"]
        metrics["unscored_share"] = _divide(s["unscored_tokens"], s["unscored_tokens"] + s["tokens"])
        envelope = [
            {
                "probability_low": low,
                "probability_high": high,
                "tokens": int(histogram.sum()),
                **_shape(histogram),
            }
            for low, high, histogram in zip(PROBABILITY_EDGES[:-1], PROBABILITY_EDGES[1:], counts, strict=False)
            if histogram.sum() > 0
        ]
        return Mismatch(metrics | means, weights, envelope, histograms[0])


@dataclass
class Mismatch:
    """
    What a [`MismatchMeter`] measured.

    Attributes:
        metrics (`dict[str, float]`):
            By name, as `docs/metrics.md` defines them; NaN where there was nothing to measure.
        weights (`dict[str, float]`):
            Of how many tokens the metrics with a health bound and each of the further means are (the sum of its
            weights).
        envelope (`list[dict[str, float]]`):
            For each bin of behaviour-policy token probability that has tokens (`probability_low` exclusive,
            `probability_high` inclusive): their number and the percentiles 2, 25, 50, 75, 98 and extremes of their
            log ratio, in nats (the paper's Figure 2), all to 1 %.
        histogram (`torch.Tensor` of shape `(N,)`):
            Tokens in each bucket of log ratio; [`bucket_edges`] are its edges.
    """

    metrics: dict[str, float]
    weights: dict[str, float]
    envelope: list[dict[str, float]]
    histogram: torch.Tensor = field(repr=False)


def clamped_gap(logps: torch.Tensor, behaviour_logps: torch.Tensor) -> torch.Tensor:
    """`p - q` in nats, clamped to ±20 as in the loss; NaN where it is not finite.  # (B, T)"""
    gap = logps - behaviour_logps
    return torch.where(torch.isfinite(gap), gap, torch.nan).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def percentiles(values: torch.Tensor) -> torch.Tensor:
    """
    Percentiles 2, 25, 50, 75 and 98, linearly interpolated, of values at hand.

    Args:
        values (`torch.Tensor` of shape `(N,)`):
            Values, at least one; `torch.quantile` refuses more than 16 million of them, this does not.

    Returns:
        `torch.Tensor` of shape `(5,)`.
    """
    ordered = values.sort().values
    rank = torch.tensor(PERCENTILES, device=values.device, dtype=torch.float64) / 100 * (values.numel() - 1)
    low = rank.floor().long()
    high = rank.ceil().long()
    return torch.lerp(ordered[low], ordered[high], (rank - low).to(values.dtype))


def kl_estimates(gap: torch.Tensor) -> dict[str, torch.Tensor]:
    """
    Estimates of `KL(behaviour || policy)` in nats per token, from tokens the behaviour policy sampled.

    Args:
        gap (`torch.Tensor` of shape `(N,)`):
            Log-prob gaps `g = p - q` of the tokens; clamped to `[-20, 20]`.

    Returns:
        `dict[str, torch.Tensor]` of scalars: `kl/k1 = mean(-g)`, unbiased, and `kl/k3 = mean(exp(g) - 1 - g)`,
            unbiased and never negative (Schulman, "Approximating KL divergence", 2020). NaN if there are no tokens.
    """
    gap = gap.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return {"kl/k1": -gap.mean(), "kl/k3": (gap.expm1() - gap).mean()}


def bucket_edges() -> torch.Tensor:
    """Edges of the histogram buckets, ascending.  # (N + 1,)"""
    upper = _SMALLEST * _GROWTH ** torch.arange(_BUCKETS + 1, dtype=torch.float64)
    return torch.cat([-upper.flip(0), upper])


def _where(kept: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return torch.where(kept, values, 0.0)


def _ratio_moments(log_ratio: torch.Tensor, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    return _where(kept, ratio), _where(kept, ratio.square())


def _bucket(value: torch.Tensor) -> torch.Tensor:
    """Index in `[0, _WIDTH)` of each log ratio's histogram bucket."""
    size = (value.abs() / _SMALLEST).clamp(min=1).log() / math.log(_GROWTH)
    return (value.sign() * size.ceil().clamp(max=_BUCKETS)).long() + _BUCKETS


def _shape(histogram: torch.Tensor, low: float = -math.inf, high: float = math.inf) -> dict[str, float]:
    """Percentiles and extremes of a histogram; `low` and `high` are the extremes where they are known exactly."""
    count = histogram.sum().item()
    names = [f"p{percentile:02d}" for percentile in PERCENTILES]
    if count == 0:
        return dict.fromkeys([*names, "min", "max"], math.nan)
    position = torch.tensor([0, *PERCENTILES, 100], dtype=torch.float64) / 100 * (count - 1)
    cumulative = histogram.cumsum(0)
    # Linear interpolation between the two values next to it, as numpy does; rank k lies in the first bucket with more
    # than k values up to it.
    below, above = (
        torch.searchsorted(cumulative, rank, right=True) - _BUCKETS for rank in (position.floor(), position.ceil())
    )
    value = torch.lerp(_bucket_value(below), _bucket_value(above), position - position.floor()).clamp(low, high)
    lowest, *middle, highest = value.tolist()
    lowest, highest = (low if math.isfinite(low) else lowest), (high if math.isfinite(high) else highest)
    return dict(zip([*names, "min", "max"], [*middle, lowest, highest], strict=True))


def _bucket_value(index: torch.Tensor) -> torch.Tensor:
    size = _SMALLEST * _GROWTH ** (index.abs().double() - 1) * 2 * _GROWTH / (_GROWTH + 1)
    return index.sign() * size


def _divide(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan
