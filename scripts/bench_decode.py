"""Prefill and decode through `generate`, heavy-hitter cache beside stock Llama's DynamicCache, in one run.

Regime: a Llama-3-8B shape with random bf16 weights, greedy, decode bound by the weights that every step reads and by
the host that launches its kernels. The byte floor is what a step must read: all weights but the embedding table, and
the filled slots. Decode time is the difference of two generate calls, so prefill and set-up drop out of it. Kernel
launches and host waits are those of one step under the profiler. The last line is JSON.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

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


@torch.no_grad()
def measure(model, make_cache, prompt: torch.Tensor, new_tokens: int, repeats: int) -> dict:
    """Time and memory of `generate` on a prompt [B, n]."""

    def generate(tokens: int):
        model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=False,
            past_key_values=make_cache(),
        )  # fmt: skip

    generate(4)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    prefill = statistics.median(timed(lambda: generate(1)) for _ in range(repeats))
    result = {"prefill_ms": round(prefill, 1)}
    if torch.cuda.is_available():
        result["extra_peak_GiB"] = round((torch.cuda.max_memory_allocated() - before) / 2**30, 2)
    if new_tokens > 1:
        total = statistics.median(timed(lambda: generate(new_tokens)) for _ in range(repeats))
        result["decode_ms"] = round((total - prefill) / (new_tokens - 1), 2)
        cache = make_cache()
        model(prompt, past_key_values=cache, logits_to_keep=1)
        result |= count_launches(model, cache, prompt[:, :1])
    return result


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
    parser.add_argument("--repeats", type=int, default=3, help="runs, of which the median counts")
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
        baseline = None
        for name, (system, make_cache) in systems.items():
            if device == "cuda":
                torch.cuda.empty_cache()
            result = measure(system, make_cache, prompt, args.new_tokens, args.repeats)
            baseline = baseline or result
            ratios = {f"{key}_x": round(result[key] / baseline[key], 3) for key in result if baseline[key]}
            rows.append({"prompt": spec, "system": name} | result | ratios)
    for row in rows:
        print("  ".join(f"{key}={value}" for key, value in row.items()))
    report |= {"rows": rows, "slimming": bench_slimming(device)}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
