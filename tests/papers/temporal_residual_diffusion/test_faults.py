"""Odd recordings, sequences and options: one line that says what came; nothing dropped or ignored without a word."""

import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from provenn.core import progress
from provenn.core.errors import UserError
from provenn.papers.temporal_residual_diffusion import E2VID, Regression
from provenn.papers.temporal_residual_diffusion.inspection import inspect
from provenn.papers.temporal_residual_diffusion.presets import trd_small
from provenn.papers.temporal_residual_diffusion.simulator import Events, Sensor
from provenn.papers.temporal_residual_diffusion.task.files import read_events, reading_of, write_events
from provenn.papers.temporal_residual_diffusion.task.recordings import parts_of
from provenn.papers.temporal_residual_diffusion.task.sequences import CUTS, clips_of
from provenn.papers.temporal_residual_diffusion.voxels import without_hot_pixels
from provenn.tasks import get_task

TASK = get_task("event-video")
META = TASK.default_meta({})


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(progress, "say", lines.append)
    return lines


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Regression(E2VID(6, 4, 2), closed=True).eval()


def recording(size=(17, 33), count=400, seconds=0.2):
    rng = np.random.default_rng(0)
    return Events(
        rng.integers(size[1], size=count).astype(np.int32),
        rng.integers(size[0], size=count).astype(np.int32),
        np.sort(rng.uniform(0, seconds, count)),
        rng.choice(np.array([-1, 1], np.int8), count),
        size,
    )


def refused(file):
    with pytest.raises(UserError) as error:
        read_events(file)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["a.zip", "a.npz", "a.npy", "a.h5"])
def test_every_cut_and_every_hole_in_a_file_is_refused_or_read(name, tmp_path):
    if name.endswith("h5"):
        pytest.importorskip("h5py")
    file = tmp_path / name
    write_events(file, recording())
    whole, rng = file.read_bytes(), np.random.default_rng(1)
    for number in range(60):
        damaged = bytearray(whole)
        if number % 2:
            damaged = damaged[: int(rng.integers(len(whole)))]
        else:
            at = int(rng.integers(len(whole) - 30))
            damaged[at : at + 30] = rng.integers(256, size=30, dtype=np.uint8).tobytes()
        file.write_bytes(damaged)
        try:
            read_events(file)
        except UserError as error:
            assert "\n" not in str(error)


def test_a_zip_that_is_locked_or_damaged_inside_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("a.txt", "".join(f"0.{i:06d} 1 2 {i % 2}\n" for i in range(4000)))
    content = bytearray((tmp_path / "a.zip").read_bytes())
    holed = content.copy()
    holed[60:120] = bytes(60)
    (tmp_path / "a.zip").write_bytes(holed)
    assert "cannot be read" in refused(tmp_path / "a.zip")
    for at in (6, content.rindex(b"PK\x01\x02") + 8):
        content[at] |= 1  # says that it is encrypted
    (tmp_path / "a.zip").write_bytes(content)
    assert "cannot be read" in refused(tmp_path / "a.zip")


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"width": "a", "height": 3}, "width is one whole number, got a"),
        ({"width": [33, 33], "height": [17]}, "width is one whole number"),
        ({"t": 1.0, "x": 1, "y": 1, "p": 1}, "columns of numbers"),
        ({"x": [0.5, 1.0]}, "x of event 0 is 0.5; expected a whole number"),
        ({"y": [1, -2]}, "y of event 1 is -2; expected a whole number"),
        ({"x": [1.0, 1e30]}, r"x of event 1 is 1e\+30"),
        ({"width": -3, "height": 5}, "a sensor of -3×5; expected 1 to"),
        ({"width": 0, "height": 0}, "a sensor of 0×0; expected 1 to"),
    ],
)
def test_arrays_that_are_no_events_are_refused(changed, says, tmp_path):
    np.savez(tmp_path / "a.npz", **({"t": [0.5, 1.5], "x": [1, 2], "y": [1, 2], "p": [0, 1]} | changed))
    with pytest.raises(UserError, match=says):
        read_events(tmp_path / "a.npz")


