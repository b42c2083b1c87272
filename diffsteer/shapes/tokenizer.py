"""The tokenizer of the shapes world: each word of the word list is one token, any other is spelled in letters."""

from __future__ import annotations

import json
from typing import Any

from diffsteer.shapes.grammar import WORDS

CONTEXT = 16  # tokens of the longest caption, start and end included


def make_tokenizer() -> Any:
    """Build it from the word list: a `transformers.CLIPTokenizer`.

    Byte-pair merges are learned until every word is whole. "<|endoftext|>" has the largest id, since open_clip pools there.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(vocab_size=4096, min_frequency=1, end_of_word_suffix="</w>", show_progress=False)
    bpe.train_from_iterator(list(WORDS) * 2, trainer)
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    letters = [c + end for c in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")]
    tokens = ["<|pad|>", *letters, *["".join(m) for m in merges], "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, pad_token="<|pad|>", model_max_length=CONTEXT)


def unknown_words(caption: str) -> list[str]:
    """The words of a caption that the shapes world does not have; it has no punctuation either, so "star," is one of them."""
    return [w for w in caption.lower().split() if w not in WORDS]
