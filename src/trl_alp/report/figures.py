# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""Which figures there are: what each draws, of which keys, and what is said of it."""

from functools import partial

from .drawing import FEWEST_TOKENS, by_probability, envelope, lines, sigma


_BAND = (
    "Band: 2nd to 98th percentile before any clip, darker: 25th to 75th, line: median (seeds: mean of each); 0 is "
    "equal probability, 0.7 twice and -0.7 half of it. Healthy: "
)
_BINS = (
    "Bars: 2nd to 98th percentile over the last tenth of the log, darker: 25th to 75th, tick: median; dashed: 2nd and "
    f"98th over its first tenth (bins of {FEWEST_TOKENS} tokens or more). Healthy: narrow bars around 0 that did not "
    "grow. "
)
# By section: file, title, unit, keys (the first that a run logged is drawn), who logs them, caption, how to draw.
FIGURES = {
    "Learning": [
        ("reward", "Reward", "mean reward", ("reward",), "GRPO",
         "Mean reward of the sampled completions. Healthy: it rises and stays.", lines),
        ("eval_reward", "Reward in evaluation", "mean reward", ("eval_reward",), "an `eval_dataset`",
         "Mean reward on the evaluation data. Healthy: it follows the training reward.", lines),
        ("entropy", "Entropy", "nats per token", ("entropy",), "GRPO",
         "Entropy of the policy in the update (with ALP, of the perturbed one). Healthy: it falls slowly or levels "
         "off, and neither drops to 0 nor shoots up.", lines),
        ("grad_norm", "Gradient norm", "norm before clipping", ("grad_norm",), "the Trainer",
         "Norm of the policy's gradient before it is clipped. Healthy: no spikes by an order of magnitude.",
         partial(lines, scale="log")),
        ("length", "Completion length", "tokens", ("completions/mean_length",), "GRPO",
         "Mean length of the completions. Healthy: no jumps, and no creeping towards the limit.", lines),
        ("kl_reference", "KL to the reference policy", "nats per token", ("kl",), "GRPO with `beta > 0`",
         "TRL's `kl`, of the policy from the reference policy. Healthy: it grows slowly and levels off.",
         partial(lines, scale="log")),
    ],
    "Policy against behaviour policy": [
        ("kl_k3", "KL to the behaviour policy, k3", "nats per token", ("alp/kl/k3",), "trl_alp",
         "The steadier estimate, never negative. Healthy: small, and no spikes by an order of magnitude; it rises and "
         "falls with staleness.", partial(lines, scale="log")),
        ("kl_k1", "KL to the behaviour policy, k1", "nats per token", ("alp/kl/k1",), "trl_alp",
         "The unbiased estimate of the same, on a log axis both ways (linear between the dotted lines), since it can "
         "fall below 0 by chance. Healthy: positive on average; where it stays below 0, the tokens were probably not "
         "sampled from the log-probs that were reported.", partial(lines, scale="symlog")),
        ("ratio_token", "Log ratio of tokens", "log ratio (nats)", ("alp/token/log_ratio/p50",), "trl_alp",
         _BAND + "a narrow band around 0 that does not widen over the run.", envelope),
        ("ratio_sequence", "Log ratio of sequences", "log ratio (nats)", ("alp/sequence/log_ratio/p50",), "trl_alp",
         _BAND + "as for tokens, but wider, since it sums over a sequence's tokens.", envelope),
        ("ratio_loss", "Log ratio in the loss", "log ratio (nats)", ("alp/log_ratio/p50",), "trl_alp",
         _BAND + "a narrow band around 0 that does not widen over the run. (`alp_ratio_level` says of what.)",
         partial(envelope, unlike="alp/token/log_ratio")),
        ("probability", "Log ratio by token probability", "log ratio (nats)", ("update",), "trl_alp's envelope files",
         _BINS, by_probability),
        ("old", "Update (band) and old policy (dashed)", "log ratio of tokens (nats)",
         ("alp/old/token/log_ratio/p50",), "`instrument` where the old policy is scored",
         "Band: 2nd to 98th and 25th to 75th percentile of the updated policy; dashed: 2nd and 98th of the old one, "
         "where no update lies between. Healthy: narrow dashed lines; a band that goes beyond them is due to updates.",
         partial(envelope, base="alp/token/log_ratio")),
        ("probability_old", "Old policy by token probability", "log ratio (nats)", ("old",),
         "`instrument` where the old policy is scored", _BINS, by_probability),
        ("ess", "Effective sample size of tokens", "share of the tokens", ("alp/token/ess",), "trl_alp",
         "How many tokens would do the work of all, weighted by their ratio before any clip. Healthy: near 100 %; "
         "when low, few tokens would carry the update.", partial(lines, scale="share")),
        ("clip_low", "Clipped from below", "share of tokens", ("alp/clip/low", "clip_ratio/low_mean"),
         "losses that clip", "Tokens with a negative advantage and a ratio below the clip range: they give no "
         "gradient. Healthy: a few per cent at most.", partial(lines, scale="share")),
        ("clip_high", "Clipped from above", "share of tokens", ("alp/clip/high", "clip_ratio/high_mean"),
         "losses that clip", "Tokens with a positive advantage and a ratio above the clip range: they give no "
         "gradient. Healthy: a few per cent at most.", partial(lines, scale="share")),
        ("clip_dual", "Dual clip", "share of tokens", ("alp/clip/dual",), "`alp_dual_clip`",
         "Tokens with a negative advantage and a ratio above the dual clip. Healthy: almost none.",
         partial(lines, scale="share")),
        ("staleness", "Staleness", "optimiser steps", ("alp/staleness",), "trl_alp",
         "Updates since the rollouts in use were generated. Healthy: what the settings ask for (below "
         "`steps_per_generation` times `num_iterations`), without growing.", lines),
        ("engine", "Engine against trainer, by TRL", "nats per token", ("sampling/sampling_logp_difference/mean",),
         "TRL with vLLM", "Mean absolute difference of their log-probs. Healthy: small and flat.",
         partial(lines, scale="log")),
    ],
    "Noise": [
        ("noise_off", "Noise on (band) and off (dashed)", "log ratio (nats)", ("alp/noise_off/log_ratio/p50",),
         "ALP with `alp_monitor_every`", "Band: 2nd to 98th and 25th to 75th percentile of the perturbed policy; "
         "dashed: 2nd and 98th of the same policy without noise, where the monitor ran. Healthy: narrow dashed lines, "
         "which show staleness and mismatch; how far the band goes beyond them is due to the noise.",
         partial(envelope, base="alp/log_ratio")),
        ("probability_noise_off", "Noise off, by token probability", "log ratio (nats)", ("noise_off",),
         "ALP with `alp_monitor_every`", _BINS, by_probability),
        ("sigma", "Sigma by layer", "sigma", ("alp/sigma/mean",), "ALP with noise",
         "Size of the noise at the input of each layer, as a share of the hidden state's RMS (or absolute, with "
         "`alp_noise_scale=\"absolute\"`). Healthy: it moves slowly and does not sit at `alp_sigma_min` or "
         "`alp_sigma_max`.", sigma),
        ("noise_effective", "Noise that survives rounding", "realised / asked", ("alp/noise/effective/min",),
         "ALP with noise", "Standard deviation of the noise that reaches the layer where most is lost, over what was "
         "asked for. Healthy: near 100 %; below 10 % the layer is as good as unperturbed.",
         partial(lines, scale="share")),
    ],
}  # fmt: skip

