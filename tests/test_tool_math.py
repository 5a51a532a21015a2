"""`examples/tool_math.py`: trained at tiny size with every kind of trajectory, its reward, and its configuration."""

import functools
import json
import logging
import os
import subprocess
import sys

import pytest
import tiny
import torch
from test_examples import GSM8K, ROOT, load
from trl import ModelConfig

from trl_alp import ALPGRPOConfig, ALPGRPOTrainer
from trl_alp.ratio import turns_from_mask


@pytest.fixture(autouse=True)
def _no_filter_is_left():
    """The script silences a warning of TRL's, for its own process."""
    logger = logging.getLogger("trl.trainer.grpo_trainer")
    before = list(logger.filters)
    yield
    logger.filters = before


CONFIG = ROOT / "examples" / "configs" / "tool_math.yaml"
TINY = {
    "dataset_name": GSM8K, "max_train_samples": 4, "per_device_train_batch_size": 8, "num_generations": 4,
    "gradient_accumulation_steps": 1, "steps_per_generation": 1, "max_completion_length": 1500, "max_steps": 1,
    "use_vllm": "false", "use_cpu": "true", "bf16": "false", "report_to": "none", "save_strategy": "no",
    "gradient_checkpointing": "false",
}  # fmt: skip


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    script = load("tool_math.py")
    try:
        script.run_python("1")
    except RuntimeError as error:
        pytest.skip(str(error))
    return script


def arguments(**overrides):
    return [str(x) for name, value in ({"config": CONFIG} | overrides).items() for x in (f"--{name}", value)]


def parse(script, **overrides):
    kinds = (script.ScriptArguments, ALPGRPOConfig, ModelConfig)
    return script.parse_options(kinds, script.__doc__, arguments(**overrides))


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory):
    path = tmp_path_factory.mktemp("chat_model")
    for part in tiny.chat_model():
        part.save_pretrained(path)
    return path


def call(code):
    arguments = code.replace("\n", "\\n").replace('"', '\\"')
    return f'<tool_call>\n{{"name": "python", "arguments": {{"code": "{arguments}"}}}}\n</tool_call><|im_end|>'


def scripted(first, later):
    """A trainer whose model says `first`, one for each completion of a group, and then `later`, by completion."""

    class Scripted(ALPGRPOTrainer):
        made = None

        def _generate_single_turn(self, prompt_ids, *args, **kwargs):
            Scripted.made = self
            if len(prompt_ids) == self.args.per_device_train_batch_size:
                self.turn, self.active = 0, list(range(len(prompt_ids)))
                said = [first[i % len(first)] for i in self.active]
            else:
                self.turn += 1
                self.active = [i for i in self.active if i % len(first) in later[self.turn - 1]]
                said = [later[self.turn - 1][i % len(first)] for i in self.active]
            assert len(said) == len(prompt_ids)
            return [self.processing_class(text)["input_ids"] for text in said], None

        def _generate_and_score_completions(self, inputs):
            self.scored = super()._generate_and_score_completions(inputs)
            self.conversations = list(self._logs["completion"])
            return self.scored

    return Scripted


