# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""How sharp a policy is: how far the same noise, and rounding of its weights, move its log-probs.

The paper's claim about the mechanism is that training with noise makes a policy less sharp. A sharp one moves far when
its hidden states are disturbed a little. The measure is k3 in nats a token, on completions of the policy's own.
"""

import statistics

import torch
from behaviour import blank_copy, load_as
from sampling import sample

from trl_alp import LayerwisePerturbation


SIGMAS = (0.03, 0.1, 0.3)
DRAWS = 4
FORMATS = ("int4", "int3")


def scorer(tokenizer, problems: list[dict], policy: torch.nn.Module, limit: int):
    """A function of a model that gives the log-probs of completions which `policy` samples, and their mask."""
    prompts = [problem["prompt"] for problem in problems]
    prompts = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left").to(policy.device)
    prompts, prompt_mask = prompts["input_ids"], prompts["attention_mask"]
    generator = torch.Generator(policy.device).manual_seed(0)
    ids, _ = sample(policy, prompts, tokenizer.eos_token_id, generator, limit, prompt_mask)
    padded = tokenizer.pad({"input_ids": ids}, padding_side="right", return_tensors="pt").to(policy.device)
    completions, mask = padded["input_ids"], padded["attention_mask"].bool()  # (B, T)
    inputs, whole = torch.cat([prompts, completions], 1), torch.cat([prompt_mask, padded["attention_mask"]], 1)
    positions = (whole.cumsum(-1) - 1).clamp(min=0)

    def score(model: torch.nn.Module) -> torch.Tensor:
        logits = model(inputs, attention_mask=whole, position_ids=positions).logits
        logits = logits[:, prompts.size(1) - 1 : -1].float()
        return logits.log_softmax(-1).gather(-1, completions[..., None])[..., 0]

    return score, mask


@torch.no_grad()
def flatness(policy: torch.nn.Module, tokenizer, problems: list[dict], limit: int) -> dict[str, list[float]]:
    """
    Mean k3 of the undisturbed policy against the disturbed one, and its standard error over completions.

    Returns:
        `dict`: `[mean, standard error]`, in nats a token, for each sigma of `SIGMAS` (noise at every layer, relative
            to the hidden RMS) and each of `FORMATS`.
    """
    copy = blank_copy(policy)
    load_as("exact", copy, policy.state_dict())
    score, mask = scorer(tokenizer, problems, copy, limit)
    before = score(copy)

    def k3(after: torch.Tensor) -> torch.Tensor:
        gap = after - before
        return torch.where(mask, gap.exp() - 1 - gap, 0.0).sum(1) / mask.sum(1)  # (B,)

    moved: dict[str, torch.Tensor] = {}
    for sigma in SIGMAS:
        perturbation = LayerwisePerturbation(copy, sigma_init=sigma, noise_scale="rms")
        draws = []
        for seed in range(DRAWS):
            with perturbation.applied(seed):
                draws.append(k3(score(copy)))
        moved[f"{sigma:g}"] = torch.stack(draws).mean(0)
        perturbation.remove()
    for numerics in FORMATS:
        load_as(numerics, copy, policy.state_dict())
        moved[numerics] = k3(score(copy))
    return {
        name: [value.mean().item(), statistics.stdev(value.tolist()) / len(value) ** 0.5]
        for name, value in moved.items()
    }
