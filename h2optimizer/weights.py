"""Checks on checkpoints. transformers loads some without an error whose texts would be wrong."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PreTrainedConfig
from transformers.utils.peft_utils import find_adapter_config_file

# Arguments of from_pretrained that say where files are.
FINDING = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "subfolder")


class CheckpointError(ValueError):
    """A checkpoint cannot be used as it is. The message is one line that does not name the checkpoint."""


def refuse_adapter(name, **finding) -> None:
    """Raises CheckpointError for an adapter, which transformers applies only if peft is installed.

    `finding` holds from_pretrained's arguments named in FINDING.
    """
    # transformers 5.17 ignores the subfolder of a local folder
    beside = name is not None and Path(name, finding.get("subfolder") or "", "adapter_config.json").is_file()
    if beside or find_adapter_config_file(name, **finding) is not None:
        raise CheckpointError(
            "holds an adapter (adapter_config.json), which takes effect only where peft is installed; merge it into "
            "its base model with peft's merge_and_unload() and save that, or remove the file"
        )


def refuse_other_family(model_class, config: PreTrainedConfig | dict) -> None:
    """Raises CheckpointError for a configuration of another family, parts of which the class would ignore."""
    wanted = model_class.config_class.model_type
    given = getattr(config, "model_type", None) if not isinstance(config, dict) else config.get("model_type")
    if given is None:  # transformers assumes Llama-2-7B's shape and fills it with random weights
        raise CheckpointError("has no config.json that names a model_type")
    if given != wanted:
        family = model_class.stock_class().__name__.removesuffix("ForCausalLM")
        raise CheckpointError(
            f"a {given} checkpoint; {model_class.__name__} runs {family} only, H2OModelForCausalLM other families too"
        )
    get = config.get if isinstance(config, dict) else lambda name: getattr(config, name, None)
    if wanted == "llama" and get("sliding_window") is not None:  # which only transformers' full cache would follow
        raise CheckpointError("config.json has a sliding_window, which Llama's attention does not know; remove it")


def config_of(source, **kwargs) -> dict:
    """The configuration of a checkpoint, or in a file, as a dict. kwargs: from_pretrained's, of which few matter."""
    known = {name: kwargs[name] for name in (*FINDING, "gguf_file") if name in kwargs}
    return PreTrainedConfig.get_config_dict(source, **known)[0]


def sliding_window(config: PreTrainedConfig) -> int | None:
    """Tokens that a layer of sliding attention sees; None if every layer sees all."""
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None and "sliding_attention" not in layer_types:
        return None
    return getattr(config, "sliding_window", None)


def refuse_short_sliding_window(config: PreTrainedConfig, h2o) -> None:
    """Raises CheckpointError for an H2OConfig with more slots than the model's sliding attention reaches back."""
    reach = sliding_window(config)
    if reach is not None and reach < h2o.capacity:
        raise CheckpointError(
            f"its attention slides over {reach} tokens, fewer than window_length={h2o.window_length} + "
            f"update_interval={h2o.update_interval}: give a smaller window_length"
        )


def refuse_misfits(model, loading: dict, resized: bool = False) -> None:
    """Raises CheckpointError for weights that are missing, unused, NaN or infinite.

    `loading` is from_pretrained's output_loading_info. With `resized` the caller expects other shapes.
    """
    absent = sorted([*loading["missing_keys"], *(() if resized else (key for key, *_ in loading["mismatched_keys"]))])
    if absent:
        said = _counted(absent, "is missing or has the wrong shape", "are missing or have the wrong shape")
        raise CheckpointError(f"{said}, first {absent[0]}")
    if unused := sorted(key for key in loading["unexpected_keys"] if _is_of_decoder(key, model)):
        said = _counted(unused, "has no place", "have no place")
        raise CheckpointError(f"{said} in the model that config.json describes, first {unused[0]}")
    if broken := _not_finite(model):
        said = _counted(broken, "holds NaN or infinity", "hold NaN or infinity")
        raise CheckpointError(
            f"{said} in {str(model.dtype).removeprefix('torch.')}, first {broken[0]}; the file is damaged, or its "
            "numbers need another dtype"
        )


def _counted(weights: list[str], one: str, many: str) -> str:
    return f"1 weight {one}" if len(weights) == 1 else f"{len(weights)} weights {many}"


