"""Token ids -> row ids, a file for each family.

A new family is one file beside `longcat.py` with a subclass of `NgramHasher`, imported here. Importing it registers it.
docs/families.md shows how.
"""

from embedding_service.ngram.base import NO_TOKEN, NgramHasher, TableShape
from embedding_service.ngram.engram import EngramHasher
from embedding_service.ngram.longcat import LongcatHasher
from embedding_service.ngram.qwen4_exp import Qwen4ExpHasher

__all__ = ["NO_TOKEN", "EngramHasher", "LongcatHasher", "NgramHasher", "Qwen4ExpHasher", "TableShape"]
