"""Summarise a jsonl of requests with Llama, with the heavy-hitter cache or with the full cache as the baseline.

    python run_summarization.py --input-path data/xsum.jsonl --output-path out/xsum.jsonl \\
        --model-name meta-llama/Meta-Llama-3-8B --enable_h2o_generation

Without arguments it runs the bundled model on the bundled requests. A flag of the cache that is not given takes
H2OConfig's value, so that editing h2optimizer/llama.py is enough.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import io
import platform
import re
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import redirect_stdout
from pathlib import Path

from utils import cli

if __name__ == "__main__":
    cli.begin()

import huggingface_hub
import torch
import transformers
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    TorchAoConfig,
)
from transformers.distributed import DistributedConfig

from h2optimizer import H2OConfig, H2OLlamaForCausalLM
from h2optimizer.backends import ATTENTION_BACKENDS, resolve_backend
from h2optimizer.batching import Batcher, Sequence, devices_of, is_out_of_memory, rows_that_fit
from h2optimizer.texts import Stops, one_bos
from h2optimizer.weights import CheckpointError, refuse_adapter, refuse_misfits
from utils.bench import free_memory
from utils.cli import InputError, OneLineParser, count, count_or_all, count_or_auto, output_file, seed
from utils.policies import SCORES
from utils.processes import Processes
from utils.requests import (
    JsonlFile,
    Request,
    ResultsFile,
    checkpoint_fingerprint,
    fingerprint,
    must_know,
    part_path,
    read_requests,
    unheeded,
)
from utils.rouge import ROUGE_TYPES, Rouge, mean_with_interval

DEMO_REQUESTS = Path(__file__).resolve().parent / "data/summarization/demo.jsonl"
DEMO_MODEL = Path(__file__).resolve().parent / "data/demo_model"

# The flags that are not called what their H2OConfig field is: the names that H2O's own scripts use.
FLAG_OF_FIELD = {
    "window_length": "num_window_length",
    "num_heavy_hitters": "num_heavy_hitter_tokens",
    "position_rolling": "enable_position_rolling",
}


# Of --quantize; each names its library.
QUANTIZERS = ("torchao-int8", "torchao-int4", "bitsandbytes-int8", "bitsandbytes-int4")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--input-path", type=Path, default=DEMO_REQUESTS, help="requests, jsonl; the bundled ones unless given")
    add(
        "--output-path",
        type=output_file,
        default=Path("out/summaries.jsonl"),
        help="results; metrics beside it (%(default)s)",
    )
    add_model_flags(parser)
    add("--sample_num", type=count, help="only so many requests, from the top of the file")
    add(
        "--batch_size",
        type=count_or_auto,
        default=1,
        help="sequences decoded together, halved when memory runs out; auto: as many as fit into the free memory",
    )
    add("--greedy", action="store_true", help="decode greedily whatever temperature, top_p and n the requests ask for")
    add(
        "--chat",
        action="store_true",
        help="wrap each request in the tokenizer's chat template, for instruct models; "
        "the tokenizer's own end-of-sequence token then ends a text, too",
    )
    add("--seed", type=seed, default=42, help="seed of sampling")
    add("--overwrite", action="store_true", help="start anew instead of resuming the results at --output-path")
    add("--skip_bad_requests", action="store_true", help="skip lines that are no requests, and count them")
    add_several_flags(parser)
    add_cache_flags(parser)
    return parser.parse_args(argv)


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


def add_several_flags(parser: argparse.ArgumentParser) -> None:
    """What `check_several` and `placement` read."""
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
        choices=SCORES,
        help="what stays beside the newest slots: mass (H2O), sink (half of the window: the oldest), streaming_llm "
        "(the 4 oldest), random",
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


def check_several(args: argparse.Namespace, processes: Processes) -> None:
    """Raises InputError for flags that do not go together, or not with how the program was started."""
    if args.tensor_parallel and not Processes.started_by_launcher():
        raise InputError(
            "--tensor_parallel: one process was started; start several with torchrun --nproc-per-node 2 "
            "run_summarization.py …, or leave it out"
        )
    for flag, given in {
        f"{processes.count} processes": processes.count > 1,
        "--device": args.device != "auto",
    }.items():
        if args.device_map is not None and given:
            raise InputError(f"--device_map: one process spreads the model over all devices; leave it out, or {flag}")
    for flag, given in {"quantize": args.quantize, "compile": getattr(args, "compile", False)}.items():
        if given and args.tensor_parallel:
            raise InputError(f"--{flag}: not with --tensor_parallel; leave one of them out")
    if processes.count > 1 and args.device not in ("auto", "cpu"):
        raise InputError(
            f"--device {args.device}: each of {processes.count} processes takes a GPU of its own; leave it out"
        )
    if processes.splits > 1 and args.device == "cpu" and torch.cuda.is_available():
        raise InputError(
            "--device cpu: --tensor_parallel takes the GPUs that it sees; set CUDA_VISIBLE_DEVICES= as well"
        )


def own_device(name: str, processes: Processes) -> torch.device:
    """`select_device` for one of several processes, which takes the GPU of its own number. Raises InputError."""
    if processes.count == 1 or name != "auto" or not torch.cuda.is_available():
        return select_device(name)
    if processes.local_rank >= (visible := torch.cuda.device_count()):
        raise InputError(
            f"{processes.local_rank + 1} processes on one machine, {visible} CUDA devices are visible: start "
            f"{visible}, or pass --device cpu"
        )
    return select_device(f"cuda:{processes.local_rank}")


def placement(args: argparse.Namespace, processes: Processes, device: torch.device) -> dict:
    """What from_pretrained is told about where weights go, and in what form; nothing for a plain model on one device.

    Raises: InputError for what this checkpoint, device or installation does not allow.
    """
    config, place = load_config(args.model_name), {}
    quantized = getattr(config, "quantization_config", None)
    if args.quantize is not None:
        if quantized is not None:
            raise InputError(f"--quantize {args.quantize}: {args.model_name} holds quantised weights; leave it out")
        place |= quantization(args, config, device)
    if processes.splits > 1:
        heads = config.num_key_value_heads
        if heads % processes.count:
            fitting = " or ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
            raise InputError(
                f"--tensor_parallel: {processes.count} processes cannot share {heads} KV heads; start {fitting}, or "
                "leave it out, and each process takes a share of the requests"
            )
        place["distributed_config"] = DistributedConfig(tp_size=processes.count, tp_plan="auto")
    elif args.device_map is not None:
        place["device_map"] = args.device_map
    elif args.quantize is not None or quantized is not None:
        place["device_map"] = {"": device}  # quantised there, or not to be moved
    if "device_map" in place and not has("accelerate"):
        raise InputError("--device_map and quantised weights: need accelerate; pip install accelerate")
    return place


def quantization(args: argparse.Namespace, config: LlamaConfig, device: torch.device) -> dict:
    """What from_pretrained is told for --quantize: transformers' own configuration. Raises InputError."""
    library = args.quantize.split("-")[0]
    if args.quantize == "torchao-int4" and (device.type != "cuda" or args.dtype not in ("auto", "bfloat16")):
        raise InputError(
            f"--quantize {args.quantize}: its kernels need a GPU and bfloat16; pass --dtype bfloat16, or another choice"
        )
    if not has(library):
        raise InputError(f"--quantize {args.quantize}: needs {library}; pip install {library}")
    if args.quantize == "bitsandbytes-int8":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    if args.quantize == "bitsandbytes-int4":
        dtype = (config.dtype if device.type == "cuda" else None) or torch.float32
        dtype = dtype if args.dtype == "auto" else getattr(torch, args.dtype)
        settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
        return {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, **settings)}
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig

    if args.quantize == "torchao-int8":
        return {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig())}
    tiles = Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d")  # torch's own kernel
    return {"quantization_config": TorchAoConfig(tiles), "dtype": torch.bfloat16}


