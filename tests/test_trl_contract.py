"""Every private name of TRL, transformers and torch that this package relies on, by name, signature and use.

When TRL moves, these fail first and say what changed.
"""

import inspect
import re
from pathlib import Path

import pytest
import tiny
import torch
import trl
from transformers import GenerationConfig, Trainer
from trl import GRPOTrainer

import trl_alp


SOURCE = Path(trl_alp.__file__).parent


def body(function):
    return re.sub(r"\s+", " ", inspect.getsource(function))


SIGNATURES = {
    (GRPOTrainer, "_compute_loss"): "(self, model, inputs)",
    (GRPOTrainer, "_generate_and_score_completions"): "(self, inputs: list[dict[str, torch.Tensor | typing.Any]])",
    (GRPOTrainer, "compute_loss"): "(self, model, inputs, return_outputs=False, num_items_in_batch=None)",
    (GRPOTrainer, "_calculate_rewards"): "(self, inputs, prompts, completions, completion_ids_list)",
    (GRPOTrainer, "log"): "(self, logs: dict[str, float], start_time: float | None = None)",
    (Trainer, "_save_optimizer_and_scheduler"): "(self, output_dir: str)",
    (Trainer, "_load_optimizer_and_scheduler"): "(self, checkpoint: str | None)",
}


@pytest.mark.parametrize(("owner", "name"), SIGNATURES)
def test_overridden_methods_have_the_signature_they_are_overridden_with(owner, name):
    signature = inspect.signature(getattr(owner, name))
    found = re.sub(r"Tensor \| Any", "Tensor | typing.Any", str(signature).split(" -> ")[0])
    assert found == SIGNATURES[owner, name], f"{owner.__name__}.{name} of TRL {trl.__version__} is now {signature}"


def test_scoring_takes_and_returns_what_we_pass_and_unpack(tmp_path):
    trainer = tiny.trainer(tmp_path, GRPOTrainer)
    ids = torch.randint(3, 13, (4, 6))
    logps, entropies, aux_loss = trainer._get_per_token_logps_and_entropies(
        trainer.model, ids, torch.ones_like(ids), 4, batch_size=2, compute_entropy=True, compute_aux_loss=False
    )
    assert logps.shape == entropies.shape == (4, 4) and aux_loss is None


def test_the_loss_scores_once_and_reads_the_knobs_we_set():
    source = body(GRPOTrainer._compute_loss)
    assert source.count("self._get_per_token_logps_and_entropies(") == 1
    for text in (
        'inputs.get("old_per_token_logps")',
        'inputs.get("sampling_per_token_logps", old_per_token_logps)',
        "log_ratio = per_token_logps - old_per_token_logps",
        "torch.clamp(coef_1, 1 - self.epsilon_low, 1 + self.epsilon_high)",
        "torch.clamp(coef_1, max=self.args.delta)",
        'self.loss_type in ["grpo", "bnpo", "dr_grpo", "dapo", "luspo"]',
    ):
        assert text in source, f"TRL {trl.__version__}'s loss no longer has {text!r}"


def test_a_step_computes_its_loss_by_compute_loss_and_that_by_the_inner_one():
    assert "loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)" in body(
        Trainer.training_step
    )
    assert "self._compute_loss(model, inputs)" in body(GRPOTrainer.compute_loss)
    assert "with torch.no_grad():" in body(GRPOTrainer.prediction_step)  # an evaluation's loss has no gradient


def test_num_iterations_decides_after_the_rollouts_whether_the_old_policy_is_scored():
    source = body(GRPOTrainer._generate_and_score_completions)
    condition = (
        "generate_every = self.args.steps_per_generation * self.num_iterations # generation frequency "
        "if self.args.gradient_accumulation_steps % generate_every != 0 or ( "
        "self.use_vllm and self.vllm_importance_sampling_correction ): "
        "old_per_token_logps, _, _ = self._get_per_token_logps_and_entropies("
    )
    assert condition in source, "TRL scores the old policy under another condition; see `_choose_old_policy_scoring`"
    assert source.count("num_iterations") == 1 and "num_iterations" not in body(GRPOTrainer._generate)
    assert source.index("self._generate(prompts)") < source.index(condition)
    assert 'if old_per_token_logps is not None: output["old_per_token_logps"]' in source


def test_buffered_rollouts_are_used_as_they_are_saved():
    source = body(GRPOTrainer._prepare_inputs)
    assert "generate_every = self.args.steps_per_generation * self.num_iterations" in source
    assert "if self._step % generate_every == 0 or self._buffered_inputs is None:" in source
    assert "inputs = self._buffered_inputs[self._step % self.args.steps_per_generation]" in source
    assert "return rewards_per_func" in body(GRPOTrainer._calculate_rewards)


