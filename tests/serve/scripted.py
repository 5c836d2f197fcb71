"""A model with fixed answers, of which the last character of the prompt chooses one."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import tokenizers
import torch
from tiny_models import END, N_TOKENS, encode, write_markov

TEMPLATE = """{%- if tools %}<begin>tools: {{ tools | tojson }}
{% endif -%}
{%- for message in messages -%}
<begin>{{ message['role'] }}: {{ message['content'] }}
{%- for call in message.tool_calls or () %}{{ call.function | tojson }}{% endfor %}
{% endfor -%}
{%- if add_generation_prompt -%}<begin>assistant: {{ begin or '' }}{{ script or 'A' }}{% endif -%}
"""
"""A chat template that knows tools. Its variable ``script``, a letter, chooses the answer."""


def write_answers(
    folder: Path,
    answers: Mapping[str, Sequence[str]],
    *,
    control_tokens: Sequence[str] = (),
    template: str = TEMPLATE,
    max_position: int = 1024,
) -> Path:
    """Writes a model whose answer to a prompt that ends with a capital letter is that letter's.

    Each piece of an answer is a token of its own; some of them can be control tokens. The
    vocabulary also has all bytes, so that any grammar can be followed.
    """
    pieces = [(letter, piece) for letter, answer in answers.items() for piece in answer]
    V = -(-(N_TOKENS + len(pieces)) // 8) * 8  # a head's size is even
    logits_VV = torch.zeros(V, V)
    before: dict[str, int] = {}
    for i, (letter, _) in enumerate(pieces, N_TOKENS):
        here = before.get(letter, encode(letter)[-1])
        logits_VV[here, i] = 20.0
        before[letter] = i
    for letter, last in before.items():
        logits_VV[last, END] = 20.0
        assert len(encode(letter)) == 1
    write_markov(folder, logits_VV, max_position=max_position)

    file = folder / "tokenizer.json"
    tokenizer = tokenizers.Tokenizer.from_file(str(file))
    for token_id, (_, piece) in enumerate(pieces, N_TOKENS):
        assert tokenizer.token_to_id(piece) is None, f"{piece!r} is a token already"
        added = tokenizers.AddedToken(piece, special=piece in control_tokens, normalized=False)
        tokenizer.add_tokens([added])
        assert tokenizer.token_to_id(piece) == token_id
    tokenizer.save(str(file))
    (folder / "chat_template.jinja").write_text(template)
    names = {"eos_token": "<end>", "bos_token": "<begin>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder
