"""What each KV head's slots are worth: the loss of a text when one head alone has a narrow window.

A prompt is prefilled once. The full cache's own greedy text is then fed again (teacher forcing), all its tokens in one
forward over the prompt's slots. A *variant* is that forward with one KV head's window cut to one width, and all else
whole. Its window is slimmed after the prompt and after each token, as in decoding, so a mask tells what each query
still sees. Variants of a layer share all that comes before it: its states, queries, keys and values. From its output
projection on they are a batch, whose queries lie side by side in one product with the prompt's keys, which are never
copied.

Cost: a variant of layer i computes its text's tokens through layers i to the last, and the vocabulary. With L layers of
K KV heads, W widths and m tokens of text that is K * W * m times L * (L + 1) / 2 layers and L vocabularies. With the
shape of Llama-3-8B (436 MFLOP a token and layer, 1.05 GFLOP for the vocabulary), 4 widths, 48 tokens and a prompt of
3,000 it is 0.45 PFLOP a text: 350 TFLOP in linear layers, 40 in attention, 52 in the vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from h2optimizer.attention import scaled_logits
from h2optimizer.llama import H2OConfig
from h2optimizer.sampling import choose_greedily
from h2optimizer.utils.budgets import UNIT, Windows
from h2optimizer.utils.cache import CACHE_ARGUMENT, HHCache
from h2optimizer.utils.heads import HeadWindows
from h2optimizer.utils.memory import halving
from h2optimizer.utils.slimming import select_slots
from h2optimizer.utils.step import Rows, Step

ATTENTION_BYTES = 2**31  # float32 logits of attention that variants hold at once on a GPU, a 16th of it on a CPU
VOCABULARY_LOGITS = 2**25  # numbers in logits of the vocabulary at once


@dataclass(frozen=True)
class TextLayer:
    """One layer's slots after a prompt and the text that follows it, n tokens: `h2optimizer.utils.policies.Candidates`.

    keys and values are views [1, Hkv, n, D] of the cache's; mass and count are of the prompt's queries alone.
    """

    layer_idx: int
    keys: torch.Tensor
    values: torch.Tensor
    mass: torch.Tensor | None  # float32 [1, Hkv, n]
    count: torch.Tensor | None
    norms: torch.Tensor | None
    positions: torch.Tensor
    seed: int

    @property
    def heads(self) -> int:
        return self.keys.shape[1]

    def visible(self, cuts: Sequence[H2OConfig], received: torch.Tensor) -> torch.Tensor:
        """Which tokens the text's queries see in windows that are slimmed after the prompt and after each step.

        A slot's mass grows by what the full cache's query gives it, as a share of what this gives to all slots that are
        still there.

        Args:
            cuts: windows; all but window_length and num_heavy_hitters agree.
            received: float32 [Hkv, m, n], the attention of the text's m queries in the full cache, summed over a
                group's heads.

        Returns: bool [cuts, Hkv, m, n].
        """
        (kv_heads, steps, tokens), device = received.shape, received.device
        policy, decay, tiny = cuts[0].policy, cuts[0].score_decay, torch.finfo(torch.float32).tiny
        numbers = torch.tensor([[cut.window_length, cut.recent] for cut in cuts], device=device)
        windows, recent = numbers.T[..., None, None]  # [cuts, 1, 1] each
        at = torch.arange(tokens, device=device)
        there = (at < tokens - steps).expand(len(cuts), kv_heads, -1)
        rows = dataclasses.replace(self, mass=None if self.mass is None else self.mass.expand(len(cuts), -1, -1))
        seen = []
        for step in range(steps):
            here = tokens - steps + step  # tokens before this query's
            newest = (at >= here - recent) & (at < here)
            kept = select_slots(policy.score(rows), ~there, newest, int(windows.max()), windows)
            there = torch.zeros_like(there).scatter(2, kept, True) & there
            there = there | (at == here)
            seen.append(there)
            if rows.mass is not None:
                given = received[:, step]
                share = given * there
                share *= given.sum(-1, keepdim=True) / share.sum(-1, keepdim=True).clamp(min=tiny)
                rows = dataclasses.replace(rows, mass=rows.mass * decay + share)
        return torch.stack(seen, dim=2)


def head_cuts(widths: list[int], score: str, recent: int, score_decay: float = 1.0) -> list[H2OConfig]:
    """A head's windows, of each width beside the newest slots. Raises ValueError for what H2OConfig refuses."""
    shared = {"score": score, "score_decay": score_decay, "update_interval": 1}
    return [H2OConfig(window_length=width + recent, num_heavy_hitters=width, **shared) for width in widths]


