"""Files on S3 or disk by URI: `s3://bucket/key`, `file:///path` or a plain path.

S3 takes its endpoint from AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL, its region and credentials from the usual AWS chain,
a certificate authority of your own from AWS_CA_BUNDLE, and a proxy from HTTPS_PROXY or HTTP_PROXY less NO_PROXY.
A whole object appears at once or not at all: on S3 by nature, on disk by writing beside it and renaming.
"""

from __future__ import annotations

import io
import os
import time
import uuid
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import pyarrow.fs as pafs

S3_ATTEMPTS = 8
"""Of one request: a store that throttles answers 503 for seconds."""
PUT_BYTES = 64 << 20
"""Larger objects go up in parts, which the store joins at the end: one request carries 5 GB at most."""
REFUSALS = (
    "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "AccessDenied", "ACCESS_DENIED", "Forbidden",
    "(403)", "status 403",
)  # fmt: skip
UNTRUSTED = (
    "CERTIFICATE_VERIFY_FAILED",
    "SSL validation failed",
    "SSL peer certificate",
    "curlCode: 60",
    "curlCode: 77",
)


class StorageError(ValueError):
    """A place that cannot be read or written, with what to do about it."""


class BucketError(OSError):
    """A bucket that did not take an object, after all attempts: where, why, and what to do about it."""


def is_s3(uri: str) -> bool:
    """Whether the URI names an object store."""
    return uri.startswith("s3://")


def join(uri: str, *parts: str) -> str:
    """`uri` with further path parts, whatever its scheme."""
    return "/".join([uri.rstrip("/"), *(p.strip("/") for p in parts)])


def s3_endpoint() -> str | None:
    """The S3-compatible endpoint to use instead of AWS, if one is set."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


def s3_region() -> str | None:
    """The region that the environment names; boto3 by itself reads the second of the two variables only."""
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or None


def s3_client(attempts: int | None = None, timeout_s: float = 60.0) -> Any:
    """boto3's client for the same endpoint and region that pyarrow is given here, and as patient.

    Made anew each time, which takes milliseconds: the environment decides. No lock stands around it, which Ctrl-C could
    leave closed; many threads that made their first at once have been tried.

    Args:
        attempts: of one request, at most; by default S3_ATTEMPTS.
        timeout_s: of one attempt to connect, and of a silence after that.
    """
    import boto3
    from botocore.config import Config

    config = Config(
        retries={"mode": "standard", "total_max_attempts": attempts or S3_ATTEMPTS}, connect_timeout=timeout_s,
        read_timeout=timeout_s,
    )  # fmt: skip
    return boto3.client("s3", endpoint_url=s3_endpoint(), region_name=s3_region(), config=config)


def open_uri(uri: str) -> tuple[pafs.FileSystem, str]:
    """The pyarrow filesystem of a URI and the path within it.

    Raises ValueError for an unknown scheme or a bucketless URI.
    """
    scheme = urlsplit(uri).scheme if "://" in uri else ""
    if scheme == "s3":
        path = uri.removeprefix("s3://").rstrip("/")
        if not path or path.startswith("/"):
            raise ValueError(f"{uri!r} names no bucket; write s3://BUCKET/PREFIX")
        return _s3_filesystem(), path
    if scheme in ("file", ""):
        return pafs.LocalFileSystem(), str(Path(uri.removeprefix("file://")).expanduser().resolve())
    raise ValueError(f"{uri!r} has the scheme {scheme!r}; use s3://BUCKET/PREFIX or a path")


def _s3_filesystem() -> pafs.S3FileSystem:
    endpoint, region = s3_endpoint(), s3_region()
    settings: dict[str, Any] = {
        "retry_strategy": pafs.AwsStandardS3RetryStrategy(max_attempts=S3_ATTEMPTS),
        "tls_ca_file_path": os.environ.get("AWS_CA_BUNDLE") or None,
    }
    if endpoint is None:
        host = f"s3.{region or 'us-east-1'}.amazonaws.com"
        return pafs.S3FileSystem(region=region, proxy_options=_proxy("https", host), **settings)
    parts = urlsplit(endpoint)
    scheme = parts.scheme or "https"
    return pafs.S3FileSystem(
        endpoint_override=parts.netloc or parts.path, scheme=scheme, region=region or "us-east-1",
        proxy_options=_proxy(scheme, parts.hostname or ""), **settings,
    )  # fmt: skip


def _proxy(scheme: str, host: str) -> str | None:
    """The proxy that boto3 would use too; pyarrow does not look into the environment for it."""
    return None if proxy_bypass(host) else getproxies().get(scheme)


def read_bytes(uri: str) -> bytes:
    """A whole object. Raises FileNotFoundError, PermissionError or OSError."""
    fs, path = open_uri(uri)
    with fs.open_input_file(path) as stream:
        return bytes(stream.read())


def write_bytes(uri: str, data: bytes) -> None:
    """Puts a whole object in one step, replacing what was there.

    Raises BucketError where a bucket does not take it, another OSError where the disk does not.
    """
    if is_s3(uri):
        return _put(uri, data)
    target = Path(open_uri(uri)[1])
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    beside.write_bytes(data)
    beside.replace(target)


def _put(uri: str, data: bytes) -> None:
    """Not through pyarrow's stream: interrupted, it is closed, and that puts an object of what it had, if anything."""
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, _, key = open_uri(uri)[1].partition("/")
    try:
        if len(data) <= PUT_BYTES:
            s3_client().put_object(Bucket=bucket, Key=key, Body=data)
        else:
            s3_client().upload_fileobj(io.BytesIO(data), bucket, key)
    except (BotoCoreError, ClientError) as error:
        raise BucketError(explain(uri, error)) from error


