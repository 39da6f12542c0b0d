#!/usr/bin/env bash
# All that a GPU is asked for, with one command:  bash experiments/on_gpu.sh FOLDER [--config.data.source=jsonl ...]
# Checks the GPU's own paths, times the steps, and runs the published ablation. The flags name a corpus that needs no
# network, for example --config.data.source=jsonl --config.data.path=books.jsonl.gz --config.data.tokenizer=bpe
# What is to be committed is left in FOLDER/checks.txt, FOLDER/benchmark.json and FOLDER/ablation/report.
set -euo pipefail
folder=$1
shift
mkdir -p "$folder"
python=${PYTHON:-python3}
JAX_PLATFORMS=cuda "$python" -m pytest -m gpu tests/test_gpu.py | tee "$folder/checks.txt"
"$python" -m experiments.benchmark --scale=published --implementations=ours --repeats=10 --out="$folder/benchmark.json"
"$python" -m experiments.ablation --scale=published --workdir="$folder/ablation" "$@"
