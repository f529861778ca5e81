"""Qwen2 and Qwen2.5 with a heavy-hitter KV cache. Query, key and value have biases, which merged products include."""

from transformers import Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2DecoderLayer, Qwen2MLP, Qwen2RMSNorm

from h2optimizer.fused import FusedDecoderLayer, FusedMLP, FusedRMSNorm
from h2optimizer.llama import H2OConfig
from h2optimizer.modeling import H2OAttention, H2OForCausalLM


class H2OQwen2Attention(H2OAttention, Qwen2Attention):
    """Qwen2's attention over the slots of an `HHCache`."""


class H2OQwen2MLP(FusedMLP, Qwen2MLP):
    """Qwen2's MLP."""


class H2OQwen2RMSNorm(FusedRMSNorm, Qwen2RMSNorm):
    """Qwen2's RMSNorm."""


class H2OQwen2DecoderLayer(FusedDecoderLayer, Qwen2DecoderLayer):
    """Qwen2's decoder layer."""


class H2OQwen2ForCausalLM(H2OForCausalLM, Qwen2ForCausalLM):
    """Qwen2 whose `generate` uses an `HHCache`."""

    layer, attention, mlp, norm = H2OQwen2DecoderLayer, H2OQwen2Attention, H2OQwen2MLP, H2OQwen2RMSNorm
    settings = H2OConfig
