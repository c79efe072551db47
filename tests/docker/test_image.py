"""The `cpu` image in a real engine: built from docker/, a short run of all stages in it, killed twice on the way.

The same variables as for `make image` count: DOCKER, BASE, CA_BUNDLE, PIP_CONFIG, TORCH_INDEX, BUILD_FLAGS. The first
build of the image takes minutes, later ones come from the engine's cache.
"""

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import micro

pytestmark = pytest.mark.slow  # builds an image

ROOT = Path(__file__).parents[2]
CLIENT = os.environ.get("DOCKER") or "docker"
STAGES = ["base-model", "prepare-data", "sft", "grpo", "infer", "merge", "gguf", "ollama-modelfile"]
PATIENCE_SECONDS = 300


@dataclass
class Checkout:
    """A copy of the repository with the image's id in it, and a secret that must turn up nowhere."""

    folder: Path
    planted: str
    image: str
    build_log: str

    def command(self, *arguments: str) -> list[str]:
        return ["make", "--no-print-directory", *arguments, "RUNTIME=docker", "GPUS=none", "RECIPE=short"]

    def environment(self) -> dict[str, str]:
        unwanted = ("DATA", "RECIPE", "RUNTIME", "GPUS", "IMAGE", "MAKEFLAGS")
        kept = {name: value for name, value in os.environ.items() if name not in unwanted}
        return kept | {"HF_TOKEN": self.planted, "WANDB_API_KEY": self.planted}

    def make(self, *arguments: str, said: str | None = None) -> subprocess.CompletedProcess:
        return subprocess.run(
            self.command(*arguments), cwd=self.folder, env=self.environment(), capture_output=True, text=True,
            check=False, input=said,
        )  # fmt: skip

    def inside(self, program: str, **bounds: str) -> subprocess.CompletedProcess:
        """Run a Python program as a stage would be."""
        settings = {"IMAGE_FILE": "data/cache/image-cpu", "GPUS": "none", **bounds}
        return subprocess.run(
            ["docker/run", "python", "-c", program], cwd=self.folder, env=self.environment() | settings,
            capture_output=True, text=True, check=False,
        )  # fmt: skip


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """Return a copy of the repository with a short recipe, its `cpu` image built with planted secrets."""
    if subprocess.run([CLIENT, "info"], capture_output=True, check=False).returncode:
        why = f"no container engine answers ({CLIENT} info), and these tests run the stages in one"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(why)
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("recipes", "stages", "docker", "make"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "Makefile", folder)
    recipe = micro.write_recipe(
        folder / "recipes",
        base_model={"hidden_size": 256, "intermediate_size": 256, "eval_problems": 250},
        sft={"steps": 400, "save_steps": 5},
        grpo={"steps": 60, "save_steps": 2},
        gguf={"types": ["f16", "q8_0"]},
    )
    # So short a training ends no completion in time, which [health] would rightly call a wasted run.
    recipe.write_text(recipe.read_text() + '\n[health]\nwarn_only = ["constant_reward", "cut_off"]\n')
    recipe.rename(recipe.with_name("short.toml"))

    planted = f"planted-{secrets.token_hex(16)}"
    given = {}
    for name in ("CA_BUNDLE", "PIP_CONFIG"):
        path = folder.parent / f"{planted[:12]}-{name}"
        before = os.environ.get(name)
        path.write_text((Path(before).read_text() if before else "") + f"\n# {planted}\n")
        if before or name == "PIP_CONFIG":
            given[name] = str(path)
    checkout = Checkout(folder, planted, "", "")
    build = checkout.make("image", "IMAGE=cpu", *(f"{name}={value}" for name, value in given.items()))
    assert build.returncode == 0, build.stdout[-3000:] + build.stderr[-3000:]
    checkout.build_log = build.stdout + build.stderr
    checkout.image = (folder / "data" / "cache" / "image-cpu").read_text()
    return checkout


