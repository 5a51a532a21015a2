"""What a run shows of its mismatch: files, tables, histograms and warnings, for ALP and for stock GRPO."""

import json
import math
import re

import pandas as pd
import pytest
import tiny
import torch
from accelerate import Accelerator
from trl import GRPOConfig, GRPOTrainer

from trl_alp import instrument
from trl_alp.instruments import HEALTH, Instruments


COLUMNS = ["step", "policy", "probability_low", "probability_high", "tokens"]
COLUMNS += ["p02", "p25", "p50", "p75", "p98", "min", "max"]
OFF_POLICY = {"steps_per_generation": 2, "max_steps": 4}


def stock(output_dir, **kwargs):
    return tiny.trainer(output_dir, GRPOTrainer, **kwargs)


def lines(output_dir):
    return [json.loads(line) for line in (output_dir / "alp" / "metrics.jsonl").read_text().splitlines()]


# ---- Files ----


def test_a_run_keeps_its_log_and_an_envelope_for_each_logging_step(tmp_path):
    trainer = tiny.trainer(tmp_path, alp_monitor_every=2, logging_steps=2, **OFF_POLICY)
    trainer.train()
    assert lines(tmp_path) == json.loads(json.dumps(trainer.state.log_history))
    files = sorted(path.name for path in (tmp_path / "alp").glob("*.parquet"))
    assert files == ["envelope_00000002.parquet", "envelope_00000004.parquet"]
    envelope = pd.read_parquet(tmp_path / "alp" / files[1])
    assert list(envelope.columns) == COLUMNS
    assert set(envelope["policy"]) == {"update", "noise_off"} and set(envelope["step"]) == {4}
    update = envelope[envelope["policy"] == "update"]
    last = trainer.state.log_history[1]
    assert update["min"].min() == pytest.approx(last["alp/token/log_ratio/min"], rel=0.02)
    assert (update["tokens"] > 0).all() and (update["p02"] <= update["p98"]).all()


