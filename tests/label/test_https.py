"""https by a certificate of one's own, on this machine only, and what is said of bad ones."""

from __future__ import annotations

import datetime
import http.client
import ipaddress
import ssl
from pathlib import Path
from urllib.error import URLError
from urllib.parse import urlsplit

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from discovr_monai.cli import main
from discovr_monai.label.server.start import TOKEN_VARIABLE
from tests.label.conftest import MODEL, start

TOKEN = "a token of more than sixteen letters"
NOT_A_PAIR = "no certificate and its key, in PEM and without a password"


def write_pair(folder: Path, name: str) -> None:
    """NAME.pem, a certificate for 127.0.0.1, and NAME.key."""
    key = ec.generate_private_key(ec.SECP256R1())
    own = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a server of cines")])
    now = datetime.datetime.now(datetime.UTC)
    here = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    made = x509.CertificateBuilder(own, own, key.public_key(), x509.random_serial_number())
    made = made.not_valid_before(now - datetime.timedelta(hours=1))
    made = made.not_valid_after(now + datetime.timedelta(hours=1))
    made = made.add_extension(here, critical=False)
    made = made.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    pem = made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    (folder / f"{name}.pem").write_bytes(pem)
    (folder / f"{name}.key").write_bytes(_pem(key, serialization.NoEncryption()))
    locked = serialization.BestAvailableEncryption(b"a password")
    (folder / f"{name}.locked").write_bytes(_pem(key, locked))


def _pem(
    key: ec.EllipticCurvePrivateKey, locked: serialization.KeySerializationEncryption
) -> bytes:
    kind = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, kind, locked)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Two pairs, and a folder of no cines."""
    folder = tmp_path_factory.mktemp("https")
    for name in ("own", "another"):
        write_pair(folder, name)
    (folder / "text.pem").write_text("no certificate")
    (folder / "studies").mkdir()
    return folder


def test_https_for_who_trusts_the_certificate_and_bears_the_token(files):
    client = pytest.importorskip("monailabel.client.client", reason="make label")
    pair = ("--certificate", str(files / "own.pem"), "--key", str(files / "own.key"))
    server = start(files / "studies", files / "work", *pair, **{TOKEN_VARIABLE: TOKEN})
    try:
        address = urlsplit(server.url)
        assert (address.scheme, address.hostname) == ("https", "127.0.0.1")
        with pytest.raises(URLError, match="CERTIFICATE_VERIFY_FAILED"):
            server.ask("GET", "/info/")
        server.trusted = ssl.create_default_context(cafile=str(files / "own.pem"))
        assert server.ask("GET", "/info/").status == 401
        server.token = TOKEN
        assert server.ask("GET", "/info/").json["labels"]
        in_clear = http.client.HTTPConnection("127.0.0.1", address.port, timeout=30)
        with pytest.raises((http.client.HTTPException, OSError)):
            in_clear.request("GET", "/info/", headers={"Authorization": f"Bearer {TOKEN}"})
            in_clear.getresponse()
        slicer = client.MONAILabelClient(server.url)
        assert slicer.auth_enabled()
        slicer.update_auth(slicer.auth_token("any name", TOKEN))
        assert slicer.info()["labels"]
    finally:
        server.process.kill()
        server.process.wait()


@pytest.mark.parametrize(
    ("certificate", "key", "said"),
    [
        ("own.pem", "none.key", "key 'none.key' does not exist. Check --key"),
        ("none.pem", "own.key", "certificate 'none.pem' does not exist. Check --certificate"),
        ("own.pem", "another.key", f"'own.pem' and 'another.key': {NOT_A_PAIR}"),
        ("own.pem", "own.locked", f"'own.pem' and 'own.locked': {NOT_A_PAIR}"),
        ("own.pem", None, f"'own.pem': {NOT_A_PAIR}"),
        ("text.pem", "own.key", f"'text.pem' and 'own.key': {NOT_A_PAIR}"),
        (None, "own.key", "--key needs --certificate beside it"),
    ],
)
def test_what_cannot_serve_https_is_named(
    files, capsys, certificate: str | None, key: str | None, said: str
):
    options = ["--studies", str(files / "studies"), "--work", str(files / "none")]
    options += ["--certificate", str(files / certificate)] if certificate else []
    options += ["--key", str(files / key)] if key else []
    assert main(["label", *options, "--model", str(MODEL)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line and str(files) not in line
    assert not (files / "none").exists()