def test_hdf5_with_odd_numbers_beside_the_events_is_refused(tmp_path):
    h5py = pytest.importorskip("h5py")
    for number, (name, value) in enumerate(
        (("t_offset", [1, 2]), ("sensor_resolution", "a"), ("sensor_resolution", [3]))
    ):
        file = tmp_path / f"{number}.h5"
        with h5py.File(file, "w") as opened:
            for column, values in {"t": [5, 6], "x": [1, 2], "y": [0, 3], "p": [1, 0]}.items():
                opened[f"events/{column}"] = np.array(values)
            if name == "t_offset":
                opened[name] = value
            else:
                opened.attrs[name] = value
        assert name in refused(file)


@pytest.mark.parametrize("name", ["a.txt", "a.zip", "a.npy", "a.npz", "a.h5"])
def test_on_a_full_disk_nothing_is_left(name, tmp_path):
    resource = pytest.importorskip("resource")
    if name.endswith("h5"):
        pytest.importorskip("h5py")
    events, before = recording(count=20_000), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, before[1]))  # as a disk with so many bytes left
    try:
        with pytest.raises(UserError, match="cannot write"):
            write_events(tmp_path / name, events)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_a_sensor_of_one_pixel_is_one(tmp_path):
    one = Events(np.zeros(3, np.int32), np.zeros(3, np.int32), np.arange(3.0), np.ones(3, np.int8), (1, 1))
    write_events(tmp_path / "a.npz", one)
    assert read_events(tmp_path / "a.npz").size == (1, 1)


@pytest.mark.parametrize("text", ["steps=²", "seed=٣", "size=²x4", "seed=" + "9" * 5000])
def test_digits_that_are_none_are_refused(text):
    with pytest.raises(UserError, match="events are read by"):
        reading_of(text)


def test_stamps_beside_the_recording_are_said_or_refused(said, tmp_path):
    events = recording()
    stamps = tmp_path / "stamps.txt"
    stamps.write_text("0.05\n0.1\n")
    assert len(list(parts_of(events, str(stamps)))) == 1
    outside = int(((events.t < 0.05) | (events.t >= 0.1)).sum())
    assert said == [f"{outside} of 400 events lie outside the stamps of {stamps}"]
    for text, says in (("100\n200\n", "no event lies between"), ("0.05\ninf\n", "expected two or more")):
        stamps.write_text(text)
        with pytest.raises(UserError, match=says):
            list(parts_of(events, str(stamps)))


def test_options_without_use_are_named(said, model, tmp_path):
    write_events(tmp_path / "a.npz", recording())
    for number in range(3):
        (tmp_path / "v").mkdir(exist_ok=True)
        Image.fromarray(np.full((17, 33), 60 * number, np.uint8)).save(tmp_path / "v" / f"{number}.png")

    def names(**options):
        said.clear()
        TASK.predict(model, META, **options)
        return [line.split(":")[0] for line in said if "not used for" in line]

    assert names(inputs=[tmp_path / "a.npz"], output=tmp_path / "a.npy") == []
    given = dict(events="sensor=v2e,threshold=0.3,unit=us", inputs=[tmp_path / "a.npz"], output=tmp_path / "a.npy")
    assert names(**given) == ["threshold=, sensor="]
    assert names(events="hot=3,sort=yes", inputs=[tmp_path / "v"], output=tmp_path / "b.png") == ["hot=, sort="]
    given = dict(events="seed=3,threshold=0.3", inputs=[tmp_path / "v"], output=tmp_path / "b.npz", paired=True)
    assert names(**given, window="1ms") == ["seed=, --window, --paired"]


def test_a_hot_pixel_is_measured_by_those_that_give_events():
    counts = np.array([10, 10, 10, 10, 10, 60])
    columns = np.repeat(np.arange(6), counts).astype(np.int32)
    events = Events(columns, columns, np.arange(110.0), np.ones(110, np.int8), (100, 100))
    assert without_hot_pixels(events)[1] == 0 and without_hot_pixels(events, 3)[1] == 1


