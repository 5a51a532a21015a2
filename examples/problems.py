# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""Math problems with their prompts and answers, of the hub or a local file, and the reward that checks an answer."""

import json
import threading
from pathlib import Path

from datasets import Dataset, get_dataset_config_names, load_dataset
from math_verify import parse, verify


INSTRUCTION = "\nPlease reason step by step, and put your final answer within \\boxed{}."


def is_file(name: str) -> bool:
    return Path(name).suffix in (".json", ".jsonl", ".csv", ".parquet")


def check_name(option: str, name: str) -> None:
    """Raise a `ValueError` for a path that is not there; the hub would call it a malformed name."""
    meant_as_path = is_file(name) or name.startswith((".", "/", "~")) or name.count("/") > 1
    if meant_as_path and not Path(name).exists():
        raise ValueError(f"{option}={name!r} is not there. Give a path that is, or a name of the hub (owner/name).")


def read_file(name: str, split: str) -> Dataset:
    """The rows of a local file; a `ValueError` with its line if it cannot be read."""
    kind = Path(name).suffix.removeprefix(".").replace("jsonl", "json")
    if name.endswith(".jsonl"):
        for number, line in enumerate(Path(name).read_text(encoding="utf-8").splitlines(), 1):
            try:
                row = json.loads(line or "{}")
            except ValueError as error:
                raise ValueError(f"{name}:{number}: not JSON ({error}). Mend the line or take it out.") from error
            if not isinstance(row, dict):
                raise ValueError(f"{name}:{number}: a row is an object with a question and an answer, not {line!r}.")
    if not Path(name).read_bytes().strip():
        raise ValueError(f"{name} is empty. Give a file with a question and an answer in each row.")
    try:
        return load_dataset(kind, data_files={split.split("[")[0]: name}, split=split)
    except Exception as error:
        cause = str(error.__cause__ or error).splitlines()[0]
        raise ValueError(f"{name} cannot be read as {kind}: {cause}") from error


def load_problems(name: str, config: str | None, split: str, limit: int | None, chat: bool) -> Dataset:
    """Rows with a `prompt` (a conversation if `chat`, else text) and the reference `solution`."""
    check_name("dataset_name", name)
    if is_file(name):
        dataset = read_file(name, split)
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
    # Its time limits work by signals, which only the main thread may set; TRL's own reward leaves them out elsewhere.
    in_main_thread = threading.current_thread() is threading.main_thread()
    reading, checking = ({}, {}) if in_main_thread else ({"parsing_timeout": None}, {"timeout_seconds": None})
    rewards: list[float | None] = []
    for completion, reference in zip(completions, solution, strict=True):
        text = completion if isinstance(completion, str) else completion[-1]["content"]
        gold = parse(f"${reference}$", **reading)
        rewards.append(float(verify(gold, parse(text, **reading), **checking)) if gold else None)
    return rewards
