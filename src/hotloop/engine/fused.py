"""The fused step: computes ``models.decoder`` by a sequence of our own CUDA kernels.

A layer is five kernels: qkv projection; head norms, rope, cache update and attention; output
projection, added to the residual stream; gate and up projections with SwiGLU; down projection,
added to the residual stream. Kernels that write the residual stream have a norm epilogue; kernels
that read it take a prescaled input. Each kernel may start before its predecessor has ended, and
loads weights until its input is ready (``kernels.cuda``). With tensor parallelism, two more kernels
per layer all-reduce the partial results. A matrix product of many rows reads x in a special layout
(``kernels.cuda.wide``). Either the kernel that computes x stores it in that layout, or a staging
kernel between the two converts it. A matrix product whose weight has parts of several number
formats has a kernel for each part. The decoder is the specification; ``prompt`` prefills prompts.

The bits of a row's result do not depend on the number of rows: verifying k drafts at once gives
exactly the results of k + 1 single steps.

Shape letters: B sequences, T tokens of each, M = B * T rows, D model width, K input features, N
output features, E head dimension, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hotloop.kernels import reference
from hotloop.kernels.cuda import step
from hotloop.kernels.cuda.attention import HEAD_DIMS, MAX_TOKENS, AttentionPlan
from hotloop.kernels.cuda.chain import chain_kernel
from hotloop.kernels.cuda.compile import Kernel
from hotloop.kernels.cuda.launch import Call, Launcher, Limits
from hotloop.kernels.cuda.linear import (
    Epilogue,
    GemmPlan,
    NextOperand,
    NormEpilogue,
    Prefetch,
    PrescaledInput,
)
from hotloop.kernels.cuda.packing import Format
from hotloop.kernels.cuda.sample import sample_kernel
from hotloop.kernels.cuda.step import Exchange, inbox_bytes
from hotloop.kernels.cuda.tuning import (
    Projection,
    attention_tuning,
    linear_tuning,
    plan_prefetch,
    plan_rows,
)
from hotloop.kernels.cuda.wide import WidePlan, max_counters
from hotloop.kernels.linear import Fused, LinearSpec
from hotloop.models.cache import KVCache
from hotloop.models.config import AttentionConfig, LayerConfig, ModelConfig
from hotloop.models.decoder import Block, Decoder, RMSNorm
from hotloop.models.linear import Embedding, Linear, Piece
from hotloop.parallel.collectives import Group, Use

_REQUANTIZE = "; with another --quant, such as int8, the file's weights are quantized again"
"""The advice that follows the reason why kernels do not support the weights of a file."""


def unsupported_reason(
    model: ModelConfig,
    matrices: Iterable[tuple[str, list[LinearSpec]]],
    dtype: torch.dtype,
    tokens: int,
) -> str | None:
    """Returns why a model cannot run the fused step, or None if it can.

    Args:
        model: Its architecture, or that of a rank's shard.
        matrices: Its matrices by name, each as pieces of one number format.
        dtype: Element type of activations.
        tokens: The most tokens of a sequence in one step.
    """
    if dtype != torch.bfloat16:
        return f"it computes in bfloat16, not {str(dtype).removeprefix('torch.')}"
    attentions = [layer.attention for layer in model.kinds]
    for width in (attention.head_dim for attention in attentions):
        if width not in HEAD_DIMS:
            return f"heads must be {', '.join(map(str, HEAD_DIMS))} wide, not {width}"
    if len({layer.shape(lambda _part: 1) for layer in model.kinds}) > 1:
        return "all layers must have the same heads and widths, since they share prefill buffers"
    for activation in (layer.feed_forward.activation for layer in model.kinds):
        if activation != "silu":
            return f"the activation of its feed-forward must be silu, not {activation}"
    if tokens > MAX_TOKENS:
        return f"a step verifies at most {MAX_TOKENS - 1} drafts, not {tokens - 1}"
    for matrix in (matrix for layer in model.kinds for matrix in layer.matrices):
        if matrix.k % 8:
            return f"{matrix.name} must have a multiple of 8 input features, not {matrix.k}"
    for name, pieces in matrices:
        for reason in filter(None, map(Fused.unsupported, pieces)):
            return f"it {reason} ({name}){_REQUANTIZE}"
    return None


class FusedForward:
    """The fused step as a ``Forward``, which also computes the argmax of the logits.

    Args:
        decoder: The model, with weights assigned for the fused step.
        cache: Its cache.
        launcher: Launches kernels.
        n_tokens: Token ids below this can be selected by the argmax.
        sharded: The model is sharded over ranks: partial results are all-reduced.
        peers: Exchange buffers of the ranks. If None, the decoder's ``all_reduce`` is used, and no
            argmax is computed.
        n_layers: Number of first layers to run; None runs all.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        launcher: Launcher,
        *,
        n_tokens: int,
        sharded: bool = False,
        peers: Peers | None = None,
        n_layers: int | None = None,
    ) -> None:
        self._decoder, self._cache, self._launcher = decoder, cache, launcher
        self._n_tokens, self._sharded, self._peers = n_tokens, sharded, peers
        self._first_id = 0 if peers is None else peers.first_id
        self._layers = decoder.blocks[:n_layers]
        self._plans: dict[tuple[int, int], _Plans] = {}
        self._dependent = False
        # Completion counters of split KV and split K; the last to arrive resets them to zero.
        kinds = {block.config.attention: None for block in self._layers}
        linears = [
            decoder.head,
            *(linear for block in self._layers for linear in block.linears.values()),
        ]
        n_counters = max(
            *(
                _attention_plan(kind, cache, launcher.limits, cache.n_seats, MAX_TOKENS).n_counters
                for kind in kinds
            ),
            *(max_counters(form) for linear in linears for form in fused_forms(linear)),
        )
        self._counters = torch.zeros(n_counters, dtype=torch.int32, device=decoder.device)

    def __call__(
        self,
        ids_BT: Tensor,
        positions_BT: Tensor,
        seats_B: Tensor,
        **_: object,  # attention indexes seats, and stops at a row's position
    ) -> tuple[Tensor, Tensor | None]:
        """See ``Forward``; positions of a sequence must be consecutive."""
        B, T = ids_BT.shape
        plans = self._plans_for(B, T)
        positions_B = positions_BT[:, 0].contiguous()
        self._dependent = False  # torch launched its predecessor
        first = self._layers[0].attention.norm
        x_MD, prescaled = self._embed(ids_BT.flatten().contiguous(), first)
        afters = (*self._layers[1:], None)
        staged: NextOperand | None = None  # what the next matrix product reads instead of x
        for i, (block, after) in enumerate(zip(self._layers, afters, strict=True)):
            layer, attention, feed_forward = plans.layers[i], block.attention, block.feed_forward
            gate_up = layer.gate_up, feed_forward.gate_up_proj
            down = layer.down, feed_forward.down_proj
            o, o_prefetch = (layer.o, attention.o_proj), _prefetch("o", *gate_up)
            qkv = self._linear(
                layer.qkv,
                attention.qkv_proj,
                prescaled,
                staged=staged,
                prefetch=_prefetch("qkv", *gate_up),
            )
            staged = self._next_operand(layer.attention.stores_operand, layer.o, like=qkv)
            attended = self._attend(layer.attention, i, qkv, seats_B, positions_B, staged)
            following = self._next_operand(_stores_operand(layer.o), layer.gate_up, like=qkv)
            x_MD, prescaled = self._add(
                *o, attended, x_MD, feed_forward.norm, o_prefetch, staged, following
            )
            staged = following
            following = self._next_operand(_stores_operand(layer.gate_up), layer.down, like=qkv)
            gated = self._linear(
                *gate_up,
                prescaled,
                staged=staged,
                following=following,
                prefetch=_prefetch("gate_up", *down),
            )
            norm, next_plans, down_prefetch = self._decoder.norm, plans.head, None
            if after is not None:
                norm, next_plans = after.attention.norm, plans.layers[i + 1].qkv
                down_prefetch = _prefetch("down", next_plans, after.attention.qkv_proj)
            staged = following
            following = self._next_operand(_stores_operand(layer.down), next_plans, like=qkv)
            x_MD, prescaled = self._add(*down, gated, x_MD, norm, down_prefetch, staged, following)
            staged = following
        logits_MV, best_M = self._logits(plans.head, prescaled, staged)
        return logits_MV.view(B, T, -1), None if best_M is None else best_M.view(B, T)

    def logits(self, x_MD: Tensor) -> Tensor:
        """Computes logits [M, V] of the residual stream after the last layer."""
        self._dependent = False
        norm = self._decoder.norm
        weighted, squares = reference.norm_epilogue(x_MD, norm.weight)
        prescaled = PrescaledInput(x=weighted, squares=squares, eps=norm.eps)
        logits_MV, _ = self._logits(self._plans_for(1, len(x_MD)).head, prescaled)
        return logits_MV

    def _plans_for(self, B: int, T: int) -> _Plans:
        if (B, T) not in self._plans:
            plans = _Plans(
                self._layers,
                self._decoder.head,
                self._cache,
                self._launcher.limits,
                B,
                T,
                sharded=self._sharded,
            )
            embed = step.embed_kernel(int8=_table(self._decoder.embedding)[1] is not None)
            # Kernels of rows and sampler are included, so that all are compiled at once.
            ends = [step.ngram_draft_kernel(), step.next_tokens_kernel(), step.accept_kernel()]
            if not self._sharded:
                ends += [step.argmax_kernel(), sample_kernel(), chain_kernel()]
            elif self._peers is not None:
                ends += [
                    step.all_reduce_kernel(self._peers.sums.ranks),
                    step.argmax_over_ranks_kernel(),
                ]
            else:
                ends += [step.add_kernel()]
            self._launcher.load((*plans.kernels, embed, *ends))
            self._plans[B, T] = plans
        return self._plans[B, T]

    def _embed(self, ids_M: Tensor, norm: RMSNorm) -> tuple[Tensor, PrescaledInput]:
        embedding = self._decoder.embedding
        x_MD = ids_M.new_empty(len(ids_M), embedding.k, dtype=torch.bfloat16)
        norm_epilogue = _norm_epilogue(norm, x_MD)
        self._launch(step.embed(ids_M, *_table(embedding), x_MD, norm_epilogue))
        return x_MD, norm_epilogue.prescaled

    def _next_operand(
        self, stored: bool, plans: _LinearPlans, *, like: Tensor
    ) -> NextOperand | None:
        """Allocates the input of the next matrix product in that product's own layout.

        Args:
            stored: The kernel that computes the input can store it in that layout.
            plans: The plans of the next matrix product.
            like: A tensor on the device.

        Returns:
            None if the input is stored as plain rows.
        """
        plan = _only(plans)
        if not stored or not isinstance(plan, WidePlan):
            return None
        return plan.next_operand(like.new_empty(plan.operand_bytes, dtype=torch.uint8))

    def _attend(
        self,
        plan: AttentionPlan,
        i: int,
        qkv: Tensor,
        seats_B: Tensor,
        positions_B: Tensor,
        next_operand: NextOperand | None,
    ) -> Tensor:
        attention = self._layers[i].attention
        out = qkv.new_empty(len(qkv), plan.n_heads * plan.head_dim)
        norms, eps = {}, 0.0
        if attention.q_norm is not None and attention.k_norm is not None:
            norms = {"q_norm_E": attention.q_norm.weight, "k_norm_E": attention.k_norm.weight}
            eps = attention.q_norm.eps
        call = plan.call(
            qkv,
            out,
            *self._cache.layer(i),
            seats_B,
            positions_B,
            *self._decoder.rope(i),
            **norms,
            eps=eps,
            partial=qkv.new_empty(plan.n_partial, dtype=torch.float32),
            counters=self._counters,
            next_operand=next_operand,
        )
        self._launch(call)
        return out

    def _add(
        self,
        plans: _LinearPlans,
        linear: Linear,
        x_MK: Tensor,
        onto_MD: Tensor,
        norm: RMSNorm,
        prefetch: Prefetch | None = None,
        staged: NextOperand | None = None,
        following: NextOperand | None = None,
    ) -> tuple[Tensor, PrescaledInput]:
        """Adds a projection to the residual stream, in place, with the norm epilogue."""
        norm_epilogue = _norm_epilogue(norm, onto_MD)
        if not self._sharded:
            self._linear(
                plans,
                linear,
                x_MK,
                onto=onto_MD,
                norm_epilogue=norm_epilogue,
                prefetch=prefetch,
                staged=staged,
                following=following,
            )
            return onto_MD, norm_epilogue.prescaled
        part_MD = self._linear(plans, linear, x_MK, prefetch=prefetch, staged=staged)
        if self._peers is not None:
            self._launch(
                step.all_reduce(part_MD, onto_MD, onto_MD, norm_epilogue, self._peers.sums)
            )
        else:
            sum_MD = self._layers[0].all_reduce(part_MD)
            self._dependent = False
            self._launch(step.add(sum_MD, onto_MD, onto_MD, norm_epilogue))
        return onto_MD, norm_epilogue.prescaled

    def _logits(
        self, plans: _LinearPlans, prescaled: PrescaledInput, staged: NextOperand | None = None
    ) -> tuple[Tensor, Tensor | None]:
        head, x_MD = self._decoder.head, prescaled.x
        (piece,), (row_plans,) = head.pieces, plans
        n_best = max(0, min(self._n_tokens - self._first_id, head.n))
        logits_MV = x_MD.new_empty(len(x_MD), head.n, dtype=torch.float32)
        best_M = x_MD.new_empty(len(x_MD), dtype=torch.int64)
        for rows, plan in row_plans:
            best = (
                x_MD.new_empty(plan.rows, plan.candidates, dtype=torch.float32),
                x_MD.new_empty(plan.rows, plan.candidates, dtype=torch.int32),
            )
            self._multiply(
                plan,
                piece,
                prescaled.rows(rows),
                logits_MV[rows],
                staged=staged,
                best=best,
                n_best=n_best,
            )
            if not self._sharded:
                self._launch(step.argmax(best, best_M[rows]))
            elif self._peers is not None:
                choices, first = self._peers.choices, self._first_id
                self._launch(step.argmax_over_ranks(best, best_M[rows], choices, first=first))
        is_known = not self._sharded or self._peers is not None
        return logits_MV, best_M if is_known else None

    def _linear(
        self,
        plans: _LinearPlans,
        linear: Linear,
        x: Tensor | PrescaledInput,
        *,
        onto: Tensor | None = None,
        norm_epilogue: NormEpilogue | None = None,
        prefetch: Prefetch | None = None,
        staged: NextOperand | None = None,
        following: NextOperand | None = None,
    ) -> Tensor:
        """Computes a matrix product.

        Args:
            plans: The plans of the weight's pieces.
            linear: The weight.
            x: The input, [M, K].
            onto: The residual stream, to which the result is added in place; None for a new tensor.
            norm_epilogue: The next norm, of which the kernel computes the first part.
            prefetch: The weight to prefetch.
            staged: x in this matrix product's own layout; it is read instead of ``x``.
            following: A buffer for the next matrix product's input, in that product's own layout.
                The kernel stores its result there instead or, with a norm epilogue, the prescaled
                input. None stores plain rows.

        Returns:
            The result [M, N], or ``onto``; with SwiGLU [M, N / 2].
        """
        x_MK = x.x if isinstance(x, PrescaledInput) else x
        width = linear.n // 2 if linear.paired else linear.n
        y = x_MK.new_empty(len(x_MK), width) if onto is None else onto
        gate: Tensor | None = None
        for piece, row_plans in zip(linear.pieces, plans, strict=True):
            _, first = row_plans[0]
            if first.epilogue == "logits":  # these are gates, for the next piece's SwiGLU
                gate = x_MK.new_empty(len(x_MK), width, dtype=torch.float32)
            for rows, plan in row_plans:
                options: dict[str, Any] = {}
                if plan.epilogue == "part":
                    options["first"] = piece.rows.start
                elif plan.epilogue == "gated" and gate is not None:
                    options["gate"] = gate[rows]
                self._multiply(
                    plan,
                    piece,
                    x.rows(rows) if isinstance(x, PrescaledInput) else x[rows],
                    gate[rows] if plan.epilogue == "logits" and gate is not None else y[rows],
                    residual=None if onto is None else onto[rows],
                    norm_epilogue=None if norm_epilogue is None else norm_epilogue.rows(rows),
                    prefetch=prefetch,
                    staged=staged,
                    next_operand=following,
                    **options,
                )
                prefetch = None  # the first launch prefetches
        return y

    def _multiply(
        self,
        plan: GemmPlan,
        piece: Piece,
        x: Tensor | PrescaledInput,
        y: Tensor,
        staged: NextOperand | None = None,
        **options: Any,
    ) -> None:
        """Launches a matrix product; for the options see ``GemmPlan.call``."""
        assert isinstance(piece.kernel, Fused), "the weight was not assigned for the fused step"
        weight = piece.kernel.named(piece.packed)
        if staged is not None:
            options["operand"] = staged.operand
        elif isinstance(plan, WidePlan):
            operand = y.new_empty(plan.operand_bytes, dtype=torch.uint8)
            self._launch(plan.staging(x, operand, weight.features))
            options["operand"] = operand
        call = plan.call(
            x,
            y,
            *weight,
            bias_N=piece.bias,
            partial=y.new_empty(plan.n_partial, dtype=torch.float32),
            counters=self._counters,
            **options,
        )
        self._launch(call)

    def _launch(self, call: Call) -> None:
        self._launcher.prepare(call, dependent=self._dependent)()
        self._dependent = True


