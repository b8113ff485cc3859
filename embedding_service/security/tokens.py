"""Bearer tokens of others: JSON web tokens, such as Kubernetes' projected service-account tokens."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any

import jwt
from jwt.exceptions import PyJWTError

from embedding_service.errors import InvalidRequest, Unauthenticated
from embedding_service.foreign import one_line

# What a public key may be used with. "none" and shared secrets are not among them.
ALGORITHMS = ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]
LEEWAY = 30


@dataclass(frozen=True)
class Issuer:
    """Who issues tokens.

    Attributes:
        keys: Its public keys, by their ids.
        name: The claim `iss` that its tokens have to have.
        audience: The claim `aud` that its tokens have to have.
    """

    keys: dict[str, Any]
    name: str
    audience: str

    @classmethod
    def read(cls, jwks: bytes, name: str, audience: str) -> Issuer:
        """From a JWKS file's content. Raises InvalidRequest."""
        try:
            found = jwt.PyJWKSet.from_dict(json.loads(jwks)).keys
            keys = {each.key_id or "": each.key for each in found if each.key_type in ("RSA", "EC", "OKP")}
        except (PyJWTError, ValueError, TypeError, AttributeError, KeyError) as error:
            raise InvalidRequest(f"the JWKS file cannot be read: {one_line(error)}") from None
        if not keys:
            raise InvalidRequest("the JWKS file has no public key")
        return cls(keys, name, audience)

    def check(self, token: str) -> tuple[str, float]:
        """Whose a token is (its claim `sub`), and until when it counts. Raises Unauthenticated."""
        try:
            key_id = jwt.get_unverified_header(token).get("kid", "")
            if key_id not in self.keys:
                raise Unauthenticated("the token does not count: its key is not in the JWKS file")
            claims = jwt.decode(
                token,
                self.keys[key_id],
                ALGORITHMS,
                issuer=self.name,
                audience=self.audience,
                leeway=LEEWAY,
                options={"require": ["exp", "iss", "aud", "sub"]},
            )
        except (PyJWTError, TypeError, ValueError) as error:
            raise Unauthenticated(f"the token does not count: {one_line(error)}") from None
        return str(claims["sub"]), min(float(claims["exp"]) + LEEWAY, time.time() + 1e9)


def is_jwt(token: str) -> bool:
    """Whether it has the form of a JSON web token."""
    return token.count(".") == 2 and token.startswith("ey")
