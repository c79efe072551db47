"""Print what an environment consists of as CycloneDX 1.6: every package with its version, sha256 and licence.

Python packages are those of the environment that runs this; the sha256 is that of the very file pip installed, as
docker/install noted it (for llama-cpp-python, which is compiled, that of its sdist). In an image also Debian's
packages, for which docker/apt noted the archive's sha256. A package of the base image that the archive had replaced
by then, and pip itself, which venv brings, have none.
"""

import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

HOME = Path(sys.prefix)
DEBIAN = Path("/usr/share/temper/debian.sha256")
DOC = Path("/usr/share/doc")


def main() -> None:
    components = python_packages() + (debian_packages() if DEBIAN.is_file() else [])
    document = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": {"type": "application", "name": "temper"}},
        "components": sorted(components, key=lambda each: each["purl"]),
    }
    json.dump(document, sys.stdout, indent=1)
    print()


def component(purl: str, name: str, version: str, licence: str | None, sha256: str | None) -> dict[str, Any]:
    """Return one entry; without a licence or hash where none is known."""
    return {
        "type": "library",
        "name": name,
        "version": version,
        "purl": purl,
        **({"licenses": [{"license": {"name": licence}}]} if licence else {}),
        **({"hashes": [{"alg": "SHA-256", "content": sha256}]} if sha256 else {}),
    }


def python_packages() -> list[dict[str, Any]]:
    """Return an entry for each installed distribution."""
    rows = [line.split() for line in (HOME / "wheels.sha256").read_text().splitlines()]
    hashes = {(canonical(name), version): sha256 for sha256, name, version in rows}
    lock = (HOME / "installed").read_text()
    for version, sha256 in re.findall(r"^llama-cpp-python==(\S+) \\\n +--hash=sha256:(\w+)$", lock, re.MULTILINE):
        hashes["llama-cpp-python", version] = sha256
    found = []
    for each in importlib.metadata.distributions():
        name = canonical(each.metadata["Name"])
        purl = f"pkg:pypi/{name}@{each.version}"
        found.append(component(purl, name, each.version, licence_of(each), hashes.get((name, each.version))))
    return found


def canonical(name: str) -> str:
    """Return a Python package's name as the locks spell it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def licence_of(package: importlib.metadata.Distribution) -> str | None:
    """Return the licence that a package's metadata states: its expression, else classifiers, else its first line."""
    stated: Any = package.metadata  # an email.message.Message, whose type says less than it can
    classifiers = [
        each.rpartition(" :: ")[2] for each in stated.get_all("Classifier", []) if each.startswith("License")
    ]
    text = (stated.get("License") or "").strip().splitlines()
    return stated.get("License-Expression") or ", ".join(classifiers) or (text[0][:100] if text else None)


def debian_packages() -> list[dict[str, Any]]:
    """Return an entry for each Debian package of the image."""
    rows = [line.split() for line in DEBIAN.read_text().splitlines()]
    hashes = {(name, version): sha256 for sha256, name, version in rows}
    listed = subprocess.run(
        ["dpkg-query", "--show", "--showformat", "${Package} ${Version} ${Architecture}\n"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    found = []
    for name, version, architecture in map(str.split, listed.splitlines()):
        copyright_file = DOC / name / "copyright"
        text = copyright_file.read_text(errors="replace") if copyright_file.is_file() else ""
        licences = sorted(set(re.findall(r"^License: *(\S.*?) *$", text, re.MULTILINE)))
        purl = f"pkg:deb/debian/{name}@{version}?arch={architecture}"
        licence = ", ".join(licences) or (f"see {copyright_file}" if text else None)
        found.append(component(purl, name, version, licence, hashes.get((name, version))))
    return found


if __name__ == "__main__":
    main()
