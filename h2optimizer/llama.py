"""Llama with a heavy-hitter KV cache (H2O, arXiv 2306.14048), on top of transformers' modeling code.

Edit the flags of `H2OConfig` for an ablation. Each departure from stock Llama is marked `# H2O:`.
"""

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm, apply_rotary_pos_emb
from transformers.utils import can_return_tuple

from h2optimizer import generation, weights
from h2optimizer.attention import ATTENTION_BACKENDS, has_kernels, kernel_decode_step, resolve_backend, rotate
from h2optimizer.columns import Columns
from h2optimizer.slimming import slimmer_of
from utils.cache import CACHE_ARGUMENT, KERNEL_DTYPES, HHCache
from utils.policies import POLICIES, RECENT_ONLY, Policy
from utils.schedule import Schedule

SILU = type(ACT2FN["silu"])  # torch's class, or transformers' own


@dataclass(frozen=True)
class H2OConfig:
    """Settings of the heavy-hitter cache. Raises ValueError, with the way out, for combinations that cannot work."""

    window_length: int = 256  # slots that a row keeps after slimming: heavy hitters + recent
    num_heavy_hitters: int = -1  # how many of them are heavy hitters; -1 = half (streaming_llm: 4), 0 = local attention
    update_interval: int = 16  # slimming is due on every N-th forward; 1 = H2O
    slimming: str = "H"  # "H": gather into place (update_slimmingH); "mask": boolean mask and copy (update_slimming)
    backend: str = "auto"  # "eager" (reference), "sdpa", "triton", "flash_attn"; auto = triton on CUDA, else sdpa
    score: str = "mass"  # "mass" (H2O), "sink" (oldest slots), "streaming_llm" (4 oldest), "random" (by score_seed)
    score_seed: int = 0  # of score="random"
    score_every_step: bool = True  # add mass on skipped steps as well; False = pure attention there
    score_decay: float = 1.0  # mass is multiplied by this before each forward's addition; 0.0 = last forward only
    score_norm: str = "sum"  # "sum" (H2O); "mean" = mass per query that could see the slot and was counted
    score_queries: int | None = None  # prefill mass from the last k queries only (SnapKV-like); None = all
    group_reduce: str = "sum"  # mass over the query heads of a KV head; "first" = first of each group only
    position_rolling: bool = False  # rotate keys by slot index when used, so positions stay below the capacity
    prefill_chunk: int | None = None  # prompt tokens between slimmings: memory for window + chunk; None = all, exact
    capture: bool = True  # decode from CUDA graphs where device, backend and what generate is asked for allow it
    compile: bool = False  # and those through torch.compile: about 45 s for each batch size, then faster steps

    def __post_init__(self):
        for name, allowed in {
            "slimming": ("H", "mask"),
            "backend": ("auto", *ATTENTION_BACKENDS),
            "score": tuple(POLICIES),
            "score_norm": ("sum", "mean"),
            "group_reduce": ("sum", "first"),
        }.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(allowed)}")
        for name in ("score_every_step", "position_rolling", "capture", "compile"):
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
            if type(number) is not int or number < least:
                raise ValueError(f"{name}={number!r}: must be a whole number of at least {least}")
        if self.capacity >= 2**31:  # positions are int32
            name = "window_length" if self.window_length >= self.update_interval else "update_interval"
            raise ValueError(
                f"{name}={getattr(self, name)}: window_length and update_interval must be below 2**31 together; give a "
                "smaller one"
            )
        if self.score_seed >= 2**32:
            raise ValueError(f"score_seed={self.score_seed}: must be below 2**32")
        if self.num_heavy_hitters >= self.window_length:
            raise ValueError(
                f"num_heavy_hitters={self.num_heavy_hitters}: must be less than window_length={self.window_length}, "
                "the newest slot is always kept"
            )
        if self.heavy >= self.window_length:
            raise ValueError(
                f"window_length={self.window_length}: has no room for the {self.heavy} sinks of "
                f"score {self.score} and the newest slot; give at least {self.heavy + 1}, or set "
                "num_heavy_hitters to how many sinks to keep"
            )
        if type(self.score_decay) not in (int, float) or not 0.0 <= self.score_decay <= 1.0:
            raise ValueError(f"score_decay={self.score_decay!r}: must be a number between 0 and 1")
        if self.backend == "flash_attn" and self.needs_mass and self.score_every_step:
            raise ValueError(
                "backend='flash_attn' gives no scores, so decode steps that need them do without it: set "
                "score_every_step=False, which leaves them to the steps that slim, or backend='triton'"
            )

        if self.compile and (not self.capture or self.backend not in ("auto", "triton") or self.slimming != "H"):
            raise ValueError(
                "compile=True compiles captured steps of kernels: it needs capture=True, slimming='H' and "
                "backend='auto' or backend='triton'"
            )

    @property
    def heavy(self) -> int:
        """Heavy hitters in the window, or what takes their place: sinks, random slots."""
        if self.num_heavy_hitters != -1:
            return self.num_heavy_hitters
        heavy = POLICIES[self.score].heavy
        return self.window_length // 2 if heavy is None else heavy

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
        return Schedule(self.window_length, self.update_interval, self.prefill_chunk)

    @property
    def policy(self) -> Policy:
        """What ranks slots."""
        return POLICIES[self.score] if self.heavy else RECENT_ONLY

    @property
    def needs_mass(self) -> bool:
        """Whether slimming ranks slots by mass; if not, every step is pure attention."""
        return self.policy.by_mass


