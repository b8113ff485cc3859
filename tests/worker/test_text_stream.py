"""Streamed pieces are whole characters, put together the decoded text, and end before a stop string."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from model_worker.text import REPLACEMENT, TextStream

SAMPLES = ["naïve café", "日本語のテキスト", "a 👩‍👩‍👧 family", "Ω≈ç√∫", "tab\tand\nline", "plain", ""]


class Bytes:
    """A tokenizer whose tokens are bytes: every character beyond ASCII is split."""

    def decode(self, token_ids: list[int], **_: bool) -> str:
        return bytes(token_ids).decode(errors="replace")


def pieces_of(stream: TextStream, tokens: list[int]) -> list[str]:
    pieces = []
    for token in tokens:
        pieces.append(stream.push(token))
        if stream.stopped:
            return pieces
    return [*pieces, stream.finish()]


@pytest.mark.parametrize("text", SAMPLES)
def test_a_real_tokenizer(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    tokens = tokenizer.encode(text)
    pieces = pieces_of(TextStream(tokenizer), tokens)
    assert "".join(pieces) == text
    assert not any(REPLACEMENT in piece for piece in pieces)


def test_special_tokens_are_not_text(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = [1, *tokenizer.encode("one"), 2, *tokenizer.encode(" two")]
    assert "".join(pieces_of(TextStream(tokenizer), tokens)) == "one two"


@given(st.text())
def test_characters_come_whole_and_at_once(text: str) -> None:
    stream, sent = TextStream(Bytes()), ""
    for end, token in enumerate(text.encode(errors="replace"), 1):
        sent += stream.push(token)
        so_far = text.encode(errors="replace")[:end]
        assert sent.removesuffix(REPLACEMENT) == so_far.decode(errors="ignore").removesuffix(REPLACEMENT)
    assert sent + stream.finish() == text.encode(errors="replace").decode()


@given(st.lists(st.integers(0, 255), max_size=40))
def test_bytes_that_are_no_text_come_as_a_decoder_gives_them(tokens: list[int]) -> None:
    assert "".join(pieces_of(TextStream(Bytes()), tokens)) == bytes(tokens).decode(errors="replace")


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3))
def test_stop_strings(text: str, stops: list[str]) -> None:
    stream = TextStream(Bytes(), tuple(stops))
    sent = "".join(pieces_of(stream, list(text.encode())))
    assert stream.stopped == any(stop in text for stop in stops)
    assert not any(stop in sent for stop in stops)
    if not stream.stopped:
        assert sent == text
        return
    # It ended at the first moment a stop string was complete, before the earliest of those then in the text.
    seen = next(text[:end] for end in range(len(text) + 1) if any(stop in text[:end] for stop in stops))
    assert sent == seen[: min(seen.find(stop) for stop in stops if stop in seen)]


def test_a_beginning_of_a_stop_string_is_held_back_until_it_is_not_one() -> None:
    stream = TextStream(Bytes(), ("\n\nEnd",))
    assert [stream.push(byte) for byte in b"a\n\nEx"] == ["a", "", "", "", "\n\nEx"]
    assert [stream.push(byte) for byte in b"\n\nEn"] == ["", "", "", ""]
    assert stream.finish() == "\n\nEn"


def test_a_stop_string_across_tokens_and_characters() -> None:
    stream = TextStream(Bytes(), ("é!",))
    assert "".join(pieces_of(stream, list("caféé!x".encode()))) == "café"
    assert stream.stopped
