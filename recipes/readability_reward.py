"""Two rewards of readable responses: one to train on, another that only judges.

Both see words alone. A response without a word counts as one word of 20 letters.
"""

import re

_WORD = re.compile(r"[^\W\d_]+")
_NO_WORD = ["x" * 20]
_LONG = 6  # letters; more make a long word of the index LIX (Björnsson, 1968)


def short_words(prompts: list[object], responses: list[str]) -> list[float]:
    """Minus the mean letters of a word, as in the Automated Readability Index (1967)."""
    words = [_WORD.findall(text) or _NO_WORD for text in responses]
    return [-sum(map(len, found)) / len(found) for found in words]


def few_long_words(prompts: list[object], responses: list[str]) -> list[float]:
    """Minus the share of long words, as in LIX."""
    words = [_WORD.findall(text) or _NO_WORD for text in responses]
    return [-sum(len(word) > _LONG for word in found) / len(found) for found in words]
