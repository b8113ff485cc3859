"""The clients in examples/ as a reader would run them, against a running service."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import DIM, HEADS, longcat_table
from support.cluster import Up
from support.security import Secured, secured_service

from embedding_service import EmbeddingClient

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
IDS = [3, 5, 8, 3]
NO_NETWORK = ("ENOTFOUND", "ECONNREFUSED", "EAI_AGAIN", "ETIMEDOUT", "ENETUNREACH", "ENOTCACHED")


def run(*command: str | Path, timeout: float = 150, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout, **options)


def needs(*programs: str) -> None:
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        pytest.skip(f"needs {' and '.join(missing)} on the PATH")


@pytest.fixture(scope="module")
def secured(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    """A shard that lets nobody in without TLS and a token."""
    with secured_service(tmp_path_factory.mktemp("secured"), store, shards=1) as running:
        yield running


def by_tls(secured: Secured, token: str | None) -> dict[str, str]:
    """What the examples are told by: the authority's file, and a token."""
    shown = {"EMBEDDING_SERVICE_TOKEN": token} if token else {}
    return {**os.environ, "EMBEDDING_SERVICE_TLS": str(secured.folder / "ca.crt"), **shown}


def check_secured(secured: Secured, rows_of: Callable[[str], torch.Tensor], *command: str | Path) -> None:
    """Rows come by TLS with a token. Without a token, or in plain text, the example says what is wrong."""
    arguments = (*command, secured.members.address, "fp32", "ngram", *map(str, IDS))
    done = run(*arguments, env=by_tls(secured, "reader"))
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(rows_of(done.stdout), longcat_table()[IDS], rtol=1e-6, atol=0)
    for environment, said in ((by_tls(secured, None), "unauthenticated"), (None, "unavailable")):
        done = run(*arguments, env=environment)
        assert said in f"{done.stdout} {done.stderr}".lower()


def number_lines(text: str) -> torch.Tensor:
    """float32 [n, DIM] of all numbers in a text."""
    return torch.tensor([float(word) for word in text.split()]).view(-1, DIM)


def test_python_stubs_need_neither_torch_nor_numpy(service: Up) -> None:
    example = EXAMPLES / "python_stubs.py"
    without = f"import runpy, sys; sys.modules.update(torch=None, numpy=None); sys.argv[0] = {str(example)!r}"
    code = f"{without}; runpy.run_path(sys.argv[0], run_name='__main__')"
    done = run(sys.executable, "-c", code, service.address, "fp32", "ngram", *map(str, IDS))
    assert done.returncode == 0, done.stderr
    assert torch.equal(number_lines(done.stdout), longcat_table()[IDS])


def test_python_stubs_say_what_the_service_says(service: Up) -> None:
    done = run(sys.executable, EXAMPLES / "python_stubs.py", service.address, "fp32", "nope", "3")
    assert done.returncode == 1
    assert done.stderr.startswith("NOT_FOUND: ")
    assert "ngram" in done.stderr


@pytest.mark.parametrize("arguments", [[], ["localhost:1"], ["localhost:1", "m", "t"], ["localhost:1", "m", "t", "x"]])
def test_python_stubs_say_how_they_are_used(arguments: list[str]) -> None:
    done = run(sys.executable, EXAMPLES / "python_stubs.py", *arguments)
    assert done.returncode == 2
    assert done.stderr == "usage: python examples/python_stubs.py HOST:PORT MODEL TABLE ID [ID ...]\n"


@pytest.fixture(scope="module")
def node_client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """client.js with its packages as the lock file pins them, beside a copy of the protos."""
    needs("node", "npm")
    root = tmp_path_factory.mktemp("node")
    shutil.copytree(EXAMPLES / "node", root / "examples/node", ignore=shutil.ignore_patterns("node_modules"))
    shutil.copytree(ROOT / "protos", root / "protos")
    done = run("npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", cwd=root / "examples/node")
    if done.returncode and any(code in done.stderr for code in NO_NETWORK):
        pytest.skip(f"npm reaches no registry: {done.stderr.splitlines()[0]}")
    assert done.returncode == 0, done.stderr
    return root / "examples/node/client.js"


def node_steps(text: str) -> dict[str, Any]:
    return {line["step"]: line["result"] for line in map(json.loads, text.splitlines())}


def test_node_looks_up_hashes_streams_and_explains_errors(
    node_client: Path, service: Up, client: EmbeddingClient
) -> None:
    done = run("node", node_client, service.address, "fp32", "ngram", *map(str, IDS))
    assert done.returncode == 0, done.stderr
    steps = node_steps(done.stdout)
    assert "fp32@1 longcat" in steps["models"]
    assert torch.equal(torch.tensor(steps["lookup"]), longcat_table()[IDS])
    ngrams = client.lookup_ngrams("fp32", torch.tensor([IDS]))
    assert torch.equal(torch.tensor(steps["ngrams"]).view(1, len(IDS), 1, HEADS, DIM), ngrams)
    *rows, failure = steps["stream"]
    assert torch.equal(torch.tensor(rows)[:, 0], longcat_table()[IDS])
    assert failure["code"] == 11  # OUT_OF_RANGE, and the requests beside it were answered
    assert "4294967295" in failure["message"]
    assert steps["error"]["code"] == "NOT_FOUND"
    assert "ngram" in steps["error"]["message"]


