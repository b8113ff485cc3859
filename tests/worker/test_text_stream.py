"""Streamed pieces, put together, are what the tokenizer decodes, for every kind of decoder, up to a stop string."""

from __future__ import annotations

from functools import cache

import pytest
from decoder_kinds import BYTES, NAMES, tokenizer_of
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from model_worker.text import REPLACEMENT, Spelling, TextStream

SAMPLES = ["naïve café", "日本語のテキスト", "a 👩‍👩‍👧 family", "Ω≈ç√∫", "tab\tand\nline", "plain", "", "a😀b 日本"]
# Every character of a text is a token, or bytes that are; the others have tokens for few words or characters.
FOR_ANY_TEXT = tuple(name for name in NAMES if "byte-" in name)
FROM_BYTE_TOKENS = tuple(name for name in NAMES if "byte-fallback" in name)
# What was seen to go wrong: parts of characters, runs of spaces, special tokens and what cleaning up joins.
SNIPPETS = [
    "a",
    "😀",
    " b",
    "日本",
    " ,",
    " 's",
    " ' ",
    "  ",
    "é",
    "\n",
    "</s>",
    "n't",
    "<think> 👍",
    ".",
    "\ufffd",
    "import",
]


@cache
def known(name: str) -> tuple[PreTrainedTokenizerFast, Spelling]:
    tokenizer = tokenizer_of(name)
    return tokenizer, Spelling(tokenizer)


def some_tokens(name: str) -> st.SearchStrategy[list[int]]:
    """Tokens at random, some of them unknown, or those of a text."""
    tokenizer, _ = known(name)
    few = st.lists(st.integers(0, len(tokenizer) + 1), min_size=1, max_size=5).flatmap(
        lambda tokens: st.lists(st.sampled_from(tokens), max_size=30)
    )
    return st.one_of(
        st.lists(st.integers(0, len(tokenizer) + 1), max_size=30),
        few,
        st.lists(st.sampled_from(SNIPPETS), max_size=20).map("".join).map(tokenizer.encode),
    )


def pieces_of(stream: TextStream, tokens: list[int]) -> list[str]:
    pieces = []
    for token in tokens:
        pieces.append(stream.push(token))
        if stream.stopped:
            return pieces
    return [*pieces, stream.finish()]


@pytest.mark.parametrize("name", NAMES)
def test_the_kinds_differ(name: str) -> None:
    """What makes this a test: decoding a piece at a time is not decoding the whole."""
    tokenizer, _ = known(name)
    tokens = tokenizer.encode("a😀b 日本 , import 's", add_special_tokens=False)
    assert len(tokens) > 3
    assert "".join(tokenizer.decode([token]) for token in tokens) != tokenizer.decode(tokens)  # type: ignore[misc]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=30)  # of each kind
@given(data=st.data())
def test_all_pieces_are_what_is_decoded_and_come_at_once(name: str, data: st.DataObject) -> None:
    tokenizer, spelling = known(name)
    tokens = data.draw(some_tokens(name))
    stream, sent = TextStream(spelling), ""
    for end, token in enumerate(tokens, 1):
        sent += stream.push(token)
        so_far = tokenizer.decode(tokens[:end], skip_special_tokens=True)
        if "by transformers" in name:
            continue
        if name in FROM_BYTE_TOKENS:
            # Of a run of bytes nothing is certain before its end.
            assert sent == so_far or not spelling.is_text(token) or tokenizer.convert_ids_to_tokens(token) in BYTES
        elif not so_far.endswith(REPLACEMENT):  # type: ignore[union-attr]
            assert sent == so_far
        assert so_far.startswith(sent)  # type: ignore[union-attr]
    assert sent + stream.finish() == tokenizer.decode(tokens, skip_special_tokens=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=30)
@given(data=st.data())
def test_a_stop_string_ends_it_wherever_tokens_begin(name: str, data: st.DataObject) -> None:
    tokenizer, spelling = known(name)
    tokens = data.draw(some_tokens(name))
    whole = tokenizer.decode(tokens, skip_special_tokens=True)
    stops = data.draw(st.lists(st.sampled_from(SNIPPETS), min_size=1, max_size=3))
    if whole:
        at = data.draw(st.integers(0, len(whole) - 1))
        stops.append(whole[at : at + data.draw(st.integers(1, 4))])  # type: ignore[arg-type]
    stream = TextStream(spelling, tuple(stops))
    sent = "".join(pieces_of(stream, tokens))
    assert stream.stopped == any(stop in whole for stop in stops)
    assert not any(stop in sent for stop in stops)
    assert any(whole.startswith(sent + stop) for stop in stops) if stream.stopped else sent == whole  # type: ignore[union-attr]


@pytest.mark.parametrize("name", FOR_ANY_TEXT)
@pytest.mark.parametrize("text", SAMPLES)
def test_texts(name: str, text: str) -> None:
    tokenizer, spelling = known(name)
    tokens = tokenizer.encode(text, add_special_tokens=False)
    pieces = pieces_of(TextStream(spelling), tokens)
    assert "".join(pieces) == text
    assert not any(REPLACEMENT in piece for piece in pieces)
    utf8 = b"".join(spelling.utf8(token) or b"" for token in tokens)
    assert utf8.removeprefix(b" ") == text.encode()


@pytest.mark.parametrize("name", FOR_ANY_TEXT)
def test_a_stop_string_of_many_tokens(name: str) -> None:
    tokenizer, spelling = known(name)
    stream = TextStream(spelling, ("😀",))
    assert "".join(pieces_of(stream, tokenizer.encode("a😀b", add_special_tokens=False))) == "a"
    assert stream.stopped


def test_a_real_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    spelling = Spelling(tokenizer)
    tokens = [1, *tokenizer.encode("one"), 2, *tokenizer.encode(" two 日本")]
    pieces = pieces_of(TextStream(spelling), tokens)
    assert "".join(pieces) == "one two 日本"
    assert len([piece for piece in pieces if piece]) > 4


def test_a_beginning_of_a_stop_string_is_held_back_until_it_is_not_one() -> None:
    tokenizer, spelling = known("byte-level")
    stream = TextStream(spelling, ("\n\nEnd",))

    def push(text: str) -> list[str]:
        return [stream.push(tokenizer.convert_tokens_to_ids(character)) for character in text]  # type: ignore[arg-type]

    # A byte-level token writes a line's end so.
    assert push("aĊĊEx") == ["a", "", "", "", "\n\nEx"]
    assert push("ĊĊEn") == ["", "", "", ""]
    assert stream.finish() == "\n\nEn"


def test_the_bytes_of_tokens() -> None:
    """What log probabilities tell: put together they are the text, and a part of a character is told as it is."""
    _, spelling = known("byte-level")
    tokenizer, fallback = known("byte-fallback, stripped")
    byte = tokenizer.convert_tokens_to_ids("<0xE6>")
    assert (fallback.utf8(byte), fallback.spell(byte)) == (b"\xe6", REPLACEMENT)  # type: ignore[arg-type]
    word = tokenizer.convert_tokens_to_ids("▁the")
    assert (fallback.utf8(word), fallback.spell(word)) == (b" the", " the")  # type: ignore[arg-type]
    for each in (spelling, fallback):
        assert (each.utf8(2), each.spell(2)) == (None, "</s>")
        assert (each.utf8(10**6), each.spell(10**6)) == (None, "")
