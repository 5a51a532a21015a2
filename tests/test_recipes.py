"""The recipes of `examples/`: read, counted, and run at tiny size with a stand-in for vLLM."""

import dataclasses
import importlib.util
import json
import logging
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys

import pytest
import tiny
import torch
import transformers
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env
from test_examples import GSM8K, ROOT, load
from trl import GRPOTrainer

from trl_alp import ALPGRPOConfig, ALPGRPOTrainer, LayerwisePerturbation, instrument


EXAMPLES = ROOT / "examples"
LAUNCHERS = sorted((EXAMPLES / "accelerate_configs").glob("*.yaml"))
SET = EXAMPLES / "configs" / "single_turn"
ALL = sorted((EXAMPLES / "configs").rglob("*.yaml"))
RECIPES = [path for path in ALL if "train_alp.py" in path.read_text()]  # tool_math.yaml trains in test_tool_math.py
ARMS = {path.stem: path for path in SET.glob("*.yaml")}
BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None  # in `make test-backends`; it has a CPU path
# What makes a recipe run anywhere; the number of updates per batch of rollouts stays the recipe's own.
TINY = {
    "dataset_name": GSM8K,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "num_generations": 2,
    "max_completion_length": 8,
    "max_steps": 3,
    "save_strategy": "no",
    "use_cpu": "true",
    "bf16": "false",
    "fp16": "false",
    "disable_tqdm": "true",
}


def name(path):
    return str(path.relative_to(EXAMPLES / "configs")).removesuffix(".yaml")


def head(path, field):
    """What the head comment says of `field`."""
    return re.search(rf"^# {field}: (.*)", path.read_text(), re.MULTILINE).group(1)


def parse(path, **overrides):
    arguments = [str(x) for key, value in overrides.items() for x in (f"--{key}", value)]
    return load("train_alp.py").parse_arguments(["--config", str(path), *arguments])


def parse_on_cpu(path, **overrides):
    return parse(path, use_cpu="true", bf16="false", fp16="false", **overrides)


def updates_per_rollout(settings):
    return settings["steps_per_generation"] // settings["gradient_accumulation_steps"]


class Engine:
    """Stands in for vLLM: samples from the policy and reports log-probs that are off by noise, some of them NaN."""

    def __init__(self, model, accelerator, processing_class, **settings):
        self.model, self.tokenizer, self.settings, self.syncs = model, processing_class, settings, 0

    def sync_weights(self):
        self.syncs += 1

    @torch.no_grad()
    def generate(self, prompts, images, num_generations, profiler=None):
        tokens = self.tokenizer.pad({"input_ids": prompts}, return_tensors="pt", padding_side="left")
        width, training = tokens["input_ids"].shape[1], self.model.training
        self.model.eval()
        length = self.settings["max_completion_length"]
        out = self.model.generate(**tokens, max_new_tokens=length, do_sample=True, top_k=0)
        mask = torch.cat([tokens["attention_mask"], torch.ones_like(out[:, width:])], dim=1)
        logits = self.model(out, attention_mask=mask).logits[:, width - 1 : -1].float().log_softmax(-1)
        self.model.train(training)
        scores = logits.gather(-1, out[:, width:, None])
        scores = scores + 0.005 * torch.randn(scores.shape)
        scores[:, 0] = torch.nan
        return prompts, out[:, width:].tolist(), scores.tolist(), None


@pytest.fixture
def engine(monkeypatch):
    from trl.trainer import grpo_trainer

    engines = []
    monkeypatch.setattr(
        grpo_trainer, "VLLMGeneration", lambda **kwargs: engines.append(Engine(**kwargs)) or engines[-1]
    )
    return engines


def train(recipe, monkeypatch, language_model, output_dir, **overrides):
    """Run a recipe at tiny size as `train_alp.py` does; the trainer."""
    settings = yaml.safe_load(recipe.read_text())
    script = load("train_alp.py")

    def math_reward(completions, **kwargs):  # the real one is 0 for whatever a tiny model says
        return [float(index) for index in range(len(completions))]

    trainers = []
    monkeypatch.setattr(script, "math_reward", math_reward)
    monkeypatch.setattr(script, "instrument", lambda trainer: trainers.append(instrument(trainer)))
    overrides = TINY | {
        "model_name_or_path": language_model,
        "output_dir": output_dir,
        "steps_per_generation": updates_per_rollout(settings),
        "load_in_4bit": settings.get("load_in_4bit", False) and BITSANDBYTES,
    } | overrides  # fmt: skip
    script.main(*parse(recipe, **overrides))
    return trainers[0]


