"""The fields that TRL's SFTConfig and GRPOConfig share: every one that changes the result is stated."""

import math
from pathlib import Path
from typing import Any

from stages.lib.recipe.tables import Grpo, Recipe, Sft
from stages.lib.train import ranks


def shared_arguments(recipe: Recipe, knobs: Sft | Grpo, rows: int, output: Path) -> dict[str, Any]:
    """Return the fields that both trainers have, from `[sft]` or `[grpo]`; an optimizer step takes `rows` rows.

    Of several ranks each takes as many of them, so that the step does not depend on their number.
    """
    own = rows // ranks.world_size()
    micro_batch = math.gcd(knobs.micro_batch_size, own)
    return {
        "output_dir": str(output),
        "max_steps": knobs.steps,
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": own // micro_batch,
        "learning_rate": knobs.learning_rate,
        "lr_scheduler_type": knobs.lr_scheduler,
        "lr_scheduler_kwargs": None,
        "warmup_steps": knobs.warmup_steps,
        "optim": knobs.optimizer,
        "optim_args": None,
        "weight_decay": knobs.weight_decay,
        "adam_beta1": knobs.adam_beta1,
        "adam_beta2": knobs.adam_beta2,
        "adam_epsilon": 1e-8,
        "max_grad_norm": knobs.max_grad_norm,
        "label_smoothing_factor": 0.0,
        "neftune_noise_alpha": None,
        "average_tokens_across_devices": True,
        "router_aux_loss_coef": None,
        "bf16": recipe.model.dtype == "bfloat16",
        "fp16": recipe.model.dtype == "float16",
        "tf32": None,
        "gradient_checkpointing": knobs.gradient_checkpointing,
        "torch_compile": False,
        "use_liger_kernel": False,
        "auto_find_batch_size": False,
        "seed": knobs.seed,
        "data_seed": knobs.seed,
        "dataloader_drop_last": False,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
        "save_strategy": "steps",
        "save_steps": knobs.save_steps,
        "save_total_limit": 2,
        "ignore_data_skip": False,
        "logging_strategy": "steps",
        "logging_steps": knobs.log_steps,
        "logging_nan_inf_filter": False,
        "eval_strategy": "no",
        "report_to": ["tensorboard"],
        "push_to_hub": False,
        "trust_remote_code": False,
    }
