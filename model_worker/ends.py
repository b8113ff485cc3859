"""Which tokens end a sequence."""

from __future__ import annotations

import logging
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

from embedding_service.errors import StoreError

_log = logging.getLogger(__name__)
# The answer in a conversation that is rendered only to see what follows it.
_ANSWER = "answer"


def end_tokens(config: PreTrainedConfig, generation: GenerationConfig, tokenizer: Any) -> frozenset[int]:
    """Every token that transformers stops at, the tokenizer's EOS and EOT, and the end of a turn in its chat template.

    config, generation: a model's. Either may name one token or several.
    tokenizer: the model's, a transformers tokenizer.
    Raises StoreError: a config names something that is no token of the model's vocabulary.
    """
    text = config.get_text_config()
    named = _named(text.vocab_size, config, "config.json") | _named(text.vocab_size, text, "config.json")
    named |= _named(text.vocab_size, generation, "generation_config.json")
    declared = {tokenizer.eos_token_id, _declared_end_of_turn(tokenizer), _end_of_turn(tokenizer)}
    # A tokenizer may know more tokens than its model. The model never gives them.
    return frozenset(named | {token for token in declared if token is not None and token < text.vocab_size})


def _named(vocab_size: int, config: PreTrainedConfig | GenerationConfig, file: str) -> set[int]:
    """The tokens under a config's `eos_token_id`."""
    ids = getattr(config, "eos_token_id", None)
    tokens = ids if isinstance(ids, list | tuple) else [] if ids is None else [ids]
    for token in tokens:
        if type(token) is not int or not 0 <= token < vocab_size:
            raise StoreError(
                f"eos_token_id of {file} holds {token!r}, which is no token in [0, {vocab_size}): correct it there"
            )
    return set(tokens)


def _declared_end_of_turn(tokenizer: Any) -> int | None:
    """The `eot_token` that a tokenizer declares beside its EOS."""
    token = getattr(tokenizer, "eot_token", None)
    return None if token is None else tokenizer.backend_tokenizer.token_to_id(str(token))


def _end_of_turn(tokenizer: Any) -> int | None:
    """The token that the chat template writes after an answer, such as <|im_end|>. None if it writes none."""
    if not tokenizer.chat_template:
        return None
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _ANSWER}]
    try:
        rendered = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception as error:
        # Templates are programs. One that fails here may well take other conversations.
        _log.info("the chat template does not tell how a turn ends: %s", error)
        return None
    _, answered, after = rendered.rpartition(_ANSWER)
    if not answered:
        return None
    added = {each.content: token for token, each in tokenizer.added_tokens_decoder.items()}
    following = [content for content in added if content and after.lstrip().startswith(content)]
    return added[max(following, key=len)] if following else None
