#!/usr/bin/env bash
# What one NVIDIA GPU can tell of this package, in under 8 minutes: the tests, the kernel, the host's time, the update.
#
#     benchmarks/on_gpu.sh [OUT] [--lab]       # OUT: folder of the logs and JSON files, `on_gpu` by default
#
# --lab adds the study's GPU stages, ten minutes more. PYTHON names the interpreter (python3); it needs torch, transformers,
# TRL, datasets, peft and pytest, and with pytest-xdist the tests run in eight processes. Each part has its own time
# limit and writes what it has as it goes, so that a part which fails or is cut off costs the others nothing.
set -uo pipefail
cd "$(dirname "$0")/.."
out=on_gpu lab=
for argument in "$@"; do
    if [ "$argument" = --lab ]; then lab=1; else out=$argument; fi
done
python=${PYTHON:-python3}
mkdir -p "$out"
out=$(cd "$out" && pwd)
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1
failed=

part() { # name, seconds, command
    local name=$1 limit=$2 start=$SECONDS
    shift 2
    printf '\n==== %s: %s\n' "$name" "$*"
    timeout --signal INT --kill-after 10 "$limit" "$@" 2>&1 | tee "$out/$name.log"
    local status=${PIPESTATUS[0]}
    [ "$status" = 0 ] || failed="$failed $name($status)"
    echo "==== $name: status $status, $((SECONDS - start)) s"
}

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
part tests 185 make --no-print-directory test-gpu PYTHON="$python"
part noise 70 "$python" benchmarks/noise.py --json "$out/noise.json"
part host 55 "$python" benchmarks/host.py --repetitions 30 --json "$out/host.json"
part update 165 "$python" benchmarks/update.py --suite gpu --steps 3 --seconds 125 --json "$out/update.json"
[ -z "$lab" ] || part lab 600 "$python" benchmarks/lab/study.py --stages gpu gpu_matched --jobs 12 --hours 0.1 --folder "$out/lab" --results "$out"
[ -z "$failed" ] || { echo "failed or cut off:$failed"; exit 1; }
