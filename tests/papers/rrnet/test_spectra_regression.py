"""The task of RRNet: a physical generator, files, missing labels, tables with errors, scalers inside the weights."""

import gzip
import json
import pickle

import numpy as np
import pytest
import torch

from provenn.core.errors import UserError
from provenn.data.tables import read_table
from provenn.papers.rrnet import Normal, RRNet, spectra, studies
from provenn.papers.rrnet.inspection import inspect
from provenn.papers.rrnet.model import rrnet_small
from provenn.papers.rrnet.spectra import LAMOST, Arm
from provenn.papers.rrnet.task import catalogue, evaluated, synthetic
from provenn.papers.rrnet.task.files import read_spectra
from provenn.papers.rrnet.task.scaling import (
    PUBLISHED,
    Member,
    Physical,
    SpectraMeta,
    System,
    read_scalers,
    standardised,
    systems_of,
)
from provenn.papers.rrnet.task.surveys import arms_of, read_folder, unit_of
from provenn.tasks import get_task
from provenn.tasks.base import count_examples
from provenn.training import weights

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
    names = "Teff,logg,Fe,Mg,Ca,Si,Ti"
    assert data.options == {"labels": 7, "length": 1440, "clean": 400, "names": names}
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
        "units.csv": (
            wave / 10,
            np.ones(50),
            "wavelength,flux",
            "do not cover 5000 to 5010 Å; they look like nanometres",
        ),
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
        ("nan.npy", "most values of 2 of 2 spectra are no numbers, the first in row 1; at least half"),
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
    mean, deviation = System([Member(network, known)])(flux[:3].clip(-0.5, 2.5))
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
    expected = System([Member(network, SpectraMeta.model_validate(data.meta))])(flux.numpy())
    assert np.allclose(mean.detach(), expected[0], rtol=1e-5) and np.allclose(
        deviation.detach(), expected[1], rtol=1e-5
    )
    assert isinstance(portable.system, Physical)


# Ensembles, catalogues, errors


def saved(folder, network, meta, preset="rrnet_small", options=None):
    options = options or {"labels": 7, "length": 1440, "clean": 400, "names": "Teff,logg,Fe,Mg,Ca,Si,Ti"}
    folder.mkdir()
    weights.save(network, folder / "weights.safetensors", weights.Label("rrnet", preset, TASK.name, options, meta))
    return folder


def shifted(meta, factor):
    """Meta with other scalers, as another split would have."""
    return meta | {
        "label_std": [factor * x for x in meta["label_std"]],
        "flux_mean": [x + 0.01 for x in meta["flux_mean"]],
    }


def test_members_are_a_mixture_each_with_its_own_scalers(tmp_path, data):
    torch.manual_seed(0)
    networks, metas = (
        [rrnet_small().eval() for _ in range(3)],
        [data.meta, shifted(data.meta, 2), shifted(data.meta, 0.5)],
    )
    runs = [saved(tmp_path / f"run{i}", *pair) for i, pair in enumerate(zip(networks, metas, strict=True))]
    np.save(tmp_path / "x.npy", synthetic.survey(5, 3)[0])
    TASK.predict(networks[0], metas[0], [tmp_path / "x.npy"], tmp_path / "all.csv", members=f"{runs[1]}, {runs[2]}")
    flux = np.load(tmp_path / "x.npy").clip(-0.5, 2.5)
    means, variances = [], []
    for network, meta in zip(networks, metas, strict=True):
        known = SpectraMeta.model_validate(meta)
        told = network(standardised(flux, known))
        spread = np.array(known.label_std)
        means.append(told.mean.detach().numpy() * spread + np.array(known.label_mean))
        variances.append(told.variance.detach().numpy() * spread**2)
    middle = np.mean(means, 0)
    sigma = np.sqrt(np.mean(np.square(means) + variances, 0) - middle**2)
    rows = np.array([line.split(",")[1:] for line in (tmp_path / "all.csv").read_text().splitlines()[1:]], float)
    assert rows[:, 0::2] == pytest.approx(middle, rel=1e-4)
    assert rows[:, 1::2] == pytest.approx(sigma, rel=1e-3)


