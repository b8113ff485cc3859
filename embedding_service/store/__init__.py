"""Tables on disk: the manifest, parts, the store that publishes them, and the importers that fill it.

STORE/MODEL/VERSION/manifest.json          written last, atomically
STORE/MODEL/VERSION/TABLE/part-00000.safetensors
STORE/MODEL/VERSION/TABLE/overlay-00000.safetensors      rows of a version with a base, in place of the base's
"""

from embedding_service.store.manifest import Manifest, Part, Table
from embedding_service.store.parts import (
    DEFAULT_PART_BYTES,
    default_rows_per_part,
    part_layout,
    read_into,
    rows_per_part,
    verify,
)
from embedding_service.store.store import Store

__all__ = [
    "DEFAULT_PART_BYTES",
    "Manifest",
    "Part",
    "Store",
    "Table",
    "default_rows_per_part",
    "part_layout",
    "read_into",
    "rows_per_part",
    "verify",
]