@pytest.mark.parametrize("recipe", RECIPES, ids=name)
def test_recipe_trains_at_tiny_size_with_its_own_method(recipe, monkeypatch, tmp_path, language_model, engine, caplog):
    settings = yaml.safe_load(recipe.read_text())
    trainer = train(recipe, monkeypatch, language_model, tmp_path)
    log = trainer.state.log_history[0]
    assert trainer.state.global_step == 3 and log["grad_norm"] > 0
    assert len(engine) == bool(settings.get("use_vllm"))
    # The engine's log-probs are the denominator: those it left out are counted.
    assert log["alp/unscored_tokens"] == (2 if engine else 0)
    if engine:
        asked = engine[0].settings
        assert engine[0].syncs > 0 and asked["enable_sleep_mode"] and asked["mode"] == "colocate"
    alp = settings.get("trainer", "alp") == "alp"
    assert type(trainer) is (ALPGRPOTrainer if alp else GRPOTrainer)
    assert ("alp/sigma/mean" in log) == (alp and settings.get("alp_enabled", True))
    corrected = settings.get("vllm_importance_sampling_correction", False)
    assert ("sampling/importance_sampling_ratio/max" in log) == corrected
    # The third update is on rollouts two updates old, unless they are used up by then.
    updates = updates_per_rollout(settings) * settings.get("num_iterations", 1)
    assert trainer.state.log_history[2]["alp/staleness"] == 2 % updates
    if settings.get("load_in_4bit") and BITSANDBYTES:
        assert trainer.model.is_loaded_in_4bit
    weights = tmp_path / ("adapter_model" if settings.get("use_peft") else "model")
    assert weights.with_suffix(".safetensors").is_file()
    # No dropout, no truncated sampling, no noise lost in rounding.
    warnings = [
        r.getMessage() for r in caplog.records if r.name.startswith("trl_alp") and r.levelno >= logging.WARNING
    ]
    # Three updates are too few tokens to fit sigma to, and a run that never fitted it says so.
    assert [w for w in warnings if "never fitted" not in w] == []
    fitted = alp and bool(engine) and settings.get("alp_noise_target", 1.0) is not None
    assert len(warnings) == fitted


def test_tis_truncates_and_mis_masks_the_engines_ratio_above_five(monkeypatch, tmp_path, language_model, engine):
    ratios = {}
    generate = Engine.generate

    def far_off(self, *args, **kwargs):
        prompts, completions, scores, _ = generate(self, *args, **kwargs)
        return prompts, completions, [[[-20.0] for _ in row] for row in scores[:1]] + scores[1:], None

    monkeypatch.setattr(Engine, "generate", far_off)  # one completion that the engine thought all but impossible
    for arm in ("tis", "mis"):
        trainer = train(ARMS[arm], monkeypatch, language_model, tmp_path / arm, max_steps=1)
        ratios[arm] = trainer.state.log_history[0]
    assert ratios["tis"]["sampling/importance_sampling_ratio/max"] == 5.0
    assert ratios["mis"]["sampling/importance_sampling_ratio/min"] == 0.0


def test_a_recipe_for_a_dataset_of_the_hub_trains_on_a_local_folder_or_a_clone_of_it(tmp_path):
    script, row = load("train_alp.py"), GSM8K.read_text().splitlines()[0]
    for folder, card in (("files", None), ("clone", "configs: [{config_name: main, data_files: train.jsonl}]")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "train.jsonl").write_text(row)
        if card:
            (tmp_path / folder / "README.md").write_text(f"---\n{card}\n---\n")
        problems = script.load_problems(str(tmp_path / folder), "main", "train", None, chat=True)
        assert problems["solution"][:] == ["72"]
        with pytest.raises(ValueError, match='Unknown split "test"'):
            script.load_problems(str(tmp_path / folder), "main", "test", None, chat=True)


# ---- The set of the paper's single-turn setting ----

NOISE = {"alp_enabled"}
STOCK = {"epsilon", "epsilon_high", "delta", "trainer"}
SEQUENCE = {"alp_ratio_level"}  # of ALP; a stock trainer has no such field
CORRECTION = {
    "vllm_importance_sampling_correction",
    "vllm_importance_sampling_mode",
    "vllm_importance_sampling_clip_max",
}
DIFFERENCES = {
    ("alp_sequence", "alp_token"): SEQUENCE,
    ("alp_sequence", "bypass_sequence"): NOISE,
    ("alp_token", "bypass_token"): NOISE,
    ("bypass_sequence", "bypass_token"): SEQUENCE,
    ("alp_sequence", "grpo"): STOCK,
    ("grpo", "gspo"): {"importance_sampling_level", "epsilon", "epsilon_high", "loss_type"},
    ("grpo", "tis"): CORRECTION,
    ("grpo", "mis"): {
        "vllm_importance_sampling_correction",
        "vllm_importance_sampling_clip_max",
    },  # TRL's default mode
    ("tis", "mis"): {"vllm_importance_sampling_mode"},
}


