"""Build a container image and note what came of it: time, size, packages, checks. With --again, whether the same again.

    python bench/images.py build cpu            bench/results/image-cpu.md
    python bench/images.py build cpu --again    then again without a cache; every installed file of both compared
    python bench/images.py is-recorded cuda     exit code 0 if the results are of exactly these files of docker/

The same variables as for `make image` count: DOCKER, BASE, CA_BUNDLE, PIP_CONFIG, TORCH_INDEX, BUILD_FLAGS.
"""

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import click

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
INPUTS = ["Dockerfile", "apt", "check.py", "common", "install", "llama"]
INPUTS += ["gotemplate/build", "gotemplate/go.mod", "gotemplate/main.go"]
LOCKS = {"cpu": ["cpu.lock", "cpu-cuda.lock"], "cuda": ["cuda.lock", "cpu.lock"]}
# Written anew on every start of a tool, and of no consequence: byte-code, logs, the loader's cache.
ASIDE = re.compile(r"(\.pyc|/__pycache__)$|^var/log/|^var/cache/ldconfig/|^llama/compile\.log$")
# Put there by the engine itself for the container that the files are read out of.
ENGINE = {".dockerenv", "dev/console", "etc/hostname", "etc/hosts", "etc/mtab", "etc/resolv.conf"}


@click.group(help=__doc__)
def main() -> None:
    pass


@main.command("is-recorded")
@click.argument("image", type=click.Choice(sorted(LOCKS)))
def is_recorded(image: str) -> None:
    path = RESULTS / f"image-{image}.md"
    if not path.is_file() or digest(image) not in path.read_text():
        click.echo(f"{path.relative_to(ROOT)} is not of these files in docker/")
        sys.exit(1)
    click.echo(f"{path.relative_to(ROOT)} is of these very files in docker/")


@main.command()
@click.argument("image", type=click.Choice(sorted(LOCKS)))
@click.option("--again", is_flag=True, help="Then build without any cache, and compare every installed file.")
def build(image: str, again: bool) -> None:
    rows, listings = [], []
    for flags in ["", " --no-cache"][: 1 + again]:
        started = time.time()
        log = make_image(image, os.environ.get("BUILD_FLAGS", "") + flags)
        seconds = time.time() - started
        identity = (ROOT / "data" / "cache" / f"image-{image}").read_text()
        inspected = json.loads(docker("image", "inspect", identity))[0]
        checked = re.search(r"check: \d.*", log)
        said = checked[0] if checked else "(its layers came from the engine's cache)"
        how = "without a cache" if flags else "with what the engine holds"
        rows.append(f"| {how} | {seconds:,.0f} | {inspected['Size'] / 1e9:.2f} | {said} |")
        if again:
            listings.append(listing(identity))
    engine = docker("version", "--format", "{{.Server.Version}}").strip()
    base = "base image made by debootstrap (Debian 12, minbase)" if os.environ.get("BASE") else "the default base image"
    lines = [
        f"# The image `{image}`",
        "",
        f"`python bench/images.py build {image}{' --again' * again}`, {time.strftime('%Y-%m-%d', time.gmtime())},",
        f"{platform.platform()}, {os.cpu_count()} processors, Docker {engine}, {base}.",
        f"Of files in docker/ with the sha256 {digest(image)}.",
        "",
        "| build | seconds | GB, unpacked | what its last layer said |",
        "|---|--:|--:|---|",
        *rows,
        "",
    ]
    if again:
        lines += compared(*listings)
    path = RESULTS / f"image-{image}.md"
    path.write_text("\n".join(lines))
    click.echo(path.read_text())


def digest(image: str) -> str:
    """Return a sha256 over all files of docker/ that the image is made of."""
    total = hashlib.sha256()
    for name in INPUTS + LOCKS[image]:
        total.update(hashlib.sha256((ROOT / "docker" / name).read_bytes()).digest())
    return total.hexdigest()


def make_image(image: str, flags: str) -> str:
    """Run `make image`, show what it prints, and return it."""
    command = ["make", "image", f"IMAGE={image}", f"BUILD_FLAGS={flags} --progress plain"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said = []
    for line in process.stdout:
        click.echo(line, nl=False)
        said.append(line)
    if process.wait():
        sys.exit(f"make image failed ({process.returncode})")
    return "".join(said)


def docker(*arguments: str) -> str:
    """Return what the client printed."""
    client = os.environ.get("DOCKER") or "docker"
    return subprocess.run([client, *arguments], capture_output=True, text=True, check=True).stdout


def listing(identity: str) -> dict[str, str]:
    """Return the sha256 of every file of the image, a link's target in place of it, by path."""
    container = docker("create", identity, "true").strip()
    client = os.environ.get("DOCKER") or "docker"
    found = {}
    try:
        with (
            subprocess.Popen([client, "export", container], stdout=subprocess.PIPE) as process,
            tarfile.open(fileobj=process.stdout, mode="r|") as archive,
        ):
            for member in archive:
                if ASIDE.search(member.name) or member.name in ENGINE:
                    continue
                if member.isfile():
                    content = archive.extractfile(member).read()
                    found[member.name] = hashlib.sha256(content).hexdigest()
                else:
                    found[member.name] = f"-> {member.linkname}"
    finally:
        docker("rm", container)
    return found


def compared(first: dict[str, str], second: dict[str, str]) -> list[str]:
    """Return the lines that say how two listings differ."""
    different = sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))
    whole = hashlib.sha256(json.dumps(sorted(first.items())).encode()).hexdigest()
    return [
        f"Byte-code, logs and the loader's cache aside, the two hold {len(first):,} and {len(second):,} files and",
        f"folders; {len(different)} of them differ or are in one alone.",
        "",
        *[f"- `{name}`" for name in different[:50]],
        f"sha256 of the first list: {whole}",
        "",
    ]


if __name__ == "__main__":
    main()
