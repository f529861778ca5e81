"""Measure how many slots each KV head of a model needs, and write a plan of head budgets.

    python scripts/calibrate.py --model-name meta-llama/Meta-Llama-3-8B-Instruct --chat \\
        --input-path requests.jsonl --output-path plan.json

Every program takes the plan with --head_budgets plan.json. All heads keep as many of the newest tokens, and a plan
divides the other slots. One plan serves any window: the window is the mean of the heads' budgets.

For each text, each KV head alone gets a window of a few widths (--widths) beside its newest tokens (--recent), which is
slimmed after the prompt and after each token of the text. Everything else stays whole, and the KL divergence from the
full cache is measured on the full cache's own greedy text. Slots then go to the heads where they save most. With
--refine the budgets of narrow windows are measured together: from wide windows on, slots are taken where, beside all
earlier cuts, it costs least. That takes several times as long.

Calibrate on texts like those to come, at least as long, and judge the plan on others. A request's prompt is its
`article` as it stands, or with --chat one turn in the tokenizer's chat template, as in run_summarization.py.

Losses of finished texts are kept beside the plan until it is written, so an interrupted command resumes when you run it
again. In half precision the smallest losses drown in rounding: --dtype float32 measures them where memory allows.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import sys
from pathlib import Path

if not __package__:  # run as a file of a clone
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from h2optimizer.utils import cli

if __name__ == "__main__":
    cli.begin()

import numpy as np
from tqdm import tqdm

from h2optimizer.calibration import Calibrator, JointElimination, head_cuts
from h2optimizer.flags import add_input_flag, add_model_flags, in_flags
from h2optimizer.llama import H2OConfig
from h2optimizer.loading import (
    ANY_CACHE,
    device_name,
    end_as_chats_do,
    eos_tokens,
    fingerprint_of,
    is_installed,
    load_model,
    quiet_libraries,
    select_device,
)
from h2optimizer.summarizing import Prompt, tokenize, warn_of_long_prompts
from h2optimizer.texts import Stops
from h2optimizer.utils.bench import print_table
from h2optimizer.utils.budgets import HASH, LEAST, GivenBudgets, HeadBudgets, MeasuredBudgets, request_fingerprint
from h2optimizer.utils.cli import InputError, OneLineParser, count, count_or_zero, counts, output_file
from h2optimizer.utils.figures import figure_file
from h2optimizer.utils.policies import POLICIES, named_policies
from h2optimizer.utils.requests import Request, read_requests
from h2optimizer.utils.results import JsonlFile
from h2optimizer.weights import sliding_window

LEAST_WIDTH = 16  # of the widths that are measured unasked
FIELD_OF_SETTING = {
    "--model-name": "model",
    "weights": "weights",
    "requests": "texts",
    "--score": "score",
    "--recent": "recent",
}
SHOWN = 128  # the window whose budgets are shown, or a fourth of shorter prompts


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add_input_flag(parser)
    add("--output-path", type=output_file, default=Path("out/head_budgets.json"), help="the plan, JSON (%(default)s)")
    add("--overwrite", action="store_true", help="replace an existing plan of other settings")
    add_model_flags(parser)
    add("--chat", action="store_true", help="put each article into the tokenizer's chat template")
    add("--texts", type=count, default=6, help="requests to measure on (%(default)s)")
    add("--first", type=count_or_zero, default=0, help="index of the first of them in the file (%(default)s)")
    add("--max_new_tokens", type=count, default=48, help="tokens of text to predict after each prompt (%(default)s)")
    add(
        "--widths",
        type=counts,
        help="a head's slots beside its newest, as 24,64,160 (16, 32, 64, … up to the longest prompt)",
    )
    add(
        "--score",
        choices=tuple(POLICIES),
        default="value_mass",
        help=f"what stays beside the newest slots (%(default)s): {named_policies()}",
    )
    add(
        "--score_decay",
        type=float,
        default=0.8,
        help="factor on stored mass before each token adds to it (%(default)s)",
    )
    add(
        "--recent",
        type=count,
        default=16,
        help="newest tokens that a window holds beside those of its width (%(default)s)",
    )
    add(
        "--refine",
        action="store_true",
        help="measure the budgets of narrow windows together, in several times the time",
    )
    add("--figure", type=figure_file, help="draw which heads remember: a PNG, SVG or PDF file; needs matplotlib")
    return parser.parse_args(argv)


# What is measured


def cuts_of(args: argparse.Namespace, longest: int) -> list[H2OConfig]:
    """The windows to cut a head to. Raises InputError."""
    widths = args.widths
    if not widths:
        octaves = max(0, math.ceil(math.log2(longest / LEAST_WIDTH)))
        widths = [LEAST_WIDTH << octave for octave in range(octaves)] or [max(2, longest // 2)]
    if min(widths) + args.recent >= longest:
        raise InputError(
            f"--widths {','.join(map(str, widths))}: the longest prompt has only {longest} tokens, and --recent takes "
            f"{args.recent} of them; give smaller numbers, or longer requests"
        )
    return checked_cuts(args, widths)


def checked_cuts(args: argparse.Namespace, widths: list[int]) -> list[H2OConfig]:
    """Raises InputError for what H2OConfig refuses."""
    try:
        return head_cuts(sorted(set(widths)), args.score, args.recent, args.score_decay)
    except ValueError as error:
        raise InputError(in_flags(str(error)).replace("num_window_length", "widths")) from None


def requests_of(args: argparse.Namespace) -> list[Request]:
    """Raises InputError where the file has too few."""
    requests, _ = read_requests(args.input_path, None, args.first + args.texts)
    if len(requests) < args.first + args.texts:
        raise InputError(
            f"--input-path {args.input_path}: has {len(requests)} requests; --first {args.first} and --texts "
            f"{args.texts} ask for more, give smaller numbers"
        )
    return requests[args.first :]


def settings_of(args: argparse.Namespace, requests: list[Request], weights: str | None, device) -> dict:
    """What the losses depend on, by flag."""
    name = args.model_name
    return {
        "--model-name": Path(name).resolve().name if Path(name).exists() else name,  # a folder may be moved
        "weights": weights and weights[:HASH],
        "requests": [request_fingerprint(request) for request in requests],
        "--chat": args.chat,
        "--score": args.score,
        "--recent": args.recent,
        "--score_decay": args.score_decay,
        "--widths": args.widths or "auto",
        "--max_new_tokens": args.max_new_tokens,
        "--refine": args.refine,
        "--dtype": args.dtype,
        "device": device_name(device),
    }


def existing_plan(args: argparse.Namespace, settings: dict) -> HeadBudgets | None:
    """The plan at --output-path, if it is of these settings. Raises InputError for anything else there."""
    if args.overwrite or not args.output_path.exists():
        return None
    way_out = "choose another --output-path, or pass --overwrite"
    try:
        plan = HeadBudgets.load(args.output_path)
    except ValueError:
        raise InputError(f"--output-path {args.output_path}: exists and is not a plan; {way_out}") from None
    before = before_of(plan) if isinstance(plan, MeasuredBudgets) else {}
    for name in settings:
        if before.get(name) != json.loads(json.dumps(settings[name])):
            raise InputError(f"--output-path {args.output_path}: a plan of other settings ({name} differs); {way_out}")
    return plan


def before_of(plan: MeasuredBudgets) -> dict:
    """The settings of a plan: those that have a field of their own, and the others."""
    return plan.settings | {name: listed(getattr(plan, field)) for name, field in FIELD_OF_SETTING.items()}


def listed(value):
    return list(value) if isinstance(value, tuple) else value


# Measuring


def check_entry(entry: dict) -> None:
    """Raises ValueError unless a line holds the losses of a text, or the windows that were refined."""
    if "windows" in entry:
        GivenBudgets(shares=tuple(map(tuple, entry["windows"])))
        return
    losses = np.array(entry["losses"], dtype=np.float64)
    counted = all(type(entry[name]) is int and entry[name] >= 0 for name in ("tokens", "prompt_tokens"))
    if losses.ndim != 3 or not np.isfinite(losses).all() or not counted:
        raise ValueError("a part of it is missing")


def measure(args: argparse.Namespace, requests: list[Request], settings: dict, device) -> MeasuredBudgets:
    """The plan, from texts that are measured now or were before an interruption. Raises InputError."""
    quiet_libraries()
    model, tokenizer = load_model(args.model_name, ANY_CACHE, device, args.dtype)
    if args.chat:
        end_as_chats_do(model, tokenizer)
    prompts = tokenize(requests, tokenizer, model, args.model_name, args.chat)
    warn_of_long_prompts(prompts, model.config.max_position_embeddings, h2o=None)
    longest = max(len(prompt.tokens) for prompt in prompts)
    if (reach := sliding_window(model.config)) is not None and longest + 2 * args.max_new_tokens > reach:
        raise InputError(
            f"--model-name {args.model_name}: its attention slides over {reach} tokens, and a prompt has {longest}; "
            "give shorter requests"
        )
    cuts = cuts_of(args, longest)
    widths = [cut.heavy for cut in cuts]
    names = [entry_name(settings, widths, prompt) for prompt in prompts]

    part = args.output_path.with_name(f"{args.output_path.name}.texts")
    file = JsonlFile(part, "text", "file of losses", args.input_path, also=[args.output_path])
    file.resume("remove it, or choose another --output-path", check_entry)
    todo = {name: prompt for name, prompt in zip(names, prompts, strict=True) if name not in file.entries}
    if done := len(set(names)) - len(todo):
        cli.say(f"{done} of {len(set(names))} texts are already measured")
    with tqdm(total=len(todo) * math.prod(shape_of(model, cuts)), unit="cut", dynamic_ncols=True) as bar:
        calibrator = Calibrator(model, cuts, args.max_new_tokens, bar.update)
        for name, prompt in todo.items():
            file.append({"text": name} | entry_of(calibrator, prompt, tokenizer, args.dtype))
    plan = plan_of([file.entries[name] for name in names], widths, settings)
    if args.refine:
        plan = refine(plan, model, tokenizer, prompts, args.max_new_tokens, file)
    try:
        plan.save(args.output_path)
        part.unlink()
    except OSError as error:
        raise InputError(
            f"--output-path {args.output_path}: cannot be written ({error.strerror}); losses are kept, run the same "
            "command again to resume"
        ) from None
    file.close()
    return plan


def entry_of(calibrator: Calibrator, prompt: Prompt, tokenizer, dtype: str) -> dict:
    """One text's losses. Raises InputError where they are not finite."""
    losses, tokens = calibrator.losses(prompt.tokens, lambda text: end_of(text, prompt, calibrator.model, tokenizer))
    if not losses.isfinite().all():
        raise InputError(
            f"--dtype {dtype}: the model's logits are not finite after the prompt {prompt.request.article[:40]!r}; "
            "pass another (texts so far are kept)"
        )
    return {"tokens": tokens, "prompt_tokens": len(prompt.tokens), "losses": losses.tolist()}