def test_members_of_other_labels_add_columns_and_a_label_twice_is_refused(tmp_path, data):
    network = rrnet_small().eval()
    other = RRNet(2, 1440, names="C,N").eval()
    first = {key: value[:2] for key, value in data.meta.items() if key.startswith(("label_", "unit"))}
    meta = data.meta | first | {"labels": ["C", "N"]}
    run = saved(tmp_path / "ca", other, meta, options={"labels": 2, "length": 1440, "names": "C,N"})
    np.save(tmp_path / "x.npy", synthetic.survey(2, 3)[0])
    TASK.predict(network, data.meta, [tmp_path / "x.npy"], tmp_path / "all.csv", members=str(run))
    assert (tmp_path / "all.csv").read_text().splitlines()[0].endswith("Ti,Ti_err,C,C_err,N,N_err")
    known = SpectraMeta.model_validate(meta | {"labels": ["Teff", "N"]})
    with pytest.raises(UserError, match="Teff is in two sets"):
        systems_of([Member(network, SpectraMeta.model_validate(data.meta)), Member(other, known)])
    with pytest.raises(UserError, match="members see one grid"):
        grid = SpectraMeta.model_validate(meta | {"arms": [[0, 1440, 1]]})
        systems_of([Member(network, SpectraMeta.model_validate(data.meta)), Member(other, grid)])


@pytest.mark.parametrize("ending", [".csv", ".parquet", ".fits"])
def test_a_catalogue_goes_on_where_it_was_stopped(tmp_path, data, monkeypatch, ending):
    """No row is lost or doubled, parts that are there are not computed again, and other weights begin anew."""
    torch.manual_seed(0)
    network = rrnet_small().eval()
    monkeypatch.setattr(catalogue, "PART", 4)
    files = []
    for name, count in (("a", 6), ("b", 3), ("c", 5)):
        np.save(tmp_path / f"{name}.npy", synthetic.survey(count, ord(name))[0])
        files.append(tmp_path / f"{name}.npy")
    whole, out = tmp_path / f"whole{ending}", tmp_path / f"out{ending}"
    TASK.predict(network, data.meta, files, whole)
    computed, estimated = [], catalogue.estimated

    def stopping(systems, part, about):
        if len(computed) == 2:
            raise KeyboardInterrupt
        computed.append(part)
        return estimated(systems, part, about)

    monkeypatch.setattr(catalogue, "estimated", stopping)
    with pytest.raises(KeyboardInterrupt):
        TASK.predict(network, data.meta, files, out)
    assert not out.exists() and len(list(out.with_name(f"{out.name}.parts").glob("*.npz"))) == 2
    monkeypatch.setattr(catalogue, "estimated", lambda *given: computed.append(given[1]) or estimated(*given))
    TASK.predict(network, data.meta, files, out)
    assert len(computed) == 4 and not out.with_name(f"{out.name}.parts").exists()
    assert rows_of(out) == rows_of(whole)
    assert [row[0] for row in rows_of(out)] == [
        f"{name}-{i}" for name, n in (("a", 6), ("b", 3), ("c", 5)) for i in range(n)
    ]
    monkeypatch.setattr(catalogue, "estimated", stopping)
    del computed[:]
    with pytest.raises(KeyboardInterrupt):
        TASK.predict(network, data.meta, files, out)
    monkeypatch.setattr(catalogue, "estimated", lambda *given: computed.append(given[1]) or estimated(*given))
    TASK.predict(network, shifted(data.meta, 2), files, out)
    assert len(computed) == 2 + 4 and rows_of(out) != rows_of(whole)


class Workers:
    """Ray's calls without a cluster: tasks end in another order than they began, and workers die."""

    class exceptions:
        class RayError(Exception):
            pass

    def __init__(self, deaths=0, fatal=False):
        self.deaths, self.fatal, self.calls, self.started = deaths, fatal, 0, []

    def is_initialized(self):
        return True

    def put(self, value):
        return value

    def cluster_resources(self):
        return {"CPU": 2.0}

    def remote(self, **options):
        retries = options["max_retries"]

        def decorate(function):
            def start(*arguments):
                self.started.append((function, arguments, retries))
                return len(self.started) - 1

            return type("Remote", (), {"remote": staticmethod(start)})

        return decorate

    def wait(self, handles, num_returns):
        return [handles[-1]], handles[:-1]

    def get(self, handle):
        function, arguments, retries = self.started[handle]
        for _ in range(1 + retries):
            self.calls += 1
            if self.fatal and self.calls > 2:
                raise self.exceptions.RayError("the node died")
            answer = function(*arguments)
            if self.deaths:  # after the work, and before the answer: it is done again
                self.deaths -= 1
                continue
            return answer
        raise self.exceptions.RayError("the worker died")


