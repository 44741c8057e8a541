"""Pruning rates and shares of bandwidth that end a round soonest: the two blocks, their descent, the joint optimum.

K clients, weight p_k (sum 1), a_k seconds of work, S_k bits to send, gamma_k in Hz (channel.py). P-A:

    min max_k T_k,  T_k = (1 - rho_k) (a_k + S_k / r_k(B_k))
    subject to  sum p_k rho_k <= rho_bar,   0 <= rho_k <= rho_max,   sum B_k <= B

The idea of choosing pruning rates and bandwidth together, and of block coordinate descent, is that of Pang et al. 2026
(arXiv 2602.01024), of which only the abstract was seen. The model, the blocks and the joint optimum are ours.

Pruning block, B fixed: A_k = a_k + S_k / r_k; rho_k = clip(1 - tau / A_k, 0, rho_max), the tau that spends the budget.
Bandwidth block, rho fixed: client k needs R_k = s_k / (tau - c_k) bit/s, B_k = gamma_k / x_k with ln(1 + x) = alpha x,
alpha = R_k ln 2 / gamma_k < 1. That is x = -W(-alpha e^-alpha) / alpha - 1 on Lambert's branch -1, which loses its
digits as alpha -> 1. Newton from x_0 = 1 / alpha^2 - 1 needs no branch and no bracket: x_0 is above the root, since
ln(1 + x) <= x / sqrt(1 + x), and from there it only descends, since ln(1 + x) - alpha x is concave. The tau at
which sum B_k = B is bracketed and found by Brent.

Joint optimum: for fixed tau the least pruning is sum p_k (1 - tau u_k(B_k)), u_k = 1 / (a_k + S_k / r_k) concave, over
B_k between where rho_k = rho_max and where rho_k = 0: a convex problem. Between these bounds p_k tau u_k'(B_k) = mu, or
u_k'(B_k) = theta / p_k, theta = mu / tau; the theta that spends the bandwidth, and outside it the tau that spends the
budget, are bracketed roots. The descent stops above this optimum: each block alone cannot trade one for the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from scipy.optimize import brentq

from fedpipe_ray.channel import LN2, rate

Values = np.ndarray[Any, Any]
Kind = Literal[
    "unpruned-equal", "unpruned", "uniform-equal", "uniform", "pruning-equal", "random", "bcd", "bcd-bandwidth-first",
    "joint",
]  # fmt: skip
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Problem:
    """P-A. weight, compute_seconds (a), bits (S), snr_hz (gamma): [K]. Raises ValueError for what has no solution."""

    weight: Values
    compute_seconds: Values
    bits: Values
    snr_hz: Values
    bandwidth_hz: float
    rho_bar: float
    rho_max: float

    def __post_init__(self) -> None:
        if not 0 <= self.rho_max < 1:
            raise ValueError(f"rho_max: {self.rho_max} must lie in [0, 1)")
        if not 0 <= self.rho_bar <= self.rho_max:
            raise ValueError(
                f"rho_bar: {self.rho_bar} must lie in [0, rho_max: {self.rho_max}]; lower rho_bar or raise rho_max"
            )
        if not 0 < self.bandwidth_hz < np.inf:
            raise ValueError(f"bandwidth_hz: {self.bandwidth_hz} must be above 0, or no rate is above 0")
        for name in ("weight", "compute_seconds", "bits", "snr_hz"):
            values = getattr(self, name)
            wrong = np.flatnonzero(~((values > 0) & np.isfinite(values)))
            if wrong.size:
                raise ValueError(
                    f"client {wrong[0]}: {name} {values[wrong[0]]:g} must be above 0; leave the client out of the round"
                )
        object.__setattr__(self, "weight", self.weight / self.weight.sum())

    def seconds(self, rho: Values, bandwidth: Values) -> Values:
        """[K] T."""
        return np.asarray((1 - rho) * (self.compute_seconds + self.bits / rate(bandwidth, self.snr_hz)))


@dataclass(frozen=True)
class Allocation:
    """rho, bandwidth in Hz: [K]; seconds: the round's, max T. path: seconds after each block of a descent."""

    rho: Values
    bandwidth: Values
    seconds: float
    path: tuple[float, ...] = ()