def fields(path):
    """All settings of a recipe with the defaults of its classes, but for `alp_*` if its trainer is the stock one."""
    script, training, model = parse_on_cpu(path)
    values = {}
    for arguments in (script, training, model):
        values |= {field.name: getattr(arguments, field.name) for field in dataclasses.fields(arguments)}
    values["trainer"] = type(training)
    assert values.pop("output_dir") == f"runs/single_turn/{path.stem}"
    return {key: value for key, value in values.items() if key not in ("logging_dir", "run_name", "distributed_state")}


@pytest.mark.parametrize(("one", "other"), DIFFERENCES, ids=["-".join(pair) for pair in DIFFERENCES])
def test_two_arms_of_the_set_differ_in_exactly_the_method(one, other):
    one_fields, other_fields = fields(ARMS[one]), fields(ARMS[other])
    shared = one_fields.keys() & other_fields.keys()
    assert all(key.startswith("alp_") for key in one_fields.keys() ^ other_fields.keys())
    assert {key for key in shared if one_fields[key] != other_fields[key]} == DIFFERENCES[one, other]


def test_the_set_is_complete_and_its_arms_are_the_methods_they_are_named_for():
    assert set(ARMS) == {arm for pair in DIFFERENCES for arm in pair}
    arms = {arm: parse_on_cpu(path)[1] for arm, path in ARMS.items()}
    assert {arm for arm, args in arms.items() if type(args) is ALPGRPOConfig} == {
        "alp_sequence", "alp_token", "bypass_sequence", "bypass_token",
    }  # fmt: skip
    paper = arms["alp_sequence"]
    assert (paper.alp_ratio_level, paper.alp_noise_scale, paper.alp_sigma_init) == ("sequence", "absolute", 0.02)
    assert (paper.alp_sigma_lr, paper.alp_dual_clip) == (1e-2, 10.0)
    assert (paper.epsilon, paper.epsilon_high, paper.beta, paper.learning_rate) == (0.5, 3.0, 1e-3, 1e-6)
    assert (paper.max_completion_length, paper.vllm_max_model_length) == (2048, 4096)
    gspo, tis, mis = arms["gspo"], arms["tis"], arms["mis"]
    assert (gspo.importance_sampling_level, gspo.epsilon, gspo.epsilon_high) == ("sequence", 3e-4, 4e-4)
    assert (tis.vllm_importance_sampling_mode, tis.vllm_importance_sampling_clip_max) == ("token_truncate", 5.0)
    assert (mis.vllm_importance_sampling_mode, mis.vllm_importance_sampling_clip_max) == ("sequence_mask", 5.0)
    assert not arms["grpo"].vllm_importance_sampling_correction and not gspo.vllm_importance_sampling_correction


def test_trainer_grpo_refuses_the_fields_of_alp(capsys):
    with pytest.raises(ValueError, match="alp_ratio_level"):
        parse_on_cpu(ARMS["grpo"], alp_ratio_level="token")
    assert type(parse_on_cpu(ARMS["alp_sequence"])[1]) is ALPGRPOConfig
    with pytest.raises(SystemExit):
        parse_on_cpu(ARMS["grpo"], trainer="ppo")
    assert "invalid choice: 'ppo'" in capsys.readouterr().err


# ---- Heads, launch lines and batches ----


@pytest.mark.parametrize("recipe", ALL, ids=name)
def test_head_names_gpus_hours_and_a_launch_line_that_fits(recipe):
    gpus = int(re.fullmatch(r"(\d+) x \d+ GB", head(recipe, "GPUs")).group(1))
    assert re.fullmatch(r"\d+ to \d+ on .+ \(an estimate, not measured\)", head(recipe, "Hours"))
    line = head(recipe, "Launch")
    assert line.startswith("accelerate launch ")
    arguments = launch_command_parser().parse_args(line.split()[2:])
    assert load_config_from_file(str(ROOT / arguments.config_file)).num_processes == gpus
    assert arguments.training_script == f"examples/{'train_alp' if recipe in RECIPES else 'tool_math'}.py"
    assert arguments.training_script_args == ["--config", str(recipe.relative_to(ROOT))]


