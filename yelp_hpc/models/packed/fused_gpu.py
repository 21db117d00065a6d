"""The decoders of ChatGLM3 and of Llama and its like in few, wide steps of plain torch, for a GPU.

The counterpart of `fused.py`, whose products and layouts are a CPU's: equal to each model's own
forward up to rounding, on any device and in any number format. Queries, keys and values are one
product, gate and up another; LoRA is computed in their number format; rotation is in place; the
last layer runs from its attention on for the wanted positions alone. A token keeps 5.5 h + 2.3 k +
2 f numbers a layer (`forecast/memory.py`). Reads and writes tensors only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from yelp_hpc.models.chatglm3.model import ChatGLMModel
from yelp_hpc.models.packed.attention import Layout, attend
from yelp_hpc.models.packed.fused import is_frozen, is_llama, norm, swiglu
from yelp_hpc.models.packed.linear import Projection

States = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class _Layer:
    """One layer: attention and MLP, each behind its norm, with a residual connection."""

    module: Any
    before_attention: Any
    query_key_value: Projection
    output: Projection
    before_mlp: Any
    gate_up: Projection
    down: Projection


class GpuDecoder:
    """Runs a prepared decoder; holds the merged projections of every layer."""

    def __init__(self, base: Any) -> None:
        config = base.config
        self.heads = config.num_attention_heads
        self.chatglm = type(getattr(base, "transformer", None)) is ChatGLMModel
        self.decoder = base.transformer if self.chatglm else base.get_decoder()
        if self.chatglm:
            self.groups = config.multi_query_group_num
            self.final = self.decoder.encoder.final_layernorm
            self.scale = config.kv_channels**-0.5
            self.layers = [_of_chatglm(layer) for layer in self.decoder.encoder.layers]
        else:
            self.groups, self.final = config.num_key_value_heads, self.decoder.norm
            self.scale = self.decoder.layers[0].self_attn.scaling
            self.layers = [_of_llama(layer) for layer in self.decoder.layers]
        self.embed = base.get_input_embeddings()

    @staticmethod
    def supports(base: Any) -> bool:
        """Whether this class computes the model, wherever it is."""
        if type(getattr(base, "transformer", None)) is not ChatGLMModel:
            return is_llama(base)
        config = base.config
        plain = config.rmsnorm and config.multi_query_attention and config.post_layer_norm
        odd = (
            config.apply_residual_connection_post_layernorm
            or config.fp32_residual_connection
            or config.hidden_dropout
            or config.attention_dropout
        )
        projections = (
            projection
            for layer in base.transformer.encoder.layers
            for projection in (
                layer.self_attention.query_key_value,
                layer.self_attention.dense,
                layer.mlp.dense_h_to_4h,
                layer.mlp.dense_4h_to_h,
            )
        )
        return plain and not odd and is_frozen(base) and all(map(Projection.supports, projections))

    def __call__(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        layout: Layout,
        select: Tensor,
        states: States | None = None,
    ) -> Tensor:
        """Hidden states `[S, hidden]` at `select`, after the final norm.

        `states` gets the keys and values `[T, groups, head_dim]` of each layer appended.
        """
        hidden: Tensor = self.embed(input_ids)
        with torch.autocast(hidden.device.type, enabled=False):
            cos, sin = self._angles(hidden, position_ids)
            for layer in self.layers:
                chosen = select if layer is self.layers[-1] else None
                inputs = (layer, hidden, cos, sin, layout, chosen, states)
                again = getattr(layer.module, "gradient_checkpointing", False)
                if again and layer.module.training and torch.is_grad_enabled():
                    # the masks of LoRA's dropout come from a counter: there is no state to keep
                    hidden = checkpoint(
                        self._layer, *inputs, use_reentrant=False, preserve_rng_state=False
                    )
                else:
                    hidden = self._layer(*inputs)
            return norm(hidden, self.final)

    def _layer(
        self,
        layer: _Layer,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        layout: Layout,
        select: Tensor | None,
        states: States | None,
    ) -> Tensor:
        mixed = layer.query_key_value(norm(hidden, layer.before_attention))
        count = self.heads + self.groups
        mixed = _Rotation.apply(mixed, cos, sin, count, self.chatglm)
        every = mixed.view(len(mixed), count + self.groups, -1)
        query, key, value = every.split([self.heads, self.groups, self.groups], 1)
        if states is not None:
            states.append((key.clone(), value.clone()))
        context = attend(query, key, value, layout, self.scale).flatten(1)
        if select is not None:
            context, hidden = context.index_select(0, select), hidden.index_select(0, select)
        hidden = hidden + layer.output(context)
        return hidden + layer.down(swiglu(layer.gate_up(norm(hidden, layer.before_mlp))))

    def _angles(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines `[T, 1, pairs]`."""
        places = position_ids.unsqueeze(0)
        if self.chatglm:
            rope = self.decoder._rope(places, len(position_ids), 0, hidden.device)
            return rope[..., 0], rope[..., 1]
        cos, sin = self.decoder.rotary_emb(hidden, places)
        half = cos.shape[-1] // 2
        return cos[0, :, None, :half], sin[0, :, None, :half]


