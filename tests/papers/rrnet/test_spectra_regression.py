"""The task of RRNet: a physical generator, files, missing labels, tables with errors, scalers inside the weights."""

import gzip
import json

import numpy as np
import pytest
import torch

from provenn.core.errors import UserError
from provenn.papers.rrnet import RRNet
from provenn.papers.rrnet.model import rrnet_small
from provenn.papers.rrnet.spectra import LAMOST, Arm
from provenn.papers.rrnet.task import Physical, SpectraMeta, arms_of, physical, synthetic
from provenn.papers.rrnet.task.files import read_spectra
from provenn.tasks import get_task
from provenn.tasks.base import count_examples

TASK = get_task("spectra-regression")


@pytest.fixture(scope="module")
def data():
    return TASK.load("synthetic", train=80)


# The generator


def test_lines_deepen_with_their_element_alone():
    star = np.array([[5777.0, 4.4, 0, 0, 0, 0, 0]])
    more = star.copy()
    more[0, 3] += 0.5  # magnesium
    change = synthetic.pure(star) - synthetic.pure(more)
    assert change.min() > -1e-12 and change.max() > 0.01
    grid = np.concatenate([arm.grid() for arm in synthetic.ARMS])
    lines = synthetic.line_list()
    own = lines.wave[lines.element == list(synthetic.ELEMENTS).index("Mg")]
    far = np.abs(grid[:, None] - own[None]).min(1) > 20
    assert change[0, far].max() < 0.1 * change.max()


def test_wings_grow_with_gravity_and_hot_stars_have_weaker_lines():
    labels = np.array([[5777.0, 2.0, 0, 0, 0, 0, 0], [5777, 4.4, 0, 0, 0, 0, 0], [6900, 4.4, 0, 0, 0, 0, 0]])
    giant, dwarf, hot = synthetic.pure(labels)
    assert (1 - hot).sum() < (1 - dwarf).sum()
    assert not np.allclose(giant, dwarf, atol=0.005)
    assert (dwarf > 0).all() and (dwarf <= 1).all() and 0.6 < dwarf.mean() < 0.99


def test_noise_follows_the_ratio_and_a_seed_repeats_itself():
    flux, labels, ratio = synthetic.survey(40, 7)
    again, other = synthetic.survey(40, 7)[0], synthetic.survey(40, 8)[0]
    assert np.array_equal(flux, again) and not np.array_equal(flux, other)
    assert flux.shape == (40, 1440) and labels.shape == (40, 7) and (ratio >= 10).all() and (ratio <= 100).all()
    rough = np.median(np.abs(np.diff(flux, n=2)), axis=1)
    low, high = ratio < np.quantile(ratio, 0.3), ratio > np.quantile(ratio, 0.7)
    assert rough[low].mean() > 1.5 * rough[high].mean()


# The task


def test_scalers_are_those_of_training_and_stand_in_the_meta(data):
    x = torch.stack([data.train[i][0] for i in range(80)])
    y = torch.stack([data.train[i][1] for i in range(80)])
    assert x.mean(0).abs().max() < 1e-3 and (x.std(0, correction=0) - 1).abs().max() < 1e-3
    assert y.mean(0).abs().max() < 1e-3 and (y.std(0, correction=0) - 1).abs().max() < 1e-3
    known = SpectraMeta.model_validate(json.loads(json.dumps(data.meta)))
    assert known.labels[0] == "Teff" and known.units[0] == "K" and len(known.flux_mean) == 1440
    assert data.options == {"labels": 7, "length": 1440, "clean": 400}
    assert count_examples(data.val) == 10 and count_examples(data.test) == 20


def test_noise_comes_after_the_clean_examples_and_leaves_the_data(data):
    torch.manual_seed(0)
    network = rrnet_small(clean=20).train()
    seen = []
    network.register_forward_pre_hook(lambda module, given: seen.append(given[0].clone()))
    x, y = (torch.stack(part) for part in zip(*(data.train[i] for i in range(20))))
    before = x.clone()
    for _ in range(3):
        TASK.loss(network, (x, y))
    assert torch.equal(x, before) and torch.equal(seen[0], x)
    for noisy in seen[1:]:
        changed = noisy != x
        assert changed.float().mean().item() == pytest.approx(0.25, abs=0.02)
        assert (noisy - x)[changed].std().item() == pytest.approx(1, abs=0.05)
        assert (noisy - x)[changed].mean().item() == pytest.approx(0, abs=0.05)
    assert int(network.examples_seen) == 60
    TASK.loss(network.eval(), (x, y))
    assert torch.equal(seen[-1], x) and int(network.examples_seen) == 60


