"""GGUF files as checkpoints. transformers reads them, with the optional packages gguf and accelerate."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import is_accelerate_available, is_gguf_available

from h2optimizer.weights import CheckpointError


def is_gguf(name) -> bool:
    """Whether a checkpoint's name is that of a GGUF file."""
    return str(name).endswith(".gguf")


def located(name) -> tuple[str, dict[str, str]]:
    """Where from_pretrained finds a checkpoint: a folder or a name on the hub, and `gguf_file` for the path of one.

    Raises: CheckpointError if there is no such file, or what reads it is not installed.
    """
    if not is_gguf(name):
        return name, {}
    path = Path(name)
    if not path.is_file():
        raise CheckpointError("no such file; give the path of a GGUF file on this machine")
    if not (is_gguf_available() and is_accelerate_available()):
        raise CheckpointError("GGUF files need two more packages: pip install --upgrade gguf accelerate")
    return str(path.parent), {"gguf_file": path.name}


def config_of_file(name) -> PreTrainedConfig:
    """The configuration in a GGUF file.

    Raises: CheckpointError as `located`, and for settings that transformers does not read; else what it raises.
    """
    located(name)
    path = Path(name).resolve()
    return copy.deepcopy(_read(path, path.stat().st_mtime_ns))


@functools.lru_cache(maxsize=1)
def _read(path: Path, changed: int) -> PreTrainedConfig:
    """Takes seconds: the reader parses the whole vocabulary."""
    from transformers.integrations.gguf import read_gguf_metadata

    settings, tensors = read_gguf_metadata(str(path))
    scaled = [name for name in tensors if name.startswith(("rope_freqs", "rope_factors"))]
    scaled += [name for name in settings if name.endswith("rope.scaling.type") and settings[name] != "none"]
    if scaled:  # as in Llama 3.1: without a word, the model would be another
        raise CheckpointError(
            f"its RoPE is scaled ({scaled[0]}), which transformers does not read from GGUF files; give the checkpoint "
            "that the file was made from"
        )
    return AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
