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
from hotloop.serve.served import LoadedModel, ServedModel
from hotloop.serve.tool_use import read_tool_use


async def tokenize(request: Request) -> Response:
    """Encodes a text, or a conversation up to where the model's answer begins."""
    served: ServedModel = request.app.state.served
    request_body = await read(request, TokenizeBody, served.settings)
    served.check_name(request_body.model)
    model = served.model
    ids = await asyncio.to_thread(_encoded, request_body, model)
    body = {"count": len(ids), "max_model_len": model.description.max_seq_len, "tokens": ids}
    if request_body.return_token_strs:
        body |= {"token_strs": await asyncio.to_thread(_texts, ids, model)}
    return JSONResponse(body)


def _encoded(request_body: TokenizeBody, model: LoadedModel) -> list[int]:
    if request_body.messages is not None:
        use = read_tool_use(request_body.tools, None)
        return list(model.required_conversations.prompt(request_body, use).token_ids)
    if request_body.prompt is None:
        raise ApiError(400, "give either prompt or messages.", param="prompt")
    return model.required_tokenizer.encode(
        request_body.prompt, add_special=request_body.add_special_tokens
    )


def _texts(ids: list[int], model: LoadedModel) -> list[str]:
    return [model.required_tokenizer.decode([i], skip_special=False) for i in ids]


async def detokenize(request: Request) -> Response:
    """Decodes token ids."""
    served: ServedModel = request.app.state.served
    request_body = await read(request, DetokenizeBody, served.settings)
    served.check_name(request_body.model)
    text = await asyncio.to_thread(
        served.model.required_tokenizer.decode, request_body.tokens, skip_special=False
    )
    return JSONResponse({"prompt": text})


async def tokenizer_info(request: Request) -> Response:
    """Describes the tokenizer."""
    served: ServedModel = request.app.state.served
    tokenizer = served.model.required_tokenizer
    names = tokenizer.names
    return JSONResponse(
        {
            "tokenizer_class": tokenizer.config.get("tokenizer_class"),
            "vocab_size": tokenizer.vocab_size,
            "model_max_length": served.model.description.max_seq_len,
            "bos_token": names.get("bos_token"),
            "eos_token": names.get("eos_token"),
            "pad_token": names.get("pad_token"),
            "chat_template": tokenizer.chat_template,
        }
    )
