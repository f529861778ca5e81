"""Where a text begins, and where it ends: between the words of a request and the tokens of a model."""

from __future__ import annotations

from itertools import islice


def one_bos(tokens: list[int], tokenizer) -> list[int]:
    """Tokens of a text, without the second BOS that a tokenizer puts before one that begins with it."""
    bos = tokenizer.bos_token_id
    return tokens[1:] if bos is not None and tokens[:2] == [bos, bos] else tokens


class Stops:
    """Where a text ends: before the first of its stop strings.

    A reader's text has no special tokens (padding, ends of turns), so that a stop string is looked for in the text
    without them. One that names special tokens, as "<|eot_id|>" does, is looked for where these stand, too.

    Args:
        tokenizer: a transformers tokenizer.
        strings: stop strings, none empty.
    """

    def __init__(self, tokenizer, strings: tuple[str, ...]):
        self.tokenizer, self.strings = tokenizer, strings
        special = {id: str(token) for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        special |= {id: tokenizer.convert_ids_to_tokens(id) for id in tokenizer.all_special_ids}
        self._special = frozenset(special)
        # For each set of special tokens that stays in the text, the stop strings that are looked for there.
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
        # A string that has just appeared lies in the last tokens; UTF-8 takes at most 4 tokens a character.
        self._reach = 4 * max(map(len, strings), default=0) + 4

    def said(self, tokens: list[int]) -> bool:
        """Whether a text, looked at after each of its tokens, has come to hold a stop string."""
        for named, strings in self._views.items():
            latest = islice((token for token in reversed(tokens) if self._stays(token, named)), self._reach)
            text = self._text([*latest][::-1], named)
            if any(string in text for string in strings):
                return self.first(tokens) is not None  # decoders treat a text's beginning differently
        return False

    def first(self, tokens: list[int]) -> tuple[str, int] | None:
        """The text before the first stop string, and how many tokens make it up; None where there is none."""
        ends = []
        for named, strings in self._views.items():
            text = self._text(tokens, named)
            found = [at for string in strings if (at := text.find(string)) >= 0]
            if found:
                ends.append(self._end(tokens, named, text[: min(found)]))
        return min(ends, key=lambda end: (len(end[0]), end[1]), default=None)

    def held(self, text: str) -> int:
        """How many of a text's last letters may turn out to be a stop string's first: they are not to be shown yet."""
        longest = min(max(map(len, self._as_read), default=0), len(text))
        return next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in self._as_read)), 0)

    def _end(self, tokens: list[int], named: frozenset[int], before: str) -> tuple[str, int]:
        """What `first` returns for a stop string that follows `before` in the text with the `named` tokens."""
        count = len(tokens)
        while count and self._text(tokens[: count - 1], named).startswith(before):
            count -= 1
        text = self._text(tokens[:count])
        if count and tokens[count - 1] not in self._special:  # its last letters may be the stop string's first
            text = text[: len(text) - (len(self._text(tokens[:count], named)) - len(before))]
        return text, count

    def _stays(self, token: int, named: frozenset[int]) -> bool:
        return token not in self._special or token in named

    def _text(self, tokens: list[int], named: frozenset[int] = frozenset()) -> str:
        """The text of tokens, of special ones only those `named`."""
        return self.tokenizer.decode(
            [token for token in tokens if self._stays(token, named)], skip_special_tokens=not named
        )
