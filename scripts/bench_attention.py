"""Benchmark one attention layer: prefill and decode, with and without mass, against SDPA and flash-attn; slimming.

Regime: random states of a Llama-3-8B layer by default. The systems of a case run in one process and take turns.
Matrix products bound prefill; reading K and V once bounds decode. A case has enough sets of inputs for their keys alone
to fill four L2 caches, and every turn goes over all of them, because a model reads gigabytes between two calls of a
layer. `us` is the median time of a call in a replayed CUDA graph of a whole turn, without the host. `events_us` is that
of plain calls between CUDA events, including launches. The floor is the longer of two times: the counted FLOPs at the
rate of a large matrix product, and the counted bytes at the rate of a device copy. The same run measures both rates.
Outputs and masses are first checked against float64; exit status 1 means that one is wrong. Without CUDA, a tiny run on
the CPU shows that the script works, but measures nothing. The last line is JSON.
"""

import argparse
import functools
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

if not __package__:  # run as a file of a clone
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from h2optimizer.utils import cli

if __name__ == "__main__":
    cli.begin()

import torch
import torch.nn.functional as F

from h2optimizer import H2OConfig, attention
from h2optimizer.backends import resolve_backend
from h2optimizer.slimming import slimmer_of
from h2optimizer.utils.bench import capture, device_us, host_us, measure_ceilings, print_table
from h2optimizer.utils.cache import HHCache
from h2optimizer.utils.cli import OneLineParser, count, sizes
from h2optimizer.utils.heads import HeadWindows
from h2optimizer.utils.int8_slots import dequantize, quantize
from h2optimizer.utils.results import to_json
from h2optimizer.utils.slots import gather
from h2optimizer.utils.step import Rows, Step

TURN_US = 2000.0  # least length of a turn
LAST = 64  # queries of the score_queries case
MODEL_LAYERS, SLIMMING_BYTES = 32, 24e9  # slimming runs over a model's layers, or as many as fit into these bytes
DEFAULTS = {
    "cuda": dict(query_heads=32, kv_heads=8, head_dim=128, dtype="bfloat16", prefill="8192,32768",
                 decode="1x1024,1x32768,32x1024,256x1024", slimming="1,16,256", window_length=1024, repeats=15),
    "cpu": dict(query_heads=4, kv_heads=2, head_dim=16, dtype="float32", prefill="80", decode="2x40", slimming="2",
                window_length=16, repeats=2),
}  # fmt: skip


class Case(NamedTuple):
    name: str
    batch: int
    columns: int  # queries of a row, the last of its slots; 1 = decode
    width: int  # slots of a row, all filled


class Inputs(NamedTuple):
    query: torch.Tensor  # [B, Hq, columns, D]
    key: torch.Tensor  # [B, Hkv, width, D]
    value: torch.Tensor
    lse: torch.Tensor | None  # prefill: [B, Hq, columns] float32
    mass: torch.Tensor | None  # decode: [B, Hkv, width] float32, in place
    lengths: torch.Tensor | None  # decode: [B] int32
    stored: tuple[torch.Tensor, ...] = ()  # decode: key and value as int8, and their scales


class System(NamedTuple):
    name: str
    run: Callable[[Inputs], tuple[torch.Tensor | None, torch.Tensor | None]]  # output and mass; None if not computed
    attends: bool = True  # whether it computes the output
    scored: int = 0  # how many of the last queries add mass
    int8: bool = False  # whether it reads the slots in 8 bits


