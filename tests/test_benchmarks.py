"""The benchmarks, run at tiny size: that they measure what they say, not how fast anything is."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent


def run(*command, cwd):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / command[0]), *command[1:]],
        capture_output=True, text=True, cwd=cwd, timeout=300, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "alp/" not in done.stderr  # health warnings of synthetic log-probs
    return done.stdout


@pytest.mark.slow
def test_update_benchmark_counts_the_forwards_and_the_memory_of_each_arm(tmp_path):
    printed = run(
        "update.py", "--models", "tiny", "--lengths", "48", "--rounds", "1", "--steps", "2", "--checkpointing", "off",
        "--json", "out.json", cwd=tmp_path,
    )  # fmt: skip
    rows = {row["arm"]: row for row in json.loads((tmp_path / "out.json").read_text())["rows"]}
    assert {arm: row["forwards"] for arm, row in rows.items()} == {
        "stock": 1, "stock, TRL correction": 2, "bypass": 1, "ALP stored": 1, "ALP recomputed": 1, "ALP torch": 1,
    }  # fmt: skip
    assert rows["ALP torch"]["kept_mb / bypass"] < 1.01 < rows["ALP stored"]["kept_mb / bypass"]
    for arm, row in rows.items():
        assert f"| {arm} |" in printed and 0 < row["update"] < row["step"]
    # Two timed steps of each arm, the first one left out.
    low, high = rows["bypass"]["update_quartiles"]
    assert low <= rows["bypass"]["update"] <= high


def test_every_noise_of_the_update_benchmark_runs_under_gradient_checkpointing(tmp_path):
    arms = ["ALP stored", "ALP recomputed", "ALP torch"]
    printed = run(
        "update.py", "--models", "tiny", "--lengths", "8", "--rounds", "1", "--steps", "1", "--checkpointing", "on",
        "--arms", *arms, cwd=tmp_path,
    )  # fmt: skip
    assert all(f"| {arm} |" in printed for arm in arms)


@pytest.mark.slow
def test_update_benchmark_sweeps_and_runs_on_two_processes(tmp_path):
    arguments = ["--models", "tiny", "--lengths", "16", "32", "--layers", "1", "3", "--arms", "bypass", "ALP torch"]
    arguments += ["--rounds", "1", "--steps", "1", "--checkpointing", "on", "--json", "out.json"]
    run("update.py", *arguments, cwd=tmp_path)
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [(row["layers"], row["length"]) for row in rows[::2]] == [(1, 16), (1, 32), (3, 16), (3, 32)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(ROOT / "benchmarks" / "update.py"), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "out.json").read_text())["environment"]["processes"] == 2


@pytest.mark.slow
def test_instruments_benchmark_prints_shares_of_the_step(tmp_path):
    printed = run(
        "instruments.py", "--layers", "1", "--hidden", "64", "--vocabulary", "100", "--length", "8", "--steps", "3",
        cwd=tmp_path,
    )  # fmt: skip
    assert [line.split()[0] for line in printed.splitlines()[-3:]] == ["forward", "recording", "flushing,"]
    assert printed.count("%") == 2


@pytest.mark.slow
def test_the_suite_of_the_update_benchmark_spends_spare_time_on_the_arms_that_are_compared(tmp_path):
    """With two tiny points in the place of the large ones."""
    script = ROOT / "benchmarks" / "update.py"
    code = (
        f"import sys; sys.path.insert(0, {str(script.parent)!r}); import update\n"
        "update.GPU_SUITE = (('tiny', 16, 2, 1, True), ('tiny', 16, 1, 2, False))\nupdate.main()"
    )
    arguments = ["--suite", "gpu", "--steps", "2", "--seconds", "20", "--json", "out.json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=tmp_path, timeout=200,
        env=environment,
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == "", done.stderr[-3000:]
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert {(row["batch"], row["accumulation"]) for row in rows} == {(2, 1), (1, 2)}
    steps = {arm: sum(row["steps"] for row in rows if row["arm"] == arm) for arm in ("stock", "bypass")}
    assert steps["bypass"] > steps["stock"] == 4


@pytest.mark.slow
def test_host_benchmark_measures_each_arm_and_writes_what_it_has(tmp_path):
    printed = run("host.py", "--layers", "2", "--repetitions", "3", "--json", "out.json", cwd=tmp_path)
    report = json.loads((tmp_path / "out.json").read_text())
    arms = ["no hook", "empty hook", "torch, rms, learned", "torch, rms, learned, measured"]
    assert [row["arm"] for row in report["rows"]] == arms and all(arm in printed for arm in arms)
    assert report["repetitions"] == 3 and report["no_hook_ms"] > 0


def test_the_parts_of_the_gpu_script_exist_and_end_within_eight_minutes():
    text = (ROOT / "benchmarks" / "on_gpu.sh").read_text()
    parts = re.findall(r"^part (\w+) (\d+) ", text, re.MULTILINE)
    assert [name for name, _ in parts] == ["tests", "noise", "host", "update"]
    assert sum(int(seconds) for _, seconds in parts) <= 480
    for name in re.findall(r"benchmarks/[\w/]+\.py", text):
        assert (ROOT / name).is_file(), name
    makefile = (ROOT / "Makefile").read_text()
    for name in re.search(r"^GPU_TESTS := (.*)$", makefile, re.MULTILINE)[1].split():
        assert (ROOT / "tests" / f"test_{name}.py").is_file(), name


def test_the_gpu_script_runs_every_part_whatever_the_others_do(tmp_path):
    script = ROOT / "benchmarks" / "on_gpu.sh"
    for python, status in (("/bin/true", 0), ("/bin/false", 1)):
        environment = os.environ | {"PYTHON": python}
        done = subprocess.run([script, tmp_path, "--lab"], capture_output=True, text=True, env=environment, timeout=60)
        assert done.returncode == status
        assert re.findall(r"^==== (\w+): status", done.stdout, re.MULTILINE) == [
            "tests", "noise", "host", "update", "lab",
        ]  # fmt: skip
    assert "failed or cut off: tests(2) noise(1)" in done.stdout
