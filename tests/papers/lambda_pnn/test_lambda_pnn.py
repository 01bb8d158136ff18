"""λ-PNN: what the brief says must hold exactly, the loss, adaptation, files and the command line."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import provenn
from provenn.core.errors import UserError
from provenn.papers.lambda_pnn import indices, layers, losses, model, sensors, studies, task
from provenn.papers.lambda_pnn.task import fusion, rasters
from provenn.tasks import get_task
from provenn.testing import seeded_array
from provenn.testing.golden import assert_values

GOLDEN = json.loads(Path(__file__).with_name("lambda_pnn_losses.json").read_text())
TASK = get_task("pansharpening")


def drawn(shape, name):
    return torch.from_numpy((seeded_array(shape, name, 1) / np.sqrt(3) + 1) / 2).float()


def scene(side=32, bands=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ms = torch.rand(1, bands, side, side, generator=generator) * 0.6 + 0.2
    return ms, torch.rand(1, 1, 4 * side, 4 * side, generator=generator) * 0.6 + 0.2


# Sensor


def test_the_interpolator_gives_the_coarse_pixels_back_and_wraps_around():
    ms = torch.rand(2, 3, 12, 8)
    wide = sensors.upsample(ms)
    assert torch.equal(wide[..., 2::4, 2::4], ms)
    rolled = sensors.upsample(ms.roll((3, 2), (2, 3)))
    torch.testing.assert_close(rolled, wide.roll((12, 8), (2, 3)))


def test_kernels_are_the_paper_s():
    kernels = sensors.sensor_kernels(sensors.SENSORS["WV3"].gains)
    centres = [0.041594, 0.045138, 0.045756, 0.044529, 0.046382, 0.045756, 0.042746, 0.040470]
    assert kernels[:, 20, 20].tolist() == pytest.approx(centres, abs=5e-7)
    torch.testing.assert_close(kernels.sum(dim=(1, 2)), torch.ones(8, dtype=torch.float64))
    assert bool((kernels >= 0).all())
    assert not torch.allclose(kernels, kernels.mT, rtol=1e-6, atol=0), "the window is along one axis"
    symmetric = sensors.sensor_kernels((0.3,), symmetric=True)
    torch.testing.assert_close(symmetric, symmetric.mT)


def test_a_constant_image_is_seen_as_it_is():
    x = torch.full((1, 3, 64, 48), 0.37)
    seen = sensors.downgrade(x, sensors.sensor_kernels((0.23,) * 3))
    torch.testing.assert_close(seen, torch.full((1, 3, 16, 12), 0.37))


def test_a_shift_moves_whole_pixels_exactly_and_halves_as_the_interpolator_does():
    x = torch.rand(1, 2, 30, 30, dtype=torch.float64)
    moved = sensors.shift(x, torch.tensor([[[2, -4], [0, 0]]]))
    assert torch.equal(moved[0, 0, 5:-5, 5:-5], x[0, 0].roll((1, -2), (0, 1))[5:-5, 5:-5])
    assert torch.equal(moved[0, 1], x[0, 1])
    wave = torch.sin(torch.arange(64, dtype=torch.float64) / 5).expand(1, 1, 64, 64)
    half = sensors.shift(wave, torch.tensor([[[0, 1]]]))[0, 0, 32, 16:-16]
    expected = torch.sin((torch.arange(64, dtype=torch.float64) - 0.5) / 5)[16:-16]
    torch.testing.assert_close(half, expected, rtol=0, atol=1e-4)


def test_how_far_each_band_lies_is_found():
    generator = torch.Generator().manual_seed(0)
    pan = nn.functional.avg_pool2d(torch.rand(1, 1, 150, 150, generator=generator), 5, 1)
    sensor = sensors.SENSORS["GE1"]
    low = sensors.low_pass(pan, sensors.sensor_kernels((sensor.pan_gain,), pan=True))
    shifts = torch.tensor([[[2, -2], [0, 1], [3, -3], [-4, 0]]])
    bands = sensors.shift(low.expand(1, 4, -1, -1), shifts).float()
    assert torch.equal(losses.band_shifts(bands, pan, sensor), shifts)


@pytest.mark.parametrize(
    "given, bands, said",
    [("WV9", 8, "no sensor is called"), ("WV3", 4, "has 8 bands"), ((0.2, 1.5), 2, "between 0 and 1")],
)
def test_a_sensor_that_does_not_fit_is_refused(given, bands, said):
    with pytest.raises(ValueError, match=said):
        sensors.sensor_of(given, bands)


# Indices


@pytest.mark.parametrize("bands", [1, 2, 3, 4, 8])
def test_q2n_of_an_image_with_itself_is_one_and_no_other_is_more(bands):
    x, y = (2048 * drawn([2, bands, 64, 64], name) for name in "ab")
    torch.testing.assert_close(indices.q2n(x, x), torch.ones(2, dtype=torch.float64))
    assert bool((indices.q2n(y, x) < 1).all())


@pytest.mark.parametrize("size", [2, 4, 8])
def test_the_hypercomplex_product_multiplies_lengths_and_is_the_textbook_s(size):
    p, q = torch.randn(2, 50, size, dtype=torch.float64)
    product = indices.product_of(p[..., :, None] * q[..., None, :])
    torch.testing.assert_close(product.norm(dim=1), p.norm(dim=1) * q.norm(dim=1))
    if size == 2:
        expected = torch.view_as_complex(p) * torch.view_as_complex(q)
        torch.testing.assert_close(product, torch.view_as_real(expected))
    if size == 4:
        vector = torch.cross(p[:, 1:], q[:, 1:], dim=1) + p[:, :1] * q[:, 1:] + q[:, :1] * p[:, 1:]
        torch.testing.assert_close(product[:, 1:], vector)


def q_of_one_block(x, reference):
    """Q2ⁿ of one block of real or complex numbers, written out."""
    mean, spread = reference.mean(axis=(1, 2), keepdims=True), reference.std(axis=(1, 2), keepdims=True, ddof=1)
    bands = [(image - mean) / spread + 1 for image in (reference, x)]
    z1, z2 = bands[0][0] + 1j * bands[0][1], bands[1][0] - 1j * bands[1][1]
    m1, m2, n = z1.mean(), z2.mean(), z1.size
    covariance = n / (n - 1) * ((z1 * z2).mean() - m1 * m2)
    power = abs(m1) ** 2 + abs(m2) ** 2
    variance = n / (n - 1) * ((abs(z1) ** 2).mean() + (abs(z2) ** 2).mean() - power)
    return abs(covariance) * 2 * abs(m1) * abs(m2) / power * 2 / variance


def test_q2n_of_two_bands_is_that_of_complex_numbers_block_by_block():
    x, y = (np.rint(2048 * drawn([1, 2, 64, 32], name).double().numpy()) for name in "ab")
    blocks = [q_of_one_block(x[0, :, top : top + 32], y[0, :, top : top + 32]) for top in (0, 32)]
    assert float(indices.q2n(torch.from_numpy(x), torch.from_numpy(y))[0]) == pytest.approx(np.mean(blocks), rel=1e-10)


def test_the_local_correlation_is_that_of_plain_windows():
    a, b = (drawn([1, 1, 20, 17], name).double() for name in "ab")
    for w in (2, 4):
        found = indices.local_correlation(a, b, w)[0, 0].numpy()
        padded = [np.pad(x[0, 0].numpy(), w) for x in (a, b)]
        box = [
            np.array([[p[i + 1 : i + 2 * w + 1, j + 1 : j + 2 * w + 1].sum() for j in range(17)] for i in range(20)])
            for p in padded
        ]
        high = [np.pad(x[0, 0].numpy() - s / (2 * w) ** 2, w) for x, s in zip((a, b), box)]
        i, j = 11, 9
        u, v = (h[i + 1 : i + 2 * w + 1, j + 1 : j + 2 * w + 1] for h in high)
        assert found[i, j] == pytest.approx((u * v).sum() / np.sqrt((u**2).sum() * (v**2).sum()), rel=1e-9)


def test_a_line_of_the_other_image_correlates_wholly_inside_and_flat_regions_not_at_all():
    a = drawn([1, 2, 32, 32], "a")
    for factor in (3.0, -0.5):
        inside = indices.local_correlation(a, factor * a + 0.2, 2)[..., 4:-4, 4:-4]
        torch.testing.assert_close(inside, torch.full_like(inside, np.sign(factor)))
    flat = indices.local_correlation(torch.zeros(1, 1, 16, 16), torch.ones(1, 1, 16, 16), 2)
    assert bool((flat == 0).all()), "nothing is correlated with a region of zeros"


def test_indices_against_their_definitions():
    x, y = (drawn([1, 3, 40, 36], name).double() for name in "ab")
    a, b = x[0].numpy(), y[0].numpy()
    error = [((p - q) ** 2).mean() / q.mean() ** 2 for p, q in zip(a, b)]
    assert float(indices.ergas(x, y)[0]) == pytest.approx(25 * np.sqrt(np.mean(error)), rel=1e-10)
    cosine = (a * b).sum(0) / np.sqrt((a**2).sum(0) * (b**2).sum(0))
    assert float(indices.sam(x, y)[0]) == pytest.approx(np.degrees(np.arccos(cosine)).mean(), rel=1e-9)
    pan = drawn([1, 1, 40, 36], "pan").double()
    fitted, *_ = np.linalg.lstsq(a.reshape(3, -1).T, pan.numpy().ravel(), rcond=None)
    left = pan.numpy().ravel() - a.reshape(3, -1).T @ fitted
    assert float(indices.d_s_r(x, pan)[0]) == pytest.approx(left.var() / pan.numpy().var(), rel=1e-9)
    p, q = a[0, 3:35, 1:33], b[0, 3:35, 1:33]
    covariance = ((p - p.mean()) * (q - q.mean())).mean()
    expected = 4 * covariance * p.mean() * q.mean() / (p.var() + q.var()) / (p.mean() ** 2 + q.mean() ** 2)
    block = (image[:, :1, 3:35, 1:33] for image in (x, y))
    assert float(indices.universal_index(*block, 32)[0, 0]) == pytest.approx(expected, rel=1e-9)


# Layers and networks


def test_the_start_is_the_interpolator():
    network = model.LambdaPNN(3, sensor="photographs", width=8)
    nn.init.zeros_(network.last.weight)
    nn.init.zeros_(network.last.bias)
    stack = torch.rand(1, 4, 20, 24)
    assert torch.equal(network(stack), stack[:, :3])


def test_borders_are_reflected_and_short_sides_continued():
    conv = layers.ReflectConv(1, 1, 7)
    x = torch.rand(1, 1, 12, 9)
    expected = nn.functional.conv2d(nn.functional.pad(x, (3,) * 4, mode="reflect"), conv.weight, conv.bias)
    torch.testing.assert_close(conv(x), expected)
    assert conv(torch.rand(1, 1, 1, 2)).shape == (1, 1, 1, 2)


def test_the_variant_without_attention_is_of_nearly_equal_size():
    counts = [
        sum(p.numel() for p in model.lambda_pnn_small(attention=attention).parameters()) for attention in (True, False)
    ]
    assert abs(counts[0] - counts[1]) <= 0.02 * counts[0]


def test_a_stack_of_other_channels_is_refused():
    for network in (model.LambdaPNN(4, sensor="GE1"), model.PNN(4, sensor="GE1"), model.PanNet(4, sensor="GE1")):
        with pytest.raises(ValueError, match="4 bands and the PAN"):
            network(torch.zeros(1, 9, 16, 16))


@pytest.mark.parametrize("numbers", [(1, 2), (0, 0, 0), (1, -1, 1), (1, 1, 1, 1, 1, 1)])
def test_weights_that_mean_nothing_are_refused(numbers):
    with pytest.raises(ValueError, match="three to five numbers"):
        model.weights_of(numbers)
    assert model.weights_of((1, 2, 3)) == losses.Weights(1, 2, 3)
    assert model.weights_of((0, 0, 3, 1, 0)) == losses.Weights(0, 0, 3, 1, threshold=False)


# Loss


@pytest.mark.parametrize("case", GOLDEN["losses"], ids=[case["sensor"] for case in GOLDEN["losses"]])
def test_losses_and_gradients_are_the_authors(case):
    bands, sensor = case["bands"], sensors.SENSORS[case["sensor"]]
    y = drawn([2, bands, 128, 128], "fused").requires_grad_()
    ms, pan = drawn([2, bands, 32, 32], "ms"), drawn([2, 1, 128, 128], "pan")
    kernels = sensors.sensor_kernels(sensor.gains)
    seen = sensors.downgrade(y, kernels, torch.tensor(case["shifts"]))
    ergas = indices.ergas(seen, ms).mean()
    khan = indices.q2n(2048 * seen, 2048 * ms, round_inputs=False)
    structural = losses.spatial_loss(y, pan, losses.promised(sensors.upsample(ms), pan, kernels))
    assert ergas.item() == pytest.approx(case["ergas"], rel=1e-4)
    assert structural.item() == pytest.approx(case["structural"], rel=1e-4)
    assert khan.tolist() == pytest.approx(case["q2n_unrounded"], rel=1e-4)
    assert indices.q2n(2048 * seen, 2048 * ms).tolist() == pytest.approx(case["q2n"], rel=1e-4)
    for name, loss in (("ergas", ergas), ("khan", 1 - khan.mean()), ("structural", structural)):
        (gradient,) = torch.autograd.grad(loss, y, retain_graph=True)
        assert_values(gradient, case[f"gradient_{name}"], what=f"gradient of {name}")


@pytest.mark.parametrize("case", GOLDEN["losses"], ids=[case["sensor"] for case in GOLDEN["losses"]])
def test_indices_are_the_authors(case):
    bands, expected = case["bands"], case["indices"]
    y, ms, pan = drawn([2, bands, 128, 128], "fused"), drawn([2, bands, 32, 32], "ms"), drawn([2, 1, 128, 128], "pan")
    assert indices.d_s(y, pan, ms).tolist() == pytest.approx(expected["d_s"], rel=1e-3)
    assert float(indices.d_rho(y, pan).mean()) == pytest.approx(expected["d_rho"], rel=1e-5)
    assert float(indices.d_s_r(y, pan).mean()) == pytest.approx(expected["d_s_r"], rel=1e-5)
    assert indices.sam(y, y.roll(1, -1)).tolist() == pytest.approx(expected["sam"], rel=1e-5)


@pytest.mark.parametrize("weights", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0, 1)])
def test_every_term_has_the_gradient_of_finite_differences(weights):
    ms, pan = (part.double() for part in scene())
    stack = fusion.stacked(ms, pan)
    sensor, given = sensors.SENSORS["photographs"], model.weights_of((*weights, *(0,) * (4 - len(weights)), 0))
    y = (stack[:, :3] + 0.05 * drawn([1, 3, 128, 128], "noise").double()).requires_grad_()

    def loss(at):
        return losses.fusion_loss(at, ms, stack, sensor, given)

    (gradient,) = torch.autograd.grad(loss(y), y)
    along = drawn([1, 3, 128, 128], "along").double() - 0.5
    with torch.no_grad():
        difference = (loss(y + 1e-6 * along) - loss(y - 1e-6 * along)) / 2e-6
    assert gradient.abs().sum() > 0
    assert float((gradient * along).sum()) == pytest.approx(float(difference), rel=1e-4)


def test_a_rounded_index_has_no_gradient_which_is_why_the_loss_does_not_round():
    x = (2048 * drawn([1, 3, 32, 32], "a")).requires_grad_()
    (gradient,) = torch.autograd.grad(indices.q2n(x, 2048 * drawn([1, 3, 32, 32], "b")).sum(), x)
    assert bool((gradient == 0).all())


def test_pixels_that_keep_the_promise_count_as_zero():
    ms, pan = scene()
    stack = fusion.stacked(ms, pan)
    y = stack[:, :3]
    distance = 1 - indices.local_correlation(y, pan, 2).clamp_min(-1)
    assert losses.spatial_loss(y, pan, torch.full_like(distance, 3.0)) == 0
    torch.testing.assert_close(losses.spatial_loss(y, pan, torch.full_like(distance, -1.0)), distance.mean().float())


# Task


@pytest.fixture(scope="module")
def photographs():
    return TASK.load("photographs")


def test_no_truth_reaches_the_loss(photographs):
    assert all(len(photographs.train[index]) == 2 for index in (0, 5))
    network = model.lambda_pnn_small()
    ms, pan, truth = (part[None] for part in photographs.test[0])
    losses_seen = {float(TASK.loss(network, (ms, pan, other))) for other in (truth, torch.zeros_like(truth))}
    assert len(losses_seen) == 1


def test_photographs_are_in_one_split_and_seen_by_the_sensor(photographs):
    ms, _, truth = photographs.test[0]
    seen = sensors.downgrade(truth[None], sensors.sensor_kernels((0.23,) * 3))[0]
    assert float((ms - seen).std()) == pytest.approx(task.NOISE, rel=0.1)
    assert not set(task.TRAIN) & {*task.VALIDATE, *task.TEST}
    assert photographs.fingerprint != TASK.load("photographs", seed=1).fingerprint


def test_a_network_that_learns_by_wald_s_protocol_never_sees_the_fine_scale(photographs):
    network = model.lambda_pnn_small()
    network.reduced = True
    ms, pan = (part[None] for part in photographs.train[0])
    shapes = []
    network.register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape[-1]))
    assert float(TASK.loss(network, (ms, pan))) > 0 and shapes == [ms.shape[-1]]


def test_an_interpolator_scores_as_the_dummy_baseline(photographs):
    network = model.lambda_pnn_small().eval()
    nn.init.zeros_(network.last.weight)
    nn.init.zeros_(network.last.bias)
    with torch.no_grad():
        metrics = TASK.evaluate(network, photographs.test)
    assert metrics["ergas"] == pytest.approx(TASK.dummy_baseline(photographs), rel=1e-5)
    assert metrics["ergas"] == pytest.approx(metrics["ergas_interpolated"], rel=1e-5)


def test_classical_methods_are_nearer_to_the_truth_than_interpolation(photographs):
    sensor = sensors.SENSORS["photographs"]
    ms, pan, truth = (part[None] for part in photographs.test[1])
    plain = float(indices.ergas(sensors.upsample(ms), truth))
    for method in (fusion.gsa, fusion.mtf_glp):
        assert float(indices.ergas(method(ms, pan, sensor), truth)) < 0.9 * plain


def test_classical_methods_give_a_scene_without_detail_back():
    ms = torch.full((1, 3, 32, 32), 0.3) + 0.01 * torch.rand(1, 3, 1, 1)
    pan = torch.full((1, 1, 128, 128), 0.4)
    fused = fusion.mtf_glp(ms, pan, sensors.SENSORS["photographs"])
    torch.testing.assert_close(fused, sensors.upsample(ms), rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", [fusion.gsa, fusion.mtf_glp])
def test_classical_methods_do_not_see_the_scale_of_the_pan(photographs, method):
    sensor = sensors.SENSORS["photographs"]
    ms, pan, _ = (part[None] for part in photographs.test[1])
    torch.testing.assert_close(method(ms, 3 * pan + 0.2, sensor), method(ms, pan, sensor), rtol=0, atol=1e-4)


def test_what_wald_s_protocol_leaves_of_the_pan_is_low_passed():
    ms, _ = scene()
    rows, columns = torch.arange(128)[:, None], torch.arange(128)
    chessboard = ((rows + columns) % 2).float()[None, None]
    _, coarse = fusion.reduced(ms, chessboard, sensors.SENSORS["photographs"])
    torch.testing.assert_close(coarse[..., 6:-6, 6:-6], torch.full((1, 1, 20, 20), 0.5), rtol=0, atol=1e-3)


# Studies


@pytest.mark.parametrize("seed", [0, 4])
def test_at_full_size_too_no_photograph_is_on_two_sides(seed):
    data = studies.folds(seed, False)
    trained, tested = data.train.scenes, [*data.val.scenes, *data.test.scenes]
    assert (len(trained), len(tested)) == (6, 3)
    assert not any(torch.equal(ms, other) for ms, _ in trained for other, *_ in tested)


def test_variants_that_are_compared_differ_in_one_thing():
    part = {name: variant for name, (_, variant) in studies.VARIANTS.items()}
    full, clusters = part["full"], part["clusters"]
    for kind, reduced in (("full", "reduced"), ("pnn", "pnn reduced"), ("pannet", "pannet reduced")):
        assert part[reduced] == part[kind]._replace(reduced=True) and not part[kind].reduced
    assert part["random"] == clusters._replace(adaptation=clusters.adaptation._replace(choice="random"))
    assert full == clusters._replace(adaptation=None) and clusters.adaptation.choice == "clusters"
    whole = part["whole"].adaptation
    assert whole.steps * 256**2 == pytest.approx(clusters.adaptation.steps * 3 * clusters.adaptation.tile**2, rel=0.02)
    weights = {name: model.weights_of(part[name].weights) for name in ("full", "spectral", "spatial", "z-pnn")}
    assert weights["spectral"] == weights["full"]._replace(spatial=0)
    assert weights["spatial"] == weights["full"]._replace(ergas=0, khan=0)
    assert weights["z-pnn"] == weights["spatial"]._replace(l1=weights["z-pnn"].l1) and weights["z-pnn"].l1 > 0


def test_scores_and_probes_are_of_the_adapted_network(photographs, monkeypatch):
    network, other = model.lambda_pnn_small().eval(), model.lambda_pnn_small().eval()
    nn.init.constant_(other.last.bias, 0.5)
    for module in (task, studies):
        monkeypatch.setattr(module, "adapted", lambda *_: other)
    one = task.Scenes([photographs.test[0]])
    data = provenn.tasks.TaskData("x", one, one, one, fingerprint="x")
    with torch.no_grad():
        assert TASK.scores(network, one)["ergas"] == TASK.scores(other, one)["ergas"]
        for probe in studies.PROBES.values():
            assert probe(network, data) == probe(other, data)


def test_probes_are_zero_at_the_truth():
    truth = drawn([1, 3, 64, 64], "a")
    for probe in (studies.missing_detail, studies.distance_of_q2n, indices.sam):
        assert float(probe(truth, truth)) == pytest.approx(0, abs=1e-4)
        assert float(probe(drawn([1, 3, 64, 64], "b"), truth)) > 0.1


# Adaptation and tiles


def test_each_scene_draws_tiles_of_its_own_and_always_the_same(monkeypatch):
    seeds = []
    network = model.LambdaPNN(3, sensor="photographs", width=8)
    network.adaptation = model.Adaptation(steps=1, tiles=3, tile=80, choice="random")
    monkeypatch.setattr(fusion, "adapt", lambda *_, seed: seeds.append(seed) or network)
    pans = torch.rand(3, 1, 1, 64, 64)
    for pan in (*pans, *pans):
        fusion.adapted(network, torch.rand(1, 3, 16, 16), pan)
    assert seeds[:3] == seeds[3:] and len(set(seeds)) == 3


def test_adaptation_is_adam_at_the_rate_that_is_given_with_the_authors_decay(monkeypatch):
    given = []
    real = torch.optim.Adam
    monkeypatch.setattr(torch.optim, "Adam", lambda *args, **options: given.append(options) or real(*args, **options))
    network = model.lambda_pnn_small().eval()
    for rate in (None, 0.003):
        fusion.adapt(network, *scene(), model.Adaptation(steps=1, rate=rate))
    assert given == [{"lr": network.rate, "weight_decay": 1e-4}, {"lr": 0.003, "weight_decay": 1e-4}]


def test_adaptation_lowers_its_loss_and_leaves_the_network(photographs):
    network = model.lambda_pnn_small().eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    ms, pan, _ = (part[None, :, : 32 if part.shape[-1] < 100 else 128] for part in photographs.test[0])
    ms, pan = ms[..., :32], pan[..., :128]
    stack = fusion.stacked(ms, pan)

    def loss(of):
        with torch.no_grad():
            return float(losses.fusion_loss(of(stack), ms, stack, of.sensor, of.adapting))

    tuned = fusion.adapt(network, ms, pan, model.Adaptation(steps=6, rate=2e-3), coregister=True)
    assert loss(tuned) < loss(network)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_the_weights_of_the_lowest_loss_are_kept():
    network = model.lambda_pnn_small().eval()
    ms, pan = scene()
    tuned = fusion.adapt(network, ms, pan, model.Adaptation(steps=3, rate=0.3))
    assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), tuned.state_dict().values()))


def test_tiles_are_of_every_kind_and_none_twice():
    stack = torch.rand(1, 4, 128, 128) * 0.02
    stack[..., :64, 64:] += 0.5
    stack[..., 64:, :64] *= 40
    how = model.Adaptation(tiles=3, tile=32)
    chosen = fusion.tiles_of(stack, how, sensors.SENSORS["photographs"])
    assert chosen.shape == (3, 4, 32, 32)
    kinds = {(round(float(tile.mean()), 1), bool(tile.std() > 0.1)) for tile in chosen}
    assert len(kinds) == 3
    assert fusion.tiles_of(stack, model.Adaptation(tiles=16, tile=32), sensors.SENSORS["photographs"]) is stack
    drawn_tiles = fusion.tiles_of(stack, how._replace(choice="random"), sensors.SENSORS["photographs"], seed=1)
    assert len({tile.sum().item() for tile in drawn_tiles}) == 3
    with pytest.raises(ValueError, match="choice must be one of"):
        fusion.tiles_of(stack, how._replace(choice="best"), sensors.SENSORS["photographs"])


def test_tiles_leave_no_seam():
    """Without channel gates, whose pools are of a tile, a tiled result is the whole one but for the borders' reach."""
    network = model.lambda_pnn_small(width=8, attention=False).eval()
    ms, pan = scene(96)
    ms, pan = sensors.upsample(ms[..., ::4, ::4]).repeat(1, 1, 1, 1), nn.functional.avg_pool2d(pan, 5, 1, 2)
    whole, tiled = fusion.fuse(network, ms, pan), fusion.fuse(network, ms, pan, tile=256)
    torch.testing.assert_close(tiled, whole, rtol=0, atol=2e-3)
    torch.testing.assert_close(tiled[..., :140, :140], whole[..., :140, :140], rtol=0, atol=1e-5)


