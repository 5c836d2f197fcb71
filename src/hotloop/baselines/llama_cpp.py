"""llama.cpp, through the C functions of llama-cpp-python, without its Python wrapper.

The loop is the same as in llama.cpp's own programs: one batch for the prompts, then one batch per
token; the host selects the most likely token from the logits. llama.cpp uses the file's quantized
weights; only GGUF files can be run.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing
from typing import TYPE_CHECKING, Any

from hotloop.baselines import EngineKind
from hotloop.baselines.common import (
    Tokens,
    UnknownMemory,
    check_levers,
    check_window,
    import_library,
    prepare_own,
    score_of,
    tokenizer_of,
)
from hotloop.errors import HotloopError, OutOfMemoryError, UnsupportedError
from hotloop.gguf_header import model_parts
from hotloop.hardware import device_info
from hotloop.memory_meter import MemoryMeter
from hotloop.types import (
    EngineConfig,
    EngineDescription,
    Generation,
    PeakMemory,
    Prompt,
    SamplingParams,
    Score,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hotloop.engine.setup import Setup

_CACHE_ITEM_BYTES = 2  # llama.cpp's cache is float16 by default
_ALL_LAYERS = 999


class LlamaCppEngine:
    """A model of llama.cpp, as an engine of the ``Engine`` protocol.

    Args:
        config: The configuration.
        lib: The module of C functions, ``llama_cpp``.
        setup: The model and device, as resolved by hotloop.
    """

    def __init__(self, config: EngineConfig, lib: Any, setup: Setup) -> None:
        import torch

        started = time.perf_counter()
        self._config, self._lib, self._setup = config, lib, setup
        self._n_seqs, self._n_positions = config.max_batch_size, setup.n_positions
        self._n_threads = torch.get_num_threads()
        self._on_gpu = setup.device.type == "cuda"
        assert setup.path is not None, "a GGUF file has a path"
        lib.llama_backend_init()
        model_options = lib.llama_model_default_params()
        model_options.n_gpu_layers = _ALL_LAYERS if self._on_gpu else 0
        first = model_parts(setup.path)[0]
        self._model = lib.llama_model_load_from_file(str(first).encode(), model_options)
        if not self._model:
            raise HotloopError(
                f"llama.cpp could not load {first.name}: see its messages on stderr."
            )
        self._context = lib.llama_init_from_model(self._model, self._context_options())
        if not self._context:
            lib.llama_model_free(self._model)
            raise OutOfMemoryError("load")
        self._vocab_size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))
        self._batch = lib.llama_batch_init(self._n_batch, 0, 1)
        self._tokens = Tokens(
            engine="llama-cpp",
            tokenizer=tokenizer_of(config),
            vocab_size=self._vocab_size,
            max_seq_len=self._n_positions,
        )
        self._load_s = time.perf_counter() - started

    @property
    def _n_batch(self) -> int:
        """Tokens of one call: all prompts, or a window."""
        return self._n_seqs * self._n_positions

    def _context_options(self) -> Any:
        options = self._lib.llama_context_default_params()
        options.n_seq_max = self._n_seqs
        options.n_ctx = options.n_batch = self._n_batch
        options.n_threads = options.n_threads_batch = self._n_threads
        options.no_perf = True
        return options

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[Generation]:
        """Answers every prompt, all at once."""
        started = time.perf_counter()
        ids = self._tokens.prompts(prompts, params)
        if len(ids) > self._n_seqs:
            raise HotloopError(
                f"{len(ids)} prompts exceed max_batch_size {self._n_seqs}: raise it."
            )
        self._clear_cache()
        answers: list[list[int]] = [[] for _ in ids]
        times: list[float] = []
        entries = [
            (token, position, row, position == len(prompt) - 1)
            for row, prompt in enumerate(ids)
            for position, token in enumerate(prompt)
        ]
        for _ in range(self._tokens.new_tokens(params)):
            self._decode(entries)
            wanted = [i for i, (*_, logits) in enumerate(entries) if logits]
            for answer, i in zip(answers, wanted, strict=True):
                answer.append(int(self._logits(i).argmax()))
            times.append(time.perf_counter() - started)
            entries = [
                (answer[-1], len(prompt) + len(answer) - 1, row, True)
                for row, (prompt, answer) in enumerate(zip(ids, answers, strict=True))
            ]
        return [
            self._tokens.answer(prompt, answer, times, params)
            for prompt, answer in zip(ids, answers, strict=True)
        ]

    def score(
        self,
        windows: Iterable[Sequence[int]],
        *,
        full: bool = False,
        share_prefixes: bool = False,  # noqa: ARG002
    ) -> Iterator[Score]:
        """Scores each window in one batch, with the logits after every token."""
        import numpy as np
        import torch

        for window in windows:
            check_window(window, self._n_positions)
            self._clear_cache()
            self._decode([(token, position, 0, True) for position, token in enumerate(window)])
            logits_TV = np.stack([self._logits(i) for i in range(len(window) - 1)])
            yield score_of(torch.from_numpy(logits_TV), window, full=full)

    def encode(self, text: str) -> list[int]:
        """Tokenizes plain text, with no special tokens added."""
        return self._tokens.encode(text)

    def describe(self) -> EngineDescription:
        """Describes the model, with llama.cpp's count of its bytes."""
        lib, model = self._lib, self._setup.model
        n_bytes = lib.llama_model_size(self._model)
        unread = 0
        if not model.tie_embeddings:
            with closing(self._setup.open()) as checkpoint:
                unread = checkpoint.tensors["model.embed_tokens.weight"].n_bytes
        return EngineDescription(
            config=self._config,
            family=model.family,
            device=str(self._setup.device),
            device_name=device_info(self._setup.device).name,
            dtype="float32",
            vocab_size=self._vocab_size,
            max_seq_len=self._n_positions,
            n_params=lib.llama_model_n_params(self._model),
            weight_bytes=n_bytes,
            weight_bytes_per_step=n_bytes - unread,
            kv_bytes_per_token=model.kv_bytes_per_token(_CACHE_ITEM_BYTES),
            load_s=self._load_s,
            version=f"llama-cpp-python {lib.__version__}",
            settings={
                "n_gpu_layers": _ALL_LAYERS if self._on_gpu else 0,
                "n_ctx": lib.llama_n_ctx(self._context),
                "n_seq_max": self._n_seqs,
                "n_threads": self._n_threads,
                "type_k": "f16",
                "type_v": "f16",
                "system_info": lib.llama_print_system_info().decode(errors="replace").strip(),
            },
        )

    def meter(self) -> AbstractContextManager[PeakMemory]:
        """Measures the process's memory; on a GPU, llama.cpp does not report its memory."""
        return UnknownMemory() if self._on_gpu else MemoryMeter("cpu")

    def close(self) -> None:
        """Frees the model."""
        self._lib.llama_batch_free(self._batch)
        self._lib.llama_free(self._context)
        self._lib.llama_model_free(self._model)

    def _clear_cache(self) -> None:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)

    def _decode(self, entries: Sequence[tuple[int, int, int, bool]]) -> None:
        """Runs tokens, each with its id, its position, its sequence, and whether it has logits."""
        batch = self._batch
        batch.n_tokens = len(entries)
        for i, (token, position, row, logits) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, logits
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = row
        if status := self._lib.llama_decode(self._context, batch):
            raise HotloopError(
                f"llama_decode failed with status {status}: see llama.cpp's messages on stderr."
            )

    def _logits(self, i: int) -> NDArray[Any]:
        """Returns the logits after the ``i``-th token of the last batch, without a copy."""
        import numpy as np

        row = self._lib.llama_get_logits_ith(self._context, i)
        return np.ctypeslib.as_array(row, (self._vocab_size,))


