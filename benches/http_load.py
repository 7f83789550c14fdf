#!/usr/bin/env python3
"""Load on an OpenAI-compatible /v1/completions: N users at once, prompts as token ids, greedy, ignore_eos.

Prints one line of a markdown table: users, output tok/s, time to first token and time between tokens (medians).
Python's standard library only.
"""
import argparse
import http.client
import json
import random
import statistics
import threading
import time


def arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", required=True, help="name that the server knows")
    parser.add_argument("--users", type=int, default=1)
    parser.add_argument("--requests-per-user", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--vocab-size", type=int, required=True)
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one request")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def one_request(args, prompt):
    """(time of submission, times at which text or tokens came, output tokens)"""
    connection = http.client.HTTPConnection(args.host, args.port, timeout=args.timeout)
    body = {
        "model": args.model,
        "prompt": prompt,
        "max_tokens": args.output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    start = time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(f"status {response.status}: {response.read(500)!r}")
    times, tokens, failed = [], 0, None
    while line := response.readline():
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            break
        event = json.loads(data)
        if "error" in event:
            failed = event["error"]
        if event.get("choices"):
            times.append(time.perf_counter())
        if event.get("usage"):
            tokens = event["usage"]["completion_tokens"]
    connection.close()
    if failed or not times or tokens == 0:
        raise RuntimeError(f"no whole answer: {failed}")
    return start, times, tokens


def user(args, number, start_line, results, errors):
    chance = random.Random(args.seed * 1_000_003 + number)
    start_line.wait()
    for _ in range(args.requests_per_user):
        prompt = [chance.randrange(args.vocab_size) for _ in range(args.prompt_tokens)]
        try:
            results.append(one_request(args, prompt))
        except (OSError, RuntimeError, ValueError, http.client.HTTPException) as error:
            errors.append(f"{type(error).__name__}: {error}")


def main():
    args = arguments()
    results, errors = [], []
    start_line = threading.Barrier(args.users + 1)
    threads = [
        threading.Thread(target=user, args=(args, number, start_line, results, errors), daemon=True)
        for number in range(args.users)
    ]
    for thread in threads:
        thread.start()
    start_line.wait()
    begin = time.perf_counter()
    for thread in threads:
        thread.join()
    if not results:
        raise SystemExit(f"every request failed: {errors[0] if errors else 'no reason given'}")
    end = max(times[-1] for _, times, _ in results)
    tokens = sum(count for _, _, count in results)
    ttft = statistics.median(times[0] - start for start, times, _ in results)
    # Over whole requests: several tokens may come in one event.
    itl = statistics.median((times[-1] - times[0]) / max(count - 1, 1) for _, times, count in results)
    row = {
        "users": args.users,
        "output_tokens_per_s": round(tokens / (end - begin), 1),
        "ttft_p50_ms": round(1e3 * ttft, 1),
        "itl_p50_ms": round(1e3 * itl, 2),
        "requests": len(results),
        "errors": len(errors),
    }
    if args.json:
        print(json.dumps(row))
    else:
        print("| " + " | ".join(str(value) for value in row.values()) + " |", flush=True)
    for error in sorted(set(errors))[:3]:
        print(f"  error: {error}")


if __name__ == "__main__":
    main()
