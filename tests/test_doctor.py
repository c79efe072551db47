"""`make doctor`: each thing that would end a run later has its line, with the remedy, and ends the doctor with 1.

nvidia-smi and docker are small programs on PATH that print what the real ones print; the hub is a server on loopback.
"""

import collections
import dataclasses
import email.utils
import json
import re
import shutil
import subprocess
import threading
import time
import tomllib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from stages import doctor
from stages.lib.machine.copies import local_model, start_tokenizer_check, tokenizer_finding
from stages.lib.machine.disk import disk_rooms, most_room
from stages.lib.machine.findings import Finding
from stages.lib.machine.hub import endpoint
from stages.lib.machine.memory import gpu_estimates
from stages.lib.machine.rehearsed import rehearsal_finding, start_rehearsal
from stages.lib.machine.shape import SHAPES
from stages.lib.recipe.read import read_recipe
from stages.lib.recipe.tables import Gguf, Grpo, Lora, Merge, Model, Ollama, Sft, Vllm
from tests.support.recipes import read_tables, write_tables

pytestmark = pytest.mark.slow  # each look starts several programs

ROOT = Path(__file__).parents[1]
H200 = "NVIDIA H200, 580.95.05, 143771, 143151, 9.0"
L4 = "NVIDIA L4, 580.95.05, 23034, 22563, 8.9"
DOCKER = {
    "ServerVersion": "28.2.2",
    "DockerRootDir": "/var/lib/docker",
    "Runtimes": {"io.containerd.runc.v2": {"path": "runc"}, "nvidia": {"path": "nvidia-container-runtime"}},
}
NO_DRIVER = (
    "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the latest NVIDIA "
    "driver is installed and running."
)
MISMATCH = "Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 580.95"
LLAMA = {
    "model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,
}  # fmt: skip
Usage = collections.namedtuple("Usage", "total used free")


