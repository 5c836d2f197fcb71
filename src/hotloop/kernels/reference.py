"""The arithmetic, in plain PyTorch: the specification of every kernel, and its fallback.

Written to be read, and so that torch.compile fuses it well. Every faster kernel is tested against
its twin here; where no faster one exists, this is what runs.

Shape letters: B sequences, T tokens of each, M = B * T rows, D model width, N output features,
K input features, G groups along K; H query heads, J key/value heads, E head dimension, C cache
positions, F feed-forward width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension, computed in float32 (Zhang & Sennrich 2019).

    The normalized value is rounded to ``x``'s type before the weight is applied, as the models
    were trained.
    """
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight


def apply_rope(x_BTHE: Tensor, cos_BTE: Tensor, sin_BTE: Tensor) -> Tensor:
    """Rotary position embedding on halves: dimension i turns with i + E/2 (Su et al. 2021).

    ``cos`` and ``sin`` are float32; the rotation is computed in float32 and rounded once.
    """
    x = x_BTHE.float()
    first, second = x.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return (x * cos_BTE[:, :, None] + rotated * sin_BTE[:, :, None]).to(x_BTHE.dtype)


def swiglu(gate_up: Tensor) -> Tensor:
    """SiLU of the first half times the second half: [..., 2F] to [..., F] (Shazeer 2020)."""
    gate, up = gate_up.chunk(2, dim=-1)
    product = F.silu(gate) * up
    # As it is: but this makes torch.compile write it down here, once, rather than compute it again
    # in every row of the product that follows.
    return product.as_strided(product.size(), product.stride())


def attention(
    q_BTHE: Tensor,
    k_BJCE: Tensor,
    v_BJCE: Tensor,
    positions_BT: Tensor,
    *,
    window: int | None,
    scale: float,
) -> Tensor:
    """Attention of new tokens to the cache, which already holds their own keys and values.

    A token at position p sees cache positions p - window + 1 … p (all up to p without a window).
    Query heads that share a key/value head are stacked as rows, so nothing is repeated in memory.

    Returns [B, T, H, E].
    """
    B, T, H, E = q_BTHE.shape
    J, C = k_BJCE.shape[1:3]
    group = H // J
    q = q_BTHE.view(B, T, J, group, E).permute(0, 2, 3, 1, 4).reshape(B, J, group * T, E)
    at = torch.arange(C, device=q.device)
    position = positions_BT[:, :, None]
    visible_BTC = at <= position
    if window is not None:
        visible_BTC = visible_BTC & (at > position - window)
    mask = visible_BTC[:, None, None].expand(B, 1, group, T, C).reshape(B, 1, group * T, C)
    out = F.scaled_dot_product_attention(q, k_BJCE, v_BJCE, attn_mask=mask, scale=scale)
    return out.view(B, J, group, T, E).permute(0, 3, 1, 2, 4).reshape(B, T, H, E)


def linear_channelwise(x_MK: Tensor, values_NK: Tensor, scale_N: Tensor) -> Tensor:
    """Product with int8 or fp8 weights: the scale of each output channel is for the result.

    In float16 it is applied to the weight: sums of products with integers would leave its range.
    """
    if x_MK.dtype == torch.float16:
        return F.linear(x_MK, (values_NK.float() * scale_N[:, None]).half())
    return (F.linear(x_MK, values_NK.to(x_MK.dtype)) * scale_N).to(x_MK.dtype)


