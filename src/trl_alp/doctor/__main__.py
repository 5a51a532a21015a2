# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""The mismatch doctor: what is the gap between training model and inference engine made of?

    python -m trl_alp.doctor MODEL --engine vllm --engine-dtype bfloat16 --temperature 1.0 --json out.json

Samples completions from the engine, scores them with the training model under one hypothesis after another, and prints
the verdict, the evidence and the way out. docs/doctor.md explains each cause. Exit status: 0 healthy, 1 not healthy,
2 could not run.
"""

import argparse
import json
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoTokenizer

from .diagnosis import Diagnosis, diagnose
from .engines import (
    Engine,
    GenerationSetting,
    Prompt,
    TransformersEngine,
    VLLMEngine,
    VLLMServerEngine,
    load_model,
    plain_copy,
)
from .figure import draw


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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = _parser()
    args = parser.parse_args(arguments)
    if args.engine not in ("vllm", "transformers") and not args.engine.startswith(("http://", "https://")):
        parser.error(f"--engine {args.engine!r} is none of vllm, transformers and the URL of a vLLM server")
    try:
        diagnosis = _run(args)
    except Exception as error:  # Python's own exit status for it, 1, would say "not healthy"
        if not isinstance(error, OSError | ValueError | ImportError):
            traceback.print_exc()
        print(f"trl_alp.doctor could not run: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    print(report(diagnosis))
    if args.json:
        args.json.write_text(json.dumps(diagnosis.to_dict(), indent=2) + "\n")
    if args.figure:
        draw(diagnosis, args.figure)
        print(f"figure: {args.figure}")
    return 0 if diagnosis.healthy else 1


def read_prompts(source: str | None, limit: int, chat: bool) -> list[Prompt]:
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
            Whether the built-in prompts are conversations.

    Raises:
        `ValueError`: If there are none, or no such field.
    """
    if source is None:
        prompts = [[{"role": "user", "content": text}] if chat else text for text in DEFAULT_PROMPTS]
    elif source.endswith(".txt"):
        prompts = [line for line in Path(source).read_text().splitlines() if line.strip()]
    else:
        if source.endswith((".json", ".jsonl")):
            text = Path(source).read_text()
            rows = json.loads(text) if source.endswith(".json") else map(json.loads, filter(None, text.splitlines()))
        else:
            from datasets import load_dataset

            rows = load_dataset(source, split=f"train[:{limit}]")
        prompts = [_prompt(row, source) for row in rows]
    if not prompts:
        raise ValueError(f"--prompts {source} has no prompts.")
    return [prompts[i % len(prompts)] for i in range(limit)]


def _prompt(row, source: str) -> Prompt:
    if isinstance(row, str | list):
        return row
    for name in ("prompt", "question", "problem", "text"):
        if row.get(name):
            return row[name]
    raise ValueError(f"--prompts {source}: a row has fields {sorted(row)}; name one of them `prompt`.")


def report(diagnosis: Diagnosis) -> str:
    """The diagnosis as text: the verdict, the evidence, the gap by position and by probability."""
    evidence = sorted(diagnosis.evidence, key=lambda row: row["gap_left"])
    temperatures = [row for row in evidence if row["hypothesis"].startswith("another temperature")]
    evidence = [row for row in evidence if row not in temperatures[1:]]
    lines = [diagnosis.verdict, ""]
    lines += _table(
        ("hypothesis", "predicts", "gap left", "of it"),
        [
            (
                f"{row['cause']}: {row['hypothesis']}",
                row["predicts"],
                row["gap_left"],
                f"{row['share_left']:.0%}" if row["share_left"] < 10 else "> 10x",
            )
            for row in evidence
        ],
    )
    lines += ["", *_table(("statistic", ""), list(diagnosis.statistics.items()))]
    columns = ("tokens", "mean", "abs_mean", "p02", "p50", "p98")
    for title, rows, name in (
        ("position", diagnosis.by_position, lambda row: f"{row['from']}-{row['to']}"),
        ("probability under the engine", diagnosis.by_probability, lambda row: f"{row['above']:g}-{row['to']:g}"),
    ):
        lines += ["", *_table((title, *columns), [(name(row), *(row[c] for c in columns)) for row in rows])]
    return "\n".join(lines)


