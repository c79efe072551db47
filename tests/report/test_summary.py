"""The summary at the end of `make all`: what is in it, of a finished run and of one under way, in 80 columns."""

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from stages import report
from stages.lib.recipe.read import read_recipe
from stages.lib.report.summary import pairs, summary
from tests.support.uploads import write_run

pytestmark = pytest.mark.slow  # each writes a whole run
SECONDS = {"base-model": 30, "prepare-data": 9, "sft": 120, "grpo": 7000, "infer": 60, "merge": 5, "gguf": 50,
           "ollama-modelfile": 4}  # fmt: skip


def run_of(folder: Path) -> Path:
    write_run(folder)
    for stage, seconds in SECONDS.items():
        path = folder / stage / "manifest.json"
        manifest = json.loads(path.read_text())
        manifest["wall"]["seconds"] = float(seconds)
        path.write_text(json.dumps(manifest))
    return folder


def printed(folder: Path) -> dict[str, list[str]]:
    return dict(summary(read_recipe(folder / "tiny.toml"), folder))


def test_a_finished_run_is_summed_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_of(tmp_path)
    monkeypatch.chdir(tmp_path.parent)
    parts = dict(summary(read_recipe(tmp_path / "tiny.toml"), Path(tmp_path.name)))
    assert parts["Accuracy on held-out problems"] == [
        "      accuracy    95% interval  well formed  tokens  truncated",
        "base      3.1%    1.1% to 5.1%        98.7%    87.2       1.3%",
        "sft      25.2%  23.2% to 27.2%        98.7%    87.2       1.3%",
        "grpo     74.3%  72.3% to 76.3%        98.7%    87.2       1.3%",
        "GRPO raised accuracy: 25.2% before, 74.3% after, on 1,319 held-out problems",
        "(655 gained, 7 lost, exact McNemar test, p = 2.5e-158). The base model: 3.1%.",
    ]
    assert parts["GGUF files, each against the merged model"] == [
        "type     MB  mean KL, nats  same top token  right",
        "q8_0    0.1        3.5e-04           97.2%  73.5%",
        "q4_k_m  0.1        1.3e-02           97.2%  70.5%",
    ]
    assert parts["Time"] == [
        "base-model              30 s", "prepare-data             9 s", "sft                    2 min",
        "grpo              1 h 57 min", "infer                   60 s", "merge                    5 s",
        "gguf                    50 s", "ollama-modelfile         4 s", "all               2 h 01 min",
    ]  # fmt: skip
    assert parts["What to run"][0] == 'make ask RECIPE=tiny     one question: Q="..."'
    paths = [line.split()[0] for line in parts["Where it is"] if line.startswith(tmp_path.name)]
    assert all((tmp_path.parent / path).exists() for path in paths if not path.endswith("report.html"))
    assert len(paths) == 6
    assert max(len(f"  {line}") for lines in parts.values() for line in lines) <= 80


def test_of_a_run_under_way_it_says_where_it_stands_and_how_to_go_on(tmp_path: Path) -> None:
    run_of(tmp_path)
    for stage in ("infer", "merge", "gguf", "ollama-modelfile"):
        shutil.rmtree(tmp_path / stage)
    shutil.move(tmp_path / "grpo", tmp_path / "grpo.unfinished")
    (tmp_path / "grpo.unfinished" / "checkpoints" / "checkpoint-20").mkdir(parents=True)
    parts = printed(tmp_path)
    assert list(parts) == ["Time", "Where it is", "What to run"]
    assert "grpo                     under way or stopped, checkpoint at step 20" in parts["Time"]
    assert parts["Time"][-1].split() == ["all", "3", "min"]
    assert parts["What to run"] == ["make all RECIPE=tiny  goes on from here"]


def test_a_long_name_stays_whole_on_a_line_of_its_own() -> None:
    long = "artifacts/" + 60 * "x" + "/report.html"
    assert list(pairs([(long, "the page of this run"), ("short", "b")])) == [
        long, "    the page of this run", "short", "    b",
    ]  # fmt: skip


@pytest.mark.parametrize(("no_color", "is_bold"), [(None, True), ("1", False)])
def test_headings_are_bold_on_a_terminal_alone_and_not_with_no_color(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_color: str | None, is_bold: bool
) -> None:
    run_of(tmp_path)
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", no_color)
    arguments = ["--recipe", str(tmp_path / "tiny.toml"), "--artifacts", str(tmp_path)]
    monkeypatch.setattr("stages.report.page.write", lambda *rest: "page")
    for terminal in (True, False):  # click's runner stands for either
        result = CliRunner().invoke(report.main, arguments, color=terminal)
        assert result.exit_code == 0, result.output
        assert ("\x1b[1mTime\x1b[0m" in result.output) is (is_bold and terminal)
        assert ("\nTime\n" in result.output) is not (is_bold and terminal)
