# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
r"""
Evaluate one or several checkpoints on math problems: Avg@n and pass@k with confidence intervals, on any machine.

    python examples/evaluate.py Qwen/Qwen2.5-Math-1.5B runs/single_turn/alp_sequence \
        --datasets math500 aime24 aime25 --samples 16 --k 1 8 --backend vllm --output runs/evaluation.json

A model is a name of the hub, or a folder with a model or a LoRA adapter. A dataset is `gsm8k`, `math500`, `aime24`,
`aime25`, another dataset of the hub, or a local `.json`, `.jsonl`, `.csv` or `.parquet` file with the columns that
`train_alp.py` reads. Prompts and the check of the final answer are those of `train_alp.py`.

Avg@n is the mean accuracy of n samples per problem; pass@k the probability that one of k samples is right, by the
unbiased estimator of Chen et al. (2021, arXiv 2107.03374). Intervals are 95 % percentile bootstraps over problems: how
much the choice of problems matters. Where all problems score alike their width is 0, which says nothing. Models beyond
the first are also compared with it, problem by problem. With transformers a seed fixes every number on one machine.

What is deployed is the policy as an engine serves it, which is not quite the policy that was trained. With vLLM the
engine's numbers are set by `--dtype`, `--quantization` and `--kv_cache_dtype`. Without vLLM they are simulated, and
several formats are compared in one call:

    python examples/evaluate.py runs/single_turn/alp_sequence --served_in exact bf16 int4
"""

import argparse
import gc
import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from problems import check_name, load_problems, math_reward
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, set_seed

from trl_alp.formats import FORMATS, put_in_format


HUB = {  # name: dataset of the hub, configuration, split
    "gsm8k": ("openai/gsm8k", "main", "test"),
    "math500": ("HuggingFaceH4/MATH-500", None, "test"),
    "aime24": ("HuggingFaceH4/aime_2024", None, "train"),
    "aime25": ("math-ai/aime25", None, "test"),
}
RESAMPLES = 10_000


# ---- Estimators ----


def pass_at_k(correct: int, samples: int, k: int) -> float:
    """Probability that k of the samples, drawn without replacement, hold a right one: 1 - C(n - c, k) / C(n, k)."""
    if not 1 <= k <= samples:
        raise ValueError(f"k={k} must be between 1 and samples={samples}; draw more samples, or ask for a smaller k.")
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


