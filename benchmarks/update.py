# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""
What an update costs with ALP, beside stock GRPO, TRL's default correction, Bypass, and the noise done naively.

    python benchmarks/update.py --json update.json                      # gpt2-sized on a CPU, about 15 minutes
    python benchmarks/update.py --suite gpu --json update.json          # Qwen2.5-sized on a GPU, under 8 minutes
    python benchmarks/update.py --models tiny --lengths 32 --rounds 2   # seconds
    torchrun --nproc_per_node 2 benchmarks/update.py --models tiny --lengths 64 128 256

Completions and behaviour log-probs are synthetic, weights are random, one optimiser step follows each batch of
rollouts. All arms run side by side in one process, alternating; times are medians over `n` steps, with quartiles. The
suite measures each of its points once with every arm, then spends the rest of `--seconds` on the arms that are
compared, where their medians are least certain. *Update* is the time of `training_step`: TRL's scoring passes, forward
and backward, without sampling. *Step* adds the optimiser. *Kept* is what the forward of the loss keeps for its
backward. Needs TRL and the sources of this package, no network.
"""

import argparse
import contextlib
import gc
import json
import logging
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from itertools import product
from pathlib import Path
from types import SimpleNamespace


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

import trl_alp
from trl_alp import ALPGRPOConfig, ALPGRPOTrainer, LayerwisePerturbation


CUDA = torch.cuda.is_available()
# hidden, intermediate, layers, heads, key-value heads, vocabulary, tied
SIZES = {
    "tiny": (64, 256, 2, 2, 2, 512, True),
    "gpt2": (768, 3072, 12, 12, 12, 50257, True),
    "qwen2.5-0.5b": (896, 4864, 24, 14, 2, 151936, True),
    "qwen2.5-1.5b": (1536, 8960, 28, 12, 2, 151936, True),
    "qwen2.5-7b": (3584, 18944, 28, 28, 4, 152064, False),
}
LORA = {"qwen2.5-7b"}  # trained with LoRA
ARMS = ("stock", "stock, TRL correction", "bypass", "ALP stored", "ALP recomputed", "ALP torch", "ALP Triton")
COMPARED = ("stock, TRL correction", "bypass", "ALP Triton")  # where the suite's spare time goes
# (model, completion length, micro-batch, accumulation, gradient checkpointing); in the order of importance, until the
# time is up. GRPO compares two completions of a prompt or more, so a micro-batch of one is accumulated.
GPU_SUITE = (
    ("qwen2.5-0.5b", 1024, 8, 1, True),
    ("qwen2.5-1.5b", 4096, 2, 1, True),
    ("qwen2.5-7b", 4096, 2, 1, True),
    ("qwen2.5-1.5b", 2048, 4, 1, True),
    ("qwen2.5-0.5b", 1024, 8, 1, False),
    ("qwen2.5-1.5b", 16384, 1, 2, True),
    ("qwen2.5-1.5b", 1024, 4, 1, False),
)


def build_model(name: str, layers: int | None, hidden: int | None) -> torch.nn.Module:
    width, intermediate, depth, heads, key_values, vocabulary, tied = SIZES[name]
    if hidden is not None:
        width, intermediate, heads, key_values = hidden, 4 * hidden, max(1, hidden // 64), max(1, hidden // 64)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=intermediate,
        num_hidden_layers=layers or depth,
        num_attention_heads=heads,
        num_key_value_heads=key_values,
        tie_word_embeddings=tied,
        max_position_embeddings=32768,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    with torch.device("cuda" if CUDA else "cpu"):
        model = Qwen2ForCausalLM(config).to(torch.bfloat16 if name in LORA else torch.float32)
    if name in LORA:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    return model


def build_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1, "b": 2}, unk_token="<eos>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<eos>", eos_token="<eos>")


# ---- Arms ----


def noisy(hidden, log_sigma):
    scale = hidden.detach().float().square().mean(-1, keepdim=True).sqrt()
    return hidden + (log_sigma.exp() * scale * torch.randn_like(hidden, dtype=torch.float32)).to(hidden.dtype)


def begins(perturbation, position) -> bool:
    """Whether a layer is to be perturbed: in an open scoring pass, or where gradient checkpointing runs it again, the
    only forward outside one that has gradients."""
    if perturbation.scoring is not None:
        perturbation.scoring.add_call(position)
    return torch.is_grad_enabled()


def stored(perturbation, hidden, position):
    """The noise as autograd would have it: `delta` is kept for the backward."""
    return noisy(hidden, perturbation.log_sigma[position]) if begins(perturbation, position) else hidden


def recomputed(perturbation, hidden, position):
    """The same under `torch.utils.checkpoint`, which saves and restores the global random state."""
    if not begins(perturbation, position):
        return hidden
    return torch.utils.checkpoint.checkpoint(noisy, hidden, perturbation.log_sigma[position], use_reentrant=False)


@contextlib.contextmanager
def perturbed_by(replacement):
    original = LayerwisePerturbation.perturb
    LayerwisePerturbation.perturb = replacement or original
    try:
        yield
    finally:
        LayerwisePerturbation.perturb = original


def build_trainer(arm: str, model, tokenizer, folder: str, point: SimpleNamespace, steps: int) -> GRPOTrainer:
    settings = {
        "output_dir": folder,
        "per_device_train_batch_size": point.batch,
        "gradient_accumulation_steps": point.accumulation,
        "num_generations": max(2, point.batch),
        "max_completion_length": point.length,
        "gradient_checkpointing": point.checkpointing,
        "max_steps": steps,
        "learning_rate": 1e-6,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "bf16": CUDA,
        "use_cpu": not CUDA,
        "optim": "adamw_torch",
    }
    # The ids and log-probs of a batch, made once: sampling costs next to nothing and its time is taken out.
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    completions = torch.randint(1, vocabulary, (64, point.length), generator=generator).tolist()
    logprobs = [[-10.0] * point.length] * 64
    prompt = list(range(1, 1 + min(point.prompt, vocabulary - 1)))
    sampling = []

    def rollout(prompts, trainer):
        start = time.perf_counter()
        rows = [i % 64 for i in range(len(prompts))]
        output = {
            "prompt_ids": [prompt] * len(prompts),
            "completion_ids": [completions[row] for row in rows],
            "logprobs": [logprobs[row] for row in rows],
        }
        sampling.append(time.perf_counter() - start)
        return output

    def reward(completions, **kwargs):
        return torch.rand(len(completions), generator=generator).tolist()

    if arm.startswith("stock"):
        trainer_class = GRPOTrainer
        correction = "TRL correction" in arm
        args = GRPOConfig(**settings, vllm_importance_sampling_correction=correction)
    else:
        trainer_class = ALPGRPOTrainer
        backend = {"ALP torch": "torch", "ALP Triton": "triton"}.get(arm, "auto")
        args = ALPGRPOConfig(
            **settings,
            alp_enabled=arm != "bypass",
            alp_noise_backend=backend,
            alp_monitor_every=0,
            alp_noise_target=None,
        )
    dataset = Dataset.from_dict({"prompt": ["a b"] * 64})
    trainer = trainer_class(model, reward, args, dataset, processing_class=tokenizer, rollout_func=rollout)
    if "TRL correction" in arm:  # TRL applies it with vLLM only; of vLLM, only the weight sync is asked for here
        trainer.use_vllm, trainer.vllm_mode = True, "server"
        trainer.vllm_generation = SimpleNamespace(sync_weights=lambda: None)
        trainer._last_loaded_step = -1
    trainer.sampling = sampling
    return trainer


# ---- Measuring ----


class Clock(TrainerCallback):
    """Whole optimiser steps."""

    def __init__(self):
        self.steps = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = now()

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(now() - self.start)


def now() -> float:
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def run(arm: str, model, tokenizer, point: SimpleNamespace, steps: int) -> dict[str, list[float]]:
    """As [`train`], leaving nothing behind on the device."""
    try:
        return train(arm, model, tokenizer, point, steps)
    finally:
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()


def train(arm: str, model, tokenizer, point: SimpleNamespace, steps: int) -> dict[str, list[float]]:
    """Train `1 + steps` optimiser steps; seconds of each but the first, forwards of each, and memory."""
    replacement = {"ALP stored": stored, "ALP recomputed": recomputed}.get(arm)
    with tempfile.TemporaryDirectory() as folder, perturbed_by(replacement):
        trainer = build_trainer(arm, model, tokenizer, folder, point, steps + 1)
        trainer.add_callback(clock := Clock())
        updates, forwards, kept = [], [], [0]
        training_step, compute_loss = trainer.training_step, trainer._compute_loss
        counter = model.register_forward_pre_hook(lambda *_: forwards.append(1))

        def timed_step(*args, **kwargs):
            start = now()
            result = training_step(*args, **kwargs)
            updates.append(now() - start)
            return result

        def watched_loss(*args, **kwargs):
            if clock.steps:  # looked at in the first step alone, which is not timed
                return compute_loss(*args, **kwargs)
            storages = {}

            def pack(tensor):
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
                return tensor

            weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                loss = compute_loss(*args, **kwargs)
            kept[0] = sum(size for pointer, size in storages.items() if pointer not in weights)
            return loss

        trainer.training_step, trainer._compute_loss = timed_step, watched_loss
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            trainer.train()
        counter.remove()
        accumulation = point.accumulation
        update = [
            sum(updates[i * accumulation : (i + 1) * accumulation]) - trainer.sampling[i] for i in range(1, steps + 1)
        ]
        step = [clock.steps[i] - trainer.sampling[i] for i in range(1, steps + 1)]
        return {
            "update": update,
            "step": step,
            "forwards": [len(forwards) / (steps + 1)],
            "kept_mb": [kept[0] / 2**20],
            "peak_mb": [torch.cuda.max_memory_allocated() / 2**20] if CUDA else [],
        }


def measure(point: SimpleNamespace, arms: tuple[str, ...], steps: int, pooled: dict, save: Callable) -> None:
    """One round: each arm trains anew; what it measured is pooled with the rounds before, and saved."""
    model, tokenizer = build_model(point.model, point.layers, point.hidden), build_tokenizer()
    for arm in arms:
        for name, values in run(arm, model, tokenizer, point, steps).items():
            pooled.setdefault(arm, {}).setdefault(name, []).extend(values)
        save()


def rows_of(point: SimpleNamespace, pooled: dict) -> list[dict]:
    """Medians and quartiles of each arm, and their ratios to the arms that others are compared with."""
    rows = {}
    for arm, measured in pooled.items():
        rows[arm] = {"arm": arm, **vars(point), "steps": len(measured["update"])}
        for name, values in measured.items():
            if values:
                low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
                rows[arm] |= {name: middle, f"{name}_quartiles": [low, high]}
    for row in rows.values():
        for base in ("bypass", "stock, TRL correction"):
            if base in rows:
                row[f"update / {base}"] = row["update"] / rows[base]["update"]
                for name in ("peak_mb", "kept_mb"):
                    if rows[base].get(name):
                        row[f"{name} / {base}"] = row[name] / rows[base][name]
    return list(rows.values())


def uncertainty(rows: list[dict], arms: tuple[str, ...]) -> float:
    """The largest relative uncertainty of these arms' medians: quartile range over root n."""
    return max(
        (row["update_quartiles"][1] - row["update_quartiles"][0]) / row["update"] / row["steps"] ** 0.5
        for row in rows
        if row["arm"] in arms
    )