def has(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


def select_device(name: str) -> torch.device:
    try:
        device = torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
        if device.type == "cuda" and (device.index or 0) >= (visible := torch.cuda.device_count()):
            raise InputError(f"--device {name}: {visible} CUDA devices are visible; pass --device cpu")
        torch.zeros(1, device=device).item()  # torch names devices that it cannot compute on here
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"--device {name}: cannot be used ({reason}); pass cuda, cuda:1 or cpu") from None
    return device


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


def load_config(name: str) -> LlamaConfig:
    """The configuration of a Llama checkpoint, without its weights. Raises InputError."""
    try:
        refuse_adapter(name, local_files_only=True)  # without asking the hub: an adapter alone has no config.json
        config = AutoConfig.from_pretrained(name)
        refuse_adapter(name)
    except CheckpointError as error:
        raise InputError(f"--model-name {name}: {error}") from None
    except Exception as error:
        raise unusable(name, error) from None
    if config.model_type != "llama":
        raise InputError(f"--model-name {name}: a {config.model_type} checkpoint; H2Optimizer runs Llama only")
    return config


def fingerprint_of(name: str) -> str | None:
    """`checkpoint_fingerprint`, for a name on the hub after its config.json is fetched. Raises InputError."""
    if not Path(name).is_dir():
        quiet_libraries()
        load_config(name)
    return checkpoint_fingerprint(name)


