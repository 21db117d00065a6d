"""ChatGLM3's tokenizer: sentencepiece, nine special tokens, `[gMASK] sop` before every text.

Equals the published `tokenization_chatglm.py`: special strings inside a text are text, and pieces
are looked up by name, so a piece spelled like a special token is that token. Reads and writes
`tokenizer.model`; registers itself for model_type `chatglm` (AutoTokenizer finds it by its class
name).
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer, PreTrainedTokenizer
from transformers.tokenization_utils_base import BatchEncoding
from transformers.utils import logging
from transformers.utils.generic import PaddingStrategy

from yelp_hpc.models.chatglm3.model import ChatGLMConfig

logger = logging.get_logger(__name__)

ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
SPECIAL_TOKENS = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", *ROLES)

# Fixed by the sentencepiece model, whatever a tokenizer_config.json says.
_FIXED = (
    "bos_token",
    "eos_token",
    "unk_token",
    "pad_token",
    "sep_token",
    "cls_token",
    "mask_token",
)
_IGNORED = ("auto_map", "additional_special_tokens", "extra_special_tokens", "name", "tokenizer")


class ChatGLMTokenizer(PreTrainedTokenizer):
    """The published tokenizer; `vocab_file` is its `tokenizer.model`.

    Token ids: the sentencepiece model's, then `SPECIAL_TOKENS`. Padding is unk's id (0), on the
    left, and the end of a text is eos (2); bos and unk have no role. `all_special_ids` is empty, as
    published: decoding drops no token but unk, bos and eos. `encode_special_tokens` makes the role
    tokens in a text tokens.
    """

    vocab_files_names = {"vocab_file": "tokenizer.model"}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask", "position_ids"]  # noqa: RUF012

    def __init__(
        self,
        vocab_file: str,
        padding_side: str = "left",
        clean_up_tokenization_spaces: bool = False,
        encode_special_tokens: bool = False,
        **kwargs: Any,
    ) -> None:
        for name in (*_FIXED, *_IGNORED):
            kwargs.pop(name, None)
        # A copy saved elsewhere may list the special tokens as added ones, to be found in texts.
        known = kwargs.pop("added_tokens_decoder", None) or {}
        added = {i: token for i, token in known.items() if str(token) not in SPECIAL_TOKENS}
        self.vocab_file = vocab_file
        self.sp_model = SentencePieceProcessor(model_file=str(vocab_file))
        self.pieces = self.sp_model.get_piece_size()
        self.special_ids = {token: self.pieces + i for i, token in enumerate(SPECIAL_TOKENS)}
        self.encode_special_tokens = encode_special_tokens
        self._special_names = {i: token for token, i in self.special_ids.items()}
        self._silent = {self.sp_model.unk_id(), self.sp_model.bos_id(), self.sp_model.eos_id()}
        self._piece_ids: dict[str, int] = dict(self.special_ids)
        super().__init__(
            padding_side=padding_side,
            clean_up_tokenization_spaces=clean_up_tokenization_spaces,
            encode_special_tokens=encode_special_tokens,
            added_tokens_decoder={i: t for i, t in added.items() if i >= self.vocab_size},
            **kwargs,
        )

    # The special tokens are read-only: other libraries set missing ones and would shift the ids.
    def __setattr__(self, key: str, value: Any) -> None:
        if key.removesuffix("_id") in _FIXED:
            logger.warning(f"{key} is fixed by tokenizer.model and was not set")
            return
        super().__setattr__(key, value)

    @property
    def unk_token(self) -> str:
        """Shown for an unknown character; it has no id of its own role."""
        return "<unk>"

    @property
    def pad_token(self) -> str:
        """The padding token (unk's piece)."""
        return "<unk>"

    @property
    def eos_token(self) -> str:
        """The end-of-text token."""
        return "</s>"

    @property
    def pad_token_id(self) -> int:
        """Id of the padding token, unk's."""
        return int(self.sp_model.unk_id())

    @property
    def eos_token_id(self) -> int:
        """Id of the end-of-text token."""
        return int(self.sp_model.eos_id())

    @property
    def vocab_size(self) -> int:
        """Pieces and special tokens."""
        return int(self.pieces + len(SPECIAL_TOKENS))

    def get_vocab(self) -> dict[str, int]:
        """Token to id. unk, bos and eos share the empty name, as published."""
        vocab = {self._convert_id_to_token(i): i for i in range(self.vocab_size)}
        vocab.update(self.added_tokens_encoder)
        return vocab

    def get_command(self, token: str) -> int:
        """Id of a special token by its published name.

        Raises:
            KeyError: there is none of that name.
        """
        names = {"<bos>": self.sp_model.bos_id(), "<eos>": self.eos_token_id}
        names |= {"<unk>": self.pad_token_id, "<pad>": self.pad_token_id}
        return int(names[token] if token in names else self.special_ids[token])

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        if not self.encode_special_tokens:
            pieces: list[str] = self.sp_model.EncodeAsPieces(text)
            return pieces
        tokens: list[str] = []
        for part in re.split("(" + "|".join(map(re.escape, ROLES)) + ")", text):
            tokens += [part] if part in ROLES else self.sp_model.EncodeAsPieces(part)
        return tokens

    def _convert_token_to_id(self, token: str) -> int:
        known = self._piece_ids.get(token)
        if known is None:
            known = int(self.sp_model.PieceToId(token))
            if known != self.sp_model.unk_id():  # there is no end of unknown pieces
                self._piece_ids[token] = known
        return known

    def _convert_id_to_token(self, index: int) -> str:
        if index in self._special_names:
            return self._special_names[index]
        if index in self._silent or not 0 <= index < self.pieces:
            return ""
        return str(self.sp_model.IdToPiece(index))

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Text of the pieces."""
        return str(self.sp_model.DecodePieces(tokens))

    def save_vocabulary(
        self, save_directory: str, filename_prefix: str | None = None
    ) -> tuple[str, ...]:
        """Copy `tokenizer.model` to the folder; returns its path."""
        name = self.vocab_files_names["vocab_file"]
        target = Path(save_directory) / (f"{filename_prefix}-{name}" if filename_prefix else name)
        if Path(self.vocab_file).resolve() != target.resolve():
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)

    def get_prefix_tokens(self) -> list[int]:
        """Ids of `[gMASK] sop`."""
        return [self.special_ids["[gMASK]"], self.special_ids["sop"]]

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """`[gMASK] sop A`, or `[gMASK] sop A B </s>`."""
        ids = self.get_prefix_tokens() + token_ids_0
        return ids if token_ids_1 is None else [*ids, *token_ids_1, self.eos_token_id]

    def get_special_tokens_mask(
        self,
        token_ids_0: list[int],
        token_ids_1: list[int] | None = None,
        already_has_special_tokens: bool = False,
    ) -> list[int]:
        """1 for the tokens that `build_inputs_with_special_tokens` adds."""
        if already_has_special_tokens:
            return super().get_special_tokens_mask(token_ids_0, token_ids_1, True)
        mask = [1, 1] + [0] * len(token_ids_0)
        return mask if token_ids_1 is None else [*mask, *([0] * len(token_ids_1)), 1]

    def build_single_message(self, role: str, metadata: str, message: str) -> list[int]:
        """One message of a chat: role token, metadata line, text.

        Raises:
            KeyError: the role is unknown.
        """
        header = self.sp_model.encode(f"{metadata}\n")
        return [self.get_command(f"<|{role}|>"), *header, *self.sp_model.encode(message)]

    def build_chat_input(
        self, query: str, history: list[dict[str, Any]] | None = None, role: str = "user"
    ) -> BatchEncoding:
        """A chat and the cue of its answer, as tensors of batch size 1."""
        ids: list[int] = []
        for item in history or []:
            content = item["content"]
            if item["role"] == "system" and "tools" in item:
                tools = json.dumps(item["tools"], indent=4, ensure_ascii=False)
                content = f"{content}\n{tools}"
            ids += self.build_single_message(item["role"], item.get("metadata", ""), content)
        ids += self.build_single_message(role, "", query)
        ids.append(self.get_command("<|assistant|>"))
        return self.prepare_for_model(ids, return_tensors="pt", prepend_batch_axis=True)

    def _pad(
        self,
        encoded_inputs: Any,
        max_length: int | None = None,
        padding_strategy: PaddingStrategy = PaddingStrategy.DO_NOT_PAD,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
    ) -> Any:
        """Pad one sequence; mask and positions are always given, positions count real tokens."""
        ids = encoded_inputs["input_ids"]
        encoded_inputs.setdefault("attention_mask", [1] * len(ids))
        encoded_inputs.setdefault("position_ids", list(range(len(ids))))
        if padding_strategy == PaddingStrategy.LONGEST:
            max_length = len(ids)
        if max_length is not None and pad_to_multiple_of:
            max_length = -(-max_length // pad_to_multiple_of) * pad_to_multiple_of
        if padding_strategy == PaddingStrategy.DO_NOT_PAD or max_length is None:
            return encoded_inputs
        missing = max_length - len(ids)
        fillers = {"input_ids": self.pad_token_id, "attention_mask": 0, "position_ids": 0}
        fillers |= {"token_type_ids": 0, "special_tokens_mask": 1}
        for name, filler in fillers.items():
            if name in encoded_inputs:
                values, padding = list(encoded_inputs[name]), [filler] * missing
                right = (padding_side or self.padding_side) == "right"
                encoded_inputs[name] = values + padding if right else padding + values
        return encoded_inputs


AutoTokenizer.register(ChatGLMConfig, slow_tokenizer_class=ChatGLMTokenizer, exist_ok=True)
