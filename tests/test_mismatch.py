"""The pooled statistics of a policy against the behaviour policy, against numpy on all values at once."""

import math
from itertools import chain

import numpy as np
import pytest
import reference
import torch

from trl_alp.mismatch import PROBABILITY_EDGES, MismatchMeter, bucket_edges, kl_estimates, percentiles
from trl_alp.ratio import LEVELS


SHAPES = ("p02", "p25", "p50", "p75", "p98", "min", "max")


def micro_batch(seed, rows=4, length=30, spread=0.5):
    generator = torch.Generator().manual_seed(seed)
    q = -4 * torch.rand(rows, length, generator=generator) ** 3
    p = q + spread * torch.randn(rows, length, generator=generator)
    mask = (torch.rand(rows, length, generator=generator) < 0.8).long()
    mask[0, 10:] = 0
    return p, q, mask


def pooled(level, batches):
    meter = MismatchMeter(level)
    for batch in batches:
        meter.update(*batch)
    return meter.compute()


def log_ratios(level, p, q, mask):
    """One for each unit of the level, from the loop reference."""
    rows = reference.log_ratio(p.double().requires_grad_(), q.double(), mask, level)
    units = [[float(u.detach()) for u in row if u is not None] for row in rows]
    return [row[0] for row in units if row] if level.startswith("sequence") else list(chain(*units))


@pytest.mark.parametrize("level", LEVELS)
def test_statistics_are_those_of_all_micro_batches_at_once(level):
    batches = [micro_batch(seed) for seed in range(5)]
    metrics = pooled(level, batches).metrics
    for prefix, of in (("", level), ("token/", "token"), ("sequence/", "sequence")):
        u = np.array(list(chain(*(log_ratios(of, *batch) for batch in batches))))
        ratio = np.exp(u.clip(-20, 20))
        for name, expected in zip(SHAPES[:5], np.percentile(u, [2, 25, 50, 75, 98]), strict=True):
            assert metrics[f"{prefix}log_ratio/{name}"] == pytest.approx(expected, rel=0.02, abs=1e-3)
        assert metrics[f"{prefix}log_ratio/min"] == pytest.approx(u.min(), rel=1e-5)
        assert metrics[f"{prefix}log_ratio/max"] == pytest.approx(u.max(), rel=1e-5)
        assert metrics[f"{prefix}ess"] == pytest.approx(ratio.sum() ** 2 / (len(u) * (ratio**2).sum()), rel=1e-4)
        assert metrics[f"{prefix}chi2"] == pytest.approx((ratio**2).mean() - 1, rel=1e-4)
    for name in SHAPES:
        assert metrics[f"ratio/{name}"] == pytest.approx(math.exp(min(20, max(-20, metrics[f"log_ratio/{name}"]))))


def test_token_and_sequence_means_equal_those_computed_by_hand():
    batches = [micro_batch(seed) for seed in range(3)]
    metrics = pooled("token", batches).metrics
    g = np.concatenate([(p - q)[mask.bool()].numpy() for p, q, mask in batches]).astype(float)
    assert metrics["kl/k1"] == pytest.approx(-g.mean(), rel=1e-4)
    assert metrics["kl/k3"] == pytest.approx((np.exp(g) - 1 - g).mean(), rel=1e-4)
    assert metrics["token/mult_prob_error"] == pytest.approx(np.exp(np.abs(g)).mean(), rel=1e-4)
    for bound in (0.1, 1, 5):
        assert metrics[f"token/above_{bound:g}"] == pytest.approx((np.abs(g) > bound).mean(), rel=1e-6)
    nll = [
        [
            -x[row][mask[row].bool()].mean().item()
            for p, q, mask in batches
            for row in range(4)
            for x in [(p, q)[which]]
        ]
        for which in (0, 1)
    ]
    assert metrics["perplexity/policy"] == pytest.approx(np.exp(np.mean(nll[0])), rel=1e-5)
    assert metrics["perplexity/behaviour"] == pytest.approx(np.exp(np.mean(nll[1])), rel=1e-5)
    assert metrics["perplexity/log_gap"] == pytest.approx(np.mean(nll[0]) - np.mean(nll[1]), rel=1e-4)


