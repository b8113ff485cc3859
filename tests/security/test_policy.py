"""Policies, tokens and proofs, without any server."""

from __future__ import annotations

import hashlib
import json
import math
import time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st
from support.security import write_policy

from embedding_service.errors import InvalidRequest, PermissionDenied, Unauthenticated
from embedding_service.security import proofs
from embedding_service.security.access import near_host
from embedding_service.security.authority import Authority, prepare_folder
from embedding_service.security.certificates import stands_for
from embedding_service.security.guard import Guard
from embedding_service.security.identity import Credential
from embedding_service.security.policy import MODEL_RIGHTS, SERVICE_RIGHTS, Identity, Policy, digest_of, read_policy
from embedding_service.security.server import Files, Security
from embedding_service.shard.server import near_rights

NAMES = st.text("ab@*?[]", max_size=6)


@given(patterns=st.lists(NAMES.filter(bool), max_size=4), model=NAMES)
def test_s4_a_right_for_a_model_is_one_of_its_patterns_and_absent_is_denied(patterns: list[str], model: str) -> None:
    identity = Identity(read=tuple(patterns))
    name = model.partition("@")[0]
    expected = [each for each in patterns if fnmatchcase(model if "@" in each else name, each)]
    assert identity.may("read", model) is bool(expected)
    assert not identity.may("publish", model) and not identity.may("train", model)
    assert not any(identity.has(right) for right in SERVICE_RIGHTS)


@given(st.lists(st.tuples(st.sampled_from(MODEL_RIGHTS), st.sampled_from(["a", "a@1", "b", "*"])), max_size=4))
def test_s4_every_right_is_its_own(rights: list[tuple[str, str]]) -> None:
    models = {right: [model for kind, model in rights if kind == right] for right in MODEL_RIGHTS}
    identity = Identity.model_validate(models)
    for right in MODEL_RIGHTS:
        for name, version in (("a", "1"), ("a", "2"), ("b", "1")):
            meant = {(right, name), (right, f"{name}@{version}"), (right, "*")} & set(rights)
            assert identity.may(right, f"{name}@{version}") is bool(meant)


