"""A stand-in for ModelScope, and for a mirror of the Hugging Face hub that gives files, on loopback.

It answers what `stages/lib/modelscope.py` asks, and of the Hugging Face hub what huggingface_hub and `datasets` ask to
fetch a model and a dataset. `faults` let it do what servers do wrong.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, unquote, urlsplit

from tests.support.loopback import serving

COMMIT = "c0ffee" + "0" * 34


@dataclass
class Mirror:
    """What the stand-in holds and does wrong, and what was asked of it."""

    url: str = ""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)  # by "models/OWNER/NAME", by path
    asked: list[tuple[str, str, str]] = field(default_factory=list)  # path and query, Range, Authorization
    wrong_digest: str = ""  # the listing states another sha256 of this file
    cut: dict[str, int] = field(default_factory=dict)  # by path: so many replies end after half of their bytes
    redirect: dict[str, str] = field(default_factory=dict)  # by path: to this address
    status: dict[str, int] = field(default_factory=dict)  # by path
    no_ranges: bool = False
    xet: str = ""  # the address of Xet storage that is announced for large files

    def fetched(self) -> list[str]:
        """Return the paths of the files that were asked for, in order."""
        return [path for each, _, _ in self.asked if (path := file_asked(each))]


def file_asked(target: str) -> str:
    """Return the path of the file that a request is for, "" for another request."""
    address = urlsplit(target)
    if address.path.endswith("/repo"):
        return parse_qs(address.query)["FilePath"][0]
    return unquote(address.path).partition(f"/resolve/{COMMIT}/")[2]


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    protocol_version = "HTTP/1.1"
    mirror: Mirror

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.do_GET()

    def do_GET(self) -> None:
        mirror, address = self.mirror, urlsplit(self.path)
        mirror.asked.append((self.path, self.headers.get("Range", ""), self.headers.get("Authorization", "")))
        words = [unquote(word) for word in address.path.strip("/").split("/")]
        query = parse_qs(address.query)
        if words[:2] == ["api", "v1"] and len(words) >= 6:
            self.answer_modelscope("/".join(words[2:5]), "/".join(words[5:]), query)
        elif "resolve" in words:
            kind = [] if words[0] == "datasets" else ["models"]
            name = "/".join([*kind, *words[: words.index("resolve")]])
            self.send_file(name, "/".join(words[words.index("resolve") + 2 :]))
        elif words[0] == "api":
            self.answer_hub(words)
        else:
            self.send(404, b"{}")

    def answer_modelscope(self, name: str, what: str, query: dict[str, list[str]]) -> None:
        files = self.mirror.files.get(name)
        if files is None or query["Revision"] != [COMMIT]:
            self.send(404, json.dumps({"Code": 404, "Message": "not found"}).encode())
        elif what in ("repo/files", "repo/tree"):
            listed = [{"Path": path.rpartition("/")[0], "Type": "tree"} for path in files if "/" in path]
            listed += [self.listed(path, content) for path, content in sorted(files.items())]
            if what == "repo/tree":
                start, size = int(query["PageNumber"][0]) - 1, int(query["PageSize"][0])
                listed = listed[start * size : (start + 1) * size]
            self.send(200, json.dumps({"Code": 200, "Data": {"Files": listed}}).encode())
        else:
            self.send_file(name, query["FilePath"][0])

    def listed(self, path: str, content: bytes) -> dict[str, object]:
        sha256 = "0" * 64 if path == self.mirror.wrong_digest else hashlib.sha256(content).hexdigest()
        return {"Path": path, "Type": "blob", "Size": len(content), "Sha256": sha256}

    def answer_hub(self, words: list[str]) -> None:
        """Answer the hub's questions about a repository: api/models/OWNER/NAME[/tree|/revision]."""
        name = "/".join(words[1:4])
        files = self.mirror.files.get(name)
        if files is None:
            self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            return
        entries = [
            {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}  # noqa: S324
            for path, content in sorted(files.items())
        ]
        if words[4:5] == ["tree"]:
            inside = "/".join(words[6:])
            shown = [each for each in entries if str(each["path"]).startswith(f"{inside}/" if inside else "")]
            self.send(200, json.dumps(shown).encode())
        elif words[4:5] == ["paths-info"]:
            self.send(200, json.dumps(entries).encode())
        else:
            siblings = [{"rfilename": path} for path in sorted(files)]
            told = {"id": "/".join(words[2:4]), "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
            self.send(200, json.dumps(told).encode())

    def send_file(self, name: str, path: str) -> None:
        mirror, content = self.mirror, self.mirror.files.get(name, {}).get(path)
        if content is None or path in mirror.status:
            self.send(mirror.status.get(path, 404), b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            return
        headers = {
            "X-Repo-Commit": COMMIT,
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "Accept-Ranges": "bytes",
        }
        if path in mirror.redirect:
            large = {"X-Linked-Size": str(len(content)), "X-Linked-Etag": headers["ETag"]}
            self.send(302, b"", headers | large | {"Location": mirror.redirect[path]})
            return
        if mirror.xet and path.endswith((".safetensors", ".parquet")):
            headers |= {"X-Xet-Hash": "f" * 64, "Link": f'<{mirror.xet}/token>; rel="xet-auth"'}
        asked = self.headers.get("Range", "")
        if asked and not mirror.no_ranges:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, end = int(first), int(last) + 1 if last else len(content)
            headers["Content-Range"] = f"bytes {start}-{min(end, len(content)) - 1}/{len(content)}"
            self.send(206, content[start:end], headers, path)
        else:
            self.send(200, content, headers, path)

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None, path: str = "") -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.mirror.cut.get(path, 0) > 0:
            self.mirror.cut[path] -= 1
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
        else:
            self.wfile.write(body)


@contextlib.contextmanager
def running(host: str = "127.0.0.1") -> Iterator[Mirror]:
    """Run a stand-in on a free port of loopback."""
    mirror = Mirror()
    with serving(type("Bound", (Handler,), {"mirror": mirror}), host) as server:
        mirror.url = f"http://{host}:{server.server_port}"
        yield mirror