class Machine:
    """A machine that is fine, until a test changes something about it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.monkeypatch = folder, monkeypatch
        self.free = {}  # bytes by folder
        self.status = {}  # HTTP status by part of the path
        self.asked = []  # path, method and Authorization of what reached the hub
        self.hub_seconds_ahead = 0.0
        self.model = "meta-llama/Llama-3.1-8B-Instruct"
        self.model_keys: dict[str, Any] = {"load_in_4bit": True}
        self.engine, self.dtype, self.share = "unsloth", "bfloat16", 0.5
        self.sources: list[dict[str, Any]] = []  # besides the tiny recipe's own
        self.commit = "c" * 40  # the newest of every repository on the hub
        (folder / "bin").mkdir()
        (folder / "shm").mkdir()
        monkeypatch.setenv("PATH", str(folder / "bin"))
        monkeypatch.setenv("HF_HOME", str(folder / "hf"))
        for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN", "RUNTIME", "DATA", "DOCKER", "http_proxy"):
            monkeypatch.delenv(name, raising=False)
        for name in ("GPUS", "PROCESSES", "NCCL_P2P_DISABLE"):
            monkeypatch.delenv(name, raising=False)
        for module in ("disk", "hub", "copies"):
            monkeypatch.setattr(f"stages.lib.machine.{module}.ARTIFACTS", folder / "artifacts")
        monkeypatch.setattr("stages.lib.machine.copies.CONTAINER_CACHE", folder / "cache")
        monkeypatch.setattr("stages.lib.machine.containers.SHARED_MEMORY", folder / "shm")
        monkeypatch.setattr("stages.lib.machine.containers.MEMINFO", folder / "meminfo")
        monkeypatch.setattr("stages.lib.machine.containers.CGROUP_LIMIT", folder / "memory.max")
        monkeypatch.setattr("stages.lib.machine.containers.CDI_FOLDERS", (folder / "cdi",))
        monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(0, 0, self.free_at(Path(path))))
        monkeypatch.setattr("stages.lib.machine.copies.start_tokenizer_check", lambda recipe, model, cache: None)
        monkeypatch.setattr("stages.lib.machine.rehearsed.start_rehearsal", lambda recipe, cache: None)
        self.memory(128_000_000, 120_000_000)
        self.program("nvidia-smi", H200)
        self.program("docker", json.dumps(DOCKER))

    def free_at(self, path: Path) -> int:
        return next((size for folder, size in self.free.items() if path.is_relative_to(folder)), 10**12)

    def memory(self, total_kb: int, available_kb: int) -> None:
        text = f"MemTotal:       {total_kb} kB\nMemFree:        1000 kB\nMemAvailable:   {available_kb} kB\n"
        (self.folder / "meminfo").write_text(text)

    def program(self, name: str, text: str, code: int = 0, stream: int = 1) -> None:
        path = self.folder / "bin" / name
        path.write_text(f"#!/bin/sh\nprintf '%s\\n' \"$*\" >> {self.folder}/{name}.calls\nwhile read -r line; do\n"
                        f"  printf '%s\\n' \"$line\" >&{stream}\ndone <<'END'\n{text}\nEND\nexit {code}\n")  # fmt: skip
        path.chmod(0o755)

    def env(self, **values: str) -> None:
        for name, value in values.items():
            self.monkeypatch.setenv(name, value)

    def cached(self, config: dict, *, shards: int = 2, there: int = 2, outside: bool = False) -> Path:
        hub = self.folder / ("hf" if outside else "cache/huggingface") / "hub"
        folder = hub / f"models--{self.model.replace('/', '--')}" / "snapshots" / ("a" * 40)
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config))
        names = [f"model-{number:05}-of-{shards:05}.safetensors" for number in range(1, shards + 1)]
        index = {"weight_map": {f"layer.{name}": name for name in names}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        for name in names[:there]:
            (folder / name).touch()
        return folder

    def recipe(self) -> Path:
        model = {"name": self.model, "engine": self.engine, "dtype": self.dtype, "revision": "a" * 40}
        tables = read_tables() | {"model": model | self.model_keys}
        if self.engine == "unsloth":
            tables["vllm"] = {"memory_share": self.share, "sequences": 64}
        tables["sft"] |= {"gradient_checkpointing": True, "micro_batch_size": 4}
        tables["grpo"] |= {"gradient_checkpointing": True, "micro_batch_size": 4}
        tables["data"]["sources"] += self.sources
        return write_tables(self.folder / "big.toml", tables)

    def look(self) -> tuple[int, dict[str, list[str]]]:
        """Return the exit code and the lines, by the name of the check."""
        result = CliRunner().invoke(doctor.main, ["--recipe", str(self.recipe())])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        lines = collections.defaultdict(list)
        *each, last = result.output.splitlines()
        assert last.startswith("doctor: ")
        for line in each:
            match = re.fullmatch(r"(ok  |warn|fail)  ([^:]+): (.+)", line)
            assert match, line
            assert (" To do: " in line) == (match[1] != "ok  "), line
            lines[match[2]].append(line)
        assert result.exit_code == int("\nfail  " in "\n" + result.output)
        return result.exit_code, lines


@pytest.fixture
def machine(tmp_path, monkeypatch) -> Machine:
    """Return a machine on which a big model can be trained, with a hub on loopback."""
    made = Machine(tmp_path, monkeypatch)

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            made.asked.append((self.path, self.command, self.headers.get("Authorization")))
            self.send_response_only(next((code for part, code in made.status.items() if part in self.path), 200))
            self.send_header("Date", email.utils.formatdate(time.time() + made.hub_seconds_ahead, usegmt=True))
            self.send_header("Location", "/elsewhere")
            if made.commit:
                self.send_header("X-Repo-Commit", made.commit)
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    made.env(HF_ENDPOINT=f"http://127.0.0.1:{server.server_address[1]}")
    yield made
    server.shutdown()
    server.server_close()


def test_a_machine_that_is_fine_has_only_ok_lines(machine):
    code, lines = machine.look()
    assert code == 0
    assert [line for each in lines.values() for line in each if not line.startswith("ok  ")] == []
    assert set(lines) == {
        "driver", "GPU", "GPU memory", "vLLM", "Docker", "/dev/shm", "memory", "disk", "model", "token", "clock",
        "tokenizer", "rehearsal",
    }  # fmt: skip
    assert len(lines["GPU memory"]) == 3
    assert "weights 5.7" in lines["GPU memory"][1]


def source(name: str, revision: str = "b" * 40) -> list[dict[str, Any]]:
    return [{"name": name, "revision": revision, "use": ["grpo"], "question": "q", "answer": "a"}]


def old_driver(machine):
    machine.program("nvidia-smi", "NVIDIA L4, 570.133.20, 23034, 22563, 8.9")


def no_gpu_program(machine):
    (machine.folder / "bin" / "nvidia-smi").unlink()


def shared_gpu(machine):
    machine.program("nvidia-smi", "NVIDIA H200, 580.95.05, 143771, 61023, 9.0")


def small_gpu(machine):
    machine.program("nvidia-smi", "NVIDIA RTX A4000, 580.95.05, 16376, 16101, 8.6")
    machine.model_keys = {}


def gpu_below_float32(machine):
    machine.program("nvidia-smi", L4)


def share_below_weights(machine):
    machine.share = 0.05


def no_runtime(machine):
    machine.program("docker", json.dumps(DOCKER | {"Runtimes": {"runc": {"path": "runc"}}}))


def docker_without_server(machine):
    machine.program("docker", "Cannot connect to the Docker daemon at unix:///var/run/docker.sock.", 1, stream=2)
    machine.env(RUNTIME="docker")


def docker_of_old(machine):
    errors = ["Cannot connect to the Docker daemon at unix:///var/run/docker.sock. Is the docker daemon running?"]
    machine.program("docker", json.dumps({"ServerErrors": errors}))
    machine.env(RUNTIME="docker")


def docker_not_allowed(machine):
    machine.program("docker", "permission denied while trying to connect to the Docker daemon socket", 1, stream=2)
    machine.env(RUNTIME="docker")


def docker_not_installed(machine):
    (machine.folder / "bin" / "docker").unlink()
    machine.env(RUNTIME="docker")


def shared_memory_of_docker(machine):
    machine.free[machine.folder / "shm"] = 64 << 20


def no_shared_memory(machine):
    (machine.folder / "shm").rmdir()


def little_memory(machine):
    machine.memory(32_000_000, 30_000_000)


def container_limit(machine):
    (machine.folder / "memory.max").write_text("17179869184\n")


def full_disk(machine):
    machine.free[machine.folder] = 50_000_000_000
    machine.free = {machine.folder / "shm": 10**12, **machine.free}


def hub_refuses(machine):
    machine.status["/resolve/"] = 403
    machine.env(HF_TOKEN="hf_planted")


def hub_wants_token(machine):
    machine.status["/resolve/"] = 401


def hub_has_no_revision(machine):
    machine.status["/resolve/"] = 404


def hub_is_away(machine):
    machine.env(HF_ENDPOINT="http://127.0.0.1:9")


def hub_is_forbidden(machine):
    machine.env(HF_HUB_OFFLINE="1")


def data_not_there(machine):
    machine.sources = source("data/mine.jsonl")


def data_away(machine):
    machine.sources = source("openai/gsm8k")
    machine.cached(LLAMA)
    machine.env(HF_ENDPOINT="http://127.0.0.1:9")


def model_folder_away(machine):
    machine.model = "./models/mine"


def half_a_copy_and_no_network(machine):
    machine.cached(LLAMA, there=1)
    hub_is_away(machine)


def token_with_line_break(machine):
    machine.env(HF_TOKEN="hf_planted\n")


def late_clock(machine):
    machine.hub_seconds_ahead = 3600


def early_clock_without_network(machine):
    hub_is_away(machine)
    machine.cached(LLAMA)
    # Only the sight of files: time goes on for everything else.
    machine.monkeypatch.setattr("time.time", lambda: 1_000_000.0)


def capability(text):
    def change(machine):
        machine.program("nvidia-smi", text)

    return change


def smi_fails(text, code):
    def change(machine):
        machine.program("nvidia-smi", text, code)

    return change


def gpus(value):
    def change(machine):
        machine.env(GPUS=value)

    return change


def runtime_local(machine):
    machine.env(RUNTIME="local")
    machine.monkeypatch.setattr("importlib.util.find_spec", lambda name: None)


@pytest.mark.parametrize(
    ("broken", "name", "found", "remedy"),
    [
        (old_driver, "driver", "570.133.20; CUDA 13's wheels need 580", "install driver 580 or newer"),
        (no_gpu_program, "driver", "there is no program nvidia-smi", "install driver 580 or newer"),
        (smi_fails(NO_DRIVER, 9), "driver", "couldn't communicate", "install driver 580 or newer"),
        (smi_fails(MISMATCH, 18), "driver", "NVML library version: 580.95", "sudo reboot"),
        (smi_fails("No devices were found", 6), "GPU", "the driver finds none", "nvidia-smi -L"),
        (
            smi_fails('Field "compute_cap" is not a valid field to query.', 2),
            "driver", "so old", "install driver 580 or newer",
        ),
        (smi_fails("Unable to determine the device handle: GPU is lost.", 15), "GPU", "GPU is lost", "sudo reboot"),
        (gpus("none"), "GPU", "GPUS=none", "GPUS=0"),
        (capability("Tesla V100-SXM2-16GB, 580.95.05, 16384, 16144, 7.0"), "GPU", "need 7.5", "take a newer GPU"),
        (capability("Tesla T4, 580.95.05, 15360, 14913, 7.5"), "GPU", "'bfloat16' needs 8.0", "dtype = 'float16'"),
        (shared_gpu, "GPU memory", "64.0 GB of 150.8 GB are free", "nvidia-smi lists it"),
        (small_gpu, "GPU memory", "grpo needs about", "load_in_4bit = true"),
        (share_below_weights, "vLLM", "for weights and vLLM; one completion", "raise memory_share to 0.06 or more"),
        (no_runtime, "Docker", "no NVIDIA runtime", "sudo nvidia-ctk runtime configure --runtime=docker"),
        (docker_without_server, "Docker", "Cannot connect", "sudo systemctl start docker"),
        (docker_of_old, "Docker", "Cannot connect", "sudo systemctl start docker"),
        (docker_not_allowed, "Docker", "permission denied", "sudo usermod -aG docker $USER"),
        (docker_not_installed, "Docker", "there is no program docker", "docs/rented-gpu.md"),
        (runtime_local, "Docker", "lacks torch, unsloth, vllm, a C compiler", "RUNTIME=docker"),
        (shared_memory_of_docker, "/dev/shm", "67 MB free", "--ipc host"),
        (no_shared_memory, "/dev/shm", "is not there", "--ipc host"),
        (little_memory, "memory", "need about 36.1 GB; 30.7 GB of 32.8 GB", "more memory"),
        (container_limit, "memory", "17.2 GB of 17.2 GB", "more memory"),
        (full_disk, "disk", "50.0 GB free", "on a larger disk"),
        (hub_refuses, "model", "the hub refuses it (403)", "see token"),
        (hub_refuses, "token", "HF_TOKEN is set and does not open it", "accept the licence at http://127.0.0.1"),
        (hub_wants_token, "token", "HF_TOKEN is not set", "export HF_TOKEN="),
        (hub_has_no_revision, "model", "not at this revision", "fix name and revision"),
        (hub_is_away, "model", "does not answer", "HF_ENDPOINT"),
        (hub_is_away, "token", "is gated and HF_TOKEN is not set", "accept the licence"),
        (hub_is_forbidden, "model", "HF_HUB_OFFLINE is set", "give a copy"),
        (data_not_there, "data", "'data/mine.jsonl': there is no such file", "fix [[data.sources]]"),
        (data_away, "data", "openai/gsm8k: no copy here", "DATA=FOLDER"),
        (model_folder_away, "model", "./models/mine: no folder with config.json", "copy the whole model there"),
        (half_a_copy_and_no_network, "model", "no copy here", "fix the network"),
        (token_with_line_break, "token", "a space or a line break", "give it again"),
        (late_clock, "clock", "s behind the hub's", "sudo timedatectl set-ntp true"),
        (early_clock_without_network, "clock", "in its future", "sudo timedatectl set-ntp true"),
    ],
)  # fmt: skip
def test_what_would_fail_later_fails_now_with_what_to_do(machine, broken, name, found, remedy):
    broken(machine)
    code, lines = machine.look()
    assert code == 1
    failed = [line for line in lines[name] if line.startswith("fail  ")]
    assert any(found in line and remedy in line.partition(" To do: ")[2] for line in failed), lines[name]
    assert "hf_planted" not in str(dict(lines))


@pytest.mark.parametrize(
    ("line", "name", "found"),
    [
        ("NVIDIA GB10, 580.95.05, [N/A], [N/A], 12.1", "GPU memory", "tells no size ([N/A])"),
        ("NVIDIA RTX A5000, 580.95.05, 48000, 47900, 8.6", "GPU memory", "would have to step down"),
    ],
)
def test_what_may_go_slower_or_can_not_be_known_is_a_warning(machine, line, name, found):
    machine.program("nvidia-smi", line)
    machine.share = 0.99
    code, lines = machine.look()
    assert code == 0
    assert any(each.startswith("warn  ") and found in each for each in lines[name]), lines[name]


def test_where_merge_and_gguf_would_compare_on_the_cpu_that_is_a_warning(machine):
    gpu_below_float32(machine)
    _, lines = machine.look()
    assert any(
        each.startswith("warn  ") and "merge and gguf needs about 40.8 GB" in each and "compare on the CPU" in each
        for each in lines["GPU memory"]
    ), lines["GPU memory"]


def test_a_login_counts_where_no_container_runs_and_a_copy_cut_short_is_none(machine, tmp_path):
    machine.sources = source("openai/gsm8k")
    (tmp_path / "token").write_text("hf_planted\n")
    machine.env(HF_TOKEN_PATH=str(tmp_path / "token"), RUNTIME="local")
    machine.look()
    assert {token for _, _, token in machine.asked} == {"Bearer hf_planted"}
    folder = machine.cached(LLAMA, outside=True)
    assert "a whole copy is at" in machine.look()[1]["model"][0]
    (folder / "model.safetensors.index.json").write_text("")
    assert "a whole copy is at" not in machine.look()[1]["model"][0]


def test_a_model_of_an_unknown_family_is_a_warning_and_no_guess(machine):
    machine.cached({"model_type": "mixtral"})
    code, lines = machine.look()
    assert code == 0
    assert lines["estimate"][0].startswith("warn")
    assert "model_type is 'mixtral'" in lines["estimate"][0]
    assert not lines["GPU memory"]
    assert not lines["disk"]


def test_gpus_chooses_the_devices_that_are_asked_about(machine):
    machine.env(GPUS="3")
    code, lines = machine.look()
    assert (machine.folder / "nvidia-smi.calls").read_text().startswith("--id=3 --query-gpu=name,driver_version,")
    assert code == 0
    assert not {"GPUs", "all_reduce"} & set(lines)


def several(machine, *cards: str, told: str = "") -> tuple[int, dict[str, list[str]]]:
    """Look at a machine with these GPUs, whose exchange tells `told`."""
    machine.env(GPUS=",".join(str(number) for number in range(2, 2 + len(cards))))
    machine.program("nvidia-smi", "\n".join(cards))
    machine.monkeypatch.setattr("stages.lib.machine.exchange.PROGRAM", f"print({told!r})")
    return machine.look()


RIGHT = """\
{"pair": [0, 1], "peer": true, "right": true, "gb_s": 390.0}
{"pair": [1, 0], "peer": true, "right": true, "gb_s": 380.5}
{"rank": 0, "sum_right": true, "seconds": 0.001, "bytes": 268000000}
{"rank": 1, "sum_right": true, "seconds": 0.002, "bytes": 268000000}
"""


def test_of_several_gpus_each_has_its_memory_said_and_what_they_exchange(machine):
    code, lines = several(machine, H200, H200, told=RIGHT)
    assert code == 0
    assert (machine.folder / "nvidia-smi.calls").read_text().startswith("--id=2,3 --query-gpu=")
    each = "NVIDIA H200, 150.1 GB of 150.8 GB free"
    assert lines["GPUs"] == [f"ok    GPUs: 2 alike (GPU 2: {each}; GPU 3: {each})"]
    assert lines["peer-to-peer"] == [
        "ok    peer-to-peer: 2 copies arrived as they were sent, the slowest at 380.5 GB/s (GPU 1 to GPU 0)"
    ]
    assert lines["all_reduce"] == [
        "ok    all_reduce: the sum of 268 MB over 2 GPUs is right on each, at 134.0 GB/s (bus bandwidth, as nccl-tests "
        "counts it)"
    ]


def test_the_gpu_with_the_least_free_memory_decides_what_fits(machine):
    code, lines = several(machine, H200, "NVIDIA H200, 580.95.05, 143771, 900, 9.0", told=RIGHT)
    assert code == 1
    assert "0.9 GB of 150.8 GB are free" in lines["GPU memory"][0]
    assert "GPU 3: NVIDIA H200, 0.9 GB of 150.8 GB free" in lines["GPUs"][0]


def test_gpus_of_two_kinds_are_a_warning_and_each_kind_is_looked_at(machine):
    _, lines = several(machine, H200, L4, told=RIGHT)
    assert lines["GPUs"][0].startswith("warn  GPUs: GPU 2: NVIDIA H200, 150.1 GB of 150.8 GB free; GPU 3: NVIDIA L4, ")
    assert "They are not alike" in lines["GPUs"][0]
    assert [line.split(": ")[1].split(",")[0] for line in lines["GPU"]] == ["NVIDIA H200", "NVIDIA L4"]


def test_gpus_between_which_nothing_could_be_tried_are_a_warning(machine):
    code, lines = several(machine, H200, H200, told='{"without": "torch 2.13.0+cpu sees 0 GPUs"}')
    assert code == 0
    assert lines["all_reduce"][0].startswith(
        "warn  all_reduce: not tried whether the 2 GPUs reach each other: torch 2.13.0+cpu sees 0 GPUs. To do: "
    )


def test_another_docker_client_and_gpus_by_cdi(machine):
    machine.env(DOCKER="podman")
    machine.program("podman", json.dumps({"version": {"Version": "5.4.0"}, "host": {}}))
    (machine.folder / "bin" / "docker").unlink()
    (machine.folder / "cdi").mkdir()
    (machine.folder / "cdi" / "nvidia.yaml").touch()
    code, lines = machine.look()
    assert lines["Docker"] == ["ok    Docker: engine 5.4.0"]
    assert code == 0


def test_without_docker_the_environment_itself_will_do_if_it_has_everything(machine):
    (machine.folder / "bin" / "docker").unlink()
    machine.program("cc", "")
    machine.monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    code, lines = machine.look()
    assert lines["Docker"][0].startswith("ok    Docker: not needed: no Docker engine answers")
    assert code == 0


def test_little_room_for_the_image_is_a_warning(machine):
    machine.free[Path("/var/lib")] = 12_000_000_000
    machine.free[Path("/var")] = 12_000_000_000
    code, lines = machine.look()
    assert code == 0
    assert any("building the CUDA image" in line for line in lines["disk"])


def test_a_whole_copy_needs_no_network_no_token_and_no_room(machine):
    hub_is_away(machine)
    machine.free[machine.folder / "shm"] = 10**12
    before = machine.look()[1]["disk"][0]
    folder = machine.cached(LLAMA)
    code, lines = machine.look()
    assert code == 0
    assert f"a whole copy is at {folder}" in lines["model"][0]
    assert lines["token"] == ["ok    token: not needed: the model is not fetched"]
    assert "(base 16.1, " in before
    assert "base" not in lines["disk"][0]
    assert machine.asked == []


@pytest.mark.parametrize("runtime", ["docker", "local"])
def test_a_container_has_a_hub_cache_of_its_own(machine, runtime):
    machine.cached(LLAMA, outside=True)
    machine.env(RUNTIME=runtime)
    assert ("a whole copy is at" in machine.look()[1]["model"][0]) == (runtime == "local")


def test_finished_stages_need_no_room_and_no_data(machine):
    machine.sources = source("openai/gsm8k")
    for stage in ("prepare-data", "merge", "gguf"):
        folder = machine.folder / "artifacts" / "big" / stage
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
    code, lines = machine.look()
    assert code == 0
    assert "prepare-data is finished" in lines["data"][0]
    assert "merge" not in lines["disk"][0]
    assert "gguf" not in lines["disk"][0]


@pytest.mark.parametrize("how", ["variable", "last time"])
def test_a_local_copy_of_the_data_is_found_where_data_says(machine, how):
    machine.sources = source("openai/gsm8k")
    file = machine.folder / "gsm8k" / "train.jsonl"
    file.parent.mkdir()
    file.write_text("{}\n")
    if how == "variable":
        machine.env(DATA=str(file.parent))
    else:
        (machine.folder / "artifacts" / "big").mkdir(parents=True)
        (machine.folder / "artifacts" / "big" / "data.path").write_text(f"{file.parent}\n")
    code, lines = machine.look()
    assert code == 0
    assert lines["data"] == [f"ok    data: openai/gsm8k: on this disk ({file})"]
    assert not any("gsm8k" in path for path, _, _ in machine.asked)


def test_the_hub_is_asked_by_head_and_a_redirect_is_not_followed_with_the_token(machine):
    machine.sources = source("openai/gsm8k")
    machine.status["/resolve/"] = 307
    machine.env(HF_TOKEN="hf_planted")
    code, lines = machine.look()
    assert code == 0
    assert sorted(machine.asked) == [
        (f"/datasets/openai/gsm8k/resolve/{'b' * 40}/.gitattributes", "HEAD", "Bearer hf_planted"),
        (f"/meta-llama/Llama-3.1-8B-Instruct/resolve/{'a' * 40}/config.json", "HEAD", "Bearer hf_planted"),
    ]
    assert lines["token"] == ["ok    token: HF_TOKEN is set"]


@pytest.mark.parametrize("status", [200, 307])
def test_for_a_dataset_without_revision_the_newest_commit_is_named(machine, status):
    machine.sources = source("openai/gsm8k", revision="")
    machine.status["/resolve/"] = status
    code, lines = machine.look()
    assert code == 1
    assert lines["data"] == [
        f"fail  data: openai/gsm8k: {endpoint()} has it, and the recipe states no revision. To do: write "
        f'revision = "{"c" * 40}", the newest commit there, below its name in the recipe; or make ... DATA=FOLDER'
    ]
    assert ("/datasets/openai/gsm8k/resolve/main/.gitattributes", "HEAD", None) in machine.asked
    machine.commit = ""  # a mirror may not say
    assert "write revision = a commit (40 hex digits) of its history, below" in machine.look()[1]["data"][0]
    machine.status["/datasets/"] = 403
    machine.status.pop("/resolve/")
    assert "the hub refuses it (403), and the recipe states no revision" in machine.look()[1]["data"][0]
    (machine.folder / "train.jsonl").write_text("{}\n")
    machine.env(DATA=str(machine.folder))
    assert machine.look()[1]["data"] == [f"ok    data: openai/gsm8k: on this disk ({machine.folder / 'train.jsonl'})"]


def test_a_hub_in_trouble_is_a_warning(machine):
    machine.status["/resolve/"] = 503
    code, lines = machine.look()
    assert code == 0
    assert lines["model"][0].startswith("warn")
    assert "503" in lines["model"][0]


def test_a_cpu_recipe_needs_no_gpu_no_docker_and_no_shared_memory(machine):
    machine.engine, machine.dtype, machine.model_keys = "trl", "float32", {}
    machine.model = "base-model"
    for program in ("nvidia-smi", "docker"):
        (machine.folder / "bin" / program).unlink()
    (machine.folder / "shm").rmdir()
    code, lines = machine.look()
    assert code == 0
    assert lines["GPU"] == ["ok    GPU: not needed: engine = 'trl' also runs on a CPU"]
    assert lines["/dev/shm"] == ["ok    /dev/shm: not needed on a CPU"]
    assert lines["model"] == ["ok    model: made by this run"]


def test_a_program_that_hangs_is_given_up_on(machine):
    machine.monkeypatch.setattr("stages.lib.machine.findings.COMMAND_SECONDS", 0.3)
    path = machine.folder / "bin" / "nvidia-smi"
    path.write_text("#!/bin/sh\nwhile :; do :; done\n")
    code, lines = machine.look()
    assert code == 1
    assert "nvidia-smi did not answer within 0.3 s" in lines["driver"][0]


@pytest.fixture
def checkout(finished, tmp_path, monkeypatch):
    """Give the folder, which is the current one, of a checkout where the stage base-model of micro.toml is finished."""
    for name in ("micro.toml", "own.py"):
        (tmp_path / name).write_text((finished / name).read_text())
    base = tmp_path / "artifacts" / "micro" / "base-model"
    base.parent.mkdir(parents=True)
    shutil.copytree(finished / "base-model", base)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.torch
def test_the_model_is_rehearsed_without_its_weights(checkout):
    for weights in checkout.glob("artifacts/micro/base-model/model/*.safetensors"):
        weights.unlink()
    run = read_recipe(checkout / "micro.toml")
    finding = rehearsal_finding(start_rehearsal(run, checkout), run, time.monotonic() + 300)
    assert (finding.status, finding.name) == ("ok", "rehearsal")
    assert re.fullmatch(
        r"a small copy of the model trains, merges and converts: its GGUF is \S+ nats .*", finding.found
    )


@pytest.mark.torch
def test_a_model_that_training_would_refuse_fails_in_the_doctor(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "llama", "quantization_config": {"quant_method": "fp8"}}')
    (model / "tokenizer.json").write_text("{}")
    tables = read_tables()
    tables["model"] |= {"name": str(model)}
    run = read_recipe(write_tables(tmp_path / "fp8.toml", tables))
    finding = rehearsal_finding(start_rehearsal(run, tmp_path), run, time.monotonic() + 120)
    assert finding.status == "fail"
    assert "its weights are quantized (fp8" in finding.found


@pytest.mark.parametrize(
    ("program", "status", "found"),
    [
        ("echo 'warning: x: no rehearsal with a small copy'", "warn", "no rehearsal with a small copy"),
        ("echo GGML_ASSERT; kill -ABRT $$", "fail", "was ended by SIGABRT: GGML_ASSERT"),
        ("echo 'Traceback (most recent'; echo 'ValueError: seven'; exit 1", "fail", "ValueError: seven"),
        ("while :; do :; done", "warn", "took too long and was ended"),
    ],
)
def test_however_a_rehearsal_ends_there_is_a_finding(machine, program, status, found):
    run = read_recipe(machine.recipe())
    process = subprocess.Popen(["/bin/sh", "-c", program], stdout=subprocess.PIPE, text=True, start_new_session=True)
    finding = rehearsal_finding(process, run, time.monotonic() + (-60 if "while" in program else 60))
    assert (finding.status, found in finding.found) == (status, True)


def test_no_rehearsal_without_a_model_or_where_the_recipe_leaves_it_out(machine):
    run = read_recipe(machine.recipe())
    assert start_rehearsal(run, machine.folder) is None
    assert "make prepare-data RECIPE=big does it" in rehearsal_finding(None, run, 0).found
    left_out = dataclasses.replace(run, model=dataclasses.replace(run.model, rehearsal=False))
    assert rehearsal_finding(None, left_out, 0).found == "left out: [model] rehearsal = false"


@pytest.mark.torch
def test_a_tokenizer_that_llama_cpp_reads_otherwise_fails(checkout):
    tmp_path, base = checkout, checkout / "artifacts" / "micro" / "base-model"
    run = read_recipe(checkout / "micro.toml")

    def look() -> Finding:
        process = start_tokenizer_check(run, local_model(run, tmp_path), tmp_path)
        return tokenizer_finding(process, run, time.monotonic() + 120)

    assert (look().status, look().name) == ("ok", "tokenizer")
    path = base / "model" / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    template = base / "model" / "chat_template.jinja"
    if template.is_file():
        template.write_text("{{ bos_token }}" + template.read_text())
    else:
        path.write_text(json.dumps(settings | {"chat_template": "{{ bos_token }}" + settings["chat_template"]}))
    finding = look()
    assert finding.status == "fail"
    assert "BOS is doubled" in finding.found


def test_a_tokenizer_check_that_takes_too_long_is_ended_and_said(machine, monkeypatch):
    process = subprocess.Popen(
        ["/bin/sh", "-c", "while :; do :; done"], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    finding = tokenizer_finding(process, read_recipe(machine.recipe()), time.monotonic() - 60)
    assert finding.status == "warn"
    assert "make prepare-data RECIPE=big" in finding.remedy
    assert process.returncode == -9


PAGE = (ROOT / "docs" / "rented-gpu.md").read_text()
BIG = sorted(path.stem for path in (ROOT / "recipes").glob("*.toml") if not path.stem.startswith("tiny"))


LINES = (ROOT / "bench" / "results" / "grpo_throughput.jsonl").read_text().splitlines()
MEASURED = {line["run"]: line["tokens_per_second"] for line in map(json.loads, LINES)}
QWEN3, QWEN25 = "unsloth:qwen3-1.7b:256:32", "unsloth:qwen2.5-3b:256:16"
LLAMA_4BIT = "unsloth:llama3.1-8b:64:16:4bit"


@pytest.mark.parametrize(
    ("name", "run", "factor"),
    [
        ("gemma3-1b-gsm8k", QWEN3, 0.70 * 0.53),
        ("qwen3-1.7b-dapo", QWEN3, 0.70),
        ("smollm2-135m-gsm8k", QWEN3, 0.70),
        ("smollm2-135m-gym", QWEN3, 0.70),
        ("qwen2.5-3b-gsm8k", QWEN25, 0.70),
        ("qwen2.5-3b-gym", QWEN25, 0.70),
        ("gemma3-4b-gsm8k", QWEN25, 0.70 * 0.53 * 3_085_938_688 / 4_300_079_472),
        ("llama3.1-8b-gsm8k", LLAMA_4BIT, 1.0),
        ("phi4-14b-gsm8k", LLAMA_4BIT, 8_030_261_248 / 14_659_507_200),
    ],
)
def test_the_times_on_the_page_follow_from_the_recipe_and_a_measured_speed(name, run, factor):
    grpo = tomllib.loads((ROOT / "recipes" / f"{name}.toml").read_text())["grpo"]
    completions = grpo["steps"] * grpo["prompts_per_step"] * grpo["completions_per_prompt"]
    tokens = completions * grpo["max_completion_tokens"]
    rate = MEASURED[run] * factor
    hours = tokens / rate / 3600
    assert f"| `{name}` | {tokens:,} | {rate:,.0f} | {hours:.2f} | {3 * hours:.2f} |" in PAGE


@pytest.mark.parametrize("name", BIG)
def test_the_gpus_and_disks_on_the_page_follow_from_the_estimate(name):
    match = re.search(
        rf"^\| `{re.escape(name)}` \| (\d+) GB(?:; training alone: (\d+) GB)? \| (\d+) GB \|$", PAGE, re.M
    )
    whole, alone, disk = (int(number or 0) for number in match.groups())
    recipe = tomllib.loads((ROOT / "recipes" / f"{name}.toml").read_text())
    run = read_recipe(ROOT / "recipes" / "tiny.toml")
    shape = SHAPES[recipe["model"]["name"]]
    # Only the tables that count: a recipe may have a revision to fill in.
    run = dataclasses.replace(
        run,
        **{
            key: kind(**recipe[key])
            for key, kind in {
                "model": Model,
                "lora": Lora,
                "sft": Sft,
                "grpo": Grpo,
                "vllm": Vllm,
                "gguf": Gguf,
            }.items()
        },
        data=dataclasses.replace(run.data, max_prompt_tokens=recipe["data"]["max_prompt_tokens"]),
        merge=Merge(**recipe["merge"]),
        ollama=Ollama(**recipe["ollama"]),
        save=recipe["save"],
    )
    for size, stages in ((whole, ("sft", "grpo", "merge and gguf")), (alone, ("sft", "grpo"))):
        needs = gpu_estimates(run, shape, size << 30)
        assert not size or max(needs[stage].peak_bytes for stage in stages) < 0.97 * (size << 30)
    room = most_room(disk_rooms(shape, run))
    assert disk - 1 < room / 1e9 <= disk
