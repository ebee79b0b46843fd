"""Downloads from a server that behaves well and from several that do not."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import data_download
from dopamine_lib.data import retinamnist
from dopamine_lib.data.transfer import download
from dopamine_lib.errors import InputError

CONTENT = bytes(range(256)) * 2000
MD5 = hashlib.md5(CONTENT).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Serves ``server.content``; the path says how: /plain, /ranges, /breaks, /endless, /away, /loop, …"""

    def do_GET(self):
        self.server.asked.append((self.path, self.headers["Range"]))
        content, start = self.server.content, 0
        if self.path in ("/away", "/loop"):
            self.send_response(302)
            self.send_header("Location", "http://example.org/file" if self.path == "/away" else "/loop")
            return self.end_headers()
        if self.path == "/missing":
            return self.send_error(404)
        if self.headers["Range"] and self.path != "/plain":
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                return self.send_error(416)
            self.send_response(206)
            first = 0 if self.path == "/shifted" else start
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        if self.path != "/endless":
            self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        stop = start + 200_000 if self.path == "/breaks" else len(content)
        self.wfile.write(content[start:stop])

    def log_message(self, *args):
        """Keep the test's output quiet."""


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.content, running.asked = CONTENT, []
        running.url = f"http://127.0.0.1:{running.server_port}"
        thread = threading.Thread(target=running.serve_forever, args=(0.02,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def fetch(server, path, folder, max_bytes=1_000_000):
    download(server.url + path, folder / "file.npz", md5=MD5, max_bytes=max_bytes)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("path", ["/plain", "/ranges", "/endless"])
def test_a_whole_download(server, tmp_path, path):
    fetch(server, path, tmp_path)
    assert (tmp_path / "file.npz").read_bytes() == CONTENT and names(tmp_path) == ["file.npz"]
    fetch(server, path, tmp_path)
    assert len(server.asked) == 1  # an existing file is not fetched again


def test_a_broken_download_is_resumed(server, tmp_path):
    with pytest.raises(InputError, match="the connection failed .* run the command again to resume"):
        fetch(server, "/breaks", tmp_path)
    assert names(tmp_path) == ["file.npz.part"]
    got = (tmp_path / "file.npz.part").stat().st_size
    assert 0 < got <= 200_000
    fetch(server, "/ranges", tmp_path)
    assert server.asked[-1] == ("/ranges", f"bytes={got}-")
    assert (tmp_path / "file.npz").read_bytes() == CONTENT and names(tmp_path) == ["file.npz"]


def test_a_server_that_ignores_ranges_starts_anew(server, tmp_path):
    (tmp_path / "file.npz.part").write_bytes(CONTENT[:1000])
    fetch(server, "/plain", tmp_path)
    assert server.asked == [("/plain", "bytes=1000-")]
    assert (tmp_path / "file.npz").read_bytes() == CONTENT


def test_a_part_that_is_already_complete(server, tmp_path):
    (tmp_path / "file.npz.part").write_bytes(CONTENT)
    fetch(server, "/ranges", tmp_path)  # the server answers 416
    assert names(tmp_path) == ["file.npz"]


def test_a_file_that_changed_meanwhile(server, tmp_path):
    (tmp_path / "file.npz.part").write_bytes(b"other" * 200)
    with pytest.raises(InputError, match=f"md5 is .*, but must be {MD5}; removed"):
        fetch(server, "/ranges", tmp_path)
    assert names(tmp_path) == []
    fetch(server, "/ranges", tmp_path)
    assert names(tmp_path) == ["file.npz"]


def test_wrong_bytes_never_replace_an_existing_file(server, tmp_path):
    (tmp_path / "file.npz").write_bytes(b"old")
    server.content = CONTENT[:-1] + b"x"
    with pytest.raises(InputError, match="md5 is"):
        fetch(server, "/plain", tmp_path)
    assert names(tmp_path) == ["file.npz"] and (tmp_path / "file.npz").read_bytes() == b"old"


@pytest.mark.parametrize("path, part", [("/plain", 0), ("/endless", 0), ("/ranges", 300_000)])
def test_too_many_bytes(server, tmp_path, path, part):
    if part:
        (tmp_path / "file.npz.part").write_bytes(CONTENT[:part])
    with pytest.raises(InputError, match="more than 400000 bytes; removed"):
        fetch(server, path, tmp_path, max_bytes=400_000)
    assert names(tmp_path) == []


def test_bytes_that_were_not_requested(server, tmp_path):
    (tmp_path / "file.npz.part").write_bytes(CONTENT[:1000])
    with pytest.raises(InputError, match="bytes that were not requested"):
        fetch(server, "/shifted", tmp_path)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "path, said",
    [("/missing", "answered 404"), ("/loop", "more than 5 redirects"), ("/away", "not an https address")],
)
def test_refused_answers(server, tmp_path, path, said):
    with pytest.raises(InputError, match=said):
        fetch(server, path, tmp_path)
    assert names(tmp_path) == []


def test_only_https(tmp_path):
    for url in (
        "http://example.org/a",
        "ftp://127.0.0.1/a",
        "file:///etc/hosts",
        "http://127.0.0.1.example.org/",
    ):
        with pytest.raises(InputError, match="not an https address"):
            download(url, tmp_path / "a", md5=MD5, max_bytes=10)


def test_retinamnist_command(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(retinamnist, "URL", server.url + "/ranges")
    command = ["retinamnist", "--out", str(tmp_path)]
    assert data_download.main(command) == 2
    said = capsys.readouterr().err
    assert "md5 is" in said and said.count("\n") == 1
    assert names(tmp_path / "retinamnist") == []
    monkeypatch.setattr(retinamnist, "MD5", MD5)
    assert data_download.main(command) == 0
    assert names(tmp_path / "retinamnist") == ["retinamnist.npz"]
