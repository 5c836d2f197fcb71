"""Hugging Face transformers: its ``generate``, eager or with its own compilation.

Every token is on the host before the next step begins, as in any use of a streamer of transformers.
The weights of a GGUF file are dequantized by hotloop.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hotloop.baselines import EngineKind
from hotloop.baselines.common import (
    Tokens,
    check_levers,
    check_window,
    import_library,
    prepare_own,
    score_of,
    tokenizer_of,
)
from hotloop.errors import RequestError, UnsupportedError, shorten
from hotloop.hardware import device_info
from hotloop.memory_meter import MemoryMeter
from hotloop.types import (
    EngineConfig,
    EngineDescription,
    Generation,
    Prompt,
    SamplingParams,
    Score,
    StepExecution,
)

if TYPE_CHECKING:
    from torch import Tensor

    from hotloop.engine.setup import Setup

_WARMUP_TOKENS = 8


class TransformersEngine:
    """A model of transformers, as an engine of the ``Engine`` protocol.

    Args:
        config: The configuration.
        transformers: The library.
        setup: The model, device and element type, as resolved by hotloop.
    """

    def __init__(self, config: EngineConfig, transformers: Any, setup: Setup) -> None:
        import torch

        started = time.perf_counter()
        self._config, self._setup, self._torch = config, setup, torch
        self._transformers = transformers
        self._execution: StepExecution = "compile" if config.execution == "compile" else "eager"
        self._tokens = Tokens(
            engine="transformers",
            tokenizer=tokenizer_of(config),
            vocab_size=setup.model.vocab_size,
            max_seq_len=setup.n_positions,
        )
        self._model = _load(transformers, setup, config.seed)
        self._model.generation_config = transformers.GenerationConfig(pad_token_id=0)
        self._options = self._generation_options(transformers)
        self._load_s = time.perf_counter() - started
        started = time.perf_counter()
        if self._execution == "compile":
            n = min(_WARMUP_TOKENS, setup.n_positions - 1)
            params = SamplingParams(max_new_tokens=n, ignore_eos=True)
            self.generate([[0]] * config.max_batch_size, params)
        self._warmup_s = time.perf_counter() - started

    def _generation_options(self, transformers: Any) -> dict[str, Any]:
        """Returns the options with which ``generate`` compiles, with a cache of fixed size."""
        if self._execution == "eager":
            return {}
        compiled = transformers.CompileConfig()
        compiled._compile_all_devices = True  # on a CPU too, where it does not compile by default
        options = {"cache_implementation": "static", "compile_config": compiled}
        if hasattr(self._model.generation_config, "max_cache_len"):
            options["max_cache_len"] = self._setup.n_positions
        return options

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[Generation]:
        """Answers prompts of equal length, all at once."""
        clock = _Clock()
        ids = self._tokens.prompts(prompts, params)
        if len(set(map(len, ids))) > 1:
            raise RequestError(
                "transformers is measured with prompts of equal length: pass the others in "
                "another call."
            )
        prompts_BT = self._torch.tensor(ids, device=self._setup.device)
        ends = sorted(self._tokens.end_ids(params))
        self._model.generate(
            prompts_BT,
            attention_mask=self._torch.ones_like(prompts_BT),
            max_new_tokens=self._tokens.new_tokens(params),
            do_sample=False,
            eos_token_id=ends or None,
            streamer=clock,
            **self._options,
        )
        answers = self._torch.stack(clock.tokens, dim=1).tolist()
        return [
            self._tokens.answer(prompt, answer, clock.times, params)
            for prompt, answer in zip(ids, answers, strict=True)
        ]

    def score(
        self,
        windows: Iterable[Sequence[int]],
        *,
        full: bool = False,
        share_prefixes: bool = False,  # noqa: ARG002
    ) -> Iterator[Score]:
        """Scores each window in one forward pass of the same model, without the compilation."""
        for window in windows:
            check_window(window, self._setup.n_positions)
            ids_BT = self._torch.tensor([list(window)], device=self._setup.device)
            with self._torch.inference_mode():
                logits_TV = self._model(ids_BT, use_cache=False).logits[0, :-1]
            yield score_of(logits_TV, window, full=full)

    def encode(self, text: str) -> list[int]:
        """Tokenizes plain text, with no special tokens added."""
        return self._tokens.encode(text)

    def describe(self) -> EngineDescription:
        """Describes the model, with its parameters as counted in memory."""
        embedding, head = self._model.get_input_embeddings(), self._model.get_output_embeddings()
        weights = list(self._model.parameters())
        n_bytes = sum(weight.nbytes for weight in weights)
        tied = head.weight is embedding.weight
        model, dtype = self._setup.model, self._setup.dtype
        notes = []
        if self._setup.path is not None and self._setup.path.is_file():
            notes.append(f"The weights of this file are dequantized to {_name(dtype)}.")
        if self._execution == "compile":
            notes.append("transformers scores without the compilation that it decodes with.")
        return EngineDescription(
            config=self._config,
            family=model.family,
            device=str(self._setup.device),
            device_name=device_info(self._setup.device).name,
            dtype=_name(dtype),
            vocab_size=model.vocab_size,
            max_seq_len=self._setup.n_positions,
            n_params=sum(weight.numel() for weight in weights),
            weight_bytes=n_bytes,
            weight_bytes_per_step=n_bytes - (0 if tied else embedding.weight.nbytes),
            kv_bytes_per_token=model.kv_bytes_per_token(dtype.itemsize),
            notes=tuple(notes),
            load_s=self._load_s,
            warmup_s=self._warmup_s,
            execution=self._execution,
            version=f"transformers {self._transformers.__version__}",
            settings={
                "attn_implementation": self._model.config._attn_implementation,
                "cache_implementation": self._options.get("cache_implementation", "dynamic"),
            },
        )

    def meter(self) -> MemoryMeter:
        """Measures the memory of a ``with`` block."""
        return MemoryMeter(str(self._setup.device))

    def close(self) -> None:
        """Frees the device."""
        del self._model
        if self._setup.device.type == "cuda":
            self._torch.cuda.empty_cache()


class _Clock:
    """A streamer of transformers that records the tokens of each step, and their times."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.times: list[float] = []
        self.tokens: list[Tensor] = []
        self._is_prompt = True

    def put(self, value: Tensor) -> None:
        if self._is_prompt:  # transformers sends the prompts first
            self._is_prompt = False
            return
        self.times.append(time.perf_counter() - self.started)
        self.tokens.append(value)

    def end(self) -> None:
        """Does nothing; transformers calls it after the last token."""


