#!/usr/bin/env bash
# This is a Slurm job with one task per node, which runs many_nodes.sh. When it is preempted or its time is
# up, it ends with a checkpoint, is requeued, and continues from there.
#     sbatch --nodes 32 recipes/launch/slurm.sh pretrain 70b a100-80gb --model llama2-70b \
#         --data.path 'corpus/*.parquet' --data.tokenizer llama2/ --run-dir runs/70b
# Submit it from the root of the repository. Options on the command line of sbatch (--time, --partition,
# --account) override the #SBATCH lines.
#SBATCH --job-name=dtensor-llama
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
# Slurm sends USR1 to this script alone, five minutes before the end. A checkpoint of 70b has 0.8 TB, which
# takes 80 s at 10 GB/s, and before that the step has to end.
#SBATCH --signal=B:USR1@300
set -euo pipefail

time_is_up=
stop() {    # Send SIGTERM to the job steps: each rank finishes its step, writes a checkpoint and ends.
    scancel --quiet --signal=TERM "$SLURM_JOB_ID"
}
trap 'time_is_up=1; stop' USR1  # with PreemptParameters=send_user_signal, preemption sends it too
trap : TERM  # the job is preempted or cancelled: the steps get it too, and Slurm decides whether to requeue

HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export HEAD NNODES=$SLURM_NNODES
export JOB_ID=$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0} PORT=$((20000 + SLURM_JOB_ID % 10000))
status=0
srun --kill-on-bad-exit=1 recipes/launch/many_nodes.sh "$@" &  # --checkpoint.resume is auto: it resumes
while true; do  # a signal that is trapped ends `wait`, but not the job
    wait $! && status=0 || status=$?
    kill -0 $! 2>/dev/null || break
done
if [ -n "$time_is_up" ]; then
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit $status