@dataclass
class Story:
    """What `make all` printed when its container was killed in SFT, when make got TERM in GRPO, and when left alone."""

    killed: tuple[int, str]
    ended: tuple[int, str]
    whole: tuple[int, str]


@pytest.fixture(scope="session")
def story(checkout: Checkout) -> Story:
    """Run the short recipe to its end, with both interruptions."""
    artifacts = checkout.folder / "artifacts" / "short"

    def kill(process: subprocess.Popen) -> None:
        listed = subprocess.run(
            [CLIENT, "ps", "--quiet", "--filter", "label=temper", "--filter", f"ancestor={checkout.image}"],
            capture_output=True, text=True, check=True,
        ).stdout.split()  # fmt: skip
        subprocess.run([CLIENT, "kill", *listed], capture_output=True, check=True)

    return Story(
        interrupted(checkout, artifacts / "sft.unfinished", kill),
        interrupted(checkout, artifacts / "grpo.unfinished", lambda process: process.send_signal(signal.SIGTERM)),
        interrupted(checkout, None, None),
    )


def interrupted(checkout: Checkout, unfinished: Path | None, interrupt) -> tuple[int, str]:
    """Run `make all`; call `interrupt` when `unfinished` holds a checkpoint. Return make's exit code and its output."""
    process = subprocess.Popen(
        checkout.command("all"), cwd=checkout.folder, env=checkout.environment(), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    if unfinished is not None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while process.poll() is None and time.monotonic() < deadline:
            if list(unfinished.glob("checkpoints/checkpoint-*/complete")):
                interrupt(process)
                break
            time.sleep(0.05)
    output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    return process.returncode, output


def test_a_killed_container_leaves_what_the_next_make_carries_on_from(checkout, story):
    code, output = story.killed
    assert code == 2, output
    assert "Error 137" in output
    assert "sft: finished" not in output
    assert "prepare-data: finished" in output
    assert "sft: carrying on from artifacts/short/sft.unfinished/checkpoints" in story.ended[1]
    assert "prepare-data: " not in story.ended[1]


def test_term_to_make_reaches_the_trainer_which_saves_first(checkout, story):
    code, output = story.ended
    assert code != 0
    assert re.search(r"stopped by SIGTERM, saved at step \d+", output), output[-2000:]
    assert "grpo: carrying on from artifacts/short/grpo.unfinished/checkpoints" in story.whole[1]


def test_every_stage_finishes_in_the_image_as_the_calling_user_and_says_so(checkout, story):
    assert story.whole[0] == 0, story.whole[1][-3000:]
    for stage in STAGES:
        manifest = checkout.folder / "artifacts" / "short" / stage / "manifest.json"
        stated = json.loads(manifest.read_text())["environment"]
        assert stated["image"] == checkout.image
        assert stated["packages"]["torch"].startswith("2.13.0")
        assert (manifest.stat().st_uid, manifest.stat().st_gid) == (os.getuid(), os.getgid())
    again = checkout.make("all")
    assert again.returncode == 0, again.stderr
    assert "docker/run" not in again.stdout


def test_the_image_has_the_renderer_of_go_templates_and_no_go(checkout, story):
    assert checkout.inside("import shutil; print(shutil.which('temper-gotemplate'), shutil.which('go'))").stdout == (
        "/opt/temper/bin/temper-gotemplate None\n"
    )


def test_a_planted_secret_is_in_no_layer_manifest_or_log(checkout, story):
    needle = checkout.planted.encode()
    said = "".join(output for _, output in (story.killed, story.ended, story.whole)) + checkout.build_log
    assert checkout.planted not in said
    for arguments in (["history", "--no-trunc", checkout.image], ["image", "inspect", checkout.image]):
        assert needle not in subprocess.run([CLIENT, *arguments], capture_output=True, check=True).stdout
    searched = 0
    with subprocess.Popen([CLIENT, "save", checkout.image], stdout=subprocess.PIPE) as process:
        rest = b""
        while chunk := process.stdout.read(1 << 24):
            assert needle not in rest + chunk
            rest = chunk[-len(needle) :]
            searched += len(chunk)
    assert searched > 500_000_000
    for path in checkout.folder.rglob("*"):
        if path.is_file():
            assert needle not in path.read_bytes(), path
    # While the stage itself does see it.
    assert checkout.inside("import os; print(os.environ['HF_TOKEN'])").stdout == f"{checkout.planted}\n"


def test_only_artifacts_data_and_tmp_can_be_written_and_nothing_else_may_be_done(checkout):
    program = """
import json, os, pathlib
def writes(folder):
    path = pathlib.Path(folder) / 'try'
    try:
        path.write_text(''); path.unlink()
        return True
    except OSError as error:
        return error.strerror
status = dict(line.split(':\\t', 1) for line in open('/proc/self/status').read().splitlines() if ':\\t' in line)
places = 'artifacts data/cache /tmp . stages recipes / /opt/temper /usr /var'.split() + [os.environ['HOME']]
print(json.dumps({
    'writes': {place: writes(place) for place in places},
    'capabilities': [status[name] for name in ('CapInh', 'CapPrm', 'CapEff', 'CapBnd', 'CapAmb')],
    'no_new_privileges': status['NoNewPrivs'],
    'network': os.readlink('/proc/self/ns/net'),
    'init': open('/proc/1/comm').read().strip(),
    'user': [os.getuid(), os.getgid()],
    'devices': sorted(os.listdir('/dev')),
}))
"""
    done = checkout.inside(program)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    writable = [place for place, written in seen["writes"].items() if written is True]
    assert writable == ["artifacts", "data/cache", "/tmp", str(checkout.folder / "data" / "cache" / "home")]
    assert {written for written in seen["writes"].values() if written is not True} == {"Read-only file system"}
    assert set(seen["capabilities"]) == {"0000000000000000"}
    assert seen["no_new_privileges"] == "1"
    assert seen["network"] != str(Path("/proc/self/ns/net").readlink())
    assert seen["init"] in ("docker-init", "tini", "catatonit")
    assert seen["user"] == [os.getuid(), os.getgid()]
    assert not {"sda", "vda", "mem", "kmsg", "fuse"} & set(seen["devices"])


@pytest.mark.parametrize(
    ("stage", "links"), [("verify", ["lo"]), ("base_model", ["lo"]), ("ask", ["lo"]), ("merge", ["eth0", "lo"])]
)
def test_a_stage_that_fetches_nothing_has_no_network_and_one_that_fetches_has(checkout, tmp_path, stage, links):
    for name in ("docker", "make"):
        shutil.copytree(checkout.folder / name, tmp_path / name)
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / f"{stage}.py").write_text("import os; print(sorted(os.listdir('/sys/class/net')))")
    settings = {"IMAGE_FILE": str(checkout.folder / "data" / "cache" / "image-cpu"), "GPUS": "none"}
    done = subprocess.run(
        ["docker/run", "python", "-m", f"stages.{stage}"], cwd=tmp_path, env=checkout.environment() | settings,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout.strip()) == (0, str(links)), done.stderr


