"""How sure a count of losses is: exact binomial bounds. Pure.

They hold for attempts that are lost independently of each other. Losses of a restart come together, so for a share to
be proven many restarts are worth more than many attempts.

Sources: Clopper and Pearson, Biometrika 26 (1934); Hanley and Lippman-Hand, JAMA 249 (1983), the rule of three; Press
and others, Numerical Recipes, 6.4, incomplete beta function by a continued fraction.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

__all__ = ["CONFIDENCE", "attempts_to_prove", "bounds", "differs", "percent", "rank_bounds"]

CONFIDENCE: Final = 0.95

_STEPS_MAX: Final = 500
_TINY: Final = 1e-300


def bounds(lost: int, attempts: int) -> tuple[float, float]:
    """Return between which shares (0 to 1) the true one lies, with 95 % confidence.

    If nothing was lost the upper bound is one-sided: about 3 divided by the attempts.
    """
    if attempts <= 0:
        return 0.0, 1.0
    if not lost:
        return 0.0, 1 - math.pow(1 - CONFIDENCE, 1 / attempts)
    tail = (1 - CONFIDENCE) / 2
    low = _solve(lambda share: _beta(share, lost, attempts - lost + 1) - tail)
    high = 1.0 if lost >= attempts else _solve(lambda share: _beta(share, lost + 1, attempts - lost) - (1 - tail))
    return low, high


def attempts_to_prove(share: float) -> int:
    """Return after how many attempts without a loss fewer than this share (0 to 1) are lost, with 95 % confidence."""
    return math.ceil(math.log(1 - CONFIDENCE) / math.log1p(-share))


def differs(lost: int, attempts: int, other_lost: int, other_attempts: int) -> bool:
    """Whether two shares differ at the 5 % level (Fisher's exact test, two-sided)."""
    whole, losses = attempts + other_attempts, lost + other_lost
    if not attempts or not other_attempts or not losses:
        return False

    def log_chance(count: int) -> float:
        return _log_choose(losses, count) + _log_choose(whole - losses, attempts - count)

    seen, scale = log_chance(lost), _log_choose(whole, attempts)
    low, high = max(0, losses - other_attempts), min(losses, attempts)
    chances = (log_chance(count) for count in range(low, high + 1))
    return math.fsum(math.exp(each - scale) for each in chances if each <= seen + 1e-9) < 1 - CONFIDENCE


def rank_bounds(count: int, share: float) -> tuple[float, float]:
    """Return between which shares of `count` sorted values the true percentile lies, with 95 % confidence.

    Sources: the normal approximation to the binomial distribution of ranks (Conover, Nonparametric Statistics).
    """
    if not count:
        return 0.0, 1.0
    spread = 1.96 * math.sqrt(share * (1 - share) / count)
    return max(0.0, share - spread), min(1.0, share + spread)


def percent(share: float) -> str:
    """Write a share with two digits that mean something: ``0.05 %``, ``0.0031 %``, ``12 %``."""
    value = share * 100
    if value <= 0:
        return "0 %"
    digits = max(0, 1 - math.floor(math.log10(value)))
    return f"{value:.{digits}f} %"


def _solve(rises: Callable[[float], float]) -> float:
    """Find where a rising function of 0 to 1 is 0, by halving."""
    low, high = 0.0, 1.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if rises(middle) < 0 else (low, middle)
    return (low + high) / 2


def _beta(x: float, a: float, b: float) -> float:
    """Return the regularized incomplete beta function."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    if x < (a + 1) / (a + b + 2):
        return front * _fraction(x, a, b) / a
    return 1 - front * _fraction(1 - x, b, a) / b


def _fraction(x: float, a: float, b: float) -> float:
    """Evaluate its continued fraction by Lentz's method."""
    c, d = 1.0, 1 / _not_zero(1 - (a + b) * x / (a + 1))
    found = d
    for m in range(1, _STEPS_MAX):
        for step in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d, c = 1 / _not_zero(1 + step * d), _not_zero(1 + step / c)
            found *= d * c
        if abs(d * c - 1) < 1e-12:
            break
    return found


def _not_zero(value: float) -> float:
    return value if abs(value) > _TINY else _TINY


def _log_choose(whole: int, part: int) -> float:
    return math.lgamma(whole + 1) - math.lgamma(part + 1) - math.lgamma(whole - part + 1)
