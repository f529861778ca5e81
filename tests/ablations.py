"""A made-up ablation in the form of scripts/ablate.py's file: what its readers are tested with."""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np

from h2optimizer import H2OConfig
from h2optimizer.utils.ablation import pack

SETUP = {
    "model": "data/demo_model", "requests": "data/requests.jsonl", "dtype": "float32", "batch_size": 8, "device": "cpu",
}  # fmt: skip
POLICIES = {  # H2OConfig's fields, and how much of what it evicts is missed
    "H2O": ({}, 0.25),
    "recent only": ({"num_heavy_hitters": 0}, 1.0),
    "sink + recent": ({"score": "sink"}, 0.9),
    "random + recent": ({"score": "random"}, 0.8),
    "decay": ({"score_decay": 0.0}, 0.5),
    "mean": ({"score_norm": "mean"}, 0.2),
    "queries": ({"score_queries": 32}, 0.15),
    "StreamingLLM (4 sinks)": ({"score": "streaming_llm"}, 0.95),
    "rolling": ({"score_queries": 32, "position_rolling": True}, 0.3),
}


def last_held(rng, config: H2OConfig, layers: int, heads: int, prompt: int, steps: int) -> np.ndarray:
    """What slimming with random heavy hitters, old ones likelier, leaves [layers, heads, tokens]."""
    last = np.zeros((layers, heads, prompt + steps), np.int16)
    for of_head in last.reshape(-1, prompt + steps):
        worth = rng.random(prompt + steps) + np.linspace(0.3, 0, prompt + steps)
        held = np.arange(prompt)
        for step in range(steps + 1):
            if step:
                held = np.append(held, prompt + step - 1)
                of_head[held] = step
            if step % config.update_interval == 0 and len(held) > config.window_length:
                older = held[: -config.recent]
                best = np.sort(older[np.argsort(-worth[older])[: config.heavy]])
                held = np.append(best, held[-config.recent :])
    return last


def made_cells(
    policies=("H2O", "recent only", "sink + recent"),
    windows=(64, 128, 256),
    intervals=(1, 16),
    requests=20,
    layers=5,
    heads=4,
    prompt=400,
    steps=40,
    setup=SETUP,
) -> list[dict]:
    """The full cache's cell, then bounded ones; `steps` = 0 stands for texts of one token."""  # fmt: skip
    rng = np.random.default_rng(0)
    best, hard, tokens = rng.uniform(0.15, 0.35, requests), rng.uniform(0.5, 1.5, requests), np.full(requests, steps)

    def cell(config: H2OConfig | None, missed: float) -> dict:
        window = config.window_length if config else 0
        lost = (
            missed * max(0, 1 - window / prompt) ** 1.5 * (1 + 0.1 * np.log2(config.update_interval)) if config else 0.0
        )
        of_request = lost * hard
        h2o = config and dataclasses.asdict(config)
        rouge = np.clip(best * (1 - of_request) + (rng.normal(0, 0.01, requests) if config else 0), 0, 1)
        kl = of_request**2 * rng.uniform(0.5, 1.5, requests)
        per_token = (0.008 + 1e-5 * window + 0.006 / config.update_interval) if config else 0.0145
        key = hashlib.sha256(json.dumps([setup, h2o], sort_keys=True).encode()).hexdigest()[:16]
        made = {
            "cell": key,
            "setup": setup,
            "h2o": h2o,
            "rouge": {name: (k * rouge).tolist() for name, k in (("rouge1", 2), ("rouge2", 1), ("rougeL", 1.5))},
            "fidelity": {
                "tokens": tokens.tolist(),
                "agreed": np.round(tokens * np.clip(1 - 0.4 * of_request, 0, 1)).astype(int).tolist(),
                "kl": (tokens * kl).tolist(),
                "nll": (tokens * (0.2 + kl)).tolist(),
                "mass_lost": (tokens * np.clip(0.3 * of_request, 0, 1)).tolist(),
            },
            "time": {
                "calls": 3,
                "time_to_first_token": 0.4,
                "time_to_first_token_range": [0.39, 0.45],
                "time_per_token": per_token,
                "time_per_token_range": [0.9 * per_token, 1.25 * per_token],
                "tokens_per_second": 8 / per_token,
                "batch": 8,
                "prompt_tokens": prompt,
            },
            "kv_bytes": 2**13 * (window or prompt + steps),
            "slots_kept": float(window or prompt + steps),
            "peak_memory_bytes": None,
        }
        if config is None:
            return made | {"texts": [[1] * (steps + 1)] * requests}
        held = last_held(rng, config, layers, heads, prompt, steps)
        grows = np.linspace(0.2, 0.35, steps)[:, None] * lost
        shares = np.clip(grows * rng.uniform(0.4, 1.6, layers) + rng.normal(0, 0.01, (steps, layers)), 0, 1)
        retention = {"index": 3, "prompt_tokens": prompt, "last_held": pack(held), "mass_lost": shares.tolist()}
        return made | {"retention": retention}

    configs = [
        (H2OConfig(window_length=window, update_interval=n, **POLICIES[policy][0]), POLICIES[policy][1])
        for policy in policies for window in windows for n in intervals
    ]  # fmt: skip
    return [cell(None, 0.0), *(cell(*config) for config in configs)]


def write_cells(path: Path, cells: list[dict]) -> Path:
    path.write_text("".join(json.dumps(cell) + "\n" for cell in cells))
    return path