def test_node_says_who_does_not_answer(node_client: Path) -> None:
    done = run("node", node_client, "127.0.0.1:1", "fp32", "ngram", "3")
    assert json.loads(done.stdout)["result"]["code"] == "UNAVAILABLE"
    assert run("node", node_client, "127.0.0.1:1", "fp32", "ngram", "-3").returncode == 2


def test_the_node_lock_file_names_no_registry_and_pins_every_package() -> None:
    lock = json.loads((EXAMPLES / "node/package-lock.json").read_text())
    packages = {name: entry for name, entry in lock["packages"].items() if name}
    assert "node_modules/@grpc/grpc-js" in packages
    assert all("resolved" not in entry and entry["integrity"] for entry in packages.values())


@pytest.fixture(scope="module")
def cpp_client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """client.cc as its Makefile builds it, beside a copy of the protos."""
    needs("g++", "make", "pkg-config", "protoc", "grpc_cpp_plugin")
    if run("pkg-config", "--exists", "grpc++", "protobuf").returncode:
        pytest.skip("needs gRPC's and protobuf's C++ headers (Debian: libgrpc++-dev libprotobuf-dev)")
    root = tmp_path_factory.mktemp("cpp")
    shutil.copytree(EXAMPLES / "cpp", root / "examples/cpp", ignore=shutil.ignore_patterns("build"))
    shutil.copytree(ROOT / "protos", root / "protos")
    done = run("make", cwd=root / "examples/cpp", timeout=270)
    assert done.returncode == 0, done.stderr
    return root / "examples/cpp/build/client"


def cpp_rows(text: str) -> list[torch.Tensor]:
    """Those of the call, and those of the stream."""
    return [number_lines(part) for part in text.removeprefix("# one call\n").split("# a stream\n")]


def test_cpp_looks_up_by_a_call_and_by_a_stream(cpp_client: Path, service: Up) -> None:
    done = run(cpp_client, service.address, "fp32", "ngram", *map(str, IDS))
    assert done.returncode == 0, done.stderr
    for rows in cpp_rows(done.stdout):
        assert torch.equal(rows, longcat_table()[IDS])


@pytest.mark.parametrize(
    ("table", "id", "code", "named"), [("nope", "3", "NOT_FOUND", "ngram"), ("ngram", "-3", "OUT_OF_RANGE", "-3")]
)
def test_cpp_says_what_the_service_says(
    cpp_client: Path, service: Up, table: str, id: str, code: str, named: str
) -> None:
    done = run(cpp_client, service.address, "fp32", table, id)
    assert done.returncode == 1
    assert done.stderr.startswith(f"{code}: ")
    assert named in done.stderr


def test_cpp_says_who_does_not_answer(cpp_client: Path) -> None:
    done = run(cpp_client, "127.0.0.1:1", "fp32", "ngram", "3")
    assert (done.returncode, done.stderr[:13]) == (1, "UNAVAILABLE: ")
    assert run(cpp_client, "127.0.0.1:1", "fp32", "ngram", "3x").returncode == 2


def shell_steps(text: str) -> dict[str, str]:
    return dict(part.split("\n", 1) for part in text.split("\n# ")[1:])  # type: ignore[misc]


def shell_rows(text: str) -> torch.Tensor:
    [rows] = [text for title, text in shell_steps(text).items() if title.startswith("Rows")]
    return number_lines(rows)


def test_the_shell_walkthrough_needs_no_proto_file(service: Up, tmp_path: Path) -> None:
    needs("grpcurl", "jq")
    done = run(EXAMPLES / "shell/walkthrough.sh", service.address, "fp32", "ngram", *map(str, IDS), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    steps = shell_steps(done.stdout)
    assert "embedding.v1.EmbeddingService" in steps["What does this process serve?"]
    assert "rpc LookupNgrams" in steps["What can be asked of it, and what is a lookup?"]
    assert "bytes ids_int64" in steps["What can be asked of it, and what is a lookup?"]
    assert '"SERVING"' in steps["Is it well?"]
    torch.testing.assert_close(shell_rows(done.stdout), longcat_table()[IDS], rtol=1e-6, atol=0)
    assert '{"request":"1","dim":16}' in done.stdout
    assert "NotFound" in done.stderr
    assert "ngram" in done.stderr


@pytest.mark.service
def test_s2_s3_the_python_stubs_speak_tls_and_show_a_token(secured: Secured) -> None:
    check_secured(secured, number_lines, sys.executable, EXAMPLES / "python_stubs.py")


@pytest.mark.service
def test_s2_s3_node_speaks_tls_and_shows_a_token(secured: Secured, node_client: Path) -> None:
    check_secured(secured, lambda text: torch.tensor(node_steps(text)["lookup"]), "node", node_client)


@pytest.mark.service
def test_s2_s3_cpp_speaks_tls_and_shows_a_token(secured: Secured, cpp_client: Path) -> None:
    check_secured(secured, lambda text: cpp_rows(text)[0], cpp_client)


@pytest.mark.service
def test_s2_s3_the_shell_walkthrough_speaks_tls_and_shows_a_token(secured: Secured) -> None:
    needs("grpcurl", "jq")
    check_secured(secured, shell_rows, EXAMPLES / "shell/walkthrough.sh")
