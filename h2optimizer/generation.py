"""`generate` over a bounded cache: what it makes of GenerationMixin's, and `sample`, its loop over recorded steps."""

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
from h2optimizer.sampling import choose_greedily
from utils.cache import CACHE_ARGUMENT, HHCache

KEPT_CACHES = 8  # caches that a model's `generate` keeps, with their graphs, for later requests of the same size
KEPT_BYTES = 8 * 2**30  # bound of them all but the latest
KEPT_DECODERS = 4  # decoders of one cache, each for its own sampling

# What depends on the logits alone, and on nothing that changes from step to step.
STATELESS_PROCESSORS = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)


class GeneratesThroughSlots:
    """GenerationMixin's `generate` through an HHCache, its steps recorded where that gives the same.

    Attributes:
        kept_caches: what calls leave for later ones.
        capture_sharded: record the steps of a tensor-parallel model as well. They hold NCCL's communicator: its end
            (destroy_process_group) waits for them for ever. A program that sets this to True drops the model and its
            caches before that, or ends without it.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.kept_caches = KeptCaches()
        self.capture_sharded = False

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


class EndedRows(StoppingCriteriaList):
    """Stopping criteria that remember which rows they have ended: what `generate` feeds these afterwards is padding.

    Where no end-of-sequence token is asked for, `generate` feeds them what they would say next: text, not padding.
    """

    def __init__(self, criteria: StoppingCriteriaList):
        super().__init__(criteria)
        self._pads = any(hasattr(each, "eos_token_id") for each in criteria)
        self._ended: torch.Tensor | None = None  # after the newest token
        self._before: torch.Tensor | None = None  # it is padding in these rows

    def __call__(self, input_ids: torch.LongTensor, scores, **kwargs) -> torch.Tensor:
        ended = super().__call__(input_ids, scores, **kwargs)
        self._before, self._ended = self._ended, ended if self._ended is None else ended | self._ended
        return ended

    def mask(self) -> torch.Tensor | None:
        """[B, 1] for the newest tokens, 0 for padding; None where it is that of no row. Waits for the device."""
        if not self._pads or self._before is None or not self._before.any():
            return None
        return (~self._before).long()[:, None]


class KeptCaches:
    """Caches that `generate` made, for later calls of the same batch size, and the graphs over any cache's slots.

    `decoders` are by how they choose tokens, those of a cache in the order of their last use; they end with it.
    """

    def __init__(self):
        self._caches: OrderedDict[Hashable, HHCache] = OrderedDict()
        self.decoders: WeakKeyDictionary[HHCache, dict[Hashable, Decoder]] = WeakKeyDictionary()

    def take(self, key: Hashable) -> HHCache | None:
        """One for this key, empty, the caller's until it is put back."""
        cache = self._caches.pop(key, None)
        if cache is not None:
            cache.reset()
        return cache

    def put(self, key: Hashable, cache: HHCache) -> None:
        self._caches[key] = cache
        while len(self._caches) > KEPT_CACHES or self._earlier_bytes() > KEPT_BYTES:
            self._caches.popitem(last=False)

    def decoder(self, cache: HHCache, key: Hashable, make: Callable[[], Decoder]) -> Decoder:
        """The decoder over a cache that an earlier call made for this key, if it still can be used, else a new one."""
        kept = self.decoders.setdefault(cache, {})
        for other in [other for other, decoder in kept.items() if not decoder.has_slots_of(cache)]:
            del kept[other]
        decoder = kept.pop(key, None)
        if decoder is None or not decoder.is_current():
            decoder = make()
        kept[key] = decoder  # the last in order
        while len(kept) > KEPT_DECODERS:
            del kept[next(iter(kept))]
        return decoder

    def _earlier_bytes(self) -> int:
        return sum(cache.nbytes for cache in list(self._caches.values())[:-1])

    def clear(self) -> bool:
        """Free them; whether there was one."""
        any_kept = bool(self._caches)
        self._caches.clear()
        return any_kept

    def __reduce__(self):  # a copy is empty: graphs belong to one model's weights
        return KeptCaches, ()


