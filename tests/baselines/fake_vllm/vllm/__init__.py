"""A stand-in for vLLM 0.26, with the signatures of what hotloop calls and a model of nothing.

After a token ``t`` it says ``7 t + 3`` modulo the vocabulary. vLLM itself needs a GPU.
"""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

from vllm.sampling_params import RequestOutputKind

__version__ = "0.26.0+fake"

ENGINE_ARGS = {  # of vllm.engine.arg_utils.EngineArgs, those that hotloop gives beside LLM's own
    "load_format",
    "max_model_len",
    "max_num_seqs",
    "enable_prefix_caching",
    "max_logprobs",
}


def following(token, vocab_size):
    return (7 * token + 3) % vocab_size


class LLM:
    def __init__(
        self,
        model,
        *,
        tokenizer=None,
        skip_tokenizer_init=False,
        tensor_parallel_size=1,
        dtype="auto",
        quantization=None,
        seed=0,
        gpu_memory_utilization=0.9,
        enforce_eager=False,
        hf_overrides=None,
        **kwargs,
    ):
        assert kwargs.keys() <= ENGINE_ARGS, kwargs
        assert skip_tokenizer_init
        self.hf_config = json.loads(Path(model, "config.json").read_text())
        self.kwargs = kwargs | {"quantization": quantization, "enforce_eager": enforce_eager}
        stored = self.hf_config.get("quantization_config", {}).get("quant_method")
        self.model_config = SimpleNamespace(quantization=quantization or stored)
        self.llm_engine = _Engine(self.hf_config["vocab_size"], kwargs["max_model_len"])

    def generate(self, prompts, sampling_params=None, *, use_tqdm=True, lora_request=None):
        assert sampling_params.prompt_logprobs <= self.kwargs["max_logprobs"]
        return [self._scored(prompt["prompt_token_ids"], sampling_params) for prompt in prompts]

    def _scored(self, ids, params):
        assert len(ids) + params.max_tokens <= self.kwargs["max_model_len"]
        positions = [None]
        for before, token in itertools.pairwise(ids):
            first = following(before, self.hf_config["vocab_size"])
            others = [i for i in range(params.prompt_logprobs) if i != first]
            ranked = [first, *others][: params.prompt_logprobs]
            found = {t: SimpleNamespace(logprob=-0.1 - i) for i, t in enumerate(ranked)}
            found.setdefault(token, SimpleNamespace(logprob=-50.0))
            positions.append(found)
        return SimpleNamespace(prompt_logprobs=positions)


class _Engine:
    def __init__(self, vocab_size, max_model_len):
        self.vocab_size, self.max_model_len = vocab_size, max_model_len
        self.running = {}
        self.engine_core = SimpleNamespace(shutdown=lambda: None)

    def add_request(
        self,
        request_id,
        prompt,
        params,
        arrival_time=None,
        lora_request=None,
        tokenization_kwargs=None,
        trace_headers=None,
        priority=0,
    ):
        assert request_id not in self.running
        assert params.output_kind is RequestOutputKind.DELTA
        assert params.temperature == 0
        assert not params.detokenize, "there is no tokenizer"
        ids = prompt["prompt_token_ids"]
        assert len(ids) + params.max_tokens <= self.max_model_len
        self.running[request_id] = (ids[-1], 0, params)
        return f"{request_id}-internal"

    def has_unfinished_requests(self):
        return bool(self.running)

    def step(self):
        outputs = []
        for request_id, (last, made, params) in list(self.running.items()):
            token = following(last, self.vocab_size)
            self.running[request_id] = (token, made + 1, params)
            stopped = token in params.stop_token_ids and not params.ignore_eos
            finished = stopped or made + 1 == params.max_tokens
            if finished:
                del self.running[request_id]
            outputs.append(
                SimpleNamespace(
                    request_id=request_id,
                    finished=finished,
                    outputs=[SimpleNamespace(token_ids=[token])],
                )
            )
        return outputs
