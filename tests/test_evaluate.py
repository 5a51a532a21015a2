"""`examples/evaluate.py`: its estimators against brute force, and whole evaluations of tiny checkpoints."""

import itertools
import json
import shutil
import sys
import types

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_examples import GSM8K, ROOT, run
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(ROOT / "examples"))  # as Python does for a script
    try:
        import evaluate

        yield evaluate
    finally:
        sys.path.remove(str(ROOT / "examples"))


# ---- Estimators ----


@pytest.mark.parametrize("samples", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_draws_without_replacement_that_hold_a_right_one(script, samples):
    for correct, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        outcomes = [i < correct for i in range(samples)]
        brute_force = np.mean([any(draw) for draw in itertools.combinations(outcomes, k)])
        assert script.pass_at_k(correct, samples, k) == pytest.approx(brute_force, abs=1e-12)


def test_pass_at_k_is_unbiased_where_the_plug_in_estimate_is_not(script):
    """The expectation over c ~ Binomial(n, p), exactly: 1 - (1 - p)^k."""
    n, k, p = 6, 3, 0.3
    weights = [len(list(itertools.combinations(range(n), c))) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    unbiased = sum(w * script.pass_at_k(c, n, k) for c, w in enumerate(weights))
    plug_in = sum(w * (1 - (1 - c / n) ** k) for c, w in enumerate(weights))
    assert unbiased == pytest.approx(1 - (1 - p) ** k, abs=1e-12)
    assert abs(plug_in - unbiased) > 0.01


def test_pass_at_k_does_not_overflow_and_needs_k_samples(script):
    assert script.pass_at_k(1, 4096, 2048) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="k=3 must be between 1 and samples=2"):
        script.pass_at_k(1, 2, 3)


def test_avg_at_n_is_pass_at_1(script):
    scores = script.score([0, 1, 3, 4], samples=4, ks=[1, 4])
    assert scores["avg@4"] == pytest.approx(scores["pass@1"]) == [0, 0.25, 0.75, 1]
    assert scores["pass@4"] == [0, 1, 1, 1]


def test_the_interval_covers_the_true_mean_as_often_as_it_says(script, monkeypatch):
    monkeypatch.setattr(script, "RESAMPLES", 400)
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        interval = script.mean_with_interval(generator.beta(1, 2, size=100))  # mean 1/3, one score per problem
        hits += interval["low"] <= 1 / 3 <= interval["high"]
    assert 0.91 <= hits / 300 <= 0.98


def test_the_interval_is_that_of_all_resamples(script):
    scores = [0.0, 0.5, 1.0, 1.0]
    means = [np.mean(resample) for resample in itertools.product(scores, repeat=4)]
    interval = script.mean_with_interval(scores)
    assert interval["mean"] == pytest.approx(0.625)
    assert [interval["low"], interval["high"]] == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=1e-9)


def test_a_paired_difference_is_tighter_than_two_intervals(script):
    """Two models that agree on which problems are hard: the difference is seen, though the intervals overlap."""
    generator = np.random.default_rng(1)
    first = generator.choice([0, 8], size=60)
    other = np.clip(first + generator.choice([0, 1], size=60), 0, 8)
    rows = [{"model": name, "dataset": "d", "correct": list(c)} for name, c in (("a", first), ("b", other))]
    options = type("Options", (), {"samples": 8, "k": [1]})
    compared = script.compare(*rows, options)
    assert (compared["model"], compared["minus"]) == ("b", "a")
    difference = compared["metrics"]["avg@8"]
    assert difference["mean"] == pytest.approx(np.mean(other - first) / 8)
    assert 0 < difference["low"] < difference["mean"] < difference["high"]
    one, two = (script.mean_with_interval(row / 8) for row in (first, other))
    assert one["high"] > two["low"]
    swapped = script.compare(*rows[::-1], options)["metrics"]["avg@8"]
    assert swapped["mean"] == -difference["mean"] and swapped["high"] < 0


# ---- Whole evaluations ----