def _of_chatglm(layer: Any) -> _Layer:
    attention, mlp = layer.self_attention, layer.mlp
    return _Layer(
        layer,
        layer.input_layernorm,
        Projection(attention.query_key_value),
        Projection(attention.dense),
        layer.post_attention_layernorm,
        Projection(mlp.dense_h_to_4h),
        Projection(mlp.dense_4h_to_h),
    )


def _of_llama(layer: Any) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return _Layer(
        layer,
        layer.input_layernorm,
        Projection(*(getattr(attention, f"{name}_proj") for name in "qkv")),
        Projection(attention.o_proj),
        layer.post_attention_layernorm,
        Projection(mlp.gate_proj, mlp.up_proj),
        Projection(mlp.down_proj),
    )


class _Rotation(torch.autograd.Function):
    """Rotary positions (Su et al. 2021) on the queries and keys of merged q/k/v, in place.

    Of ChatGLM3 pairs that lie side by side, in the first half of each head; of Llama the two halves
    of each head.
    """

    @staticmethod
    def forward(
        ctx: Any, mixed: Tensor, cos: Tensor, sin: Tensor, turned: int, beside: bool
    ) -> Tensor:
        ctx.mark_dirty(mixed)
        ctx.save_for_backward(cos, sin)
        ctx.turned, ctx.beside = turned, beside
        first, second = _pairs(mixed, cos, turned, beside)
        kept = (first * cos).addcmul_(second, sin, value=-1)
        second.mul_(cos).addcmul_(first, sin)
        first.copy_(kept)
        return mixed

    @staticmethod
    def backward(ctx: Any, dmixed: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        result = dmixed.clone()
        first, second = _pairs(result, cos, ctx.turned, ctx.beside)
        # a rotation's transpose is the rotation by the opposite angle
        kept = (first * cos).addcmul_(second, sin)
        second.mul_(cos).addcmul_(first, sin, value=-1)
        first.copy_(kept)
        return result, None, None, None, None


def _pairs(mixed: Tensor, cos: Tensor, turned: int, beside: bool) -> tuple[Tensor, Tensor]:
    """Views `[T, turned heads, pairs]` of the numbers that are rotated together."""
    pairs, tokens = cos.shape[-1], len(mixed)
    if beside:
        # the head is twice as wide as what is turned of it
        states = mixed.view(tokens, -1, 4 * pairs)[:, :turned, : 2 * pairs]
        return states[..., 0::2], states[..., 1::2]
    states = mixed.view(tokens, -1, 2 * pairs)[:, :turned]
    return states[..., :pairs], states[..., pairs:]
