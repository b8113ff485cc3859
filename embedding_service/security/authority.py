"""A local authority, for one machine: its certificates and an admin's token, in a folder of the user's alone."""

from __future__ import annotations

import datetime
import ipaddress
import os
import re
import secrets
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from embedding_service.errors import InvalidRequest
from embedding_service.security.policy import digest_of

# As cert-manager names them in a Secret.
CERTIFICATE, KEY, AUTHORITY = "tls.crt", "tls.key", "ca.crt"
TOKEN, POLICY = "token", "policy.toml"
URI = "spiffe://embedding-service"
AUTHORITY_DAYS, CERTIFICATE_DAYS = 3650, 397

_POLICY = """\
# Who may do what. docs/security.md explains it. Changes count within two seconds, without a restart.

[identities.members]
certificates = ["{uri}/controller", "{uri}/shard/*"]
rights = ["member"]

[identities.admin]
tokens = ["sha256:{digest}"]
certificates = ["{uri}/admin"]
rights = ["admin", "metrics"]
read = ["*"]
publish = ["*"]
train = ["*"]
"""


class Authority:
    """Signs certificates of members and clients.

    Args:
        certificate: Its own.
        key: The private key of that.
    """

    def __init__(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        self._certificate, self._key = certificate, key

    @classmethod
    def create(cls, name: str = "embedding-service", days: int = AUTHORITY_DAYS) -> Authority:
        """A new one, with a key of its own."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        usage = _usage(key_cert_sign=True, crl_sign=True)
        builder = _builder(subject, subject, key, -1, days)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        builder = builder.add_extension(usage, critical=True)
        builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        return cls(builder.sign(key, hashes.SHA256()), key)

    @classmethod
    def load(cls, folder: Path) -> Authority:
        """The one that `save` wrote. Raises OSError, ValueError."""
        certificate = x509.load_pem_x509_certificate((folder / AUTHORITY).read_bytes())
        key = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        return cls(certificate, key)

    def save(self, folder: Path) -> None:
        """Write its certificate and its key."""
        write_private(folder / AUTHORITY, self.pem)
        write_private(folder / "ca.key", _key_pem(self._key))

    @property
    def pem(self) -> bytes:
        """Its certificate."""
        return self._certificate.public_bytes(serialization.Encoding.PEM)

    def issue(self, folder: Path, names: Sequence[str], *, begins: float = -1, days: float = CERTIFICATE_DAYS) -> None:
        """Write a certificate of these names with a new key, and the authority's own, as cert-manager would.

        Args:
            folder: Where the three files go.
            names: URIs, addresses and DNS names.
            begins: Days from now on when it becomes valid.
            days: How long it is valid, from now on.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        # Another name than the authority's, or the certificate would look like one that signed itself.
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0][-64:])])
        builder = _builder(subject, self._certificate.subject, key, begins, days)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        builder = builder.add_extension(_usage(digital_signature=True), critical=True)
        both = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        builder = builder.add_extension(x509.ExtendedKeyUsage(both), critical=False)
        builder = builder.add_extension(x509.SubjectAlternativeName([_name(each) for each in names]), critical=False)
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        builder = builder.add_extension(issuer, critical=False)
        certificate = builder.sign(self._key, hashes.SHA256())
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_private(folder / AUTHORITY, self.pem)
        write_private(folder / CERTIFICATE, certificate.public_bytes(serialization.Encoding.PEM))
        write_private(folder / KEY, _key_pem(key))


def prepare_folder(folder: Path, hosts: Sequence[str], members: Sequence[str]) -> None:
    """Make the folder of `up --secure`: authority, certificates, policy and an admin's token. What is there stays.

    Certificates are made again each time, for they belong to this start: `hosts` may have changed.

    Args:
        folder: Its mode becomes 0700.
        hosts: Addresses and names of this machine that clients connect to.
        members: "controller", and the ids of the shards.

    Raises:
        InvalidRequest: The folder is no such folder, or others may write to it.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    if not (folder / "ca.key").exists():
        if any(folder.iterdir()):
            raise InvalidRequest(f"{folder} holds other files and no authority of this service: give another --secure")
        Authority.create().save(folder)
        token = new_token()
        write_private(folder / TOKEN, token.encode())
        write_private(folder / POLICY, _POLICY.format(uri=URI, digest=digest_of(token)).encode())
    try:
        authority = Authority.load(folder)
    except (OSError, ValueError, AssertionError) as error:
        raise InvalidRequest(f"{folder} holds no authority that can be read ({error}): give another --secure") from None
    for member in members:
        kind = member if member == "controller" else f"shard/{member}"
        authority.issue(folder / member, [f"{URI}/{kind}", *([] if member == kind else [member]), *hosts])
    client = folder / "client"
    client.mkdir(mode=0o700, exist_ok=True)
    write_private(client / AUTHORITY, authority.pem)
    write_private(client / TOKEN, (folder / TOKEN).read_bytes())


def new_token() -> str:
    """An opaque token that nobody can guess."""
    return f"es-{secrets.token_urlsafe(32)}"


def write_private(path: Path, content: bytes) -> None:
    """Replace a file that only this user may read, at once."""
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with open(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:  # noqa: PTH123
        file.write(content)
    scratch.replace(path)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, begins: float, days: float
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now + datetime.timedelta(days=begins))
    return builder.not_valid_after(now + datetime.timedelta(days=days))


def _usage(**given: bool) -> x509.KeyUsage:
    names = ["digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"]
    names += ["key_cert_sign", "crl_sign", "encipher_only", "decipher_only"]
    return x509.KeyUsage(**{name: given.get(name, False) for name in names})


def _name(name: str) -> x509.GeneralName:
    if "://" in name:
        return x509.UniformResourceIdentifier(name)
    try:
        return x509.IPAddress(ipaddress.ip_address(name.strip("[]")))
    except ValueError:
        if not re.fullmatch(r"(\*\.)?[A-Za-z0-9_.-]{1,253}", name):
            raise InvalidRequest(f"{name!r} cannot be a name of a certificate") from None
        return x509.DNSName(name)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    kind, none = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, kind, none)
