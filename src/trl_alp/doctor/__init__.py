# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""The mismatch doctor: what is the gap between training model and inference engine made of? See docs/doctor.md.

`engines.py` and `vllm_engines.py` are what is examined, `counterfactuals.py` how it may have come to its log-probs,
`examination.py` the search among them, `weights.py` and `trainer_side.py` what is asked of the engine and of the
trainer alone, `diagnosis.py` the whole, `findings.py` its words, `figure.py` its picture, `__main__.py` the command.
`noise.py` asks whether noise would cover an engine, `coverage.py` measures it, `noise_answer.py` has the words.
Nothing here is needed for training.
"""

import importlib
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .diagnosis import diagnose as diagnose
    from .engines import Engine as Engine
    from .engines import GenerationSetting as GenerationSetting
    from .engines import Samples as Samples
    from .engines import TransformersEngine as TransformersEngine
    from .figure import draw as draw
    from .findings import Diagnosis as Diagnosis
    from .findings import Finding as Finding
    from .noise import ask_noise as ask_noise
    from .noise_answer import NoiseAnswer as NoiseAnswer
    from .noise_answer import NoiseVariant as NoiseVariant
    from .vllm_engines import VLLMEngine as VLLMEngine
    from .vllm_engines import VLLMServerEngine as VLLMServerEngine

_MODULES = {
    "Diagnosis": "findings",
    "Engine": "engines",
    "Finding": "findings",
    "GenerationSetting": "engines",
    "NoiseAnswer": "noise_answer",
    "NoiseVariant": "noise_answer",
    "Samples": "engines",
    "TransformersEngine": "engines",
    "VLLMEngine": "vllm_engines",
    "VLLMServerEngine": "vllm_engines",
    "ask_noise": "noise",
    "diagnose": "diagnosis",
    "draw": "figure",
}
__all__ = sorted(_MODULES)


def __getattr__(name: str):
    """PEP 562: help and version of the command import no torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
