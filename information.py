"""Information in bits: entropy and mutual information of counts."""

import math

import numpy as np
from scipy.sparse import csr_matrix


#%% Information: entropy and mutual information of counts[x, y], how often y comes after x
def row_totals(counts: csr_matrix) -> np.ndarray:
    return np.asarray(counts.sum(1)).ravel()


def entropy_floor(counts: csr_matrix) -> float:
    """
    Entropy of the next token given this one, in nats per token.
    No model that sees one token has a lower loss on these counts.
    """
    stored_per_row = np.diff(counts.indptr)
    p_next = counts.data / np.repeat(row_totals(counts), stored_per_row)
    return float(-(counts.data * np.log(p_next)).sum() / counts.sum())


def mutual_information(counts: csr_matrix) -> float:
    """Bits per token that this token tells about the next: how much a model loses that knows only frequencies."""
    frequency = np.asarray(counts.sum(0)).ravel() / counts.sum()
    seen = frequency[frequency > 0]
    entropy = -(seen * np.log(seen)).sum()
    return float(entropy - entropy_floor(counts)) / math.log(2)