@pytest.mark.parametrize("level", ["sequence", "cumulative_turn"])
def test_every_kind_of_trajectory_trains_or_is_left_out(script, monkeypatch, tmp_path, chat_model, level, caplog):
    # Of each group of four: computes, then answers; is stopped by the sandbox, then answers; a void turn; and
    # answers wrongly at once.
    first = [call("6 * 7"), call("import os\nos.fork()"), "I do not know.<|im_end|>", "\\boxed{-1}<|im_end|>"]
    later = [
        {0: call("import time\ntime.sleep(60)"), 1: "So \\boxed{72}<|im_end|>"},
        {0: "\\boxed{72}<|im_end|>"},
    ]
    trainer_class = scripted(first, later)
    monkeypatch.setattr(script, "ALPGRPOTrainer", trainer_class)
    monkeypatch.setattr(script, "run_python", functools.partial(script.run_python, wall_seconds=0.5))
    monkeypatch.setattr(script, "math_reward", lambda answers, solution: [float("72" in answer) for answer in answers])
    out = tmp_path / "out"
    overrides = {"model_name_or_path": chat_model, "output_dir": out, "logging_steps": 1, "alp_ratio_level": level}
    script.main(*parse(script, **TINY | overrides))
    trainer = trainer_class.made

    computes, stopped, void, wrong = trainer.conversations[:4]
    assert [m["role"] for m in computes] == ["assistant", "tool", "assistant", "tool", "assistant"]
    assert computes[1] == {"role": "tool", "name": "python", "content": "42"}
    assert computes[3]["content"] == "Error: stopped after 0.5 seconds."
    assert "PermissionError" in stopped[1]["content"] and len(stopped) == 3
    assert len(void) == len(wrong) == 1

    # The void trajectory is outside the group's mean and deviation too: rewards are 1, 1, none, 0.
    rewards = torch.tensor([1.0, 1.0, 0.0])
    expected = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    by_text = dict.fromkeys(("42", "PermissionError", "do not know", "-1"))
    decoded = trainer.processing_class.batch_decode(trainer.scored["completion_ids"])
    for text, advantage in zip(decoded, trainer.scored["advantages"].tolist(), strict=True):
        for key in by_text:
            by_text[key] = advantage if key in text else by_text[key]
    assert by_text["do not know"] == 0
    assert [by_text[k] for k in ("42", "PermissionError", "-1")] == pytest.approx(expected.tolist(), abs=1e-4)

    # What the tool wrote is outside the loss, and the turns are apart.
    mask = trainer.scored["completion_mask"] * trainer.scored["tool_mask"]
    for ids, row in zip(trainer.scored["completion_ids"], mask, strict=True):
        trained = trainer.processing_class.decode(ids[row.bool()])
        assert "<tool_response>" not in trained and "stopped after" not in trained
    assert sorted((turns_from_mask(mask).max(-1).values + 1).tolist()) == [1, 1, 1, 1, 2, 2, 3, 3]
    row = trainer.state.log_history[0]
    assert row["tools/void_turns"] == 0.25 and row["tools/answered"] == 0.75
    assert row["alp/unscored_rewards"] == 2 and row["tools/call_frequency"] == 0.75
    assert row["alp/log_ratio/max"] > row["alp/log_ratio/min"]
    assert (out / "model.safetensors").is_file()
    assert "All reward functions returned None" not in caplog.text


@pytest.mark.slow
def test_it_runs_under_accelerate_launch_on_gsm8k_with_a_model_that_calls_the_tool(script, tmp_path):
    model, tokenizer = taught_to_call(script)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    overrides = TINY | {
        "model_name_or_path": tmp_path / "model", "output_dir": tmp_path / "out", "max_steps": 2, "logging_steps": 1,
        "temperature": 0.5, "max_completion_length": 300,
    }  # fmt: skip
    done = subprocess.run(
        [*launcher, str(ROOT / "examples" / "tool_math.py"), *arguments(**overrides)],
        cwd=tmp_path, capture_output=True, text=True, timeout=280, env=os.environ | {"CI": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    log = [json.loads(line) for line in (tmp_path / "out" / "alp" / "metrics.jsonl").read_text().splitlines()]
    for name, least in (("tools/call_frequency", 0.5), ("tools/answered", 0.5)):
        values = [row[name] for row in log if name in row]
        assert len(values) == 2 and min(values) >= least, (name, values)
    assert "All reward functions returned None" not in done.stdout + done.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()


def taught_to_call(script):
    """A tiny model that calls the tool on whatever it is asked, and answers with whatever the tool printed."""
    model, tokenizer = tiny.chat_model(initializer_range=0.05, hidden_size=64, num_hidden_layers=2)
    rows = script.load_problems(str(GSM8K), None, "train", 8, chat=True)
    examples = []
    for row in rows:
        asked = tokenizer.apply_chat_template(
            [script.SYSTEM, *row["prompt"]], tools=[script.python], add_generation_prompt=True, tokenize=False
        )
        response = "<|im_start|>user\n<tool_response>\n42\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
        turns = [(asked, 0), (call("6 * 7"), 1), ("\n" + response, 0), ("\\boxed{42}<|im_end|>", 1)]
        ids, labels = [], []
        for text, said in turns:
            tokens = tokenizer(text)["input_ids"]
            ids += tokens
            labels += tokens if said else [-100] * len(tokens)
        examples.append((torch.tensor([ids]), torch.tensor([labels])))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(400):
        ids, labels = examples[step % len(examples)]
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss < 0.01:
            break
    return model, tokenizer


def test_nothing_is_loaded_without_a_sandbox(script, monkeypatch):
    def unavailable(code):
        raise RuntimeError("no isolation that holds")

    monkeypatch.setattr(script, "run_python", unavailable)
    with pytest.raises(RuntimeError, match="no isolation that holds"):
        script.main(None, None, None)


ANSWER = {"role": "assistant", "content": "So \\boxed{72}."}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "python"}}]}
TOOL = {"role": "tool", "name": "python", "content": "\\boxed{72}"}


