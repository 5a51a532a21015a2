# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
r"""
Train a chat model with ALP-GRPO to solve math problems with a Python tool, over several turns.

The paper's multi-turn setting, on 8 GPUs (`pip install ".[examples]" "trl[vllm]" deepspeed` in a clone):

    accelerate launch --config_file examples/accelerate_configs/zero3.yaml examples/tool_math.py \
        --config examples/configs/tool_math.yaml

On one GPU of 24 GB, with LoRA and plain generation, on GSM8K:

    accelerate launch examples/tool_math.py \
        --config examples/configs/tool_math.yaml --model_name_or_path Qwen/Qwen2.5-1.5B-Instruct \
        --dataset_name openai/gsm8k --dataset_config main --use_peft --lora_target_modules all-linear \
        --lora_dropout 0 --learning_rate 1e-5 --use_vllm false --gradient_accumulation_steps 16 \
        --steps_per_generation 64 --num_generations 8 --max_completion_length 2048

`--alp_ratio_level` is `sequence` in the file, as in the paper; `cumulative_turn` gives every turn the ratio of the
trajectory up to its end. In both, tokens that the tool wrote are outside the ratio and the loss.

The chat template must know tools (Qwen2.5 and Qwen3 do, and others listed by TRL). What the model writes runs in the
sandbox of `sandbox.py`, see there and in `docs/tools.md`; without one that holds the script stops at its start.

Void turns, which neither call the tool nor answer: their trajectories get no reward and no advantage.

`--dataset_name` is read as in `train_alp.py`.
"""

import logging
from collections.abc import Callable

from problems import check_name, load_problems, math_reward
from sandbox import run_python
from train_alp import ScriptArguments, errors_in_one_line, parse_options, problems_to_evaluate_on, train_and_save
from transformers import AutoTokenizer
from trl import ModelConfig, get_peft_config, get_quantization_config

from trl_alp import ALPGRPOConfig, ALPGRPOTrainer, ConsoleCallback


SYSTEM = {
    "role": "system",
    "content": "You solve math problems. Call the tool `python` to compute, look at what it prints, and answer when "
    "you are sure. Every turn either calls the tool or gives the final answer.",
}


def python(code: str) -> str:
    """
    Runs a Python program in a sandbox and returns what it prints, and its error if it fails. Programs share nothing:
    define all that is needed. `sympy` and `numpy` can be imported. There is no network, and no file is kept.

    Args:
        code: The program. The value of a last line that is an expression is printed.

    Returns:
        The output.
    """
    return run_python(code)


def is_void(message: dict) -> bool:
    """Whether a turn neither calls a tool nor gives an answer."""
    return message["role"] == "assistant" and not message.get("tool_calls") and not has_answer(message)


def has_answer(message: dict) -> bool:
    return message["role"] == "assistant" and "\\boxed{" in (message.get("content") or "")


def tool_math_reward(
    completions: list[list[dict]],
    solution: list[str],
    log_metric: Callable[[str, float], None] | None = None,
    **kwargs,
) -> list[float | None]:
    r"""1 if the last turn's `\boxed{}` is the solution, else 0; None for a trajectory with a void turn, or where
    `math-verify` cannot read the solution, so that TRL leaves it out."""
    answers = [turns[-1]["content"] if has_answer(turns[-1]) else "" for turns in completions]
    void = [any(map(is_void, turns)) for turns in completions]
    if log_metric is not None:
        log_metric("tools/void_turns", sum(void) / len(void))
        log_metric("tools/answered", sum(map(bool, answers)) / len(answers))
    rewards = math_reward(answers, solution)
    return [None if is_void else reward for is_void, reward in zip(void, rewards, strict=True)]


def build(script_args: ScriptArguments, training_args: ALPGRPOConfig, model_args: ModelConfig) -> ALPGRPOTrainer:
    """The trainer; a `ValueError` if something that was given cannot be."""
    run_python("1")  # SandboxUnavailable now, rather than from inside the first rollouts
    check_name("model_name_or_path", model_args.model_name_or_path)
    # TRL prints a whole conversation for every batch with a reward of None, which void turns make commonplace;
    # `tools/void_turns` and `alp/unscored_rewards` count them.
    logging.getLogger("trl.trainer.grpo_trainer").addFilter(
        lambda record: "All reward functions returned None" not in record.getMessage()
    )
    tokenizer = AutoTokenizer.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        trust_remote_code=training_args.trust_remote_code,
        padding_side="left",
    )

    def with_system(problems):
        return problems.map(lambda row: {"prompt": [SYSTEM, *row["prompt"]]})

    name, config, split = script_args.dataset_name, script_args.dataset_config, script_args.dataset_train_split
    train_dataset = with_system(load_problems(name, config, split, script_args.max_train_samples, chat=True))
    evaluate = training_args.eval_strategy != "no"
    eval_dataset = with_system(problems_to_evaluate_on(script_args, chat=True)) if evaluate else None
    # `--dtype` defaults to float32: master weights in fp32 and compute in bf16, as in the paper.
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    return ALPGRPOTrainer(
        model=model_args.model_name_or_path,
        reward_funcs=tool_math_reward,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        tools=[python],
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
        callbacks=[ConsoleCallback()],
    )


def main(script_args: ScriptArguments, training_args: ALPGRPOConfig, model_args: ModelConfig) -> None:
    with errors_in_one_line():
        trainer = build(script_args, training_args, model_args)
    train_and_save(trainer, script_args)


if __name__ == "__main__":
    with errors_in_one_line():
        arguments = parse_options((ScriptArguments, ALPGRPOConfig, ModelConfig), __doc__)
    main(*arguments)
