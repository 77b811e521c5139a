"""Pictures from an https server on loopback, with an authority of its own: only where both are allowed."""

from __future__ import annotations

import datetime
import http.server
import ipaddress
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.ray_jobs.serve.conftest import Made, chat, picture, png, url, with_alpha

PICTURE = png(with_alpha(picture()))


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate of 127.0.0.1 that signs itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem, secret = folder / "ca.pem", folder / "key.pem"
    pem.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    secret.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return pem, secret


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/moved.png":
            self.send_response(302)
            self.send_header("Location", "/a.png")
            self.end_headers()
            return
        self.send_response(200 if self.path == "/a.png" else 404)
        self.end_headers()
        self.wfile.write(PICTURE)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """host:port of the server; its certificate is trusted."""
    pem, secret = make_certificate(tmp_path)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem, secret)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    monkeypatch.setenv("SSL_CERT_FILE", str(pem))
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join(20)


def test_a_picture_is_fetched_from_a_host_that_is_listed(make_client: Made, host: str) -> None:
    client = make_client(url_hosts=(host,))
    fetched = client.post("/v1/chat/completions", json=chat(f"https://{host}/a.png"))
    assert fetched.status_code == 200, fetched.text
    sent = client.post("/v1/chat/completions", json=chat(url(PICTURE)))
    assert fetched.json()["choices"] == sent.json()["choices"]
    for path in ("moved.png", "none.png"):
        answer = client.post("/v1/chat/completions", json=chat(f"https://{host}/{path}"))
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "url_failed"), "redirects are not followed"


def test_nothing_else_is_reached(make_client: Made, host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client = make_client(url_hosts=(host,))
    others = (
        f"https://u:p@{host}/a.png",
        "https://127.0.0.1/a.png",
        "https://127.0.0.1:1/a.png",
        f"http://{host}/a.png",
    )
    for other in others:
        answer = client.post("/v1/chat/completions", json=chat(other))
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "url_not_allowed"), other
    small = make_client(url_hosts=(host,), max_body_mb=len(PICTURE) / 1e6 / 2)
    assert small.post("/v1/chat/completions", json=chat(f"https://{host}/a.png")).status_code == 413
    monkeypatch.delenv("SSL_CERT_FILE")
    answer = client.post("/v1/chat/completions", json=chat(f"https://{host}/a.png"))
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "url_failed"), "nobody vouches for it"
