"""What the tests of Skellam noise share: exact probabilities, and draws held against them."""

import math

import numpy as np
from scipy import stats

from dopamine_lib.privacy.skellam import log_pmf


def exact_pmf(variance):
    """Integers (m,) within 12.5 standard deviations and their probabilities."""
    reach = math.ceil(12.5 * math.sqrt(variance))
    x = np.arange(-reach, reach + 1)
    return x, np.exp(log_pmf(x, variance))


def chi_square(draws, variance, classes=64):
    """p-value of draws against the exact probabilities, in classes of about equal weight."""
    x, p = exact_pmf(variance)
    cumulative = np.cumsum(p)
    edges = x[np.searchsorted(cumulative, np.arange(1, classes) / classes)]
    expected = np.diff(np.concatenate([[0], cumulative[edges - x[0]], [1]]))
    observed = np.bincount(np.searchsorted(edges, draws), minlength=classes)
    return stats.chisquare(observed, expected * len(draws)).pvalue
