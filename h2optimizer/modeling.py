"""Attention and model over a heavy-hitter KV cache (H2O, arXiv 2306.14048), as mixins for families like Llama.

A family mixes them into its classes of transformers, see `llama.py` and the files beside it. Each departure from
transformers' code is marked `# H2O:`.
"""

from collections.abc import Sequence
from dataclasses import fields
from functools import partial

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from h2optimizer.attention import Inputs, decodes_by_kernel, kernel_decode_step
from h2optimizer.backends import ATTENTION_BACKENDS, KERNEL_BACKENDS, has_kernels, resolve_backend
from h2optimizer.columns import Columns
from h2optimizer.fused import FusedRMSNorm, MergedLinear, is_familys_own, is_watched, rotate, takes_norm
from h2optimizer.generation import GeneratesThroughSlots
from h2optimizer.prefixes import Prefix, prefill_prefix
from h2optimizer.settings import HeadsError, SavedSettings, SettingsError, check_heads, save_settings
from h2optimizer.slimming import slimmer_of
from h2optimizer.utils.cache import CACHE_ARGUMENT, HHCache
from h2optimizer.utils.step import to_rows
from h2optimizer.weights import FINDING, ChecksItsWeights, refuse_short_sliding_window


class H2OAttention:
    """A family's attention over the slots of an `HHCache`. With any other cache, or none, the family's own code runs.

    A family that normalises queries and keys does so in `project`.
    """

    rotates = True  # whether the layer has RoPE

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.merged, self.output = MergedLinear(), MergedLinear()

    @takes_norm
    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values=None,
        cache=None,
        norm: FusedRMSNorm | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        cache = past_key_values if cache is None else cache  # H2O: transformers has two names for it
        if not isinstance(cache, HHCache):
            return super().forward(hidden_states, position_embeddings, attention_mask, cache, **kwargs)
        step = cache.step
        if step is None:
            raise RuntimeError(
                "an HHCache is slimmed only by H2OLlamaForCausalLM and its like: call that model, not its .model"
            )

        if not self.rotates:
            position_embeddings = None
        projected = self.project(hidden_states, norm)
        layer = cache.layers[self.layer_idx] if step.decode else None
        by_kernel = layer is not None and decodes_by_kernel(layer, step) and projected[0].dtype == layer.dtype
        if by_kernel and not any(states.requires_grad for states in projected):
            # H2O: one product, then rotation, append, attention and mass in two or three launches
            attn_output = kernel_decode_step(projected, position_embeddings, layer, step, self.scaling)
        else:
            attn_output = self._attend(projected, position_embeddings, cache)
        if not step.static and step.due:
            cache.slim(self.layer_idx)
        if norm is not None:
            return self.output.added(hidden_states, attn_output, self.o_proj), None
        return self.output(attn_output, self.o_proj), None

    def project(self, hidden_states: torch.Tensor, norm: FusedRMSNorm | None = None) -> list[torch.Tensor]:
        """Query, key and value [B, columns, heads * D], unrotated, or one tensor of them that nothing else holds.

        norm: of the hidden states, if they still lack it.
        """
        projections = self.q_proj, self.k_proj, self.v_proj
        if norm is not None:
            merged = self.merged.of_norm(hidden_states, norm, *projections)
            if merged is not None:
                return [merged]
            hidden_states = norm(hidden_states)
        merged = self.merged.product(hidden_states, *projections)
        return [projection(hidden_states) for projection in projections] if merged is None else [merged]

    def heads_of(self, projected: list[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Query, key and value [B, heads, columns, D], views of what `project` returns."""
        heads = [states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for states in projected]
        return heads if len(heads) > 1 else heads[0].split_with_sizes(self._merged_heads, 1)

    @property
    def _merged_heads(self) -> list[int]:
        """Heads of query, key and value in a merged product."""
        return [width // self.head_dim for width in self.merged.widths]

    def _attend(self, projected, position_embeddings: tuple[torch.Tensor, torch.Tensor] | None, cache: HHCache):
        """Run query, key and value [B, columns, heads * D] through a backend: [B, columns, Hq * D].

        Without position embeddings, nothing is rotated.
        """
        step, h2o = cache.step, cache.h2o
        backend = resolve_backend(h2o.backend, projected[0].device.type)
        # H2O: nobody else reads a merged product, so it is rotated where it is, and attention reads strided views
        turn = partial(rotate, by_kernel=backend in KERNEL_BACKENDS, in_place=len(projected) == 1)

        rope, rolling = position_embeddings, h2o.position_rolling
        if rope is not None and not rolling and len(projected) == 1:  # queries and keys lie side by side
            queries, keys, values = self._merged_heads
            heads = projected[0].unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            both, value_states = heads.split_with_sizes([queries + keys, values], 1)
            query_states, key_states = turn(both, *rope).split_with_sizes([queries, keys], 1)
        else:
            query_states, key_states, value_states = self.heads_of(projected)
            if rope is not None and not rolling:
                query_states, key_states = turn(query_states, *rope), turn(key_states, *rope)
        keys, values = cache.update(key_states, value_states, self.layer_idx, slimmer=slimmer_of(backend))
        if keys.dtype != query_states.dtype or values.dtype != query_states.dtype:
            keys, values = keys.to(query_states.dtype), values.to(query_states.dtype)
        layer, key_rope = cache.layers[self.layer_idx], None
        prefix = None if layer.before is None else layer.before[:2]  # H2O: keys and values, one copy for all rows
        seen = layer.seen_by(step)  # H2O: a head with a window of its own is a row of its own
        query_states = to_rows(query_states, seen)
        if rolling and rope is not None:  # H2O: keys are cached unrotated and rotated by slot index, in a copy
            cos, sin = (table[:, : step.shared + keys.shape[2]] for table in rope)
            key_rope = (cos[0], sin[0])
            query_states = turn(query_states, *(_at_queries(table, seen) for table in (cos, sin)))

        # H2O: attention reports the mass that each slot received; slimming follows when due
        attn_output, mass = ATTENTION_BACKENDS[backend](
            Inputs(query_states, keys, values, seen, self.scaling, h2o.group_reduce, layer, key_rope, prefix)
        )
        if mass is not None:
            cache.add_mass(mass, self.layer_idx)
        attn_output = to_rows(attn_output, step).transpose(1, 2).flatten(2).contiguous()
        if step.padded:  # H2O: padding attends to nothing, so it depends on no token to its right
            attn_output = attn_output.masked_fill(step.padding(attn_output.device)[..., None], 0.0)
        return attn_output


def _at_queries(table: torch.Tensor, step) -> torch.Tensor:
    """The rows of a RoPE table [1, width, D] at the slots of the queries: [1 or B, columns, D]."""
    if step.min_start == step.max_start:
        return table[:, step.max_start :]
    return table[0, step.starts(table.device)[:, None] + torch.arange(step.columns, device=table.device)]


class H2OForCausalLM(GeneratesThroughSlots, ChecksItsWeights):
    """A family's causal language model whose `generate` uses an `HHCache`. It loads and saves plain checkpoints.

    RoPE types `dynamic` and `longrope` choose their frequencies by the largest position in a forward, over all rows and
    without padding. Without position_rolling these are original positions, evicted tokens included, and a key keeps the
    rotation it was cached with, as in stock models. With position_rolling they are slots: the largest is bounded by the
    capacity plus a forward's columns, and all keys are rotated with the frequencies of the current step. The `dynamic`
    frequencies belong to the model, not to a cache. As in stock models, they stay at the largest position seen until a
    forward, of any text, lies within the original context again; `cache.reset()` does not change them.

    Args:
        config: the family's.
        h2o: the cache's settings, an H2OConfig or a dict of its fields (default: H2OConfig()). Assign `model.h2o` to
            change them for the next `generate`. Raises ValueError for anything else.
    """

    layer: type  # the family's, with FusedDecoderLayer
    attention: type  # with H2OAttention
    mlp: type  # with FusedMLP
    norm: type  # with FusedRMSNorm
    settings: type  # H2OConfig

    def __init__(self, config, h2o=None):
        super().__init__(config)
        self._h2o = self.settings()
        if h2o is not None:
            self.h2o = h2o
        for layer_idx in range(len(self.model.layers)):  # H2O: weights and names stay the same
            layer = self.model.layers[layer_idx] = self.layer(config, layer_idx)
            layer.self_attn = self.attention(config, layer_idx)
            layer.mlp = self.mlp(config)
            layer.input_layernorm = self.norm(config.hidden_size, eps=config.rms_norm_eps)
            layer.post_attention_layernorm = self.norm(config.hidden_size, eps=config.rms_norm_eps)
        self.model.norm = self.norm(config.hidden_size, eps=config.rms_norm_eps)
        norms = [layer.input_layernorm for layer in self.model.layers] + [self.model.norm]
        for layer, norm in zip(self.model.layers, norms[1:], strict=True):
            layer.precede(norm)
        self.post_init()
        self._no_split_modules = {self.layer.__name__}  # device maps keep layers whole, which they know by name

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, h2o=None, **kwargs):
        """As the family's. The default of `h2o` is what `save_pretrained` has written beside the checkpoint, if it has.

        Raises: ValueError for a checkpoint that this class cannot run as it is, or bad settings beside it.
        """
        name, finding = pretrained_model_name_or_path, {key: kwargs[key] for key in FINDING if key in kwargs}
        saved = None if name is None or h2o is not None else SavedSettings.find(name, **finding)
        if saved is None:
            return super().from_pretrained(name, *model_args, h2o=h2o, **kwargs)
        try:
            return super().from_pretrained(name, *model_args, h2o=saved.config(cls.settings), **kwargs)
        except HeadsError as error:
            raise SettingsError(f"{saved.path}: {error}") from None

    def save_pretrained(self, save_directory, is_main_process: bool = True, *args, **kwargs):
        """As the family's; the settings of the cache go into a file of their own, h2o_config.json.

        Raises: ValueError for push_to_hub, which would upload before all files are right.
        """
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        if is_main_process:
            save_settings(self.h2o, save_directory)

    @property
    def h2o(self):
        return self._h2o

    @h2o.setter
    def h2o(self, h2o) -> None:
        if isinstance(h2o, dict):
            names = [field.name for field in fields(self.settings)]
            if unknown := [name for name in h2o if name not in names]:
                raise ValueError(f"h2o: {unknown[0]!r} is not a field of H2OConfig; its fields are {', '.join(names)}")
            h2o = self.settings(**h2o)
        if not isinstance(h2o, self.settings):
            raise ValueError(f"h2o={h2o!r:.60}: must be an H2OConfig, or a dict of its fields")
        check_heads(h2o, self.config)
        refuse_short_sliding_window(self.config, h2o)
        self._h2o = h2o

    def merge_projections(self) -> None:
        """Merge the weights of q, k and v, and those of gate and up, into one tensor each if kernels run.

        `generate` does this. Callers of `forward` may call it first.
        """
        if not has_kernels(self.h2o, self.device):
            return
        for layer in self.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            attention.merged.merge(attention.q_proj, attention.k_proj, attention.v_proj)
            attention.output.merge(attention.o_proj)
            mlp.merged.merge(mlp.gate_proj, mlp.up_proj)
            mlp.down.merge(mlp.down_proj)

    def prefill_prefix(self, ids: list[int] | torch.Tensor, prefix: Prefix | None = None) -> Prefix:
        """Compute a beginning that several prompts share, once: for `generate(…, prefix=…)`, or an HHCache.

        Args:
            ids: its tokens, of one row; with `prefix`, those that follow it.
            prefix: a shorter prefix to extend. The result holds both, and the shorter one stays as it is.

        Returns: the keys, values and mass of the tokens, on the layers' devices. `prefix.nbytes` is their size.

        Raises: ValueError for `prefill_chunk` and the RoPE types `dynamic` and `longrope`, which rule out an exact
            result, and for a `prefix` of another model or of other settings.
        """
        return prefill_prefix(self, ids, prefix)

    def fill_slots(self, cache: HHCache, input_ids: torch.Tensor) -> None:
        """A forward of input_ids [B, tokens] for the cache alone, without logits."""
        self._through_slots(cache, input_ids, None, None, None, 1)

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
        """As the family's, but `past_key_values` (or `cache`) may be an HHCache; the default is a new one.

        With `labels` there is no cache unless one is given or `use_cache=True`; stock code then runs at its own cost.
        `_through_slots` describes what else differs with an HHCache.
        """
        recomputing = self.training and self.model.gradient_checkpointing  # checkpointed layers use no cache
        if use_cache is None:
            use_cache = self.config.use_cache and labels is None
        cache = past_key_values if cache is None else cache
        if cache is None and use_cache and not recomputing:
            cache = HHCache(self.h2o)
        if not isinstance(cache, HHCache):
            kwargs |= dict(labels=labels, use_cache=use_cache, logits_to_keep=logits_to_keep)
            return super().forward(input_ids, attention_mask, position_ids, cache, inputs_embeds, **kwargs)

        if recomputing:
            raise ValueError("gradient checkpointing works only without a cache: omit past_key_values")
        kwargs["use_cache"] = use_cache
        hidden_states, all_hidden_states = self._through_slots(
            cache, input_ids, inputs_embeds, attention_mask, position_ids, logits_to_keep, **kwargs
        )
        logits, loss = self.lm_head(hidden_states), None
        if labels is not None:
            del kwargs["use_cache"]
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=all_hidden_states, attentions=None, **{CACHE_ARGUMENT: cache}
        )

    def _last_layer(self, output_hidden_states: bool | None = None, **kwargs) -> int | None:
        """The index of the last layer, if nothing but the logits of one column needs what it computes after attention.

        Then it computes that for each row's last token alone.
        """
        shown = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        layer, norm = self.model.layers[-1], self.model.norm
        if shown or not is_familys_own(layer, norm):
            return None
        watched = (*layer.modules(), norm, self.model)
        return None if any(map(is_watched, watched)) else layer.self_attn.layer_idx

    def _through_slots(
        self, cache: HHCache, input_ids, inputs_embeds, attention_mask, position_ids, logits_to_keep, **kwargs
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None]:
        """One forward over an HHCache: last hidden states of the columns to keep, and all hidden states if requested.

        `attention_mask` [B, columns so far], or only of the new columns, may have zeros anywhere. Reading it waits for
        the device, so a decode loop whose tokens are all real should omit it, as `generate` does. A padded column
        returns the output of the token before it and depends on no token to its right. With position_rolling, positions
        come from the cache and `position_ids` is ignored. Inputs longer than the cache's `prefill_chunk` are processed
        in chunks of that size, using the memory of one chunk plus the requested logits and states.

        Raises: ValueError for a mask that hides tokens the cache has seen, an input without columns, a cache that
            begins after another model's prefix, or one with more slots than a sliding window reaches.
        """
        refuse_short_sliding_window(self.config, cache.h2o)
        if cache.continues_prefix:
            cache.prefix.check_model(self)
        if kwargs.get("output_attentions", self.config.output_attentions):
            stock = self.stock_class().__name__
            raise ValueError(f"output_attentions: no attention matrix is kept with an HHCache; use {stock}")
        if isinstance(logits_to_keep, list):
            logits_to_keep = torch.tensor(logits_to_keep)
        if isinstance(logits_to_keep, torch.Tensor) and logits_to_keep.ndim > 1:
            raise ValueError("logits_to_keep: give the number of last columns, or a 1-D tensor of columns")
        several = isinstance(logits_to_keep, torch.Tensor) and logits_to_keep.ndim == 1
        wanted = logits_to_keep if several else slice(-int(logits_to_keep), None)

        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        if inputs.ndim != (2 if inputs_embeds is None else 3):
            raise ValueError(f"input of shape {tuple(inputs.shape)}: must be [batch, tokens], or their embeddings")
        columns = Columns(*inputs.shape[:2], attention_mask, cache)  # H2O: padding is dropped on entry
        inputs = columns.to_left(inputs)
        if position_ids is not None:
            position_ids = columns.to_left(position_ids.expand(len(inputs), -1))

        last_layer = None
        if (
            not several and logits_to_keep == 1 and inputs.shape[1] > 1 and min(columns.new)
        ):  # each row has a last token
            last_layer = self._last_layer(**kwargs)
        # H2O: with prefill_chunk, a long prompt runs in chunks, each followed by a slimming
        hidden_states, all_hidden_states = None, None
        for begin, end in columns.chunks(cache.h2o.prefill_chunk):
            step = cache.begin(*inputs.shape[:2], columns.new, chunk=(begin, end), real=columns.real)
            if cache.h2o.position_rolling:  # H2O: positions are slot indices
                positions = step.slot_positions(inputs.device)
            elif position_ids is None:
                positions = columns.spread(step.positions(inputs.device), begin, end)
            else:
                positions = position_ids[:, begin:end]
            step.last_layer = last_layer
            chunk = inputs[:, begin:end]
            outputs = self.model(
                input_ids=chunk if inputs_embeds is None else None,
                inputs_embeds=None if inputs_embeds is None else chunk,
                # H2O: a ready-made 4-D mask keeps stock models from building one; the cache knows what each query sees
                attention_mask=inputs.new_empty(1, 1, 1, 1),
                position_ids=positions,
                **{CACHE_ARGUMENT: cache},
                **kwargs,
            )
            cache.end(columns.gaps if position_ids is None else None)
            if outputs.last_hidden_state.shape[1] < end - begin:
                hidden_states = columns.keep_last(hidden_states, outputs.last_hidden_state, step.new)
            else:
                hidden_states = columns.keep(hidden_states, outputs.last_hidden_state, begin, wanted)
            if outputs.hidden_states is not None:
                before = all_hidden_states or [None] * len(outputs.hidden_states)
                layers = zip(before, outputs.hidden_states, strict=True)
                all_hidden_states = tuple(columns.keep(kept, states, begin) for kept, states in layers)
        return hidden_states, all_hidden_states