@dataclass(frozen=True, kw_only=True)
class Peers:
    """Exchange buffers of a tensor-parallel step.

    Attributes:
        sums: For the all-reduce of the residual stream.
        choices: For the argmax over ranks.
        first_id: First token id of this rank's shard of the vocabulary.
    """

    sums: Exchange
    choices: Exchange
    first_id: int

    @classmethod
    def of(cls, group: Group, decoder: Decoder, first_id: int, rows: int) -> Peers | None:
        """Allocates the buffers of a group; None if ranks cannot write each other's memory.

        All ranks call this at the same time.

        Args:
            group: The ranks.
            decoder: This rank's shard of the model.
            first_id: See ``Peers``.
            rows: The most rows of a step.
        """

        def exchange(use: Use, k: int) -> Exchange | None:
            inboxes = group.inboxes(inbox_bytes(group.size, rows, k), use)
            if inboxes is None:
                return None
            addresses, device = inboxes.addresses, decoder.device
            return Exchange.over(
                inboxes.rank, addresses, capacity=rows, k=k, device=device, kept=inboxes
            )

        sums, choices = exchange("all_reduce", decoder.embedding.k), exchange("argmax", 0)
        if sums is None or choices is None:
            return None
        return cls(sums=sums, choices=choices, first_id=first_id)


