from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tiny_tokenizers import CHATML, byte_level_folder

from hotloop.errors import CheckpointError, RequestError, UnsupportedError
from hotloop.text.tokenizer import load_tokenizer

MESSAGES = [
    {"role": "system", "content": "Be brief & <kind>."},
    {"role": "user", "content": "What's 2 + 2?\n"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": 'naïve 🙂 "quoted"'},
]

WHITESPACE = """
{# a comment #}
{{ bos_token }}
{% set ns = namespace(n=0) %}
{% for message in messages %}
    {% set ns.n = ns.n + 1 %}
    {% if message.role == 'system' %}
        {% continue %}
    {% endif %}
[{{ ns.n }}] {{ message.content | trim }}
    {% if ns.n == 3 %}{% break %}{% endif %}
{% endfor %}
{{ eos_token }}
"""

JSON = "{{ messages | tojson }}|{{ messages[0] | tojson(indent=2) }}|{{ dict(a=1) | tojson }}"

GENERATION = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)

OPTIONAL = (
    "{% if tools is not none %}T{% endif %}{% if documents %}D{% endif %}"
    "{% if enable_thinking is defined and not enable_thinking %}N{% endif %}{{ unk_token }}"
)


def folder_with(folder: Path, template: Any) -> Path:
    return byte_level_folder(folder, chat_template=template)


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize(
    "template",
    [CHATML, WHITESPACE, JSON, GENERATION, OPTIONAL],
    ids=["chatml", "whitespace", "json", "generation", "optional"],
)
def test_prompt_is_that_of_transformers(template: str, prompt: bool, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    ours = load_tokenizer(folder_with(tmp_path, template))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for messages in (MESSAGES, MESSAGES[1:2]):
        text = ours.apply_chat_template(
            messages, add_generation_prompt=prompt, enable_thinking=False
        )
        assert text == theirs.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=prompt, enable_thinking=False
        )
        ids = theirs.apply_chat_template(
            messages, add_generation_prompt=prompt, enable_thinking=False
        )["input_ids"]
        assert ours.encode(text, add_special=False, parse_special=True) == ids


def test_template_in_a_file_of_its_own_comes_first(tmp_path: Path) -> None:
    folder_with(tmp_path, "from the configuration")
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert load_tokenizer(tmp_path).apply_chat_template(MESSAGES) == "from the file"


def test_of_several_templates_the_default_is_taken(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    assert load_tokenizer(folder_with(tmp_path, named)).apply_chat_template(MESSAGES) == "d"


@pytest.mark.parametrize("template", [None, [{"name": "tool_use", "template": "t"}]])
def test_model_without_a_template_says_so(template: Any, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder_with(tmp_path, template))
    assert tokenizer.chat_template is None
    with pytest.raises(UnsupportedError, match="has no chat template"):
        tokenizer.apply_chat_template(MESSAGES)


def test_template_can_refuse_messages(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder_with(tmp_path, CHATML))
    with pytest.raises(RequestError, match="no role robot"):
        tokenizer.apply_chat_template([{"role": "robot", "content": "x"}])


@pytest.mark.parametrize("message", [{"role": "user"}, {"role": "user", "content": None}])
def test_messages_without_content_are_refused(message: dict, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder_with(tmp_path, CHATML))
    with pytest.raises(RequestError, match="chat template"):
        tokenizer.apply_chat_template([message])


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{% for i in range(10**9) %}{% endfor %}",
    ],
)
def test_template_cannot_reach_out_of_the_sandbox(attack: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder_with(tmp_path, attack))
    with pytest.raises(RequestError):
        tokenizer.apply_chat_template(MESSAGES)


def test_template_that_is_not_jinja_is_refused(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder_with(tmp_path, "{% for %}"))
    with pytest.raises(CheckpointError, match="not valid Jinja"):
        tokenizer.apply_chat_template(MESSAGES)


def test_template_can_ask_for_the_date(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder_with(tmp_path, "{{ strftime_now('%Y-%m-%d') }}"))
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", tokenizer.apply_chat_template(MESSAGES))


def test_messages_are_left_as_they_were(tmp_path: Path) -> None:
    before = json.dumps(MESSAGES)
    load_tokenizer(folder_with(tmp_path, CHATML)).apply_chat_template(MESSAGES)
    assert json.dumps(MESSAGES) == before
