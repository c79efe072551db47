"""Files of repositories on ModelScope, at a commit: listed, fetched, resumed and checked.

The addresses and fields are those of ModelScope's own client (PyPI `modelscope-hub` 0.5.1: `_legacy_api.py`,
`_download.py`), which is not used: it brings the package `cryptography`, and checks no redirect.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple
from urllib.parse import urljoin, urlsplit

import click

from stages.lib.errors import UserError
from stages.lib.mirror import refuse_other_host

Kind = Literal["models", "datasets"]
LISTING = ".listing.json"  # in the copy: what the repository holds at that commit
MOST_LISTED = 3000  # of a model's files ModelScope lists so many, and says nothing of the rest
PAGE_FILES = 200  # a page of a dataset's files
TRIES, SECONDS = 4, 30  # of a request; without a byte for so long it has failed
REDIRECTS = 5
CHUNK = 1 << 20


class Listed(NamedTuple):
    """A file of a repository."""

    path: str
    size: int
    sha256: str


class Failed(Exception):
    """A request that may succeed when it is asked again."""


def endpoint() -> str:
    """Return ModelScope's address: MODELSCOPE_ENDPOINT, as for its own client."""
    return (os.environ.get("MODELSCOPE_ENDPOINT") or "https://www.modelscope.cn").rstrip("/")


def copy_folder(kind: Kind, name: str, revision: str) -> Path:
    """Return where the files of a repository at a commit are kept on this disk."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "temper" / "modelscope" / kind / name / revision


def fetch(kind: Kind, name: str, revision: str, choose: Callable[[list[str], Path], Sequence[str]]) -> Path:
    """Return the folder that holds the files of `name` at the commit `revision` which `choose` takes of all paths.

    What is there already is not asked for again, and without a missing file nothing is asked at all. A file appears
    when it is whole and has the size and sha256 that the listing states. `choose` also gets the folder. Raises
    `UserError` for a repository or file that ModelScope does not give, and for one that is not what the listing states.
    """
    folder = copy_folder(kind, name, revision)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:  # the ranks of a stage start together
        fcntl.flock(lock, fcntl.LOCK_EX)
        listing = listed_files(kind, name, revision, folder)
        chosen = choose(sorted(listing), folder)
        missing = [listing[path] for path in chosen if not is_there(folder / path, listing[path])]
        if missing:
            refuse_full_disk(folder, name, sum(file.size for file in missing))
            size = sum(file.size for file in missing) / 1e9
            click.echo(f"{name}: fetching {len(missing)} files, {size:.2f} GB, from {endpoint()}", err=True)
        for file in missing:
            fetch_file(address(kind, name, "repo"), {"Revision": revision, "FilePath": file.path}, file, folder)
    return folder


def is_there(path: Path, file: Listed) -> bool:
    """Say whether a file has been fetched: it gets its name when it is whole."""
    return path.is_file() and path.stat().st_size == file.size


def refuse_full_disk(folder: Path, name: str, size: int) -> None:
    """Raise `UserError` where the disk has no room for `size` bytes."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise UserError(f"{folder}: {free / 1e9:.2f} GB are free, and {name} takes {size / 1e9:.2f} GB. Free some")


def address(kind: Kind, name: str, what: str) -> str:
    """Return the address of a repository's files."""
    return f"{endpoint()}/api/v1/{kind}/{name}/{what}"


def listed_files(kind: Kind, name: str, revision: str, folder: Path) -> dict[str, Listed]:
    """Return the files of a repository at a commit, by path; they are asked for once and kept in `folder`."""
    kept = folder / LISTING
    if not kept.is_file():
        asked = {"Revision": revision, "Recursive": "True"}
        if kind == "models":
            entries = ask_json(address(kind, name, "repo/files"), asked, name, revision)
            if len(entries) >= MOST_LISTED:
                raise UserError(f"{name}: has {MOST_LISTED} files or more, and ModelScope does not list the rest")
        else:
            entries, page = [], 0
            while len(entries) == page * PAGE_FILES:
                page += 1
                pages = {"PageNumber": str(page), "PageSize": str(PAGE_FILES)}
                entries += ask_json(address(kind, name, "repo/tree"), asked | pages, name, revision)
        partial = kept.with_name(f"{LISTING}.part")
        partial.write_text(json.dumps(entries))
        partial.replace(kept)
    found = {}
    for entry in json.loads(kept.read_text()):
        if entry.get("Type") != "tree":
            file = Listed(str(entry.get("Path")), entry.get("Size"), str(entry.get("Sha256") or "").lower())
            place = PurePosixPath(file.path)
            is_sound = isinstance(file.size, int) and re.fullmatch("[0-9a-f]{64}", file.sha256)
            if not is_sound or place.is_absolute() or ".." in place.parts or "\0" in file.path:
                kept.unlink()
                raise UserError(
                    f"{name}: ModelScope lists {file.path!r} with size {file.size!r} and sha256 {file.sha256!r}; "
                    f"expected a path within the repository, a number of bytes and 64 hex digits"
                )
            found[file.path] = file
    return found


