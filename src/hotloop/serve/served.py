"""``ServedModel``: the model of a server, from loading to its end.

The server uses only one part of the engine: ``engine.service``.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Literal

from hotloop.engine.service import Service
from hotloop.errors import HotloopError, shorten_value
from hotloop.serve.conversations import Conversations
from hotloop.serve.errors import ApiError, unavailable
from hotloop.serve.metrics import Metrics
from hotloop.serve.settings import ServerSettings
from hotloop.text.tokenizer import Tokenizer
from hotloop.types import EngineDescription, SamplingParams

STALLED_S = 30.0
"""The longest iteration of a healthy engine."""

API_TEMPERATURE = 1.0
"""The default temperature of requests, as in OpenAI's API, if the model's own default is greedy
decoding."""

Status = Literal["loading", "ready", "draining", "stalled", "failed"]


@dataclass(frozen=True)
class LoadedModel:
    """A loaded model.

    Attributes:
        service: Its engine.
        tokenizer: Its tokenizer; None for random weights.
        description: Its engine's description.
        sampling: The default sampling options of requests.
        conversations: Formats conversations with it, and parses its answers; None without a
            tokenizer.
    """

    service: Service
    tokenizer: Tokenizer | None
    description: EngineDescription
    sampling: SamplingParams
    conversations: Conversations | None

    @property
    def required_tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            ApiError: There is none.
        """
        if self.tokenizer is None:
            raise _no_tokenizer()
        return self.tokenizer

    @property
    def required_conversations(self) -> Conversations:
        """The ``Conversations`` of the model.

        Raises:
            ApiError: There is no tokenizer.
        """
        if self.conversations is None:
            raise _no_tokenizer()
        return self.conversations


class ServedModel:
    """The model of a server, and the state of serving it: loading, ready, draining or failed.

    Args:
        settings: The server's settings.

    Attributes:
        settings: The server's settings.
        created: When the server started, in seconds since 1970.
        metrics: The metrics of its requests.
        draining: The server is ending, and takes no more requests.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self.created = int(time.time())
        self.draining = False
        self.metrics = Metrics(settings.name)
        self._model: LoadedModel | None = None

    def attach(self, service: Service) -> None:
        """Serves an engine from now on. Called from any thread."""
        settings = self.settings
        tokenizer, sampling = service.tokenizer, service.default_sampling
        if tokenizer is not None and settings.template is not None:
            tokenizer = replace(tokenizer, chat_template=settings.template, tool_template=None)
        conversations = None
        if tokenizer is not None:
            conversations = Conversations(
                tokenizer,
                tool_parser_name=settings.tool_parser,
                variables=settings.template_variables,
            )
            conversations.prepare()
        if sampling.greedy:
            sampling = replace(sampling, temperature=API_TEMPERATURE)
        self.metrics.watch(service)
        self._model = LoadedModel(service, tokenizer, service.description, sampling, conversations)

    @property
    def model(self) -> LoadedModel:
        """The model.

        Raises:
            ApiError: It is being loaded, or the server is stopping.
        """
        if self._model is None:
            raise unavailable("the model is being loaded: try again in a moment.")
        if self.draining:
            raise unavailable("the server is stopping and takes no more requests.")
        return self._model

    @property
    def service(self) -> Service:
        """The service of submitted requests, also while the server ends."""
        assert self._model is not None, "a request was submitted"
        return self._model.service

    def end(self) -> None:
        """Ends the engine's service: clients that wait for an answer get an error."""
        if self._model is not None:
            self._model.service.close()

    @property
    def error(self) -> HotloopError | None:
        """The error that has ended the engine; None while it runs."""
        return None if self._model is None else self._model.service.state().error

    @property
    def status(self) -> Status:
        """The state of the model; it takes requests only if it is ``ready``."""
        if self._model is None:
            return "loading"
        state = self._model.service.state()
        if state.error is not None:
            return "failed"
        if self.draining:
            return "draining"
        return "stalled" if state.stalled_s > STALLED_S else "ready"

    def check_name(self, name: str | None) -> None:
        """Refuses the name of another model.

        Raises:
            ApiError: ``model_not_found``.
        """
        if name is not None and name != self.settings.name:
            raise ApiError(
                404,
                f"the model {shorten_value(name)} is not served here: {self.settings.name!r} is.",
                param="model",
                code="model_not_found",
            )


def _no_tokenizer() -> ApiError:
    return ApiError(
        400, "a model with random weights has no tokenizer: send the prompt as token ids."
    )
