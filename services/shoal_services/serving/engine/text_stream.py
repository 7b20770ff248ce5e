"""Tokens in, text out, as early as the text is certain: whole characters, and nothing of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from itertools import islice

from shoal_services.serving.engine.spelling import Spelling

# A character has four bytes at most, so that no more tokens of a prompt can belong to one that it leaves unfinished.
CHARACTER_BYTES = 4


class TextStream:
    """The text of one generation, in pieces. `stopped` is true once a stop string was met: it ends the text before.

    Bytes that are no character become "�", as everywhere in Unicode.
    """

    def __init__(self, spelling: Spelling, stop: tuple[str, ...] = ()):
        self.spelling, self.stop = spelling, stop
        self.stopped = False
        self.before: int | None = None
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def follow(self, prompt_ids: tuple[int, ...]) -> None:
        """From now on the text is what comes after a prompt."""
        ordinary = (token for token in reversed(prompt_ids) if self.spelling.is_text(token))
        self.read(reversed(list(islice(ordinary, CHARACTER_BYTES))))

    def read(self, tokens: Iterable[int]) -> str:
        """The whole characters that these tokens make up, stop strings or not."""
        return "".join(self._decode(token) for token in tokens)

    def push(self, token: int) -> str:
        """What is certain now: text before which no stop string can begin any more."""
        self._held += self._decode(token)
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
        text, self._held = self._held + self._characters.decode(b"", final=True), ""
        return text

    def _decode(self, token: int) -> str:
        spelled = self.spelling.spell(token, self.before)
        if self.spelling.is_text(token):
            self.before = token
        return self._characters.decode(spelled)

    def _longest_beginning(self) -> int:
        """Characters at the end of the held text that may begin a stop string."""
        longest = max((len(word) for word in self.stop), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(word.startswith(self._held[-size:]) for word in self.stop):
                return size
        return 0
