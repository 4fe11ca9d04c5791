"""Files beside a checkpoint's weights that a copy with other weights needs, too.

Everything is copied (tokenizer, processor, chat templates, code, license, under any name) except a
second copy of the weights. A file of weights is recognized by its format, and copied all the same
where the checkpoint does not load without it: an adapter beside its config, and in a folder below
those with a config beside them, such as a Dense layer of sentence-transformers or the audio
tokenizer of a speech model.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from peftkern.tools.checkpoints.checkpoint import (
    CONFIG,
    INDEX,
    SINGLE,
    Checkpoint,
    CheckpointError,
    folder_file,
)

_OF_TORCH = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_OF_OTHERS = (".h5", ".keras", ".msgpack", ".gguf", ".ggml", ".llamafile", ".tflite", ".ot", ".pte")
_OF_OTHERS += (".mlmodel", ".mlpackage", ".engine", ".nemo", ".distcp")
_NO_WEIGHTS = ("vocab", "tokenizer")  # with any suffix
_NEVER_NEEDED = ("optimizer", "scheduler", "rng_state", "training_args", "openvino")
# In the checkpoint's own folder transformers would load it over the weights; and what this package
# writes beside a checkpoint.
_OF_THIS_BASE = re.compile(r"adapter_(config\.json|model\..*)|(residual_adapter|adapter)/.*", re.S)
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
# Git's, the hub's download records, Python's; checkpoints that a Trainer left while it ran.
_FOLDERS_LEFT = re.compile(r"\..*|__pycache__|checkpoint-\d+|global_step\d+")


@dataclass(frozen=True)
class Companions:
    """Paths of files below the checkpoint's folder; in `left` also folders, with / at their end.

    Together with config.json and the weights these are all files of the folder.
    """

    copied: tuple[str, ...]
    left: tuple[str, ...]
    nbytes: int  # of the files to copy


def find_companions(checkpoint: Checkpoint, *, adapters: bool = True) -> Companions:
    """Find the files to be copied with the checkpoint, and those to be left.

    Links to files are followed as `folder_file` does; links to folders are left.

    Args: adapters, False leaves those of this very model: they do not fit other values of it.
    Raises: CheckpointError for a file to copy that is none, belongs to another folder, or may not
        be read.
    """
    folder = checkpoint.folder
    weights = {path.name for path in checkpoint.files}
    own = {CONFIG, *weights, *([INDEX] if weights != {SINGLE} else [])}
    copied, left, nbytes = [], [], 0
    for where, folders, files in os.walk(folder, onerror=_unreadable):
        prefix = "" if where == str(folder) else f"{os.path.relpath(where, folder)}/"
        for name in folders[:]:
            if os.path.islink(os.path.join(where, name)) or _FOLDERS_LEFT.fullmatch(name):
                left.append(f"{prefix}{name}/")
                folders.remove(name)  # and not walked through
        for path, name in ((prefix + name, name) for name in files):
            extra = is_weights(name) and not _needed(prefix, name, set(files))
            extra |= not adapters and _OF_THIS_BASE.fullmatch(path) is not None
            if path in own:
                continue
            if extra or name.startswith("."):
                left.append(path)
                continue
            file = folder_file(folder, path)
            if not os.access(file, os.R_OK):
                raise CheckpointError(f"{file}: may not be read")
            copied.append(path)
            nbytes += file.stat().st_size
    return Companions(tuple(sorted(copied)), tuple(sorted(left)), nbytes)


def _unreadable(error: OSError) -> None:
    raise error


def is_weights(name: str) -> bool:
    """Return whether a file of this name holds weights, or is the index of files that do."""
    name = name.lower().removesuffix(".index.json")
    if name.startswith(_NO_WEIGHTS):
        return False
    return name.endswith(_OF_TORCH + _OF_OTHERS) or ".onnx" in name


def _needed(prefix: str, name: str, beside: set[str]) -> bool:
    """Return whether the checkpoint needs these weights to load, too."""
    if name in _ADAPTERS:
        return "adapter_config.json" in beside
    of_torch = name.removesuffix(".index.json").endswith(_OF_TORCH)
    configured = any(other.endswith(CONFIG) for other in beside)
    return prefix != "" and of_torch and configured and not name.startswith(_NEVER_NEEDED)
