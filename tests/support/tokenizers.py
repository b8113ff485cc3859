"""Small tokenizers with the traits of real ones: byte-level BPE, cases, accents, runs of whitespace, parts of UTF-8."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TEXT = (
    "The cafe, the Café and THE CAFÉ. ﬁne fine, Ⅳ or iv; naïve\t\tnaive\r\n\n"
    "Σίσυφος ΣΊΣΥΦΟΣ  日本語 ½ x  y   z Straße STRASSE"
)


def byte_level_bpe(tokens: int = 420) -> Tokenizer:
    """A tokenizer with at most `tokens` tokens, as its text gives them. Pad is token 2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=tokens,
        special_tokens=["<bos>", "<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    return tokenizer