class Calibrator:
    """Measures what cuts cost on one text after another.

    Args:
        model: an H2OForCausalLM, whole on one device.
        cuts: windows of a head; all but window_length and num_heavy_hitters agree.
        most_tokens: of a text.
        tick: called with a number of variants whenever so many more are done.
    """

    def __init__(self, model, cuts: list[H2OConfig], most_tokens: int, tick: Callable[[int], object] = int):
        self.model, self.cuts, self.most_tokens, self.tick = model, cuts, most_tokens, tick
        self.shape = model.config.num_hidden_layers, model.config.num_key_value_heads, len(cuts)

    @torch.inference_mode()
    def losses(self, prompt: list[int], end: Callable[[list[int]], list[int]] = list) -> tuple[torch.Tensor, int]:
        """What each cut costs after a prompt: nats, float64 [layers, KV heads, cuts] on the host; and of how many
        tokens.

        The loss is the KL divergence from the full cache's next-token distributions, summed over the tokens of its own
        greedy text, without the first, which the exact prefill decides for any cache. A cut as wide as prompt and text
        costs nothing.

        Args: end: cuts the greedy text, a list of tokens, where it ends.
        """
        forced = self.forced(prompt, end)
        measured = torch.zeros(self.shape, dtype=torch.float64)
        tokens = 0 if forced is None else len(prompt) + forced.step.columns - 1  # the last query's own is not slimmed
        narrow = [at for at, cut in enumerate(self.cuts) if cut.window_length < tokens]
        if forced is None or not narrow:
            self.tick(measured.numel())
            return measured, 0 if forced is None else forced.step.columns
        layers, heads, cuts = self.shape
        variants = [(head, self.cuts[at]) for at in narrow for head in range(heads)]
        losses = self.divergences(forced, [variants] * layers).view(layers, len(narrow), heads)
        measured[..., narrow] = losses.transpose(1, 2).cpu()
        self.tick(layers * heads * (cuts - len(narrow)))
        return measured, forced.step.columns

    @torch.inference_mode()
    def forced(self, prompt: list[int], end: Callable[[list[int]], list[int]] = list) -> ForcedText | None:
        """The greedy text after a prompt, to be fed again; None where it has a single token."""
        cache, text = self._read(prompt)
        text = end(text)
        if len(text) < 2:
            return None
        return ForcedText(self.model, _text_layers(cache, len(prompt) + len(text) - 1), text[:-1])

    def cut_to(self, width: int) -> H2OConfig:
        """A window of a head like the others, of this width beside the newest slots."""
        window = width + self.cuts[0].recent
        return dataclasses.replace(self.cuts[0], window_length=window, num_heavy_hitters=width)

    @torch.inference_mode()
    def divergences(self, forced: ForcedText, variants: list[list[tuple[int, H2OConfig]]]) -> torch.Tensor:
        """Of the variants of each layer, one after the other, as many at once as memory holds: float64 [variants]."""
        todo, divergences = [list(of_layer) for of_layer in variants], []

        def measure(at_once: int) -> Iterator[int]:
            for layer, of_layer in enumerate(todo):
                while of_layer:
                    heads, cuts = zip(*of_layer[:at_once], strict=True)
                    divergences.append(forced.divergence(layer, heads, cuts))
                    del of_layer[:at_once]
                    yield len(heads)

        for done in halving(measure, self._at_once(forced, max(map(len, todo)))):
            self.tick(done)
        return torch.cat(divergences)

    def _at_once(self, forced: ForcedText, most: int) -> int:
        """Variants whose attention fits into ATTENTION_BYTES."""
        budget = ATTENTION_BYTES if self.model.device.type == "cuda" else ATTENTION_BYTES // 16
        one = 4 * self.model.config.num_attention_heads * forced.step.columns * forced.step.width
        return max(1, min(budget // one, most))

    def _read(self, prompt: list[int]) -> tuple[HHCache, list[int]]:
        """The slots of a prompt and the greedy text that follows it, of which none is evicted; and the text."""
        window = len(prompt) + self.most_tokens
        whole = {"window_length": window, "num_heavy_hitters": -1, "update_interval": self.most_tokens}
        h2o = dataclasses.replace(self.cuts[0], **whole, score_every_step=False)  # mass of the prompt's queries alone
        cache, device = HHCache(h2o), self.model.device
        outputs = self.model(torch.tensor([prompt], device=device), logits_to_keep=1, **{CACHE_ARGUMENT: cache})
        text = [choose_greedily(outputs.logits[:, -1])]
        for _ in range(self.most_tokens - 1):
            logits = self.model(text[-1][:, None], **{CACHE_ARGUMENT: cache}).logits
            text.append(choose_greedily(logits[:, -1]))
        return cache, torch.cat(text).tolist()


def _text_layers(cache: HHCache, tokens: int) -> list[TextLayer]:
    """Views of the first slots of each layer."""
    layers = []
    for layer in cache.layers:
        slots = layer.slots
        keys, values = slots.read(tokens)
        ranked = (None if of is None else of[:, :, :tokens] for of in (slots.mass, slots.count, slots.norms))
        positions = slots.positions[:, :, :tokens]
        layers.append(TextLayer(layer.layer_idx, keys, values, *ranked, positions, cache.h2o.score_seed))
    return layers


class JointElimination:
    """Windows that shrink together: slots are taken where, beside all earlier cuts, it costs least.

    Losses of single heads do not add up where many heads are cut. From wide windows on, each head's further cut is
    measured while all others keep what they have left, and the cheapest cuts are made.

    Args:
        calibrator: of any cuts with the score and the newest slots to use.
        texts: to measure on, together.
        windows: [layers][KV heads] to begin with, without the newest slots.
    """

    def __init__(self, calibrator: Calibrator, texts: list[ForcedText], windows: Windows):
        self.calibrator, self.texts, self.windows = calibrator, texts, [list(of_layer) for of_layer in windows]

    def to(self, window_length: int) -> Windows:
        """Take slots until this is the windows' mean; returns them."""
        while (surplus := sum(map(sum, self.windows)) - window_length * self._heads) > 0:
            for _, layer, head, width in self._cheapest():
                taken = min(self.windows[layer][head] - width, surplus)
                if taken > 0:  # the head was not cut in this round
                    self.windows[layer][head] -= taken
                    surplus -= taken
        return tuple(map(tuple, self.windows))

    @property
    def _heads(self) -> int:
        return len(self.windows) * len(self.windows[0])

    @torch.inference_mode()
    def _cheapest(self) -> list[tuple[float, int, int, int]]:
        """Cost per slot, layer, head and width of one cut of each head, the cheapest first."""
        steps = [
            [(head, width) for head, slots in enumerate(of_layer) for width in _narrower(slots)]
            for of_layer in self.windows
        ]
        cuts = [[(head, self.calibrator.cut_to(width)) for head, width in of_layer] for of_layer in steps]
        held = [[self.calibrator.cut_to(slots) for slots in of_layer] for of_layer in self.windows]
        costs = sum(self._costs(text, held, cuts) for text in self.texts).tolist()
        best: dict[tuple[int, int], tuple[float, int, int, int]] = {}
        at = [(layer, head, width) for layer, of_layer in enumerate(steps) for head, width in of_layer]
        for cost, (layer, head, width) in zip(costs, at, strict=True):
            each = (cost / (self.windows[layer][head] - width), layer, head, width)
            best[layer, head] = min(best.get((layer, head), each), each)
        return sorted(best.values())

    def _costs(self, text: ForcedText, held, cuts) -> torch.Tensor:
        base = text.hold(held)
        return self.calibrator.divergences(text, cuts) - base


def _narrower(slots: int) -> list[int]:
    """Widths to cut a head to next: three quarters and half of its slots, in multiples of UNIT."""
    widths = (max(UNIT, int(slots * part) // UNIT * UNIT) for part in (0.75, 0.5))
    return list(dict.fromkeys(width for width in widths if width < slots))


class ForcedText:
    """A text's m tokens in one forward after a prompt: the full cache's predictions, and those of variants.

    Args:
        model: as Calibrator's.
        layers: their slots, the text's included.
        text: the tokens to feed.
    """

    @torch.inference_mode()
    def __init__(self, model, layers: list[TextLayer], text: list[int]):
        self.model, self.layers = model, layers
        device, tokens = model.device, layers[0].keys.shape[2] - len(text)
        rows = Rows(1, HeadWindows.of(tokens + len(text), 1))
        rows.append([tokens + len(text)])
        self.step = Step(rows, [tokens], [len(text)], len(text), False, False, False, [len(text)])
        states = model.model.embed_tokens(torch.tensor([text], device=device))
        positions = torch.arange(tokens, tokens + len(text), device=device)[None]
        self.rope = model.model.rotary_emb(states, positions)
        self.embedded = states
        self.masks: list[torch.Tensor | None] = [None] * len(layers)  # tokens that each query sees; None = all
        self.received: list[torch.Tensor] = []  # each layer's, for `TextLayer.visible`
        self.logprobs = self._logits(self._run()).log_softmax(-1, dtype=torch.float32)[0]  # [m, vocabulary]

    @torch.inference_mode()
    def hold(self, cuts: Sequence[Sequence[H2OConfig]]) -> torch.Tensor:
        """Keep from here on what the windows [layers][KV heads] keep; returns their divergence, float64, one number.

        `divergence` then is that of these windows with one head cut further.
        """
        self.masks = [self._mask(layer_idx, of_layer) for layer_idx, of_layer in enumerate(cuts)]
        return self._divergence_of(self._run())[0]

    def _run(self) -> torch.Tensor:
        """The last states [1, m, hidden]; `states` are those that enter each layer."""
        self.states, states = [], self.embedded
        for layer_idx in range(len(self.layers)):
            self.states.append(states)
            states = self._after(layer_idx, states, self._attend(layer_idx, states))
        return states

    @torch.inference_mode()
    def divergence(self, layer_idx: int, heads: Sequence[int], cuts: Sequence[H2OConfig]) -> torch.Tensor:
        """KL divergence of variants of one layer, each a head and its cut: float64 [variants], summed over tokens."""
        states = self.states[layer_idx]
        states = self._after(layer_idx, states, self._cut(layer_idx, heads, cuts))
        for later in range(layer_idx + 1, len(self.layers)):
            states = self._after(later, states, self._attend(later, states))
        at_once = max(1, VOCABULARY_LOGITS // self.logprobs.numel())
        return torch.cat([self._divergence_of(part) for part in states.split(at_once)])

    def _divergence_of(self, states: torch.Tensor) -> torch.Tensor:
        """Of last hidden states [variants, m, hidden]."""
        logprobs = self._logits(states).log_softmax(-1, dtype=torch.float32)
        divergence = (self.logprobs.exp() * (self.logprobs - logprobs)).sum(-1)
        return divergence.sum(-1, dtype=torch.float64).clamp(min=0.0)  # rounding makes nothing a little less than that

    def _mask(self, layer_idx: int, cuts: Sequence[H2OConfig]) -> torch.Tensor:
        """What the queries of each head see in a window of its own: bool [Hkv, m, n]."""
        different = list(dict.fromkeys(cuts))
        visible = self.layers[layer_idx].visible(different, self.received[layer_idx])
        return torch.stack([visible[different.index(cut), head] for head, cut in enumerate(cuts)])

    def _cut(self, layer_idx: int, heads: Sequence[int], cuts: Sequence[H2OConfig]) -> torch.Tensor:
        """The layer's attention in each variant: [variants, m, Hq * D]. It differs from the whole in one KV head."""
        projected, kv_heads = self._project(layer_idx, self.states[layer_idx]), self.layers[layer_idx].heads
        whole = self._attend_to(layer_idx, projected, self.masks[layer_idx])
        by_head = whole.expand(len(heads), -1, -1).unflatten(-1, (kv_heads, -1)).clone()
        different = list(dict.fromkeys(cuts))
        visible = self.layers[layer_idx].visible(different, self.received[layer_idx])
        for cut, mask in zip(different, visible, strict=True):  # all heads at once are hardly more work than one
            narrow = self._attend_to(layer_idx, projected, mask).unflatten(-1, (kv_heads, -1))
            for variant, head in enumerate(heads):
                if cuts[variant] == cut:
                    by_head[variant, :, head] = narrow[0, :, head]
        return by_head.flatten(2)

    # The model's layers

    def _project(self, layer_idx: int, states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Rotated query and key, and value [variants, heads, m, D]."""
        layer = self.model.model.layers[layer_idx]
        attention = layer.self_attn
        query, key, value = attention.heads_of(attention.project(layer.input_layernorm(states)))
        if attention.rotates:
            query, key = apply_rotary_pos_emb(query, key, *self.rope)
        return query, key, value

    def _attend(self, layer_idx: int, states: torch.Tensor) -> torch.Tensor:
        """Attention over the prompt's slots and the variant's own tokens: [variants, m, Hq * D]."""
        return self._attend_to(layer_idx, self._project(layer_idx, states), self.masks[layer_idx])

    def _attend_to(self, layer_idx: int, projected, mask: torch.Tensor | None) -> torch.Tensor:
        """Causal attention over the prompt's slots, which all variants share, and over their own tokens.

        mask: bool [Hkv, m, n], the tokens that each query sees; None if all up to its own.
        """
        query, key, value = projected
        variants, kv_heads, columns = len(query), key.shape[1], key.shape[2]
        keys, values = (of[:, :, :-columns] for of in (self.layers[layer_idx].keys, self.layers[layer_idx].values))
        scaling = self.model.model.layers[layer_idx].self_attn.scaling
        grouped = query.unflatten(1, (kv_heads, -1))  # [variants, Hkv, G, m, D]
        side_by_side = grouped.transpose(0, 1).flatten(1, 2)[None]  # [1, Hkv, variants * G, m, D]
        shared = scaled_logits(side_by_side, keys, scaling)[0].unflatten(1, (variants, -1)).transpose(0, 1)
        own = scaled_logits(grouped, key, scaling)
        own.masked_fill_(torch.ones_like(own[0, 0, 0], dtype=torch.bool).triu(1), -torch.inf)
        if mask is not None:
            shared.masked_fill_(~mask[:, None, :, :-columns], -torch.inf)
            own.masked_fill_(~mask[:, None, :, -columns:], -torch.inf)
        total = torch.logaddexp(shared.logsumexp(-1, keepdim=True), own.logsumexp(-1, keepdim=True))
        shared, own = (of.sub_(total).exp_() for of in (shared, own))
        if len(self.received) == layer_idx:
            self.received.append(torch.cat([shared, own], dim=-1)[0].sum(dim=1, dtype=torch.float32))
        shared, own = (of.to(value.dtype) for of in (shared, own))
        # [Hkv, variants * G * m, n - m] @ [Hkv, n - m, D]
        output = (shared.transpose(0, 1).flatten(1, 3) @ values[0]).view(kv_heads, variants, -1, columns, key.shape[3])
        output = output.transpose(0, 1) + (own.flatten(2, 3) @ value).view(grouped.shape)
        return output.flatten(1, 2).transpose(1, 2).flatten(2)

    def _after(self, layer_idx: int, states: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """The states after a layer, of those that enter it and its attention."""
        layer = self.model.model.layers[layer_idx]
        states = states + layer.self_attn.o_proj(attended)
        return states + layer.mlp(layer.post_attention_layernorm(states))

    def _logits(self, states: torch.Tensor) -> torch.Tensor:
        return self.model.lm_head(self.model.model.norm(states))
