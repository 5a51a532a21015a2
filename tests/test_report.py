"""The report, on logs made up here."""

import json
import math
import random
import re
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib import image

from trl_alp.report import _FIGURES, main, report


PERCENTILES = {"p02": -1.0, "p25": -0.3, "p50": 0.0, "p75": 0.3, "p98": 1.0, "min": -3.0, "max": 3.0}
STOCK = ("reward", "entropy", "grad_norm", "loss", "completions/mean_length", "clip_ratio/low_mean")


def log(steps=60, seed=0, reward=None):
    """Rows with every key that the report draws."""
    draw = np.random.default_rng(seed)
    rows = []
    for step in range(1, steps + 1):
        noise = draw.uniform(0.9, 1.1)
        row = {"step": step, "reward": step / steps * noise, "entropy": noise, "grad_norm": noise, "loss": 0.1}
        row |= {
            "eval_reward": noise,
            "completions/mean_length": 9 * noise,
            "kl": 0.1 * noise,
            "alp/kl/k3": 0.1 * noise,
        }
        row |= {"alp/kl/k1": 0.1 * (noise - 0.95), "alp/ess": 0.9 * noise, "alp/staleness": step % 8}
        row |= {"clip_ratio/low_mean": 0.01, "alp/clip/low": 0.01, "alp/clip/high": 0.02, "alp/clip/dual": 0.0}
        row |= {"sampling/sampling_logp_difference/mean": 0.01, "alp/sigma/mean": 0.01}
        row |= {"alp/noise/effective/min": 0.9, "alp/sigma/layer_00": 0.01, "alp/sigma/layer_01": 0.02 * noise}
        prefixes = {"alp": 1, "alp/token": 0.9, "alp/sequence": 2, "alp/old/token": 0.2}
        if step % 4 == 0:
            prefixes |= {"alp/noise_off": 0.5}
        for prefix, size in prefixes.items():
            row |= {f"{prefix}/log_ratio/{p}": size * value * noise for p, value in PERCENTILES.items()}
        if reward is not None:
            row["reward"] = reward(step)
        rows.append(row)
    return rows


def fabricate(path, rows, envelope=(), end="\n", name="alp/metrics.jsonl"):
    """A run directory with `rows` as its log and envelope files for the steps `envelope`."""
    (path / "alp").mkdir(parents=True, exist_ok=True)
    if name == "alp/metrics.jsonl":
        (path / name).write_text("\n".join(map(json.dumps, rows)) + end)
    else:
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(json.dumps({"log_history": rows}))
    edges = [0, 0.01, 0.1, 0.5, 0.9, 1]
    for step in envelope:
        bins = [
            {"step": step, "policy": policy, "probability_low": low, "probability_high": high, "tokens": 100}
            | {p: value * (1.1 - high) for p, value in PERCENTILES.items()}
            for policy in ("update", "noise_off", "old")
            for low, high in pairwise(edges)
        ]
        with open(path / "alp" / "envelope.jsonl", "a") as file:
            file.writelines(json.dumps(one) + "\n" for one in bins)
    return path


def only(rows, *keys):
    """The rows with the keys that begin with one of `keys`."""
    return [{key: row[key] for key in row if key.startswith(("step", *keys))} for row in rows]


def stock(rows):
    return only(rows, *STOCK)


def drawn(page):
    return {path.stem for path in page.parent.glob("*.png")}


ALL = {name for figures in _FIGURES.values() for name, *_ in figures}


@pytest.fixture(scope="module")
def full_page(tmp_path_factory):
    """The report on one run that has everything."""
    run = fabricate(tmp_path_factory.mktemp("full") / "run", log(), envelope=(1, 30, 60))
    page = report([run])
    assert page == run / "report" / "index.html"
    return page


def test_every_figure_is_on_the_page_and_a_png_file(full_page):
    page = full_page
    assert drawn(page) == ALL
    assert set(re.findall(r'<figure id="(\w+)"', page.read_text())) == ALL
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in page.parent.glob("*.png"))
    assert "Nothing." in page.read_text()  # missing