def refine(plan: MeasuredBudgets, model, tokenizer, prompts: list[Prompt], most_tokens: int, file: JsonlFile):
    """The plan with windows that were measured together, down from half of the mean prompt."""
    windows = narrow_windows(plan)
    tables = {windows[0]: plan.windows(windows[0])} if windows else {}
    key = hashlib.sha256(json.dumps([plan.texts, plan.losses, plan.settings]).encode()).hexdigest()[:HASH]
    for window in windows[1:]:
        if (entry := file.entries.get(f"{key} {window}")) is None:
            break
        tables[window] = tuple(map(tuple, entry["windows"]))
    if todo := windows[len(tables) :]:
        cuts = head_cuts([max(windows)], plan.score, plan.recent, plan.settings["--score_decay"])
        with tqdm(total=len(todo), unit="window", dynamic_ncols=True) as bar:
            calibrator = Calibrator(model, cuts, most_tokens)
            ends = [lambda text, of=prompt: end_of(text, of, model, tokenizer) for prompt in prompts]
            texts = [calibrator.forced(prompt.tokens, end) for prompt, end in zip(prompts, ends, strict=True)]
            joint = JointElimination(calibrator, [text for text in texts if text is not None], tables[min(tables)])
            for window in todo:
                tables[window] = joint.to(window)
                file.append({"text": f"{key} {window}", "windows": tables[window]})
                bar.update()
    return dataclasses.replace(plan, refined=tuple(tables[window] for window in sorted(tables)))