def test_metrics_are_their_definitions_and_leave_out_what_is_missing():
    off = np.array([[1.0, np.nan], [-2.0, 0.5]])
    scores = {
        "off": off,
        "squared": np.array([[0.5, np.nan], [4.0, 1.0]]),
        "likelihood": np.array([[1.0, np.nan], [3, 5]]),
    }
    told = TASK.summary(scores)
    assert told["error"] == pytest.approx((1.5 + 0.5) / 2)
    assert told["deviation"] == pytest.approx((1.5 + 0) / 2)
    assert told["within_sigma"] == pytest.approx(2 / 3)
    assert told["likelihood"] == pytest.approx(3)


def test_the_dummy_baseline_is_the_mean_of_training(data):
    y = np.stack([data.test[i][1].numpy() for i in range(20)])
    assert TASK.dummy_baseline(data) == pytest.approx(np.abs(y).mean())


# The user's own spectra


def folder_of(path, rows=20, pixels=96, names="Teff,feh", hole=True):
    rng = np.random.default_rng(0)
    np.save(path / "flux.npy", rng.normal(1, 0.1, (rows, pixels)).astype(np.float32))
    lines = [names] + [f"{5000 + 10 * i},{'' if hole and i % 3 == 0 else i / 10}" for i in range(rows)]
    (path / "labels.csv").write_text("\n".join(lines) + "\n")
    return path


def test_a_folder_with_missing_labels_is_read_and_learned(tmp_path):
    data = TASK.load(folder_of(tmp_path), grid="5000:5048:0.5")
    assert data.meta["labels"] == ["Teff", "feh"] and data.meta["arms"] == [[5000.0, 5048.0, 0.5]]
    y = torch.stack([data.train[i][1] for i in range(count_examples(data.train))])
    assert y.isnan().any() and not y[:, 0].isnan().any()
    network = RRNet(2, 96, segments=4).train()
    loss = TASK.loss(network, (torch.randn(len(y), 96), y))
    loss.backward()
    assert all(p.grad.isfinite().all() for p in network.parameters())
    held = TASK.held_out(tmp_path, data.meta)
    assert count_examples(held.dataset) == 20


def test_folders_that_cannot_be_read_are_refused(tmp_path):
    folder = folder_of(tmp_path)
    for grid, words in (("5000:5100:0.5", "has 200 pixels, the spectra have 96"), ("a:b", "grid is start:end:step")):
        with pytest.raises(UserError, match=words):
            TASK.load(folder, grid=grid)
    (folder / "labels.csv").write_text("Teff,feh\n5000,0\n")
    with pytest.raises(UserError, match="has 1 rows for 20 spectra"):
        TASK.load(folder)
    folder_of(folder, rows=5)
    with pytest.raises(UserError, match="holds 5 spectra; expected at least 10"):
        TASK.load(folder)
    folder_of(folder, names="Teff,feh", hole=False)
    text = (folder / "labels.csv").read_text().splitlines()
    (folder / "labels.csv").write_text("\n".join([text[0], *(f"5000,{i}" for i in range(20))]))
    with pytest.raises(UserError, match="Teff has one value"):
        TASK.load(folder)
    np.save(folder / "flux.npy", np.full((20, 96), np.nan))
    with pytest.raises(UserError, match="expected numbers in an array"):
        TASK.load(folder)
    (folder / "flux.npy").write_bytes(b"none")
    with pytest.raises(UserError, match="no array that can be read"):
        TASK.load(folder)
    (folder / "flux.npy").unlink()
    with pytest.raises(UserError, match=r"flux\.npy"):
        TASK.load(folder)


def test_grids_are_lamost_s_where_they_have_its_pixels():
    assert arms_of("", 7200) == list(LAMOST)
    assert arms_of("", 10) == [Arm(0.0, 10.0, 1.0)]


def wide(arm):
    return np.linspace(arm.start - 5, arm.end + 5, 4000)


def table_of(path, waves, fluxes, columns="wavelength,flux"):
    lines = [columns] + [f"{w!r},{f!r}" for w, f in zip(waves.tolist(), fluxes.tolist(), strict=True)]
    path.write_text("\n".join(lines) + "\n")


