"""An HTTPS server with a certificate authority of its own, that takes notes."""

import datetime
import socket
import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


class Webhook:
    """`answers`: the status codes of the requests to come, in order; then 204. `location`: where a 3xx sends them."""

    def __init__(self, directory: Path) -> None:
        self.authority = directory / "authority.pem"
        self.answers: list[int] = []
        self.location = ""
        self.requests: list[tuple[str, str, dict[str, str], bytes]] = []
        rig = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                rig.requests.append((self.command, self.path, dict(self.headers), body))
                self.send_response(rig.answers.pop(0) if rig.answers else 204)
                if rig.location:
                    self.send_header("Location", rig.location)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def do_GET(self) -> None:
                self.do_POST()

            def log_message(self, *_: object) -> None:
                return

        certificate = _certificate(directory, self.authority)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        self._server, self._beside = _alone(Handler)
        # The handshake is the thread's, so that one that fails delays nobody.
        self._server.socket = context.wrap_socket(
            self._server.socket, server_side=True, do_handshake_on_connect=False
        )
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def address(self, path: str) -> str:
        return f"https://localhost:{self.port}{path}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self._beside.close()


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A client that hangs up, or does not trust the certificate, is part of the test."""


def _alone(handler: type[BaseHTTPRequestHandler]) -> tuple[_Quiet, socket.socket]:
    """A server, and a socket that keeps others from its port on ::1, where ``localhost`` may be looked for first."""
    while True:
        server = _Quiet(("127.0.0.1", 0), handler)
        beside = socket.socket(socket.AF_INET6)
        try:
            beside.bind(("::1", server.server_address[1]))  # and does not listen: who comes is refused
        except OSError:
            server.server_close()
            beside.close()
        else:
            return server, beside


def _usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _certificate(directory: Path, authority: Path) -> Path:
    """A file with the key and the certificate of ``localhost``; the authority's certificate goes to `authority`."""
    now = datetime.datetime.now(datetime.UTC)
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    names = [
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        for name in ("a test's authority", "localhost")
    ]
    made = []
    for number in range(2):
        builder = (
            x509.CertificateBuilder()
            .subject_name(names[number])
            .issuer_name(names[0])
            .public_key(keys[number].public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=number == 0, path_length=None), critical=True)
            # Without the three below Python 3.13 takes neither: it verifies as RFC 5280 section 4.2.1 says.
            .add_extension(_usage(authority=number == 0), critical=True)
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(keys[number].public_key()), critical=False
            )
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(keys[0].public_key()), critical=False
            )
        )
        if number == 1:
            name = x509.SubjectAlternativeName([x509.DNSName("localhost")])
            builder = builder.add_extension(name, critical=False)
        made.append(builder.sign(keys[0], hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    authority.write_bytes(made[0])
    private = keys[1].private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path = directory / "localhost.pem"
    path.write_bytes(private + made[1])
    return path
