"""Does live traffic use the experts as the calibration did? A distance per layer and its threshold.

Per layer two distributions over experts are compared, live and reference: the shares of
selections, and the mean router probabilities. The distance is the Jensen-Shannon divergence in
bits, 0 for equal distributions and 1 for disjoint ones (Lin 1991, IEEE Trans. Inf. Theory
37(1):145-151).

Two samples of one distribution differ too. With d = live - reference, C the covariance of d and
m = (live + reference) / 2, the divergence is sum_i d_i^2 / (8 m_i) nats to second order, hence

    E[divergence] = tr(A) / 8,   A = diag(m)^-1/2 C diag(m)^-1/2,

which is subtracted as its bias; for independent tokens it is (experts - 1) (1/n + 1/n') / 8. The
tokens of a request are not independent, so C is estimated from whole requests, as for a survey that
samples clusters: with x_r the sums and t_r the tokens of request r, the ratio estimate
p = sum x_r / sum t_r has the covariance sum (x_r - t_r p)(x_r - t_r p)^T / (sum t_r)^2 (Cochran,
Sampling Techniques, 3rd ed. 1977, section 6.3). The sum of squares is then a sum of chi-squares
with the eigenvalues of A as weights. Its quantile is taken from Satterthwaite's approximation, the
second-order correction of Rao and Scott (1984, Ann. Statist. 12(1):46-60), as an F distribution
because C is itself estimated (Thomas and Rao 1987, JASA 82:630-636):

    threshold = tr(A) / 8 * F_{1 - alpha}(nu, nu (requests - 1)),   nu = tr(A)^2 / tr(A^2).

The reference is a file of sums without its requests: its tokens are taken to depend on each other
as the live ones do.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from scipy import stats

MIN_REQUESTS = 30


class RequestSums(NamedTuple):
    """Weighted sums over requests r with weight w: t tokens, x [expert] a sum over the tokens.

    Every field is additive, so memory does not grow with traffic.

    Attributes:
      w: sum w.
      t: sum w t.
      x: [expert] sum w x.
      ww: sum w^2.
      wwt: sum w^2 t.
      tt: sum w^2 t^2.
      tx: [expert] sum w^2 t x.
      xx: [expert, expert] sum w^2 x x^T.
    """

    w: float
    t: float
    x: np.ndarray
    ww: float
    wwt: float
    tt: float
    tx: np.ndarray
    xx: np.ndarray


class Divergence(NamedTuple):
    """How far a layer's live distribution is from its reference.

    Attributes:
      bits: Jensen-Shannon divergence as it is.
      bias_bits: what two samples of one distribution would have on average.
      threshold_bits: what they would exceed with probability alpha; infinite below MIN_REQUESTS.
    """

    bits: float
    bias_bits: float
    threshold_bits: float

    @property
    def distance_bits(self) -> float:
        """The divergence without its bias, at least 0."""
        return max(self.bits - self.bias_bits, 0.0)


def no_requests(num_experts: int) -> RequestSums:
    """Returns sums over no request."""
    zeros = np.zeros(num_experts)
    return RequestSums(0.0, 0.0, zeros, 0.0, 0.0, 0.0, zeros, np.zeros((num_experts,) * 2))


def add_requests(
    sums: RequestSums, tokens: np.ndarray, x: np.ndarray, half_life: float | None
) -> RequestSums:
    """Adds requests, the last one with weight 1 and those before it with less and less.

    Args:
      sums: over the requests so far.
      tokens: [request] tokens of each new request, oldest first.
      x: [request, expert] their sums.
      half_life: requests after which a request counts half; None weighs all alike.
    """
    decay = 1.0 if half_life is None else 0.5 ** (1.0 / half_life)
    t, x = np.asarray(tokens, np.float64), np.asarray(x, np.float64)
    weight = decay ** np.arange(len(t) - 1, -1, -1, dtype=np.float64)
    square = weight**2
    old = decay ** len(t)
    new = RequestSums(
        w=float(weight.sum()),
        t=float(weight @ t),
        x=weight @ x,
        ww=float(square.sum()),
        wwt=float(square @ t),
        tt=float(square @ t**2),
        tx=(square * t) @ x,
        xx=(x * square[:, None]).T @ x,
    )
    first_order = ("w", "t", "x")
    return RequestSums(
        **{
            name: getattr(sums, name) * (old if name in first_order else old**2)
            + getattr(new, name)
            for name in RequestSums._fields
        }
    )


def num_requests(sums: RequestSums) -> float:
    """Returns how many requests of equal weight the sums are worth."""
    return sums.w**2 / sums.ww if sums.ww else 0.0


def shares(x: np.ndarray) -> np.ndarray:
    """Returns a distribution: sums [expert] >= 0 divided by their total."""
    return np.asarray(x, np.float64) / max(float(np.sum(x)), np.finfo(np.float64).tiny)


def jensen_shannon_bits(p: np.ndarray, q: np.ndarray) -> float:
    """Returns the Jensen-Shannon divergence in bits of two distributions [expert]."""
    m = (p + q) / 2
    terms = [part[part > 0] * np.log2(part[part > 0] / m[part > 0]) for part in (p, q)]
    return max(0.5 * sum(float(term.sum()) for term in terms), 0.0)


def divergence(
    sums: RequestSums, reference: np.ndarray, reference_tokens: float, *, alpha: float
) -> Divergence:
    """Compares live requests with a reference.

    Args:
      sums: over live requests; x sums to t, as selections divided by top-k or probabilities do.
      reference: [expert] the same sums over the reference's tokens.
      reference_tokens: how many tokens that were.
      alpha: probability that the threshold is exceeded without drift, for one look at one layer.

    Returns:
      The divergence; all zero and an infinite threshold before the first token.
    """
    if not sums.t:
        return Divergence(0.0, 0.0, math.inf)
    p, q = shares(sums.x), shares(reference)
    requests = num_requests(sums)
    bits = jensen_shannon_bits(p, q)
    if requests <= 1:
        return Divergence(bits, 0.0, math.inf)
    cross = np.outer(p, sums.tx)
    spread = sums.xx - cross - cross.T + sums.tt * np.outer(p, p)
    spread *= requests / (requests - 1)
    covariance = spread * (1 / sums.t**2 + 1 / (sums.wwt * reference_tokens))
    m = (p + q) / 2
    is_used = m > 0
    root = np.sqrt(m[is_used])
    a = covariance[np.ix_(is_used, is_used)] / np.outer(root, root)
    trace, square = float(np.trace(a)), float(np.sum(a * a))
    bias = trace / (8 * math.log(2))
    if requests < MIN_REQUESTS:
        return Divergence(bits, bias, math.inf)
    if square <= 0:
        # All requests alike: any difference is one.
        return Divergence(bits, bias, bias)
    nu = trace**2 / square
    quantile = float(stats.f.isf(alpha, nu, nu * (requests - 1)))
    return Divergence(bits, bias, bias * quantile)