def test_tables_and_fits_give_the_same_spectrum(tmp_path):
    fits = pytest.importorskip("astropy.io.fits")
    waves = [wide(arm) for arm in LAMOST]
    rng = np.random.default_rng(0)
    fluxes = [
        800 * (1 - 0.3 * np.exp(-((w - w.mean()) ** 2))) * (1 + 0.01 * rng.standard_normal(len(w))) for w in waves
    ]
    table_of(tmp_path / "star.csv", np.concatenate(waves), np.concatenate(fluxes))
    told = read_spectra(tmp_path / "star.csv", LAMOST)
    assert told.names == ["star"] and told.flux.shape == (1, 7200)
    units = [fits.PrimaryHDU()]
    for name, scale in (("B-1", 3.0), ("COADD", 1.0)):  # a single exposure before what was added up
        for arm, wave, flux in zip("BR", waves, fluxes, strict=True):
            columns = [
                fits.Column("FLUX", "D", array=flux * scale + (50 if scale > 1 else 0)),
                fits.Column("LOGLAM", "D", array=np.log10(wave)),
            ]
            units.append(fits.BinTableHDU.from_columns(columns, name=f"{name}_{arm}"))
    fits.HDUList(units).writeto(tmp_path / "star.fits")
    (tmp_path / "star.fits.gz").write_bytes(gzip.compress((tmp_path / "star.fits").read_bytes()))
    for name in ("star.fits", "star.fits.gz"):
        again = read_spectra(tmp_path / name, LAMOST)
        assert again.names[0].startswith("star")
        assert np.allclose(again.flux, told.flux, atol=1e-6)
    with pytest.raises(UserError, match="has no spectrum of 8000 to 8100 Å: COADD_B 4963 to 5333 Å"):
        read_spectra(tmp_path / "star.fits", [Arm(8000, 8100)])


def test_files_that_are_no_spectra_are_refused(tmp_path):
    arm = Arm(5000, 5010)
    wave = np.linspace(4990, 5020, 50)
    cases = {
        "units.csv": (wave / 10, np.ones(50), "wavelength,flux", "do not cover 5000 to 5010 Å"),
        "names.csv": (wave, np.ones(50), "x,y", "has the columns x, y; expected wavelength"),
        "short.csv": (wave[:1], np.ones(1), "wavelength,flux", "holds 1 pixel"),
    }
    for name, (x, y, columns, words) in cases.items():
        table_of(tmp_path / name, x, y, columns)
        with pytest.raises(UserError, match=words):
            read_spectra(tmp_path / name, [arm])
    (tmp_path / "image.png").write_bytes(b"x")
    np.save(tmp_path / "flat.npy", np.ones((2, 7)))
    np.save(tmp_path / "nan.npy", np.full((2, 100), np.nan))
    (tmp_path / "bad.fits").write_bytes(b"SIMPLE" * 100)
    for name, words in (
        ("image.png", "is no spectrum: expected an ending"),
        ("flat.npy", r"expected \(spectra, 100\) numbers"),
        ("nan.npy", "2 of 2 spectra hold values that are no numbers"),
        ("bad.fits", "no FITS file that can be read|has no table"),
    ):
        with pytest.raises(UserError, match=words):
            read_spectra(tmp_path / name, [arm])
    np.save(tmp_path / "good.npy", np.linspace(0, 5, 200).reshape(2, 100))
    told = read_spectra(tmp_path / "good.npy", [arm])
    assert told.names == ["good-0", "good-1"] and told.flux.max() == 2.5


def test_a_table_of_labels_and_errors_is_written(tmp_path, data):
    torch.manual_seed(0)
    network = rrnet_small().eval()
    flux = synthetic.survey(300, 5)[0]
    np.save(tmp_path / "many.npy", flux)
    said = TASK.predict(network, data.meta, [tmp_path / "many.npy"], tmp_path / "labels.csv")
    assert "300 spectra" in said
    lines = (tmp_path / "labels.csv").read_text().splitlines()
    assert lines[0].startswith("spectrum,Teff,Teff_err,logg,logg_err") and len(lines) == 301
    known = SpectraMeta.model_validate(data.meta)
    mean, deviation = physical(network, known, flux[:3].clip(-0.5, 2.5))
    row = [float(cell) for cell in lines[2].split(",")[1:]]
    assert row[0::2] == pytest.approx(mean[1].tolist(), rel=1e-4)
    assert row[1::2] == pytest.approx(deviation[1].tolist(), rel=1e-4)
    told = network(
        (torch.from_numpy(flux[:3].clip(-0.5, 2.5)).float() - torch.tensor(known.flux_mean))
        / torch.tensor(known.flux_std)
    )
    assert np.allclose(deviation, (told.variance.sqrt() * torch.tensor(known.label_std)).detach().numpy(), rtol=1e-5)
    np.save(tmp_path / "one.npy", flux[0])
    assert " K, logg " in TASK.predict(network, data.meta, [tmp_path / "one.npy"], None)


def test_what_is_exported_takes_normalised_flux(data):
    network = rrnet_small().eval()
    portable = TASK.portable(network, data.meta)
    flux = torch.from_numpy(synthetic.survey(4, 5)[0])
    mean, deviation = portable.system(flux)
    expected = physical(network, SpectraMeta.model_validate(data.meta), flux.numpy())
    assert np.allclose(mean.detach(), expected[0], rtol=1e-5) and np.allclose(
        deviation.detach(), expected[1], rtol=1e-5
    )
    assert isinstance(portable.system, Physical)
