"""``/tokenize``, ``/detokenize`` and ``/tokenizer_info``, in vLLM's form.

They are for clients that count tokens. lm-eval uses all three in place of a tokenizer of its own.
"""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from hotloop.serve.bodies import read
from hotloop.serve.errors import ApiError
from hotloop.serve.schemas import DetokenizeBody, TokenizeBody
from hotloop.serve.served import Model, Served
from hotloop.serve.tool_use import read_tool_use


async def tokenize(request: Request) -> Response:
    """Encodes a text, or a conversation up to where the model's answer begins."""
    served: Served = request.app.state.served
    asked = await read(request, TokenizeBody, served.settings)
    served.check_name(asked.model)
    model = served.model
    ids = await asyncio.to_thread(_encoded, asked, model)
    body = {"count": len(ids), "max_model_len": model.about.max_seq_len, "tokens": ids}
    if asked.return_token_strs:
        body |= {"token_strs": await asyncio.to_thread(_texts, ids, model)}
    return JSONResponse(body)


def _encoded(asked: TokenizeBody, model: Model) -> list[int]:
    if asked.messages is not None:
        use = read_tool_use(asked.tools, None)
        return list(model.chats.prompt(asked, use).token_ids)
    if asked.prompt is None:
        raise ApiError(400, "give either prompt or messages.", param="prompt")
    return model.text.encode(asked.prompt, add_special=asked.add_special_tokens)


def _texts(ids: list[int], model: Model) -> list[str]:
    return [model.text.decode([i], skip_special=False) for i in ids]


async def detokenize(request: Request) -> Response:
    """Decodes token ids."""
    served: Served = request.app.state.served
    asked = await read(request, DetokenizeBody, served.settings)
    served.check_name(asked.model)
    text = await asyncio.to_thread(served.model.text.decode, asked.tokens, skip_special=False)
    return JSONResponse({"prompt": text})


async def tokenizer_info(request: Request) -> Response:
    """Describes the tokenizer."""
    served: Served = request.app.state.served
    tokenizer = served.model.text
    names = tokenizer.names
    return JSONResponse(
        {
            "tokenizer_class": tokenizer.config.get("tokenizer_class"),
            "vocab_size": tokenizer.vocab_size,
            "model_max_length": served.model.about.max_seq_len,
            "bos_token": names.get("bos_token"),
            "eos_token": names.get("eos_token"),
            "pad_token": names.get("pad_token"),
            "chat_template": tokenizer.chat_template,
        }
    )
