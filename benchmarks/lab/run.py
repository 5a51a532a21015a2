# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""
One run of the lab, described by one YAML file of what differs from `DEFAULTS` below:

    mkdir -p runs/lab && echo '{arm: alp_sequence, numerics: int3, seed: 7}' > runs/lab/mine.yaml
    python benchmarks/lab/run.py runs/lab/mine.yaml

Writes, beside the YAML file, `NAME.json`: the settings, the accuracy on held-out problems (one sample at temperature
1, without noise) every so many updates, of the policy in the precision it is trained in (`accuracy`) and in the
numerics that sample its rollouts (`served`), both of the final policy on problems that were trained on
(`on_training_problems`), its accuracy in every number format (`formats`), how sharp it is (`flatness`), and the log,
one row an update. A run that is there already is not repeated.
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

import gsm8k
import task as addition
import torch
import transformers
import yaml
from arms import ARMS, build_trainer
from behaviour import Behaviour, blank_copy, check_numerics, load_as
from datasets import Dataset
from flatness import flatness
from transformers import PrinterCallback, TrainerCallback, set_seed
from transformers.trainer_callback import ProgressCallback


TASKS = {"addition": addition, "gsm8k": gsm8k}
# What a run is made of, and where it starts; a YAML file changes what it names.
DEFAULTS = {
    "arm": "alp_token",
    "overrides": {},  # fields of the arm's config
    "place": None,
    "numerics": "int5",
    "lag": 0,
    "task": "addition",
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
    "max_completion_length": None,  # the task's
    "prepare": {},  # what of the preparation of `gsm8k` is changed
}
# Of the log, what the report reads.
KEPT = ("step", "reward", "grad_norm", "entropy", "completions/mean_length")


class Evaluation(TrainerCallback):
    """Accuracy without noise, as trained and as served, at the start, every so many updates, and at the end."""

    def __init__(self, policy, tokenizer, problems: list[dict], settings: dict):
        self.policy, self.tokenizer, self.problems, self.settings = policy, tokenizer, problems, settings
        self.task = TASKS[settings["task"]]
        # A rounded copy of the latest weights: whatever lags, shakes or has noise while sampling is not served.
        self.numerics = settings["numerics"] if settings["numerics"] in self.task.SERVED_IN else "exact"
        self.copy = blank_copy(policy)
        self.accuracy: list[tuple[int, float]] = []
        self.served: list[tuple[int, float]] = []

    def measure(self, step: int) -> None:
        trained, served = self.on(self.problems)
        self.accuracy.append((step, trained))
        self.served.append((step, served))

    def on(self, problems: list[dict]) -> tuple[float, float]:
        """Accuracy as trained and as served."""
        trained = self.task.accuracy(self.policy, self.tokenizer, problems, self.settings)
        return trained, trained if self.numerics == "exact" else self.in_format(self.numerics, problems)

    def in_format(self, numerics: str, problems: list[dict] | None = None) -> float:
        load_as(numerics, self.copy, self.policy.state_dict())
        return self.task.accuracy(self.copy, self.tokenizer, problems or self.problems, self.settings)

    def on_train_begin(self, args, state, control, **kwargs):
        self.measure(0)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.settings["eval_every"] == 0 or state.global_step == self.settings["updates"]:
            self.measure(state.global_step)


def run(settings: dict, cache: Path) -> dict:
    """Train as `settings` say (see `DEFAULTS`); them, the accuracy over time, the log, and the seconds it took."""
    if unknown := settings.keys() - DEFAULTS.keys():
        raise ValueError(f"{sorted(unknown)} are no settings of a run; see `DEFAULTS` in benchmarks/lab/run.py.")
    settings = DEFAULTS | settings
    if settings["arm"] not in ARMS:
        raise ValueError(f"arm={settings['arm']!r} is unknown; the arms are {', '.join(ARMS)}.")
    if settings["task"] not in TASKS:
        raise ValueError(f"task={settings['task']!r} is unknown; the tasks are {', '.join(TASKS)}.")
    if settings["numerics"] not in FORMATS:
        check_numerics(settings["numerics"])
    start = time.perf_counter()
    task, device = TASKS[settings["task"]], settings["device"]
    policy, tokenizer, train, held_out = task.start(settings, cache)
    set_seed(settings["seed"])
    evaluation = Evaluation(policy, tokenizer, held_out[: settings["eval_problems"]], settings)
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
            "max_completion_length": task.longest(settings),
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
                reward_funcs=task.is_correct,
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
        "on_training_problems": evaluation.on(train[: settings["eval_problems"]]),
        "formats": {numerics: evaluation.in_format(numerics) for numerics in task.SERVED_IN},
        "flatness": flatness(policy, tokenizer, evaluation.problems[:200], task.longest(settings)),
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