# Files


def rasters_of(tmp_path, dtype="uint16", bands=3, side=32, shift=0.0, crs="EPSG:32633", nodata=None):
    rasterio = pytest.importorskip("rasterio")
    files = []
    for name, count, size, step in (("ms", bands, side, 4.0), ("pan", 1, 4 * side, 1.0)):
        values = (400 + 300 * drawn([count, size, size], name).numpy()).astype(dtype)
        if nodata is not None:
            values[:, : size // 4, : size // 4] = nodata
        file = tmp_path / f"a_{name}.tif"
        transform = rasterio.Affine(step, 0, 500_000 + (shift if name == "pan" else 0), 0, -step, 4_000_000)
        with rasterio.open(
            file, "w", driver="GTiff", count=count, height=size, width=size, dtype=dtype, transform=transform,
            crs=crs if name == "ms" else "EPSG:32633", nodata=nodata,
        ) as opened:  # fmt: skip
            opened.write(values)
        files.append(file)
    return files


def test_a_fused_geotiff_lies_where_the_pan_lies_in_the_type_of_the_ms(tmp_path):
    rasterio = pytest.importorskip("rasterio")
    ms, pan = rasters_of(tmp_path, nodata=0)
    said = TASK.predict(model.lambda_pnn_small().eval(), {}, [pan, ms], tmp_path / "fused.tif")
    assert "R-ERGAS" in said and "wrote" in said
    with rasterio.open(tmp_path / "fused.tif") as fused, rasterio.open(pan) as fine:
        assert (fused.crs, fused.transform, fused.dtypes[0], fused.nodata) == (fine.crs, fine.transform, "uint16", 0)
        values = fused.read()
        assert fused.shape == fine.shape and fused.count == 3
        assert bool((values[:, :32, :32] == 0).all()) and bool((values[:, 40:, 40:] > 0).all())


def test_pixels_that_the_ms_lacks_are_not_invented(tmp_path):
    rasterio = pytest.importorskip("rasterio")
    ms, pan = rasters_of(tmp_path)
    with rasterio.open(ms, "r+") as opened:
        opened.nodata = 0
        values = opened.read()
        values[:, :4, 5:9] = 0
        opened.write(values)
    TASK.predict(model.lambda_pnn_small().eval(), {}, [ms, pan], tmp_path / "fused.tif")
    with rasterio.open(tmp_path / "fused.tif") as fused:
        empty = fused.read() == 0
    assert bool(empty[:, :16, 20:36].all()) and empty.sum() == 3 * 16 * 16


@pytest.mark.parametrize("steps", [float("nan"), float("inf"), 2.5, -1.0])
def test_steps_that_are_no_number_of_steps_are_refused(tmp_path, steps):
    with pytest.raises(UserError, match="--adapting takes a whole number"):
        TASK.predict(model.lambda_pnn_small().eval(), {}, [*tmp_path.parents][:2], tmp_path / "a.npy", adapting=steps)


def test_a_fused_file_is_what_the_network_gives(tmp_path):
    ms, pan = scene()
    for name, part in (("ms", ms), ("pan", pan)):
        np.save(tmp_path / f"{name}.npy", part[0].numpy())
    network = model.lambda_pnn_small().eval()
    TASK.predict(network, {}, [tmp_path / "ms.npy", tmp_path / "pan.npy"], tmp_path / "fused.npy")
    expected = fusion.fuse(network, ms, pan)[0].numpy()
    np.testing.assert_allclose(np.load(tmp_path / "fused.npy"), expected, rtol=1e-6, atol=1e-7)


def test_counts_are_read_by_their_bits_and_written_back(tmp_path):
    ms, pan = rasters_of(tmp_path)
    coarse, fine = rasters.read_raster(ms), rasters.read_raster(pan)
    low, _ = rasters.check_pair(coarse, fine)
    np.testing.assert_allclose(low.numpy(), coarse.values / 2048, rtol=1e-6)
    assert torch.equal(rasters.check_pair(coarse, fine, 12)[0], low / 2)
    wide = np.repeat(np.repeat(low.numpy(), 4, 1), 4, 2)
    rasters.write_raster(tmp_path / "b.npy", wide, coarse, fine)
    np.testing.assert_array_equal(np.load(tmp_path / "b.npy")[:, ::4, ::4], coarse.values)
    rasters.write_raster(tmp_path / "c.npy", np.array([-1.0, 1e9]).reshape(2, 1, 1), coarse, fine)
    assert np.load(tmp_path / "c.npy").ravel().tolist() == [0, 65535]


@pytest.mark.parametrize(
    "change, said",
    [
        ({"shift": 1e5}, "do not overlap"),
        ({"shift": 20.0}, "do not cover the same area"),
        ({"crs": "EPSG:4326"}, "reproject one of them"),
        ({"side": 16}, "at least 128 a side"),
        ({"bands": 4}, "has 4 bands, these weights are for 3"),
    ],
)
def test_a_pair_that_does_not_fit_is_refused_in_a_line(tmp_path, change, said):
    files = rasters_of(tmp_path, **change)
    with pytest.raises(UserError, match=said):
        TASK.predict(model.lambda_pnn_small().eval(), {}, files, tmp_path / "fused.tif")
    assert not (tmp_path / "fused.tif").exists()


def rewritten(file, change=None, **profile):
    """A GeoTIFF with other values or another profile."""
    rasterio = pytest.importorskip("rasterio")
    with rasterio.open(file) as opened:
        values, kept = opened.read(), dict(opened.profile)
    with rasterio.open(file, "w", **(kept | profile)) as opened:
        opened.write(values if change is None else change(values))


def predicted(files, output, **options):
    return TASK.predict(model.lambda_pnn_small().eval(), {}, files, output, **options)


def test_a_pixel_that_one_band_lacks_has_no_data_and_does_not_enter(tmp_path):
    rasterio = pytest.importorskip("rasterio")
    ms, pan = rasters_of(tmp_path, dtype="float32")
    rewritten(ms, lambda v: v / 1000, nodata=-9999)
    rewritten(pan, lambda v: v / 1000)

    def gap(values):
        values[1, 3, 5] = -9999
        return values

    rewritten(ms, gap)
    said = predicted([ms, pan], tmp_path / "fused.tif")
    assert "a_ms.tif: 0.1% of the pixels hold no data" in said
    with rasterio.open(tmp_path / "fused.tif") as fused:
        values, empty = fused.read(), fused.dataset_mask() == 0
    assert bool(empty[12:16, 20:24].all()) and empty.sum() == 16
    assert float(np.abs(values[:, ~empty]).max()) < 3


def test_where_no_data_are_the_network_sees_the_mean_and_data_are_never_written_as_none(tmp_path):
    rasterio = pytest.importorskip("rasterio")
    coarse, fine = (rasters.read_raster(file) for file in rasters_of(tmp_path, nodata=500))
    low, _ = rasters.check_pair(coarse, fine)
    for band, values in zip(low, coarse.values / 2048):
        assert float(band[0, 0]) == pytest.approx(values[~coarse.empty].mean(), rel=1e-5)
    rasters.write_raster(tmp_path / "out.tif", np.full((3, 128, 128), 500 / 2048), coarse, fine)
    with rasterio.open(tmp_path / "out.tif") as out:
        values, empty = out.read(), fine.empty | coarse.empty.repeat(4, 0).repeat(4, 1)
    assert bool((values[:, ~empty] == 501).all()) and bool((values[:, empty] == 500).all())


def test_counts_in_numbers_with_a_point_are_not_taken_for_reflectances(tmp_path):
    files = rasters_of(tmp_path, dtype="float32")
    with pytest.raises(UserError, match="give --bits 11 if they are counts"):
        predicted(files, tmp_path / "fused.tif")
    assert "wrote" in predicted(files, tmp_path / "fused.tif", bits=11.0)


@pytest.mark.parametrize("kind", ["south up", "turned", "rotated"])
def test_files_that_are_turned_or_mirrored_against_each_other_are_refused(tmp_path, kind):
    rasterio = pytest.importorskip("rasterio")
    ms, pan = rasters_of(tmp_path)
    at = rasterio.Affine.translation
    lies = {
        "south up": at(500_000, 4_000_000 - 128) * rasterio.Affine.scale(4, 4),
        "turned": at(500_128, 4_000_000) * rasterio.Affine(0, -4, 0, -4, 0, 0),
        "rotated": at(500_000, 4_000_000) * rasterio.Affine.rotation(30) * rasterio.Affine.scale(4, -4),
    }
    rewritten(ms, transform=lies[kind])
    with pytest.raises(UserError, match=r"turned or mirrored|same area"):
        predicted([ms, pan], tmp_path / "fused.tif")


def test_a_pair_that_is_rotated_alike_keeps_its_place(tmp_path):
    rasterio = pytest.importorskip("rasterio")
    ms, pan = rasters_of(tmp_path)
    for file, step in ((ms, 4), (pan, 1)):
        turn = rasterio.Affine.translation(500_000, 4_000_000) * rasterio.Affine.rotation(30)
        rewritten(file, transform=turn * rasterio.Affine.scale(step, -step), tiled=True, blockxsize=16, blockysize=16)
    predicted([ms, pan], tmp_path / "fused.tif")
    with rasterio.open(tmp_path / "fused.tif") as fused, rasterio.open(pan) as fine:
        assert fused.transform.almost_equals(fine.transform) and fused.crs == fine.crs


def test_what_is_guessed_of_the_place_is_said(tmp_path):
    rasterio = pytest.importorskip("rasterio")
    ms, pan = rasters_of(tmp_path, shift=-2.0)
    assert "a_ms.tif begins +2 pixels of the PAN to the right" in predicted([ms, pan], tmp_path / "fused.tif")
    ms, pan = rasters_of(tmp_path)
    assert "begins" not in predicted([ms, pan], tmp_path / "fused.tif")
    rewritten(ms, crs=None, transform=rasterio.Affine.identity())
    assert "a_ms.tif says no place: it is taken to cover" in predicted([ms, pan], tmp_path / "fused.tif")


@pytest.mark.parametrize(
    ("name", "bands", "said"), [("x.jpg", 3, "expected .tif, .npy or .png"), ("x.png", 2, "three bands of 8 or 16")]
)
def test_where_nothing_can_be_written_nothing_is_computed(tmp_path, monkeypatch, name, bands, said):
    files = rasters_of(tmp_path, bands=bands)
    monkeypatch.setattr(task, "fuse", lambda *_, **__: pytest.fail("it was fused"))
    with pytest.raises(UserError, match=said):
        predicted(files, tmp_path / name)


def test_a_disk_that_fills_up_while_the_file_is_closed_is_told(tmp_path, monkeypatch):
    """GDAL writes the rest of a compressed file at its end, and does not tell when that fails."""
    rasterio = pytest.importorskip("rasterio")
    real = rasterio.open

    def cut(file, *mode, **options):
        if not mode:
            Path(file).write_bytes(Path(file).read_bytes()[:2000])
        return real(file, *mode, **options)

    files = [rasters.read_raster(file) for file in rasters_of(tmp_path)]
    monkeypatch.setattr(rasterio, "open", cut)
    with pytest.raises(UserError, match="not whole; is the disk full"):
        rasters.write_raster(tmp_path / "out.tif", drawn([3, 128, 128], "x").numpy(), *files)
    assert not (tmp_path / "out.tif").exists()


def test_an_index_that_has_no_value_says_so(tmp_path):
    ms, pan = rasters_of(tmp_path)
    rewritten(ms, np.zeros_like)
    assert "R-ERGAS undefined" in predicted([ms, pan], tmp_path / "fused.tif")


def test_arrays_are_fused_as_files_are(tmp_path):
    ms, pan = (rasters.read_raster(file) for file in rasters_of(tmp_path))
    torch.manual_seed(0)
    network = model.lambda_pnn_small().eval()
    TASK.predict(network, {}, [ms.file, pan.file], tmp_path / "fused.npy")
    fused = provenn.papers.lambda_pnn.pansharpen(network, ms.values, pan.values[0])
    assert fused.dtype == np.uint16 and np.array_equal(fused, np.load(tmp_path / "fused.npy"))
    other = provenn.papers.lambda_pnn.pansharpen(network, ms.values, pan.values[0], adapt=2, coregister=True)
    assert other.shape == fused.shape and not np.array_equal(other, fused)
    for wrong, said in (
        ({"ms": ms.values[:2]}, "has 2 bands"),
        ({"pan": pan.values[0, :100]}, "expected 128 by 128"),
        ({"coregister": True}, "give adapt=100 too"),
        ({"pan": np.full((128, 128), np.nan)}, "not finite"),
    ):
        with pytest.raises(UserError, match=said):
            provenn.papers.lambda_pnn.pansharpen(network, **({"ms": ms.values, "pan": pan.values[0]} | wrong))


def test_files_that_are_no_pair_are_refused_in_a_line(tmp_path):
    np.save(tmp_path / "ms.npy", np.ones((3, 32, 32)))
    np.save(tmp_path / "pan.npy", np.ones((1, 120, 128)))
    np.save(tmp_path / "nan.npy", np.full((1, 128, 128), np.nan))
    (tmp_path / "text.tif").write_text("no image")
    (tmp_path / "text.npy").write_text("no array")
    network = model.lambda_pnn_small().eval()
    for second, said in (
        ("pan.npy", "4 times as many a side"),
        ("nan.npy", "not finite"),
        ("text.tif", "cannot be read as GeoTIFF"),
        ("text.npy", "cannot be read as a NumPy array"),
        ("gone.npy", "gone.npy"),
    ):
        with pytest.raises(UserError, match=said):
            TASK.predict(network, {}, [tmp_path / "ms.npy", tmp_path / second], tmp_path / "out.npy")
    with pytest.raises(UserError, match="takes two files"):
        TASK.predict(network, {}, [tmp_path / "ms.npy"], tmp_path / "out.npy")
    with pytest.raises(UserError, match="--coregister"):
        TASK.predict(network, {}, [tmp_path / "ms.npy"] * 2, tmp_path / "out.npy", coregister=True)


def test_without_rasterio_its_extra_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.tif").write_bytes(b"II*\0")
    monkeypatch.setitem(__import__("sys").modules, "rasterio", None)
    with pytest.raises(UserError, match=r"pip install 'provenn\[geo\]'"):
        rasters.read_raster(tmp_path / "a.tif")


def test_a_folder_of_pairs_is_trained_on_and_tested_by_wald_s_protocol(tmp_path):
    for name in "abcd":
        ms, pan = scene(72, seed=ord(name))
        np.save(tmp_path / f"{name}_ms.npy", ms[0].numpy())
        np.save(tmp_path / f"{name}_pan.npy", pan[0].numpy())
    data = TASK.load(tmp_path)
    ms, pan, truth = data.test[0]
    assert (ms.shape, pan.shape, truth.shape) == ((3, 18, 18), (1, 72, 72), (3, 72, 72))
    assert data.options == {"bands": 3} and len(data.train) == 16
    assert len(TASK.held_out(tmp_path, {}).dataset) == 4
    (tmp_path / "e_ms.npy").write_bytes((tmp_path / "a_ms.npy").read_bytes())
    with pytest.raises(UserError, match="no e_pan beside"):
        TASK.load(tmp_path)
    (tmp_path / "e_ms.npy").unlink()
    for name in "abcd":
        np.save(tmp_path / f"{name}_ms.npy", scene(40)[0][0].numpy())
        np.save(tmp_path / f"{name}_pan.npy", scene(40)[1][0].numpy())
    with pytest.raises(UserError, match="40×40 multispectral pixels is too small"):
        TASK.load(tmp_path)


def test_the_authors_files_of_eight_bands_are_taken_for_either_sensor():
    card = provenn.catalog.card("lambda_pnn")
    convert = card.resolve("official:convert")
    eight = {"conv_1.weight": torch.zeros(64, 9, 3, 3)}
    assert convert(eight)[0] == "lambda_pnn_wv3" and convert(eight, preset="lambda_pnn_wv2")[0] == "lambda_pnn_wv2"
    for state, said in (({}, "no λ-PNN|not λ-PNN"), ({"conv_1.weight": torch.zeros(64, 7, 3, 3)}, "6 bands")):
        with pytest.raises(UserError, match=said):
            convert(state)
