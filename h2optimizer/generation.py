"""`generate` over a bounded cache: overrides of GenerationMixin, and `sample`, the loop over recorded steps."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from weakref import WeakKeyDictionary

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation import (
    EosTokenCriteria,
    GenerateDecoderOnlyOutput,
    MaxLengthCriteria,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from h2optimizer.backends import has_kernels
from h2optimizer.decoder import CHUNK, Decoder, is_replayable
from h2optimizer.prefixes import Prefix, prefix_first
from h2optimizer.sampling import choose_greedily
from h2optimizer.utils.cache import CACHE_ARGUMENT, HHCache

KEPT_CACHES = 8  # caches that a model's `generate` keeps, with their graphs, for later requests of the same size
KEPT_BYTES = 8 * 2**30  # most bytes of all kept caches but the latest
KEPT_DECODERS = 4  # decoders per cache, one for each way of sampling

# Processors that depend on the logits alone, not on anything that changes from step to step.
STATELESS_PROCESSORS = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)


class GeneratesThroughSlots:
    """GenerationMixin's `generate` over an HHCache, with recorded steps where the results are the same.

    Attributes:
        kept_caches: caches and graphs kept for later calls.
        capture_sharded: record the steps of a tensor-parallel model as well. The graphs hold NCCL's communicator, so
            destroy_process_group waits for them forever. A program that sets this to True must drop the model and its
            caches first, or exit without destroy_process_group.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.kept_caches = KeptCaches()
        self.capture_sharded = False

    def generate(self, *args, prefix: Prefix | None = None, **kwargs):
        """As GenerationMixin's, over an HHCache; `past_key_values` (or `cache`) may be the caller's own.

        Inputs may be padded in any column. Once a row has finished, the tokens fed to it no longer enter the cache.

        Args:
            prefix: from `prefill_prefix`, a beginning of all prompts that need not be computed again. The prompts are
                whole, so the results are those without it, up to the order of sums. `HHCache(h2o, prefix=prefix)` as
                the cache does the same.

        Raises: ValueError for `use_cache=False` or another cache_implementation, for fewer tokens than a given
            cache has seen, and for prompts that do not begin with the prefix or do not go beyond it.
        """
        # H2O: accept the cache under either name, whichever this version of transformers uses
        for name in ("past_key_values", "cache"):
            if name in kwargs and name != CACHE_ARGUMENT:
                kwargs[CACHE_ARGUMENT] = kwargs.pop(name)
        # H2O: a checkpoint's use_cache is left over from training, not the caller's choice
        if kwargs.get("generation_config") in (None, self.generation_config):
            kwargs.setdefault("use_cache", True)
        if prefix is not None:
            if kwargs.get(CACHE_ARGUMENT) is not None:
                raise ValueError("prefix: give it to the cache, HHCache(h2o, prefix=prefix), or leave the cache out")
            kwargs["prefix"] = prefix
        return super().generate(*args, **kwargs)

    def _validate_model_kwargs(self, model_kwargs):
        # H2O: `prefix` is for the cache, not for the model
        super()._validate_model_kwargs({name: value for name, value in model_kwargs.items() if name != "prefix"})

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        # H2O: generate makes an HHCache where stock models make a DynamicCache
        prefix = model_kwargs.pop("prefix", None)
        if model_kwargs.get(CACHE_ARGUMENT) is None:
            if not generation_config.use_cache or generation_config.cache_implementation is not None:
                raise ValueError(
                    f"{type(self).__name__} generates with its own HHCache: leave use_cache and cache_implementation "
                    f"unset, pass a cache as past_key_values, or use {self.stock_class().__name__}"
                )
            self._refuse_prefix_tuning()
            model_kwargs[CACHE_ARGUMENT] = HHCache(self.h2o, prefix)
            self.merge_projections()
            return
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

    @property
    def _adapter(self):
        """peft's model around this one while peft's `generate` runs, which replaces a method here; else None."""
        owner = getattr(self.prepare_inputs_for_generation, "__self__", self)
        return None if owner is self else owner

    def _refuse_prefix_tuning(self) -> None:
        kind = getattr(getattr(self._adapter, "active_peft_config", None), "peft_type", None)
        if kind in ("PREFIX_TUNING", "CARTRIDGE"):
            raise ValueError(
                f"{kind.value}: an HHCache cannot rank its keys and values, which belong to no token; use "
                f"{self.stock_class().__name__}, or prompt tuning"
            )

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
        if not isinstance(model_kwargs.get(CACHE_ARGUMENT), HHCache | None):
            return super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
        # H2O: the cache counts each row's tokens; positions are needed only for holes in the mask, which take none
        mask = model_kwargs.get("attention_mask")
        if mask is None or bool((mask[:, 1:] >= mask[:, :-1]).all()):
            return None
        return (mask.long().cumsum(-1) - 1).clamp(min=0)  # the step after a padded column continues from it

    def _prefill(self, input_ids, generation_config, model_kwargs, **kwargs):
        cache, embeds = model_kwargs.get(CACHE_ARGUMENT), model_kwargs.get("inputs_embeds")
        if isinstance(cache, HHCache) and cache.continues_prefix:
            return self._prefill_after_prefix(input_ids, generation_config, model_kwargs, **kwargs)
        if isinstance(cache, HHCache) and (seen := cache.get_seq_length()):
            given, mask = (input_ids if embeds is None else embeds).shape[1], model_kwargs.get("attention_mask")
            # H2O: generate drops a mask of ones, but keeps its length
            masked = getattr(generation_config, "_mask_length", None) if mask is None else mask.shape[1]
            if masked is not None and masked not in (given, seen + given):
                raise ValueError(
                    f"attention_mask has {masked} columns for {given} given tokens and {seen} seen by the cache: "
                    "give the mask of the whole text"
                )
            if masked in (None, given) and given <= seen:
                raise ValueError(
                    f"{given} tokens were given, but the cache has seen {seen}: give the whole text so far plus at "
                    "least one new token, or reset() the cache"
                )
        return super()._prefill(input_ids, generation_config, model_kwargs, **kwargs)

    def _prefill_after_prefix(self, input_ids, generation_config, model_kwargs, **kwargs):
        """The first forward of whole prompts whose beginning, the cache's prefix, need not be computed."""
        cache, mask = model_kwargs[CACHE_ARGUMENT], model_kwargs.get("attention_mask")
        tuning = getattr(getattr(self._adapter, "active_peft_config", None), "is_prompt_learning", False)
        if model_kwargs.get("inputs_embeds") is not None or tuning:
            raise ValueError("prefix: inputs_embeds and prompt tuning do not begin with its tokens: leave it out")
        if generation_config.prefill_chunk_size is not None:
            raise ValueError("prefix: does not end where a chunk of the prompt does: leave prefill_chunk_size out")
        real = torch.ones(input_ids.shape, dtype=torch.bool) if mask is None else mask.bool().cpu()
        order = prefix_first(input_ids, real, cache.prefix.tokens)  # H2O: the cache takes it before any padding
        inputs = {"input_ids": input_ids, "attention_mask": real.long()}  # the mask stays on the host, which reads it
        if model_kwargs.get("position_ids") is not None:
            inputs["position_ids"] = model_kwargs["position_ids"]
        inputs = {name: of.gather(1, order.to(of.device)) for name, of in inputs.items()}
        input_ids = inputs.pop("input_ids")[:, len(cache.prefix) :]
        outputs = super()._prefill(input_ids, generation_config, model_kwargs | inputs, **kwargs)
        cache.set_padding(real)
        return outputs

    def _sample(self, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        # H2O: all steps of a bounded cache are the same work: replay them unless the request needs the host
        request = (input_ids, logits_processor, stopping_criteria, generation_config)
        if can_capture(self, *request, **kwargs):
            return sample(self, *request, **kwargs)
        if isinstance(kwargs.get(CACHE_ARGUMENT), HHCache) and len(input_ids) > 1:
            kwargs["ended_rows"] = stopping_criteria = EndedRows(stopping_criteria)
        return super()._sample(input_ids, logits_processor, stopping_criteria, generation_config, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids,
        next_sequence_length=None,
        attention_mask=None,
        inputs_embeds=None,  # named because `generate` checks the signature for it
        is_first_iteration=False,
        ended_rows=None,
        **kwargs,
    ):
        if isinstance(kwargs.get(CACHE_ARGUMENT), HHCache) and not is_first_iteration and next_sequence_length == 1:
            # H2O: decode tokens are real except in finished rows: without a mask, nothing is read from the device
            past = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            attention_mask = None if ended_rows is None else ended_rows.mask()
            if attention_mask is not None and self._adapter is not None:  # the adapter prepends its own columns
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
            inputs["past_key_values"] = cache  # H2O: peft runs next and knows only this name
        return inputs


class EndedRows(StoppingCriteriaList):
    """Stopping criteria that remember which rows they ended: `generate` feeds padding to these rows afterwards.

    Without an end-of-sequence token, `generate` feeds such rows their own next tokens instead of padding.
    """

    def __init__(self, criteria: StoppingCriteriaList):
        super().__init__(criteria)
        self._pads = any(hasattr(each, "eos_token_id") for each in criteria)
        self._ended: torch.Tensor | None = None  # rows ended after the newest token
        self._before: torch.Tensor | None = None  # rows ended before it, where it is padding

    def __call__(self, input_ids: torch.LongTensor, scores, **kwargs) -> torch.Tensor:
        ended = super().__call__(input_ids, scores, **kwargs)
        self._before, self._ended = self._ended, ended if self._ended is None else ended | self._ended
        return ended

    def mask(self) -> torch.Tensor | None:
        """Mask [B, 1] of the newest tokens, 0 for padding; None if no row has padding. Waits for the device."""
        if not self._pads or self._before is None or not self._before.any():
            return None
        return (~self._before).long()[:, None]


class KeptCaches:
    """Caches that `generate` made, kept for later calls of the same batch size, and decoders with their graphs.

    `decoders` maps a cache to its decoders, keyed by how they choose tokens, least recently used first. They are freed
    with the cache.
    """

    def __init__(self):
        self._caches: OrderedDict[Hashable, HHCache] = OrderedDict()
        self.decoders: WeakKeyDictionary[HHCache, dict[Hashable, Decoder]] = WeakKeyDictionary()

    def take(self, key: Hashable) -> HHCache | None:
        """A cache for this key, owned by the caller until it is put back; it must be reset. None if there is none."""
        return self._caches.pop(key, None)

    def put(self, key: Hashable, cache: HHCache) -> None:
        self._caches[key] = cache
        while len(self._caches) > KEPT_CACHES or self._earlier_bytes() > KEPT_BYTES:
            self._caches.popitem(last=False)

    def decoder(self, cache: HHCache, key: Hashable, make: Callable[[], Decoder]) -> Decoder:
        """The cache's decoder that an earlier call made for this key if it is still usable, else a new one."""
        kept = self.decoders.setdefault(cache, {})
        for other in [other for other, decoder in kept.items() if not decoder.has_slots_of(cache)]:
            del kept[other]
        decoder = kept.pop(key, None)
        if decoder is None or not decoder.is_current():
            decoder = make()
        kept[key] = decoder  # now the most recent
        while len(kept) > KEPT_DECODERS:
            del kept[next(iter(kept))]
        return decoder

    def _earlier_bytes(self) -> int:
        return sum(cache.nbytes for cache in list(self._caches.values())[:-1])

    def clear(self) -> bool:
        """Free the kept caches; returns whether there were any."""
        any_kept = bool(self._caches)
        self._caches.clear()
        return any_kept

    def __reduce__(self):  # a copy is empty: graphs belong to one model's weights
        return KeptCaches, ()


def can_capture(
    model, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus=False, streamer=None, **kwargs
) -> bool:
    """Whether `sample` gives the same result as transformers' loop."""
    cache = kwargs.get(CACHE_ARGUMENT)
    if not isinstance(cache, HHCache) or not cache.h2o.capture or cache.h2o.slimming != "H":
        return False
    if synced_gpus or streamer is not None or generation_config.is_assistant or model.training:
        return False
    wanted = ("output_scores", "output_logits", "output_hidden_states", "output_attentions")
    if generation_config.return_dict_in_generate and any(getattr(generation_config, name) for name in wanted):
        return False
    if not all(type(processor) in STATELESS_PROCESSORS for processor in logits_processor):
        return False
    if not is_replayable(model) or not has_kernels(cache.h2o, model.device):
        return False
    return cache.h2o.position_rolling or _positions_are_counts(input_ids, **kwargs)


def _positions_are_counts(input_ids, position_ids=None, attention_mask=None, inputs_embeds=None, **kwargs) -> bool:
    """Whether each row's last position equals the number of tokens before it, as the cache's own count assumes."""
    if position_ids is None:
        return True
    columns = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
    tokens = columns if attention_mask is None else attention_mask.sum(dim=-1)
    return position_ids.ndim == 2 and bool((position_ids[:, -1] + 1 == tokens).all())


def sample(
    model, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus=False, streamer=None, **kwargs
):
    """As GenerationMixin._sample, greedy or sampling: sequences [B, tokens], or its output object.

    The device detects end-of-sequence tokens. If anything but the length can end the call, the host checks after up to
    CHUNK steps: other criteria then see every prefix, and tokens decoded past the end of the last row are dropped.
    A cache that outlives the call must not run ahead, so the host then checks after every step that could be the last,
    and finished rows bring no token to later steps.
    """
    cache = kwargs[CACHE_ARGUMENT]
    outlives = generation_config.return_dict_in_generate or getattr(cache, "_is_user_defined", False)
    eos = [criteria.eos_token_id for criteria in stopping_criteria if isinstance(criteria, EosTokenCriteria)]
    eos = torch.cat([ids.reshape(-1) for ids in eos]).to(input_ids.device) if eos else None
    others = [c for c in stopping_criteria if not isinstance(c, EosTokenCriteria | MaxLengthCriteria)]
    pad = generation_config._pad_token_tensor
    pad = 0 if pad is None else int(pad)
    # everything is read from the device before the prefill, for which it would wait
    ends = None if eos is None else tuple(eos.tolist())
    max_length = stopping_criteria.max_length
    at_a_time = 1 if outlives and (eos is not None or others) else CHUNK

    key = (len(input_ids), cache.h2o, model.dtype, model.device)
    if not outlives and (kept := model.kept_caches.take(key)) is not None:
        kept.follow(cache.prefix)  # which resets it
        cache = kwargs[CACHE_ARGUMENT] = kept
    logits = None
    while logits is None:
        try:
            logits = model._prefill(input_ids, generation_config, dict(kwargs), is_first_iteration=True).logits[:, -1]
        except torch.OutOfMemoryError:
            if not model.kept_caches.clear():
                raise
        if logits is None:  # retry with the kept caches freed
            torch.cuda.empty_cache()
            cache.reset()
    decoder = _decoder_of(model, cache, logits_processor, generation_config.do_sample, eos, ends, pad)

    new = decoder.choose(logits)
    decoder.start(new)
    new, ended = new[:, None], torch.zeros_like(decoder.finished)
    bring = None  # rows that bring a token to the next step; None = all, as for a cache that ends with the call
    while True:
        before = ended
        done = []  # for each new column, whether every row has ended
        if others:
            for column in new.unbind(1):
                column = column if eos is None else torch.where(ended, pad, column)
                input_ids = torch.cat([input_ids, column[:, None]], dim=1)
                ended = ended | decoder.ends(column)
                for criteria in others:
                    ended = ended | criteria(input_ids, None)
                done.append(ended.all())
            done = torch.stack(done).tolist()  # the host waits here
        else:
            input_ids = torch.cat([input_ids, new], dim=1)
            if eos is not None:
                ended_by = (decoder.ends(new).cumsum(dim=1) > 0) | ended[:, None]
                ended = ended_by[:, -1]
                done = ended_by.all(dim=0).tolist()  # or here
        if True in done:
            input_ids = input_ids[:, : input_ids.shape[1] - len(done) + done.index(True) + 1]
            break
        left = CHUNK if max_length is None else max_length - input_ids.shape[1]
        if left <= 0:
            break
        if outlives and eos is not None and len(input_ids) > 1:
            bring = (~before).long().tolist()  # the newest token of a row that had ended before it is padding
        if others and eos is not None:  # the decoder does not know which rows the other criteria ended
            decoder.finished.copy_(ended)
            decoder.token.copy_(input_ids[:, -1])
        new = decoder.decode(min(at_a_time, left), bring)[0]
    if not outlives:
        if cache.prefix is not None:
            cache.follow(None)  # a kept cache must not hold on to the snapshot
        model.kept_caches.put(key, cache)
    if generation_config.return_dict_in_generate:
        return GenerateDecoderOnlyOutput(sequences=input_ids, **{CACHE_ARGUMENT: cache})
    return input_ids


def _decoder_of(
    model, cache: HHCache, processors: LogitsProcessorList, do_sample: bool, eos, ends: tuple | None, pad: int
) -> Decoder:
    """A decoder over this cache with these sampling settings, reused from an earlier call if possible.

    ends: the numbers in `eos`.
    """
    settings = [(type(p).__name__, *sorted((k, str(v)) for k, v in vars(p).items())) for p in processors]
    key = (*settings, do_sample, ends, pad)

    def choose(logits: torch.Tensor) -> torch.Tensor:
        scores = processors(None, logits.float())
        return torch.multinomial(scores.softmax(-1), 1)[:, 0] if do_sample else scores.argmax(-1)

    greedy = not do_sample and not processors
    return model.kept_caches.decoder(
        cache, key, lambda: Decoder(model, cache, choose_greedily if greedy else choose, eos, pad)
    )
