"""Metrics for Prometheus: counts that add up, under the names of vLLM's dashboards."""

from typing import Any

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving import HELLO

ASKED = {"messages": HELLO, "max_tokens": 7, "ignore_eos": True}


def samples(client: httpx2.Client) -> dict[str, float]:
    """All samples by name; those with more labels than the model's by name and the others."""
    found = {}
    for family in text_string_to_metric_families(client.get("/metrics").text):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k != "model_name"}
            if sample.name.startswith("hotloop:"):
                assert sample.labels["model_name"] == "tiny"
            found[sample.name + "".join(f"/{v}" for v in labels.values())] = sample.value
    return found


def difference(client: httpx2.Client, *bodies: dict[str, Any]) -> dict[str, float]:
    before = samples(client)
    for body in bodies:
        client.post("/v1/chat/completions", json=body)
    after = samples(client)
    return {name: value - before.get(name, 0.0) for name, value in after.items()}


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_and_answers_are_counted(client, stream):
    asked = ASKED | {"stream": stream}
    n_prompt = client.post("/v1/chat/completions", json=ASKED).json()["usage"]["prompt_tokens"]
    found = difference(client, asked, asked | {"n": 2})
    counted = {
        "prompt_tokens_total": 2 * n_prompt,
        "generation_tokens_total": 3 * 7,
        "request_success_total/length": 3,
        "prefix_cache_queries_total": 3 * n_prompt,
        "time_to_first_token_seconds_count": 3,
        "inter_token_latency_seconds_count": 3 * 6,
        "e2e_request_latency_seconds_count": 3,
        "request_queue_time_seconds_count": 3,
        "request_prefill_time_seconds_count": 3,
        "request_decode_time_seconds_count": 3,
        "captures_total": 0,
        "num_requests_running": 0,
        "num_requests_waiting": 0,
        "kv_cache_usage_perc": 0,
    }
    for name, value in counted.items():
        assert found[f"hotloop:{name}"] == value, name
    assert found["hotloop:steps_total"] <= found["hotloop:step_rows_total"]


def test_errors_are_counted_by_status(client):
    found = difference(client, {"messages": []}, {"model": "other", "messages": HELLO})
    assert found["hotloop:request_errors_total/400"] == 1
    assert found["hotloop:request_errors_total/404"] == 1


def test_buckets_begin_below_the_time_of_a_token(client):
    names = [n for n in samples(client) if n.startswith("hotloop:inter_token_latency_seconds_b")]
    assert min(float(name.split("/")[1]) for name in names) == 0.00025


def test_the_state_of_the_process_is_told(client):
    assert samples(client)["process_resident_memory_bytes"] > 0
