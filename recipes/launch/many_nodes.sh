#!/usr/bin/env bash
# Many nodes, by torchrun: the same command on each of them, in any order, within ten minutes.
#     NNODES=8 HEAD=node-0 recipes/launch/many_nodes.sh pretrain 70b h100-80gb --model llama2-70b --data.path 'corpus/*.parquet' \
#         --data.tokenizer llama2/ --run-dir /shared/runs/70b
# RECIPE SIZE GPU, then any flags of the recipe; where they say something else than sizes.py, they win.
# HEAD (MASTER_ADDR): host name of the node where the others meet; it must be one of them. Code, data and --run-dir: on a file system that all see.
# GPUS_PER_NODE (8), PORT (29400), JOB_ID (the recipe and size: two jobs on one HEAD need two), PYTHON (python).
set -euo pipefail
recipe=$1 size=$2 gpu=$3
shift 3
here=$(dirname "$0") python=${PYTHON:-python} gpus=${GPUS_PER_NODE:-8}
flags=$("$python" "$here/sizes.py" "$recipe" "$size" "$gpu" $((NNODES * gpus)))
# A new store for every start. The one torchrun would share holds the addresses of the dead, and nodes do not count restarts
# alike: without this a restart on several nodes hangs.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${SHUTDOWN_SECONDS:-300}      # for the checkpoint after a SIGTERM
# Several network cards: say which one leads to the other nodes, NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME (ip -brief address).
# shellcheck disable=SC2086  # flags are words
exec "$python" -m torch.distributed.run --nnodes "$NNODES" --nproc-per-node "$gpus" --max-restarts "${MAX_RESTARTS:-3}" \
    --rdzv-backend c10d --rdzv-endpoint "${HEAD:-$MASTER_ADDR}:${PORT:-29400}" --rdzv-id "${JOB_ID:-$recipe-$size}" ${TORCHRUN_OPTIONS:-} \
    "$here/../$recipe.py" $flags "$@"
