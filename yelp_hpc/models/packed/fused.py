"""The decoder of Llama and its like in few, wide steps.

Merged projections, fused norms, rotation and SwiGLU. Recognised by its structure (RMS norms before
attention and MLP, q/k/v/o and gate/up/down projections, rotation of half heads) and equal to
transformers' own forward up to rounding. The last layer runs from its attention on for the wanted
positions alone. Each step is an autograd function that keeps only what its backward needs. Reads
and writes tensors only.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from yelp_hpc.models.packed.attention import Layout
from yelp_hpc.models.packed.linear import Projection, available
from yelp_hpc.models.packed.rows import RowPlan, rows_backward, rows_forward

_ARCHITECTURES = ("LlamaModel", "Qwen2Model")

# Tokens whose MLP is computed at once where nothing is kept of it. Its inner states are the largest
# tensors of a pass; the system gives memory that large anew, and cleared, for every layer.
_INNER_AT_ONCE = 2048


class FusedDecoder:
    """Runs a prepared decoder; holds the merged projections of every layer."""

    def __init__(self, decoder: Any) -> None:
        self.decoder = decoder
        config = decoder.config
        self.heads, self.key_heads = config.num_attention_heads, config.num_key_value_heads
        order = self._order(decoder.layers[0].self_attn.head_dim)
        self.layers = [
            (
                Projection(
                    *(getattr(layer.self_attn, f"{name}_proj") for name in "qkv"), order=order
                ),
                Projection(layer.self_attn.o_proj),
                Projection(layer.mlp.gate_proj, layer.mlp.up_proj),
                Projection(layer.mlp.down_proj),
            )
            for layer in decoder.layers
        ]

    def _order(self, head_dim: int) -> Tensor:
        """Columns of q/k/v with the two halves of each head of q and k interleaved.

        The pairs that are rotated together then are complex numbers.
        """
        columns = torch.arange((self.heads + 2 * self.key_heads) * head_dim).view(-1, head_dim)
        turned = columns[: -self.key_heads].view(-1, 2, head_dim // 2).transpose(1, 2)
        return torch.cat([turned.flatten(), columns[-self.key_heads :].flatten()])

    @staticmethod
    def supports(base: Any) -> bool:
        """Whether this class computes the model, on a device and in a dtype that it is fast on."""
        weight = base.get_input_embeddings().weight
        return available(weight.device, weight.dtype) and is_llama(base)

    def __call__(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        layout: Layout,
        select: Tensor,
        states: list[tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """Hidden states `[S, hidden]` at `select`, after the final norm.

        `states` gets the keys and values `[T, groups, head_dim]` of each layer appended.
        """
        decoder = self.decoder
        hidden = decoder.embed_tokens(input_ids)
        cos, sin = decoder.rotary_emb(hidden, position_ids.unsqueeze(0))
        half = cos.shape[-1] // 2
        angle = torch.complex(cos[0, :, :half], sin[0, :, :half]).unsqueeze(1)
        plan = RowPlan(layout, self.heads, self.key_heads)
        last = len(self.layers) - 1
        for i, (layer, (qkv, o, gate_up, down)) in enumerate(
            zip(decoder.layers, self.layers, strict=True)
        ):
            attention = layer.self_attn
            mixed = qkv(norm(hidden, layer.input_layernorm))
            if states is not None:
                states.append(_keys_values(mixed, angle, plan))
            context = _RotatedAttention.apply(mixed, angle, plan, attention.scaling)
            if i == last:
                context, hidden = context.index_select(0, select), hidden.index_select(0, select)
            hidden = hidden + o(context)
            mlp = partial(_mlp, layer.post_attention_layernorm, gate_up, down)
            if torch.is_grad_enabled() or decoder.training:
                hidden = hidden + mlp(hidden)
                continue
            for some in hidden.chunk(-(-len(hidden) // _INNER_AT_ONCE)):  # of about equal length
                some += mlp(some)
        return norm(hidden, decoder.norm)


def _mlp(before: Any, gate_up: Projection, down: Projection, hidden: Tensor) -> Tensor:
    """What a layer's MLP adds to `[T, hidden]`, which the norm `before` takes first."""
    return down(swiglu(gate_up(norm(hidden, before))))


def is_llama(base: Any) -> bool:
    """Whether a model is Llama or one of its like, with frozen weights, LoRA aside."""
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else None
    if type(decoder).__name__ not in _ARCHITECTURES or not hasattr(base, "lm_head"):
        return False
    config = base.config
    plain = config.hidden_act == "silu" and not config.attention_dropout
    windows = getattr(config, "layer_types", None) or ["full_attention"]
    if not plain or set(windows) != {"full_attention"}:
        return False
    head = base.lm_head
    if type(head) is not nn.Linear or head.bias is not None:
        return False
    return is_frozen(base) and all(map(_plain, decoder.layers))