def allocate(problem: Problem, kind: Kind = "joint", rng: np.random.Generator | None = None) -> Allocation:
    """The joint optimum, the descent in either order, or a baseline: what `kind` does not choose is equal for all.

    random: rho_k in proportion to uniform numbers of `rng`, clipped at rho_max, of mean rho_bar; optimal bandwidth.
    """
    count = len(problem.weight)
    equal = np.full(count, problem.bandwidth_hz / count)
    if kind == "joint":
        return joint(problem)
    if kind in ("bcd", "bcd-bandwidth-first"):
        return descend(problem, pruning_first=kind == "bcd")
    if kind == "pruning-equal":
        return Allocation(prune(problem, equal)[0], equal, prune(problem, equal)[1])
    rho = np.zeros(count) if kind.startswith("unpruned") else np.full(count, problem.rho_bar)
    if kind == "random":
        rho = random_rates(problem, rng or np.random.default_rng(0))
    if kind.endswith("equal"):
        return Allocation(rho, equal, float(problem.seconds(rho, equal).max()))
    return Allocation(rho, *share(problem, rho))


# -- the two blocks


def prune(problem: Problem, bandwidth: Values) -> tuple[Values, float]:
    """(rho [K], seconds): the pruning block. What is unclipped ends together; the budget is spent, unless capped."""
    whole = problem.compute_seconds + problem.bits / rate(bandwidth, problem.snr_hz)  # [K] A
    weight, most = problem.weight, problem.rho_max

    def rates(tau: float) -> Values:
        return np.clip(1 - tau / whole, 0.0, most)

    low, high = (1 - most) * float(whole.max()), float(whole.max())
    if weight @ rates(low) <= problem.rho_bar:
        return rates(low), low
    tau = root(lambda at: float(weight @ rates(at)) - problem.rho_bar, low, high)
    between = (rates(tau) > 0) & (rates(tau) < most)
    if between.any():  # then tau is rational in what is known of the others
        capped = most * weight[rates(tau) >= most].sum()
        exact = (weight[between].sum() + capped - problem.rho_bar) / (weight[between] / whole[between]).sum()
        tau = exact if np.array_equal(between, (rates(exact) > 0) & (rates(exact) < most)) else tau
    return rates(tau), float(tau)


def share(problem: Problem, rho: Values) -> tuple[Values, float]:
    """(bandwidth [K], seconds): the bandwidth block."""
    left = 1 - rho
    return shares(left * problem.compute_seconds, left * problem.bits, problem.snr_hz, problem.bandwidth_hz)


def shares(compute_seconds: Values, bits: Values, snr_hz: Values, bandwidth_hz: float) -> tuple[Values, float]:
    """(bandwidth [K], seconds): all end together after c_k seconds of work and s_k bits; sum B_k = bandwidth_hz."""
    low = float((compute_seconds + bits * LN2 / snr_hz).max())  # with all the bandwidth there is
    equal = np.full(len(bits), bandwidth_hz / len(bits))
    high = float((compute_seconds + bits / rate(equal, snr_hz)).max())

    def needed(tau: float) -> Values:
        return bandwidth_for(bits / (tau - compute_seconds), snr_hz)

    tau = root(lambda at: 1 - bandwidth_hz / float(needed(at).sum()), low, high)
    bandwidth = needed(tau)
    if not np.isfinite(bandwidth).all():  # more bandwidth than can be told from all there is
        bandwidth = needed(np.nextafter(low, high))
    bandwidth = bandwidth * (bandwidth_hz / bandwidth.sum())
    return bandwidth, float((compute_seconds + bits / rate(bandwidth, snr_hz)).max())


def bandwidth_for(needed: Values, snr_hz: Values) -> Values:
    """[K] the B with rate(B, snr_hz) = needed, in bit/s; infinite where that is at or above the limit gamma / ln 2."""
    with np.errstate(divide="ignore"):
        return np.asarray(snr_hz / snr_for(needed * LN2 / snr_hz))


