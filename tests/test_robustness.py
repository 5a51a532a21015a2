import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch


HERE = Path(__file__).parent
KILLS = 10 if tiny.DEVICE == "cpu" else 2  # a process takes ten seconds or more to reach a GPU


def run(out, *seconds):
    command = [sys.executable, str(HERE / "killed_run.py"), str(out), *map(str, seconds)]
    return subprocess.run(command, capture_output=True, text=True, env=tiny.environment(), timeout=120)


@pytest.mark.slow
def test_a_run_killed_many_times_at_random_points_ends_like_an_uninterrupted_one(tmp_path):
    whole = run(tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr[-3000:]
    draw = random.Random(0)
    kills = started = 0
    while kills < KILLS:
        started += 1
        # 12 steps and as many saves take about a second; short lives, so that they do not reach the end.
        done = run(tmp_path / "killed", draw.uniform(0.02, 0.25))
        assert done.returncode in (0, -signal.SIGKILL), done.stderr[-3000:]
        if done.returncode == 0:  # it got to its end: begin again, from nothing
            subprocess.run(["rm", "-rf", str(tmp_path / "killed")], check=True)
            continue
        kills += 1
        assert started < 40
    done = run(tmp_path / "killed")
    assert done.returncode == 0, done.stderr[-3000:]
    expected, found = (torch.load(tmp_path / name / "final.pt", weights_only=False) for name in ("whole", "killed"))
    assert torch.equal(expected["log_sigma"], found["log_sigma"])
    for name, weight in expected["weights"].items():
        assert torch.equal(weight, found["weights"][name]), name
    assert expected["log"][:-1] == found["log"][:-1]  # the last row measures this process's loss alone
