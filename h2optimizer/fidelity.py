"""Measures what a bounded cache changes, on the full cache's own texts; no reference texts are needed.

The full cache's greedy texts are fed to both caches token by token (teacher forcing). Every step then compares two
distributions of the next token after the same tokens, and one different token does not spoil the rest.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch

from h2optimizer.decoding import BoundedDecoding, FullDecoding, decoding_of

Prefill = Callable[[BoundedDecoding | FullDecoding], torch.Tensor]  # starts a decoding, and returns its logits


class ForcedDecode:
    """A batch of rows whose next tokens are given, over the model's own kind of cache.

    Args:
        model: an H2OForCausalLM, or its stock model.
        prompts: tokens of each row; equal prompts are computed once.
        attentions: with a full cache, keep each step's attention probabilities. The model must use eager attention from
            the first step on.
        prefill: starts the decoding in place of its own prefill, from beginnings that other prompts share.

    `logits` [B, vocabulary] are those of each row's next token, at first of the one after the prompt.
    """

    @torch.inference_mode()
    def __init__(
        self,
        model,
        prompts: list[list[int]],
        pad_token_id: int = 0,
        attentions: bool = False,
        prefill: Prefill | None = None,
    ):
        self.model, self.attentions, self._wanted = model, (), attentions
        self._decoding = decoding_of(model, pad_token_id=pad_token_id)
        self.logits = self._decoding.prefill(prompts) if prefill is None else prefill(self._decoding)
        longest = max(map(len, prompts))
        self.padding = torch.tensor([longest - len(prompt) for prompt in prompts])  # columns before its first token

    @property
    def cache(self):
        """An HHCache, or the stock model's DynamicCache."""
        return self._decoding.cache

    def statistics(self, prompt: int, text: int) -> dict[str, int]:
        """What the cache holds of a row of so many tokens, the text's last one not fed; see `BoundedDecoding`."""
        return self._decoding.statistics(prompt, text)

    @torch.inference_mode()
    def feed(self, tokens: list[int] | torch.Tensor) -> None:
        """Feed these tokens [B] in one step. Then `logits` are of the next tokens and `attentions` of this step."""
        tokens = torch.as_tensor(tokens, device=self.model.device)
        outputs = self._decoding.feed(tokens[:, None], **({"output_attentions": True} if self._wanted else {}))
        self.logits, self.attentions = outputs.logits[:, -1], outputs.attentions if self._wanted else ()


class Recorded:
    """The full cache's side of several comparisons on the same texts, computed once; see `compare`.

    It takes the place of a ForcedDecode over the full cache, without its attention.

    Args:
        stock, prompts, texts, pad_token_id: as `compare`'s.
    """

    attentions = ()

    def __init__(self, stock, prompts: list[list[int]], texts: list[list[int]], pad_token_id: int = 0):
        full = ForcedDecode(stock, prompts, pad_token_id)
        self._steps, self._rows, self._at = [full.logits], slice(None), 0
        for tokens in _columns(texts, pad_token_id, full.logits.device)[:-1]:
            full.feed(tokens)
            self._steps.append(full.logits)

    def of(self, rows: list[int]) -> Recorded:
        """The beginning of these rows' texts."""
        beginning = copy.copy(self)
        beginning._rows, beginning._at = rows, 0
        return beginning

    @property
    def logits(self) -> torch.Tensor:
        return self._steps[self._at][self._rows]

    def feed(self, tokens) -> None:
        self._at += 1


def _columns(texts: list[list[int]], pad_token_id: int, device: torch.device) -> torch.Tensor:
    """The texts' tokens step by step, [longest, B], padded on the right."""
    longest = max(map(len, texts))
    return torch.tensor([text + [pad_token_id] * (longest - len(text)) for text in texts], device=device).T


@dataclass
class Fidelity:
    """Sums over a text's tokens except the first, which the exact prefill decides for any cache; and what was held."""

    tokens: int = 0
    agreed: int = 0  # tokens whose most probable prediction is the same
    kl: float = 0.0  # Kullback-Leibler divergence from the full cache's distribution, nats
    nll: float = 0.0  # negative log-likelihood of the text, nats; its mean's exponential is the perplexity
    mass_lost: float = 0.0  # share of the full cache's attention that falls on evicted tokens, mean of layers and heads
    slots_kept: int = 0  # of a head, at the text's end
    kv_bytes: int = 0  # of the row's part of the cache


SUMS = ("tokens", "agreed", "kl", "nll", "mass_lost")  # Fidelity's fields that add up over tokens


@dataclass
class Retention:
    """Which tokens of one row a bounded cache held, step by step."""

    prompt_tokens: int
    last_held: torch.Tensor  # int16 [layers, KV heads, tokens]: the last step that could attend to it
    mass_lost: list[list[float]]  # [steps][layers], as Fidelity's


