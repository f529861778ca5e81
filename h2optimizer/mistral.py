"""Mistral with a heavy-hitter KV cache. A family whose attention is Llama's needs no more than this file."""

from transformers import MistralForCausalLM
from transformers.models.mistral.modeling_mistral import (
    MistralAttention,
    MistralDecoderLayer,
    MistralMLP,
    MistralRMSNorm,
)

from h2optimizer.fused import FusedDecoderLayer, FusedMLP, FusedRMSNorm
from h2optimizer.llama import H2OConfig
from h2optimizer.modeling import H2OAttention, H2OForCausalLM


class H2OMistralAttention(H2OAttention, MistralAttention):
    """Mistral's attention over the slots of an `HHCache`."""


class H2OMistralMLP(FusedMLP, MistralMLP):
    """Mistral's MLP."""


class H2OMistralRMSNorm(FusedRMSNorm, MistralRMSNorm):
    """Mistral's RMSNorm."""


class H2OMistralDecoderLayer(FusedDecoderLayer, MistralDecoderLayer):
    """Mistral's decoder layer."""


class H2OMistralForCausalLM(H2OForCausalLM, MistralForCausalLM):
    """Mistral whose `generate` uses an `HHCache`."""

    layer, attention, mlp, norm = H2OMistralDecoderLayer, H2OMistralAttention, H2OMistralMLP, H2OMistralRMSNorm
    settings = H2OConfig