def _load(transformers: Any, setup: Setup, seed: int) -> Any:
    """Loads the model onto the device, from its checkpoint or with random weights."""
    import torch

    if setup.path is not None and setup.config.weights == "checkpoint" and setup.path.is_dir():
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                setup.path, local_files_only=True, use_safetensors=True, **_options(setup)
            )
        except ImportError as error:  # of a library that reads a kind of quantized checkpoint
            raise UnsupportedError(
                f"transformers cannot load this checkpoint: {shorten(str(error))}"
            ) from error
        return model.to(setup.device).eval()
    torch.manual_seed(seed)
    with setup.device:
        model = transformers.AutoModelForCausalLM.from_config(
            _model_config(transformers, setup), **_options(setup)
        )
    if setup.config.weights == "checkpoint":
        _copy_weights(model, setup)
    return model.eval()


def _options(setup: Setup) -> dict[str, Any]:
    return {"dtype": setup.dtype, "attn_implementation": "sdpa"}


def _model_config(transformers: Any, setup: Setup) -> Any:
    """Makes the library's configuration of a GGUF file, a folder or a built-in shape."""
    if setup.path is None:
        from hotloop.models.shapes import shape

        return transformers.AutoConfig.for_model("llama", **shape(setup.config.model))
    with closing(setup.open()) as checkpoint:
        keys = dict(checkpoint.config)
    return transformers.AutoConfig.for_model(keys.pop("model_type"), **keys)


def _copy_weights(model: Any, setup: Setup) -> None:
    """Copies the weights of a GGUF file, which transformers reads only with another library."""
    import torch

    tied = {"lm_head.weight"} if setup.model.tie_embeddings else set()
    with closing(setup.open()) as checkpoint, torch.no_grad():
        for name, weight in model.named_parameters():
            if name not in tied:
                weight.copy_(checkpoint.read(name))


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def create(config: EngineConfig) -> TransformersEngine:
    """Loads the engine.

    Raises:
        UnsupportedError: transformers is not installed, or cannot load the model.
    """
    transformers = import_library(config, "transformers", "transformers")
    transformers.utils.logging.disable_progress_bar()
    return TransformersEngine(config, transformers, prepare_own(config))


def check(config: EngineConfig) -> None:
    """Refuses configurations that transformers does not support, before anything is loaded."""
    check_levers(
        config,
        supported=("device", "dtype"),
        choices={"quant": ("auto", "none"), "execution": ("auto", "eager", "compile")},
    )


def resolve_auto(config: EngineConfig) -> EngineConfig:
    """Resolves ``auto``."""
    execution = "eager" if config.execution == "auto" else config.execution
    return replace(config, execution=execution)


ENGINE = EngineKind(create=create, predict=check, resolve_auto=resolve_auto, reads_checkpoints=True)