CORRECT = "\\boxed{72}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, language_model):
    """A checkpoint that has learnt to say one answer by heart, and no other."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("trained")
    tokenizer = AutoTokenizer.from_pretrained(language_model)
    policy = AutoModelForCausalLM.from_pretrained(language_model)
    ids = torch.tensor([tokenizer("<|assistant|>" + CORRECT + "<eos>", add_special_tokens=False)["input_ids"]])
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
    for _ in range(60):
        prefix = torch.randint(4, policy.config.vocab_size, (16, 5))
        batch = torch.cat([prefix, ids.expand(16, -1)], dim=1)
        labels = batch.clone()
        labels[:, :6] = -100
        policy(batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    policy.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def problems(tmp_path):
    """Two problems with the answer that `trained` knows, one with another, one that math-verify cannot read."""
    rows = [("a?", "so #### 72"), ("bb?", "#### 72"), ("ccc?", "#### 987654"), ("d?", "")]
    path = tmp_path / "problems.jsonl"
    path.write_text("\n".join(json.dumps({"question": q, "answer": a}) for q, a in rows))
    return path


FAST = ["--samples", "4", "--k", "1", "4", "--max_new_tokens", "12", "--batch_size", "2", "--temperature", "0.3"]


def test_two_checkpoints_are_evaluated_and_compared(script, trained, language_model, problems, tmp_path, capsys):
    output = tmp_path / "new" / "report.json"
    arguments = [str(language_model), str(trained), "--datasets", str(problems), *FAST, "--output", str(output)]
    script.main(arguments)
    report = json.loads(output.read_text())
    untrained, right = report["results"]
    assert right["correct"] == [4, 4, 0] and untrained["correct"] == [0, 0, 0]
    assert (right["problems"], right["unreadable"]) == (3, 1)
    assert right["truncated"] == 0 and untrained["truncated"] > 0.5
    assert right["metrics"]["avg@4"]["mean"] == pytest.approx(2 / 3) == right["metrics"]["pass@4"]["mean"]
    (difference,) = report["differences"]
    assert difference["model"] == str(trained) and difference["metrics"]["pass@4"]["mean"] == pytest.approx(2 / 3)
    printed = capsys.readouterr().out
    score = "66.7 [0.0, 100.0]"
    assert f"{trained} {score} {score} {score} 3 0%" in " ".join(printed.split())
    assert "+66.7 [+0.0, +100.0]" in printed and f"{trained} - {language_model}" in printed
    assert "math-verify cannot read their solution" in printed and "95 % bootstrap" in printed
    assert "completions" not in right and report["settings"]["samples"] == 4


def test_completions_are_saved_on_request(script, trained, problems, tmp_path):
    output = tmp_path / "report.json"
    script.main([str(trained), "--datasets", str(problems), *FAST, "--output", str(output), "--save_completions"])
    (result,) = json.loads(output.read_text())["results"]
    assert result["completions"] == [[CORRECT] * 4] * 3


def test_with_a_seed_the_evaluation_is_deterministic_and_with_another_it_is_not(script, language_model, problems):
    def completions(model, seed):
        arguments = [str(model), "--datasets", str(problems), *FAST[:-1], "1.0", "--seed", seed, "--save_completions"]
        return script.main(arguments)["results"][0]["completions"]

    first = completions(language_model, "0")
    assert completions(language_model, "0") == first
    assert completions(language_model, "1") != first
    assert len({text for samples in first for text in samples}) > 4


def test_sampling_settings_that_come_with_the_model_are_not_used(script, language_model, problems, tmp_path):
    def completions(model):
        arguments = [str(model), "--datasets", str(problems), *FAST[:-1], "1.0", "--save_completions"]
        return script.main(arguments)["results"][0]["completions"]

    policy = AutoModelForCausalLM.from_pretrained(language_model)
    policy.generation_config.update(min_p=0.9, suppress_tokens=[5, 6, 7], typical_p=0.2, do_sample=True, top_k=3)
    policy.generation_config.update(repetition_penalty=2.0, min_new_tokens=3)
    policy.save_pretrained(tmp_path / "with_settings")
    AutoTokenizer.from_pretrained(language_model).save_pretrained(tmp_path / "with_settings")
    assert completions(tmp_path / "with_settings") == completions(language_model)


def test_a_score_depends_on_no_other_model_or_dataset_of_the_call(script, trained, language_model, problems, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text('{"question": "?", "answer": "72"}')
    settings = [*FAST[:-1], "1.5", "--save_completions"]
    (alone,) = script.main([str(trained), "--datasets", str(problems), *settings])["results"]
    report = script.main([str(language_model), str(trained), "--datasets", str(other), str(problems), *settings])
    rows = [(row["dataset"], row["model"]) for row in report["results"]]
    assert rows == [(str(d), str(m)) for d in (other, problems) for m in (language_model, trained)]
    assert report["results"][3]["completions"] == alone["completions"]
    assert [(row["dataset"], row["model"]) for row in report["differences"]] == [rows[1], rows[3]]


def test_a_policy_is_evaluated_as_an_engine_of_a_number_format_serves_it(script, language_model, problems, tmp_path):
    from trl_alp.formats import put_in_format

    arguments = ["--datasets", str(problems), *FAST[:-1], "1.0", "--save_completions"]
    report = script.main([str(language_model), *arguments, "--served_in", "exact", "int3"])
    exact, served = report["results"]
    assert (exact["model"], served["model"]) == (str(language_model), f"{language_model} in int3")
    assert exact["completions"] == script.main([str(language_model), *arguments])["results"][0]["completions"]
    rounded = put_in_format(AutoModelForCausalLM.from_pretrained(language_model), "int3")
    rounded.save_pretrained(tmp_path / "rounded")
    AutoTokenizer.from_pretrained(language_model).save_pretrained(tmp_path / "rounded")
    expected = script.main([str(tmp_path / "rounded"), *arguments])["results"][0]["completions"]
    assert served["completions"] == expected != exact["completions"]
    (difference,) = report["differences"]
    assert (difference["model"], difference["minus"]) == (served["model"], exact["model"])


def test_the_k_of_pass_at_k_follow_the_samples_unless_they_are_given(script, language_model, problems):
    settings = ["--datasets", str(problems), "--max_new_tokens", "2", "--samples", "2"]
    (result,) = script.main([str(language_model), *settings])["results"]
    assert list(result["metrics"]) == ["avg@2", "pass@1"]


@pytest.mark.parametrize("wrong", ["a second model", "a second dataset", "an output"])
def test_everything_is_checked_before_anything_runs(
    wrong, script, language_model, problems, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(script, "evaluate", None)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    models, datasets, output = [str(language_model)], [str(problems)], str(tmp_path / "report.json")
    if wrong == "a second model":
        models.append(str(tmp_path / "empty"))
    elif wrong == "a second dataset":
        datasets.append(str(tmp_path / "nothing.jsonl"))
    else:
        output = str(tmp_path / "file" / "report.json")
    with pytest.raises(SystemExit):
        script.main([*models, "--datasets", *datasets, *FAST, "--output", output])
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert {"a second model": "empty holds neither", "a second dataset": "nothing.jsonl' is not there"}.get(
        wrong, "file"
    ) in said


def test_what_is_evaluated_is_kept_where_a_later_model_fails(script, language_model, problems, tmp_path, monkeypatch):
    evaluate = script.evaluate

    def fails_at_the_second(*arguments):
        if arguments[-1] == "int4":
            raise RuntimeError("out of memory")
        return evaluate(*arguments)

    monkeypatch.setattr(script, "evaluate", fails_at_the_second)
    output = tmp_path / "report.json"
    arguments = [str(language_model), "--datasets", str(problems), *FAST, "--output", str(output)]
    with pytest.raises(RuntimeError):
        script.main([*arguments, "--served_in", "exact", "int4"])
    (result,) = json.loads(output.read_text())["results"]
    assert result["model"] == str(language_model) and result["problems"] == 3


def test_vllm_serves_with_the_number_formats_that_are_asked_for(script, language_model, problems, monkeypatch):
    asked = {}

    class Sampled:
        outputs = [type("Sample", (), {"text": "72", "finish_reason": "stop"})] * 4

    class LLM:
        def __init__(self, model, **settings):
            asked.update(settings)

        def generate(self, prompts, sampling, lora_request):
            return [Sampled] * len(prompts)

    names = {"vllm": {"LLM": LLM, "SamplingParams": dict}, "vllm.lora": {}, "vllm.lora.request": {"LoRARequest": None}}
    for name, members in names.items():
        module = types.ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: True)
    settings = ["--dtype", "bfloat16", "--quantization", "fp8", "--kv_cache_dtype", "fp8_e4m3"]
    script.main([str(language_model), "--datasets", str(problems), *FAST, "--backend", "vllm", *settings])
    assert (asked["dtype"], asked["quantization"], asked["kv_cache_dtype"]) == ("bfloat16", "fp8", "fp8_e4m3")
    monkeypatch.setattr(script, "evaluate", None)
    with pytest.raises(SystemExit):
        script.main([str(language_model), *FAST, "--backend", "vllm", "--served_in", "int4"])


def test_a_lora_adapter_is_evaluated_on_its_base_model(script, trained, problems, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(trained)
    adapter = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"]))
    adapter.save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(trained).save_pretrained(tmp_path / "adapter")
    assert script.base_of(str(tmp_path / "adapter")) == str(trained) and script.base_of(str(trained)) == str(trained)
    (result,) = script.main([str(tmp_path / "adapter"), "--datasets", str(problems), *FAST])["results"]
    assert result["correct"] == [4, 4, 0]


def test_a_model_without_chat_template_is_asked_in_plain_text(script, language_model, problems, tmp_path, monkeypatch):
    shutil.copytree(language_model, tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink()
    asked = []
    monkeypatch.setattr(
        script,
        "transformers_generator",
        lambda model, tokenizer, *settings: (
            lambda prompts: asked.extend(map(tokenizer.decode, prompts)) or [[(CORRECT, True)] * 4 for _ in prompts]
        ),
    )
    for model in (tmp_path / "base", language_model):
        script.main([str(model), "--datasets", str(problems), *FAST])
    plain, chat = asked[0], asked[3]
    assert plain.startswith("a?") and plain.endswith("\\boxed{}.\n")
    assert chat.startswith("<|user|>a?") and chat.endswith("<|assistant|>")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--temperature", "0"], "--temperature 0 would draw --samples 8 equal ones"),
        (["--samples", "4", "--k", "8"], "--k [8] must be between 1 and --samples 4"),
        (["--backend", "vllm"], "--backend vllm needs vLLM"),
        (["--limit", "0"], "--limit 0 must be at least 1"),
        (["--samples", "0"], "--samples 0 must be at least 1"),
        (["--temperature", "-1"], "--temperature -1 must be 0 (greedy) or above"),
        (["--top_p", "0"], "--top_p 0 must be above 0"),
        (["--quantization", "fp8"], "--quantization and --kv_cache_dtype are vLLM's"),
        (["--kv_cache_dtype", "fp8"], "use --backend vllm, or --served_in"),
        (["--served_in", "int5"], "invalid choice: 'int5'"),
    ],
)
def test_settings_that_cannot_be_meant_are_errors_before_a_model_is_loaded(script, options, said, capsys, monkeypatch):
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: None)  # nor is vLLM here
    with pytest.raises(SystemExit):
        script.main(["nowhere", *options])
    assert said in capsys.readouterr().err


def test_greedy_decoding_draws_nothing(script, language_model, problems):
    arguments = [str(language_model), "--datasets", str(problems), "--temperature", "0", "--samples", "1", "--k", "1"]
    arguments += ["--max_new_tokens", "12", "--save_completions", "--seed"]
    first, other = (script.main([*arguments, seed])["results"][0]["completions"] for seed in "01")
    assert first == other


def test_the_script_evaluates_gsm8k_from_a_file_and_shows_a_progress_bar(tmp_path, language_model):
    arguments = [language_model, "--datasets", GSM8K, "--limit", 3, "--samples", 2, "--k", 1, "--max_new_tokens", 4]
    printed = run("evaluate.py", *arguments, "--output", tmp_path / "report.json", cwd=tmp_path)
    assert "avg@2" in printed and "pass@1" in printed
    assert json.loads((tmp_path / "report.json").read_text())["results"][0]["problems"] == 3


def test_the_named_datasets_come_from_the_hub(script, monkeypatch, language_model):
    asked = []

    def load_problems(*arguments):
        asked.append(arguments)
        raise FileNotFoundError

    monkeypatch.setattr(script, "load_problems", load_problems)
    for name in ("gsm8k", "math500", "aime24", "aime25", "some/dataset"):
        with pytest.raises(SystemExit):
            script.main([str(language_model), "--datasets", name])
    assert [(hub, config, split) for hub, config, split, *_ in asked] == [
        ("openai/gsm8k", "main", "test"),
        ("HuggingFaceH4/MATH-500", None, "test"),
        ("HuggingFaceH4/aime_2024", None, "train"),
        ("math-ai/aime25", None, "test"),
        ("some/dataset", None, "test"),
    ]
