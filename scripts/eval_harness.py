"""lm-evaluation-harness tasks with the heavy-hitter cache, or with the full cache as the baseline.

    python scripts/eval_harness.py --model-name meta-llama/Meta-Llama-3-8B --tasks hellaswag,gsm8k \\
        --enable_h2o_generation --num_window_length 512 --output-path out/h2o.json

Model and cache have the flags of run_summarization.py. The results file is lm_eval's, with one more key, `h2o`:
settings, versions, and how much of each task came after an eviction. Answers are saved beside it as they come, so an
interrupted command resumes when it is run again. Answers from before the interruption are then not counted under `h2o`.

Imported (`import scripts.eval_harness`), it registers the model for lm_eval's own API:

    lm_eval.simple_evaluate("h2o_llama", model_args="pretrained=folder,window_length=512", tasks=["hellaswag"])
"""

import argparse
import dataclasses
import hashlib
import json
import os
import platform
import sys
import time
from itertools import chain
from pathlib import Path

if not __package__:  # run as a file of a clone
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from h2optimizer.utils import cli

if __name__ == "__main__":
    cli.begin()

import torch
import transformers

try:
    import lm_eval
    from lm_eval.api.registry import register_model
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import handle_non_serializable, make_table

    from h2optimizer.lm_eval_model import CacheLM
except ImportError as error:
    if __name__ != "__main__" and not __package__:  # neither the program nor the command
        raise
    missing = error.name.split(".")[0] if isinstance(error, ModuleNotFoundError) else None
    problem = f"{missing} is not installed" if missing else f"lm_eval cannot be imported ({error})"
    cli.report(cli.InputError(f"{problem}: pip install {missing or '--upgrade lm_eval'}"))
    sys.exit(cli.INPUT_ERROR)

from h2optimizer import H2OConfig
from h2optimizer.flags import add_cache_flags, add_model_flags, add_sharing_flag, attention_backend, h2o_config
from h2optimizer.loading import device_name, load_model, quiet_libraries, select_device
from h2optimizer.utils.bench import print_table
from h2optimizer.utils.cli import InputError, OneLineParser, count, count_or_auto, count_or_zero, output_file
from h2optimizer.utils.memory import is_out_of_memory
from h2optimizer.utils.results import checkpoint_fingerprint, replace_file, to_json

# HFLM's other arguments choose how it loads a model, which load_model does here.
PROMPT_TOKENS = ("prompt_tokens_computed", "prompt_tokens_shared")
PASSED_ON = "add_bos_token chat_template_args enable_thinking max_length prefix_token_id softmax_dtype think_end_token"


@register_model("h2o_llama")
class H2OLlamaLM(CacheLM):
    """A CacheLM with the argument names of lm_eval's API: `pretrained`, and the fields of H2OConfig.

    Args:
        pretrained: a folder, a name on the hub, or the path of a GGUF file.
        full_cache: the stock model, the baseline.
        device, dtype, share_prefixes: as the flags of run_summarization.py.
        kwargs: fields of H2OConfig (including `backend`), and the arguments of HFLM in PASSED_ON.
    """

    def __init__(
        self,
        pretrained,
        full_cache=False,
        device="auto",
        dtype="auto",
        batch_size=1,
        max_batch_size=64,
        share_prefixes=True,
        **kwargs,
    ):
        fields = {field.name for field in dataclasses.fields(H2OConfig)}
        flags = {name: kwargs.pop(name) for name in fields & kwargs.keys()}
        if unknown := set(kwargs) - set(PASSED_ON.split()):
            raise InputError(
                f"{min(unknown)}: unknown; h2o_llama takes the fields of H2OConfig and {', '.join(PASSED_ON.split())}"
            )
        if full_cache and flags:
            raise InputError(f"{min(flags)}: has no effect with full_cache; leave one of them out")
        h2o = None if full_cache else H2OConfig(**flags)
        model, tokenizer = load_model(str(pretrained), h2o, select_device(device), dtype)
        sizes = {"batch_size": batch_size, "max_batch_size": max_batch_size}
        super().__init__(model, tokenizer, share_prefixes, **sizes, **kwargs)


def names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def limit(text: str) -> int | float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not (0 < number < 1 or (number >= 1 and number.is_integer())):
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number of documents, or a share below 1")
    return number if number < 1 else int(number)


