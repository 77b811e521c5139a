"""The bucket as a hospital runs it: its own certificate authority, its own key, and no right beyond those shipped."""

from __future__ import annotations

import datetime
import fnmatch
import ipaddress
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import boto3
import numpy as np
import pytest

from meddam_core import storage
from meddam_core.shards import read_shard
from ray_jobs import fetch_weights, withdraw
from ray_jobs.audit import audit
from ray_jobs.doctor import bucket_findings
from ray_jobs.lease import Lease
from ray_jobs.run_directory import RunDirectory
from tests.cluster.head import ROOT
from tests.conftest import s3_environment
from tests.faults.faulty_s3 import Faults, faulty
from tests.faults.kill_and_resume import MODEL, Job
from tests.ray_jobs.made_shards import make_shards, png

pytestmark = pytest.mark.s3
AWS = ROOT / "cluster/aws"
ONLY_WHEN_SOMETHING_FAILS = {"s3:AbortMultipartUpload", "s3:ListMultipartUploadParts", "s3:ListBucketMultipartUploads"}


@pytest.fixture(scope="module")
def own_authority(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    """(file of an authority that nobody knows, certificate of 127.0.0.1 signed by it, its key)."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    folder = tmp_path_factory.mktemp("authority")
    now = datetime.datetime.now(datetime.UTC)
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    names = [x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, n)]) for n in ("Our own authority", "store")]

    def signed(number: int) -> bytes:
        builder = (
            x509.CertificateBuilder().subject_name(names[number]).issuer_name(names[0])
            .public_key(keys[number].public_key()).serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1)).not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=number == 0, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(keys[number].public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(keys[0].public_key()), critical=False)
        )  # fmt: skip
        if number:
            here = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
            builder = builder.add_extension(here, critical=False)
        return builder.sign(keys[0], hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    plain = serialization.NoEncryption()
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    for name, content in (("ca.pem", signed(0)), ("cert.pem", signed(1)), ("key.pem", keys[1].private_bytes(*form))):
        (folder / name).write_bytes(content)
    return str(folder / "ca.pem"), str(folder / "cert.pem"), str(folder / "key.pem")


@pytest.fixture
def tls_bucket(own_authority: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket behind TLS, whose authority only AWS_CA_BUNDLE knows."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    authority, certificate, key = own_authority
    app = DomainDispatcherApplication(create_backend_app)
    server = make_server("127.0.0.1", 0, app, threaded=True, ssl_context=(certificate, key))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    for name, value in s3_environment(f"https://127.0.0.1:{server.server_port}").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_CA_BUNDLE", authority)
    monkeypatch.setattr(storage, "S3_ATTEMPTS", 1)  # one that is refused is refused again, with growing pauses
    boto3.client("s3").create_bucket(Bucket="behind-tls")
    yield "s3://behind-tls"
    server.shutdown()
    thread.join()


def test_an_authority_of_ones_own_holds_for_all_reading_and_writing(
    tls_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_through_arrow(f"{tls_bucket}/a")
    make_shards(f"{tls_bucket}/set", 1, 3)  # through boto3
    with Lease(f"{tls_bucket}/run"):
        assert storage.exists(f"{tls_bucket}/run/lease")
    (shard,) = storage.list_objects(f"{tls_bucket}/set/")
    assert storage.read_bytes(f"{tls_bucket}/a") == b"through arrow" and len(list(read_shard(shard.uri))) == 3
    monkeypatch.delenv("AWS_CA_BUNDLE")
    for refused in (storage.list_objects, storage.check_writable):
        with pytest.raises(storage.StorageError, match="certificate is not trusted here; set AWS_CA_BUNDLE"):
            refused(f"{tls_bucket}/set")


def write_through_arrow(uri: str) -> None:
    """As Ray Data writes part files."""
    filesystem, path = storage.open_uri(uri)
    with filesystem.open_output_stream(path) as stream:
        stream.write(b"through arrow")


def encrypted(bucket: str) -> tuple[str, dict[str, Any]]:
    """Gives the bucket the encryption that is shipped; returns the key, and the answers for all of its objects."""
    rules = json.loads((AWS / "bucket-encryption.json").read_text())
    name = bucket.removeprefix("s3://")
    boto3.client("s3").put_bucket_encryption(Bucket=name, ServerSideEncryptionConfiguration=rules)
    return rules["Rules"][0]["ApplyServerSideEncryptionByDefault"]["KMSMasterKeyID"], answers(bucket)


def answers(bucket: str) -> dict[str, Any]:
    client, name = boto3.client("s3"), bucket.removeprefix("s3://")
    listed = client.list_objects_v2(Bucket=name).get("Contents", [])
    return {o["Key"]: client.head_object(Bucket=name, Key=o["Key"]) for o in listed}


def test_whatever_is_written_is_encrypted_with_the_hospitals_key(s3_bucket: str) -> None:
    before = [f for f in bucket_findings(f"{s3_bucket}/runs") if f.about == "encryption"]
    assert before[0].state == "warning" and "bucket-encryption.json" in (before[0].todo or "")
    key, _ = encrypted(s3_bucket)
    write_through_arrow(f"{s3_bucket}/a")
    make_shards(f"{s3_bucket}/set", 1, 3)
    with Lease(f"{s3_bucket}/run"):
        found = {k: o for k, o in answers(s3_bucket).items() if not k.endswith("/")}  # a folder's mark is older
    assert {"a", "run/lease"} < set(found) and len(found) >= 3
    assert {(o["ServerSideEncryption"], o["SSEKMSKeyId"]) for o in found.values()} == {("aws:kms", key)}
    after = [f for f in bucket_findings(f"{s3_bucket}/runs") if f.about == "encryption"]
    assert after[0].state == "ok" and f"aws:kms with the key that ends in {key[-6:]}" in after[0].said


def action(method: str, path: str) -> tuple[str, str, str | None]:
    """(right, key or "", prefix) that AWS asks for a request by (Service Authorization Reference, Amazon S3)."""
    parts = urlsplit(path)
    _, _, key = unquote(parts.path).lstrip("/").partition("/")
    query = parse_qs(parts.query, keep_blank_values=True)
    if not key:
        if "uploads" in query:
            return "s3:ListBucketMultipartUploads", "", query.get("prefix", [""])[0]
        return "s3:ListBucket", "", query["prefix"][0] if "prefix" in query else None
    if method == "GET" and "uploadId" in query:
        return "s3:ListMultipartUploadParts", key, None
    if method == "DELETE" and "uploadId" in query:
        return "s3:AbortMultipartUpload", key, None
    rights = {"GET": "s3:GetObject", "HEAD": "s3:GetObject", "DELETE": "s3:DeleteObject"}
    return rights.get(method, "s3:PutObject"), key, None


def allowed(policy: dict[str, Any], right: str, resource: str, prefix: str | None) -> bool:
    for statement in policy["Statement"]:
        resources = statement["Resource"]
        resources = [resources] if isinstance(resources, str) else resources
        if right not in statement["Action"] or not any(fnmatch.fnmatchcase(resource, r) for r in resources):
            continue
        condition = statement.get("Condition", {}).get("StringLikeIfExists", {}).get("s3:prefix")
        if condition is None or prefix is None or any(fnmatch.fnmatchcase(prefix, c) for c in condition):
            return True
    return False


KEY_ID, ENCRYPTION = "s3:x-amz-server-side-encryption-aws-kms-key-id", "s3:x-amz-server-side-encryption"


def denied(policy: dict[str, Any], right: str, context: dict[str, str]) -> list[str]:
    """Statements that refuse a request, by AWS's rules: a condition's parts are joined by "and", and what is compared
    with a fact that the request does not have is unequal to it, with IfExists or without.
    """
    tests = {
        "Null": lambda name, value: (name not in context) == (value == "true"),
        "Bool": lambda name, value: context.get(name) == value,
        "StringNotEquals": lambda name, value: context.get(name) != value,
        "StringNotEqualsIfExists": lambda name, value: context.get(name) != value,
    }
    return [
        s["Sid"] for s in policy["Statement"]
        if s["Effect"] == "Deny" and (s["Action"] == "s3:*" or right in s["Action"])
        and all(tests[how](n, v) for how, part in s["Condition"].items() for n, v in part.items())
    ]  # fmt: skip


def test_a_bucket_takes_what_names_no_key_or_its_own_and_nothing_else() -> None:
    policy = json.loads((AWS / "bucket-policy.json").read_text())
    rules = json.loads((AWS / "bucket-encryption.json").read_text())["Rules"][0]["ApplyServerSideEncryptionByDefault"]
    ours = rules["KMSMasterKeyID"]
    (inside,) = (s for s in policy["Statement"] if s["Sid"] == "OnlyFromInside")
    endpoint = {"aws:SourceVpce": inside["Condition"]["StringNotEquals"]["aws:SourceVpce"]}
    usual = endpoint | {"aws:SecureTransport": "true"}
    named = {ENCRYPTION: "aws:kms", KEY_ID: ours}
    for sent, refused in (
        ({}, []), (named, []), ({ENCRYPTION: "AES256"}, ["NoEncryptionWithoutOurKey"]),
        ({ENCRYPTION: "aws:kms"}, ["NoEncryptionWithoutOurKey"]), (named | {KEY_ID: ours[:-1] + "1"}, ["NoOtherKey"]),
        ({"s3:x-amz-server-side-encryption-customer-algorithm": "AES256"}, ["NoKeyOfTheSender"]),
    ):  # fmt: skip
        assert denied(policy, "s3:PutObject", usual | sent) == refused, sent
    assert denied(policy, "s3:PutObject", usual | {"aws:SecureTransport": "false"}) == ["OnlyOverTls"]
    for right in ("s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:GetObjectVersion", "s3:DeleteObjectVersion"):
        assert denied(policy, right, {"aws:SecureTransport": "true"}) == ["OnlyFromInside"]
    assert denied(policy, "s3:ListBucket", {"aws:SecureTransport": "true"}) == []


def test_our_writers_name_no_key(s3_bucket: str, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a policy that asks for one in each request would refuse every run."""
    key, _ = encrypted(s3_bucket)
    assert key
    with faulty(s3_endpoint, Faults()) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        write_through_arrow(f"{s3_bucket}/runs/a")
        make_shards(f"{s3_bucket}/set", 1, 3)
        with Lease(f"{s3_bucket}/runs/one"):
            pass
        sent = set(server.headers)
    assert sent and not any(name.startswith("x-amz-server-side-encryption") for name in sent)


def refusals(policy: str, bucket: str, asked: dict[tuple[str, str], int]) -> list[tuple[str, str, str | None]]:
    """Requests that a role with one of the shipped policies may not make."""
    rules = json.loads((AWS / f"{policy}.json").read_text().replace("BUCKET", bucket))
    used = {action(method, path) for method, path in asked}
    return [
        (right, name, prefix) for right, name, prefix in sorted(used, key=str)
        if not allowed(rules, right, f"arn:aws:s3:::{bucket}" + (f"/{name}" if name else ""), prefix)
    ]  # fmt: skip


def test_who_writes_and_withdraws_datasets_has_rights_for_that(
    s3_bucket: str, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = s3_bucket.removeprefix("s3://")
    with faulty(s3_endpoint, Faults()) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        shards = make_shards(f"{s3_bucket}/set/one", 2, 6)  # what an ingest writes,
        storage.check_writable(shards)
        storage.write_bytes(f"{shards}/_work/salt", b"1")
        filesystem, work = storage.open_uri(f"{shards}/_work")
        filesystem.delete_dir(work)  # and clears away
        image = next(iter(read_shard(storage.list_objects(f"{shards}/")[0].uri)))
        found = withdraw.run(withdraw.Config(places=(shards,), patient_key=image.patient_key))
        asked = dict(server.asked)
    assert found.num_images and refusals("data-policy", bucket, asked) == []
    assert {right for right, *_ in refusals("role-policy", bucket, asked)} == {"s3:DeleteObject", "s3:PutObject"}


@pytest.mark.slow
def test_who_ingests_has_rights_to_read_the_source_out_of_the_bucket(
    s3_bucket: str, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = s3_bucket.removeprefix("s3://")
    lines = [{"image": f"{i}.png", "box": [8, 8, 40, 40], "label": "nodule"} for i in range(4)]
    for i in range(4):
        storage.write_bytes(f"{s3_bucket}/source/films/{i}.png", png(np.full((64, 64, 3), 50 * i, np.uint8)))
    storage.write_bytes(f"{s3_bucket}/source/films/list.jsonl", "\n".join(map(json.dumps, lines)).encode())
    with faulty(s3_endpoint, Faults()) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        command = [
            sys.executable, "-m", "ray_jobs.ingest", "manifest", f"{s3_bucket}/source/films/list.jsonl", "--out",
            f"{s3_bucket}/set/films", "--num-cpus", "2",
        ]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
        asked = dict(server.asked)
    assert done.returncode == 0 and "4 images" in done.stdout, done.stdout + done.stderr
    assert any(action(*request)[1].startswith("source/") for request in asked)
    assert refusals("data-policy", bucket, asked) == []
    assert "s3:GetObject" in {right for right, *_ in refusals("role-policy", bucket, asked)}, "a run reads no source"


def test_the_endpoint_may_fetch_its_weights_and_nothing_else(
    s3_bucket: str, s3_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = s3_bucket.removeprefix("s3://")
    for file in (f for f in Path(MODEL).rglob("*") if f.is_file()):
        storage.write_bytes(f"{s3_bucket}/weights/DAM-3B/{file.relative_to(MODEL)}", file.read_bytes())
    with faulty(s3_endpoint, Faults()) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        source = f"{s3_bucket}/weights/DAM-3B"
        assert fetch_weights.run(fetch_weights.Config(source=source, target=tmp_path / "DAM-3B")).copied
        assert refusals("weights-policy", bucket, server.asked) == []
        storage.list_objects(f"{s3_bucket}/set/")
        asked = dict(server.asked)
    assert refusals("weights-policy", bucket, asked) == [("s3:ListBucket", "", "set/")]


@pytest.mark.slow
def test_a_run_needs_the_rights_that_are_shipped_and_no_others(
    s3_bucket: str, s3_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, _ = encrypted(s3_bucket)
    make_shards(f"{s3_bucket}/set", 2, 20)
    with faulty(s3_endpoint, Faults()) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        job = Job(f"{s3_bucket}/set", ["--engine", "benchmarks.waiting_engine:WaitingEngine"])
        for log in (tmp_path / "first", tmp_path / "again"):
            assert job.start(f"{s3_bucket}/runs/one", log).wait() == 0, log.read_text()
        assert audit(RunDirectory(f"{s3_bucket}/runs/one")).clean
        asked = dict(server.asked)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    bucket = s3_bucket.removeprefix("s3://")
    policy = json.loads((AWS / "role-policy.json").read_text().replace("BUCKET", bucket))
    used = {action(method, path) for method, path in asked}
    assert refusals("role-policy", bucket, asked) == []
    granted = {a for s in policy["Statement"] for a in s["Action"] if a.startswith("s3:")}
    assert granted - {right for right, _, _ in used} <= ONLY_WHEN_SOMETHING_FAILS, "a right that no run uses"
    written = {n: o for n, o in answers(s3_bucket).items() if n.startswith("runs/")}
    assert len(written) > 5 and {o.get("SSEKMSKeyId") for o in written.values()} == {key}