def fused_kernels(linear: Linear) -> list[Fused]:
    """Returns the kernels of the pieces of a weight that was assigned for the fused step."""
    kernels = [piece.kernel for piece in linear.pieces]
    fused = [kernel for kernel in kernels if isinstance(kernel, Fused)]
    assert fused == kernels != [], "the weight was not assigned for the fused step"
    return fused


def fused_forms(linear: Linear) -> tuple[Format, ...]:
    """Returns the packed formats of the pieces of a weight."""
    return tuple(kernel.form for kernel in fused_kernels(linear))


def _prefetch(by: Projection, plans: _LinearPlans, linear: Linear) -> Prefetch | None:
    """Plans the prefetch of a weight, or its first piece, by an earlier projection ``by``."""
    (_, plan), (weight, *_) = plans[0][0], linear.packed
    return plan_prefetch(by, plan, weight)


def _table(embedding: Embedding) -> tuple[Tensor, Tensor | None]:
    """Returns the rows of an embedding, and the scales of an int8 one."""
    table, *scale = embedding.packed
    return table, scale[0] if scale else None


def _norm_epilogue(norm: RMSNorm, x_MD: Tensor) -> NormEpilogue:
    rows, width = x_MD.shape
    prescaled = PrescaledInput.empty(rows, width, norm.eps, x_MD.device)
    return NormEpilogue(weight=norm.weight, prescaled=prescaled)


