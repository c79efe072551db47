"""What each rank of a test does besides, on whatever machine: put as sitecustomize.py into a folder of PYTHONPATH.

It notes its adapter after every step in a file of the folder NOTES, and sleeps PAUSE seconds.
"""

import hashlib
import json
import os
import time
from pathlib import Path

if "RANK" in os.environ and "NOTES" in os.environ:
    from transformers import TrainerCallback, trainer

    class Watch(TrainerCallback):
        """Note the adapter's digest after every step."""

        def on_step_end(self, args, state, control, model=None, **kwargs):
            """Append a line to the file of this rank."""
            weights = b"".join(each.detach().numpy().tobytes() for each in model.parameters() if each.requires_grad)
            line = {"step": state.global_step, "adapter": hashlib.sha256(weights).hexdigest()}
            with Path(os.environ["NOTES"], f"{os.environ['RANK']}.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
            time.sleep(float(os.environ.get("PAUSE", "0")))

    trainer.DEFAULT_CALLBACKS.append(Watch)
