"""The importance matrix, by which llama.cpp's quantizer weighs rounding errors; its tools/imatrix makes the same."""

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from stages.lib.errors import UserError
from stages.lib.gguf.convert import HOME

if TYPE_CHECKING:
    import numpy as np


def collect(model: Any, texts: Iterable[list[int]], architecture: str) -> dict[str, "np.ndarray"]:
    """Return the mean squared input of every linear layer over `texts` (token ids): float32, (inputs,), by GGUF name.

    Raises `UserError` when llama.cpp knows no layer of a model of `architecture` (general.architecture).
    """
    import torch

    layers = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    names = gguf_names(layers, architecture, model.config.get_text_config().num_hidden_layers)
    sums = {name: torch.zeros(layers[name].in_features, dtype=torch.float64, device=model.device) for name in names}
    rows = 0

    def watch(name: str) -> Any:
        def add(module: Any, inputs: tuple[Any, ...], output: Any) -> None:
            sums[name] += inputs[0].reshape(-1, module.in_features).double().square().sum(0)

        return add

    hooks = [layers[name].register_forward_hook(watch(name)) for name in names]
    for tokens in texts:
        with torch.inference_mode():
            model(input_ids=torch.tensor([tokens], device=model.device))
        rows += len(tokens)
    for hook in hooks:
        hook.remove()
    return {names[name]: (total / rows).float().cpu().numpy() for name, total in sums.items()}


def gguf_names(layers: Iterable[str], architecture: str, blocks: int) -> dict[str, str]:
    """Return, for those of `layers` that llama.cpp's converter knows, the tensor's name in a GGUF file."""
    sys.path.insert(0, path := str(HOME / "gguf-py"))
    try:
        import gguf
    finally:
        sys.path.remove(path)  # it has packages of names that others may ask for, such as `tests`

    kind = next((kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), None)
    name_map = gguf.get_tensor_name_map(kind, blocks) if kind is not None else None
    names = {layer: name_map.get_name(layer) for layer in layers} if name_map else {}
    tensors = {layer: f"{name}.weight" for layer, name in names.items() if name}
    if not tensors:
        raise UserError(
            f"[gguf] importance_prompts: the converter in {HOME} knows no layer of a {architecture!r} model by its "
            f"name; set it to 0"
        )
    return tensors