def _is_of_decoder(key: str, model) -> bool:
    """Whether a weight that was not loaded would have changed logits; buffers of old files and other heads do not."""
    part = re.search(r"(?:^|\.)(?:layers\.(\d+)|embed_tokens|norm|lm_head)\.", key)
    if part is None or "rotary_emb." in key:
        return False
    if getattr(model, "hf_quantizer", None) is not None:  # a quantiser adds tensors beside the weights
        return part[1] is not None and int(part[1]) >= model.config.num_hidden_layers
    return True


@torch.no_grad()
def _not_finite(model) -> list[str]:
    """Names of parameters and buffers with NaN or infinity. Makes one pass and waits once per device."""
    flags: dict[torch.device, tuple[list, list]] = {}
    for name, weight in [*model.named_parameters(), *model.named_buffers()]:
        for tensor in plain_tensors(weight.data):
            if tensor.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64) and tensor.numel():
                names, finite = flags.setdefault(tensor.device, ([], []))
                names.append(name)
                # aminmax, because isfinite writes a tensor as large as the weight
                finite.append(torch.stack(torch.aminmax(tensor)).isfinite().all())
    flags.pop(torch.device("meta"), None)  # weights on disk
    broken = set()
    for names, finite in flags.values():
        broken |= {name for name, good in zip(names, torch.stack(finite).tolist(), strict=True) if not good}
    return sorted(broken)


def plain_tensors(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors inside a sharded or quantised one; a plain one is returned as it is."""
    if hasattr(tensor, "__tensor_flatten__"):
        for inner in (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]):
            if isinstance(inner, torch.Tensor):  # a sharded one also lists its device mesh
                yield from plain_tensors(inner)
    else:
        yield tensor


def unpacking() -> dict:
    """from_pretrained's arguments for plain weights from a GGUF file: merged products and kernels need them."""
    from transformers import GgufConfig  # which imports torchao

    return {"quantization_config": GgufConfig(dequantize=True)}


def forget_file(model) -> None:
    """Remove what marks a model from a GGUF file as quantised, if its weights have been unpacked."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not getattr(quantizer, "packed_modules", True):
        del model.hf_quantizer, model.quantization_method, model.config.quantization_config
        model.is_quantized = False


class ChecksItsWeights:
    """A model that loads only checkpoints which it runs as they are, and saves them as the family's own."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *model_args,
        config=None,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
        **kwargs,
    ):
        """As PreTrainedModel's, for checkpoints that this class runs as they are.

        Raises: ValueError for one of another family, with an adapter beside its weights, or with weights that are
            missing, of the wrong shape (unless ignore_mismatched_sizes), of no place in the model, NaN or infinite.
        """
        name, finding = pretrained_model_name_or_path, {key: kwargs[key] for key in FINDING if key in kwargs}
        try:
            refuse_adapter(name, **finding)
            if isinstance(config, PreTrainedConfig):
                refuse_other_family(cls, config)
            elif (source := name if config is None else config) is not None:
                refuse_other_family(cls, config_of(source, **kwargs))
            if kwargs.get("gguf_file") is not None:
                kwargs = unpacking() | kwargs
            model, loading = super().from_pretrained(
                name, *model_args, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )  # other shapes are named below, with the weights that transformers would fill at random
            forget_file(model)
            refuse_misfits(model, loading, resized=ignore_mismatched_sizes)
        except CheckpointError as error:
            raise CheckpointError(f"{name}: {error}") from None
        return (model, loading) if output_loading_info else model

    def save_pretrained(self, save_directory, is_main_process: bool = True, *args, **kwargs):
        """As PreTrainedModel's; the checkpoint names the family's own class as its architecture.

        Raises: ValueError for push_to_hub, which would upload before the name is right.
        """
        if kwargs.get("push_to_hub"):
            raise ValueError("push_to_hub: save to a folder, then upload that")
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        self.config.architectures = [self.stock_class().__name__]
        if is_main_process:
            self.config.save_pretrained(save_directory)

    @classmethod
    def stock_class(cls) -> type:
        """The family's own class of transformers."""
        return next(base for base in cls.__mro__ if base.__module__.startswith("transformers."))
