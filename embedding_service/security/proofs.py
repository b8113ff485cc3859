"""Statements that a certificate's key signs: JSON web tokens with the certificate in their header `x5c`.

gRPC's servers for Python ask all clients for certificates, or none. A port that takes bearer tokens asks none. There
the holder of a certificate sends a short-lived token that its key signed. It names the host that it is for, so who gets
it cannot use it elsewhere. A routing is signed in the same way.
"""

from __future__ import annotations

import base64
import binascii
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jwt
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.exceptions import PyJWTError

from embedding_service.errors import InvalidRequest, Unauthenticated
from embedding_service.foreign import one_line
from embedding_service.security.certificates import covers, current_pair, names_of, verify

# Seconds that a proof counts, and that two clocks may differ.
LIFETIME, LEEWAY = 300, 60
# Certificates between one and its authority.
MOST_CHAIN = 4


def sign(claims: dict[str, Any], certificate: bytes, key: bytes) -> str:
    """A token with these claims.

    Args:
        claims: JSON.
        certificate: PEM, with those between it and its authority.
        key: PEM of its private key.

    Raises:
        ValueError: A file is no PEM of its kind.
    """
    chain = x509.load_pem_x509_certificates(certificate)
    private: Any = serialization.load_pem_private_key(key, None)
    if private.public_key() != chain[0].public_key():
        raise ValueError("the key is not the certificate's")
    der = [each.public_bytes(serialization.Encoding.DER) for each in chain[:MOST_CHAIN]]
    headers = {"x5c": [base64.b64encode(each).decode() for each in der]}
    return jwt.encode(claims, private, _algorithm(private.public_key()), headers=headers)


def prove(host: str, certificate: bytes, key: bytes) -> str:
    """A token that proves to a server, by the host it is reached by, who sends it. Raises ValueError."""
    now = int(time.time())
    return sign({"aud": host, "iat": now, "exp": now + LIFETIME}, certificate, key)


def is_proof(token: str) -> bool:
    """Whether a token says that it was signed by a certificate's key."""
    try:
        return "x5c" in jwt.get_unverified_header(token)
    except PyJWTError:
        return False


def check_proof(token: str, authorities: bytes, own: Sequence[str]) -> tuple[tuple[str, ...], float]:
    """The names of the certificate whose holder sent it, and until when it counts.

    `own`: the names of the server's certificate, of which the token has to be for one. Raises Unauthenticated.
    """
    names, claims = check(token, authorities, time.time())
    begin, end = claims["iat"], claims.get("exp")
    if type(begin) is not int or type(end) is not int or not time.time() - LEEWAY <= end <= begin + LIFETIME:
        raise Unauthenticated(f"the proof has expired, or counts for more than {LIFETIME} s: send a newer one")
    if not covers(own, str(claims.get("aud"))):
        raise Unauthenticated("the proof is for another server")
    if end < begin:
        raise Unauthenticated("the proof ends before it begins")
    return names, float(end) + LEEWAY


def check(token: str, authorities: bytes, when: float | None = None) -> tuple[tuple[str, ...], dict[str, Any]]:
    """What a certificate's key signed: the names of the certificate, and the claims.

    Args:
        token: As `sign` makes it.
        authorities: PEM of those that may vouch for the certificate.
        when: Seconds since 1970 at which the certificate has to be valid; None: when the token was signed.

    Raises:
        Unauthenticated: Says why it does not count.
    """
    try:
        header = jwt.get_unverified_header(token)
        chain = [base64.b64decode(each, validate=True) for each in header["x5c"][:MOST_CHAIN]]
        if when is None:
            when = float(jwt.decode(token, options={"verify_signature": False})["iat"])
        leaf = verify(chain, authorities, when)
        public: Any = leaf.public_key()
        options: Any = {"require": ["iat"], "verify_aud": False, "verify_exp": False}
        claims = jwt.decode(token, public, [_algorithm(public)], leeway=LEEWAY, options=options)
    except (PyJWTError, KeyError, TypeError, ValueError, OverflowError, AttributeError, binascii.Error) as error:
        raise Unauthenticated(f"the token does not count: {one_line(error)}") from None
    return names_of(leaf), claims


def _algorithm(public: Any) -> str:
    """By the kind of the key, never by what a token says."""
    if isinstance(public, ec.EllipticCurvePublicKey):
        sizes = {256: "ES256", 384: "ES384", 521: "ES512"}
        if public.curve.key_size in sizes:
            return sizes[public.curve.key_size]
    if isinstance(public, ed25519.Ed25519PublicKey):
        return "EdDSA"
    if isinstance(public, rsa.RSAPublicKey):
        return "RS256"
    raise ValueError("a certificate's key must be of a NIST curve, of Ed25519 or of RSA")


class Signer:
    """Signs by a certificate and a key in files, which may be replaced."""

    def __init__(self, certificate: Path, key: Path) -> None:
        self._certificate, self._key = certificate, key

    def sign(self, claims: dict[str, Any]) -> str:
        """See `sign`. Raises InvalidRequest naming the files."""
        try:
            return sign(claims, *current_pair(self._certificate, self._key))
        except ValueError as error:
            raise InvalidRequest(f"{self._certificate} and {self._key} cannot sign: {one_line(error)}") from None
