"""Texts that are nearly the same, by MinHash (Broder 1997) and locality-sensitive hashing, in a
time that grows with their number alone.
"""

from collections.abc import Sequence

import numpy as np
import xxhash

from ..extras import need
from .texts import words_alone

SAME = 0.8
"""The share of three-word phrases (Jaccard) from which two texts are nearly the same."""
_PERMUTATIONS, _BANDS = 128, 16  # 16 bands of 8: half of the pairs at 0.71, 95 % of those at 0.8
_WORDS = 3
_DOUBT = 0.12  # of a similarity by 128 numbers, more than three standard deviations
_CHUNK = 20_000
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


def phrases(text: str) -> set[str]:
    """The three-word phrases of a text; all of a shorter one is a phrase."""
    words = words_alone(text).split()
    if len(words) < _WORDS:
        return {" ".join(words)}
    return {" ".join(words[i : i + _WORDS]) for i in range(len(words) - _WORDS + 1)}


def signatures(texts: Sequence[str]) -> np.ndarray:
    """MinHash signatures (n, 128) uint32.

    Raises:
        ConfigError: the library is not installed.
    """
    rensa = need("rensa", "looking for near duplicates", "check")
    parts, known = [np.zeros((0, _PERMUTATIONS), np.uint32)], _Words()
    for start in range(0, len(texts), _CHUNK):
        hashes, offsets = _phrase_hashes(texts[start : start + _CHUNK], known)
        matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(
            hashes, offsets, _PERMUTATIONS, 42
        )
        parts.append(np.array(matrix.to_rows(), np.uint32))
    return np.concatenate(parts)


class _Words(dict[str, int]):
    """Hashes of words, each computed once."""

    def __missing__(self, word: str) -> int:
        found = self[word] = xxhash.xxh3_64_intdigest(word.encode("utf-8", "surrogatepass"))
        return found


def _phrase_hashes(texts: Sequence[str], known: _Words) -> tuple[np.ndarray, np.ndarray]:
    """A hash of every phrase of all texts, uint64, and where those of each text begin."""
    words: list[int] = []
    counts = np.zeros(len(texts), np.int64)
    for place, text in enumerate(texts):
        own = [known[word] for word in words_alone(text).split()]
        own += [0] * (_WORDS - len(own))
        words += own
        counts[place] = len(own)
    flat = np.array(words, np.uint64)
    hashes = np.zeros(max(0, len(flat) - _WORDS + 1), np.uint64)
    for position in range(_WORDS):
        hashes = (hashes ^ flat[position : position + len(hashes)]) * _FACTOR
        hashes ^= hashes >> np.uint64(29)
    ends = np.cumsum(counts)
    phrase = np.ones(len(flat), bool)
    for short in range(1, _WORDS):
        phrase[ends - short] = False
    offsets = np.concatenate([[0], np.cumsum(counts - _WORDS + 1)]).astype(np.uint64)
    return hashes[phrase[: len(hashes)]], offsets


def clusters(texts: Sequence[str]) -> np.ndarray:
    """The cluster (n,) of each text, named by its first: texts that are nearly the same as one
    before them, directly or through others.
    """
    parent = list(range(len(texts)))

    def root(place: int) -> int:
        while parent[place] != place:
            parent[place] = parent[parent[place]]
            place = parent[place]
        return place

    pairs, alike = _candidates(signatures(texts))
    for (first, other), share in zip(pairs.tolist(), alike.tolist(), strict=True):
        a, b = root(first), root(other)
        if a != b and _is_same(texts[first], texts[other], share):
            parent[max(a, b)] = min(a, b)
    return np.array([root(place) for place in range(len(texts))], np.int64)


def matches(texts: Sequence[str], others: Sequence[str]) -> dict[int, int]:
    """Of each text that is nearly the same as one of the others: which."""
    pairs, alike = _candidates(signatures([*others, *texts]))
    found: dict[int, int] = {}
    for (first, place), share in zip(pairs.tolist(), alike.tolist(), strict=True):
        mine = place - len(others)
        new = first < len(others) <= place and mine not in found
        if new and _is_same(others[first], texts[mine], share):
            found[mine] = first
    return found
    return found


def similarity(one: str, other: str) -> float:
    """The Jaccard similarity of two texts' phrases."""
    a, b = phrases(one), phrases(other)
    return len(a & b) / len(a | b)


def _is_same(one: str, other: str, alike: float) -> bool:
    """Whether two texts are nearly the same; counted only where their signatures leave a doubt."""
    return alike >= SAME + _DOUBT or similarity(one, other) >= SAME


def _candidates(signs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (first, other), (C, 2), that share a band, each text with the first of its bucket, and
    may be as similar as they should be by all of their signatures; and the share of those that
    agree, (C,).
    """
    found = [np.zeros((0, 2), np.int64)]
    width = _PERMUTATIONS // _BANDS
    for band in range(_BANDS):
        part = np.ascontiguousarray(signs[:, band * width : (band + 1) * width])
        keys = part.view([("", part.dtype)] * width).ravel()
        _, first, bucket = np.unique(keys, return_index=True, return_inverse=True)
        leader = first[bucket]
        others = np.flatnonzero(leader != np.arange(len(leader)))
        found.append(np.stack([leader[others], others], 1))
    pairs = np.unique(np.concatenate(found), axis=0)
    parts = np.array_split(pairs, len(pairs) // 100_000 + 1)
    alike = np.concatenate([(signs[a[:, 0]] == signs[a[:, 1]]).mean(1) for a in parts])
    kept = alike >= SAME - _DOUBT
    return pairs[kept], alike[kept]
