"""H2Optimizer: Llama and families like it with a heavy-hitter KV cache.

What is exported here is imported when it is first used, because that takes seconds: programs answer Ctrl-C before.
"""

from importlib import import_module
from pathlib import Path

__version__ = "0.1.0"

_HOMES = {
    "H2OConfig": "h2optimizer.llama",
    "H2OLlamaAttention": "h2optimizer.llama",
    "H2OLlamaForCausalLM": "h2optimizer.llama",
    "H2OMistralForCausalLM": "h2optimizer.mistral",
    "H2OModelForCausalLM": "h2optimizer.families",
    "H2OQwen2ForCausalLM": "h2optimizer.qwen2",
    "H2OQwen3ForCausalLM": "h2optimizer.qwen3",
    "H2OSmolLM3ForCausalLM": "h2optimizer.smollm3",
    "HHCache": "h2optimizer.utils.cache",
}
__all__ = [*_HOMES]

# Installed, utils/, scripts/ and run_summarization.py lie in this folder. In a clone they lie beside it.
_clone = Path(__file__).resolve().parents[1]
if (_clone / "utils").is_dir() and (_clone / "run_summarization.py").is_file():
    __path__.append(str(_clone))


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
