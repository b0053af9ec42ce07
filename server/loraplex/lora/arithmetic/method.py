"""Method: the ways in which adapters are merged. No torch here, so that a command line can list them."""

from enum import StrEnum


class Method(StrEnum):
    """With w the weights and s the scalings, and PEFT's names (`add_weighted_adapter`).

    linear   Σ w·s·B·A, exactly, in the smallest rank that holds it. (PEFT's "linear" sums A and B apart: no such sum.)
    cat      the same, the matrices side by side, no rank saved
    svd      the same, cut to a rank by its largest singular values
    ties, dare_linear, dare_ties, magnitude_prune   on A and on B apart, each scaled by sqrt(w·s)
    …_svd    the same on the deltas s·B·A, and the result cut to a rank
    """

    LINEAR = "linear"
    CAT = "cat"
    SVD = "svd"
    TIES = "ties"
    DARE = "dare"
    DARE_LINEAR = "dare_linear"
    DARE_TIES = "dare_ties"
    MAGNITUDE_PRUNE = "magnitude_prune"
    TIES_SVD = "ties_svd"
    DARE_LINEAR_SVD = "dare_linear_svd"
    DARE_TIES_SVD = "dare_ties_svd"
    MAGNITUDE_PRUNE_SVD = "magnitude_prune_svd"

    @property
    def is_exact(self) -> bool:
        """Whether it sums the deltas as they are."""
        return self in (Method.LINEAR, Method.CAT, Method.SVD)

    @property
    def cuts(self) -> bool:
        """Whether its result has no rank of its own and must be cut to one."""
        return self is Method.SVD or self.endswith("_svd")

    @property
    def is_random(self) -> bool:
        return self.startswith("dare")

    @property
    def elects_signs(self) -> bool:
        return "ties" in self

    @property
    def works_on_deltas(self) -> bool:
        """Whether it prunes the deltas themselves, not A and B."""
        return self.cuts and not self.is_exact


class MajoritySign(StrEnum):
    """How a number's sign is elected: by the sum of the values, or by the count of their signs."""

    TOTAL = "total"
    FREQUENCY = "frequency"