def can_capture(
    model, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus=False, streamer=None, **kwargs
) -> bool:
    """Whether `sample` gives what transformers' loop gives."""
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
    """Whether the last token's position is the number of those before it, from where the cache counts on."""
    if position_ids is None:
        return True
    columns = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
    tokens = columns if attention_mask is None else attention_mask.sum(dim=-1)
    return position_ids.ndim == 2 and bool((position_ids[:, -1] + 1 == tokens).all())


def sample(
    model, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus=False, streamer=None, **kwargs
):
    """As GenerationMixin._sample, greedy or sampling: sequences [B, tokens], or its output object.

    End-of-sequence tokens are noticed on the device. The host looks after up to CHUNK steps, where something but the
    length can end the call; other criteria then see every prefix, and what was decoded past the last row's end is
    dropped. A cache that outlives the call never ends a step ahead: where a step could be the last, the host looks at
    once, and rows that have ended bring no token to the steps that follow.
    """
    cache = kwargs[CACHE_ARGUMENT]
    outlives = generation_config.return_dict_in_generate or getattr(cache, "_is_user_defined", False)
    eos = [criteria.eos_token_id for criteria in stopping_criteria if isinstance(criteria, EosTokenCriteria)]
    eos = torch.cat([ids.reshape(-1) for ids in eos]).to(input_ids.device) if eos else None
    others = [c for c in stopping_criteria if not isinstance(c, EosTokenCriteria | MaxLengthCriteria)]
    pad = generation_config._pad_token_tensor
    pad = 0 if pad is None else int(pad)
    max_length = stopping_criteria.max_length
    at_a_time = 1 if outlives and (eos is not None or others) else CHUNK

    key = (len(input_ids), cache.h2o, model.dtype, model.device)
    if not outlives:
        cache = kwargs[CACHE_ARGUMENT] = model.kept_caches.take(key) or cache
    logits = None
    while logits is None:
        try:
            logits = model._prefill(input_ids, generation_config, dict(kwargs), is_first_iteration=True).logits[:, -1]
        except torch.OutOfMemoryError:
            if not model.kept_caches.clear():
                raise
        if logits is None:  # again, with what was kept out of the way
            torch.cuda.empty_cache()
            cache.reset()
    decoder = _decoder_of(model, cache, logits_processor, generation_config.do_sample, eos, pad)

    new = decoder.choose(logits)
    decoder.start(new)
    new, ended = new[:, None], torch.zeros_like(decoder.finished)
    bring = None  # which rows bring a token to the next step; all where the cache ends with the call
    while True:
        before = ended
        done = []  # for each new column, whether it ends the last row
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
        if others and eos is not None:  # rows that they ended: the decoder knows of its own only
            decoder.finished.copy_(ended)
            decoder.token.copy_(input_ids[:, -1])
        new = decoder.decode(min(at_a_time, left), bring)[0]
    if not outlives:
        model.kept_caches.put(key, cache)
    if generation_config.return_dict_in_generate:
        return GenerateDecoderOnlyOutput(sequences=input_ids, **{CACHE_ARGUMENT: cache})
    return input_ids


def _decoder_of(model, cache: HHCache, processors: LogitsProcessorList, do_sample: bool, eos, pad: int) -> Decoder:
    """A decoder over this cache that chooses so; the one of an earlier call where there is one."""
    settings = [(type(p).__name__, *sorted((k, str(v)) for k, v in vars(p).items())) for p in processors]
    key = (*settings, do_sample, None if eos is None else tuple(eos.tolist()), pad)

    def choose(logits: torch.Tensor) -> torch.Tensor:
        scores = processors(None, logits.float())
        return torch.multinomial(scores.softmax(-1), 1)[:, 0] if do_sample else scores.argmax(-1)

    greedy = not do_sample and not processors
    return model.kept_caches.decoder(
        cache, key, lambda: Decoder(model, cache, choose_greedily if greedy else choose, eos, pad)
    )