@pytest.mark.parametrize(
    ("turns", "reward"),
    [
        ([ANSWER], 1.0),
        ([CALL, TOOL, ANSWER], 1.0),
        ([CALL, TOOL, {"role": "assistant", "content": "\\boxed{71}"}], 0.0),
        ([{"role": "assistant", "content": "Hm, 72."}], None),
        ([CALL, TOOL, {"role": "assistant", "content": ""}], None),
        ([CALL, TOOL, {"role": "assistant", "content": None}], None),
        # The turns or the tokens were used up: no void turn, and no answer either, whatever the tool printed.
        ([CALL, TOOL, CALL], 0.0),
        ([CALL, TOOL], 0.0),
        ([CALL], 0.0),
        ([{**CALL, "content": "It is 72."}], 0.0),
        ([{"role": "assistant", "content": "<tool_call>{not json"}], None),
    ],
)
def test_the_reward_is_of_the_final_answer_and_none_for_void_turns(script, turns, reward):
    logged = {}
    assert script.tool_math_reward([turns], ["72"], log_metric=logged.__setitem__) == [reward]
    assert logged == {"tools/void_turns": float(reward is None), "tools/answered": float(script.has_answer(turns[-1]))}
    assert script.tool_math_reward([turns], ["72"]) == [reward]


def test_the_configuration_is_the_papers_multi_turn_setting_but_for_the_noise(script):
    _, training_args, model_args = parse(script, use_cpu="true", bf16="false", use_vllm="false")
    paper = {
        "alp_ratio_level": "sequence", "alp_noise_scale": "rms", "alp_sigma_init": 1e-3, "alp_sigma_lr": 5e-4,
        "epsilon": 0.5, "epsilon_high": 3.0, "alp_dual_clip": 3.0, "beta": 0.0, "learning_rate": 1e-6,
        "lr_scheduler_type": "constant", "max_grad_norm": 1.0, "num_generations": 16, "loss_type": "dapo",
        "temperature": 1.0, "max_completion_length": 8000, "max_tool_calling_iterations": 4,
    }  # fmt: skip
    assert {name: getattr(training_args, name) for name in paper} == paper
    assert model_args.dtype == "float32" and training_args.mask_truncated_completions is False
    per_update = 8 * training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps
    per_rollout = 8 * training_args.per_device_train_batch_size * training_args.steps_per_generation
    assert (per_update // 16, per_rollout // 16) == (32, 128)


def test_the_tools_description_is_what_the_template_renders(script):
    _, tokenizer = tiny.chat_model()
    text = tokenizer.apply_chat_template([script.SYSTEM], tools=[script.python], tokenize=False)
    assert '"name": "python"' in text and "The program." in text and script.SYSTEM["content"] in text