@pytest.mark.parametrize("ending", [".csv", ".fits"])
def test_a_cluster_loses_and_doubles_no_row(tmp_path, data, monkeypatch, ending):
    torch.manual_seed(0)
    network = rrnet_small().eval()
    monkeypatch.setattr(catalogue, "PART", 3)
    np.save(tmp_path / "a.npy", synthetic.survey(20, 1)[0])
    whole, out = tmp_path / f"whole{ending}", tmp_path / f"out{ending}"
    TASK.predict(network, data.meta, [tmp_path / "a.npy"], whole)
    for workers in (Workers(), Workers(deaths=3)):
        monkeypatch.setattr(catalogue, "_ray", lambda made=workers: made)
        TASK.predict(network, data.meta, [tmp_path / "a.npy"], out, cluster="auto")
        assert rows_of(out) == rows_of(whole) and len(workers.started) == 7
        out.unlink()
    # A node that is lost for good: what had ended is kept, and the same command goes on with the rest alone.
    lost = Workers(fatal=True)
    monkeypatch.setattr(catalogue, "_ray", lambda: lost)
    with pytest.raises(UserError, match=r"a part was lost 4 times .the node died.; what had ended is kept"):
        TASK.predict(network, data.meta, [tmp_path / "a.npy"], out, cluster="auto")
    assert not out.exists() and len(list(out.with_name(f"{out.name}.parts").glob("*.npz"))) == 2
    again = Workers()
    monkeypatch.setattr(catalogue, "_ray", lambda: again)
    TASK.predict(network, data.meta, [tmp_path / "a.npy"], out, cluster="auto")
    assert len(again.started) == 5 and rows_of(out) == rows_of(whole)


@pytest.mark.parametrize("ending", [".csv", ".parquet", ".fits"])
def test_a_catalogue_is_written_a_part_at_a_time(tmp_path, ending):
    """When the third part is asked for, the first is in the file: no more than two are held at once."""
    import gc
    import weakref

    output, alive, most = tmp_path / f"out{ending}", [], []

    def parts():
        for number in range(6):
            gc.collect()
            most.append(sum(each() is not None for each in alive))
            values = np.full((1000, 4), float(number))
            alive.append(weakref.ref(values))
            yield [f"star-{number}-{row}" for row in range(1000)], values
            del values

    columns = ["spectrum", "Teff", "Teff_err", "logg", "logg_err"]
    catalogue.write_catalogue(output, columns, ["K", "K", "", ""], parts(), catalogue.Size(6000, 20))
    assert max(most) <= 1
    rows = rows_of(output)
    assert len(rows) == 6000 and rows[0][0] == "star-0-0" and rows[5999] == ["star-5-999", 5.0, 5.0, 5.0, 5.0]


def test_outputs_that_cannot_be_are_refused_before_any_work(tmp_path, data, monkeypatch):
    network = rrnet_small().eval()
    np.save(tmp_path / "a.npy", synthetic.survey(3, 1)[0])
    monkeypatch.setattr(catalogue, "estimated", lambda *_: pytest.fail("it was estimated"))
    for name, said in (("labels.foo", "a catalogue is written as"), ("labels.csv.gz", "a catalogue is written as")):
        with pytest.raises(UserError, match=said):
            TASK.predict(network, data.meta, [tmp_path / "a.npy"], tmp_path / name)
    with pytest.raises(UserError, match="a sheet holds 1,048,575 rows, and 1,048,576 spectra"):
        catalogue.check_catalogue(tmp_path / "a.xlsx", 1_048_576)
    monkeypatch.setattr("provenn.papers.rrnet.task.PART", 2)
    with pytest.raises(UserError, match="3 spectra need a table: give a file with -o"):
        TASK.predict(network, data.meta, [tmp_path / "a.npy"], None)
    assert [file.name for file in tmp_path.iterdir()] == ["a.npy"]


