"""What a checkpoint holds of ALP, and what is said where it does not fit."""

import numpy as np
import pytest
import tiny
import torch
from peft import LoraConfig

from trl_alp import ALPGRPOTrainer


SAVING = {"save_strategy": "steps", "save_steps": 1}


def rollouts(folder, step):
    return torch.load(folder / f"checkpoint-{step}" / "alp_rollouts_0.pt", weights_only=True)


class CountsPrompts(ALPGRPOTrainer):
    """Puts values of numpy beside the rollouts, as a subclass that computes them may."""

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        rows = len(output["completion_ids"])
        output["weights"] = list(np.linspace(0, 1, rows))  # numpy's scalars
        output["array"] = np.arange(rows, dtype=np.float32)
        output["names"] = [np.str_(f"row {i}") for i in range(rows)]
        return output


@pytest.mark.parametrize("iterations", [1, 2])
def test_only_rollouts_that_will_be_read_again_are_saved(tmp_path, iterations):
    settings = {"steps_per_generation": 3, "num_iterations": iterations, "max_steps": 3 * iterations, **SAVING}
    tiny.trainer(tmp_path, **settings).train()
    for step in range(1, 3 * iterations + 1):
        held = rollouts(tmp_path, step)["buffered_inputs"]
        left = 3 * iterations - step
        if left == 0:
            assert held is None
        else:
            assert [batch is not None for batch in held] == [index >= 3 - left for index in range(3)]


def test_a_slice_is_saved_without_the_batch_that_it_was_cut_from(tmp_path):
    # Like a vision-language model's pixels: most of what a checkpoint would hold.
    class WithPixels(ALPGRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            return output | {"extra": torch.zeros(len(output["completion_ids"]), 50_000)}

    trainer = tiny.trainer(tmp_path, WithPixels, steps_per_generation=4, max_steps=4, **SAVING)
    trainer.train()
    sizes = [(tmp_path / f"checkpoint-{step}" / "alp_rollouts_0.pt").stat().st_size for step in (1, 2, 3, 4)]
    slice_bytes = 8 * 50_000 * 4
    for size, left in zip(sizes, (3, 2, 1, 0), strict=True):
        assert size == pytest.approx(left * slice_bytes, abs=50_000)


def test_what_the_save_accepts_the_load_accepts(tmp_path):
    settings = {"steps_per_generation": 4, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = tiny.trainer(tmp_path / "whole", CountsPrompts, **settings)
    whole.train()
    resumed = tiny.trainer(tmp_path / "resumed", CountsPrompts, policy=tiny.model(seed=1), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    held = rollouts(tmp_path / "whole", 2)["buffered_inputs"][-1]
    assert [type(held[name][0]) for name in ("weights", "array", "names")] == [float, float, str]
    for name, value in tiny.parameters(whole.model).items():
        assert torch.equal(value, tiny.parameters(resumed.model)[name])


def test_rollouts_that_no_checkpoint_can_hold_are_said_to_be_left_out(tmp_path, caplog):
    class Anything(ALPGRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            return output | {"objects": [object() for _ in range(len(output["completion_ids"]))]}

    trainer = tiny.trainer(tmp_path, Anything, steps_per_generation=4, max_steps=2, **SAVING)
    trainer.train()
    assert "The rollouts hold a object, which a checkpoint cannot" in caplog.text
    resumed = tiny.trainer(tmp_path, Anything, steps_per_generation=4, max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 4 and "No buffered rollouts" in caplog.text


def test_a_checkpoint_of_a_run_without_noise_is_not_taken_for_another_trainers(tmp_path, caplog):
    tiny.trainer(tmp_path, alp_enabled=False, max_steps=1, **SAVING).train()
    tiny.trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert "it is of a run with `alp_enabled=False`" in caplog.text and "not ALP's" not in caplog.text


@pytest.mark.parametrize("name", ["alp_state.pt", "alp_rollouts_0.pt"])
def test_a_file_that_would_run_code_is_refused_without_the_advice_to_let_it(tmp_path, name):
    tiny.trainer(tmp_path, max_steps=1, steps_per_generation=2, **SAVING).train()

    class Code:
        def __reduce__(self):
            return (print, ("run",))

    torch.save({"layout": Code()}, tmp_path / "checkpoint-1" / name)
    with pytest.raises(ValueError, match=rf"{name} cannot be read \(UnpicklingError\)") as error:
        tiny.trainer(tmp_path, steps_per_generation=2).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    text = str(error.value)
    assert "weights_only" not in text and error.value.__cause__ is None and error.value.__suppress_context__


def test_a_checkpoint_of_the_first_version_resumes(tmp_path):
    """Its file of rollouts holds all slices of the batch, used up or not."""
    settings = {"steps_per_generation": 4, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = tiny.trainer(tmp_path / "whole", **settings)
    whole.train()
    path = tmp_path / "whole" / "checkpoint-2" / "alp_rollouts_0.pt"
    state = torch.load(path, weights_only=True)
    state["buffered_inputs"] = [state["buffered_inputs"][-1] if b is None else b for b in state["buffered_inputs"]]
    torch.save(state, path)
    resumed = tiny.trainer(tmp_path / "resumed", policy=tiny.model(seed=1), **settings)
    resumed.train(resume_from_checkpoint=str(path.parent))
    for name, value in tiny.parameters(whole.model).items():
        assert torch.equal(value, tiny.parameters(resumed.model)[name])


def test_an_adapters_checkpoint_holds_rollouts_and_sigma_beside_it(tmp_path):
    lora = LoraConfig(target_modules=["q_proj"])
    tiny.trainer(tmp_path, peft_config=lora, max_steps=1, steps_per_generation=2, **SAVING).train()
    names = {path.name for path in (tmp_path / "checkpoint-1").iterdir()}
    assert {"adapter_model.safetensors", "alp_state.pt", "alp_rollouts_0.pt"} <= names
