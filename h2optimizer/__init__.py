"""H2Optimizer: Llama and families like it with a heavy-hitter KV cache."""

from h2optimizer.families import H2OModelForCausalLM
from h2optimizer.llama import H2OConfig, H2OLlamaAttention, H2OLlamaForCausalLM
from h2optimizer.mistral import H2OMistralForCausalLM
from h2optimizer.qwen2 import H2OQwen2ForCausalLM
from h2optimizer.qwen3 import H2OQwen3ForCausalLM
from h2optimizer.smollm3 import H2OSmolLM3ForCausalLM

__all__ = [
    "H2OConfig",
    "H2OLlamaAttention",
    "H2OLlamaForCausalLM",
    "H2OMistralForCausalLM",
    "H2OModelForCausalLM",
    "H2OQwen2ForCausalLM",
    "H2OQwen3ForCausalLM",
    "H2OSmolLM3ForCausalLM",
]
