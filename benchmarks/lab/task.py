# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""The lab's task: column addition with the carries written out, and a small model that half knows it.

    347+285=  ->  7+5=12,4+8+1=13,3+2+1=6:632

One token is one character, and the reward is 1 if what follows the colon is the sum. The number of digits is the dial
of length: answers have 21 to 29 tokens at 3 digits, about 100 to 120 at 12, and 250 to 300 at 30. The model is
warm-started once by imitation, until it is right about 40 % of the time at temperature 1, and cached, so that all runs
start from the same weights.
"""

import random
from pathlib import Path

import torch
from filelock import FileLock
from sampling import sample
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM


# What a trained policy may be served in.
SERVED_IN = ("exact", "bf16", "int8", "int6", "int5", "int4", "int3")


def prompt_length(digits: int) -> int:
    """Tokens of a prompt; all prompts of a run are as long, so nothing is padded on the left."""
    return 2 * digits + 2


def max_completion_length(digits: int) -> int:
    """One token more than the longest right answer has."""
    return 10 * digits + 1


def build_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *"0123456789+=,:"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def build_model(tokenizer: PreTrainedTokenizerFast, size: dict[str, int], digits: int = 3) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=size["hidden"],
        intermediate_size=4 * size["hidden"],
        num_hidden_layers=size["layers"],
        num_attention_heads=size["heads"],
        num_key_value_heads=size["heads"],
        max_position_embeddings=max(64, prompt_length(digits) + max_completion_length(digits)),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.eos_token_id,
    )
    return Qwen2ForCausalLM(config)


def work_out(a: int, b: int, digits: int) -> str:
    """The answer, column by column from the right."""
    columns, carry = [], 0
    for place in range(digits):
        left, right = a // 10**place % 10, b // 10**place % 10
        columns.append(f"{left}+{right}" + ("+1" if carry else "") + f"={left + right + carry}")
        carry = (left + right + carry) // 10
    return f"{','.join(columns)}:{a + b}"


def build_problems(digits: int = 3) -> tuple[list[dict], list[dict]]:
    """Sums of two numbers of as many digits: (20000 to train on, 1000 held out)."""
    draw, least = random.Random(0), 10 ** (digits - 1)
    if digits == 3:
        pairs = [divmod(index, 900) for index in draw.sample(range(900 * 900), 21000)]
    else:  # too many to draw from without replacement; that two are equal is out of the question
        pairs = [(draw.randrange(9 * least), draw.randrange(9 * least)) for _ in range(21000)]
    sums = [(least + a, least + b) for a, b in pairs]
    problems = [{"prompt": f"{a}+{b}=", "answer": str(a + b), "worked": work_out(a, b, digits)} for a, b in sums]
    return problems[1000:], problems[:1000]


def is_correct(completions: list[str], answer: list[str], **kwargs) -> list[float]:
    """Reward: 1 if the completion's part after its colon is the sum, else 0."""
    return [float(text.rpartition(":")[2] == right) for text, right in zip(completions, answer, strict=True)]


@torch.no_grad()
def accuracy(model, tokenizer, problems: list[dict], settings: dict | None = None) -> float:
    """Share of problems answered correctly by one completion each."""
    was_training = model.training
    model.eval()
    prompt_ids = tokenizer([problem["prompt"] for problem in problems], return_tensors="pt")["input_ids"]
    generator = torch.Generator(model.device).manual_seed(0)
    limit = max_completion_length(prompt_ids.size(1) // 2 - 1)
    ids, _ = sample(model, prompt_ids, tokenizer.eos_token_id, generator, limit)
    model.train(was_training)
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return sum(is_correct(texts, [problem["answer"] for problem in problems])) / len(problems)


def warm_start(
    folder: Path, size: dict[str, int], target: float, device: str = "cpu", digits: int = 3
) -> tuple[Qwen2ForCausalLM, PreTrainedTokenizerFast]:
    """The model that all runs start from: imitation until `target` of the held-out problems are right; cached."""
    tokenizer = build_tokenizer()
    if (folder / "config.json").exists():
        return Qwen2ForCausalLM.from_pretrained(folder).to(device), tokenizer
    torch.manual_seed(0)
    model = build_model(tokenizer, size, digits).to(device)
    train, held_out = build_problems(digits)
    rate = 1e-3 * min(1, 96 / size["hidden"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    draw = random.Random(1)
    model.train()
    longer = digits / 3  # as many tokens a step at every length
    for step in range(4000):
        rows = [draw.choice(train) for _ in range(round(128 / longer))]
        texts = [row["prompt"] + row["worked"] + "<eos>" for row in rows]
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right").to(device)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        labels[:, : prompt_length(digits)] = -100
        loss = model(**batch, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        every = round(20 * longer)
        if step % every == every - 1 and accuracy(model, tokenizer, held_out[:500]) >= target:
            model.save_pretrained(folder)
            return model, tokenizer
    raise RuntimeError(f"The warm start did not reach an accuracy of {target} in 4000 steps.")


# ---- What a run asks of its task ----


def start(settings: dict, cache: Path) -> tuple[Qwen2ForCausalLM, PreTrainedTokenizerFast, list[dict], list[dict]]:
    """The model that the run starts from, its tokenizer, the problems to train on, and those held out."""
    size, target, digits = settings["size"], settings["start_accuracy"], settings["digits"]
    name = f"warm-{size['hidden']}x{size['layers']}-{target}" + (f"-{digits}digits" if digits != 3 else "")
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"{name}.lock"):  # the first of several processes makes it
        policy, tokenizer = warm_start(cache / name, size, target, settings["device"], digits)
    return policy, tokenizer, *build_problems(digits)


def longest(settings: dict) -> int:
    """Tokens of the longest completion."""
    return settings["max_completion_length"] or max_completion_length(settings["digits"])