class MergedLinear:
    """Linear layers of one input as one product in decode steps, which read small weights too slowly one by one.

    `merge` puts the weights side by side in memory; the layers' parameters become views of it, so that checkpoints,
    training and in-place changes see no difference. Layers that cannot be merged, or that have been replaced, moved,
    hooked or wrapped since, compute alone.
    """

    def __init__(self):
        self.weight: torch.Tensor | None = None

    def product(self, inputs: torch.Tensor, *layers: torch.nn.Module) -> torch.Tensor | None:
        """The layers' outputs for [B, 1, n] side by side, [B, 1, outputs]; None where each computes alone."""
        if self.weight is None or inputs.shape[1] != 1:
            return None
        if not (torch.compiler.is_compiling() or self.is_current(*layers)):
            return None
        if torch.is_grad_enabled() and (inputs.requires_grad or any(layer.weight.requires_grad for layer in layers)):
            return None  # gradients are the layers' own, and the kernels that follow have none
        return F.linear(inputs, self.weight)

    def is_current(self, *layers: torch.nn.Module) -> bool:
        """Whether the merged weight still is all that the layers are."""
        at = self.weight.data_ptr()
        for layer in layers:
            if not _is_plain(layer) or layer.weight.data_ptr() != at or layer.weight.dtype != self.weight.dtype:
                return False
            at += layer.weight.nbytes
        return True

    @torch.no_grad()
    @torch.inference_mode(False)  # weights outlive the mode they are moved in
    def merge(self, *layers: torch.nn.Module) -> None:
        if self.weight is not None and self.is_current(*layers):
            return
        self.weight = None
        if all(map(_is_plain, layers)):
            weights = [layer.weight.data for layer in layers]
            if len({(weight.dtype, weight.device) for weight in weights}) == 1:
                self.weight = torch.cat(weights)
                for layer, rows in zip(layers, self.weight.split([len(weight) for weight in weights]), strict=True):
                    layer.weight.data = rows


def _is_plain(layer: torch.nn.Module) -> bool:
    """Whether a linear layer is its weight and nothing else: no bias, hooks, adapter, sharding or quantisation."""
    if type(layer) is not torch.nn.Linear or layer.bias is not None or "forward" in vars(layer):
        return False
    if layer.weight.dtype not in KERNEL_DTYPES:
        return False
    hooked = layer._forward_hooks or layer._forward_pre_hooks
    return not hooked and type(layer.weight) is torch.nn.Parameter and type(layer.weight.data) is torch.Tensor


class H2OLlamaRMSNorm(LlamaRMSNorm):
    """RMSNorm in one kernel for decode steps, where stock Llama's six cost more than what they compute."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if hidden_states.shape[1] != 1 or hidden_states.dtype != self.weight.dtype:
            return super().forward(hidden_states)
        return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


class H2OLlamaMLP(LlamaMLP):
    """Llama's MLP with gate and up in one product in decode steps."""

    def __init__(self, config):
        super().__init__(config)
        self.merged = MergedLinear()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        by_silu = isinstance(self.act_fn, SILU)
        gate_up = self.merged.product(x, self.gate_proj, self.up_proj) if by_silu else None
        if gate_up is None:
            return super().forward(x)
        from h2optimizer.kernels import mlp

        compiling = torch.compiler.is_compiling()
        activate = mlp.silu_and_multiply if compiling else mlp.run_silu_and_multiply
        return self.down_proj(activate(gate_up))


