"""Stores in buckets, on real servers: moto's for s3://, emulators for gs:// and az://. A proxy makes them fail.

`make azurite` installs the one for az://.
"""

import json
import logging
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import fsspec
import pytest
import torch
from support.checkpoints import longcat_checkpoint, longcat_table
from support.cluster import cluster, free_port
from support.object_stores import (
    BUCKET,
    Answer,
    Fault,
    Proxy,
    Request,
    az_server,
    azure_account,
    azurite,
    cut_short,
    each_once,
    gs_server,
    hanging,
    hung_up,
    passing,
    s3_server,
    slow_down,
)
from typer.testing import CliRunner

from embedding_service import EmbeddingClient, cli
from embedding_service.errors import ImportRefused, RemoteStoreError, StoreError
from embedding_service.formats import get_format
from embedding_service.store import Manifest, Part, Store, garbage, read_into, remote
from embedding_service.store.draft import RemoteDraft
from embedding_service.store.garbage import find_garbage
from embedding_service.store.importing import import_checkpoint
from embedding_service.wire import control_pb2 as control

pytestmark = pytest.mark.slow
PART_BYTES = 128 << 10
# What botocore would do 5 times and s3fs 5 times each.
FEW_TRIES = {"config_kwargs": {"retries": {"max_attempts": 1}, "connect_timeout": 30}}


class Bucket(NamedTuple):
    """One on a server, seen through a proxy."""

    scheme: str
    proxy: Proxy

    def url(self, store: str) -> str:
        """Of a store of this name in the bucket."""
        return f"{self.scheme}://{BUCKET}/{store}"

    def sent(self, method: str, file: str) -> list[Request]:
        """The requests with this method for, or with, a file of this name."""
        return [each for each in self.proxy.requests if each.method == method and names(each, file)]


def names(request: Request, file: str) -> bool:
    """Whether a request is about a file of this name. Google's uploads have the name in the body."""
    return file in request.path or bool(re.search(rb'"name": "[^"]*' + file.encode(), request.body))


def once_for(file: str, fault: Fault) -> Fault:
    """The fault for the first request of each kind for a file of this name."""
    first = each_once(fault)
    return lambda request, ask: (first if names(request, file) else passing)(request, ask)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return longcat_checkpoint(tmp_path_factory.mktemp("source") / "checkpoint")


@pytest.fixture(scope="module")
def buckets() -> Iterator[dict[str, Bucket]]:
    """One of each kind. fsspec's configuration names the servers."""
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_CONFIG_FILE", "/nonexistent")
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # it asks by gRPC, which the emulator does not speak
        servers = {"s3": stack.enter_context(s3_server()), "gs": stack.enter_context(gs_server(free_port()))}
        if azurite():
            servers["az"] = stack.enter_context(az_server(free_port()))
        found = {scheme: Bucket(scheme, Proxy(server)) for scheme, server in servers.items()}
        for bucket in found.values():
            stack.callback(bucket.proxy.close)
        s3 = {"endpoint_url": f"http://{found['s3'].proxy.address}", "key": "somebody", "secret": "secret", **FEW_TRIES}
        patch.setitem(fsspec.config.conf, "s3", s3)
        gs = {"endpoint_url": f"http://{found['gs'].proxy.address}", "token": "anon"}
        patch.setitem(fsspec.config.conf, "gs", gs)
        if "az" in found:
            az = {"connection_string": azure_account(found["az"].proxy.address)}
            patch.setitem(fsspec.config.conf, "az", az)
        yield found


@pytest.fixture(params=["s3", "gs", "az"])
def bucket(request: pytest.FixtureRequest, buckets: dict[str, Bucket]) -> Iterator[Bucket]:
    """Each kind in turn, without a fault."""
    if request.param not in buckets:
        pytest.skip("needs Azure's emulator: `make azurite`")
    found = buckets[request.param]
    found.proxy.requests.clear()
    yield found
    found.proxy.fault = passing


