"""One line a step on the console."""

import pytest
import tiny
from transformers import PrinterCallback, ProgressCallback
from trl import GRPOTrainer

from trl_alp import ConsoleCallback, instrument
from trl_alp.console import line


ROW = {
    "reward": 0.5, "completions/mean_length": 118.4, "alp/token/log_ratio/p02": -0.1, "alp/token/log_ratio/p98": 0.1,
    "alp/kl/k3": 0.0012, "alp/token/ess": 0.98, "alp/sigma/mean": 0.01, "alp/staleness": 3.0, "step_time": 2.13,
    "grad_norm": 0.25, "loss": 0.0,
}  # fmt: skip


def test_a_row_is_one_line_of_what_a_person_follows():
    text = " ".join(line(ROW, 7, 400).split())
    assert text.startswith("step 7/400 reward 0.500 length 118 ratio 0.90-1.11 KL 1.2e-03 ESS 98% sigma 0.01 ")
    assert text.endswith(" staleness 3 grad norm 0.25 2.1 s")
    assert line({"reward": 0.5}, 12, 400).split() == ["step", "12/400", "reward", "0.500"]
    assert line({"eval_reward": 0.5, "eval_runtime": 3.0}, 12, 400).split()[0] == "eval"
    assert line({"train_runtime": 60.4}, 400, 400) == "done: 400 steps in 60 s"
    assert "ratio 0.90-" in line(ROW | {"alp/token/log_ratio/p98": 1e4}, 7, 400)  # no overflow


@pytest.mark.parametrize("disable_tqdm", [True, False])
@pytest.mark.parametrize("kind", ["alp", "instrumented", "attached"])
def test_it_takes_the_place_of_what_prints_the_whole_row(tmp_path, capsys, kind, disable_tqdm):
    stock = {"trainer_class": GRPOTrainer} if kind != "alp" else {}
    callbacks = [ConsoleCallback()] if kind != "attached" else None
    trainer = tiny.trainer(tmp_path, **stock, callbacks=callbacks, disable_tqdm=disable_tqdm)
    if kind == "instrumented":
        instrument(trainer)
    if kind == "attached":
        ConsoleCallback().attach(trainer)
    printing = [c for c in trainer.callback_handler.callbacks if isinstance(c, PrinterCallback | ProgressCallback)]
    assert [type(callback) for callback in printing] == [ConsoleCallback]
    capsys.readouterr()
    trainer.train()
    captured = capsys.readouterr()
    printed = [text for text in captured.out.splitlines() if text.startswith(("step", "done"))]
    assert [text.split()[1] for text in printed] == ["1/2", "2/2", "2"]
    assert "{" not in captured.out and max(map(len, printed)) < 200
    assert ("2/2" in captured.err) != disable_tqdm  # the bar
    assert ("KL" in printed[0]) == (kind != "attached")


def test_every_leaves_out_the_steps_between(tmp_path, capsys):
    # Rollouts of two updates: every second row of the log has no reward.
    trainer = tiny.trainer(tmp_path, max_steps=6, steps_per_generation=2, callbacks=[ConsoleCallback(every=3)])
    trainer.train()
    trainer.evaluate(tiny.prompts(4))
    printed = [text.split()[:2] for text in capsys.readouterr().out.splitlines()]
    assert printed == [["step", "3/6"], ["step", "6/6"], ["done:", "6"], ["eval", "6/6"]]
    with pytest.raises(ValueError, match="every=0 is out of range"):
        ConsoleCallback(every=0)


def test_a_trainer_without_it_prints_as_stock(tmp_path):
    trainer = tiny.trainer(tmp_path)
    assert any(type(callback) is PrinterCallback for callback in trainer.callback_handler.callbacks)
