#!/usr/bin/env bash
# Everything that can only be known on a GPU, measured part by part; this file is the door to gpu.py.
#
#     bash recipes/bench/gpu.sh                     # every part without results, largest promise first
#     bash recipes/bench/gpu.sh resident rates      # these two only
#     bash recipes/bench/gpu.sh --warm-up           # on a fresh machine: compiles all of it first, side by side
#     bash recipes/bench/gpu.sh --seconds 520       # starts nothing that could not end within 520 s from now
#     bash recipes/bench/gpu.sh --out FOLDER        # results go there, as JSON lines (recipes/bench/results)
#     bash recipes/bench/gpu.sh plan --card h200    # what is measured and predicted; needs no GPU
#     bash recipes/bench/gpu.sh summary             # predicted, measured, difference, as a Markdown table
#     bash recipes/bench/gpu.sh --help              # the other flags
#
# What is measured stands in gpu_plan.py, as a table: 7B with everything on the device first, then what a step
# is made of, FSDP2, the tests, and 3.5B to 13B under budgets against FSDP2's offload. Each part ends within
# ten minutes, and every figure is on the disk as soon as it is known, so a machine may go away at any moment:
# the next call goes on with what is missing.
#
# A bare machine needs torch, transformers, triton, pytest and tensorboard. What else the recipes import is
# pure Python and can be brought along as wheels (tyro, docstring_parser, typeguard):
#
#     WHEELS=folder/of/wheels PYTHON=python3.12 bash recipes/bench/gpu.sh
set -euo pipefail
for wheel in ${WHEELS:+"$WHEELS"/*.whl}; do
    export PYTHONPATH="$(realpath "$wheel")${PYTHONPATH:+:$PYTHONPATH}"
done
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu.py" "$@"