def stored_rows(store: Store, manifest: Manifest, cache: Path) -> torch.Tensor:
    """All rows of the table as they are stored: uint8 [rows, row_bytes]."""
    table, found = manifest.tables[0], []
    for part in table.parts:
        found.append(torch.empty(part.rows, table.row_bytes, dtype=torch.uint8))
        read_into(store.fetch_part(manifest, part, cache), part, found[-1])
    return torch.cat(found)


def test_a_bucket_holds_what_a_folder_does(bucket: Bucket, source: Path, tmp_path: Path) -> None:
    """What others publish is seen by a store that has looked before: a listing that s3fs remembered hid it."""
    store = Store(bucket.url("whole"))
    assert store.newest() == []
    with pytest.raises(FileNotFoundError, match="nothing is at bucket/whole: import into it"):
        store.catalogue()
    manifest = import_checkpoint(source, bucket.url("whole"), "tiny", part_bytes=PART_BYTES)
    assert manifest.tables == import_checkpoint(source, tmp_path, "tiny", part_bytes=PART_BYTES).tables
    assert store.manifest("tiny") == manifest
    assert torch.equal(stored_rows(store, manifest, tmp_path), get_format("int8").encode(longcat_table()))
    with pytest.raises(ImportRefused, match=r"name taken.*--version 2"):
        import_checkpoint(source, bucket.url("whole"), "tiny")
    import_checkpoint(source, bucket.url("whole"), "tiny", version="2", part_bytes=PART_BYTES)
    assert store.versions("tiny") == ["1", "2"]
    assert [each.version for each in store.catalogue().manifests["tiny"]] == ["1", "2"]