def test_a_resumed_run_goes_on_with_the_log_of_its_checkpoint(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "alp_monitor_every": 1}
    tiny.trainer(tmp_path, **settings, max_steps=3).train()  # broken off one step after its checkpoint
    tiny.trainer(tmp_path, **settings, max_steps=4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [row["step"] for row in lines(tmp_path)] == [1, 2, 3, 4, 4]


def test_a_fresh_run_does_not_mix_with_the_one_before_it(tmp_path):
    tiny.trainer(tmp_path, max_steps=3).train()
    tiny.trainer(tmp_path, max_steps=1).train()
    assert [row["step"] for row in lines(tmp_path)] == [1, 1]
    assert len(list((tmp_path / "alp").glob("*.parquet"))) == 1
    assert len(list((tmp_path / "alp.previous").glob("*.parquet"))) == 3


def test_a_half_written_last_line_does_not_stop_a_resume(tmp_path):
    tiny.trainer(tmp_path, save_strategy="steps", save_steps=1, max_steps=2).train()
    log = tmp_path / "alp" / "metrics.jsonl"
    log.write_text(log.read_text() + '{"step": 2, "lo')
    tiny.trainer(tmp_path, max_steps=3).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert [row["step"] for row in lines(tmp_path)] == [1, 2, 3, 3]


# ---- Where it is shown ----


def test_the_envelope_reaches_wandb_as_a_table(tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    tiny.trainer(tmp_path, report_to="wandb", alp_monitor_every=1).train()
    wandb.finish()
    tables = list(tmp_path.rglob("alp/envelope*.table.json"))
    assert tables and all(json.loads(table.read_text())["columns"] == COLUMNS for table in tables)


def test_the_envelope_reaches_tensorboard_as_text_and_the_log_ratio_as_a_histogram(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    trainer = tiny.trainer(tmp_path, report_to="tensorboard", alp_monitor_every=1)
    trainer.train()
    (folder,) = {p.parent for p in tmp_path.rglob("events.out.tfevents*")}
    events = EventAccumulator(str(folder)).Reload()
    assert "alp/envelope/text_summary" in events.Tags()["tensors"]
    last = events.Histograms("alp/token/log_ratio")[-1]
    row = trainer.state.log_history[1]
    assert last.step == 2 and last.histogram_value.num == sum(last.histogram_value.bucket)
    assert last.histogram_value.min == pytest.approx(row["alp/token/log_ratio/min"], rel=0.03)
    assert "alp/noise_off/token/log_ratio" in events.Tags()["histograms"]


def test_the_envelope_reaches_trackio_as_a_table(tmp_path, monkeypatch):
    import sys
    import types

    shown = []
    trackio = types.SimpleNamespace(log=shown.append, Table=lambda dataframe: dataframe)
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    instruments = Instruments(Accelerator(cpu=True), str(tmp_path), ["trackio"])
    p, q = torch.zeros(2, 5), torch.full((2, 5), -0.1)
    instruments.record("update", p, q, torch.ones(2, 5), staleness=0)
    instruments.flush(7)
    (entry,) = shown
    assert list(entry["alp/envelope"].columns) == COLUMNS and entry["alp/envelope"]["tokens"].tolist() == [10]


# ---- Stock GRPO ----


@pytest.mark.parametrize("rollouts", ["engine", "plain"])
def test_instruments_change_nothing_of_a_stock_run(tmp_path, rollouts):
    settings = dict(OFF_POLICY) | ({"rollout_func": tiny.rollout_func(0.1)} if rollouts == "engine" else {})
    runs = []
    for watched in (False, True):
        trainer = stock(tmp_path, **settings)
        if watched:
            assert instrument(trainer) is trainer
        trainer.train()
        runs.append(trainer)
    plain, watched = runs
    assert all(
        torch.equal(value, tiny.parameters(watched.model)[name])
        for name, value in tiny.parameters(plain.model).items()
    )
    for before, after in zip(tiny.history(plain), tiny.history(watched), strict=True):
        assert before == {name: value for name, value in after.items() if not name.startswith("alp/")}
        assert ("alp/kl/k3" in after) == ("loss" in after)
    assert lines(tmp_path)[0]["alp/kl/k3"] >= 0


def test_stock_metrics_equal_those_computed_by_hand(tmp_path):
    trainer = instrument(stock(tmp_path, rollout_func=tiny.rollout_func(0.5), steps_per_generation=2, max_steps=2))
    seen = []
    compute_loss, score = trainer._compute_loss, trainer._get_per_token_logps_and_entropies

    def recorded_score(*args, **kwargs):
        seen.append(score(*args, **kwargs))
        return seen[-1]

    def recorded_loss(model, inputs):
        seen.clear()
        loss = compute_loss(model, inputs)
        rows.append((seen[0][0].detach(), inputs))
        return loss

    rows = []
    trainer._compute_loss, trainer._get_per_token_logps_and_entropies = recorded_loss, recorded_score
    trainer.train()
    for (p, inputs), row in zip(rows, trainer.state.log_history, strict=False):
        mask = inputs["completion_mask"].bool()
        engine, old = inputs["sampling_per_token_logps"], inputs["old_per_token_logps"]
        for prefix, g in (("alp", p - engine), ("alp/old", old - engine)):
            assert row[f"{prefix}/kl/k1"] == pytest.approx(-g[mask].mean().item(), abs=1e-5)
            assert row[f"{prefix}/log_ratio/max"] == pytest.approx(g[mask].max().item(), rel=1e-4)
    assert [row["alp/staleness"] for row in trainer.state.log_history[:2]] == [0, 1]


def test_the_ratio_is_logged_before_trl_truncates_it(tmp_path):
    # trl#5231: with the correction on, TRL's own ratio metrics are those after its cap.
    config = tiny.config(tmp_path, GRPOConfig, steps_per_generation=2, vllm_importance_sampling_clip_max=1.5)
    trainer = instrument(stock(tmp_path, args=config, rollout_func=tiny.rollout_func(2.0)))
    trainer.train()
    assert trainer.state.log_history[0]["alp/old/ratio/max"] > 3


def test_an_alp_trainer_has_its_instruments_already(tmp_path):
    trainer = tiny.trainer(tmp_path)
    instruments = trainer.instruments
    assert instrument(trainer) is trainer and trainer.instruments is instruments
    watched = instrument(stock(tmp_path))
    callbacks = len(watched.callback_handler.callbacks)
    assert instrument(watched) is watched and len(watched.callback_handler.callbacks) == callbacks


def test_other_trainers_are_refused_with_the_reason():
    with pytest.raises(ValueError, match="got a object; it reads the importance ratio of a `GRPOTrainer`"):
        instrument(object())


# ---- Health ----


def flush(tmp_path, gap, staleness=0, policy="update", perturbed=False, instruments=None):
    instruments = instruments or Instruments(Accelerator(cpu=True), str(tmp_path), [], perturbed=perturbed)
    q = torch.full_like(gap, -1.0)
    instruments.record(policy, q + gap, q, torch.ones_like(gap), staleness)
    instruments.flush(1)
    return instruments


def noise(std, mean=0.0):
    return mean + std * torch.randn(64, 64, generator=torch.Generator().manual_seed(0))


CROSSINGS = {
    "token/mult_prob_error": noise(0.08),
    "kl/k1": noise(0.01, mean=-0.02),
    "token/ess": noise(1.5),
    "token/chi2": noise(1.5),
}


@pytest.mark.parametrize("metric", CROSSINGS)
def test_a_crossed_bound_is_warned_about_once_with_its_source_and_a_way_out(tmp_path, caplog, metric):
    instruments = flush(tmp_path, CROSSINGS[metric])
    (bound,) = [b for b in HEALTH if b.metric == metric][:1]
    assert len(re.findall(rf"alp/{metric}=\S+ is (above|below) .*{re.escape(bound.source)}", caplog.text)) == 1
    assert "trl-alp-doctor" in caplog.text
    before = caplog.text.count("the bound of")
    flush(tmp_path, CROSSINGS[metric], instruments=instruments)
    assert caplog.text.count("the bound of") == before


def test_a_healthy_run_is_not_warned_about(tmp_path, caplog):
    flush(tmp_path, noise(0.02))
    assert "the bound of" not in caplog.text


def test_bounds_on_the_engine_hold_for_fresh_rollouts_only(tmp_path, caplog):
    flush(tmp_path, noise(0.08, mean=-0.02), staleness=3)
    assert "the bound of" not in caplog.text  # drift of this size is what updates do
    flush(tmp_path, noise(0.1, mean=-0.2), staleness=3)
    assert "alp/kl/k1=0.201 is above 0.1" in caplog.text and "take fewer updates per batch of rollouts" in caplog.text


def test_noise_is_not_taken_for_a_fault_of_the_engine(tmp_path, caplog):
    flush(tmp_path, noise(0.08), perturbed=True)
    assert "the bound of" not in caplog.text
    flush(tmp_path, noise(0.08), perturbed=True, policy="noise_off")
    assert "alp/noise_off/token/mult_prob_error" in caplog.text and "The noise is part of it" not in caplog.text
    caplog.clear()
    flush(tmp_path, noise(0.1, mean=-0.2), perturbed=True)
    assert "The noise is part of it; `alp_monitor_every=10`" in caplog.text


def test_a_run_whose_engine_is_off_is_warned_about(tmp_path, caplog):
    tiny.trainer(tmp_path, rollout_func=tiny.rollout_func(0.5), alp_enabled=False).train()
    assert "the bound of NeMo-RL" in caplog.text
    caplog.clear()
    tiny.trainer(tmp_path, alp_enabled=False).train()
    assert "the bound of" not in caplog.text


def test_metrics_without_value_cross_nothing(tmp_path, caplog):
    instruments = Instruments(Accelerator(cpu=True), str(tmp_path), [])
    instruments.record("update", torch.zeros(2, 3), torch.full((2, 3), math.nan), torch.ones(2, 3), 0)
    metrics = instruments.flush(1)
    assert metrics["alp/unscored_tokens"] == 6 and math.isnan(metrics["alp/kl/k1"])
    assert "the bound of" not in caplog.text
