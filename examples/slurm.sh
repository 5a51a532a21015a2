#!/bin/bash
# Train a recipe on Slurm, from the root of the repository:
#
#   sbatch --nodes=2 examples/slurm.sh examples/configs/single_turn/alp_sequence.yaml \
#       --gradient_accumulation_steps 4 --steps_per_generation 64
#
# trains on both nodes (16 GPUs, hence half the accumulation), generation by vLLM on the training GPUs. With a server,
#
#   sbatch --nodes=2 --export=ALL,VLLM_NODES=1 examples/slurm.sh examples/configs/single_turn/alp_sequence.yaml
#
# the last node runs vLLM on all its GPUs and the other one trains. Options after the recipe override it. The launch line
# in the recipe's head says which script trains it, and whether it is sharded (ZeRO, FSDP2) or DDP is enough;
# ACCELERATE_CONFIG is another file of examples/accelerate_configs. The numbers of machines and GPUs come from Slurm.
#
#SBATCH --job-name=trl-alp
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --output=%x-%j.out
set -euo pipefail

recipe=${1:?usage: sbatch examples/slurm.sh RECIPE [OPTION...]}
shift
vllm_nodes=${VLLM_NODES:-0}
gpus=${SLURM_GPUS_ON_NODE:-8}
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
training_nodes=$((${#nodes[@]} - vllm_nodes))
if ((vllm_nodes > 1 || training_nodes < 1)); then
    echo "VLLM_NODES=$vllm_nodes of ${#nodes[@]} nodes: it must be 0 or 1, and leave a node to train on." >&2
    exit 1
fi

launch_line=$(sed -n 's/^# Launch: //p' "$recipe")
script=$(grep -o 'examples/[a-z_]*\.py' <<< "$launch_line" || echo examples/train_alp.py)
sharded=$(grep -o 'examples/accelerate_configs/\(zero[23]\|fsdp2\)\.yaml' <<< "$launch_line" || true)
accelerate_config=${ACCELERATE_CONFIG:-${sharded:-examples/accelerate_configs/multi_node.yaml}}

generation=(--vllm_mode colocate)
if ((vllm_nodes == 1)); then
    server=${nodes[-1]}
    model=$(sed -n 's/^model_name_or_path: *\([^ ]*\).*/\1/p' "$recipe")
    generation=(--vllm_mode server --vllm_enable_sleep_mode false --vllm_server_host "$server" --vllm_server_timeout 1200)
    VLLM_SERVER_DEV_MODE=1 srun --nodes=1 --ntasks=1 --nodelist="$server" --exact \
        vllm serve "$model" --data-parallel-size "$gpus" --weight-transfer-config '{"backend": "nccl"}' \
        --logprobs-mode processed_logprobs --max-logprobs -1 &
    vllm_job=$!
    trap 'kill "$vllm_job" 2> /dev/null || true' EXIT
fi

# SLURM_NODEID is the node's own and known only there.
# shellcheck disable=SC2016
srun --nodes="$training_nodes" --ntasks="$training_nodes" --ntasks-per-node=1 --exact \
    --nodelist="$(IFS=,; echo "${nodes[*]:0:training_nodes}")" \
    bash -c 'exec accelerate launch --machine_rank "$SLURM_NODEID" "$@"' launch \
    --config_file "$accelerate_config" \
    --num_machines "$training_nodes" --num_processes $((training_nodes * gpus)) \
    --main_process_ip "${nodes[0]}" --main_process_port "${MASTER_PORT:-29500}" \
    "$script" --config "$recipe" "${generation[@]}" "$@"