def test_a_version_in_a_bucket_is_made_by_one(
    bucket: Bucket, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what a dead import left is found and removed."""
    store, real = Store(bucket.url("claimed")), RemoteDraft.keep
    import_checkpoint(source, store, "tiny", part_bytes=PART_BYTES)

    def keep(draft: RemoteDraft, part: Part) -> None:
        real(draft, part)
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # that of another machine
        with pytest.raises(ImportRefused, match=r"tiny@2 is being made by .*remove bucket/claimed/tiny/2/.claim"):
            import_checkpoint(source, store, "tiny", version="2", dtype="fp16")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RemoteDraft, "keep", keep)
        import_checkpoint(source, store, "tiny", version="2", part_bytes=PART_BYTES)
    assert store.filesystem.create(store.location("tiny", "2", ".claim"), b"later") != b"later"
    assert find_garbage(store, 1, drafts=True) == []
    monkeypatch.setattr(garbage, "IDLE_HOURS", -1)
    [found] = find_garbage(store, 1, drafts=True)
    assert (found.kind, found.name) == ("draft", "tiny@2") and found.bytes > PART_BYTES // 2
    assert garbage.remove(store, found)
    assert not store.filesystem.exists(store.location("tiny", "2"))
    import_checkpoint(source, store, "tiny", version="2", part_bytes=PART_BYTES)
    [version] = find_garbage(store, 1)
    assert version.name == "tiny@1" and garbage.remove(store, version)
    assert store.versions("tiny") == ["2"] and not store.filesystem.exists(store.location("tiny", "1"))


@pytest.mark.parametrize(
    ("bucket", "fault"),
    [("s3", slow_down), ("s3", hung_up), ("s3", cut_short), ("gs", hung_up), ("gs", hanging)],
    indirect=["bucket"],
)
def test_a_request_that_fails_once_is_made_again(
    bucket: Bucket, source: Path, tmp_path: Path, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gcsfs waits for seconds between tries, so it gets one fault at a time."""
    monkeypatch.setattr(remote, "_SILENT_SECONDS", 0.5)
    url = bucket.url(fault.__name__)
    bucket.proxy.fault = once_for("part-00000", fault)
    manifest = import_checkpoint(source, url, "tiny", part_bytes=PART_BYTES)
    bucket.proxy.fault = once_for("part-00000", fault)
    rows = stored_rows(Store(url), manifest, tmp_path)
    assert torch.equal(rows, get_format("int8").encode(longcat_table()))
    assert len(bucket.sent("GET", "part-00000")) > len(bucket.sent("GET", "part-00001"))


def test_an_import_that_cannot_write_goes_on_later(bucket: Bucket, source: Path, tmp_path: Path) -> None:
    url, write = bucket.url("resumed"), "POST" if bucket.scheme == "gs" else "PUT"
    bucket.proxy.fault = lambda request, ask: forbidden(request, ask) if names(request, "part-00001") else ask()
    with pytest.raises(StoreError, match=rf"^{url}: access is refused .*Finished parts are kept: run the same import"):
        import_checkpoint(source, url, "tiny", part_bytes=PART_BYTES)
    assert Store(url).models() == []
    bucket.proxy.fault = passing
    manifest = import_checkpoint(source, url, "tiny", part_bytes=PART_BYTES)
    assert len(bucket.sent(write, "part-00000")) == 1
    assert torch.equal(stored_rows(Store(url), manifest, tmp_path), get_format("int8").encode(longcat_table()))


def forbidden(request: Request, ask: Callable[[], Answer]) -> Answer:
    """What both kinds of servers say to somebody who may not."""
    s3 = "<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
    gs = json.dumps({"error": {"code": 403, "message": "no permission to storage.objects.create"}})
    return Answer(403, [], (gs if "/storage/" in request.path else s3).encode())


def test_a_bucket_that_is_not_there_is_told_and_not_made(bucket: Bucket, source: Path) -> None:
    """s3fs made one of any name that was mistyped."""
    url = f"{bucket.scheme}://typo/store"
    for call in (lambda: Store(url).catalogue(), lambda: import_checkpoint(source, url, "tiny")):
        with pytest.raises(RemoteStoreError, match=rf"^{url}: the bucket is not there: make it, or correct"):
            call()
    assert not any(request.method in ("PUT", "POST") for request in bucket.proxy.requests)


def line_of(*arguments: str) -> str:
    """What a command says that fails: one line."""
    result = CliRunner().invoke(cli.app, arguments)
    assert isinstance(result.exception, StoreError), result.output
    assert "\n" not in str(result.exception)
    return str(result.exception)


def test_who_has_no_credentials_is_told_how_to_give_them(
    buckets: dict[str, Bucket], source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3 = {"endpoint_url": f"http://{buckets['s3'].proxy.address}", **FEW_TRIES}
    monkeypatch.setitem(fsspec.config.conf, "s3", s3)
    for command in (
        ("inspect", "s3://bucket/store"),
        ("import", str(source), "--store=s3://bucket/store", "--name=tiny"),
        ("up", "--store=s3://bucket/store"),
    ):
        line = line_of(*command)
        assert re.match(r"s3://bucket/store: no credentials \(Unable to locate credentials\): set AWS_ACCESS_KEY", line)
    monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "google_default"})
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/nonexistent/key.json")
    line = line_of("inspect", "gs://bucket/store")
    assert re.match(r"gs://bucket/store: no credentials \(.*key.json.*\): set GOOGLE_APPLICATION_CREDENTIALS", line)
    monkeypatch.setitem(fsspec.config.conf, "az", {})
    assert re.match(
        r"az://bucket/store: no credentials \(.*\): set AZURE_STORAGE_ACCOUNT_NAME",
        line_of("inspect", "az://bucket/store"),
    )


def test_who_is_not_let_in_is_told(bucket: Bucket, source: Path) -> None:
    bucket.proxy.fault = forbidden
    for command in (("inspect", bucket.url("shut")), ("up", f"--store={bucket.url('shut')}")):
        assert re.match(rf"{bucket.url('shut')}: access is refused .*check the credentials, and", line_of(*command))