def unusable(name: str, error: Exception) -> InputError:
    reason = " ".join(str(error).split())[:200]
    return InputError(f"--model-name {name}: cannot be loaded here or from the hub ({reason})")


def load_model(args: argparse.Namespace, h2o: H2OConfig | None, device: torch.device, place: dict | None = None):
    """Model (eval mode) and left-padding tokenizer of a Llama checkpoint. Raises InputError.

    `place` is `placement`'s.
    """
    name, on_gpu = args.model_name, device.type == "cuda"
    try:
        load_config(name)
        tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
        kwargs = {
            "dtype": getattr(torch, args.dtype) if args.dtype != "auto" else "auto" if on_gpu else torch.float32,
            **(place or {}),
        }
        if h2o is None:
            whole = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # refuse_misfits names what is not
            model, loading = LlamaForCausalLM.from_pretrained(name, **kwargs, **whole)
            refuse_misfits(model, loading)
        else:
            model = H2OLlamaForCausalLM.from_pretrained(name, h2o=h2o, **kwargs)
    except InputError:
        raise
    except CheckpointError as error:
        raise InputError(f"--model-name {name}: {str(error).removeprefix(f'{name}: ')}") from None
    except torch.OutOfMemoryError:
        raise too_large(name, device) from None
    except Exception as error:  # a damaged checkpoint fails in any of four libraries
        raise unusable(name, error) from None
    if tokenizer.pad_token is None or tokenizer.pad_token_id >= model.config.vocab_size:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    # Requests decide how to sample: nothing else of the checkpoint's generation defaults takes part.
    model.generation_config = GenerationConfig(
        bos_token_id=model.generation_config.bos_token_id,
        eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    try:
        return (model if place else model.to(device)).eval(), tokenizer
    except torch.OutOfMemoryError:
        raise too_large(name, device) from None


def too_large(name: str, device: torch.device) -> InputError:
    return InputError(f"--model-name {name}: does not fit into the memory of --device {device}")


def quiet_libraries() -> None:
    """What goes wrong with a model is said by this project's own lines."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity_error()


@dataclasses.dataclass
class Prompt:
    """A request with its tokens."""

    request: Request
    tokens: list[int]


def render_chat(tokenizer, texts: list[str], model_name: str) -> str:
    """A conversation of user and assistant in turn in the tokenizer's chat template, ready for the next reply.

    Raises: InputError where there is no template, or it cannot say this.
    """
    if not tokenizer.chat_template:
        raise InputError(
            f"--chat: the tokenizer of {model_name} has no chat template; take an instruct model, or leave it out"
        )
    bos = tokenizer.bos_token or ""  # the template's own; a text may begin with one as well
    messages = [
        {"role": ("user", "assistant")[i % 2], "content": text.removeprefix(bos)} for i, text in enumerate(texts)
    ]
    to_reply = len(texts) % 2 == 1
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=to_reply)
        reason = "" if text else "it makes no text of a message"
    except Exception as error:  # a program of the model's authors
        reason = " ".join(str(error).split())[:200] or type(error).__name__
    if reason:
        raise InputError(f"--chat: the chat template of {model_name} cannot be used ({reason}); leave it out")
    return text


def end_as_chats_do(model, tokenizer) -> None:
    """Let the tokenizer's own end-of-sequence token end a text too: some instruct models' settings leave it out."""
    settings, eos = model.generation_config, tokenizer.eos_token_id
    known = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    settings.eos_token_id = [token for token in dict.fromkeys([*known, eos]) if token is not None] or None


def tokenize(requests: list[Request], tokenizer, model, model_name: str, chat: bool = False) -> list[Prompt]:
    """Requests with their tokens. Raises InputError where tokenizer and model do not belong together."""
    if chat:  # the template says where a text begins
        texts = [render_chat(tokenizer, [request.article], model_name) for request in requests]
        encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    else:
        encoded = [one_bos(of, tokenizer) for of in tokenizer([request.article for request in requests])["input_ids"]]
    must_know(model, model_name, max(max(tokens, default=0) for tokens in encoded))
    for request, tokens in zip(requests, encoded, strict=True):
        if not tokens:
            raise InputError(f"request {request.index}: the tokenizer of {model_name} finds no token in its article")
    return [Prompt(request, tokens) for request, tokens in zip(requests, encoded, strict=True)]


def in_order(prompts: list[Prompt], batch_size: int | str, processes: Processes | None = None) -> list[Prompt]:
    """The order to decode in: longest prompts first, so that memory runs out early or not at all, and alike together.

    One by one, requests keep their order. Processes that share them out deal them, longest first, and get alike shares.
    """
    shares = processes.shares if processes else 1
    if batch_size == 1 and shares == 1:
        return prompts
    prompts = sorted(prompts, key=lambda prompt: -len(prompt.tokens))
    return prompts[processes.rank :: shares] if shares > 1 else prompts


def sampling(request: Request, greedy: bool) -> tuple[float, float, int]:
    """(temperature, top_p, sequences) that a request is decoded with; (0, 1, 1) is greedy, whose choices are equal."""
    return (0.0, 1.0, 1) if greedy or request.temperature == 0 else (request.temperature, request.top_p, request.n)


@dataclasses.dataclass
class Job:
    """A request on its way: the sequences of its choices, one where these are equal."""

    prompt: Prompt
    sequences: list[Sequence]


class Summarizer:
    """Runs requests through a model, many at once, and fewer when memory runs out."""

    def __init__(self, model, tokenizer, args: argparse.Namespace, processes: Processes | None = None):
        self.model, self.tokenizer, self.args = model, tokenizer, args
        self.processes = processes or Processes()
        self.rouge = Rouge()
        self._stops: dict[tuple[str, ...], Stops] = {}
        eos = model.generation_config.eos_token_id
        self.eos = set(eos if isinstance(eos, list) else [eos]) - {None}

    def run(self, prompts: list[Prompt]) -> Iterator[dict]:
        """Results, as result lines, in the order in which they end. Raises InputError when one alone is too large."""
        latest = time.perf_counter()
        for job in self.decode(prompts):
            now = time.perf_counter()
            yield self._result(job, wall_time=(now - latest) / self.processes.shares)
            latest = now

    def decode(self, prompts: list[Prompt]) -> Iterator[Job]:
        """Requests whose sequences have ended, in that order. Raises InputError when one alone is too large."""
        jobs = [Job(prompt, []) for prompt in prompts]
        for job in jobs:
            choices = sampling(job.prompt.request, self.args.greedy)[2]
            job.sequences = [self._sequence(job.prompt, choice) for choice in range(choices)]
        rows = self.args.batch_size
        if rows == "auto" and prompts:
            longest = max(len(prompt.tokens) for prompt in prompts)
            try:
                rows = rows_that_fit(self.model, longest, max(prompt.request.max_tokens for prompt in prompts))
            except torch.OutOfMemoryError:  # the others may have the room, and wait
                raise InputError(
                    f"process {self.processes.rank}: out of memory with the longest prompt ({longest} tokens) alone; "
                    "start more processes, or pass a --prefill_chunk"
                ) from None
            if self.processes.splits > 1:
                rows = min(self.processes.gather(rows))
            self.processes.say(f"--batch_size auto: up to {rows} sequences at once")
        while jobs:
            rows = min(rows, sum(not sequence.finish_reason for job in jobs for sequence in job.sequences))
            out_of_memory = False
            try:
                yield from self._ended(jobs, rows)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                out_of_memory = True
            jobs = [job for job in jobs if not all(sequence.finish_reason for sequence in job.sequences)]
            if out_of_memory:  # handled here, where the traceback no longer holds the tensors
                free_memory(compiled=False)
                rows = self._fewer(rows, jobs)

    def _fewer(self, rows: int, jobs: list[Job]) -> int:
        """Half as many rows, for jobs that begin anew where they have not ended. Raises InputError."""
        if self.processes.splits > 1:  # the others are in the middle of a step
            raise InputError(
                f"process {self.processes.rank}: out of memory with {rows} sequences; pass a smaller --batch_size "
                "(results so far are kept, the command then goes on)"
            )
        if rows == 1:
            prompt = jobs[0].prompt
            raise InputError(
                f"request {prompt.request.index} ({len(prompt.tokens)} tokens): does not fit into memory even "
                "alone; use a device with more or a smaller window, or leave it out (results so far are kept)"
            )
        for job in jobs:  # what was under way begins anew, and says the same again
            for choice, sequence in enumerate(job.sequences):
                if not sequence.finish_reason:
                    job.sequences[choice] = self._sequence(job.prompt, choice)
        self.processes.say(f"out of memory with {rows} sequences: going on with {(rows + 1) // 2}")
        return (rows + 1) // 2

    def _sequence(self, prompt: Prompt, choice: int) -> Sequence:
        request = prompt.request
        temperature, top_p, _ = sampling(request, self.args.greedy)
        return Sequence(
            prompt=prompt.tokens,
            max_tokens=request.max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=(self.args.seed, request.index, choice),
            has_ended=self._stops_of(request).said if request.stop else None,
        )

    def _stops_of(self, request: Request) -> Stops:
        if request.stop not in self._stops:
            self._stops[request.stop] = Stops(self.tokenizer, request.stop)
        return self._stops[request.stop]

    def _ended(self, jobs: list[Job], rows: int) -> Iterator[Job]:
        """Each job when the last of its sequences has ended."""
        todo = [(sequence, job) for job in jobs for sequence in job.sequences if not sequence.finish_reason]
        job_of = {id(sequence): job for sequence, job in todo}
        left = Counter(id(job) for _, job in todo)  # several may end in one step: what counts is what has come out
        sampled = [sequence for sequence, _ in todo if sequence.temperature > 0]
        nucleus = any(sequence.top_p < 1 for sequence in sampled)
        agree = self.processes.agree_on if self.processes.splits > 1 else None
        batcher = Batcher(self.model, rows, self.eos, self.tokenizer.pad_token_id, bool(sampled), nucleus, agree)
        for sequence in batcher.run(sequence for sequence, _ in todo):
            job = job_of[id(sequence)]
            left[id(job)] -= 1
            if sequence.finish_reason == "nan":
                raise InputError(
                    f"request {job.prompt.request.index}: the model's logits are NaN after {len(sequence.tokens) - 1} "
                    f"tokens in {str(self.model.dtype).removeprefix('torch.')}; pass another --dtype, or leave the "
                    "request out (results so far are kept)"
                )
            if not left[id(job)]:
                yield job

    def _result(self, job: Job, wall_time: float) -> dict:
        request, longest = job.prompt.request, max(job.sequences, key=lambda sequence: len(sequence.tokens))
        choices = [self.choice(request, sequence) for sequence in job.sequences]
        if request.temperature == 0 and not self.args.greedy:
            choices *= request.n
        decoding = longest.seconds - longest.seconds_to_first_token
        kv_bytes = sum(sequence.cache["kv_bytes"] for sequence in job.sequences)
        timing = {
            "latency": longest.seconds,
            "time_to_first_token": longest.seconds_to_first_token,
            "time_per_output_token": decoding / (len(longest.tokens) - 1) if len(longest.tokens) > 1 else None,
            "decode_time": sum(sequence.decode_seconds for sequence in job.sequences) / self.processes.shares,
            "wall_time": wall_time,
            "batch_size": longest.rows,
        }
        return {
            "index": request.index,
            "request": request.fields,
            "result": {"choices": choices, "request_time": timing},
            "rouge": self.rouge.score(request.summary_gt, choices[0]["text"]),
            "cache": longest.cache | {"kv_bytes": kv_bytes * self.processes.splits},  # each process has as many heads
            "tokens_generated": sum(len(sequence.tokens) for sequence in job.sequences),
            "tokens_emitted": sum(len(choice["logprobs"]["tokens"]) for choice in choices),
            "peak_memory_bytes": self._peak_memory(),
        }

    def _peak_memory(self) -> int:
        """Of all devices that hold the model."""
        peak = sum(map(peak_memory, devices_of(self.model)))
        return sum(self.processes.gather(peak)) if self.processes.splits > 1 else peak

    def choice(self, request: Request, sequence: Sequence) -> dict:
        """Text up to the stop string or EOS, with the tokens that make it up."""
        tokens = sequence.tokens
        emitted = tokens[:-1] if tokens[-1] in self.eos else tokens
        text = self.tokenizer.decode(emitted, skip_special_tokens=True)
        stop = self._stops_of(request).first(tokens) if request.stop else None
        if stop is not None and stop[1] <= len(emitted):
            text, emitted = stop[0], emitted[: stop[1]]
        return {
            "text": text,
            "logprobs": {
                "tokens": self.tokenizer.convert_ids_to_tokens(emitted),
                "token_logprobs": [round(p, 6) for p in sequence.logprobs[: len(emitted)]],
            },
            "finish_reason": sequence.finish_reason,
        }


def peak_memory(device: torch.device) -> int:
    """Bytes at the process's peak so far: of the GPU, or without one of the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def decode_speed(results: Iterable[dict]) -> float | None:
    """Tokens a second that decode steps gave all sequences together; a text's first token is prefill's."""
    tokens = seconds = 0
    for result in results:
        tokens += result["tokens_generated"] - len(result["result"]["choices"])
        seconds += result["result"]["request_time"]["decode_time"]
    return tokens / seconds if tokens and seconds else None


def summarize_metrics(results: list[dict], device: torch.device, idle: float = 0.0) -> dict:
    """What the metrics file says of all results, those of earlier, interrupted runs included. Times in seconds.

    Speed of decoding is that of all sequences together, without prefill: their tokens but the first, over what the
    steps took. `tokens_per_second` counts prefill's time and tokens in. None stands where no token was decoded.

    Args: idle: what processes, on average, have waited for the last one.
    """
    times = [result["result"]["request_time"] for result in results]
    seconds = sum(t["wall_time"] for t in times) + idle
    tokens = sum(result["tokens_generated"] for result in results)
    mean = {}
    for name in ("time_to_first_token", "time_per_output_token"):
        timed = [t[name] for t in times if t[name] is not None]  # a single token has no time per token
        mean[name] = sum(timed) / len(timed) if timed else None
    return {
        "rouge_unit": "F-measure from 0 to 1",
        "rouge": {name: mean_with_interval([result["rouge"][name] for result in results]) for name in ROUGE_TYPES},
        "requests": len(results),
        "tokens_generated": tokens,
        "tokens_emitted": sum(result["tokens_emitted"] for result in results),
        **mean,
        "decode_tokens_per_second": decode_speed(results),
        "requests_per_second": len(results) / seconds,
        "tokens_per_second": tokens / seconds,
        "seconds": seconds,
        "peak_memory_bytes": max(result["peak_memory_bytes"] for result in results),
        "peak_memory_of": "GPU" if device.type == "cuda" else "process",
        "kv_bytes_per_request": sum(result["cache"]["kv_bytes"] for result in results) / len(results),
        "slots_kept_per_request": sum(result["cache"]["slots_kept"] for result in results) / len(results),
        "requests_evicted_from": sum(result["cache"]["slimmings"] > 0 for result in results),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
    }


def print_table(metrics: dict) -> None:
    requests = metrics["requests"]

    def line(label: str, value: float | None, spec: str, note: str = "") -> None:
        shown = "-" if value is None else format(value, spec)
        print(f"{label:<22}{shown:>8}{note and f' {note}'}")

    interval = f"[95 % interval over {requests} requests]" if requests > 1 else "(one request has no interval)"
    print(f"ROUGE, points of 100 (F-measure; the files hold fractions of 1)   {interval}")
    for name in ROUGE_TYPES:
        mean, low, high = (100 * metrics["rouge"][name][key] for key in ("mean", "low", "high"))
        label = f"ROUGE-{name.removeprefix('rouge')}"
        line(label, mean, ".2f", f"  [{low:.2f}, {high:.2f}]" if requests > 1 else "")
    line("requests", requests, "d", f"  {metrics['requests_evicted_from']} with slots dropped")
    first, each = metrics["time_to_first_token"], metrics["time_per_output_token"]
    line("time to first token", 1e3 * first, ".1f", "ms   mean of requests, from the beginning of their prefill")
    line("time per token", None if each is None else 1e3 * each, ".1f", "ms   mean of requests, after the first token")
    line("decoding", metrics["decode_tokens_per_second"], ".1f", "tokens/s   all sequences together, without prefill")
    line("overall", metrics["requests_per_second"], ".3g", "requests/s   with prefill")
    line("KV cache", metrics["kv_bytes_per_request"] / 2**20, ".2f", "MiB a request")
    line("peak memory", metrics["peak_memory_bytes"] / 2**30, ".2f", f"GiB of the {metrics['peak_memory_of']}")


def warn_of_long_prompts(prompts: list[Prompt], positions: int, h2o: H2OConfig | None) -> None:
    """Say once how many requests need more positions than the model was trained on."""
    rolling = h2o is not None and h2o.position_rolling
    # Rolling keeps decoding within the window's positions, but a prompt, or a chunk of it, is prefilled at its own.
    needs = [len(p.tokens) + (0 if rolling else p.request.max_tokens) for p in prompts]
    if rolling and h2o.prefill_chunk is not None:
        needs = [min(n, h2o.window_length + h2o.prefill_chunk) for n in needs]
    if too_long := sum(n > positions for n in needs):
        what = "prompts" if rolling else "prompts with their summaries"
        way_out = "; a --prefill_chunk keeps them within window and chunk" if rolling else ""
        cli.say(
            f"warning: {too_long} of {len(prompts)} {what} are longer than the model's {positions} positions "
            f"(the longest needs {max(needs)}); expect poor text there{way_out}"
        )


def settings_of(args: argparse.Namespace, h2o: H2OConfig | None, requests: list[Request]) -> dict:
    """What a resumed run must share, by flag; not how many processes run, nor on what."""
    settings = {
        "the form of results": 3,  # results of another form cannot be resumed
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
        check_several(args, processes)
        h2o = h2o_config(args)
        device = own_device(args.device, processes)
        backend = attention_backend(h2o, device)
        if processes.first:  # the one that reads: a pipe gives its lines once
            requests, skipped = read_requests(args.input_path, args.skip_bad_requests, args.sample_num)
            if skipped:
                processes.say(f"warning: {skipped} bad lines of {args.input_path} skipped")
            if warning := unheeded(requests):
                processes.say(warning)
            output = ResultsFile(args.output_path, settings_of(args, h2o, requests), args.overwrite, args.input_path)
            if output.results:
                processes.say(f"{len(output.results)} of {len(requests)} results are there already")
    requests, done = processes.broadcast((requests, set(output.results) if output else None))

    todo, idle = [request for request in requests if request.index not in done], 0.0
    if todo:
        with processes.together():
            quiet_libraries()
            model, tokenizer = load_model(args, h2o, device, placement(args, processes, device))
            model.capture_sharded = processes.splits > 1  # Processes.close asks nothing of NCCL
            prompts = tokenize(requests, tokenizer, model, args.model_name, args.chat)
            if args.chat:
                end_as_chats_do(model, tokenizer)
            if processes.first:
                warn_of_long_prompts(prompts, model.config.max_position_embeddings, h2o)
                output.start()
        prompts = [prompt for prompt in prompts if prompt.request.index not in done]
        summarizer = Summarizer(model, tokenizer, args, processes)
        idle = summarize(summarizer, in_order(prompts, args.batch_size, processes), output, args.output_path)
    with processes.together():
        if processes.first:
            output.absorb()
            if missing := [request.index for request in requests if request.index not in output.results]:
                raise InputError(
                    f"--output-path {args.output_path}: {len(missing)} results are missing, first that of request "
                    f"{missing[0]}; all processes must write to one folder; run the same command again"
                )
            if todo or not output.metrics:
                results = [output.results[request.index] for request in requests]
                metrics = summarize_metrics(results, device, idle)
                metrics |= {"input_path": str(args.input_path), "skipped_lines": skipped, "batch_size": args.batch_size}
                metrics |= {"attention_backend": backend, "processes": processes.count}
                metrics["tensor_parallel"] = processes.splits > 1
                output.finish(metrics)
            print_table(output.metrics)
            sys.stdout.flush()  # where it fails, all processes end with the same status
    return 0


def summarize(summarizer: Summarizer, prompts: list[Prompt], output: ResultsFile | None, path: Path) -> float:
    """Run this process's prompts, writing each result as soon as it is there; seconds that it waits for the slowest.

    Process 0 writes to `output`, others that have prompts of their own to parts of `path`, which it takes in.
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
