"""Family longcat: LongCat-Flash-Lite (`LongcatFlashNgramForCausalLM`), LongCat-2.0, LongCat-Next and their kin.

Source: "Scaling Embeddings Outperforms Scaling Experts in Language Models" (arXiv 2601.21204) and the model code
published with LongCat-Flash-Lite and LongCat-Next.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from embedding_service.errors import InvalidRequest
from embedding_service.foreign import shown
from embedding_service.ngram.base import NO_TOKEN, NgramHasher, TableShape
from embedding_service.ngram.bounds import (
    MOST_ENDS,
    MOST_HEADS,
    MOST_IGNORED,
    MOST_ORDER,
    MOST_TOKENS,
    MOST_WORD,
    check_heads,
    whole,
    wholes,
)

# Configs of the same family spell the three keys in two ways.
_KEYS = {
    "ngram_vocab_size_ratio": "oe_vocab_size_ratio",
    "emb_neighbor_num": "oe_neighbor_num",
    "emb_split_num": "oe_split_num",
}
# Switches of kindred models that change the ids in ways this file does not compute. LongCat-Next says `text_vocab_size`
# beside the first one, and then it means what the class below says.
_IGNORED, _TEXT_VOCAB = "oe_ignored_token_ids", "text_vocab_size"
_UNSUPPORTED = (_IGNORED, "ngram_exclude_sp_token")
# The default of the published config class, for a config.json that leaves the key out.
_DEFAULT_EOS = 2


class LongcatHasher(NgramHasher):
    """K hash functions for each n-gram length n in 2..N, all into one table.

        rows of head i = int(r * V) + 2i + 1,    i = (n - 2) * K + j,    j in 0..K-1
        id at t = (sum over d < n of x[t-d] * V^d) mod rows, plus the rows of the heads before

    where x[t-d], the token d before t, counts as 0 once look-back has met an EOS, a NO_TOKEN or the sequence's start.
    An EOS at t itself ends nothing yet. It is hashed with what came before it.

    The published code knows one EOS id. A config may list several, and then each ends a segment. None cuts nothing.

    LongCat-Next hears and sees too, and V is its text vocabulary alone. `ignored_token_ids` count as token 0. There
    token 0 ends a segment as an EOS does, and looks back at nothing itself: its ids are the first rows of the heads.
    The model takes zeros for those rows.

    Args:
        vocab_size: Token ids are below it. It is V where `text_vocab_size` is None.
        ngram_vocab_size_ratio: r.
        emb_neighbor_num: N.
        emb_split_num: K.
        eos_token_ids: End a segment.
        text_vocab_size: V of LongCat-Next. None for all others.
        ignored_token_ids: LongCat-Next's.
    """

    family = "longcat"
    model_types = ("longcat_flash_ngram", "longcat_flash", "longcat_next")
    architectures = (
        "LongcatFlashNgramForCausalLM",
        "LongcatFlashForCausalLM",
        "LongcatCausalLM",
        "LongcatNextForCausalLM",
    )

    def __init__(
        self,
        *,
        vocab_size: int,
        ngram_vocab_size_ratio: float,
        emb_neighbor_num: int,
        emb_split_num: int,
        eos_token_ids: list[int],
        text_vocab_size: int | None = None,
        ignored_token_ids: Sequence[int] = (),
    ) -> None:
        vocab_size = whole("vocab_size", vocab_size, MOST_TOKENS)
        hashed = vocab_size if text_vocab_size is None else whole(_TEXT_VOCAB, text_vocab_size, MOST_TOKENS)
        ignored = wholes(_IGNORED, ignored_token_ids, MOST_TOKENS, MOST_IGNORED)
        emb_neighbor_num = whole("emb_neighbor_num", emb_neighbor_num, MOST_ORDER)
        emb_split_num = whole("emb_split_num", emb_split_num, MOST_HEADS)
        ends = wholes("eos_token_id", eos_token_ids, MOST_WORD - 1, MOST_ENDS)
        if isinstance(ngram_vocab_size_ratio, bool) or not isinstance(ngram_vocab_size_ratio, (int, float)):
            raise TypeError(f"ngram_vocab_size_ratio must be a number, got {shown(ngram_vocab_size_ratio)}")
        if vocab_size < 1 or emb_neighbor_num < 2 or emb_split_num < 1 or not 0 < ngram_vocab_size_ratio <= MOST_TOKENS:
            raise InvalidRequest(
                "longcat needs vocab_size >= 1, emb_neighbor_num >= 2, emb_split_num >= 1, ngram_vocab_size_ratio > 0; "
                f"got {vocab_size}, {emb_neighbor_num}, {emb_split_num} and {shown(ngram_vocab_size_ratio)}"
            )
        if not 1 <= hashed <= vocab_size:
            raise InvalidRequest(f"longcat needs 1 <= text_vocab_size <= vocab_size, got {hashed} and {vocab_size}")
        base = int(ngram_vocab_size_ratio * hashed)
        heads = emb_split_num * (emb_neighbor_num - 1)
        check_heads("emb_neighbor_num and emb_split_num", 1, heads)
        head_rows = tuple(base + 2 * head + 1 for head in range(heads))
        if emb_neighbor_num * vocab_size * head_rows[-1] >= 2**53:
            raise InvalidRequest(
                f"vocab_size {vocab_size} with heads of {head_rows[-1]} rows is beyond exact hashing (sums of 2^53)"
            )
        super().__init__(vocab_size, emb_neighbor_num - 1, (TableShape("ngram", sum(head_rows), head_rows),))
        self.ngram_vocab_size_ratio = ngram_vocab_size_ratio
        self.emb_neighbor_num = emb_neighbor_num
        self.emb_split_num = emb_split_num
        self.eos_token_ids = tuple(ends)
        self.text_vocab_size = text_vocab_size
        self.ignored_token_ids = tuple(ignored)
        # A head of n-grams sees n tokens. Its further powers are 0.
        powers = [
            [pow(hashed, d, rows) if d < 2 + head // emb_split_num else 0 for head, rows in enumerate(head_rows)]
            for d in range(emb_neighbor_num)
        ]
        # Always made on the CPU, with any default device around it.
        cpu = torch.device("cpu")
        self._constants: dict[torch.device, tuple[Tensor, ...]] = {
            cpu: (
                torch.tensor(powers, dtype=torch.float64, device=cpu),
                torch.tensor(head_rows, device=cpu),
                torch.tensor([0, *accumulate(head_rows[:-1])], device=cpu),
                torch.tensor(ignored, dtype=torch.int64, device=cpu),
            )
        }

    @classmethod
    def recognizes(cls, config: Mapping[str, Any]) -> bool:
        """Recognize a config by its keys, too, if it names neither model_type nor architectures."""
        if config.get("model_type") or config.get("architectures"):
            return super().recognizes(config)
        return all(_value(config, key) is not None for key in _KEYS)

    @classmethod
    def params_of(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """See the base class. Raises InvalidRequest if keys are missing or ask for other ids than ours."""
        missing = [key for key in ("vocab_size", *_KEYS) if _value(config, key) is None]
        if missing:
            raise InvalidRequest(f"this LongCat config has no n-gram tables: it lacks {', '.join(missing)}")
        is_next = config.get(_TEXT_VOCAB) is not None
        unsupported = [key for key in _UNSUPPORTED if config.get(key) and not (is_next and key == _IGNORED)]
        if unsupported:
            raise InvalidRequest(f"family longcat does not know {', '.join(unsupported)}: its ids would be wrong")
        eos = config.get("eos_token_id", _DEFAULT_EOS)
        return {
            "vocab_size": config["vocab_size"],
            **{key: _value(config, key) for key in _KEYS},
            "eos_token_ids": [] if eos is None else list(eos) if isinstance(eos, (list, tuple)) else [eos],
            **(_of_next(config[_TEXT_VOCAB], config.get(_IGNORED) or []) if is_next else {}),
        }

    def params(self) -> dict[str, Any]:
        """The config's own keys, with the EOS ids always as a list."""
        return {
            "vocab_size": self.vocab_size,
            "ngram_vocab_size_ratio": self.ngram_vocab_size_ratio,
            "emb_neighbor_num": self.emb_neighbor_num,
            "emb_split_num": self.emb_split_num,
            "eos_token_ids": list(self.eos_token_ids),
            **(
                _of_next(self.text_vocab_size, list(self.ignored_token_ids)) if self.text_vocab_size is not None else {}
            ),
        }

    def _hash(self, tokens: Tensor) -> Tensor:
        powers, rows, offsets, ignored = self._constants_on(tokens.device)
        is_next = self.text_vocab_size is not None
        if is_next:
            tokens = tokens.masked_fill(torch.isin(tokens, ignored), 0)
        # [B, S, N], the token itself first, then older ones.
        grams = tokens.unfold(1, self.emb_neighbor_num, 1).flip(-1)
        older = grams[..., 1:]
        connected = older != NO_TOKEN
        for eos in self.eos_token_ids:
            connected &= older != eos
        if is_next:
            connected &= (older != 0) & (grams[..., :1] != 0)
        grams = grams.clamp_min(0)
        grams[..., 1:] *= connected.cumprod(-1)
        # In float64, because every device multiplies matrices of it. All sums stay below 2^53, so they are exact.
        sums = (grams.double() @ powers).long()
        return sums.fmod_(rows).add_(offsets).unsqueeze(2)

    def _constants_on(self, device: torch.device) -> tuple[Tensor, ...]:
        if device not in self._constants:
            self._constants[device] = tuple(each.to(device) for each in self._constants[torch.device("cpu")])
        return self._constants[device]


def _of_next(text_vocab_size: object, ignored_token_ids: object) -> dict[str, Any]:
    """Parameters that only LongCat-Next has."""
    return {"text_vocab_size": text_vocab_size, "ignored_token_ids": ignored_token_ids}


def _value(config: Mapping[str, Any], key: str) -> Any:
    value = config.get(key)
    return config.get(_KEYS.get(key, key)) if value is None else value