def create(config: EngineConfig) -> LlamaCppEngine:
    """Loads the engine.

    Raises:
        UnsupportedError: llama-cpp-python is not installed, or cannot run the model here.
    """
    from hotloop.weights.checkpoint import stored_form  # imports torch

    lib = import_library(config, "llama_cpp", "llama-cpp-python")
    check(config)
    setup = prepare_own(config)
    if setup.path is None or not setup.path.is_file():
        raise UnsupportedError(
            "llama-cpp reads GGUF files, and this model is not one: name a .gguf file of it "
            "(checkpoint: PATH in its cell, or --checkpoint llama-cpp=PATH)."
        )
    with closing(setup.open()) as checkpoint:
        if config.quant == "none" and stored_form(checkpoint).is_quantized:
            raise UnsupportedError(
                "llama-cpp uses the weights as the file stores them, and these are quantized: "
                "leave out quant none, or name an unquantized file."
            )
    if setup.device.type == "cuda" and not lib.llama_supports_gpu_offload():
        raise UnsupportedError(
            "this build of llama-cpp-python has no GPU backend: build it with one, or give its "
            "cell device: cpu."
        )
    return LlamaCppEngine(config, lib, setup)


def check(config: EngineConfig) -> None:
    """Refuses configurations that llama.cpp does not support, before anything is loaded."""
    check_levers(
        config,
        supported=("device",),
        choices={"quant": ("auto", "none"), "dtype": ("auto",), "weights": ("checkpoint",)},
    )


ENGINE = EngineKind(create=create, predict=check, reads_checkpoints=True)