@pytest.mark.parametrize("recipe", ALL, ids=name)
def test_batches_add_up_to_what_the_head_says(recipe, monkeypatch):
    pattern = r"(\d+) prompts x (\d+) completions per update, (\d+) updates per batch of rollouts"
    prompts, completions, updates = map(int, re.fullmatch(pattern, head(recipe, "Batch")).groups())
    gpus = int(head(recipe, "GPUs").split()[0])
    # TRL's own checks run at the size of the real thing.
    monkeypatch.setattr(transformers.TrainingArguments, "world_size", property(lambda self: gpus))
    _, args, _ = parse_on_cpu(recipe)
    assert args.num_generations == completions
    micro_batches = args.per_device_train_batch_size * gpus
    assert micro_batches * args.gradient_accumulation_steps == prompts * completions
    assert args.steps_per_generation % args.gradient_accumulation_steps == 0
    mini_batches = args.steps_per_generation // args.gradient_accumulation_steps
    assert mini_batches * args.num_iterations == updates
    assert args.generation_batch_size == mini_batches * prompts * completions
    assert args.max_steps % updates == 0
    comment = recipe.read_text()
    assert f"# {args.max_steps // updates} batches of rollouts" in comment
    if args.use_vllm:
        assert args.vllm_max_model_length > args.max_completion_length
    else:
        assert args.vllm_max_model_length is None


def test_a_batch_that_does_not_add_up_is_an_error_of_trl(monkeypatch):
    monkeypatch.setattr(transformers.TrainingArguments, "world_size", property(lambda self: 3))
    with pytest.raises(ValueError, match="must be divisible by num_generations"):
        parse_on_cpu(ARMS["grpo"], per_device_train_batch_size=1, steps_per_generation=1)


def test_the_alternative_for_four_gpus_is_the_same_batch(monkeypatch):
    text = ARMS["alp_sequence"].read_text()
    accumulation, steps = map(
        int, re.search(r"On 4 GPUs: gradient_accumulation_steps (\d+), steps_per_generation (\d+)", text).groups()
    )
    sizes = set()
    for gpus, overrides in (
        (8, {}),
        (4, {"gradient_accumulation_steps": accumulation, "steps_per_generation": steps}),
        (16, slurm_overrides()),
    ):
        monkeypatch.setattr(transformers.TrainingArguments, "world_size", property(lambda self, gpus=gpus: gpus))
        _, args, _ = parse_on_cpu(ARMS["alp_sequence"], **overrides)
        update = args.per_device_train_batch_size * gpus * args.gradient_accumulation_steps
        sizes.add((update, args.generation_batch_size))
    assert sizes == {(256, 4096)}


def test_the_table_of_recipes_says_what_the_heads_say():
    text = (EXAMPLES / "README.md").read_text()
    rows = re.findall(r"^\| \[`([\w/]+)`\]\(configs/(.*?)\.yaml\) \|.*\| (.*) \| (.*) \|$", text, re.MULTILINE)
    assert all(shown == file for shown, file, *_ in rows)
    listed = {shown: (gpus, hours) for shown, _, gpus, hours in rows}
    heads = {name(path): (head(path, "GPUs"), head(path, "Hours").split(" on ")[0]) for path in ALL}
    # The set of the single-turn setting has one row.
    assert listed == {key: heads[key] for key in heads if key == "single_turn/alp_sequence" or "/" not in key}


@pytest.mark.parametrize("recipe", ALL, ids=name)
def test_the_noise_of_a_recipe_survives_in_the_precision_of_its_launch_line(recipe):
    _, args, model_args = parse_on_cpu(recipe)
    if not getattr(args, "alp_enabled", False):
        pytest.skip("no noise")
    arguments = launch_command_parser().parse_args(head(recipe, "Launch").split()[2:])
    backend = str(launcher(ROOT / arguments.config_file).distributed_type).split(".")[-1]
    # FSDP2 and DeepSpeed cast the hidden states; under autocast they have the dtype of the weights.
    dtype = torch.bfloat16 if backend in ("FSDP", "DEEPSPEED") else getattr(torch, model_args.dtype)
    model = tiny.model(dtype=dtype)
    perturbation = LayerwisePerturbation(model, noise_scale=args.alp_noise_scale, sigma_init=args.alp_sigma_init)
    with torch.no_grad(), perturbation.applied(seed=0):
        model(torch.arange(40).reshape(2, 20))
    assert perturbation.effective_noise().min() > 0.7


# ---- fp16, as on a T4 ----


@pytest.fixture
def fp16(monkeypatch):
    """Give a trainer what accelerate gives it on a GPU under fp16, autocast and gradient scaler, on a CPU."""
    from accelerate.state import AcceleratorState

    def prepare(trainer, scale):
        monkeypatch.setattr(AcceleratorState, "mixed_precision", property(lambda self: "fp16"))
        trainer.accelerator.native_amp = True
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        return trainer

    return prepare


