#!/usr/bin/env bash
# All that a GPU is asked for:  bash experiments/on_gpu.sh FOLDER [STAGE] BOOKS.jsonl.gz
# STAGE: checks | benchmark | memory | published | study | waterfall | all (default). Each goes on where it was stopped, and is meant to
# fit in ten minutes. BOOKS is a corpus of long documents that needs no network; its field `text` is read.
#   checks     the paths that only a GPU takes
#   benchmark  step times at the three shapes
#   memory     what fits 24 GiB at each length, and what real steps of it take
#   published  the original's protocol to the letter (leaks on purpose)
#   study      the same model and shapes under the clean protocol, three seeds, paired and independent order, and recall
#   waterfall  from the one to the other, a confound at a time
# What is to be committed is left in FOLDER/checks.txt, FOLDER/benchmark-*.json, and the report folders in FOLDER/*.
set -euo pipefail
folder=$1
stage=all
[ $# -lt 3 ] || { stage=$2; shift; }
books=$2
python=${PYTHON:-python3}
mkdir -p "$folder"
corpus="--config.data.source=jsonl --config.data.path=$books --config.data.tokenizer=bpe"
clean="--config.data.protocol=clean --config.data.max_documents=0 --config.data.max_document_chars=0 --config.data.max_tokens=0
    --config.data.heldout_fraction=0.15 --config.train.steps=800"

checks() { JAX_PLATFORMS=cuda "$python" -m pytest -m gpu tests/test_gpu.py | tee "$folder/checks.txt"; }
benchmark() {
    for dropout in 0.1 0; do  # as the original; and where cuDNN's attention can serve
        "$python" -m experiments.benchmark --scale=published --implementations=ours --repeats=20 \
            --config.model.dtype=bfloat16 --config.model.dropout=$dropout --out="$folder/benchmark-dropout-$dropout.json"
    done
}
memory() {
    "$python" -m experiments.memory_frontier --config=configs/balanced.py:published --budget=24GiB --lengths=256,1024,4096 \
        --parts --workdir="$folder/memory"
    "$python" -m experiments.memory_check --workdir="$folder/memory" --most=24GiB
}
published() { "$python" -m experiments.ablation --scale=published --workdir="$folder/published" $corpus; }
study() {
    "$python" -m experiments.ablation --scale=published --workdir="$folder/study" --seeds=42,43,44 \
        --settings=independent,paired,recall $corpus $clean
}
waterfall() {  # 800 steps stay within one epoch of 25 M tokens; a small corpus of 0.4 M keeps the original's 53 passes
    "$python" -m experiments.waterfall --scale=published --workdir="$folder/waterfall" $corpus \
        --config.train.steps=800 --config.data.max_tokens=400000
}

case $stage in
    checks | benchmark | memory | published | study | waterfall) $stage ;;
    all) checks && benchmark && memory && published && study && waterfall ;;
    *) echo "stage $stage: choose checks, benchmark, memory, published, study, waterfall or all" >&2; exit 2 ;;
esac
