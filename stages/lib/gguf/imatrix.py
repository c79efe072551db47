"""An importance matrix for llama.cpp's quantizer: how large the inputs of each weight matrix are, column by column.

It is what llama.cpp's tools/imatrix collects, the mean square of every input channel over a text, taken here from the
merged model in transformers, so that no second program is needed. The quantizer weighs its rounding errors by it.
"""

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from stages.lib.errors import UserError
from stages.lib.gguf.convert import HOME

if TYPE_CHECKING:
    import numpy as np


def collect(model: Any, texts: Iterable[list[int]], architecture: str) -> dict[str, "np.ndarray"]:
    """Return the mean squared input of every linear layer of a transformers model over `texts`, lists of token ids.

    Keys are tensor names as in a GGUF file of `architecture` (general.architecture), values float32, (inputs,).
    Raises `UserError` when no layer's name is one that llama.cpp knows.
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

    watched = [layers[name].register_forward_hook(watch(name)) for name in names]
    for tokens in texts:
        with torch.inference_mode():
            model(input_ids=torch.tensor([tokens], device=model.device))
        rows += len(tokens)
    for hook in watched:
        hook.remove()
    return {names[name]: (total / rows).float().cpu().numpy() for name, total in sums.items()}


def gguf_names(layers: Iterable[str], architecture: str, blocks: int) -> dict[str, str]:
    """Return, for those of `layers` that llama.cpp's converter knows, the tensor's name in a GGUF file."""
    if (path := str(HOME / "gguf-py")) not in sys.path:
        sys.path.insert(0, path)
    import gguf

    kind = next((kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), None)
    known = gguf.get_tensor_name_map(kind, blocks) if kind is not None else None
    names = {layer: known.get_name(layer) for layer in layers} if known else {}
    found = {layer: f"{name}.weight" for layer, name in names.items() if name}
    if not found:
        raise UserError(
            f"[gguf] importance_prompts: no layer of a {architecture!r} model has a name that the converter in "
            f"{HOME} knows; set it to 0"
        )
    return found