def snr_for(alpha: Values) -> Values:
    """[K] the x > 0 with ln(1 + x) = alpha x, alpha in (0, 1); 0 at alpha >= 1, where there is none."""
    alpha = np.clip(alpha, 1e-100, 1.0)
    x = (1 - alpha) * (1 + alpha) / alpha**2
    for _ in range(30):  # 4 to 8 are enough; near alpha = 1 the last steps are rounding
        with np.errstate(invalid="ignore", divide="ignore"):
            step = (np.log1p(x) - alpha * x) / (1 / (1 + x) - alpha)
        step = np.where(step > 0, step, 0.0)
        x = np.maximum(x - step, 0.0)
        if np.all(step <= 1e-13 * x):
            break
    return np.asarray(x)


# -- both


def descend(problem: Problem, *, pruning_first: bool = True, tolerance: float = 1e-4) -> Allocation:
    """Block coordinate descent from equal bandwidth and no pruning, until a pass gains less than `tolerance` of tau."""
    count, path = len(problem.weight), [np.inf]
    rho, bandwidth = np.zeros(count), np.full(count, problem.bandwidth_hz / count)
    while True:
        for pruning in (pruning_first, not pruning_first):
            if pruning:
                rho, tau = prune(problem, bandwidth)
            else:
                bandwidth, tau = share(problem, rho)
            path.append(tau)
        if path[-3] - path[-1] < tolerance * path[-1]:
            return Allocation(rho, bandwidth, path[-1], tuple(path[1:]))


def joint(problem: Problem) -> Allocation:
    """The optimum of P-A."""
    count = len(problem.weight)
    capped, low = share(problem, np.full(count, problem.rho_max))
    if problem.rho_bar >= problem.rho_max * (1 - 1e-12):
        return Allocation(np.full(count, problem.rho_max), capped, low)
    whole, high = share(problem, np.zeros(count))
    if problem.rho_bar == 0:
        return Allocation(np.zeros(count), whole, high)
    solver = LeastPruning(problem)
    tau = newton(solver.at, low, high, low + (high - low) * (1 - problem.rho_bar / problem.rho_max))
    for later in (0.0, *10.0 ** np.arange(-15, -5)):  # the first tau, to the digits there are, that keeps the budget
        if solver.at(tau * (1 + later))[0] <= 1e-10:
            break
    bandwidth = solver.bandwidth * (problem.bandwidth_hz / solver.bandwidth.sum())
    return Allocation(solver.rho, bandwidth, float(problem.seconds(solver.rho, bandwidth).max()))