def test_a_program_that_takes_more_memory_than_it_may_is_ended(checkout):
    program = "print(len(bytearray(1 << 29)))"
    assert checkout.inside(program, MEMORY="2g").stdout == f"{1 << 29}\n"
    done = checkout.inside(program, MEMORY="300m")
    assert (done.returncode, done.stdout) == (137, "")


def test_a_program_that_starts_more_processes_than_it_may_can_not(checkout):
    program = """
import os, time
started = 0
try:
    while started < 200:
        if os.fork() == 0:
            time.sleep(3)
            os._exit(0)
        started += 1
except BlockingIOError:
    pass
print(started)
"""
    assert checkout.inside(program, PIDS="1000").stdout == "200\n"
    assert 40 < int(checkout.inside(program, PIDS="60").stdout) < 60


def test_a_user_that_the_image_does_not_know_can_use_it(checkout):
    program = "import getpass, llama_cpp, torch, transformers, trl; print(getpass.getuser())"
    options = [
        "--rm",
        "--read-only",
        "--tmpfs",
        "/tmp",
        "--user",
        "12345:12345",
        "--env",
        "USER=temper",
        "--env",
        "HOME=/tmp",
    ]
    done = subprocess.run(
        [CLIENT, "run", *options, checkout.image, "python", "-c", program], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "temper\n"), done.stderr