def _table(head: Sequence[str], rows: list[Sequence]) -> list[str]:
    cells = [[f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row] for row in [head, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def _run(args: argparse.Namespace) -> Diagnosis:
    setting = GenerationSetting(
        args.temperature, args.top_p, args.top_k, args.min_p, args.repetition_penalty, args.max_tokens
    )
    if args.figure:
        import matplotlib  # noqa: F401  # before the minutes of work, not after
    for path in (args.json, args.figure):
        if path and not path.absolute().parent.is_dir():
            raise ValueError(f"{path} is to be written to a folder that does not exist.")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(args.model, getattr(torch, args.dtype), args.adapter, device)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer or args.model)
    prompts = read_prompts(args.prompts, args.num_completions, chat=tokenizer.chat_template is not None)
    engine = _engine(args, model, device)
    with tqdm(desc="doctor", unit="step", disable=args.no_progress) as bar:

        def progress(step: str) -> None:
            bar.set_postfix_str(step)
            bar.update()

        return diagnose(
            model,
            tokenizer,
            engine,
            prompts,
            setting,
            candidates={path: path for path in args.candidates},
            sync=args.sync if args.sync is not None else not args.engine.startswith("http"),
            seed=args.seed,
            batch_size=args.batch_size,
            progress=progress,
        )


def _engine(args: argparse.Namespace, model: torch.nn.Module, device: str) -> Engine:
    if args.engine.startswith(("http://", "https://")):
        return VLLMServerEngine(args.engine)
    path = args.engine_model or args.model
    if args.engine == "transformers":
        dtype = getattr(torch, args.engine_dtype or args.dtype)
        # Without a path of its own the engine has the training model's weights, adapter and all.
        copy = load_model(path, dtype, device=device) if args.engine_model else plain_copy(model, dtype)
        return TransformersEngine(copy, AutoTokenizer.from_pretrained(path), args.logprobs_mode)
    try:
        from vllm import LLM
    except ImportError as error:
        raise ImportError(
            f'--engine vllm: {error}. `pip install "trl[vllm]"`, or examine another engine: `--engine transformers`.'
        ) from error

    options = {"kv_cache_dtype": args.kv_cache_dtype, "logprobs_mode": args.logprobs_mode, "seed": args.seed}
    llm = LLM(path, dtype=args.engine_dtype or "auto", **options | json.loads(args.vllm_options))
    engine = VLLMEngine(llm)
    if args.engine_model is None and args.adapter is not None:
        engine.sync(model)
    return engine


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("trl_alp.doctor", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("model", help="the training model: a path, or a name on the hub")
    add("--adapter", help="PEFT adapter of the training model")
    add("--tokenizer", help="tokenizer of the trainer, if it is not the model's")
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="dtype of the training model")
    add("--device", help="of the training model; a GPU if there is one")
    add("--engine", default="vllm", help="vllm (in this process), transformers, or the URL of a vLLM server")
    add("--engine-model", help="path of the engine's own copy; default: the training model")
    add("--engine-dtype", choices=("float32", "bfloat16", "float16"), help="default: as the engine chooses")
    add("--kv-cache-dtype", default="auto", help="of vLLM")
    add("--logprobs-mode", default="processed_logprobs", help="of the engine; TRL's vLLM has processed_logprobs")
    add("--vllm-options", default="{}", help='further arguments of vllm.LLM as JSON, {"enforce_eager": true} say')
    add("--temperature", type=float, default=1.0)
    add("--top-p", type=float, default=1.0)
    add("--top-k", type=int, default=0)
    add("--min-p", type=float, default=0.0)
    add("--repetition-penalty", type=float, default=1.0)
    add("--max-tokens", type=int, default=64)
    add("--prompts", help="a .txt, .json or .jsonl file, or a dataset; default: a dozen built-in ones")
    add("--num-completions", type=int, default=256)
    add("--batch-size", type=int, default=16, help="rows scored at once")
    add("--candidates", nargs="+", default=[], help="checkpoints or adapters that the engine may have instead")
    add(
        "--sync",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="sync the engine's weights and score again; default: yes, but for a server, which may be in use",
    )
    add("--seed", type=int, default=0)
    add("--json", type=Path, help="write the diagnosis to this file")
    add("--figure", type=Path, help="draw the gap to this PNG")
    add("--no-progress", action="store_true")
    return parser


if __name__ == "__main__":
    sys.exit(main())
