"""ChatGLM3-6B-base as a native transformers model: the published weights load by their own names.

The arithmetic is that of the published `modeling_chatglm.py`, so that logits agree with it to the
last bit; the layers lie in `layers.py`. Registers configuration and model for model_type
`chatglm` with the Auto classes. Reads and writes tensors only.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation.utils import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from yelp_hpc.models.chatglm3.layers import (
    Embedding,
    GLMTransformer,
    Linear,
    RotaryEmbedding,
    attention_mask_of,
)


class ChatGLMConfig(PretrainedConfig):
    """The published configuration; the defaults are chatglm3-6b-base.

    Raises:
        ValueError: what this model does not do: a quantized checkpoint or a P-tuning prefix.
    """

    model_type = "chatglm"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {
        "num_hidden_layers": "num_layers",
        "num_key_value_heads": "multi_query_group_num",
        "head_dim": "kv_channels",
        "intermediate_size": "ffn_hidden_size",
        "max_position_embeddings": "seq_length",
        "vocab_size": "padded_vocab_size",
    }

    def __init__(
        self,
        num_layers: int = 28,
        padded_vocab_size: int = 65024,
        hidden_size: int = 4096,
        ffn_hidden_size: int = 13696,
        kv_channels: int = 128,
        num_attention_heads: int = 32,
        seq_length: int = 32768,
        hidden_dropout: float = 0.0,
        attention_dropout: float = 0.0,
        layernorm_epsilon: float = 1e-5,
        rmsnorm: bool = True,
        apply_residual_connection_post_layernorm: bool = False,
        post_layer_norm: bool = True,
        add_bias_linear: bool = False,
        add_qkv_bias: bool = True,
        multi_query_attention: bool = True,
        multi_query_group_num: int = 2,
        rope_ratio: float = 1,
        apply_query_key_layer_scaling: bool = True,
        attention_softmax_in_fp32: bool = True,
        fp32_residual_connection: bool = False,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        eos_token_id: int = 2,
        pad_token_id: int = 0,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        for key, meaning in (("quantization_bit", "quantized"), ("pre_seq_len", "P-tuning")):
            if kwargs.pop(key, None):
                raise ValueError(f"{meaning} ChatGLM3 checkpoints ({key}) are not supported")
        # The published remote code is never run, so a saved copy must not ask for it.
        # Other names of values that have their own here would overwrite them.
        for key in ("auto_map", *self.attribute_map):
            kwargs.pop(key, None)
        self.num_layers = num_layers
        self.padded_vocab_size = padded_vocab_size
        self.hidden_size = hidden_size
        self.ffn_hidden_size = ffn_hidden_size
        self.kv_channels = kv_channels
        self.num_attention_heads = num_attention_heads
        self.seq_length = seq_length
        self.hidden_dropout = hidden_dropout
        self.attention_dropout = attention_dropout
        self.layernorm_epsilon = layernorm_epsilon
        self.rmsnorm = rmsnorm
        self.apply_residual_connection_post_layernorm = apply_residual_connection_post_layernorm
        self.post_layer_norm = post_layer_norm
        self.add_bias_linear = add_bias_linear
        self.add_qkv_bias = add_qkv_bias
        self.multi_query_attention = multi_query_attention
        self.multi_query_group_num = (
            multi_query_group_num if multi_query_attention else num_attention_heads
        )
        self.rope_ratio = rope_ratio
        self.apply_query_key_layer_scaling = apply_query_key_layer_scaling
        self.attention_softmax_in_fp32 = attention_softmax_in_fp32
        self.fp32_residual_connection = fp32_residual_connection
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        self.eos_token_id = eos_token_id
        self.pad_token_id = pad_token_id
        self.tie_word_embeddings = tie_word_embeddings
        super().__init__(**kwargs)


class ChatGLMPreTrainedModel(PreTrainedModel):
    """What the two models below share: how they are built, initialised and run."""

    config_class = ChatGLMConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GLMBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, RotaryEmbedding):
            init.copy_(module.inv_freq, module.frequencies())


class ChatGLMModel(ChatGLMPreTrainedModel):
    """Embeddings, layers and the vocabulary projection, which the published model keeps here."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.embedding = Embedding(config)
        self.rotary_pos_emb = RotaryEmbedding(config)
        self.encoder = GLMTransformer(config)
        self.output_layer: nn.Linear = Linear(
            config.hidden_size, config.padded_vocab_size, bias=False
        )
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token embeddings."""
        return self.embedding.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embeddings."""
        self.embedding.word_embeddings = value  # type: ignore[assignment]

    def forward(
        self,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states `[batch, tokens, hidden]` after the final norm.

        `attention_mask` is `[batch, cached + new tokens]`. Without `position_ids` (`[batch,
        tokens]`) positions count from the first cached token, padding included. Further arguments
        reach the attention function.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embedding.word_embeddings(input_ids)
        tokens = inputs_embeds.shape[1]
        checkpointing = self.gradient_checkpointing and self.training
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        use_cache = use_cache and not checkpointing
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past = int(past_key_values.get_seq_length()) if past_key_values is not None else 0

        mask = self._mask(inputs_embeds, attention_mask, position_ids, past_key_values, past)
        rope = self._rope(position_ids, tokens, past, inputs_embeds.device)
        hidden = inputs_embeds.transpose(0, 1).contiguous()
        if self.config.fp32_residual_connection:
            hidden = hidden.float()

        keep_states = _default(output_hidden_states, self.config.output_hidden_states)
        keep_weights = _default(output_attentions, self.config.output_attentions)
        states: tuple[Tensor, ...] = ()
        attentions: tuple[Any, ...] = ()
        for layer in self.encoder.layers:
            if keep_states:
                states += (hidden.transpose(0, 1),)
            hidden, weights = layer(hidden, rope, mask, past_key_values=past_key_values, **kwargs)
            if keep_weights:
                attentions += (weights,)
        if keep_states:
            states += (hidden.transpose(0, 1),)
        if self.config.post_layer_norm:
            hidden = self.encoder.final_layernorm(hidden)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden.transpose(0, 1),
            past_key_values=past_key_values,
            hidden_states=states if keep_states else None,
            attentions=attentions if keep_weights else None,
        )

    def _rope(
        self, position_ids: Tensor | None, tokens: int, past: int, device: torch.device
    ) -> Tensor:
        """Cosines and sines of the positions, `[tokens, batch or 1, pairs, 2]`."""
        table: Tensor = self.rotary_pos_emb(self.embedding.word_embeddings.weight.dtype, device)
        if position_ids is not None:
            return table[position_ids].transpose(0, 1).contiguous()
        if past + tokens > len(table):
            raise ValueError(
                f"{past + tokens} tokens are more than this model's {len(table)} (seq_length)"
            )
        return table[past : past + tokens].unsqueeze(1)

    def _mask(
        self,
        embeds: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
        past: int,
    ) -> Tensor | None:
        if self.config._attn_implementation in ("eager", "sdpa"):
            return attention_mask_of(attention_mask, position_ids, embeds, past)
        # Any other attention function comes with a mask function of its own.
        mask: Tensor | None = create_causal_mask(  # type: ignore[assignment]
            config=self.config,
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            past_key_values=cache,
            position_ids=position_ids,
        )
        return mask