def train_in_fp16(tmp_path, prepare, scale=2.0**10, policy=None, **settings):
    settings = {"alp_sigma_lr": 0.05, "rollout_func": tiny.rollout_func(), "seed": 3} | settings
    trainer = tiny.trainer(tmp_path, policy=policy if policy is not None else tiny.model(), **settings)
    if prepare is not None:
        prepare(trainer, scale)
    trainer.train()
    return trainer


def test_under_fp16_autocast_the_hidden_states_are_fp32_and_the_smallest_noise_survives(tmp_path, fp16):
    trainer = train_in_fp16(tmp_path, fp16, alp_noise_scale="absolute", alp_sigma_init=1e-6)
    assert trainer.perturbation.hidden_dtype == torch.float32
    assert trainer.state.log_history[0]["alp/noise/effective/min"] > 0.9


def test_under_fp16_autocast_sigma_is_trained_as_in_fp32_whatever_the_loss_scale(tmp_path, fp16, monkeypatch):
    gradients = []
    for folder, prepare, scale in (("fp32", None, 1.0), ("small", fp16, 2.0**4), ("large", fp16, 2.0**14)):
        torch.manual_seed(0)
        # Sampled in fp16, the completions themselves may be others on another CPU.
        settings = {"rollout_func": tiny.fixed_rollouts, "max_steps": 1, "alp_log_layers": True}
        trainer = train_in_fp16(tmp_path / folder, prepare, scale, **settings)
        gradients.append([trainer.state.log_history[0][f"alp/sigma/grad/layer_{i:02d}"] for i in range(2)])
        assert (trainer.perturbation.sigma - 0.01).abs().min() > 1e-4
    fp32, small, large = map(torch.tensor, gradients)
    assert fp32.abs().min() > 1e-5
    rounding = 0.1 * fp32.abs().max().item()
    torch.testing.assert_close(small, fp32, rtol=0, atol=rounding)
    torch.testing.assert_close(large, fp32, rtol=0, atol=rounding)
    assert not torch.equal(small, fp32)  # it did run in fp16


def test_under_fp16_sigma_sits_out_the_step_that_overflows(tmp_path, fp16):
    trainer = train_in_fp16(tmp_path, fp16, scale=2.0**126, max_steps=1)
    assert trainer.accelerator.scaler.get_scale() < 2.0**126  # the scaler saw the overflow
    assert trainer.perturbation.sigma.tolist() == pytest.approx([0.01, 0.01], rel=1e-6)


def test_with_fp16_weights_small_noise_is_lost_and_the_scaler_refuses_to_train_them(tmp_path, fp16, caplog):
    from peft import LoraConfig

    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    policy = tiny.model(dtype=torch.float16)
    trainer = train_in_fp16(tmp_path, fp16, policy=policy, peft_config=adapter, alp_noise_scale="absolute",
                            alp_sigma_init=1e-6)  # fmt: skip
    assert trainer.state.log_history[0]["alp/noise/effective/min"] < 0.1
    assert "in float16, with sigma between 1e-06" in caplog.text
    relative = train_in_fp16(tmp_path, fp16, policy=tiny.model(dtype=torch.float16), peft_config=adapter)
    assert relative.state.log_history[0]["alp/noise/effective/min"] > 0.9  # 1 % of the RMS does survive
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
        train_in_fp16(tmp_path, fp16, policy=tiny.model(dtype=torch.float16))


# ---- Launchers ----


def launcher(path):
    return load_config_from_file(str(path))


def test_each_launcher_is_what_it_is_named_for():
    kinds = {path.stem: launcher(path) for path in LAUNCHERS}
    kind = {name: (str(config.distributed_type).split(".")[-1], config.num_machines) for name, config in kinds.items()}
    assert kind == {
        "single_gpu": ("NO", 1),
        "ddp": ("MULTI_GPU", 1),
        "fsdp2": ("FSDP", 1),
        "zero2": ("DEEPSPEED", 1),
        "zero3": ("DEEPSPEED", 1),
        "multi_node": ("MULTI_GPU", 2),
    }
    assert kinds["fsdp2"].fsdp_config["fsdp_version"] == 2
    assert [kinds[f"zero{stage}"].deepspeed_config["zero_stage"] for stage in (2, 3)] == [2, 3]
    assert kinds["multi_node"].num_processes == 16


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.stem)
def test_each_launcher_says_how_it_is_launched(path):
    (line,) = re.findall(r"^# (accelerate launch .*)", path.read_text(), re.MULTILINE)
    arguments = launch_command_parser().parse_args(line.split()[2:])
    assert arguments.config_file == str(path.relative_to(ROOT))
    assert [arguments.training_script, *arguments.training_script_args] == [
        "examples/train_alp.py", "--config", "RECIPE",
    ]  # fmt: skip


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(path, options, language_model, out, log):
    """`accelerate launch` with a launcher of ours on a CPU, at tiny size."""
    settings = TINY | {
        "model_name_or_path": language_model, "output_dir": out, "steps_per_generation": 2, "use_vllm": "false",
        "use_cpu": "false",  # it would leave FSDP and DeepSpeed out
    }  # fmt: skip
    script = [str(ROOT / "tests" / "train_alp_on_cpu.py"), "--config", str(ARMS["alp_token"])]
    script += [str(x) for key, value in settings.items() for x in (f"--{key}", value)]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(path), *options, *script]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu"}
    if path.stem in ("single_gpu", "ddp", "multi_node"):
        environment["ACCELERATE_USE_CPU"] = "true"
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)


