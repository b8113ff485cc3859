"""Token ids -> row ids, a file for each family.

A new family is one file beside `longcat.py` with a subclass of `NgramHasher`, and one line in `FAMILIES`.
docs/families.md goes through it.
"""

from embedding_service.ngram.base import NO_TOKEN, NgramHasher, TableShape
from embedding_service.registry import Registry

FAMILIES: Registry[NgramHasher] = Registry(
    "n-gram family",
    "embedding_service.ngram.base:NgramHasher",
    {
        "engram": "embedding_service.ngram.engram:EngramHasher",
        "gemma": "embedding_service.ngram.gemma:GemmaHasher",
        "longcat": "embedding_service.ngram.longcat:LongcatHasher",
        "qwen4_exp": "embedding_service.ngram.qwen4_exp:Qwen4ExpHasher",
    },
)

__all__ = ["FAMILIES", "NO_TOKEN", "NgramHasher", "TableShape"]
