"""The locks, audited by pip-audit against a stored list of advisories: safety-db, given out as OSV does.

pip-audit asks a server of OSV for each package and version. Where none can be reached, a small server here answers from
the list. That it would find something is shown by releases that the list names.
"""

import datetime
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

DOCKER = Path(__file__).parents[2] / "docker"
LOCKS = ("cpu.lock", "cuda.lock", "cpu-cuda.lock", "benchmark.lock", "sky.lock", "dev.lock")
KNOWN_BAD = ("jinja2==2.10", "pyyaml==5.1", "urllib3==1.24.1")


def installed(folder: Path) -> tuple[Path, Path]:
    """Install pip-audit and safety-db apart from the project; return that Python and the list."""
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    python = folder / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "pip-audit", "safety-db"], check=True)
    return python, next(folder.glob("venv/lib/*/site-packages/safety_db/insecure_full.json"))


def known(place: Path) -> tuple[dict[str, list[dict]], dict]:
    """Return the advisories by the package's canonical name, and what the list says of itself."""
    listed = json.loads(place.read_text())
    meta = listed.pop("$meta", {})
    return {canonicalize_name(name): entries for name, entries in listed.items()}, meta


def answers(listed: dict[str, list[dict]]) -> type[BaseHTTPRequestHandler]:
    """Return the handler that answers a question of OSV's form from the list."""

    class Answers(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            found = []
            for entry in listed.get(canonicalize_name(asked["package"]["name"]), []):
                if any(SpecifierSet(spec, prereleases=True).contains(asked["version"]) for spec in entry["specs"]):
                    found.append({"id": entry["id"], "aliases": [entry["cve"]] if entry.get("cve") else [],
                                  "details": entry["advisory"], "affected": []})  # fmt: skip
            body = json.dumps({"vulns": found} if found else {}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *given: object) -> None:
            """Say nothing: pip-audit reports."""

    return Answers


def audited(python: Path, url: str, file: Path, *options: str) -> tuple[int, list[str], list[str]]:
    """Return how many packages of a file pip-audit asked about, its findings, and what it left out."""
    command = [python, "-m", "pip_audit", "--vulnerability-service", "osv", "--osv-url", url, "--disable-pip",
               "--no-deps", "--format", "json", "--progress-spinner", "off", *options, "-r", file]  # fmt: skip
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1) or not done.stdout.strip():
        raise RuntimeError(f"pip-audit ended with {done.returncode}: {done.stderr[-2000:]}")
    packages = json.loads(done.stdout)["dependencies"]
    found = [
        f"{each['name']} {each['version']}: {(vuln['aliases'] or [vuln['id']])[0]}"
        for each in packages
        for vuln in each.get("vulns", [])
    ]
    left_out = [f"{each['name']}: {each['skip_reason']}" for each in packages if "skip_reason" in each]
    return len(packages) - len(left_out), found, left_out


def run(folder: Path, seed: int, count: int) -> list[str]:
    """Audit; return the lines of the report. There is no chance in it: `seed` and `count` are not used."""
    python, place = installed(folder)
    listed, meta = known(place)
    names = "import importlib.metadata as m; print(m.version('pip-audit'), m.version('safety-db'))"
    audit, release = subprocess.run([python, "-c", names], capture_output=True, text=True, check=True).stdout.split()
    server = ThreadingHTTPServer(("127.0.0.1", 0), answers(listed))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/v1/query"
    (bad := folder / "bad.txt").write_text("".join(f"{each}\n" for each in KNOWN_BAD))
    _, control, _ = audited(python, url, bad)
    rows, wrong = [], []
    for name in LOCKS:
        asked, found, left_out = audited(python, url, DOCKER / name, "--require-hashes")
        rows.append(f"| `{name}` | {asked} | {'; '.join(found) or 'none'} |")
        wrong += left_out
    server.shutdown()
    day = datetime.datetime.fromtimestamp(meta["timestamp"], datetime.UTC).date()
    missed = [each for each in KNOWN_BAD if not any(one.startswith(each.replace("==", " ")) for one in control)]
    wrong += [f"pip-audit found nothing for {each}, of which the list knows" for each in missed]
    return [
        f"pip-audit {audit} against safety-db {release} (of {day}, {len(listed):,} packages), the newest stored list "
        f"that could be installed here. What became known after it is not in it, so that nothing is found says little "
        f"of packages of 2026: with a network, `pip-audit --disable-pip -r docker/cpu.lock` asks today's. Shown "
        f"to find: {len(control)} advisories for {', '.join(KNOWN_BAD)}.",
        "",
        "| lock | packages asked about | an advisory for the locked version |",
        "|---|--:|---|",
        *rows,
        "",
        f"Wrong: {'; '.join(wrong) if wrong else 'nothing'}.",
    ]
