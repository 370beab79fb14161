#!/usr/bin/env bash
# What can only be known on a GPU: the tests marked so, then the measurements, largest promise first. One call on a bare
# machine with torch; results are JSON lines in the folder given (default: recipes/bench/results).
#
#     bash recipes/bench/gpu.sh [FOLDER]
#
# Predictions for one H200 (989 TFLOP/s data sheet, 790 measured matmul; 7B needs 6.9 * 6 GFLOP a token at sequence 4096):
#   llama2-7b, 16 bytes a parameter resident = 108 GB and about 20 GB of activations with selective recompute: fits 141 GB.
#   Casting fp32 masters to bf16 once a forward moves 40 GB (10 ms at 4.3 TB/s); AdamW moves 28 bytes a parameter, 189 GB
#   (44 ms); at 16,384 tokens a step and 592 TFLOP/s sustained the products take 1.17 s: expect 55 % MFU before tuning.
set -uo pipefail
cd "$(dirname "$0")/../.."
out=${1:-recipes/bench/results}
mkdir -p "$out"
results="$out/gpu-$(date +%Y-%m-%d).jsonl"
python=${PYTHON:-python3}

"$python" -m pytest -q -m gpu tests 2>&1 | tee "$out/gpu-tests.log" | tail -15

measure() {     # the last line a benchmark prints is its JSON; the command stands beside it
    echo "== recipes/benchmark.py $*"
    line=$(timeout 240 "$python" recipes/benchmark.py "$@" 2> "$out/last-error.log" | tail -1)
    if [ -n "$line" ]; then echo "{\"command\": \"recipes/benchmark.py $*\", \"result\": $line}" | tee -a "$results"
    else tail -3 "$out/last-error.log"; fi
}

measure --model llama2-7b --data.seq-len 4096 --train.global-batch-size 4 --train.compile --train.recompute selective --train.steps 8
measure --model llama2-7b --data.seq-len 4096 --train.global-batch-size 4 --train.compile --train.recompute full --train.steps 8
measure --model llama2-7b --data.seq-len 4096 --train.global-batch-size 4 --train.compile --train.recompute selective --train.steps 8 --parallel.zero-stage 1
measure --model small-110m --data.seq-len 2048 --train.global-batch-size 32 --train.micro-batch-size 8 --train.compile --train.steps 20
measure --model small-110m --data.seq-len 2048 --train.global-batch-size 32 --train.micro-batch-size 8 --train.steps 20

# The wires, then offload under a budget against everything resident. Predictions: memory/placement.py's formulas, printed with
# the plan beside what is measured (7b under 40 GiB 1.1 s at 4k tokens a step, 2.1 s at 16k, 6.4 s at 64k).
for bench in memory_rates host_adam step_price; do
    line=$(timeout 240 "$python" "recipes/bench/$bench.py" 2> "$out/last-error.log" | tail -1)
    if [ -n "$line" ]; then echo "{\"command\": \"recipes/bench/$bench.py\", \"result\": $line}" | tee -a "$results"
    else tail -3 "$out/last-error.log"; fi
done
for rows in 1 4 16; do
    for budget in 40 130; do
        measure --model llama2-7b --data.seq-len 4096 --train.global-batch-size $rows --train.compile --train.recompute full \
            --memory.placement auto --memory.device-budget-gib $budget --train.steps 6 --warmup 6
    done
done
