#!/bin/bash
# Several nodes under Slurm: sbatch recipes/distributed/slurm.sh RECIPE RUN [KEY=VALUE]...
# RUN and the files that the recipe names must be on a file system that all nodes see. 300 s before the time limit, and when the
# job is preempted, Slurm sends TERM: the stage that is training writes a checkpoint at the end of its step, and the job is queued
# again. The same command then continues from there.
#SBATCH --job-name=slimepo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -u

if [ $# -lt 2 ]; then
    echo "usage: sbatch slurm.sh RECIPE RUN [KEY=VALUE]..." >&2
    exit 2
fi
recipe=$1 run=$2
shift 2

# One address for the ranks to meet at: the first node's.
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# Seconds that the checkpoint may take between TERM and the end.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=270
srun --kill-on-bad-exit=1 torchrun \
    --nnodes="$SLURM_NNODES" --nproc-per-node=gpu \
    --rdzv-backend=c10d --rdzv-endpoint="$head:29500" --rdzv-id="$SLURM_JOB_ID" \
    -m slimepo.cli run "$recipe" "$@" --out "$run" &
step=$!

stopped=
trap 'stopped=1; kill -TERM "$step"' TERM
wait "$step"
code=$?
if [ -n "$stopped" ]; then
    # The signal has ended the first wait.
    wait "$step"
    code=$?
    if [ "$code" -ne 0 ]; then
        echo "told to end; queueing again"
        scontrol requeue "$SLURM_JOB_ID"
    fi
fi
exit "$code"
