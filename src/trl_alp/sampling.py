# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""Which sampling options make completions come from another distribution than the one that is scored."""

from collections.abc import Mapping
from typing import Any


# What leaves the distribution as it is, of each option, with TRL's, vLLM's and transformers' names.
_NEUTRAL: dict[str, tuple] = {
    "top_p": (1.0, None), "top_k": (0, -1, None), "min_p": (0.0, None), "top_h": (None,),
    "typical_p": (1.0, None), "epsilon_cutoff": (0.0, None), "eta_cutoff": (0.0, None),
    "repetition_penalty": (1.0, None), "presence_penalty": (0.0, None), "frequency_penalty": (0.0, None),
    "encoder_repetition_penalty": (1.0, None), "no_repeat_ngram_size": (0, None),
    "encoder_no_repeat_ngram_size": (0, None), "exponential_decay_length_penalty": (None,),
    "min_tokens": (0, None), "min_new_tokens": (0, None), "min_length": (0, None),
    "forced_bos_token_id": (None,), "forced_eos_token_id": (None,),
    "suppress_tokens": (None, []), "begin_suppress_tokens": (None, []), "bad_words": (None, []),
    "bad_words_ids": (None, []), "allowed_token_ids": (None, []), "logit_bias": (None, {}),
    "sequence_bias": (None, {}, []), "guidance_scale": (1, None), "watermarking_config": (None,),
    "penalty_alpha": (0, None), "dola_layers": (None,), "do_sample": (True, None), "num_beams": (1, None),
    "structured_outputs": (None,), "vllm_structured_outputs_regex": (None,),
}  # fmt: skip


def reshaping(options: Mapping[str, Any], temperature: float) -> dict[str, Any]:
    """
    Those of the sampling options that truncate or reweight the distribution.

    Args:
        options (`Mapping[str, Any]`):
            Sampling options by name, TRL's, vLLM's or transformers'; names that say nothing of the distribution may be
            among them.
        temperature (`float`):
            The temperature that log-probs are computed at, the only one that is right.

    Returns:
        `dict[str, Any]`: The options that change the distribution, with their values.
    """
    neutral = _NEUTRAL | {"temperature": (temperature, None)}
    return {name: value for name, value in options.items() if name in neutral and value not in neutral[name]}


def neutral_value(option: str, temperature: float) -> Any:
    """The value at which an option changes nothing."""
    return temperature if option == "temperature" else _NEUTRAL[option][0]