@pytest.mark.slow
@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.stem)
def test_each_launcher_trains_under_its_backend_on_a_cpu(path, tmp_path, language_model):
    if path.stem.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed (`make test-backends` has it)")
    config, port = launcher(path), free_port()
    processes = min(config.num_processes, 2)
    options = ["--num_processes", str(processes), "--mixed_precision", "no"]
    if config.num_machines > 1:
        options += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
    logs, running = [tmp_path / f"log_{machine}" for machine in range(config.num_machines)], []
    for machine, log in enumerate(logs):
        with open(log, "w") as file:
            rank = ["--machine_rank", str(machine)] if config.num_machines > 1 else []
            running.append(start(path, [*options, *rank], language_model, tmp_path / "out", file))
    try:
        codes = [process.wait(240) for process in running]
    finally:
        for process in running:
            process.kill()
    printed = "".join(log.read_text() for log in logs)
    assert codes == [0] * len(codes), printed[-4000:]
    wrapper = {
        "single_gpu": "Qwen2ForCausalLM", "fsdp2": "FSDP2", "zero2": "DeepSpeedEngine2", "zero3": "DeepSpeedEngine3",
    }.get(path.stem, "DistributedDataParallel")  # fmt: skip
    assert printed.count(f"backend {wrapper} processes {processes}\n") == processes
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.slow
def test_fsdp2_in_bf16_rounds_the_log_probs(tmp_path, language_model):
    """A flaw of accelerate with TRL; if this fails, docs/distributed.md and fsdp2.yaml have a warning too many."""
    options = ["--num_processes", "2", "--mixed_precision", "bf16"]
    with open(tmp_path / "log", "w") as log:
        process = start(EXAMPLES / "accelerate_configs" / "fsdp2.yaml", options, language_model, tmp_path, log)
        try:
            assert process.wait(240) == 0, (tmp_path / "log").read_text()[-4000:]
        finally:
            process.kill()
    assert "they come in steps of 1/32 in bf16" in (tmp_path / "log").read_text()
    row = json.loads((tmp_path / "alp" / "metrics.jsonl").read_text().splitlines()[0])
    extremes = row["alp/log_ratio/min"], row["alp/log_ratio/max"]
    assert extremes[0] < 0 < extremes[1]
    assert all((32 * extreme).is_integer() for extreme in extremes)  # log-probs here are between -8 and -4


# ---- Slurm and the server ----


def slurm_examples():
    """Of the two `sbatch` lines of the script's head, the options of sbatch and the arguments of the script."""
    text = (EXAMPLES / "slurm.sh").read_text()
    comment = "\n".join(line[1:].strip() for line in text.split("set -euo")[0].splitlines()[1:])
    lines = re.findall(r"^sbatch (.*)$", comment.replace("\\\n", " "), re.MULTILINE)
    for line in lines:
        words = shlex.split(line)
        script = words.index("examples/slurm.sh")
        yield words[:script], words[script + 1 :]


def slurm_overrides():
    (_, (_, *colocate)), _ = slurm_examples()
    return dict(zip([word.removeprefix("--") for word in colocate[::2]], colocate[1::2], strict=True))


