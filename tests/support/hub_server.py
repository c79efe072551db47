"""A stand-in for the hub on loopback: repositories, LFS and Xet storage, commits, over the hub's HTTP interface.

What it answers is what huggingface_hub 1.x asks (`hf_api.py`, `_commit_api.py`, `lfs.py`) and what hf_xet asks of the
storage behind it (https://huggingface.co/docs/xet/api). It is strict where the hub is: it refuses a request without the
right token, a commit of a file whose content has not arrived, and content that is not what its name says.
"""

import base64
import contextlib
import hashlib
import json
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, unquote, urlsplit

from tests.support.loopback import serving

LARGE = (".safetensors", ".gguf", ".model", ".png", ".bin")  # what the hub's .gitattributes sends to storage
STORAGE_TOKEN = "short-lived"
PART_BYTES = 100_000
COMMIT = "0" * 40


@dataclass
class Repository:
    """One repository: its files by path, as the tree lists them, and the content of those that are not in storage."""

    private: bool
    tree: dict[str, dict] = field(default_factory=dict)
    content: dict[str, bytes] = field(default_factory=dict)
    commits: list[dict] = field(default_factory=list)


@dataclass
class Hub:
    """The state of the stand-in, and what was asked of it."""

    token: str
    owner: str
    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    stored: dict[str, int] = field(default_factory=dict)  # bytes by sha256: content that has arrived whole
    parts: dict[str, dict[int, bytes]] = field(default_factory=dict)  # by sha256, of uploads in parts
    xorbs: dict[str, int] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)  # method and path
    authorized: list[tuple[str, str]] = field(default_factory=list)  # path and token of every request that had one
    uploads: list[tuple[str, int]] = field(default_factory=list)  # content that storage took: name and bytes
    multipart: bool = False  # LFS storage takes parts of PART_BYTES
    refuse_after: int | None = None  # storage takes so many uploads and refuses those after
    refuse_with: int = 403
    refuse_commits: bool = False
    damage: str = ""  # the tree tells another sha256 for this path
    lock: threading.Lock = field(default_factory=threading.Lock)

    def refuses_upload(self) -> bool:
        """Say whether storage is to refuse the upload that comes now."""
        return self.refuse_after is not None and len(self.uploads) >= self.refuse_after


