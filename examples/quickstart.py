# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""
ALP-GRPO from nothing to a figure, on a CPU, offline, in a few minutes:

    python examples/quickstart.py

A small decoder LM learns two-digit addition by imitation until it is right less than half of the time, then
`ALPGRPOTrainer` trains it off-policy, 8 updates per batch of rollouts, on a reward that checks the sum. Printed:
accuracy on held-out problems before and after. Written to `runs/quickstart` (or `--output_dir`): the model, the log
and a figure.
"""

import argparse
import json
import os
import random
import warnings
from pathlib import Path


# Nothing here needs the network; TRL would otherwise send a usage ping.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import matplotlib
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, set_seed
from transformers.utils import logging

from trl_alp import ALPGRPOConfig, ALPGRPOTrainer, ConsoleCallback


matplotlib.use("Agg")
logging.set_verbosity_error()
warnings.simplefilter("ignore", FutureWarning)  # transformers on its own future


def build_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *"0123456789+="])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def build_model(tokenizer: PreTrainedTokenizerFast, hidden_size: int) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=32,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.eos_token_id,
    )
    return Qwen2ForCausalLM(config)


def build_problems() -> tuple[list[dict], list[dict]]:
    """All sums of two numbers from 10 to 99, split at random: (train, 500 held out)."""
    problems = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(10, 100) for b in range(10, 100)]
    random.Random(0).shuffle(problems)
    return problems[500:], problems[:500]


def imitate(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, problems: list[dict], steps: int) -> None:
    """Warm start: next-token prediction of the answer on random problems."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=steps)
    sample = random.Random(1)
    model.train()
    for _ in range(steps):
        rows = [sample.choice(problems) for _ in range(256)]
        batch = tokenizer([row["prompt"] + row["answer"] + "<eos>" for row in rows], return_tensors="pt", padding=True)
        labels = batch["input_ids"].clone()
        labels[:, :-4] = -100  # the answer has at most three digits and ends with <eos>
        labels[batch["attention_mask"] == 0] = -100
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()


def is_correct(completions: list[str], answer: list[str], **kwargs) -> list[float]:
    """Reward: 1 if the completion is the sum, else 0."""
    return [float(completion == right) for completion, right in zip(completions, answer, strict=True)]


@torch.no_grad()
def accuracy(model, tokenizer, problems: list[dict], sample: bool) -> float:
    """Share of problems answered correctly, greedily or by one sample at temperature 1."""
    model.eval()
    batch = tokenizer([problem["prompt"] for problem in problems], return_tensors="pt", padding=True)
    output = model.generate(**batch, max_new_tokens=4, do_sample=sample, top_k=0)
    completions = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(is_correct(completions, [problem["answer"] for problem in problems])) / len(problems)


def draw(log: list[dict], path: Path, num_layers: int) -> None:
    """Reward, envelope of the importance ratio and sigma per layer, over optimiser steps."""
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    rewards = [row for row in log if "reward" in row]
    left.plot([row["step"] for row in rewards], [row["reward"] for row in rewards], color="tab:green")
    left.set(title="Reward (share of correct samples)", ylim=(0, 1))
    steps = [row["step"] for row in log]
    for low, high, alpha in (("p02", "p98", 0.25), ("p25", "p75", 0.5)):
        lower, upper = ([row[f"alp/ratio/{p}"] for row in log] for p in (low, high))
        label = f"P{int(low[1:])} to P{int(high[1:])}"
        middle.fill_between(steps, lower, upper, color="tab:blue", alpha=alpha, lw=0, label=label)
    middle.plot(steps, [row["alp/ratio/p50"] for row in log], color="navy", lw=0.8, label="median")
    middle.set(title="Importance ratio, perturbed / behaviour", yscale="log")
    middle.yaxis.set_major_formatter("{x:g}")
    middle.legend(loc="lower left", fontsize="small")
    for layer in range(num_layers):
        right.plot(steps, [row[f"alp/sigma/layer_{layer:02d}"] for row in log], label=f"layer {layer}")
    right.set(title="Sigma (share of the hidden state's RMS)")
    right.legend(fontsize="small")
    for axis in (left, middle, right):
        axis.set_xlabel("optimiser step")
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--hidden_size", type=int, default=64)
    parser.add_argument("--warm_start_steps", type=int, default=360)
    parser.add_argument("--rollout_batches", type=int, default=50)
    options = parser.parse_args()
    if options.hidden_size < 8 or options.hidden_size % 8:
        parser.error(f"--hidden_size {options.hidden_size} must be a multiple of 8: four heads of an even size each.")
    for name in ("warm_start_steps", "rollout_batches"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)} must be at least 1.")

    set_seed(0)
    train, held_out = build_problems()
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, options.hidden_size)
    print(
        f"1/3 Warm start: {model.num_parameters() / 1e6:.1f}M parameters, {options.warm_start_steps} steps", flush=True
    )
    imitate(model, tokenizer, train, options.warm_start_steps)
    before = [accuracy(model, tokenizer, held_out, sample) for sample in (False, True)]

    updates_per_batch = 8
    args = ALPGRPOConfig(
        output_dir=str(options.output_dir),
        per_device_train_batch_size=256,
        num_generations=8,
        steps_per_generation=updates_per_batch,
        max_steps=options.rollout_batches * updates_per_batch,
        max_completion_length=4,
        alp_log_layers=True,
        alp_noise_target=None,  # there is no engine here, to whose mismatch the noise could be fitted
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    trainer = ALPGRPOTrainer(
        model=model,
        reward_funcs=is_correct,
        args=args,
        train_dataset=Dataset.from_list(train),
        processing_class=tokenizer,
        callbacks=[ConsoleCallback(every=4 * updates_per_batch)],
    )
    print(f"2/3 ALP-GRPO: {options.rollout_batches} batches of rollouts, {updates_per_batch} updates each", flush=True)
    try:
        trainer.train()
    except KeyboardInterrupt:
        trainer.save_model()
        print(f"\nStopped after {trainer.state.global_step} of {args.max_steps} updates.\nModel: {options.output_dir}")
        raise SystemExit(130) from None

    print("3/3 Evaluation and figure", flush=True)
    after = [accuracy(model, tokenizer, held_out, sample) for sample in (False, True)]
    log = [row for row in trainer.state.log_history if "alp/ratio/p50" in row]
    trainer.save_model()
    (options.output_dir / "log.json").write_text(json.dumps(log, indent=1))
    draw(log, options.output_dir / "figure.png", len(trainer.perturbation.layer_indices))
    print(f"\nAccuracy on {len(held_out)} held-out problems        before    after")
    print(f"  sampled at temperature 1 (what RL trains)  {before[1]:6.1%}   {after[1]:6.1%}")
    print(f"  greedy                                     {before[0]:6.1%}   {after[0]:6.1%}")
    print(f"\nFigure: {options.output_dir / 'figure.png'}\nLog:    {options.output_dir / 'log.json'}")
    print(f"Model:  {options.output_dir}")


if __name__ == "__main__":
    main()