def test_missing_fluxes_are_counted_and_are_the_mean_of_training(tmp_path, data):
    """NaN in an array, a FITS file and a table: the pixel counts as the mean of training, whatever its IVAR."""
    fits = pytest.importorskip("astropy.io.fits")
    network = rrnet_small().eval()
    flux = synthetic.survey(3, 1)[0]
    holed = flux.copy()
    holed[1, 100:150] = np.nan
    np.save(tmp_path / "a.npy", holed)
    said = TASK.predict(network, data.meta, [tmp_path / "a.npy"], tmp_path / "out.csv")
    assert "50 pixels of 1 spectra are missing, and count as the mean of training" in said
    filled = holed.copy()
    filled[1, 100:150] = np.array(data.meta["flux_mean"])[100:150]
    np.save(tmp_path / "b.npy", filled)
    TASK.predict(network, data.meta, [tmp_path / "b.npy"], tmp_path / "b.csv")
    for ours, plain in zip(rows_of(tmp_path / "out.csv"), rows_of(tmp_path / "b.csv"), strict=True):
        assert ours[1:] == pytest.approx(plain[1:], rel=1e-4)

    units, waves = [fits.PrimaryHDU()], [np.linspace(a.start - 5, a.end + 5, 3700) for a in synthetic.ARMS]
    for name, wave in zip("BR", waves, strict=True):
        y = np.full(wave.shape, 500.0)
        if name == "B":
            y[1000:1020] = np.nan
        inverse = np.where(np.isnan(y), 0.0, 1.0)
        made = [("FLUX", y), ("LOGLAM", np.log10(wave)), ("IVAR", inverse)]
        units.append(
            fits.BinTableHDU.from_columns([fits.Column(n, "D", array=v) for n, v in made], name=f"COADD_{name}")
        )
    fits.HDUList(units).writeto(tmp_path / "star.fits")
    star = read_spectra(tmp_path / "star.fits", synthetic.ARMS)
    assert 3 <= np.isnan(star.flux).sum() <= 6 and np.isfinite(star.error).all()
    known = SpectraMeta.model_validate(data.meta)
    assert (standardised(star.flux, known)[0][np.isnan(star.flux[0])] == 0).all()
    assert "1 spectra are missing" in TASK.predict(network, data.meta, [tmp_path / "star.fits"], None)
    cells = ["" if np.isnan(v) else f"{v}" for v in np.where((waves[0] > 5100) & (waves[0] < 5101), np.nan, 7.0)]
    lines = ["wavelength,flux", *(f"{w},{c}" for w, c in zip(waves[0], cells)), *(f"{w},7" for w in waves[1])]
    (tmp_path / "star.csv").write_text("\n".join(lines))
    assert np.isnan(read_spectra(tmp_path / "star.csv", synthetic.ARMS).flux).sum() == 2


def test_probes_read_figures_off_by_ratio_and_in_units():
    data = studies.survey(3, True)
    model, (_, y) = _Told(), studies._tensors(data.test)
    ratio, spread = torch.from_numpy(data.test.ratio), torch.tensor(data.test.known.label_std)
    low = ratio < 20
    assert 0 < low.sum() < len(low) and len(ratio) == len(y)
    told = {name: probe(model, data) for name, probe in studies.PROBES.items()}
    assert told["error below S/N 20"] == pytest.approx(float(y[low].abs().mean()))
    assert told["error above S/N 50"] == pytest.approx(float(y[ratio >= 50].abs().mean()))
    assert told["error of Teff in K"] == pytest.approx(float((y[:, 0].abs() * spread[0]).mean()))
    assert told["deviation of log g in dex"] == pytest.approx(float(y[:, 1].std() * spread[1]), rel=1e-5)
    within = float(((y - 0.0).square() <= 1).double().mean())
    assert told["within one σ"] == pytest.approx(within) and told["growth with noise"] == 0
    iron = data.test.known.label_mean[2]
    others = [(iron - data.test.known.label_mean[i]) / data.test.known.label_std[i] for i in range(3, 7)]
    copied = (torch.tensor(others) - y[:, 3:]).abs()
    assert told["elements over iron"] == pytest.approx(float((y[:, 3:].abs() - copied).mean()), rel=1e-4)
    constant = studies._tensors(data.val)[1].square().mean(0)
    expected = y.square().mean() / 2 - (constant.log() / 2 + y.square() / (2 * constant)).mean()
    assert told["likelihood over constant σ"] == pytest.approx(float(expected), rel=1e-4)


