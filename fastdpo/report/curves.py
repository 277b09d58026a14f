"""A metric by steps: what is drawn of it, and what is said of it."""

from collections.abc import Sequence

_DRAWN = 1000
_SMOOTHED_FROM = 20


class Curve:
    """The values of a metric, in the order of their steps."""

    def __init__(self, points: Sequence[tuple[float, float]]) -> None:
        self.steps = [step for step, _ in points]
        self.values = [value for _, value in points]

    def __len__(self) -> int:
        return len(self.values)

    def start(self, share: float = 0.1) -> float:
        """The mean of the first share of the values."""
        return _mean(self.values[: max(1, round(len(self) * share))])

    def end(self, share: float = 0.1) -> float:
        """The mean of the last share of the values."""
        return _mean(self.values[-max(1, round(len(self) * share)) :])

    def around(self, step: float, share: float = 0.1) -> float:
        """The mean of a share of the values, those with the steps nearest to this one."""
        count = max(1, round(len(self) * share))
        nearest = sorted(range(len(self)), key=lambda i: abs(self.steps[i] - step))
        return _mean([self.values[i] for i in nearest[:count]])

    def thinned(self, points: int = _DRAWN) -> "Curve":
        """At most so many points, each the mean of as many values, at the last of their steps."""
        if len(self) <= points:
            return self
        size = -(-len(self) // points)
        starts = range(0, len(self), size)
        return Curve(
            [(self.steps[i : i + size][-1], _mean(self.values[i : i + size])) for i in starts]
        )

    def smoothed(self) -> "Curve | None":
        """The mean of each value and its neighbours; None where there are too few to need it."""
        if len(self) < _SMOOTHED_FROM:
            return None
        reach = max(2, len(self) // 30)
        sums = [0.0]
        for value in self.values:
            sums.append(sums[-1] + value)
        found = []
        for i, step in enumerate(self.steps):
            near = min(reach, i, len(self) - 1 - i)
            total = sums[i + near + 1] - sums[i - near]
            found.append((step, total / (2 * near + 1)))
        return Curve(found)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
