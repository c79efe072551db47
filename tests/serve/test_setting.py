"""What the Modelfile says reaches the model: file, system prompt, stops, context and sampling."""

import shutil
from pathlib import Path

import pytest

from stages.lib.answers import formats
from stages.lib.errors import UserError
from stages.lib.serve.setting import Setting, read_setting
from tests.support import micro, tiny_models

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "1 + 1?"}


@pytest.mark.torch
def test_all_settings_come_from_the_modelfile():
    folder = tiny_models.modelfile()
    assert read_setting(folder) == Setting(
        path=folder / "./model.q8_0.gguf",
        system=formats.XML.system_prompt,
        stops=["<eos>", "<end_of_turn>"],
        context_tokens=1024,
        sampling={"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0},
    )


@pytest.mark.torch
def test_a_modelfile_without_a_system_prompt_has_none(tmp_path):
    folder = Path(shutil.copytree(tiny_models.modelfile(), tmp_path / "ollama-modelfile"))
    text = (folder / "Modelfile").read_text()
    start = text.index("SYSTEM ")
    (folder / "Modelfile").write_text(text[:start] + text[text.index("PARAMETER") :])
    micro.restate(folder, "Modelfile")
    setting = read_setting(folder)
    assert setting.system == ""
    assert setting.with_system([USER]) == [USER]


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([USER], [SYSTEM, USER]),
        ([], [SYSTEM]),
        ([{"role": "system", "content": "No."}, USER], [{"role": "system", "content": "No."}, USER]),
        ([{"role": "system", "content": ""}, USER], [{"role": "system", "content": ""}, USER]),
        ([USER, {"role": "system", "content": "Late."}], [USER, {"role": "system", "content": "Late."}]),
    ],
)
def test_the_system_prompt_is_added_only_where_there_is_none(messages, expected):
    assert Setting(Path("x"), "Be brief.", [], 8, {}).with_system(messages) == expected


def test_what_is_not_finished_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"expected the finished output of ollama-modelfile there. Run: make ollama"):
        read_setting(tmp_path / "ollama-modelfile")
