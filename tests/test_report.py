"""The report, on logs made up here."""

import json
import math
import random
import re
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib import image

from trl_alp.report import report
from trl_alp.report.__main__ import main
from trl_alp.report.figures import FIGURES


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
        row |= {"alp/kl/k1": 0.1 * (noise - 0.95), "alp/token/ess": 0.9 * noise, "alp/staleness": step % 8}
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


ALL = {name for figures in FIGURES.values() for name, *_ in figures}


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
    for figures in FIGURES.values():
        for name, _, _, keys, *_ in figures:
            assert (f"<code>{keys[0]}</code>" in text) == (name not in drawn(page)), name
    assert "no collapse" in text and "nan" not in text


def test_a_column_that_one_run_lacks_is_noted_with_its_name(tmp_path):
    fabricate(tmp_path / "alp", only(log(), "reward", "alp/token/ess"))
    fabricate(tmp_path / "stock", only(log(), "reward"))
    text = report([tmp_path / "alp", tmp_path / "stock"], tmp_path / "out").read_text()
    assert re.search(rf"Effective sample size of tokens: not in {tmp_path}/stock \(<code>alp/token/ess</code>", text)


def test_seeds_are_drawn_as_their_mean_with_a_shade(tmp_path):
    for directory, value in (("a_seed1", 1.0), ("a-seed2", 3.0), ("b", 1.0)):
        fabricate(tmp_path / directory, only(log(30, reward=lambda step, value=value: value), "reward"))
    text = report([tmp_path / "a_seed1", tmp_path / "a-seed2", tmp_path / "b"], tmp_path / "out").read_text()
    assert "3 runs, 2 settings" in text and "2 seeds" in text
    assert ">2<small>± 13</small></td>" in text  # 12.7 standard errors with one degree of freedom
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
    from trl_alp.report.reading import name_settings as _settings

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
    rows = only(log(), "grad_norm", "alp/kl/k3", "alp/token/log_ratio")
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
    page = report([fabricate(tmp_path / "run", only(log(steps), "reward", "alp/token/log_ratio", "alp/sigma"))])
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
    rows = only(rows, "alp/log_ratio", "alp/token/log_ratio")
    assert "ratio_loss" not in drawn(report([fabricate(tmp_path / "run", rows)]))


def test_names_are_escaped_on_the_page_and_in_figures(tmp_path):
    name = r"_<b onclick=alert(1)>&\"$\frac$"
    labels = [name, name + "2"]
    paths = [fabricate(tmp_path / n, only(log(), "reward", "alp/sigma"), end="\n{") for n in ("<i>a", "b")]
    text = report(paths, tmp_path / "out", labels).read_text()
    assert "<b onclick" not in text and "<i>a" not in text and "&lt;b onclick=alert(1)&gt;&amp;" in text


def test_an_earlier_reports_figures_do_not_stay(tmp_path):
    run = fabricate(tmp_path / "run", only(log(), "reward", "alp/token/ess"))
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
            writer.add_scalar("train/alp/token/ess", 0.5, step)
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
    assert main([str(tmp_path / "nothing")]) == 2 and "nothing holds no log" in capsys.readouterr().err
    run = fabricate(tmp_path / "run", only(log(), "reward"))
    assert "nothing holds no log" in report([run, tmp_path / "nothing"], tmp_path / "out").read_text()
    assert main([str(run), str(tmp_path / "nothing"), "--output", str(tmp_path / "out")]) == 1
    assert "left out: " in capsys.readouterr().err