def _attention_plan(
    config: AttentionConfig, cache: KVCache, limits: Limits, B: int, T: int
) -> AttentionPlan:
    return AttentionPlan(
        batch=B,
        tokens=T,
        n_heads=config.n_heads,
        n_kv_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        scale=config.scale,
        n_positions=cache.n_positions,
        window=config.window,
        tuning=attention_tuning(
            head_dim=config.head_dim,
            n_kv_heads=config.n_kv_heads,
            n_positions=cache.n_positions,
            batch=B,
            limits=limits,
            rows=T * config.n_heads // config.n_kv_heads,
        ),
    )


_Kind = tuple[LayerConfig, tuple[tuple[Format, ...], ...]]
"""The configuration of a layer, and the formats of its weights."""

_RowPlans = Sequence[tuple[slice, GemmPlan]]
"""The launches of one piece of a weight: the rows of each, and its plan."""

_LinearPlans = Sequence[_RowPlans]
"""The launches of each piece of a weight."""


def _only(plans: _LinearPlans) -> GemmPlan | None:
    """Returns the plan of a matrix product if it is a single launch, else None."""
    (_, plan), *others = (row_plan for row_plans in plans for row_plan in row_plans)
    return None if others else plan


def _stores_operand(plans: _LinearPlans) -> bool:
    """Returns whether a matrix product stores its result as the operand of the next one."""
    plan = _only(plans)
    return plan is not None and plan.stores_operand


