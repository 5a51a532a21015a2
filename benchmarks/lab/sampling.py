# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""Sampling at temperature 1 that reports the log-probs it sampled with: the lab's inference engine."""

import torch
from transformers import DynamicCache


@torch.no_grad()
def sample(
    model,
    prompt_ids: torch.Tensor,
    eos: int,
    generator: torch.Generator,
    limit: int,
    prompt_mask: torch.Tensor | None = None,
) -> tuple[list[list[int]], list[list[float]]]:
    """
    Sample completions at temperature 1, and the log-probs that the model sampled them with.

    Args:
        model: A causal language model, in any number format.
        prompt_ids (`torch.Tensor` of shape `(B, P)`): Prompts, padded on the left if at all.
        eos (`int`): Id of the token that ends a completion.
        generator (`torch.Generator`): Source of all randomness, on the model's device.
        limit (`int`): No completion has more tokens.
        prompt_mask (`torch.Tensor` of shape `(B, P)`, *optional*): 0 where a prompt is padded.

    Returns:
        Completion ids, the end of sequence included, and their log-probs in nats, for each prompt.
    """
    cache, tokens, logprobs = DynamicCache(config=model.config), [], []
    step, where = prompt_ids.to(generator.device), {}
    padded = prompt_mask is not None and not prompt_mask.all()
    if padded:
        mask = prompt_mask.to(generator.device)
        where = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    finished = torch.zeros_like(step[:, 0], dtype=torch.bool)
    while len(tokens) < limit and not finished.all():
        logits = model(step, past_key_values=cache, use_cache=True, logits_to_keep=1, **where).logits[:, -1].float()
        scores = logits.log_softmax(-1)  # (B, V)
        step = scores.exp().multinomial(1, generator=generator)
        tokens.append(step)
        logprobs.append(scores.gather(-1, step))
        finished |= step[:, 0] == eos
        if padded:
            mask = torch.nn.functional.pad(where["attention_mask"], (0, 1), value=1)
            where = {"attention_mask": mask, "position_ids": where["position_ids"][:, -1:] + 1}
    ids, logprobs = torch.cat(tokens, 1).tolist(), torch.cat(logprobs, 1).tolist()
    lengths = [row.index(eos) + 1 if eos in row else len(row) for row in ids]
    ids, logprobs = ([row[:n] for row, n in zip(rows, lengths, strict=True)] for rows in (ids, logprobs))
    return ids, logprobs
