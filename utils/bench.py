"""What the benchmark scripts share: models, clocks, CUDA graphs, ceilings, counted bytes, a table."""

import copy
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from transformers import LlamaConfig, LlamaForCausalLM

SHAPES = {
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
    "tiny": dict(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=131072,
    ),
}  # fmt: skip


def make_models(ours: type[LlamaForCausalLM], shape: str, device: str) -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    """A model of class `ours` and stock Llama over the same random weights: bf16 on a GPU, else float32.

    No token ends a sequence. The projections are merged first, as `generate` does on a GPU: merging moves them, and
    stock Llama would keep the old ones beside them.
    """
    config = LlamaConfig(**SHAPES[shape], bos_token_id=None, eos_token_id=None)
    torch.manual_seed(0)
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16 if device == "cuda" else torch.float32)
        model = ours(config).eval()
        torch.set_default_dtype(torch.float32)
    model.merge_projections()
    return model, stock_llama(model)


def stock_llama(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Stock Llama over the very weights of a model of a class derived from it, which are not copied."""
    with torch.device("meta"):  # nothing is allocated that would be thrown away
        stock = LlamaForCausalLM(copy.deepcopy(model.config))
    stock.load_state_dict(model.state_dict(), assign=True)
    stock.tie_weights()  # assigned apart, a tied head would be counted, and moved, as another weight
    stock.model.rotary_emb, stock.generation_config = model.model.rotary_emb, copy.deepcopy(model.generation_config)
    return stock.eval()


def device_report(device: str) -> dict[str, str]:
    return {"device": torch.cuda.get_device_name() if device == "cuda" else "cpu", "torch": torch.__version__}


def held_weights(model: LlamaForCausalLM, bits: int | None = None) -> int:
    """Bytes of all weights. With `bits`, those of the layers' projections take so many each, their scales not counted.

    Quantisers leave the rest as it is: embedding, head and norms.
    """
    return sum(
        p.nbytes if bits is None or not name.endswith("_proj.weight") else p.numel() * bits // 8
        for name, p in model.named_parameters()
    )


def unread_embedding(model: LlamaForCausalLM) -> torch.Tensor | None:
    """An embedding of which a step reads a row a token; None where it is the head as well, which is read whole."""
    embedding = model.get_input_embeddings().weight
    return None if embedding is model.get_output_embeddings().weight else embedding


def read_weights(model: LlamaForCausalLM, bits: int | None = None) -> int:
    """Bytes of the weights that every decode step reads; `bits` as in `held_weights`."""
    unread = unread_embedding(model)
    return held_weights(model, bits) - (0 if unread is None else unread.nbytes)


def weight_flops(model: LlamaForCausalLM) -> int:
    """Operations that the matrices take for a token in a decode step; attention's, a few a byte it reads, left out."""
    unread = unread_embedding(model)
    return 2 * sum(p.numel() for p in model.parameters() if p.ndim == 2 and p is not unread)


def slot_bytes(config: LlamaConfig, itemsize: int, scored: float = 0.0) -> float:
    """Bytes that a decode step moves for a slot of a row: K and V of all layers and, where scored, mass in and out.

    `scored` is the share of steps that add mass, float32.
    """
    return config.num_hidden_layers * config.num_key_value_heads * (2 * config.head_dim * itemsize + scored * 2 * 4)


def slots_read(prompt: int, steps: int, h2o=None) -> float:
    """Slots of a row that a decode step attends to, the mean of `steps` steps: a full cache's, or H2O's."""
    if h2o is None:
        return prompt + (steps + 1) / 2
    return h2o.schedule.slots_read(prompt, steps)


def row_read(config: LlamaConfig, itemsize: int, prompt: int, steps: int, h2o=None) -> float:
    """Bytes of a row's cache that a mean decode step moves: keys, values and mass; no slimming."""
    scored = 0.0
    if h2o is not None and h2o.needs_mass:
        scored = 1.0 if h2o.score_every_step else 1 / h2o.update_interval
    return slots_read(prompt, steps, h2o) * slot_bytes(config, itemsize, scored)


def row_held(config: LlamaConfig, itemsize: int, tokens: int, h2o=None) -> int:
    """Bytes of memory that a row takes: a full cache of `tokens`, or H2O's slots of any number, and a step's logits.

    H2O's slots have mass and position beside them (float32, int32), and one layer at a time what slimming picks.
    """
    logits = 8 * config.vocab_size
    if h2o is None:
        return int(tokens * slot_bytes(config, itemsize)) + logits
    heads, picked = config.num_key_value_heads, 4 * config.num_key_value_heads * (h2o.window_length + 1)
    return int(h2o.capacity * (slot_bytes(config, itemsize) + config.num_hidden_layers * heads * 8)) + logits + picked


def floor_ms(model: LlamaForCausalLM, batch: int, prompt: int, steps: int, bandwidth: float, h2o=None) -> float:
    """Milliseconds that reading weights and slots takes in a mean decode step at `bandwidth` TB/s; no slimming."""
    row = row_read(model.config, model.dtype.itemsize, prompt, steps, h2o)
    return (read_weights(model) + batch * row) / bandwidth / 1e9


def free_memory(compiled: bool = True) -> None:
    """Give back the GPU's memory that nothing needs: cycles, `compiled` functions and their graphs, blocks."""
    if not torch.cuda.is_available():
        return
    if compiled and "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()


def allocated() -> int:
    """Bytes of tensors on the GPU; 0 without one."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def peak_allocated(run: Callable) -> int:
    """The most bytes of tensors on the GPU during `run`, those from before it counted in; 0 without one."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def attempt(name: str, run: Callable, *args, failures: tuple = (torch.OutOfMemoryError,)):
    """What `run(*args)` returns, or None, after one line on stderr, where it fails so."""
    try:
        return run(*args)
    except failures as error:
        print(f"left out: {name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}", file=sys.stderr)
    free_memory(compiled=False)  # systems that it takes turns with may have compiled theirs
    return None


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def host_ms(run: Callable) -> float:
    return host_us(run) / 1e3


def host_us(run: Callable) -> float:
    """Microseconds of `run` on the host's clock, the device drained before and after."""
    synchronize()
    begin = time.perf_counter()
    run()
    synchronize()
    return (time.perf_counter() - begin) * 1e6


def prefill_and_whole_ms(generate: Callable[[int], None], tokens: int) -> tuple[float, float]:
    """Milliseconds of `generate(1)` and `generate(tokens)`, one after the other."""
    first = host_ms(lambda: generate(1))
    return first, host_ms(lambda: generate(tokens)) if tokens > 1 else first


class Spread(NamedTuple):
    """The median of several measurements, the lowest and the highest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        values = list(values)
        return cls(statistics.median(values), min(values), max(values))


def prefill_and_step_ms(times: list[tuple[float, float]], tokens: int) -> tuple[Spread, Spread]:
    """Over what `prefill_and_whole_ms` gave: the prefill, and what each further token adds to it."""
    steps = ((whole - first) / max(tokens - 1, 1) for first, whole in times)
    return Spread.of(first for first, _ in times), Spread.of(steps)


def device_us(run: Callable, ahead: bool = False) -> float:
    """Microseconds of `run` between CUDA events, without CUDA on the host's clock.

    With `ahead` the host enqueues all of it while the device is still busy, so that no launch is waited for.
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
    """The replay of a CUDA graph of `run`, which has run before; None, with a line on stderr, where that fails."""
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
    """Rates of a device copy, bytes read and written, and of a large square matrix product."""
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
    """Prints a result as soon as it is there, on one line; returns it with its floats rounded."""
    row = {key: round(value, 3) if isinstance(value, float) else value for key, value in result.items()}
    print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    return row


def print_table(rows: Iterable[dict], columns: dict[str, str]) -> None:
    """`columns` maps a key of the rows to the format of its values; "-" where a row has none."""
    cells = [list(columns)]
    for row in rows:
        cells.append(["-" if row.get(key) is None else format(row[key], spec) for key, spec in columns.items()])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
