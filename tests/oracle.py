"""H2O in plain Python loops and float64: the authority that every backend, kernel and cache is tested against.

The algorithm is the Heavy-Hitter Oracle (H2O, arXiv 2306.14048): the cache keeps the most recent tokens and, of the
older ones, those that have received the most attention probability. It is written for one row without padding, as lists
of slots and loops over layers, heads and queries, so that reading it is enough to check it against the paper. Nothing
here is shared with the code under test.

Stock Llama computes RMSNorm and the RoPE angles in float32 even after `model.double()`; the oracle computes both in
float64, so it agrees with `model.double()` to float32 precision and not to float64's.
"""

import copy
import math
from dataclasses import dataclass

import torch


@dataclass
class Slot:
    """One cached token, as one KV head of one layer sees it."""

    position: int  # original position, counted over all tokens seen
    key: torch.Tensor  # [head_dim] float64, not rotated
    value: torch.Tensor  # [head_dim] float64
    mass: float = 0.0  # attention probability received
    count: float = 0.0  # queries that could see this slot while adding mass; decays as mass does
    norm: float = 0.0  # L2 norm of the value as it came
    stored: bool = False  # whether key and value are what 8-bit slots hold


class Oracle:
    """H2O on a copy of a stock `LlamaForCausalLM`, or a family like it, in float64, for a single row of tokens.

    The arguments are the `H2OConfig` flags of the same names, and `score_seed` for score="random". The step clock is
    the number of forwards since `reset`; slimming is due after a forward of several tokens, and after every
    `update_interval`-th forward, the first included.
    """

    def __init__(
        self,
        model,
        *,
        window_length,
        num_heavy_hitters=-1,
        update_interval=1,
        score="mass",
        score_every_step=True,
        score_decay=1.0,
        score_norm="sum",
        score_queries=None,
        group_reduce="sum",
        position_rolling=False,
        score_seed=0,
        prefill_chunk=None,
        head_budgets="even",
        slots="auto",
    ):
        self.model = copy.deepcopy(model).double().eval()
        self.inv_freq = model.model.rotary_emb.inv_freq.double()
        self.rope_scaling = model.model.rotary_emb.attention_scaling
        config = model.config
        self.num_query_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.group_size = self.num_query_heads // self.num_kv_heads
        self.window_length = window_length
        self.score = score
        layers = range(config.num_hidden_layers)
        self.windows = head_budgets
        if head_budgets == "even":
            self.windows = [[window_length] * self.num_kv_heads for _ in layers]
        self.recent = window_length - self._heavy(num_heavy_hitters)
        assert self.recent >= 1 and all(window >= self.recent for row in self.windows for window in row)
        assert score in ("mass", "value_mass", "sink", "streaming_llm", "random")
        assert score_norm in ("sum", "mean") and group_reduce in ("sum", "first")
        self.update_interval = update_interval
        self.score_norm, self.score_seed = score_norm, score_seed
        self.score_every_step, self.score_decay, self.score_queries = score_every_step, score_decay, score_queries
        self.group_reduce = group_reduce
        self.position_rolling = position_rolling
        self.prefill_chunk = prefill_chunk
        assert slots in ("auto", "int8")
        self.int8 = slots == "int8"
        self.reset()

    def reset(self):
        """Forgets all tokens and sets the step clock back to 0."""
        # self.cache[layer][kv_head] is a list of slots
        self.cache = [[[] for _ in range(self.num_kv_heads)] for _ in self.model.model.layers]
        self.clock = 0
        self.seen = 0
        self.evictions = 0

    def length(self) -> int:
        """Number of slots kept, by the fullest head where heads have windows of their own."""
        return max(len(slots) for heads in self.cache for slots in heads)

    def _heavy(self, number):
        """How many slots of a window are heavy hitters; the mean, where heads have windows of their own."""
        if isinstance(number, str):
            part, whole = map(int, number.split("/"))
            return min(self.window_length * part // whole, self.window_length - 1)
        if number == -1:
            return 4 if self.score == "streaming_llm" else self.window_length // 2
        return number

    def positions(self, layer) -> list[list[int]]:
        """Original positions of the kept slots, ascending, for each KV head."""
        return [[slot.position for slot in slots] for slots in self.cache[layer]]

    def mass(self, layer) -> list[list[float]]:
        """Mass of the kept slots, in the order of `positions`, for each KV head."""
        return [[slot.mass for slot in slots] for slots in self.cache[layer]]

    @torch.no_grad()
    def forward(self, tokens: list[int]) -> torch.Tensor:
        """Attends over slots and `tokens`, then slims if due. Returns float64 logits [len(tokens), vocab].

        With `prefill_chunk`, more tokens than that are taken so many at a time, and slimmed after each.
        """
        chunk = self.prefill_chunk or len(tokens)
        logits = []
        for begin in range(0, len(tokens), chunk):
            logits.append(self._forward(tokens, begin, min(begin + chunk, len(tokens))))
        self.clock += 1
        return torch.cat(logits)

    def _forward(self, tokens, begin, end):
        """One chunk of a forward: tokens[begin:end]."""
        slimming_due = len(tokens) > 1 or self.clock % self.update_interval == 0
        decodes = self.clock > 0 and len(tokens) == 1
        first_adding_query = begin  # queries before this one add no mass
        if not (self.score_every_step or slimming_due):
            first_adding_query = end
        elif self.clock == 0 and self.score_queries is not None:
            last = len(tokens)
            if self.length() + end - begin > min(min(row) for row in self.windows):
                last = end  # slots are dropped before the prompt's last queries are there to rank them
            first_adding_query = max(begin, last - self.score_queries)
        first_chunk, tokens = begin == 0, tokens[begin:end]
        hidden = self.model.model.embed_tokens(torch.tensor(tokens))
        for layer, block in enumerate(self.model.model.layers):
            normed = rms_norm(block.input_layernorm, hidden)
            hidden = hidden + self._attention(
                layer, block.self_attn, normed, first_adding_query - begin, first_chunk, decodes
            )
            hidden = hidden + block.mlp(rms_norm(block.post_attention_layernorm, hidden))
        logits = self.model.lm_head(rms_norm(self.model.model.norm, hidden))
        self.seen += len(tokens)
        self._store()  # tokens of a longer forward have seen each other as they came
        if slimming_due:
            self._slim(0)
        return logits

    def generate(self, prompt: list[int], max_new_tokens: int, eos=None) -> list[int]:
        """Greedy decoding from an empty cache. Returns the new tokens, `eos` included; the last one is not cached."""
        self.reset()
        new_tokens, block = [], prompt
        while len(new_tokens) < max_new_tokens:
            token = int(self.forward(block)[-1].argmax())
            new_tokens.append(token)
            if token == eos:
                break
            block = [token]
        return new_tokens

    def wait(self):
        """A step to which other rows of a batch bring a token, and this one none."""
        due = self.clock % self.update_interval == 0
        self.clock += 1
        if due:
            self._slim(0)

    def evict_for_space(self, space_needed: int):
        """Slims to window_length - space_needed slots, taken from the recent part, before a turn of that many tokens.

        Raises ValueError when `space_needed` does not fit into the recent part.
        """
        if space_needed > self.recent:
            raise ValueError(f"{space_needed} slots do not fit into the recent part of {self.recent}")
        self._slim(space_needed)

    def _store(self):
        """Rounds the keys and values of new tokens to 8 bits, if that is how slots hold them."""
        for block, heads in zip(self.model.model.layers, self.cache, strict=True):
            as_it_is = self.position_rolling or not rotates(block.self_attn)
            for slot in [slot for slots in heads for slot in slots]:
                if not self.int8 or slot.stored:
                    continue
                if as_it_is:
                    slot.key = in_8_bits(slot.key)
                else:  # the cache holds it rotated
                    assert self.rope_scaling == 1.0
                    slot.key = self._rotate(in_8_bits(self._rotate(slot.key, slot.position)), -slot.position)
                slot.value, slot.stored = in_8_bits(slot.value), True

    def _attention(self, layer, attn, hidden, first_adding_query, decays, decodes):
        """Appends a slot per row of `hidden` [tokens, hidden_size] and attends causally; returns the same shape."""
        n = hidden.shape[0]
        queries = attn.q_proj(hidden).view(n, self.num_query_heads, -1)
        keys = attn.k_proj(hidden).view(n, self.num_kv_heads, -1)
        values = attn.v_proj(hidden).view(n, self.num_kv_heads, -1)
        if hasattr(attn, "q_norm"):  # Qwen3
            queries, keys = rms_norm(attn.q_norm, queries), rms_norm(attn.k_norm, keys)
        turns = rotates(attn)
        head_dim = queries.shape[-1]
        output = torch.zeros(n, self.num_query_heads, head_dim, dtype=torch.float64)
        for kv_head, slots in enumerate(self.cache[layer]):
            before = len(slots)
            for i in range(n):
                norm = float(values[i, kv_head].norm())
                slots.append(Slot(self.seen + i, keys[i, kv_head], values[i, kv_head], norm=norm))
            if decodes:
                self._store()  # its own query sees it as it is stored
            if first_adding_query < n and decays:
                for slot in slots:  # once a forward, however many queries it has; new slots hold 0
                    slot.mass *= self.score_decay
                    slot.count *= self.score_decay
            held_keys, held_values = (torch.stack([getattr(slot, name) for slot in slots]) for name in ("key", "value"))
            own_queries = queries[:, kv_head * self.group_size : (kv_head + 1) * self.group_size]
            if turns:
                positions = range(len(slots)) if self.position_rolling else [slot.position for slot in slots]
                positions = torch.tensor(positions)
                held_keys = self._rotate(held_keys, positions)
                own_queries = self._rotate(own_queries, positions[before:, None])  # each at its own key's position

            for i in range(n):
                visible = before + i + 1
                for g in range(self.group_size):
                    scores = held_keys[:visible] @ own_queries[i, g] / math.sqrt(head_dim)
                    probabilities = softmax(scores.tolist())
                    mixed = torch.tensor(probabilities, dtype=torch.float64) @ held_values[:visible]
                    output[i, kv_head * self.group_size + g] = mixed
                    if i >= first_adding_query and (g == 0 or self.group_reduce == "sum"):
                        for j in range(visible):
                            slots[j].mass += probabilities[j]
                if i >= first_adding_query:
                    for j in range(visible):
                        slots[j].count += 1.0  # one query, however many heads of the group it has
        return attn.o_proj(output.view(n, -1))

    def _rotate(self, vectors, positions):
        """RoPE: turns the pairs (vector[d], vector[d + head_dim / 2]) of each vector by its position * inv_freq[d]."""
        angles = torch.as_tensor(positions)[..., None] * self.inv_freq
        cos, sin = torch.cos(angles) * self.rope_scaling, torch.sin(angles) * self.rope_scaling
        first, second = vectors.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    def _slim(self, space):
        """Keeps each head's newest slots, but for `space` of them, and its heavy hitters."""
        evicts = False
        for layer, heads in enumerate(self.cache):
            for kv_head, slots in enumerate(heads):
                heavy, recent = self.windows[layer][kv_head] - self.recent, self.recent - space
                if len(slots) <= heavy + recent:
                    continue
                older = range(len(slots) - recent)
                scores = [self._score(slots[j], layer, kv_head) for j in older]
                best_first = sorted(older, key=lambda j: (-scores[j], j))  # the older slot wins a tie
                heavy_hitters = sorted(best_first[:heavy])
                heads[kv_head] = [slots[j] for j in heavy_hitters] + slots[len(slots) - recent :]
                evicts = True
        self.evictions += evicts

    def _score(self, slot, layer, kv_head):
        """What heavy hitters are chosen by: the greatest scores stay."""
        if self.score in ("sink", "streaming_llm"):
            return -slot.position
        if self.score == "random":
            return pseudo_random(slot.position, layer, kv_head, self.score_seed)
        mass = slot.mass
        if self.score_norm == "mean":
            mass = mass / slot.count if slot.count > 0 else 0.0
        if self.score == "value_mass":
            return mass * slot.norm
        return mass


def rotates(attn):
    """Whether a layer has RoPE: in SmolLM3 some have none."""
    return bool(getattr(attn, "use_rope", True))


def rms_norm(norm, hidden):
    """RMSNorm with the weight and epsilon of the module `norm`, in float64 throughout."""
    return norm.weight * hidden / torch.sqrt(hidden.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)


def softmax(scores):
    """Softmax of a list of floats, as a list."""
    greatest = max(scores)
    exps = [math.exp(score - greatest) for score in scores]
    total = sum(exps)
    return [e / total for e in exps]


def in_8_bits(vector):
    """A vector's numbers as whole multiples, of at most 127, of a 127th of the largest magnitude."""
    scale = max(abs(float(x)) for x in vector) / 127
    if scale == 0:
        return vector
    return torch.tensor([round(float(x) / scale) * scale for x in vector], dtype=torch.float64)


def pseudo_random(position, layer, kv_head, seed):
    """A fixed 24-bit integer for a slot: the four numbers, hashed in 32-bit unsigned arithmetic."""
    x = position * 0x9E3779B1 + layer * 0x85EBCA77 + kv_head * 0xC2B2AE3D + seed * 0x27D4EB2F
    x &= 0xFFFFFFFF
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    x ^= x >> 16
    return x >> 8
