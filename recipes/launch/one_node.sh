#!/usr/bin/env bash
# Starts training on one node with GPUs, with torchrun:
#     recipes/launch/one_node.sh pretrain 7b h100-80gb --model llama2-7b --data.path 'corpus/*.parquet' \
#         --data.tokenizer llama2/
#     recipes/launch/one_node.sh sft 13b a100-80gb --model llama2-13b-hf/ --data.path chats.jsonl
# The arguments are RECIPE SIZE GPU, then any flags of the recipe, which override the flags of sizes.py.
# GPUS_PER_NODE is the number of GPUs, and PYTHON is the interpreter (8 and `python` unless set).
set -euo pipefail
usage="give RECIPE SIZE GPU, for example: $0 pretrain 7b h100-80gb"
recipe=${1:?$usage} size=${2:?$usage} gpu=${3:?$usage}
shift 3
here=$(dirname "$0") python=${PYTHON:-python} gpus=${GPUS_PER_NODE:-8}
flags=$("$python" "$here/sizes.py" "$recipe" "$size" "$gpu" "$gpus")
# If a process dies, all processes are started again from the newest checkpoint. After a SIGTERM (Ctrl-C,
# shutdown) the recipe writes a checkpoint, and torchrun waits for it this long. Its own default is 30 s.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${SHUTDOWN_SECONDS:-300}
# shellcheck disable=SC2086  # flags are words
exec "$python" -m torch.distributed.run --standalone --nproc-per-node "$gpus" \
    --max-restarts "${MAX_RESTARTS:-3}" "$here/../$recipe.py" $flags "$@"
