"""`policy check`, `policy token`: the policy file, before it counts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from embedding_service.commands.text import JsonOption, say, say_json

app = typer.Typer(help="Try a policy file, and make tokens for it.", no_args_is_help=True)
PolicyPath = Annotated[Path, typer.Option("--policy", help="The policy file.")]


@app.command()
def check(
    who: Annotated[str, typer.Option(help="An identity, or the name of a certificate, or a token's subject.")],
    may: Annotated[str, typer.Option(help="A right: read, publish, train, member, admin, metrics.")],
    model: Annotated[str | None, typer.Option(help="NAME or NAME@VERSION, for read, publish, train.")] = None,
    policy: PolicyPath = Path("policy.toml"),
    as_json: JsonOption = False,
) -> None:
    """Say whether somebody may do something, and by which line. Exit code 1 if not."""
    from embedding_service.security.policy import MODEL_RIGHTS, SERVICE_RIGHTS, read_policy

    if may not in (*MODEL_RIGHTS, *SERVICE_RIGHTS):
        raise typer.BadParameter(f"--may must be one of {', '.join((*MODEL_RIGHTS, *SERVICE_RIGHTS))}, got {may!r}")
    if (may in MODEL_RIGHTS) != (model is not None):
        raise typer.BadParameter(f"--may {may} needs " + ("a --model" if may in MODEL_RIGHTS else "no --model"))
    found = read_policy(policy)
    name = who if who in found.identities else found.of_names([who]) or found.of_subject(who)
    if name is None:
        if as_json:
            say_json({"allowed": False, "identity": None, "granted": []})
        else:
            say(f"denied: the policy knows nobody by {who}")
        raise typer.Exit(1)
    identity = found.identities[name]
    allowed = identity.has(may) if model is None else identity.may(may, model)
    granted = list(identity.rights if model is None else identity.models(may))
    if as_json:
        say_json({"allowed": allowed, "identity": name, "granted": granted})
    else:
        line = f"identity {name}, {'rights' if model is None else may} = {', '.join(granted) or 'nothing'}"
        say(f"{'allowed' if allowed else 'denied'}: {line}")
    if not allowed:
        raise typer.Exit(1)


@app.command()
def token(as_json: JsonOption = False) -> None:
    """Make an opaque token. The first line is for its holder, the second one for the policy file."""
    from embedding_service.security.authority import new_token
    from embedding_service.security.policy import digest_of

    made = new_token()
    if as_json:
        say_json({"token": made, "digest": f"sha256:{digest_of(made)}"})
        return
    say(made)
    say(f'tokens = ["sha256:{digest_of(made)}"]')
