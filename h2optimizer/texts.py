"""Where a text begins and ends, in characters and in tokens: BOS tokens and stop strings."""

from __future__ import annotations

from itertools import islice


def one_bos(tokens: list[int], tokenizer) -> list[int]:
    """Tokens of a text, without the second BOS that a tokenizer adds if the text begins with one."""
    bos = tokenizer.bos_token_id
    return tokens[1:] if bos is not None and tokens[:2] == [bos, bos] else tokens


class Stops:
    """Finds the end of a text: it ends before its first stop string.

    Text for readers has no special tokens (padding, ends of turns), so stop strings are searched in the text without
    them. A stop string that names special tokens, such as "<|eot_id|>", is searched in the text with those tokens.

    Args:
        tokenizer: a transformers tokenizer.
        strings: stop strings, none empty.
    """

    def __init__(self, tokenizer, strings: tuple[str, ...]):
        self.tokenizer, self.strings = tokenizer, strings
        special = {id: str(token) for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        special |= {id: tokenizer.convert_ids_to_tokens(id) for id in tokenizer.all_special_ids}
        self._special = frozenset(special)
        # For each set of special tokens that stays in the text, the stop strings searched there.
        self._views: dict[frozenset[int], tuple[str, ...]] = {frozenset(): strings}
        for string in strings:
            named = frozenset(id for id, text in special.items() if text and text in string)
            if named:
                self._views[named] = (*self._views.get(named, ()), string)
        self._as_read = [*strings]
        for string in strings:
            for text in sorted(filter(None, special.values()), key=len, reverse=True):
                string = string.replace(text, "")
            self._as_read.append(string)
        # A string that has just appeared is in the last tokens; UTF-8 takes at most 4 tokens per character.
        self._reach = 4 * max(map(len, strings), default=0) + 4

    def said(self, tokens: list[int]) -> bool:
        """Whether the text now contains a stop string. Must be called after each token."""
        for named, strings in self._views.items():
            latest = islice((token for token in reversed(tokens) if self._stays(token, named)), self._reach)
            text = self._text([*latest][::-1], named)
            if any(string in text for string in strings):
                return self.first(tokens) is not None  # decoders treat a text's beginning differently
        return False

    def first(self, tokens: list[int]) -> tuple[str, int] | None:
        """The text before the first stop string, and its number of tokens; None without one."""
        ends = []
        for named, strings in self._views.items():
            text = self._text(tokens, named)
            found = [at for string in strings if (at := text.find(string)) >= 0]
            if found:
                ends.append(self._end(tokens, named, text[: min(found)]))
        return min(ends, key=lambda end: (len(end[0]), end[1]), default=None)

    def held(self, text: str) -> int:
        """How many of the text's last characters may start a stop string, and must not be shown yet."""
        longest = min(max(map(len, self._as_read), default=0), len(text))
        return next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in self._as_read)), 0)

    def _end(self, tokens: list[int], named: frozenset[int], before: str) -> tuple[str, int]:
        """The result of `first` for a stop string that follows `before` in the text with the `named` tokens."""
        count = len(tokens)
        while count and self._text(tokens[: count - 1], named).startswith(before):
            count -= 1
        text = self._text(tokens[:count])
        if count and tokens[count - 1] not in self._special:  # its last characters may start the stop string
            text = text[: len(text) - (len(self._text(tokens[:count], named)) - len(before))]
        return text, count

    def _stays(self, token: int, named: frozenset[int]) -> bool:
        return token not in self._special or token in named

    def _text(self, tokens: list[int], named: frozenset[int] = frozenset()) -> str:
        """The text of tokens, without special ones that are not `named`."""
        return self.tokenizer.decode(
            [token for token in tokens if self._stays(token, named)], skip_special_tokens=not named
        )
