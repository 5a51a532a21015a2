# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""The sigma that one measurement gives, beside that of bisection, for engines in several number formats.

    python examples/smollm2.py smollm2 && python benchmarks/fit.py smollm2       # ten minutes on two cores
    python benchmarks/fit.py smollm2 --lora --numerics int4                      # the policy has an adapter
    python benchmarks/fit.py runs/lab/warm-96x4-0.4 --sums --repeat 8            # the lab's model, after its first run

The engine is the model in bf16, or with its matrices rounded: fp8 is e4m3 with a scale a row, int4 has a scale for
each 32 weights. It samples, and its log-probs are the behaviour policy's. *Fitted* is the sigma that
`alp_noise_target=1.0` sets after the first update, from one probe; *bisected* is the sigma at which the noise,
averaged over other seeds, is as far from the policy as the engine is.
"""

import argparse
import copy
import math
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_alp import LayerwisePerturbation
from trl_alp.fit import SigmaFit


QUESTIONS = (
    "What is 17 + 25?", "Name the capital of France.", "Write one sentence about the sea.",
    "If x + 3 = 10, what is x?", "List three prime numbers greater than 10.", "Why is the sky blue?",
    "Translate to French: good morning.",
    "A train leaves at 9:40 and arrives at 11:15. How long is the journey?",
)  # fmt: skip


def rounded(weight: torch.Tensor, numerics: str) -> torch.Tensor:
    if numerics == "fp8":
        scale = weight.abs().amax(1, keepdim=True) / 448
        return (weight / scale).to(torch.float8_e4m3fn).float() * scale
    groups = weight.reshape(-1, 32)
    step = groups.abs().amax(1, keepdim=True).clamp(min=1e-9) / 7
    return ((groups / step).round() * step).reshape(weight.shape)


def engine_of(model, numerics: str):
    engine = copy.deepcopy(model)
    if hasattr(engine, "merge_and_unload"):  # an engine has the adapter merged
        engine = engine.merge_and_unload()
    if numerics == "bf16":
        return engine.bfloat16()
    for name, weight in engine.named_parameters():
        if weight.dim() == 2 and "embed" not in name:
            weight.data = rounded(weight.data, numerics)
    return engine


def logps_of(model, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Of each token but the first.  # (B, T - 1)"""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, :-1].float()
    return logits.gather(-1, ids[:, 1:, None])[..., 0] - logits.logsumexp(-1)


@torch.no_grad()
def measure(model, tokenizer, numerics: str, args: argparse.Namespace) -> None:
    engine = engine_of(model, numerics)
    if args.sums:
        sums = [f"{100 + 37 * i % 900}+{100 + 71 * i % 900}=" for i in range(8 * args.repeat)]
        prompt = dict(tokenizer(sums, return_tensors="pt", padding=True, return_token_type_ids=False))
    else:
        chats = [[{"role": "user", "content": question}] for question in QUESTIONS * args.repeat]
        prompt = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
        )
    torch.manual_seed(0)
    ids = engine.generate(**prompt, max_new_tokens=args.tokens, do_sample=True, top_k=0, pad_token_id=0)
    width = prompt["input_ids"].shape[1]
    ended = (ids[:, width:] == tokenizer.eos_token_id).cumsum(1)
    scored = ended - (ids[:, width:] == tokenizer.eos_token_id).long() == 0  # the end itself counts
    mask = torch.cat([prompt["attention_mask"], scored.long()], 1)
    behaviour, plain = (logps_of(each, ids, mask)[:, width - 1 :] for each in (engine, model))
    perturbation = LayerwisePerturbation(model, sigma_init=args.probe)

    def noisy(seed: int) -> torch.Tensor:
        with perturbation.applied(seed):
            return logps_of(model, ids, mask)[:, width - 1 :]

    def k3(log_ratio: torch.Tensor) -> float:
        return (log_ratio.expm1() - log_ratio)[scored].mean().item()

    fit = SigmaFit(perturbation, Accelerator(cpu=True), target=1.0)
    fit.record(noisy(0), plain, behaviour, scored)
    fit.on_optimizer_step(None, None, None)
    fitted, mismatch = fit.level, k3(plain - behaviour)
    low, high = math.log(fitted / 4), math.log(fitted * 4)
    for _ in range(7):
        middle = (low + high) / 2
        perturbation.log_sigma.fill_(middle)
        noise = sum(k3(noisy(seed) - plain) for seed in (1, 2)) / 2
        low, high = (low, middle) if noise > mismatch else (middle, high)
    found = math.exp((low + high) / 2)
    perturbation.remove()
    numbers = (f"{mismatch:.2g}", f"{fitted:.3g}", f"{found:.3g}", f"{fitted / found - 1:+.0%}")
    row = (numerics, scored.sum().item(), *numbers)
    print("|", " | ".join(map(str, row)), "|", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--numerics", nargs="+", default=["bf16", "fp8", "int4"], choices=["bf16", "fp8", "int4"])
    parser.add_argument("--probe", type=float, default=0.01, help="sigma that is tried first")
    parser.add_argument("--tokens", type=int, default=32, help="longest completion")
    parser.add_argument("--repeat", type=int, default=2, help="completions of each of the eight questions")
    parser.add_argument("--sums", action="store_true", help="prompt with the sums that the lab's model knows")
    parser.add_argument("--lora", action="store_true", help="give the policy an adapter, as large as a trained one")
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    if args.sums:
        sys.path.insert(0, str(Path(__file__).parent / "lab"))
        from task import build_tokenizer

        tokenizer = build_tokenizer()
    else:
        tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    if args.lora:
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=1e-3)
        model.eval()
    print("| engine | tokens | mismatch, k3 | fitted | bisected | off by |\n|---|---|---|---|---|---|", flush=True)
    for numerics in args.numerics:
        measure(model, tokenizer, numerics, args)


if __name__ == "__main__":
    main()