class Refused(Exception):
    """An answer other than 200: status, message, and the hub's name for the error."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two packets: the second would wait 40 ms for the client
    hub: Hub

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        self.respond("GET")

    def do_POST(self) -> None:
        self.respond("POST")

    def do_PUT(self) -> None:
        self.respond("PUT")

    def respond(self, method: str) -> None:
        body = self.body()
        address = urlsplit(self.path)
        token = self.headers.get("authorization", "").removeprefix("Bearer ")
        headers: dict[str, str] = {}
        with self.hub.lock:
            self.hub.requests.append((method, self.path))
            if token:
                self.hub.authorized.append((address.path, token))
            try:
                status, answer = 200, route(self.hub, method, address.path, parse_qs(address.query), body, token)
            except Refused as refused:
                status, answer = refused.status, {"error": refused.message}
                headers = {"X-Error-Message": refused.message, "X-Error-Code": refused.code}
        if isinstance(answer, tuple):
            answer, headers = answer
        sent = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(sent), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(sent)

    def body(self) -> bytes:
        if self.headers.get("transfer-encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("content-length", 0)))
        read = b""
        while size := int(self.rfile.readline(), 16):
            read += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return read


def route(hub: Hub, method: str, path: str, query: dict[str, list[str]], body: bytes, token: str) -> object:
    """Return the answer: JSON, bytes, or JSON and headers. Raises `Refused`."""
    words = [unquote(word) for word in path.strip("/").split("/")]
    match method, words:
        case "PUT", ["storage", sha]:  # an address signed for this one upload: it takes no token
            return put(hub, sha, body, int(query["part"][0]) if "part" in query else None)
        case "POST", ["storage", sha, "complete"]:
            return complete(hub, sha, json.loads(body))
        case _, ["v1" | "v2", *what]:
            return xet_storage(hub, what, body, token, streamed=words[0] == "v2")
    if token != hub.token:
        raise Refused(401, "Invalid credentials in Authorization header")
    match method, words:
        case "POST", ["api", "repos", "create"]:
            return create(hub, json.loads(body))
        case "POST", ["api", "validate-yaml"]:
            return {"errors": [], "warnings": []}
        case "POST", ["api", "verify"]:
            return verify(hub, json.loads(body))
    if words[:2] == ["api", "models"] and len(words) >= 4:
        name, what = f"{words[2]}/{words[3]}", words[4:]
    elif len(words) == 6 and words[2:] == ["info", "lfs", "objects", "batch"]:
        name, what = f"{words[0]}/{words[1].removesuffix('.git')}", ["batch"]
    else:
        raise Refused(404, f"{method} {path} is not known here")
    if name not in hub.repositories:
        raise Refused(404, "Repository not found", "RepoNotFound")
    repository = hub.repositories[name]
    match method, what:
        case "GET", []:
            return {"id": name, "private": repository.private, "sha": COMMIT, "siblings": [], "tags": []}
        case "PUT", ["settings"]:
            repository.private = json.loads(body)["visibility"] == "private"
            return {}
        case "POST", ["preupload", "main"]:
            return {"files": [mode(repository, file) for file in json.loads(body)["files"]]}
        case "POST", ["batch"]:
            return batch(hub, json.loads(body))
        case "GET", ["xet-write-token", "main"]:
            granted = {"accessToken": STORAGE_TOKEN, "casUrl": hub.url, "exp": 4_000_000_000}
            names = ("X-Xet-Access-Token", "X-Xet-Cas-Url", "X-Xet-Token-Expiration")
            return granted, dict(zip(names, granted.values(), strict=True))
        case "POST", ["commit", "main"]:
            return commit(hub, name, repository, [json.loads(line) for line in body.splitlines()])
        case "GET", ["tree", _]:
            return [damaged(hub, entry) for entry in repository.tree.values()]
    raise Refused(404, f"{method} {path} is not known here")


def create(hub: Hub, asked: dict) -> dict:
    """Make an empty repository."""
    name = f"{asked['organization']}/{asked['name']}"
    if asked["organization"] != hub.owner:
        raise Refused(403, f"You don't have the rights to create a model under the namespace {asked['organization']!r}")
    if name in hub.repositories:
        raise Refused(409, "You already created this model repo")
    hub.repositories[name] = Repository(private=asked.get("visibility") == "private")
    return {"url": f"{hub.url}/{name}"}


def mode(repository: Repository, file: dict) -> dict:
    """Say whether a file goes to storage or into the commit, and what is there under its name."""
    entry = repository.tree.get(file["path"], {})
    large = file["path"].endswith(LARGE) or file["size"] > 10_000_000
    known = entry.get("lfs", entry).get("oid")
    return {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": known}


def batch(hub: Hub, asked: dict) -> dict:
    """Say, for each object, where to send it; for one that is there, nothing."""
    objects = []
    for each in asked["objects"]:
        sha, size = each["oid"], each["size"]
        if hub.stored.get(sha) == size:
            objects.append({"oid": sha, "size": size})
            continue
        upload: dict = {"href": f"{hub.url}/storage/{sha}"}
        if hub.multipart and size > PART_BYTES:
            hub.parts.setdefault(sha, {})
            count = -(-size // PART_BYTES)
            urls = {f"{part:05}": f"{hub.url}/storage/{sha}?part={part}" for part in range(1, count + 1)}
            upload = {"href": f"{upload['href']}/complete", "header": {"chunk_size": str(PART_BYTES), **urls}}
        actions = {"upload": upload, "verify": {"href": f"{hub.url}/api/verify"}}
        objects.append({"oid": sha, "size": size, "actions": actions})
    return {"transfer": "basic", "objects": objects}


def put(hub: Hub, sha: str, body: bytes, part: int | None) -> object:
    """Take an object or a part of one."""
    if hub.refuses_upload():
        raise Refused(hub.refuse_with, "storage is told to refuse this")
    if part is None:
        keep(hub, sha, body)
    else:
        hub.parts[sha][part] = body
    hub.uploads.append((sha, len(body)))
    return b"", {"ETag": f'"{hashlib.md5(body, usedforsecurity=False).hexdigest()}"'}


def complete(hub: Hub, sha: str, asked: dict) -> dict:
    """Join the parts of an object; each has to be named by its number and its ETag."""
    parts = hub.parts.pop(sha)
    named = {part["partNumber"]: part["etag"] for part in asked["parts"]}
    if named != {number: f'"{hashlib.md5(part, usedforsecurity=False).hexdigest()}"' for number, part in parts.items()}:
        raise Refused(400, "the parts are not those that arrived")
    keep(hub, sha, b"".join(parts[number] for number in sorted(parts)))
    return {}


def keep(hub: Hub, sha: str, content: bytes) -> None:
    """Note that content has arrived, if it is what its name says."""
    if hashlib.sha256(content).hexdigest() != sha:
        raise Refused(400, "the content has another sha256")
    hub.stored[sha] = len(content)


def verify(hub: Hub, asked: dict) -> dict:
    """Confirm that an object has arrived."""
    if hub.stored.get(asked["oid"]) != asked["size"]:
        raise Refused(404, "the object has not arrived")
    return {}


def xet_storage(hub: Hub, what: list[str], body: bytes, token: str, *, streamed: bool) -> object:
    """Answer as Xet's storage: it takes xorbs (runs of chunks), and shards, which say what files are made of."""
    if token != STORAGE_TOKEN:
        raise Refused(401, "storage takes the token that the hub gave for it, and no other")
    match what:
        case ["xorbs", "default", name]:
            if hub.refuses_upload():
                raise Refused(hub.refuse_with, "storage is told to refuse this")
            fresh = name not in hub.xorbs
            hub.xorbs[name] = len(body)
            hub.uploads.append((name, len(body)))
            return {"was_inserted": fresh}
        case ["shards"]:
            for sha, size, xorbs in files_of(body):
                if not xorbs <= set(hub.xorbs):
                    raise Refused(400, "the shard names a xorb that has not arrived")
                hub.stored[sha] = size
            return b'{"type": "result", "result": 1}\n' if streamed else {"result": 1}
    raise Refused(404, "no such chunk")


