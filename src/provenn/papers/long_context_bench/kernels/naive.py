"""Attention as it is written, with all S × S scores."""

from provenn.papers.long_context_bench.kernels.base import Attend, Case, Kernel, reference


class Naive(Kernel):
    """softmax(q kᵀ / √d) v in four operations."""

    name, about, sparse = "naive", "explicit scores, plain torch", True

    def build(self, case: Case) -> Attend:
        visible = case.mask.dense(case.device)
        return lambda q, k, v: reference(q, k, v, visible)


KERNEL = Naive()
