"""Versions of models as the store describes them, of no files."""

from embedding_service.store.manifest import Manifest, Part, Provenance, Table

DIM = 16


def manifest(version: str, model: str = "m", parts: int = 3, imported_at: str = "") -> Manifest:
    """One table "t" of fp32 rows."""
    row_bytes, rows = DIM * 4, 64
    return Manifest(
        model=model,
        version=version,
        family="",
        hash_params={},
        provenance=Provenance(
            checkpoint="", files={}, source_dtype="", source_bytes=0, imported_at=imported_at, importer=""
        ),
        tables=(
            Table(
                name="t",
                rows=rows * parts,
                dim=DIM,
                dtype="fp32",
                row_bytes=row_bytes,
                rows_per_part=rows,
                parts=tuple(
                    Part(
                        index=index,
                        first_row=index * rows,
                        rows=rows,
                        file=f"t/part-{index:05d}.safetensors",
                        bytes=rows * row_bytes,
                        checksum="xxh3-128:" + "0" * 32,
                    )
                    for index in range(parts)
                ),
            ),
        ),
    )