def narrow_windows(plan: MeasuredBudgets) -> list[int]:
    """Means to refine, each a fifth less than the one before."""
    windows = [int(plan.prompt_tokens / 2)]
    while windows[-1] * 4 // 5 >= LEAST_WIDTH:
        windows.append(windows[-1] * 4 // 5)
    return windows if windows[0] >= LEAST_WIDTH else []


def shape_of(model, cuts: list[H2OConfig]) -> tuple[int, int, int]:
    return model.config.num_hidden_layers, model.config.num_key_value_heads, len(cuts)


def entry_name(settings: dict, widths: list[int], prompt: Prompt) -> str:
    """A hash of all that a text's losses depend on."""
    alone = {name: of for name, of in settings.items() if name not in ("requests", "--widths", "--refine")}
    decides = [alone, widths, request_fingerprint(prompt.request)]
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:HASH]


def end_of(text: list[int], prompt: Prompt, model, tokenizer) -> list[int]:
    """A greedy text up to its end-of-sequence token, or the token after which its stop string begins."""
    eos = eos_tokens(model)
    text = text[: next((i + 1 for i, token in enumerate(text) if token in eos), len(text))]
    stop = Stops(tokenizer, prompt.request.stop).first(text) if prompt.request.stop else None
    return text if stop is None else text[: stop[1] + 1]


