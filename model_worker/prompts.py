"""What requests ask, as tokens: texts, lists of ids and conversations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from model_worker.protocol import BadRequest, ChatCompletionRequestMessage, Prompt, clipped, shortened, whole

# Characters of a token: more than the mean of almost any text.
_CHARACTERS = 8


class Prompts:
    """Reads prompts for one model. Call from any thread: Python's lock is free while a text is tokenized.

    If a text is far too long for the model's context, only its beginning is tokenized. That is enough to know it.

    name: the served model id.
    tokenizer: a fast transformers tokenizer.
    vocab_size: token ids are below it.
    context_length: the most tokens of prompt and completion together.
    Its methods raise BadRequest.
    """

    def __init__(self, name: str, tokenizer: Any, vocab_size: int, context_length: int) -> None:
        self._name = name
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._context_length = context_length
        # transformers' own `encode` keeps each token's text and offsets (ten times the text), and holds Python's lock.
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = tokenizer.split_special_tokens

    def tokens(self, prompt: Prompt, where: str) -> list[int]:
        """The tokens of a text, or of a list of ids as it came. where: its place in the request."""
        if isinstance(prompt, str):
            return self._encode(prompt, "prompt", where)
        if len(prompt) > self._context_length:
            raise self._too_long(f"{where} has {len(prompt)} tokens", "prompt")
        kinds = set(map(type, prompt))
        if float in kinds:
            prompt = [whole(token) for token in prompt]
            kinds = set(map(type, prompt))
        if kinds <= {int} and (not prompt or 0 <= min(prompt) <= max(prompt) < self._vocab_size):
            return prompt
        at, token = next(
            (at, token)
            for at, token in enumerate(prompt)
            if type(token) is not int or not 0 <= token < self._vocab_size
        )
        raise BadRequest(f"{where}[{at}] is {clipped(token)}, not a token id in [0, {self._vocab_size})", "prompt")

    def conversation(self, messages: Sequence[ChatCompletionRequestMessage]) -> list[int]:
        """The tokens of a conversation, up to where the model's turn begins."""
        if not self._tokenizer.chat_template:
            raise BadRequest(f"{self._name!r} has no chat template: use /v1/completions", "messages")
        turns = [message.for_template() for message in messages]
        try:
            text = self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        # A template is a program from the checkpoint.
        except Exception as error:
            told = shortened(f"{type(error).__name__}: {error}")
            raise BadRequest(
                f"the chat template of {self._name!r} refuses these messages: {told}", "messages"
            ) from error
        return self._encode(text, "messages", "the conversation", special=False)

    def _encode(self, text: str, param: str, where: str, special: bool = True) -> list[int]:
        self._check_beginnings(text, param, where)
        # A batch, because `encode` does not let go of Python's lock.
        [encoding] = self._backend.encode_batch_fast([text], add_special_tokens=special)
        if len(encoding) > self._context_length:
            raise self._too_long(f"{where} has {len(encoding)} tokens", param)
        tokens: list[int] = encoding.ids
        if tokens and max(tokens) >= self._vocab_size:
            odd = max(tokens)
            told = f"{where} holds {clipped(self._backend.id_to_token(odd))}, token {odd} of the checkpoint's tokenizer"
            raise BadRequest(f"{told}, but its model has tokens in [0, {self._vocab_size}): leave it out", param)
        return tokens

    def _check_beginnings(self, text: str, param: str, where: str) -> None:
        """Refuse a text whose beginning is too long already. Each next beginning is twice as long."""
        size = _CHARACTERS * self._context_length
        while size < len(text):
            [encoding] = self._backend.encode_batch_fast([text[:size]], add_special_tokens=False)
            # The last tokens of a beginning may differ in the whole text, but not a quarter of them.
            if len(encoding) > 16 + self._context_length * 5 // 4:
                raise self._too_long(
                    f"{where} has {len(text)} characters, {len(encoding)} tokens in the first {size}", param
                )
            size *= 2

    def _too_long(self, told: str, param: str) -> BadRequest:
        return BadRequest(
            f"{told}, but the model's context is {self._context_length}: shorten it", param, "context_length_exceeded"
        )
