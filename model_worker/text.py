"""Tokens to text as they come. The text sent is what the tokenizer decodes all tokens to, without any of a stop string.

`tokenizers` has a DecodeStream for this. It was tried with every kind of decoder (0.23). It loses an unfinished
character at the end. For byte tokens it sends characters that `decode` takes back.
"""

from __future__ import annotations

import codecs
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from embedding_service.errors import StoreError
from embedding_service.foreign import one_line

TOKENIZER = "tokenizer.json"
# Decoders write this for bytes that are not, or not yet, a character.
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")
# All characters that transformers' clean_up_tokenization_spaces replaces. No replacement goes across another character.
_CLEANED_UP = " .?!,'ntmsver"


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a checkpoint folder. Raises StoreError: it is not there, or cannot be read."""
    try:
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # a fault in a tokenizer.json comes as just that
        if not (folder / TOKENIZER).exists():
            message = f"{folder} has no {TOKENIZER}: copy the files of the model's tokenizer into it"
        else:
            message = f"cannot read the tokenizer in {folder} ({one_line(error)}): fetch {TOKENIZER} and its companions"
        raise StoreError(message) from error


class Spelling:
    """The text of one tokenizer's tokens.

    tokenizer: a transformers tokenizer, with any decoder that the `tokenizers` library has.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._backend: Any = tokenizer.backend_tokenizer
        added = tokenizer.added_tokens_decoder.items()
        self._special = frozenset(token for token, each in added if each.special)
        self._clean_up = tokenizer.clean_up_tokenization if _cleans_up(tokenizer) else None
        kinds = _decoder_kinds(self._backend.decoder)
        self._is_byte_level = "ByteLevel" in kinds and kinds <= {"Sequence", "ByteLevel", "Fuse"}
        self._may_end_within_a_character = "ByteLevel" in kinds
        self._has_byte_tokens = "ByteFallback" in kinds
        # Many decoders write a text's first token without the space that it gets after others.
        known = range(self._backend.get_vocab_size())
        firsts = ([token] for token in known if self.is_text(token) and self._byte(token) is None)
        self._first = next(filter(self.decode, firsts), [])

    def is_text(self, token: int) -> bool:
        """False for special tokens and for ids that the tokenizer does not know. Decoding leaves both out."""
        return token not in self._special and self._backend.id_to_token(token) is not None

    def utf8(self, token: int) -> bytes | None:
        """The bytes of one token, as it is after others, maybe a part of a character. None for what is no text."""
        if not self.is_text(token):
            return None
        if self._may_end_within_a_character:
            return _byte_level_bytes(self._backend.id_to_token(token))
        byte = self._byte(token)
        if byte is not None:
            return byte
        return self.decode([*self._first, token])[len(self.decode(self._first)) :].encode()

    def spell(self, token: int) -> str:
        """One token for people: its text as it is after others, or a special token's name."""
        utf8 = self.utf8(token)
        return (self._backend.id_to_token(token) or "") if utf8 is None else utf8.decode(errors="replace")

    def decode(self, tokens: list[int]) -> str:
        """The text of tokens, all of which are text, before it is cleaned up."""
        return self._backend.decode(tokens, skip_special_tokens=False)

    def is_byte(self, token: int) -> bool:
        """Whether this is a token like <0xE6>, and the decoder reads those as bytes."""
        return self._byte(token) is not None

    def may_change(self, text: str) -> bool:
        """Whether the next token may change the last character of a text."""
        return self._may_end_within_a_character and text.endswith(REPLACEMENT)

    def pieces(self) -> Pieces:
        """A new sequence's text, piece by piece."""
        pieces: Pieces = _BytePieces(self) if self._is_byte_level else _DecodedPieces(self)
        return pieces if self._clean_up is None else _CleanPieces(pieces, self._clean_up)

    def _byte(self, token: int) -> bytes | None:
        match = self._has_byte_tokens and _BYTE_TOKEN.fullmatch(self._backend.id_to_token(token))
        return bytes.fromhex(match[1]) if match else None


class Pieces(ABC):
    """The text of one growing sequence. All pieces put together are what the tokenizer decodes all tokens to."""

    @abstractmethod
    def push(self, token: int) -> str:
        """Add a token that is text. Returns what is certain now."""

    @abstractmethod
    def finish(self) -> str:
        """The rest. No token comes any more."""


