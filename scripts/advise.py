"""Predict from byte counts whether eviction pays for a model on a GPU; no model runs and no GPU is needed.

    python scripts/advise.py --model-name meta-llama/Meta-Llama-3-8B --gpu h100-sxm --context 32768 --batch 16

A decode step reads all weights and each row's cache. H2O bounds only the cache, so it pays if the cache is large
compared with the weights: in large batches after long prompts. It *pays* if a step becomes shorter by --gain, or if the
full cache does not fit at all. For H2O, and for a full cache that appends in place, this prints

- `floor_ms`: the time to move the bytes of a mean step at the datasheet's bandwidth. No step is shorter.
- `ms`: the same at --share of that bandwidth, which a device copy reaches. In batches of a few hundred rows,
  multiplying by the weights takes longer than reading them; it is counted at MATMUL_SHARE of the datasheet's TFLOP/s.
  Slimming, launches, waits for the host and prefill are not included.
- `held_GiB`: weights, caches and logits. `largest`: the rows that fit into USABLE of the memory. Prefill briefly needs
  more memory, for the rows that are prefilled together.

Tokens/s count decode steps of all rows together. --json prints the same figures as a single JSON object. The cost in
quality is not predicted; scripts/ablate.py measures it.

The flags of the cache are those of every program, so those of a run can be pasted here. With a plan (--head_budgets), a
step reads each head's own slots. Of several GPUs, the one whose heads keep the most slots counts.
"""

import argparse
import bisect
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

if not __package__:  # run as a file of a clone
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from h2optimizer.utils import cli

if __name__ == "__main__":
    cli.begin()

import torch
from transformers import PreTrainedModel

from h2optimizer import H2OConfig
from h2optimizer.families import family_of
from h2optimizer.flags import add_cache_flags, h2o_config, plans_in
from h2optimizer.loading import check_windows, load_config, plans_of_config, quiet_libraries
from h2optimizer.utils.bench import SHAPES, config_of, print_table
from h2optimizer.utils.budgets import HeadBudgets
from h2optimizer.utils.cli import InputError, OneLineParser, count, positive
from h2optimizer.utils.costs import held_weights, read_weights, row_held, row_read, weight_flops


class Card(NamedTuple):
    bandwidth: float  # TB/s
    memory: float  # GiB; datasheets write GB but mean roughly GiB
    tflops: float  # dense bf16 with float32 accumulation


