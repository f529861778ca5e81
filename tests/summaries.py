"""What the tests of run_summarization.py share: a tiny checkpoint, runs of the command line, and what these leave."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

import run_summarization
from checkpoints import make_checkpoint, make_requests, write_requests
from h2optimizer import batching, decoding
from h2optimizer.utils.cache import HHCache

ROOT = Path(__file__).resolve().parents[1]
WINDOW = dict(window_length=24, num_heavy_hitters=10, update_interval=4)
H2O = ["--enable_h2o_generation", "--num_window_length=24", "--num_heavy_hitter_tokens=10", "--update_interval=4"]
CACHES = {"h2o": H2O, "full": []}
SAMPLED = {"temperature": 0.8, "top_p": 0.9}
both_caches = pytest.mark.parametrize("flags", CACHES.values(), ids=CACHES)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return AutoTokenizer.from_pretrained(checkpoint)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No network, no threads of the tokenizer that a fork would miss, and no log level left to other tests."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    levels = transformers.logging.get_verbosity(), huggingface_hub.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(levels[0])
    huggingface_hub.logging.set_verbosity(levels[1])


@dataclasses.dataclass
class Outcome:
    """What a run of the command line left behind, as it was then."""

    stdout: str
    stderr: list[str]  # lines, progress bars not counted
    path: Path  # the results
    lines: list[bytes]
    metrics: dict | None

    @property
    def results(self) -> list[dict]:
        return [json.loads(line) for line in self.lines]

    @property
    def choices(self) -> list[dict]:
        return [choice for result in self.results for choice in result["result"]["choices"]]

    @property
    def texts(self) -> list[str]:
        return [choice["text"] for choice in self.choices]

    @property
    def files(self) -> tuple[bytes, bytes]:
        """Results and metrics as they are on disk now."""
        return self.path.read_bytes(), metrics_path(self.path).read_bytes()


def metrics_path(path: Path) -> Path:
    return path.with_name(path.name.removesuffix(".jsonl") + ".metrics.json")


def assert_same_results(actual: Outcome, expected: Outcome) -> None:
    """The same in everything but times, memory, and log-probabilities by more than rounding."""
    assert len(actual.results) == len(expected.results)
    for pair in zip(actual.results, expected.results, strict=True):
        logprobs = []
        for result in pair:
            del result["result"]["request_time"], result["peak_memory_bytes"]
            choices = result["result"]["choices"]
            logprobs.append([p for choice in choices for p in choice["logprobs"].pop("token_logprobs")])
        assert pair[0] == pair[1]
        assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-4)


@pytest.fixture
def run(checkpoint, tmp_path, capsys):
    """run(requests or path, *flags, ...) calls main in this process, on the CPU."""

    def run(requests, *flags, output="out.jsonl", model=checkpoint, code=0) -> Outcome:
        path = write_requests(tmp_path / "in.jsonl", requests) if isinstance(requests, list) else requests
        argv = ["--input-path", path, "--output-path", tmp_path / output, "--model-name", model]
        argv = [*map(str, argv), *([] if "--device" in flags else ["--device", "cpu"]), *flags]
        capsys.readouterr()
        try:
            got = run_summarization.main(argv)
        except SystemExit as stop:
            got = stop.code
        captured = capsys.readouterr()
        lines = [line for line in re.split(r"[\r\n]+", captured.err) if line.strip() and "%|" not in line]
        assert got == code, captured.err
        path = tmp_path / output
        metrics = metrics_path(path)
        return Outcome(
            captured.out,
            lines,
            path,
            path.read_bytes().splitlines() if path.is_file() else [],
            json.loads(metrics.read_text()) if metrics.is_file() else None,
        )

    return run


@pytest.fixture
def refused(run):
    """refused(requests, *flags, words=...): exit 2 and one line on stderr that holds the words."""

    def refused(*args, words, **kwargs) -> Outcome:
        outcome = run(*args, code=2, **kwargs)
        (line,) = outcome.stderr
        assert line.startswith("error: ")
        for word in [words] if isinstance(words, str) else words:
            assert word in line, line
        assert outcome.stdout == ""
        return outcome

    return refused


@pytest.fixture
def no_model(monkeypatch):
    """Fails the test when a model is loaded."""
    monkeypatch.setattr(run_summarization, "load_model", lambda *args: pytest.fail("a model was loaded"))


@pytest.fixture
def script(monkeypatch):
    """script(tokens) lets greedy texts say these tokens, the last one again and again; log-probabilities stay its own.

    Rows that begin later would go on where the others are: for one row, or rows that begin together.
    """
    prefill = batching.Batcher._prefill

    def script(tokens):
        step = 0

        def begins(self, group, rows):
            nonlocal step
            step = 0
            prefill(self, group, rows)

        def choose(logits):
            nonlocal step
            said = torch.full((len(logits),), tokens[min(step, len(tokens) - 1)])
            step += 1
            return said

        monkeypatch.setattr(batching.Batcher, "_prefill", begins)
        monkeypatch.setattr(batching, "choose_greedily", choose)

    return script


@pytest.fixture
def caches(monkeypatch):
    """The HHCaches that a run makes: of each prefill, after the first the one that all rows move into."""
    made = []

    class Recorded(HHCache):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

        def with_rows(self, batch_size):
            made.append(super().with_rows(batch_size))
            return made[-1]

    monkeypatch.setattr(decoding, "HHCache", Recorded)
    return made


@pytest.fixture
def prefills(monkeypatch):
    """For each prefill of a run, how many sequences it begins and how many are under way beside them."""
    seen, prefill = [], batching.Batcher._prefill

    def recorded(self, group, rows):
        seen.append((len(group), sum(sequence is not None for sequence in self.rows)))
        prefill(self, group, rows)

    monkeypatch.setattr(batching.Batcher, "_prefill", recorded)
    return seen


def with_generation_config(checkpoint: Path, folder: Path, **settings) -> Path:
    """A copy of the checkpoint with other generation defaults."""
    shutil.copytree(checkpoint, folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


def says_eos(checkpoint: Path, folder: Path, tokenizer, *tokens: str) -> Path:
    """A copy of the checkpoint for which ordinary tokens end a text too, as Llama 3 has two of them."""
    eos = [tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(list(tokens))]
    return with_generation_config(checkpoint, folder, eos_token_id=eos)


def tokens_of(choice: dict) -> list[str]:
    return choice["logprobs"]["tokens"]


def ways_to_ask(count: int) -> list[dict]:
    """Requests of every kind side by side: greedy, of several temperatures and choices, with a nucleus and without."""
    settings = [{"temperature": 0.9}, {}, SAMPLED | {"n": 2}, {"temperature": 1.3, "top_p": 0.6}, {"temperature": 0.7}]
    requests = make_requests(count)
    for i, request in enumerate(requests):
        request |= {"max_tokens": (18, 4, 11)[i % 3]} | settings[i % 5]
    return requests


TEMPLATE = (
    "<s>{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def instruct_model(checkpoint, folder, template=TEMPLATE, eos="</s>") -> Path:
    """The checkpoint with a chat template, and a tokenizer that begins each text with <s> as Llama's do."""
    shutil.copytree(checkpoint, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    begins = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = begins
    tokenizer.chat_template, tokenizer.eos_token = template, eos
    tokenizer.save_pretrained(folder)
    return folder


ON_GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
