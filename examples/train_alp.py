# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
r"""
Train any causal language model with ALP-GRPO on a verifiable math reward; made to be copied.

One GPU, LoRA, generation by transformers:

    accelerate launch examples/train_alp.py \
        --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name openai/gsm8k --dataset_config main \
        --use_peft --lora_target_modules all-linear --lora_dropout 0 --learning_rate 1e-5 \
        --output_dir qwen2.5-0.5b-gsm8k-alp

It needs `pip install ".[examples]"` in a clone (`math-verify`, and `peft` for LoRA). Generation by vLLM on the same
GPU: add `--use_vllm --vllm_mode colocate` (`pip install "trl[vllm]"`). Options can also stand in a YAML file
(`--config FILE`, recipes in `examples/`); options on the command line override it. `--help` lists them all.

`--trainer grpo` trains with TRL's own `GRPOTrainer`, on a `GRPOConfig` and with ALP's instruments: for baselines such
as GRPO, GSPO, TIS and MIS. (Bypass, ALP without the noise, is `--alp_enabled false`.)

`--dataset_name` takes a dataset of the hub, a local folder, or a local `.json`, `.jsonl`, `.csv` or `.parquet` file,
with a question (column `question`, `problem` or `prompt`) and an `answer` or `solution`. Of an answer in GSM8K's
format, the part behind `####` is taken. Ctrl-C saves the model as it is and says where.

`--help-alp` lists what ALP adds to TRL's options, `--help` lists all.
"""

import argparse
import dataclasses
import difflib
import sys
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from datasets import Dataset
from problems import check_name, is_file, load_problems, math_reward
from transformers import AutoTokenizer
from transformers.trainer_utils import get_last_checkpoint
from trl import GRPOConfig, GRPOTrainer, ModelConfig, TrlParser, get_peft_config, get_quantization_config

from trl_alp import ALPGRPOConfig, ALPGRPOTrainer, ConsoleCallback, instrument
from trl_alp.checks import check_dataset


@dataclass
class Method:
    """
    Which trainer to use.

    Args:
        trainer (`str`, *optional*, defaults to `"alp"`):
            `"alp"` for `ALPGRPOTrainer`, or `"grpo"` for TRL's own `GRPOTrainer`, which has no `alp_*` fields.
    """

    trainer: Literal["alp", "grpo"] = field(
        default="alp",
        metadata={"help": "`alp`: ALPGRPOTrainer; `grpo`: TRL's own GRPOTrainer, without `alp_*` fields."},
    )


@dataclass
class ScriptArguments:
    """
    Arguments of this script.

    Args:
        dataset_name (`str`):
            Dataset on the hub, local folder, or local `.json`, `.jsonl`, `.csv` or `.parquet` file.
        dataset_config (`str`, *optional*):
            Configuration (subset) of the dataset, for example `main` of GSM8K.
        dataset_train_split (`str`, *optional*, defaults to `"train"`):
            Split to train on.
        dataset_test_split (`str`, *optional*, defaults to `"test"`):
            Split to evaluate on, with `--eval_strategy steps`.
        max_train_samples (`int`, *optional*):
            Use only the first so many rows.
    """

    dataset_name: str = field(metadata={"help": "Dataset on the hub, local folder, or local json/jsonl/csv/parquet."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration (subset) of the dataset."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(default="test", metadata={"help": "Split to evaluate on."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first so many rows."})


class Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the lines of the description, and shows defaults."""


def parse_arguments(arguments: Iterable[str] | None = None) -> tuple[ScriptArguments, GRPOConfig, ModelConfig]:
    """Parse the command line and `--config`; `--trainer` is looked up first, since the configuration depends on it."""
    lookup = TrlParser((Method,), add_help=False, allow_abbrev=False)
    method, _ = lookup.parse_args_and_config(arguments, return_remaining_strings=True)
    config_class = ALPGRPOConfig if method.trainer == "alp" else GRPOConfig
    return parse_options((Method, ScriptArguments, config_class, ModelConfig), __doc__, arguments)[1:]


def parse_options(kinds: tuple[type, ...], description: str, arguments: Iterable[str] | None = None) -> tuple:
    """One value of each kind from the command line and `--config`; a `ValueError` for what is no option."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if "--help-alp" in arguments:
        help_on_alp()
    script = Path(sys.argv[0]).name
    usage = f"accelerate launch examples/{script} --model_name_or_path MODEL --dataset_name DATASET [OPTIONS]"
    parser = TrlParser(kinds, description=description, formatter_class=Formatter, usage=usage, allow_abbrev=False)
    *parsed, unknown = parser.parse_args_and_config(arguments, return_remaining_strings=True)
    if unknown:
        raise ValueError(unknown_option(unknown[0].removeprefix("--").partition("=")[0], parser))
    check_resuming(next(value for value in parsed if isinstance(value, GRPOConfig)))
    return tuple(parsed)


def help_on_alp() -> None:
    """Print what ALP adds to TRL's options, and leave."""
    print("ALP's options of train_alp.py, each with its default; docs/choosing.md says how to set them.\n")
    for option in dataclasses.fields(ALPGRPOConfig):
        if option.name.startswith("alp_"):
            print(f"  --{option.name} {option.default}")
            print(textwrap.fill(option.metadata["help"], 100, initial_indent=" " * 6, subsequent_indent=" " * 6))
    sys.exit()


