"""vLLM's offline engine, stepped as in its own ``LLM.generate``, so that each token is timed.

It needs another version of torch than hotloop, so it has an interpreter of its own. It reads
checkpoints in their own quantization; with random weights, the shape gets the requested
quantization. The prefix cache is off. Memory is not measured, since vLLM reserves a fixed share of
the device's memory.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from hotloop.baselines import EngineKind
from hotloop.baselines.common import (
    Tokens,
    UnknownMemory,
    check_levers,
    check_window,
    import_library,
    prepare_own,
    score_of_top,
    tokenizer_of,
)
from hotloop.errors import UnsupportedError, shorten_value
from hotloop.hardware import device_info
from hotloop.types import (
    EngineConfig,
    EngineDescription,
    Generation,
    PeakMemory,
    Prompt,
    SamplingParams,
    Score,
    StepExecution,
)
from hotloop.writing import write_json

if TYPE_CHECKING:
    from hotloop.engine.setup import Setup

TOP_K = 20
"""The number of most likely tokens at each position that scores use; vLLM's default maximum."""

_SPEED_VARIABLES = (
    "VLLM_ATTENTION_BACKEND",
    "VLLM_DISABLED_KERNELS",
    "VLLM_ENABLE_V1_MULTIPROCESSING",
    "VLLM_USE_FLASHINFER_SAMPLER",
    "VLLM_WORKER_MULTIPROC_METHOD",
)
"""Environment variables that change its speed, and are recorded; others may hold keys and paths."""


class VllmEngine:
    """A model of vLLM, as an engine of the ``Engine`` protocol.

    Args:
        config: The configuration.
        vllm: The library.
        setup: The model and element type, as resolved by hotloop.
    """

    def __init__(self, config: EngineConfig, vllm: Any, setup: Setup) -> None:
        started = time.perf_counter()
        self._config, self._vllm, self._setup = config, vllm, setup
        self._sampling = import_library(config, "vllm.sampling_params", "vllm")
        self._request_ids = map(str, itertools.count())
        self._resources = ExitStack()
        self._options = _options(config, setup)
        path = setup.path
        if config.weights == "random":
            folder = self._resources.enter_context(TemporaryDirectory())
            path = _write_config(Path(folder), config, setup)
        try:
            self._llm = vllm.LLM(model=str(path), **self._options)
        except BaseException:
            self._resources.close()
            raise
        self._tokens = Tokens(
            engine="vllm",
            tokenizer=tokenizer_of(config),
            vocab_size=setup.model.vocab_size,
            max_seq_len=setup.n_positions,
        )
        self._load_s = time.perf_counter() - started

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[Generation]:
        """Answers every prompt, all at once; a token's time is the end of its step."""
        started = time.perf_counter()
        ids, engine = self._tokens.prompts(prompts, params), self._llm.llm_engine
        request_ids = list(itertools.islice(self._request_ids, len(ids)))
        for request_id, prompt in zip(request_ids, ids, strict=True):
            engine.add_request(request_id, {"prompt_token_ids": list(prompt)}, self._greedy(params))
        tokens: dict[str, list[int]] = {request_id: [] for request_id in request_ids}
        times: dict[str, list[float]] = {request_id: [] for request_id in request_ids}
        while engine.has_unfinished_requests():
            outputs = engine.step()
            at_s = time.perf_counter() - started
            for output in outputs:
                new = output.outputs[0].token_ids
                tokens[output.request_id] += new
                times[output.request_id] += [at_s] * len(new)
        return [
            self._tokens.answer(prompt, tokens[request_id], times[request_id], params)
            for request_id, prompt in zip(request_ids, ids, strict=True)
        ]

    def _greedy(self, params: SamplingParams) -> Any:
        return self._sampling.SamplingParams(
            temperature=0,
            max_tokens=self._tokens.new_tokens(params),
            ignore_eos=params.ignore_eos,
            stop_token_ids=sorted(self._tokens.end_ids(params)),
            detokenize=False,
            output_kind=self._sampling.RequestOutputKind.DELTA,
        )

    def score(
        self,
        windows: Iterable[Sequence[int]],
        *,
        full: bool = False,
        share_prefixes: bool = False,  # noqa: ARG002
    ) -> Iterator[Score]:
        """Scores windows by the most likely tokens that vLLM returns; never whole distributions."""
        for window in windows:
            check_window(window, self._setup.n_positions)
            params = self._sampling.SamplingParams(
                temperature=0, max_tokens=1, prompt_logprobs=TOP_K, detokenize=False
            )
            (output,) = self._llm.generate(
                [{"prompt_token_ids": list(window)}], params, use_tqdm=False
            )
            entries = [
                {token: each.logprob for token, each in position.items()}
                for position in output.prompt_logprobs[1:]
            ]
            yield score_of_top(entries, window, TOP_K, top=full)

    def encode(self, text: str) -> list[int]:
        """Tokenizes plain text, with no special tokens added."""
        return self._tokens.encode(text)

    def describe(self) -> EngineDescription:
        """Describes the model, with the options that vLLM was given."""
        model, device = self._setup.model, self._setup.device
        settings = dict(self._options)
        resolved = getattr(self._llm, "model_config", None)
        settings["resolved_quantization"] = getattr(resolved, "quantization", None)
        settings |= {name: os.environ[name] for name in _SPEED_VARIABLES if name in os.environ}
        return EngineDescription(
            config=self._config,
            family=model.family,
            device=str(device),
            device_name=device_info(device).name,
            dtype=_name(self._setup.dtype),
            vocab_size=model.vocab_size,
            max_seq_len=self._setup.n_positions,
            n_params=model.n_params,
            weight_bytes=None,
            weight_bytes_per_step=None,
            kv_bytes_per_token=model.kv_bytes_per_token(self._setup.dtype.itemsize),
            load_s=self._load_s,
            execution=_execution(self._config),
            version=f"vllm {self._vllm.__version__}",
            settings=settings,
        )

    def meter(self) -> AbstractContextManager[PeakMemory]:
        """Measures nothing, since vLLM reserves a fixed share of the device's memory."""
        return UnknownMemory()

    def close(self) -> None:
        """Ends vLLM's processes."""
        shutdown = getattr(getattr(self._llm.llm_engine, "engine_core", None), "shutdown", None)
        del self._llm
        if shutdown is not None:
            shutdown()
        self._resources.close()