def test_percentiles_are_within_one_per_cent_over_twelve_orders_of_magnitude():
    for scale in (1e-6, 1e-3, 1.0, 1e4):
        g = torch.randn(1, 20_000, generator=torch.Generator().manual_seed(1), dtype=torch.float32) * scale
        metrics = pooled("token", [(g, torch.zeros_like(g), torch.ones_like(g))]).metrics
        expected = np.percentile(g.numpy(), [2, 25, 50, 75, 98])
        for name, value in zip(SHAPES[:5], expected, strict=True):
            slack = 0.01 * scale if name == "p50" else 0  # around 0, its own size is none to go by
            assert metrics[f"log_ratio/{name}"] == pytest.approx(value, rel=0.0101, abs=slack + 1e-7)


def test_the_order_and_split_of_micro_batches_change_nothing():
    batches = [micro_batch(seed) for seed in range(4)]
    whole = pooled("sequence", [tuple(torch.cat(parts) for parts in zip(*batches, strict=True))])
    for other in (pooled("sequence", batches), pooled("sequence", batches[::-1])):
        assert other.metrics == pytest.approx(whole.metrics, rel=1e-9)
        assert other.envelope == whole.envelope and torch.equal(other.histogram, whole.histogram)


def test_processes_are_brought_together_by_one_sum_and_one_maximum():
    batches = [micro_batch(seed) for seed in range(4)]
    parts = []
    for rank in (0, 1):
        meter = MismatchMeter("token")
        for batch in batches[rank::2]:
            meter.update(*batch)
        seen = []
        meter.compute(lambda x, seen=seen: seen.append(x.clone()) or x, lambda x, seen=seen: seen.append(x) or x)
        parts.append((meter, seen))
    (meter, (total, extremes)), (_, (other_total, other_extremes)) = parts
    together = meter.compute(lambda x: total + other_total, lambda x: torch.maximum(extremes, other_extremes))
    assert together.metrics == pytest.approx(pooled("token", batches).metrics, rel=1e-9)


def test_tokens_without_a_finite_log_prob_are_counted_and_left_out():
    p, q, mask = micro_batch(0)
    clean = pooled("token", [(p, q, mask * 1)]).metrics
    bad = torch.zeros_like(mask)
    bad[1, 3:6] = 1
    for values in (math.nan, math.inf, -math.inf):
        for which in (0, 1):
            pair = [p.clone(), q.clone()]
            pair[which][bad.bool()] = values
            metrics = pooled("token", [(*pair, mask)]).metrics
            assert metrics["unscored_tokens"] == (bad * mask).sum() > 0
            expected = pooled("token", [(p, q, mask * (1 - bad))]).metrics
            expected["unscored_tokens"] = (bad * mask).sum().item()
            expected["unscored_share"] = (bad * mask).sum().item() / mask.sum().item()
            assert metrics == pytest.approx(expected, rel=1e-6) and metrics != pytest.approx(clean, rel=1e-6)


def test_nothing_measured_is_nan_and_huge_gaps_are_finite():
    p, q, mask = micro_batch(0)
    nothing = pooled("token", [(p, q, mask * 0)])
    numbers = {name: value for name, value in nothing.metrics.items() if name != "unscored_tokens"}
    assert all(math.isnan(value) for value in numbers.values()) and nothing.envelope == []
    metrics = pooled("sequence", [(q + 1e4 * torch.randn_like(q), q, mask)]).metrics
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["token/log_ratio/max"] > 1e4  # raw, not clamped


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_envelope_is_the_percentiles_by_behaviour_probability(dtype):
    p, q, mask = (x if x.dtype == torch.long else x.to(dtype) for x in micro_batch(3, rows=16, length=200))
    envelope = pooled("token", [(p, q, mask)]).envelope
    g, probability = (p.float() - q.float())[mask.bool()].numpy(), q.float().exp()[mask.bool()].numpy()
    assert sum(row["tokens"] for row in envelope) == len(g)
    assert [row["probability_low"] for row in envelope] == sorted(row["probability_low"] for row in envelope)
    for row in envelope:
        inside = g[(probability > row["probability_low"]) & (probability <= row["probability_high"])]
        assert row["tokens"] == len(inside)
        for name, value in zip(SHAPES[:5], np.percentile(inside, [2, 25, 50, 75, 98]), strict=True):
            assert row[name] == pytest.approx(value, rel=0.0101, abs=0.02)
    assert {row["probability_high"] for row in envelope} <= set(PROBABILITY_EDGES)


