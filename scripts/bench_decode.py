"""Prefill and decode through `generate`: heavy-hitter cache, by backend, beside stock Llama's DynamicCache, in one run.

Regime: a Llama-3-8B shape with random bf16 weights, greedy, decode bound by the weights that every step reads and by
the host that launches its kernels. Kernel launches and host waits are those of one step, not due, under the profiler.
The last line is JSON; keys that end in _x are ratios to stock.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, LogitsProcessor, LogitsProcessorList

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from h2optimizer import H2OConfig, H2OLlamaForCausalLM
from h2optimizer.attention import resolve_backend
from utils.bench import count, sizes, synchronize
from utils.cache import HHCache
from utils.requests import InputError, OneLineParser

BACKENDS = ("sdpa", "flash_attn")  # beside auto

SHAPES = {
    "8b": dict(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
    ),
    "tiny": dict(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=131072,
    ),
}  # fmt: skip


def count_launches(model, cache, token: torch.Tensor) -> dict[str, int]:
    """Kernel launches and host waits of one decode step that is not due."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    for _ in range(3):
        model(token, past_key_values=cache)
    synchronize()
    with profile(activities=activities) as prof:
        model(token, past_key_values=cache)
    names = [event.name for event in prof.events()]
    return {
        "launches": sum("LaunchKernel" in name for name in names),
        "host_waits": sum(name in ("aten::_local_scalar_dense", "aten::nonzero") for name in names),
    }


class PhaseClock(LogitsProcessor):
    """Times the phases of a `generate`: prefill up to the first logits, and the mean of the decode steps after."""

    def __enter__(self):
        synchronize()
        self.begin, self.first, self.steps = time.perf_counter(), None, 0
        return self

    def __call__(self, input_ids, scores):
        if self.first is None:
            synchronize()
            self.first = time.perf_counter()
        else:
            self.steps += 1
        return scores

    def __exit__(self, *exception):
        synchronize()
        self.decode_ms = (time.perf_counter() - self.first) / max(self.steps, 1) * 1e3
        self.prefill_ms = (self.first - self.begin) * 1e3


@torch.no_grad()
def measure(systems: dict, prompt: torch.Tensor, new_tokens: int, repeats: int) -> dict[str, dict]:
    """Time of `generate` on a prompt [B, n] and memory of its prefill, by system; the systems take turns."""

    def generate(model, make_cache, tokens: int) -> PhaseClock:
        with PhaseClock() as clock:
            model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=False,
                past_key_values=make_cache(), logits_processor=LogitsProcessorList([clock]),
            )  # fmt: skip
        return clock

    phases = ("prefill_ms", "decode_ms") if new_tokens > 1 else ("prefill_ms",)
    results, clocks = {}, {name: [] for name in systems}
    for name, (model, make_cache) in systems.items():
        generate(model, make_cache, min(4, new_tokens))
        results[name] = dict.fromkeys(phases)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            generate(model, make_cache, 1)
            peak = torch.cuda.max_memory_allocated()
            results[name] |= {"peak_GiB": peak / 2**30, "extra_peak_GiB": (peak - before) / 2**30}
        if new_tokens == 1:
            continue
        cache = make_cache()
        if cache is None:
            cache = DynamicCache(config=model.config)
        model(prompt, past_key_values=cache, logits_to_keep=1)
        results[name] |= count_launches(model, cache, prompt[:, :1])
    for _ in range(repeats):
        for name, (model, make_cache) in systems.items():
            clocks[name].append(generate(model, make_cache, new_tokens))
    for name, result in results.items():
        for phase in phases:
            result[phase] = statistics.median(getattr(clock, phase) for clock in clocks[name])
    return results


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--shape", choices=SHAPES, default="8b", help="model shape")
    parser.add_argument("--window_length", type=count, default=1024, help="slots kept after slimming")
    parser.add_argument("--update_interval", type=count, default=16, help="steps between slimmings")
    parser.add_argument(
        "--prompts", type=sizes("length", "batch"), default="2048x1,2048x16,8192x1,32768x1",
        help="prompt length x batch, comma-separated; '' = none",
    )  # fmt: skip
    parser.add_argument("--alone", type=count, help="prefill one prompt of this length with H2O only as well")
    parser.add_argument(
        "--backends", nargs="*", choices=BACKENDS, default=BACKENDS, help="H2O systems to run beside auto"
    )
    parser.add_argument("--new_tokens", type=count, default=65, help="tokens to generate, the first by prefill")
    parser.add_argument("--prefill_only", action="store_true", help="no decode; with score_queries=64 as well")
    parser.add_argument("--repeats", type=count, default=5, help="runs, of which the median counts")
    args = parser.parse_args(argv)
    try:
        H2OConfig(window_length=args.window_length, update_interval=args.update_interval)
    except ValueError as error:
        parser.error(str(error))
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    return args


