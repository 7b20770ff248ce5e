"""Tokens in, text out, as early as the text is certain: whole characters, and nothing of a stop string."""

from __future__ import annotations

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase


class TextStream:
    """The text of one generation, in pieces. `stopped` is true once a stop string was met: it ends the text before."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...] = ()):
        self.tokenizer, self.stop = tokenizer, stop
        self.stopped = False
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._held = ""

    def push(self, token: int) -> str:
        """What is certain now: text before which no stop string can begin any more."""
        self._held += self._decoder.step(self.tokenizer.backend_tokenizer, token) or ""
        found = min((at for word in self.stop if (at := self._held.find(word)) >= 0), default=-1)
        if found >= 0:
            self.stopped = True
            text, self._held = self._held[:found], ""
            return text
        safe = len(self._held) - self._longest_beginning()
        text, self._held = self._held[:safe], self._held[safe:]
        return text

    def flush(self) -> str:
        """What was held back, now that no more tokens come."""
        text, self._held = self._held, ""
        return text

    def _longest_beginning(self) -> int:
        """Characters at the end of the held text that may begin a stop string."""
        longest = max((len(word) for word in self.stop), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(word.startswith(self._held[-size:]) for word in self.stop):
                return size
        return 0