def _options(config: EngineConfig, setup: Setup) -> dict[str, Any]:
    """Returns the arguments of ``vllm.LLM``, without the model's path."""
    return {
        "skip_tokenizer_init": True,
        "dtype": _name(setup.dtype),
        "load_format": "dummy" if config.weights == "random" else "safetensors",
        "quantization": "fp8" if config.quant == "fp8" else None,
        "tensor_parallel_size": config.tensor_parallel,
        "max_model_len": min(setup.n_positions + 1, setup.model.max_position),
        "max_num_seqs": config.max_batch_size,
        "enforce_eager": _execution(config) == "eager",
        "enable_prefix_caching": False,
        "max_logprobs": TOP_K,
        "seed": config.seed % 2**31,
    }


def _execution(config: EngineConfig) -> StepExecution:
    return "eager" if config.execution == "eager" else "compile"


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _write_config(folder: Path, config: EngineConfig, setup: Setup) -> Path:
    """Writes the ``config.json`` of random weights, with the requested quantization."""
    if setup.path is None:
        from hotloop.models.shapes import shape

        keys = {"model_type": "llama", **shape(config.model)}
    else:
        with closing(setup.open()) as checkpoint:
            keys = dict(checkpoint.config)
    keys.pop("quantization_config", None)
    if quantization := _QUANTIZATIONS.get(config.quant):
        keys["quantization_config"] = quantization
    write_json(folder / "config.json", keys)
    return folder


def _awq(group_size: int) -> dict[str, Any]:
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group_size,
        "zero_point": True,
        "version": "gemm",
    }


def _gptq(bits: int, group_size: int) -> dict[str, Any]:
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "sym": True,
        "desc_act": False,
        "lm_head": False,
    }


_GROUP_SIZES = (32, 64, 128)

_QUANTIZATIONS: Mapping[str, dict[str, Any]] = {
    **{f"int4-g{size}-asym": _awq(size) for size in _GROUP_SIZES},
    **{f"int4-g{size}": _gptq(4, size) for size in _GROUP_SIZES},
    "int8": _gptq(8, -1),
}
"""vLLM's quantizations with the number format of a scheme of hotloop."""


def _stored_scheme(quantization: Mapping[str, Any] | None) -> str:
    """Names the scheme of hotloop with a checkpoint's number format."""
    if quantization is None:
        return "none"
    given = {key: value for key, value in quantization.items() if value is not None}
    for name, known in _QUANTIZATIONS.items():
        decisive = ("quant_method", "bits", "group_size", "zero_point", "sym")
        if all(given.get(key) == known[key] for key in decisive if key in known):
            return name
    return str(quantization.get("quant_method", "another"))


def create(config: EngineConfig) -> VllmEngine:
    """Loads the engine.

    Raises:
        UnsupportedError: vLLM is not installed, or does not support the configuration.
    """
    vllm = import_library(config, "vllm", "vllm")
    check(config)
    setup = prepare_own(replace(config, tensor_parallel=1), quant="auto")
    if config.weights == "checkpoint":
        _check_checkpoint(config, setup)
    return VllmEngine(config, vllm, setup)


def _check_checkpoint(config: EngineConfig, setup: Setup) -> None:
    """Refuses a checkpoint that does not have the requested quantization."""
    assert setup.path is not None, "a checkpoint has a path"
    if not setup.path.is_dir():
        raise UnsupportedError(
            "vllm reads folders of safetensors, and this model is a single file: name its folder "
            "(checkpoint: PATH in its cell, or --checkpoint vllm=PATH)."
        )
    with closing(setup.open()) as checkpoint:
        described = checkpoint.quantization_config
    stored = _stored_scheme(described[1] if described else None)
    online = config.quant == "fp8" and stored == "none"
    if config.quant not in ("auto", stored) and not online:
        raise UnsupportedError(
            f"vllm does not quantize a checkpoint to {config.quant}, and this one is stored as "
            f"{shorten_value(stored)}: name a copy in {config.quant} (--checkpoint vllm=PATH)."
        )


def check(config: EngineConfig) -> None:
    """Refuses configurations that vLLM does not support, before anything is loaded."""
    check_levers(
        config,
        supported=("dtype", "tensor_parallel"),
        choices={
            "quant": ("auto", "none", "fp8", *_QUANTIZATIONS),
            "execution": ("auto", "eager", "compile"),
        },
    )


def resolve_auto(config: EngineConfig) -> EngineConfig:
    """Resolves ``auto``."""
    return replace(config, execution=_execution(config))


ENGINE = EngineKind(create=create, predict=check, resolve_auto=resolve_auto, reads_checkpoints=True)
