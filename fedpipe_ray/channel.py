"""The wireless link of an edge in a round: path loss, Rayleigh block fading, and the rate of Shannon's formula.

    h = 10^(-PL/10) |g|^2,   PL = 128.1 + 37.6 log10 d_km dB,   |g|^2 ~ Exp(1), drawn anew each round
    r(B) = B log2(1 + gamma / B),   gamma = P h / N_0 [Hz]

The path loss is that of a macro cell at 2 GHz (3GPP TR 36.814, in its form of TR 25.814). All is drawn from (seed,
round, edge), so a channel does not depend on who else is asked, nor on what was drawn before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from .randomness import rng_for

Values = np.ndarray[Any, Any]

LN2 = math.log(2)


@dataclass(frozen=True)
class Channel:
    """What all edges share of the air. power_dbm: of an edge; noise_dbm_hz: N_0.

    radius_m: of the disc in which edges without a distance of their own stand; outage: chance that a link is blocked
    for a round.
    """

    power_dbm: float = 23.0
    noise_dbm_hz: float = -174.0
    radius_m: float = 500.0
    outage: float = 0.0

    def snr_hz(self, seed: int, round: int, edge: str, distance_m: float | None = None) -> float:
        """gamma of the edge in the round, in Hz; 0 while its link is blocked. distance_m: null draws it, once a run."""
        if distance_m is None:
            distance_m = self.radius_m * math.sqrt(rng_for(seed, 0, f"distance/{edge}").random())
        rng = rng_for(seed, round, f"channel/{edge}")
        blocked, fading = rng.random() < self.outage, float(rng.exponential())
        if blocked or fading == 0.0:
            return 0.0
        decibels = self.power_dbm - self.noise_dbm_hz - path_loss_db(distance_m / 1000)
        return float(10 ** (decibels / 10) * fading)


def path_loss_db(kilometres: float) -> float:
    """PL of a distance; below a metre that of a metre, where the formula would amplify."""
    return 128.1 + 37.6 * math.log10(max(kilometres, 1e-3))


def rate(bandwidth: Values, snr_hz: Values) -> Values:
    """r(B) in bit/s; B and gamma in Hz, above 0. Concave and increasing in B, from 0 to its limit gamma / ln 2."""
    return np.asarray(bandwidth * np.log1p(snr_hz / bandwidth) / LN2)
