# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""The doctor as a command; torch is imported once the call has been understood."""

import argparse
import importlib.util
import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path


DESCRIPTION = "Say what the gap between a training model and its inference engine is made of."
EPILOG = """\
examples:
  trl-alp doctor Qwen/Qwen2.5-0.5B-Instruct --engine vllm --engine-dtype bfloat16
  trl-alp doctor Qwen/Qwen2.5-0.5B-Instruct --adapter run/checkpoint-40 --engine http://localhost:8000
  trl-alp doctor run/checkpoint-40 --engine transformers --engine-model run/int8 --prompts prompts.jsonl
  trl-alp doctor Qwen/Qwen2.5-0.5B-Instruct --noise int4

Completions are sampled from the engine and scored with the training model under one hypothesis after another.
The verdict comes first, with the way out; docs/doctor.md explains each cause.

With --noise the question is another: would noise as large as the mismatch cover this engine?

exit status: 0 healthy, 1 not healthy, 2 could not run or could not tell; with --noise 0 it would, 1 it would not
"""
_DTYPES = ("float32", "bfloat16", "float16")
_SERVER = ("http://", "https://")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    add = parser.add_argument
    add("model", help="the training model: a path, or a name on the hub")
    add("--adapter", help="PEFT adapter of the training model")
    add("--tokenizer", help="tokenizer of the trainer, if it is not the model's")
    add("--dtype", default="float32", choices=_DTYPES, help="dtype of the training model (default: %(default)s)")
    add("--device", help="of the training model (default: a GPU if there is one)")
    add(
        "--engine",
        default="vllm",
        help="vllm (in this process), transformers, or the URL of a vLLM server (default: %(default)s)",
    )
    add("--engine-model", help="path of the engine's own copy (default: the training model)")
    add("--engine-dtype", choices=_DTYPES, help="dtype of the engine (default: as the engine chooses)")
    add("--kv-cache-dtype", default="auto", help="of vLLM (default: %(default)s)")
    add(
        "--logprobs-mode",
        default="processed_logprobs",
        help="of the engine (default: %(default)s, as TRL runs vLLM)",
    )
    add(
        "--vllm-options",
        default="{}",
        type=_options,
        metavar="JSON",
        help='further arguments of vllm.LLM, as in {"enforce_eager": true}',
    )
    add(
        "--timeout", type=float, default=600.0, help="seconds to wait for an answer of a server (default: %(default)g)"
    )
    add("--temperature", type=float, default=1.0, help="default: %(default)g")
    add("--top-p", type=float, default=1.0, help="default: %(default)g, off")
    add("--top-k", type=int, default=0, help="default: %(default)s, off")
    add("--min-p", type=float, default=0.0, help="default: %(default)g, off")
    add("--repetition-penalty", type=float, default=1.0, help="default: %(default)g, off")
    add("--max-tokens", type=int, default=64, help="longest completion, in tokens (default: %(default)s)")
    add("--prompts", help="a .txt, .json or .jsonl file, or a dataset (default: a dozen built-in ones)")
    add("--num-completions", type=int, help="how many are sampled (default: 256, with --noise 64)")
    add("--batch-size", type=int, default=16, help="rows scored at once (default: %(default)s)")
    add(
        "--candidates",
        nargs="+",
        default=[],
        metavar="PATH",
        help="checkpoints or adapters that the engine may have instead",
    )
    add(
        "--sync",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="sync the engine's weights and score again (default: yes, but not for a server, which may be in use)",
    )
    add(
        "--noise",
        nargs="?",
        const="engine",
        metavar="FORMAT",
        help="ask whether noise would cover the engine, or one simulated in bf16, fp8, int8, int4, int3 or nvfp4 "
        "(default: ask what the gap is made of)",
    )
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--json", type=Path, help="write the diagnosis to this file")
    add("--figure", type=Path, help="draw the gap to this PNG (needs matplotlib)")
    add("--no-progress", action="store_true", help="print no progress bar")


