# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""Adaptive Layerwise Perturbation (arXiv 2603.19470) for TRL's GRPO."""

from .config import ALPGRPOConfig
from .perturbation import LayerwisePerturbation
from .ratio import log_importance_ratio
from .trainer import ALPGRPOTrainer
from .watching import instrument


__version__ = "0.1.0"
__all__ = ["ALPGRPOConfig", "ALPGRPOTrainer", "LayerwisePerturbation", "instrument", "log_importance_ratio"]