class _Told(torch.nn.Module):
    """The mean of training with a variance of 1, whatever the spectrum."""

    def forward(self, x):
        return Normal(torch.zeros(len(x), 7), torch.ones(len(x), 7))


def test_a_gap_and_noise_reach_the_pixels_that_they_say():
    data = studies.survey(3, True)

    class Sum(torch.nn.Module):
        def forward(self, x):
            return Normal(x[:, 200:400].abs().mean(1, keepdim=True).expand(-1, 7), torch.ones(len(x), 7))

    x, y = studies._tensors(data.test)
    seen = x[:, 200:400].abs().mean(1, keepdim=True)
    expected = float(y.abs().mean() - (seen - y).abs().mean())
    assert studies.growth_with_a_gap(Sum(), data) == pytest.approx(expected, abs=1e-6)

    class Outside(torch.nn.Module):
        def forward(self, x):
            return Normal(x[:, :7], torch.ones(len(x), 7))

    assert studies.growth_with_a_gap(Outside(), data) == 0 < studies.growth_with_noise(Outside(), data)


def test_variants_differ_in_the_part_that_they_say():
    torch.manual_seed(0)
    apart, post = studies.network("apart"), studies.network("post")
    assert sum(p.numel() for p in apart.parameters()) == sum(p.numel() for p in post.parameters())
    again = apart.rnn.rnn.weight_hh_l0
    assert not again.any() and not again.requires_grad and post.rnn.rnn.weight_hh_l0.any()
    x = torch.zeros(1, 2880)
    moved = x.clone()
    moved[0, :72] = 1
    changed = (apart.rnn(moved) - apart.rnn(x)).abs()[0] > 0
    assert changed[:72].all() and not changed[72:].any()
    both = sum(p.numel() for p in studies.BothWays(2880, 40).parameters())
    assert abs(both - sum(p.numel() for p in post.rnn.parameters())) < 600
    data = studies.survey(3, True)
    assert data is studies.survey(3, True), "drawn once a seed"
    ridge = studies.trained(lambda: studies.network("ridge"), TASK, data).model
    x, y = studies._tensors(data.train)
    (x_val, y_val), errors = studies._tensors(data.val), []
    for penalty in np.logspace(-4, 4, 13) * float((x.T @ x).diagonal().mean()):
        weights = torch.linalg.solve(x.T @ x + penalty * torch.eye(1440), x.T @ (y - y.mean(0)))
        errors.append(float((x_val @ weights + y.mean(0) - y_val).abs().mean()))
    assert float((ridge(x_val).mean - y_val).abs().mean()) == pytest.approx(min(errors), rel=1e-4)
    seeds = [studies.survey(seed, True).test.tensors[0] for seed in (1, 2)]
    assert not torch.equal(*seeds) and not torch.equal(seeds[0][:16], studies.survey(1, True).val.tensors[0])


def rows_of(file):
    if file.suffix == ".csv":
        return [[row[0], *map(float, row[1:])] for row in read_table(file).rows]
    if file.suffix == ".parquet":
        return [[row[0], *map(float, row[1:])] for row in read_table(file).rows]
    fits = pytest.importorskip("astropy.io.fits")
    with fits.open(file) as units:
        assert units[1].columns.names[:3] == ["spectrum", "Teff", "Teff_err"] and units[1].columns["Teff"].unit == "K"
        return [[row[0], *map(float, list(row)[1:])] for row in units[1].data]