class ChatGLMForCausalLM(ChatGLMPreTrainedModel, GenerationMixin):
    """ChatGLM3 with its vocabulary projection; `transformer.encoder.layers` are the layers."""

    _tied_weights_keys = {}  # noqa: RUF012

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token embeddings."""
        return self.transformer.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embeddings."""
        self.transformer.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The vocabulary projection."""
        return self.transformer.output_layer

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replace the vocabulary projection."""
        self.transformer.output_layer = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits `[batch, kept tokens, vocabulary]`, and the mean loss over `labels`.

        `logits_to_keep`: the last so many tokens (0: all), positions `[kept]` for every row,
        positions `[batch, kept]` for each row, or a bool mask `[batch, tokens]`, which gives logits
        `[kept, vocabulary]`. `labels` (`[batch, tokens]`, shifted here, -100 left out) need the
        logits of all tokens.

        Raises:
            ValueError: there are labels beside `logits_to_keep`.
        """
        if labels is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise ValueError("labels need the logits of all tokens: leave logits_to_keep out")
        outputs = self.transformer(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self._project(outputs.last_hidden_state, logits_to_keep)
        loss = None
        if labels is not None:
            # The loss is computed in fp32 and rounded to the model's dtype, as published.
            shifted = logits.float()[:, :-1, :].reshape(-1, logits.shape[-1])
            targets = labels[:, 1:].reshape(-1).to(shifted.device)
            loss = F.cross_entropy(shifted, targets, ignore_index=-100)
            loss = loss.to(outputs.last_hidden_state.dtype)
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return result if _default(return_dict, self.config.return_dict) else result.to_tuple()

    def _project(self, hidden: Tensor, keep: int | Tensor) -> Tensor:
        """Logits of the kept positions of `hidden` `[batch, tokens, hidden]`."""
        if isinstance(keep, Tensor) and keep.dim() == 2:
            if keep.dtype == torch.bool:
                kept: Tensor = self.transformer.output_layer(hidden[keep])
                return kept
            hidden = torch.take_along_dim(hidden, keep.unsqueeze(-1), dim=1)
        rows = hidden.transpose(0, 1)  # the layout the layers left it in
        if isinstance(keep, int):
            rows = rows[-keep:] if keep else rows
        elif keep.dim() == 1:
            rows = rows[keep]
        logits: Tensor = self.transformer.output_layer(rows)
        return logits.transpose(0, 1).contiguous()

    def _prepare_position_ids_for_generation(
        self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]
    ) -> Tensor:
        """Positions count padding where the caller gives none, as published.

        The rule of transformers counts real tokens.
        """
        cache = model_kwargs.get("past_key_values")
        total = inputs_tensor.shape[1] + (cache.get_seq_length() if cache is not None else 0)
        if (mask := model_kwargs.get("attention_mask")) is not None and mask.dim() == 2:
            total = mask.shape[1]
        return torch.arange(total, device=inputs_tensor.device).expand(inputs_tensor.shape[0], -1)


def _default(value: bool | None, otherwise: Any) -> bool:
    return bool(otherwise if value is None else value)


AutoConfig.register(ChatGLMConfig.model_type, ChatGLMConfig, exist_ok=True)
AutoModelForCausalLM.register(ChatGLMConfig, ChatGLMForCausalLM, exist_ok=True)
