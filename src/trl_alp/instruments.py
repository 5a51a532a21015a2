# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""What a trainer shows of its training-inference mismatch: metrics, envelope and health warnings.

This module measures and shows; what is measured and when is decided in `watching.py`, what is written in
`run_files.py`.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger

from .mismatch import Mismatch, MismatchMeter, bucket_edges, clamped_gap
from .run_files import ENVELOPE, LOG, RunFiles


logger = get_logger(__name__)  # speaks on the main process only

# Metric prefix of each policy that is measured against the behaviour policy.
PREFIXES = {
    "update": "alp",  # the one whose ratio is in the loss
    "noise_off": "alp/noise_off",  # the same one scored without noise (`alp_monitor_every`)
    "old": "alp/old",  # the old policy of stock GRPO, at generation time
}


@dataclass(frozen=True)
class _Bound:
    """A bound on a metric, and whose it is."""

    metric: str
    highest: float
    source: str
    lowest: float = -math.inf


# The bounds of others, since nobody has ours yet. k1 and k3 are different estimates of one divergence, and the
# multiplicative error of tokens a third view; a number of one is no bound on another.
# Held against fresh rollouts without noise: the very weights that sampled.
FRESH_HEALTH = (
    _Bound("fresh/token/mult_prob_error", 1.05, "NeMo-RL, docs/adding-new-models.md"),
    _Bound("fresh/kl/k1", 0.01, "Tinker, docs/rl/rl-hyperparams", lowest=-0.01),
)
# Held against whatever was measured: noise and updates leave no log-prob out.
UNSCORED_HEALTH = (
    _Bound("unscored_share", 0.1, "trl_alp: single tokens without log-prob are usual in vLLM, a tenth is not"),
)
# Held against the policy of the update, however many updates its rollouts have seen.
UPDATE_HEALTH = (
    _Bound("kl/k1", 0.1, "verl, docs/algo/rollout_corr.md", lowest=-0.1),
    _Bound("token/ess", math.inf, "verl, docs/algo/rollout_corr.md", lowest=0.3),
    _Bound("token/chi2", 1.0, "verl, docs/algo/rollout_corr.md"),
)
# Of fewer tokens a mean says too little: with gaps of 0.05 nats, the standard error of k1 over 500 is 0.002.
_FEWEST_TOKENS = 500
# Noise and mismatch within this factor, in k3, are said to be of one size: a factor of 3 in sigma.
_OF_A_SIZE = 10
_COLUMNS = ("step", "policy", "probability_low", "probability_high", "tokens")
_COLUMNS += ("p02", "p25", "p50", "p75", "p98", "min", "max")