def _is_staged_before(plans: _LinearPlans) -> bool:
    """Returns whether the kernel that computes x can store it in a matrix product's layout."""
    plan = _only(plans)
    return isinstance(plan, WidePlan) and plan.is_staged_before


def _storing_for(plans: _LinearPlans, after: _LinearPlans) -> _LinearPlans:
    """Returns a matrix product's plans, changed to store the operand of ``after`` if possible."""
    plan = _only(plans)
    if not isinstance(plan, WidePlan) or not _is_staged_before(after):
        return plans
    return [[(slice(0, plan.rows), dataclasses.replace(plan, has_next=True))]]


def _epilogues(epilogue: Epilogue, n_pieces: int) -> tuple[Epilogue, ...]:
    """Returns the epilogue of each piece of a projection.

    With SwiGLU and two pieces, the first stores the gates, and the second applies SwiGLU. With a
    plain epilogue, each piece stores its part of the common output.
    """
    if n_pieces == 1:
        return (epilogue,)
    if epilogue == "swiglu":
        assert n_pieces == 2, f"gate and up features in {n_pieces} pieces"
        return "logits", "gated"
    assert epilogue == "plain", f"{epilogue} of several pieces"
    return ("part",) * n_pieces


@dataclass(frozen=True)
class _LayerPlans:
    """The launch plans of a layer's kernels.

    Attributes:
        qkv: The qkv projection.
        attention: Attention.
        o: The output projection.
        gate_up: The gate and up projections, with SwiGLU.
        down: The down projection.
    """

    qkv: _LinearPlans
    attention: AttentionPlan
    o: _LinearPlans
    gate_up: _LinearPlans
    down: _LinearPlans

    def storing(self, after: _LinearPlans, *, sharded: bool) -> _LayerPlans:
        """Returns the plans, changed so that kernels store the next matrix product's operand.

        Args:
            after: The plans of the matrix product after the layer.
            sharded: Partial results are summed over ranks before they are added to the residual
                stream.
        """
        return _LayerPlans(
            qkv=self.qkv,
            attention=dataclasses.replace(self.attention, stores_operand=_is_staged_before(self.o)),
            o=self.o if sharded else _storing_for(self.o, self.gate_up),
            gate_up=_storing_for(self.gate_up, self.down),
            down=self.down if sharded else _storing_for(self.down, after),
        )

    @property
    def kernels(self) -> list[Kernel]:
        """All kernels of the layer."""
        linears = (self.qkv, self.o, self.gate_up, self.down)
        return [self.attention.kernel, *(kernel for plans in linears for kernel in _kernels(plans))]


