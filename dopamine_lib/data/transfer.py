"""Fetching files: downloads that resume after a break, and archives unpacked completely or not at all.

pooch 1.9 would fetch a file and check its hash, but begins anew after a break and takes however much a server sends.
"""

import contextlib
import errno
import hashlib
import os
import shutil
import stat
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from urllib.parse import urljoin, urlsplit

import requests

from dopamine_lib.errors import InputError
from dopamine_lib.progress import progress_bar

TIMEOUT = 30  # seconds without a byte from the server
MAX_REDIRECTS = 5
CHUNK = 2**16


def download(url: str, target: str | Path, *, md5: str, max_bytes: int) -> None:
    """Stream ``url`` into ``target``, of at most ``max_bytes`` bytes and with this md5.

    After a broken connection the next call resumes from ``target.part``. Raises InputError for an address that is
    not https, a refusal, a broken connection, too many bytes, or other content.
    """
    target = Path(target)
    if target.is_file() and _md5(target) == md5:
        return
    part = target.with_name(target.name + ".part")
    offset = part.stat().st_size if part.exists() else 0
    try:
        with _open(url, offset) as response:
            _receive(response, part, offset, max_bytes)
    except requests.RequestException as error:
        reason = type(error).__name__
        raise InputError(f"{url}: the connection failed ({reason}); run the command again to resume") from None
    found = _md5(part)
    if found != md5:
        part.unlink()
        raise InputError(f"{url}: md5 is {found}, but must be {md5}; removed, run the command again to start anew")
    os.replace(part, target)


def _md5(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _open(url: str, offset: int) -> requests.Response:
    """Request the bytes from ``offset`` on; redirects are followed one by one, so that each must be https."""
    headers = {"Accept-Encoding": "identity"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
    for _ in range(MAX_REDIRECTS + 1):
        parts = urlsplit(url)
        loopback = parts.hostname in ("127.0.0.1", "::1", "localhost")
        if parts.scheme != "https" and not (parts.scheme == "http" and loopback):
            raise InputError(f"{url}: not an https address; give one that is")
        response = requests.get(url, headers=headers, stream=True, timeout=TIMEOUT, allow_redirects=False)
        if not response.is_redirect:
            return response
        response.close()
        url = urljoin(url, response.headers["location"])
    raise InputError(f"{url}: more than {MAX_REDIRECTS} redirects; try again later")


def _receive(response: requests.Response, part: Path, offset: int, max_bytes: int) -> None:
    """Write the body to ``part``: appended if the server resumes at ``offset``, else from the start."""
    if offset and response.status_code == requests.codes.requested_range_not_satisfiable:
        return  # the part is all there is: the md5 decides
    if response.status_code == requests.codes.ok:
        offset = 0  # the server does not know ranges
    elif response.status_code != requests.codes.partial_content:
        raise InputError(f"{response.url}: the server answered {response.status_code}; try again later")
    elif not response.headers.get("Content-Range", "").startswith(f"bytes {offset}-"):
        part.unlink(missing_ok=True)
        raise InputError(f"{response.url}: bytes that were not requested; run the command again to start anew")
    length = response.headers.get("Content-Length", "")
    total = offset + int(length) if length.isdecimal() else None
    received = offset
    part.parent.mkdir(parents=True, exist_ok=True)
    with (
        open(part, "ab" if offset else "wb") as file,
        progress_bar(title=part.stem, unit="B", total=total, initial=offset, unit_scale=True) as bar,
    ):
        for chunk in response.iter_content(CHUNK):
            received += len(chunk)
            if received > max_bytes:
                part.unlink()
                raise InputError(f"{response.url}: more than {max_bytes} bytes; removed, check the address")
            file.write(chunk)
            bar.update(len(chunk))
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def new_folder(target: str | Path) -> Iterator[Path]:
    """Yield an empty folder beside ``target``; rename it to ``target`` on success, remove it on any error.

    Raises InputError where ``target`` is there and not empty.
    """
    target = Path(target)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise InputError(f"{target}: already there; move it away to fetch it again")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as temporary:
        # one folder down, because a temporary directory is closed to other users
        folder = Path(temporary) / target.name
        folder.mkdir()
        yield folder
        os.replace(folder, target)


def unpack_zip(archive: str | Path, target: str | Path, *, prefix: str, max_bytes: int, max_files: int) -> None:
    """Unpack the members of ``archive`` whose names begin with ``prefix`` into the new folder ``target``.

    Raises InputError, and leaves nothing behind, where a member would land outside ``target`` or is a link, where
    names repeat, where a limit is exceeded, and where the archive is damaged.
    """
    try:
        with zipfile.ZipFile(archive) as opened, new_folder(target) as folder:
            members = opened.infolist()
            _refuse_unsafe(archive, members, max_bytes, max_files)
            wanted = [file for file in members if file.filename.startswith(prefix) and not file.is_dir()]
            if not wanted:
                raise InputError(f"{archive}: no {prefix}* files in it; get the right archive")
            for member in progress_bar(wanted, title="unpacking", unit="file"):
                path = folder / member.filename
                path.parent.mkdir(parents=True, exist_ok=True)
                with opened.open(member) as packed, open(path, "xb") as file:
                    shutil.copyfileobj(packed, file)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, UnicodeDecodeError, struct.error, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # a seek to before the file's beginning
            raise
        raise InputError(f"{archive}: damaged or encrypted zip ({error}); move it away and get it again") from None


def _refuse_unsafe(archive: str | Path, members: list[zipfile.ZipInfo], max_bytes: int, max_files: int) -> None:
    if len(members) > max_files:
        raise InputError(f"{archive}: {len(members)} files, but at most {max_files} are unpacked; check the archive")
    # zipfile cuts off a member that is longer than it declares, which then fails its checksum
    size = sum(member.file_size for member in members)
    if size > max_bytes:
        raise InputError(f"{archive}: {size} bytes unpacked, but the limit is {max_bytes}; check the archive")
    if len({member.filename for member in members}) < len(members):
        raise InputError(f"{archive}: two files of the same name; check the archive")
    for member in members:
        path = PurePosixPath(member.filename)
        outside = path.is_absolute() or ".." in path.parts or any(c in member.filename for c in "\\:")
        if outside or stat.S_ISLNK(member.external_attr >> 16):
            raise InputError(f"{archive}: unsafe member {member.filename!r}; do not use this archive")
