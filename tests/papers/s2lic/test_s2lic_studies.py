"""S2LIC's studies: sides of equal size, what each may see, and probes against their definitions."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from provenn.core.cost import count_parameters
from provenn.data.photographs import NAMES, photograph
from provenn.evidence.study import TUNING_SEED
from provenn.papers.s2lic import studies
from provenn.papers.s2lic.context import anchors
from provenn.papers.s2lic.model import SMALL
from provenn.papers.s2lic.task import pictures
from provenn.papers.s2lic.task.metrics import Coded, psnr, through_pillow
from provenn.tasks import TaskData
from provenn.training import Fit, Recipe


def coder(name):
    torch.manual_seed(0)
    model = studies.CODERS[name][1]().eval()
    lasts = [each.parameters_of[-1] for each in (*model.first, *model.second)] if hasattr(model, "first") else []
    with torch.no_grad():  # scales that lie above their floor, and differ clearly from site to site
        for last in lasts:
            last.weight.mul_(20)
            last.bias[: len(last.bias) // 2] += 1
    return model


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("channel", "stack for AC"),
        ("both", "channel, stack"),
        ("both", "stack, inter"),
        ("intra", "intra plain"),
        ("intra", "parallel"),
        ("intra", "fixed"),
        ("intra", "global"),
        ("intra", "window"),
        ("intra", "pointwise"),
    ],
)
def test_entropy_models_that_are_compared_have_equal_size(one, other):
    sizes = [count_parameters(coder(name)) for name in (one, other)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.005)


def test_codecs_that_are_compared_have_equal_size():
    sizes = {name: count_parameters(studies.codec(name)) for name in ("full", "convolutions", "no dense", "channel")}
    assert list(sizes.values()) == pytest.approx([sizes["full"]] * 4, rel=0.005)


@pytest.mark.parametrize("name", list(studies.CODERS))
@torch.no_grad()
def test_no_entropy_model_sees_what_is_not_decoded(name):
    """Bits of what comes first do not change with what comes last."""
    model = coder(name)
    y = 3 * torch.randn(1, 40, 8, 8, generator=torch.Generator().manual_seed(1))
    changed = y.clone()
    if name == "serial":
        changed[:, :, 6:] += 5
        first = (slice(None), slice(None), slice(0, 6))
    else:
        changed[:, 32:] += 5
        first = (slice(None), slice(0, 32))
    hyper = 0.3 * torch.randn(1, 80, 8, 8, generator=torch.Generator().manual_seed(2))
    model.hyper_decoder = Always(hyper)
    before, after = (model(x)[1][first] for x in (y, changed))
    assert torch.equal(before, after)


class Always(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return self.value


@torch.no_grad()
def test_in_one_pass_the_second_half_of_a_slice_sees_nothing_of_the_first():
    y = 3 * torch.randn(1, 40, 8, 8, generator=torch.Generator().manual_seed(1))
    changed = y.clone()
    changed[:, 16:24] += 7 * anchors(y)
    for name, sees in (("parallel", False), ("intra", True), ("intra plain", True)):
        model = coder(name)
        model.hyper_decoder = Always(torch.zeros(1, 80, 8, 8))
        other = (1 - anchors(y)).bool().expand(8, -1, -1)
        before, after = (model(x)[1][0, 16:24][other] for x in (y, changed))
        assert torch.equal(before, after) is not sees, name


@torch.no_grad()
def test_the_serial_decoder_walks_as_its_training_sees_it():
    model = coder("serial")
    hyper = torch.randn(1, 80, 4, 6)
    decoded = model.decode(hyper)
    _, mean = model.parameters_of(torch.cat([model.around(decoded), hyper], 1)).chunk(2, 1)
    torch.testing.assert_close(decoded, mean)


@torch.no_grad()
def test_window_attention_is_attention_in_each_window():
    torch.manual_seed(0)
    layer = studies.Windows(16, 8)
    u = torch.randn(2, 16, 8, 24)
    out = layer(u)
    for start in (0, 8, 16):
        part = u[..., start : start + 8]
        q, k, v = (conv(part).reshape(2, 2, 8, 64).transpose(2, 3) for conv in (layer.q, layer.k, layer.v))
        expected = (q @ k.transpose(2, 3) / math.sqrt(8)).softmax(-1) @ v
        torch.testing.assert_close(out[..., start : start + 8], expected.transpose(2, 3).reshape(2, 16, 8, 8))


def test_offsets_that_are_fixed_stay_at_zero():
    model = coder("fixed").train()
    _, y, _ = model(torch.randn(2, 40, 8, 8))
    y.log2().sum().backward()
    layer = model.contexts[0].parts[1].attention[0]
    assert all(p.grad is None for p in layer.offsets.parameters())
    assert not layer.offsets[-1].weight.any()


@torch.no_grad()
def test_attention_to_all_sites_is_global_attention():
    layer = coder("global").contexts[0].parts[1].attention[0]
    u = torch.randn(1, 8, 4, 6)
    q, k, v = (conv(u).reshape(1, 1, 8, 24).transpose(2, 3) for conv in (layer.q, layer.k, layer.v))
    expected = ((q @ k.transpose(2, 3) / math.sqrt(8)).softmax(-1) @ v).transpose(2, 3).reshape(u.shape)
    torch.testing.assert_close(layer(u), expected)


def test_gdn_divides_and_its_inverse_multiplies():
    x = torch.randn(1, 3, 2, 2)
    expected = x / (1 + 1e-6 + 0.1 * x * x).sqrt()
    torch.testing.assert_close(studies.GDN(3)(x), expected)
    torch.testing.assert_close(studies.GDN(3, inverse=True)(x), x * (x / expected))


def test_the_dummy_baseline_counts_each_channel():
    train = torch.tensor([0.0, 0, 0, 1]).view(4, 1, 1, 1).expand(-1, 2, 1, 1)
    test = torch.tensor([0.0, 1]).view(2, 1, 1, 1).expand(-1, 2, 1, 1)
    data = TaskData("x", TensorDataset(train), TensorDataset(test), TensorDataset(test), fingerprint="x")
    expected = 2 * (-math.log2(4 / 261) - math.log2(2 / 261)) / (2 * 256**2)
    assert studies.LatentCoding().dummy_baseline(data) == pytest.approx(expected)


def test_parts_of_a_study_share_no_photograph():
    data = studies.folds(3, True)
    for index in range(len(data.test)):
        pixels = data.test[index].permute(1, 2, 0).numpy()
        names = [name for name in NAMES if np.array_equal(pixels, pictures.middle(name, 192))]
        assert len(names) == 1
        assert not any(np.array_equal(photograph(names[0]), photo) for photo in data.train.photos)
    assert studies.TRAIN and not {*studies.TRAIN} & {*studies.TEST, *studies.VALIDATE}


@pytest.mark.parametrize("seed", [0, 4])
def test_at_full_size_too_no_photograph_is_on_two_sides(seed):
    data = studies.folds(seed, False)
    tested = [
        name
        for part in (data.val, data.test)
        for i in range(len(part))
        for name in NAMES
        if np.array_equal(part[i].permute(1, 2, 0).numpy(), pictures.middle(name))
    ]
    trained = [name for name in NAMES for photo in data.train.photos if np.array_equal(photograph(name), photo)]
    assert len(tested) == 3 and len(trained) == 6 and not {*tested} & {*trained}


def test_a_sweep_is_tuned_from_the_first_at_other_prices_and_a_third_of_its_rate(monkeypatch):
    calls = []

    def fit(build, task, data, recipe, **options):
        model = build()
        calls.append(({name: t.clone() for name, t in model.state_dict().items()}, recipe, model.lam))
        with torch.no_grad():
            model.encoder[1].bias.add_(len(calls))
        return Fit(model, {})

    monkeypatch.setattr(studies, "fit", fit)
    recipe = Recipe(epochs=3, lr=0.03)
    none = TensorDataset(torch.empty(0))
    data = TaskData("x", none, none, none, fingerprint="x")
    done = studies.swept(lambda: studies.codec("hyperprior"), studies.Sweeping(), data, recipe)
    first, *others = done.model.members
    assert [member.lam for member in (first, *others)] == [studies.LAM, *studies.PRICES] == [lam for *_, lam in calls]
    for state, tuning, _ in calls[1:]:
        assert all(torch.equal(state[name], value) for name, value in first.state_dict().items())
        assert (tuning.lr, tuning.max_steps) == (pytest.approx(0.01), studies.TUNING)
    assert not torch.equal(others[0].encoder[1].bias, first.encoder[1].bias)
    before = len(calls)
    done = studies.swept(lambda: studies.codec("hyperprior"), studies.Sweeping(), data, recipe, seed=TUNING_SEED)
    assert len(calls) == before + 1 and not isinstance(done.model, studies.Sweep)  # a rate is chosen at the first λ


def test_the_bits_of_a_latent_are_those_of_y_and_z():
    model = coder("both")
    y = torch.randn(2, 40, 8, 8, generator=torch.Generator().manual_seed(0))
    task = studies.LatentCoding()
    with torch.no_grad():
        _, likely, hyper = model(y)
        each = [float(-(likely[i].log2().sum() + hyper[i].log2().sum())) / 256**2 for i in (0, 1)]
        assert task.scores(model, TensorDataset(y))["bpp"].tolist() == pytest.approx(each, rel=1e-4)
        loss = task.loss(model, (y,))
    assert float(loss) == pytest.approx(np.mean(each) + 1e-3 * float(model.prior.auxiliary_loss()), rel=1e-4)


def test_a_bd_rate_against_jpeg_is_zero_for_jpeg(monkeypatch):
    class Member(nn.Module):
        def __init__(self, quality):
            super().__init__()
            self.quality = quality

    monkeypatch.setattr(
        studies, "estimate", lambda model, pixels: through_pillow(pixels, "JPEG", quality=model.quality)
    )
    data = studies.folds(0, True)
    sweep = studies.Sweep([Member(q) for q in (12, 25, 50)])
    assert studies.against_jpeg(psnr)(sweep, data) == pytest.approx(0, abs=3)
    monkeypatch.setattr(
        studies, "estimate", lambda model, pixels: half(through_pillow(pixels, "JPEG", quality=model.quality))
    )
    assert studies.against_jpeg(psnr)(sweep, data) == pytest.approx(-50, abs=2)


def half(coded):
    return Coded(coded.pixels, coded.bits / 2)


def test_latents_are_those_of_the_shipped_encoder():
    data = studies.latents(0, True)
    assert data.test[0][0].shape == (SMALL.latent, 8, 8)
    assert data.fingerprint == studies.latents(0, True).fingerprint != studies.latents(1, True).fingerprint
    rng = np.random.default_rng(2)
    photo = photograph("chelsea")
    top, left = (int(rng.integers(length - 127)) for length in photo.shape[:2])
    x = torch.from_numpy(photo[top : top + 128, left : left + 128].copy()).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():
        torch.testing.assert_close(studies.frozen()(x)[0], data.test[0][0])


def test_without_a_shared_quality_there_is_no_bd_rate(monkeypatch):
    monkeypatch.setattr(
        studies,
        "estimate",
        lambda model, pixels: Coded(255 - pixels, through_pillow(pixels, "JPEG", quality=1).bits * 2),
    )
    assert math.isnan(studies.against_jpeg(psnr)(nn.Identity(), studies.folds(0, True)))


@pytest.mark.parametrize("part", studies.BEGUN)
def test_codecs_begin_with_the_transform_that_ships_and_a_drawn_entropy_model(part):
    torch.manual_seed(0)
    one, other = studies.begun(part), studies.begun(part)
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(one.encoder.eval()(x), studies.frozen()(x))
    equal = [
        torch.equal(value, other.coder.state_dict()[name])
        for name, value in one.coder.state_dict().items()
        if name.endswith("weight") and value.dim() == 4
    ]
    assert sum(equal) < len(equal) / 2  # offsets begin at zero
    assert all(torch.equal(v, other.decoder.state_dict()[k]) for k, v in one.decoder.state_dict().items())


def test_what_the_shipped_transform_saw_is_not_tested():
    data = studies.unseen(0, False)
    assert len(data.test) == 6 and len(data.train.photos) == len(studies.TRAIN)
    for index, name in enumerate(name for name in studies.TEST for _ in range(2)):
        square, photo = data.test[index].permute(1, 2, 0).numpy(), photograph(name)
        windows = np.lib.stride_tricks.sliding_window_view(photo[..., 0], (256, 256))
        places = np.argwhere(windows[:, :, 0, 0] == square[0, 0, 0])
        assert any(np.array_equal(photo[y : y + 256, x : x + 256], square) for y, x in places)
    assert not {*studies.TEST} & {*studies.TRAIN, *studies.VALIDATE}
    assert data.fingerprint != studies.unseen(1, False).fingerprint
