"""Show which tokens of a request several policies keep: one HTML page that needs no network.

    python scripts/show_kept.py --policies mass mass:96 streaming_llm --num_window_length 128 --output-path kept.html
    python scripts/show_kept.py --model-name HuggingFaceTB/SmolLM2-135M-Instruct --chat --input-path data/xsum.jsonl \\
        --request 3 --num_window_length 128 --output-path kept.html

The request is decoded greedily under the full cache and under each policy. The prompt is the request's `article` as it
is, or with --chat one user turn in the tokenizer's chat template. The page shades each token by the share of KV heads
that still hold it, of all layers or of a chosen layer and head, at any step. It shows what the model said under each
policy, and marks the first token that differs from the full cache's text.

A policy is `score[:heavy][,flag=value…]`. `heavy` is the value of --num_heavy_hitter_tokens, and any other flag of the
cache may follow: `mass:96`, `mass,score_norm=mean`, `value_mass:3/4,head_budgets=plan.json`. Cache flags given by
themselves hold for every policy that does not set them.

Agreement and KL are measured on the full cache's text, fed to the policy token by token; what is held and the attention
lost, on the policy's own text. At step t the model chooses token t of its text, counted from 0. Step 0 is the
prompt's, before anything is evicted. The page contains the request's text: mind its licence before you publish it.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a file of a clone
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from h2optimizer.utils import cli

if __name__ == "__main__":
    cli.begin()

import torch

from h2optimizer import H2OConfig
from h2optimizer.fidelity import Fidelity, Retention, compare
from h2optimizer.flags import add_cache_flags, add_input_flag, add_model_flags
from h2optimizer.loading import check_windows, end_as_chats_do, load_model, quiet_libraries, select_device
from h2optimizer.policy_flags import policy_config
from h2optimizer.summarizing import Prompt, Summarizer, tokenize, warn_of_long_prompts
from h2optimizer.utils.ablation import pack
from h2optimizer.utils.bench import print_table, stock_model
from h2optimizer.utils.cli import InputError, OneLineParser, count, count_or_zero, output_file
from h2optimizer.utils.costs import slot_bytes
from h2optimizer.utils.requests import Request, read_requests, unheeded
from h2optimizer.utils.results import replace_file, to_json

PAGE = Path(__file__).with_suffix(".html")
DATA_MARK = "{{data}}"  # in PAGE: where the page's data go
MOST_TOKENS = 2**15 - 1  # steps are stored as int16
LONGEST_CHARACTER = 4  # tokens: a byte each
TABLE = {
    "policy": "", "tokens": ",", "first_difference": "", "agreement": ".1%", "kl": ".4f", "slots": ",", "kv_MiB": ".2f",
}  # fmt: skip


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add_input_flag(parser)
    add("--output-path", type=output_file, default=Path("out/kept.html"), help="the page (%(default)s)")
    add("--overwrite", action="store_true", help="replace an existing page")
    add("--request", type=count_or_zero, default=0, help="index of the request to show, from 0 (%(default)s)")
    add("--max_tokens", type=count, help="most tokens to generate (the request's own number)")
    add("--chat", action="store_true", help="wrap the request in the tokenizer's chat template, for instruct models")
    add(
        "--policies",
        nargs="+",
        default=["mass", "streaming_llm"],
        metavar="POLICY",
        help="what to show side by side, each as score[:heavy][,flag=value...]: a --score, the value of "
        "--num_heavy_hitter_tokens, and other flags of the cache, such as mass mass:96 mass:96,update_interval=1 "
        "value_mass:3/4,head_budgets=plan.json (mass streaming_llm)",
    )
    add_model_flags(parser)
    add_cache_flags(parser, always=True)  # the full cache is shown beside the policies in any case
    args = parser.parse_args(argv)
    if hasattr(args, "score"):
        parser.error("--score: --policies names the scores; leave it out")
    return args


# Policies


def configs_of(args: argparse.Namespace, device: torch.device) -> dict[str, H2OConfig]:
    """The settings of each of --policies, by the text that names it. Raises InputError."""
    return {policy: policy_config(policy, device, args) for policy in args.policies}


# Measuring


@dataclass
class Shown:
    """A text that the model generated, and how the cache held it."""

    tokens: list[int]
    cache: dict[str, int]  # as in a result line: slots_kept, kv_bytes, …
    fidelity: Fidelity | None = None  # on the full cache's text
    retention: Retention | None = None  # of the prompt and its own text; None of the full cache


class Viewer:
    """Decodes one prompt under the full cache, then under policies."""

    def __init__(self, model, tokenizer, prompt: Prompt):
        self.model, self.tokenizer, self.prompt = model, tokenizer, prompt
        model.merge_projections()  # moves the weights, which the stock model then shares
        self.stock = stock_model(model)
        self.full = self._greedy(self.stock)

    def show(self, h2o: H2OConfig) -> Shown:
        self.model.h2o = h2o
        shown = self._greedy(self.model)
        texts, pad = [self.full.tokens, shown.tokens], self.tokenizer.pad_token_id
        fidelity, shown.retention = compare(self.stock, self.model, [self.prompt.tokens] * 2, texts, pad, follow=1)
        shown.fidelity = fidelity[0]
        self.model.kept_caches.clear()
        return shown

    def _greedy(self, model) -> Shown:
        (job,) = Summarizer(model, self.tokenizer, 1, greedy=True).decode([self.prompt])
        (sequence,) = job.sequences
        return Shown(sequence.tokens, sequence.cache)


def first_difference(tokens: list[int], others: list[int]) -> int | None:
    """Index of the first token that differs, or that only one text has; None for equal texts."""
    shared = min(len(tokens), len(others))
    differs = next((i for i in range(shared) if tokens[i] != others[i]), shared)
    return None if differs == len(tokens) == len(others) else differs


# The page


def pieces_of(tokens: list[int], tokenizer) -> list[str]:
    """The text of each token, special ones included; concatenated they are the text of all.

    A token that ends within a character has no text: the token that completes the character has it all.
    """

    def text(begin: int, end: int) -> str:
        return tokenizer.decode(tokens[begin:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    pieces = []
    before = begin = 0  # begin: of the tokens without text so far; before: of some context, since decoders strip starts
    for end in range(1, len(tokens) + 1):
        known = text(before, begin)
        piece = text(before, end)[len(known) :]
        if piece.endswith("\ufffd") and end < len(tokens) and end - begin < LONGEST_CHARACTER:
            pieces.append("")
        else:
            pieces.append(piece)
            before, begin = begin, end
    return pieces


def shown_text(shown: Shown, full: Shown, tokenizer) -> dict:
    """What the page holds of any text."""
    return {
        "pieces": pieces_of(shown.tokens, tokenizer),
        "differs": first_difference(shown.tokens, full.tokens),
        "slots": shown.cache["slots_kept"],
        "bytes": shown.cache["kv_bytes"],
    }


def shown_policy(policy: str, h2o: H2OConfig, shown: Shown, full: Shown, viewer: Viewer) -> dict:
    """What the page holds of a policy."""
    model, tokenizer = viewer.model, viewer.tokenizer
    fidelity, retention = shown.fidelity, shown.retention
    compared = max(1, fidelity.tokens)
    return shown_text(shown, full, tokenizer) | {
        "policy": policy,
        "label": h2o.policy.label + ("" if h2o.head_windows.even else ", head budgets") + eight_bits(h2o),
        "slot_bytes": bytes_of_token(model, h2o),
        "window": h2o.window_length,
        "heavy": h2o.heavy,
        "chosen_by": "random" if h2o.policy.seeded else "sinks" if h2o.policy.keeps_oldest else "heavy",
        "recent": h2o.recent,
        "even": h2o.head_windows.even,
        "interval": h2o.update_interval,
        "agreement": fidelity.agreed / compared if fidelity.tokens else None,
        "kl": fidelity.kl / compared if fidelity.tokens else None,
        "last_held": pack(retention.last_held.numpy()),
        "mass_lost": [[round(share, 4) for share in layers] for layers in retention.mass_lost],
    }


def page_of(data: dict) -> str:
    """The page with its data, of which no text can end the script element that holds it."""
    return PAGE.read_text(encoding="utf-8").replace(DATA_MARK, to_json(data).replace("<", "\\u003c"))


def eight_bits(h2o: H2OConfig) -> str:
    return ", slots of 8 bits" if h2o.slots == "int8" else ""


def bytes_of_token(model, h2o: H2OConfig | None = None) -> int:
    """Of one token's key and value in one KV head, as a cache stores them."""
    heads = model.config.num_hidden_layers * model.config.num_key_value_heads
    return int(slot_bytes(model.config, model.dtype.itemsize, h2o=h2o)) // heads