def files_of(shard: bytes) -> Iterator[tuple[str, int, set[str]]]:
    """Give sha256, size and xorbs of every file in a shard (https://huggingface.co/docs/xet/shard)."""
    place = 48
    while shard[place : place + 32] != b"\xff" * 32:
        flags, count = struct.unpack_from("<II", shard, place + 32)
        entries = [place + 48 * number for number in range(1, count + 1)]
        size = sum(struct.unpack_from("<I", shard, entry + 36)[0] for entry in entries)
        xorbs = {hash_text(shard[entry : entry + 32]) for entry in entries}
        place += 48 * (1 + count * (2 if flags >> 31 else 1))
        assert flags >> 30 & 1, "a file in a git repository needs its sha256"
        yield hash_text(shard[place : place + 32]), size, xorbs
        place += 48


def hash_text(hashed: bytes) -> str:
    """Write a hash as Xet does: four little-endian numbers of 64 bits."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", hashed))


def git_blob(content: bytes) -> str:
    """Return git's hash of a file."""
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content, usedforsecurity=False).hexdigest()


def commit(hub: Hub, name: str, repository: Repository, lines: list[dict]) -> dict:
    """Add files to a repository, all of them or none."""
    if hub.refuse_commits:
        raise Refused(503, "commits are told to fail")
    tree, content = {}, {}
    for line in lines[1:]:
        value = line["value"]
        path = value["path"]
        if line["key"] == "file":
            content[path] = base64.b64decode(value["content"])
            blob = git_blob(content[path])
            tree[path] = {"type": "file", "path": path, "size": len(content[path]), "oid": blob}
            continue
        sha, size = value["oid"], value["size"]
        if hub.stored.get(sha) != size:
            raise Refused(400, f"LFS pointer pointed to a file that does not exist: {path}")
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha}\nsize {size}\n"
        blob = git_blob(pointer.encode())
        lfs = {"oid": sha, "size": size, "pointerSize": len(pointer)}
        tree[path] = {"type": "file", "path": path, "size": size, "oid": blob, "lfs": lfs}
    repository.tree |= tree
    repository.content |= content
    repository.commits.append(lines[0]["value"] | {"files": sorted(tree)})
    return {"commitUrl": f"{hub.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT, "success": True}


def damaged(hub: Hub, entry: dict) -> dict:
    """Return a file of the tree, with another sha256 if it is the one to be damaged."""
    if entry["path"] != hub.damage:
        return entry
    return entry | {"lfs": entry["lfs"] | {"oid": "f" * 64}} if "lfs" in entry else entry | {"oid": "f" * 40}


@contextlib.contextmanager
def running(token: str, owner: str) -> Iterator[Hub]:
    """Run the stand-in on a free port of loopback, for one user who has one token."""
    hub = Hub(token, owner)
    with serving(type("Bound", (Handler,), {"hub": hub})) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        yield hub
