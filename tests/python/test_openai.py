"""The `openai` client against `mserve launch`, and what clients see when a replica or the launcher is killed."""

import math
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from conftest import wait_until

REQUESTS, TOKENS = 96, 300


def client_of(deployment):
    return openai.OpenAI(base_url=deployment.status()["endpoint"] + "/v1", api_key="none", max_retries=0, timeout=60)


def alive(pid):
    """A process that runs: gone and zombie both count as dead."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_chat_streams_deltas_and_ends_with_usage(deployment):
    client = client_of(deployment)
    messages = [{"role": "user", "content": "And it came to pass"}]
    stream = client.chat.completions.create(
        model="demo", messages=messages, stream=True, max_tokens=48, temperature=0, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert len([p for p in pieces if p]) > 3, "one delta for each few tokens, not the whole text at once"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens > 3
    whole = client.chat.completions.create(model="demo", messages=messages, max_tokens=48, temperature=0)
    assert "".join(pieces) == whole.choices[0].message.content
    assert whole.usage.completion_tokens == chunks[-1].usage.completion_tokens


def test_embeddings_are_unit_vectors_and_near_texts_are_near(deployment):
    client = client_of(deployment)
    texts = ["The king of Israel sent for the prophet.", "The prophet was called by the king.", "Miss Bennet danced with Mr. Bingley at the ball."]
    vectors = [item.embedding for item in client.embeddings.create(model="demo-embed", input=texts).data]
    again = client.embeddings.create(model="demo-embed", input=texts[0]).data[0].embedding
    dot = lambda a, b: sum(x * y for x, y in zip(a, b))
    assert all(math.isclose(dot(v, v), 1.0, abs_tol=1e-3) for v in vectors)
    assert dot(vectors[0], again) > 0.9999
    assert dot(vectors[0], vectors[1]) > dot(vectors[0], vectors[2])


def test_models_and_errors_have_openai_shape(deployment):
    client = client_of(deployment)
    assert {m.id for m in client.models.list().data} == {"demo", "demo-embed"}
    with pytest.raises(openai.NotFoundError) as not_found:
        client.chat.completions.create(model="no-such", messages=[{"role": "user", "content": "x"}])
    assert not_found.value.body["code"] == "model_not_found"
    with pytest.raises(openai.BadRequestError) as too_long:
        client.completions.create(model="demo", prompt="word " * 5000)
    assert too_long.value.body["code"] == "context_length_exceeded"


def test_a_replica_killed_under_load_loses_no_request_that_had_not_begun(deployment):
    client = client_of(deployment)
    victim = next(r for r in deployment.status()["replicas"] if r["id"] == "demo-0")

    def ask(number):
        done = client.completions.create(
            model="demo", prompt=f"And Moses said {number}", max_tokens=TOKENS, extra_body={"ignore_eos": True}
        )
        return done.usage.completion_tokens

    def victim_is_busy():
        replica = next(r for r in deployment.status()["replicas"] if r["id"] == "demo-0")
        return replica["in_flight"] >= 4

    with ThreadPoolExecutor(32) as pool:
        futures = [pool.submit(ask, number) for number in range(REQUESTS)]
        wait_until("the victim has requests in flight", victim_is_busy)
        os.kill(victim["pid"], signal.SIGKILL)
        answers = [future.result() for future in futures]
    assert answers == [TOKENS] * REQUESTS
    assert deployment.status()["router"]["retries_total"] >= 1, "the victim's requests ran again elsewhere"

    def back():
        replica = next(r for r in deployment.status()["replicas"] if r["id"] == "demo-0")
        return replica if replica["state"]["state"] == "ready" and replica["pid"] != victim["pid"] else None

    replica = wait_until("the killed replica is back", back)
    assert replica["restarts"] == 1
    assert "SIGKILL" in replica["last_exit"]


def test_a_stream_cut_by_a_kill_ends_with_an_error_not_with_done(deployment):
    client = client_of(deployment)
    stream = client.completions.create(
        model="demo", prompt="And Moses said", max_tokens=2000, stream=True, extra_body={"ignore_eos": True}
    )
    with pytest.raises(openai.APIError):
        for number, _ in enumerate(stream):
            if number == 3:
                busy = [r for r in deployment.status()["replicas"] if r["in_flight"]]
                assert len(busy) == 1
                os.kill(busy[0]["pid"], signal.SIGKILL)


def test_no_process_outlives_a_killed_launcher(deployment):
    pids = deployment.pids()
    assert all(alive(pid) for pid in pids) and len(pids) == 3
    deployment.process.kill()
    deployment.process.wait()
    wait_until("every replica gone", lambda: not any(alive(pid) for pid in pids), 10)


def test_an_asked_stop_ends_with_zero_and_leaves_nothing(deployment):
    pids = deployment.pids()
    deployment.process.send_signal(signal.SIGTERM)
    assert deployment.process.wait(30) == 0
    assert not any(alive(pid) for pid in pids)