def test_the_finished_model_is_asked_talked_to_and_served(checkout, story):
    asked = checkout.make("ask", "Q=What is 17 + 25?")
    assert asked.returncode == 0, asked.stderr
    talked = checkout.make("chat", said="What is 1 + 1?\n/quit\n")
    assert talked.returncode == 0, talked.stderr
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        checkout.command("serve", f"PORT={port}"), cwd=checkout.folder, env=checkout.environment(),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        models = json.loads(answer_of(f"http://127.0.0.1:{port}/v1/models", server))
        assert [each["id"] for each in models["data"]] == ["short"]
    finally:
        server.send_signal(signal.SIGTERM)
        output, _ = server.communicate(timeout=PATIENCE_SECONDS)
    assert f":{port}/v1" in output


def answer_of(address: str, server: subprocess.Popen) -> bytes:
    """Return what the server answers, once it does."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            with urllib.request.urlopen(address) as answer:
                return answer.read()
        except OSError:
            assert server.poll() is None, "the server has ended"
            assert time.monotonic() < deadline, "the server does not answer"
            time.sleep(0.1)


def test_the_bill_of_materials_names_everything_with_licence_and_hash(checkout):
    done = checkout.make("sbom")
    assert done.returncode == 0, done.stderr
    document = json.loads((checkout.folder / "artifacts" / "sbom.json").read_text())
    assert (document["bomFormat"], document["specVersion"]) == ("CycloneDX", "1.6")
    python = {each["name"]: each for each in document["components"] if each["purl"].startswith("pkg:pypi/")}
    debian = {each["name"]: each for each in document["components"] if each["purl"].startswith("pkg:deb/")}
    lock = (ROOT / "docker" / "cpu.lock").read_text()
    for name in ("transformers", "numpy", "llama-cpp-python", "math-verify"):
        stated = python[name]["hashes"][0]["content"]
        assert f"--hash=sha256:{stated}" in lock, name
        assert python[name]["licenses"], name
    assert [name for name, each in python.items() if "hashes" not in each] == ["pip"]
    assert {"libc6", "gcc", "python3", "libgomp1"} <= set(debian)
    assert sum("hashes" in each for each in debian.values()) > 0.9 * len(debian)
    assert sum("licenses" in each for each in [*python.values(), *debian.values()]) > 0.95 * (len(python) + len(debian))


def test_programs_are_judged_in_a_container_that_may_make_namespaces_and_refused_in_another(checkout: Checkout):
    judge = """
from stages.lib.answers.sandbox import check_sandbox, passes_tests
check_sandbox()
programs = ["def f(x): return 7 * x", "def f(x): return 8 * x", "import os\\nos.execv('/bin/sh', ['sh'])",
            "import socket\\nsocket.socket()\\ndef f(x): return 42",
            "print(open('/etc/passwd').read())\\ndef f(x): return 42",
            "import os\\nos.fork()\\ndef f(x): return 42", "while True: pass"]
print([passes_tests("assert f(6) == 42", each) for each in programs])
"""
    given = checkout.inside(judge, SANDBOX="1")
    assert (given.returncode, given.stdout.strip()) == (0, str([True] + [False] * 6)), given.stderr
    refused = checkout.inside(judge)
    assert refused.returncode == 1
    assert "this machine gives no sandbox to run programs in" in refused.stderr
    assert "in a container: SANDBOX=1" in refused.stderr
