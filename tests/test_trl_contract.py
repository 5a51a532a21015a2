"""Every private name of TRL and transformers that `trainer.py` relies on, by name, signature and use.

When TRL moves, these fail first and say what changed.
"""

import inspect
import re
from pathlib import Path

import pytest
import tiny
import torch
import trl
from transformers import Trainer
from trl import GRPOTrainer

import trl_alp
from trl_alp import ALPGRPOTrainer


SOURCE = Path(trl_alp.__file__).parent


def body(function):
    return re.sub(r"\s+", " ", inspect.getsource(function))


SIGNATURES = {
    (GRPOTrainer, "_compute_loss"): "(self, model, inputs)",
    (GRPOTrainer, "_generate_and_score_completions"): "(self, inputs: list[dict[str, torch.Tensor | typing.Any]])",
    (GRPOTrainer, "training_step"): "(self, model, inputs, num_items_in_batch)",
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


def test_every_model_input_of_the_loss_is_passed_when_rollouts_are_scored():
    ours = set(re.findall(r'"(\w+)",', inspect.getsource(ALPGRPOTrainer._score_rollouts)))
    scoring = body(GRPOTrainer._compute_loss).split("self._get_per_token_logps_and_entropies(")[1].split(")\n")[0]
    passed = set(re.findall(r'(\w+)=inputs\.get\("\1"\)', scoring.split("if self.top_entropy_quantile")[0]))
    assert passed == ours, "TRL's loss passes other model inputs than `_score_rollouts`"


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


def test_the_old_policy_is_scored_first_and_only_when_misaligned():
    source = body(GRPOTrainer._generate_and_score_completions)
    condition = (
        "if self.args.gradient_accumulation_steps % generate_every != 0 or ( "
        "self.use_vllm and self.vllm_importance_sampling_correction ): "
        "old_per_token_logps, _, _ = self._get_per_token_logps_and_entropies("
    )
    assert condition in source, "TRL scores the old policy under another condition; see `_skip_scoring`"
    before, _ = source.split(condition)
    assert "_get_per_token_logps_and_entropies(" not in before
    assert 'if old_per_token_logps is not None: output["old_per_token_logps"]' in source


def test_buffered_rollouts_are_used_as_they_are_saved():
    source = body(GRPOTrainer._prepare_inputs)
    assert "if self._step % generate_every == 0 or self._buffered_inputs is None:" in source
    assert "inputs = self._buffered_inputs[self._step % self.args.steps_per_generation]" in source
    assert "return rewards_per_func" in body(GRPOTrainer._calculate_rewards)


def test_generation_returns_the_engines_log_probs_fifth():
    source = body(GRPOTrainer._generate)
    assert "return prompt_ids, completion_ids, tool_mask, completions, logprobs, extra_fields" in source
    assert list(inspect.signature(GRPOTrainer._generate).parameters) == ["self", "prompts"]


def test_checkpointing_is_switched_off_for_scoring_by_trls_own_context():
    from trl.models.utils import disable_gradient_checkpointing

    assert list(inspect.signature(disable_gradient_checkpointing).parameters) == [
        "model",
        "gradient_checkpointing_kwargs",
    ]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("_buffered_inputs", type(None)),
        ("_metrics", dict),
        ("_step", int),
        ("accelerator", object),
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


def test_private_names_of_trl_live_in_the_trainer_module_alone():
    private = re.compile(
        r"_get_per_token_logps|_compute_loss|_generate_and_score|_buffered_inputs|\._step\b|\._metrics\b|trl\.experimental"
    )
    for path in SOURCE.glob("*.py"):
        if path.name != "trainer.py":
            assert not private.search(path.read_text()), path
    assert "trl.experimental" not in (SOURCE / "trainer.py").read_text()


def test_imports_run_one_way():
    for name, allowed in {"noise": [], "ratio": [], "perturbation": [".noise"], "mismatch": [".ratio"]}.items():
        source = (SOURCE / f"{name}.py").read_text()
        found = re.findall(r"^(?:from|import) ((?:\.|trl|transformers|accelerate)\S*)", source, re.MULTILINE)
        assert found == allowed, name
    for path in SOURCE.rglob("*.py"):
        if path.name not in ("__init__.py", "trainer.py"):
            assert not re.search(r"from \.+trainer import|import trainer", path.read_text()), path


def test_the_whole_method_is_readable_in_under_400_lines():
    # Code lines of its two halves: without blank lines, comments and docstrings.
    import io
    import tokenize

    def code_lines(path):
        lines = set()
        for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
            prose = token.type in (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
            docstring = token.type == tokenize.STRING and token.line.lstrip().startswith(('"""', 'r"""'))
            if not prose and not docstring and token.type != tokenize.ENDMARKER:
                lines |= set(range(token.start[0], token.end[0] + 1))
        return len(lines)

    assert sum(code_lines(SOURCE / f"{name}.py") for name in ("noise", "perturbation", "ratio")) < 400
