"""Prefill and decode through `generate`, heavy-hitter cache beside stock Llama's DynamicCache, in one run.

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
from utils.cache import HHCache

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


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(call) -> float:
    """Milliseconds of one call, the device drained before and after."""
    synchronize()
    begin = time.perf_counter()
    call()
    synchronize()
    return (time.perf_counter() - begin) * 1e3


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
    """Time and memory of `generate` on a prompt [B, n], by system; the runs of the systems take turns."""

    def generate(model, make_cache, tokens: int) -> PhaseClock:
        with PhaseClock() as clock:
            model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=False,
                past_key_values=make_cache(), logits_processor=LogitsProcessorList([clock]),
            )  # fmt: skip
        return clock

    results, clocks = {}, {name: [] for name in systems}
    for name, (model, make_cache) in systems.items():
        generate(model, make_cache, 4)
        results[name] = {"prefill_ms": None, "decode_ms": None}
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            generate(model, make_cache, 1)
            results[name]["extra_peak_GiB"] = (torch.cuda.max_memory_allocated() - before) / 2**30
        cache = make_cache()
        if cache is None:
            cache = DynamicCache(config=model.config)
        model(prompt, past_key_values=cache, logits_to_keep=1)
        results[name] |= count_launches(model, cache, prompt[:, :1])
    for _ in range(repeats):
        for name, (model, make_cache) in systems.items():
            clocks[name].append(generate(model, make_cache, new_tokens))
    for name, result in results.items():
        for phase in ("prefill_ms", "decode_ms"):
            result[phase] = statistics.median(getattr(clock, phase) for clock in clocks[name])
    return results


def bench_slimming(device: str, rows: int = 16, heads: int = 8, window: int = 1024, interval: int = 16) -> dict:
    """update_slimmingH against update_slimming on one layer of `window + interval` slots, D = 128, microseconds."""
    cache = HHCache(H2OConfig(window_length=window, update_interval=interval))
    new = torch.randn(rows, heads, window, 128, device=device, dtype=torch.bfloat16)
    for columns in [window] + [1] * interval:
        cache.begin(rows, columns)
        cache.update(new[:, :, :columns], new[:, :, :columns], 0)
        cache.add_mass(torch.rand(rows, heads, cache.step.width, device=device), 0)
        if columns > 1:
            cache.slim(0)
            cache.end()
        elif cache.step.due:
            break
        else:
            cache.end()
    result = {}
    for name in ("update_slimmingH", "update_slimming"):
        slim = getattr(cache, name)

        def many(slim=slim):
            for _ in range(50):
                slim(0)

        many()
        result[name + "_us"] = round(statistics.median(timed(many) for _ in range(5)) / 50 * 1e3, 1)
    result["speedup"] = round(result["update_slimming_us"] / result["update_slimmingH_us"], 2)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="8b", help="model shape")
    parser.add_argument("--window_length", type=int, default=1024, help="slots kept after slimming")
    parser.add_argument("--update_interval", type=int, default=16, help="steps between slimmings")
    parser.add_argument("--prompts", default="2048x1,2048x16,32768x1", help="prompt length x batch, comma-separated")
    parser.add_argument("--new_tokens", type=int, default=65, help="tokens to generate, the first by prefill")
    parser.add_argument("--repeats", type=int, default=5, help="runs, of which the median counts")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
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

    window = dict(window_length=args.window_length, update_interval=args.update_interval)
    systems = {
        "stock DynamicCache": (stock, lambda: None),
        "H2O": (model, lambda: HHCache(H2OConfig(**window))),
        "H2O score_every_step=False": (model, lambda: HHCache(H2OConfig(**window, score_every_step=False))),
    }
    weights = sum(p.nbytes for name, p in model.named_parameters() if "embed_tokens" not in name)
    report = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "weights_GB": round(weights / 1e9, 2),
    }
    rows = []
    for spec in args.prompts.split(","):
        length, batch = map(int, spec.split("x"))
        prompt = torch.randint(1, config.vocab_size, (batch, length), device=device)
        results = measure(systems, prompt, args.new_tokens, args.repeats)
        baseline = next(iter(results.values()))
        for name, result in results.items():
            ratios = {f"{key}_x": result[key] / baseline[key] for key in result if baseline[key]}
            row = {key: round(value, 3) for key, value in (result | ratios).items()}
            rows.append({"prompt": spec, "system": name} | row)
    for row in rows:
        print("  ".join(f"{key}={value}" for key, value in row.items()))
    report |= {"rows": rows, "slimming": bench_slimming(device)}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
