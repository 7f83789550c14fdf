# `just` lists these. CI runs `.ci/run`.

default:
    @just --list

# Everything CI checks
ci:
    .ci/run

# README's test command, in parallel processes where nextest is installed
test:
    cargo nextest run --workspace || cargo test --workspace

# The runtime on a card: logits, texts, sampling and a mixed load against the CPU, then every kernel against float64
test-card:
    cargo test --release -p mserve-runtime --test card -- --require-card
    cargo run --release -p mserve-runtime --example kernel_check -- check

lint:
    cargo fmt --all --check
    cargo clippy --workspace --all-targets -- -D warnings

# Licences, banned crates, sources (advisories too where the database can be fetched)
deny:
    command -v cargo-deny >/dev/null || cargo install --locked cargo-deny
    cargo deny check bans licenses sources

# Tokens per second of the CPU engine, beside the machine's memory bandwidth
bench:
    cargo run --release -- bench

# The demo model again: needs Debian's bible-kjv packages and a GPU with PyTorch
train-demo:
    python3 examples/demo-model/train/prepare_text.py target/corpus.txt
    python3 examples/demo-model/train/train.py target/corpus.txt examples/demo-model