def plan_of(entries: list[dict], widths: list[int], settings: dict) -> MeasuredBudgets:
    """The mean loss over all tokens of all texts. Raises InputError where there is none."""
    tokens = sum(entry["tokens"] for entry in entries)
    if not tokens:
        raise InputError("every text ends with its first token, so there is nothing to measure; give other requests")
    losses = sum(np.array(entry["losses"]) for entry in entries) / tokens
    rounded = [[[float(f"{loss:.4g}") for loss in head] for head in layer] for layer in losses]
    return MeasuredBudgets(
        widths=tuple(widths),
        losses=tuple(tuple(map(tuple, layer)) for layer in rounded),
        prompt_tokens=round(sum(entry["prompt_tokens"] for entry in entries) / len(entries), 1),
        settings={name: of for name, of in settings.items() if name not in FIELD_OF_SETTING},
        **{field: settings[name] for name, field in FIELD_OF_SETTING.items() if name != "requests"},
        texts=tuple(settings["requests"]),
    )


# What is shown


def shown_window(plan: MeasuredBudgets) -> int:
    return max(plan.recent + LEAST, min(SHOWN, int(plan.prompt_tokens) // 4))


def show(plan: MeasuredBudgets) -> None:
    """A line for each layer: what cuts of its heads cost, and the heads' slots in one window."""
    window = shown_window(plan)
    slots = plan.windows(window, plan.recent)
    losses = np.array(plan.losses).mean(axis=1)
    rows = [
        {"layer": layer, f"slots at {window}": " ".join(map(str, slots[layer]))}
        | dict(zip(map(str, plan.widths), losses[layer].tolist(), strict=True))
        for layer in range(len(slots))
    ]
    print_table(rows, {"layer": ""} | dict.fromkeys(map(str, plan.widths), ".5f") | {f"slots at {window}": ""})
    beside = f"beside the {plan.recent} newest" if plan.recent > 1 else "beside the newest"
    print(f"\nUnder a width: KL divergence in nats per token when one KV head alone keeps so many slots {beside},")
    print(
        f"mean over the layer's heads. Slots at {window}: of each KV head, {plan.recent} of them for the newest tokens,"
    )
    print(f"where the window is {window}.")


def draw(plan: MeasuredBudgets, path: Path) -> None:
    """Two heat maps of layers and KV heads: the loss of a cut, and the slots in one window. Raises InputError."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    window, middle = shown_window(plan), len(plan.widths) // 2
    losses = np.array(plan.losses)[:, :, middle].clip(1e-6)
    slots = np.array(plan.windows(window, plan.recent))
    figure = Figure(figsize=(9, 2 + 0.14 * plan.shape[0]), layout="constrained")
    panels = {
        f"KL in nats per token, cut to {plan.widths[middle]} slots": losses,
        f"slots where the window is {window}": slots,
    }
    for axes, (title, table) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        norm = LogNorm(table.min(), max(table.max(), table.min() * 1.01))
        image = axes.imshow(table, aspect="auto", cmap="viridis", norm=norm, interpolation="nearest")
        axes.set(title=title, xlabel="KV head", ylabel="layer", xticks=range(plan.shape[1]))
        figure.colorbar(image, ax=axes)
    figure.suptitle(f"Which heads of {plan.model} remember")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise InputError(f"--figure {path}: cannot be written ({error.strerror}); the plan is kept") from None


def run(args: argparse.Namespace) -> None:
    if args.figure is not None and not is_installed("matplotlib"):
        raise InputError("--figure: matplotlib is not installed: pip install matplotlib, or leave it out")
    checked_cuts(args, args.widths or [LEAST_WIDTH])  # before a model is loaded
    device = select_device(args.device)
    requests = requests_of(args)
    settings = settings_of(args, requests, fingerprint_of(args.model_name), device)
    plan = existing_plan(args, settings) or measure(args, requests, settings, device)
    show(plan)
    if args.figure is not None:
        draw(plan, args.figure)
    print(f"the plan is in {args.output_path}")


def main(argv: list[str] | None = None) -> int:
    """The exit status, see utils/cli.py."""
    kept = "texts so far are kept; run the same command again to resume"
    return cli.run(lambda: run(parse_args(argv)), kept, f"give shorter requests, or another --dtype ({kept})")


if __name__ == "__main__":
    sys.exit(main())
