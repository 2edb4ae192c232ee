"""Downloads against a publisher on this machine; nothing leaves it."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from discovr_monai.cli import main
from discovr_monai.weights import download as hub
from discovr_monai.weights.download import REGISTRY, DownloadError, download, licence_beside

CONTENT = bytes(range(256)) * 4000
HASH = hashlib.sha256(CONTENT).hexdigest()
NAME = "discovr-800"
FILE = "checkpoint-799.pth"


class Publisher(BaseHTTPRequestHandler):
    """Serves CONTENT with ranges, or misbehaves as ``server.how`` says."""

    def do_GET(self):
        server = self.server
        server.requests.append((self.path, dict(self.headers)))
        if server.how == "missing":
            return self.send_error(404)
        if server.how == "elsewhere" and "moved" not in self.path:
            self.send_response(302)
            self.send_header("Location", server.target)
            return self.end_headers()
        body, start = server.content, 0
        asked = self.headers.get("Range")
        if asked and self.headers.get("If-Range") == server.etag and server.how != "no ranges":
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            if start >= len(body):
                return self.send_error(416)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        if server.how != "no size":
            self.send_header("Content-Length", str(len(body) - start))
        self.send_header("ETag", server.etag)
        self.end_headers()
        body = body[start:]
        self.wfile.write(body[: len(body) // 2] if server.how == "cut" else body)
        return None

    def log_message(self, *_):
        pass


@pytest.fixture
def publisher(tmp_path, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Publisher)
    server.how, server.content, server.etag, server.requests = "well", CONTENT, '"v1"', []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("DISCOVR_MONAI_HUB", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("DISCOVR_MONAI_CACHE", str(tmp_path / "cache"))
    for name in ("HF_HUB_OFFLINE", "DISCOVR_MONAI_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    yield server
    server.shutdown()
    server.server_close()


def files(folder):
    return sorted(f.name for f in folder.iterdir()) if folder.exists() else []


def test_a_file_comes_with_its_licence_and_hash(publisher, tmp_path):
    path = download(NAME, sha256=HASH.upper())
    assert path == tmp_path / "cache" / FILE
    assert path.read_bytes() == CONTENT
    assert files(path.parent) == [FILE, f"{FILE}.licence.txt", f"{FILE}.sha256"]
    assert licence_beside(path).startswith("MIT, says the README")
    assert path.with_name(f"{FILE}.sha256").read_text() == f"{HASH}  {FILE}\n"
    asked = publisher.requests[0][0]
    assert asked == f"/Div97/DISCOVR_ADULT_PEDIATRIC_MODEL/resolve/main/{FILE}"


def test_without_a_hash_it_must_be_accepted_and_is_recorded(publisher, tmp_path):
    with pytest.raises(DownloadError, match="nobody published a SHA-256 .*--accept-unverified"):
        download(NAME, tmp_path)
    assert publisher.requests == []
    path = download(NAME, tmp_path, accept_unverified=True)
    assert path.with_name(f"{FILE}.sha256").read_text().startswith(HASH)
    assert download(NAME, tmp_path) == path  # the recorded hash is the one that counts from now
    assert len(publisher.requests) == 1
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(DownloadError, match=f"in the folder has SHA-256 .*, not {HASH}: delete it"):
        download(NAME, tmp_path)
    assert path.exists()


def test_another_content_is_refused_and_removed(publisher, tmp_path):
    with pytest.raises(DownloadError, match=f"has SHA-256 {HASH}, not {'0' * 64}: removed"):
        download(NAME, tmp_path, sha256="0" * 64)
    assert files(tmp_path) == []
    with pytest.raises(DownloadError, match="--sha256 must be 64 hexadecimal digits"):
        download(NAME, tmp_path, sha256="12")


def test_a_cut_download_never_looks_finished_and_goes_on(publisher, tmp_path):
    publisher.how = "cut"
    with pytest.raises(DownloadError, match=f"cut at {len(CONTENT) // 2} of {len(CONTENT)} bytes"):
        download(NAME, tmp_path, sha256=HASH)
    assert FILE not in files(tmp_path)
    publisher.how = "well"
    assert download(NAME, tmp_path, sha256=HASH).read_bytes() == CONTENT
    headers = publisher.requests[1][1]
    assert headers["Range"] == f"bytes={len(CONTENT) // 2}-"
    assert headers["If-Range"] == '"v1"'
    assert files(tmp_path) == [FILE, f"{FILE}.licence.txt", f"{FILE}.sha256"]


@pytest.mark.parametrize("why", ["changed", "no ranges"])
def test_a_rest_of_another_version_is_not_glued_on(publisher, tmp_path, why):
    publisher.how = "cut"
    with pytest.raises(DownloadError, match="was cut"):
        download(NAME, tmp_path, accept_unverified=True)
    publisher.how = "well" if why == "changed" else why
    if why == "changed":
        publisher.content, publisher.etag = CONTENT[::-1], '"v2"'
    path = download(NAME, tmp_path, accept_unverified=True)
    assert path.read_bytes() == publisher.content


def test_all_there_but_never_finished(publisher, tmp_path):
    """Killed between the last byte and the renaming: nothing is left to ask for."""
    publisher.how = "cut"
    with pytest.raises(DownloadError, match="was cut"):
        download(NAME, tmp_path, sha256=HASH)
    (tmp_path / f".{FILE}.part").write_bytes(CONTENT)
    publisher.how = "well"
    with pytest.raises(DownloadError, match="answers 416"):
        download(NAME, tmp_path, sha256=HASH)
    assert download(NAME, tmp_path, sha256=HASH).read_bytes() == CONTENT


def test_a_weak_tag_starts_again(publisher, tmp_path):
    publisher.how, publisher.etag = "cut", 'W/"v1"'
    with pytest.raises(DownloadError, match="was cut"):
        download(NAME, tmp_path, sha256=HASH)
    publisher.how = "well"
    assert download(NAME, tmp_path, sha256=HASH).read_bytes() == CONTENT
    assert "Range" not in publisher.requests[1][1]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", f"{FILE}: the publisher answers 404 Not Found; it may have moved"),
        ("no size", f"{FILE}: the publisher does not tell the size"),
    ],
)
def test_publishers_that_fail(publisher, tmp_path, how, message):
    publisher.how = how
    with pytest.raises(DownloadError, match=message):
        download(NAME, tmp_path, sha256=HASH)
    assert FILE not in files(tmp_path)


def test_nobody_there(publisher, tmp_path, monkeypatch):
    monkeypatch.setenv("DISCOVR_MONAI_HUB", "http://127.0.0.1:9")
    with pytest.raises(DownloadError, match="the connection failed .*the same command goes on"):
        download(NAME, tmp_path, sha256=HASH)


def test_redirects_are_followed_to_safe_places_only(publisher, tmp_path):
    publisher.how = "elsewhere"
    publisher.target = f"http://127.0.0.1:{publisher.server_port}/moved"
    assert download(NAME, tmp_path / "a", sha256=HASH).read_bytes() == CONTENT
    publisher.target = "http://example.org/moved"
    with pytest.raises(DownloadError, match="http://example.org: only https is used"):
        download(NAME, tmp_path / "b", sha256=HASH)


@pytest.mark.parametrize("mirror", ["http://example.org", "ftp://127.0.0.1", "file:///tmp"])
def test_mirrors_must_be_safe_too(publisher, tmp_path, monkeypatch, mirror):
    monkeypatch.setenv("DISCOVR_MONAI_HUB", mirror)
    with pytest.raises(DownloadError, match="only https is used for downloads"):
        download(NAME, tmp_path, sha256=HASH)


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "DISCOVR_MONAI_OFFLINE"])
def test_offline_uses_the_cache_and_nothing_else(publisher, tmp_path, monkeypatch, variable):
    download(NAME, sha256=HASH)
    monkeypatch.setenv(variable, "1")
    assert download(NAME).read_bytes() == CONTENT
    with pytest.raises(DownloadError, match="is not in the folder, and .* forbids to fetch it"):
        download("discovr-700", sha256=HASH)
    assert len(publisher.requests) == 1
    monkeypatch.setenv(variable, "0")
    download("discovr-700", sha256=HASH)


def test_two_at_once(publisher, tmp_path):
    import fcntl

    with (tmp_path / f".{FILE}.part").open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(DownloadError, match="is being downloaded by another process"):
            download(NAME, tmp_path, sha256=HASH)


def test_the_registry_is_honest():
    """https only; a pin or the admission that there is none; no hash that nobody saw."""
    for name, entry in REGISTRY.items():
        assert hub._safe(entry.url).startswith("https://"), name
        assert entry.licence, name
        assert "pinned" in entry.note, name
        assert entry.sha256 is None, name
    assert {f"discovr-{n}" for n in range(200, 801, 100)} <= set(REGISTRY)
    assert REGISTRY[NAME].file == FILE
    with pytest.raises(
        DownloadError, match="'resnet' is no released file that is known: discovr-200"
    ):
        download("resnet")


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.delenv("DISCOVR_MONAI_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert hub.cache_folder() == tmp_path / "discovr-monai"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.cache_folder() == tmp_path / ".cache" / "discovr-monai"


def test_the_command(publisher, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["download", "list"]) == 0
    assert "videomae-base" in capsys.readouterr().out
    assert main(["download", NAME, "--to", "weights"]) == 1
    assert capsys.readouterr().err.startswith("Error: nobody published a SHA-256")
    assert main(["download", NAME, "--to", "weights", "--accept-unverified"]) == 0
    out = capsys.readouterr().out
    assert "Licence: MIT, says the README" in out
    assert f"SHA-256: {HASH}" in out
    assert f"File: {FILE} in weights" in out
    assert str(tmp_path) not in out


def test_downloading_needs_no_torch():
    code = "import sys, discovr_monai.weights.download; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False"