def mean_with_interval(scores: list[float], seed: int = 0) -> dict[str, float]:
    """Mean of one score per problem, with its 95 % percentile bootstrap over problems."""
    scores = np.asarray(scores, dtype=np.float64)  # (P,)
    generator = np.random.default_rng(seed)
    means = [scores[generator.integers(len(scores), size=len(scores))].mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return {"mean": float(scores.mean()), "low": float(low), "high": float(high)}


def score(correct: list[int], samples: int, ks: list[int]) -> dict[str, list[float]]:
    """Score of each problem by each metric."""
    scores = {f"avg@{samples}": [c / samples for c in correct]}
    return scores | {f"pass@{k}": [pass_at_k(c, samples, k) for c in correct] for k in ks}


# ---- Generation: token ids of P prompts to P lists of samples, each the text and whether it ended by itself ----


def base_of(model: str) -> str:
    """The model itself, or the one that a LoRA adapter is for."""
    adapter = Path(model) / "adapter_config.json"
    return json.loads(adapter.read_text())["base_model_name_or_path"] if adapter.is_file() else model


def transformers_generator(model: str, tokenizer, options, max_length: int, served_in: str) -> Callable:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if options.dtype == "auto" and device == "cuda" else options.dtype
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval().to(device)
    if served_in != "exact":
        policy = put_in_format(policy, served_in)
    ends = policy.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    # Sampling settings that come with the model are not used: `generate` would take each one that is not given below.
    policy.generation_config = GenerationConfig()
    sampling = {"do_sample": options.temperature > 0}
    if options.temperature > 0:
        sampling |= {"top_k": 0, "top_p": options.top_p, "temperature": options.temperature}

    @torch.no_grad()
    def generate(prompts: list[list[int]]) -> list[list[tuple[str, bool]]]:
        set_seed(options.seed)
        completions = []
        for start in tqdm(range(0, len(prompts), options.batch_size), desc=model, unit="batch"):
            batch = {"input_ids": prompts[start : start + options.batch_size]}
            batch = tokenizer.pad(batch, return_tensors="pt", padding_side="left").to(device)
            output = policy.generate(
                **batch,
                **sampling,
                max_new_tokens=options.max_new_tokens,
                num_return_sequences=options.samples,
                eos_token_id=sorted(ends),
                pad_token_id=tokenizer.pad_token_id,
            )
            output = output[:, batch["input_ids"].shape[1] :].tolist()
            rows = [(tokenizer.decode(ids, skip_special_tokens=True), not ends.isdisjoint(ids)) for ids in output]
            completions += [rows[i : i + options.samples] for i in range(0, len(rows), options.samples)]
        return completions

    return generate


def vllm_generator(model: str, tokenizer, options, max_length: int, served_in: str) -> Callable:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    base, adapter, lora = base_of(model), None, {}
    if base != model:
        adapter = LoRARequest("adapter", 1, str(Path(model).resolve()))
        rank = json.loads((Path(model) / "adapter_config.json").read_text())["r"]
        lora = {"enable_lora": True, "max_lora_rank": max(8, 2 ** math.ceil(math.log2(rank)))}
    engine = LLM(
        base, dtype=options.dtype, quantization=options.quantization, kv_cache_dtype=options.kv_cache_dtype,
        seed=options.seed, max_model_len=max_length, **lora,
    )  # fmt: skip

    def generate(prompts: list[list[int]]) -> list[list[tuple[str, bool]]]:
        settings = {"n": options.samples, "temperature": options.temperature, "top_p": options.top_p}
        settings |= {"max_tokens": options.max_new_tokens}
        # A seed for each sample: with one for all, problems would share their random numbers.
        sampling = [SamplingParams(**settings, seed=options.seed + i * options.samples) for i in range(len(prompts))]
        prompts = [{"prompt_token_ids": ids} for ids in prompts]
        outputs = engine.generate(prompts, sampling, lora_request=adapter)
        return [[(sample.text, sample.finish_reason == "stop") for sample in output.outputs] for output in outputs]

    return generate


# ---- Evaluation ----


def read(dataset: str, tokenizer, options) -> dict:
    """Prompts and solutions of a dataset, without the problems whose solution math-verify cannot read."""
    chat = tokenizer.chat_template is not None
    name, config, split = HUB.get(dataset, (dataset, None, options.split))
    problems = load_problems(name, config, split, options.limit, chat)
    readable = [reward is not None for reward in math_reward([""] * len(problems), problems["solution"])]
    problems = problems.select(np.flatnonzero(readable))
    prompts = list(problems["prompt"])
    if chat:
        prompts = [tokenizer.apply_chat_template(p, add_generation_prompt=True, tokenize=False) for p in prompts]
    prompts = tokenizer(prompts, add_special_tokens=not chat)["input_ids"]
    return {"prompts": prompts, "solutions": problems["solution"], "unreadable": readable.count(False)}


def prepare(model: str, options) -> tuple:
    """The tokenizer of a model, and the datasets as it reads them; an error if one of them cannot be had."""
    check_name("models", model)
    if Path(model).is_dir() and not any((Path(model) / f"{kind}config.json").is_file() for kind in ("", "adapter_")):
        raise ValueError(f"{model} holds neither a model nor a LoRA adapter. Give a folder that does.")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer, {name: read(name, tokenizer, options) for name in options.datasets}


def evaluate(model: str, tokenizer, datasets: dict[str, dict], options, served_in: str = "exact") -> list[dict]:
    """Counts and scores of one model as an engine serves it, for each dataset."""
    longest = max(len(prompt) for dataset in datasets.values() for prompt in dataset["prompts"])
    generator = {"transformers": transformers_generator, "vllm": vllm_generator}[options.backend]
    generate = generator(model, tokenizer, options, longest + options.max_new_tokens, served_in)
    results, shown = [], model if served_in == "exact" else f"{model} in {served_in}"
    for name, dataset in datasets.items():
        completions = generate(dataset["prompts"])
        correct = []
        for samples, solution in zip(tqdm(completions, desc="math-verify"), dataset["solutions"], strict=True):
            correct.append(int(sum(math_reward([text for text, _ in samples], [solution] * len(samples)))))
        ended = [ended for samples in completions for _, ended in samples]
        result = {"model": shown, "dataset": name, "problems": len(correct), "unreadable": dataset["unreadable"]}
        scores = score(correct, options.samples, options.k).items()
        result |= {"metrics": {metric: mean_with_interval(values) for metric, values in scores}}
        result |= {"truncated": 1 - sum(ended) / len(ended), "correct": correct}
        results.append(result | {"completions": [[text for text, _ in samples] for samples in completions]})
    return results


def compare(first: dict, other: dict, options) -> dict:
    """Difference to the first model, problem by problem."""
    pair = [score(result["correct"], options.samples, options.k) for result in (first, other)]
    differences = {metric: np.subtract(pair[1][metric], pair[0][metric]) for metric in pair[0]}
    names = {"model": other["model"], "minus": first["model"], "dataset": other["dataset"]}
    return names | {"metrics": {metric: mean_with_interval(values) for metric, values in differences.items()}}


def table(rows: list[dict], sign: str = "") -> str:
    """Percentages with their intervals, one line per model and dataset."""
    metrics = list(rows[0]["metrics"])
    lines = [["dataset", "model", *metrics, *(["problems", "truncated"] if not sign else [])]]
    for row in rows:
        values = [[100 * value[x] for x in ("mean", "low", "high")] for value in row["metrics"].values()]
        cells = [f"{mean:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]" for mean, low, high in values]
        rest = [] if sign else [str(row["problems"]), f"{row['truncated']:.0%}"]
        lines.append([row["dataset"], row["model"] + (" - " + row["minus"] if sign else ""), *cells, *rest])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def write(options, results: list[dict], differences: list[dict]) -> dict:
    """The report, also in the file if one is asked for; called whenever a model is done, so that none is lost."""
    if not options.save_completions:
        results = [{key: value for key, value in row.items() if key != "completions"} for row in results]
    report = {
        "settings": vars(options) | {"output": str(options.output)},
        "results": results,
        "differences": differences,
    }
    if options.output:
        options.output.write_text(json.dumps(report, indent=1))
    return report


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="names of the hub, or folders with a model or a LoRA adapter")
    parser.add_argument("--datasets", nargs="+", default=["gsm8k"], help="gsm8k, math500, aime24, aime25, hub or file")
    parser.add_argument("--split", default="test", help="split of datasets other than the four (default: test)")
    parser.add_argument("--limit", type=int, help="use only the first so many problems")
    parser.add_argument("--samples", type=int, default=8, help="completions per problem: the n of Avg@n (default: 8)")
    parser.add_argument("--k", type=int, nargs="+", help="the k of pass@k (default: 1, and 8 if --samples allows it)")
    parser.add_argument("--backend", choices=["transformers", "vllm"], default="transformers")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 for greedy, with --samples 1 --k 1")
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--max_new_tokens", type=int, default=2048)
    parser.add_argument("--batch_size", type=int, default=16, help="problems at a time, with transformers")
    parser.add_argument("--dtype", default="auto", help="auto: bfloat16 on a GPU with transformers, else the model's")
    parser.add_argument(
        "--served_in", nargs="+", default=["exact"], choices=["exact", *FORMATS], metavar="FORMAT",
        help=f"with transformers: number formats of an engine, simulated; exact, or {', '.join(FORMATS)}",
    )  # fmt: skip
    parser.add_argument("--quantization", help="with vLLM: its quantisation, such as fp8 (default: the model's)")
    parser.add_argument("--kv_cache_dtype", default="auto", help="with vLLM: number format of the cache, such as fp8")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file for the scores and counts")
    parser.add_argument("--save_completions", action="store_true", help="put the completions into that file too")
    options = parser.parse_args(arguments)
    for name in ("limit", "samples", "max_new_tokens", "batch_size"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name} {value} must be at least 1.")
    if options.temperature < 0:
        parser.error(f"--temperature {options.temperature:g} must be 0 (greedy) or above.")
    if not 0 < options.top_p <= 1:
        parser.error(f"--top_p {options.top_p:g} must be above 0 and at most 1.")
    options.k = options.k or [k for k in (1, 8) if k <= options.samples]
    if options.temperature == 0 and options.samples > 1:
        parser.error(f"--temperature 0 would draw --samples {options.samples} equal ones. Use --samples 1 --k 1.")
    if options.backend == "vllm" and importlib.util.find_spec("vllm") is None:
        parser.error('--backend vllm needs vLLM: `pip install "trl[vllm]"`, or use --backend transformers.')
    if not all(1 <= k <= options.samples for k in options.k):
        parser.error(f"--k {options.k} must be between 1 and --samples {options.samples}.")

    if options.backend == "vllm" and options.served_in != ["exact"]:
        parser.error("--served_in simulates an engine; vLLM is one: use --dtype, --quantization, --kv_cache_dtype.")
    if options.backend != "vllm" and (options.quantization or options.kv_cache_dtype != "auto"):
        parser.error("--quantization and --kv_cache_dtype are vLLM's: use --backend vllm, or --served_in.")

    try:
        prepared = {model: prepare(model, options) for model in options.models}
        if options.output:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.touch()
    except (OSError, ValueError) as error:
        parser.error(" ".join(str(error).split()))

    by_model = []
    for model, (tokenizer, datasets) in prepared.items():
        for served_in in options.served_in:
            by_model.append(evaluate(model, tokenizer, datasets, options, served_in))
            write(options, [result for results in by_model for result in results], [])
            gc.collect()  # a vLLM engine gives its memory back before the next one asks for it
    results = [result for dataset in zip(*by_model, strict=True) for result in dataset]
    first, *others = by_model
    differences = [compare(*pair, options) for other in others for pair in zip(first, other, strict=True)]
    print(f"Percent, with 95 % bootstrap intervals over problems\n\n{table(results)}")
    if differences:
        print(f"\nDifference to the first model, paired by problem\n\n{table(differences, sign='+')}")
    if unreadable := {row["dataset"]: row["unreadable"] for row in results if row["unreadable"]}:
        print(f"\nLeft out, since math-verify cannot read their solution: {unreadable}")
    return write(options, results, differences)


if __name__ == "__main__":
    main()
