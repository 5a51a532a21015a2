# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""What a trainer shows of its training-inference mismatch: metrics, envelope, files and health warnings.

This module measures and writes; the trainer decides what is measured and when (`trainer.py`).
"""

import json
import math
import os
import shutil
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger

from .mismatch import Mismatch, MismatchMeter, bucket_edges


logger = get_logger(__name__)  # speaks on the main process only

FOLDER = "alp"  # in the trainer's output_dir
# Metric prefix of each policy that is measured against the behaviour policy.
PREFIXES = {
    "update": "alp",  # the one whose ratio is in the loss
    "noise_off": "alp/noise_off",  # the same one scored without noise (`alp_monitor_every`)
    "old": "alp/old",  # the old policy of stock GRPO, at generation time
}


@dataclass(frozen=True)
class _Bound:
    """A published bound on a metric. `fresh`: it holds for the very weights that sampled, not for later ones."""

    metric: str
    highest: float
    source: str
    lowest: float = -math.inf
    fresh: bool = False


# The bounds of others, since nobody has ours yet. k1 and k3 are different estimates of one divergence, and the
# multiplicative error of tokens a third view; a number of one is no bound on another.
HEALTH = (
    _Bound("token/mult_prob_error", 1.05, "NeMo-RL, docs/adding-new-models.md", fresh=True),
    _Bound("kl/k1", 0.01, "Tinker, docs/rl/rl-hyperparams", lowest=-0.01, fresh=True),
    _Bound("kl/k1", 0.1, "verl, docs/algo/rollout_corr.md", lowest=-0.1),
    _Bound("token/ess", math.inf, "verl, docs/algo/rollout_corr.md", lowest=0.3),
    _Bound("token/chi2", 1.0, "verl, docs/algo/rollout_corr.md"),
)


class Instruments:
    """
    Measures a trainer's policies against the behaviour policy, and keeps and shows the result.

    At each logging step, in `output_dir/alp/`: `metrics.jsonl`, the log so far, one entry a line, there also when a
    run breaks off before its first checkpoint; and `envelope_STEP.parquet`, percentiles of the token log ratio by bin
    of behaviour-policy token probability (the paper's Figure 2). The envelope goes to wandb and trackio as a table,
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
            Whether the policy of the update carries noise. Bounds that hold for an engine are then held against the
            noise-off policy only.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        output_dir: str,
        report_to: list[str],
        level: str = "token",
        perturbed: bool = False,
    ) -> None:
        self.accelerator = accelerator
        self.folder = os.path.join(output_dir, FOLDER)
        self.report_to = report_to
        self.level = level
        self.perturbed = perturbed
        self.meters = {policy: MismatchMeter(level) for policy in PREFIXES}
        self._staleness: dict[str, list[int]] = {policy: [] for policy in PREFIXES}
        self._warned: set[_Bound] = set()

    def begin(self, step: int) -> None:
        """Start measuring at a step: 0, or that of the checkpoint a run is resumed from."""
        for policy, meter in self.meters.items():  # an interrupted run may have left something
            meter.reset()
            self._staleness[policy].clear()
        if not (self.accelerator.is_main_process and os.path.isdir(self.folder)):
            return
        if step == 0:  # another run's
            shutil.rmtree(f"{self.folder}.previous", ignore_errors=True)
            os.rename(self.folder, f"{self.folder}.previous")
            return
        log = os.path.join(self.folder, "metrics.jsonl")
        if os.path.isfile(log):  # what is done again is logged again
            with open(log) as file:
                lines = [line for line in file if line.endswith("\n") and json.loads(line)["step"] <= step]
            with open(log, "w") as file:
                file.writelines(lines)

    def record(
        self,
        policy: str,
        logps: torch.Tensor,
        behaviour_logps: torch.Tensor,
        mask: torch.Tensor,
        staleness: int,
        means: dict[str, tuple[torch.Tensor, torch.Tensor]] | None = None,
    ) -> None:
        """Pool one micro-batch of a policy; `staleness` is the number of updates since its rollouts were sampled, and
        the rest as in [`MismatchMeter.update`]."""
        self.meters[policy].update(logps, behaviour_logps, mask, means)
        self._staleness[policy].append(staleness)

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
        if staleness := self._staleness["update"]:
            metrics["alp/staleness"] = sum(staleness) / len(staleness)
        self._check_health(measured)
        self._staleness = {policy: [] for policy in PREFIXES}
        if measured and self.accelerator.is_main_process:
            self._show(measured, step, tensorboard)
        return metrics

    def append(self, entry: dict[str, Any]) -> None:
        """Add an entry of the trainer's log to `metrics.jsonl`; to be called on the main process."""
        os.makedirs(self.folder, exist_ok=True)
        with open(os.path.join(self.folder, "metrics.jsonl"), "a") as file:
            file.write(json.dumps(entry) + "\n")

    def _show(self, measured: dict[str, Mismatch], step: int, tensorboard: Any) -> None:
        rows = [
            {"step": step, "policy": policy, **row}
            for policy, mismatch in measured.items()
            for row in mismatch.envelope
        ]
        envelope = pd.DataFrame(rows)
        os.makedirs(self.folder, exist_ok=True)
        envelope.to_parquet(os.path.join(self.folder, f"envelope_{step:08d}.parquet"), index=False)
        if "wandb" in self.report_to:
            import wandb

            if wandb.run is not None:
                wandb.log({"alp/envelope": wandb.Table(dataframe=envelope)}, commit=False)
        if "trackio" in self.report_to:
            import trackio

            trackio.log({"alp/envelope": trackio.Table(dataframe=envelope)})
        if tensorboard is not None:
            for policy, mismatch in measured.items():
                shown = envelope[envelope["policy"] == policy].drop(columns=["step", "policy"])
                text = "\n".join("    " + line for line in shown.to_string(index=False).splitlines())
                tensorboard.add_text(f"{PREFIXES[policy]}/envelope", text, step)
                _add_histogram(tensorboard, f"{PREFIXES[policy]}/token/log_ratio", mismatch.histogram, step)

    def _check_health(self, measured: dict[str, Mismatch]) -> None:
        policy = next((name for name in ("noise_off", "old", "update") if name in measured), None)
        if policy is None:
            return
        metrics = measured[policy].metrics
        noisy = self.perturbed and policy == "update"
        fresh = not noisy and max(self._staleness[policy]) == 0
        for bound in HEALTH:
            value = metrics[bound.metric]
            if bound in self._warned or (bound.fresh and not fresh) or math.isnan(value):
                continue
            if not bound.lowest <= value <= bound.highest:
                self._warned.add(bound)
                logger.warning(_health_warning(f"{PREFIXES[policy]}/{bound.metric}", value, bound, fresh, noisy))


def _health_warning(name: str, value: float, bound: _Bound, fresh: bool, noisy: bool) -> str:
    crossed = bound.highest if value > bound.highest else bound.lowest
    side = "above" if value > bound.highest else "below"
    message = f"{name}={value:.3g} is {side} {crossed:g}, the bound of {bound.source}. "
    if fresh:
        return message + (
            "These are the weights that sampled, so it comes from the inference engine: weights that were not synced, "
            "log-probs of another distribution (temperature, top_p, the engine's log-prob mode), other tokens, or low "
            "precision. `trl-alp-doctor` tells which; mend it before tuning anything else."
        )
    if noisy:
        message += "The noise is part of it; `alp_monitor_every=10` would log the ratio without noise beside it. "
    return message + (
        "The policy is far from the one that sampled: take fewer updates per batch of rollouts "
        "(`steps_per_generation`, `num_iterations`) or a lower learning rate. If it is as large at `alp/staleness` 0, "
        "it is the engine's: run `trl-alp-doctor`."
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
