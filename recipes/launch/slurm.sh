#!/usr/bin/env bash
# Slurm: one task a node, which is many_nodes.sh; ends with a checkpoint when it is preempted or its time is up, and goes on.
#     sbatch --nodes 32 recipes/launch/slurm.sh pretrain 70b a100-80gb --model llama2-70b --data.path 'corpus/*.parquet' \
#         --data.tokenizer llama2/ --run-dir runs/70b
# Submit from the root of the repository. Whatever #SBATCH says, sbatch's own options win: --time, --partition, --account.
#SBATCH --job-name=dtensor-llama
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
# Five minutes before the end, to this script only: a 70b checkpoint is 0.8 TB, at 10 GB/s 80 s, and the step has to end first.
#SBATCH --signal=B:USR1@300
set -euo pipefail

time_is_up=
stop() {    # to the steps: there each rank finishes its optimizer step, writes a checkpoint and ends
    scancel --quiet --signal=TERM "$SLURM_JOB_ID"
}
trap 'time_is_up=1; stop' USR1      # also at preemption, where the cluster says PreemptParameters=send_user_signal
trap : TERM                         # preempted or cancelled: the steps have it too; whether to requeue is Slurm's to say

HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export HEAD NNODES=$SLURM_NNODES JOB_ID=$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0} PORT=$((20000 + SLURM_JOB_ID % 10000))
status=0
srun --kill-on-bad-exit=1 recipes/launch/many_nodes.sh "$@" &      # --checkpoint.resume auto is the default: goes on where it was
while true; do                                                     # a trap ends `wait`, not the job
    wait $! && status=0 || status=$?
    kill -0 $! 2>/dev/null || break
done
if [ -n "$time_is_up" ]; then
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit $status
