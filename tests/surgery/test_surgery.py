"""Surgery on plain and on Hugging Face models: the result runs, trains, saves and says what changed."""

import copy
import io
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from provenn.core.cost import count_parameters
from provenn.core.errors import UserError
from provenn.surgery import insert_after, remove, swap


class ChannelScale(nn.Module):
    """A stand-in for a channel gate: one factor a channel."""

    def __init__(self, channels: int, start: float = 1.0):
        super().__init__()
        self.scale = nn.Parameter(torch.full((channels,), start))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.view(-1, *[1] * (x.dim() - 2)) if x.dim() > 3 else x * self.scale


class Branch(nn.Module):
    """A module with a forward of its own, unlike `nn.Sequential`."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(4, 6)
        self.down = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


@pytest.fixture
def resnet() -> ResNetForImageClassification:
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic", num_labels=3)
    return ResNetForImageClassification(config).eval()


@pytest.fixture
def vit() -> ViTForImageClassification:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8
    )
    return ViTForImageClassification(config).eval()


image = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
BRANCHES = "resnet.encoder.stages.*.layers.*.layer"


def trains(model: nn.Module, parameters: list[nn.Parameter]) -> bool:
    model.train()
    loss = model(image, labels=torch.tensor([0, 1])).loss
    loss.backward()
    return all(p.grad is not None and bool(p.grad.any()) and bool(p.grad.isfinite().all()) for p in parameters)


def test_a_gate_goes_into_every_branch_of_a_resnet(resnet: nn.Module):
    before, keys = count_parameters(resnet), set(resnet.state_dict())
    plain = resnet(image).logits
    changes = insert_after(resnet, BRANCHES, lambda channels: ChannelScale(channels, 0.5), name="gate", example=image)
    assert [change.name for change in changes] == [
        "resnet.encoder.stages.0.layers.0.layer",
        "resnet.encoder.stages.1.layers.0.layer",
        "resnet.encoder.stages.1.layers.1.layer",
    ]
    assert changes.parameters == 8 + 16 + 16 == count_parameters(resnet) - before
    assert not torch.allclose(resnet(image).logits, plain)
    assert set(resnet.state_dict()) - keys == {f"{change.name}.gate.scale" for change in changes}
    assert keys <= set(resnet.state_dict())
    assert trains(resnet, [p for name, p in resnet.named_parameters() if "gate" in name])


def test_a_neutral_insertion_changes_no_output_and_old_weights_load(resnet: nn.Module, vit: nn.Module):
    for model, where in ((resnet, BRANCHES), (vit, "vit.layers.*.attention"), (vit, "vit.layers.*.mlp")):
        plain, weights = model(image).logits, copy.deepcopy(model.state_dict())
        insert_after(model, where, ChannelScale, example=image)
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
        missing, unexpected = model.load_state_dict(weights, strict=False)
        assert all(".inserted." in key for key in missing) and len(missing) >= 2 and not unexpected
        for key in missing:
            nn.init.ones_(model.get_parameter(key))
        torch.testing.assert_close(model(image).logits, plain)


def test_what_returns_a_tuple_is_followed_in_its_first_value(vit: nn.Module):
    plain = vit(image).logits
    changes = insert_after(vit, "vit.layers.*.attention", lambda dim: ChannelScale(dim, 0.0), example=image)
    assert changes.parameters == 2 * 16
    assert not torch.allclose(vit(image).logits, plain)
    remove(vit, "**.inserted")
    torch.testing.assert_close(vit(image).logits, plain)


def test_every_relu_of_a_resnet_becomes_another(resnet: nn.Module):
    changes = swap(resnet, nn.ReLU, lambda relu: nn.PReLU(init=0.0))
    plain = resnet(image).logits
    assert not any(isinstance(module, nn.ReLU) for module in resnet.modules())
    assert changes.parameters == len(changes) == 7
    assert "ReLU becomes PReLU, +1 parameters" in str(changes)
    assert trains(resnet, [m.weight for m in resnet.modules() if isinstance(m, nn.PReLU)])
    assert plain.isfinite().all()


def test_attention_of_a_vit_is_swapped_by_pattern(vit: nn.Module):
    class Mean(nn.Module):
        def __init__(self, dim: int):
            super().__init__()
            self.project = nn.Linear(dim, dim)

        def forward(self, hidden_states: Tensor, *_: object) -> tuple[Tensor, None]:
            return self.project(hidden_states.mean(1, keepdim=True)).expand_as(hidden_states), None

    changes = swap(vit, "vit.layers.*.attention", lambda old: Mean(old.q_proj.in_features))
    assert len(changes) == 2 and changes.parameters == 2 * (16 * 17 - 4 * 16 * 17)
    assert trains(vit, [p for name, p in vit.named_parameters() if "attention" in name])


def test_the_factory_sees_the_old_module_and_may_keep_its_weights():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    x, plain = torch.randn(2, 4), model(torch.zeros(2, 4))
    swap(model, "1", lambda old: nn.Sequential(old, nn.ReLU()))
    torch.testing.assert_close(model(torch.zeros(2, 4)), plain.relu())
    assert model(x).shape == (2, 4)


def test_a_factory_may_leave_a_place_alone():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3))
    assert len(insert_after(model, nn.Conv2d, lambda width: None)) == 0
    changes = swap(model, nn.Conv2d, lambda old: nn.Conv2d(8, 8, 5) if old.kernel_size == (3, 3) else None)
    assert [change.name for change in changes] == ["1"]


def saved_and_loaded(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, saved_and_loaded])
def test_a_copy_runs_its_own_inserted_modules(copied):
    model = nn.Sequential(nn.Linear(4, 4), Branch())
    insert_after(model, "**", lambda width: ChannelScale(width, 0.5), example=torch.randn(1, 4))
    other, x = copied(model), torch.randn(2, 4)
    torch.testing.assert_close(other(x), model(x))
    before = model(x)
    for name, parameter in other.named_parameters():
        if "inserted" in name:
            nn.init.zeros_(parameter)
    assert not other(x).any()
    torch.testing.assert_close(model(x), before)


def test_in_another_process_a_later_hook_does_not_displace_an_inserted_module(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4))
    insert_after(model, "0", nn.LayerNorm)
    torch.save(model, tmp_path / "model.pt")
    script = (
        "import sys, torch; model = torch.load(sys.argv[1], weights_only=False)\n"
        "for _ in range(50): model[0].register_forward_hook(lambda *_: None)\n"
        "assert len(model[0]._forward_hooks) == 51, len(model[0]._forward_hooks)"
    )
    environment = {"PYTHONPATH": ":".join(sys.path)}
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "model.pt")], check=True, env=environment)


@pytest.mark.usefixtures("untyped")
def test_the_result_compiles_and_exports():
    model = nn.Sequential(nn.Linear(4, 4), Branch(), nn.Sequential(nn.Linear(4, 4))).eval()
    x = torch.randn(2, 4)
    insert_after(model, ["1", "1.up", "2"], lambda width: ChannelScale(width, 0.5), example=x)
    swap(model, "0", lambda old: nn.Sequential(old, nn.GELU()))
    expected = model(x)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), expected)
    for strict in (False, True):
        exported = torch.export.export(model, (x,), strict=strict)
        torch.testing.assert_close(exported.module()(x), expected)
    assert "1.up.inserted.scale" in exported.state_dict


@pytest.mark.parametrize("last", [nn.Sequential(nn.Identity()), nn.Identity()])
def test_an_inserted_module_runs_once(last: nn.Module):
    model = nn.Sequential(nn.Linear(4, 4), last)
    insert_after(model, "1", lambda width: ChannelScale(width, 0.5), example=torch.randn(1, 4))
    x = torch.randn(2, 4)
    torch.testing.assert_close(model(x), model[0](x) / 2)


def test_inserting_twice_stacks_in_order():
    model = nn.Sequential(Branch())
    insert_after(model, "0", lambda width: nn.Identity())
    insert_after(model, "0", lambda width: nn.Softplus())
    x = torch.randn(2, 4)
    assert (model(x) > 0).all()
    assert {"inserted", "inserted_2"} <= set(dict(model[0].named_children()))
    remove(model, "0.inserted_2")
    torch.testing.assert_close(model(x), Branch.forward(model[0], x))


def test_new_modules_join_the_precision_and_the_mode():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).to(torch.float64).eval()
    insert_after(model, "0", nn.BatchNorm1d)
    swap(model, nn.Dropout, lambda old: nn.Sequential(nn.Linear(4, 4)))
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert not any(module.training for module in model.modules())


def test_a_module_in_use_twice_is_changed_once():
    shared = Branch()
    model = nn.ModuleDict({"a": shared, "b": shared, "c": Branch()})
    changes = insert_after(model, ["a", "b"], ChannelScale)
    assert [change.name for change in changes] == ["a = b"] and changes.parameters == 4
    changes = swap(model, Branch, lambda old: nn.Linear(4, 4))
    assert [change.name for change in changes] == ["a = b", "c"]
    assert model["a"] is model["b"] is not model["c"]


def test_what_is_shared_is_not_changed_behind_the_users_back():
    shared = Branch()
    model = nn.ModuleDict({"a": shared, "b": shared})
    with pytest.raises(UserError, match="a and b are one module"):
        insert_after(model, "a", ChannelScale)
    swap(model, "a", lambda old: nn.Identity())
    assert model["b"] is shared


def test_untying_is_reported():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    changes = swap(model, "head", lambda old: nn.Linear(4, 5, bias=False))
    assert "no longer tied to embed.weight: head.weight" in str(changes)
    assert changes.parameters == 20


def test_a_swap_that_does_not_fit_the_example_is_undone():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    parts, names, x = list(model), list(model.state_dict()), torch.randn(3, 4)
    with pytest.raises(
        UserError, match=r"0: Linear gave \(3, 6\) for this example, Linear gives \(3, 7\); the change is"
    ):
        swap(nn.Sequential(*parts[:1]), "0", lambda old: nn.Linear(4, 7), example=x)
    with pytest.raises(UserError, match="shapes cannot be multiplied"):
        swap(model, nn.Linear, lambda old: nn.Linear(5, old.out_features), example=x)
    assert list(model) == parts and list(model.state_dict()) == names
    y = model(x)
    with pytest.raises(UserError, match="TypeError"):
        swap(model, "1", lambda old: nn.Bilinear(1, 1, 1), example=x)
    assert list(model) == parts and torch.equal(model(x), y) and model.training
    assert len(swap(model, "1", lambda old: nn.Tanh(), example=(x,))) == 1 and isinstance(model[1], nn.Tanh)


def test_the_outer_of_two_matches_is_swapped():
    model = nn.Sequential(nn.Sequential(nn.Sequential(nn.ReLU())), nn.Sequential())
    changes = swap(model, nn.Sequential, lambda old: nn.Identity())
    assert [change.name for change in changes] == ["0", "1"]
    model = nn.Sequential(nn.Sequential(nn.Sequential(nn.ReLU())))
    changes = swap(model, nn.Sequential, lambda old: None if isinstance(old[0], nn.Sequential) else nn.Identity())
    assert [change.name for change in changes] == ["0.0"]


def test_stars_stand_for_one_name_and_double_stars_for_any_number(resnet: nn.Module):
    def names(pattern: str) -> list[str]:
        return [change.name for change in swap(copy.deepcopy(resnet), pattern, lambda old: nn.Identity())]

    assert names("resnet.*") == ["resnet.embedder", "resnet.encoder", "resnet.pooler"]
    assert len(names("**.shortcut")) == 3
    assert names("**.stages.1.**.shortcut.conv*") == ["resnet.encoder.stages.1.layers.0.shortcut.convolution"]


@pytest.mark.parametrize(
    "where, message",
    [
        ("resnet.encoder.stages.*.layer.*", r"close to it are resnet\.encoder\.stages\.\*\.layers"),
        ("backbone", "there are classifier, "),
        (nn.Conv3d, r"no Conv3d in this ResNetForImageClassification; it has .*ReLU \(7\)"),
        ([nn.ReLU, "nowhere.*"], "nowhere"),
        ([], "`where` is empty: name a module"),
    ],
)
def test_a_place_that_does_not_exist_says_what_does(resnet: nn.Module, where, message: str):
    for operate in (
        lambda: swap(resnet, where, lambda old: nn.Identity()),
        lambda: insert_after(resnet, where, nn.ReLU),
    ):
        with pytest.raises(UserError, match=message) as error:
            operate()
        assert "\n" not in str(error.value)


def test_widths_come_from_the_last_layer_inside_or_from_an_example():
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x, x], dim=1)

    def widths(where: str, **options: object) -> list[int]:
        seen: list[int] = []
        model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 5, 1), nn.ReLU()), Odd())
        insert_after(model, where, lambda width: seen.append(width) or nn.Identity(), **options)
        return seen

    assert widths("0") == [5]
    assert widths("**", example=torch.randn(1, 3, 2, 2)) == [5, 5, 5, 10]
    with pytest.raises(UserError, match=r"the width of 1 .* is unknown"):
        widths("1")


def test_an_insertion_that_fails_on_the_example_is_undone():
    model = nn.Sequential(nn.Linear(4, 4), Branch())
    with pytest.raises(RuntimeError):
        insert_after(model, "*", lambda width: nn.Linear(width + 1, width), example=torch.randn(1, 4))
    assert set(model.state_dict()) == set(nn.Sequential(nn.Linear(4, 4), Branch()).state_dict())
    assert model(torch.randn(1, 4)).shape == (1, 4)


def test_a_swap_that_fails_on_the_example_is_undone():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.Sequential(nn.ReLU(), shared), nn.Linear(4, 2))
    before = dict(model.named_modules())
    x = torch.randn(3, 4)
    for factory, says in (
        (lambda old: nn.Linear(4, 5), "does not run on the example: RuntimeError"),
        (lambda old: nn.Unflatten(1, (2, 2)) if old.out_features == 2 else None, r"gave \(3, 2\).*gives \(3, 2, 2\)"),
    ):
        with pytest.raises(UserError, match=says) as error:
            swap(model, nn.Linear, factory, example=x)
        assert "\n" not in str(error.value) and dict(model.named_modules()) == before
    assert len(swap(model, nn.Linear, lambda old: nn.Linear(4, old.out_features), example=x)) == 2
    assert model.training and model[0] is model[1][1] and model[0] is not shared


def test_a_name_of_the_interface_loads_no_statistics():
    """`scipy.stats` takes as long to load as torch."""
    code = "import sys; from provenn import swap, insert_after; assert 'scipy.stats' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})


def test_a_module_that_is_never_called_is_noticed():
    attention = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True))
    with pytest.raises(UserError, match="does not call 0"):
        insert_after(attention, "0.self_attn.out_proj", ChannelScale, example=torch.randn(1, 3, 8))
    assert not any("inserted" in key for key in attention.state_dict())


def test_an_example_leaves_no_trace():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train()
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    insert_after(model, "0", lambda width: nn.Identity(), example=torch.randn(8, 4))
    assert model.training and not model[1].training
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())


@pytest.mark.usefixtures("untyped")
def test_what_is_no_model_and_no_place_is_refused():
    with pytest.raises(TypeError, match=r"model must be a .*Module, got str"):
        insert_after("resnet", "layer1", nn.BatchNorm2d)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"where must be a name pattern, .* got 3"):
        swap(nn.Sequential(nn.ReLU()), 3, lambda old: nn.GELU())  # type: ignore[arg-type]


def test_a_factory_must_give_a_module():
    with pytest.raises(TypeError, match="must return an nn"):
        swap(nn.Sequential(nn.ReLU()), "0", lambda old: torch.relu)


def test_an_output_that_cannot_be_followed_says_so(vit: nn.Module):
    insert_after(vit, "vit", nn.LayerNorm)
    with pytest.raises(TypeError, match="only a tensor"):
        vit(image)


class Mean(nn.Module):
    """Every token's output is the mean of all, so it knows of later ones and of padding."""

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, None]:
        return hidden_states.mean(dim=1, keepdim=True).expand_as(hidden_states), None


