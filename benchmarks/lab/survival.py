# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""
How large the noise is beside the mismatch, and how much of it survives in bf16, on the lab's warm-started model:

    python benchmarks/lab/survival.py    # writes benchmarks/results/lab/survival.json

The model's weights are cast, so the hidden states that the noise is added to are bf16 too; under autocast over fp32
weights they stay fp32. Beside it what the lab's behaviour policies do to the log-probs of the same tokens.
"""

import json
from pathlib import Path

import torch
from behaviour import Behaviour
from results import RESULTS
from task import build_problems, prompt_length, warm_start

from trl_alp import LayerwisePerturbation


NOISE = [("rms", sigma) for sigma in (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)]
NOISE += [("absolute", sigma) for sigma in (1e-6, 1e-4, 1e-3, 2e-2)]
NUMERICS = ("bf16", "int8", "int6", "int5", "int4", "int3")
DRAWS = 8


@torch.no_grad()
def completion_logps(model, ids: torch.Tensor) -> torch.Tensor:
    """Log-probs of the tokens after the prompt, in nats.  # (B, T)"""
    logits = model(ids).logits[:, PROMPT_LENGTH - 1 : -1].float()
    return logits.log_softmax(-1).gather(-1, ids[:, PROMPT_LENGTH:, None])[..., 0]


PROMPT_LENGTH = prompt_length(digits=3)


def measure(model, ids: torch.Tensor, mask: torch.Tensor, scale: str, sigma: float) -> dict[str, float]:
    """
    Size of the noise, over `DRAWS` draws of it.

    Args:
        model: In the number format to look at.
        ids (`torch.Tensor` of shape `(B, PROMPT_LENGTH + T)`): Prompts and completions.
        mask (`torch.Tensor` of shape `(B, T)`): Which tokens of the completions count.
        scale, sigma: `alp_noise_scale` and `alp_sigma_init`.

    Returns:
        `survived`, the smallest share of the asked standard deviation that is left in any layer, and `log_ratio_std`,
        the standard deviation of log pi_noisy - log pi over tokens, in nats.
    """
    perturbation = LayerwisePerturbation(model, sigma_init=sigma, sigma_min=sigma, noise_scale=scale)
    clean, gaps, survived = completion_logps(model, ids), [], []
    try:
        for seed in range(DRAWS):
            with perturbation.applied(seed=seed):
                gaps.append((completion_logps(model, ids) - clean)[mask])
            survived.append(perturbation.effective_noise())
    finally:
        perturbation.remove()
    return {
        "survived": torch.stack(survived).mean(0).min().item(),
        "log_ratio_std": torch.cat(gaps).std().item(),
    }


def main() -> None:
    torch.set_num_threads(1)
    model, tokenizer = warm_start(Path("runs/lab/warm-96x4-0.4"), {"hidden": 96, "layers": 4, "heads": 3}, 0.4)
    _, held_out = build_problems()
    texts = [row["prompt"] + row["worked"] + "<eos>" for row in held_out[:128]]
    ids = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")["input_ids"]
    mask = ids[:, PROMPT_LENGTH:] != tokenizer.pad_token_id
    copies = {}
    for numerics in NUMERICS:
        behaviour = Behaviour(numerics, lag=0, seed=0)
        behaviour.sync(model.eval())
        copies[numerics] = behaviour.copy
    clean = completion_logps(model, ids)
    mismatch = {name: (completion_logps(copy, ids) - clean)[mask].std().item() for name, copy in copies.items()}
    precisions = {"fp32": model, "bf16": copies["bf16"]}
    noise = [
        {"scale": scale, "sigma": sigma}
        | {name: measure(each, ids, mask, scale, sigma) for name, each in precisions.items()}
        for scale, sigma in NOISE
    ]
    text = json.dumps({"noise": noise, "mismatch_log_ratio_std": mismatch}, indent=1)
    (RESULTS / "survival.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
