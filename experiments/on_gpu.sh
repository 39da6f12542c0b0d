#!/usr/bin/env bash
# All that a GPU is asked for:  bash experiments/on_gpu.sh FOLDER [STAGE] BOOKS.jsonl.gz
# STAGE: checks | benchmark | published | memory | all (default: these four, 10 minutes each at most), or study |
# waterfall, which take longer, or corpora. Each goes on where it was stopped. Checks have to pass before anything is
# measured; of the others one that fails, or is out of time, keeps none from running.
# On an H200 checks take 2 minutes, a file of the benchmark 2 (by torch.compile more), published 4; the others have not
# been run yet. BOOKS is a corpus of long documents that needs no network; its field `text` is read, but by checks,
# benchmark and memory, which read no text: any file will do for these.
#   corpora    needs no GPU: what is read is cut into tokens, by the same BOOKS (3 minutes on two CPU cores)
#   checks     the paths that only a GPU takes
#   benchmark  step times at the three shapes, beside PyTorch (where torch and transformers are installed), and a profile
#   published  the original's protocol to the letter (leaks on purpose)
#   memory     what fits 24 GiB at each length, and what real steps of it take
#   study      the same model and shapes under the clean protocol, three seeds, paired and independent order, and recall
#   waterfall  from the one to the other, a confound at a time
# Where a command has a time limit, say LIMIT=540 (seconds, for all of this script): what runs then is told to save and
# stop, and gets 25 seconds for it.
# One GPU is used: CUDA_VISIBLE_DEVICES says which. Another card or commit gets another FOLDER: what is there is not made again.
# FOLDER/cache holds corpora and compiled programs, and is worth keeping. What is to be committed is left in
# FOLDER/checks.txt, FOLDER/benchmark-*.json, FOLDER/clocks.csv, and the report folders in FOLDER/*; FOLDER/kept.tar.gz
# holds all but cache and checkpoints. Unpacked elsewhere, finished runs are not run again, and `--report_only` makes the
# report of those there are.
# The README's published_h200.json, _swiglu and _profile are benchmark-original, -mixtral and -profile.json.
set -euo pipefail
wrong() { echo "error: $1; bash experiments/on_gpu.sh FOLDER [STAGE] BOOKS.jsonl.gz" >&2; exit 2; }
[ $# -eq 2 ] || [ $# -eq 3 ] || wrong "$# arguments, needs 2 or 3"
folder=$1
stage=all
[ $# -lt 3 ] || { stage=$2; shift; }
books=$2
case $stage in
    corpora | checks | benchmark | memory | published | study | waterfall | all) ;;
    *) wrong "STAGE=$stage: choose corpora, checks, benchmark, memory, published, study, waterfall or all" ;;
esac
[ -f "$books" ] && [ -r "$books" ] || wrong "BOOKS=$books: no file that can be read"
[[ ${LIMIT:-1} =~ ^[1-9][0-9]*$ ]] || wrong "LIMIT=$LIMIT: give whole seconds"
[ -f experiments/on_gpu.sh ] || wrong "$PWD is not the repository: run it there"
python=${PYTHON:-python3}
mkdir -p "$folder"
root=$(cd "$folder" && pwd)
export XDG_CACHE_HOME=$root/cache TORCHINDUCTOR_CACHE_DIR=$root/cache/inductor TRITON_CACHE_DIR=$root/cache/triton
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}
export JAX_PLATFORMS=cuda,cpu # a JAX without CUDA stops here, and does not go on for hours on a CPU
corpus=(--config.data.source=jsonl "--config.data.path=$books" --config.data.tokenizer=bpe)
original=(--scale=published "--workdir=$folder/published" "${corpus[@]}" # 10,000 characters of each of 241 books make up
    --config.data.max_document_chars=10000 --config.train.eval_every=100 --config.train.checkpoint_every=500) # 500,000 tokens
clean=(--scale=published "--workdir=$folder/study" --seeds=42,43,44 --settings=independent,paired,recall "${corpus[@]}"
    --config.data.protocol=clean --config.data.max_documents=0 --config.data.max_document_chars=0 --config.data.max_tokens=0
    --config.data.heldout_fraction=0.15 --config.train.steps=800
    --config.train.keep_last=1 --config.train.keep_best=false) # 0.7 GB a checkpoint, of 24 runs
between=(--scale=published "--workdir=$folder/waterfall" "${corpus[@]}" # 800 steps stay within one epoch of 25 M tokens;
    --config.train.steps=800 --config.data.max_tokens=400000) # a small corpus of 0.4 M keeps the original's 53 passes

