"""Engram's compressed vocabulary: tokens that look alike once normalized share an id.

Source: `engram.py` in the code published with DeepSeek-V4.1-Flash and with "Conditional Memory via Scalable Lookup"
(github.com/deepseek-ai/Engram). Making a map needs the `tokenizers` library. Clients of the service do not need it:
they get the map with the routing.
"""

from __future__ import annotations

import base64
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from embedding_service.errors import InvalidRequest, StoreError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER_FILE = "tokenizer.json"
# A token that is a single space would be stripped to nothing. A code point of private use stands for it until then.
_LONE_SPACE = "\ue000"
_COUNT_BYTES = 4
# Bytes of a packed map once it is inflated: 16 million tokens.
_MOST_BYTES = 64 << 20


def token_map_of(tokenizer: object) -> Tensor:
    """Each token's compressed id: int64 [tokens], numbered in order of first appearance.

    tokenizer: a `tokenizers.Tokenizer`, a fast tokenizer of transformers, or the path of a tokenizer.json or of the
    folder that holds it. An int64 tensor is taken as the map itself.
    Raises InvalidRequest for anything else, and if the `tokenizers` library is missing. Raises StoreError for a path
    that holds no tokenizer.
    """
    if isinstance(tokenizer, Tensor):
        return _checked(tokenizer)
    if isinstance(tokenizer, (str, Path)):
        tokenizer = _read(Path(tokenizer))
    tokenizer = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not all(hasattr(tokenizer, name) for name in ("decode", "id_to_token", "get_vocab_size")):
        raise InvalidRequest(
            "family engram hashes normalized tokens: give tokenizer= a tokenizers.Tokenizer, a fast tokenizer of "
            f"transformers, the path of a {TOKENIZER_FILE} or the int64 map itself; got {type(tokenizer).__name__}"
        )
    return _compress(tokenizer)


def pack(token_map: Tensor) -> str:
    """A map as text that is short enough for a routing: 0.8 bytes a token if every fourth repeats a random one.

    It holds the number of tokens, a bit for each that says whether its id is new, and the ids of the others with all
    lowest bytes first. It is deflated, in base 85.
    """
    ids = _checked(token_map).numpy()
    new = _is_new(ids)
    repeated = ids[~new].astype("<u4").view(np.uint8).reshape(-1, 4).T
    head = len(ids).to_bytes(_COUNT_BYTES, "little")
    return base64.b85encode(zlib.compress(head + np.packbits(new).tobytes() + repeated.tobytes(), 9)).decode()


def unpack(text: str) -> Tensor:
    """The map that `pack` packed: int64 [tokens]. Raises InvalidRequest."""
    try:
        inflate = zlib.decompressobj()
        content = inflate.decompress(base64.b85decode(text), _MOST_BYTES)
        count = int.from_bytes(content[:_COUNT_BYTES], "little")
        rest = _COUNT_BYTES + -(-count // 8)
        if not inflate.eof or not _COUNT_BYTES < rest <= len(content):
            raise ValueError(f"{count:,} tokens in {len(content):,} bytes")
        new = np.unpackbits(np.frombuffer(content[_COUNT_BYTES:rest], np.uint8), count=count).astype(bool)
        ids = np.cumsum(new, dtype=np.int64) - 1
        ids[~new] = np.ascontiguousarray(np.frombuffer(content[rest:], np.uint8).reshape(4, -1).T).view("<u4").ravel()
    except (TypeError, ValueError, zlib.error) as error:
        raise InvalidRequest(f"token_map is no packed map of tokens: {error}") from None
    return _checked(torch.from_numpy(ids))


def _compress(tokenizer: Any) -> Tensor:
    normalizer = _normalizer()
    ids: dict[str, int] = {}
    compressed = []
    for token in range(tokenizer.get_vocab_size()):
        text = tokenizer.decode([token], skip_special_tokens=False)
        # Part of a character in UTF-8 is no text yet. Its raw form says which part.
        key = tokenizer.id_to_token(token) if "\ufffd" in text else normalizer.normalize_str(text) or text
        compressed.append(ids.setdefault(key, len(ids)))
    return torch.tensor(compressed, dtype=torch.int64, device="cpu")


def _normalizer() -> Any:
    try:
        from tokenizers import Regex, normalizers
    except ImportError:
        raise InvalidRequest(
            "family engram needs the tokenizers library to read a tokenizer: pip install tokenizers"
        ) from None
    return normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.NFD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[ \t\r\n]+"), " "),
            normalizers.Replace(Regex("^ $"), _LONE_SPACE),
            normalizers.Strip(),
            normalizers.Replace(_LONE_SPACE, " "),
        ]
    )


def _read(path: Path) -> Tokenizer:
    file = path / TOKENIZER_FILE if path.is_dir() else path
    if not file.is_file():
        raise StoreError(f"{file} is not there: family engram hashes normalized tokens and needs the tokenizer")
    _normalizer()  # says what to install, where it must be
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise StoreError(f"{file} is not a tokenizer of the tokenizers library: {error}") from error


def _checked(token_map: Tensor) -> Tensor:
    if token_map.dtype != torch.int64 or token_map.dim() != 1 or not len(token_map):
        raise InvalidRequest(f"a map of tokens must be int64 [tokens], got {token_map.dtype} {list(token_map.shape)}")
    token_map = token_map.cpu()
    new = torch.from_numpy(_is_new(token_map.numpy()))
    if token_map.min() < 0 or not torch.equal(token_map[new], torch.arange(int(new.sum()), device="cpu")):
        raise InvalidRequest("a map of tokens must number compressed ids in order of first appearance: 0, 1, 2, ...")
    return token_map


def _is_new(ids: np.ndarray[Any, np.dtype[np.int64]]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Whether an id is above all before it. If ids are numbered that way, it appears first there."""
    return ids > np.concatenate(([-1], np.maximum.accumulate(ids)[:-1]))