def pack_int4(values_NK: Tensor, group_size: int) -> Tensor:
    """Packs int8 values -8…7 into int16 [N, K/4].

    A group is group_size / 4 words; word j holds values j, j + group_size/4, j + group_size/2 and
    j + 3 * group_size/4, each plus 8, from the lowest nibble up: four consecutive runs of a group
    come apart with one shift and one mask each.
    """
    n, k = values_NK.shape
    words = values_NK.new_zeros(n, k // group_size, group_size // 4, dtype=torch.int16)
    # A quarter at a time: the weight can be large, and this is on the way of loading it.
    for i, run in enumerate(values_NK.view(n, -1, 4, group_size // 4).unbind(2)):
        words |= (run + 8).to(torch.int16) << 4 * i  # unsigned words: the top bit is int16's sign
    return words.view(n, k // 4)


def unpack_int4(packed: Tensor, group_size: int) -> Tensor:
    """The inverse of ``pack_int4``: int8 [N, K] in -8…7."""
    n = packed.shape[0]
    words = packed.view(n, -1, 1, group_size // 4)
    shifts = torch.arange(0, 16, 4, device=packed.device, dtype=torch.int16).view(4, 1)
    nibbles = (words >> shifts) & 15
    return (nibbles.to(torch.int8) - 8).view(n, -1)


def dequantize_int4(
    packed: Tensor, scale_NG: Tensor, offset_NG: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The [N, K] weight that a packed one stands for, rounded once to ``dtype``."""
    n, groups = scale_NG.shape
    values = unpack_int4(packed, packed.shape[1] * 4 // groups).view(n, groups, -1)
    weight = values.float() * scale_NG.float()[:, :, None]
    if offset_NG is not None:
        weight = weight + offset_NG.float()[:, :, None]
    return weight.to(dtype).view(n, -1)


def linear_int4(x_MK: Tensor, packed: Tensor, scale_NG: Tensor, offset_NG: Tensor | None) -> Tensor:
    """Product with packed int4 weights."""
    return F.linear(x_MK, dequantize_int4(packed, scale_NG, offset_NG, x_MK.dtype))


def fused_linear(
    x_MK: Tensor,
    weight_NK: Tensor,
    *,
    squares: Tensor | None = None,
    eps: float = 0.0,
    bias: Tensor | None = None,
    paired: bool = False,
    residual: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Product with all that surrounds it in a decoder: rest of a norm, bias, SwiGLU, residual.

    Nothing is rounded between reading ``x`` and the result.

    Args:
        x_MK: Activations; with a norm, as ``begin_norm`` gives them.
        weight_NK: Floating point.
        squares: Of a norm, as ``begin_norm`` gives them, or None: the factor that a row of the
            norm has in common is applied to the sums.
        eps: Of the norm.
        bias: [N], or None.
        paired: The weight is gate and up features, one below the other: their SwiGLU is taken.
        residual: Like the result, which is added to it; or None.
        dtype: Of the result.

    Returns:
        [M, N], or [M, N / 2] of a paired weight.
    """
    y = x_MK.float() @ weight_NK.float().T
    if squares is not None:
        y = y * torch.rsqrt(squares.sum(-1, keepdim=True) / x_MK.shape[-1] + eps)
    if bias is not None:
        y = y + bias.float()
    if paired:
        gate, up = y.chunk(2, dim=-1)
        y = F.silu(gate) * up
    if residual is not None:
        y = y + residual.float()
    return y.to(dtype)


def begin_norm(x_MK: Tensor, weight_K: Tensor, part: int = 16) -> tuple[Tensor, Tensor]:
    """Of a root-mean-square norm, what can be done before a whole row is known.

    Args:
        x_MK: The norm's input.
        weight_K: Its weight.
        part: How many squares are added up together.

    Returns:
        [M, K], the input times the weight, rounded to the input's type; and float32
        [M, K / part rounded up], what squares of the input add up to.
    """
    squares = F.pad(x_MK.float().square(), (0, -x_MK.shape[-1] % part))
    return x_MK * weight_K, squares.unflatten(-1, (-1, part)).sum(-1)


def fused_attention(
    qkv: Tensor,
    keys_BJCE: Tensor,
    values_BJCE: Tensor,
    positions_B: Tensor,
    cos_CE: Tensor,
    sin_CE: Tensor,
    *,
    n_heads: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    window: int | None = None,
) -> Tensor:
    """Attention with all that surrounds it: head norms, rotation, storing new keys and values.

    Args:
        qkv: [B * T, (H + 2J) * E]: queries, keys and values of T new tokens of each sequence.
        keys_BJCE: The cache, written at the new tokens' positions. A token beyond its end is not
            stored, and sees what the last one sees.
        values_BJCE: Likewise.
        positions_B: Position of each sequence's first new token; the others follow it.
        cos_CE: Rotation, float32.
        sin_CE: Rotation, float32.
        n_heads: H.
        q_norm: [E] of a root-mean-square norm of each query head, or None.
        k_norm: [E] of one of each key head, or None.
        eps: Of those norms.
        window: Positions that a token sees, itself included, or None for all.

    Returns:
        [B * T, H * E].
    """
    B, J, C, E = keys_BJCE.shape
    split = (n_heads, J, J)
    q, k, v = qkv.view(B, -1, sum(split), E).split(split, dim=2)
    if q_norm is not None:
        q = rms_norm(q, q_norm, eps)
    if k_norm is not None:
        k = rms_norm(k, k_norm, eps)
    T = q.shape[1]
    positions_BT = positions_B[:, None] + torch.arange(T, device=qkv.device)
    at = positions_BT.clamp(max=C - 1)
    q, k = (apply_rope(part, cos_CE[at], sin_CE[at]) for part in (q, k))
    for b, t in (positions_BT < C).nonzero().tolist():
        keys_BJCE[b, :, at[b, t]] = k[b, t]
        values_BJCE[b, :, at[b, t]] = v[b, t]
    out = attention(q, keys_BJCE, values_BJCE, at, window=window, scale=E**-0.5)
    return out.reshape(B * T, n_heads * E)


def embed(ids: Tensor, table_VK: Tensor, scale_V: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Rows of a table, [..., K]; of an int8 one with a scale per row, as they are worth.

    Ids that are not of the table look up its first or last row.
    """
    ids = ids.clamp(0, len(table_VK) - 1)
    rows = F.embedding(ids, table_VK)
    return rows if scale_V is None else (rows.float() * scale_V[ids][..., None]).to(dtype)


def argmax(logits_MV: Tensor) -> Tensor:
    """Where each row is largest, [M]: of equal ones the first; -1 where that is not finite."""
    largest = logits_MV.amax(-1, keepdim=True)  # NaN where anything is
    first = (logits_MV == largest).int().argmax(-1)
    return first.where(largest[..., 0].abs() < torch.inf, -1)
