#!/bin/bash
# Train on nodes of eight GPUs. A run that is preempted, or reaches its time limit, saves itself and is queued again:
#
#   sbatch --nodes=4 examples/slurm/train.sh dynamics stores=[porous.latent.zarr] run=runs/porous
#
# Submit it from the folder that the paths are relative to. What follows the script is what follows `latentphys train`.
#
#SBATCH --job-name=latentphys
#SBATCH --nodes=1
# One launcher per node; it starts one process for each GPU.
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
# SIGUSR1 to every process of the step, 120 s before the end, and not to this script. It has to be longer than the
# slowest step and the writing of a checkpoint together.
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -u

run=
for argument in "$@"; do
    case $argument in run=*) run=${argument#run=} ;; esac
done
if [ -z "$run" ]; then
    echo "train.sh: Expected run=DIR among the arguments, got none." >&2
    exit 2
fi

gpus=${SLURM_GPUS_ON_NODE:-8}
launch=${ACCELERATE_CONFIG:-configs/accelerate/multi_node.yaml}
# The first node of the job, on a port that no other job of this machine is likely to have.
address=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))

# Threads of each process for what stays on the CPU; a launcher would set 1, which starves the reading of data.
export OMP_NUM_THREADS=$((${SLURM_CPUS_PER_TASK:-96} / gpus))
# The launcher kills its workers this long after SIGTERM; 30 s by default, too short to write a large checkpoint.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110
# Say what NCCL cannot do, and nothing else; a lost rank ends the others instead of hanging them.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1
# Where NCCL takes the wrong network, name the right one: export NCCL_SOCKET_IFNAME=ib0

status() { cat "$run/status.json" 2>/dev/null; }
before=$(status)

# Preemption sends SIGTERM to this script as well. A handler that does nothing lets it wait for the step to end.
trap : TERM USR1

# In every node's own shell: its rank, and SIGUSR1 ignored by the launcher, which would die of it and pass nothing on.
# The training processes set a handler of their own.
# --kill-on-bad-exit=0 --wait=180: a launcher whose workers are done must not end the one whose worker still writes;
# after a crash the others are given up 180 s later.
export LATENTPHYS_LAUNCH="--config_file $launch --num_machines $SLURM_NNODES \
--num_processes $((SLURM_NNODES * gpus)) --main_process_ip $address --main_process_port $port"
srun --kill-on-bad-exit=0 --wait=180 bash -c '
    trap "" USR1
    exec accelerate launch $LATENTPHYS_LAUNCH --machine_rank "$SLURM_NODEID" -m latentphys train "$@"
' train "$@" &
# A signal ends a wait early: wait until the step is over.
step=$!
code=143
while kill -0 "$step" 2>/dev/null; do
    wait "$step"
    code=$?
done

# Of the exit status of its workers a launcher makes 1. The run itself says how it ended, in words that change with
# every start: the same words as before are those of an earlier one.
after=$(status)
case $after in
"$before") state=failed ;;
*'"state": "done"'*) state=done ;;
*'"state": "preempted"'*) state=preempted ;;
*) state=failed ;;
esac
echo "train.sh: $run is $state (the step ended with $code)"

case $state in
done) exit 0 ;;
preempted)
    # Where Slurm preempts by requeueing, it has queued the job again already, and refuses.
    scontrol requeue "$SLURM_JOB_ID" || echo "train.sh: not queued again by this script" >&2
    exit 75
    ;;
*) exit $((code == 0 ? 1 : code)) ;;
esac
