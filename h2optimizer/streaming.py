"""One endless sequence: turns are fed and answered over one cache, which is slimmed to make room for each turn.

This follows the streams of H2O and StreamingLLM (arXiv 2309.17453), with any policy of this cache. With
position_rolling no position exceeds window + interval, so the model's trained positions never run out.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from h2optimizer.batching import Sequence
from h2optimizer.decoder import token_logprobs
from h2optimizer.decoding import decoding_of
from h2optimizer.sampling import RowSampler, choose_greedily


class Stream:
    """A model, its cache, and how far they have come.

    Turns are fed in pieces. `evict_for_space` first makes room for each piece in the window's recent slots, so a piece
    is at most half as long as those, or `prefill_chunk` if that is shorter. With a stock model, the baseline, the cache
    is full and grows until memory runs out.

    Args:
        model: an H2OForCausalLM, or its stock model.
        eos_token_ids: tokens that end a reply.
        temperature, top_p: 0 and 1 decode greedily; otherwise tokens are sampled, reproducibly by `seed`.
    """

    def __init__(self, model, eos_token_ids: set[int], temperature: float = 0.0, top_p: float = 1.0, seed: int = 0):
        self.model, self.eos, self.h2o = model, eos_token_ids, getattr(model, "h2o", None)
        self.pending: int | None = None  # the last token of a reply: emitted, but not fed yet
        self.fed = 0  # tokens that the cache has seen
        self._logits: torch.Tensor | None = None  # [1, vocabulary], of the next token
        self._sampler, self._row = None, Sequence([], 1, temperature, top_p, (seed,))
        if temperature:
            self._sampler = RowSampler(1, model.device, nucleus=top_p < 1)
        self.decoding = decoding_of(model, self._sampler or choose_greedily, eos_token_ids)
        self.decoding.open()
        self.decoding.prepare()

    @property
    def cache(self):
        """An HHCache, or the stock model's DynamicCache."""
        return self.decoding.cache

    @property
    def piece(self) -> int:
        """How many tokens of a turn are fed at once."""
        return self.decoding.piece

    def pieces(self, tokens: list[int]) -> Iterator[list[int]]:
        """The pieces in which a turn's tokens are fed. Calling `feed` with each is equivalent to one call.

        The first leaves room for the last token of the reply before, and is empty if there is room for no more.
        """
        room = self.piece - (self.pending is not None)
        yield tokens[:room]
        for begin in range(room, len(tokens), self.piece):
            yield tokens[begin : begin + self.piece]

    @torch.inference_mode()
    def feed(self, tokens: list[int]) -> tuple[float, int]:
        """Feed a turn's tokens, preceded by the last token of the reply before (`pending`): at least one in all.

        Returns: the sum of their negative log-likelihoods in nats, given what the cache held at the time, and how many
        were scored: all but the stream's first, and the first after a reply whose last token was removed.
        """
        pieces = list(self.pieces(tokens))
        said = [] if self.pending is None else [self.pending]
        self.pending = None
        skip = int(self._logits is None)  # the stream's first token, or a reply's last, scored when it was said
        nll, scored = 0.0, len(said) + len(tokens) - skip
        for piece in pieces:
            part = torch.tensor([said + piece], device=self.model.device)
            said = []
            self.decoding.make_room(part.shape[1])
            logits = self.decoding.feed(part).logits[0]
            if len(of := part[0, skip:]):
                before = logits[:-1] if self._logits is None else torch.cat([self._logits, logits[:-1]])
                nll -= float(token_logprobs(before[-len(of) :], of).sum(dtype=torch.float64))
            self._logits, skip = logits[-1:], 0
            self.fed += part.shape[1]
        return nll, scored

    @torch.inference_mode()
    def say(self, max_tokens: int) -> Iterator[tuple[int, float]]:
        """Yield a reply's tokens as they are decoded, each with its log-probability, up to an end-of-sequence token.

        The last token is `pending`: it is fed with the next turn, and may be removed before.
        """
        choose = choose_greedily if self._sampler is None else self._sampler.at([0], [self._row])
        tokens = choose(self._logits)
        logprob, self._logits = token_logprobs(self._logits, tokens), None
        self.decoding.start(tokens, [0])
        for step in range(max_tokens):
            if step:
                if self._sampler is not None:
                    self._sampler.draw([self._row], 1)
                tokens, logprob = (got[:, 0] for got in self.decoding.decode(1))
                self.fed += 1
            self.pending = int(tokens)
            yield self.pending, float(logprob)
            if self.pending in self.eos:
                break

    @property
    def slots(self) -> int:
        """Slots of the cache that are filled."""
        return self.decoding.slots

    @property
    def kv_bytes(self) -> int:
        """Bytes of the cache."""
        return self.decoding.kv_bytes