class Forgetful(nn.Module):
    """A running mean that knows nothing of a cache."""

    def __init__(self, counts_padding: bool = True):
        super().__init__()
        self.counts_padding = counts_padding

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **more: object):
        x = hidden_states
        real = torch.ones_like(x[..., :1])
        if attention_mask is not None and not self.counts_padding:
            real = attention_mask[:, 0, -x.shape[1] :, -x.shape[1] :].diagonal(dim1=-2, dim2=-1)[..., None].to(x)
        return (x * real).cumsum(1) / real.cumsum(1).clamp_min(1), None


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=2, hidden_size=16, intermediate_size=16, num_attention_heads=4, vocab_size=60,
        initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


TEXT = torch.randint(60, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("new", "lost"),
    [
        (Mean(), "a token moves outputs before it"),
        (Forgetful(), "padding moves outputs of the text"),
        (Forgetful(counts_padding=False), "a text read on from a cache gives other outputs"),
    ],
)
def test_an_example_shows_which_layer_loses_what_the_model_kept(new: nn.Module, lost: str):
    model = tiny_llama()
    kept = {name: module for name, module in model.named_modules()}
    before = model(TEXT).logits
    names = ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    from provenn.huggingface import as_attention

    made = iter([as_attention("softmax"), lambda old: new])
    with pytest.raises(UserError, match=rf"^{names[1]}: with {type(new).__name__} instead of .*{lost}.*, by .* undone"):
        swap(model, names, lambda old: next(made)(old), example={"input_ids": TEXT})
    assert dict(model.named_modules()) == kept and torch.equal(model(TEXT).logits, before)
    assert "provenn" not in model.config.to_json_string()
    # Without an example nothing is tried.
    swap(model, names[1], lambda old: new)


def test_an_example_shows_a_lost_order_in_a_plain_module():
    from provenn.nn.attention import SoftmaxAttention

    model = nn.Sequential(nn.Linear(8, 8), SoftmaxAttention(8, 2), nn.Linear(8, 8))
    x = torch.randn(2, 7, 8)
    with pytest.raises(UserError, match=r"^1: with SoftmaxAttention instead .* a token moves outputs before it"):
        swap(model, "1", lambda old: SoftmaxAttention(8, 2, causal=False), example=x)
    swap(model, "1", lambda old: SoftmaxAttention(8, 4), example=x)
    both_ways = nn.Sequential(SoftmaxAttention(8, 2, causal=False))
    swap(both_ways, "0", lambda old: SoftmaxAttention(8, 2, causal=False), example=x)
    apart = nn.Sequential(nn.Linear(8, 8))  # there was no order that could be lost
    swap(apart, "0", lambda old: SoftmaxAttention(8, 2, causal=False), example=x)