def run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    if args.engine not in ("vllm", "transformers") and not args.engine.startswith(_SERVER):
        parser.error(f"--engine {args.engine!r} is none of vllm, transformers and the URL of a vLLM server")
    if args.num_completions is None:
        args.num_completions = 64 if args.noise else 256
    try:
        _check(args)
        diagnosis = _diagnose(args)
    except Exception as error:  # Python's own exit status for it, 1, would say "not healthy"
        if not isinstance(error, OSError | ValueError | ImportError):
            traceback.print_exc()
        print(f"{parser.prog} could not run: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    from .figure import draw
    from .findings import report
    from .noise_answer import report_noise

    try:
        print((report_noise if args.noise else report)(diagnosis), flush=True)
    except BrokenPipeError:  # its reader has enough, as `head` has; the interpreter's last flush must not raise either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    # The verdict stands, whatever becomes of the files.
    if args.json:
        _write(args.json, lambda path: path.write_text(json.dumps(diagnosis.to_dict(), indent=2) + "\n"))
    if args.figure and _write(args.figure, lambda path: draw(diagnosis, path)):
        print(f"figure: {args.figure}")
    return 0 if (diagnosis.covers if args.noise else diagnosis.healthy) else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """The command by itself, `trl-alp-doctor`."""
    parser = argparse.ArgumentParser(
        "trl-alp-doctor", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    return run(parser, parser.parse_args(arguments))


def _options(text: str) -> dict:
    try:
        options = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from error
    if not isinstance(options, dict):
        raise argparse.ArgumentTypeError(f'{text} is no JSON object, as in {{"enforce_eager": true}}')
    return options


def _check(args: argparse.Namespace) -> None:
    """All that can be seen to be wrong before a model is loaded, which takes minutes."""
    if args.noise:
        _check_noise(args)
    if args.engine == "vllm" and args.noise in (None, "engine") and importlib.util.find_spec("vllm") is None:
        raise ImportError(
            '--engine vllm: vLLM is not installed. `pip install "trl[vllm]"`, or examine another engine: '
            "`--engine transformers`."
        )
    if args.figure and importlib.util.find_spec("matplotlib") is None:
        raise ImportError("--figure needs matplotlib: `pip install matplotlib`.")
    for name, least in (("num_completions", 1), ("batch_size", 1), ("timeout", 1e-3)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)} is out of range: it must be above 0.")
    for name in ("json", "figure"):
        if (path := getattr(args, name)) is not None:
            _check_writable(f"--{name}", path)
    for name, path in (
        ("the model", args.model),
        ("--tokenizer", args.tokenizer),
        ("--engine-model", args.engine_model),
        ("--adapter", args.adapter),
        *(("--candidates", path) for path in args.candidates),
    ):
        # A name on the hub has at most one slash, and does not begin with one or with a dot.
        first, *rest = (path or "").split("/")
        local = first in ("", ".", "..", "~") or len(rest) > 1 or (rest and os.path.isdir(first))
        if path and local and not os.path.isdir(path):
            raise ValueError(f"{name}: there is no folder {path}.")
    if args.adapter and os.path.isdir(args.adapter):
        if not os.path.isfile(os.path.join(args.adapter, "adapter_config.json")):
            raise ValueError(f"--adapter {args.adapter} holds no adapter_config.json, so it is no PEFT adapter.")
        if importlib.util.find_spec("peft") is None:
            raise ImportError("--adapter needs PEFT: `pip install peft`.")


def _check_noise(args: argparse.Namespace) -> None:
    if args.noise != "engine":
        from ..formats import check_format

        check_format(args.noise, "--noise", ("nothing, for the engine",))
    off = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    for name, value in off.items():
        if getattr(args, name) != value:
            raise ValueError(
                f"--noise compares whole distributions, which --{name.replace('_', '-')} {getattr(args, name)} cuts: "
                "leave it off."
            )
    if args.figure:
        raise ValueError("--noise has no figure: leave --figure off, and take the numbers from --json.")


def _check_writable(name: str, path: Path) -> None:
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{name} {path} is to be written to a folder that does not exist.")
    existed = path.exists()
    try:
        path.open("ab").close()
    except OSError as error:
        raise ValueError(f"{name} {path} cannot be written: {error.strerror}.") from error
    if not existed:
        path.unlink()


def _write(path: Path, write) -> bool:
    try:
        write(path)
    except Exception as error:
        print(f"{path} could not be written: {type(error).__name__}: {error}", file=sys.stderr)
        return False
    return True


def _diagnose(args: argparse.Namespace):
    from .engines import GenerationSetting, check_logprobs_mode, tokenise
    from .prompts import read_prompts

    setting = GenerationSetting(
        args.temperature, args.top_p, args.top_k, args.min_p, args.repetition_penalty, args.max_tokens
    )
    check_logprobs_mode(args.logprobs_mode)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer or args.model)
    prompts = read_prompts(args.prompts, args.num_completions, chat=tokenizer.chat_template is not None)
    for prompt in prompts:
        tokenise(tokenizer, prompt)
    server = None
    if args.engine.startswith(_SERVER):
        from .vllm_engines import VLLMServerEngine

        server = VLLMServerEngine(args.engine, args.timeout)

    import torch
    from tqdm import tqdm

    from .diagnosis import diagnose
    from .engines import load_model
    from .noise import ask_noise

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(args.model, getattr(torch, args.dtype), args.adapter, device)
    engine = args.noise if args.noise not in (None, "engine") else server or _engine(args, model, device)
    with tqdm(desc="doctor", unit="step", disable=args.no_progress) as bar:

        def progress(step: str) -> None:
            bar.set_postfix_str(step)
            bar.update()

        if args.noise:
            return ask_noise(
                model,
                tokenizer,
                engine,
                prompts,
                temperature=args.temperature,
                max_tokens=args.max_tokens,
                seed=args.seed,
                batch_size=args.batch_size,
                progress=progress,
            )
        return diagnose(
            model,
            tokenizer,
            engine,
            prompts,
            setting,
            candidates={path: path for path in args.candidates},
            sync=args.sync if args.sync is not None else server is None,
            seed=args.seed,
            batch_size=args.batch_size,
            progress=progress,
        )


def _engine(args: argparse.Namespace, model, device: str):
    """An engine in this process."""
    import torch
    from transformers import AutoTokenizer

    from .engines import TransformersEngine, load_model, plain_copy

    path = args.engine_model or args.model
    if args.engine == "transformers":
        dtype = getattr(torch, args.engine_dtype or args.dtype)
        # Without a path of its own the engine has the training model's weights, adapter and all.
        copy = load_model(path, dtype, device=device) if args.engine_model else plain_copy(model, dtype)
        return TransformersEngine(copy, AutoTokenizer.from_pretrained(path), args.logprobs_mode)
    from vllm import LLM

    from .vllm_engines import VLLMEngine

    options = {"kv_cache_dtype": args.kv_cache_dtype, "logprobs_mode": args.logprobs_mode, "seed": args.seed}
    engine = VLLMEngine(LLM(path, dtype=args.engine_dtype or "auto", **options | args.vllm_options))
    if args.engine_model is None and args.adapter is not None:
        engine.sync(model)
    return engine


if __name__ == "__main__":
    sys.exit(main())
