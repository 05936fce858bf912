"""What a draft gains: the speed-up that measured costs predict, by gamma, and where it begins.

A round drafts gamma tokens, and the target scores gamma + 1 positions in one call: tau tokens for
gamma c + v + o. c, a draft step, v, the scoring, and o, all else, are in units of what one token of
the target alone costs.
"""


def predicted_speedup(tau: float, gamma: float, c: float, v: float, o: float = 0.0) -> float:
    """tau / (gamma c + v + o): tokens a round over its cost, in tokens of the target alone.

    tau: tokens a round; gamma: drafts a round; c: a draft step; v: the target scoring gamma + 1
    positions; o: all else.
    """
    return tau / (gamma * c + v + o)


def predicted_speedups(row: dict) -> dict[int, float]:
    """Speed-up over the target alone by gamma, of a row of results.json: its tau by gamma over the
    costs of a round. The loop's own time is not in it. {} for a row without these."""
    if not row.get("tau_by_gamma") or not row.get("cost_ratio"):
        return {}
    speedups = {}
    for gamma, tau in row["tau_by_gamma"].items():
        scoring = row["scoring_ratio"][gamma]
        speedups[int(gamma)] = predicted_speedup(tau, int(gamma), row["cost_ratio"], scoring)
    return speedups


def recommend(predictions: dict[int, float]) -> int:
    """The gamma of the largest predicted speed-up; of equals the smallest."""
    return max(sorted(predictions), key=predictions.get)


def break_even_cost(tau: float, gamma: float, v: float, o: float) -> float:
    """The c at which `predicted_speedup` is 1. Below 0: even a free draft would not gain."""
    return (tau - v - o) / gamma


def break_even_acceptance(c: float, scoring: dict) -> float | None:
    """The least acceptance at which some gamma's predicted speed-up is 1, where every draft is
    accepted with the same chance, whatever happened before it (AdaSPEC Eq. 4). None: even drafts
    that are always accepted would not gain.

    scoring: gamma (int, or str as in results.json) -> v.
    """

    def best(alpha: float) -> float:
        speedups = []
        for gamma, v in scoring.items():
            tau = sum(alpha**i for i in range(int(gamma) + 1))
            speedups.append(predicted_speedup(tau, int(gamma), c, v))
        return max(speedups)

    if best(1.0) < 1:
        return None
    low, high = 0.0, 1.0
    for _ in range(50):  # the speed-up rises with alpha
        middle = (low + high) / 2
        if best(middle) >= 1:
            high = middle
        else:
            low = middle
    return high
