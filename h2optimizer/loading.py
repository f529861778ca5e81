"""Loads a checkpoint, given its folder, hub name or GGUF file, as a model and a tokenizer. Every error is one line."""

from __future__ import annotations

import importlib.util
import os
import platform
from collections.abc import Iterable

import huggingface_hub
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TorchAoConfig,
)
from transformers.distributed import DistributedConfig
from transformers.utils import is_torchao_available

from h2optimizer import float8
from h2optimizer.families import H2OModelForCausalLM, family_of
from h2optimizer.gguf_files import config_of_file, is_gguf, located
from h2optimizer.llama import H2OConfig
from h2optimizer.utils.budgets import HeadBudgets
from h2optimizer.utils.cli import InputError
from h2optimizer.utils.processes import Processes
from h2optimizer.utils.results import checkpoint_fingerprint
from h2optimizer.weights import (
    CheckpointError,
    config_of,
    forget_file,
    refuse_adapter,
    refuse_misfits,
    refuse_other_family,
    refuse_short_sliding_window,
    unpacking,
)

# Settings of a model that is loaded before its cache is known: no sliding attention is too short for them.
ANY_CACHE = H2OConfig(window_length=2, update_interval=1)
# library-format
QUANTIZERS = ("torchao-float8", "torchao-int8", "torchao-int4", "bitsandbytes-int8", "bitsandbytes-int4")


def select_device(name: str) -> torch.device:
    try:
        device = torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
        if device.type == "cuda" and (device.index or 0) >= (visible := torch.cuda.device_count()):
            raise InputError(f"--device {name}: {visible} CUDA devices are visible; pass --device cpu")
        torch.zeros(1, device=device).item()  # torch accepts names of devices that it cannot use here
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"--device {name}: cannot be used ({reason}); pass cuda, cuda:1 or cpu") from None
    return device


def own_device(name: str, processes: Processes) -> torch.device:
    """`select_device` for one of several processes, each of which uses the GPU of its local rank. Raises InputError."""
    if processes.size == 1 or name != "auto" or not torch.cuda.is_available():
        return select_device(name)
    if processes.local_rank >= (visible := torch.cuda.device_count()):
        raise InputError(
            f"{processes.local_rank + 1} processes on one machine, but {visible} CUDA devices are visible: start "
            f"{visible}, or pass --device cpu"
        )
    return select_device(f"cuda:{processes.local_rank}")


def device_name(device: torch.device) -> str:
    """The device's name in results: the GPU's, or the kind of CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()


def load_config(name: str) -> PreTrainedConfig:
    """The configuration of a checkpoint, without its weights. Raises InputError, also for an unknown family."""
    try:
        folder, of_gguf = located(name)
        refuse_adapter(folder, local_files_only=True)  # without asking the hub: an adapter alone has no config.json
        if not of_gguf:
            family_of(config_of(name))  # AutoConfig does not know every family by name
        config = config_of_file(name) if of_gguf else AutoConfig.from_pretrained(name)
        refuse_adapter(folder)
        refuse_other_family(family_of(config), config)
    except CheckpointError as error:
        raise InputError(f"--model-name {name}: {error}") from None
    except Exception as error:
        raise unusable(name, error) from None
    return config


def check_windows(name: str, settings: Iterable[H2OConfig]) -> None:
    """Raises InputError for settings with more slots than a checkpoint's sliding attention reaches back."""
    quiet_libraries()
    config = load_config(name)
    try:
        for h2o in settings:
            refuse_short_sliding_window(config, h2o)
    except CheckpointError as error:
        raise InputError(f"--model-name {name}: {error}") from None


def fingerprint_of(name: str) -> str | None:
    """`checkpoint_fingerprint`, which for a hub name first fetches config.json. Raises InputError."""
    if not os.path.exists(name):  # pathlib raises an error for a name that no file can have
        quiet_libraries()
        load_config(name)
    return checkpoint_fingerprint(name)


def plans_of_model(paths: Iterable[str], name: str) -> list[HeadBudgets]:
    """The plans of head budgets in these files. Raises InputError unless each is for this checkpoint."""
    if not (paths := list(dict.fromkeys(paths))):
        return []
    quiet_libraries()
    config, weights = load_config(name), checkpoint_fingerprint(name)  # the latter reads what the former has fetched
    return plans_of_config(paths, config, weights)


