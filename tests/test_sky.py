"""The SkyPilot task: SkyPilot's own parser takes it, and it runs what this checkout has."""

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
TASK = ROOT / "docker" / "sky.yaml"
LOCK = ROOT / "docker" / "sky.lock"
PARSE = """
import json, sys
import sky
STOP = {sky.clouds.CloudImplementationFeatures.STOP, sky.clouds.CloudImplementationFeatures.AUTOSTOP}
task = sky.Task.from_yaml_config(
    __import__("yaml").safe_load(open(sys.argv[1])),
    env_overrides=[("RECIPE", "tiny")],
    secrets_overrides=[("HF_TOKEN", sys.argv[2])] if len(sys.argv) > 2 else None,
)
task.validate_name()
task.validate_run()
print(json.dumps({
    "envs": task.envs,
    "secrets": {name: value.get_secret_value() for name, value in task.secrets.items()},
    "nodes": task.num_nodes,
    "resources": [
        {
            "accelerators": each.accelerators, "disk": each.disk_size, "memory": each.memory, "spot": each.use_spot,
            "down": each.autostop_config.down, "idle": each.autostop_config.idle_minutes,
            "cloud": str(each.cloud), "stops": each.cloud.check_features_are_supported(each, STOP) is None,
        }
        for each in task.resources
    ],
    "shown": str(task),
}))
"""


@pytest.fixture(scope="module")
def parse() -> object:
    """Return a function that reads a task file with SkyPilot, out of docker/sky.lock in an environment of its own.

    It is made once, under data/cache/, which needs a package index. Without one the tests are skipped, but not in CI.
    """
    digest = hashlib.sha256(LOCK.read_bytes() + sys.version.encode()).hexdigest()[:12]
    venv = ROOT / "data" / "cache" / f"sky-{digest}"
    venv.parent.mkdir(parents=True, exist_ok=True)
    with (venv.parent / ".sky.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (venv / "installed").is_file():
            shutil.rmtree(venv, ignore_errors=True)
            subprocess.run([sys.executable, "-m", "venv", venv], check=True)
            pip = [venv / "bin" / "pip", "install", "--quiet", "--only-binary", ":all:", "--require-hashes"]
            done = subprocess.run([*pip, "-r", LOCK], capture_output=True, text=True, check=False)
            if done.returncode and not os.environ.get("CI"):
                pytest.skip(f"SkyPilot can't be installed here: {done.stderr[-300:]}")
            assert done.returncode == 0, done.stderr
            (venv / "installed").touch()

    def read(task: Path, *arguments: str, home: Path) -> subprocess.CompletedProcess:
        own = {"PATH": os.environ["PATH"], "HOME": str(home), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
        return subprocess.run(
            [venv / "bin" / "python", "-c", PARSE, task, *arguments],
            cwd=ROOT, env=own, capture_output=True, text=True, check=False,
        )  # fmt: skip

    return read


def test_skypilot_reads_the_task_as_one_gpu_that_is_not_deleted_with_the_artifacts_on_it(parse, tmp_path):
    done = parse(TASK, home=tmp_path)
    assert done.returncode == 0, done.stderr
    task = json.loads(done.stdout)
    assert task["nodes"] == 1
    assert task["envs"] == {"RECIPE": "tiny"}
    assert task["secrets"] == {"HF_TOKEN": ""}
    gpus = {name for each in task["resources"] for name in each["accelerators"]}
    assert gpus == {"L40S", "A100-80GB", "H100", "H200"}
    assert {each["cloud"] for each in task["resources"]} == {"AWS", "GCP", "Azure", "Nebius", "OCI"}
    for each in task["resources"]:
        assert each["stops"]  # or SkyPilot raised: idle, a machine of that cloud would bill on
        assert list(each["accelerators"].values()) == [1]
        assert (each["disk"], each["memory"], each["spot"]) == (256, "64+", False)
        assert (each["down"], each["idle"]) == (False, 30)


def test_the_token_is_a_secret_that_skypilot_does_not_show(parse, tmp_path):
    done = parse(TASK, "hf_planted", home=tmp_path)
    assert done.returncode == 0, done.stderr
    task = json.loads(done.stdout)
    assert task["secrets"] == {"HF_TOKEN": "hf_planted"}
    assert "HF_TOKEN" not in task["envs"]
    assert "hf_planted" not in task["shown"]


@pytest.mark.parametrize(
    ("line", "wrong", "message"),
    [
        ("disk_size: 256", "disksize: 256", "disksize"),
        ("workdir: .", "workdr: .", "workdr"),
        ("H100: 1", "H100: one", "one"),
    ],
)
def test_skypilot_refuses_a_task_with_a_slip_in_it(parse, tmp_path, line, wrong, message):
    text = TASK.read_text()
    assert text.count(line) == 1
    task = tmp_path / "sky.yaml"
    task.write_text(text.replace(line, wrong))
    done = parse(task, home=tmp_path)
    assert done.returncode == 1
    assert message in done.stderr


@pytest.mark.parametrize("part", ["setup", "run"])
def test_the_shell_reads_what_the_machine_will_run(part):
    done = subprocess.run(["bash", "-n"], input=yaml.safe_load(TASK.read_text())[part], text=True, check=False)
    assert done.returncode == 0


def test_it_runs_targets_that_the_makefile_has_on_a_recipe_that_is_there():
    task = yaml.safe_load(TASK.read_text())
    wanted = re.findall(r"\bmake ([a-z-]+)", task["run"])
    assert wanted == ["doctor", "all", "node"]
    makefile = "".join(path.read_text() for path in [ROOT / "Makefile", *(ROOT / "make").glob("*.mk")])
    assert [name for name in wanted if not re.search(rf"^{name}:", makefile, re.M)] == []
    assert (ROOT / "recipes" / f"{task['envs']['RECIPE']}.toml").is_file()


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ({}, ["doctor - - -", "all - - -"]),
        ({"SKYPILOT_NUM_NODES": "1", "SKYPILOT_NODE_RANK": "0"}, ["doctor - - -", "all - - -"]),
        (
            {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "0"},
            ["doctor 2 0 10.0.0.7:29400", "all 2 0 10.0.0.7:29400"],
        ),
        (
            {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"},
            ["doctor 2 1 10.0.0.7:29400", "node 2 1 10.0.0.7:29400"],
        ),
    ],
)
def test_of_several_machines_the_first_runs_the_stages_and_the_others_train_with_it(tmp_path, nodes, expected):
    for name, text in (("sg", 'exec bash -c "$3"'), ("make", 'echo "$1 ${NODES:--} ${NODE_RANK:--} ${MASTER:--}"')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "RECIPE": "tiny",
        "SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8",
        **nodes,
    }
    run = yaml.safe_load(TASK.read_text())["run"]
    done = subprocess.run(["bash", "-c", run], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == expected


def test_the_usage_at_the_top_names_options_of_its_own_file():
    text = TASK.read_text()
    assert "--env RECIPE=" in text
    assert "--secret HF_TOKEN" in text
    assert "rsync -a temper:sky_workdir/artifacts/ artifacts/" in text
    assert yaml.safe_load(text)["name"] == "temper"


def test_the_lock_has_a_hash_for_every_package_and_no_address():
    text = LOCK.read_text()
    packages = re.findall(r"^([a-z0-9][\w.-]*)==", text, re.M)
    assert "skypilot" in packages
    assert len(packages) > 50
    assert all("--hash=sha256:" in block for block in re.split(r"^(?=[a-z0-9])", text, flags=re.M)[1:])
    assert "://" not in text
