from __future__ import annotations

import pytest
from typer.testing import CliRunner

from embedding_service.cli import app
from embedding_service.commands.secured import check_plain, is_loopback
from embedding_service.errors import InvalidRequest

HOSTS = {
    "127.0.0.1:1": True,
    "127.3.4.5": True,
    "[::1]:7": True,
    "::1": True,
    "localhost:0": True,
    "0.0.0.0:7069": False,
    "[::]:1": False,
    "::": False,
    "10.0.0.1": False,
    "*:1": False,
    "a-host:7": False,
}


@pytest.mark.parametrize("host", HOSTS)
def test_s1_plain_text_beyond_loopback_has_to_be_wished(host: str) -> None:
    assert is_loopback(host) is HOSTS[host]
    check_plain(True, host)
    if HOSTS[host]:
        check_plain(False, host, None)
    else:
        with pytest.raises(InvalidRequest, match="--insecure"):
            check_plain(False, "127.0.0.1:1", host)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("shard --store=x --controller=a:1 --listen=0.0.0.0:7070", "--insecure"),
        ("controller --store=x --control-listen=0.0.0.0:7070", "--insecure"),
        ("up --store=x --host=0.0.0.0", "--insecure"),
        ("shard --store=x --controller=a:1 --tls-cert=y", "come together"),
        ("controller --store=x --tls-cert=y --tls-key=y --tls-ca=y --policy=y", "--control-listen"),
        ("up --store=x --secure=d --insecure", "exclude each other"),
    ],
)
def test_s1_a_server_that_is_not_secured_as_a_whole_does_not_start(arguments: str, said: str) -> None:
    done = CliRunner().invoke(app, arguments.split())
    assert done.exit_code != 0
    assert said in f"{done.exception} {' '.join(done.output.replace('│', ' ').split())}"
