# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""Makes the sample report and the doctor's figure of docs/assets: `python docs/make_samples.py`.

The report is made from the logs in docs/samples: the quickstart's sums in fewer updates, with and without noise, three
seeds each. `--train` trains these again (six minutes on two cores).
"""

import argparse
import importlib.util
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from transformers import set_seed

from trl_alp import ALPGRPOConfig, ALPGRPOTrainer, ConsoleCallback
from trl_alp.doctor import GenerationSetting, TransformersEngine, diagnose, draw
from trl_alp.doctor.engines import plain_copy
from trl_alp.report import report
from trl_alp.report.figures import drawn


DOCS = Path(__file__).resolve().parent
SETTINGS = {"alp": {}, "without_noise": {"alp_enabled": False}}
SEEDS = (1, 2, 3)


def quickstart():
    """The example as a module."""
    spec = importlib.util.spec_from_file_location("quickstart", DOCS.parent / "examples" / "quickstart.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def start(seed: int):
    """Tokenizer, problems and a model that is right now and then."""
    example = quickstart()
    set_seed(seed)
    train, _ = example.build_problems()
    tokenizer = example.build_tokenizer()
    model = example.build_model(tokenizer, 64)
    example.imitate(model, tokenizer, train, 360)
    return example, tokenizer, train, model


def train(folder: Path) -> None:
    """Train all settings, and keep of their logs what the report draws, to four digits."""
    shutil.rmtree(folder, ignore_errors=True)
    for setting, arguments in SETTINGS.items():
        for seed in SEEDS:
            example, tokenizer, problems, model = start(seed)
            with tempfile.TemporaryDirectory() as output:
                args = ALPGRPOConfig(
                    output_dir=output, seed=seed, per_device_train_batch_size=128, num_generations=8,
                    steps_per_generation=8, max_steps=240, max_completion_length=4, learning_rate=1e-4,
                    lr_scheduler_type="constant", logging_steps=4, save_strategy="no", report_to="none", use_cpu=True,
                    bf16=False, gradient_checkpointing=False, disable_tqdm=True, alp_sigma_init=0.05,
                    alp_noise_target=None, **arguments,
                )  # fmt: skip
                trainer = ALPGRPOTrainer(
                    model=model,
                    reward_funcs=example.is_correct,
                    args=args,
                    train_dataset=Dataset.from_list(problems),
                    processing_class=tokenizer,
                    callbacks=[ConsoleCallback(every=80)],
                )
                trainer.train()
                target = folder / f"{setting}_seed{seed}" / "alp"
                target.mkdir(parents=True)
                rows = map(json.loads, (Path(output) / "alp" / "metrics.jsonl").read_text().splitlines())
                kept = [{key: short(row[key]) for key in row if key == "step" or drawn(key)} for row in rows]
                (target / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
                config = json.loads((Path(output) / "alp" / "config.json").read_text())
                (target / "config.json").write_text(json.dumps(config | {"output_dir": ""}, indent=1) + "\n")


def short(value):
    return float(f"{value:.4g}") if isinstance(value, float) else value


def examine(figure: Path) -> None:
    """The doctor on an engine that missed the last updates."""
    example, tokenizer, problems, model = start(1)
    engine = TransformersEngine(plain_copy(model), tokenizer)
    example.imitate(model, tokenizer, problems, 30)
    prompts = [problem["prompt"] for problem in problems[:256]]
    diagnosis = diagnose(model, tokenizer, engine, prompts, GenerationSetting(max_tokens=4))
    print(diagnosis.verdict)
    draw(diagnosis, figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", action="store_true", help="train the logs of docs/samples again")
    options = parser.parse_args()
    torch.set_num_threads(2)
    if options.train:
        train(DOCS / "samples")
    os.chdir(DOCS)  # the page names the folders as it is given them
    runs = [Path("samples") / f"{setting}_seed{seed}" for setting in SETTINGS for seed in SEEDS]
    page = report(runs, Path("assets") / "sample_report")
    for figure in page.parent.glob("*.png"):
        if figure.stem not in ("reward", "kl_k3"):
            figure.unlink()
    examine(DOCS / "assets" / "doctor.png")
