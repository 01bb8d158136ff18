"""Pruned models: three forms of the same weights, masks in files, and counts that can be checked by hand."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

from provenn.core.errors import UserError
from provenn.nn.masks import Masks
from provenn.surgery import pruned


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Flatten(2), nn.Linear(16, 5), nn.Flatten(), nn.Linear(30, 4))


def masked(share: float = 0.4) -> tuple[nn.Module, Masks]:
    model = network()
    torch.manual_seed(1)
    kept = {name: torch.rand_like(model.get_parameter(name)) < share for name in ("0.weight", "2.weight")}
    kept["2.weight"][3] = False  # an empty row
    masks = Masks(kept, {"0.weight": "first", "2.weight": "second"})
    masks.apply(model)
    return model, masks


@pytest.mark.parametrize("form", pruned.FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_form_gives_the_same_outputs(form, dtype, tmp_path):
    model, masks = masked()
    model.to(dtype)
    pruned.save_packed(model, masks, tmp_path / "m.safetensors", form)
    again = network().to(dtype)
    again.load_state_dict(pruned.load_packed(tmp_path / "m.safetensors"))
    x = torch.randn(2, 3, 4, 4, dtype=dtype)
    assert torch.equal(model(x), again(x))
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_kept_weight_that_is_zero_is_kept_and_a_removed_one_that_is_not_is_gone(tmp_path):
    model, masks = masked()
    with torch.no_grad():
        model[2].weight.fill_(0)
        model[2].weight[0, 0] = 3.0
    masks.kept["2.weight"][0, 0] = False
    for form in pruned.FORMS:
        state = pruned.unpack(pruned.pack(model, masks, form), {n: tuple(m.shape) for n, m in masks.kept.items()})
        assert not state["2.weight"].any(), form


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 3, 512])
def test_counts_of_bytes_are_those_of_the_tensors_and_break_even_where_it_is_said(dtype, width):
    model = nn.Linear(width, 512, bias=False).to(dtype)
    count = 512 * width
    for kept in {count, count - 1, *(int(share * count) for share in (0.98, 0.96, 0.92, 0.6, 0.52, 0.44, 0.3, 0.1)), 0}:
        masks = Masks({"weight": (torch.randperm(count) < kept).view(512, width)})
        summary = pruned.summarise(model, masks)
        for form in pruned.FORMS:
            assert summary.sizes[form] == sum(tensor.nbytes for tensor in pruned.pack(model, masks, form).values())
        for form, even in summary.break_even.items():
            gone = (count - kept) / count
            assert (even is not None and gone > even) == (summary.sizes[form] < summary.sizes["dense"]), (form, kept)
    assert (summary.break_even["csr"] is None) == (
        (width == 1 and dtype != torch.float64) or (width < 3 and dtype == torch.bfloat16)
    )


def test_counts_of_weights_and_multiply_adds():
    model, masks = masked()
    summary = pruned.summarise(model, masks, lambda: model(torch.zeros(1, 3, 4, 4)))
    kept = {name: int(mask.sum()) for name, mask in masks.kept.items()}
    total = 6 * 27 + 6 + 5 * 16 + 5 + 4 * 30 + 4
    assert (summary.parameters, summary.kept) == (total, total - (162 - kept["0.weight"]) - (80 - kept["2.weight"]))
    assert summary.macs == 16 * 162 + 6 * 80 + 120  # 16 places of the map, 6 rows of the linear layer
    assert summary.macs_kept == 16 * kept["0.weight"] + 6 * kept["2.weight"] + 120
    assert summary.groups() == {"first": (kept["0.weight"], 162), "second": (kept["2.weight"], 80)}
    assert summary.dense == ("4",) and not any(module._forward_hooks for module in model.modules())
    report = summary.json()
    assert report["parameters"]["removed share"] == pytest.approx(1 - summary.kept / total)
    assert report["multiply_adds"]["removed share"] == pytest.approx(1 - summary.macs_kept / summary.macs)
    lines = pruned.draw(summary).axes[0].lines
    assert [line.get_label() for line in lines] == ["first", "second"]
    assert [line.get_ydata()[0] for line in lines] == pytest.approx([kept["0.weight"] / 162, kept["2.weight"] / 80])


def test_layers_are_listed_and_drawn_along_the_model_whatever_the_order_of_the_masks():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    kept = {f"{i}.weight": torch.arange(16).view(4, 4) < 3 * i + 2 for i in (3, 0, 2, 1)}
    summary = pruned.summarise(model, Masks(kept, {f"{i}.weight": "even" if i % 2 == 0 else "odd" for i in range(4)}))
    assert [(layer.name, layer.kept) for layer in summary.layers] == [(f"{i}.weight", 3 * i + 2) for i in range(4)]
    assert summary.groups() == {"even": (10, 32), "odd": (16, 32)}
    even, odd = pruned.draw(summary).axes[0].lines
    assert even.get_xydata().tolist() == [[0, 2 / 16], [2, 8 / 16]]
    assert odd.get_xydata().tolist() == [[1, 5 / 16], [3, 11 / 16]]


def test_a_layer_that_is_called_twice_costs_twice_and_a_kept_zero_costs_all_the_same():
    layer = nn.Linear(3, 3, bias=False)
    with torch.no_grad():
        layer.weight.zero_()
    model = nn.Sequential(layer, layer)
    masks = Masks({"0.weight": torch.arange(9).view(3, 3) < 5})
    summary = pruned.summarise(model, masks, lambda: model(torch.zeros(1, 3)))
    assert (summary.macs, summary.macs_kept, summary.layers[0].kept) == (18, 10, 5)


class Reader(nn.Module):
    """Reads the weights of its layers by itself, as `MultiheadAttention` reads those of its projection."""

    def __init__(self, how: str):
        super().__init__()
        self.how, self.layer, self.up = how, nn.Linear(3, 4, bias=False), nn.ConvTranspose1d(3, 4, 2, bias=False)

    def forward(self, x):  # (5, 3)
        weight = self.layer.weight
        if self.how == "some rows":
            return nn.functional.linear(x, weight[1:3])
        if self.how == "cast":
            return x.double() @ weight.double().T
        if self.how == "einsum":
            return torch.einsum("nd,gcd->ngc", x, weight.unflatten(0, (2, 2)).transpose(0, 1))
        return self.up(x.T[None])  # 5 places, each of which every weight of this layer meets


@pytest.mark.parametrize(
    ("how", "times", "rows"),
    [("some rows", 5, slice(1, 3)), ("cast", 5, slice(None)), ("einsum", 5, slice(None)), ("transposed", 5, None)],
)
def test_a_removed_weight_saves_wherever_it_is_read(how, times, rows):
    model = Reader(how)
    gone = torch.rand(4, 3) < 0.4, torch.rand(3, 4, 2) < 0.4
    masks = Masks({"layer.weight": ~gone[0], "up.weight": ~gone[1]})
    summary = pruned.summarise(model, masks, lambda: model(torch.rand(5, 3)))
    met = gone[1] if rows is None else gone[0][rows]
    assert summary.macs == times * met.numel() and summary.macs - summary.macs_kept == times * int(met.sum())


@pytest.mark.parametrize("masked", [("a",), ("b",), ("a", "b")])
def test_layers_whose_weights_lie_in_one_storage_are_told_apart(masked):
    flat = torch.rand(3 * 4 + 4 * 2)
    model = nn.Sequential(OrderedDict(a=nn.Linear(3, 4, bias=False), b=nn.Linear(4, 2, bias=False)))
    model.a.weight, model.b.weight = nn.Parameter(flat[:12].view(4, 3)), nn.Parameter(flat[12:].view(2, 4))
    gone = {"a.weight": torch.eye(4, 3).bool(), "b.weight": torch.eye(2, 4).bool()}
    kept = {f"{name}.weight": ~gone[f"{name}.weight"] for name in masked}
    summary = pruned.summarise(model, Masks(kept), lambda: model(torch.rand(5, 3)))
    assert summary.macs - summary.macs_kept == 5 * sum(int((~mask).sum()) for mask in kept.values())


def test_the_projection_of_torchs_attention_saves_too():
    model = nn.MultiheadAttention(4, 2, bias=False, batch_first=True)
    kept = {"in_proj_weight": torch.rand(12, 4) < 0.5, "out_proj.weight": torch.rand(4, 4) < 0.5}
    summary = pruned.summarise(model, Masks(kept), lambda: model(*[torch.rand(1, 5, 4)] * 3, need_weights=False))
    assert summary.macs - summary.macs_kept == 5 * sum(int((~mask).sum()) for mask in kept.values())


@pytest.mark.parametrize("form", pruned.FORMS)
def test_nine_bits_take_two_bytes(form):
    layer, masks = nn.Linear(3, 3, bias=False), Masks({"weight": torch.arange(9).view(3, 3) < 5})
    packed = pruned.pack(layer, masks, form)
    assert pruned.summarise(layer, masks).sizes[form] == sum(tensor.nbytes for tensor in packed.values())


def test_masks_come_back_from_their_file(tmp_path):
    _, masks = masked()
    pruned.save_masks(masks, tmp_path / "masks.safetensors")
    again = pruned.load_masks(tmp_path / "masks.safetensors")
    assert again.groups == masks.groups and again.kept.keys() == masks.kept.keys()
    assert all(torch.equal(mask, again.kept[name]) for name, mask in masks.kept.items())
    assert {mask.dtype for mask in again.kept.values()} == {torch.bool}
    assert (tmp_path / "masks.safetensors").stat().st_size < 600


def test_other_files_are_refused_in_one_line(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    for file, words in (
        ("other", "no packed model"),
        ("text", "no readable safetensors"),
        ("none", "cannot be read: No such file"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            pruned.load_packed(tmp_path / f"{file}.safetensors")
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="holds no masks"):
        pruned.load_masks(tmp_path / "other.safetensors")
    save_file(
        {"a": torch.zeros(2, dtype=torch.uint8)},
        tmp_path / "s.safetensors",
        {"masks": '{"a": {"shape": [3, 9], "group": ""}}'},
    )
    with pytest.raises(UserError, match="holds no masks, or is damaged"):
        pruned.load_masks(tmp_path / "s.safetensors")
    with pytest.raises(UserError, match="form must be one of dense, mask, csr, got 'coo'"):
        pruned.pack(*masked(), "coo")