def test_velocities_and_another_catalogue(tmp_path, data):
    torch.manual_seed(0)
    network = rrnet_small().eval()
    waves = np.concatenate([np.linspace(a.start - 20, a.end + 20, 900) for a in synthetic.ARMS])
    rng = np.random.default_rng(0)
    for name in "ab":
        table_of(tmp_path / f"{name}.csv", waves, 1 + 0.05 * rng.standard_normal(len(waves)))
    (tmp_path / "velocity.csv").write_text("spectrum,velocity\na,300\nb,-300\n")
    files = [tmp_path / "a.csv", tmp_path / "b.csv"]
    TASK.predict(network, data.meta, files, tmp_path / "v.csv", velocity=str(tmp_path / "velocity.csv"))
    TASK.predict(network, data.meta, files[:1], tmp_path / "one.csv", velocity="300")
    assert rows_of(tmp_path / "v.csv")[0] == rows_of(tmp_path / "one.csv")[0]
    (tmp_path / "short.csv").write_text("spectrum,velocity\na,300\n")
    with pytest.raises(UserError, match=r"has no velocity of 1 spectra, the first b\.csv"):
        TASK.predict(network, data.meta, files, None, velocity=str(tmp_path / "short.csv"))
    mine = rows_of(tmp_path / "v.csv")
    (tmp_path / "theirs.csv").write_text(f"spectrum,Teff,x\na,{mine[0][1] - 10},\nb,{mine[1][1] - 30},\n")
    said = TASK.predict(
        network, data.meta, files, None, velocity=str(tmp_path / "velocity.csv"), beside=tmp_path / "theirs.csv"
    )
    assert "Teff   2        20    10" in said
    (tmp_path / "none.csv").write_text("spectrum,Teff\nz,1\n")
    with pytest.raises(UserError, match="no spectrum in common"):
        TASK.predict(network, data.meta, files, None, beside=tmp_path / "none.csv")


def test_an_unknown_pixel_counts_as_the_mean_of_training(data):
    known = SpectraMeta.model_validate(data.meta)
    flux = synthetic.survey(2, 3)[0].astype(float)
    error = np.zeros_like(flux)
    assert torch.equal(standardised(flux, known, error), standardised(flux, known))
    error[:, 5] = 1e6
    error[:, 6] = known.flux_std[6]
    x, plain = standardised(flux, known, error), standardised(flux, known)
    assert (
        x[:, 5].abs().max() < 1e-6 and torch.allclose(x[:, 6], plain[:, 6] / 2) and torch.equal(x[:, 7:], plain[:, 7:])
    )


def test_a_pixel_counts_by_the_square_of_its_error(data):
    """s²/(s² + e²): a half where the error is the pixel's spread, a fifth where it is twice as large."""
    known = SpectraMeta.model_validate(data.meta)
    flux = synthetic.survey(1, 5)[0].astype(float)
    plain = standardised(flux, known)
    for factor, share in ((0.0, 1.0), (1.0, 0.5), (2.0, 0.2)):
        told = standardised(flux, known, factor * np.array(known.flux_std)[None])
        assert torch.allclose(told, share * plain, rtol=1e-5, atol=1e-7)


def test_errors_of_a_folder_reach_training_and_prediction(tmp_path):
    folder = folder_of(tmp_path, hole=False)
    error = np.full((20, 96), 0.1)
    error[:, 3] = np.inf
    np.save(folder / "error.npy", error)
    plain, weighed = TASK.load(folder), TASK.load(folder, errors=True)
    assert (
        not plain.meta["weighs_errors"] and weighed.meta["weighs_errors"] and plain.fingerprint != weighed.fingerprint
    )
    assert weighed.train[0][0][3].abs() < 1e-6 < plain.train[0][0][3].abs()
    network = RRNet(2, 96, segments=4).eval()
    np.savez(tmp_path / "x.npz", flux=np.load(folder / "flux.npy")[:2], error=error[:2])
    np.save(tmp_path / "x.npy", np.load(folder / "flux.npy")[:2])
    for name, meta in (("x.npz", weighed.meta), ("x.npy", weighed.meta), ("x.npz", plain.meta)):
        TASK.predict(network, meta, [tmp_path / name], tmp_path / "out.csv")
        known = SpectraMeta.model_validate(meta)
        given = error[:2].clip(0, 1e6) if name == "x.npz" and known.weighs_errors else None
        told = network(standardised(np.load(tmp_path / "x.npy"), known, given))
        expected = told.mean.detach().numpy() * np.array(known.label_std) + np.array(known.label_mean)
        assert np.array(rows_of(tmp_path / "out.csv"))[:, 1::2].astype(float) == pytest.approx(expected, rel=1e-4)
    assert (
        torch.equal(TASK.held_out(folder, weighed.meta).dataset.tensors[0][:, 3], torch.zeros(20))
        or TASK.held_out(folder, weighed.meta).dataset.tensors[0][:, 3].abs().max() < 1e-6
    )
    np.save(folder / "error.npy", error[:3])
    with pytest.raises(UserError, match=r"error.npy is \(3, 96\); expected a deviation of each"):
        read_folder(folder, "", True)


