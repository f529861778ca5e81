"""One sequence without end: turns are fed and answered over one cache, which is slimmed to make room for each turn.

As H2O's and StreamingLLM's (arXiv 2309.17453) streams do, with any of this cache's policies. With position_rolling no
position passes the window and an interval, so that the model's trained positions never run out.
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

    Turns are fed in pieces. Room for each is made first (`evict_for_space`), out of the window's recent slots, so that
    a piece takes at most half of those, or `prefill_chunk` where that is less. With stock Llama, the baseline, the
    cache is full and grows until memory ends.

    Args:
        model: an H2OLlamaForCausalLM, or a LlamaForCausalLM.
        eos_token_ids: tokens that end a reply.
        temperature, top_p: 0 and 1 decode greedily; else each token is drawn, `seed` fixing all of them.
    """

    def __init__(self, model, eos_token_ids: set[int], temperature: float = 0.0, top_p: float = 1.0, seed: int = 0):
        self.model, self.eos, self.h2o = model, eos_token_ids, getattr(model, "h2o", None)
        self.pending: int | None = None  # the last token of a reply: said, and not fed yet
        self.fed = 0  # tokens that the cache has seen
        self._logits: torch.Tensor | None = None  # [1, vocabulary], of the token after those fed
        self._sampler, self._row = None, Sequence([], 1, temperature, top_p, (seed,))
        if temperature:
            self._sampler = RowSampler(1, model.device, nucleus=top_p < 1)
        self.decoding = decoding_of(model, self._sampler or choose_greedily, eos_token_ids)
        self.decoding.open()
        self.decoding.prepare()

    @property
    def cache(self):
        """An HHCache, or stock Llama's DynamicCache."""
        return self.decoding.cache

    @property
    def piece(self) -> int:
        """Tokens of a turn that are fed at once."""
        return self.decoding.piece

    def pieces(self, tokens: list[int]) -> Iterator[list[int]]:
        """A turn's tokens as they are fed at once; `feed` may be called with each, which comes to the same.

        The first has room for the reply's last token, and is empty where there is none for more.
        """
        room = self.piece - (self.pending is not None)
        yield tokens[:room]
        for begin in range(room, len(tokens), self.piece):
            yield tokens[begin : begin + self.piece]

    @torch.inference_mode()
    def feed(self, tokens: list[int]) -> tuple[float, int]:
        """Let the cache see a turn's tokens, after the last of the reply before it (`pending`): at least one in all.

        Returns: the sum of their negative log-likelihoods in nats, each after what the cache held then, and how many
        were scored: all but the stream's first, and the first after a reply whose last token was taken away.
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
        """A reply, token by token as it is decoded, each with its log-probability; ends with an end-of-sequence token.

        The last token is fed with the next turn: `pending`, which may be taken away before.
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