@given(tokens=st.dictionaries(st.text(min_size=1), st.sampled_from("abc"), max_size=6), other=st.text())
def test_s3_a_token_is_found_by_its_digest_alone(tokens: dict[str, str], other: str) -> None:
    held: dict[str, list[str]] = {}
    for token, name in tokens.items():
        held.setdefault(name, []).append(f"sha256:{digest_of(token)}")
    policy = Policy(identities={name: Identity(tokens=tuple(digests)) for name, digests in held.items()})
    for token in (*tokens, other):
        assert policy.of_token(hashlib.sha256(token.encode()).digest()) == tokens.get(token)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[identities.a]\nread = 3", "identities.a.read"),
        ("[identities.a]\nrights = ['root']", "identities.a.rights.0"),
        ("[identities.a]\ntokens = ['secret']", "identities.a.tokens.0"),
        ("[identities.a]\nreads = ['*']", "identities.a.reads"),
        ("[identities.'a b']\n", "identities"),
        ("[jwt]\njwks = 'x'", "jwt.issuer"),
        ("identities = [", "no TOML"),
        ("\x00", "no TOML"),
    ],
)
def test_a_policy_that_is_not_right_names_the_field(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(text)
    with pytest.raises(InvalidRequest, match=said) as raised:
        read_policy(path)
    assert "\n" not in str(raised.value) and str(path) in str(raised.value)


def test_s4_a_policy_that_changes_counts_and_one_that_is_broken_does_not(tmp_path: Path) -> None:
    authority = _authority(tmp_path)
    policy = write_policy(tmp_path, {"a": {"tokens": ["one"], "read": ["m"]}})
    guard = Guard(policy, *authority)
    caller = guard.caller("Bearer one")
    assert caller.name == "a" and caller.may_read("m", "1") and not caller.may_read("n", "1")
    with pytest.raises(PermissionDenied, match="admin"):
        caller.require(["admin"], "anything")
    policy.write_text("nonsense [")
    guard.look()
    assert guard.caller("bearer one").name == "a"
    write_policy(tmp_path, {"b": {"tokens": ["two"], "read": ["n"]}})
    guard.look()
    with pytest.raises(Unauthenticated):
        guard.again(caller)
    with pytest.raises(Unauthenticated):
        guard.caller("Bearer one")
    assert guard.caller("Bearer two").name == "b"


def test_s4_patterns_for_everybody_are_not_for_nobody(tmp_path: Path) -> None:
    """Neither a call that no process said whose it is, nor a certificate without a name, nor a token of nobody."""
    everybody = {"all": {"subjects": ["*"], "certificates": ["*"], "rights": ["member"]}}
    guard = Guard(write_policy(tmp_path, everybody), *_authority(tmp_path))
    assert guard.caller(None, passed_on="all").name == "all"
    nameless = Authority.create().pem  # an authority's own certificate has no name
    for shown in ({"passed_on": ""}, {"passed_on": "*"}, {"certificate": b""}, {"certificate": nameless}):
        with pytest.raises(Unauthenticated):
            guard.caller(None, **shown)
    for empty in (Credential(), Credential(subject="")):
        assert empty.found_in(read_policy(tmp_path / "policy.toml")) is None


def test_n5_a_policy_that_changes_for_others_leaves_a_near_client_where_it_is(tmp_path: Path) -> None:
    one = {"tokens": ["one"], "read": ["m"]}
    prepare_folder(tmp_path, ["127.0.0.1"], ["s"])
    own, policy = tmp_path / "s", write_policy(tmp_path, {"a": one})
    security = Security(Files(own / "tls.crt", own / "tls.key", own / "ca.crt", policy, tmp_path / "audit"))
    before = near_rights(security, "near", "Bearer one")
    write_policy(tmp_path, {"a": one, "b": {"tokens": ["two"]}})
    security.guard.look()
    assert near_rights(security, "near", "Bearer one") == before
    for bearer in ("", "Bearer three", "Bearer two"):
        with pytest.raises(Unauthenticated if bearer != "Bearer two" else PermissionDenied):
            near_rights(security, "near", bearer)
    denied = [json.loads(line) for line in (tmp_path / "audit").read_text().splitlines()]
    assert [(each["who"], each["method"]) for each in denied] == [
        (who, "near rows") for who in ("nobody", "nobody", "b")
    ]
    write_policy(tmp_path, {"a": {**one, "read": ["n"]}})
    security.guard.look()
    assert near_rights(security, "near", "Bearer one") != before


@pytest.mark.parametrize(
    "bearer", [None, "", "Bearer", "Bearer ", "Basic one", "Bearer \x00", "Bearer " + "x" * 10_000]
)
def test_s3_what_is_no_token_is_nobody(tmp_path: Path, bearer: str | None) -> None:
    guard = Guard(write_policy(tmp_path, {"a": {"tokens": ["one"]}}), *_authority(tmp_path))
    with pytest.raises(Unauthenticated):
        guard.caller(bearer)


def test_s3_a_json_web_token_counts_by_its_issuers_keys_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    public = jwt.algorithms.ECAlgorithm.to_jwk(ours.public_key(), as_dict=True)
    (tmp_path / "jwks.json").write_text(json.dumps({"keys": [{**public, "kid": "k", "use": "sig", "alg": "ES256"}]}))
    about = {"jwks": "jwks.json", "issuer": "https://i", "audience": "us"}
    policy = write_policy(tmp_path, {"w": {"subjects": ["system:*"], "read": ["*"]}}, about)
    guard = Guard(policy, *_authority(tmp_path))
    now = int(time.time())
    right: dict[str, Any] = {"iss": "https://i", "aud": ["us", "x"], "sub": "system:w", "exp": now + 60}

    def bearer(key: Any = ours, algorithm: str = "ES256", kid: str = "k", **other: Any) -> str:
        claims = {name: value for name, value in {**right, **other}.items() if value is not None}
        return "Bearer " + jwt.encode(claims, key, algorithm, headers={"kid": kid})

    assert guard.caller(bearer()).name == "w"
    point = ours.public_key().public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)
    wrong = [bearer(theirs), bearer(kid="z"), bearer(iss="https://other"), bearer(aud="them"), bearer(exp=now - 60)]
    wrong += [bearer(exp=None), bearer(sub=None), bearer(sub="other"), bearer(nbf=now + 600)]
    wrong += [bearer(point, "HS256"), bearer("", "none"), bearer()[:-3] + "AAA"]
    for each in wrong:
        with pytest.raises(Unauthenticated):
            guard.caller(each)
    token = bearer()
    caller = guard.caller(token)
    assert guard.again(caller) is caller
    monkeypatch.setattr(time, "time", lambda: now + 100.0)
    for ask in (lambda: guard.caller(token), lambda: guard.again(caller)):  # it is known, and expires all the same
        with pytest.raises(Unauthenticated, match="has expired"):
            ask()