def run_slurm(tmp_path, nodes, arguments, **environment):
    """Run the script with stand-ins for Slurm's commands, vLLM and accelerate; what each node was told to run."""
    stubs = {
        "scontrol": "printf '%s\\n' $NODES",
        # One task for each node of the step, as `--ntasks-per-node=1` has it.
        "srun": """
            while [[ $1 == --* ]]; do case $1 in --nodelist=*) step=${1#*=};; esac; shift; done
            [[ $step == *,* ]] || SLURM_NODEID=0 NODE=$step exec "$@"
            id=0; for node in ${step//,/ }; do SLURM_NODEID=$id NODE=$node "$@"; id=$((id + 1)); done""",
        "vllm": """
            printf "%s\\t" "$NODE" "DEV=${VLLM_SERVER_DEV_MODE:-}" vllm "$@" >> $LOG; echo >> $LOG; exec sleep 600""",
        "accelerate": """
            for i in {1..50}; do [[ -n $WAIT && ! -s $LOG ]] || break; sleep 0.1; done
            printf "%s\\t" "$NODE" accelerate "$@" >> $LOG; echo >> $LOG""",
    }
    for command, body in stubs.items():
        (tmp_path / command).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / command).chmod(0o755)
    log = tmp_path / "log"
    done = subprocess.run(
        ["bash", "examples/slurm.sh", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60,
        env=os.environ | {
            "PATH": f"{tmp_path}:{os.environ['PATH']}", "NODES": " ".join(nodes), "SLURM_JOB_NODELIST": "n[1-9]",
            "SLURM_GPUS_ON_NODE": "8", "LOG": str(log), "WAIT": environment.get("VLLM_NODES", ""), **environment,
        },
    )  # fmt: skip
    lines = log.read_text().splitlines() if log.exists() else []
    return done, [line.rstrip("\t").split("\t") for line in lines]


def test_slurm_starts_one_launcher_on_each_node_with_the_ranks_and_numbers_of_the_job(tmp_path, monkeypatch):
    (_, arguments), _ = slurm_examples()
    done, lines = run_slurm(tmp_path, ["n1", "n2"], arguments)
    assert done.returncode == 0, done.stderr
    assert [node for node, *_ in lines] == ["n1", "n2"]
    for rank, (_, accelerate, *words) in enumerate(lines):
        assert (accelerate, words[0]) == ("accelerate", "launch")
        launched = launch_command_parser().parse_args(words[1:])
        assert (launched.machine_rank, launched.num_machines, launched.num_processes) == (rank, 2, 16)
        assert (launched.main_process_ip, launched.main_process_port) == ("n1", 29500)
        assert launched.training_script == "examples/train_alp.py"
        options = launched.training_script_args
        _, args, _ = load("train_alp.py").parse_arguments([*options, "--use_cpu", "true", "--bf16", "false"])
        assert (args.vllm_mode, args.gradient_accumulation_steps, args.steps_per_generation) == ("colocate", 4, 64)


@pytest.mark.parametrize(
    ("recipe", "script", "launcher"),
    [("tool_math", "tool_math.py", "zero3"), ("qwen3_4b_token", "train_alp.py", "zero3"),
     ("staleness", "train_alp.py", "multi_node")],
)  # fmt: skip
def test_slurm_runs_the_script_and_the_sharding_that_the_recipe_names(tmp_path, recipe, script, launcher):
    done, lines = run_slurm(tmp_path, ["n1", "n2"], [f"examples/configs/{recipe}.yaml"])
    assert done.returncode == 0, done.stderr
    for rank, (_, _, _, *words) in enumerate(lines):
        launched = launch_command_parser().parse_args(words)
        assert launched.training_script == f"examples/{script}"
        assert launched.config_file == f"examples/accelerate_configs/{launcher}.yaml"
        launched, *_ = _validate_launch_command(launched)
        assert (launched.machine_rank, launched.num_machines, launched.num_processes) == (rank, 2, 16)
        if launcher == "zero3":  # pdsh, accelerate's default, would start two runs that know nothing of each other
            launched.deepspeed_fields_from_accelerate_config = ""  # what `accelerate launch` fills in itself
            command, _ = prepare_deepspeed_cmd_env(launched)
            assert command is None  # torchrun, which accelerate starts within its process
            assert (launched.nnodes, launched.node_rank) == ("2", rank)


def test_slurm_serves_the_recipes_model_on_the_last_node_and_ends_the_server_with_the_training(tmp_path):
    _, (sbatch, arguments) = slurm_examples()
    assert sbatch == ["--nodes=2", "--export=ALL,VLLM_NODES=1"]
    done, lines = run_slurm(tmp_path, ["n1", "n2"], arguments, VLLM_NODES="1")  # back before the server's 600 seconds
    assert done.returncode == 0, done.stderr
    (where, mode, *server), (node, *launch) = lines
    assert (where, mode, node) == ("n2", "DEV=1", "n1")
    assert server[:4] == ["vllm", "serve", "Qwen/Qwen2.5-Math-1.5B", "--data-parallel-size"]
    launched = launch_command_parser().parse_args(launch[2:])
    assert (launched.num_machines, launched.num_processes, launched.main_process_ip) == (1, 8, "n1")
    options = [*launched.training_script_args, "--use_cpu", "true", "--bf16", "false"]
    _, args, _ = load("train_alp.py").parse_arguments(options)
    assert (args.vllm_mode, args.vllm_server_host, args.vllm_enable_sleep_mode) == ("server", "n2", False)


@pytest.mark.parametrize(
    ("arguments", "nodes", "said"), [([], "2", "usage: sbatch"), (["x"], "2", "VLLM_NODES=2 of 2")]
)
def test_slurm_says_what_is_wrong_before_anything_starts(tmp_path, arguments, nodes, said):
    done, lines = run_slurm(tmp_path, ["n1", "n2"], arguments, VLLM_NODES=nodes)
    assert done.returncode != 0 and said in done.stderr and lines == []


def documented_lines(*documents):
    """The commands of documents, or those indented in a script's docstring."""
    text = "\n".join((ROOT / document).read_text() for document in documents)
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    blocks += re.findall(r"^    (accelerate launch (?:.*\\\n)*.*)", text, re.MULTILINE)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


@pytest.mark.parametrize(
    ("document", "lines"),
    [
        ("docs/distributed.md", 6),
        ("examples/README.md", 4),
        ("examples/train_alp.py", 1),
        ("examples/tool_math.py", 2),
    ],
)
def test_documented_launch_lines_are_valid_and_name_files_that_exist(document, lines):
    found = documented_lines(document)
    assert len(found) == lines
    for line in found:
        words = [word for word in shlex.split(line, comments=True) if not re.match(r"^[A-Z_]+=", word)]
        for word in words:
            assert not re.match(r"(examples|docs|tests)/", word) or (ROOT / word).exists(), word
        if words[:2] == ["accelerate", "launch"]:
            launched = launch_command_parser().parse_args(words[2:])
            options = [*launched.training_script_args, "--use_cpu", "true", "--bf16", "false"]
            load("train_alp.py").parse_arguments(options)


@pytest.mark.slow
def test_the_commands_from_training_to_a_report_run_as_documented_at_tiny_size(tmp_path, language_model):
    (tmp_path / "examples").symlink_to(EXAMPLES)
    small = TINY | {"model_name_or_path": language_model, "steps_per_generation": 4, "use_vllm": "false"}
    commands = {
        "accelerate": ["-m", "accelerate.commands.accelerate_cli"],
        "python": [],
        "trl-alp": ["-m", "trl_alp"],
    }
    more = {
        "accelerate": [str(x) for key, value in small.items() for x in (f"--{key}", value)],
        "python": ["--samples", "2", "--k", "1", "2", "--max_new_tokens", "8", "--limit", "3"],
        "trl-alp": [],
    }
    stand_ins = {"Qwen/Qwen2.5-1.5B-Instruct": language_model, "gsm8k": GSM8K, "vllm": "transformers"}
    for line in documented_lines("examples/README.md"):
        command, *words = shlex.split(line)
        words = [str(stand_ins.get(word, word)) for word in words]
        done = subprocess.run(
            [sys.executable, *commands[command], *words, *more[command]], cwd=tmp_path, capture_output=True, text=True,
            env=os.environ | {"ACCELERATE_USE_CPU": "true", "CI": "1"}, timeout=280,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    evaluation = json.loads((tmp_path / "runs" / "evaluation.json").read_text())
    assert (len(evaluation["results"]), len(evaluation["differences"])) == (3, 2)
    assert "lora_24gb_bypass" in (tmp_path / "runs" / "report" / "index.html").read_text()


def test_the_server_is_started_with_what_trl_imposes_on_its_own(monkeypatch):
    from trl.scripts import vllm_serve

    monkeypatch.setattr(vllm_serve, "is_vllm_available", lambda **kwargs: False)
    imposed = vllm_serve.build_command(vllm_serve.ScriptArguments("m"))
    imposed = imposed[imposed.index("--weight-transfer-config") :]
    servers = [line for line in documented_lines("docs/distributed.md") if "vllm serve" in line]
    slurm = (EXAMPLES / "slurm.sh").read_text().replace("\\\n", " ")
    servers.append(re.search(r"VLLM_SERVER_DEV_MODE=1 srun .*?(vllm serve.*?) &", slurm).group(0).removesuffix(" &"))
    assert len(servers) >= 2
    for line in servers:
        words = shlex.split(line)
        assert "VLLM_SERVER_DEV_MODE=1" in words
        assert [word for word in words if word in imposed] == imposed


def test_shell_scripts_are_sound():
    scripts = list(EXAMPLES.glob("*.sh"))
    assert scripts
    for script in scripts:
        subprocess.run(["bash", "-n", script], check=True)
        if shutil.which("shellcheck"):
            subprocess.run(["shellcheck", script], check=True)