def test_a_recording_of_hot_pixels_alone_says_so(model, tmp_path):
    write_events(tmp_path / "a.npz", recording())
    with pytest.raises(UserError, match=r"all \d+ pixels with events are hot by hot=0\.001"):
        TASK.predict(model, META, [tmp_path / "a.npz"], tmp_path / "a.npy", events="hot=0.001")
    assert not (tmp_path / "a.npy").exists()


@pytest.mark.parametrize("size", [(17, 33), (1, 1), (5, 64)])
def test_what_is_looked_into_has_the_size_of_the_sensor(size):
    torch.manual_seed(0)
    shown = inspect(trd_small(low=None, steps=1).eval(), torch.randn(1, 5, *size).round())
    assert all(shown[name].shape == size for name in ("low", "residual", "frame"))


def sequence(folder, *, images=None, stamps=None, count=6, size=(20, 24)):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(count)
    stamps = np.arange(count, dtype=np.float64) if stamps is None else np.asarray(stamps, np.float64)
    np.save(folder / "events_ts.npy", np.sort(rng.uniform(0, 30, 900)))
    np.save(folder / "events_xy.npy", np.stack([rng.integers(0, size[1], 900), rng.integers(0, size[0], 900)], 1))
    np.save(folder / "events_p.npy", rng.integers(0, 2, 900))
    np.save(folder / "images.npy", rng.integers(0, 256, (count, *size)).astype(np.uint8) if images is None else images)
    np.save(folder / "images_ts.npy", stamps)
    return folder


def test_cuts_are_those_of_evreal_by_its_names(said, tmp_path):
    assert CUTS["office_zigzag"] == (5, 12) and CUTS["indoor_flying4_data"] == (10, 19.8) and len(CUTS) == 13
    folder = sequence(tmp_path / "slider_depth", stamps=[0.5, 1.0, 1.5, 2.0, 2.5, 3.0])
    # Times are counted from the first event or image, which is an event a little after 0 here.
    first = np.load(folder / "events_ts.npy")[0]
    cut = list(clips_of(folder, 9, Sensor(), cut=True))
    kept = [t for t in (0.5, 1.0, 1.5, 2.0, 2.5, 3.0) if 1 <= t - first <= 2.5]
    assert len(cut) == 1 and len(cut[0].frames) == len(kept) == 3 and not said
    # What E2VID+ cut before has another name, and is not cut again.
    assert len(next(clips_of(sequence(tmp_path / "slider_depth_cut"), 9, Sensor(), cut=True)).frames) == 6
    assert "taken whole" in said[0]
    with pytest.raises(UserError, match="no two frames are left"):
        TASK.held_out(_only(folder, tmp_path / "late", stamps=[20, 21, 22, 23, 24, 25]), META, cut=True)


def _only(folder, parent, stamps):
    sequence(parent / folder.name, stamps=stamps)
    return parent


def test_images_of_other_kinds_are_read_or_refused(tmp_path):
    rng = np.random.default_rng(0)
    bright = rng.integers(0, 65536, (6, 20, 24)).astype(np.uint16)
    clip = next(clips_of(sequence(tmp_path / "a", images=bright), 9, Sensor()))
    assert torch.allclose(clip.frames[:, 0], torch.from_numpy(bright.astype(np.float32) / 65535), atol=1e-6)
    for name, images, says in (
        ("b", rng.uniform(0, 255, (6, 20, 24)), "expected 0 to 1"),
        ("c", np.full((6, 20, 24), np.nan), "expected 0 to 1"),
        ("d", bright.astype(np.int64), "images.npy holds int64"),
    ):
        with pytest.raises(UserError, match=says):
            list(clips_of(sequence(tmp_path / name, images=images), 9, Sensor()))
    for name, stamps in (("e", [0, 1, 1, 2, 3, 4]), ("f", [0, 1, np.nan, 3, 4, 5])):
        with pytest.raises(UserError, match="not each later than the last"):
            list(clips_of(sequence(tmp_path / name, stamps=stamps), 9, Sensor()))
