from __future__ import annotations

from pathlib import Path

import pytest
from support.security import write_policy
from typer.testing import CliRunner

from embedding_service.cli import app
from embedding_service.security.policy import digest_of


@pytest.mark.parametrize(
    ("asked", "said", "code"),
    [
        ("--who w --may read --model cat@1", "allowed: identity w, read = cat*", 0),
        ("--who system:w --may read --model cat", "allowed", 0),
        ("--who w --may read --model dog", "denied: identity w", 1),
        ("--who w --may admin", "denied", 1),
        ("--who spiffe://x/shard/1 --may member", "allowed: identity m, rights = member", 0),
        ("--who x --may member", "knows nobody by x", 1),
        ("--who w --may read", "needs a --model", 2),
        ("--who w --may fly", "must be one of", 2),
    ],
)
def test_s4_a_dry_run_says_what_is_allowed_and_why(tmp_path: Path, asked: str, said: str, code: int) -> None:
    members = {"certificates": ["spiffe://x/shard/*"], "rights": ["member"]}
    policy = write_policy(tmp_path, {"w": {"subjects": ["system:w"], "read": ["cat*"]}, "m": members})
    done = CliRunner().invoke(app, ["policy", "check", f"--policy={policy}", *asked.split()])
    assert done.exit_code == code
    assert said in " ".join(done.output.replace("│", " ").split())


def test_a_token_comes_with_its_line_for_the_policy() -> None:
    token, line = CliRunner().invoke(app, ["policy", "token"]).output.split("\n")[:2]
    assert line == f'tokens = ["sha256:{digest_of(token)}"]' and len(token) > 40
