#!/bin/bash
# Train on a Slurm cluster whose nodes share a folder. Two ways:
#
#   sbatch --nodes 2 tools/slurm.sh ray --scale paper --data agrivision-2020 --data-root /shared/Agriculture-Vision --out /shared/out
#       Ray on all nodes; `agrivision reproduce --ray` queues every Run of the tables, one GPU each.
#   sbatch --nodes 2 tools/slurm.sh torchrun --scale paper --data agrivision-2020 --data-root … --out … -p norm=ibn_s -p channels=rgb
#       one Run on all GPUs of all nodes; `agrivision train` receives the other arguments.
#
# All arguments after the first are passed on. If resubmitted, the job resumes from the saved states.
# Set GPUs, time and partition for your cluster here or on sbatch's command line; set VENV if the project is not installed in .venv.
#SBATCH --job-name=agrivision
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

usage="usage: sbatch [options of sbatch] tools/slurm.sh ray|torchrun [options of agrivision reproduce|train]"
way=${1:-}
case $way in ray | torchrun) shift ;; *) echo "$usage" >&2; exit 2 ;; esac
if [ -z "${SLURM_JOB_ID:-}" ]; then echo "not inside a Slurm job; $usage" >&2; exit 2; fi

venv=${VENV:-$SLURM_SUBMIT_DIR/.venv}
if [ ! -x "$venv/bin/agrivision" ]; then echo "no $venv/bin/agrivision: install the project there, or set VENV" >&2; exit 2; fi
export PATH="$venv/bin:$PATH" RAY_USAGE_STATS_ENABLED=0
n_nodes=$SLURM_JOB_NUM_NODES
gpus=${SLURM_GPUS_ON_NODE:-0}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000)) # jobs that share a node use different ports

if [ "$way" = torchrun ]; then
    per_node=$((gpus > 0 ? gpus : 1))
    export OMP_NUM_THREADS=$((${SLURM_CPUS_PER_TASK:-1} / per_node > 0 ? ${SLURM_CPUS_PER_TASK:-1} / per_node : 1))
    exec srun --kill-on-bad-exit=1 torchrun --nnodes "$n_nodes" --nproc-per-node "$per_node" --rdzv-backend c10d \
        --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$head:$port" --no-python agrivision train "$@"
fi

# one step runs Ray's head, another the other nodes; both end with the job
ray_on="ray start --block --num-cpus ${SLURM_CPUS_PER_TASK:-1} --num-gpus $gpus"
srun --overlap --nodes 1 --ntasks 1 --nodelist "$head" $ray_on --head --port "$port" --include-dashboard false &
if [ "$n_nodes" -gt 1 ]; then
    srun --overlap --nodes $((n_nodes - 1)) --ntasks $((n_nodes - 1)) --exclude "$head" $ray_on --address "$head:$port" &
fi
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT

for _ in $(seq 60); do # until every node has joined
    alive=$(python -c "import ray; ray.init('$head:$port', logging_level='ERROR'); print(sum(n['Alive'] for n in ray.nodes()))" 2>/dev/null || echo 0)
    [ "$alive" -ge "$n_nodes" ] && break
    sleep 2
done
if [ "$alive" -lt "$n_nodes" ]; then echo "only $alive of $n_nodes nodes joined Ray: see the messages above" >&2; exit 1; fi
srun --overlap --nodes 1 --ntasks 1 --nodelist "$head" agrivision reproduce --ray "$head:$port" "$@"