class H2OLlamaAttention(LlamaAttention):
    """Llama attention over the slots of an `HHCache`; with any other cache, or none, it is stock Llama's."""

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.merged = MergedLinear()

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values=None,
        cache=None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        cache = past_key_values if cache is None else cache  # H2O: by either name that transformers has for it
        if not isinstance(cache, HHCache):
            return super().forward(hidden_states, position_embeddings, attention_mask, cache, **kwargs)
        step = cache.step
        if step is None:
            raise RuntimeError("an HHCache is slimmed only by H2OLlamaForCausalLM: call that model, not its .model")

        projections = self.q_proj, self.k_proj, self.v_proj
        merged = self.merged.product(hidden_states, *projections) if step.decode else None
        projected = [projection(hidden_states) for projection in projections] if merged is None else [merged]
        slots = cache.layers[self.layer_idx] if step.decode else None
        by_kernel = slots is not None and slots.decodes_by_kernel(step) and projected[0].dtype == slots.keys.dtype
        if by_kernel and not any(p.requires_grad for p in projected):
            # H2O: one product, then rotation, append, attention and mass in two or three launches
            attn_output = kernel_decode_step(projected, position_embeddings, slots, step, self.scaling)
        else:
            if merged is not None:
                projected = merged.split([projection.out_features for projection in projections], dim=-1)
            attn_output = self._attend(projected, position_embeddings, cache)
        if not step.static and step.due:
            cache.slim(self.layer_idx)
        return self.o_proj(attn_output), None

    def _attend(self, projected, position_embeddings: tuple[torch.Tensor, torch.Tensor], cache: HHCache):
        """Attention of query, key and value [B, columns, heads * D] through a backend: [B, columns, Hq * D]."""
        step, h2o = cache.step, cache.h2o
        shape = (*projected[0].shape[:-1], -1, self.head_dim)
        query_states, key_states, value_states = (states.view(shape).transpose(1, 2) for states in projected)

        cos, sin = position_embeddings
        if not h2o.position_rolling:
            query_states, key_states = apply_rotary_pos_emb(query_states, key_states, cos, sin)
        backend = resolve_backend(h2o.backend, query_states.device.type)
        keys, values = cache.update(key_states, value_states, self.layer_idx, slimmer=slimmer_of(backend))
        keys, values = keys.to(query_states.dtype), values.to(query_states.dtype)
        slots, key_rope = cache.layers[self.layer_idx], None
        if h2o.position_rolling:  # H2O: keys are cached unrotated and rotated by slot index when used, in a copy
            key_rope = (cos[0], sin[0])
            query_states = rotate(query_states, *(_at_queries(table, step)[:, None] for table in (cos, sin)))

        # H2O: attention reports the mass that each slot received, and slimming follows it when due
        attn_output, mass = ATTENTION_BACKENDS[backend](
            query_states, keys, values, step, self.scaling, h2o.group_reduce, slots=slots, rope=key_rope
        )
        if mass is not None:
            cache.add_mass(mass, self.layer_idx)
        attn_output = attn_output.transpose(1, 2).flatten(2).contiguous()
        if step.padded:  # H2O: padding attends to nothing, and so depends on no token to its right
            attn_output = attn_output.masked_fill(step.padding(attn_output.device)[..., None], 0.0)
        return attn_output


def _at_queries(table: torch.Tensor, step) -> torch.Tensor:
    """The rows of a RoPE table [1, width, D] at the slots of the queries: [1 or B, columns, D]."""
    if step.min_start == step.max_start:
        return table[:, step.max_start :]
    return table[0, step.starts(table.device)[:, None] + torch.arange(step.columns, device=table.device)]


