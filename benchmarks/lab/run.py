# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""
One run of the lab, described by one YAML file of what differs from `DEFAULTS` below:

    mkdir -p runs/lab && echo '{arm: alp_sequence, numerics: int3, seed: 7}' > runs/lab/mine.yaml
    python benchmarks/lab/run.py runs/lab/mine.yaml

Writes, beside the YAML file, `NAME.json`: the settings, the accuracy on held-out problems (one sample at temperature
1, without noise) every so many updates, of the policy in the precision it is trained in (`accuracy`) and in the
numerics that sample its rollouts (`served`), that of the final policy in every number format (`formats`), how sharp it
is (`flatness`), and the log, one row an update. A run that is there already is not repeated.
"""

import argparse
import json
import os
import time
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

from engine import FORMATS, colocated, set_environment


if find_spec("vllm"):
    set_environment()

import torch
import transformers
import yaml
from arms import ARMS, build_trainer
from behaviour import Behaviour, blank_copy, check_numerics, load_as
from datasets import Dataset
from filelock import FileLock
from flatness import flatness
from task import accuracy, build_problems, is_correct, max_completion_length, warm_start
from transformers import PrinterCallback, TrainerCallback, set_seed
from transformers.trainer_callback import ProgressCallback


# What a run is made of, and where it starts; a YAML file changes what it names.
DEFAULTS = {
    "arm": "alp_token",
    "overrides": {},  # fields of the arm's config
    "place": None,
    "numerics": "int5",
    "lag": 0,
    "digits": 3,
    "updates_per_rollout": 8,  # the rollouts are as many mini-batches, so that no dial changes the batch of an update
    "mini_batch": 32,  # completions
    "num_generations": 8,
    "updates": 400,
    "learning_rate": 5e-5,
    "seed": 0,
    "eval_every": 50,  # updates
    "eval_problems": 400,
    "size": {"hidden": 96, "layers": 4, "heads": 3},
    "start_accuracy": 0.4,
    "device": "cpu",  # "cuda": bf16 autocast over fp32 weights
}
# Of the log, what the report reads.
KEPT = ("step", "reward", "grad_norm", "entropy", "completions/mean_length")


# What a trained policy may be served in.
SERVED_IN = ("exact", "bf16", "int8", "int6", "int5", "int4", "int3")


class Evaluation(TrainerCallback):
    """Accuracy without noise, as trained and as served, at the start, every so many updates, and at the end."""

    def __init__(self, policy, tokenizer, problems: list[dict], every: int, updates: int, numerics: str):
        self.policy, self.tokenizer, self.problems = policy, tokenizer, problems
        self.every, self.updates = every, updates
        # A rounded copy of the latest weights: whatever lags, shakes or has noise while sampling is not served.
        self.numerics = numerics if numerics in SERVED_IN else "exact"
        self.copy = blank_copy(policy)
        self.accuracy: list[tuple[int, float]] = []
        self.served: list[tuple[int, float]] = []

    def measure(self, step: int) -> None:
        self.accuracy.append((step, accuracy(self.policy, self.tokenizer, self.problems)))
        served = self.accuracy[-1][1] if self.numerics == "exact" else self.in_format(self.numerics)
        self.served.append((step, served))

    def in_format(self, numerics: str) -> float:
        load_as(numerics, self.copy, self.policy.state_dict())
        return accuracy(self.copy, self.tokenizer, self.problems)

    def on_train_begin(self, args, state, control, **kwargs):
        self.measure(0)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0 or state.global_step == self.updates:
            self.measure(state.global_step)


def started(settings: dict, cache: Path):
    """The warm-started model of a run of `settings`, and its tokenizer; made once and cached."""
    size, target, digits = settings["size"], settings["start_accuracy"], settings["digits"]
    name = f"warm-{size['hidden']}x{size['layers']}-{target}" + (f"-{digits}digits" if digits != 3 else "")
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"{name}.lock"):  # the first of several processes makes it
        return warm_start(cache / name, size, target, settings["device"], digits)


def run(settings: dict, cache: Path) -> dict:
    """Train as `settings` say (see `DEFAULTS`); them, the accuracy over time, the log, and the seconds it took."""
    if unknown := settings.keys() - DEFAULTS.keys():
        raise ValueError(f"{sorted(unknown)} are no settings of a run; see `DEFAULTS` in benchmarks/lab/run.py.")
    settings = DEFAULTS | settings
    if settings["arm"] not in ARMS:
        raise ValueError(f"arm={settings['arm']!r} is unknown; the arms are {', '.join(ARMS)}.")
    if settings["numerics"] not in FORMATS:
        check_numerics(settings["numerics"])
    start = time.perf_counter()
    train, held_out = build_problems(settings["digits"])
    device = settings["device"]
    policy, tokenizer = started(settings, cache)
    set_seed(settings["seed"])
    evaluation = Evaluation(
        policy, tokenizer, held_out[: settings["eval_problems"]], settings["eval_every"], settings["updates"],
        settings["numerics"],
    )  # fmt: skip
    with TemporaryDirectory() as folder, TemporaryDirectory() as served:
        if settings["numerics"] in FORMATS:
            engine, rollout = colocated(settings["numerics"], policy, tokenizer, Path(served)), None
        else:
            engine, rollout = (
                nullcontext({}),
                Behaviour(settings["numerics"], settings["lag"], settings["seed"], device),
            )
        common = {
            "output_dir": folder,
            "per_device_train_batch_size": settings["mini_batch"],
            "steps_per_generation": settings["updates_per_rollout"],
            "num_generations": settings["num_generations"],
            "max_completion_length": max_completion_length(settings["digits"]),
            "max_steps": settings["updates"],
            "learning_rate": settings["learning_rate"],
            "lr_scheduler_type": "constant",
            "max_grad_norm": 1.0,
            "seed": settings["seed"],
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": device == "cpu",
            "bf16": device != "cpu",
            "gradient_checkpointing": False,
            "disable_tqdm": True,
        }
        with engine as fields:
            trainer = build_trainer(
                settings["arm"],
                settings["overrides"],
                common | fields,
                settings["place"],
                model=policy,
                reward_funcs=is_correct,
                train_dataset=Dataset.from_list(train),
                processing_class=tokenizer,
                rollout_func=rollout,
                callbacks=[evaluation],
            )
            for callback in (PrinterCallback, ProgressCallback):
                trainer.remove_callback(callback)
            trainer.train()
    log = [
        {key: value for key, value in row.items() if key in KEPT or key.startswith("alp/")}
        for row in trainer.state.log_history
        if "reward" in row or "grad_norm" in row
    ]
    return {
        "settings": settings,
        "accuracy": evaluation.accuracy,
        "served": evaluation.served,
        "formats": {numerics: evaluation.in_format(numerics) for numerics in SERVED_IN},
        "flatness": flatness(policy, tokenizer, evaluation.problems[:200]),
        "log": log,
        "seconds": time.perf_counter() - start,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--cache", type=Path, default=Path("runs/lab"), help="where the warm-started model is kept")
    arguments = parser.parse_args()
    output = arguments.file.with_suffix(".json")
    if output.exists():
        print(f"{output} is there already")
        return
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    result = run(yaml.safe_load(arguments.file.read_text()), arguments.cache)
    output.write_text(json.dumps(result))
    print(f"accuracy {result['accuracy'][0][1]:.3f} to {result['accuracy'][-1][1]:.3f}, {result['seconds']:.0f} s")


if __name__ == "__main__":
    main()