def count_work(args, case: Case, system: System) -> tuple[int, int]:
    """Bytes and FLOPs of a call: each tensor counts once, a multiply-add twice, nothing above the diagonal."""

    def logits(queries: int) -> int:
        return case.batch * args.query_heads * (queries * case.width - queries * (queries - 1) // 2)

    def query_bytes(queries: int) -> int:
        return case.batch * args.query_heads * queries * args.head_dim * args.dtype.itemsize

    of_slot = args.head_dim + 4 if system.int8 else args.head_dim * args.dtype.itemsize
    key_bytes = case.batch * args.kv_heads * case.width * of_slot
    moved = flops = 0
    if system.attends:
        moved += 2 * query_bytes(case.columns) + 2 * key_bytes  # queries, outputs, keys, values
        flops += 4 * args.head_dim * logits(case.columns)
    if system.scored:
        mass_bytes = 4 * case.batch * args.kv_heads * case.width
        moved += 2 * mass_bytes if case.columns == 1 else mass_bytes  # a decode step updates it in place
    if system.scored and case.columns > 1:  # column sums need the log-sum-exps first, so logits are computed twice
        flops += 2 * args.head_dim * logits(system.scored)
        if not system.attends:
            moved += key_bytes + query_bytes(system.scored) + 4 * case.batch * args.query_heads * system.scored
    return moved, flops


def make_inputs(args, case: Case) -> list[Inputs]:
    """Sets of inputs in the layouts of model and cache, enough for their keys to fill at least four L2 caches."""
    kind = dict(dtype=args.dtype, device=args.device)
    sets, q_shape = [], (case.batch, case.columns, args.query_heads, args.head_dim)
    while not sets or len(sets) * sets[0].key.nbytes < 4 * args.l2_bytes:
        query, lse, mass, lengths = torch.randn(q_shape, **kind).transpose(1, 2), None, None, None
        stored = ()
        if case.columns == 1:
            key, value = torch.randn(2, case.batch, args.kv_heads, case.width, args.head_dim, **kind).unbind(0)
            mass = torch.zeros(key.shape[:3], device=args.device)
            lengths = torch.full((case.batch,), case.width, dtype=torch.int32, device=args.device)
            if args.kernels:
                stored = tuple(of for pair in zip(quantize(key), quantize(value), strict=True) for of in pair)
        else:
            shape = (case.batch, case.width, args.kv_heads, args.head_dim)
            key, value = (torch.randn(shape, **kind).transpose(1, 2) for _ in range(2))
            if args.kernels:
                from h2optimizer.kernels.prefill import attention_with_lse

                lse = attention_with_lse(query, key, value, all_scored(case).spans(key.device), args.scaling)[1]
        sets.append(Inputs(query, key, value, lse, mass, lengths, stored))
    return sets


def all_scored(case: Case, first: int = 0) -> Step:
    """A prefill in which queries from column `first` on add mass."""
    rows, new, firsts = (
        Rows(case.batch, HeadWindows.of(case.width, 1)),
        [case.columns] * case.batch,
        [first] * case.batch,
    )
    return Step(rows, [0] * case.batch, new, case.columns, decode=False, due=True, scored=True, first_scored=firsts)


def make_systems(args, case: Case) -> list[System]:
    """The baseline first."""
    decode, gqa = case.columns == 1, args.query_heads != args.kv_heads

    def sdpa(x: Inputs):
        return F.scaled_dot_product_attention(
            x.query, x.key, x.value, is_causal=not decode, scale=args.scaling, enable_gqa=gqa
        ), None

    def flash(x: Inputs):
        q, k, v = (states.transpose(1, 2) for states in (x.query, x.key, x.value))
        if decode:
            output = args.flash.flash_attn_with_kvcache(
                q, k, v, cache_seqlens=x.lengths, softmax_scale=args.scaling, causal=True
            )
        else:
            output = args.flash.flash_attn_func(q, k, v, softmax_scale=args.scaling, causal=True)
        return (output[0] if isinstance(output, tuple) else output).transpose(1, 2), None

    systems = [System("sdpa", sdpa)]
    if args.flash is not None:
        systems.append(System(args.flash.__name__, flash))
    if not args.kernels:
        return systems
    from h2optimizer.kernels.decode import decode_attention
    from h2optimizer.kernels.prefill import attention_mass, attention_with_lse

    if decode:

        def ours(x: Inputs, mass=None):
            return decode_attention(x.query, x.key, x.value, x.lengths, args.scaling, mass=mass), mass

        def ours_int8(x: Inputs):
            key, value, *scales = x.stored
            output = decode_attention(x.query, key, value, x.lengths, args.scaling, mass=x.mass, scales=tuple(scales))
            return output, x.mass

        return systems + [
            System("ours, no mass", ours),
            System("ours, mass", lambda x: ours(x, x.mass), scored=1),
            System("ours, mass, int8", ours_int8, scored=1, int8=True),
        ]

    last = min(LAST, case.columns)
    step, last_step = all_scored(case), all_scored(case, case.columns - last)

    def ours_with_mass(x: Inputs):
        return attention.triton_attention(attention.Inputs(x.query, x.key, x.value, step, args.scaling))

    def mass_pass(x: Inputs, step: Step):
        return None, attention_mass(x.query, x.key, x.lse, step.spans(x.key.device), args.scaling, False)

    return systems + [
        System("ours, mass", ours_with_mass, scored=case.columns),
        System("mass pass alone", lambda x: mass_pass(x, step), attends=False, scored=case.columns),
        System(f"mass pass, {last} queries", lambda x: mass_pass(x, last_step), attends=False, scored=last),
        System("Triton attention + lse", lambda x: (
            attention_with_lse(x.query, x.key, x.value, step.spans(x.key.device), args.scaling)[0], None)),
    ]  # fmt: skip


def some_heads(states: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """First and last row and KV head of [B, Hq or Hkv, …], float64 [rows, KV heads, G or 1, …]."""
    rows, heads = sorted({0, states.shape[0] - 1}), sorted({0, kv_heads - 1})
    return states.unflatten(1, (kv_heads, -1))[rows][:, heads].double()


def reference(args, x: Inputs, scored: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and mass [rows, KV heads, width] of the last `scored` queries in float64, for `some_heads`."""
    query, key, value = (some_heads(states, args.kv_heads) for states in (x.query, x.key, x.value))
    query, width = query[..., -scored:, :], key.shape[-2]
    block = max(1, 2**26 // (query[..., 0, 0].numel() * width))
    slot = torch.arange(width, device=key.device)
    outputs, mass = [], 0
    for i in range(0, scored, block):
        logits = query[..., i : i + block, :] @ key.transpose(-1, -2) * args.scaling
        own = slot[width - scored + i :][: logits.shape[-2], None]
        probs = logits.masked_fill_(slot > own, -torch.inf).softmax(-1)
        outputs.append(probs @ value)
        mass += probs.sum((2, 3))
    return torch.cat(outputs, dim=-2), mass


def as_stored(x: Inputs) -> Inputs:
    """The same inputs with key and value as slots of 8 bits hold them, in float32."""
    key, value, *scales = x.stored
    key, value = (dequantize(of, by, torch.float32) for of, by in zip((key, value), scales, strict=True))
    return x._replace(key=key, value=value)


def check(args, case: Case, systems: list[System], x: Inputs) -> dict[str, dict[str, float]]:
    """By system, the greatest relative error of an output (L2 norm of a query's) and of a slot's mass."""
    expected, errors = {}, {}
    for system in systems:
        scored = case.columns if system.attends else system.scored
        if (scored, system.int8) not in expected:
            expected[scored, system.int8] = reference(args, as_stored(x) if system.int8 else x, scored)
        true_output, true_mass = expected[scored, system.int8]
        if x.mass is not None:
            x.mass.zero_()
        output, mass = system.run(x)
        errors[system.name] = error = {}
        if output is not None:
            difference = (some_heads(output, args.kv_heads) - true_output).norm(dim=-1) / true_output.norm(dim=-1)
            error["output_error"] = difference.max().item()
        if mass is not None:
            difference = (some_heads(mass, args.kv_heads)[:, :, 0] - true_mass).abs() / true_mass
            error["mass_error"] = difference.max().item()
    return errors


def find_wrong(case: Case, errors: dict[str, dict[str, float]]) -> list[str]:
    """Outputs may have twice the error of the baseline, as in flash-attention's own tests; mass is float32."""
    baseline = next(iter(errors.values()))["output_error"]
    limits = {"output_error": max(2 * min(baseline, 0.01), 1e-5), "mass_error": 1e-3}
    return [
        f"{case.name}, {name}: {kind} {error:.2e}, must be at most {limits[kind]:.2e}"
        for name, result in errors.items()
        for kind, error in result.items()
        if not error <= limits[kind]  # NaN is wrong too
    ]


def bench_case(args, case: Case, rates: dict[str, float]) -> tuple[list[dict], list[str]]:
    """A row of results for each system, and a list of wrong results."""
    sets, systems = make_inputs(args, case), make_systems(args, case)
    errors = check(args, case, systems, sets[0])
    turns = {}
    for system in systems:

        def run(system=system, rounds=1):
            for _ in range(rounds):
                for x in sets:
                    system.run(x)

        run()
        rounds = math.ceil(TURN_US / min(device_us(run) for _ in range(3)))
        turn = functools.partial(run, rounds=rounds)
        turns[system.name] = (turn, capture(turn, f"{case.name}, {system.name}"), rounds * len(sets), [], [])
    for _ in range(args.repeats):
        for turn, replay, calls, events_us, graph_us in turns.values():
            events_us.append(device_us(turn) / calls)
            if replay is not None:
                graph_us.append(device_us(replay, ahead=True) / calls)
    rows = []
    for system in systems:
        _, replay, calls, events_us, graph_us = turns[system.name]
        moved, flops = count_work(args, case, system)
        events = statistics.median(events_us)
        us = statistics.median(graph_us) if replay is not None else events
        floor_us = max(moved / rates["copy_TBps"], flops / rates["matmul_TFLOPs"]) / 1e6
        row = {"case": case.name, "system": system.name, "us": us, "x_sdpa": us / (rows[0]["us"] if rows else us)}
        row |= {"events_us": events, "events_x_sdpa": events / (rows[0]["events_us"] if rows else events)}
        row |= {"TBps": moved / us / 1e6, "TFLOPs": flops / us / 1e6, "floor_us": floor_us, "x_floor": us / floor_us}
        rows.append(row | errors[system.name] | {"graph": replay is not None, "sets": len(sets), "calls": calls})
    return rows, find_wrong(case, errors)


def bench_slimming(args, batch: int, rates: dict[str, float]) -> tuple[dict, list[str]]:
    """update_slimmingH against update_slimming, per layer averaged over a model's layers, in an open step that is due.

    Masses and positions are restored before every turn, untimed: otherwise there would soon be nothing left to evict.
    """
    h2o = H2OConfig(window_length=args.window_length, update_interval=16 if args.device == "cuda" else 4)
    new = torch.randn(batch, args.kv_heads, h2o.window_length, args.head_dim, dtype=args.dtype, device=args.device)
    layers = max(1, min(MODEL_LAYERS if args.device == "cuda" else 2, int(SLIMMING_BYTES // (2 * new.nbytes))))
    cache, slimmer = HHCache(h2o), slimmer_of(resolve_backend(h2o.backend, args.device))
    for columns in [h2o.window_length] + [1] * h2o.update_interval:
        step = cache.begin(batch, columns)
        for layer in range(layers):
            cache.update(new[:, :, :columns], new[:, :, :columns], layer, slimmer=slimmer)
            cache.add_mass(torch.rand(batch, args.kv_heads, step.width, device=args.device), layer)
            if columns > 1:
                cache.slim(layer)
        if columns > 1 or not step.due:
            cache.end()
    first_layer = cache.layers[0].slots.tensors()
    start = {name: slots.clone() for name, slots in first_layer.items()}
    masses = [layer.slots.mass.clone() for layer in cache.layers]

    def restore() -> None:
        for layer, mass in zip(cache.layers, masses, strict=True):
            layer.slots.mass.copy_(mass)
            layer.slots.positions.copy_(start["positions"])  # no layer has evicted anything yet

    runs, left = {}, []
    for name in ("update_slimmingH", "update_slimming"):
        restore()
        for slots, old in start.items():
            first_layer[slots].copy_(old)
        slim = getattr(cache, name)
        runs[name] = lambda slim=slim: [slim(layer) for layer in range(layers)]
        runs[name]()
        by_age = first_layer["positions"][:, :, : h2o.window_length].argsort(dim=-1)  # slots may lie in any order
        left.append([gather(slots, by_age) for slots in first_layer.values()])
    wrong = [f"slimming {batch}: update_slimmingH and update_slimming leave different caches"] * (
        not all(map(torch.equal, *left))
    )
    # In torch, both wait for the device or allocate memory that a graph would have to hold.
    kernels = args.device == "cuda" and slimmer.by_kernel
    replay = capture(runs["update_slimmingH"], f"slimming {batch}") if kernels else None
    times = {name: [] for name in [*runs, "graph"]}
    for _ in range(args.repeats):
        for name, run in runs.items():
            restore()
            times[name].append(host_us(run) / layers)
        if replay is not None:
            restore()
            times["graph"].append(device_us(replay, ahead=True) / layers)
    host, mask_us = (statistics.median(times[name]) for name in runs)
    us = statistics.median(times["graph"]) if replay is not None else host
    slots = cache.layers[0].slots  # one key and value a step are read and written, all mass and positions read
    moved = 4 * new.nbytes * h2o.update_interval / h2o.window_length + slots.mass.nbytes + slots.positions.nbytes
    per_step = MODEL_LAYERS / h2o.update_interval / 1e3
    return {
        "batch": batch, "layers": layers, "graph": replay is not None, "us": us, "host_us": host, "mask_us": mask_us,
        "speedup": mask_us / host, "TBps": moved / us / 1e6, "x_floor": us / (moved / rates["copy_TBps"] / 1e6),
        "ms_per_step": us * per_step, "host_ms_per_step": host * per_step,
    }, wrong  # fmt: skip


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = OneLineParser(description=__doc__.split("\n")[0])
    parser.add_argument("--query_heads", type=count, help="number of query heads (default: %(default)s)")
    parser.add_argument("--kv_heads", type=count, help="number of KV heads (default: %(default)s)")
    parser.add_argument("--head_dim", type=count, help="head dimension (default: %(default)s)")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="dtype of queries, keys and values (default: %(default)s)",
    )
    parser.add_argument(
        "--prefill", type=sizes("length"), help="prompt lengths, comma-separated; '': none (default: %(default)s)"
    )
    parser.add_argument(
        "--decode",
        type=sizes("batch", "slots"),
        help="batch x slots of the cache, comma-separated; '': none (default: %(default)s)",
    )
    parser.add_argument(
        "--slimming", type=sizes("batch"), help="batch sizes to slim, comma-separated; '': none (default: %(default)s)"
    )
    parser.add_argument("--window_length", type=count, help="slots kept by slimming (default: %(default)s)")
    parser.add_argument(
        "--repeats", type=count, help="turns of each system; the median is reported (default: %(default)s)"
    )
    parser.set_defaults(**DEFAULTS[device])
    args = parser.parse_args(argv)
    if args.query_heads % args.kv_heads:
        parser.error(f"--query_heads {args.query_heads}: must be a multiple of --kv_heads {args.kv_heads}")
    if args.head_dim % 8 or args.head_dim > 256:
        parser.error(f"--head_dim {args.head_dim}: must be a multiple of 8, at most 256")
    if args.window_length < 2:
        parser.error(f"--window_length {args.window_length}: must be at least 2")
    args.device, args.dtype, args.scaling = device, getattr(torch, args.dtype), args.head_dim**-0.5
    args.l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else 0
    args.kernels, args.flash = True, None
    try:
        resolve_backend("triton", device)
    except ValueError as error:
        args.kernels = False
        cli.say(f"SDPA alone: {error}")
    if args.kernels and device == "cpu" and args.dtype == torch.bfloat16:
        parser.error("--dtype bfloat16: Triton's interpreter cannot multiply it; give float16, or run on a GPU")
    if device == "cuda" and args.dtype != torch.float32:
        try:
            args.flash = attention.find_flash_attn()
        except ValueError as error:
            cli.say(f"without flash-attn: {error}")
    return args


@torch.no_grad()
def run(args) -> int:
    torch.manual_seed(0)
    rates = measure_ceilings(args.dtype)
    cases = [Case(f"prefill {n}", 1, n, n) for (n,) in args.prefill]
    cases += [Case(f"decode {batch}x{slots}", batch, 1, slots) for batch, slots in args.decode]
    rows, slimming, wrong = [], [], []
    for case in cases:
        results, faults = bench_case(args, case, rates)
        rows, wrong = rows + results, wrong + faults
        torch.cuda.empty_cache()
    for (batch,) in args.slimming:
        result, faults = bench_slimming(args, batch, rates)
        slimming, wrong = slimming + [result], wrong + faults
        torch.cuda.empty_cache()
    name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    print(f"{name}: copy {rates['copy_TBps']:.3g} TB/s, matrix product {rates['matmul_TFLOPs']:.3g} TFLOP/s")
    times = {"case": "", "system": "", "us": ".1f", "x_sdpa": ".3f", "events_us": ".1f", "events_x_sdpa": ".3f"}
    rest = {"TBps": ".2f", "TFLOPs": ".0f", "x_floor": ".2f", "output_error": ".1e", "mass_error": ".1e", "sets": ""}
    print_table(rows, times | rest)
    if slimming:
        print(f"slimming a layer to {args.window_length} slots; host_us, mask_us (update_slimming): host clock")
        rest = {"speedup": ".2f", "TBps": ".2f", "x_floor": ".2f", "ms_per_step": ".3f", "host_ms_per_step": ".3f"}
        print_table(slimming, {"batch": "", "layers": "", "us": ".1f", "host_us": ".1f", "mask_us": ".1f"} | rest)
    shape = {key: getattr(args, key) for key in ("query_heads", "kv_heads", "head_dim", "window_length", "repeats")}
    report = {"device": name, "torch": torch.__version__, "dtype": str(args.dtype).removeprefix("torch."), **shape}
    print(to_json(report | rates | {"rows": rows, "slimming": slimming, "wrong": wrong}))
    for fault in wrong:
        print(f"wrong: {fault}", file=sys.stderr)
    return 1 if wrong else 0


def main(argv: list[str] | None = None) -> int:
    """The exit status, see utils/cli.py."""
    way_out = "give smaller --prefill, --decode, --slimming"
    return cli.run(lambda: run(parse_args(argv)), "the results so far are printed above", way_out)


if __name__ == "__main__":
    sys.exit(main())