class _BytePieces(Pieces):
    """For a decoder that does nothing but put bytes together."""

    def __init__(self, spelling: Spelling) -> None:
        self._spelling = spelling
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(self._spelling.utf8(token) or b"")

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class _DecodedPieces(Pieces):
    """For any other decoder. New tokens are decoded after the tokens of the last piece."""

    def __init__(self, spelling: Spelling) -> None:
        self._spelling = spelling
        self._new: list[int] = []
        # The tokens of the last pieces, as few as have text of their own. What a decoder drops at a text's start is
        # then dropped from these.
        self._before: list[list[int]] = []
        self._text_before = ""

    def push(self, token: int) -> str:
        self._new.append(token)
        # One wrong byte token spoils its whole run. So a run is decoded as a whole, once it has ended.
        return "" if self._spelling.is_byte(token) else self._decode()

    def finish(self) -> str:
        return self._decode(final=True) if self._new else ""

    def _decode(self, final: bool = False) -> str:
        together = [*self._before, self._new]
        text = self._text_of(together)
        if self._spelling.may_change(text) and not final:
            return ""
        piece = text[len(self._text_before) :]
        self._before, self._text_before, self._new = together, text, []
        while (fewer := self._before[1:]) and (text := self._text_of(fewer)):
            self._before, self._text_before = fewer, text
        return piece

    def _text_of(self, pieces: list[list[int]]) -> str:
        return self._spelling.decode([token for piece in pieces for token in piece])


class _CleanPieces(Pieces):
    """Cleaned up as transformers does it: spaces before punctuation go."""

    def __init__(self, pieces: Pieces, clean_up: Callable[[str], str]) -> None:
        self._pieces = pieces
        self._clean_up = clean_up
        self._held = ""

    def push(self, token: int) -> str:
        text = self._held + self._pieces.push(token)
        certain = text.rstrip(_CLEANED_UP)
        self._held = text[len(certain) :]
        return self._clean_up(certain)

    def finish(self) -> str:
        return self._clean_up(self._held + self._pieces.finish())


class TextStream:
    """The text of one growing sequence.

    The pieces that `push` and `finish` return, put together, are the decoded text up to the first stop string.
    """

    def __init__(self, spelling: Spelling, stop: tuple[str, ...] = ()) -> None:
        self._spelling = spelling
        self._pieces = spelling.pieces()
        self._stop = stop
        self.stopped = False
        """A stop string came; there is no more text."""
        self._held = ""

    def push(self, token: int) -> str:
        """Add a token. Returns the text that is certain now, which may be none."""
        return self._release(self._pieces.push(token), final=False) if self._spelling.is_text(token) else ""

    def finish(self) -> str:
        """The text still held back. The sequence is over."""
        return self._release(self._pieces.finish(), final=True)

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


def _decoder_kinds(decoder: Any) -> set[str]:
    """The types of a `tokenizers` decoder and of all its parts."""
    if decoder is None:
        return set()
    # A decoder's pickle is the only place that tells its parts.
    described = [json.loads(decoder.__getstate__())]
    for each in described:
        described.extend(each.get("decoders", ()))
    return {each["type"] for each in described}


def _cleans_up(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether `tokenizer.decode` cleans up. After a BPE it does so only if a second setting says so too."""
    if type(tokenizer.backend_tokenizer.model).__name__ == "BPE":
        setting = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
        return tokenizer.clean_up_tokenization_spaces and getattr(tokenizer, setting, False)
    return tokenizer.clean_up_tokenization_spaces


def _bytes_of_characters() -> dict[str, int]:
    """The byte that each character of a byte-level token stands for: its own, or the next one that is left over."""
    alphabet = sorted(ByteLevel.alphabet())
    own = [ord(character) for character in alphabet if ord(character) < 256]
    return dict(zip(alphabet, [*own, *sorted(set(range(256)) - set(own))], strict=True))


_BYTES_OF_CHARACTERS = _bytes_of_characters()


def _byte_level_bytes(spelled: str) -> bytes:
    """The bytes of a token as the vocabulary spells it. An added token, with other characters, is taken as it is."""
    try:
        return bytes([_BYTES_OF_CHARACTERS[character] for character in spelled])
    except KeyError:
        return spelled.encode()