def _kernels(plans: _LinearPlans) -> list[Kernel]:
    """Returns all kernels of a matrix product."""
    return [kernel for rows in plans for _, plan in rows for kernel in plan.kernels]


class _Plans:
    """The launch plans of a step of B sequences with T tokens each.

    Layers with the same configuration and weight formats share their plans, if what follows them
    (a layer of the same kind, or the head) is the same too.

    Attributes:
        layers: The plans of each layer.
        head: The plan of the head.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        head: Linear,
        cache: KVCache,
        limits: Limits,
        B: int,
        T: int,
        *,
        sharded: bool,
    ) -> None:
        def plan(
            linear: Linear, projection: Projection, epilogue: Epilogue = "plain", *, norm: bool
        ) -> _LinearPlans:
            forms = fused_forms(linear)
            # Inputs with a norm are sums over ranks; and a weight in pieces has no single operand.
            staged = (sharded and norm) or len(forms) > 1
            return [
                plan_rows(
                    form,
                    B * T,
                    epilogue,
                    norm=norm,
                    tuning=linear_tuning(form, limits, projection),
                    limits=limits,
                    staged=staged,
                )
                for form, epilogue in zip(forms, _epilogues(epilogue, len(forms)), strict=True)
            ]

        def layer(block: Block) -> _LayerPlans:
            attention, feed_forward = block.attention, block.feed_forward
            return _LayerPlans(
                qkv=plan(attention.qkv_proj, "qkv", norm=True),
                attention=_attention_plan(block.config.attention, cache, limits, B, T),
                o=plan(attention.o_proj, "o", norm=False),
                gate_up=plan(feed_forward.gate_up_proj, "gate_up", "swiglu", norm=True),
                down=plan(feed_forward.down_proj, "down", norm=False),
            )

        self.head = plan(head, "head", "logits", norm=True)

        def kind_of(block: Block) -> _Kind:
            return block.config, tuple(map(fused_forms, block.linears.values()))

        kinds: dict[_Kind | None, _LayerPlans] = {}
        self._pairs: dict[tuple[_Kind, _Kind | None], _LayerPlans] = {}  # of a layer and the next
        for block in blocks:
            if kind_of(block) not in kinds:
                kinds[kind_of(block)] = layer(block)
        sequence = [*map(kind_of, blocks), None]  # None: the head
        self.layers: list[_LayerPlans] = []
        for pair in itertools.pairwise(sequence):
            kind, after = pair
            assert kind is not None
            if pair not in self._pairs:
                next_plans = self.head if after is None else kinds[after].qkv
                self._pairs[kind, after] = kinds[kind].storing(next_plans, sharded=sharded)
            self.layers.append(self._pairs[kind, after])

    @property
    def kernels(self) -> list[Kernel]:
        """All kernels of the layers and the head. Only these depend on the number of rows."""
        layers = [kernel for plans in self._pairs.values() for kernel in plans.kernels]
        return [*layers, *_kernels(self.head)]