def unknown_option(name: str, parser: TrlParser) -> str:
    """What to say of an option that there is not, on the command line or in a YAML file."""
    if name in {option.name for option in dataclasses.fields(ALPGRPOConfig)}:
        return f"{name} is ALP's, and --trainer grpo has none of its fields. Leave it out, or use --trainer alp."
    options = [option.removeprefix("--") for option in parser._option_string_actions if option.startswith("--")]
    near = difflib.get_close_matches(name, options, n=1)
    return f"{name} is no option; did you mean {near[0]}?" if near else f"{name} is no option; --help lists all."


def check_resuming(training_args: GRPOConfig) -> None:
    """`true` is the last checkpoint in `output_dir`; a `ValueError` if there is none."""
    asked = training_args.resume_from_checkpoint
    if asked is None or asked.lower() == "false":
        training_args.resume_from_checkpoint = None
        return
    latest = asked.lower() == "true"
    folder = training_args.output_dir if latest else asked
    checkpoint = None
    if Path(folder).is_dir():
        checkpoint = get_last_checkpoint(folder) if latest else folder
    if checkpoint is None:
        raise ValueError(
            f"resume_from_checkpoint={asked}: {folder} is no folder with a checkpoint. Give a checkpoint's folder, or "
            "leave the option out to start anew."
        )
    training_args.resume_from_checkpoint = checkpoint


def problems_to_evaluate_on(script_args: ScriptArguments, chat: bool) -> Dataset:
    """The test split, which one file has not unless the two splits are slices of it."""
    name, train, test = script_args.dataset_name, script_args.dataset_train_split, script_args.dataset_test_split
    if is_file(name) and not ("[" in train and "[" in test and train != test):
        raise ValueError(
            f"dataset_name={name} is one file, so --eval_strategy would evaluate on what is trained on. Give slices "
            "(--dataset_train_split 'train[:90%]' --dataset_test_split 'train[90%:]'), or a folder of both splits."
        )
    return load_problems(name, script_args.dataset_config, test, None, chat)


def build(script_args: ScriptArguments, training_args: GRPOConfig, model_args: ModelConfig) -> GRPOTrainer:
    """The trainer; a `ValueError` if something that was given cannot be."""
    check_name("model_name_or_path", model_args.model_name_or_path)
    tokenizer = AutoTokenizer.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        trust_remote_code=training_args.trust_remote_code,
        padding_side="left",
    )
    chat = tokenizer.chat_template is not None
    name, config = script_args.dataset_name, script_args.dataset_config
    train_split = script_args.dataset_train_split
    train_dataset = load_problems(name, config, train_split, script_args.max_train_samples, chat)
    check_dataset(train_dataset, training_args)
    evaluate = training_args.eval_strategy != "no"
    eval_dataset = problems_to_evaluate_on(script_args, chat) if evaluate else None
    # `--dtype` defaults to float32: master weights in fp32 and compute in bf16, as in the paper.
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    trainer_class = ALPGRPOTrainer if isinstance(training_args, ALPGRPOConfig) else GRPOTrainer
    trainer = trainer_class(
        model=model_args.model_name_or_path,
        reward_funcs=math_reward,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
        callbacks=[ConsoleCallback()],
    )
    instrument(trainer)  # a stock trainer logs what ALP logs; ALP's own has the instruments already
    return trainer


def train_and_save(trainer: GRPOTrainer, script_args: ScriptArguments) -> None:
    """Train, save the model, and push it if asked to."""
    args = trainer.args
    try:
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    except KeyboardInterrupt:
        stopped(trainer)
    trainer.save_model(args.output_dir)
    trainer.accelerator.print(f"Model saved to {args.output_dir}.")
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    if hasattr(trainer, "end"):  # transformers 5.18 and later
        trainer.end()


def stopped(trainer: GRPOTrainer) -> None:
    """Save what can be saved, say where, and leave. Several processes may not stop at one place: they only leave."""
    folder, alone = trainer.args.output_dir, trainer.accelerator.num_processes == 1
    if alone:
        trainer.save_model(folder)
    last = get_last_checkpoint(folder) if Path(folder).is_dir() else None
    lines = [f"Stopped in update {trainer.state.global_step + 1} of {trainer.state.max_steps}."]
    lines += [f"The model as it is: {folder}"] if alone else []
    lines.append(
        f"To go on: --resume_from_checkpoint {last}" if last else "No checkpoint yet: `save_steps` makes them."
    )
    if trainer.accelerator.is_main_process:
        print(*lines, sep="\n", file=sys.stderr)
    sys.exit(130)


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """End the script with the message of a `ValueError` that is one line, as those about what the user gave are; for
    what comes before training, whose errors keep their tracebacks."""
    try:
        yield
    except ValueError as error:
        if "\n" in str(error):
            raise
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")


def main(script_args: ScriptArguments, training_args: GRPOConfig, model_args: ModelConfig) -> None:
    with errors_in_one_line():
        trainer = build(script_args, training_args, model_args)
    train_and_save(trainer, script_args)


if __name__ == "__main__":
    with errors_in_one_line():
        arguments = parse_arguments()
    main(*arguments)
