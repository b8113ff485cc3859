"""What pods are handed to show and to believe: cert-manager's certificates, and tokens of service accounts."""

from __future__ import annotations

import json
import secrets
import tempfile
import time
from pathlib import Path

import jwt
from cryptography.hazmat.primitives.asymmetric import ec
from support.kustomize import Manifest

from embedding_service.security.authority import Authority

ISSUER = "https://kubernetes.default.svc.cluster.local"


class CertManager:
    """Issues what Certificates ask for."""

    def __init__(self) -> None:
        self._authority = Authority.create()

    def issue(self, certificate: Manifest) -> dict[str, bytes]:
        """The content of its Secret, with a new key each time."""
        spec = certificate["spec"]
        with tempfile.TemporaryDirectory() as folder:
            self._authority.issue(Path(folder), [*spec["uris"], *spec["dnsNames"]], days=1)
            return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


class TokenIssuer:
    """Signs tokens of service accounts, as the API server does."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())

    def jwks(self) -> bytes:
        """What `kubectl get --raw /openid/v1/jwks` says."""
        public = json.loads(jwt.algorithms.ECAlgorithm.to_jwk(self._key.public_key()))
        return json.dumps({"keys": [{**public, "kid": "one", "use": "sig", "alg": "ES256"}]}).encode()

    def token(self, namespace: str, account: str, audience: str, seconds: int) -> bytes:
        """A projected one."""
        now = int(time.time())
        claims = {
            "iss": ISSUER,
            "sub": f"system:serviceaccount:{namespace}:{account}",
            "aud": [audience],
            "iat": now,
            "exp": now + seconds,
            "jti": secrets.token_hex(8),
        }
        return jwt.encode(claims, self._key, "ES256", {"kid": "one"}).encode()
