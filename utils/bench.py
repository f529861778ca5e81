"""Shared by the benchmark scripts: models, timers, CUDA graphs, ceilings and a table. utils/costs.py counts costs."""

import copy
import functools
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from h2optimizer.utils.memory import free_memory

SHAPES = {  # of a Llama, unless it names another model_type
    "8b": dict(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
    ),
    "70b": dict(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
    ),
    "mistral-7b": dict(
        model_type="mistral", vocab_size=32768, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=131072, sliding_window=None,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    ),
    "qwen3-8b": dict(
        model_type="qwen3", vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    ),
    "tiny": dict(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=131072,
    ),
}  # fmt: skip


def config_of(shape: str, **fields) -> PreTrainedConfig:
    """The configuration of a shape, with other values of some fields."""
    return AutoConfig.for_model(**{"model_type": "llama"} | SHAPES[shape] | fields)


def make_models(
    ours: Callable[[PreTrainedConfig], PreTrainedModel], shape: str, device: str
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The H2O model that `ours` makes, and a stock one over the same random weights: bf16 on a GPU, else float32.

    No token ends a sequence. The projections are merged first, as `generate` does on a GPU. Merging moves the weights;
    afterwards, the stock model would hold a second copy.
    """
    config = config_of(shape, bos_token_id=None, eos_token_id=None)
    torch.manual_seed(0)
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16 if device == "cuda" else torch.float32)
        model = ours(config).eval()
        torch.set_default_dtype(torch.float32)
    model.merge_projections()
    return model, stock_model(model)


def stock_model(model) -> PreTrainedModel:
    """The stock model of an H2O model's family that shares its weights, without a copy."""
    with torch.device("meta"):  # allocate no weights only to replace them
        stock = model.stock_class()(copy.deepcopy(model.config))
    stock.load_state_dict(model.state_dict(), assign=True)
    stock.tie_weights()  # otherwise a tied head would be counted, and moved, as a separate weight
    stock.model.rotary_emb, stock.generation_config = model.model.rotary_emb, copy.deepcopy(model.generation_config)
    return stock.eval()


# Matrix products -> their operand that is no weight. In inference mode, a linear layer is one operator.
PRODUCTS = {
    torch.ops.aten.linear.default: 0,
    torch.ops.aten.mm.default: 0,
    torch.ops.aten.addmm.default: 1,
    torch.ops.aten._scaled_mm.default: 0,
}


class MatrixProducts(TorchDispatchMode):
    """Records the matrix products of what runs inside `with`, so that `run` can repeat them alone, in order.

    They read the same weights. Products of inputs of one shape all read the first of those inputs.
    """

    def __init__(self):
        super().__init__()
        self._calls: list[Callable] = []
        self._inputs: dict[tuple, torch.Tensor] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if (at := PRODUCTS.get(function)) is not None:
            own = args[at]
            shared = self._inputs.setdefault((own.shape, own.dtype), own.detach())
            self._calls.append(functools.partial(function, *args[:at], shared, *args[at + 1 :], **(kwargs or {})))
        return function(*args, **(kwargs or {}))

    def __len__(self) -> int:
        return len(self._calls)

    @torch.no_grad()
    def run(self) -> None:
        for call in self._calls:
            call()


def device_report(device: str) -> dict[str, str]:
    return {"device": torch.cuda.get_device_name() if device == "cuda" else "cpu", "torch": torch.__version__}


def attempt(name: str, run: Callable, *args, failures: tuple = (torch.OutOfMemoryError,)):
    """The result of `run(*args)`; None, after one line on stderr, if it raises one of `failures`."""
    try:
        return run(*args)
    except failures as error:
        print(f"left out: {name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}", file=sys.stderr)
    free_memory(compiled=False)  # keep the compiled code of the other systems
    return None


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def host_ms(run: Callable) -> float:
    return host_us(run) / 1e3


def host_us(run: Callable) -> float:
    """Microseconds of `run` on the host's clock, with the device synchronised before and after."""
    synchronize()
    begin = time.perf_counter()
    run()
    synchronize()
    return (time.perf_counter() - begin) * 1e6


def prefill_and_whole_ms(generate: Callable[[int], None], tokens: int) -> tuple[float, float]:
    """Milliseconds of `generate(1)`, and then of `generate(tokens)`."""
    first = host_ms(lambda: generate(1))
    return first, host_ms(lambda: generate(tokens)) if tokens > 1 else first


class Spread(NamedTuple):
    """Median, lowest and highest of several measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        values = list(values)
        return cls(statistics.median(values), min(values), max(values))


def prefill_and_step_ms(times: list[tuple[float, float]], tokens: int) -> tuple[Spread, Spread]:
    """Spreads of the prefill, and of the time per further token, from the results of `prefill_and_whole_ms`."""
    steps = ((whole - first) / max(tokens - 1, 1) for first, whole in times)
    return Spread.of(first for first, _ in times), Spread.of(steps)


def device_us(run: Callable, ahead: bool = False) -> float:
    """Microseconds of `run` between CUDA events; without CUDA, on the host's clock.

    With `ahead`, the host enqueues everything while the device is still busy, so launch latency is not measured.
    """
    if not torch.cuda.is_available():
        return host_us(run)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    synchronize()
    if ahead:
        torch.cuda._sleep(500_000)  # cycles
    begin.record()
    run()
    end.record()
    synchronize()
    return begin.elapsed_time(end) * 1e3


def capture(run: Callable, name: str) -> Callable | None:
    """The replay of a CUDA graph of `run`, which must have run before; None, with a line on stderr, on failure."""
    if not torch.cuda.is_available():
        return None
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    try:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        synchronize()
        with torch.cuda.graph(graph, stream=stream):
            run()
        graph.replay()
        synchronize()
    except RuntimeError as error:
        print(f"{name}: no CUDA graph: {' '.join(str(error).split())[:200]}", file=sys.stderr)
        return None
    return graph.replay


def measure_ceilings(dtype: torch.dtype, repeats: int = 10) -> dict[str, float]:
    """Rates of a device copy (bytes read plus written) and of a large square matrix product."""
    device, size, n = ("cuda", 2**30, 8192) if torch.cuda.is_available() else ("cpu", 2**20, 128)
    source, target = torch.ones(2, size, dtype=torch.uint8, device=device)
    matrix = torch.randn(n, n, dtype=dtype, device=device)
    rates = {}
    for name, run, work in (
        ("copy_TBps", lambda: target.copy_(source), 2 * size),
        ("matmul_TFLOPs", lambda: matrix @ matrix, 2 * n**3),
    ):
        times = [device_us(run, ahead=True) for _ in range(3 + repeats)][3:]
        rates[name] = work / statistics.median(times) / 1e6
    return rates


def print_row(result: dict) -> dict:
    """Print a result on one line at once, and return it with floats rounded."""
    row = {key: round(value, 3) if isinstance(value, float) else value for key, value in result.items()}
    print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    return row


def print_table(rows: Iterable[dict], columns: dict[str, str]) -> None:
    """Print rows as a table. `columns` maps a key of the rows to the format of its values; missing values print "-"."""
    cells = [list(columns)]
    for row in rows:
        cells.append(["-" if row.get(key) is None else format(row[key], spec) for key, spec in columns.items()])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
