"""What each token adds to a text, in bytes: a character may be spread over several tokens, and no text cuts it there."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import takewhile

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from shoal_services.serving.engine.generation import Token

BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Spelling:
    """The bytes of a tokenizer's tokens: those of all tokens of a text, in a row, are the text in UTF-8.

    Tokenizers over bytes (GPT-2's kind) and those that fall back to bytes (SentencePiece's kind) say the bytes of a token
    themselves. Any other is asked for the text with and without it: a token may have a space before it, or none, only
    in the middle of a text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.special.update(tokenizer.all_special_ids)
        kinds = _find_decoders(tokenizer)
        self._has_bytes, self._falls_back = "ByteLevel" in kinds, "ByteFallback" in kinds

    def is_text(self, token: int) -> bool:
        """Whether it is neither a special token nor one that the tokenizer does not know."""
        return token not in self.special and bool(self._name(token))

    def spell(self, token: int, before: int | None = None) -> bytes:
        """What `token` adds to a text whose last token, special ones aside, is `before` (None: it begins the text)."""
        if not self.is_text(token):
            return b""
        name = self._name(token)
        if self._has_bytes:
            known = all(character in BYTE_OF for character in name)
            return bytes(BYTE_OF[character] for character in name) if known else _encode(name)
        if self._falls_back and (found := BYTE_TOKEN.fullmatch(name)):
            return bytes.fromhex(found[1])
        old = "" if before is None else self._decode([before])
        new = self._decode([token] if before is None else [before, token])
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(old, new, strict=False)))
        return _encode(new[same:])

    def label(self, token: Token, before: int | None) -> Token:
        """The token, and those that were likely in its place, with their texts and bytes."""
        top = tuple(self.label(one, before) for one in token.top)
        if token.id in self.special:
            return replace(token, text=self._name(token.id), top=top)
        spelled = self.spell(token.id, before)
        try:
            text = spelled.decode()
        except UnicodeDecodeError:  # a part of a character, in OpenAI's notation
            text = "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)
        return replace(token, text=text, spelled=spelled, top=top)

    def _name(self, token: int) -> str:
        name = self.tokenizer.convert_ids_to_tokens(token)
        return name if isinstance(name, str) else ""  # models may have more rows than the tokenizer has tokens

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "replace")


def _find_decoders(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """The kinds of a tokenizer's decoders; none for tokenizers written in Python."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if decoder is None:
        return set()
    state = json.loads(decoder.__getstate__())
    return {part["type"] for part in (state, *state.get("decoders", ()))}
