"""Which tokens of which rank are scored together: the rounds of a call.

A round is a range of tokens of every rank, few enough together for one tile. The states of a round
are gathered, and their gradients sent back, before the next: no rank holds those of all tokens.
"""

from heapq import heapify, heappop, heappush

Round = list[slice]
"""A range of the tokens of each rank."""


def even_rounds(counts: list[int], rows: int) -> list[Round]:
    """Ranges of about equal length, at most `rows` tokens together where there are more of those
    than ranks; `counts` are the tokens of each rank.
    """
    total = sum(counts)
    rounds = 1 if total <= rows else -(-total // max(1, rows - len(counts)))
    ends = [[count * k // rounds for k in range(rounds + 1)] for count in counts]
    return [[slice(own[k], own[k + 1]) for own in ends] for k in range(rounds)]


def whole_rounds(cuts: list[list[int]], rows: int) -> list[Round]:
    """Ranges that begin and end at `cuts`, ascending from 0 to the tokens of each rank, and hold at
    most `rows` tokens together where possible. Ranks come along alike, so that all send as much.
    """
    at = [0] * len(cuts)
    waiting = [(0.0, rank) for rank, own in enumerate(cuts) if len(own) > 1]
    heapify(waiting)
    rounds = []
    while waiting:
        begin, taken = list(at), 0
        while waiting:
            rank = waiting[0][1]
            own, here = cuts[rank], at[rank]
            size = own[here + 1] - own[here]
            if taken and taken + size > rows:
                break
            taken += size
            at[rank] += 1
            heappop(waiting)
            if here + 2 < len(own):
                heappush(waiting, (own[here + 1] / own[-1], rank))
        pairs = zip(cuts, begin, at, strict=True)
        rounds.append([slice(own[first], own[last]) for own, first, last in pairs])
    return rounds