ends=${LIMIT:-1000000000} # seconds after the start of this script; of each stage of `all` 10 minutes after its own
left() {
    local until=${LIMIT:-$ends}
    echo $(((ends < until ? ends : until) - SECONDS))
}
limited() {
    [ "$(left)" -gt 0 ] || { echo "out of time; the same command goes on from there" >&2; return 124; }
    timeout --foreground --signal=TERM --kill-after=25 "$(left)" "$@"
}
corpora() {
    export JAX_PLATFORMS=cpu
    limited "$python" -m experiments.ablation --check_only "${original[@]}" || return
    limited "$python" -m experiments.ablation --check_only "${clean[@]}" || return
    limited "$python" -m experiments.waterfall --check_only "${between[@]}"
}
checks() {
    [ "$stage" = checks ] || [ ! -e "$folder/checks.txt" ] || return 0
    limited "$python" -m pytest -m gpu tests/test_gpu.py | tee "$folder/checks-failed.txt" || return
    mv "$folder/checks-failed.txt" "$folder/checks.txt"
}
benchmark() {
    # benchmark-original.json  dropout as published: ours, the original in PyTorch, eager
    # benchmark-mixtral.json   gated experts, no dropout (cuDNN's attention can serve): ours, original, transformers' Mixtral
    # benchmark-unrolled.json  ours, dropout as published, without a loop over layers: its copies cost about 2 ms of 32
    # benchmark-profile.json   ours, dropout as published: the parts of a step, and where its time goes by a trace
    # benchmark-compiled.json  ours, and the original by torch.compile: last, for how long it takes is not known
    local failed=0
    timed original torch --implementations=ours,original || noted || return
    timed mixtral transformers --implementations=ours,original,mixtral --config.model.activation=swiglu \
        --config.model.dropout=0 || noted || return
    timed unrolled "" --implementations=ours --config.model.unroll=6 || noted || return
    timed profile "" --implementations=ours --profile="$folder/traces" || noted || return
    timed compiled torch --implementations=ours,compiled || noted || return
    return $failed # a file with a row that failed is called -failed, and made again by the next command
}
noted() { # after a command that failed: out of time ends its stage, anything else is said at its end
    local code=$?
    [ $code -ne 124 ] || return 124
    failed=1
}
timed() { # a file of the benchmark, the package that its peers need, arguments
    local out="$folder/benchmark-$1.json" code=0
    [ ! -e "$out" ] || return 0
    if [ -n "$2" ] && ! "$python" -c "import torch, $2; assert torch.cuda.is_available()" 2>/dev/null; then
        echo "$out: left out, for PyTorch with CUDA, or $2, is not installed" >&2
        return 0
    fi
    [ "$(left)" -gt 200 ] || { echo "too little time is left for $out; the same command begins with it" >&2; return 124; }
    limited "$python" -m experiments.benchmark --scale=published --repeats=20 --config.model.dtype=bfloat16 \
        --out="$out" "${@:3}" && return 0 || code=$?
    [ ! -e "$out" ] || mv "$out" "${out%.json}-failed.json"
    return $code
}
memory() {
    # Once: to plan anew would compile anew where the cache is not, and what was measured of another plan is dropped.
    [ -e "$folder/memory/frontier.json" ] ||
        limited "$python" -m experiments.memory_frontier --config=configs/balanced.py:published --budget=24GiB \
            --lengths=256,1024,4096 --workdir="$folder/memory" || return
    limited "$python" -m experiments.memory_check --workdir="$folder/memory" --most=24GiB
}
published() { watched limited "$python" -m experiments.ablation "${original[@]}"; }
watched() { # beside a command the card's clock, power and heat in clocks.csv: a step was seen to grow in 100 steps
    local code=0
    if command -v nvidia-smi >/dev/null; then
        nvidia-smi --id="$CUDA_VISIBLE_DEVICES" --loop=1 --format=csv \
            --query-gpu=timestamp,clocks.sm,power.draw,temperature.gpu >>"$folder/clocks.csv" 2>/dev/null &
        watcher=$!
    fi
    "$@" || code=$?
    unwatched
    return $code
}
unwatched() {
    [ -z "$watcher" ] || { kill "$watcher" && wait "$watcher"; } 2>/dev/null || true
    watcher=""
}
study() { limited "$python" -m experiments.ablation "${clean[@]}"; }
waterfall() { limited "$python" -m experiments.waterfall "${between[@]}"; }
pack() {
    tar -C "$root" -czf "$root.tmp" --exclude=./cache --exclude=./traces --exclude=checkpoints --exclude=tb \
        --exclude=./kept.tar.gz . && mv "$root.tmp" "$root/kept.tar.gz"
}
watcher=""
trap 'unwatched; pack || echo "kept.tar.gz was not made" >&2' EXIT

failed=0
if [ "$stage" = all ]; then
    ends=600
    checks
    for stage_of_all in benchmark published memory; do
        ends=$((SECONDS + 600)) code=0
        $stage_of_all || code=$?
        [ $code -ne 124 ] || [ -z "${LIMIT:-}" ] || exit 124
        [ $code -eq 0 ] || { failed=1; echo "$stage_of_all failed or is out of time; the others go on" >&2; }
    done
else
    $stage || failed=$?
fi
exit $failed