# The program


def open_output(args: argparse.Namespace) -> None:
    """Raises InputError, before anything is computed, where the page cannot be written."""
    output = args.output_path
    if output.exists() and args.input_path.exists() and output.samefile(args.input_path):
        raise InputError(f"--output-path {output}: is the --input-path; choose another path")
    if output.exists() and not args.overwrite:
        raise InputError(f"--output-path {output}: exists; pass --overwrite to replace it, or choose another path")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(output.parent, os.W_OK):
            raise PermissionError(13, "the folder is not writable")
    except OSError as error:
        raise InputError(f"--output-path {output}: cannot be written ({error.strerror})") from None


def read_request(args: argparse.Namespace) -> Request:
    """The one to show. Raises InputError."""
    requests, _ = read_requests(args.input_path, None, args.request + 1)
    if args.request >= len(requests):
        raise InputError(f"--request {args.request}: the requests of {args.input_path} are 0 to {len(requests) - 1}")
    request = requests[args.request]
    if warning := unheeded([request]):
        cli.say(warning)
    if args.max_tokens is not None:
        request = dataclasses.replace(request, max_tokens=args.max_tokens)
    if request.max_tokens > MOST_TOKENS:
        raise InputError(
            f"--request {args.request}: asks for {request.max_tokens:,} tokens, a page holds {MOST_TOKENS:,}; "
            f"pass a --max_tokens of at most that"
        )
    return request


