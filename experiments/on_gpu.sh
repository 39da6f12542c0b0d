#!/usr/bin/env bash
# All that a GPU is asked for:  bash experiments/on_gpu.sh FOLDER [STAGE] BOOKS.jsonl.gz
# STAGE: checks | benchmark | memory | published | study | waterfall | all (default). Each goes on where it was stopped.
# On an H200 checks take 2 minutes, a file of the benchmark 2 (by torch.compile more), published 4; the others have not
# been run yet. BOOKS is a corpus of long documents that needs no network; its field `text` is read.
#   checks     the paths that only a GPU takes
#   benchmark  step times at the three shapes, beside PyTorch (where torch and transformers are installed), and a profile
#   memory     what fits 24 GiB at each length, and what real steps of it take
#   published  the original's protocol to the letter (leaks on purpose)
#   study      the same model and shapes under the clean protocol, three seeds, paired and independent order, and recall
#   waterfall  from the one to the other, a confound at a time
# Where a command has a time limit, say LIMIT=570 (seconds, for all of this script): what runs then is told to save and stop.
# FOLDER/cache holds corpora and compiled programs, and is worth keeping. What is to be committed is left in
# FOLDER/checks.txt, FOLDER/benchmark-*.json, and the report folders in FOLDER/*.
set -euo pipefail
wrong() { echo "error: $1; bash experiments/on_gpu.sh FOLDER [STAGE] BOOKS.jsonl.gz" >&2; exit 2; }
[ $# -eq 2 ] || [ $# -eq 3 ] || wrong "$# arguments, needs 2 or 3"
folder=$1
stage=all
[ $# -lt 3 ] || { stage=$2; shift; }
books=$2
case $stage in
    checks | benchmark | memory | published | study | waterfall | all) ;;
    *) wrong "STAGE=$stage: choose checks, benchmark, memory, published, study, waterfall or all" ;;
esac
[ -r "$books" ] || wrong "BOOKS=$books: no file that can be read"
python=${PYTHON:-python3}
mkdir -p "$folder"
export XDG_CACHE_HOME; XDG_CACHE_HOME=$(cd "$folder" && pwd)/cache
corpus="--config.data.source=jsonl --config.data.path=$books --config.data.tokenizer=bpe"
clean="--config.data.protocol=clean --config.data.max_documents=0 --config.data.max_document_chars=0 --config.data.max_tokens=0
    --config.data.heldout_fraction=0.15 --config.train.steps=800"

limited() {
    local left=$((${LIMIT:-1000000000} - SECONDS))
    [ $left -gt 0 ] || { echo "LIMIT=$LIMIT is over; the same command goes on from there" >&2; return 124; }
    timeout --foreground --signal=TERM $left "$@"
}
checks() { JAX_PLATFORMS=cuda limited "$python" -m pytest -m gpu tests/test_gpu.py | tee "$folder/checks.txt"; }
benchmark() {
    # benchmark-original.json  dropout as published: ours, the original in PyTorch, eager and by torch.compile
    # benchmark-mixtral.json   gated experts, no dropout (cuDNN's attention can serve): ours, original, transformers' Mixtral
    # benchmark-unrolled.json  ours, dropout as published, without a loop over layers: its copies cost about 2 ms of 32
    # benchmark-profile.json   ours, dropout as published: the parts of a step, and where its time goes by a trace
    local failed=0
    timed original "--implementations=ours$(installed torch ,original,compiled)" || failed=1
    timed mixtral "--implementations=ours$(installed torch ,original)$(installed transformers ,mixtral)" \
        --config.model.activation=swiglu --config.model.dropout=0 || failed=1
    timed unrolled --implementations=ours --config.model.unroll=6 || failed=1
    timed profile --implementations=ours --profile="$folder/traces" || failed=1
    return $failed  # a file with a row that failed is called -failed, and made again by the next command
}
installed() {  # what it says of $2 where the package $1 is there; PyTorch only with CUDA
    "$python" -c "import torch, $1; assert torch.cuda.is_available()" 2>/dev/null && echo "$2" || true
}
timed() {
    local out="$folder/benchmark-$1.json"
    [ ! -e "$out" ] || return 0
    limited "$python" -m experiments.benchmark --scale=published --repeats=20 --config.model.dtype=bfloat16 \
        --out="$out" "${@:2}" && return 0
    [ ! -e "$out" ] || mv "$out" "${out%.json}-failed.json"
    return 1
}
memory() {
    limited "$python" -m experiments.memory_frontier --config=configs/balanced.py:published --budget=24GiB \
        --lengths=256,1024,4096 --workdir="$folder/memory"
    limited "$python" -m experiments.memory_check --workdir="$folder/memory" --most=24GiB
}
published() {  # 10,000 characters of each of 241 books make up the original's 500,000 tokens
    limited "$python" -m experiments.ablation --scale=published --workdir="$folder/published" $corpus \
        --config.data.max_document_chars=10000 --config.train.eval_every=100 --config.train.checkpoint_every=500
}
study() {
    limited "$python" -m experiments.ablation --scale=published --workdir="$folder/study" --seeds=42,43,44 \
        --settings=independent,paired,recall $corpus $clean
}
waterfall() {  # 800 steps stay within one epoch of 25 M tokens; a small corpus of 0.4 M keeps the original's 53 passes
    limited "$python" -m experiments.waterfall --scale=published --workdir="$folder/waterfall" $corpus \
        --config.train.steps=800 --config.data.max_tokens=400000
}

if [ "$stage" = all ]; then
    checks && { benchmark || true; } && memory && published && study && waterfall
else
    $stage
fi