class H2OLlamaForCausalLM(LlamaForCausalLM):
    """Llama whose `generate` keeps an `HHCache`. Checkpoints are plain Llama's, in both directions.

    RoPE types `dynamic` and `longrope` take their frequencies from the farthest position of a forward, of all its rows;
    padding has none. Without position_rolling these are original positions, evicted or not, and a key keeps the
    rotation it was cached with, as in stock Llama. With it they are slots: frequencies follow what the cache holds,
    never more than its capacity and the columns of a forward, and all keys are rotated with those of the step. Those of
    `dynamic` belong to the model, not to a cache: as in stock Llama they stay at the farthest position seen until a
    forward lies within the original context again, whichever text that is of; `cache.reset()` does not touch them.

    Args:
        config: a LlamaConfig.
        h2o: the cache's settings, an H2OConfig or a dict of its fields, H2OConfig() unless given; assign `model.h2o`
            to change them for the next `generate`. Raises ValueError for anything else.
    """

    def __init__(self, config, h2o: H2OConfig | dict | None = None):
        super().__init__(config)
        self.h2o = H2OConfig() if h2o is None else h2o
        for layer_idx, layer in enumerate(self.model.layers):  # H2O: same weights and names
            layer.self_attn = H2OLlamaAttention(config, layer_idx)
            layer.mlp = H2OLlamaMLP(config)
            layer.input_layernorm = H2OLlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            layer.post_attention_layernorm = H2OLlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.model.norm = H2OLlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.kept_caches = generation.KeptCaches()
        self.post_init()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *model_args,
        config=None,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
        **kwargs,
    ):
        """As PreTrainedModel's, for checkpoints that this class runs as they are.

        Raises: ValueError for one of another family, with an adapter beside its weights, or with weights that are
            missing, of the wrong shape (unless ignore_mismatched_sizes), of no place in the model, NaN or infinite.
        """
        name, finding = pretrained_model_name_or_path, {key: kwargs[key] for key in weights.FINDING if key in kwargs}
        try:
            weights.refuse_adapter(name, **finding)
            if isinstance(config, PreTrainedConfig):
                weights.refuse_other_family(cls, config)
            elif (source := name if config is None else config) is not None:
                of_gguf = {"gguf_file": kwargs["gguf_file"]} if "gguf_file" in kwargs else {}
                weights.refuse_other_family(cls, PreTrainedConfig.get_config_dict(source, **finding, **of_gguf)[0])
            model, loading = super().from_pretrained(
                name, *model_args, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )  # other shapes are named below, with the weights that transformers would fill at random
            weights.refuse_misfits(model, loading, resized=ignore_mismatched_sizes)
        except weights.CheckpointError as error:
            raise weights.CheckpointError(f"{name}: {error}") from None
        return (model, loading) if output_loading_info else model

    @property
    def h2o(self) -> H2OConfig:
        return self._h2o

    @h2o.setter
    def h2o(self, h2o: H2OConfig | dict) -> None:
        if isinstance(h2o, dict):
            names = [field.name for field in fields(H2OConfig)]
            if unknown := [name for name in h2o if name not in names]:
                raise ValueError(f"h2o: {unknown[0]!r} is no field of H2OConfig; it has {', '.join(names)}")
            h2o = H2OConfig(**h2o)
        if not isinstance(h2o, H2OConfig):
            raise ValueError(f"h2o={h2o!r:.60}: must be an H2OConfig, or a dict of its fields")
        self._h2o = h2o

    def merge_projections(self) -> None:
        """Put the weights of q, k and v side by side, and those of gate and up, where kernels decode.

        `generate` does so; whoever calls `forward` alone may.
        """
        if not has_kernels(self.h2o, self.device):
            return
        for layer in self.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            attention.merged.merge(attention.q_proj, attention.k_proj, attention.v_proj)
            mlp.merged.merge(mlp.gate_proj, mlp.up_proj)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache=None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """As LlamaForCausalLM's; `past_key_values`, or `cache`, may be an HHCache, and is a new one when none is given.

        With `labels` there is no cache unless one is given or `use_cache=True`: that is stock Llama, at its cost.

        With an HHCache, `attention_mask` [B, columns so far] (or only the new columns) may hold zeros anywhere; reading
        it waits for the device, so a decode loop that knows its tokens are real leaves it out, as `generate` does. A
        padded column gives what the token before it gives, and depends on no token to its right. With position_rolling
        the cache gives the positions, and `position_ids` is not read. More columns than the cache's `prefill_chunk` are
        taken in chunks of so many, in memory for one, but for the logits and states asked for.

        Raises: ValueError for a mask that hides tokens which the cache has seen, or an input without columns.
        """
        recomputing = self.training and self.model.gradient_checkpointing  # its layers go without a cache
        if use_cache is None:
            use_cache = self.config.use_cache and labels is None
        cache = past_key_values if cache is None else cache
        if cache is None and use_cache and not recomputing:
            cache = HHCache(self.h2o)
        if not isinstance(cache, HHCache):
            kwargs |= dict(labels=labels, use_cache=use_cache, logits_to_keep=logits_to_keep)
            return super().forward(input_ids, attention_mask, position_ids, cache, inputs_embeds, **kwargs)

        if recomputing:
            raise ValueError("gradient checkpointing works without a cache only: leave past_key_values out")
        if kwargs.get("output_attentions", self.config.output_attentions):
            raise ValueError("output_attentions: an HHCache's model keeps no attention matrix; use LlamaForCausalLM")
        if isinstance(logits_to_keep, torch.Tensor) and logits_to_keep.ndim > 1:
            raise ValueError("logits_to_keep: give a number of last columns, or a 1-D tensor of columns")

        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        if inputs.ndim != (2 if inputs_embeds is None else 3):
            raise ValueError(f"input of shape {tuple(inputs.shape)}: must be [batch, tokens], or embeddings of those")
        columns = Columns(*inputs.shape[:2], attention_mask, cache)  # H2O: padding is dropped on entry
        inputs = columns.to_left(inputs)
        if position_ids is not None:
            position_ids = columns.to_left(position_ids.expand(len(inputs), -1))
        if isinstance(logits_to_keep, list):
            logits_to_keep = torch.tensor(logits_to_keep)
        if not isinstance(logits_to_keep, torch.Tensor) or logits_to_keep.ndim == 0:
            wanted = slice(-int(logits_to_keep), None)
        else:
            wanted = logits_to_keep

        # H2O: a long prompt comes in chunks, with a slimming after each, where that is asked for
        hidden_states, all_hidden_states = None, None
        for begin, end in columns.chunks(cache.h2o.prefill_chunk):
            step = cache.begin(*inputs.shape[:2], columns.new, chunk=(begin, end), real=columns.real)
            if cache.h2o.position_rolling:  # H2O: positions are slot indices
                positions = step.slot_positions(inputs.device)
            elif position_ids is None:
                positions = columns.spread(step.positions(inputs.device), begin, end)
            else:
                positions = position_ids[:, begin:end]
            chunk = inputs[:, begin:end]
            outputs = self.model(
                input_ids=chunk if inputs_embeds is None else None,
                inputs_embeds=None if inputs_embeds is None else chunk,
                # H2O: a ready-made 4-D mask keeps stock Llama from building one; the cache knows what each query sees
                attention_mask=inputs.new_empty(1, 1, 1, 1),
                position_ids=positions,
                use_cache=use_cache,
                **{CACHE_ARGUMENT: cache},
                **kwargs,
            )
            cache.end(columns.gaps if position_ids is None else None)
            hidden_states = columns.keep(hidden_states, outputs.last_hidden_state, begin, wanted)
            if outputs.hidden_states is not None:
                before = all_hidden_states or [None] * len(outputs.hidden_states)
                layers = zip(before, outputs.hidden_states, strict=True)
                all_hidden_states = tuple(columns.keep(kept, states, begin) for kept, states in layers)
        logits = self.lm_head(hidden_states)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=all_hidden_states, attentions=None, **{CACHE_ARGUMENT: cache}
        )

    def generate(self, *args, **kwargs):
        """As GenerationMixin's, through an HHCache; `past_key_values`, or `cache`, may be one of the caller's.

        Padding may stand anywhere in the inputs. A row that has ended while others go on leaves nothing more in the
        cache, whatever is fed to it.

        Raises: ValueError where `use_cache=False` or another cache_implementation is asked for, and for fewer tokens
            than a given cache has seen.
        """
        # H2O: the cache under either name, whichever this version of transformers has
        for name in ("past_key_values", "cache"):
            if name in kwargs and name != CACHE_ARGUMENT:
                kwargs[CACHE_ARGUMENT] = kwargs.pop(name)
        # H2O: a checkpoint's use_cache is the wish of those who trained it, not of the caller
        if kwargs.get("generation_config") in (None, self.generation_config):
            kwargs.setdefault("use_cache", True)
        return super().generate(*args, **kwargs)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        # H2O: generate makes an HHCache where stock Llama makes a DynamicCache
        if model_kwargs.get(CACHE_ARGUMENT) is None:
            if not generation_config.use_cache or generation_config.cache_implementation is not None:
                raise ValueError(
                    "H2OLlamaForCausalLM generates with its own HHCache: leave use_cache and cache_implementation "
                    "unset, pass a cache as past_key_values, or use LlamaForCausalLM"
                )
            self._refuse_prefix_tuning()
            model_kwargs[CACHE_ARGUMENT] = HHCache(self.h2o)
            self.merge_projections()
            return
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

    @property
    def _adapter(self):
        """peft's model around this one, where its `generate` is what runs: it puts a method of its own here."""
        owner = getattr(self.prepare_inputs_for_generation, "__self__", self)
        return None if owner is self else owner

    def _refuse_prefix_tuning(self) -> None:
        kind = getattr(getattr(self._adapter, "active_peft_config", None), "peft_type", None)
        if kind in ("PREFIX_TUNING", "CARTRIDGE"):
            raise ValueError(
                f"{kind.value}: its keys and values come from no token, and an HHCache cannot rank them; use "
                "LlamaForCausalLM, or prompt tuning"
            )

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
        if not isinstance(model_kwargs.get(CACHE_ARGUMENT), HHCache | None):
            return super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
        # H2O: the cache counts each row's tokens; only holes, which take no positions here, need saying
        mask = model_kwargs.get("attention_mask")
        if mask is None or bool((mask[:, 1:] >= mask[:, :-1]).all()):
            return None
        return (mask.long().cumsum(-1) - 1).clamp(min=0)  # the step after a padded column counts on from it

    def _prefill(self, input_ids, generation_config, model_kwargs, **kwargs):
        cache, embeds = model_kwargs.get(CACHE_ARGUMENT), model_kwargs.get("inputs_embeds")
        if isinstance(cache, HHCache) and (seen := cache.get_seq_length()):
            given, mask = (input_ids if embeds is None else embeds).shape[1], model_kwargs.get("attention_mask")
            # H2O: a mask of ones is dropped on the way, but not its length
            masked = getattr(generation_config, "_mask_length", None) if mask is None else mask.shape[1]
            if masked is not None and masked not in (given, seen + given):
                raise ValueError(
                    f"attention_mask has {masked} columns: {given} tokens were given, and the cache has seen {seen}; "
                    "give the mask of the whole text"
                )
            if masked in (None, given) and given <= seen:
                raise ValueError(
                    f"{given} tokens were given, and the cache has seen {seen}: give the whole text so far and at "
                    "least one token more, or reset() the cache"
                )
        return super()._prefill(input_ids, generation_config, model_kwargs, **kwargs)

    def _sample(self, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        # H2O: the steps of a bounded cache are all alike: replay them, where nothing is asked for that needs the host
        request = (input_ids, logits_processor, stopping_criteria, generation_config)
        if generation.can_capture(self, *request, **kwargs):
            return generation.sample(self, *request, **kwargs)
        if isinstance(kwargs.get(CACHE_ARGUMENT), HHCache) and len(input_ids) > 1:
            kwargs["ended_rows"] = stopping_criteria = generation.EndedRows(stopping_criteria)
        return super()._sample(input_ids, logits_processor, stopping_criteria, generation_config, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids,
        next_sequence_length=None,
        attention_mask=None,
        inputs_embeds=None,  # named, as `generate` asks whether it is
        is_first_iteration=False,
        ended_rows=None,
        **kwargs,
    ):
        if isinstance(kwargs.get(CACHE_ARGUMENT), HHCache) and not is_first_iteration and next_sequence_length == 1:
            # H2O: decode tokens are real, no mask to read back from the device, but for rows that have ended
            past = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            attention_mask = None if ended_rows is None else ended_rows.mask()
            if attention_mask is not None and self._adapter is not None:  # which puts columns of its own before all
                attention_mask = torch.cat([past[:, :-1].long(), attention_mask], dim=1)
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        if isinstance(cache := inputs.get(CACHE_ARGUMENT), HHCache):
            del inputs[CACHE_ARGUMENT]
            inputs["past_key_values"] = cache  # H2O: peft, which comes next, knows no other name
        return inputs

    def save_pretrained(self, save_directory, is_main_process: bool = True, *args, **kwargs):
        """As PreTrainedModel's; the checkpoint names plain Llama as its architecture.

        Raises: ValueError for push_to_hub, which would upload before the name is right.
        """
        if kwargs.get("push_to_hub"):
            raise ValueError("push_to_hub: save to a folder, then upload that")
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        self.config.architectures = ["LlamaForCausalLM"]
        if is_main_process:
            self.config.save_pretrained(save_directory)
