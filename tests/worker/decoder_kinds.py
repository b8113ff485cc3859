"""A small tokenizer of every kind of decoder, trained on the Python manual."""

import json
import pydoc_data.topics
from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
TOKENS = 400
# Beside the manual's English: accents, other scripts, runs of spaces and what cleaning up would join.
TEXT = [
    *list(pydoc_data.topics.topics.values())[:8],
    "naïve café, Straße; Σίσυφος 日本語 x   y , it 's . I 've n't ? ! ' we 're '",
]


def _trained(model: Any, trainer: Any, pre_tokenizer: Any, normalizer: Any = None) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer, tokenizer.normalizer = pre_tokenizer, normalizer
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def _bpe(pre_tokenizer: Any, decoder: Any, normalizer: Any = None, **options: Any) -> Tokenizer:
    trainer = trainers.BpeTrainer(vocab_size=TOKENS, special_tokens=SPECIAL, show_progress=False, **options)
    tokenizer = _trained(models.BPE(unk_token="<unk>"), trainer, pre_tokenizer, normalizer)
    tokenizer.decoder = decoder
    return tokenizer


def _with_byte_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with tokens for what it has no other: it must not be trained any more."""
    described = json.loads(tokenizer.to_str())
    model, vocab = described["model"], described["model"]["vocab"]
    if model["type"] == "Unigram":
        vocab.extend([byte, -20.0] for byte in BYTES)
    else:
        vocab.update({byte: len(vocab) + number for number, byte in enumerate(BYTES)})
    model["byte_fallback"] = True
    return Tokenizer.from_str(json.dumps(described))


def _byte_level() -> Tokenizer:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _bpe(pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel(), initial_alphabet=alphabet)


def _byte_level_in_sequence(*others: Any) -> Tokenizer:
    tokenizer = _byte_level()
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), *others])
    return tokenizer


def _byte_fallback(*ends: Any) -> Tokenizer:
    """As Llama 2 and Gemma have it."""
    decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *ends])
    prepended = [normalizers.Prepend("▁")] if ends else []
    spaces = normalizers.Sequence([*prepended, normalizers.Replace(" ", "▁")])
    return _with_byte_tokens(_bpe(pre_tokenizers.Split("▁", "merged_with_next"), decoder, spaces))


def _metaspace(decoder: Any = None) -> Tokenizer:
    trainer = trainers.UnigramTrainer(vocab_size=TOKENS, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    tokenizer = _trained(models.Unigram(), trainer, pre_tokenizers.Metaspace())
    tokenizer.decoder = decoder or decoders.Metaspace()
    return tokenizer


def _metaspace_with_bytes() -> Tokenizer:
    return _with_byte_tokens(_metaspace(decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])))


def _word_piece(cleanup: bool) -> Tokenizer:
    trainer = trainers.WordPieceTrainer(vocab_size=TOKENS, special_tokens=SPECIAL, show_progress=False)
    model = models.WordPiece(unk_token="<unk>")
    tokenizer = _trained(model, trainer, pre_tokenizers.BertPreTokenizer())
    tokenizer.decoder = decoders.WordPiece(cleanup=cleanup)
    return tokenizer


def _word_ends() -> Tokenizer:
    decoder = decoders.BPEDecoder(suffix="</w>")
    return _bpe(pre_tokenizers.Whitespace(), decoder, end_of_word_suffix="</w>")


def _words(decoder: Any = None) -> Tokenizer:
    trainer = trainers.WordLevelTrainer(vocab_size=TOKENS, special_tokens=SPECIAL, show_progress=False)
    tokenizer = _trained(models.WordLevel(unk_token="<unk>"), trainer, pre_tokenizers.Whitespace())
    if decoder:
        tokenizer.decoder = decoder
    return tokenizer


_KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": _byte_level,
    "byte-level, fused": lambda: _byte_level_in_sequence(decoders.Fuse()),
    "byte-level, stripped": lambda: _byte_level_in_sequence(decoders.Strip(" ", 2, 0)),
    "byte-fallback, stripped": lambda: _byte_fallback(decoders.Strip(" ", 1, 0)),
    "byte-fallback, two stripped": lambda: _byte_fallback(decoders.Strip(" ", 2, 0)),
    "byte-fallback": _byte_fallback,
    "metaspace": _metaspace,
    "metaspace and byte-fallback": _metaspace_with_bytes,
    "wordpiece": lambda: _word_piece(cleanup=False),
    "wordpiece, cleaned up": lambda: _word_piece(cleanup=True),
    "word ends": _word_ends,
    "no decoder": _words,
    "ctc": lambda: _words(decoders.CTC(pad_token=",", word_delimiter_token=".")),
}
# Kinds whose tokenizer transformers cleans up as well, where its configuration says so; of BPE it does not.
_CLEANED_UP = ("wordpiece", "metaspace", "byte-level", "no decoder")
NAMES = (*_KINDS, *(f"{name}, by transformers" for name in _CLEANED_UP))


def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a kind, with one token more than was trained that is no special one."""
    kind, _, by_transformers = name.partition(", by ")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_KINDS[kind](),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=bool(by_transformers),
    )
    tokenizer.add_tokens(["<think> 👍"])
    return tokenizer
