"""Identity of a server: a certificate, pinned by its fingerprint, and a token that its workers know.

Where no certificate is given one is made at the start, signed by itself, for the name "manyhands". A worker knows the
server by the SHA-256 of that certificate (as SSH knows hosts): it fetches the certificate, compares the fingerprint, and
trusts this certificate alone. `cryptography` makes it, because the standard library cannot and an `openssl` program is
not everywhere.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import hmac
import re
import secrets
import ssl
from dataclasses import dataclass
from pathlib import Path

from manyhands.core.errors import PeerLost, UsageError

NAME = "manyhands"
DAYS = 3650
LEAST_TOKEN = 16  # characters


@dataclass(frozen=True)
class Identity:
    """A certificate and its key, as PEM."""

    certificate: bytes
    key: bytes

    @property
    def fingerprint(self) -> str:
        """``sha256:`` and the digest of the certificate."""
        return fingerprint_of(self.certificate)


def fingerprint_of(certificate: bytes) -> str:
    """``sha256:`` and the hexadecimal digest of a PEM certificate's DER bytes (the first one's, of a chain).

    Raises:
        UsageError: there is no certificate in it.
    """
    first = re.search(rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", certificate, re.DOTALL)
    if first is None:
        raise UsageError("a certificate that is not PEM", "it begins with -----BEGIN CERTIFICATE-----", "")
    return "sha256:" + hashlib.sha256(ssl.PEM_cert_to_DER_cert(first[0].decode())).hexdigest()


def name_in(certificate: bytes) -> str:
    """A name that a PEM certificate is valid for: the first DNS name, else address, else the common name.

    The fingerprint tells who the server is; TLS wants a name as well, and any that the certificate has will do.
    """
    try:
        from cryptography import x509
        from cryptography.x509.oid import NameOID
    except ImportError:  # then the certificate is most likely a server's own
        return NAME
    found = x509.load_pem_x509_certificate(certificate)
    names: list[str] = []
    with contextlib.suppress(x509.ExtensionNotFound):
        valid = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        names += valid.get_values_for_type(x509.DNSName)
        names += map(str, valid.get_values_for_type(x509.IPAddress))
    names += [str(a.value) for a in found.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    return names[0].replace("*", NAME, 1) if names else NAME


def self_signed() -> Identity:
    """A new key (ECDSA P-256) and a certificate for the name "manyhands"."""
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import NameOID
    except ImportError:
        raise UsageError(
            "TLS without the package cryptography",
            "the server's certificate is made with it",
            "pip install cryptography, or give a certificate of your own",
        ) from None
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, NAME)])
    now = datetime.datetime.now(datetime.timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))  # clocks differ
        .not_valid_after(now + datetime.timedelta(days=DAYS))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(NAME)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    return Identity(
        certificate.public_bytes(serialization.Encoding.PEM),
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
    )


def kept(directory: Path | None) -> Identity:
    """The identity in `directory`, made there at the first time: a restarted server is known again."""
    if directory is None:
        return self_signed()
    certificate, key = directory / "certificate.pem", directory / "key.pem"
    if certificate.exists() and key.exists():
        return Identity(certificate.read_bytes(), key.read_bytes())
    made = self_signed()
    directory.mkdir(parents=True, exist_ok=True)
    private(key, made.key)
    temporary = directory / ".certificate.pem.tmp"  # one that is there is whole
    temporary.write_bytes(made.certificate)
    temporary.replace(certificate)
    return made


def private(path: Path, data: bytes) -> None:
    """Write a file that only its owner can read."""
    import os

    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(fd, "wb") as file:
        file.write(data)


def pinned(host: str, port: int, fingerprint: str, *, timeout_s: float) -> bytes:
    """The PEM certificate of the server at that address, which must have this fingerprint.

    Raises:
        OSError: nobody answers there, or it goes away while it greets.
        UsageError: another certificate is shown: this is another server, or somebody in between.
    """
    try:
        certificate = ssl.get_server_certificate((host, port), timeout=timeout_s).encode()
    except (ssl.SSLEOFError, ssl.SSLZeroReturnError) as error:  # as when it is just being started anew
        raise ConnectionResetError(f"{host}:{port} hung up while greeting: {error}") from None
    except ssl.SSLError as error:
        raise PeerLost(None, f"greeting {host}:{port}", f"it does not speak TLS: {error}") from None
    found = fingerprint_of(certificate)
    if not hmac.compare_digest(found, fingerprint.lower()):
        raise UsageError(
            f"{host}:{port} shows the certificate {found}",
            f"the fingerprint {fingerprint} was given",
            "take the one that the server printed at its start; otherwise somebody is in between",
        )
    return certificate


def new_token() -> str:
    """A token that nobody guesses."""
    return secrets.token_urlsafe(32)


def read_token(path: str) -> str:
    """The token in a file. Raises `UsageError` where it is absent or too short to be secret."""
    try:
        token = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"token file {path}: {error}", "it holds the server's token", "check the path"
        ) from None
    if len(token) < LEAST_TOKEN or not token.isascii() or not token.isprintable():
        raise UsageError(
            f"a token of {len(token)} characters in {path}",
            f"it has at least {LEAST_TOKEN} printable ASCII characters",
            "make one: python -c 'import secrets; print(secrets.token_urlsafe(32))'",
        )
    return token


def same_token(given: str, token: str) -> bool:
    """Compared in a time that does not depend on where they differ."""
    return hmac.compare_digest(given.encode(), token.encode())
