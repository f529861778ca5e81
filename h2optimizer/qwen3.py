"""Qwen3 with a heavy-hitter KV cache. Queries and keys are normalised before they are rotated."""

import torch
from transformers import Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3DecoderLayer, Qwen3MLP, Qwen3RMSNorm

from h2optimizer.fused import FusedDecoderLayer, FusedMLP, FusedRMSNorm, normalise_heads
from h2optimizer.llama import H2OConfig
from h2optimizer.modeling import H2OAttention, H2OForCausalLM


class H2OQwen3RMSNorm(FusedRMSNorm, Qwen3RMSNorm):
    """Qwen3's RMSNorm, of hidden states and of heads."""


class H2OQwen3Attention(H2OAttention, Qwen3Attention):
    """Qwen3's attention over the slots of an `HHCache`."""

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.q_norm, self.k_norm = (H2OQwen3RMSNorm(self.head_dim, eps=config.rms_norm_eps) for _ in range(2))

    def project(self, hidden_states: torch.Tensor) -> list[torch.Tensor]:
        # H2O: what is cached and rotated later is normalised, wherever its slot
        return normalise_heads(super().project(hidden_states), self.q_norm, self.k_norm, self.merged.widths)


class H2OQwen3MLP(FusedMLP, Qwen3MLP):
    """Qwen3's MLP."""


class H2OQwen3DecoderLayer(FusedDecoderLayer, Qwen3DecoderLayer):
    """Qwen3's decoder layer."""


class H2OQwen3ForCausalLM(H2OForCausalLM, Qwen3ForCausalLM):
    """Qwen3 whose `generate` uses an `HHCache`."""

    layer, attention, mlp, norm = H2OQwen3DecoderLayer, H2OQwen3Attention, H2OQwen3MLP, H2OQwen3RMSNorm
    settings = H2OConfig
