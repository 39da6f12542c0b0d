#!/usr/bin/env bash
# All that a GPU is asked for:  bash experiments/on_gpu.sh FOLDER [STAGE] BOOKS.jsonl.gz
# STAGE: checks | benchmark | published | study | waterfall | all (default). Each goes on where it was stopped, and is meant to
# fit in ten minutes. BOOKS is a corpus of long documents that needs no network; its field `text` is read.
#   checks     the paths that only a GPU takes
#   benchmark  step times at the three shapes
#   published  the original's protocol to the letter (leaks on purpose)
#   study      the same model and shapes under the clean protocol, three seeds, paired and independent order, and recall
#   waterfall  from the one to the other, a confound at a time
# What is to be committed is left in FOLDER/checks.txt, FOLDER/benchmark.json, and the report folders in FOLDER/*.
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
    "$python" -m experiments.benchmark --scale=published --implementations=ours --repeats=10 --out="$folder/benchmark.json"
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
    checks | benchmark | published | study | waterfall) $stage ;;
    all) checks && benchmark && published && study && waterfall ;;
    *) echo "stage $stage: choose checks, benchmark, published, study, waterfall or all" >&2; exit 2 ;;
esac