ECC = 15 / 16  # usable share of GDDR6 memory with error correction, which these cards enable by default
# From NVIDIA's datasheets of H100, H200, DGX B200 (an eighth of it), A100, L40S, L4 and A10; from H100 on they state
# TFLOP/s with sparsity, twice the dense rate. RTX: architecture whitepapers (Ampere GA102, Ada, Blackwell).
CARDS = {
    "H100 SXM": Card(3.35, 80, 989),
    "H100 PCIe": Card(2.0, 80, 756),
    "H100 NVL": Card(3.9, 94, 835),
    "H200": Card(4.8, 141, 989),
    "B200": Card(8.0, 180, 2250),
    "A100 40GB": Card(1.555, 40, 312),
    "A100 80GB PCIe": Card(1.935, 80, 312),
    "A100 80GB SXM": Card(2.039, 80, 312),
    "L40S": Card(0.864, 48 * ECC, 362),
    "L4": Card(0.3, 24 * ECC, 121),
    "A10": Card(0.6, 24 * ECC, 125),
    "RTX 3090": Card(0.936, 24, 71),
    "RTX 4090": Card(1.008, 24, 165),
    "RTX 5090": Card(1.792, 32, 209),
}
COPY_SHARE = 0.89  # of the bandwidth: a device copy took 4.27 of 4.8 TB/s on an H200, about 3.0 of 3.35 on an H100
MATMUL_SHARE = 0.8  # of the TFLOP/s: a large bf16 product took about 790 of 989 on an H200
USABLE = 0.95  # of the memory, as run_summarization.py --batch_size auto fills it
LIMIT = 10**9  # most tokens and rows that are searched
WINDOW = 1024  # slots, by default
LONGER = 1.5  # than a plan's prompts: with prompts of three times that length, plans saved less
SIZES = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    max_position_embeddings""".split()
FULL, H2O = "full cache", "H2O"


@dataclass
class Prediction:
    """A model on a GPU under both caches, for any batch and context (tokens of a prompt)."""

    model: PreTrainedModel  # on the meta device
    caches: dict[str, H2OConfig | None]
    steps: int  # decode steps over which times are averaged
    bits: int | None  # of the projections' weights
    card: Card
    share: float
    gain: float
    gpus: int = 1  # GPUs that share the model; all figures are per GPU

    def __post_init__(self):
        # counted once, because the searches need the weights many times
        norms = sum(p.nbytes for name, p in self.model.named_parameters() if "norm" in name)
        # transformers' plan leaves norms on each GPU, that of 5.17 the embedding as well
        self.held = norms + (held_weights(self.model, self.bits) - norms) / self.gpus
        self.read = norms + (read_weights(self.model, self.bits) - norms) / self.gpus
        self.flops = weight_flops(self.model) / self.gpus
        self.part = {cache: largest_part(h2o, self.gpus) for cache, h2o in self.caches.items()}

    def ms(self, cache: str, batch: int, context: int, attainable: bool = True) -> float:
        """Milliseconds of a step at attainable rates, or else at the datasheet's bandwidth."""
        share, tflops = (self.share, MATMUL_SHARE * self.card.tflops) if attainable else (1.0, float("inf"))
        bandwidth = share * self.card.bandwidth
        weights = max(self.read / bandwidth, batch * self.flops / tflops)
        return (weights + batch * self.row_read(cache, context) / bandwidth) / 1e9

    def row_read(self, cache: str, context: int) -> float:
        """Bytes of a row's cache that a step reads and writes."""
        config = self.model.config
        return row_read(config, self.model.dtype.itemsize, context, self.steps, self.caches[cache]) * self.part[cache]

    def row_bytes(self, cache: str, context: int) -> float:
        # the last token is chosen but never fed, so no cache holds it
        config = self.model.config
        row = row_held(config, self.model.dtype.itemsize, context + self.steps, self.caches[cache])
        logits = 8 * config.vocab_size  # each GPU chooses from all of them
        return logits + (row - logits) * self.part[cache]

    def largest(self, cache: str, context: int) -> int:
        """Rows that fit beside the weights."""
        free = USABLE * self.card.memory * 2**30 - self.held
        return int(min(LIMIT, max(0.0, free / self.row_bytes(cache, context))))

    def verdict(self, batch: int, context: int) -> tuple[str, str]:
        """ "gain", "no gain" or "does not fit", and the reason."""
        fits = {cache: self.largest(cache, context) for cache in self.caches}
        window, cached = self.caches[H2O].window_length, context + self.steps
        smallest = self.caches[H2O].schedule.smallest
        if max(fits.values()) < batch:
            rows = " and ".join(f"{n:,} with {'the ' * (cache == FULL)}{cache}" for cache, n in fits.items())
            return "does not fit", f"{batch:,} rows are too many: {rows} fit; give a smaller --batch"
        if cached <= smallest:
            the = "the" if smallest == window else "even the smallest"
            return (
                "no gain",
                f"nothing is evicted: {the} window of {smallest:,} slots holds all of {cached:,} cached tokens",
            )
        if fits[H2O] < batch:
            return (
                "no gain",
                f"{batch:,} rows fit with the full cache but not with H2O: give a smaller --num_window_length",
            )
        if fits[FULL] < batch:
            return "gain", f"{batch:,} rows fit with H2O but not with the full cache, which fits {fits[FULL]:,}"
        full, h2o = (self.ms(cache, batch, context) for cache in (FULL, H2O))
        shorter = 1 - h2o / full
        change = f"{abs(shorter):.1%} {'shorter' if shorter >= 0 else 'longer'} ({full:.4g} -> {h2o:.4g} ms)"
        if shorter >= self.gain:
            return "gain", f"H2O's steps are {change}"
        if context <= window:
            return "no gain", f"the window holds the whole prompt and little is evicted: H2O's steps are {change}"
        weights, row = self.read, self.row_read(FULL, context)
        return "no gain", (
            f"H2O's steps are {change}, not by {self.gain:.0%}: weights are {weights / (weights + batch * row):.0%} of "
            f"what a step reads, and H2O reads {self.row_read(H2O, context) / row:.0%} of the cache"
        )

    def pays(self, batch: int, context: int) -> bool:
        return self.verdict(batch, context)[0] == "gain"

    def pays_from_batch(self, context: int) -> int | None:
        """The smallest batch for which eviction pays; None if no such batch fits."""
        # savings grow with the rows up to the largest batch that fits
        most = self.largest(H2O, context)
        first = bisect.bisect_left(range(1, most + 1), True, key=lambda batch: self.pays(batch, context)) + 1
        return first if first <= most else None

    def pays_from_context(self, batch: int) -> int | None:
        """The shortest prompt for which eviction pays; None if there is none."""
        # H2O's steps stop growing at the window; the full cache's never do
        first = bisect.bisect_left(range(1, LIMIT + 1), True, key=lambda context: self.pays(batch, context)) + 1
        return first if first <= LIMIT else None

    def row(self, cache: str, batch: int, context: int) -> dict:
        """The table's row for a cache at a batch size."""
        floor, ms = self.ms(cache, batch, context, attainable=False), self.ms(cache, batch, context)
        largest = self.largest(cache, context)
        return {
            "cache": cache,
            "batch": batch,
            "fits": "yes" if batch <= largest else "no",
            "weights_GB": self.read / 1e9,
            "cache_GB": batch * self.row_read(cache, context) / 1e9,
            "held_GiB": (self.held + batch * self.row_bytes(cache, context)) / 2**30,
            "floor_ms": floor,
            "floor_tokens_per_s": batch / floor * 1e3,
            "ms": ms,
            "tokens_per_s": batch / ms * 1e3,
            "largest": largest,
        }


