"""The flags that programs share, and the H2OConfig they produce. A flag not given takes H2OConfig's default."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from h2optimizer.backends import ATTENTION_BACKENDS, resolve_backend
from h2optimizer.llama import H2OConfig
from h2optimizer.loading import QUANTIZERS, load_config, plans_of_model, quiet_libraries
from h2optimizer.settings import SavedSettings, SettingsError
from h2optimizer.utils.cli import InputError, count_or_all, number_or_share, seed
from h2optimizer.utils.policies import POLICIES, named_policies
from h2optimizer.utils.processes import Processes
from h2optimizer.utils.results import checkpoint_fingerprint

DATA = Path(__file__).resolve().parents[1] / "data"
DEMO_REQUESTS, DEMO_MODEL = DATA / "summarization/demo.jsonl", DATA / "demo_model"  # bundled

# Flags named differently from their H2OConfig fields: these are the names in H2O's own scripts.
FLAG_OF_FIELD = {
    "window_length": "num_window_length",
    "num_heavy_hitters": "num_heavy_hitter_tokens",
    "position_rolling": "enable_position_rolling",
}


def bundled(path: Path, help: str, default: str) -> dict:
    """`add_argument`'s options for a flag whose default is bundled with a clone: an installed program requires it."""
    if path.exists():
        return {"default": str(path), "help": f"{help} (default: {default})"}
    return {"required": True, "help": f"{help} (required)"}


def add_input_flag(parser: argparse.ArgumentParser) -> None:
    """`--input-path`, a file for `read_requests`."""
    parser.add_argument("--input-path", type=Path, **bundled(DEMO_REQUESTS, "jsonl of requests", "the bundled ones"))


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that `select_device` and `load_model` read."""
    add = parser.add_argument
    checkpoint = "a checkpoint: a folder, a name on the Hugging Face hub, or a GGUF file"
    add("--model-name", **bundled(DEMO_MODEL, checkpoint, "the bundled model"))
    add(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="dtype of weights and cache; auto: float32 on a CPU, elsewhere the checkpoint's (default: %(default)s)",
    )
    add("--device", default="auto", help="cuda, cuda:1, cpu, …; auto: cuda if there is one (default: %(default)s)")


def add_sharing_flag(parser: argparse.ArgumentParser) -> None:
    """`--share_prefixes`, which Summarizer, CacheLM and ablate.py's Lab take."""
    parser.add_argument(
        "--share_prefixes",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compute a beginning that several prompts share once, and let them continue from it; the texts are the "
        "same up to rounding. Settings that rule this out, such as --prefill_chunk, turn it off (default: yes)",
    )