class Instruments:
    """
    Measures a trainer's policies against the behaviour policy, and keeps and shows the result.

    At each logging step, in `output_dir/alp/`: `metrics.jsonl`, the log so far, one entry a line, there also when a
    run breaks off before its first checkpoint; and `envelope.jsonl`, percentiles of the token log ratio by bin of
    behaviour-policy token probability (the paper's Figure 2). The envelope goes to wandb and trackio as a table,
    and to tensorboard as text, with a histogram of the log ratio.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            Brings the processes together.
        output_dir (`str`):
            The trainer's.
        report_to (`list[str]`):
            The trainer's.
        level (`str`, *optional*, defaults to `"token"`):
            Level of the ratio in the loss.
        perturbed (`bool`, *optional*, defaults to `False`):
            Whether the policy of the update carries noise. Bounds on an engine are then held against the noise-off
            policy alone.
        monitored (`bool`, *optional*, defaults to `False`):
            Whether the noise-off policy is measured from time to time.
        fitted (`bool`, *optional*, defaults to `False`):
            Whether the noise is fitted to the mismatch, so that nothing need be said of how large both are.
        neftune (`bool`, *optional*, defaults to `False`):
            Whether NEFTune's noise is on, which makes a policy disagree with itself as dropout does.
        log_files (`bool`, *optional*, defaults to `True`):
            Whether to write the files. What cannot be written or shown is warned of once and ends no run.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        output_dir: str,
        report_to: list[str],
        level: str = "token",
        perturbed: bool = False,
        monitored: bool = False,
        fitted: bool = False,
        neftune: bool = False,
        log_files: bool = True,
    ) -> None:
        self.accelerator = accelerator
        self.files = RunFiles(output_dir, log_files)
        self.report_to = report_to
        self.level = level
        self.perturbed, self.monitored, self.neftune = perturbed, monitored, neftune
        self.meters = {policy: MismatchMeter(level) for policy in PREFIXES}
        self._staleness = [0, 0]  # sum and number over the micro-batches of the update
        self._engine = True  # whether an engine reported the behaviour log-probs
        self._failed: set[str] = set()
        self._compared = fitted
        self._warned: set[_Bound] = set()

    def begin(self, step: int, history: Iterable[dict[str, Any]] = (), config: dict[str, Any] | None = None) -> None:
        """Start measuring at a step: 0, or that of the checkpoint a run is resumed from, whose log so far is
        `history`. `config` are the settings to be kept beside the log."""
        for meter in self.meters.values():  # an interrupted run may have left something
            meter.reset()
        self._staleness = [0, 0]
        if self.accelerator.is_main_process:
            self.files.begin(step, history, config)

    def record(
        self,
        policy: str,
        logps: torch.Tensor,
        behaviour_logps: torch.Tensor,
        mask: torch.Tensor,
        staleness: int,
        means: dict[str, tuple[torch.Tensor, torch.Tensor]] | None = None,
        engine: bool = True,
    ) -> None:
        """Pool one micro-batch of a policy; `staleness` is the number of updates since its rollouts were sampled,
        `engine` whether an inference engine reported the behaviour log-probs, and the rest as in
        [`MismatchMeter.update`]."""
        gap = clamped_gap(logps.detach(), behaviour_logps)
        fresh = mask * (staleness == 0)
        means = {
            **(means or {}),
            "fresh/kl/k1": (-gap, fresh),
            "fresh/kl/k3": (gap.expm1() - gap, fresh),
            "fresh/token/mult_prob_error": (gap.abs().exp(), fresh),
        }
        self.meters[policy].update(logps, behaviour_logps, mask, means)
        self._engine = engine
        if policy == "update":
            self._staleness[0] += staleness
            self._staleness[1] += 1

    def flush(self, step: int, tensorboard: Any = None) -> dict[str, float]:
        """
        Metrics of all that was recorded since the last flush; to be called on every process.

        Args:
            step (`int`):
                The logging step.
            tensorboard (`torch.utils.tensorboard.SummaryWriter`, *optional*):
                Where the envelope and the histogram are shown too.
        """
        measured = {}
        for policy, meter in self.meters.items():
            if not meter.empty:
                measured[policy] = meter.compute(
                    lambda pooled: self.accelerator.reduce(pooled, reduction="sum"),
                    lambda extremes: self.accelerator.gather(extremes.unsqueeze(0)).amax(0),
                )
                meter.reset()
        metrics = {
            f"{PREFIXES[policy]}/{name}": value
            for policy, mismatch in measured.items()
            for name, value in mismatch.metrics.items()
        }
        total, micro_batches = self._staleness
        if micro_batches:
            metrics["alp/staleness"] = total / micro_batches
        self._staleness = [0, 0]
        self._check_health(measured, stale=total > 0)
        self._compare_noise(measured)
        if measured and self.accelerator.is_main_process:
            self._show(measured, step, tensorboard)
        return {name: value for name, value in metrics.items() if not math.isnan(value)}

    def append(self, entry: dict[str, Any]) -> None:
        """Add an entry of the trainer's log to `metrics.jsonl`; to be called on the main process."""
        self.files.append(LOG, [entry])

    def _show(self, measured: dict[str, Mismatch], step: int, tensorboard: Any) -> None:
        # Percentiles are exact to 1 %.
        envelope = [
            {"step": step, "policy": policy}
            | {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in row.items()}
            for policy, mismatch in measured.items()
            for row in mismatch.envelope
        ]
        self.files.append(ENVELOPE, envelope)
        if "wandb" in self.report_to:
            with self._survived("wandb"):
                import wandb

                if wandb.run is not None:
                    table = wandb.Table(columns=list(_COLUMNS), data=[[row[c] for c in _COLUMNS] for row in envelope])
                    wandb.log({"alp/envelope": table}, commit=False)
        if "trackio" in self.report_to:
            with self._survived("trackio"):
                import pandas as pd
                import trackio

                trackio.log({"alp/envelope": trackio.Table(dataframe=pd.DataFrame(envelope, columns=_COLUMNS))})
        if tensorboard is not None:
            with self._survived("tensorboard"):
                for policy, mismatch in measured.items():
                    rows = [
                        _COLUMNS[2:],
                        *([row[c] for c in _COLUMNS[2:]] for row in envelope if row["policy"] == policy),
                    ]
                    text = "\n".join("    " + " ".join(f"{cell!s:>16}" for cell in row) for row in rows)
                    tensorboard.add_text(f"{PREFIXES[policy]}/envelope", text, step)
                    _add_histogram(tensorboard, f"{PREFIXES[policy]}/token/log_ratio", mismatch.histogram, step)

    @contextmanager
    def _survived(self, where: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a tracker raises: a picture is no reason to end a run
            if where not in self._failed:
                logger.warning(f"The envelope could not be shown in {where} ({error!r}). Training goes on without it.")
            self._failed.add(where)

    def _check_health(self, measured: dict[str, Mismatch], stale: bool) -> None:
        # The engine is seen best in the policy that has neither noise nor updates in it.
        clean = [name for name in ("noise_off", "old", "update") if name in measured]
        unscored = [line for name in clean[-1:] for line in self._crossed(name, measured[name], UNSCORED_HEALTH)]
        if self.perturbed and "update" in clean:
            clean.remove("update")
        engine = [line for name in clean[:1] for line in self._crossed(name, measured[name], FRESH_HEALTH)]
        update = self._crossed("update", measured["update"], UPDATE_HEALTH) if "update" in measured else []
        if unscored:
            logger.warning("; ".join(unscored) + ". " + _UNSCORED_ADVICE)
        if engine:
            cause = _NEFTUNE if self.neftune else _DROPOUT
            logger.warning("; ".join(engine) + ". " + (_ENGINE_ADVICE if self._engine else _NO_ENGINE_ADVICE + cause))
        if update:
            noise = _NOISE_ADVICE if self.perturbed and not self.monitored else ""
            logger.warning("; ".join(update) + ". " + noise + (_STALE_ADVICE if stale else _FRESH_ADVICE))

    def _compare_noise(self, measured: dict[str, Mismatch]) -> None:
        """Say once how large the noise is beside the mismatch that it is to cover."""
        if not {"update", "noise_off"} <= measured.keys() or self._compared or not self._engine:
            return
        found = [measured[policy] for policy in ("update", "noise_off")]
        names = ("noise/kl/k3", "fresh/kl/k3")
        noise, mismatch = (each.metrics.get(name, math.nan) for each, name in zip(found, names, strict=True))
        if min(each.weights.get(name, 0) for each, name in zip(found, names, strict=True)) < _FEWEST_TOKENS:
            return
        if not (noise >= 0 and mismatch > 0):  # NaN, or an engine that agrees to the last bit
            return
        self._compared = True
        size = (
            f"alp/noise/kl/k3={noise:.2g} beside alp/noise_off/fresh/kl/k3={mismatch:.2g}: the noise moves the "
            f"log-probs {noise / mismatch:.2g} times as much as the engine is off. "
        )
        if noise < mismatch / _OF_A_SIZE:
            advice = "It is too small to act: raise `alp_sigma_init` (k3 goes with its square), or set "
            logger.warning(size + advice + "`alp_noise_target=1.0`.")
        elif noise > mismatch * _OF_A_SIZE:
            advice = "It is larger than what it is to cover: lower `alp_sigma_init`, or set `alp_noise_target=1.0`."
            logger.warning(size + advice)
        else:
            logger.info(size + "It is of the size of what it is to cover.")

    def _crossed(self, policy: str, mismatch: Mismatch, bounds: tuple[_Bound, ...]) -> list[str]:
        """Say of each bound that is crossed for the first time how far."""
        lines = []
        for bound in bounds:
            value = mismatch.metrics[bound.metric]
            if mismatch.weights.get(bound.metric, math.inf) < _FEWEST_TOKENS:
                continue
            if math.isnan(value) or bound.lowest <= value <= bound.highest or bound in self._warned:
                continue
            self._warned.add(bound)
            side, crossed = ("above", bound.highest) if value > bound.highest else ("below", bound.lowest)
            lines.append(f"{PREFIXES[policy]}/{bound.metric}={value:.3g} is {side} {crossed:g} ({bound.source})")
        return lines


_ENGINE_ADVICE = (
    "These rollouts are fresh: the weights that score are those that sampled. So the gap is the inference engine's "
    "(weights that were not synced, log-probs of another distribution, other tokens, low precision) or dropout's, "
    "LoRA's included. `trl-alp doctor` tells which; mend it before tuning anything else."
)
_NO_ENGINE_ADVICE = (
    "These rollouts are fresh and no engine reported log-probs: one policy scored the same tokens twice and disagrees "
    "with itself. "
)
_DROPOUT = "Usually this is dropout: set `disable_dropout=True`, and `lora_dropout=0`."
_NEFTUNE = "This is NEFTune's noise: set `neftune_noise_alpha=None`."
_UNSCORED_ADVICE = (
    "Tokens whose log-prob is not finite, the policy's or the behaviour policy's, are left out of the ratio; so many "
    "are a fault. Look at the `logprobs` that the engine or the `rollout_func` returns, or run `trl-alp doctor`."
)
_NOISE_ADVICE = "The noise is part of it; `alp_monitor_every=10` logs the ratio without noise beside it. "
_STALE_ADVICE = (
    "The policy of the update is far from the one that sampled: take fewer updates per batch of rollouts "
    "(`steps_per_generation`, `num_iterations`) or a lower learning rate. If it is as far at `alp/staleness` 0, look "
    "at the inference engine: run `trl-alp doctor`."
)
_FRESH_ADVICE = (
    "The policy of the update is far from the one that sampled, though no update lies between them "
    "(`alp/staleness` is 0): with ALP's noise on, look at `alp/noise/kl/k3` and lower `alp_sigma_init`; else look at "
    "the inference engine: run `trl-alp doctor`."
)


def _add_histogram(writer: Any, name: str, histogram: torch.Tensor, step: int) -> None:
    """Show a histogram of log ratios, thinned to about 200 buckets around those that hold something."""
    held = histogram.nonzero().flatten()
    if len(held) == 0:
        return
    first, last = held[0].item(), held[-1].item()
    every = max(1, math.ceil((last + 1 - first) / 200))
    edges = bucket_edges()
    counts = [part.sum().item() for part in histogram[first : last + 1].split(every)]
    limits = [edges[min(first + (i + 1) * every, last + 1)].item() for i in range(len(counts))]
    middles = (edges[:-1] + edges[1:]) / 2
    writer.add_histogram_raw(
        name,
        min=edges[first].item(),
        max=edges[last + 1].item(),
        num=histogram.sum().item(),
        sum=(histogram * middles).sum().item(),
        sum_squares=(histogram * middles.square()).sum().item(),
        bucket_limits=limits,
        bucket_counts=counts,
        global_step=step,
    )
