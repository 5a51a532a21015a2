# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""
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
format, the part behind `####` is taken.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from datasets import Dataset, get_dataset_config_names, load_dataset
from math_verify import parse, verify
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, ModelConfig, TrlParser, get_peft_config, get_quantization_config

from trl_alp import ALPGRPOConfig, ALPGRPOTrainer, ConsoleCallback, instrument
from trl_alp.checks import check_dataset


INSTRUCTION = "\nPlease reason step by step, and put your final answer within \\boxed{}."


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


def load_problems(name: str, config: str | None, split: str, limit: int | None, chat: bool) -> Dataset:
    """Rows with a `prompt` (a conversation if `chat`, else text) and the reference `solution`."""
    suffix = Path(name).suffix.removeprefix(".").replace("jsonl", "json")
    if suffix in ("json", "csv", "parquet"):
        dataset = load_dataset(suffix, data_files={split.split("[")[0]: name}, split=split)
    else:
        # A folder of plain files has no configurations; one of the hub's that a recipe names is then not meant.
        if Path(name).is_dir() and config not in get_dataset_config_names(name):
            config = None
        dataset = load_dataset(name, config, split=split)
    if limit is not None:
        dataset = dataset.select(range(min(limit, len(dataset))))
    question = pick(dataset, name, "question", "problem", "prompt")
    solution = pick(dataset, name, "answer", "solution")

    def read(row: dict) -> dict:
        messages = row[question]
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        *earlier, last = messages
        messages = [*earlier, {**last, "content": last["content"] + INSTRUCTION}]
        prompt = messages if chat else "\n".join(message["content"] for message in messages) + "\n"
        return {"prompt": prompt, "solution": str(row[solution]).split("####")[-1].strip()}

    return dataset.map(read, remove_columns=dataset.column_names)


def pick(dataset: Dataset, name: str, *columns: str) -> str:
    for column in columns:
        if column in dataset.column_names:
            return column
    raise ValueError(
        f"{name} has the columns {dataset.column_names}, but none of {list(columns)}. Rename one of them."
    )


def math_reward(completions: list, solution: list[str], **kwargs) -> list[float | None]:
    """1 if `math-verify` finds the completion's final answer equal to the solution, else 0; None if it cannot read the
    solution, so that TRL leaves the sample out."""
    rewards: list[float | None] = []
    for completion, reference in zip(completions, solution, strict=True):
        text = completion if isinstance(completion, str) else completion[-1]["content"]
        gold = parse(f"${reference}$")
        rewards.append(float(verify(gold, parse(text))) if gold else None)
    return rewards


def parse_arguments(arguments: Iterable[str] | None = None) -> tuple[ScriptArguments, GRPOConfig, ModelConfig]:
    """Parse the command line and `--config`; `--trainer` is looked up first, since the configuration depends on it."""
    lookup = TrlParser((Method,), add_help=False, allow_abbrev=False)
    method, _ = lookup.parse_args_and_config(arguments, return_remaining_strings=True)
    config_class = ALPGRPOConfig if method.trainer == "alp" else GRPOConfig
    parser = TrlParser((Method, ScriptArguments, config_class, ModelConfig))
    return parser.parse_args_and_config(arguments, fail_with_unknown_args=True)[1:]


def main(script_args: ScriptArguments, training_args: GRPOConfig, model_args: ModelConfig) -> None:
    tokenizer = AutoTokenizer.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        trust_remote_code=training_args.trust_remote_code,
        padding_side="left",
    )
    chat = tokenizer.chat_template is not None
    name, config = script_args.dataset_name, script_args.dataset_config
    train_split, test_split = script_args.dataset_train_split, script_args.dataset_test_split
    train_dataset = load_problems(name, config, train_split, script_args.max_train_samples, chat)
    check_dataset(train_dataset, training_args)
    evaluate = training_args.eval_strategy != "no"
    eval_dataset = load_problems(name, config, test_split, None, chat) if evaluate else None
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
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(f"Model saved to {training_args.output_dir}.")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    if hasattr(trainer, "end"):  # transformers 5.18 and later
        trainer.end()


if __name__ == "__main__":
    main(*parse_arguments())
