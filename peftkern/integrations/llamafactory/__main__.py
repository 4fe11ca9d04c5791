"""Train with LLaMA-Factory and peftkern: `llamafactory-cli` with a callback, or with a kernel.

python -m peftkern.integrations.llamafactory train llama3_lora_sft.yaml
USE_V1=1 python -m peftkern.integrations.llamafactory sft train_lora_sft.yaml
torchrun --nproc-per-node 2 -m peftkern.integrations.llamafactory train llama3_lora_sft.yaml
"""

from __future__ import annotations

import sys

from llamafactory.extras.misc import is_env_enabled


def main() -> None:
    """Run the command in this process: LLaMA-Factory's own would start others without peftkern."""
    if is_env_enabled("USE_V1"):
        from llamafactory.v1 import launcher

        from peftkern.integrations.llamafactory import kernel  # noqa: F401, registers it

        launcher.main()
        return
    from llamafactory.train.tuner import run_exp

    from peftkern.integrations.transformers.callbacks import PeftKernCallback

    if sys.argv[1:2] == ["train"]:
        del sys.argv[1]
    run_exp(callbacks=[PeftKernCallback()])


if __name__ == "__main__":
    main()
