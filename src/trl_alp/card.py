# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""The part of a model card that says how the model was perturbed, and how far its rollouts were off."""

from pathlib import Path
from typing import Any


_SETTINGS = (
    "alp_ratio_level",
    "alp_noise_target",
    "alp_noise_scale",
    "alp_noise_profile",
    "alp_layers",
    "alp_learn_sigma",
    "alp_dual_clip",
    "epsilon",
    "epsilon_high",
)
_MEASURED = {
    "alp/noise_off/fresh/kl/k3": "mismatch: k3 of the unperturbed policy on fresh rollouts",
    "alp/noise/kl/k3": "noise: k3 of the perturbed policy from the unperturbed one",
    "alp/kl/k3": "both, and staleness: k3 in the loss",
}


def add_to_card(path: Path, trainer: Any) -> None:
    """
    Add ALP's section to the model card that TRL has written.

    Args:
        path (`Path`):
            The card.
        trainer ([`ALPGRPOTrainer`]):
            Whose settings, sigma and measurements are told; the latter are the last that its log has, in nats a token.
    """
    # Of a base model on disk TRL knows no name, and links to a model called None.
    text = path.read_text().replace("[None](https://huggingface.co/None)", "a local model")
    rows = [f"| `{name}` | {getattr(trainer.args, name)} |" for name in _SETTINGS]
    if trainer.args.alp_enabled:
        sigma = trainer.perturbation.sigma.detach()
        rows.append(f"| sigma, smallest to largest of {len(sigma)} layers | {sigma.min():.3g} to {sigma.max():.3g} |")
    else:
        rows.append("| noise | none (`alp_enabled=False`, the Bypass baseline) |")
    for name, what in _MEASURED.items():
        values = [row[name] for row in trainer.state.log_history if name in row]
        if values:
            rows.append(f"| {what} | {values[-1]:.3g} |")
    section = ["### Adaptive Layerwise Perturbation", "", "| | |", "|---|---|", *rows, "", ""]
    heading = "### Framework versions"
    path.write_text(text.replace(heading, "\n".join(section) + heading, 1))
