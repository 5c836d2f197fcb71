"""Plain-PyTorch implementations: the specification of every kernel, and its fallback.

They are written to be read, and to be fused well by torch.compile. The function that specifies a
kernel is the kernel's *twin*: every faster kernel is tested against its twin, which also runs where
no faster kernel can. Only sampling is specified elsewhere, in ``engine.sampling``, since its plain
form also samples from sharded logits.

Shape letters: B sequences, T tokens of each, M = B * T rows, D model width, N output features,
K input features, G groups along K; H query heads, J key/value heads, E head dimension, C cache
positions, F feed-forward width; R rows, W positions of a row's history, D drafts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Applies RMS norm to the last dimension, in float32 (Zhang & Sennrich 2019).

    The normalized value is rounded to ``x``'s type before the weight is applied, as in training.
    """
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight


def apply_rope(x_BTHE: Tensor, cos_BTE: Tensor, sin_BTE: Tensor) -> Tensor:
    """Applies rope (rotary position embedding) to pairs of dimensions i, i + E/2 (Su et al. 2021).

    ``cos`` and ``sin`` are float32; the rotation is computed in float32 and rounded once.
    """
    x = x_BTHE.float()
    first, second = x.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return (x * cos_BTE[:, :, None] + rotated * sin_BTE[:, :, None]).to(x_BTHE.dtype)


def swiglu(gate_up: Tensor) -> Tensor:
    """Multiplies SiLU of the first half by the second: [..., 2F] to [..., F] (Shazeer 2020)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return _stored(F.silu(gate) * up)


def geglu_tanh(gate_up: Tensor) -> Tensor:
    """Multiplies GELU (by tanh) of the first half by the second: [..., 2F] to [..., F]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return _stored(F.gelu(gate, approximate="tanh") * up)


def _stored(gated: Tensor) -> Tensor:
    # as_strided changes nothing, but makes torch.compile store the result here, once, instead of
    # recomputing it for every output feature of the matrix product that follows.
    return gated.as_strided(gated.size(), gated.stride())


