# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""The lab's real task: SmolLM2-135M-Instruct on GSM8K, without the hub.

As in Precision-RL's sanity test (arXiv 2510.26788): the model is fine-tuned on the worked solutions until it has
something to lose, and the training problems that it gets right in some of eight samples and wrong in others are kept.
Every arm should be able to drive the reward on those up; an arm that cannot is broken. A completion is right if what
follows its last `####` is the answer.

Two things are made once for a folder: `adapter`, a LoRA adapter of under 16 MiB, which is merged into the weights so
that all runs start from the same ones, and `mixed.json`, the numbers of the problems that were kept.
"""

import json
import random
import sys
from pathlib import Path

import torch
from filelock import FileLock
from sampling import sample


ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))

import smollm2  # noqa: E402


DATA = ROOT / "real_parts" / "gsm8k"  # `real.sh pack` puts it there
RANK = 16
SAMPLES = 8
SERVED_IN = ("exact", "bf16", "fp8", "int8-32", "int4-32", "int3-32")
# What the preparation takes; a run's setting `prepare` changes what it names.
PREPARE = {"steps": 400, "batch": 32, "learning_rate": 1e-3, "candidates": 1500, "batch_of_samples": 1024}


def is_correct(completions: list[str], answer: list[str], **kwargs) -> list[float]:
    """Reward: 1 if what follows the last `####` is the answer, else 0."""
    parts = (text.rpartition("####") for text in completions)
    found = (number.strip().replace(",", "") if mark else None for _, mark, number in parts)
    return [float(number == right) for number, right in zip(found, answer, strict=True)]


def longest(settings: dict) -> int:
    """Tokens of the longest completion."""
    return settings["max_completion_length"] or 256


def read(tokenizer, split: str) -> list[dict]:
    """Problems as prompts in the model's chat format, answers, and worked solutions without calculator notes."""
    rows = []
    for line in (DATA / f"{split}.jsonl").read_text().splitlines():
        row = json.loads(line)
        solution, _, answer = row["answer"].rpartition("####")
        while "<<" in solution:
            before, _, after = solution.partition("<<")
            solution = before + after.partition(">>")[2]
        messages = [{"role": "user", "content": row["question"]}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        answer = answer.strip().replace(",", "")
        rows.append({"prompt": prompt, "answer": answer, "worked": f"{solution}#### {answer}"})
    return rows


def start(settings: dict, cache: Path):
    """The model that all runs start from, its tokenizer, the training problems that were kept, and held-out ones."""
    from peft import PeftModel

    model, tokenizer = smollm2.load()
    model.to(settings["device"])
    train = read(tokenizer, "train")
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / "gsm8k.lock"):  # the first of several processes makes them
        adapter, mixed = cache / "adapter", cache / "mixed.json"
        if not (adapter / "adapter_config.json").exists():
            fine_tune(model, tokenizer, train, adapter, settings)
        policy = PeftModel.from_pretrained(model, adapter).merge_and_unload()
        if not mixed.exists():
            mixed.write_text(json.dumps(mixed_problems(policy, tokenizer, train, settings)))
    policy.requires_grad_(True)
    kept = [train[index] for index in json.loads(mixed.read_text())]
    return policy, tokenizer, kept, read(tokenizer, "test")


def autocast(device: str):
    return torch.autocast("cuda", torch.bfloat16, enabled=str(device).startswith("cuda"))


def fine_tune(model, tokenizer, problems: list[dict], folder: Path, settings: dict) -> None:
    """Imitate the worked solutions with an adapter, and save it in bf16; the model itself stays as it is."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    prepare = PREPARE | settings["prepare"]
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"))
    optimizer = torch.optim.AdamW((p for p in adapted.parameters() if p.requires_grad), lr=prepare["learning_rate"])
    draw = random.Random(0)
    adapted.train()
    for step in range(prepare["steps"]):
        for group in optimizer.param_groups:  # to zero, linearly
            group["lr"] = prepare["learning_rate"] * (1 - step / prepare["steps"])
        rows = [draw.choice(problems) for _ in range(prepare["batch"])]
        prompts = [len(tokenizer(row["prompt"])["input_ids"]) for row in rows]
        texts = [row["prompt"] + row["worked"] + tokenizer.eos_token for row in rows]
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right").to(adapted.device)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        for label, prompt in zip(labels, prompts, strict=True):
            label[:prompt] = -100
        with autocast(settings["device"]):
            loss = adapted(**batch, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(adapted.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    narrow = {name: value.bfloat16() for name, value in get_peft_model_state_dict(adapted).items()}
    adapted.save_pretrained(folder, state_dict=narrow)
    adapted.unload()


def completions(model, tokenizer, problems: list[dict], settings: dict, generator: torch.Generator) -> list[str]:
    batch = tokenizer([row["prompt"] for row in problems], return_tensors="pt", padding=True, padding_side="left")
    with autocast(settings["device"]):
        ids, _ = sample(
            model, batch["input_ids"], tokenizer.eos_token_id, generator, longest(settings),
            batch["attention_mask"],
        )  # fmt: skip
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


@torch.no_grad()
def mixed_problems(model, tokenizer, problems: list[dict], settings: dict) -> list[int]:
    """Numbers of the problems that are right in some samples and wrong in others."""
    prepare, generator = PREPARE | settings["prepare"], torch.Generator(model.device).manual_seed(0)
    model.eval()
    chosen, at_once = [], max(1, prepare["batch_of_samples"] // SAMPLES)
    for first in range(0, prepare["candidates"], at_once):
        numbers = range(first, min(first + at_once, prepare["candidates"], len(problems)))
        rows = [problems[number] for number in numbers for _ in range(SAMPLES)]
        if not rows:
            break
        texts = completions(model, tokenizer, rows, settings, generator)
        right = torch.tensor(is_correct(texts, [row["answer"] for row in rows])).view(-1, SAMPLES).mean(1)
        chosen += [number for number, share in zip(numbers, right.tolist(), strict=True) if 0 < share < 1]
    return chosen


@torch.no_grad()
def accuracy(model, tokenizer, problems: list[dict], settings: dict) -> float:
    """Share of problems answered correctly by one completion each."""
    was_training = model.training
    model.eval()
    generator = torch.Generator(model.device).manual_seed(0)
    texts = completions(model, tokenizer, problems, settings, generator)
    model.train(was_training)
    return sum(is_correct(texts, [row["answer"] for row in problems])) / len(problems)
