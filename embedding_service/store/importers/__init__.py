"""Checkpoints read into tables, a file a model family. See `base.Importer`."""

from __future__ import annotations

from embedding_service.errors import ImportRefused
from embedding_service.store.checkpoint import Checkpoint
from embedding_service.store.importers.base import Importer, TableSource
from embedding_service.store.importers.longcat import LongcatImporter

IMPORTERS: tuple[type[Importer], ...] = (LongcatImporter,)


def find_importer(checkpoint: Checkpoint) -> Importer:
    """Return the importer that knows the checkpoint's family. Raises ImportRefused naming the known ones."""
    for importer in IMPORTERS:
        if importer.recognizes(checkpoint.config):
            return importer(checkpoint)
    config = checkpoint.config
    raise ImportRefused(
        f"{checkpoint.folder}: no n-gram family known for model_type {config.get('model_type')!r}, architectures "
        f"{config.get('architectures')!r}; known families: {', '.join(importer.family for importer in IMPORTERS)}"
    )


__all__ = ["IMPORTERS", "Importer", "TableSource", "find_importer"]
