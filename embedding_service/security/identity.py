"""Whose a call is, and what its caller may do."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from embedding_service.errors import PermissionDenied
from embedding_service.security.policy import MODEL_RIGHTS, Identity, Policy
from embedding_service.security.quotas import Quota

# Models of which a caller's right is remembered.
_REMEMBERED = 1024


@dataclass(frozen=True)
class Credential:
    """What a call showed, once it was found to count.

    Attributes:
        digest: SHA-256 of an opaque token.
        names: Of a certificate.
        subject: Of a JSON web token.
        identity: What a process of this service says. Only a private socket's word counts.
        until: Seconds since 1970 until which it counts.
    """

    digest: bytes = b""
    names: tuple[str, ...] = ()
    subject: str = ""
    identity: str = ""
    until: float = math.inf

    def found_in(self, policy: Policy) -> str | None:
        """The identity that a policy gives it. None: it is nobody's."""
        if self.identity:
            return self.identity if self.identity in policy.identities else None
        if self.digest:
            return policy.of_token(self.digest)
        if self.names:
            return policy.of_names(self.names)
        return policy.of_subject(self.subject) if self.subject else None


@dataclass(eq=False)
class Caller:
    """Whose a call is.

    Attributes:
        name: In the policy.
        rights: What the policy gives it.
        credential: What it showed.
        quota: What it may take. None: any amount.
    """

    name: str
    rights: Identity
    credential: Credential
    quota: Quota | None = None
    _reads: dict[str, bool] = field(default_factory=dict)

    @property
    def reads_all(self) -> bool:
        """Whether it may read every model."""
        return "*" in self.rights.models("read")

    def may_read(self, model: str, version: str) -> bool:
        """Whether it may read a version of a model."""
        key = f"{model}@{version}"
        known = self._reads.get(key)
        if known is None:
            known = self.rights.may("read", key)
            if len(self._reads) < _REMEMBERED:
                self._reads[key] = known
        return known

    def require(self, rights: Sequence[str], what: str) -> None:
        """Raise PermissionDenied, naming the right and what needs it, unless it has one of these rights."""
        if not any(self.rights.has(right) for right in rights):
            asked = " or ".join(f"{right} of a model" if right in MODEL_RIGHTS else right for right in rights)
            missing = f"the policy does not give it {asked}" if rights else "nobody has"
            raise PermissionDenied(f"{self.name} has no right to {what}: {missing}")

    def spend(self, rows: int, nbytes: int) -> None:
        """It is about to be answered rows. Raises QuotaExceeded."""
        if self.quota:
            self.quota.spend(rows, nbytes)

    def give_back(self, rows: int, nbytes: int) -> None:
        """It was not answered them after all."""
        if self.quota:
            self.quota.give_back(rows, nbytes)

    @property
    def expired(self) -> bool:
        """Whether what it showed counts no more."""
        return self.credential.until < time.time()