def test_trl_says_of_nan_rewards_that_they_are_none():
    source = body(GRPOTrainer._calculate_rewards)
    assert "All reward functions returned None" in source and "zip(self.reward_funcs," in source
    assert GRPOTrainer.__module__ == "trl.trainer.grpo_trainer"  # and so the name of its logger


def test_a_log_is_due_where_we_pool_for_it_and_the_summary_is_logged_last():
    source = body(Trainer._maybe_log_save_evaluate)
    assert "if self.control.should_log and self.state.global_step > self._globalstep_last_logged:" in source
    assert source.index("self.log(logs, start_time)") < source.index("self._evaluate(")
    assert "self.log(metrics)" in body(Trainer._finalize_training)
    assert "logs.update(metrics)" in body(GRPOTrainer.log)


def test_generate_fills_what_was_not_asked_from_the_models_own_config():
    model = tiny.model()
    model.generation_config.min_p = 0.1
    used, _ = model._prepare_generation_config(GenerationConfig(top_p=0.5))
    assert (used.top_p, used.min_p) == (0.5, 0.1)
    assert "self._prepare_generation_config(generation_config" in body(type(model).generate)


def test_autograd_tells_in_backward_which_node_runs_and_when_it_was_made():
    number = torch._C._autograd._get_sequence_nr
    assert torch._C._current_graph_task_id() == -1
    before = number()
    assert number() == before  # looking takes no number
    seen = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append((torch._C._current_graph_task_id(), torch._C._current_autograd_node()._sequence_nr()))
            return grad

    x = torch.ones(1, requires_grad=True) * 2
    middle = number()
    y = Look.apply(x)
    after = number()
    (y * 3).backward()
    ((task, node),) = seen
    assert task != -1 and before < middle <= node < after


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("_buffered_inputs", type(None)),
        ("_metrics", dict),
        ("_step", int),
        ("accelerator", object),
        ("generation_config", GenerationConfig),
        ("temperature", float),
        ("epsilon_low", float),
        ("epsilon_high", float),
        ("importance_sampling_level", str),
        ("loss_type", str),
        ("num_iterations", int),
        ("rollout_func", object),
        ("use_vllm", bool),
        ("vllm_mode", str),
    ],
)
def test_the_trainer_has_the_attributes_we_read(tmp_path, name, kind):
    assert isinstance(getattr(tiny.trainer(tmp_path, GRPOTrainer), name), kind)


def test_private_names_of_trl_live_in_few_modules():
    private = re.compile(
        r"_get_per_token_logps|_compute_loss|_generate_and_score|_buffered_inputs|\._step\b|\._metrics\b|trl\.experimental"
        r"|_calculate_rewards|_maybe_log_save|_finalize_training|_globalstep"
    )
    found = {path.stem for path in SOURCE.glob("*.py") if private.search(path.read_text())}
    assert found == {"trainer", "guard", "resume", "watching"}
    assert not any("trl.experimental" in path.read_text() for path in SOURCE.glob("*.py"))


def test_imports_run_one_way():
    allowed_imports = {
        "noise": [], "layers": [], "perturbation": [".layers", ".noise"], "ratio": [], "mismatch": [".ratio"],
        "sampling": [],
    }  # fmt: skip
    for name, allowed in allowed_imports.items():
        source = (SOURCE / f"{name}.py").read_text()
        found = re.findall(r"^(?:from|import) ((?:\.|trl|transformers|accelerate)\S*)", source, re.MULTILINE)
        assert found == allowed, name
    for path in SOURCE.rglob("*.py"):
        if path.name not in ("__init__.py", "trainer.py"):
            assert not re.search(r"from \.+trainer import|import trainer", path.read_text()), path


def code_lines(name):
    """Lines of code: without blank lines, comments and docstrings."""
    import ast

    text = (SOURCE / f"{name}.py").read_text()
    prose = set()
    for node in ast.walk(ast.parse(text)):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node)
        if documented:
            prose |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = enumerate(text.splitlines(), 1)
    return sum(1 for number, line in lines if line.strip() and line.strip()[0] != "#" and number not in prose)


def test_the_method_and_the_trainer_that_carries_it_read_in_one_sitting():
    assert sum(code_lines(name) for name in ("noise", "perturbation", "ratio")) < 450
    assert code_lines("trainer") <= 260
    assert all(code_lines(path.stem) <= 300 for path in SOURCE.glob("*.py") if path.stem != "report")