def json_object(text: str) -> dict:
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise argparse.ArgumentTypeError("must be a JSON object")
    return parsed


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add_model_flags(parser)
    add(
        "--tasks",
        type=names,
        required=True,
        help="comma-separated names or patterns of lm_eval tasks, or YAML files (required)",
    )
    add("--include_path", type=Path, help="a folder with your own tasks (default: none)")
    add("--num_fewshot", type=count_or_zero, help="examples before each document (default: the task's own number)")
    add("--limit", type=limit, help="use only this many documents of each task, or this share of them (default: all)")
    add(
        "--batch_size",
        type=count_or_auto,
        default=1,
        help="contexts computed together; auto: as many as memory holds (default: %(default)s)",
    )
    add("--max_length", type=count, help="the most positions to use (default: the model's)")
    add("--apply_chat_template", action="store_true", help="wrap contexts in the tokenizer's chat template")
    add(
        "--metadata",
        type=json_object,
        default={},
        help="JSON for tasks that need it, such as RULER's max_seq_lengths (default: {})",
    )
    add("--confirm_run_unsafe_code", action="store_true", help="allow tasks to run code that the model writes")
    add("--log_samples", action="store_true", help="save each document and its answers in the results")
    add(
        "--output-path",
        type=output_file,
        default=Path("out/eval_harness.json"),
        help="JSON of results (default: %(default)s)",
    )
    add("--overwrite", action="store_true", help="replace existing results (default: stop with an error)")
    add_sharing_flag(parser)
    add_cache_flags(parser)
    args = parser.parse_args(argv)
    if not args.tasks:
        parser.error("--tasks: is empty; `lm_eval ls tasks` lists all tasks")
    if args.include_path is not None and not args.include_path.is_dir():
        parser.error(f"--include_path {args.include_path}: no such folder")
    return args


def load_tasks(args: argparse.Namespace) -> tuple[TaskManager, list]:
    """The tasks and groups in --tasks, each checked on its first document. Raises InputError."""
    for built_in in (False, True):  # lm_eval's own tasks, some 14,000, take a while to index
        metadata = {"pretrained": args.model_name} | args.metadata
        manager = TaskManager(include_path=args.include_path, include_defaults=built_in, metadata=metadata)
        found = {name: [name] if Path(name).is_file() else manager.match_tasks([name]) for name in args.tasks}
        if all(found.values()) and not set(manager.all_groups + manager.all_tags) & set(chain(*found.values())):
            break  # a group's members may be built in
    if unknown := [name for name, matches in found.items() if not matches]:
        raise InputError(
            f"--tasks {unknown[0]}: no such task; `lm_eval ls tasks` lists them, --include_path adds yours"
        )
    loaded = []
    for name in dict.fromkeys(chain(*found.values())):
        try:
            got = manager.load([name])
            for task in got["tasks"].values():
                document = next(iter(task.eval_docs))
                if task.OUTPUT_TYPE != "loglikelihood_rolling":
                    task.doc_to_text(document)
                task.doc_to_target(document)
        except Exception as error:  # YAML, data sets and templates fail in many libraries
            reason = " ".join(f"{type(error).__name__} {error}".split())[:300]
            raise InputError(f"--tasks {name}: cannot be loaded ({reason})") from None
        for task in got["tasks"].values():
            if args.num_fewshot and task.get_config("num_fewshot") != 0:  # a task's own 0 always wins
                try:
                    task.fewshot_context(next(iter(task.eval_docs)), args.num_fewshot)
                except Exception as error:  # templates, data sets and samplers of any kind
                    reason = " ".join(f"{type(error).__name__} {error}".split())[:300]
                    raise InputError(
                        f"--num_fewshot {args.num_fewshot}: --tasks {name} cannot make such examples ({reason})"
                    ) from None
            if getattr(task, "UNSAFE_CODE", False) and not args.confirm_run_unsafe_code:
                raise InputError(f"--tasks {name}: runs code that the model writes; pass --confirm_run_unsafe_code")
        loaded += list(got["groups"].values())[:1] or got["tasks"].values()  # a group comes before its members
    return manager, loaded