def plans_of_config(paths: Iterable[str], config: PreTrainedConfig, weights: str | None = None) -> list[HeadBudgets]:
    """As `plans_of_model`, for a model's config and, if known, its `checkpoint_fingerprint`."""
    try:
        plans = [HeadBudgets.load(path) for path in paths]
        for plan in plans:
            plan.check_model(config, weights)
    except ValueError as error:
        raise InputError(f"--head_budgets {error}") from None
    return plans


def unusable(name: str, error: Exception, what: str | None = None) -> InputError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    if what is None and is_gguf(name):
        return InputError(f"--model-name {name}: not a GGUF file that can be used ({reason}); get it again, or another")
    return InputError(f"--model-name {name}: {what or 'cannot be loaded here or from the hub'} ({reason})")


def loading_options(
    name: str,
    device: torch.device,
    dtype: str,
    processes: Processes,
    quantize: str | None = None,
    device_map: str | None = None,
) -> dict:
    """from_pretrained's arguments for placing and quantising weights; empty for a plain model on one device.

    All arguments but `processes` are values of the flags of the same name.

    Raises: InputError for a choice that this checkpoint, device or installation does not allow.
    """
    config, options = load_config(name), {}
    quantized = getattr(config, "quantization_config", None)
    if quantize is not None:
        if quantized is not None:
            raise InputError(f"--quantize {quantize}: {name} is already quantised; leave the flag out")
        if is_gguf(name):
            raise InputError(f"--quantize {quantize}: the weights of a GGUF file are unpacked; leave the flag out")
        options |= quantization(quantize, config, device, dtype)
    if processes.splits > 1:
        heads = config.num_key_value_heads
        if heads % processes.size:
            fitting = " or ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
            raise InputError(
                f"--tensor_parallel: {processes.size} processes cannot share {heads} KV heads; start {fitting}, or "
                "leave the flag out, so that each process takes a share of the requests"
            )
        options["distributed_config"] = DistributedConfig(tp_size=processes.size, tp_plan="auto")
    elif device_map is not None:
        options["device_map"] = device_map
    elif quantize is not None or quantized is not None:
        options["device_map"] = {"": device}  # quantisation happens on this device, or moving would break it
    if "device_map" in options and not is_installed("accelerate"):
        raise InputError("--device_map and quantised weights: need accelerate; pip install accelerate")
    return options


def quantization(choice: str, config: PreTrainedConfig, device: torch.device, dtype: str) -> dict:
    """from_pretrained's arguments for --quantize: transformers' own configuration. Raises InputError."""
    library = choice.split("-")[0]
    if choice in ("torchao-float8", "torchao-int4") and (device.type != "cuda" or dtype not in ("auto", "bfloat16")):
        raise InputError(
            f"--quantize {choice}: its kernels need a GPU and bfloat16; pass --dtype bfloat16, or another choice"
        )
    if choice == "torchao-float8" and (capability := torch.cuda.get_device_capability(device)) < (8, 9):
        raise InputError(
            f"--quantize {choice}: needs a GPU of compute capability 8.9 or higher (Ada, Hopper or newer); this one "
            f"has {'.'.join(map(str, capability))}, so choose torchao-int8"
        )
    if not is_installed(library):
        raise InputError(f"--quantize {choice}: needs {library}; pip install {library}")
    if library == "torchao" and not is_torchao_available():
        raise InputError(f"--quantize {choice}: needs a newer torchao; pip install --upgrade torchao")
    if choice == "bitsandbytes-int8":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    if choice == "bitsandbytes-int4":
        own = (config.dtype if device.type == "cuda" else None) or torch.float32
        computed_in = own if dtype == "auto" else getattr(torch, dtype)
        settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": computed_in}
        return {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, **settings)}
    if choice == "torchao-float8":  # all products but the last, which gives the logits
        return {"quantization_config": TorchAoConfig(float8.config()), "dtype": torch.bfloat16}
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig

    if choice == "torchao-int8":
        return {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig())}
    tiles = Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d")  # torch's own kernel
    return {"quantization_config": TorchAoConfig(tiles), "dtype": torch.bfloat16}


