"""The packages of the locks against a stored list of advisories: safety-db, which pip installs."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

DOCKER = Path(__file__).parents[2] / "docker"
LOCKS = ("cpu.lock", "cuda.lock", "sky.lock", "dev.lock")


def locked(path: Path) -> dict[str, Version]:
    """Return name and version of each package that a lock pins."""
    pins = re.findall(r"^([\w.-]+)(?:\[[\w,.-]*\])?==([^\s;\\]+)", path.read_text(), re.MULTILINE)
    return {canonicalize_name(name): Version(version) for name, version in pins}


def run(folder: Path, seed: int, count: int) -> list[str]:
    """Compare; return the lines of the report. There is no chance in it: `seed` and `count` are not used."""
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), "safety-db"]
    subprocess.run(install, check=True)
    spec = importlib.util.find_spec("safety_db") or next(folder.glob("safety_db"))
    place = Path(spec.origin).parent if hasattr(spec, "origin") else spec
    listed = json.loads((place / "insecure_full.json").read_text())
    meta = listed.pop("$meta", {})
    release = next(folder.glob("safety_db-*.dist-info")).name.removeprefix("safety_db-").removesuffix(".dist-info")
    known = {canonicalize_name(name): entries for name, entries in listed.items()}
    lines = [
        f"The locks against safety-db {release} (timestamp {meta.get('timestamp')}, {len(known)} packages with an "
        f"advisory): the newest stored list that a package index had here. What became known after it is not in it, so "
        f"that nothing is found says little of packages of 2026; pip-audit with a network asks the index itself.",
        "",
        "| lock | packages | of them in the list | an advisory for the locked version |",
        "|---|--:|--:|---|",
    ]
    for name in LOCKS:
        pins = locked(DOCKER / name)
        found = []
        for package in sorted(pins.keys() & known.keys()):
            for entry in known[package]:
                if any(SpecifierSet(spec, prereleases=True).contains(pins[package]) for spec in entry["specs"]):
                    found.append(f"{package} {pins[package]}: {entry.get('cve') or entry['id']}")
        lines.append(f"| `{name}` | {len(pins)} | {len(pins.keys() & known.keys())} | {'; '.join(found) or 'none'} |")
    return lines