def test_the_page_refers_to_nothing_outside_itself(full_page):
    text = full_page.read_text()
    targets = re.findall(r"""(?:src|href|srcset|action)\s*=\s*["']([^"']*)|url\(([^)]*)\)""", text)
    targets = [a or b for a, b in targets]
    assert targets  # glyphs and clip paths of the figures
    assert all(target.strip("\"'").startswith(("#", "data:")) for target in targets)
    assert not re.search(r"@import|<script|<link|<iframe", text)
    names = set(re.findall(r'href="#([^"]+)"', text))
    assert names <= set(re.findall(r'id="([^"]+)"', text))


def test_a_stock_run_gives_the_figures_of_its_keys_and_a_note_for_each_other(tmp_path):
    page = report([fabricate(tmp_path / "run", stock(log()), name="checkpoint-60/trainer_state.json")])
    assert drawn(page) == {"reward", "entropy", "grad_norm", "length", "clip_low"}
    text = page.read_text()
    for figures in _FIGURES.values():
        for name, _, _, keys, *_ in figures:
            assert (f"<code>{keys[0]}</code>" in text) == (name not in drawn(page)), name
    assert "no collapse" in text and "nan" not in text


def test_a_column_that_one_run_lacks_is_noted_with_its_name(tmp_path):
    fabricate(tmp_path / "alp", only(log(), "reward", "alp/ess"))
    fabricate(tmp_path / "stock", only(log(), "reward"))
    text = report([tmp_path / "alp", tmp_path / "stock"], tmp_path / "out").read_text()
    assert re.search(rf"Effective sample size: not in {tmp_path}/stock \(<code>alp/ess</code>", text)


def test_seeds_are_drawn_as_their_mean_with_a_shade(tmp_path):
    for directory, value in (("a_seed1", 1.0), ("a-seed2", 3.0), ("b", 1.0)):
        fabricate(tmp_path / directory, only(log(30, reward=lambda step, value=value: value), "reward"))
    text = report([tmp_path / "a_seed1", tmp_path / "a-seed2", tmp_path / "b"], tmp_path / "out").read_text()
    assert "3 runs, 2 settings" in text and "mean of 2 seeds" in text
    assert re.search(r"<td>2<small>1 to 3</small></td>", text)
    apart = report([tmp_path / "a_seed1", tmp_path / "b"], tmp_path / "apart").read_text()
    assert text.count("fill-opacity: 0.2") == 1 and "fill-opacity: 0.2" not in apart


@pytest.mark.parametrize(
    ("directories", "settings"),
    [
        (("alp/seed_1", "alp/seed-2", "bypass/seed1"), ["alp", "alp", "bypass"]),
        (("x/alp_seed1", "y/alp_seed1"), ["x/alp", "y/alp"]),
        (("linseed1", "linseed2"), ["linseed1", "linseed2"]),
    ],
)
def test_runs_are_seeds_of_one_setting_where_their_paths_differ_in_the_seed_alone(tmp_path, directories, settings):
    from trl_alp.report import _settings

    assert _settings([tmp_path / directory for directory in directories]) == settings


def test_labels_override_the_grouping(tmp_path):
    paths = [fabricate(tmp_path / name, only(log(), "reward")) for name in ("a_seed1", "a_seed2", "b")]
    assert "3 settings" in report(paths, tmp_path / "out", ["x", "y", "z"]).read_text()
    assert "1 setting<" in report(paths, tmp_path / "out", ["x", "x", "x"]).read_text()
    with pytest.raises(ValueError, match="2 labels for 3 runs"):
        report(paths, tmp_path / "out", ["x", "y"])


def test_after_a_resume_the_later_row_wins_and_the_abandoned_steps_are_gone(tmp_path):
    def values(step, value):
        return {"step": step, "reward": value}

    first = [values(step, 100.0) for step in range(1, 31)]
    again = [values(step, 1.0) for step in range(1, 26)]
    text = report([fabricate(tmp_path / "run", first + again)]).read_text()
    assert "30 steps of the earlier attempt are left out" in text
    assert "<td>25</td><td>1</td><td>1</td>" in text  # last step, final and best reward


