"""The layers of ChatGLM3 under their published names: norms, rotation, attention, masks, MLP.

Every operation, its order and its memory layout (`[tokens, batch, ...]`) are those of the published
`modeling_chatglm.py`; tidying them up would change the last bit. Reads and writes tensors only.
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

if TYPE_CHECKING:
    from yelp_hpc.models.chatglm3.model import ChatGLMConfig


class Linear(nn.Linear):
    """A linear layer whose fp16 products are summed in fp32 on every machine.

    GPUs and CPUs with AVX512-FP16 do so; torch's kernel for other CPUs does not, and is several
    times slower than fp32 there.
    """

    def forward(self, input: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        half = input.dtype == self.weight.dtype == torch.float16
        if not half or input.device.type != "cpu" or _native_fp16():
            return super().forward(input)
        bias = None if self.bias is None else self.bias.float()
        return F.linear(input.float(), self.weight.float(), bias).half()


@cache
def _native_fp16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


class RMSNorm(nn.Module):
    """Root mean square norm (Zhang & Sennrich 2019) in fp32, rounded once, after the weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        """`[..., size]` in and out."""
        variance = hidden.to(torch.float32).pow(2).mean(-1, keepdim=True)
        normed = hidden * torch.rsqrt(variance + self.eps)
        return (self.weight * normed).to(hidden.dtype)


def _norm(config: ChatGLMConfig) -> nn.Module:
    kind = RMSNorm if config.rmsnorm else nn.LayerNorm
    return kind(config.hidden_size, eps=config.layernorm_epsilon)


