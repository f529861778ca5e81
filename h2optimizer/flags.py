"""The flags that programs share, and the H2OConfig they produce. A flag not given takes H2OConfig's default."""

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

# Flags named differently from their H2OConfig fields: these are the names in H2O's own scripts.
FLAG_OF_FIELD = {
    "window_length": "num_window_length",
    "num_heavy_hitters": "num_heavy_hitter_tokens",
    "position_rolling": "enable_position_rolling",
}


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that `select_device` and `load_model` read."""
    add = parser.add_argument
    add("--model-name", default=str(DEMO_MODEL), help="a Llama checkpoint: a folder, or a name on the hub (bundled)")
    add(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="auto: the checkpoint's, or float32 on a CPU",
    )
    add("--device", default="auto", help="cuda, cuda:1, cpu …; auto: cuda if available")


def add_loading_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that `check_loading_flags` and `loading_options` read."""
    add = parser.add_argument
    add(
        "--tensor_parallel",
        action="store_true",
        help="split the model across the processes that torchrun started",
    )
    add(
        "--device_map",
        choices=("auto",),
        help="auto: one process spreads the layers over all GPUs and CPU memory",
    )
    add("--quantize", choices=QUANTIZERS, help="quantise weights to 8 or 4 bits while loading, with this library")


def add_cache_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that `h2o_config` reads."""
    h2o = parser.add_argument_group(
        "heavy-hitter cache",
        "defaults are those in h2optimizer/llama.py",
        argument_default=argparse.SUPPRESS,  # None is a value
    )
    add = h2o.add_argument
    add(
        "--enable_h2o_generation",
        action="store_true",
        default=False,
        help="use this cache (default: stock Llama's full cache)",
    )
    add(
        "--num_heavy_hitter_tokens",
        type=int,
        help="heavy hitters in the window; -1: half of it (streaming_llm: 4), 0: local attention",
    )
    add("--num_window_length", type=int, help="slots kept: heavy hitters + recent")
    add("--enable_position_rolling", action=argparse.BooleanOptionalAction, help="rotate keys by slot index")
    add("--update_interval", type=int, help="slim on every N-th step; 1: H2O")
    add("--slimming", choices=("H", "mask"), help="H: gather into place; mask: boolean mask and copy")
    add("--backend", choices=("auto", *ATTENTION_BACKENDS), help="attention backend; auto: triton on CUDA, else sdpa")
    add(
        "--score",
        choices=tuple(POLICIES),
        help=f"which slots to keep besides the newest: {named_policies()}",
    )
    add("--score_seed", type=seed, help="seed of --score random")
    add("--score_every_step", action=argparse.BooleanOptionalAction, help="add mass on steps without slimming too")
    add("--score_decay", type=float, help="factor on stored mass before each addition")
    add("--score_norm", choices=("sum", "mean"), help="mean: mass per query that could see the slot")
    add("--score_queries", type=count_or_all, help="take prefill mass from the last k queries, or all")
    add("--prefill_chunk", type=count_or_all, help="prompt tokens between slimmings; all: exact prefill")
    add(
        "--capture",
        action=argparse.BooleanOptionalAction,
        help="decode with CUDA graphs if kernels slim",
    )
    add("--compile", action=argparse.BooleanOptionalAction, help="compile these graphs too; 45 s per batch size")
    add("--group_reduce", choices=("sum", "first"), help="mass of a KV head; first: from its first query head only")


def h2o_config(args: argparse.Namespace) -> H2OConfig | None:
    """H2OConfig with the flags that were given; None for the full-cache baseline. Raises InputError."""
    flags = {field.name: FLAG_OF_FIELD.get(field.name, field.name) for field in dataclasses.fields(H2OConfig)}
    given = {name: getattr(args, flag) for name, flag in flags.items() if hasattr(args, flag)}
    if not args.enable_h2o_generation:
        if given:
            raise InputError(
                f"--{flags[next(iter(given))]}: has no effect without --enable_h2o_generation; add that flag"
            )
        return None
    try:
        return H2OConfig(**given)
    except ValueError as error:
        raise InputError(in_flags(str(error))) from None


def in_flags(message: str) -> str:
    """An error message of H2OConfig or a backend, rewritten in terms of command-line flags."""
    for field, flag in FLAG_OF_FIELD.items():
        message = message.replace(field, flag)
    message = message.replace("score_every_step=False", "--no-score_every_step")
    message = re.sub(r"\b(capture|compile)=True", r"--\1", message)
    message = re.sub(r"\b(backend|slimming)='(\w+)'", r"--\1 \2", message)
    return message if message.startswith("--") else f"--{message}"


def attention_backend(h2o: H2OConfig | None, device: torch.device) -> str | None:
    """The attention backend on this device; None for the full cache of stock Llama. Raises InputError."""
    if h2o is None:
        return None
    try:
        backend = resolve_backend(h2o.backend, device.type)
    except ValueError as error:
        raise InputError(in_flags(str(error))) from None
    if h2o.compile and backend != "triton":
        raise InputError(f"--compile: needs --backend triton, but the backend here is {backend}; leave --compile out")
    return backend


def check_loading_flags(args: argparse.Namespace, processes: Processes) -> None:
    """Raises InputError for flags that contradict each other or the way the program was started."""
    if args.tensor_parallel and not Processes.started_by_launcher():
        raise InputError(
            "--tensor_parallel: only one process was started; start several with torchrun --nproc-per-node 2 "
            "run_summarization.py …, or leave the flag out"
        )
    for flag, given in {
        f"{processes.size} processes": processes.size > 1,
        "--device": args.device != "auto",
    }.items():
        if args.device_map is not None and given:
            raise InputError(f"--device_map: uses one process and all devices; leave it out, or {flag}")
    for flag, given in {"quantize": args.quantize, "compile": getattr(args, "compile", False)}.items():
        if given and args.tensor_parallel:
            raise InputError(f"--{flag}: does not work with --tensor_parallel; leave one of them out")
    if processes.size > 1 and args.device not in ("auto", "cpu"):
        raise InputError(
            f"--device {args.device}: each of the {processes.size} processes uses its own GPU; leave it out"
        )
    if processes.splits > 1 and args.device == "cpu" and torch.cuda.is_available():
        raise InputError("--device cpu: --tensor_parallel uses all visible GPUs; hide them with CUDA_VISIBLE_DEVICES=")
