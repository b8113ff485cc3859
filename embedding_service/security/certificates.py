"""Certificates: whose they are, whether an authority vouches for them, and their keys."""

from __future__ import annotations

import datetime
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from embedding_service.errors import InvalidRequest, Unauthenticated
from embedding_service.foreign import one_line
from embedding_service.security.files import Reloaded, Unmatched, read


class Pair(NamedTuple):
    """PEM of a certificate, with those between it and its authority, and of its private key."""

    certificate: bytes
    key: bytes


def read_pair(certificate: Path, key: Path) -> Pair:
    """What two files hold. Raises InvalidRequest naming them, and Unmatched if the key is another one's."""
    pair = Pair(read(certificate), read(key))
    try:
        own = x509.load_pem_x509_certificate(pair.certificate).public_key()
        matches = serialization.load_pem_private_key(pair.key, None).public_key() == own
    except (ValueError, TypeError) as error:
        raise InvalidRequest(f"{certificate} and {key} do not count: {one_line(error)}") from None
    if not matches:
        raise Unmatched(f"{key} is not the key of {certificate}: give files that belong together")
    return pair


def current_pair(certificate: Path, key: Path) -> Pair:
    """What two files hold now. While they do not match or cannot be read, what they held before.

    Raises InvalidRequest where nothing was there before.
    """
    kept = _kept(certificate, key)
    kept.look()
    return kept.now


@functools.lru_cache(maxsize=256)
def _kept(certificate: Path, key: Path) -> Reloaded[Pair]:
    return Reloaded((certificate, key), functools.partial(read_pair, certificate, key))


def names_of(certificate: x509.Certificate) -> tuple[str, ...]:
    """Its URIs, DNS names and addresses. A certificate without a SAN has none."""
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ()
    names: list[str] = found.get_values_for_type(x509.UniformResourceIdentifier)
    names += found.get_values_for_type(x509.DNSName)
    return (*names, *(str(each) for each in found.get_values_for_type(x509.IPAddress)))


@functools.lru_cache(maxsize=256)
def names_in(pem: bytes) -> tuple[str, ...]:
    """`names_of` of a certificate as TLS gave it, which has been verified then."""
    return names_of(x509.load_pem_x509_certificate(pem))


def verify(chain: Sequence[bytes], authorities: bytes, when: float) -> x509.Certificate:
    """The first certificate of a chain, if an authority vouches for it as a client's.

    Args:
        chain: DER, its own first, then those between it and an authority.
        authorities: PEM.
        when: Seconds since 1970 at which it has to be valid.

    Raises:
        Unauthenticated: Says why it does not count.
    """
    try:
        leaf, *between = [x509.load_der_x509_certificate(each) for each in chain]
        store = Store(x509.load_pem_x509_certificates(authorities))
        time = datetime.datetime.fromtimestamp(when, datetime.UTC).replace(tzinfo=None)
        PolicyBuilder().store(store).time(time).build_client_verifier().verify(leaf, between)
    except (VerificationError, ValueError, OverflowError) as error:
        raise Unauthenticated(f"the certificate does not count: {one_line(error)}") from None
    return leaf


def covers(names: Sequence[str], host: str) -> bool:
    """Whether a certificate is one of a host, as it is or by a wildcard of DNS."""
    dns, host = [name.lower() for name in names if "://" not in name], host.strip("[]").lower()
    return host in dns or ("." in host and f"*.{host.partition('.')[2]}" in dns)


def speaks_for(names: Sequence[str], shard: str) -> bool:
    """Whether a certificate is the one of a shard.

    Its names hold the id: as a name, as the first label of a name, by a wildcard, or as the last piece of a URI.
    """
    known, shard = [name.lower() for name in names], shard.lower()
    return any(
        name.endswith(f"/{shard}") if "://" in name else name == shard or name.startswith((f"{shard}.", "*."))
        for name in known
    )


def stands_for(names: Sequence[str], host: str, shard: str) -> bool:
    """Whether a shard's certificate may speak for this address and this shard id.

    Its names hold the host, as it is or by a wildcard of DNS, and it `speaks_for` the id.
    """
    return covers(names, host) and speaks_for(names, shard)