def compare(
    stock,
    model,
    prompts: list[list[int]],
    texts: list[list[int]],
    pad_token_id: int = 0,
    follow: int | None = None,
    recorded: Recorded | None = None,
    prefills: tuple[Prefill | None, Prefill | None] = (None, None),
) -> tuple[list[Fidelity], Retention | None]:
    """Teacher-force texts through a bounded cache and the full cache, side by side.

    Step t, from 1, feeds text token t - 1 and predicts token t. Step 0 is the prompt's, with all tokens held.

    Args:
        stock: the stock model that produced the texts; its attention is eager during the steps.
        model: an H2OForCausalLM with the same weights, or `stock` itself.
        follow: the row whose tokens are followed.
        recorded: the full cache's side of these very texts, for a bounded cache. Saves time; mass_lost is then 0, and
            nothing can be followed.
        prefills: those of `stock` and of `model`, if not their own; see ForcedDecode.

    Returns: one Fidelity per row, and the followed row's Retention; None for `stock`, which evicts nothing.
    """
    steps = max(map(len, texts))
    ours = ForcedDecode(model, prompts, pad_token_id, prefill=prefills[1]) if model is not stock else None
    attention = ours is not None and recorded is None
    full = recorded or ForcedDecode(stock, prompts, pad_token_id, attention, prefills[0])
    device = full.logits.device
    lengths = torch.tensor([len(text) for text in texts], device=device)
    said = _columns(texts, pad_token_id, device)
    sums = torch.zeros(4, len(prompts), dtype=torch.float64, device=device)  # agreed, kl, nll, mass_lost
    last_held, lost_there, held = None, [], None
    if follow is not None and ours is not None:
        own = len(prompts[follow])  # the column of the first step's token
        shape = len(ours.cache.layers), ours.cache.layers[0].slots.heads, own + len(texts[follow])
        last_held = torch.zeros(shape, dtype=torch.int16, device=device)  # the last column is empty slots'
    implementation = stock.config._attn_implementation
    try:
        stock.set_attn_implementation("eager" if attention else implementation)
        for step in range(1, steps):
            if attention:
                held = [ours.cache.positions(layer) for layer in range(len(ours.cache.layers))]
            if ours is not None:
                ours.feed(said[step - 1])
            full.feed(said[step - 1])
            wanted = full.logits.log_softmax(-1, dtype=torch.float32)
            got = wanted if ours is None else ours.logits.log_softmax(-1, dtype=torch.float32)
            figures = [
                (wanted.argmax(-1) == got.argmax(-1)).double(),
                (wanted.exp() * (wanted - got)).sum(-1).double(),
                -got.gather(1, said[step][:, None])[:, 0].double(),
                torch.zeros(len(prompts), dtype=torch.float64, device=device),
            ]
            if attention:
                lost = torch.stack([_mass_lost(*of, full.padding) for of in zip(full.attentions, held, strict=True)])
                figures[3] = lost.mean(dim=0).double()
                if last_held is not None and step < len(texts[follow]):
                    there = torch.stack([positions[follow] for positions in held]).long()
                    last_held.scatter_(2, there % last_held.shape[-1], step)  # -1, no token, is the last column
                    last_held[..., own + step - 1] = step
                    lost_there.append(lost[:, follow])
            sums += torch.stack(figures).masked_fill(step >= lengths, 0.0)
    finally:
        stock.set_attn_implementation(implementation)
    retention = None
    if last_held is not None:
        shares = [[round(share, 6) for share in lost.tolist()] for lost in lost_there]
        retention = Retention(len(prompts[follow]), last_held[..., :-1].cpu(), shares)
    fidelity = []
    for prompt, text, (agreed, *others) in zip(prompts, texts, sums.T.tolist(), strict=True):
        held = (ours or full).statistics(len(prompt), len(text))
        sizes = held["slots_kept"], held["kv_bytes"]
        fidelity.append(Fidelity(max(len(text) - 1, 0), round(agreed), *others, *sizes))
    return fidelity, retention


def _mass_lost(attention: torch.Tensor, held: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    """Share [B] of a step's attention that falls on tokens not held, averaged over heads.

    attention: probabilities [B, Hq, 1, columns] of the full cache, the last column the step's own; held: positions
    [B, Hkv, slots] there before the step, -1 for none; padding [B]: columns before position 0.
    """
    grouped = attention[:, :, 0].float().unflatten(1, (held.shape[1], -1)).mean(dim=2)  # [B, Hkv, columns]
    columns = (held.long() + padding.to(held.device)[:, None, None]).clamp(min=0)
    kept = grouped.gather(2, columns).masked_fill(held < 0, 0.0).sum(-1) + grouped[..., -1]
    return (1 - kept / grouped.sum(-1)).clamp(min=0.0).mean(dim=1)