def ask_json(url: str, query: dict[str, str], name: str, revision: str) -> list[dict[str, Any]]:
    """Return the files in one reply. Raises `UserError` when there are none for this repository and commit."""
    for attempt in range(TRIES):
        with retrying(attempt, f"{name} at {revision}"), asked(url, query, {}) as reply:
            reply.read()
            if reply.status_code == 200:
                try:
                    data = reply.json()["Data"]
                    return list(data["Files"] if isinstance(data, dict) else data)
                except (ValueError, KeyError, TypeError) as error:
                    raise Failed(f"a reply that is no list of files: {reply.text[:80]!r}") from error
            refuse_status(reply.status_code, f"{name} at {revision}")
    raise AssertionError("the last try raises")


def refuse_status(status: int, what: str) -> None:
    """Raise `UserError` for an HTTP status that stays as it is, and `Failed` for another."""
    if status in (401, 403):
        raise UserError(
            f"{what}: ModelScope refuses it ({status}). If it is private or gated: export MODELSCOPE_API_TOKEN=..., of "
            f"an account that may read it"
        )
    if status == 404:
        raise UserError(f"{what}: not on ModelScope ({endpoint()}). Fix name, revision or hub in the recipe")
    raise Failed(f"HTTP {status}")


@contextlib.contextmanager
def retrying(attempt: int, what: str) -> Iterator[None]:
    """Let a request fail, after a pause, unless it is the last of `TRIES`: then raise `UserError`."""
    import httpx

    try:
        yield
    except (httpx.HTTPError, Failed) as error:
        if attempt == TRIES - 1:
            raise UserError(
                f"{what}: {endpoint()} did not give it in {TRIES} tries: {error or type(error).__name__}. Run it "
                f"again: what has arrived is kept. Or give a local folder"
            ) from error
        time.sleep(2**attempt)


@contextlib.contextmanager
def asked(url: str, query: dict[str, str], headers: dict[str, str]) -> Iterator[Any]:
    """Give the reply to a GET request, redirects followed within the site; the token goes to the endpoint alone."""
    import httpx

    token = os.environ.get("MODELSCOPE_API_TOKEN", "")
    own = urlsplit(endpoint()).netloc
    target = str(httpx.URL(url, params=query))
    with httpx.Client(timeout=SECONDS) as client:
        for _ in range(REDIRECTS):
            secret = {"Authorization": f"Bearer {token}", "Cookie": f"m_session_id={token}"}
            given = headers | (secret if token and urlsplit(target).netloc == own else {})
            # As it lies in storage: bytes that a proxy packs would have another size.
            with client.stream("GET", target, headers={"Accept-Encoding": "identity", **given}) as reply:
                if not reply.has_redirect_location:
                    yield reply
                    return
                target = urljoin(target, reply.headers["Location"])
                refuse_other_host(target, endpoint(), "MODELSCOPE_ENDPOINT")
    raise Failed(f"more than {REDIRECTS} redirects")


def fetch_file(url: str, query: dict[str, str], file: Listed, folder: Path) -> None:
    """Fetch one file to its place in `folder`, going on where an earlier try ended.

    Raises `UserError` for one whose size or sha256 is not what was listed: what has arrived of it is then deleted.
    """
    place = folder / file.path
    partial = place.with_name(f".{place.name}.part")
    place.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(TRIES):
        if partial.is_file() and partial.stat().st_size >= file.size:
            break
        with retrying(attempt, file.path):
            append_rest(url, query, file, partial)
            break
    digest = hashlib.sha256()
    with partial.open("rb") as content:
        while chunk := content.read(CHUNK):
            digest.update(chunk)
        size = content.tell()
        os.fsync(content.fileno())
    if (size, digest.hexdigest()) != (file.size, file.sha256):
        partial.unlink()
        raise UserError(
            f"{file.path}: {size:,} bytes with sha256 {digest.hexdigest()} came from {endpoint()}; expected "
            f"{file.size:,} with {file.sha256}, as listed. It was deleted. Run it again; if it is the same, "
            f"the mirror is at fault"
        )
    partial.replace(place)


def append_rest(url: str, query: dict[str, str], file: Listed, partial: Path) -> None:
    """Append to `partial` what it lacks of a file; a server that knows no ranges sends it from its beginning."""
    have = partial.stat().st_size if partial.is_file() else 0
    headers = {"Range": f"bytes={have}-"} if have else {}
    with asked(url, query, headers) as reply:
        if reply.status_code not in (200, 206):
            refuse_status(reply.status_code, file.path)
        start = re.match(r"bytes (\d+)-", reply.headers.get("Content-Range", ""))
        goes_on = reply.status_code == 206 and start is not None and int(start[1]) == have
        if reply.status_code == 206 and not goes_on:
            partial.unlink(missing_ok=True)
            raise Failed(f"bytes from {reply.headers.get('Content-Range')!r}; asked for those from {have}")
        with partial.open("ab" if goes_on else "wb") as out:
            for chunk in reply.iter_raw():  # as it arrives: what a cut-off reply brought is kept
                out.write(chunk)
                if out.tell() > file.size:
                    break
    if partial.stat().st_size < file.size:
        raise Failed(f"{partial.stat().st_size:,} of {file.size:,} bytes came")