def largest_part(h2o: H2OConfig | None, gpus: int) -> float:
    """The share of a row's slots on that of the GPUs whose KV heads keep the most."""
    if h2o is None or h2o.head_windows.even:
        return 1 / gpus
    slots = h2o.head_windows.table.sum(axis=0) + h2o.update_interval * len(h2o.head_windows.table)  # of a head
    return float(slots.reshape(gpus, -1).sum(axis=1).max() / slots.sum())


TABLE = {
    "cache": "", "batch": ",", "fits": "", "weights_GB": ".4g", "cache_GB": ".4g", "held_GiB": ".4g",
    "floor_ms": ".4g", "floor_tokens_per_s": ",.0f", "ms": ".4g", "tokens_per_s": ",.0f", "largest": ",",
}  # fmt: skip


def read_card(text: str) -> tuple[str, Card]:
    """An argparse type: a card by its name, or by an unambiguous beginning of it."""

    def plain(name: str) -> str:
        return re.sub(r"[^a-z0-9]|nvidia|geforce|rtx", "", name.lower())

    found = [name for name in CARDS if plain(name).startswith(plain(text))]
    exact = [name for name in found if plain(name) == plain(text)]
    if len(exact or found) != 1:
        others = "" if found else "; or --bandwidth and --memory"
        raise argparse.ArgumentTypeError(f"{text!r}: give one of {', '.join(found or CARDS)}{others}")
    (name,) = exact or found
    return name, CARDS[name]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__.split("\n")[0])
    model = parser.add_mutually_exclusive_group()
    model.add_argument(
        "--model-name", help="a checkpoint: a folder, a name on the hub or a GGUF file; only its config is read"
    )
    model.add_argument("--shape", choices=SHAPES, help="or the shape of a model; 8b: Llama-3-8B (default: 8b)")
    add = parser.add_argument
    add(
        "--dtype",
        choices=("auto", "bfloat16", "float16", "float32"),
        default="auto",
        help="dtype of weights and cache; auto: the config's (default: %(default)s)",
    )
    add(
        "--weight_bits",
        type=int,
        choices=(8, 4),
        help="bits per weight of the layers' projections (default: those of --dtype)",
    )
    add("--context", type=count, default=32768, help="tokens of each prompt (default: %(default)s)")
    add("--batch", type=count, default=1, help="sequences decoded together (default: %(default)s)")
    add("--new_tokens", type=count, default=64, help="tokens to generate, the first included (default: %(default)s)")
    add("--gpu", type=read_card, help=f"{', '.join(CARDS)} (default: H200)")
    add(
        "--gpus",
        type=count,
        default=1,
        help="number of GPUs that the model is split among, as with --tensor_parallel (default: %(default)s)",
    )
    add("--bandwidth", type=positive, help="memory bandwidth in TB/s (default: that of --gpu, from its datasheet)")
    add("--memory", type=positive, help="memory in GiB (default: that of --gpu)")
    add("--tflops", type=positive, help="dense bf16 TFLOP/s (default: those of --gpu; without --gpu, no limit)")
    add(
        "--share",
        type=positive,
        default=COPY_SHARE,
        help="share of the bandwidth that can be reached (default: %(default)s)",
    )
    add(
        "--gain",
        type=positive,
        default=0.1,
        help="eviction pays if steps become shorter by this share (default: %(default)s)",
    )
    add("--json", action="store_true", help="print one JSON object instead of text and table")
    add_cache_flags(parser, always=True, window=WINDOW)
    args = parser.parse_args(argv)
    args.shape = args.shape or "8b"  # no default: argparse would not see both flags in --shape 8b --model-name …
    for name in ("context", "batch", "new_tokens"):
        if getattr(args, name) > LIMIT:
            parser.error(f"--{name}: must be at most {LIMIT:,}")
    if args.new_tokens < 2:
        parser.error("--new_tokens 1: prefill gives the first token, so no step decodes; give at least 2")
    # catches a bandwidth in GB/s
    for name, most in ("share", 1.0), ("gain", 0.99), ("bandwidth", 100), ("memory", 10_000), ("tflops", 100_000):
        if (number := getattr(args, name)) is not None and not 1e-3 <= number <= most:
            parser.error(f"--{name} {number:g}: must be between 0.001 and {most}")
    args.h2o = h2o_config(args, check_plan=False)  # against the config alone: `plan_of`
    given = {name: value for name in Card._fields if (value := getattr(args, name)) is not None}
    if args.gpu is None and {"bandwidth", "memory"} <= given.keys():
        args.gpu = f"a GPU of {args.bandwidth:g} TB/s and {args.memory:g} GiB", Card(0, 0, float("inf"))
    elif args.gpu is None and given:
        parser.error(
            f"--{next(iter(given))}: give --bandwidth and --memory together, or a --gpu that supplies the rest"
        )
    args.gpu, card = args.gpu or ("H200", CARDS["H200"])
    args.card = card._replace(**given)
    return args


