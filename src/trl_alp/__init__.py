# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""Adaptive Layerwise Perturbation (arXiv 2603.19470) for TRL's GRPO."""

import importlib
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .config import ALPGRPOConfig as ALPGRPOConfig
    from .console import ConsoleCallback as ConsoleCallback
    from .perturbation import LayerwisePerturbation as LayerwisePerturbation
    from .ratio import log_importance_ratio as log_importance_ratio
    from .trainer import ALPGRPOTrainer as ALPGRPOTrainer
    from .watching import instrument as instrument

__version__ = "0.1.0"
_MODULES = {
    "ALPGRPOConfig": "config",
    "ALPGRPOTrainer": "trainer",
    "ConsoleCallback": "console",
    "LayerwisePerturbation": "perturbation",
    "instrument": "watching",
    "log_importance_ratio": "ratio",
}
__all__ = sorted(_MODULES)


def __getattr__(name: str):
    """PEP 562: the command's help, version and report import no torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
