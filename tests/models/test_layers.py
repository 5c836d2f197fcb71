"""Layers that differ in whatever a configuration holds compute each what its own says."""

import math
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hotloop.kernels.attention import choose_attention
from hotloop.models.cache import KVCache
from hotloop.models.config import (
    AttentionConfig,
    FeedForwardConfig,
    LayerConfig,
    ModelConfig,
    RopeConfig,
)
from hotloop.models.decoder import Decoder
from hotloop.quant import parse_scheme
from hotloop.weights.load import load_weights
from hotloop.weights.source import RandomSource, Request, schemes_by_name

CPU, N_POSITIONS, WIDTH = torch.device("cpu"), 40, 64


def layer(
    n_heads: int, head_dim: int, n_features: int, theta: float, window: int | None, **options: str
) -> LayerConfig:
    return LayerConfig(
        attention=AttentionConfig(
            hidden_size=WIDTH,
            n_heads=n_heads,
            n_kv_heads=2,
            head_dim=head_dim,
            rope=RopeConfig(theta=theta),
            scale=0.3 / head_dim**0.5,
            norm_eps=1e-5,
            window=window,
        ),
        feed_forward=FeedForwardConfig(
            hidden_size=WIDTH, intermediate_size=n_features, norm_eps=1e-6, **options
        ),
    )


KINDS = {
    "local": layer(4, 16, 96, 100.0, 5, activation="gelu_tanh"),
    "whole": layer(2, 32, 160, 10_000.0, None),
}
CONFIG = ModelConfig(
    family="mixed",
    vocab_size=50,
    hidden_size=WIDTH,
    max_position=N_POSITIONS,
    norm_eps=1e-5,
    layers=(KINDS["local"], KINDS["whole"], KINDS["local"]),
)


class Weights(RandomSource):
    """Matrices that keep activations at their size, and norms that are not all ones."""

    def pieces(self, request: Request) -> Iterator[Tensor]:
        return (piece * (50 * request.shape[1] ** -0.5) for piece in super().pieces(request))

    def tensor(self, name: str, shape: tuple[int, ...], **options: object) -> Tensor:
        tensor = super().tensor(name, shape, **options)
        return tensor + torch.linspace(0, 0.5, *shape)


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def rotated(x_THE: Tensor, theta: float) -> Tensor:
    T, _, E = x_THE.shape
    turns = torch.outer(torch.arange(T), theta ** (-torch.arange(0, E, 2) / E))
    first, second = x_THE.chunk(2, dim=-1)
    cos, sin = turns.cos()[:, None], turns.sin()[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def expected_logits(decoder: Decoder, ids: Tensor) -> Tensor:
    """The logits of a sequence, by the definitions and the configuration alone."""
    x = decoder.embedding(ids)
    for block, kind in zip(decoder.blocks, CONFIG.layers, strict=True):
        config, weights = kind.attention, {n: w.packed[0] for n, w in block.linears.items()}
        qkv = norm(x, block.attention.norm.weight, config.norm_eps) @ weights["qkv_proj"].T
        J, E = config.n_kv_heads, config.head_dim
        q, k, v = qkv.view(len(x), -1, E).split((config.n_heads, J, J), dim=1)
        q, k = rotated(q, config.rope.theta), rotated(k, config.rope.theta)
        k, v = (t.repeat_interleave(config.n_heads // J, dim=1) for t in (k, v))
        scores = torch.einsum("the,she->hts", q, k) * config.scale
        back = torch.arange(len(x))[:, None] - torch.arange(len(x))
        unseen = (back < 0) | (back >= (config.window or len(x)))
        attended = scores.masked_fill(unseen, -math.inf).softmax(-1)
        x = x + torch.einsum("hts,she->the", attended, v).flatten(1) @ weights["o_proj"].T
        y = norm(x, block.feed_forward.norm.weight, kind.feed_forward.norm_eps)
        gate, up = (y @ weights["gate_up_proj"].T).chunk(2, dim=-1)
        silu = kind.feed_forward.activation == "silu"
        gate = F.silu(gate) if silu else F.gelu(gate, approximate="tanh")
        x = x + (gate * up) @ weights["down_proj"].T
    return norm(x, decoder.norm.weight, CONFIG.norm_eps) @ decoder.head.packed[0].T


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    made = Decoder(
        CONFIG,
        n_positions=N_POSITIONS,
        attention=choose_attention(CPU, torch.float32)[1],
        device=CPU,
    )
    none = parse_scheme("none")
    load_weights(
        made,
        CONFIG,
        Weights(0, torch.float32, CPU),
        shard=CONFIG.shards(1)[0],
        adds_biases=True,
        schemes=schemes_by_name(CONFIG, none, none),
        dtype=torch.float32,
        device=CPU,
    )
    return made


@pytest.mark.parametrize("parts", [[0, 30], [0, 13, 14, 15, 30]], ids=["whole", "cached"])
@torch.inference_mode()
def test_layers_of_two_kinds_compute_each_by_its_own_configuration(decoder, parts):
    ids = torch.randint(50, (30,), generator=torch.Generator().manual_seed(0))
    cache = KVCache(
        kv_heads=CONFIG.kv_heads,
        n_seats=1,
        n_positions=N_POSITIONS,
        dtype=torch.float32,
        device=CPU,
    )
    found = []
    for first, end in pairwise(parts):
        hidden = decoder(
            ids[None, first:end],
            torch.arange(first, end)[None],
            cache,
            seats_B=torch.zeros(1, dtype=torch.int64),
            first_seat=0,
            length=end,
        )
        found.append(decoder.logits(hidden)[0])
    torch.testing.assert_close(torch.cat(found), expected_logits(decoder, ids))


def test_sizes_are_sums_over_the_layers():
    matrices = sum(m.n * m.k for kind in CONFIG.layers for m in kind.matrices)
    assert CONFIG.n_params == matrices + 7 * WIDTH + 2 * 50 * WIDTH
    assert CONFIG.kv_bytes_per_token(4) == 4 * 2 * 2 * (16 + 32 + 16)
    assert CONFIG.kinds == {KINDS["local"]: 2, KINDS["whole"]: 1}
    halves = CONFIG.shards(2)
    assert [CONFIG.local(half).kv_heads for half in halves] == [[(1, 16), (1, 32), (1, 16)]] * 2
