#!/usr/bin/env bash
# Measures the CUDA backend over HTTP: exec to ready, then 1, 8, 64 and 256 users with 1,024 prompt and 128 output
# tokens. For each model directory a worker of its own; prints markdown.
#
#   benches/gpu.sh MODEL_DIR [MODEL_DIR ...]
#
# MSERVE (default: target/release/mserve), USERS ("1 8 64 256"), DEVICE (cuda), LOGS (a fresh directory).
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
mserve=${MSERVE:-$here/../target/release/mserve}
users=${USERS:-1 8 64 256}
device=${DEVICE:-cuda}
logs=${LOGS:-$(mktemp -d)}
prompt=${PROMPT_TOKENS:-1024}
output=${OUTPUT_TOKENS:-128}
ready_timeout_s=${READY_TIMEOUT_S:-180}
mkdir -p "$logs"
worker=
trap '[ -z "$worker" ] || kill "$worker" 2>/dev/null || true' EXIT

[ $# -gt 0 ] || { echo "usage: $0 MODEL_DIR [MODEL_DIR ...]" >&2; exit 2; }

# Seconds since the epoch, with a fraction.
now() { date +%s.%N; }

measure() {
    local dir=$1 name events log begin vocab port
    name=$(basename "$dir")
    events=$logs/$name.events log=$logs/$name.log
    vocab=$(python3 -c 'import json,sys; c=json.load(open(sys.argv[1]+"/config.json")); print((c.get("text_config") or c)["vocab_size"])' "$dir")
    begin=$(now)
    "$mserve" worker --model "$dir" --served-model-name bench --device "$device" --no-enable-prefix-caching \
        --max-num-queued-reqs 4096 --max-model-len $((prompt + output + 16)) >"$events" 2>"$log" &
    worker=$!
    # A line at a time as it comes; the clock stops when `ready` has been written.
    until grep -q '"event":"ready"' "$events"; do
        if ! kill -0 "$worker" 2>/dev/null; then
            echo "$name: the worker has ended:"; tail -n 5 "$events" "$log"; worker=; return 1
        fi
        if awk -v a="$begin" -v b="$(now)" -v most="$ready_timeout_s" 'BEGIN { exit !(b - a > most) }'; then
            echo "$name: not ready after $ready_timeout_s s"; tail -n 5 "$log"; kill "$worker"; worker=; return 1
        fi
        sleep 0.02
    done
    local ready; ready=$(awk -v a="$begin" -v b="$(now)" 'BEGIN { printf "%.2f", b - a }')
    port=$(sed -n 's/.*"event":"listening","port":\([0-9]*\).*/\1/p' "$events" | head -n 1)
    echo; echo "## $name"; echo
    echo "exec to ready: $ready s"; echo
    grep 'memory of the card' "$log" || true
    echo; echo "| users | output tok/s | TTFT p50 ms | ITL p50 ms | requests | errors |"; echo "|--:|--:|--:|--:|--:|--:|"
    local load=(python3 "$here/http_load.py" --port "$port" --model bench --vocab-size "$vocab" --prompt-tokens "$prompt" --output-tokens "$output")
    "${load[@]}" --users 1 --requests-per-user 1 --seed 7 >/dev/null || true # first kernels, first connections
    for n in $users; do
        "${load[@]}" --users "$n" --requests-per-user 2 --seed "$n" || echo "| $n | failed | | | | |"
    done
    kill "$worker"; wait "$worker" || true
    worker=
}

status=0
for dir in "$@"; do measure "$dir" || status=1; done
echo; echo "logs: $logs"
exit $status
