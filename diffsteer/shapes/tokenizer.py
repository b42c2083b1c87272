"""The tokenizer of the shapes world: each word of the word list is one token, any other is spelled in letters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from diffsteer.shapes.grammar import WORDS

CONTEXT = 16  # tokens of the longest caption, start and end included


def make_tokenizer() -> Any:
    """Build it from the word list: a `transformers.CLIPTokenizer`, the same each time.

    Byte-pair merges are learned until every word is whole. "<|endoftext|>" has the largest id, since open_clip pools there.
    """
    from transformers import CLIPTokenizer

    merges = learn_merges(WORDS)
    letters = [c + end for c in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")]
    tokens = ["<|pad|>", *letters, *["".join(m) for m in merges], "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, pad_token="<|pad|>", model_max_length=CONTEXT)


def learn_merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Byte-pair encoding: the most frequent pair first, of equals the alphabetically first."""
    spelled = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for pieces in spelled for pair in zip(pieces, pieces[1:], strict=False)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for pieces in spelled:
            for i in range(len(pieces) - 2, -1, -1):
                if (pieces[i], pieces[i + 1]) == best:
                    pieces[i : i + 2] = ["".join(best)]
    return merges


def unknown_words(caption: str) -> list[str]:
    """The words of a caption that the shapes world does not have; it has no punctuation either, so "star," is one of them."""
    return [w for w in caption.lower().split() if w not in WORDS]
