# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""The mismatch doctor: what is the gap between training model and inference engine made of? See docs/doctor.md.

`engines.py` is what is examined, `counterfactuals.py` how it may have come to its log-probs, `diagnosis.py` the search
among them, `figure.py` its picture, `__main__.py` the command. Nothing here is needed for training.
"""

from .diagnosis import Diagnosis, Finding, diagnose
from .engines import Engine, GenerationSetting, Samples, TransformersEngine, VLLMEngine, VLLMServerEngine
from .figure import draw


__all__ = [
    "Diagnosis",
    "Engine",
    "Finding",
    "GenerationSetting",
    "Samples",
    "TransformersEngine",
    "VLLMEngine",
    "VLLMServerEngine",
    "diagnose",
    "draw",
]