@pytest.mark.slow
def test_fifty_runs_are_drawn_and_stay_a_page(tmp_path):
    paths = [
        fabricate(tmp_path / f"run{i:02d}", only(log(20 + i, seed=i), "reward", "alp/token/log_ratio", "alp/sigma"))
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
    (words,) = map(str.split, re.findall(r"^trl-alp report (.*)$", text, re.MULTILINE))
    runs, output = words[: words.index("--output")], words[-1]
    for run in runs:
        fabricate(tmp_path / run, stock(log()))
    monkeypatch.chdir(tmp_path)
    assert main(words) == 0
    page = (tmp_path / output / "index.html").read_text()
    assert "2 settings" in page and page.count("<small>2 seeds</small>") == 2


# ---- Right ----


def curves(monkeypatch):
    """What is plotted, by the title of the figure."""
    from matplotlib.axes import Axes

    seen, plot = [], Axes.plot

    def watch(axis, x, y, *args, **kwargs):
        seen.append((axis, np.asarray(y, float)))
        return plot(axis, x, y, *args, **kwargs)

    monkeypatch.setattr(Axes, "plot", watch)
    return seen


def test_kl_is_averaged_before_zeros_are_drawn_at_a_floor(tmp_path, monkeypatch):
    """A run that is zero half of the time has the smaller mean, and is drawn below the other."""
    half = [{"step": step, "alp/kl/k3": 0.05 * (step % 2)} for step in range(1, 501)]
    steady = [{"step": step, "alp/kl/k3": 0.03} for step in range(1, 501)]
    seen = curves(monkeypatch)
    report([fabricate(tmp_path / name, rows) for name, rows in (("half", half), ("steady", steady))], tmp_path / "out")
    first, second = (y for axis, y in seen if axis.get_title(loc="left").startswith("KL to the behaviour policy, k3"))
    assert first.mean() == pytest.approx(0.025, rel=0.02) and second.mean() == pytest.approx(0.03)
    zeros = [{"step": step, "alp/kl/k3": 0.1 if step > 250 else 0.0} for step in range(1, 501)]
    seen.clear()
    report([fabricate(tmp_path / "zeros", zeros)])
    (drawn_,) = (y for axis, y in seen if axis.get_title(loc="left").startswith("KL to the behaviour policy, k3"))
    assert (drawn_ > 0).all() and len(drawn_) > 300, "zeros are drawn at the floor, not left out"


def test_one_ess_is_on_the_page_and_named(full_page):
    text = full_page.read_text()
    assert "Effective sample size of tokens" in text and "min ESS of tokens" in text
    assert "<code>alp/ess</code>" not in text and "always wider" not in text


# ---- The answer ----


def test_intervals_and_differences_are_those_of_the_textbook():
    from trl_alp.report.answer import difference, interval

    # Student: mean 2, s = 1, n = 3, t = 4.303. Welch: 10.5 - 2, variances 0.5 / 2 and 1 / 3, 2.9 degrees of freedom.
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 4.303 / 3**0.5))
    mean, half = difference([10.0, 11.0], [1.0, 2.0, 3.0])
    assert mean == 8.5 and half == pytest.approx(4.303 * (0.25 + 1 / 3) ** 0.5)
    assert interval([1.0])[0] == 1.0 and math.isnan(interval([1.0])[1])
    assert math.isnan(difference([1.0], [2.0, 3.0])[1])


def test_the_answer_comes_first_with_what_differs_and_the_difference(tmp_path):
    for setting, rate in (("a", 1e-5), ("b", 1e-6)):
        for seed in (1, 2, 3):
            value = {"a": 0.5, "b": 0.7}[setting] + 0.01 * seed
            rows = only(log(30, reward=lambda step, value=value: value), "reward", "alp/kl", "eval_reward")
            rows[-1] |= {"train_runtime": 7200.0}
            run = fabricate(tmp_path / f"{setting}_seed{seed}", rows)
            config = {"learning_rate": rate, "seed": seed, "output_dir": str(run), "beta": 0.0, "hub_token": None}
            (run / "alp" / "config.json").write_text(json.dumps(config))
    paths = [tmp_path / f"{setting}_seed{seed}" for setting in "ab" for seed in (1, 2, 3)]
    text = report(paths, tmp_path / "out").read_text()
    answer = text[: text.index("</table>")]
    assert "<code>learning_rate=1e-05</code>" in answer and "<code>learning_rate=1e-06</code>" in answer
    assert not re.search("beta|seed=|output_dir", answer)
    assert ">0.52<small>± 0.025</small></td>" in answer and ">+0.2<small>± 0.023</small></td>" in answer
    assert answer.count(">2.0 h</td>") == 2 and answer.index("learning_rate") < text.index("<figure")


def test_arguments_that_only_one_kind_of_trainer_has_are_no_difference(tmp_path):
    for name, config in (
        ("alp", {"trainer": "ALPGRPOTrainer", "alp_sigma_init": 0.01, "beta": 0.1}),
        ("stock", {"trainer": "GRPOTrainer", "beta": 0.1}),
    ):
        run = fabricate(tmp_path / name, only(log(), "reward"))
        (run / "alp" / "config.json").write_text(json.dumps(config))
    text = report([tmp_path / "alp", tmp_path / "stock"], tmp_path / "out").read_text()
    assert "trainer=GRPOTrainer" in text and "alp_sigma_init" not in text


def test_what_matters_is_open_and_the_rest_and_what_is_flat_is_folded(full_page):
    text = full_page.read_text()
    shown = re.findall(r'<figure id="(\w+)"', text[: text.index("<h2>More")])
    assert shown == ["reward", "eval_reward", "length", "kl_k3", "ratio_token", "ess"]
    flat = text[text.index("Flat all along") :]
    assert {"clip_low", "clip_high", "clip_dual", "engine", "noise_effective"} == set(
        re.findall(r'<figure id="(\w+)"', flat)
    )


# ---- Legible ----


def contrast(one, other):
    from matplotlib.colors import to_rgb

    def luminance(colour):
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True)) + 0.05

    low, high = sorted((luminance(one), luminance(other)))
    return high / low


def test_every_line_has_a_contrast_of_3_on_a_light_and_on_a_dark_page(full_page):
    from trl_alp.report.drawing import COLOURS

    text = full_page.read_text()
    back = re.findall(r"--back: (#\w+)", text)[:2]
    assert len(set(back)) == 2
    strokes = set(re.findall(r"stroke: (#\w{6})", text)) | set(COLOURS)
    strokes -= {"#808080"}  # the grid
    assert len(strokes) > 3
    for page in back:
        faint = {colour: contrast(colour, page) for colour in strokes if contrast(colour, page) < 3}
        assert not faint
    lines_of_figures = re.findall(r'<path d="[^"]*" clip-path="[^"]*" style="fill: none; ([^"]*)"', text)
    assert lines_of_figures and not any(
        "stroke-opacity" in style and "#808080" not in style for style in lines_of_figures
    )


