#!/usr/bin/env bash
# Starts training on many nodes with torchrun.
# Run the same command on each node, in any order, within ten minutes.
#     NNODES=8 HEAD=node-0 recipes/launch/many_nodes.sh pretrain 70b h100-80gb --model llama2-70b \
#         --data.path 'corpus/*.parquet' --data.tokenizer llama2/ --run-dir /shared/runs/70b
# The arguments are RECIPE SIZE GPU, then any flags of the recipe, which override the flags of sizes.py. HEAD
# (or MASTER_ADDR) is the host name of the node at which all nodes meet; it must be one of them. Code, data
# and --run-dir must be on a file system that all nodes see. GPUS_PER_NODE is 8, PORT is 29400, and PYTHON is
# python unless they are set. JOB_ID is RECIPE-SIZE unless it is set: two jobs with one HEAD need two ids.
set -euo pipefail
usage="give RECIPE SIZE GPU, for example: $0 pretrain 7b h100-80gb"
recipe=${1:?$usage} size=${2:?$usage} gpu=${3:?$usage}
shift 3
: "${NNODES:?is missing; set it to the number of nodes}"
head=${HEAD:-${MASTER_ADDR:?is missing, and so is HEAD; set one to the host name of a node that all reach}}
here=$(dirname "$0") python=${PYTHON:-python} gpus=${GPUS_PER_NODE:-8}
flags=$("$python" "$here/sizes.py" "$recipe" "$size" "$gpu" $((NNODES * gpus)))
# This makes a new store for every start. The store that torchrun would share still has the addresses of the
# earlier processes, and nodes may count restarts differently, so that a restart on several nodes would hang.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${SHUTDOWN_SECONDS:-300}  # for the checkpoint after a SIGTERM
# If nodes have several network cards, set NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME to the card that leads to
# the other nodes (`ip -brief address` lists them).
# shellcheck disable=SC2086  # flags are words
exec "$python" -m torch.distributed.run --nnodes "$NNODES" --nproc-per-node "$gpus" \
    --max-restarts "${MAX_RESTARTS:-3}" --rdzv-backend c10d \
    --rdzv-endpoint "$head:${PORT:-29400}" \
    --rdzv-id "${JOB_ID:-$recipe-$size}" ${TORCHRUN_OPTIONS:-} "$here/../$recipe.py" $flags "$@"
