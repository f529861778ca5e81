"""SmolLM3 with a heavy-hitter KV cache. Every fourth layer has no rotation, also under position_rolling."""

from transformers import SmolLM3ForCausalLM
from transformers.models.smollm3.modeling_smollm3 import (
    SmolLM3Attention,
    SmolLM3DecoderLayer,
    SmolLM3MLP,
    SmolLM3RMSNorm,
)

from h2optimizer.fused import FusedDecoderLayer, FusedMLP, FusedRMSNorm
from h2optimizer.llama import H2OConfig
from h2optimizer.modeling import H2OAttention, H2OForCausalLM


class H2OSmolLM3Attention(H2OAttention, SmolLM3Attention):
    """SmolLM3's attention over the slots of an `HHCache`."""

    @property
    def rotates(self) -> bool:
        return bool(self.use_rope)


class H2OSmolLM3MLP(FusedMLP, SmolLM3MLP):
    """SmolLM3's MLP."""


class H2OSmolLM3RMSNorm(FusedRMSNorm, SmolLM3RMSNorm):
    """SmolLM3's RMSNorm."""


class H2OSmolLM3DecoderLayer(FusedDecoderLayer, SmolLM3DecoderLayer):
    """SmolLM3's decoder layer."""


class H2OSmolLM3ForCausalLM(H2OForCausalLM, SmolLM3ForCausalLM):
    """SmolLM3 whose `generate` uses an `HHCache`."""

    layer, attention, mlp, norm = H2OSmolLM3DecoderLayer, H2OSmolLM3Attention, H2OSmolLM3MLP, H2OSmolLM3RMSNorm
    settings = H2OConfig
