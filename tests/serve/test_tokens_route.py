"""Tokenizing over HTTP, as lm-eval's client does it."""

from serving import HELLO
from tiny_models import encode


def test_a_text_is_encoded_and_decoded(client):
    answer = client.post("/tokenize", json={"prompt": "The engine", "return_token_strs": True})
    body = answer.json()
    assert body["tokens"] == encode("The engine")
    assert body["count"] == len(body["tokens"])
    assert body["max_model_len"] == 320
    assert "".join(body["token_strs"]) == "The engine"
    assert client.post("/detokenize", json={"tokens": body["tokens"]}).json() == {
        "prompt": "The engine"
    }


def test_a_conversation_is_encoded_by_the_template(client):
    tokens = client.post("/tokenize", json={"messages": HELLO}).json()["tokens"]
    text = client.post("/detokenize", json={"tokens": tokens}).json()["prompt"]
    assert text == "<begin>user: Hello\n<begin>assistant: "
    usage = client.post("/v1/chat/completions", json={"messages": HELLO, "max_tokens": 1}).json()
    assert usage["usage"]["prompt_tokens"] == len(tokens)


def test_the_tokenizer_is_described(client):
    info = client.get("/tokenizer_info").json()
    assert info["eos_token"] == "<end>"
    assert info["bos_token"] == "<begin>"
    assert "add_generation_prompt" in info["chat_template"]


def test_an_invalid_request_to_tokenize_is_refused(client):
    for path, body in (("/tokenize", {}), ("/detokenize", {"tokens": [10**6]})):
        response = client.post(path, json=body)
        assert response.status_code == 400
        assert response.json()["error"]["message"]