def is_frozen(base: nn.Module) -> bool:
    """Whether nothing of a model is trained but LoRA."""
    return not any(p.requires_grad and "lora_" not in name for name, p in base.named_parameters())


def _plain(layer: Any) -> bool:
    """Whether the layer is of the kind that is computed here."""
    attention, mlp = layer.self_attn, layer.mlp
    linears = [getattr(attention, f"{name}_proj") for name in "qkvo"]
    linears += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    return all(map(Projection.supports, linears)) and not hasattr(attention, "q_norm")


def norm(x: Tensor, module: Any) -> Tensor:
    """Root mean square norm of `[T, hidden]` (Zhang & Sennrich 2019), in fp32, rounded once."""
    eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    if x.is_cuda:  # one kernel
        return F.rms_norm(x, (x.shape[-1],), module.weight, eps)
    result: Tensor = _RMSNorm.apply(x, module.weight, eps)
    return result


class _RMSNorm(torch.autograd.Function):
    """`x / rms(x) * weight`; keeps x and one number a token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        result: Tensor = (wide * scale).mul_(weight)
        return result.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        x, weight, scale = ctx.saved_tensors
        wide = x.to(scale.dtype)
        dx = dy.to(scale.dtype) * weight
        along = (dx * wide).sum(-1, keepdim=True).mul_(scale.pow(3)).div_(-x.shape[-1])
        return dx.mul_(scale).addcmul_(wide, along).to(x.dtype), None, None


def swiglu(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` of `[T, 2 * inner]`, gate first (Shazeer 2020)."""
    result: Tensor = _SwiGLU.apply(gate_up)
    return result


class _SwiGLU(torch.autograd.Function):
    """Keeps its input alone."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        result = torch.empty_like(gate_up)
        dgate, dup = result.chunk(2, -1)
        torch.mul(F.silu(gate), dy, out=dup)
        torch.ops.aten.silu_backward.grad_input(dy * up, gate, grad_input=dgate)
        return result


def _rotate(x: Tensor, angle: Tensor, out: Tensor) -> None:
    """Rotate pairs of `[T, heads, head_dim]` by `[T, 1, head_dim / 2]` complex numbers.

    Source: Su et al. 2021.
    """
    pairs, turned = (torch.view_as_complex(t.unflatten(-1, (-1, 2))) for t in (x, out))
    torch.mul(pairs, angle, out=turned)


def _keys_values(mixed: Tensor, angle: Tensor, plan: RowPlan) -> tuple[Tensor, Tensor]:
    """Rotated keys, in the model's own order, and values, `[T, groups, head_dim]`."""
    groups = plan.key_heads
    states = mixed.view(mixed.shape[0], plan.heads + 2 * groups, -1)
    keys = torch.empty_like(states[:, -groups:])
    _rotate(states[:, -2 * groups : -groups], angle, out=keys)
    halves = keys.unflatten(-1, (-1, 2)).transpose(-1, -2)
    return halves.flatten(-2), states[:, -groups:].clone()


class _RotatedAttention(torch.autograd.Function):
    """Rotation and packed attention of merged q/k/v `[T, (heads + 2 * groups) * head_dim]`."""

    @staticmethod
    def forward(ctx: Any, mixed: Tensor, angle: Tensor, plan: RowPlan, scale: float) -> Tensor:
        groups = plan.key_heads
        states = mixed.view(mixed.shape[0], plan.heads + 2 * groups, -1)
        turned = torch.empty_like(states)
        _rotate(states[:, :-groups], angle, out=turned[:, :-groups])
        turned[:, -groups:] = states[:, -groups:]
        out, saved = rows_forward(turned, plan, scale, keep=ctx.needs_input_grad[0])
        ctx.args = (plan, scale)
        ctx.save_for_backward(angle, *saved)
        return out.view(mixed.shape[0], -1)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        plan, scale = ctx.args
        angle, *saved = ctx.saved_tensors
        groups = plan.key_heads
        dturned = rows_backward(dout.view(len(dout), plan.heads, -1), plan, scale, saved)
        dstates = torch.empty_like(dturned)
        # A rotation's transpose is the rotation by the opposite angle.
        _rotate(dturned[:, :-groups], angle.conj(), out=dstates[:, :-groups])
        dstates[:, -groups:] = dturned[:, -groups:]
        return dstates.view(len(dout), -1), None, None, None
