#!/usr/bin/env bash
# One node with GPUs, by torchrun:
#     recipes/launch/one_node.sh pretrain 7b h100-80gb --model llama2-7b --data.path 'corpus/*.parquet' --data.tokenizer llama2/
#     recipes/launch/one_node.sh sft 13b a100-80gb --model llama2-13b-hf/ --data.path chats.jsonl
# RECIPE SIZE GPU, then any flags of the recipe; where they say something else than sizes.py, they win.
# GPUS_PER_NODE (8): how many. PYTHON (python): the interpreter of the environment.
set -euo pipefail
recipe=$1 size=$2 gpu=$3
shift 3
here=$(dirname "$0") python=${PYTHON:-python} gpus=${GPUS_PER_NODE:-8}
flags=$("$python" "$here/sizes.py" "$recipe" "$size" "$gpu" "$gpus")
# A process that dies is started again with the others, from the newest checkpoint.
# After a SIGTERM (Ctrl-C, shutdown) the recipe writes a checkpoint: torchrun waits so many seconds for it, 30 unless told.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${SHUTDOWN_SECONDS:-300}
# shellcheck disable=SC2086  # flags are words
exec "$python" -m torch.distributed.run --standalone --nproc-per-node "$gpus" --max-restarts "${MAX_RESTARTS:-3}" \
    "$here/../$recipe.py" $flags "$@"