def attention(
    q_BTHE: Tensor,
    k_BJCE: Tensor,
    v_BJCE: Tensor,
    positions_BT: Tensor,
    *,
    window: int | None,
    scale: float,
) -> Tensor:
    """Computes attention of new tokens over the cache, which already holds their keys and values.

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
    """Multiplies by int8 or fp8 weights, then multiplies each output channel by its scale.

    In float16 the scale is applied to the weight first: unscaled sums would overflow.
    """
    if x_MK.dtype == torch.float16:
        return F.linear(x_MK, (values_NK.float() * scale_N[:, None]).half())
    return (F.linear(x_MK, values_NK.to(x_MK.dtype)) * scale_N).to(x_MK.dtype)


def dequantize(
    values_NK: Tensor,
    scale_NG: Tensor,
    offset_NG: Tensor | None = None,
    *,
    super_scale_NS: Tensor | None = None,
    super_offset_NS: Tensor | None = None,
    table: Tensor | None = None,
    permutation_K: Tensor | None = None,
) -> Tensor:
    """Dequantizes a weight to float32 [N, K]; ``quant.QTensor`` defines the parts.

    Args:
        values_NK: Integers, float8, or indices of ``table``.
        scale_NG: The scale of each group.
        offset_NG: Integer zero points, which are subtracted before scaling; or offsets, which are
            added after it: floating-point ones, or integers with ``super_offset_NS``.
        super_scale_NS: Factors of scales, each for G / S adjacent scales; None for 1.
        super_offset_NS: Factors of offsets, like ``super_scale_NS``.
        table: The lookup table of the indices.
        permutation_K: The input feature of each column of values; None for the same order.
    """
    n, groups = scale_NG.shape
    weight = values_NK.float() if table is None else table.float()[values_NK.int()]
    weight = weight.view(n, groups, -1)
    zero_point = (
        offset_NG is not None and not offset_NG.is_floating_point() and super_offset_NS is None
    )
    if offset_NG is not None and zero_point:
        weight = weight - offset_NG.float()[:, :, None]
    weight = weight * scaled(scale_NG, super_scale_NS)[:, :, None]
    if offset_NG is not None and not zero_point:
        weight = weight + scaled(offset_NG, super_offset_NS)[:, :, None]
    weight = weight.view(n, -1)
    if permutation_K is None:
        return weight
    return torch.empty_like(weight).index_copy_(1, permutation_K.long(), weight)


def scaled(parts_NG: Tensor, factors_NS: Tensor | None) -> Tensor:
    """Multiplies scales or offsets by the factors of their super-blocks, in float32."""
    if factors_NS is None:
        return parts_NG.float()
    n, n_factors = factors_NS.shape
    return (parts_NG.float().view(n, n_factors, -1) * factors_NS.float()[:, :, None]).view(n, -1)


def pack_int4(values_NK: Tensor, group_size: int) -> Tensor:
    """Packs int8 values -8…7 into int16 [N, K/4].

    A group is group_size / 4 words; word j holds values j, j + group_size/4, j + group_size/2 and
    j + 3 * group_size/4, each plus 8, from the lowest nibble up. So one shift and one mask unpack
    each of the four consecutive quarters of a group.
    """
    n, k = values_NK.shape
    words = values_NK.new_zeros(n, k // group_size, group_size // 4, dtype=torch.int16)
    # A quarter at a time, to save memory: the weight can be large.
    for i, quarter in enumerate(values_NK.view(n, -1, 4, group_size // 4).unbind(2)):
        # Words are unsigned; their top bit is the sign of int16.
        words |= (quarter + 8).to(torch.int16) << 4 * i
    return words.view(n, k // 4)


def unpack_int4(packed: Tensor, group_size: int) -> Tensor:
    """Inverts ``pack_int4``: returns int8 [N, K] in -8…7."""
    n = packed.shape[0]
    words = packed.view(n, -1, 1, group_size // 4)
    shifts = torch.arange(0, 16, 4, device=packed.device, dtype=torch.int16).view(4, 1)
    nibbles = (words >> shifts) & 15
    return (nibbles.to(torch.int8) - 8).view(n, -1)


def split_planes(values_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Splits integers q of -128…119 into two planes of -8…7, h and l, with q = 16 h + l.

    16 h is the multiple of 16 that is nearest to q, so h alone is an integer weight, too.
    """
    high_NK = (values_NK + 8) >> 4  # at most 127, which int8 holds
    return high_NK, values_NK - 16 * high_NK


def join_planes(high_NK: Tensor, low_NK: Tensor) -> Tensor:
    """Inverts ``split_planes``."""
    return 16 * high_NK + low_NK