def test_s3_a_proof_counts_for_the_certificates_names_and_not_of_another_authority(tmp_path: Path) -> None:
    authority, other = Authority.create(), Authority.create()
    authority.issue(tmp_path / "shard", ["spiffe://x/shard/a", "localhost"])
    authority.issue(tmp_path / "old", ["spiffe://x/shard/a"], begins=-2, days=-1)
    other.issue(tmp_path / "false", ["spiffe://x/shard/a"])
    policy = write_policy(tmp_path, {"members": {"certificates": ["spiffe://x/shard/*"], "rights": ["member"]}})
    guard = Guard(policy, tmp_path / "shard" / "ca.crt", tmp_path / "shard" / "tls.crt")

    def files(name: str) -> tuple[bytes, bytes]:
        return (tmp_path / name / "tls.crt").read_bytes(), (tmp_path / name / "tls.key").read_bytes()

    assert guard.caller("Bearer " + proofs.prove("localhost", *files("shard"))).name == "members"
    now = int(time.time())
    wrong = [proofs.prove("localhost", *files(name)) for name in ("old", "false")]
    wrong.append(proofs.prove("another-shard", *files("shard")))  # as a shard would use one that it was sent
    right = {"aud": "localhost", "iat": now, "exp": now + 60}
    false: list[dict[str, Any]] = [{"exp": now + 99_999}, {"iat": now - 999, "exp": now - 900}, {"aud": ["localhost"]}]
    false += [{"exp": "1"}, {"exp": None}, {"iat": now, "exp": now - 3}]
    odd: list[Any] = [str(now), "now", float(now), math.inf, math.nan, [now], {}, None, True]
    false += [{"iat": each} for each in odd]
    wrong += [proofs.sign({**right, **claims}, *files("shard")) for claims in false]
    # With the shard's certificate, which everybody may see, but not signed by its key, or signed for something else.
    head, _, mark = proofs.sign(right, *files("shard")).split(".")
    _, body, other_mark = proofs.sign({**right, "exp": now + 61}, *files("false")).split(".")
    wrong += [f"{head}.{body}.{each}" for each in (mark, other_mark, "")]
    for token in wrong:
        with pytest.raises(Unauthenticated):
            guard.caller(f"Bearer {token}")
    near, other_near = near_host("a boot", "/run/a"), near_host("a boot", "/run/b")
    of_near = "Bearer " + proofs.prove(near, *files("shard"))
    assert guard.caller(of_near, near=near).name == "members"
    of_all = [(of_near, ""), (of_near, other_near), ("Bearer " + proofs.prove("localhost", *files("shard")), near)]
    for bearer, host in of_all:  # what one was sent counts nowhere else
        with pytest.raises(Unauthenticated, match="another server"):
            guard.caller(bearer, near=host)
    with pytest.raises(ValueError, match="not the certificate's"):
        proofs.prove("x", files("shard")[0], files("false")[1])


@pytest.mark.parametrize(
    ("names", "host", "shard", "right"),
    [
        (["spiffe://x/shard/a", "localhost", "127.0.0.1"], "127.0.0.1", "a", True),
        (["spiffe://x/shard/a", "localhost"], "localhost", "b", False),
        (["spiffe://x/shard/a", "localhost"], "elsewhere", "a", False),
        (["*.shards.ns.svc"], "shards-0.shards.ns.svc", "shards-0", True),
        (["*.shards.ns.svc"], "shards-0.other.ns.svc", "shards-0", False),
        (["shards-0.shards.ns.svc"], "shards-0.shards.ns.svc", "shards-1", False),
        (["a", "::1"], "[::1]", "a", True),
        ([], "a", "a", False),
    ],
)
def test_s6_a_certificate_speaks_for_its_own_shard(names: list[str], host: str, shard: str, right: bool) -> None:
    assert stands_for(names, host, shard) is right


def _authority(folder: Path) -> tuple[Path, Path]:
    Authority.create().issue(folder / "own", ["localhost"])
    return folder / "own" / "ca.crt", folder / "own" / "tls.crt"
