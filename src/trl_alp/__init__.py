# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""Adaptive Layerwise Perturbation (arXiv 2603.19470) for TRL's GRPO."""

from importlib import import_module
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .config import ALPGRPOConfig
    from .perturbation import LayerwisePerturbation
    from .ratio import log_importance_ratio
    from .trainer import ALPGRPOTrainer

__version__ = "0.1.0"
__all__ = ["ALPGRPOConfig", "ALPGRPOTrainer", "LayerwisePerturbation", "log_importance_ratio"]

_MODULES = {
    "ALPGRPOConfig": "config",
    "ALPGRPOTrainer": "trainer",
    "LayerwisePerturbation": "perturbation",
    "log_importance_ratio": "ratio",
}


def __getattr__(name: str):
    # On first use, since `trl_alp.report` has no use for torch and TRL, which take seconds to import.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