def table(rows: list[dict]) -> str:
    head = (
        "arm",
        "update ms",
        "quartiles",
        "/ Bypass",
        "/ TRL corr.",
        "step ms",
        "forwards",
        "kept MB",
        "peak MB",
        "n",
    )
    lines, last = [], None
    for row in rows:
        point = tuple(
            row[name] for name in ("model", "layers", "hidden", "length", "batch", "accumulation", "checkpointing")
        )
        if point != last:
            model, layers, hidden, length, batch, accumulation, checkpointing = point
            shape = "".join(f", {n} {v}" for n, v in (("layers", layers), ("hidden", hidden)) if v)
            lines += [
                "",
                f"**{model}{shape}, {length} tokens, micro-batch {batch} x {accumulation}, "
                f"gradient checkpointing {'on' if checkpointing else 'off'}**",
                "",
                "| " + " | ".join(head) + " |",
                "|---" * len(head) + "|",
            ]
            last = point
        low, high = row["update_quartiles"]
        cells = (
            row["arm"],
            f"{1e3 * row['update']:.1f}",
            f"{1e3 * low:.1f} to {1e3 * high:.1f}",
            f"{row.get('update / bypass', float('nan')):.3f}",
            f"{row.get('update / stock, TRL correction', float('nan')):.3f}",
            f"{1e3 * row['step']:.1f}",
            f"{row['forwards']:g}",
            f"{row['kept_mb']:.1f}",
            f"{row['peak_mb']:.0f}" if "peak_mb" in row else "",
            f"{row['steps']}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=["gpu"], help="a list of points made for one large GPU")
    parser.add_argument("--models", nargs="+", default=["gpt2"], choices=list(SIZES))
    parser.add_argument("--lengths", nargs="+", type=int, default=[256], help="tokens of a completion")
    parser.add_argument("--layers", nargs="+", type=int, default=[None])
    parser.add_argument("--hidden", nargs="+", type=int, default=[None])
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--batch", type=int, default=4, help="completions in each micro-batch")
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--checkpointing", nargs="+", default=["on", "off"], choices=["on", "off"])
    parser.add_argument("--arms", nargs="+", choices=ARMS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="timed optimiser steps of each arm in each round")
    parser.add_argument("--seconds", type=float, default=420, help="with --suite: no new round after this time")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.batch * args.accumulation < 2:
        parser.error("--batch 1 needs --accumulation 2 or more: GRPO compares two completions of a prompt or more")
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    logging.getLogger("trl_alp").setLevel(logging.ERROR)  # synthetic log-probs are no healthy run's
    arms = tuple(args.arms or [arm for arm in ARMS if CUDA or arm != "ALP Triton"])
    if args.suite:
        shapes = [(model, None, None, *rest) for model, *rest in GPU_SUITE]
    else:
        shapes = [
            (model, layers, hidden, length, args.batch, args.accumulation, checkpointing == "on")
            for model, layers, hidden, length, checkpointing in product(
                args.models, args.layers, args.hidden, args.lengths, args.checkpointing
            )
        ]
    names = ("model", "layers", "hidden", "length", "batch", "accumulation", "checkpointing")
    points = [SimpleNamespace(**dict(zip(names, shape, strict=True)), prompt=args.prompt) for shape in shapes]
    results: list[dict] = [{} for _ in points]
    main_process = int(os.environ.get("RANK", 0)) == 0
    environment = {
        "date": time.strftime("%Y-%m-%d"),
        "command": "python " + " ".join(["benchmarks/update.py", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name() if CUDA else f"CPU, {torch.get_num_threads()} threads",
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, trl, trl_alp)},
    }

    def save() -> None:
        if args.json and main_process:
            rows = [row for point, pooled in zip(points, results, strict=True) for row in rows_of(point, pooled)]
            args.json.write_text(json.dumps({"environment": environment, "rows": rows}, indent=1) + "\n")

    def show(index: int) -> None:
        if main_process:
            print(table(rows_of(points[index], results[index])), flush=True)

    start = time.perf_counter()
    for index, point in enumerate(points):
        if args.suite and time.perf_counter() - start > args.seconds:
            print(f"time is up; left out: {point}", file=sys.stderr)
            continue
        for _ in range(1 if args.suite else args.rounds):
            measure(point, arms, args.steps, results[index], save)
        show(index)
    if not args.suite:
        return
    again, compared = set(), tuple(arm for arm in COMPARED if arm in arms) or arms
    while time.perf_counter() - start < args.seconds:
        index = max(
            (i for i, pooled in enumerate(results) if pooled),
            key=lambda i: uncertainty(rows_of(points[i], results[i]), compared),
        )
        measure(points[index], compared, args.steps, results[index], save)
        again.add(index)
    for index in sorted(again):
        show(index)


if __name__ == "__main__":
    main()