def is_installed(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


def load_model(
    name: str, h2o: H2OConfig | None, device: torch.device, dtype: str = "auto", options: dict | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model (eval mode) and left-padding tokenizer of a checkpoint; transformers' own class if `h2o` is None.

    Args:
        name: a folder, a name on the hub, or the path of a GGUF file.
        dtype: value of --dtype; "auto" is the checkpoint's dtype (bfloat16 for a GGUF file), or float32 on a CPU.
        options: result of `loading_options`.

    Raises: InputError if it cannot be loaded.
    """
    folder = name
    try:
        config, (folder, of_gguf) = load_config(name), located(name)
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", **of_gguf)
        kwargs = {"dtype": _dtype(dtype, device, name)} | (options or {})
        if h2o is None:
            whole = {
                "output_loading_info": True,
                "ignore_mismatched_sizes": True,
            }  # for refuse_misfits
            file = of_gguf | {"config": config} | unpacking() if of_gguf else {}
            model, loading = family_of(config).stock_class().from_pretrained(folder, **file, **kwargs, **whole)
            forget_file(model)
            refuse_misfits(model, loading)
        else:
            model = H2OModelForCausalLM.from_pretrained(name, h2o=h2o, **kwargs)
    except InputError:
        raise
    except CheckpointError as error:
        reason = str(error).removeprefix(f"{folder}: ")
        raise InputError(f"--model-name {name}: {reason}") from None
    except torch.OutOfMemoryError:
        raise too_large(name, device) from None
    except Exception as error:  # a damaged checkpoint can fail in any of four libraries
        raise unusable(name, error) from None
    if tokenizer.pad_token is None or tokenizer.pad_token_id >= model.config.vocab_size:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    # The caller decides what is returned, not the checkpoint.
    model.config.output_attentions = model.config.output_hidden_states = False
    model.config.return_dict = True
    eos = model.generation_config.eos_token_id
    for token in eos if isinstance(eos, list) else [eos]:
        if token is not None and (type(token) is not int or not 0 <= token < model.config.vocab_size):
            raise InputError(
                f"--model-name {name}: eos_token_id {token!r} is not one of the model's tokens, 0 to "
                f"{model.config.vocab_size - 1}; correct generation_config.json or config.json"
            )
    # Requests decide how to sample, so the checkpoint's other generation defaults are dropped.
    model.generation_config = GenerationConfig(
        bos_token_id=model.generation_config.bos_token_id,
        eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    try:
        return (model if options else model.to(device)).eval(), tokenizer
    except torch.OutOfMemoryError:
        raise too_large(name, device) from None


def _dtype(choice: str, device: torch.device, name: str) -> torch.dtype | str:
    """from_pretrained's dtype for a value of --dtype."""
    if choice != "auto":
        return getattr(torch, choice)
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if is_gguf(name) else "auto"  # transformers would unpack GGUF files to float32


def too_large(name: str, device: torch.device) -> InputError:
    return InputError(f"--model-name {name}: does not fit into the memory of --device {device}")


def must_know(model, name: str, largest: int) -> None:
    """Raises InputError if the tokenizer produces a token outside the model's vocabulary."""
    if largest >= (known := model.config.vocab_size):
        raise InputError(
            f"--model-name {name}: its tokenizer produces token {largest}, but the model knows only "
            f"{known} tokens; use the tokenizer that belongs to the model"
        )


def quiet_libraries() -> None:
    """Silence the libraries: this project reports problems with a model itself."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity_error()


def render_chat(tokenizer, texts: list[str], model_name: str) -> str:
    """A conversation of alternating user and assistant turns in the chat template, ready for the next reply.

    Raises: InputError if there is no template, or it cannot render the conversation.
    """
    if not tokenizer.chat_template:
        raise InputError(
            f"--chat: the tokenizer of {model_name} has no chat template; use an instruct model, or leave --chat out"
        )
    bos = tokenizer.bos_token or ""  # the template adds one; the text may begin with another
    messages = [
        {"role": ("user", "assistant")[i % 2], "content": text.removeprefix(bos)} for i, text in enumerate(texts)
    ]
    to_reply = len(texts) % 2 == 1
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=to_reply)
        reason = "" if text else "it renders a message as no text"
    except Exception as error:  # templates are programs by the model's authors
        reason = " ".join(str(error).split())[:200] or type(error).__name__
    if reason:
        raise InputError(f"--chat: the chat template of {model_name} cannot be used ({reason}); leave --chat out")
    return text


def eos_tokens(model) -> set[int]:
    """The tokens that end a text, from the checkpoint's generation settings."""
    eos = model.generation_config.eos_token_id
    return {token for token in (eos if isinstance(eos, list) else [eos]) if token is not None}


def end_as_chats_do(model, tokenizer) -> None:
    """Let the tokenizer's end-of-sequence token end a text too; the settings of some instruct models lack it."""
    settings, eos = model.generation_config, tokenizer.eos_token_id
    known = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    settings.eos_token_id = [token for token in dict.fromkeys([*known, eos]) if token is not None] or None