def make_model(args) -> PreTrainedModel:
    """The model on the meta device: shapes without weights. Raises InputError."""
    given = args.model_name is not None
    name = f"--model-name {args.model_name}" if given else f"--shape {args.shape}"
    config = load_config(args.model_name) if given else config_of(args.shape)
    if getattr(config, "quantization_config", None) and not args.weight_bits:
        raise InputError(f"{name}: its weights are quantised; give --weight_bits 8 or 4, and --dtype of the cache")
    for size in SIZES:
        if type(number := getattr(config, size, 1)) is not int or number < 1:  # head_dim may be left out
            raise InputError(f"{name}: its config has {size}={number!r}; it must be a whole number above 0")
    dtype = config.dtype or torch.bfloat16 if args.dtype == "auto" else getattr(torch, args.dtype)
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise InputError(f"{name}: its weights are {dtype}; give --dtype bfloat16, float16 or float32")
    try:
        with torch.device("meta"):
            return family_of(config).stock_class()(config).to(dtype)
    except Exception as error:  # sizes that do not match fail anywhere
        raise InputError(
            f"{name}: its config does not describe a model ({' '.join(str(error).split())[:200]})"
        ) from None


def plan_of(args, model: PreTrainedModel) -> HeadBudgets | None:
    """The plan of --head_budgets. Raises InputError for a model of another shape; weights are not read."""
    plans = plans_of_config(plans_in([getattr(args, "head_budgets", None)]), model.config)
    return plans[0] if plans else None


