"""Tokens to text as they come: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from typing import Protocol

# What decoders put for bytes that are not, or not yet, a character.
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer; `end_tokens` asks for more where there is a chat template."""

    eos_token_id: int | None
    chat_template: str | dict[str, str] | None

    def decode(
        self, token_ids: list[int], *, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool = False
    ) -> str:
        """The text of tokens."""


class TextStream:
    """The text of one growing sequence.

    The pieces that `push` and `finish` return, put together, are the decoded text up to the first stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self.stopped = False
        """A stop string came; there is no more text."""
        # Only a window is decoded anew for each token: the tokens of the last piece, as some tokenizers write a token
        # differently at a text's start, and those after it.
        self._tokens: list[int] = []
        self._window_start = 0
        self._window_read = 0
        self._window_sent = 0
        self._held = ""

    def push(self, token: int) -> str:
        """Add a token; return the text that is certain now, which may be none."""
        self._tokens.append(token)
        text = self._decode(self._window_start)
        # Later bytes can complete at most the last character.
        certain = text.removesuffix(REPLACEMENT)
        piece = certain[self._window_sent :]
        self._window_sent = max(self._window_sent, len(certain))
        if text and certain == text:
            self._window_start, self._window_read = self._window_read, len(self._tokens)
            self._window_sent = len(self._decode(self._window_start))
        return self._release(piece, final=False)

    def finish(self) -> str:
        """The text still held back: the sequence is over."""
        return self._release(self._decode(self._window_start)[self._window_sent :], final=True)

    def _decode(self, start: int) -> str:
        return self._tokenizer.decode(
            self._tokens[start:], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def _release(self, piece: str, final: bool) -> str:
        """Hold back what may be the beginning of a stop string."""
        if self.stopped:
            return ""
        text = self._held + piece
        found = [at for at in map(text.find, self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        kept = 0 if final else max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a beginning, not the whole, of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
