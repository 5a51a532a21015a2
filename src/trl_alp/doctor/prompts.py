# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""The prompts of the command: read and checked before anything is loaded."""

import json
from collections.abc import Iterator
from pathlib import Path


DEFAULT_PROMPTS = (
    "What is 17 + 25?",
    "Name the capital of France.",
    "Write one sentence about the sea.",
    "A train leaves at 9:40 and arrives at 11:15. How long is the journey?",
    "Translate to French: good morning",
    "List three prime numbers greater than 10.",
    "Explain in one paragraph why the sky is blue, to a child of six.",
    "def fibonacci(n):",
    "If x + 3 = 10, what is x?",
    "Give me a rhyme for 'stone'.",
    "Sort these words by length: pear, fig, banana, kiwi.",
    "Once upon a time,",
)


def read_prompts(source: str | None, limit: int, chat: bool) -> list[str | list[dict]]:
    """
    Read prompts, repeated until there are `limit`.

    Args:
        source (`str`, *optional*):
            A `.txt` file (one prompt a line), a `.json` or `.jsonl` file, or the name of a dataset (its `train`
            split), of which the field `prompt`, else `question`, `problem` or `text` is taken: a text or a
            conversation. `None` for a dozen built-in ones.
        limit (`int`):
            How many.
        chat (`bool`):
            Whether the tokenizer has a chat template, without which there are no conversations.

    Raises:
        `ValueError`: If there are none, one is neither a text nor a conversation, or some are texts and others
            conversations; with the file and the line.
    """
    if source is None:
        prompts = [[{"role": "user", "content": text}] if chat else text for text in DEFAULT_PROMPTS]
    else:
        prompts, kinds = [], {}
        for where, row in _rows(source, limit):
            prompt = _prompt(row, where)
            kinds.setdefault(type(prompt), where)
            if len(kinds) > 1:
                raise ValueError(f"Texts and conversations are mixed: {' and '.join(kinds.values())}. Give one kind.")
            if isinstance(prompt, list) and not chat:
                raise ValueError(f"{where}: a conversation, but the tokenizer has no chat template. Give texts.")
            prompts.append(prompt)
    if not prompts:
        raise ValueError(f"--prompts {source} has no prompts.")
    return [prompts[i % len(prompts)] for i in range(limit)]


def _rows(source: str, limit: int) -> Iterator[tuple[str, object]]:
    """Where each row stands, and the row."""
    if not source.endswith((".txt", ".json", ".jsonl")):
        from datasets import load_dataset

        for number, row in enumerate(load_dataset(source, split=f"train[:{limit}]")):
            yield f"--prompts {source}, row {number}", row
        return
    try:
        text = Path(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompts {source} cannot be read: {error}") from error
    if source.endswith(".json"):
        for number, row in enumerate(_json(text, source, 1, list)):
            yield f"--prompts {source}, item {number}", row
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            where = f"--prompts {source}:{number}"
            yield where, line if source.endswith(".txt") else _json(line, source, number, dict | list | str)


def _json(text: str, source: str, line: int, kind):
    try:
        value = json.loads(text)
    except ValueError as error:
        number = line + getattr(error, "lineno", 1) - 1
        raise ValueError(f"--prompts {source}:{number}: not JSON ({getattr(error, 'msg', error)}).") from error
    if not isinstance(value, kind):
        raise ValueError(f"--prompts {source}:{line}: a {type(value).__name__} is no prompt, nor a list of them.")
    return value


def _prompt(row, where: str) -> str | list[dict]:
    if isinstance(row, dict):
        name = next((name for name in ("prompt", "question", "problem", "text") if row.get(name)), None)
        if name is None:
            raise ValueError(f"{where}: a row has fields {sorted(row)}; name one of them `prompt`.")
        row = row[name]
    if isinstance(row, str) and row.strip():
        return row
    if (
        isinstance(row, list)
        and row
        and all(isinstance(turn, dict) and {"role", "content"} <= set(turn) for turn in row)
    ):
        return row
    raise ValueError(f"{where}: neither a text nor a list of messages with `role` and `content`: {str(row)[:60]!r}.")