# What most questions are answered by; the other figures are folded away.
MAIN = ("reward", "eval_reward", "length", "kl_k3", "ratio_token", "ess")
WORDS = {
    "behaviour policy": "the policy that sampled the rollouts: the inference engine, at the weights it had then.",
    "ratio": "probability of a token under the policy in the update over that under the behaviour policy; it is 1 "
    "where they agree.",
    "KL, k3": "how far the policy is from the behaviour policy, in nats per token: mean ratio - 1 - log(ratio).",
    "effective sample size": "the share of equally weighted tokens that would know as much as the weighted ones.",
    "staleness": "optimiser steps between the generation of a rollout and its use.",
    "sigma": "size of ALP's noise at the input of a layer.",
    "P2, P98": "the 2nd and 98th percentile: 96 of 100 tokens lie between them.",
}


def drawn(key: str) -> bool:
    """Whether a key of the log is in a figure or in the answer."""
    return key in _KEYS or key.startswith(("alp/sigma/", "eval_")) or key.rpartition("/")[0] in _PERCENTILES_OF


_PLAN = [figure for figures in FIGURES.values() for figure in figures]
_KEYS = {key for figure in _PLAN for key in figure[3]} | {"loss", "step_time", "train_runtime"}
_PERCENTILES_OF = {key.removesuffix("/p50") for key in _KEYS if key.endswith("/p50")} | {"alp/log_ratio"}