def test_runs_that_coincide_can_both_be_seen(tmp_path):
    from trl_alp.report.drawing import style

    settings = dict.fromkeys("abcd")
    widths = [style(settings, name)["linewidth"] for name in settings]
    assert widths == sorted(widths, reverse=True) and len(set(widths)) == 4
    assert len({style(settings, name)["linestyle"] for name in settings}) == 4


def test_tick_labels_are_plain_numbers(tmp_path):
    rows = [{"step": step, "entropy": 5.985 + 1e-5 * step} for step in range(1, 60)]
    page = report([fabricate(tmp_path / "run", rows)]).read_text()
    assert "5.985" in page and "+5.98" not in page


# ---- Large and broken ----


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "metrics.jsonl is empty"),
        (b"\x00\xff\x1f\x8b" * 50, "holds no line of JSON"),
        (b"[1, 2]\n3\n", "holds no line of JSON"),
        (b"[" * 100_000, "holds no line of JSON"),
    ],
)
def test_a_log_that_cannot_be_read_is_called_that(tmp_path, content, said, capsys):
    (tmp_path / "alp").mkdir()
    (tmp_path / "alp" / "metrics.jsonl").write_bytes(content)
    assert main([str(tmp_path)]) == 2
    printed = capsys.readouterr().err
    assert said in printed and "no alp/metrics.jsonl" not in printed and printed.count("\n") == 1


def test_a_folder_of_runs_lists_them(tmp_path, capsys):
    for name in ("b", "a"):
        fabricate(tmp_path / "runs" / name, only(log(), "reward"))
    assert main([str(tmp_path / "runs")]) == 2
    runs = tmp_path / "runs"
    assert f"holds no log, but runs lie below it: {runs / 'a'} {runs / 'b'}" in capsys.readouterr().err
    assert not (runs / "report").exists()


def test_an_output_that_cannot_be_written_is_told_before_the_work(tmp_path, monkeypatch, capsys):
    run = fabricate(tmp_path / "run", only(log(), "reward"))
    (tmp_path / "file").touch()
    monkeypatch.setattr("trl_alp.report.page.read", lambda *_: pytest.fail("a run was read"))
    assert main([str(run), "--output", str(tmp_path / "file")]) == 2
    assert re.fullmatch(r"trl-alp-report: --output .*file cannot be written to: [^\n]+\n", capsys.readouterr().err)
    assert main([str(tmp_path / "no" / "run")]) == 2 and not (tmp_path / "no").exists()


def test_integers_of_hundreds_of_digits_and_parquet_of_other_types_do_not_end_it(tmp_path):
    rows = only(log(), "reward", "grad_norm")
    rows[5]["grad_norm"] = 10**400
    run = fabricate(tmp_path / "run", rows)
    pd.DataFrame({"step": ["x", "y"], "policy": [1, 2], "tokens": [b"a", b"b"]}).to_parquet(
        run / "alp" / "envelope_00000001.parquet"
    )
    (run / "alp" / "config.json").write_bytes(b"\xff")
    text = report([run]).read_text()
    assert "1 of 60 values are not finite" in text and "1 envelope file(s) cannot be read" in text
    assert "alp/config.json cannot be read" in text


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for the memory")
def test_ten_thousand_steps_of_many_columns_stay_small(tmp_path):
    """In a process of its own, since memory is that of the whole process."""
    rows = log(50)
    keys = {f"alp/unknown/{i}": 0.123456789 for i in range(60)}
    (tmp_path / "run" / "alp").mkdir(parents=True)
    with open(tmp_path / "run" / "alp" / "metrics.jsonl", "w") as file:
        for step in range(1, 10_001):
            file.write(json.dumps(rows[step % 50] | keys | {"step": step}) + "\n")
    script = (
        "import re, sys; from trl_alp.report.__main__ import main; assert main(sys.argv[1:]) == 0; "
        "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "run")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 300 * 1024  # KiB
    assert (tmp_path / "run" / "report" / "index.html").stat().st_size < 3e6


def test_the_sample_of_the_docs_is_made_from_the_committed_logs(tmp_path, monkeypatch):
    docs = Path(__file__).parent.parent / "docs"
    monkeypatch.chdir(docs)
    pages = report(sorted(Path("samples").iterdir()), tmp_path), docs / "assets" / "sample_report" / "index.html"
    # All but the figures, of whose points other versions of matplotlib write other digits.
    answer, committed = (re.sub("(?s)<svg xmlns.*?</svg>", "", page.read_text()) for page in pages)
    assert answer == committed and "alp_enabled=False" in answer
    assert "<small>samples/alp_seed1<br>" in committed  # and no folder of the machine that made it
    assert "0.442<small>± 0.33" in answer and "0.447<small>± 0.3<" in answer
    assert "0.442 ± 0.33 against 0.447 ± 0.30" in (docs / "report.md").read_text()
