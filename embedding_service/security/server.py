"""A server's side: its certificate, and whom it lets in."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import grpc
from cryptography import x509

from embedding_service.errors import EmbeddingServiceError, InvalidRequest
from embedding_service.foreign import one_line
from embedding_service.security.access import Access
from embedding_service.security.audit import Audit
from embedding_service.security.certificates import read_pair
from embedding_service.security.files import Reloaded, Unmatched, read
from embedding_service.security.guard import Guard
from embedding_service.security.identity import Caller

log = logging.getLogger(__name__)


class Files(NamedTuple):
    """What secures a process: PEM of its certificate, its key and the authorities it believes, and the policy.

    `audit`: where it notes who was denied and more. None: nowhere.
    """

    certificate: Path
    key: Path
    ca: Path
    policy: Path
    audit: Path | None = None

    @property
    def access(self) -> Access:
        """What it shows others of the service."""
        return Access(self.ca, self.certificate, self.key)


class Security:
    """Who may do what in a process. That TLS is 1.3 alone is said in `__main__`, before grpc is imported.

    Attributes:
        files: What it was made of.
        guard: Finds out whose a call is.
        audit: Where to note what is done to models.

    Raises:
        InvalidRequest: Names a file that cannot be read, or is not right.
    """

    def __init__(self, files: Files) -> None:
        self.files = files
        self._pair = Reloaded(files[:3], self._read, _complain)
        self._context = Reloaded(files[:2], self._make_context, _complain)
        self.audit = Audit(files.audit)
        self.guard = Guard(files.policy, files.ca, files.certificate)

    def credentials(self, members: bool) -> grpc.ServerCredentials:
        """Of a port. gRPC asks for the files at each handshake. `members`: clients have to have a certificate."""
        seen = self._pair.now

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            nonlocal seen
            self._pair.look()
            if self._pair.now is seen:
                return None
            seen = self._pair.now
            return seen

        return grpc.dynamic_ssl_server_credentials(seen, fetch, members)

    def context(self) -> ssl.SSLContext:
        """Of TLS for what is no gRPC, by the files as they are now."""
        self._context.look()
        return self._context.now

    def _make_context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        try:
            context.load_cert_chain(self.files.certificate, self.files.key)
        except ssl.SSLError as error:
            raise Unmatched(f"{self.files.certificate} and {self.files.key} do not count: {one_line(error)}") from None
        return context

    def admit(
        self,
        rights: tuple[str, ...] | None,
        path: bytes,
        *,
        bearer: str | bytes | None = None,
        certificate: Callable[[], bytes | None] | None = None,
        passed_on: str | None = None,
        near: str = "",
        peer: str = "",
    ) -> Caller | None:
        """Whose a new call is. None where it may be anybody's.

        Args:
            rights: Of which its method needs one (`methods.RIGHTS`).
            path: The method's.
            bearer: The metadata `authorization`.
            certificate: The client's, at a port that asks for one, where nothing else counts.
            passed_on: The identity that another process of this shard found.
            near: The host that a proof has to be for, in place of those of this process.
            peer: Whose connection it is.

        Raises:
            Unauthenticated, PermissionDenied: Says what is missing.
        """
        if rights == ("anybody",):
            return None
        if isinstance(bearer, bytes):
            bearer = bearer.decode(errors="replace")
        caller = None
        try:
            caller = self.guard.caller(bearer, certificate() or b"" if certificate else None, passed_on, near)
            _require(caller, rights, path)
        except EmbeddingServiceError as error:
            self._denied(caller, path, error, peer)
            raise
        return caller

    def again(self, caller: Caller, rights: tuple[str, ...] | None, path: bytes) -> Caller:
        """Who the caller of an open call is by now. Raises Unauthenticated, PermissionDenied."""
        try:
            now = self.guard.again(caller)
            if now is not caller:
                _require(now, rights, path)
        except EmbeddingServiceError as error:
            self._denied(caller, path, error, "")
            raise
        return now

    def _denied(self, caller: Caller | None, path: bytes, error: Exception, peer: str) -> None:
        who = caller.name if caller else "nobody"
        self.audit.note("denied", who, method=path.decode(errors="replace")[1:], peer=peer, why=str(error))

    def _read(self) -> grpc.ServerCertificateConfiguration:
        certificate, key = read_pair(self.files.certificate, self.files.key)
        ca = read(self.files.ca)
        try:
            x509.load_pem_x509_certificates(ca)
        except ValueError as error:
            raise InvalidRequest(f"{self.files.ca} does not count: {one_line(error)}") from None
        return grpc.ssl_server_certificate_configuration([(key, certificate)], ca)


def _require(caller: Caller, rights: tuple[str, ...] | None, path: bytes) -> None:
    if rights != ("known",):
        caller.require(rights or (), f"call {path.decode(errors='replace')[1:]}")


def _complain(error: Exception) -> None:
    log.error("the certificate of before is used on: %s", error)
