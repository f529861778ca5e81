"""Summarise a jsonl of requests, with the heavy-hitter cache or with the full cache as the baseline.

    python run_summarization.py --input-path data/xsum.jsonl --output-path out/xsum.jsonl \\
        --model-name meta-llama/Meta-Llama-3-8B --enable_h2o_generation

Without arguments it runs the bundled model on the bundled requests. Cache flags default to H2OConfig's values, so it is
enough to edit h2optimizer/llama.py. Settings saved beside a checkpoint, in h2o_config.json, come before these.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import sys
import time
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

from h2optimizer.utils import cli

if __name__ == "__main__":
    cli.begin()

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from h2optimizer import H2OConfig
from h2optimizer.flags import (
    FLAG_OF_FIELD,
    add_cache_flags,
    add_input_flag,
    add_loading_flags,
    add_model_flags,
    add_sharing_flag,
    attention_backend,
    check_loading_flags,
    h2o_config,
)
from h2optimizer.loading import (
    end_as_chats_do,
    fingerprint_of,
    load_model,
    loading_options,
    own_device,
    quiet_libraries,
)
from h2optimizer.summarizing import (
    Prompt,
    Summarizer,
    check_result,
    decoding_order,
    metrics_of,
    tokenize,
    warn_of_long_prompts,
)
from h2optimizer.utils.cli import InputError, OneLineParser, count, count_or_auto, output_file, seed
from h2optimizer.utils.processes import Processes
from h2optimizer.utils.requests import Request, read_requests, unheeded
from h2optimizer.utils.results import JsonlFile, ResultsFile, fingerprint, part_path
from h2optimizer.utils.rouge import ROUGE_TYPES


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add_input_flag(parser)
    add(
        "--output-path",
        type=output_file,
        default=Path("out/summaries.jsonl"),
        help="jsonl of results; the metrics are written beside it (default: %(default)s)",
    )
    add_model_flags(parser)
    add("--sample_num", type=count, help="use only this many requests, from the top of the file (default: all)")
    add(
        "--batch_size",
        type=count_or_auto,
        default=1,
        help="sequences decoded together, halved when memory runs out; auto: as many as fit into the free memory "
        "(default: %(default)s)",
    )
    add("--greedy", action="store_true", help="decode greedily whatever temperature, top_p and n the requests ask for")
    add(
        "--chat",
        action="store_true",
        help="wrap each request in the tokenizer's chat template, for instruct models; "
        "the tokenizer's own end-of-sequence token then also ends a text",
    )
    add("--seed", type=seed, default=42, help="seed for sampling (default: %(default)s)")
    add(
        "--overwrite",
        action="store_true",
        help="delete the results at --output-path and start again (default: resume them)",
    )
    add(
        "--skip_bad_requests",
        action="store_true",
        help="skip and count lines that are not requests (default: refuse the file)",
    )
    add_sharing_flag(parser)
    add_loading_flags(parser)
    add_cache_flags(parser)
    return parser.parse_args(argv)


def is_whole(metrics: dict) -> bool:
    """Whether `print_table` can show them, unlike those of an unfinished run or an edited file."""
    try:
        with redirect_stdout(io.StringIO()):
            print_table(metrics)
    except (KeyError, TypeError, ValueError):
        return False
    return True


def print_table(metrics: dict) -> None:
    requests = metrics["requests"]

    def line(label: str, value: float | None, spec: str, note: str = "") -> None:
        shown = "-" if value is None else format(value, spec)
        print(f"{label:<22}{shown:>8}{note and f' {note}'}")

    interval = f"[95 % interval over {requests} requests]" if requests > 1 else "(one request has no interval)"
    print(f"ROUGE, 0 to 100 (F-measure; the files hold 0 to 1)   {interval}")
    for name in ROUGE_TYPES:
        mean, low, high = (100 * metrics["rouge"][name][key] for key in ("mean", "low", "high"))
        label = f"ROUGE-{name.removeprefix('rouge')}"
        line(label, mean, ".2f", f"  [{low:.2f}, {high:.2f}]" if requests > 1 else "")
    line("requests", requests, "d", f"  {metrics['requests_evicted_from']} with slots dropped")
    shared = f"  computed, {metrics['prompt_tokens_shared']} shared"
    line("prompt tokens", metrics["prompt_tokens_computed"], "d", shared)
    first, each = metrics["time_to_first_token"], metrics["time_per_output_token"]
    line("time to first token", 1e3 * first, ".1f", "ms   mean of requests, from the start of their prefill")
    line("time per token", None if each is None else 1e3 * each, ".1f", "ms   mean of requests, after the first token")
    line("decoding", metrics["decode_tokens_per_second"], ".1f", "tokens/s   all sequences together, without prefill")
    line("overall", metrics["requests_per_second"], ".3g", "requests/s   with prefill")
    line("KV cache", metrics["kv_bytes_per_request"] / 2**20, ".2f", "MiB per request")
    line("peak memory", metrics["peak_memory_bytes"] / 2**30, ".2f", f"GiB of the {metrics['peak_memory_of']}")


def settings_of(args: argparse.Namespace, h2o: H2OConfig | None, requests: list[Request]) -> dict:
    """The settings that a resumed run must share, by flag. The number of processes and the device may differ."""
    settings = {
        "the form of results": 4,  # results of another form cannot be resumed
        "--model-name": args.model_name,
        "--sample_num": args.sample_num,
        "--input-path": f"sha256 {fingerprint(requests)[:16]}",
        "--greedy": args.greedy,
        "--chat": args.chat,
        "--seed": args.seed,
        "--dtype": args.dtype,
        "--quantize": args.quantize,
        "--enable_h2o_generation": args.enable_h2o_generation,
    }
    if weights := fingerprint_of(args.model_name):
        settings["what --model-name holds"] = f"sha256 {weights[:16]}"
    if h2o is not None:
        for name, value in dataclasses.asdict(h2o).items():
            settings[f"--{FLAG_OF_FIELD.get(name, name)}"] = value
    return settings


def run(args: argparse.Namespace, processes: Processes) -> int:
    output, requests, skipped = None, [], 0
    with processes.together():
        check_loading_flags(args, processes)
        h2o = h2o_config(args, check_plan=processes.first, say=processes.say)
        device = own_device(args.device, processes)
        backend = attention_backend(h2o, device)
        if processes.first:  # only one process reads, because a pipe gives its lines once
            requests, skipped, output = open_files(args, h2o, processes)
    requests, done = processes.broadcast((requests, set(output.results) if output else None))
    todo, idle = {request.index for request in requests} - done, 0.0
    if todo:
        with processes.together():
            model, tokenizer, prompts = load(args, h2o, device, processes, requests)
            if processes.first:
                warn_of_long_prompts(prompts, model.config.max_position_embeddings, h2o)
                output.start()
        prompts = [prompt for prompt in prompts if prompt.request.index in todo]
        options = args.greedy, args.seed, processes, args.share_prefixes
        summarizer = Summarizer(model, tokenizer, args.batch_size, *options)
        idle = summarize(summarizer, decoding_order(prompts, args.batch_size, processes), output, args.output_path)
    with processes.together():
        if processes.first:
            results = all_results(output, requests)
            if todo or not is_whole(output.metrics):
                metrics = metrics_of(results, device, idle)
                metrics |= {"input_path": str(args.input_path), "skipped_lines": skipped, "batch_size": args.batch_size}
                metrics |= {"attention_backend": backend, "processes": processes.size}
                metrics["share_prefixes"] = args.share_prefixes
                metrics["tensor_parallel"] = processes.splits > 1
                output.finish(metrics)
            print_table(output.metrics)
            sys.stdout.flush()  # if it fails here, all processes end with the same status
    return 0


def open_files(
    args: argparse.Namespace, h2o: H2OConfig | None, processes: Processes
) -> tuple[list[Request], int, ResultsFile]:
    """The requests, the number of skipped lines, and the existing results. Raises InputError."""
    requests, skipped = read_requests(args.input_path, args.skip_bad_requests, args.sample_num)
    if skipped:
        processes.say(f"warning: {skipped} bad lines of {args.input_path} skipped")
    if warning := unheeded(requests):
        processes.say(warning)
    settings, check = settings_of(args, h2o, requests), partial(check_result, requests=requests)
    output = ResultsFile(args.output_path, settings, args.overwrite, args.input_path, check)
    if output.results:
        processes.say(f"{len(output.results)} of {len(requests)} results exist already")
    return requests, skipped, output


def load(
    args: argparse.Namespace,
    h2o: H2OConfig | None,
    device: torch.device,
    processes: Processes,
    requests: list[Request],
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[Prompt]]:
    """Model, tokenizer, and the requests with their tokens. Raises InputError."""
    quiet_libraries()
    options = loading_options(args.model_name, device, args.dtype, processes, args.quantize, args.device_map)
    model, tokenizer = load_model(args.model_name, h2o, device, args.dtype, options)
    model.capture_sharded = processes.splits > 1  # Processes.close ends without NCCL
    prompts = tokenize(requests, tokenizer, model, args.model_name, args.chat)
    if args.chat:
        end_as_chats_do(model, tokenizer)
    return model, tokenizer, prompts


def all_results(output: ResultsFile, requests: list[Request]) -> list[dict]:
    """The results of all processes, in the order of the requests. Raises InputError if one is missing."""
    output.absorb()
    if missing := [request.index for request in requests if request.index not in output.results]:
        raise InputError(
            f"--output-path {output.path}: {len(missing)} results are missing, first that of request "
            f"{missing[0]}; all processes must write to one folder; run the same command again"
        )
    return [output.results[request.index] for request in requests]


def summarize(summarizer: Summarizer, prompts: list[Prompt], output: ResultsFile | None, path: Path) -> float:
    """Run this process's prompts and write each result at once; returns the mean wait for the slowest process, seconds.

    Process 0 writes to `output`. Other processes with their own prompts write parts of `path`, which process 0 merges.
    """
    processes, begin = summarizer.processes, time.perf_counter()
    with processes.lockstep() if processes.splits > 1 else processes.together():
        if output is not None:
            with_bar(summarizer, prompts, output)
        else:
            part = None if processes.splits > 1 else JsonlFile(part_path(path, processes.rank), "index", "result")
            for result in summarizer.run(prompts):
                if part is not None:
                    part.append(result)
            if part is not None:
                part.close()
        spent = time.perf_counter() - begin
    spent = processes.gather(spent)
    return max(spent) - sum(spent) / len(spent)


def with_bar(summarizer: Summarizer, prompts: list[Prompt], output: ResultsFile) -> None:
    rouge2 = [result["rouge"]["rouge2"] for result in output.results.values()]
    with tqdm(total=len(rouge2) + len(prompts), initial=len(rouge2), unit="req", dynamic_ncols=True) as bar:
        if (shares := summarizer.processes.shares) > 1:
            bar.set_description_str(f"process 1 of {shares}")
        for result in summarizer.run(prompts):
            output.append(result)
            rouge2.append(result["rouge"]["rouge2"])
            bar.set_postfix_str(f"ROUGE-2 {100 * sum(rouge2) / len(rouge2):.2f}", refresh=False)
            bar.update()


def main(argv: list[str] | None = None) -> int:
    """The exit status, see utils/cli.py."""
    processes = Processes.launched()

    def work() -> int:
        processes.join()
        with processes.together():
            with redirect_stdout(sys.stdout if processes.first else io.StringIO()):  # one --help is enough
                args = parse_args(argv)
            processes.tensor_parallel = args.tensor_parallel
        try:
            return processes.close(run(args, processes))
        except KeyboardInterrupt as stop:
            kept = f"results so far are in {args.output_path}; run the same command again to resume"
            raise type(stop)(kept) from None

    return cli.run(work, "nothing has begun" if processes.first else None, leave=processes.leave)


if __name__ == "__main__":
    sys.exit(main())
