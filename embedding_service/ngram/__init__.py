"""Token ids -> row ids, a file a family.

A new family is one file beside `longcat.py` with a subclass of `NgramHasher`, imported here: importing it registers it.
"""

from embedding_service.ngram.base import NO_TOKEN, NgramHasher, TableShape
from embedding_service.ngram.longcat import LongcatHasher

__all__ = ["NO_TOKEN", "LongcatHasher", "NgramHasher", "TableShape"]
