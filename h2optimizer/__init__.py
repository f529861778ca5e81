"""H2Optimizer: Llama with a heavy-hitter KV cache."""

from h2optimizer.llama import H2OConfig, H2OLlamaAttention, H2OLlamaForCausalLM

__all__ = ["H2OConfig", "H2OLlamaAttention", "H2OLlamaForCausalLM"]
