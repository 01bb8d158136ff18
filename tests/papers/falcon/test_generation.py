"""The benchmark of writing with a cache: both sides have one shape and write as many tokens."""

import pytest

from provenn.evidence.benchmark import benchmarks
from provenn.nn.decoder import Decoder
from provenn.papers.falcon import experiments
from provenn.papers.falcon.bench import GENERATION, PACKAGE


def test_both_sides_write_as_many_tokens_with_as_many_parameters(monkeypatch):
    transformers = pytest.importorskip("transformers")
    (each,) = benchmarks(experiments)
    assert (each.timing, each.system, each.baselines, each.package) == (GENERATION, "ours", (PACKAGE,), PACKAGE)
    built = []
    for kind in (transformers.LlamaForCausalLM, Decoder):
        before = kind.generate
        monkeypatch.setattr(
            kind,
            "generate",
            lambda self, *given, before=before, **more: built.append(self) or before(self, *given, **more),
        )
    for label in (PACKAGE, "ours"):
        assert GENERATION.runners[label](9, "cpu")().shape == (1, 9), label
    theirs, ours = (sum(p.numel() for p in model.parameters()) for model in built)
    assert theirs == ours
