"""Counts the bytes that a decode step reads and a cache holds, and a step's FLOPs. utils/bench.py measures times.

`h2o` is an H2OConfig, or None for the full cache.
"""

import torch
from transformers import PreTrainedConfig, PreTrainedModel


def head_dim(config: PreTrainedConfig) -> int:
    """Numbers in a key or value of one head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def held_weights(model: PreTrainedModel, bits: int | None = None) -> int:
    """Bytes of all weights. With `bits`, weights of the layers' projections take that many bits each, without scales.

    Quantisers do not change embedding, head and norms.
    """
    return sum(
        p.nbytes if bits is None or not name.endswith("_proj.weight") else p.numel() * bits // 8
        for name, p in model.named_parameters()
    )


def unread_embedding(model: PreTrainedModel) -> torch.Tensor | None:
    """The embedding, of which a step reads one row per token; None if it is also the head, which is read whole."""
    embedding = model.get_input_embeddings().weight
    return None if embedding is model.get_output_embeddings().weight else embedding


def read_weights(model: PreTrainedModel, bits: int | None = None) -> int:
    """Bytes of the weights that every decode step reads; `bits` as in `held_weights`."""
    unread = unread_embedding(model)
    return held_weights(model, bits) - (0 if unread is None else unread.nbytes)


def weight_flops(model: PreTrainedModel) -> int:
    """FLOPs of the weight matrices per token in a decode step, without attention's, which are few per byte read."""
    unread = unread_embedding(model)
    return 2 * sum(p.numel() for p in model.parameters() if p.ndim == 2 and p is not unread)


def slot_bytes(config: PreTrainedConfig, itemsize: int, scored: float = 0.0, h2o=None) -> float:
    """Bytes that a decode step moves per slot of a row: K and V of all layers and, if scored, mass in and out.

    `scored` is the share of steps that add mass, float32. Slots of 8 bits also have scales, float32.
    """
    vector = head_dim(config) + 4 if h2o is not None and h2o.slots == "int8" else head_dim(config) * itemsize
    return config.num_hidden_layers * config.num_key_value_heads * (2 * vector + scored * 2 * 4)


def slots_read(prompt: int, steps: int, h2o=None) -> float:
    """Slots of a row that a decode step attends to, averaged over `steps` steps, for the full cache or H2O's."""
    if h2o is None:
        return prompt + (steps + 1) / 2
    return h2o.schedule.slots_read(prompt, steps)


def sliding_part(config: PreTrainedConfig) -> tuple[float, int]:
    """The share of layers whose attention slides, and the tokens that such a layer sees."""
    layers, kinds = config.num_hidden_layers, getattr(config, "layer_types", None)
    reach = getattr(config, "sliding_window", None)
    if reach is None:
        return 0.0, 0
    return 1.0 if kinds is None else kinds.count("sliding_attention") / layers, reach


def full_slots_read(config: PreTrainedConfig, prompt: int, steps: int) -> float:
    """As `slots_read` for the full cache of a model, some of whose layers may slide: the mean of all layers."""
    (share, reach), seen = sliding_part(config), slots_read(prompt, steps)
    if not share:
        return seen
    growing = min(max(reach - prompt, 0), steps)
    slid = growing * slots_read(prompt, growing) + (steps - growing) * reach
    return share * slid / steps + (1 - share) * seen


def row_read(config: PreTrainedConfig, itemsize: int, prompt: int, steps: int, h2o=None) -> float:
    """Bytes of a row's cache that an average decode step moves: keys, values and mass, without slimming."""
    scored = 0.0
    if h2o is not None and h2o.needs_mass:
        scored = 1.0 if h2o.score_every_step else 1 / h2o.update_interval
    read = full_slots_read(config, prompt, steps) if h2o is None else slots_read(prompt, steps, h2o)
    return read * slot_bytes(config, itemsize, scored, h2o)


def row_held(config: PreTrainedConfig, itemsize: int, tokens: int, h2o=None) -> int:
    """Bytes of memory per row: a full cache of `tokens` tokens, or H2O's slots for any number, plus a step's logits.

    H2O's slots also have mass (float32) and position (int32), count and norm (float32) if they rank by these, and one
    layer at a time the slots picked by slimming.
    """
    logits = 8 * config.vocab_size
    if h2o is None:
        share, reach = sliding_part(config)
        held = share * min(tokens, reach) + (1 - share) * tokens
        return int(held * slot_bytes(config, itemsize)) + logits
    heads, windows = config.num_key_value_heads, h2o.head_windows
    most = (
        heads * (h2o.window_length + 1)
        if windows.even
        else windows.table.sum(axis=1).max() + heads * h2o.update_interval
    )
    beside = 8 + 4 * (h2o.needs_mass and h2o.score_norm == "mean") + 4 * h2o.policy.by_value
    slots = h2o.capacity * (slot_bytes(config, itemsize, h2o=h2o) + config.num_hidden_layers * heads * beside)
    return int(slots) + logits + 4 * int(most)


def floor_ms(model: PreTrainedModel, batch: int, prompt: int, steps: int, bandwidth: float, h2o=None) -> float:
    """Milliseconds to read weights and slots in an average decode step at `bandwidth` TB/s, without slimming."""
    row = row_read(model.config, model.dtype.itemsize, prompt, steps, h2o)
    return (read_weights(model) + batch * row) / bandwidth / 1e9