class RotaryEmbedding(nn.Module):
    """Rotary positions (Su et al. 2021) on the first half of each head, pairs side by side.

    `inv_freq` is published with the weights and unused by the published code too.
    """

    inv_freq: Tensor

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.dim = config.kv_channels // 2
        self.base = 10000 * config.rope_ratio
        self.positions = config.seq_length
        self.register_buffer("inv_freq", self.frequencies())
        self._table: Tensor | None = None

    def frequencies(self, device: torch.device | None = None) -> Tensor:
        """Angle a position turns each pair by, `[dim / 2]` in fp32."""
        steps = torch.arange(0, self.dim, 2, dtype=torch.float32, device=device)
        result: Tensor = 1.0 / (self.base ** (steps / self.dim))
        return result

    def forward(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Cosine and sine of every position, `[seq_length, dim / 2, 2]` in `dtype`."""
        if self._table is None or self._table.dtype != dtype or self._table.device != device:
            # A table made inside inference_mode could not take part in training later.
            with torch.inference_mode(False), torch.autocast(device.type, enabled=False):
                seen = torch.arange(self.positions, dtype=torch.float32, device=device)
                angle = torch.outer(seen, self.frequencies(device))
                self._table = torch.stack([torch.cos(angle), torch.sin(angle)], dim=-1).to(dtype)
        return self._table


def rotate(states: Tensor, rope: Tensor) -> Tensor:
    """Turn `[tokens, batch, heads, head_dim]` by `rope` `[tokens, batch or 1, pairs, 2]`."""
    tokens, batch, heads, _ = states.shape
    turned = rope.shape[-2] * 2
    states, rest = states[..., :turned], states[..., turned:]
    pairs = states.reshape(tokens, batch, heads, turned // 2, 2)
    rope = rope.view(tokens, -1, 1, turned // 2, 2)
    cos, sin = rope[..., 0], rope[..., 1]
    out = torch.stack(
        [pairs[..., 0] * cos - pairs[..., 1] * sin, pairs[..., 1] * cos + pairs[..., 0] * sin], -1
    )
    return torch.cat((out.flatten(3), rest), dim=-1)


class SelfAttention(nn.Module):
    """Multi-query attention; `query_key_value` is one projection, as published."""

    def __init__(self, config: ChatGLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.kv_channels
        self.heads = config.num_attention_heads
        self.groups = config.multi_query_group_num
        # What transformers' attention functions expect of a module.
        self.num_key_value_groups = self.heads // self.groups
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.query_key_value = Linear(
            config.hidden_size,
            (self.heads + 2 * self.groups) * self.head_dim,
            bias=config.add_bias_linear or config.add_qkv_bias,
        )
        self.dense = Linear(
            self.heads * self.head_dim, config.hidden_size, bias=config.add_bias_linear
        )

    def forward(
        self,
        hidden: Tensor,
        rope: Tensor,
        mask: Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """`[tokens, batch, hidden]` in and out, and the attention weights if computed."""
        query, key, value = self._project(hidden)
        query, key = rotate(query, rope), rotate(key, rope)
        if past_key_values is not None:
            seen = past_key_values.get_seq_length(self.layer_idx)
            new = (key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3))
            keys, values = past_key_values.update(*new, self.layer_idx)
            # The first call attends to what it has just computed, in the layout it has computed it.
            if seen or keys.shape[2] != key.shape[0]:
                key, value = keys.permute(2, 0, 1, 3), values.permute(2, 0, 1, 3)

        weights = None
        implementation = self.config._attn_implementation
        if implementation == "sdpa":
            context = self._sdpa(query, self._repeat(key), self._repeat(value), mask)
        elif implementation == "eager":
            context, weights = self._eager(query, self._repeat(key), self._repeat(value), mask)
        else:
            attend = ALL_ATTENTION_FUNCTIONS[implementation]
            context, weights = attend(
                self,
                *(states.permute(1, 2, 0, 3) for states in (query, key, value)),
                mask,
                dropout=self.attention_dropout if self.training else 0.0,
                scaling=self.scaling,
                **kwargs,
            )
            context = context.transpose(0, 1)
        return self.dense(context.reshape(*hidden.shape[:2], -1)), weights

    def _project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, each `[tokens, batch, its heads, head_dim]`."""
        mixed = self.query_key_value(hidden)
        if not self.config.multi_query_attention:  # interleaved by head
            mixed = mixed.view(*mixed.shape[:-1], self.heads, 3 * self.head_dim)
            query, key, value = torch.split(mixed, self.head_dim, dim=-1)
            return query, key, value
        sizes = [count * self.head_dim for count in (self.heads, self.groups, self.groups)]
        query, key, value = (
            part.view(*part.shape[:-1], -1, self.head_dim) for part in mixed.split(sizes, dim=-1)
        )
        return query, key, value

    def _repeat(self, states: Tensor) -> Tensor:
        """Key or value for every query head."""
        if not self.config.multi_query_attention:
            return states
        states = states.unsqueeze(-2).expand(-1, -1, -1, self.num_key_value_groups, -1)
        return states.contiguous().view(*states.shape[:2], self.heads, self.head_dim)

    def _sdpa(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        query, key, value = (states.permute(1, 2, 0, 3) for states in (query, key, value))
        causal = mask is None and query.shape[2] == key.shape[2]
        # As published: no dropout on this path, whatever the configuration says.
        context = F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal)
        return context.permute(2, 0, 1, 3)

    def _eager(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        tokens, batch, heads, _ = query.shape
        seen = key.shape[0]
        query, key, value = (
            states.reshape(states.shape[0], batch * heads, -1).transpose(0, 1)
            for states in (query, key, value)
        )
        # Layer scaling divides before the product and multiplies after it, to keep fp16 in range.
        layer = self.layer_idx + 1 if self.config.apply_query_key_layer_scaling else 1
        scores = torch.baddbmm(
            query.new_empty(batch * heads, tokens, seen),
            query,
            key.transpose(1, 2),
            beta=0.0,
            alpha=1.0 / (math.sqrt(self.head_dim) * layer),
        ).view(batch, heads, tokens, seen)
        if self.config.attention_softmax_in_fp32 or self.config.apply_query_key_layer_scaling:
            scores = scores.float()
        scores = scores * layer
        if mask is None and tokens == seen:
            mask = torch.ones(tokens, seen, dtype=torch.bool, device=scores.device).tril()
        if mask is not None:
            scores = (
                scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
            )
        weights = F.softmax(scores, dim=-1).type_as(value)
        dropped = F.dropout(weights, p=self.attention_dropout, training=self.training)
        context = torch.bmm(dropped.view(batch * heads, tokens, seen), value)
        return context.view(batch, heads, tokens, -1).permute(2, 0, 1, 3), weights


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020); gate and value are one projection, gate first."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        size, inner, bias = config.hidden_size, config.ffn_hidden_size, config.add_bias_linear
        self.dense_h_to_4h = Linear(size, inner * 2, bias=bias)
        self.dense_4h_to_h = Linear(inner, size, bias=bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """`[..., hidden]` in and out."""
        gate, value = torch.chunk(self.dense_h_to_4h(hidden), 2, dim=-1)
        result: Tensor = self.dense_4h_to_h(F.silu(gate) * value)
        return result


class GLMBlock(GradientCheckpointingLayer):
    """One layer: attention and MLP, each behind its norm, with a residual connection."""

    def __init__(self, config: ChatGLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.residual_after_norm = config.apply_residual_connection_post_layernorm
        self.hidden_dropout = config.hidden_dropout
        self.input_layernorm = _norm(config)
        self.self_attention = SelfAttention(config, layer_idx)
        self.post_attention_layernorm = _norm(config)
        self.mlp = MLP(config)

    def forward(
        self, hidden: Tensor, rope: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """`[tokens, batch, hidden]` in and out, and the attention weights if computed."""
        normed = self.input_layernorm(hidden)
        attended, weights = self.self_attention(normed, rope, mask, **kwargs)
        residual = normed if self.residual_after_norm else hidden
        hidden = residual + F.dropout(attended, p=self.hidden_dropout, training=self.training)
        normed = self.post_attention_layernorm(hidden)
        residual = normed if self.residual_after_norm else hidden
        output = F.dropout(self.mlp(normed), p=self.hidden_dropout, training=self.training)
        return residual + output, weights


class Embedding(nn.Module):
    """Token embeddings under their published name."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.padded_vocab_size, config.hidden_size)


class GLMTransformer(nn.Module):
    """The layers and the final norm under their published names."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList([GLMBlock(config, i) for i in range(config.num_layers)])
        if config.post_layer_norm:
            self.final_layernorm = _norm(config)


def attention_mask_of(
    mask: Tensor | None, position_ids: Tensor | None, embeds: Tensor, past: int
) -> Tensor | None:
    """Which key each query sees, bool; None where plain causality says it all.

    `[batch, 1, tokens, past + tokens]`. `mask` is 1 for tokens and 0 for padding, `[batch, past +
    tokens]`, or a mask of the result's shape, which is taken as it is. Padding rows see everything,
    as published: a row that sees nothing would be NaN.
    """
    if mask is not None and mask.dim() == 4:
        return mask
    batch, tokens = embeds.shape[:2]
    padded = mask is not None and not bool(mask.all())
    if not padded and not (past and tokens != 1):
        if mask is None and not past:
            return _packed_mask(position_ids, batch, tokens)
        return None
    seen = torch.ones(tokens, past + tokens, dtype=torch.bool, device=embeds.device)
    seen = seen.tril(past).expand(batch, -1, -1)
    if mask is not None:
        real = mask.to(embeds.device).bool()
        if real.shape != (batch, past + tokens):
            raise ValueError(
                f"attention_mask is {tuple(real.shape)}, not {(batch, past + tokens)}: "
                f"{batch} rows of {past} cached and {tokens} new tokens"
            )
        seen = seen & real.unsqueeze(1)
        blind = ~seen.any(-1, keepdim=True) if past else ~real.unsqueeze(-1)
        seen = seen | blind
    return seen.unsqueeze(1)


def _packed_mask(position_ids: Tensor | None, batch: int, tokens: int) -> Tensor | None:
    """Sequences laid one after the other, each counting from 0, see themselves only.

    This is the convention of transformers.
    """
    if position_ids is None or batch != 1 or tokens == 1:
        return None
    positions = position_ids[0]
    starts = positions == 0
    restarts = torch.where(starts[1:], starts[1:], positions[1:] == positions[:-1] + 1).all()
    if not bool(starts[0] & starts[1:].any() & restarts & positions.any()):
        return None
    sequence = starts.cumsum(0)
    own = sequence.unsqueeze(0) == sequence.unsqueeze(1)
    return own.tril().view(1, 1, tokens, tokens)