def run(args) -> None:
    quiet_libraries()
    if args.model_name is not None:
        check_windows(args.model_name, [args.h2o])
    model, card = make_model(args), args.card
    plan = plan_of(args, model)
    if (heads := model.config.num_key_value_heads) % args.gpus:
        raise InputError(
            f"--gpus {args.gpus}: {heads} KV heads cannot be divided among them; give a divisor of {heads}"
        )
    args.gpu = f"{args.gpus} x {args.gpu}" if args.gpus > 1 else args.gpu
    if model.dtype == torch.float32:
        card = card._replace(tflops=float("inf"))  # the datasheets' figure is for bf16
    caches = {FULL: None, H2O: args.h2o}
    prediction = Prediction(
        model, caches, args.new_tokens - 1, args.weight_bits, card, args.share, args.gain, args.gpus
    )
    largest = {cache: prediction.largest(cache, args.context) for cache in caches}
    if not any(largest.values()):
        held, usable = prediction.held / 2**30, USABLE * card.memory
        way_out = "more --gpus, or one with more --memory" + (" or --weight_bits 4" if args.weight_bits != 4 else "")
        if held < usable:
            way_out = f"a smaller --num_window_length (a row of H2O is too large for the rest), or {way_out}"
        raise InputError(f"{args.gpu}: weights alone need {held:.1f} of {usable:.1f} usable GiB; give {way_out}")
    verdict, reason = prediction.verdict(args.batch, args.context)
    rows = [prediction.row(cache, args.batch, args.context) for cache in caches]
    rows += [prediction.row(cache, n, args.context) for cache, n in largest.items() if n not in (0, args.batch)]
    flags = "gpus context batch new_tokens weight_bits share gain".split()
    report = {"verdict": verdict, "reason": reason, "model": args.model_name or args.shape}
    report |= {"dtype": str(model.dtype).removeprefix("torch."), "gpu": args.gpu}
    report |= {flag: getattr(args, flag) for flag in flags} | {"bandwidth_TBps": card.bandwidth}
    report |= {name: getattr(args.h2o, name) for name in ("window_length", "update_interval", "score", "slots")}
    report["head_budgets"] = plan and of_plan(plan, args.h2o)
    report |= {"memory_GiB": card.memory, "tflops": None if card.tflops == float("inf") else card.tflops}
    report["positions"] = model.config.max_position_embeddings
    report["pays_from_batch"] = prediction.pays_from_batch(args.context)
    report["pays_from_context"] = prediction.pays_from_context(args.batch)
    report["rows"] = rows
    if args.json:
        print(json.dumps(report, allow_nan=False))
    else:
        print_report(report)


def of_plan(plan: HeadBudgets, h2o: H2OConfig) -> dict:
    """What a report says of a plan; prompt_tokens is the mean length of those it was measured on, if it was."""
    windows = {"smallest": h2o.head_windows.smallest, "largest": h2o.head_windows.largest}
    return {"plan": str(plan.path), "prompt_tokens": getattr(plan, "prompt_tokens", None)} | windows


def print_report(report: dict) -> None:
    """Print a report as text and a table."""
    context, new_tokens, positions = (report[key] for key in ("context", "new_tokens", "positions"))
    batch_from, context_from = report["pays_from_batch"], report["pays_from_context"]
    print(f"{report['verdict']}: {report['reason']}")
    print(
        f"{report['model']}, {report['dtype']}, {report['gpu']}: {report['batch']:,} x {context:,} tokens, and "
        f"{new_tokens:,} new each"
    )
    too_long = context_from and context_from + new_tokens > positions
    beyond = f" (the model has {positions:,} positions)" if too_long else ""
    if plan := report["head_budgets"]:
        print(f"{plan['plan']}: windows of {plan['smallest']:,} to {plan['largest']:,} slots")
    print(f"pays from batch: {f'{batch_from:,}' if batch_from else 'none that fits'}, at this context")
    print(f"pays from context: {f'{context_from:,} tokens{beyond}' if context_from else 'none'}, at this batch\n")
    print_table(report["rows"], TABLE)
    print(
        f"\nfloor_ms at {report['bandwidth_TBps']:g} TB/s, ms at {report['share']:.0%} of it. On an H200 measured steps"
    )
    print("took 1.1 times ms with a full cache in place, 1.0 to 1.2 times with H2O: a gain below a fifth may vanish.")
    if report["gpus"] > 1:
        print("Bytes and rows are per GPU. The time of all-reduces, two per layer and step, is not counted.")
    if report["tflops"] is None:
        print("The time of matrix products is not counted: large batches take longer.")
    if (needed := context + new_tokens) > positions:
        print(f"warning: {needed:,} positions are needed, but the model has {positions:,}: expect poor text")
    if plan and plan["prompt_tokens"] and context > LONGER * plan["prompt_tokens"]:
        print(
            f"warning: the plan was measured on prompts of {plan['prompt_tokens']:,.0f} tokens on average. It helps "
            "less with longer ones: measure a plan on such prompts"
        )
    print("Not predicted: the memory of prefill, and what eviction costs in quality, which scripts/ablate.py measures.")


def main(argv: list[str] | None = None) -> int:
    """The exit status, see utils/cli.py."""
    return cli.run(
        lambda: run(parse_args(argv)), "nothing is written", "the config describes a model that is too large to count"
    )


if __name__ == "__main__":
    sys.exit(main())
