"""What llama.cpp's converter is told."""

import json

import pytest

from stages.lib.gguf import convert


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"mtp_num_hidden_layers": 1}, True),
        ({"text_config": {"mtp_num_hidden_layers": 1}}, True),
        ({"text_config": {"num_hidden_layers": 2}}, False),
        ({"num_hidden_layers": 2}, False),  # the converter refuses the word for a network that never has such layers
    ],
)
def test_layers_that_predict_several_tokens_are_left_out_where_config_json_counts_them(
    tmp_path, monkeypatch, config, told
):
    (tmp_path / "config.json").write_text(json.dumps(config))
    seen = []
    monkeypatch.setattr(convert, "run_converter", lambda arguments: seen.extend(arguments))
    convert.convert_model(tmp_path, tmp_path / "out.gguf", "f16", "name")
    assert ("--no-mtp" in seen) == told
    assert seen[:3] == [str(tmp_path), "--outfile", str(tmp_path / "out.gguf")]