def run(args: argparse.Namespace) -> int:
    h2o = h2o_config(args, say=cli.say)
    device = select_device(args.device)
    backend = attention_backend(h2o, device)
    output = args.output_path
    if output.exists() and not (output.is_file() and args.overwrite):
        raise InputError(f"--output-path {output}: exists; pass --overwrite to replace a file, or choose another path")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(output.parent, os.W_OK):
            raise PermissionError(13, "the folder is not writable")
    except OSError as error:
        raise InputError(f"--output-path {output}: cannot be written ({error.strerror})") from None
    manager, tasks = load_tasks(args)

    quiet_libraries()
    flags = {"full_cache": True} if h2o is None else dataclasses.asdict(h2o)
    positions = {} if args.max_length is None else {"max_length": args.max_length}
    model = {"pretrained": args.model_name, "dtype": args.dtype, **positions, **flags}
    lm = H2OLlamaLM(device=args.device, batch_size=args.batch_size, share_prefixes=args.share_prefixes, **model)
    if args.apply_chat_template and not lm.tokenizer.chat_template:
        raise InputError(f"--apply_chat_template: the tokenizer of {args.model_name} has none; leave the flag out")
    versions = {module.__name__: module.__version__ for module in (torch, transformers)}
    versions |= {"python": platform.python_version(), "lm_eval": lm_eval.__version__}
    weights = checkpoint_fingerprint(args.model_name)
    decides = [model, versions, weights, backend, str(lm.model.dtype), device.type]  # --dtype auto: the device's
    key = hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:16]
    answers = output.with_name(f"{output.name}.{key}")  # of this model and cache alone
    begin = time.perf_counter()
    results = lm_eval.simple_evaluate(
        lm, tasks=tasks, task_manager=manager, num_fewshot=args.num_fewshot, limit=args.limit,
        batch_size=args.batch_size, device=str(device), apply_chat_template=args.apply_chat_template,
        log_samples=args.log_samples, confirm_run_unsafe_code=args.confirm_run_unsafe_code, use_cache=str(answers),
    )  # fmt: skip
    results["h2o"] = {
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "h2o": None if h2o is None else dataclasses.asdict(h2o),
        "attention_backend": backend,
        "model_fingerprint": weights,
        "versions": versions,
        "device": device_name(device),
        "seconds": time.perf_counter() - begin,
        "evictions": lm.evictions,
    }
    print(make_table(results))
    if "groups" in results:
        print(make_table(results, "groups"))
    report_evictions(lm)
    try:
        replace_file(output, [to_json(results, indent=2, default=handle_non_serializable) + "\n"])
    except OSError as error:
        raise InputError(
            f"--output-path {output}: cannot be written ({error.strerror}); answers are kept; run the same command "
            "again to resume"
        ) from None
    answers.with_name(f"{answers.name}_rank0.db").unlink(missing_ok=True)
    print(f"results are in {output}")
    return 0


def report_evictions(lm: CacheLM) -> None:
    """Print how much of each task came after an eviction, and warn if that may surprise."""
    for task, counts in lm.evictions.items():
        for name in ("contexts_cut", "documents_split"):
            if counts[name]:
                what = name.replace("_", " ")
                cli.say(f"warning: {task}: {counts[name]} {what} to the model's {lm.max_length} positions")
        answers = counts["tokens"] + counts["texts"]
        if answers and not counts["tokens_after_eviction"] + counts["texts_after_eviction"]:
            cli.say(
                f"warning: {task}: nothing came after an eviction, so these are the full cache's scores; contexts fit "
                f"into the window of {lm.h2o.window_length}, or continuations are single tokens"
            )
    columns = ("tokens", "tokens_after_eviction", "texts", "texts_after_eviction", *PROMPT_TOKENS)
    if lm.h2o is not None:
        print_table(
            [{"task": task} | counts for task, counts in lm.evictions.items()],
            {"task": ""} | dict.fromkeys(columns, ""),
        )


def main(argv: list[str] | None = None) -> int:
    """The exit status, see utils/cli.py."""

    def work() -> int:
        try:
            return run(parse_args(argv))
        except RuntimeError as error:
            if not is_out_of_memory(error):  # on the host as well
                raise
            raise MemoryError from None

    kept = "answers so far are kept; run the same command again to resume"
    return cli.run(work, kept, f"give a smaller --batch_size ({kept})")


if __name__ == "__main__":
    sys.exit(main())
