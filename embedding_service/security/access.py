"""What a client shows a secured service, and which servers it believes."""

from __future__ import annotations

import hashlib
import os
import threading
import time
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import grpc

from embedding_service.errors import InvalidRequest
from embedding_service.security.files import Stamp, read, stamp_of
from embedding_service.wire import embedding_pb2 as wire

if TYPE_CHECKING:
    from embedding_service.security.certificates import Pair

# Each means what the argument of this name does, where that is not given.
TLS_VARIABLE, TOKEN_VARIABLE, TOKEN_FILE_VARIABLE = (
    "EMBEDDING_SERVICE_TLS",
    "EMBEDDING_SERVICE_TOKEN",
    "EMBEDDING_SERVICE_TOKEN_FILE",
)
# Names of files in a folder of credentials.
_FILES = {"ca": "ca.crt", "certificate": "tls.crt", "key": "tls.key", "token_file": "token"}
# Seconds that a proof is used, of those that it counts.
_PROOF_SECONDS = 200.0


@dataclass(frozen=True)
class Access:
    """Files, and perhaps a token. They are read again whenever a connection is made, or a call begins.

    Attributes:
        ca: PEM of the authorities that vouch for servers, and for the routing's signature.
        certificate, key: PEM of the client's own certificate.
        token_file: A file with a bearer token.
        token: A bearer token, in place of the file's.
    """

    ca: Path
    certificate: Path | None = None
    key: Path | None = None
    token_file: Path | None = None
    token: str | None = None

    def stamp(self) -> Stamp:
        """What changes when a connection must be made again to show the files as they are now."""
        return stamp_of([path for path in (self.ca, self.certificate, self.key) if path])

    def authorities(self) -> bytes:
        """The content of `ca`. Raises InvalidRequest."""
        return read(self.ca)

    def check_routing(self, routing: wire.Routing, known: tuple[int, int]) -> None:
        """Refuse a routing that is not the controller's (`routing.check_routing`). Raises Unauthenticated."""
        from embedding_service.security.routing import check_routing  # with cryptography

        check_routing(routing, known, self.authorities())

    def credentials(self) -> grpc.ChannelCredentials:
        """For a new connection. Raises InvalidRequest naming a file that cannot be read."""
        _need_packages()
        pair = self._pair()
        channel = grpc.ssl_channel_credentials(self.authorities(), *(reversed(pair) if pair else ()))
        if not (self.token or self.token_file or self.certificate):
            return channel
        return grpc.composite_channel_credentials(channel, grpc.metadata_call_credentials(Shown(self)))

    def prove(self, host: str) -> str:
        """A token that proves to a server at this host whose certificate it is. Raises InvalidRequest, ValueError."""
        from embedding_service.security.proofs import prove

        pair = self._pair()
        assert pair
        return prove(host, *pair)

    def _pair(self) -> Pair | None:
        if not (self.certificate and self.key):
            return None
        from embedding_service.security.certificates import current_pair

        return current_pair(self.certificate, self.key)


class Shown(grpc.AuthMetadataPlugin):
    """Adds the token of the moment to each call. Thread-safe."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self._lock = threading.Lock()
        self._stamp: Stamp | None = None
        self._made = 0.0
        self._headers: dict[str, str] = {}

    def __call__(self, context: Any, callback: Any) -> None:
        """See the base class."""
        try:
            header = self.header(urlsplit(context.service_url).hostname or "")
        except (InvalidRequest, ValueError) as error:
            callback((), error)
        else:
            callback((("authorization", header),), None)

    def header(self, host: str) -> str:
        """The metadata `authorization` for a server at this host. Raises InvalidRequest, ValueError."""
        access = self._access
        if access.token:
            return f"Bearer {access.token}"
        if not (access.token_file or access.certificate):
            return ""
        paths = [access.token_file] if access.token_file else [access.certificate, access.key]
        stamp, now = stamp_of([path for path in paths if path]), time.monotonic()
        with self._lock:
            if stamp != self._stamp or (not access.token_file and now - self._made > _PROOF_SECONDS):
                self._headers, self._stamp, self._made = {}, stamp, now
            if host not in self._headers:
                self._headers[host] = f"Bearer {self._make(host)}"
            return self._headers[host]

    def _make(self, host: str) -> str:
        access = self._access
        if access.token_file:
            return read(access.token_file).decode(errors="replace").strip()
        return access.prove(host)


def near_host(boot_id: str, path: str) -> str:
    """The host that a proof is for, at a near socket: none that a certificate may name, and another for each socket."""
    return "near-" + hashlib.sha256(f"{boot_id} {path}".encode()).hexdigest()


def access_of(tls: str | os.PathLike[str] | bool | Access | None, token: str | None) -> Access | None:
    """What a client's arguments mean. None: plain text.

    Args:
        tls: A folder with ca.crt, and perhaps tls.crt with tls.key, and token. Or the authority's file alone. Or a
            TOML file with the keys ca, certificate, key, token, token_file. None: what EMBEDDING_SERVICE_TLS says,
            plain text without it. False: plain text.
        token: A bearer token. None: what EMBEDDING_SERVICE_TOKEN or EMBEDDING_SERVICE_TOKEN_FILE says.

    Raises:
        InvalidRequest: Names what cannot be, and the remedy.
    """
    if isinstance(tls, Access):
        return tls
    file = None if token else os.environ.get(TOKEN_FILE_VARIABLE)
    given = token
    token = token or (None if file else os.environ.get(TOKEN_VARIABLE)) or None
    if tls is None:
        tls = os.environ.get(TLS_VARIABLE) or False
    if tls is True:
        raise InvalidRequest("tls must be a folder or a file with the authority's certificate, such as ca.crt")
    if tls is False:
        if given:
            raise InvalidRequest("a token is sent over TLS only: give tls, a folder or a file with ca.crt")
        return None
    access = _read_access(Path(tls))
    if token:
        access = replace(access, token=token, token_file=None)
    elif file:
        access = replace(access, token=None, token_file=Path(file))
    if access.token and not (access.token.isascii() and access.token.isprintable()):
        raise InvalidRequest("a token has printable ASCII characters only")
    return access


def _read_access(path: Path) -> Access:
    if path.is_dir():
        found = {name: path / file for name, file in _FILES.items() if (path / file).is_file()}
        if "ca" not in found:
            raise InvalidRequest(f"{path} has no ca.crt: tls must name a folder with the authority's certificate")
        return Access(found.pop("ca"), found.get("certificate"), found.get("key"), found.get("token_file"))
    content = read(path)
    if b"-----BEGIN" in content:
        return Access(path)
    try:
        about = tomllib.loads(content.decode())
        unknown = set(about) - {*_FILES, "token"}
        if "ca" not in about or unknown or not all(isinstance(each, str) for each in about.values()):
            raise ValueError(f"its keys are ca, certificate, key, token, token_file, got {', '.join(about) or 'none'}")
    except ValueError as error:
        raise InvalidRequest(f"{path} is neither a certificate nor a file of credentials: {error}") from None
    token = about.pop("token", None)
    files = {name: path.parent / file for name, file in about.items()}
    return Access(files["ca"], files.get("certificate"), files.get("key"), files.get("token_file"), token)


def _need_packages() -> None:
    try:
        import cryptography  # noqa: F401
        import jwt  # noqa: F401
    except ImportError as error:
        raise InvalidRequest(f"TLS needs {error.name}: pip install 'embedding-service[tls]'") from None
