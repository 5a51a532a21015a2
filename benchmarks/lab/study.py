# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""
The study: many runs of the lab, resumable, in parallel.

    python benchmarks/lab/study.py                       # all that is not there yet: hours
    python benchmarks/lab/study.py --stages tune grid    # some stages
    python benchmarks/lab/study.py --quick               # under ten minutes on 2 cores: the edge, every arm, one seed
    .venv-vllm/bin/python benchmarks/lab/study.py --stages engine    # vLLM as the behaviour policy
    python benchmarks/lab/study.py --stages gpu gpu_matched --jobs 4 --hours 0.1 --results $OUT    # on one GPU
    python benchmarks/lab/study.py --stages real --jobs 2    # a GPU and a day; `real.sh`: in pieces of 8 minutes
    python benchmarks/lab/figures.py                     # tables and figures of docs/results.md from the results

Each run is a YAML file in `runs/lab/STAGE/` and leaves its log beside it (`run.py`). What is finished is summed up in
`benchmarks/results/lab/STAGE.json.gz`, which is committed: runs in there are not repeated either. `stages.py` says
what runs a stage is made of.
"""

import argparse
import itertools
import json
import os
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path


os.environ["OMP_NUM_THREADS"] = "1"  # a run is small: two at a time beat two threads
os.environ.setdefault("PYTHONWARNINGS", "ignore")

import yaml
from results import RESULTS, final, finished, start, start_file, sum_up
from stages import FURTHER_STAGES, STAGES, Runs, quick


def one(file: Path, cache: Path) -> float:
    """In a process of its own: do the run of one YAML file; the final accuracy."""
    sys.path.insert(0, str(Path(__file__).parent))
    import torch
    import transformers
    from run import run

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    result = run(yaml.safe_load(file.read_text()), cache)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(result))
    temporary.rename(file.with_suffix(".json"))
    return final(result)


def carry_out(stage: str, runs: Runs, folder: Path, jobs: int, deadline: float, results: Path | None) -> None:
    """Do the runs of a stage that are not there yet, until the time is up, and sum up into `results`."""
    known, files = finished(stage) if results else {}, []
    (folder / stage).mkdir(parents=True, exist_ok=True)
    for name, settings in runs:
        file = folder / stage / f"{name}.yaml"
        if name not in known and not file.with_suffix(".json").exists():
            file.write_text(yaml.safe_dump(settings, sort_keys=False))
            files.append(file)
    print(f"{stage}: {len(files)} runs to do", flush=True)
    start, waiting = time.time(), iter(files)
    once = 1 if stage == "engine" else None  # vLLM leaves things behind in its process
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), max_tasks_per_child=once) as pool:
        running = {pool.submit(one, file, folder): file for file in itertools.islice(waiting, jobs)}
        done = failed = 0
        while running:
            future = next(as_completed(running))
            file = running.pop(future)
            done += 1
            failed += bool(future.exception())
            outcome = f"FAILED: {future.exception()!r}" if future.exception() else f"{future.result():.3f}"
            left = (time.time() - start) / done * (len(files) - done) / 60
            print(f"{stage} {done}/{len(files)} {file.stem}: {outcome} ({left:.0f} min left)", flush=True)
            if time.time() < deadline and (following := next(waiting, None)) is not None:
                running[pool.submit(one, following, folder)] = following
    if results is not None:
        sum_up(stage, folder, results)
    if failed:  # a mean over the others would be of survivors
        raise SystemExit(f"{failed} runs of the stage `{stage}` failed; the rest is kept.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=[*STAGES, *FURTHER_STAGES], default=list(STAGES))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", default="", help="a regular expression: of the stages, the runs whose name matches")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--hours", type=float, default=float("inf"), help="begin no run after this time")
    parser.add_argument("--folder", type=Path, default=Path("runs/lab"), help="for runs, and the warm-started model")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where finished runs are summed up")
    options = parser.parse_args()
    deadline = time.time() + 3600 * options.hours
    if options.quick:
        carry_out("quick", quick(), options.folder, options.jobs, deadline, results=None)
        for file in sorted((options.folder / "quick").glob("*.json")):
            values = [value for _, value in json.loads(file.read_text())["accuracy"]]
            print(
                f"{file.stem:20s} {values[0]:.3f} to {values[-1]:.3f}, between {min(values):.3f} and {max(values):.3f}"
            )
        return
    for name in options.stages:
        runs = (STAGES | FURTHER_STAGES)[name]()
        runs = ((run, settings) for run, settings in runs if re.search(options.only, run))
        carry_out(name, runs, options.folder, options.jobs, deadline, options.results)
        for stage, digits in (("fitted", 3), ("length", 12)):
            if name == stage and not (options.results / start_file(digits)).exists():
                start(options.folder, options.results, digits)


if __name__ == "__main__":
    main()