def fused_linear(
    x_MK: Tensor,
    weight_NK: Tensor,
    *,
    squares: Tensor | None = None,
    eps: float = 0.0,
    bias: Tensor | None = None,
    paired: bool = False,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Computes a matrix product with its epilogue: 1 / rms of a norm, bias, SwiGLU, residual.

    Nothing is rounded before the result.

    Args:
        x_MK: Activations, or the prescaled input that ``norm_epilogue`` returns.
        weight_NK: Floating point.
        squares: Partial sums of squares of a prescaled input, with which each row of the product is
            multiplied by 1 / rms. None for other inputs.
        eps: The norm's epsilon.
        bias: [N], or None.
        paired: The weight is gate features followed by up features, and the result their SwiGLU.
        gate: The result is multiplied by SiLU of the gate; float32, shaped like the result, or
            None.
        residual: Added; shaped like the result, or None.
        dtype: Element type of the result.

    Returns:
        [M, N], or [M, N / 2] for a paired weight.
    """
    y = x_MK.float() @ weight_NK.float().T
    if squares is not None:
        y = y * torch.rsqrt(squares.sum(-1, keepdim=True) / x_MK.shape[-1] + eps)
    if bias is not None:
        y = y + bias.float()
    if paired:
        gate, y = y.chunk(2, dim=-1)
    if gate is not None:
        y = F.silu(gate) * y
    if residual is not None:
        y = y + residual.float()
    return y.to(dtype)


def sum_of_parts(parts: Tensor) -> Tensor:
    """Sums the parts of ranks [ranks, ...] in float32, in the order of ranks, and rounds once."""
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total.to(parts.dtype)


def norm_epilogue(x_MK: Tensor, weight_K: Tensor, part: int = 16) -> tuple[Tensor, Tensor]:
    """Computes the part of an RMS norm that does not need a whole row.

    The matrix product that follows completes the norm (``squares`` of ``fused_linear``).

    Args:
        x_MK: The norm's input.
        weight_K: The norm's weight.
        part: The number of squares in a partial sum.

    Returns:
        The prescaled input [M, K], which is the input times the weight, rounded to the input's
        type; and partial sums of the input's squares, float32 [M, K / part rounded up].
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
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Computes head norms and rope, stores new keys and values, and computes attention.

    Args:
        qkv: [B * T, (H + 2J) * E]: queries, keys and values of T new tokens of each sequence.
        keys_BJCE: The cache, written at the new tokens' positions. A token beyond its end is not
            stored, and is treated as if it were at the last position.
        values_BJCE: Like ``keys_BJCE``.
        positions_B: Position of each sequence's first new token; the others follow it.
        cos_CE: Cosines of rope, float32.
        sin_CE: Sines of rope, float32.
        n_heads: H.
        q_norm: [E], weight of the RMS norm of query heads, or None.
        k_norm: [E], weight of the RMS norm of key heads, or None.
        eps: Epsilon of those norms.
        scale: The factor of scores; None is the inverse square root of E.
        window: The number of positions that a token sees, itself included, or None for all.

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
    scale = E**-0.5 if scale is None else scale
    out = attention(q, keys_BJCE, values_BJCE, at, window=window, scale=scale)
    return out.reshape(B * T, n_heads * E)


def embed(ids: Tensor, table_VK: Tensor, scale_V: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Looks up rows of a table, [..., K]; dequantizes rows of an int8 table by their scales.

    Ids outside the table are clamped to it.
    """
    ids = ids.clamp(0, len(table_VK) - 1)
    rows = F.embedding(ids, table_VK)
    return rows if scale_V is None else (rows.float() * scale_V[ids][..., None]).to(dtype)


def argmax(logits_MV: Tensor) -> Tensor:
    """Returns the argmax of each row, [M]: the first of equal values; -1 if it is not finite."""
    largest = logits_MV.amax(-1, keepdim=True)  # NaN where anything is
    first = (logits_MV == largest).int().argmax(-1)
    return first.where(largest[..., 0].abs() < torch.inf, -1)


def next_tokens(
    history_RW: Tensor, positions_R: Tensor, drafts_BD: Tensor | None, n: int, *, last_position: int
) -> tuple[Tensor, Tensor]:
    """Collects the input of a step: the newest token of each of the first n rows, and its drafts.

    Args:
        history_RW: int64, the tokens of each row.
        positions_R: int64, the position of each row's newest token.
        drafts_BD: int64, negative for no draft; None if D is 0.
        n: B.
        last_position: The last position of the cache, to which positions are clamped.

    Returns:
        int64 [B, T], the tokens (0 for no draft), where T = D + 1; and int64 [B, T], their
        positions.
    """
    newest_B1 = positions_R[:n, None]
    ids_B1 = history_RW[:n].gather(1, newest_B1)
    if drafts_BD is None:
        return ids_B1, newest_B1
    at_T = torch.arange(drafts_BD.shape[1] + 1, device=newest_B1.device)
    ids_BT = torch.cat((ids_B1, drafts_BD.clamp(min=0)), dim=1)
    return ids_BT, (newest_B1 + at_T).clamp(max=last_position)


def accept(
    ids_BT: Tensor,
    drafts_BD: Tensor | None,
    history_RW: Tensor,
    positions_R: Tensor,
    *,
    last_position: int,
) -> tuple[Tensor | None, Tensor | None]:
    """Appends sampled tokens to the first B rows, up to the first that differs from its draft.

    Args:
        ids_BT: int64, the sampled tokens.
        drafts_BD: As for ``next_tokens``.
        history_RW: int64; the sampled tokens are appended.
        positions_R: int64; advanced by the number of tokens accepted, up to the last position.
        last_position: The last position of the cache.

    Returns:
        int64 [B], the number of tokens accepted, and int64 [B], the number of drafts; (None, None)
        without drafts, where all tokens are accepted.
    """
    B, T = ids_BT.shape
    n_kept_B = n_drafts_B = None
    if drafts_BD is not None:
        accepted_BD = ids_BT[:, :-1] == drafts_BD
        n_kept_B = accepted_BD.long().cumprod(dim=1).sum(dim=1) + 1
        n_drafts_B = (drafts_BD >= 0).sum(dim=1)
    positions_B = positions_R[:B]
    after_BT = positions_B[:, None] + torch.arange(1, T + 1, device=positions_B.device)
    history_RW[:B].scatter_(1, after_BT, ids_BT)
    positions_B.add_(1 if n_kept_B is None else n_kept_B).clamp_(max=last_position)
    return n_kept_B, n_drafts_B


def extend_chain(
    own_B: Tensor, accepted_B: Tensor | None, undrafted_B: Tensor
) -> tuple[Tensor, Tensor]:
    """Updates the probability that all drafts of a chain so far are accepted.

    Args:
        own_B: float32, the probability that the draft model gives the newest draft.
        accepted_B: float32, the probability for the drafts before it; None if it is the first.
        undrafted_B: bool, rows whose drafts do not count.

    Returns:
        float32 [B], the probability that all drafts including the newest are accepted; and its mean
        over all rows, in which rows whose drafts do not count have 0. The chain ends if the mean is
        too small.
    """
    accepted_B = own_B if accepted_B is None else accepted_B * own_B
    return accepted_B, accepted_B.masked_fill(undrafted_B, 0.0).mean()


def ngram_draft(history_RW: Tensor, positions_R: Tensor, n: int, k: int, *, length: int) -> Tensor:
    """Drafts the k tokens after an earlier occurrence of the newest n-gram, for the first n rows.

    It looks up the latest earlier occurrence of the newest three tokens, or else of the newest two.
    If fewer than k tokens follow it, they are repeated cyclically.

    Args:
        history_RW: int64, the tokens of each row.
        positions_R: int64, the position of each row's newest token.
        n: B.
        k: D.
        length: A number above these positions.

    Returns:
        int64 [B, D]; -1 if there is no such occurrence.
    """
    history_BC = history_RW[:n, :length]
    newest_B1 = positions_R[:n, None]
    at_C = torch.arange(length, device=history_BC.device)
    # matching[c]: how many of the newest tokens, up to three, equal those that end at c.
    matching_BC = torch.zeros_like(history_BC)
    unbroken_BC = at_C < newest_B1
    for back in range(3):
        token_B1 = history_BC.gather(1, (newest_B1 - back).clamp(min=0))
        unbroken_BC = unbroken_BC & (history_BC.roll(back, dims=1) == token_B1) & (at_C >= back)
        matching_BC += unbroken_BC
    match_B1 = (matching_BC * length + at_C).argmax(dim=1, keepdim=True)
    found_B1 = matching_BC.gather(1, match_B1) >= 2
    ahead_D = torch.arange(k, device=history_BC.device)
    source_BD = match_B1 + 1 + ahead_D % (newest_B1 - match_B1).clamp(min=1)
    return history_RW[:n].gather(1, source_BD).where(found_B1, -1)
