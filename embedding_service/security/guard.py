"""Finds out whose a call is. A process has one guard for all of its ports."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from embedding_service.errors import InvalidRequest, Unauthenticated
from embedding_service.security import proofs, tokens
from embedding_service.security.certificates import names_in
from embedding_service.security.files import Reloaded, read
from embedding_service.security.identity import Caller, Credential
from embedding_service.security.policy import Identity, Policy, read_policy
from embedding_service.security.quotas import Quota

log = logging.getLogger(__name__)
T = TypeVar("T")

# Seconds between two looks at the files. What is revoked is refused within two seconds, on open streams too.
LOOK_SECONDS = 0.5
# Tokens that are remembered. What is beyond that is checked at each call.
MOST_KNOWN = 10_000
# Bytes of a token.
MOST_TOKEN = 8 << 10

HEADER, SCHEME = "authorization", "bearer "
MISSING = (
    "UNAUTHENTICATED: the call shows nobody's right. Commands take --tls or --token-file, Python's client tls= or "
    "token=; others send the metadata 'authorization' as 'Bearer TOKEN'"
)
_UNSAID = "the process that passed the call on did not say whose it is"


class Guard:
    """Knows the policy, and whose tokens and certificates are. Thread-safe.

    Args:
        policy: The policy file.
        authorities: PEM of who vouches for certificates. None: nobody does.
        certificate: PEM of the server's own certificate. None: it has none, and takes no proofs.

    Raises:
        InvalidRequest: A file cannot be read or is not right.
    """

    def __init__(self, policy: Path, authorities: Path | None = None, certificate: Path | None = None) -> None:
        def complain(error: Exception) -> None:
            log.error("the files of before go on counting: %s", error)

        self._policy = Reloaded([policy], lambda: read_policy(policy), complain)
        self._issuer: Reloaded[tokens.Issuer | None] = self._read_issuer(complain)
        self._authorities = _content(authorities, lambda content: content, b"", complain)
        nobody: tuple[str, ...] = ()
        self._own = _content(certificate, names_in, nobody, complain)
        self._complain = complain
        self._known: dict[tuple[bytes, str], Credential] = {}
        self._callers: dict[Credential, Caller] = {}
        self._quotas: dict[str, Quota] = {}
        self._listeners: list[Callable[[], object]] = []
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def _read_issuer(self, complain: Callable[[Exception], None]) -> Reloaded[tokens.Issuer | None]:
        about = self._policy.now.jwt
        if about is None:
            return Reloaded([], lambda: None)
        return Reloaded(
            [about.jwks], lambda: tokens.Issuer.read(read(about.jwks), about.issuer, about.audience), complain
        )

    def watch(self, listener: Callable[[], object]) -> None:
        """Call `listener` regularly, on a thread of the guard's, so that open calls are looked at again."""
        self._listeners.append(listener)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="guard", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Let the thread end."""
        self._ended.set()
        if self._thread:
            self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(LOOK_SECONDS):
            try:
                self.look()
                for listener in self._listeners:
                    listener()
            except Exception:
                log.exception("looking at the policy failed")

    def look(self) -> None:
        """Take in what changed in the files."""
        changed = self._policy.look()
        if changed:
            try:
                self._issuer = self._read_issuer(self._complain)
            except InvalidRequest as error:
                self._complain(error)
        if self._issuer.look() | self._authorities.look() | self._own.look() | changed:
            self._known, self._callers = {}, {}
            for name, identity in self._policy.now.identities.items():
                if name in self._quotas:
                    self._quotas[name].limit(identity)
            log.info("the policy was read again")

    def caller(
        self, bearer: str | None, certificate: bytes | None = None, passed_on: str | None = None, near: str = ""
    ) -> Caller:
        """Whose a call is.

        Args:
            bearer: The metadata `authorization`.
            certificate: PEM, as TLS verified it.
            passed_on: The identity that a process of this service found. Empty if it named none.
            near: The host that a proof has to be for, in place of those of the server's certificate.

        Raises:
            Unauthenticated: Nobody's. The message says what is missing, or does not count.
        """
        if passed_on is not None:
            if not passed_on:
                raise Unauthenticated(_UNSAID)
            return self._find(Credential(identity=passed_on))
        if certificate is not None:
            names = names_in(certificate) if certificate else ()
            if not names:
                raise Unauthenticated("the connection shows no certificate with a name")
            return self._find(Credential(names=names))
        if bearer is None:
            raise Unauthenticated(MISSING)
        return self._find(self._of_bearer(bearer, near))

    def again(self, caller: Caller) -> Caller:
        """Who that is by now. Raises Unauthenticated for one that is nobody any more."""
        return self._find(caller.credential)

    def _of_bearer(self, bearer: str, near: str) -> Credential:
        token = bearer[len(SCHEME) :].strip()
        if bearer[: len(SCHEME)].lower() != SCHEME or not token or len(token) > MOST_TOKEN:
            raise Unauthenticated("the metadata 'authorization' must be 'Bearer TOKEN'")
        digest = hashlib.sha256(token.encode()).digest()
        known = self._known
        credential = known.get((digest, near))
        if credential is None:
            credential = self._check(token, digest, near)
            if len(known) < MOST_KNOWN:
                known[digest, near] = credential
        return credential

    def _check(self, token: str, digest: bytes, near: str) -> Credential:
        if not tokens.is_jwt(token):
            return Credential(digest=digest)
        if proofs.is_proof(token):
            if not self._authorities.now:
                raise Unauthenticated("certificates do not count here: send a token of the policy")
            names, until = proofs.check_proof(token, self._authorities.now, (near,) if near else self._own.now)
            return Credential(names=names, until=until)
        if self._issuer.now is None:
            raise Unauthenticated("the token does not count: the policy has no table [jwt]")
        subject, until = self._issuer.now.check(token)
        return Credential(subject=subject, until=until)

    def _find(self, credential: Credential) -> Caller:
        callers = self._callers
        caller = callers.get(credential)
        if caller is None:
            policy: Policy = self._policy.now
            name = credential.found_in(policy)
            if name is None:
                raise Unauthenticated("the policy knows nobody with this token or certificate")
            caller = Caller(name, policy.identities[name], credential, self._quota(name, policy.identities[name]))
            if len(callers) < MOST_KNOWN:
                callers[credential] = caller
        if caller.expired:
            raise Unauthenticated("the token has expired: send a newer one")
        return caller

    def _quota(self, name: str, identity: Identity) -> Quota | None:
        """One for all that an identity shows. It stays when the policy changes."""
        if name in self._quotas or identity.is_limited:
            return self._quotas.setdefault(name, Quota(name, identity))
        return None


def _content(
    path: Path | None, made: Callable[[bytes], T], none: T, complain: Callable[[Exception], None]
) -> Reloaded[T]:
    """What is made of a file's content. `none` where there is no file."""
    return Reloaded([path], lambda: made(read(path)), complain) if path else Reloaded([], lambda: none)