def load(args: argparse.Namespace, h2o: H2OConfig, device: torch.device, request: Request) -> Viewer:
    """Raises InputError."""
    quiet_libraries()
    model, tokenizer = load_model(args.model_name, h2o, device, args.dtype)
    if getattr(model, "hf_quantizer", None) is not None:
        raise InputError(f"--model-name {args.model_name}: is quantised; give a checkpoint with plain weights")
    (prompt,) = tokenize([request], tokenizer, model, args.model_name, args.chat)
    warn_of_long_prompts([prompt], model.config.max_position_embeddings, None)
    if args.chat:
        end_as_chats_do(model, tokenizer)
    return Viewer(model, tokenizer, prompt)


def run(args: argparse.Namespace) -> int:
    open_output(args)
    device = select_device(args.device)
    configs = configs_of(args, device)
    check_windows(args.model_name, configs.values())
    request = read_request(args)
    viewer = load(args, next(iter(configs.values())), device, request)
    tokenizer, model, full = viewer.tokenizer, viewer.model, viewer.full
    policies = []
    for policy, h2o in configs.items():
        mean = "" if h2o.head_windows.even else " on average"
        cli.say(f"{policy}: window {h2o.window_length}, {h2o.heavy} heavy{mean}, N = {h2o.update_interval}")
        policies.append(shown_policy(policy, h2o, viewer.show(h2o), full, viewer))
    data = {
        "model": Path(args.model_name).name,
        "input": args.input_path.name,
        "request": request.index,
        "chat": args.chat,
        "dtype": str(model.dtype).removeprefix("torch."),
        "layers": model.config.num_hidden_layers,
        "heads": model.config.num_key_value_heads,
        "slot_bytes": bytes_of_token(model),
        "prompt": pieces_of(viewer.prompt.tokens, tokenizer),
        "full": shown_text(full, full, tokenizer),
        "policies": policies,
    }
    try:
        replace_file(args.output_path, [page_of(data)])
    except OSError as error:
        raise InputError(f"--output-path {args.output_path}: cannot be written ({error.strerror})") from None
    print_table([table_row("full cache", data["full"]), *(table_row(of["policy"], of) for of in policies)], TABLE)
    print(f"page: {args.output_path}")
    return 0


def table_row(name: str, shown: dict) -> dict:
    return shown | {
        "policy": name,
        "tokens": len(shown["pieces"]),
        "first_difference": shown["differs"],
        "kv_MiB": shown["bytes"] / 2**20,
    }


def main(argv: list[str] | None = None) -> int:
    """The exit status, see utils/cli.py."""
    return cli.run(lambda: run(parse_args(argv)), "no page was written", "give a shorter request, or a smaller window")


if __name__ == "__main__":
    sys.exit(main())
