"""Make a file of summarization requests (one JSON line each) from XSum, CNN/DailyMail or a local file.

    python scripts/prepare_data.py --dataset xsum --shots 3 --output-path data/xsum_3shot.jsonl
    python scripts/prepare_data.py --input-path news.csv --dataset cnn_dailymail --output-path data/news_0shot.jsonl
    python scripts/prepare_data.py --articles 6 --output-path data/xsum_long.jsonl
    python scripts/prepare_data.py --articles 6 --needles 5 --temperature 0 --output-path data/needles.jsonl

Prompts have the form of the H2O project's request files (arXiv 2306.14048). ROUGE still differs from published figures:
scorers and samples are not the same.

--articles makes long prompts: several articles, and a summary of one of them is asked for. --needles hides sentences
such as "The pass number of Cedar is 48213." in the text and asks for one number instead, which is then the reference.
Such prompts suit instruct models (--chat). Request i asks for article or needle i modulo their number.
"""

import argparse
import codecs
import glob
import logging
import os
import random
import sys
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if not __package__:  # run as a file of a clone
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from h2optimizer.utils import cli

if __name__ == "__main__":
    cli.begin()

from tqdm import tqdm

from h2optimizer.utils.cli import NOT_TEXT, InputError, OneLineParser, count, count_or_zero, output_file, seed
from h2optimizer.utils.long_prompts import NAMES, in_groups, needle_prompt, numbered, summary_prompt
from h2optimizer.utils.requests import check_flags, request_line
from h2optimizer.utils.results import replace_file

if TYPE_CHECKING:  # importing datasets takes seconds: --help and a wrong flag should not wait for it
    from datasets import Dataset


class PromptForm(NamedTuple):
    hub_name: tuple[str, ...]  # positional arguments of datasets.load_dataset
    length: str  # what the prompt asks for
    max_tokens: int  # room for a summary of that length


FORMS = {
    "xsum": PromptForm(("EdinburghNLP/xsum",), "1 sentence", 64),
    "cnn_dailymail": PromptForm(("abisee/cnn_dailymail", "3.0.0"), "3 sentences", 128),
}
BUILDERS = {".parquet": "parquet", ".csv": "csv", ".jsonl": "json", ".json": "json"}
COLUMNS = {"article": ("document", "article"), "summary": ("summary", "highlights")}
NUMBER_TOKENS = 16  # room for the answer to a needle's question
TEXT_DTYPES = ("string", "large_string", "null")  # null: a column without a single value; its rows are skipped


def on_one_line(text: str | None) -> str:
    return " ".join(line.strip() for line in (text or "").splitlines() if line.strip())


def builder_of(path: Path) -> str:
    """The datasets builder for this file. Raises InputError if none can read it, as far as one look tells."""
    if path.suffix.lower() not in BUILDERS:
        raise InputError(f"--input-path {path}: unknown ending {path.suffix!r}; use one of {', '.join(BUILDERS)}")
    builder = BUILDERS[path.suffix.lower()]
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):  # a device may never end
            raise InputError(f"--input-path {path}: is not a regular file; give one")
        with path.open("rb") as file:
            pieces = iter(partial(file.read, 2**20), b"")
            beginning = next((piece for piece in pieces if piece.strip()), b"")
    except OSError as error:
        raise InputError(f"--input-path {path}: cannot be read ({error.strerror})") from None
    if not beginning:
        raise InputError(f"--input-path {path}: is empty; give a file with at least one row")
    if builder != "parquet" and not begins_as_text(beginning):
        raise InputError(f"--input-path {path}: {NOT_TEXT}; give a well-formed {path.suffix} file, in UTF-8")
    return builder