def make_systems(args, model, stock) -> dict[str, tuple]:
    """Model and a maker of its cache (None = generate's own) by system; "auto" is the Triton kernels on CUDA."""

    def h2o(**flags):
        settings = H2OConfig(window_length=args.window_length, update_interval=args.update_interval, **flags)
        return model, lambda: HHCache(settings)

    systems = {"stock DynamicCache": (stock, lambda: None), "H2O": h2o()}
    if args.prefill_only:
        systems["H2O score_queries=64"] = h2o(score_queries=64)
    else:
        systems["H2O score_every_step=False"] = h2o(score_every_step=False)
    for backend in args.backends:
        try:
            resolve_backend(backend, args.device)
        except ValueError as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        if backend == "flash_attn":  # it has no scores in a decode step
            systems["H2O backend=flash_attn score_every_step=False"] = h2o(backend=backend, score_every_step=False)
        else:
            systems[f"H2O backend={backend}"] = h2o(backend=backend)
    return systems


@torch.no_grad()
def run(args) -> None:
    device = args.device
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        torch.set_default_dtype(dtype)
        config = LlamaConfig(**SHAPES[args.shape], bos_token_id=None, eos_token_id=None)
        model = H2OLlamaForCausalLM(config).eval()
        torch.set_default_dtype(torch.float32)
    stock = LlamaForCausalLM(config) if args.shape == "tiny" else None
    if stock is None:  # one set of weights serves both: stock attention modules over the same projections
        with torch.device("meta"):
            stock = LlamaForCausalLM(config)
    stock.load_state_dict(model.state_dict(), assign=True)
    stock.model.rotary_emb = model.model.rotary_emb
    stock.eval()

    systems = make_systems(args, model, stock)
    weights = sum(p.nbytes for name, p in model.named_parameters() if "embed_tokens" not in name)
    report = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "weights_GB": round(weights / 1e9, 2),
    }
    tokens = 1 if args.prefill_only else args.new_tokens
    runs = [(length, batch, systems, tokens) for length, batch in args.prompts]
    if args.alone:
        runs.append((args.alone, 1, {"H2O": systems["H2O"]}, 1))
    rows = []
    for length, batch, chosen, tokens in runs:
        prompt = torch.randint(1, config.vocab_size, (batch, length), device=device)
        results = measure(chosen, prompt, tokens, args.repeats)
        baseline = results.get("stock DynamicCache", {})
        for name, result in results.items():
            ratios = {f"{key}_x": result[key] / baseline[key] for key in result if baseline.get(key)}
            row = {key: round(value, 3) for key, value in (result | ratios).items()}
            rows.append({"prompt": f"{length}x{batch}", "system": name} | row)
            print("  ".join(f"{key}={value}" for key, value in rows[-1].items()))
    print(json.dumps(report | {"rows": rows}))


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, or 2 after one line about what the caller can put right."""
    try:
        run(parse_args(argv))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError:
        print("error: too little memory on the device: give shorter --prompts or --alone", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