def test_errors_are_divided_by_the_continuum(tmp_path):
    wave = np.linspace(4990, 5060, 900)
    flux = 800 - 0.1 * wave
    normalised, error = spectra.normalise_with_error(wave, flux, np.full(900, 8.0), 0.0, [Arm(5000, 5048, 0.5)])
    assert np.allclose(normalised, 1, atol=1e-3) and np.allclose(error, 8 / 300, rtol=0.02)


def test_the_authors_scalers_are_read_and_nothing_is_run(tmp_path):
    names = ["Teff[K]", "Logg", "vmic[km/s]", "FeH", *PUBLISHED[14]]
    held = {
        "label_list": names,
        "label_mean": np.arange(len(names)) + 0.5,
        "label_std": np.arange(len(names)) + 1.0,
        "flux_mean": np.full(7200, 0.9, np.float32),
        "flux_std": np.full(7200, 0.05, np.float32),
    }
    (tmp_path / "c.pkl").write_bytes(pickle.dumps(held))
    known = read_scalers(tmp_path / "c.pkl", 3)
    assert known.labels == ["Teff[K]", "Logg", "FeH"] and known.label_mean == [0.5, 1.5, 3.5] and known.units[0] == "K"
    torch.manual_seed(0)
    network = RRNet(3).eval()
    np.save(tmp_path / "x.npy", np.full((1, 7200), 0.9))
    assert "Teff[K]" in TASK.predict(network, {}, [tmp_path / "x.npy"], None, members=str(tmp_path / "c.pkl"))
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(print))
    (tmp_path / "half.pkl").write_bytes(pickle.dumps(held)[:-50])
    for name, words in (("evil.pkl", "asks for builtins.print"), ("half.pkl", "holds no scalers")):
        with pytest.raises(UserError, match=words):
            read_scalers(tmp_path / name, 3)
    with pytest.raises(UserError, match="networks of 3 and of 14 labels, got one of 7"):
        read_scalers(tmp_path / "c.pkl", 7)
    with pytest.raises(UserError, match=r"name the authors' label_config\.pkl in --members"):
        TASK.predict(rrnet_small(), {}, [tmp_path / "c.pkl"], None)


def test_inspection_is_the_slope_of_each_label_by_name(data, tmp_path):
    torch.manual_seed(0)
    network = rrnet_small(names="Teff,logg,Fe,Mg,Ca,Si,Ti").eval()
    np.save(tmp_path / "x.npy", synthetic.survey(2, 3)[0])
    x = TASK.example(tmp_path / "x.npy", data.meta)
    slopes = inspect(network.double(), x.double())
    assert list(slopes) == data.meta["labels"]
    step = torch.zeros_like(x).double()
    step[0, 700] = 1e-5
    rise = (network(x.double() + step).mean - network(x.double() - step).mean)[0] / 2e-5
    assert torch.allclose(torch.stack([each[700] for each in slopes.values()]), rise.detach(), rtol=1e-4, atol=1e-9)


def test_units_stand_in_the_names_of_labels():
    assert unit_of("Teff [K]") == "K" and unit_of("[Fe/H]") == "Fe/H" and unit_of("logg") == ""


def test_an_evaluation_draws_bias_scatter_and_the_kiel_diagram(data):
    network = rrnet_small().eval()
    figure = evaluated(network, data.test, TASK.scores(network, data.test))
    assert len(figure.axes) == 3 and figure.axes[2].get_xlabel() == "Teff K" and figure.axes[2].xaxis_inverted()
    cells = figure.axes[1].tables[0].get_celld()
    off = TASK.scores(network, data.test)["off"][:, 0] * data.meta["label_std"][0]
    assert float(cells[1, 1].get_text().get_text()) == pytest.approx(off.mean(), rel=0.01)
    assert float(cells[1, 2].get_text().get_text()) == pytest.approx(off.std(), rel=0.01)