def begins_as_text(piece: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(piece)  # the piece may end inside a character
    except UnicodeDecodeError:
        return False
    return b"\0" not in piece  # NUL: UTF-16, for example


def find_column(dataset: "Dataset", source: str, kind: str, named: str | None) -> str:
    """The column that holds the `kind` ("article" or "summary"). Raises InputError if none or several could."""
    found = [column for column in (COLUMNS[kind] if named is None else [named]) if column in dataset.column_names]
    if len(found) != 1:
        wanted = (
            f"the column {named!r}" if named is not None else f"exactly one of the columns {', '.join(COLUMNS[kind])}"
        )
        raise InputError(
            f"{source}: the {kind} should be in {wanted}, but the columns are "
            f"{', '.join(dataset.column_names)}; name the right one with --{kind}_column"
        )
    feature = dataset.features[found[0]]
    dtype = getattr(feature, "dtype", type(feature).__name__)
    if dtype not in TEXT_DTYPES:
        raise InputError(
            f"{source}: column {found[0]} holds {dtype}, not only text; "
            f"name a column of strings with --{kind}_column or correct the file"
        )
    return found[0]


def load_examples(args: argparse.Namespace, split: str) -> "Dataset":
    """Rows {"article", "summary"} of the hub data set's `split`, or of the local file.

    Texts are on one line; a missing one is "". They are cleaned when a row is read, because only a few rows of a large
    train split are ever drawn as shots.
    """
    if args.input_path:
        source, builder = str(args.input_path), builder_of(args.input_path)
        name, options = (builder,), {"data_files": glob.escape(source), "split": "train"}
        if builder == "csv":  # "NA" may be a text, and pandas must not use the first column as its index
            options |= {"keep_default_na": False, "index_col": False}
        way_out = f"give a well-formed {args.input_path.suffix} file with at least one row"
    else:
        name, options = FORMS[args.dataset].hub_name, {"split": split}
        source = f"{name[0]}, split {split}"
        way_out = "check --split and the network, or download the file elsewhere and pass --input-path"

    import datasets

    # The libraries log retries and parse errors as well as raising them. The line that main prints is enough.
    for library in ("datasets", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    if args.input_path or not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            # pandas only warns when it cuts off what follows an unquoted comma.
            warnings.filterwarnings("error", message="Length of header")
            dataset = datasets.load_dataset(*name, **options)
    except Exception as error:  # parsers, network and hub raise anything from StopIteration to ArrowInvalid
        cause = error.__cause__ or error
        reason = textwrap.shorten(str(cause), 200) or type(cause).__name__
        raise InputError(f"cannot load {source} ({reason}); {way_out}") from error
    columns = {kind: find_column(dataset, source, kind, getattr(args, f"{kind}_column")) for kind in COLUMNS}
    return dataset.with_transform(
        lambda batch: {kind: [on_one_line(text) for text in batch[column]] for kind, column in columns.items()}
    )


def select_rows(args: argparse.Namespace) -> tuple[dict[int, dict], "Dataset | list[dict]", int]:
    """Requests by row number, the pool that their shots are drawn from, and how many rows were skipped."""
    split = args.split or "test"
    examples = load_examples(args, split)
    rows = {
        row: example
        for row, example in enumerate(tqdm(examples, desc="reading", unit="row", delay=1))
        if example["article"] and example["summary"]
    }
    skipped = len(examples) - len(rows)
    if not rows:
        source = args.input_path or f"{FORMS[args.dataset].hub_name[0]}, split {split}"
        raise InputError(f"{source}: no row has both an article and a summary; check the columns or the file")
    pool: Dataset | list[dict] = []
    if args.shots and args.input_path:
        # A file has no train split, so some of its rows are set aside as shots. Duplicate articles count once;
        # otherwise a request could be shown its own answer.
        distinct = list({example["article"]: example for example in rows.values()}.values())
        if len(distinct) <= args.shots:
            raise InputError(
                f"--shots {args.shots} needs at least {args.shots + 1} different articles, but "
                f"{args.input_path} has {len(distinct)}; lower --shots or give a longer file"
            )
        pool = random.Random(args.seed).sample(distinct, args.shots)
        set_aside = {example["article"] for example in pool}
        rows = {row: example for row, example in rows.items() if example["article"] not in set_aside}
    elif args.shots:
        pool = load_examples(args, "train")
    wanted = args.sample_num and args.sample_num * args.articles
    return dict(list(rows.items())[:wanted]), pool, skipped


def draw_shots(pool: "Dataset | list[dict]", shots: int, asked: set[str], generator: random.Random) -> list[dict]:
    """`shots` different examples drawn uniformly from the pool, none of them an article that is asked for."""
    drawn: dict[str, dict] = {}
    tried: set[int] = set()
    while len(drawn) < shots:
        if len(tried) == len(pool):
            raise InputError(f"--shots {shots}: the train split has only {len(drawn)} rows to show; lower --shots")
        row = generator.randrange(len(pool))
        tried.add(row)
        example = pool[row]
        if example["article"] and example["summary"] and example["article"] not in asked:
            drawn.setdefault(example["article"], example)
    return list(drawn.values())


def make_requests(args: argparse.Namespace, rows: dict[int, dict], pool: "Dataset | list[dict]") -> Iterator[str]:
    """The lines of the requests. Raises InputError for one that run_summarization.py would refuse."""
    make = long_requests if args.articles > 1 or args.needles else short_requests
    for row, fields in make(args, rows, pool):
        try:
            yield request_line(fields)
        except ValueError as error:
            raise InputError(f"row {row} cannot become a request: {error}; correct or remove it") from None


def short_requests(
    args: argparse.Namespace, rows: dict[int, dict], pool: "Dataset | list[dict]"
) -> Iterator[tuple[int, dict]]:
    """Rows, each with the fields of its request: shots, then its own article."""
    form = FORMS[args.dataset]

    def prompt(example: dict) -> str:
        return f"###\nArticle: {example['article']}\n\nSummarize the above article in {form.length}.\n"

    fixed = None
    if args.fixed_shots:
        asked = {example["article"] for example in rows.values()}
        fixed = draw_shots(pool, args.shots, asked, random.Random(args.seed))
    for row, example in rows.items():
        # Seeded by row, so neither --sample_num nor earlier rows change the shots of a row.
        shots = fixed or draw_shots(pool, args.shots, {example["article"]}, random.Random(f"{args.seed}/{row}"))
        article = "".join(f"{prompt(shot)}{shot['summary']}\n\n" for shot in shots) + prompt(example)
        yield row, {"article": article, "summary_gt": example["summary"]} | decoding(args, form.max_tokens)


def long_requests(args: argparse.Namespace, rows: dict[int, dict], _pool) -> Iterator[tuple[int, dict]]:
    """The first row of each prompt of several articles, or with needles, and the fields of its request."""
    for i, group in enumerate(in_groups(list(rows.items()), args.articles, "rows")):
        (row, _), articles = group[0], [example["article"] for _, example in group]
        if args.needles:
            text = numbered(articles) if len(articles) > 1 else articles[0]
            needle = needle_prompt(text, args.needles, i % args.needles, random.Random(f"{args.seed}/{row}"))
            fields = {
                "article": needle.prompt,
                "summary_gt": needle.answer,
                "id": f"row {row}, depth {needle.depth:.2f}",
            }
            yield row, fields | decoding(args, NUMBER_TOKENS)
        else:
            asked = i % args.articles
            fields = {"article": summary_prompt(articles, asked), "summary_gt": group[asked][1]["summary"]}
            yield row, fields | decoding(args, FORMS[args.dataset].max_tokens)


def decoding(args: argparse.Namespace, max_tokens: int) -> dict:
    """The fields of a request that say how to decode; `max_tokens`: without --max_tokens."""
    return {
        "logprobs": 1,
        "max_tokens": args.max_tokens or max_tokens,
        "n": 1,
        "stop": ["###"],
        "temperature": args.temperature,
        "top_p": 1,
    }


def write_jsonl(output_path: Path, lines: Iterable[str]) -> None:
    """Readers see the old file or the whole new one, never a part, even after a crash."""
    try:
        output_path.resolve().parent.mkdir(parents=True, exist_ok=True)
        replace_file(output_path, lines)
    except OSError as error:
        raise InputError(f"--output-path {output_path}: cannot be written ({error.strerror})") from None


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dataset", choices=FORMS, default="xsum", help="prompt form and hub data set (default: xsum)")
    add(
        "--input-path",
        type=Path,
        help=f"convert this local file ({', '.join(BUILDERS)}) instead of the hub data set (default: none)",
    )
    add(
        "--output-path",
        type=output_file,
        required=True,
        help="jsonl of requests to write; its folder is created (required)",
    )
    add(
        "--shots",
        type=count_or_zero,
        default=0,
        help="solved examples before each request; H2O used 0, 3 or 5 (default: 0). They come from the train split, or "
        "from the rows of the local file, which then do not become requests",
    )
    add(
        "--articles",
        type=count,
        default=1,
        help="articles in a prompt, which asks for a summary of one; from consecutive rows (default: 1)",
    )
    add(
        "--needles",
        type=count_or_zero,
        default=0,
        help=f"sentences with numbers to hide in each prompt, which asks for one of them; at most {len(NAMES)} "
        "(default: 0)",
    )
    add(
        "--fixed_shots",
        action="store_true",
        help="show the same examples before every request, as HELM does; run_summarization.py then computes them once "
        "(default: draw them anew for each request)",
    )
    add("--split", help="split of the hub data set to convert (default: test)")
    add("--sample_num", type=count, help="write only the first SAMPLE_NUM requests (default: all)")
    add("--seed", type=seed, default=0, help="seed for drawing the shots or needles (default: 0)")
    add(
        "--max_tokens",
        type=count,
        help=f"tokens to generate (default: 64 for xsum, 128 for cnn_dailymail, {NUMBER_TOKENS} with --needles)",
    )
    add("--temperature", type=float, default=0.3, help="sampling temperature; 0 decodes greedily (default: 0.3)")
    for kind, columns in COLUMNS.items():
        add(f"--{kind}_column", help=f"column that holds the {kind} (default: {' or '.join(columns)})")
    add("--overwrite", action="store_true", help="replace an existing output file (default: stop with an error)")
    args = parser.parse_args(argv)
    if args.needles > len(NAMES):
        parser.error(f"--needles {args.needles}: must be at most {len(NAMES)}")
    if args.shots and (args.articles > 1 or args.needles):
        parser.error(f"--shots {args.shots}: goes with neither --articles nor --needles; leave it out")
    if args.fixed_shots and not args.shots:
        parser.error("--fixed_shots: there are no shots; give their number with --shots, or leave the flag out")
    check_flags(temperature=args.temperature, max_tokens=args.max_tokens)
    if args.input_path and args.split:
        parser.error(f"--split {args.split}: a local file has no splits; leave the flag out")
    output = args.output_path
    if os.path.exists(output):  # unlike Path.exists, no error for a name that no file can have
        if args.input_path and args.input_path.exists() and output.samefile(args.input_path):
            parser.error(f"--output-path {output} is the input file; choose another path")
        if not args.overwrite:
            parser.error(f"--output-path {output} exists; pass --overwrite to replace it")
    return args


def run(args: argparse.Namespace) -> None:
    rows, pool, skipped = select_rows(args)
    lines, requests = make_requests(args, rows, pool), len(rows) // args.articles
    write_jsonl(args.output_path, tqdm(lines, total=requests, desc="writing", unit="request", delay=1))
    if skipped:
        cli.say(f"skipped {skipped} rows with an empty article or summary")
    print(f"wrote {requests} requests to {args.output_path}")


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status, see utils/cli.py."""
    return cli.run(lambda: run(parse_args(argv)), "nothing was written")


if __name__ == "__main__":
    sys.exit(main())
