"""What a run shows of its mismatch: files, tables, histograms and warnings, for ALP and for stock GRPO."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import tiny
import torch
from accelerate import Accelerator
from trl import GRPOConfig, GRPOTrainer

from trl_alp import instrument
from trl_alp.instruments import FRESH_HEALTH, UNSCORED_HEALTH, UPDATE_HEALTH, Instruments


COLUMNS = ["step", "policy", "probability_low", "probability_high", "tokens"]
COLUMNS += ["p02", "p25", "p50", "p75", "p98", "min", "max"]
OFF_POLICY = {"steps_per_generation": 2, "max_steps": 4}


def stock(output_dir, **kwargs):
    return tiny.trainer(output_dir, GRPOTrainer, **kwargs)


def lines(output_dir):
    return [json.loads(line) for line in (output_dir / "alp" / "metrics.jsonl").read_text().splitlines()]


def envelope_of(output_dir, folder="alp"):
    return pd.read_json(output_dir / folder / "envelope.jsonl", lines=True)


# ---- Files ----


def test_a_run_keeps_its_log_and_an_envelope_for_each_logging_step(tmp_path):
    trainer = tiny.trainer(tmp_path, alp_monitor_every=2, logging_steps=2, **OFF_POLICY)
    trainer.train()
    assert lines(tmp_path) == json.loads(json.dumps(trainer.state.log_history))
    assert sorted(path.name for path in (tmp_path / "alp").iterdir()) == [
        "config.json",
        "envelope.jsonl",
        "metrics.jsonl",
    ]
    envelope = envelope_of(tmp_path)
    assert list(envelope.columns) == COLUMNS and envelope["step"].unique().tolist() == [2, 4]
    envelope = envelope[envelope["step"] == 4]
    assert set(envelope["policy"]) == {"update", "noise_off"}
    update = envelope[envelope["policy"] == "update"]
    last = trainer.state.log_history[1]
    assert update["min"].min() == pytest.approx(last["alp/token/log_ratio/min"], rel=0.02)
    assert (update["tokens"] > 0).all() and (update["p02"] <= update["p98"]).all()


def test_a_run_keeps_its_settings_with_tokens_masked(tmp_path):
    tiny.trainer(tmp_path, hub_token="secret", learning_rate=3e-4).train()
    text = (tmp_path / "alp" / "config.json").read_text()
    config = json.loads(text)
    assert config["trainer"] == "ALPGRPOTrainer" and config["learning_rate"] == 3e-4 and "secret" not in text


def test_a_resumed_run_goes_on_with_the_log_of_its_checkpoint(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "alp_monitor_every": 1}
    tiny.trainer(tmp_path, **settings, max_steps=3).train()  # broken off one step after its checkpoint
    tiny.trainer(tmp_path, **settings, max_steps=4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [row["step"] for row in lines(tmp_path)] == [1, 2, 3, 4, 4]


PREVIOUS = ("alp.previous-1", "alp.previous-2")


def test_a_fresh_run_does_not_mix_with_the_one_before_it(tmp_path, caplog):
    tiny.trainer(tmp_path, max_steps=3).train()
    tiny.trainer(tmp_path, max_steps=1).train()
    assert [row["step"] for row in lines(tmp_path)] == [1, 1]
    tiny.trainer(tmp_path, max_steps=1).train()
    steps = {name: len(envelope_of(tmp_path, name)["step"].unique()) for name in ("alp", *PREVIOUS)}
    assert steps == {"alp": 1, PREVIOUS[0]: 3, PREVIOUS[1]: 1}
    assert all(f"which is now {tmp_path / name}; delete what is old" in caplog.text for name in PREVIOUS)


def test_an_evaluation_outside_a_run_does_not_touch_the_log_of_another(tmp_path):
    tiny.trainer(tmp_path, max_steps=1).train()
    before = lines(tmp_path)
    tiny.trainer(tmp_path, eval_dataset=tiny.prompts(8), per_device_eval_batch_size=8).evaluate()
    assert lines(tmp_path) == before


def test_unreadable_lines_do_not_stop_a_resume_and_later_envelopes_are_dropped(tmp_path):
    tiny.trainer(tmp_path, save_strategy="steps", save_steps=1, max_steps=4).train()
    log = tmp_path / "alp" / "metrics.jsonl"
    log.write_text("not json\n[]\n" + log.read_text() + '{"step": 2, "lo')
    tiny.trainer(tmp_path, max_steps=2).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert [row["step"] for row in lines(tmp_path)] == [1, 2, 2]
    assert envelope_of(tmp_path)["step"].unique().tolist() == [1, 2]


def test_a_resume_drops_the_later_envelope_files_of_earlier_versions(tmp_path):
    tiny.trainer(tmp_path, save_strategy="steps", save_steps=1, max_steps=2).train()
    for step in (1, 2):
        (tmp_path / "alp" / f"envelope_{step:08d}.parquet").touch()
    tiny.trainer(tmp_path, max_steps=2).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert [path.name for path in (tmp_path / "alp").glob("*.parquet")] == ["envelope_00000001.parquet"]


# ---- What goes wrong around a run ----


def full_disk(monkeypatch, path):
    """Writing to files of that name fails half way, as on a full disk."""
    real_open = open

    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *args):
            self.file.close()

        def write(self, text):
            self.file.write(text[: len(text) // 2])
            raise OSError(28, "No space left on device")

        def writelines(self, texts):
            self.write("".join(texts))

    def opened(name, mode="r", *args, **kwargs):
        file = real_open(name, mode, *args, **kwargs)
        return Full(file) if path in str(name) and ("a" in mode or "w" in mode) else file

    monkeypatch.setattr("trl_alp.run_files.open", opened, raising=False)


@pytest.mark.parametrize("name", ["metrics.jsonl", "envelope.jsonl"])
@pytest.mark.parametrize("watched", ["alp", "stock"])
def test_a_full_disk_is_one_warning_and_training_goes_on(tmp_path, monkeypatch, caplog, watched, name):
    full_disk(monkeypatch, name)
    trainer = tiny.trainer(tmp_path, max_steps=3) if watched == "alp" else instrument(stock(tmp_path, max_steps=3))
    trainer.train()
    assert trainer.state.global_step == 3 and "alp/kl/k3" in trainer.state.log_history[0]
    assert caplog.text.count("No space left on device). Training goes on") == 1


def test_a_full_disk_does_not_lose_the_log_that_a_resume_cuts_back(tmp_path, monkeypatch, caplog):
    tiny.trainer(tmp_path, save_strategy="steps", save_steps=1, max_steps=3).train()
    before = lines(tmp_path)
    full_disk(monkeypatch, "metrics.jsonl")
    trainer = tiny.trainer(tmp_path, max_steps=4)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.state.global_step == 4 and "Training goes on" in caplog.text
    text = (tmp_path / "alp" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in text[: len(before)]] == before


def test_a_folder_in_the_place_of_a_file_or_a_file_in_that_of_the_folder_ends_no_run(tmp_path, caplog):
    (tmp_path / "a" / "alp").parent.mkdir()
    (tmp_path / "a" / "alp").touch()
    trainer = tiny.trainer(tmp_path / "a")
    trainer.train()
    assert trainer.state.global_step == 2 and caplog.text.count("cannot write to") == 1


def test_a_log_of_another_run_that_cannot_be_moved_away_is_not_written_into(tmp_path, monkeypatch, caplog):
    tiny.trainer(tmp_path, max_steps=1).train()
    before = lines(tmp_path)

    def fail(*args):
        raise PermissionError(13, "planted")

    monkeypatch.setattr("trl_alp.run_files.os.rename", fail)
    trainer = tiny.trainer(tmp_path)
    trainer.train()
    assert trainer.state.global_step == 2 and caplog.text.count("cannot write to") == 1
    assert lines(tmp_path) == before


def test_a_tracker_that_fails_is_one_warning_and_training_goes_on(tmp_path, monkeypatch, caplog):
    import sys
    import types

    def fail(*args, **kwargs):
        raise RuntimeError("planted")

    writer = types.SimpleNamespace(add_text=fail)
    trackio = types.SimpleNamespace(log=fail, Table=lambda dataframe: dataframe)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(run=1, Table=fail, log=fail))
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    instruments = Instruments(Accelerator(cpu=tiny.DEVICE == "cpu"), str(tmp_path), ["wandb", "trackio"])
    instruments.begin(0)
    for step in (1, 2):
        assert "alp/kl/k3" in record(instruments, gaps(0.02)).flush(step, writer)
    for tracker in ("wandb", "trackio", "tensorboard"):
        assert caplog.text.count(f"could not be shown in {tracker} (RuntimeError('planted'))") == 1
    assert envelope_of(tmp_path)["step"].unique().tolist() == [1, 2]


@pytest.mark.parametrize("watched", ["alp", "stock"])
def test_no_file_is_written_where_none_is_wanted(tmp_path, watched):
    if watched == "alp":
        trainer = tiny.trainer(tmp_path, alp_log_files=False)
    else:
        trainer = instrument(stock(tmp_path), alp_log_files=False)
    trainer.train()
    assert "alp/kl/k3" in trainer.state.log_history[0] and not (tmp_path / "alp").exists()


def test_a_log_that_would_begin_in_the_middle_gets_its_beginning(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2}
    stock(tmp_path / "first", max_steps=2, **settings).train()
    checkpoint = str(tmp_path / "first" / "checkpoint-2")
    resumed = instrument(stock(tmp_path / "second", max_steps=3, **settings))
    resumed.train(resume_from_checkpoint=checkpoint)
    assert lines(tmp_path / "second") == json.loads(json.dumps(resumed.state.log_history))
    assert [row["step"] for row in lines(tmp_path / "second")] == [1, 2, 3, 3]


def test_pushing_to_the_hub_is_said_to_take_the_log_along(tmp_path, monkeypatch, caplog):
    for log_files in (True, False):
        caplog.clear()
        trainer = stock(tmp_path)
        trainer.args.push_to_hub = True
        instrument(trainer, alp_log_files=log_files)
        assert ("push_to_hub=True uploads `output_dir/alp/`" in caplog.text) == log_files


def test_the_log_may_hold_tensors_and_numbers_of_numpy(tmp_path):
    import numpy as np

    instruments = instruments_at(tmp_path, log_files=True)
    instruments.append({"step": 1, "a": torch.tensor(1.5), "b": np.float32(2.5), "c": torch.zeros(2)})
    assert lines(tmp_path) == [{"step": 1, "a": 1.5, "b": 2.5, "c": "tensor([0., 0.])"}]


@pytest.mark.parametrize("logging", [{"logging_strategy": "epoch"}, {"logging_steps": 3}], ids=["epoch", "3 of 4"])
def test_whatever_the_logging_steps_all_that_is_logged_is_measured(tmp_path, logging):
    trainer = tiny.trainer(tmp_path, max_steps=4, train_dataset=tiny.prompts(4), **logging)  # 2 steps an epoch
    trainer.train()
    steps = [row["step"] for row in trainer.state.log_history if "alp/kl/k3" in row]
    assert steps == ([2, 4] if "logging_strategy" in logging else [3, 4])


@pytest.mark.parametrize("watched", ["alp", "stock"])
def test_a_window_without_any_token_is_no_error(tmp_path, monkeypatch, watched):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    ends = iter([1, 5])  # the end of a sequence, and a token that is not

    def one_token(completion_ids, logprobs):
        return [[end] for end in [next(ends)] * len(completion_ids)], logprobs

    settings = {"mask_truncated_completions": True, "max_completion_length": 1, "report_to": "tensorboard"}
    settings["rollout_func"] = tiny.rollout_func(edit=one_token)
    trainer = tiny.trainer(tmp_path, **settings) if watched == "alp" else instrument(stock(tmp_path, **settings))
    trainer.train()
    assert trainer.state.global_step == 2
    assert envelope_of(tmp_path)["step"].unique().tolist() == [1] and len(lines(tmp_path)) == 3


# ---- Where it is shown ----


def test_the_envelope_reaches_wandb_as_a_table(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    tiny.trainer(tmp_path, report_to="wandb", alp_monitor_every=1).train()
    shown = dict(wandb.run.summary["alp/envelope"])
    wandb.finish()
    envelope = envelope_of(tmp_path)
    rows = (envelope["step"] == 2).sum()
    assert (shown["_type"], shown["ncols"], shown["nrows"]) == ("table-file", len(COLUMNS), rows)


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
    instruments = Instruments(Accelerator(cpu=tiny.DEVICE == "cpu"), str(tmp_path), ["trackio"])
    instruments.begin(0)
    p = torch.zeros(2, 5, device=tiny.DEVICE)
    instruments.record("update", p, p - 0.1, torch.ones_like(p), staleness=0)
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


def test_log_probs_that_fsdp2_would_round_are_warned_about_with_the_documented_way_out(tmp_path, monkeypatch, caplog):
    trainer = stock(tmp_path)
    policy = torch.distributed.fsdp.MixedPrecisionPolicy(torch.bfloat16, output_dtype=torch.bfloat16)
    plugin = SimpleNamespace(mixed_precision_policy=policy)
    monkeypatch.setitem(vars(trainer.accelerator.state), "fsdp_plugin", plugin)
    instrument(trainer)
    assert caplog.text.count("casts what the model returns to output_dtype=torch.bfloat16") == 1
    assert f"`{plugin_lines()[1]}`" in caplog.text
    caplog.clear()
    exec("\n".join(["import dataclasses, torch", *plugin_lines()]), {"trainer": trainer})
    assert plugin.mixed_precision_policy.param_dtype == torch.bfloat16
    del trainer.instruments
    instrument(trainer)
    assert "output_dtype" not in caplog.text


def plugin_lines() -> list[str]:
    text = (Path(__file__).parent.parent / "docs" / "distributed.md").read_text()
    return re.findall(r"^plugin.*$", text, re.MULTILINE)


def test_evaluation_in_between_is_not_measured(tmp_path):
    rows = []
    for evaluating in ({}, {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": tiny.prompts(8)}):
        trainer = instrument(stock(tmp_path, per_device_eval_batch_size=8, **OFF_POLICY, **evaluating))
        trainer.train()
        rows.append([row for row in tiny.history(trainer) if "alp/kl/k3" in row])
    assert [row["alp/staleness"] for row in rows[1]] == [0, 1, 0, 1]
    assert rows[0][0]["alp/perplexity/policy"] == rows[1][0]["alp/perplexity/policy"]


def test_tool_output_stays_out_of_stock_metrics(tmp_path):
    def tool_output_first(batch, trainer):
        output = tiny.rollout_func(0.0)(batch, trainer)
        output["env_mask"] = [[0] + [1] * (len(ids) - 1) for ids in output["completion_ids"]]
        for row in output["logprobs"]:
            row[0] -= 50.0
        return output

    trainer = instrument(stock(tmp_path, rollout_func=tool_output_first, steps_per_generation=2))
    trainer.train()
    assert abs(trainer.state.log_history[0]["alp/token/log_ratio/max"]) < 1
    assert abs(trainer.state.log_history[0]["alp/old/token/log_ratio/max"]) < 1


def test_nothing_is_kept_of_a_loss_that_fails(tmp_path, monkeypatch):
    trainer = stock(tmp_path)
    score = trainer._get_per_token_logps_and_entropies

    def failing(model, inputs):
        score(model, inputs["completion_ids"], torch.ones_like(inputs["completion_ids"]), 2)
        raise MemoryError

    monkeypatch.setattr(trainer, "_compute_loss", failing)
    instrument(trainer)
    with pytest.raises(MemoryError):
        trainer.train()
    (watcher,) = [c for c in trainer.callback_handler.callbacks if hasattr(c, "watch_loss")]
    assert watcher._loss is None


def test_a_loss_that_does_not_score_is_warned_about_and_trains(tmp_path, monkeypatch, caplog):
    trainer = stock(tmp_path)
    weight = trainer.model.lm_head.weight
    monkeypatch.setattr(trainer, "_compute_loss", lambda model, inputs: weight.sum())
    instrument(trainer).train()
    assert trainer.state.global_step == 2
    assert caplog.text.count("does not score the policy as GRPOTrainer's does") == 1


# ---- Health ----


def instruments_at(folder, **kwargs):
    settings = {"log_files": False} | kwargs
    instruments = Instruments(Accelerator(cpu=tiny.DEVICE == "cpu"), str(folder), [], **settings)
    instruments.begin(0)
    return instruments


def record(instruments, gap, staleness=0, policy="update", engine=True):
    gap = gap.to(tiny.DEVICE)
    q = torch.full_like(gap, -1.0)
    instruments.record(policy, q + gap, q, torch.ones_like(gap), staleness, engine=engine)
    return instruments


def gaps(std, mean=0.0, rows=64):
    return mean + std * torch.randn(rows, 64, generator=torch.Generator().manual_seed(0))


def heavy_tail(share, size):
    gap = torch.zeros(64, 64)
    gap.view(-1)[: int(share * gap.numel())] = size
    return gap


CROSSINGS = {
    "fresh/token/mult_prob_error": (gaps(0.08, mean=0.003), "above 1.05"),
    "fresh/kl/k1": (gaps(0.01, mean=-0.02), "above 0.01"),
    "fresh/kl/k1 ": (gaps(0.01, mean=0.02), "below -0.01"),
    "unscored_share": (torch.where(torch.arange(64) < 8, math.nan, 0.0).expand(64, 64), "above 0.1"),
    "kl/k1": (gaps(0.1, mean=-0.2), "above 0.1"),
    "kl/k1 ": (gaps(0.1, mean=0.2), "below -0.1"),
    "token/ess": (torch.cat([torch.full((54, 64), -4.0), torch.full((10, 64), -0.1)]), "below 0.3"),
    "token/chi2": (heavy_tail(0.02, 2.4), "above 1"),
}


@pytest.mark.parametrize("metric", CROSSINGS)
def test_a_crossed_bound_is_warned_about_once_with_its_source_and_a_way_out(tmp_path, caplog, metric):
    gap, side = CROSSINGS[metric]
    metric = metric.strip()
    (bound, *_) = [b for b in FRESH_HEALTH + UNSCORED_HEALTH + UPDATE_HEALTH if b.metric == metric]
    instruments = instruments_at(tmp_path)
    staleness = 3 if bound in UPDATE_HEALTH else 0
    record(instruments, gap, staleness).flush(1)
    assert len(re.findall(rf"alp/{metric}=\S+ is {side} \({re.escape(bound.source)}\)", caplog.text)) == 1
    assert "trl-alp doctor" in caplog.text
    advice = {FRESH_HEALTH: "These rollouts are fresh", UNSCORED_HEALTH: "left out of the ratio"}
    assert next((text for bounds, text in advice.items() if bound in bounds), "take fewer updates") in caplog.text
    record(instruments, gap, staleness).flush(2)
    assert len(caplog.records) == 1


def test_a_healthy_run_is_not_warned_about(tmp_path, caplog):
    record(instruments_at(tmp_path), gaps(0.02)).flush(1)
    assert not caplog.records


def test_several_bounds_crossed_at_once_make_one_warning(tmp_path, caplog):
    record(instruments_at(tmp_path), gaps(1.5), staleness=2).flush(1)
    (warning,) = caplog.records
    assert warning.getMessage().count("verl") >= 2


def test_bounds_on_the_engine_look_at_the_fresh_rollouts_of_a_mixed_window(tmp_path, caplog):
    record(instruments_at(tmp_path), gaps(0.08, mean=-0.02), staleness=3).flush(1)
    assert not caplog.records  # drift of this size is what updates do
    instruments = record(instruments_at(tmp_path / "mixed"), gaps(0.02), staleness=3)
    metrics = record(instruments, gaps(0.2), staleness=0).flush(1)
    assert "alp/fresh/token/mult_prob_error" in caplog.text
    assert metrics["alp/fresh/token/mult_prob_error"] > metrics["alp/token/mult_prob_error"] > 1.05
    assert metrics["alp/staleness"] == 1.5


def test_the_update_is_looked_at_beside_a_healthy_engine(tmp_path, caplog):
    instruments = record(instruments_at(tmp_path), gaps(0.001), policy="old")
    record(instruments, gaps(0.3, mean=-0.5), staleness=3).flush(1)
    (warning,) = caplog.records
    assert "alp/kl/k1=0.5" in warning.getMessage() and "fresh" not in warning.getMessage()


def test_noise_is_not_taken_for_a_fault_of_the_engine(tmp_path, caplog):
    record(instruments_at(tmp_path, perturbed=True), gaps(0.08)).flush(1)
    assert not caplog.records
    instruments = record(instruments_at(tmp_path, perturbed=True), gaps(0.08))
    record(instruments, gaps(0.08), policy="noise_off").flush(1)
    (warning,) = caplog.records
    assert "alp/noise_off/fresh/token/mult_prob_error" in warning.getMessage()
    caplog.clear()
    record(instruments_at(tmp_path, perturbed=True), gaps(0.1, mean=-0.2)).flush(1)
    assert "The noise is part of it; `alp_monitor_every=10`" in caplog.text
    caplog.clear()
    record(instruments_at(tmp_path, perturbed=True, monitored=True), gaps(0.1, mean=-0.2)).flush(1)
    assert "kl/k1" in caplog.text and "alp_monitor_every" not in caplog.text


@pytest.mark.parametrize(
    ("noise", "said"),
    [(0.001, "too small to act: raise"), (0.02, "of the size"), (0.3, "larger than what it is to cover")],
)
def test_the_size_of_the_noise_beside_the_mismatch_is_said_once(tmp_path, caplog, noise, said):
    instruments = instruments_at(tmp_path, perturbed=True, monitored=True)
    for step in (1, 2):
        gap, plain = gaps(0.03), gaps(0.02)
        delta = gaps(noise)
        means = {"noise/kl/k3": (delta.expm1() - delta, torch.ones_like(delta))}
        q = torch.full_like(gap, -1.0)
        instruments.record("update", q + gap, q, torch.ones_like(gap), 0, means)
        instruments.record("noise_off", q + plain, q, torch.ones_like(gap), 0)
        instruments.flush(step)
    assert caplog.text.count("times as much as the engine is off") == 1 and said in caplog.text


def test_few_tokens_and_a_policy_without_an_engine_say_nothing_of_the_noise(tmp_path, caplog):
    for rows, engine in ((4, True), (64, False)):
        instruments = instruments_at(tmp_path, perturbed=True, monitored=True)
        gap = gaps(0.02, rows=rows)
        q, ones = torch.full_like(gap, -1.0), torch.ones_like(gap)
        for policy in ("update", "noise_off"):
            instruments.record(policy, q + gap, q, ones, 0, {"noise/kl/k3": (gap.square(), ones)}, engine)
        instruments.flush(1)
    assert "the engine is off" not in caplog.text


def test_an_infinite_log_prob_is_left_out_of_the_fresh_metrics_too(tmp_path):
    gap = gaps(0.01)
    whole = record(instruments_at(tmp_path), gap).flush(1)
    gap[0, 0] = math.inf
    partly = record(instruments_at(tmp_path), gap).flush(1)
    assert partly["alp/unscored_tokens"] == 1
    for name in ("kl/k1", "kl/k3", "token/mult_prob_error"):
        assert partly[f"alp/fresh/{name}"] == pytest.approx(partly[f"alp/{name}"])
        assert partly[f"alp/fresh/{name}"] == pytest.approx(whole[f"alp/fresh/{name}"], rel=0.2)


def test_tokens_without_a_log_prob_are_told_of_whatever_the_noise(tmp_path, caplog):
    few = torch.where(torch.arange(64) < 8, math.nan, 0.0).expand(64, 64)
    record(instruments_at(tmp_path, perturbed=True), few, staleness=2).flush(1)
    (warning,) = caplog.records
    assert "alp/unscored_share=0.125 is above 0.1" in warning.getMessage()
    assert "left out of the ratio" in warning.getMessage()


def test_a_policy_that_disagrees_with_itself_is_told_of_dropout_and_not_of_an_engine(tmp_path, caplog):
    record(instruments_at(tmp_path), gaps(0.3), engine=False).flush(1)
    assert "`disable_dropout=True`" in caplog.text and "engine's" not in caplog.text


def test_few_tokens_are_not_judged(tmp_path, caplog):
    record(instruments_at(tmp_path), gaps(0.3, rows=4)).flush(1)
    record(instruments_at(tmp_path), torch.full((4, 64), math.nan)).flush(1)
    assert not caplog.records


def test_a_run_whose_engine_is_off_is_warned_about(tmp_path, caplog):
    settings = {"alp_enabled": False, "per_device_train_batch_size": 128, "steps_per_generation": 2}
    settings["train_dataset"] = tiny.prompts(128)
    tiny.trainer(tmp_path, rollout_func=tiny.rollout_func(0.5), logging_steps=2, **settings).train()
    assert "NeMo-RL" in caplog.text
    caplog.clear()
    tiny.trainer(tmp_path, **settings).train()
    assert "NeMo-RL" not in caplog.text


def test_dropout_without_an_engine_is_named(tmp_path, caplog):
    from peft import LoraConfig

    lora = LoraConfig(r=4, lora_dropout=0.5, init_lora_weights=False, target_modules="all-linear")
    settings = {"per_device_train_batch_size": 128, "steps_per_generation": 2, "train_dataset": tiny.prompts(128)}
    instrument(stock(tmp_path, peft_config=lora, **settings)).train()
    assert "`lora_dropout=0`" in caplog.text and "the inference engine's" not in caplog.text


def test_metrics_without_value_are_left_out_and_cross_nothing(tmp_path, caplog):
    instruments = record(instruments_at(tmp_path), torch.full((2, 3), math.nan))
    metrics = instruments.flush(1)
    assert metrics["alp/unscored_tokens"] == 6 and "alp/kl/k1" not in metrics
    assert "kl/k1" not in caplog.text
