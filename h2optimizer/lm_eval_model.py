"""lm-evaluation-harness's model class for the heavy-hitter cache. Only this module needs lm_eval."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch.nn.functional import pad
from tqdm import tqdm

from h2optimizer.batching import rows_that_fit
from h2optimizer.decoding import decoding_of
from h2optimizer.likelihood import log_likelihoods_in_batches
from h2optimizer.loading import must_know
from h2optimizer.prefixes import prefix_first
from h2optimizer.sharing import common_beginning, most_snapshot_bytes, snapshot_bytes
from h2optimizer.texts import Stops
from h2optimizer.utils.cache import CACHE_ARGUMENT
from h2optimizer.utils.cli import InputError


class CacheLM(HFLM):
    """HFLM over a loaded model. Every answer goes through the cache under evaluation.

    HFLM scores context and continuation in one forward, which attends to everything, so each window would get the full
    cache's score. Here the context is prefilled exactly and slimmed as in generation, and the continuation is fed token
    by token. Prefill predicts its first token, which is the same for every window. `generate` makes texts, in HFLM's
    batches, from the beginning that all contexts of a task share.

    Args:
        model: an H2OForCausalLM, or its stock model as the baseline, which HFLM evaluates itself.
        tokenizer: must pad on the left.
        batch_size: contexts computed together, or "auto"; continuations may use up to 16 rows in any case.
        share_prefixes: compute beginnings that contexts share once, where the results are the same.
        kwargs: arguments of HFLM. Log-probabilities are float32 unless softmax_dtype is given.

    `evictions` holds, by task: `tokens` scored and `texts` generated; how many of them came `_after_eviction` of a slot
    (the texts of a batch all count as long as the longest); `contexts_cut` and `documents_split` at the model's
    positions; tokens of contexts, `prompt_tokens_computed` and `prompt_tokens_shared`, where not HFLM scores them.
    """

    def __init__(self, model, tokenizer, share_prefixes: bool = True, **kwargs):
        if tokenizer.eos_token_id is None:
            raise InputError(f"{model.name_or_path}: its tokenizer has no end-of-sequence token; lm_eval needs one")
        logger = logging.getLogger(HFLM.__module__)
        logger.setLevel(logging.ERROR)  # silences a warning that it has not loaded the model itself
        super().__init__(model, "causal", tokenizer=tokenizer, **({"softmax_dtype": "float32"} | kwargs))
        logger.setLevel(logging.NOTSET)
        self.pretrained = model.name_or_path  # the name in results
        self.h2o = getattr(model, "h2o", None)
        self.snapshots = most_snapshot_bytes(model) if share_prefixes else 0
        self._decoding = decoding_of(model, pad_token_id=tokenizer.pad_token_id)
        self._prefix = None  # the snapshot of what all contexts of the current requests begin with
        self.evictions: dict[str, Counter] = {}
        self._task, self._counts = "", Counter()  # of the current requests
        self._stops: Stops | None = None  # of the current texts

    def _by_task(self, answer: Callable, requests: list, **kwargs) -> list:
        """The results of `answer` for the requests, called with one task's requests at a time."""
        tasks, answers = {}, [None] * len(requests)
        for i, request in enumerate(requests):
            tasks.setdefault(request.task_name or "", []).append(i)
        for self._task, indices in tasks.items():
            self._counts = self.evictions.setdefault(self._task, Counter())
            for i, got in zip(indices, answer([requests[i] for i in indices], **kwargs), strict=True):
                answers[i] = got
        return answers

    def _refuse(self, why: str, task: str | None = None):
        raise InputError(f"task {task or self._task or '(without a name)'}: {why}")

    def _must_be_number(self, logprob: float) -> None:
        """Refuse NaN, which tasks would count as a wrong answer, or average."""
        if math.isnan(logprob):
            dtype = str(self.model.dtype).removeprefix("torch.")
            self._refuse(f"the model's logits are NaN in {dtype}; pass another --dtype")

    def _detect_batch_size(self, requests=None, pos: int = 0) -> int:
        if self.device.type == "cuda":
            return super()._detect_batch_size(requests, pos)
        return min(self.max_batch_size, rows_that_fit(self.model, self.max_length, self.max_gen_toks))

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """As HFLM's, through the cache. Raises InputError for contexts without tokens or without room after them."""
        for request in requests:
            context, settings = request.args
            wanted = normalize_gen_kwargs(settings, self.max_gen_toks)["max_gen_toks"]
            if wanted >= self.max_length:
                positions = f"{wanted} tokens are to follow a context, and the model has {self.max_length} positions"
                self._refuse(f"{positions}; lower its max_gen_toks, or raise --max_length", request.task_name)
            if not context.strip() and not self.tok_encode(context):
                self._refuse("a context has no tokens; nothing can be generated after it", request.task_name)
        return self._by_task(self._generate_texts, requests, disable_tqdm=disable_tqdm)

    def _generate_texts(self, requests: list, disable_tqdm: bool) -> list[str]:
        contexts = [self.tok_batch_encode([request.args[0]])[0][0].tolist() for request in requests]
        with self._sharing(contexts):
            return super().generate_until(requests, disable_tqdm)

    @contextmanager
    def _sharing(self, contexts: list[list[int]]) -> Iterator[None]:
        """Compute once what all contexts begin with, and let HFLM's batches continue from it."""
        common = common_beginning(self._decoding, contexts, self.snapshots)
        must_know(self.model, self.pretrained, max(common, default=0))
        if common:
            with torch.inference_mode():
                self._prefix = self._decoding.snapshot(common)
            self._counts["prompt_tokens_computed"] += len(common)
        try:
            yield
        finally:
            self._prefix = None

    def _continues(self, real: torch.Tensor, rows: torch.Tensor) -> bool:
        """Whether the first tokens of all rows [B, columns], where `real`, are the shared ones; HFLM cuts long rows."""
        if self._prefix is None or int(real.sum(dim=1).min()) < len(self._prefix) + self._decoding.least_own:
            return False
        first = real.long().argmax(dim=1, keepdim=True) + torch.arange(len(self._prefix), device=rows.device)
        return bool((rows.gather(1, first) == torch.tensor(self._prefix.tokens, device=rows.device)).all())

    def _model_call(self, inps: torch.Tensor, attn_mask=None, labels=None) -> torch.Tensor:
        """As HFLM's, for the full cache: logits of rows [B, columns] padded on the right.

        Those of a shared beginning, which HFLM does not read, are 0.
        """
        if not self._continues(torch.ones_like(inps, dtype=torch.bool), inps):
            return super()._model_call(inps, attn_mask, labels)
        cache, shared = self._decoding.continuing(self._prefix, len(inps)), len(self._prefix)
        with torch.no_grad():
            logits = self.model(inps[:, shared:], **{CACHE_ARGUMENT: cache}).logits
        return pad(logits, (0, 0, shared, 0))

    def tok_batch_encode(
        self, strings: list[str], padding_side: str = "left", left_truncate_len: int | None = None, truncation=False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As HFLM's: tokens and mask [B, columns]. Counts the contexts that are cut.

        HFLM checks only the first context for a leading BOS.
        """
        bos = self.tokenizer.bos_token
        if (
            bos
            and self.add_bos_token is not False
            and self.tokenizer("a")["input_ids"][:1] == [self.tokenizer.bos_token_id]
        ):
            strings = [string.removeprefix(bos) for string in strings]
        tokens, mask = super().tok_batch_encode(strings, padding_side, truncation=truncation)
        if left_truncate_len:
            if cut := int((mask.sum(dim=1) > left_truncate_len).sum()):
                self._counts["contexts_cut"] += cut
            tokens, mask = tokens[:, -left_truncate_len:], mask[:, -left_truncate_len:]
        return tokens, mask

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **kwargs) -> torch.Tensor:
        must_know(self.model, self.pretrained, int(context.max()))
        self._stops = Stops(self.tokenizer, tuple(filter(None, stop)))
        real = kwargs["attention_mask"].bool()
        shared = len(context) * len(self._prefix) if (continues := self._continues(real, context)) else 0
        self._counts.update(prompt_tokens_computed=int(real.sum()) - shared, prompt_tokens_shared=shared)
        if continues and self.h2o is not None:
            kwargs["prefix"] = self._prefix
        elif continues:
            order = prefix_first(context, real.cpu(), self._prefix.tokens).to(context.device)
            context, kwargs["attention_mask"] = (of.gather(1, order) for of in (context, kwargs["attention_mask"]))
            kwargs[CACHE_ARGUMENT] = self._decoding.continuing(self._prefix, len(context))
        tokens = super()._model_generate(context, max_length, stop, **kwargs)
        if self.h2o is not None:
            fed = tokens.shape[1] - context.shape[1] - 1
            lengths = kwargs["attention_mask"].sum(dim=1).tolist()
            evicted = sum(fed > 0 and self.h2o.schedule.evicts(length, fed - 1) for length in lengths)
            self._counts.update(texts=len(lengths), texts_after_eviction=evicted)
        return tokens

    def tok_decode(self, tokens, skip_special_tokens: bool = True) -> str:
        """As HFLM's, but a text ends before its first stop string. HFLM searches after special tokens are removed."""
        if self._stops is None or not skip_special_tokens or isinstance(tokens, int):
            return super().tok_decode(tokens, skip_special_tokens)
        thought = 0  # tokens before the answer, where stop strings do not count
        if isinstance(self.think_end_token, str):
            text = super().tok_decode(tokens)
            while text.count(self.think_end_token) > super().tok_decode(tokens[:thought]).count(self.think_end_token):
                thought += 1
        stop = self._stops.first(tokens[thought:])
        if stop is None:
            return super().tok_decode(tokens)
        return super().tok_decode(tokens[:thought]) + stop[0]

    def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As HFLM's, through the cache: a continuation's log-probability, and whether greedy decoding gives it."""
        for request in requests:
            if not request.args[1]:
                self._refuse("a continuation is empty; there is nothing to score", request.task_name)
        return self._by_task(super().loglikelihood, requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """The log-probability of whole documents, where each token sees what the cache holds of earlier ones.

        A document streams through one cache after the prefix token (BOS), one decode step per token. If it is longer
        than the model's positions, it is split as HFLM splits it. Each part has its own cache, with the preceding token
        as context; the last part has as much context as fits. With position_rolling positions stay within the cache, so
        the document is not split.
        """
        answer = super().loglikelihood_rolling if self.h2o is None else self._stream
        return self._by_task(answer, requests, disable_tqdm=disable_tqdm)

    def _stream(self, requests: list, disable_tqdm: bool) -> list[float]:
        owners, parts, totals = [], [], [0.0] * len(requests)
        for i, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            longest = max(len(tokens), 1) if self.h2o.position_rolling else self.max_length
            self._counts["documents_split"] += len(tokens) > longest
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, longest, context_len=1):
                owners.append(i)
                parts.append((None, *make_disjoint_window(window)))
        for i, (logprob, _) in zip(owners, self._loglikelihood_tokens(parts, disable_tqdm), strict=True):
            totals[i] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(self, requests: list, disable_tqdm: bool = False, override_bs: int | None = None) -> list:
        largest = max(chain.from_iterable(context + continuation for _, context, continuation in requests), default=0)
        must_know(self.model, self.pretrained, largest)
        pairs = [self._fit(context, continuation) for _, context, continuation in requests]
        if self.h2o is None:
            with self._sharing([context for context, _ in pairs]):
                answers = super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
            for logprob, _ in answers:
                self._must_be_number(logprob)
            return answers
        contexts, answers = self.batch_size, [None] * len(pairs)
        if contexts == "auto" and pairs:
            longest = [max(map(len, part)) for part in zip(*pairs, strict=True)]
            shared = [context for context, _ in pairs]
            beside = snapshot_bytes(decoding_of(self.model), shared, len(shared), self.snapshots)
            contexts = rows_that_fit(self.model, *longest, beside)
        settings = self.tokenizer.pad_token_id, self.softmax_dtype, self.snapshots, self._counts
        found = log_likelihoods_in_batches(self.model, pairs, contexts, *settings)
        for i, score in tqdm(found, f"scoring {self._task}", len(pairs), disable=disable_tqdm):
            self._must_be_number(score.logprob)
            answers[i] = score.logprob, score.greedy
            self._counts.update(tokens=len(pairs[i][1]), tokens_after_eviction=score.after_eviction)
            if requests[i][0] is not None:  # a part of a document is not an answer
                self.cache_hook.add_partial("loglikelihood", requests[i][0], answers[i])
        return answers

    def _fit(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """The pair, with the context cut on the left to the model's positions, as in HFLM. Raises InputError."""
        if not context or not continuation:
            self._refuse(f"a {'continuation' if context else 'context'} has no tokens; it cannot be scored")
        rolling = self.h2o is not None and self.h2o.position_rolling  # decoding then needs no positions
        room = self.max_length if rolling else self.max_length + 1 - len(continuation)
        if room < 1:
            self._refuse(
                f"a continuation has {len(continuation)} tokens, but the model has {self.max_length} "
                "positions; pass --enable_position_rolling for the heavy-hitter cache"
            )
        self._counts["contexts_cut"] += len(context) > room
        return context[-room:], continuation
