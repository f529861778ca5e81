"""Padding and chunks: which token of which row is in which column of a forward, and where it is computed."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from h2optimizer.utils.cache import HHCache
from h2optimizer.utils.memory import to_device


class Columns:
    """The columns of one forward. Each row's tokens move to the left, in order, so causal attention needs no mask.

    Args:
        batch_size, columns: of the forward's inputs.
        attention_mask: [B, columns] or [B, columns so far, these included], 1 for tokens and 0 for padding in any
            pattern; None if all are tokens. Reading it waits for the device.
        cache: the cache of the forward.

    Attributes:
        new: tokens of each row.
        real: bool [B, columns] on the host; None if all are tokens.
        gaps: positions that each row skips, as in stock models: padding between two tokens. None if there are none.

    Raises: ValueError for a malformed mask, or one that contradicts what the cache has seen.
    """

    def __init__(self, batch_size: int, columns: int, attention_mask: torch.Tensor | None, cache: HHCache):
        if not batch_size or not columns:
            raise ValueError(f"the input has no {'columns' if batch_size else 'rows'}: give at least one token per row")
        self.columns, self.real, self.gaps = columns, None, None
        self.new = [columns] * batch_size
        if attention_mask is not None:
            mask = _read(attention_mask, batch_size, columns)
            if mask.shape[1] > columns:
                cache.check_past(mask[:, :-columns])
            real = mask[:, -columns:]
            if not real.all():
                self.real, self.new = real, real.sum(dim=1).tolist()
        if self.real is not None:
            order, new = torch.arange(columns), torch.tensor(self.new)[:, None]
            before = self.real.cumsum(dim=1)  # tokens up to each column
            place = torch.where(self.real, before - 1, new + order - before)  # where a column is computed
            self._source = torch.empty_like(place).scatter_(1, place, order.expand_as(place))
            # Padding after a token gives that token's output; padding before all tokens gives its own.
            self._shown = torch.where(before > 0, before - 1, place)
            # A token's place is the number of tokens to its left; everything else there is padding.
            first = self.real.long().argmax(dim=1, keepdim=True)
            self._gap = torch.where(order < new, self._source - first - order, 0).cummax(dim=1).values
            if (gaps := self._gap[:, -1]).any():
                self.gaps = gaps.tolist()

    def to_left(self, states: torch.Tensor) -> torch.Tensor:
        """[B, columns(, H)] with each row's tokens first and its padding last."""
        return states if self.real is None else _take(states, self._source)

    def spread(self, positions: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        """Positions [1 or B, end - begin] of the chunk's tokens, skipping the row's gaps so far."""
        return positions if self.gaps is None else positions + self._gap[:, begin:end].to(positions.device)

    def chunks(self, size: int | None) -> Iterator[tuple[int, int]]:
        """(begin, end) of `size` columns at a time; of all columns if it is None."""
        size = size or self.columns
        for begin in range(0, self.columns, size):
            yield begin, min(begin + size, self.columns)

    def keep(
        self, kept: torch.Tensor | None, states: torch.Tensor, begin: int, wanted: slice | torch.Tensor = slice(None)
    ) -> torch.Tensor:
        """`kept` [B, m, H], the wanted columns, updated with the states [B, n, H] of a chunk starting at `begin`.

        Without `kept`, columns of other chunks are undefined.
        """
        if self.real is None and states.shape[1] == self.columns:
            return states[:, wanted]
        if self.real is None:
            columns = torch.arange(self.columns, device=getattr(wanted, "device", None))[wanted]
            at = columns.expand(states.shape[0], -1)
        else:
            shown = self._shown if isinstance(wanted, slice) else self._shown.to(wanted.device)
            at = shown[:, wanted]
        at = at.to(states.device) - begin
        there = _take(states, at.clamp(0, states.shape[1] - 1))
        if kept is None:
            return there
        return torch.where(((at >= 0) & (at < states.shape[1]))[..., None], there, kept)

    @staticmethod
    def keep_last(kept: torch.Tensor | None, states: torch.Tensor, new: list[int]) -> torch.Tensor:
        """`kept` [B, 1, H], each row's last token so far, updated with that of a chunk, which brings `new` tokens."""
        if kept is None or min(new):
            return states
        return torch.where((to_device(new, states.device) > 0)[:, None, None], states, kept)


def _read(attention_mask: torch.Tensor, batch_size: int, columns: int) -> torch.Tensor:
    """The mask as bool on the host."""
    if attention_mask.ndim != 2 or attention_mask.shape[0] != batch_size or attention_mask.shape[1] < columns:
        raise ValueError(
            f"attention_mask {tuple(attention_mask.shape)}: must be 2-D, [batch, tokens] with 0 for padding, for "
            f"inputs {(batch_size, columns)}"
        )
    mask = attention_mask.cpu()
    if not ((mask == 0) | (mask == 1)).all():
        raise ValueError("attention_mask: must hold 1 for tokens and 0 for padding, and nothing else")
    return mask.bool()


def _take(states: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Row b's columns columns[b] of states [B, n(, H)]: [B, m(, H)]."""
    columns = columns.to(states.device)  # the last layer may be on another device
    return states.gather(1, columns if states.ndim == 2 else columns[..., None].expand(-1, -1, states.shape[-1]))
