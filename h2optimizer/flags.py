"""The flags that programs share, and the H2OConfig that they make: one that is not given takes H2OConfig's value."""

from __future__ import annotations

import argparse
import dataclasses
import re
from pathlib import Path

import torch

from h2optimizer.backends import ATTENTION_BACKENDS, resolve_backend
from h2optimizer.llama import H2OConfig
from h2optimizer.loading import QUANTIZERS
from utils.cli import InputError, count_or_all, seed
from utils.policies import POLICIES, named_policies
from utils.processes import Processes

DATA = Path(__file__).resolve().parents[1] / "data"
DEMO_REQUESTS, DEMO_MODEL = DATA / "summarization/demo.jsonl", DATA / "demo_model"  # bundled

# The flags that are not called what their H2OConfig field is: the names that H2O's own scripts use.
FLAG_OF_FIELD = {
    "window_length": "num_window_length",
    "num_heavy_hitters": "num_heavy_hitter_tokens",
    "position_rolling": "enable_position_rolling",
}


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """What `select_device` and `load_model` read."""
    add = parser.add_argument
    add("--model-name", default=str(DEMO_MODEL), help="a Llama checkpoint: a folder, or a name on the hub; or bundled")
    add(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="auto: the checkpoint's; on a CPU float32",
    )
    add("--device", default="auto", help="cuda, cuda:1, cpu …; auto: cuda where there is one")


def add_loading_flags(parser: argparse.ArgumentParser) -> None:
    """What `check_loading_flags` and `loading_options` read."""
    add = parser.add_argument
    add(
        "--tensor_parallel",
        action="store_true",
        help="the processes that torchrun started hold a part of the model each",
    )
    add(
        "--device_map",
        choices=("auto",),
        help="auto: one process spreads the layers over all GPUs, and the CPU's memory",
    )
    add("--quantize", choices=QUANTIZERS, help="weights of 8 or 4 bits, made while loading by the library named")


def add_cache_flags(parser: argparse.ArgumentParser) -> None:
    """What `h2o_config` reads."""
    h2o = parser.add_argument_group(
        "heavy-hitter cache",
        "a flag not given takes the value in h2optimizer/llama.py",
        argument_default=argparse.SUPPRESS,  # None is a value
    )
    add = h2o.add_argument
    add(
        "--enable_h2o_generation",
        action="store_true",
        default=False,
        help="use it; without it, the full cache of stock Llama",
    )
    add(
        "--num_heavy_hitter_tokens",
        type=int,
        help="heavy hitters in the window; -1 = half of it (streaming_llm: 4), 0 = local attention",
    )
    add("--num_window_length", type=int, help="slots kept: heavy hitters + recent")
    add("--enable_position_rolling", action=argparse.BooleanOptionalAction, help="rotate keys by slot index")
    add("--update_interval", type=int, help="slimming on every N-th step; 1 = H2O")
    add("--slimming", choices=("H", "mask"), help="H: gather into place; mask: boolean mask and copy")
    add("--backend", choices=("auto", *ATTENTION_BACKENDS), help="attention; auto: triton on CUDA, else sdpa")
    add(
        "--score",
        choices=tuple(POLICIES),
        help=f"what stays beside the newest slots: {named_policies()}",
    )
    add("--score_seed", type=seed, help="of --score random")
    add("--score_every_step", action=argparse.BooleanOptionalAction, help="mass on skipped steps as well")
    add("--score_decay", type=float, help="mass is multiplied by this before each addition")
    add("--score_norm", choices=("sum", "mean"), help="mean: mass per query that could see the slot")
    add("--score_queries", type=count_or_all, help="prefill mass from the last k, or all")
    add("--prefill_chunk", type=count_or_all, help="prompt tokens between slimmings, or all: the exact prefill")
    add(
        "--capture",
        action=argparse.BooleanOptionalAction,
        help="decode from CUDA graphs, where kernels do the slimming",
    )
    add("--compile", action=argparse.BooleanOptionalAction, help="and compile their steps, about 45 s a batch size")
    add("--group_reduce", choices=("sum", "first"), help="mass over the query heads of a KV head")


def h2o_config(args: argparse.Namespace) -> H2OConfig | None:
    """H2OConfig with the flags that were given; None for the full-cache baseline. Raises InputError."""
    flags = {field.name: FLAG_OF_FIELD.get(field.name, field.name) for field in dataclasses.fields(H2OConfig)}
    given = {name: getattr(args, flag) for name, flag in flags.items() if hasattr(args, flag)}
    if not args.enable_h2o_generation:
        if given:
            raise InputError(
                f"--{flags[next(iter(given))]}: does nothing without --enable_h2o_generation; add that, or drop it"
            )
        return None
    try:
        return H2OConfig(**given)
    except ValueError as error:
        raise InputError(in_flags(str(error))) from None


def in_flags(message: str) -> str:
    """What H2OConfig or its backend says, in the words of the command line."""
    for field, flag in FLAG_OF_FIELD.items():
        message = message.replace(field, flag)
    message = message.replace("score_every_step=False", "--no-score_every_step")
    message = re.sub(r"\b(capture|compile)=True", r"--\1", message)
    message = re.sub(r"\b(backend|slimming)='(\w+)'", r"--\1 \2", message)
    return message if message.startswith("--") else f"--{message}"


def attention_backend(h2o: H2OConfig | None, device: torch.device) -> str | None:
    """What attention runs on there; None for the full cache, which stock Llama attends to. Raises InputError."""
    if h2o is None:
        return None
    try:
        backend = resolve_backend(h2o.backend, device.type)
    except ValueError as error:
        raise InputError(in_flags(str(error))) from None
    if h2o.compile and backend != "triton":
        raise InputError(
            f"--compile: compiles the decode steps of --backend triton, this one is {backend}; leave it out"
        )
    return backend


def check_loading_flags(args: argparse.Namespace, processes: Processes) -> None:
    """Raises InputError for flags that do not go together, or not with how the program was started."""
    if args.tensor_parallel and not Processes.started_by_launcher():
        raise InputError(
            "--tensor_parallel: one process was started; start several with torchrun --nproc-per-node 2 "
            "run_summarization.py …, or leave it out"
        )
    for flag, given in {
        f"{processes.size} processes": processes.size > 1,
        "--device": args.device != "auto",
    }.items():
        if args.device_map is not None and given:
            raise InputError(f"--device_map: one process spreads the model over all devices; leave it out, or {flag}")
    for flag, given in {"quantize": args.quantize, "compile": getattr(args, "compile", False)}.items():
        if given and args.tensor_parallel:
            raise InputError(f"--{flag}: not with --tensor_parallel; leave one of them out")
    if processes.size > 1 and args.device not in ("auto", "cpu"):
        raise InputError(
            f"--device {args.device}: each of {processes.size} processes takes a GPU of its own; leave it out"
        )
    if processes.splits > 1 and args.device == "cpu" and torch.cuda.is_available():
        raise InputError(
            "--device cpu: --tensor_parallel takes the GPUs that it sees; set CUDA_VISIBLE_DEVICES= as well"
        )