class LeastPruning:
    """min sum p_k rho_k for a given tau. Keeps the last solution, where the next search begins."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.log_weight = np.log(problem.weight)
        self.y = np.zeros(len(problem.weight))  # [K] ln(gamma / B)
        self.drift = np.zeros(len(problem.weight))  # [K] dy/dt
        self.t = 0.0  # ln theta
        self.bandwidth = self.rho = np.zeros(len(problem.weight))

    def slope(self, y: Values) -> tuple[Values, Values]:
        """(ln u', its derivative in y), [K]: the second is above 0, for u is concave in B."""
        a, bits, x = self.problem.compute_seconds, self.problem.bits, np.exp(y)
        log, share = np.log1p(x), x / (1 + x)
        gap = np.where(x < 1e-3, x * x * (0.5 + x * (-2 / 3 + x * (0.75 - 0.8 * x))), log - share)  # r' ln 2
        work = a * self.problem.snr_hz * log / (x * LN2)  # a r
        value = np.log(bits * gap / LN2) - 2 * np.log(work + bits)
        return value, share * share / gap + 2 * work / (work + bits) * (1 - share / log)

    def at(self, tau: float) -> tuple[float, float]:
        """(least sum p_k rho_k with which the round takes tau seconds, less rho_bar; its derivative in tau)."""
        problem, snr, total = self.problem, self.problem.snr_hz, self.problem.bandwidth_hz
        least, most = self._bound(tau, problem.rho_max), self._bound(tau, 0.0)
        least = np.minimum(least, total)
        self.low, self.high = np.log(snr / np.clip(most, least, total)), np.log(snr / least)
        self.at_low, self.at_high = (self.slope(y)[0] + self.log_weight for y in (self.low, self.high))
        down, up = float(self.at_low.min()), float(self.at_high.max())
        newton(self._spent, down, up, self.t)
        self.bandwidth = snr * np.exp(-self.y)
        u = 1 / (problem.compute_seconds + problem.bits / rate(self.bandwidth, snr))
        self.rho = np.clip(1 - tau * u, 0.0, problem.rho_max)
        inside = (self.t > self.at_low) & (self.t < self.at_high)
        # A bound, where tau u(B) stays, moves by u / (tau u') a second, and bandwidth is worth mu = tau theta.
        moves = ~inside & (self.bandwidth < 0.999999 * total)
        freed = np.exp(self.t - self.slope(self.y)[0]) * u
        fall = float(problem.weight @ np.where(inside, u, 0.0)) + float(freed[moves].sum())
        return float(problem.weight @ self.rho) - problem.rho_bar, -fall

    def _bound(self, tau: float, rho: float) -> Values:
        """[K] the bandwidth with which T is tau at this rate; infinite where none is enough."""
        left = tau - (1 - rho) * self.problem.compute_seconds
        needed = (1 - rho) * self.problem.bits / np.where(left > 0, left, 1.0)
        return np.where(left > 0, bandwidth_for(needed, self.problem.snr_hz), np.inf)

    def _spent(self, t: float) -> tuple[float, float]:
        """(ln of the bandwidth taken at ln theta = t over all there is, its derivative)."""
        derivative = self._follow(t)
        bandwidth = self.problem.snr_hz * np.exp(-self.y)
        total = float(bandwidth.sum())
        return float(np.log(total / self.problem.bandwidth_hz)), -float((bandwidth * derivative).sum()) / total

    def _follow(self, t: float) -> Values:
        """Moves y to ln u'(y) = t - ln p between its bounds; returns dy/dt, 0 at a bound."""
        target, low, high = t - self.log_weight, self.low, self.high
        inside = (t > self.at_low) & (t < self.at_high)
        y = np.where(
            inside, np.clip(self.y + self.drift * (t - self.t), low, high), np.where(t <= self.at_low, low, high)
        )
        for _ in range(100):
            value, derivative = self.slope(y)
            over = np.where(inside, value - target, 0.0)
            if np.abs(over).max() < 1e-9:
                break
            high, low = np.where(over > 0, y, high), np.where(over < 0, y, low)
            step = y - over / derivative
            y = np.where((step >= low) & (step <= high), step, (low + high) / 2)
        self.t, self.y, self.drift = t, y, np.where(inside, 1 / derivative, 0.0)
        return self.drift


def random_rates(problem: Problem, rng: np.random.Generator) -> Values:
    """[K] rates in proportion to uniform numbers, clipped at rho_max, so that sum p_k rho_k = rho_bar."""
    drawn = 1 - rng.random(len(problem.weight))  # (0, 1]
    if problem.rho_bar == 0:
        return np.zeros_like(drawn)
    most = problem.rho_max / float(drawn.min())
    scale = root(lambda c: problem.rho_bar - float(problem.weight @ np.minimum(c * drawn, problem.rho_max)), 0.0, most)
    return np.minimum(scale * drawn, problem.rho_max)


def root(excess: Callable[[float], float], low: float, high: float, rtol: float = 1e-14) -> float:
    """Where `excess`, which falls from low to high, is 0: a bound where rounding leaves no change of sign."""
    if excess(low) <= 0:
        return low
    if excess(high) >= 0:
        return high
    return float(brentq(excess, low, high, xtol=1e-300, rtol=rtol, maxiter=500))


def newton(
    function: Callable[[float], tuple[float, float]], low: float, high: float, start: float, tolerance: float = 1e-10
) -> float:
    """Where a function that falls from low to high is 0, by (value, derivative); halves where Newton would leave."""
    at = min(max(start, low), high)
    for _ in range(200):
        value, derivative = function(at)
        if abs(value) < tolerance or high - low <= 1e-15 * abs(high):
            break
        low, high = (at, high) if value > 0 else (low, at)
        step = at - value / derivative if derivative < 0 else np.inf
        before, at = at, step if low < step < high else (low + high) / 2
        if abs(at - before) <= 1e-14 * abs(at):
            break
    return at
