"""The model families that work, and the model of any of them, chosen by its checkpoint's model_type."""

from __future__ import annotations

from transformers import PreTrainedConfig

from h2optimizer.gguf_files import config_of_file, located
from h2optimizer.llama import H2OLlamaForCausalLM
from h2optimizer.mistral import H2OMistralForCausalLM
from h2optimizer.modeling import H2OForCausalLM
from h2optimizer.qwen2 import H2OQwen2ForCausalLM
from h2optimizer.qwen3 import H2OQwen3ForCausalLM
from h2optimizer.smollm3 import H2OSmolLM3ForCausalLM
from h2optimizer.weights import CheckpointError, config_of

FAMILIES: dict[str, type[H2OForCausalLM]] = {
    family.config_class.model_type: family
    for family in (
        H2OLlamaForCausalLM,
        H2OMistralForCausalLM,
        H2OQwen2ForCausalLM,
        H2OQwen3ForCausalLM,
        H2OSmolLM3ForCausalLM,
    )
}


def family_of(config: PreTrainedConfig | dict) -> type[H2OForCausalLM]:
    """The model class of a configuration. Raises CheckpointError for a family that there is none for."""
    kind = config.get("model_type") if isinstance(config, dict) else getattr(config, "model_type", None)
    if not isinstance(kind, str) or not kind:
        raise CheckpointError("has no config.json that names a model_type")
    if kind not in FAMILIES:
        *others, last = FAMILIES
        raise CheckpointError(
            f"a {kind} checkpoint; H2Optimizer runs {', '.join(others)} and {last}; to add a family, copy "
            "h2optimizer/mistral.py"
        )
    return FAMILIES[kind]


class H2OModelForCausalLM:
    """As transformers' AutoModelForCausalLM: makes the model of a checkpoint's family, for example an
    H2OLlamaForCausalLM.
    """

    @classmethod
    def from_pretrained(cls, name, *args, config=None, **kwargs) -> H2OForCausalLM:
        """The family's own `from_pretrained`, with its arguments. `name` may also be the path of a GGUF file.

        Raises: ValueError for a family that does not work, or a checkpoint that its class refuses.
        """
        try:
            folder, of_gguf = located(name)
            if of_gguf and config is None:
                config = config_of_file(name)
            known = isinstance(config, PreTrainedConfig)
            family = family_of(config if known else config_of(folder if config is None else config, **kwargs))
        except CheckpointError as error:
            raise CheckpointError(f"{name}: {error}") from None
        return family.from_pretrained(folder, *args, config=config, **of_gguf, **kwargs)

    @classmethod
    def from_config(cls, config: PreTrainedConfig, **kwargs) -> H2OForCausalLM:
        """A model of random weights. kwargs: `h2o`. Raises: as `from_pretrained`."""
        return family_of(config)(config, **kwargs)
