"""Policies for tests."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from embedding_service.security.authority import write_private
from embedding_service.security.policy import digest_of


def write_policy(
    folder: Path, identities: Mapping[str, Mapping[str, Any]], about: Mapping[str, str] | None = None
) -> Path:
    """A policy file. `tokens` are given as they are, and written as their digests. `about` is the table [jwt]."""
    lines = []
    for name, each in identities.items():
        given = {**each, "tokens": [f"sha256:{digest_of(token)}" for token in each.get("tokens", ())]}
        lines += [f"[identities.{name}]", *(f"{key} = {json.dumps(value)}" for key, value in given.items())]
    if about:
        lines += ["[jwt]", *(f"{key} = {json.dumps(value)}" for key, value in about.items())]
    write_private(folder / "policy.toml", "\n".join(lines).encode())
    return folder / "policy.toml"
