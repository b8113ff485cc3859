"""The policy file: who may do what. Absent is denied.

[identities.workers]
subjects = ["system:serviceaccount:models:worker"]      # whose they are: certificates, tokens, subjects
read = ["longcat*", "qwen@2"]                           # models: read, publish, train
rights = ["metrics"]                                    # of the service: member, admin, metrics
calls = 64                                              # quotas of each process: also rows_per_second, bytes_per_second

[jwt]
jwks = "jwks.json"
issuer = "https://kubernetes.default.svc.cluster.local"
audience = "embedding-service"
"""

from __future__ import annotations

import hashlib
import hmac
import tomllib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, PositiveInt, StringConstraints, ValidationError

from embedding_service.errors import InvalidRequest
from embedding_service.foreign import one_line, printable

# What may be done with a model, and what with the service.
ModelRight = Literal["read", "publish", "train"]
ServiceRight = Literal["member", "admin", "metrics"]
MODEL_RIGHTS: tuple[ModelRight, ...] = ("read", "publish", "train")
SERVICE_RIGHTS: tuple[ServiceRight, ...] = ("member", "admin", "metrics")
MOST_BYTES = 1 << 20

Digest = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]
Pattern = Annotated[str, StringConstraints(min_length=1, max_length=300)]


class Identity(BaseModel):
    """Who somebody may be, and what they may do then.

    Attributes:
        certificates: Patterns of URI and DNS names. One of a certificate's names has to match.
        tokens: SHA-256 of opaque bearer tokens, as "sha256:" and 64 hexadecimal digits.
        subjects: Patterns of the claim `sub` of JSON web tokens.
        rights: Of the service.
        read, publish, train: Patterns of models. One without "@" is for all versions.
        calls: The most that may be open at a time, in each process. None: any number.
        rows_per_second, bytes_per_second: The most that lookups may take, in each process. None: any number.
        tokens_per_second: The most that a worker's replica reads and writes for it. None: any number.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    certificates: tuple[Pattern, ...] = ()
    tokens: tuple[Digest, ...] = ()
    subjects: tuple[Pattern, ...] = ()
    rights: tuple[ServiceRight, ...] = ()
    read: tuple[Pattern, ...] = ()
    publish: tuple[Pattern, ...] = ()
    train: tuple[Pattern, ...] = ()
    calls: PositiveInt | None = None
    rows_per_second: PositiveInt | None = None
    bytes_per_second: PositiveInt | None = None
    tokens_per_second: PositiveInt | None = None

    @property
    def is_limited(self) -> bool:
        """Whether it has a quota."""
        limits = (self.calls, self.rows_per_second, self.bytes_per_second, self.tokens_per_second)
        return any(limit is not None for limit in limits)

    def has(self, right: str) -> bool:
        """Whether it has a right of the service, or a right for some model."""
        return right in self.rights or bool(right in MODEL_RIGHTS and self.models(right))

    def models(self, right: str) -> tuple[str, ...]:
        """The patterns of models that it has a right for. Members read all: they hold them."""
        found: tuple[str, ...] = getattr(self, right)
        return ("*",) if right == "read" and "member" in self.rights else found

    def may(self, right: str, model: str) -> bool:
        """Whether it has a right for a model, NAME or NAME@VERSION."""
        name = model.partition("@")[0]
        return any(fnmatchcase(model if "@" in each else name, each) for each in self.models(right))


class Jwt(BaseModel):
    """Whose JSON web tokens count: those of `issuer` for `audience`, by the keys in the file `jwks`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    jwks: Path
    issuer: Pattern
    audience: Pattern


class Policy(BaseModel):
    """A whole policy. Identities by their names."""

    model_config = ConfigDict(extra="forbid", frozen=True, ignored_types=(cached_property,))

    identities: dict[Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]{1,100}$")], Identity] = {}
    jwt: Jwt | None = None

    @cached_property
    def _digests(self) -> Sequence[tuple[bytes, str]]:
        pairs = [(digest, name) for name, each in self.identities.items() for digest in each.tokens]
        return [(bytes.fromhex(digest.removeprefix("sha256:")), name) for digest, name in pairs]

    def of_token(self, digest: bytes) -> str | None:
        """The identity of an opaque token, by the token's SHA-256. All are compared, in constant time."""
        found = None
        for known, name in self._digests:
            if hmac.compare_digest(known, digest):
                found = name
        return found

    def of_names(self, names: Sequence[str]) -> str | None:
        """The first identity that one of a certificate's names matches."""
        return self._first("certificates", names)

    def of_subject(self, subject: str) -> str | None:
        """The first identity that a token's subject matches."""
        return self._first("subjects", (subject,))

    def _first(self, kind: str, names: Sequence[str]) -> str | None:
        for identity, each in self.identities.items():
            if any(fnmatchcase(name, pattern) for pattern in getattr(each, kind) for name in names):
                return identity
        return None


def read_policy(path: Path) -> Policy:
    """A policy file. Raises InvalidRequest naming the file, the field and the remedy."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"the policy {path} cannot be read ({error.strerror}): give another --policy") from None
    if len(content) > MOST_BYTES:
        raise InvalidRequest(f"the policy {path} is larger than {MOST_BYTES:,} bytes")
    try:
        policy = Policy.model_validate(tomllib.loads(content.decode()))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the policy {path} is no TOML: {one_line(error)}") from None
    except ValidationError as error:
        fault = error.errors()[0]
        where = printable(".".join(str(each) for each in fault["loc"]))
        raise InvalidRequest(f"the policy {path} is not right at {where}: {printable(fault['msg'])}") from None
    if policy.jwt:
        jwks = path.parent / policy.jwt.jwks
        policy = policy.model_copy(update={"jwt": policy.jwt.model_copy(update={"jwks": jwks})})
    return policy


def digest_of(token: str) -> str:
    """The SHA-256 of a token, in hexadecimal digits."""
    return hashlib.sha256(token.encode()).hexdigest()
