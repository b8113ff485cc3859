"""`inspect` and `gc`: what is in a store, whether it is whole, and what can go."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from embedding_service.commands.secured import AuditOption
from embedding_service.commands.store import Progress, open_store
from embedding_service.commands.text import JsonOption, format_bytes, say, say_json
from embedding_service.security.audit import Audit, this_user

if TYPE_CHECKING:
    from pathlib import Path

    from embedding_service.store.garbage import Garbage
    from embedding_service.store.manifest import Manifest
    from embedding_service.store.store import Store

StoreArgument = Annotated[str, typer.Argument(help="The store: a folder or an fsspec URL.")]


def inspect(
    store: StoreArgument,
    verify: Annotated[bool, typer.Option("--verify", help="Read every file, and compare its checksum.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what is in a store. Exit code 1 if something cannot be read, or is not what its checksum says."""
    source = open_store(store)
    catalogue = source.catalogue()
    manifests = [manifest for versions in catalogue.manifests.values() for manifest in versions]
    problems = list(catalogue.problems.values())
    if verify:
        problems += _corrupt(source, manifests)
    if as_json:
        say_json({"versions": [_about(manifest) for manifest in manifests], "problems": problems})
    else:
        for manifest in manifests:
            say(_line(manifest))
        if not manifests:
            say(f"no model in {store}: `embedding-service import` makes one")
        if verify and not problems:
            say(f"every file of {len(manifests)} versions is what its checksum says")
        for problem in problems:
            say(f"problem: {problem}", err=True)
    raise typer.Exit(1 if problems else 0)


def gc(
    store: StoreArgument,
    keep: Annotated[int, typer.Option(min=1, help="Newest versions of each model that stay, and their bases.")] = 2,
    drafts: Annotated[
        bool, typer.Option("--drafts", help="Remove imports that were broken off, too. They could be gone on with.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Remove. Without it, only say what would go.")] = False,
    audit: AuditOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remove versions that newer ones have replaced. The base of a version or of a branch stays."""
    from embedding_service.store.garbage import find_garbage

    target = open_store(store)
    found = find_garbage(target, keep, _bases_of_branches(target), drafts)
    if yes:
        found = [garbage for garbage in found if _removed(target, garbage, audit, as_json)]
    elif not as_json:
        for garbage in found:
            say(f"would remove {garbage.kind} {garbage.name}: {format_bytes(garbage.bytes)}")
    if as_json:
        say_json({"removed" if yes else "would_remove": [asdict(garbage) for garbage in found]})
    elif not found:
        say("nothing can go")
    elif not yes:
        say(f"{format_bytes(sum(garbage.bytes for garbage in found))} in all: say --yes to remove them")


def _bases_of_branches(store: Store) -> list[tuple[str, str]]:
    from embedding_service.training.branch import branches, read_branch

    return [(branch.model, branch.base) for branch in (read_branch(store, name) for name in branches(store))]


def _removed(store: Store, garbage: Garbage, audit: Path | None, as_json: bool) -> bool:
    """Remove it, unless it is in use by now. Whether it went."""
    from embedding_service.store.garbage import remove

    about = f"{garbage.kind} {garbage.name}"
    if not remove(store, garbage, lambda: _bases_of_branches(store)):
        say(f"kept {about}: it is in use by now", err=True)
        return False
    Audit(audit).note("gc", this_user(), model=garbage.name, kind=garbage.kind, store=store.url)
    if not as_json:
        say(f"removed {about}: {format_bytes(garbage.bytes)}")
    return True


def remove_branch_command(
    branch: Annotated[str, typer.Argument(help="MODEL@BRANCH.")],
    store: Annotated[str, typer.Option(help="The store: a folder that shards see.")],
    audit: AuditOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remove a branch that nobody trains, with its checkpoints and logs. What was published of it stays."""
    from embedding_service.training.branch import remove_branch

    remove_branch(open_store(store), branch)
    Audit(audit).note("gc", this_user(), model=branch, kind="branch", store=store)
    if as_json:
        say_json({"removed": branch})
    else:
        say(f"removed {branch}: shards give its memory back within seconds")


def _corrupt(store: Store, manifests: list[Manifest]) -> list[str]:
    """What is wrong with the files, a line each."""
    from embedding_service.errors import StoreError
    from embedding_service.store.reading import check_part, replaced_rows

    total = sum(manifest.own_bytes for manifest in manifests)
    found, done = [], 0
    with Progress("verifying") as progress:
        for manifest in manifests:
            for table in manifest.tables:
                overlays = manifest.overlays(table.name)
                for part in table.parts:
                    size = part.bytes
                    try:
                        if not manifest.base:
                            check_part(store, manifest, part)
                        elif part.index in overlays:
                            size = overlays[part.index].bytes
                            replaced_rows(store, manifest, table, part)
                        else:
                            continue
                    except (StoreError, OSError) as error:
                        found.append(f"{manifest.full_name}: {error}")
                    progress(done := done + size, total)
    return found


def _about(manifest: Manifest) -> dict[str, Any]:
    return {
        "model": manifest.model,
        "version": manifest.version,
        "family": manifest.family,
        "base": "@".join(manifest.root) if manifest.base else None,
        "replaced_rows": manifest.replaced_rows if manifest.base else None,
        "bytes": manifest.own_bytes,
        "tables": [
            {"name": table.name, "rows": table.rows, "dim": table.dim, "dtype": table.dtype, "parts": len(table.parts)}
            for table in manifest.tables
        ],
    }


def _line(manifest: Manifest) -> str:
    tables = ", ".join(f"{table.name} {table.rows:,} x {table.dim} {table.dtype}" for table in manifest.tables)
    if manifest.base:
        size = format_bytes(manifest.replaced_bytes)
        return f"{manifest.full_name}: {manifest.replaced_rows:,} rows over {'@'.join(manifest.root)}, {size}; {tables}"
    parts = sum(len(table.parts) for table in manifest.tables)
    return f"{manifest.full_name}: {tables}; {format_bytes(manifest.bytes)} in {parts} parts"
