# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""
What the instruments cost: time inside them as a share of the time of the optimiser steps they measure.

    python benchmarks/instruments.py                      # gpt2-sized on a CPU, about 3 minutes
    python benchmarks/instruments.py --layers 2 --hidden 64 --steps 3

A random-weight GPT-2 is trained by `ALPGRPOTrainer` on random completions of a `rollout_func`; the time of generation
is not counted. Printed: the median optimiser step, and the time in recording and in flushing (at every step).
"""

import argparse
import json
import os
import statistics
import tempfile
import time


os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from trl_alp import ALPGRPOConfig, ALPGRPOTrainer


def timed(function, times: list[float]):
    def wrapper(*args, **kwargs):
        synchronize()
        start = time.perf_counter()
        result = function(*args, **kwargs)
        synchronize()
        times.append(time.perf_counter() - start)
        return result

    return wrapper


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--vocabulary", type=int, default=50257)
    parser.add_argument("--length", type=int, default=256, help="tokens of each completion")
    parser.add_argument("--batch", type=int, default=4, help="completions in each micro-batch")
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()

    words = {"<eos>": 0} | {f"w{i}": i for i in range(1, 100)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<eos>", eos_token="<eos>")
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=args.vocabulary,
            n_layer=args.layers,
            n_embd=args.hidden,
            n_head=max(1, args.hidden // 64),
            bos_token_id=0,
            eos_token_id=0,
            **dropout,
        )
    )

    def rollout(prompts, trainer):
        completions = torch.randint(1, args.vocabulary, (len(prompts), args.length)).tolist()
        return {
            "prompt_ids": [[1, 2, 3]] * len(prompts),
            "completion_ids": completions,
            "logprobs": [[-10.8] * args.length] * len(prompts),
        }

    with tempfile.TemporaryDirectory() as folder:
        trainer = ALPGRPOTrainer(
            model,
            lambda completions, **kwargs: torch.rand(len(completions)).tolist(),
            ALPGRPOConfig(
                folder,
                per_device_train_batch_size=args.batch,
                num_generations=args.batch,
                max_completion_length=args.length,
                max_steps=args.steps,
                logging_steps=1,
                report_to="none",
                save_strategy="no",
                bf16=torch.cuda.is_available(),
                use_cpu=not torch.cuda.is_available(),
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_dict({"prompt": ["w1 w2 w3"] * 64}),
            processing_class=tokenizer,
            rollout_func=rollout,
        )
        steps, recording, flushing = [], [], []
        trainer.training_step = timed(trainer.training_step, steps)
        trainer.watcher.measure = timed(trainer.watcher.measure, recording)
        trainer.instruments.flush = timed(trainer.instruments.flush, flushing)
        trainer.train()
    step, record, flush = (statistics.median(times[1:]) for times in (steps, recording, flushing))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(json.dumps({"device": device, "torch": torch.__version__, **vars(args)}))
    print(f"forward and backward {1e3 * step:10.2f} ms (median of {len(steps) - 1})")
    print(f"recording            {1e3 * record:10.2f} ms {100 * record / step:6.2f} %")
    print(f"flushing, each step  {1e3 * flush:10.2f} ms {100 * flush / step:6.2f} %")


if __name__ == "__main__":
    main()
