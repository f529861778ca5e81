"""Llama with a heavy-hitter KV cache (H2O, arXiv 2306.14048), on top of transformers' modeling code.

Edit the flags of `H2OConfig` for an ablation; they are those of all families. `modeling.py` has the attention and the
model that this file, and the one of each other family, mixes into the classes of transformers.
"""

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm

from h2optimizer.backends import ATTENTION_BACKENDS
from h2optimizer.fused import FusedDecoderLayer, FusedMLP, FusedRMSNorm
from h2optimizer.modeling import H2OAttention, H2OForCausalLM
from h2optimizer.utils.budgets import HeadBudgets
from h2optimizer.utils.heads import HeadWindows, as_share, check_table
from h2optimizer.utils.policies import POLICIES, RECENT_ONLY, Policy
from h2optimizer.utils.schedule import Schedule


@dataclass(frozen=True)
class H2OConfig:
    """Settings of the heavy-hitter cache. Raises ValueError, with a remedy, for combinations that cannot work."""

    window_length: int = 256  # slots that a row keeps after slimming: heavy hitters + recent
    num_heavy_hitters: int | str = -1  # heavy hitters among them, or their share ("31/32"); -1 = half, 0 = none
    head_budgets: str | tuple = "even"  # a window for each head: a plan (scripts/calibrate.py), or [layers][KV heads]
    update_interval: int = 16  # slimming is due on every N-th forward; 1 = H2O
    slimming: str = "H"  # "H": gather into place (update_slimmingH); "mask": boolean mask and copy (update_slimming)
    backend: str = "auto"  # "eager" (reference), "sdpa", "triton", "flash_attn"; auto = triton on CUDA, else sdpa
    score: str = "mass"  # "mass" (H2O), "value_mass", "sink" (oldest), "streaming_llm" (4 oldest), "random"
    score_seed: int = 0  # seed of score="random"
    score_every_step: bool = True  # add mass on steps without slimming too; False = plain attention on those steps
    score_decay: float = 1.0  # factor on stored mass before each forward adds to it; 0.0 = last forward only
    score_norm: str = "sum"  # "sum" (H2O); "mean" = mass per counted query that could see the slot
    score_queries: int | None = None  # prefill mass from the last k queries only (SnapKV-like); None = all
    group_reduce: str = "sum"  # mass over the query heads of a KV head; "first" = only the first head of each group
    position_rolling: bool = False  # rotate keys by slot index when used, so positions stay below the capacity
    slots: str = "auto"  # storage of keys and values: "auto" = the model's dtype; "int8" = 8 bits, half of bf16's bytes
    prefill_chunk: int | None = None  # prompt tokens between slimmings: memory for window + chunk; None = all, exact
    capture: bool = True  # decode with CUDA graphs if device, backend and generate's options allow it

    def __post_init__(self):
        for name, allowed in {
            "slimming": ("H", "mask"),
            "backend": ("auto", *ATTENTION_BACKENDS),
            "score": tuple(POLICIES),
            "score_norm": ("sum", "mean"),
            "group_reduce": ("sum", "first"),
            "slots": ("auto", "int8"),
        }.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(allowed)}")
        for name in ("score_every_step", "position_rolling", "capture"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r}: must be True or False")
        at_least = {
            "window_length": 2,
            "num_heavy_hitters": -1,
            "update_interval": 1,
            "score_queries": 1,
            "score_seed": 0,
            "prefill_chunk": 1,
        }
        for name, least in at_least.items():
            number = getattr(self, name)
            if name in ("score_queries", "prefill_chunk") and number is None:
                continue
            if name == "num_heavy_hitters" and self._share is not None:
                continue
            if type(number) is not int or number < least:
                raise ValueError(f"{name}={number!r}: must be a whole number of at least {least}")
        if self.capacity >= 2**31:  # positions are int32
            name = "window_length" if self.window_length >= self.update_interval else "update_interval"
            raise ValueError(
                f"{name}={getattr(self, name)}: window_length + update_interval must be below 2**31; give a smaller "
                "value"
            )
        if self.score_seed >= 2**32:
            raise ValueError(f"score_seed={self.score_seed}: must be below 2**32")
        if self._share is None and self.num_heavy_hitters >= self.window_length:
            raise ValueError(
                f"num_heavy_hitters={self.num_heavy_hitters}: must be less than window_length={self.window_length}, "
                "because the newest slot is always kept"
            )
        if self.heavy >= self.window_length:
            raise ValueError(
                f"window_length={self.window_length}: has no room for the {self.heavy} sinks of "
                f"score {self.score} and the newest slot; give at least {self.heavy + 1}, or set "
                "num_heavy_hitters to the number of sinks to keep"
            )
        self._resolve_budgets()
        if type(self.score_decay) not in (int, float) or not 0.0 <= self.score_decay <= 1.0:
            raise ValueError(f"score_decay={self.score_decay!r}: must be a number between 0 and 1")
        if self.backend == "flash_attn" and self.needs_mass and self.score_every_step:
            raise ValueError(
                "backend='flash_attn' returns no attention scores, so it cannot run decode steps that need them: set "
                "score_every_step=False, so that only steps that slim need them, or backend='triton'"
            )

    def _resolve_budgets(self) -> None:
        """Turn a plan into its table for this window, and check the table."""
        budgets = self.head_budgets
        if isinstance(budgets, str) and budgets == "even":
            return
        if self.slimming == "mask":
            raise ValueError("slimming='mask' needs heads of one window: leave out head_budgets, or set slimming='H'")
        if isinstance(budgets, str):
            try:
                plan = HeadBudgets.load(budgets)
            except ValueError as error:
                raise ValueError(f"head_budgets {error}") from None
            budgets = plan.windows(self.window_length, self.recent)
        try:
            object.__setattr__(self, "head_budgets", check_table(budgets, self.window_length, self.recent))
        except ValueError as error:
            raise ValueError(f"head_budgets: {error}") from None

    @property
    def _share(self) -> Fraction | None:
        """`num_heavy_hitters` where it is a share of the window."""
        try:
            return as_share(self.num_heavy_hitters)
        except ValueError as error:
            raise ValueError(f"num_heavy_hitters={error}") from None

    @cached_property  # each forward asks
    def heavy(self) -> int:
        """Heavy hitters in the window, or the sinks or random slots that replace them; with head budgets, the mean."""
        share, policy = self._share, POLICIES[self.score]
        if share is not None:
            return min(int(share * self.window_length), self.window_length - 1)
        if self.num_heavy_hitters != -1:
            return self.num_heavy_hitters
        return self.window_length // 2 if policy.heavy is None else policy.heavy

    @cached_property
    def head_windows(self) -> HeadWindows:
        """How many slots each KV head keeps."""
        return HeadWindows.of(self.window_length if self.head_budgets == "even" else self.head_budgets, self.recent)

    @property
    def recent(self) -> int:
        """Newest slots in the window, at least 1."""
        return self.window_length - self.heavy

    @property
    def capacity(self) -> int:
        """Slots allocated per row and KV head."""
        return self.window_length + self.update_interval

    @property
    def schedule(self) -> Schedule:
        """When slimming is due."""
        return Schedule(self.window_length, self.update_interval, self.prefill_chunk, self.head_windows.counts)

    @property
    def policy(self) -> Policy:
        """The policy that ranks slots."""
        return POLICIES[self.score] if self.heavy else RECENT_ONLY

    @property
    def needs_mass(self) -> bool:
        """Whether slimming ranks slots by mass; if not, every step is plain attention."""
        return self.policy.by_mass


class H2OLlamaAttention(H2OAttention, LlamaAttention):
    """Llama's attention over the slots of an `HHCache`."""


class H2OLlamaMLP(FusedMLP, LlamaMLP):
    """Llama's MLP."""


class H2OLlamaRMSNorm(FusedRMSNorm, LlamaRMSNorm):
    """Llama's RMSNorm."""


class H2OLlamaDecoderLayer(FusedDecoderLayer, LlamaDecoderLayer):
    """Llama's decoder layer."""


class H2OLlamaForCausalLM(H2OForCausalLM, LlamaForCausalLM):
    """Llama whose `generate` uses an `HHCache`."""

    layer, attention, mlp, norm = H2OLlamaDecoderLayer, H2OLlamaAttention, H2OLlamaMLP, H2OLlamaRMSNorm
    settings = H2OConfig