def test_values_that_are_not_finite_are_left_out_and_counted(tmp_path):
    rows = only(log(), "grad_norm", "alp/kl/k3", "alp/token")
    for row in rows[10:13]:
        row |= {"grad_norm": math.nan, "alp/kl/k3": math.inf, "alp/token/log_ratio/p98": math.nan}
    page = report([fabricate(tmp_path / "run", rows)])
    text = page.read_text()
    assert text.count("3 of 60 values are not finite") == 3
    assert drawn(page) == {"grad_norm", "kl_k3", "ratio_token"} and not re.search(r"\b(nan|inf)\b", text)


@pytest.mark.parametrize(
    ("reward", "verdict"),
    [
        (lambda step: min(step, 60) / 60, "no collapse"),
        (lambda step: step / 60 if step < 60 else 0.1, "collapsed"),
        (lambda step: random.Random(step).random(), "no collapse"),  # noise
        (lambda step: 0.8 - 1e-4 * step, "no collapse"),  # small
        (lambda step: step / 60 if step < 90 else math.nan, "diverged (reward)"),
    ],
)
def test_the_verdict_tells_a_collapse_from_noise(tmp_path, reward, verdict):
    text = report([fabricate(tmp_path / "run", only(log(100, reward=reward), "reward"))]).read_text()
    assert re.search(r'<td class="(?:bad|good)">([^<]*)</td>', text)[1] == verdict


def test_a_short_run_gets_no_verdict(tmp_path):
    assert "too short to tell" in report([fabricate(tmp_path / "run", only(log(19), "reward"))]).read_text()


@pytest.mark.parametrize("steps", [1, 2])
def test_a_run_of_few_points_is_drawn(tmp_path, steps):
    page = report([fabricate(tmp_path / "run", only(log(steps), "reward", "alp/token", "alp/sigma"))])
    assert drawn(page) == {"reward", "ratio_token", "sigma"}
    for name in drawn(page):  # a line of one point is invisible without a marker
        panel = image.imread(page.parent / f"{name}.png")[:, :700, :3]  # without sigma's colour bar
        assert (np.ptp(panel, axis=-1) > 0.3).any(), name


def test_a_half_written_last_line_is_noted_and_the_rest_is_read(tmp_path):
    text = report([fabricate(tmp_path / "run", only(log(30), "reward"), end='\n{"step": 31, "rew')]).read_text()
    assert "1 line(s) of alp/metrics.jsonl are not JSON" in text and "<td>30</td>" in text


def test_a_half_written_line_of_the_envelope_is_noted_and_the_rest_is_drawn(tmp_path):
    run = fabricate(tmp_path / "run", only(log(), "reward"), envelope=(1, 60))
    with open(run / "alp" / "envelope.jsonl", "a") as file:
        file.write('{"step": 61, "pol')
    page = report([run])
    assert "1 line(s) of alp/envelope.jsonl are not JSON" in page.read_text() and "probability" in drawn(page)


def test_envelope_files_of_earlier_versions_are_drawn_and_broken_ones_noted(tmp_path):
    run = fabricate(tmp_path / "run", only(log(), "reward"), envelope=(1, 60))
    lines = run / "alp" / "envelope.jsonl"
    full = pd.read_json(lines, lines=True)
    lines.unlink()
    for step, table in full.groupby("step"):
        table.to_parquet(run / "alp" / f"envelope_{step:08d}.parquet", index=False)
    full.head(0).to_parquet(run / "alp" / "envelope_00000002.parquet")
    (run / "alp" / "envelope_00000003.parquet").touch()
    (run / "alp" / "envelope_00000004.parquet").write_bytes(b"PAR1 half")
    page = report([run])
    assert "2 envelope file(s) cannot be read" in page.read_text() and "probability" in drawn(page)


def test_a_key_with_no_positive_value_leaves_no_empty_log_axis(tmp_path):
    rows = [row | {"alp/kl/k3": 0.0, "alp/kl/k1": 0.0} for row in only(log(), "reward")]
    page = report([fabricate(tmp_path / "run", rows)])
    assert "kl_k3" not in drawn(page) and "KL to the behaviour policy, k3: nothing to draw" in page.read_text()


def test_the_ratio_in_the_loss_is_not_drawn_twice(tmp_path):
    rows = [row | {f"alp/log_ratio/{p}": row[f"alp/token/log_ratio/{p}"] for p in PERCENTILES} for row in log()]
    rows = only(rows, "alp/log_ratio", "alp/token")
    assert "ratio_loss" not in drawn(report([fabricate(tmp_path / "run", rows)]))


