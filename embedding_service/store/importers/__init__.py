"""Checkpoints read into tables, a file a model family. See `base.Importer`."""