def test_whose_key_the_server_does_not_know_is_told(
    buckets: dict[str, Bucket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Moto knows no key at all, and asks for one from the first request on."""
    proxy = buckets["s3"].proxy
    Answer.of(proxy.address, "POST", "/moto-api/reset-auth", body=b"0")
    try:
        line = line_of("inspect", "s3://bucket/store")
    finally:
        Answer.of(proxy.address, "POST", "/moto-api/reset-auth", body=b"inf")
    assert re.match(r"s3://bucket/store: access is refused \(.*Access Key Id.*\): check the credentials, and", line)
    if "az" in buckets:
        wrong = azure_account(buckets["az"].proxy.address, key="QUJD")
        monkeypatch.setitem(fsspec.config.conf, "az", {"connection_string": wrong})
        line = line_of("inspect", "az://bucket/store")
        assert re.match(
            r"az://bucket/store: access is refused \(Server failed to authenticate.*\): check the cred", line
        )


def test_a_server_that_is_away_is_told(buckets: dict[str, Bucket], monkeypatch: pytest.MonkeyPatch) -> None:
    away = {"endpoint_url": f"http://127.0.0.1:{free_port()}", "key": "a", "secret": "b", **FEW_TRIES}
    monkeypatch.setitem(fsspec.config.conf, "s3", away)
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)
    line = line_of("inspect", "s3://bucket/store")
    assert re.match(
        r"s3://bucket/store: no answer \(EndpointConnectionError: .*check the network and the address", line
    )


def test_a_bucket_that_hangs_is_told(buckets: dict[str, Bucket], monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes requests and answers none. s3fs tries five times, which is done with one here."""
    assert remote.patience("s3://bucket/store")["s3"]["config_kwargs"]["read_timeout"] == remote._SILENT_SECONDS
    monkeypatch.setattr(remote, "_SILENT_SECONDS", 0.1)
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)
    bucket = buckets["s3"]
    bucket.proxy.fault = hanging
    try:
        line = line_of("inspect", bucket.url("hanging"))
    finally:
        bucket.proxy.fault = passing
    assert re.match(r"s3://bucket/hanging: no answer \(ReadTimeoutError: .*check the network and the address", line)


@pytest.mark.service
def test_a_service_serves_a_bucket_and_starts_again_from_its_cache(
    buckets: dict[str, Bucket], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = buckets["s3"]
    url = bucket.url("served")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{bucket.proxy.address}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("FSSPEC_S3", json.dumps({"config_kwargs": {"read_timeout": 0.5}}))
    bucket.proxy.requests.clear()
    import_checkpoint(source, url, "tiny", dtype="fp32", part_bytes=PART_BYTES)
    ids = torch.arange(0, len(longcat_table()), 7)

    def serves_2(status: control.Status) -> bool:
        return any(each.model.version == "2" and each.serving for each in status.models)

    with cluster(tmp_path, url) as running:
        running.start_shard("a", f"--cache={tmp_path / 'cache'}")
        running.wait_serving()
        with EmbeddingClient(running.controller_address) as client:
            assert torch.equal(client.lookup("tiny/ngram", ids), longcat_table()[ids])
            fetched = len(bucket.sent("GET", "part-"))
            assert fetched
            # A version that comes later is found, though both have listed the model before.
            import_checkpoint(source, url, "tiny", version="2", dtype="fp32", part_bytes=PART_BYTES)
            running.wait_until(serves_2, "version 2")
            bucket.proxy.requests.clear()
            running.processes["a"].end(signal.SIGKILL)
            running.start_shard("a", f"--cache={tmp_path / 'cache'}")
            running.wait_serving()
            assert torch.equal(client.lookup("tiny/ngram", ids), longcat_table()[ids])
            assert not bucket.sent("GET", "part-")
            # It hangs: that is told, and what is served goes on.
            bucket.proxy.fault = hanging
            try:
                running.wait_until(
                    lambda status: any("no answer" in each.message for each in status.problems), "the problem"
                )
                assert torch.equal(client.lookup("tiny/ngram", ids), longcat_table()[ids])
            finally:
                bucket.proxy.fault = passing
