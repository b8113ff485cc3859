"""Checkpoints read into tables, a file for each model family. See `base.Importer`."""

from __future__ import annotations

from typing import Any

from embedding_service.checkpoint import CONFIG_FILE, Checkpoint
from embedding_service.errors import ImportRefused, InvalidRequest
from embedding_service.foreign import shown
from embedding_service.registry import Registry
from embedding_service.store.importers.base import FamilyImporter, Importer, TableSource
from embedding_service.store.importers.generic import GenericImporter

# By the name of the family, as in `ngram.FAMILIES`.
IMPORTERS: Registry[FamilyImporter[Any]] = Registry(
    "importer",
    "embedding_service.store.importers.base:FamilyImporter",
    {
        "engram": "embedding_service.store.importers.engram:EngramImporter",
        "gemma": "embedding_service.store.importers.gemma:GemmaImporter",
        "longcat": "embedding_service.store.importers.longcat:LongcatImporter",
        "qwen4_exp": "embedding_service.store.importers.qwen4_exp:Qwen4ExpImporter",
    },
)


def find_importer(checkpoint: Checkpoint) -> Importer:
    """Return the importer that knows the checkpoint's family. Raises ImportRefused naming the known ones."""
    for importer in IMPORTERS.values():
        try:
            recognized = importer.recognizes(checkpoint.config)
        except InvalidRequest as error:
            raise ImportRefused(f"{checkpoint.folder / CONFIG_FILE}: {error}") from error
        if recognized:
            return importer(checkpoint)
    config, known = checkpoint.config, ", ".join(IMPORTERS)
    raise ImportRefused(
        f"{checkpoint.folder}: no n-gram family known for model_type {shown(config.get('model_type'))}, "
        f"architectures {shown(config.get('architectures'))}; known families: {known}. "
        "Any matrix can be imported with --generic TENSOR"
    )


__all__ = ["IMPORTERS", "GenericImporter", "Importer", "TableSource", "find_importer"]
