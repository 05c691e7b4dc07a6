"""Tokens that are parts of letters: byte-level tokenizers cut an emoji into several tokens.

Such a token is a text in which a byte b that is no whole letter stands as U+DC00 + b, as Python's
`surrogateescape` has it: the file system's way of having any bytes in a str.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

_ENDS_OPEN = re.compile("[\udc80-\udcff]$")
_BEGINS_OPEN = re.compile("^[\udc80-\udcff]")
_ONE_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def token_texts(tokenizer: Any, ids: Iterable[Any]) -> list[str]:
    """The text of each token, as `view` takes them, also of those that are parts of letters.

    `tokenizer.decode([id])` gives the same sign (U+FFFD) for every part of a letter; here such a
    part keeps its bytes, so that the page can put the letter together again.

    Args:
        tokenizer: of transformers, byte-level (GPT-2, Llama 3, Qwen) or with byte fallback (Llama
            2, Gemma); of any other kind, what it decodes is taken.
        ids: token ids, a list or an integer tensor [L].
    """
    numbers = [int(one) for one in ids]
    texts = [str(tokenizer.decode([one])) for one in numbers]
    for place, text in enumerate(texts):
        if "\ufffd" in text:
            content = _bytes_of(str(tokenizer.convert_ids_to_tokens([numbers[place]])[0]))
            if content is not None:
                texts[place] = content.decode("utf-8", "surrogateescape")
    return texts


def joined(tokens: Sequence[str]) -> tuple[list[str], dict[int, str]]:
    """(what each token adds to the text, the names of tokens that are parts of letters).

    A letter is given to the token that begins it; a token that only goes on adds nothing. The parts
    of what belongs together are named by it and numbered, such as "😀 2/3".
    """
    texts, names = list(tokens), {}
    begin = 0
    while begin < len(tokens):
        end = begin + 1
        while end < len(tokens) and _goes_on(tokens[end - 1], tokens[end]):
            end += 1
        if end - begin > 1:
            names.update(_join(texts, begin, end))
        begin = end
    return texts, names


def _goes_on(token: str, after: str) -> bool:
    """Whether a letter may have been cut between two tokens."""
    return bool(_ENDS_OPEN.search(token) and _BEGINS_OPEN.search(after))


def _join(texts: list[str], begin: int, end: int) -> dict[int, str]:
    """Give the letters of tokens [begin, end) to where they begin; the names of their parts."""
    try:
        contents = [text.encode("utf-8", "surrogateescape") for text in texts[begin:end]]
    except UnicodeEncodeError:  # half a UTF-16 pair, which has no bytes
        return {}
    owners = [begin + place for place, content in enumerate(contents) for _ in content]
    texts[begin:end] = [""] * (end - begin)
    cut_after = {*range(begin, end)}
    at = 0
    for letter in b"".join(contents).decode("utf-8", "surrogateescape"):
        size = len(letter.encode("utf-8", "surrogateescape"))
        texts[owners[at]] += letter
        # Between the tokens of one letter nothing ends.
        cut_after -= {*range(owners[at], owners[at + size - 1])}
        at += size
    names, first = {}, begin
    for last in sorted(cut_after):
        count = last + 1 - first
        if count > 1:
            whole = "".join(texts[first : last + 1])
            names.update({first + n: f"{whole} {n + 1}/{count}" for n in range(count)})
        first = last + 1
    return names


def _bytes_of(token: str) -> bytes | None:
    """The bytes that a tokenizer's own spelling of a token stands for; None if it is another."""
    fallback = _ONE_BYTE.fullmatch(token)
    if fallback:
        return bytes([int(fallback[1], 16)])
    try:
        return bytes(_BYTES[sign] for sign in token)
    except KeyError:
        return None


def _byte_signs() -> dict[str, int]:
    """GPT-2's spelling: a byte that can be seen stands for itself, the rest from U+0100 on."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    unseen = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {
        chr(0x100 + place): byte for place, byte in enumerate(unseen)
    }


_BYTES = _byte_signs()
