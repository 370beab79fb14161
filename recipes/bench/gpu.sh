#!/usr/bin/env bash
# What can only be known on a GPU: the tests marked so, then the measurements, largest promise first. For a bare machine with
# torch; results are JSON lines in the folder given (default: recipes/bench/results), appended as they come. Each part ends
# within ten minutes, so a machine that is lent for so long does one part a call.
#
#     bash recipes/bench/gpu.sh [FOLDER] [PART...]       # all parts, or some of: tests speed rates 3.5b-24 7b-40 7b 13b host
#
# Predictions for one H200 (989 TFLOP/s data sheet, 790 measured matmul, HBM 4.3 TB/s; 7B needs 6.9 * 6 GFLOP a token at 4096):
#   speed   llama2-7b, 16 bytes a parameter resident = 108 GB and about 20 GB of activations with selective recompute: fits.
#           Casting fp32 masters to bf16 once a forward moves 40 GB (10 ms); AdamW moves 28 bytes a parameter, 189 GB (44 ms);
#           16,384 tokens at 592 TFLOP/s sustained take 1.17 s: 55 % MFU before tuning.
#   rates   H2D and D2H 50 GB/s each, 100 both at once; DRAM 200 GB/s on 16 cores, so host Adam 7 G parameters/s at 28 bytes;
#           device Adam 165 G parameters/s at 26 bytes. Far below, look at the loads of its kernel: its length is a symbol, so
#           triton may not know it for a multiple of 16, and load bfloat16 one by one
#   host    Adam 0.95 of the stream; torch calls beside it within a half of those alone (default wrapper: near none)
#   offload auto_plan with those rates, 592 TFLOP/s, full recompute (4 forwards), exact clip, 4 rows a forward; seconds a step:
#           tokens a step       4k     16k    64k      all resident, where it fits
#           3.5B, 24 GiB        0.47   0.99   3.34     0.23  0.86  3.36
#           7B, 40 GiB          0.96   1.94   6.45     0.44  1.65  6.48
#           7B, whole card      0.44   1.65   6.48     0.44  1.65  6.48
#           13B, whole card     1.11   3.12   12.31    does not fit
#           Peers: the formulas of recipes/bench/offload.py, printed beside each figure; aims: 2.0 x the best exact one at
#           4k tokens, 1.7 x at 16k, 3 x FSDP2's CPU offload.
set -uo pipefail
cd "$(dirname "$0")/../.."
out=${1:-recipes/bench/results}
shift $(($# > 0))
parts=${*:-tests speed rates 3.5b-24 7b-40 7b 13b host}
mkdir -p "$out"
results="$out/gpu-$(date +%Y-%m-%d).jsonl"
python=${PYTHON:-python3}

keep() {        # JSON lines on standard input; the command stands beside each
    while IFS= read -r line; do
        case $line in "{"*) echo "{\"command\": \"$1\", \"result\": $line}" | tee -a "$results" ;; *) echo "$line" ;; esac
    done
}

measure() {     # seconds, then the script and its flags; what it said when it printed no result
    limit=$1; shift
    echo "== $*"
    timeout "$limit" "$python" "$@" 2> "$out/last-error.log" | keep "$*"
    [ "${PIPESTATUS[0]}" -eq 0 ] || tail -3 "$out/last-error.log"
}

speed="recipes/benchmark.py --train.compile"
offload="recipes/bench/offload.py --compile"
for part in $parts; do
    case $part in
    tests)
        timeout 540 "$python" -m pytest -q -m gpu tests 2>&1 | tee "$out/gpu-tests.log" | tail -15 ;;
    speed)
        seven="--model llama2-7b --data.seq-len 4096 --train.global-batch-size 4 --train.steps 8"
        measure 180 $speed $seven --train.recompute selective
        measure 180 $speed $seven --train.recompute full
        measure 90 $speed --model small-110m --data.seq-len 2048 --train.global-batch-size 32 --train.micro-batch-size 8
        measure 90 recipes/bench/step_price.py --model small-110m --seq-len 2048 --dtype bfloat16 ;;
    rates)
        measure 300 recipes/bench/memory_rates.py ;;
    3.5b-24)
        measure 590 $offload --model llama2-7b --layers 16 --device-budget-gib 24 --rounds 1 --timeout-s 90 ;;
    7b-40)
        measure 590 $offload --model llama2-7b --device-budget-gib 40 --rounds 1 --timeout-s 120 ;;
    7b)
        measure 590 $offload --model llama2-7b --rounds 1 --timeout-s 120 ;;
    13b)
        measure 590 $offload --model llama2-13b --rounds 1 --timeout-s 150 --contenders ours fsdp2_offload deepspeed_zero3 ;;
    host)
        OMP_NUM_THREADS=$(nproc) measure 300 recipes/bench/host_adam.py ;;
    *)
        echo "there is no part $part; see the head of recipes/bench/gpu.sh"; exit 2 ;;
    esac
done
