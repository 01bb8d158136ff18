"""Networks are timed in every form beside a reference; what fails is reported and costs no other."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from provenn.cli.measure import _forms
from provenn.core import cost
from provenn.core.errors import UserError
from provenn.experiments import latency


def tiny(width: int = 2) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, width, 3, bias=False), nn.BatchNorm2d(width), nn.AdaptiveAvgPool2d(1))


class Fussy(nn.Module):
    """Runs, and cannot be traced."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum().item() > -1 else x


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch):
    def compiled(model: nn.Module, image: Tensor, threads: int):
        raise RuntimeError("No working C++ compiler\nfound in here")

    monkeypatch.setattr(latency, "_compiled", compiled)


@pytest.mark.usefixtures("no_compiler")
def test_each_form_is_timed_beside_the_reference_and_trouble_costs_no_other(tmp_path: Path):
    def broken() -> nn.Module:
        raise ValueError("heads must divide dim")

    networks = {"small": tiny, "wide": partial(tiny, 5), "fussy": Fussy, "broken": broken}
    options = {"size": 8, "batches": [1, 3], "threads": [1], "rounds": 6}
    with pytest.warns(UserWarning) as said:
        result = latency.measure(networks, **options, reference="small")
    lines = [str(each.message) for each in said]
    by = {(each.network, each.form, each.batch): each for each in result.latencies}
    for batch in (1, 3):
        for form in ("eager", "ONNX Runtime"):
            assert by["small", form, batch].ratio == 1 and len(by["wide", form, batch].seconds) == 6
            low, high = by["wide", form, batch].interval or (0, 0)
            assert 0 < low <= (by["wide", form, batch].ratio or 0) <= high
        assert by["fussy", "eager", batch].seconds and by["fussy", "ONNX Runtime", batch].trouble
        assert by["wide", "torch.compile", batch].trouble.startswith("no compiler: RuntimeError: No working C++")
    assert set(result.costs) == {"small", "wide", "fussy"} and "broken" in result.troubles
    assert result.costs["wide"] == latency.Cost(5 * 27 + 10, 5 * 27 * 36, True) and not result.costs["fussy"].fused
    assert any("broken: left out: ValueError: heads must divide dim" in line for line in lines)
    assert all("\n" not in line for line in lines)
    files = result.save(tmp_path)
    assert [file.suffix for file in files] == [".md", ".png", ".json"] and all(file.stat().st_size for file in files)
    assert len(json.loads(files[2].read_text())["latencies"]) == 2 * 3 * 3
    assert "failed" in files[0].read_text() and "CPU time" in files[0].read_text()


@pytest.mark.usefixtures("no_compiler")
def test_more_threads_are_timed_by_the_wall_and_told_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(latency, "_onnx", latency._eager)
    seen = []
    monkeypatch.setattr(cost.time, "process_time", lambda: seen.append("cpu") or 0.0)
    result = latency.measure({"one": tiny}, size=8, batches=[1], threads=[2], rounds=1)
    assert not seen and "wall clock" in result.tables[0].caption
    assert result.latencies[0].interval is None  # one round gives none
    latency.measure({"one": tiny}, size=8, batches=[1], threads=[1], rounds=1)
    assert seen and torch.get_num_threads() >= 1


@pytest.mark.parametrize(
    "options, says",
    [
        ({"batches": [0]}, "batch must be at least 1, got 0"),
        ({"forms": ["eager", "lazy"]}, "forms are eager, torch.compile, ONNX Runtime; got lazy"),
        ({"reference": "other"}, "the reference 'other' is none of the networks: one"),
    ],
)
def test_bad_numbers_and_names_are_refused(options: dict, says: str):
    with pytest.raises(UserError, match=says):
        latency.measure({"one": tiny}, **options)


def test_forms_are_chosen():
    result = latency.measure({"one": tiny}, size=8, batches=[1], threads=[1], rounds=1, forms=["eager"])
    assert [each.form for each in result.latencies] == ["eager"] and result.tables[0].columns[-1] == "eager"
    with pytest.raises(UserError, match="--forms must name some of eager, compile, onnx, got 'lazy'"):
        _forms("lazy")
    assert _forms("onnx, eager") == ["eager", "ONNX Runtime"]


def test_backbones_are_found_by_preset_and_by_paper():
    assert list(latency.ours(["eca_resnet18"])) == ["eca_resnet18"]
    found = latency.ours(["eca_net"])
    assert {"eca_resnet20", "eca_resnet50", "eca_mobilenet_v2"} <= set(found)
    assert hasattr(found["eca_resnet20"](), "features")
    assert "moh_vit_digits" not in latency.ours(["moh"])  # it has no pyramid
    with pytest.raises(UserError, match="no backbone is called 'eca_resnet17', did you mean"):
        latency.ours(["eca_resnet17"])


@pytest.mark.parametrize("name", ["emov2_small", "moh_vit_digits", "bevanet_tiny_classifier", "l2vit_mini"])
def test_small_presets_are_built_for_the_images_that_are_timed(name: str):
    model = latency.ours([name], size=32)[name]().eval()  # grey ones, of 8 pixels too, by default
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 32, 32)).ndim == 2
