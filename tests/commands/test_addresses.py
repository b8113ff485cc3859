"""Addresses that are given to commands: IPv6 in brackets, ports that exist, hosts of this machine."""

import socket

import pytest
from typer.testing import CliRunner

from embedding_service import cli
from embedding_service.errors import InvalidRequest
from embedding_service.machine import check_free, free_port, join_address, split_address
from embedding_service.serving import reachable_address

ADDRESS_OPTIONS = [
    ["controller", "--store=x", "--listen"],
    ["shard", "--store=x", "--controller"],
    ["shard", "--store=x", "--controller=a:1", "--listen"],
    ["shard", "--store=x", "--controller=a:1", "--shared-listen"],
    ["lookup", "m/t", "1", "--address"],
    ["status"],
    ["models"],
    ["bench", "--table=m/t"],
]


@pytest.mark.parametrize("command", ADDRESS_OPTIONS, ids=lambda command: f"{command[0]} {command[-1]}")
@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("localhost:65536", "ports go up to 65,535, got 'localhost:65536'"),
        ("localhost:72606", "ports go up to 65,535"),
        ("localhost:" + "9" * 5000, "ports go up to 65,535"),
        ("::1:7070", "an IPv6 host goes in brackets, as [::1]:7070"),
        ("localhost:-1", "an address must be HOST:PORT"),
        ("localhost:٣", "an address must be HOST:PORT"),
        (":7070", "an address must be HOST:PORT"),
    ],
)
def test_an_address_that_cannot_be(command: list[str], address: str, message: str) -> None:
    *rest, last = command
    given = [*rest, f"{last}={address}"] if last.startswith("--") and "=" not in last else [*command, address]
    done = CliRunner().invoke(cli.app, given)
    assert isinstance(done.exception, InvalidRequest), done.output
    assert message in str(done.exception)


@pytest.mark.parametrize("option", ["--port=65536", "--port=-1", "--port=0", "--port=x"])
def test_a_port_that_cannot_be(option: str) -> None:
    done = CliRunner().invoke(cli.app, ["up", "--store=x", option])
    assert done.exit_code == 2
    assert "--port" in done.output


def test_hosts_and_ports_are_joined_and_split() -> None:
    for host, port, address in [("::1", 7, "[::1]:7"), ("[::1]", 7, "[::1]:7"), ("a.b", 65535, "a.b:65535")]:
        assert join_address(host, port) == address
        assert split_address(address) == (address.rpartition(":")[0], port)


@pytest.mark.parametrize(
    ("listen", "advertise", "expected"),
    [
        ("0.0.0.0:7", None, f"{socket.getfqdn()}:7"),
        ("[::]:7", None, f"{socket.getfqdn()}:7"),
        ("[::1]:7", None, "[::1]:7"),
        ("[::]:7", "2001:db8::1", "[2001:db8::1]:7"),
        ("[::]:7", "[2001:db8::1]", "[2001:db8::1]:7"),
        ("[::]:7", "[2001:db8::1]:8", "[2001:db8::1]:8"),
        ("0.0.0.0:7", "pod", "pod:7"),
        ("0.0.0.0:7", "pod:8", "pod:8"),
    ],
)
def test_the_address_that_others_use(listen: str, advertise: str | None, expected: str) -> None:
    assert reachable_address(listen, advertise) == expected


@pytest.mark.parametrize("advertise", ["pod:65536", "[::1]:x", ":7", "[::1"])
def test_an_address_for_others_that_cannot_be(advertise: str) -> None:
    done = CliRunner().invoke(cli.app, ["controller", "--store=x", f"--advertise={advertise}"])
    assert isinstance(done.exception, InvalidRequest), done.output


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "[::1]"])
def test_a_port_is_free_until_somebody_listens(host: str) -> None:
    address = join_address(host, free_port(host))
    check_free(address)
    with (
        socket.create_server(
            (host.strip("[]"), split_address(address)[1]), family=socket.AF_INET6 if ":" in host else socket.AF_INET
        ),
        pytest.raises(InvalidRequest, match="give another port"),
    ):
        check_free(address)


@pytest.mark.parametrize("host", ["a..b", "x" * 300, "a b", "no-such-host.invalid", "2001:db8::1", "a\0b"])
def test_a_host_that_is_none_of_this_machine(host: str) -> None:
    said = r"^(cannot listen on .*: (the host must be an address of|that is no name)|an address must be HOST:PORT)"
    with pytest.raises(InvalidRequest, match=said):
        check_free(join_address(host, 7070))