def test_names_are_escaped_on_the_page_and_in_figures(tmp_path):
    name = r"_<b onclick=alert(1)>&\"$\frac$"
    labels = [name, name + "2"]
    paths = [fabricate(tmp_path / n, only(log(), "reward", "alp/sigma"), end="\n{") for n in ("<i>a", "b")]
    text = report(paths, tmp_path / "out", labels).read_text()
    assert "<b onclick" not in text and "<i>a" not in text and "&lt;b onclick=alert(1)&gt;&amp;" in text


def test_an_earlier_reports_figures_do_not_stay(tmp_path):
    run = fabricate(tmp_path / "run", only(log(), "reward", "alp/ess"))
    assert "ess" in drawn(report([run]))
    fabricate(run, only(log(), "reward"))
    assert "ess" not in drawn(report([run]))


def test_the_newest_readable_trainer_state_is_taken(tmp_path):
    run = fabricate(tmp_path / "run", only(log(30), "reward"), name="trainer_state.json")
    fabricate(run, only(log(90), "reward"), name="checkpoint-90/trainer_state.json")
    fabricate(run, only(log(10), "reward"), name="checkpoint-100/trainer_state.json")
    (run / "checkpoint-100" / "trainer_state.json").write_text('{"log_hist')
    text = report([run]).read_text()
    assert "checkpoint-90/trainer_state.json" in text and "<td>90</td>" in text
    assert "checkpoint-100/trainer_state.json holds no readable log" in text


def test_tensorboard_events_are_read_with_the_trainers_names(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    for number, steps in enumerate((range(1, 41), range(21, 61))):
        writer = SummaryWriter(tmp_path / "runs" / f"life{number}", filename_suffix=str(number))
        for step in steps:
            writer.add_scalar("train/reward", number + 1.0, step)
            writer.add_scalar("train/alp/ess", 0.5, step)
            writer.add_scalar("eval/reward", 0.5, step)
        writer.close()
        time.sleep(1.1)  # the file's name has its time in seconds
    page = report([tmp_path], tmp_path / "out")
    assert drawn(page) == {"reward", "ess", "eval_reward"}
    assert "<td>60</td><td>2</td>" in page.read_text() and "tensorboard events" in page.read_text()


def test_a_directory_without_a_log_is_an_error_that_names_it_and_a_note_beside_others(tmp_path, capsys):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match=r"nothing holds no log.*save_state"):
        report([tmp_path / "nothing"])
    with pytest.raises(SystemExit) as exit_:
        main([str(tmp_path / "nothing")])
    assert exit_.value.code == 1 and "nothing holds no log" in capsys.readouterr().err
    run = fabricate(tmp_path / "run", only(log(), "reward"))
    assert "nothing holds no log" in report([run, tmp_path / "nothing"], tmp_path / "out").read_text()


def test_fifty_runs_are_drawn_and_stay_a_page(tmp_path):
    paths = [
        fabricate(tmp_path / f"run{i:02d}", only(log(20 + i, seed=i), "reward", "alp/token", "alp/sigma"))
        for i in range(50)
    ]
    page = report(paths, tmp_path / "out")
    text = page.read_text()
    assert "show 12 of the 50" in text and "run49" in text
    facets = text[text.index('<figure id="ratio_token"') :]
    assert float(re.search(r'viewBox="0 0 [\d.]+ ([\d.]+)"', facets)[1]) < 4 * 210 + 10  # points, in rows of three
    assert len(text) < 20e6


def test_the_command_of_the_docs_makes_a_page_of_two_settings_with_two_seeds(tmp_path, monkeypatch):
    text = (Path(__file__).parent.parent / "docs" / "report.md").read_text()
    (words,) = map(str.split, re.findall(r"^python -m trl_alp.report (.*)$", text, re.MULTILINE))
    runs, output = words[: words.index("--output")], words[-1]
    for run in runs:
        fabricate(tmp_path / run, stock(log()))
    monkeypatch.chdir(tmp_path)
    main(words)
    page = (tmp_path / output / "index.html").read_text()
    assert "2 settings" in page and page.count("mean of 2 seeds") == 2