def exists(uri: str) -> bool:
    """Whether a file or object is there."""
    fs, path = open_uri(uri)
    return bool(fs.get_file_info(path).type == pafs.FileType.File)


def age_s(uri: str) -> float:
    """Seconds since a file or object was written, by one clock: the bucket's own, or this machine's for a file.

    Raises FileNotFoundError where it is not there.
    """
    if not is_s3(uri):
        return max(0.0, time.time() - Path(open_uri(uri)[1]).stat().st_mtime)
    from botocore.exceptions import ClientError

    bucket, _, key = uri.removeprefix("s3://").partition("/")
    try:
        answer = s3_client().head_object(Bucket=bucket, Key=key)
    except ClientError as error:
        if error.response["Error"]["Code"] in ("404", "NoSuchKey"):
            raise FileNotFoundError(uri) from error
        raise
    now = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
    return max(0.0, float((now - answer["LastModified"]).total_seconds()))


def delete(uri: str) -> None:
    """Deletes a file or object; one that is not there is fine."""
    fs, path = open_uri(uri)
    if fs.get_file_info(path).type == pafs.FileType.File:
        fs.delete_file(path)


def list_files(uri: str, suffix: str = "", recursive: bool = False) -> list[pafs.FileInfo]:
    """Files below a folder whose name ends with `suffix`, sorted by path; [] where the folder is absent.

    Names that begin with "." or "_" are half-written or private and are left out.
    """
    fs, path = open_uri(uri)
    infos = fs.get_file_info(pafs.FileSelector(path, recursive=recursive, allow_not_found=True))
    files = [
        i for i in infos if i.type == pafs.FileType.File and i.path.endswith(suffix) and i.base_name[0] not in "._"
    ]
    return sorted(files, key=lambda i: i.path)


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectInfo:
    """A file or object, with a tag that changes when its content does."""

    uri: str
    size: int
    etag: str


def list_objects(uri: str, suffix: str = "") -> list[ObjectInfo]:
    """Objects below a prefix whose name ends with `suffix`, sorted by URI, with tags that change with their content.

    Raises StorageError when the bucket is absent or the credentials are refused.
    """
    if not is_s3(uri):
        return [
            ObjectInfo(uri=info.path, size=info.size, etag=f"{info.size}-{info.mtime_ns}")
            for info in list_files(uri, suffix, recursive=True)
        ]
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    pages = s3_client().get_paginator("list_objects_v2")
    try:
        found = [o for page in pages.paginate(Bucket=bucket, Prefix=prefix) for o in page.get("Contents", [])]
    except (BotoCoreError, ClientError) as error:
        raise StorageError(explain(uri, error)) from error
    # A key that ends in "/" stands for an empty folder: consoles and pyarrow make such objects.
    names = [o for o in found if o["Key"].endswith(suffix) and o["Key"].rpartition("/")[2][:1] not in ("", ".", "_")]
    return [ObjectInfo(uri=f"s3://{bucket}/{o['Key']}", size=o["Size"], etag=o["ETag"].strip('"')) for o in names]


def explain(uri: str, error: Exception) -> str:
    """What went wrong with a bucket, and what to do, in one sentence. Understands boto3's and pyarrow's errors."""
    if isinstance(error, BucketError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    text = str(error)
    where = f"{uri} (endpoint {s3_endpoint() or 'AWS'})"
    if any(sign in text + type(error).__name__ for sign in ("NoSuchBucket", "NO_SUCH_BUCKET", "Not Found")):
        return f"{where}: the bucket does not exist; check its name, or AWS_ENDPOINT_URL if it is not on AWS"
    if any(code in text for code in REFUSALS):
        return f"{where}: access was refused; check the credentials and that they may list, read and write there"
    if "credentials" in text.lower():
        return f"{where}: no credentials were found; set AWS_PROFILE or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    if any(sign in text for sign in UNTRUSTED):
        return (
            f"{where}: its certificate is not trusted here; set AWS_CA_BUNDLE to the file of your certificate "
            "authority, on every node"
        )
    if any(sign in text.lower() for sign in ("connect", "resolve", "read timeout")):
        return f"{where}: the endpoint does not answer; check AWS_ENDPOINT_URL and the network"
    answer = getattr(error, "response", None)  # as boto3 raises it, with the store's own word
    code = answer.get("Error", {}).get("Code") if isinstance(answer, dict) else None
    return f"{where}: the bucket answers {code}" if code else f"{where}: {type(error).__name__}"


def check_writable(uri: str) -> None:
    """Puts and deletes a small object. Raises StorageError where that fails."""
    probe = join(uri, f".probe-{uuid.uuid4().hex}")
    try:
        write_bytes(probe, b"")
        delete(probe)
    except OSError as error:
        raise StorageError(f"cannot write to {explain(uri, error)}") from error
