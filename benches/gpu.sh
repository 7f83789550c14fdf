#!/usr/bin/env bash
# Measures the CUDA backend and prints markdown for BENCHMARKS.md: for each model directory a worker of its own under 1,
# 8, 64 and 256 users over HTTP (1,024 prompt and 128 output tokens), then 512 requests at once through the engine alone
# (1,024 and 256 tokens). With CUDA_CHECK (the path of the built example cuda_check) the time of single steps too.
#
#   benches/gpu.sh MODEL_DIR [MODEL_DIR ...]
#
# MSERVE (default: target/release/mserve), USERS ("1 8 64 256"; empty: none), OFFLINE_PROMPTS (512; 0: none), DEVICE (cuda),
# REQUESTS_PER_USER (2), WORKER_ARGS, LOGS (a fresh directory).
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
mserve=${MSERVE:-$here/../target/release/mserve}
users=${USERS-1 8 64 256}
offline_prompts=${OFFLINE_PROMPTS:-512}
device=${DEVICE:-cuda}
each=${REQUESTS_PER_USER:-2}
logs=${LOGS:-$(mktemp -d)}
input=${INPUT_LEN:-1024}
output=${OUTPUT_LEN:-128}
offline_output=${OFFLINE_OUTPUT_LEN:-256}
ready_timeout_s=${READY_TIMEOUT_S:-180}
mkdir -p "$logs"
worker=
trap '[ -z "$worker" ] || kill "$worker" 2>/dev/null || true' EXIT

[ $# -gt 0 ] || { echo "usage: $0 MODEL_DIR [MODEL_DIR ...]" >&2; exit 2; }

# Seconds since the epoch, with a fraction.
now() { date +%s.%N; }
seconds_since() { awk -v a="$1" -v b="$(now)" 'BEGIN { printf "%.2f", b - a }'; }
# A figure of a report: the first number after a label.
figure() { awk -v label="$2" -v at="${3:-1}" 'index($0, label) == 1 { $0 = substr($0, length(label) + 1); print $at; exit }' "$1"; }

start_worker() {
    local dir=$1 events=$2 log=$3 begin
    begin=$(now)
    # shellcheck disable=SC2086
    "$mserve" worker --model "$dir" --served-model-name bench --device "$device" --no-enable-prefix-caching \
        --max-num-queued-reqs 4096 --max-model-len $((input + output + 16)) ${WORKER_ARGS:-} >"$events" 2>"$log" &
    worker=$!
    # The clock stops when `ready` has been written.
    until grep -q '"event":"ready"' "$events"; do
        if ! kill -0 "$worker" 2>/dev/null; then
            echo "the worker has ended:"; tail -n 5 "$events" "$log"; worker=; return 1
        fi
        if awk -v s="$(seconds_since "$begin")" -v most="$ready_timeout_s" 'BEGIN { exit !(s > most) }'; then
            echo "not ready after $ready_timeout_s s"; tail -n 5 "$log"; stop_worker; return 1
        fi
        sleep 0.02
    done
    echo "exec to ready: $(seconds_since "$begin") s"; echo
    # What a start puts off to idle times is not what is measured here.
    if [[ $device == cuda* ]]; then
        for _ in $(seq 300); do grep -q 'all is measured and captured' "$log" && break; sleep 0.1; done
        echo "measured and captured: $(seconds_since "$begin") s"; echo
    fi
    grep -h 'where the time of the start went\|memory of the card' "$log" || true
}

stop_worker() { kill "$worker" 2>/dev/null || true; wait "$worker" || true; worker=; }

over_http() {
    local dir=$1 name=$2 port report vocab
    start_worker "$dir" "$logs/$name.events" "$logs/$name.log" || return 1
    port=$(sed -n 's/.*"event":"listening","port":\([0-9]*\).*/\1/p' "$logs/$name.events" | head -n 1)
    vocab=$(tr -d ' \n' <"$dir/config.json" | sed -n 's/.*"vocab_size":\([0-9]*\).*/\1/p')
    load() {
        "$mserve" bench --url "http://127.0.0.1:$port" --vocab-size "$vocab" --input-len "$input" --output-len "$output" \
            --users "$1" --num-prompts "$2" --seed "$1"
    }
    load 1 1 >/dev/null || true # first kernels, first connections
    echo; echo "| users | output tok/s | TTFT p50 ms | p99 | TPOT p50 ms | ITL p99 ms | device idle | host ms a step | requests | errors |"
    echo "|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|"
    for n in $users; do
        report=$logs/$name.$n.txt
        load "$n" $((each * n)) >"$report" || { echo "| $n | failed | | | | | | | | |"; continue; }
        echo "| $n | $(figure "$report" "Output token throughput (tok/s):") | $(figure "$report" TTFT 2) |" \
            "$(figure "$report" TTFT 4) | $(figure "$report" TPOT 2) | $(figure "$report" ITL 4) |" \
            "$(figure "$report" "device idle") % | $(sed -n 's/.*host \([0-9.]*\) ms.*/\1/p' "$report") |" \
            "$(figure "$report" "Successful requests:") | $(figure "$report" "Failed requests:") |"
    done
    for n in $users; do
        [ ! -s "$logs/$name.$n.txt" ] || { echo; echo "$n users:"; grep -E ' steps of |^error' "$logs/$name.$n.txt"; }
    done
    stop_worker
}

offline() {
    echo; echo "Offline, $offline_prompts requests of $input and $offline_output tokens:"; echo '```'
    # shellcheck disable=SC2086
    "$mserve" bench --device "$device" --model "$1" --num-prompts "$offline_prompts" --input-len "$input" \
        --output-len "$offline_output" ${OFFLINE_ARGS:-} || { echo '```'; return 1; }
    echo '```'
}

status=0
card=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null | head -n 1 || true)
echo "$(date -u +%F), ${card:-no card}, $(nproc) cores"
for dir in "$@"; do
    name=$(basename "$dir")
    echo; echo "## $name"; echo
    [ -z "$users" ] || over_http "$dir" "$name" || status=1
    [ "$offline_prompts" = 0 ] || offline "$dir" || status=1
done
if [ -n "${CUDA_CHECK:-}" ]; then
    echo; echo "Decode steps, contexts of 1,024:"; echo; echo "| shape | batch | ms one by one | ms with one ahead |"; echo "|---|--:|--:|--:|"
    "$CUDA_CHECK" llama qwen | tee "$logs/cuda_check.txt" |
        sed -n -e 's/^== //p;s/^decode batch \([0-9]*\): \([0-9.]*\) ms.*, \([0-9.]*\) ms.*/\1 \2 \3/p' |
        awk 'NF != 3 || $1 !~ /^[0-9]/ { shape = $0; next } { print "| " shape " | " $1 " | " $2 " | " $3 " |" }' || status=1
    grep -E '^prefill' "$logs/cuda_check.txt" || true
fi
echo; echo "logs: $logs"
exit $status
