#!/usr/bin/env python3
"""How long `mserve plan` takes, process start included: on every config of the tests (the slowest are named), with
targets, with small models, and on a checkpoint of 700 safetensors files whose headers are written here (the data behind them is a hole in the file).

    cargo build --release && benches/plan.py [target/release/mserve]
"""
import json
import os
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
CONFIGS = os.path.join(HERE, "..", "planner", "tests", "fixtures", "configs")
FILES = 700


def config(name):
    return os.path.join(CONFIGS, name + ".json")


def tensors(layers=61, experts=256, hidden=7168, inner=2048):
    """Names and shapes of DeepSeek-V3: 45,000 tensors of experts and what stands around them."""
    yield "model.embed_tokens.weight", [129280, hidden]
    for layer in range(layers):
        base = f"model.layers.{layer}"
        yield f"{base}.self_attn.q_a_proj.weight", [1536, hidden]
        yield f"{base}.self_attn.q_b_proj.weight", [24576, 1536]
        yield f"{base}.self_attn.kv_a_proj_with_mqa.weight", [576, hidden]
        yield f"{base}.self_attn.kv_b_proj.weight", [32768, 512]
        yield f"{base}.self_attn.o_proj.weight", [hidden, 16384]
        yield f"{base}.input_layernorm.weight", [hidden]
        for expert in range(experts if layer >= 3 else 0):
            yield f"{base}.mlp.experts.{expert}.gate_proj.weight", [inner, hidden]
            yield f"{base}.mlp.experts.{expert}.up_proj.weight", [inner, hidden]
            yield f"{base}.mlp.experts.{expert}.down_proj.weight", [hidden, inner]
    yield "lm_head.weight", [129280, hidden]


def write_checkpoint(directory):
    everything = list(tensors())
    per_file = -(-len(everything) // FILES)
    weight_map = {}
    for index in range(FILES):
        name = f"model-{index + 1:05d}-of-{FILES:05d}.safetensors"
        header, offset = {}, 0
        for tensor, shape in everything[index * per_file : (index + 1) * per_file]:
            size = 1
            for n in shape:
                size *= n
            header[tensor] = {"dtype": "F8_E4M3", "shape": shape, "data_offsets": [offset, offset + size]}
            offset += size
            weight_map[tensor] = name
        if not header:
            break
        text = json.dumps(header).encode()
        with open(os.path.join(directory, name), "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + offset)
    with open(os.path.join(directory, "model.safetensors.index.json"), "w") as file:
        json.dump({"metadata": {}, "weight_map": weight_map}, file)
    with open(config("deepseek-ai__DeepSeek-V3")) as source, open(os.path.join(directory, "config.json"), "w") as file:
        file.write(source.read())
    return len(set(weight_map.values())), len(weight_map)


def timed(command, runs):
    """Milliseconds of each run, the shortest first."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        result = subprocess.run(command, capture_output=True)
        times.append(1e3 * (time.perf_counter() - start))
        if result.returncode not in (0, 3):
            sys.exit(f"{' '.join(command)}: {result.stderr.decode()}")
    return sorted(times)


def show(title, times):
    print(f"{title:<48} median {times[len(times) // 2]:7.1f} ms   best {times[0]:7.1f}   worst {times[-1]:7.1f}")


def measure(title, command, runs=30):
    show(title, timed(command, runs))


def every_config(plan, slowest=4, runs=7):
    flags = ["--gpu", "h200", "--gpus", "8"]
    found = {}
    for name in sorted(os.listdir(CONFIGS)):
        if name.endswith(".json") and not name.endswith(".hf_quant_config.json"):
            found[name.removesuffix(".json")] = timed(plan + [os.path.join(CONFIGS, name)] + flags, runs)
    by_median = sorted(found, key=lambda name: found[name][runs // 2])
    print(f"{len(found)} configs on 8 x H200, {runs} runs each:")
    show(f"  the middle one, {by_median[len(by_median) // 2][:28]}", found[by_median[len(by_median) // 2]])
    for name in reversed(by_median[-slowest:]):
        show(f"  {name[:44]}", found[name])


def main():
    binary = sys.argv[1] if len(sys.argv) > 1 else os.path.join(HERE, "..", "target", "release", "mserve")
    plan = [binary, "plan"]
    llama, r1 = config("meta-llama__Meta-Llama-3.1-8B"), config("deepseek-ai__DeepSeek-R1")
    small = ["--slm", config("BAAI__bge-large-en-v1.5"), "--slm", config("BAAI__bge-reranker-v2-m3")]
    every_config(plan)
    measure("Llama-3.1-8B, 8 x H200", plan + [llama, "--gpu", "h200", "--gpus", "8"])
    measure("the same over all common cards", plan + [llama, "--gpus", "8"])
    measure("DeepSeek-R1, 8 x H200", plan + [r1, "--gpu", "h200", "--gpus", "8"])
    measure("Llama-3.1-8B, targets, number of cards sought", plan + [llama, "--gpu", "h200", "--target-request-rate", "500"])
    measure("Llama-3.1-8B with two small models, 8 x H200", plan + [llama, "--gpu", "h200", "--gpus", "8"] + small)
    with tempfile.TemporaryDirectory() as directory:
        files, count = write_checkpoint(directory)
        measure(f"DeepSeek-V3, headers of {files} files, {count:,} tensors", plan + [directory, "--gpu", "h200", "--gpus", "8"])


if __name__ == "__main__":
    main()