def add_loading_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that `check_loading_flags` and `loading_options` read."""
    add = parser.add_argument
    add(
        "--tensor_parallel",
        action="store_true",
        help="split the model among the processes that torchrun starts (default: each process holds all of it)",
    )
    add(
        "--device_map",
        choices=("auto",),
        help="auto: a single process spreads the layers over all GPUs, and over CPU memory if they do not fit "
        "(default: one device)",
    )
    add(
        "--quantize",
        choices=QUANTIZERS,
        help="let this library quantise the weights to 8 or 4 bits while they are loaded; torchao-float8 also "
        "quantises what they are multiplied with, which makes prefill faster (default: not quantised)",
    )


def add_cache_flags(parser: argparse.ArgumentParser, always: bool = False, window: int | None = None) -> None:
    """The flags that `h2o_config` reads.

    Args:
        always: the program uses the cache without --enable_h2o_generation.
        window: the program's default window, if that is not H2OConfig's.
    """
    needed = "" if always else ", which need --enable_h2o_generation"
    saved = "" if always else ", unless h2o_config.json beside the checkpoint holds others"
    h2o = parser.add_argument_group(
        "heavy-hitter cache",
        f"Settings of the heavy-hitter cache{needed}. Their defaults are those of H2OConfig in h2optimizer/llama.py"
        f"{saved}. A slot is the place of one token in the cache; slimming drops slots; a slot's mass is the attention "
        "probability that its token has received.",
        argument_default=argparse.SUPPRESS,  # None is a value
    )
    add = h2o.add_argument
    add(
        "--enable_h2o_generation",
        action="store_true",
        default=always,
        help=argparse.SUPPRESS if always else "use the heavy-hitter cache (default: the stock model with a full cache)",
    )
    add(
        "--num_heavy_hitter_tokens",
        type=number_or_share,
        help="slots of the window for heavy hitters, or their share of it, such as 31/32; the others hold the newest "
        f"tokens. -1: half of the window (streaming_llm: 4); 0: newest tokens only {default_of('num_heavy_hitters')}",
    )
    add(
        "--head_budgets",
        help="even: all KV heads keep as many slots; or a plan that scripts/calibrate.py has measured, a JSON file: "
        "each keeps its own number of heavy hitters, on average that of --num_heavy_hitter_tokens, and all as many of "
        f"the newest tokens {default_of('head_budgets')}",
    )
    own = {} if window is None else {"default": window}
    shown = default_of("window_length") if window is None else f"(default: {window})"
    names = ("--num_window_length", "--window_length")
    add(*names, type=int, help=f"slots kept after slimming {shown}", **own)
    add(
        "--enable_position_rolling",
        action=argparse.BooleanOptionalAction,
        help="take positions from slots instead of the text, so that they never exceed the cache's size "
        f"{default_of('position_rolling')}",
    )
    add(
        "--update_interval",
        type=int,
        help=f"decode steps from one slimming to the next {default_of('update_interval')}",
    )
    add(
        "--slimming",
        choices=("H", "mask"),
        help=f"H: move slots in place; mask: boolean mask and copy, as in H2O {default_of('slimming')}",
    )
    add(
        "--backend",
        choices=("auto", *ATTENTION_BACKENDS),
        help="what computes attention; auto: triton on NVIDIA GPUs of compute capability 8 or more, else sdpa "
        f"{default_of('backend')}",
    )
    add(
        "--score",
        choices=tuple(POLICIES),
        help=f"what ranks the slots older than the newest: {named_policies()} {default_of('score')}",
    )
    add("--score_seed", type=seed, help=f"seed for --score random {default_of('score_seed')}")
    add(
        "--score_every_step",
        action=argparse.BooleanOptionalAction,
        help=f"add to mass on every decode step; if not, only on those that slim {default_of('score_every_step')}",
    )
    add(
        "--score_decay",
        type=float,
        help="multiply mass by this before each forward adds to it; 0: only the last forward counts "
        f"{default_of('score_decay')}",
    )
    add(
        "--score_norm",
        choices=("sum", "mean"),
        help="sum: rank by mass; mean: by mass divided by the number of queries that could add to it "
        f"{default_of('score_norm')}",
    )
    add(
        "--score_queries",
        type=count_or_all,
        help=f"take prefill mass from the prompt's last k tokens only, or from all {default_of('score_queries')}",
    )
    add(
        "--slots",
        choices=("auto", "int8"),
        help="what keys and values are stored as; auto: the model's dtype; int8: 8 bits with a scale for each slot and "
        f"head, which take half the memory of 16 bits {default_of('slots')}",
    )
    add(
        "--prefill_chunk",
        type=count_or_all,
        help=f"slim after every so many prompt tokens; all: after the whole prompt {default_of('prefill_chunk')}",
    )
    add(
        "--capture",
        action=argparse.BooleanOptionalAction,
        help=f"record decode steps as CUDA graphs, with backends triton and flash_attn {default_of('capture')}",
    )
    add(
        "--group_reduce",
        choices=("sum", "first"),
        help="query heads of a KV head that mass is taken from; sum: all of them; first: the first one "
        f"{default_of('group_reduce')}",
    )


def default_of(name: str) -> str:
    """How --help shows the default of a field of H2OConfig."""
    (value,) = (field.default for field in dataclasses.fields(H2OConfig) if field.name == name)
    words = {None: "all", True: "yes", False: "no"}
    return f"(default: {words[value] if value is None or isinstance(value, bool) else value})"


def h2o_config(
    args: argparse.Namespace, check_plan: bool = True, say: Callable[[str], None] | None = None
) -> H2OConfig | None:
    """H2OConfig with the flags that were given; None for the full-cache baseline. Raises InputError.

    A plan of head budgets must be for the checkpoint of `args.model_name`, if args has one.

    Args:
        check_plan: whether this process checks that. It reads the checkpoint, so one of several processes is enough.
        say: other fields are those saved beside the checkpoint, if there are any, and this prints which. None: the
            defaults.
    """
    flags = {field.name: FLAG_OF_FIELD.get(field.name, field.name) for field in dataclasses.fields(H2OConfig)}
    given = {name: getattr(args, flag) for name, flag in flags.items() if hasattr(args, flag)}
    if not args.enable_h2o_generation:
        if given:
            raise InputError(
                f"--{flags[next(iter(given))]}: has no effect without --enable_h2o_generation; add that flag"
            )
        return None
    try:
        saved = None if say is None else with_saved(args.model_name, given, say, check_plan)
        h2o = H2OConfig(**given) if saved is None else saved
    except ValueError as error:
        raise InputError(in_flags(str(error))) from None
    if check_plan and hasattr(args, "model_name"):
        plans_of_model(plans_in([given.get("head_budgets")]), args.model_name)
    return h2o


def with_saved(name: str, given: dict, say: Callable[[str], None], check_plan: bool = True) -> H2OConfig | None:
    """The settings saved beside a checkpoint, with the fields that were given in their place; None if there are none.

    `say` and `check_plan` are those of `h2o_config`.

    Raises: InputError for a bad file; ValueError for a bad field among those given.
    """
    try:
        if (saved := SavedSettings.find(name)) is None:
            return None
        h2o = saved.config(H2OConfig, given)
    except SettingsError as error:
        raise InputError(f"{error}{_way_out(saved, error.field, given) if given else ''}") from None
    if check_plan and "head_budgets" not in given:
        _check_budgets(saved, name)
    usual = {field.name: field.default for field in dataclasses.fields(H2OConfig)}
    taken = {name: value for name, value in saved.fields.items() if name not in given and value != usual[name]}
    shown = ", ".join(f"{name}={'a table' if isinstance(value, list) else value}" for name, value in taken.items())
    replaced = [
        FLAG_OF_FIELD.get(name, name) for name, value in saved.fields.items() if given.get(name, value) != value
    ]
    by_flags = f"; not from there: --{', --'.join(replaced)}" if replaced else ""
    say(f"cache settings from {saved.path}: {shown or 'all defaults'}{by_flags}")
    return h2o


def _check_budgets(saved: SavedSettings, name: str) -> None:
    """Raises InputError unless the head budgets beside a checkpoint are for it."""
    if (plan := saved.budgets()) is None:
        return
    quiet_libraries()
    config, weights = load_config(name), checkpoint_fingerprint(name)
    try:
        plan.check_model(config, weights)
    except ValueError as error:
        raise InputError(f"{error}, or give --head_budgets even") from None


def _way_out(saved: SavedSettings, field: str | None, given: dict) -> str:
    """Which flag to add, where a saved field does not go with those given but goes with the other saved ones."""
    try:
        saved.config(H2OConfig)
    except SettingsError:
        return ""  # the file is wrong by itself
    flags = " and ".join(f"--{FLAG_OF_FIELD.get(name, name)}" for name in given)
    if field is None or field in given:
        return f" (with {flags} given)"
    values = ": even, or a plan" if field == "head_budgets" else ""
    return f"; with {flags} given, give --{FLAG_OF_FIELD.get(field, field)} too{values}"


def plans_in(budgets: Iterable) -> list[str]:
    """Those values of --head_budgets that name the file of a plan."""
    return [of for of in budgets if isinstance(of, str) and of != "even"]


def in_flags(message: str) -> str:
    """An error message of H2OConfig or a backend, rewritten in terms of command-line flags."""
    for field, flag in FLAG_OF_FIELD.items():
        message = message.replace(field, flag)
    message = message.replace("score_every_step=False", "--no-score_every_step")
    message = re.sub(r"(?<![-/\w])head_budgets\b(?!\.)", "--head_budgets", message)  # not a file's name
    message = re.sub(r"\bcapture=True", "--capture", message)
    message = re.sub(r"\b(backend|slimming)='(\w+)'", r"--\1 \2", message)
    return message if message.startswith("--") else f"--{message}"


def attention_backend(h2o: H2OConfig | None, device: torch.device) -> str | None:
    """The attention backend on this device; None for the full cache of a stock model. Raises InputError."""
    if h2o is None:
        return None
    try:
        return resolve_backend(h2o.backend, device.type)
    except ValueError as error:
        raise InputError(in_flags(str(error))) from None


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
    if args.quantize and args.tensor_parallel:
        raise InputError("--quantize: does not work with --tensor_parallel; leave one of them out")
    if processes.size > 1 and args.device not in ("auto", "cpu"):
        raise InputError(
            f"--device {args.device}: each of the {processes.size} processes uses its own GPU; leave it out"
        )
    if processes.splits > 1 and args.device == "cpu" and torch.cuda.is_available():
        raise InputError("--device cpu: --tensor_parallel uses all visible GPUs; hide them with CUDA_VISIBLE_DEVICES=")