def test_histogram_counts_each_token_between_its_edges():
    p, q, mask = micro_batch(2, rows=8, length=100)
    histogram, edges = pooled("token", [(p, q, mask)]).histogram, bucket_edges()
    counts, _ = np.histogram((p - q)[mask.bool()].double().numpy(), bins=edges.numpy())
    assert len(edges) == len(histogram) + 1
    assert np.abs(np.cumsum(counts) - histogram.cumsum(0).numpy()).max() <= 1  # rounding at an edge


def test_sequences_without_a_scored_token_are_no_units():
    p, q, mask = micro_batch(0)
    q[2] = math.nan
    for level in ("sequence", "sequence_geometric"):
        left_out = pooled(level, [(p[[0, 1, 3]], q[[0, 1, 3]], mask[[0, 1, 3]])]).metrics
        for name, value in pooled(level, [(p, q, mask)]).metrics.items():
            assert value == pytest.approx(left_out[name], rel=1e-9) or "unscored" in name, name


def test_further_means_are_weighted_and_leave_out_what_is_not_finite():
    meter = MismatchMeter()
    values, weights = torch.tensor([[1.0, 3.0, math.nan, math.inf]]), torch.tensor([[0.5, 0.25, 1.0, 1.0]])
    meter.update(torch.zeros(1, 4), torch.zeros(1, 4), torch.ones(1, 4), {"mean": (values, weights)})
    mismatch = meter.compute()
    assert mismatch.metrics["mean"] == pytest.approx((0.5 * 1 + 0.25 * 3) / 0.75)
    assert mismatch.weights["mean"] == 0.75 and mismatch.weights["unscored_share"] == mismatch.weights["kl/k1"] == 4


def test_further_means_are_pooled():
    p, q, mask = micro_batch(0)
    meter = MismatchMeter()
    meter.update(p, q, mask, {"clip": (p > q, mask), "none": (p, torch.zeros_like(mask))})
    meter.update(p, q, mask, {"clip": (p < q, mask), "none": (p, torch.zeros_like(mask))})
    metrics = meter.compute().metrics
    assert metrics["clip"] == pytest.approx(0.5) and math.isnan(metrics["none"])


def test_reset_forgets():
    meter = MismatchMeter()
    meter.update(*micro_batch(0))
    meter.reset()
    assert meter.empty
    meter.update(*micro_batch(1))
    assert meter.compute().metrics == pooled("token", [micro_batch(1)]).metrics


@pytest.mark.parametrize("count", [1, 2, 7, 1000])
def test_percentiles_equal_numpy(count):
    values = torch.randn(count, generator=torch.Generator().manual_seed(count))
    np.testing.assert_allclose(percentiles(values), np.percentile(values, [2, 25, 50, 75, 98]), rtol=1e-5, atol=1e-6)


def test_kl_estimates_approach_the_exact_divergence():
    torch.manual_seed(0)
    behaviour, policy = torch.randn(2, 5, dtype=torch.float64).log_softmax(-1)
    tokens = torch.multinomial(behaviour.exp(), 200_000, replacement=True)
    estimates = kl_estimates((policy - behaviour)[tokens])
    exact = (behaviour.exp() * (behaviour - policy)).sum()
    assert estimates["kl/k1"].item() == pytest.approx(exact.item(), rel=0.03)
    assert estimates["kl/k3"].item() == pytest.approx(exact.item(), rel=0.03)
