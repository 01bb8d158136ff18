"""The task of video from events: files, windows, clips, figures, what is written, and one line for bad input."""

import builtins
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from provenn.core.errors import UserError
from provenn.papers.temporal_residual_diffusion import E2VID, Regression, Sensor, simulate_events
from provenn.papers.temporal_residual_diffusion.inspection import inspect
from provenn.papers.temporal_residual_diffusion.presets import e2vid, trd_small
from provenn.papers.temporal_residual_diffusion.simulator import Events
from provenn.papers.temporal_residual_diffusion.studies import Hold, Integration
from provenn.papers.temporal_residual_diffusion.task import answer, evaluated, reconstructed
from provenn.papers.temporal_residual_diffusion.task.clips import TEST, Clips, flight, flights, gathered, seen_by_camera
from provenn.papers.temporal_residual_diffusion.task.files import Reading, read_events, reading_of, write_events
from provenn.papers.temporal_residual_diffusion.task.metrics import by_percentile, compared
from provenn.papers.temporal_residual_diffusion.task.recordings import parts_of
from provenn.papers.temporal_residual_diffusion.task.sequences import clips_of
from provenn.papers.temporal_residual_diffusion.task.videos import read_video, write_video
from provenn.tasks import get_task
from provenn.tasks.demos import Trial

TASK = get_task("event-video")
META = TASK.default_meta({})


@pytest.fixture(scope="module")
def clip():
    return flights(TEST, 1, 3)[0]


@pytest.fixture(scope="module")
def recording():
    """Events of a camera of 40×24 pixels, for a quarter of a second."""
    picture = np.random.default_rng(0).integers(0, 256, (120, 120)).astype(np.uint8)
    picture = np.asarray(Image.fromarray(picture).resize((240, 240), Image.Resampling.BICUBIC))
    frames = flight(picture, np.random.default_rng(1), 8, 40)[:, :24]
    return simulate_events(frames, np.arange(len(frames)) / 240)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Regression(E2VID(6, 4, 2), closed=True).eval()


def same(a: Events, b: Events) -> bool:
    return a.size == b.size and all(np.allclose(x, y, atol=1e-6) for x, y in zip(a[:4], b[:4], strict=True))


@pytest.mark.parametrize("name", ["a.txt", "a.zip", "a.npy", "a.npz", "a.h5"])
def test_a_recording_is_read_back_as_it_was_written(name, recording, tmp_path):
    write_events(tmp_path / name, recording)
    reading = Reading(size=(40, 24)) if name == "a.npy" else Reading()
    assert same(read_events(tmp_path / name, reading), recording)


def test_text_may_have_commas_names_and_polarities_of_either_kind(tmp_path):
    (tmp_path / "a.csv").write_text("t,x,y,p\n0.5,1,2,-1\n0.75,3,4,1\n")
    told = read_events(tmp_path / "a.csv")
    assert told.size == (5, 4) and told.p.tolist() == [-1, 1] and told.t.tolist() == [0.5, 0.75]
    (tmp_path / "b.txt").write_text("10 9\n1000 1 2 0\n2500 3 4 1\n")
    told = read_events(tmp_path / "b.txt")
    assert told.size == (9, 10) and told.p.tolist() == [-1, 1] and np.allclose(told.t, [0.001, 0.0025])
    assert np.allclose(read_events(tmp_path / "b.txt", reading_of("unit=ms")).t, [1, 2.5])


def test_hdf5_of_other_makers(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "dsec.h5", "w") as file:
        for name, values in {"t": [5, 6], "x": [1, 2], "y": [0, 3], "p": [1, 0]}.items():
            file[f"events/{name}"] = np.array(values, np.uint32)
        file["t_offset"] = 1_000_000
    assert np.allclose(read_events(tmp_path / "dsec.h5").t, [1.000005, 1.000006])
    with h5py.File(tmp_path / "cnn.h5", "w") as file:
        for name, values in {"ts": [0.5, 0.6], "xs": [1, 2], "ys": [0, 3], "ps": [True, False]}.items():
            file[f"events/{name}"] = np.array(values)
        file.attrs["sensor_resolution"] = [20, 30]
    told = read_events(tmp_path / "cnn.h5")
    assert told.size == (20, 30) and told.p.tolist() == [1, -1]


BAD = {
    "0.1 1 1 1\n0.05 1 1 1\n": "event 1 is earlier than the one before; --events sort=yes",
    "-0.1 1 1 1\n": "the time of event 0 is negative",
    "4 4\n0.5 4 1 1\n": "event 0 lies at x 4, y 1, outside a sensor of 4×4",
    "0.5 1 1 3\n": "polarities are 1 and 0, or 1 and −1; got [3.0]",
    "0.5 1 1\n": "has 3 numbers; expected four",
    "0.5 1 one 1\n": "a line is no event",
    "0.5 nan 1 1\n": "x of event 0 is no number",
    "": "holds no events",
}


@pytest.mark.parametrize("text", BAD)
def test_a_bad_recording_is_refused_in_a_line(text, tmp_path):
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(UserError) as error:
        read_events(tmp_path / "a.txt")
    assert BAD[text] in str(error.value) and "\n" not in str(error.value)


def test_events_out_of_order_are_put_in_order_when_asked(tmp_path):
    (tmp_path / "a.txt").write_text("4 4\n0.75 1 1 1\n0.25 2 3 0\n")
    told = read_events(tmp_path / "a.txt", reading_of("sort=yes"))
    assert told.t.tolist() == [0.25, 0.75] and told.x.tolist() == [2, 1] and told.p.tolist() == [-1, 1]


@pytest.mark.parametrize(
    "text", ["unit=h", "size=3", "size=0x4", "hot=-1", "hot=nan", "sort", "threshold=0", "a=b", "steps=0"]
)
def test_other_ways_to_read_are_refused(text):
    with pytest.raises(UserError, match=r"events are read by|columns x rows"):
        reading_of(text)


def test_zips_of_several_texts_and_damaged_files_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as packed:
        packed.writestr("a.txt", "0.5 1 1 1\n")
        packed.writestr("b.txt", "0.5 1 1 1\n")
    (tmp_path / "b.zip").write_bytes(b"PK\x03\x04 no")
    (tmp_path / "c.npy").write_bytes(b"\x93NUMPY no")
    np.save(tmp_path / "d.npy", np.zeros((3, 5)))
    (tmp_path / "e.bin").write_bytes(b"")
    for name, says in [
        ("a.zip", "2 texts"),
        ("b.zip", "cannot be read"),
        ("c.npy", "no NumPy file"),
        ("d.npy", r"\(events, 4\)"),
        ("e.bin", "no rec"),
    ]:
        with pytest.raises(UserError, match=says):
            read_events(tmp_path / name)


def test_windows_are_of_a_time_a_count_a_share_or_stamps(recording, tmp_path):
    span = recording.t[-1] - recording.t[0]
    parts = list(parts_of(recording, "33ms"))
    assert len(parts) == int(span // 0.033) + 1 and sum(len(part[2].t) for part in parts) == len(recording.t)
    assert [len(part[2].t) for part in parts_of(recording, "100")][:-1] == [100] * (len(recording.t) // 100)
    share = next(parts_of(recording, "0.5/pixel"))
    assert len(share[2].t) == 0.5 * 24 * 40
    (tmp_path / "stamps.txt").write_text("0.01\n0.05\n0.2\n")
    stamped = list(parts_of(recording, str(tmp_path / "stamps.txt")))
    assert [part[:2] for part in stamped] == [(0.01, 0.05), (0.05, 0.2)]
    assert all(((part.t >= start) & (part.t < end)).all() for start, end, part in stamped)
    for window in ("soon", "0ms", "-3", "1.2.3ms"):
        with pytest.raises(UserError, match="window"):
            list(parts_of(recording, window))
    with pytest.raises(UserError, match="unit of the times"):
        list(parts_of(recording, "0.0000001us"))


def test_a_clip_holds_all_its_events(clip):
    assert clip.voxels.shape == (9, 5, 32, 32) and clip.frames.shape == (10, 1, 32, 32)
    signed = clip.counts[:, 0] - clip.counts[:, 1]
    assert torch.allclose(clip.voxels.sum(1), signed, atol=1e-4) and clip.counts.sum() > 0
    assert clip.frames.min() >= 0 and clip.frames.max() <= 1


def test_no_picture_is_in_two_splits_and_a_seed_gives_the_same_clips():
    data = TASK.load("moving", clips=4)
    assert data.fingerprint == TASK.load("moving", clips=4).fingerprint
    assert data.fingerprint != TASK.load("moving", clips=4, seed=1).fingerprint
    from provenn.papers.temporal_residual_diffusion.task import clips

    names = [*clips.TRAIN, *clips.VALIDATE, *clips.TEST]
    assert len(set(names)) == len(names)
    every = [part[i][1].numpy().tobytes() for part in (data.train, data.val, data.test) for i in range(4)]
    assert len(set(every)) == len(every)


def test_normalised_grids_have_mean_0_and_spread_1_where_there_are_events():
    voxel = TASK.load("moving", clips=4, normalise=True).train[0][0][2]
    there = voxel != 0
    assert abs(float(voxel[there].mean())) < 0.05 and 0.9 < float(voxel[there].std()) < 1.1


def test_times_may_be_counted_from_the_first_and_the_last_event():
    data, own = TASK.load("moving", clips=2), TASK.load("moving", clips=2, bounds=False)
    assert own.meta["bounds"] is False and torch.equal(data.train[0].counts, own.train[0].counts)
    assert torch.allclose(own.train[0].voxels.sum(1), data.train[0].voxels.sum(1), atol=1e-4)
    assert not torch.allclose(own.train[0].voxels, data.train[0].voxels, atol=1e-2)
    held = TASK.held_out("moving", own.meta)
    assert torch.equal(held.dataset[0].voxels, own.test[0].voxels)


def test_figures_are_what_they_say(clip):
    truth = clip.frames[1:]
    same_again = compared(truth, truth)
    assert same_again["mse"] == 0 and same_again["high_error"] == 0
    assert same_again["ssim"] == pytest.approx(1) and same_again["high_correlation"] == pytest.approx(1)
    assert same_again["high_ratio"] == pytest.approx(1)
    brighter = compared(truth + 0.25, truth)
    assert brighter["mse"] == pytest.approx(0.0625, rel=1e-5) and brighter["high_error"] < 1e-12
    contrast = compared(3 * truth, truth)
    assert contrast["high_ratio"] == pytest.approx(3) and contrast["high_correlation"] == pytest.approx(1)
    blurred = torch.nn.functional.avg_pool2d(truth, 5, 1, 2, count_include_pad=False)
    assert compared(blurred, truth)["high_ratio"] < 0.6
    assert compared(-truth, truth)["high_correlation"] == pytest.approx(-1)
    stretched = by_percentile(0.2 + 0.3 * truth)
    assert stretched.min() == 0 and stretched.max() == 1


def test_one_video_is_scored_as_among_others(model):
    data = Clips([*flights(TEST, 3, 5, 3), *flights(TEST, 2, 5, 2)])
    whole, alone = TASK.scores(model, data, 30), TASK.scores(model, data, 1)
    for name in whole:
        assert np.allclose(whole[name], alone[name], atol=1e-5, equal_nan=True), name
    assert whole["by_frame"].shape == (5, 3) and np.isnan(whole["by_frame"][3:, 2]).all()


def test_a_sampler_scores_a_video_as_among_others():
    torch.manual_seed(0)
    system = trd_small(low=None, steps=2).eval()
    data = Clips(flights(TEST, 3, 5, 2))
    every = {n: told for n, _, told in reconstructed(system, data, 30)}
    again = {n: told for n, _, told in reconstructed(system, data, 1)}
    assert all(torch.allclose(every[n], again[n], atol=1e-4) for n in range(3))


def test_holding_the_first_frame_is_the_dummy_baseline(clip):
    data = TASK.load("moving", clips=4)
    assert TASK.evaluate(Hold(), data.test)["mse"] == pytest.approx(TASK.dummy_baseline(data), rel=1e-5)


def test_integration_with_fitted_thresholds_follows_a_clean_camera():
    rng = np.random.default_rng(2)
    picture = np.asarray(Image.fromarray(rng.integers(40, 200, (30, 30)).astype(np.uint8)).resize((240, 240)))
    frames = flight(picture, rng, 6, 32)
    from provenn.papers.temporal_residual_diffusion.simulator import Simulator

    camera, parts = Simulator(frames[0], 0.0, Sensor(0.03, 0.04)), []
    parts = [camera.step(frame, (i + 1) / 240) for i, frame in enumerate(frames[1:])]
    clean = gathered(frames, parts, [i / 240 for i in range(len(frames))])
    told = Integration().rebuilt([clean.voxels[None], clean.frames[None], clean.counts[None]])
    values = compared(told[0], clean.frames[1:])
    held = compared(clean.frames[:1].expand_as(told[0]), clean.frames[1:])
    assert values["mse"] < 0.02 * held["mse"] and values["high_correlation"] > 0.9
    noisy = seen_by_camera(frames, rng)
    assert noisy.counts.sum() > 0


def frames_of(count=5, size=(18, 26)):
    return [np.full(size, 30 * (i % 8), np.uint8) for i in range(count)]


@pytest.mark.parametrize("name", ["a.mp4", "a.avi", "a.mkv", "a.mov", "a.gif"])
def test_a_video_is_read_back_about_as_it_was_written(name, tmp_path):
    pytest.importorskip("av")
    write_video(tmp_path / name, iter(frames_of()), [0.1 * i for i in range(5)])
    told = list(read_video(tmp_path / name))
    assert len(told) == 5 and told[0][1].shape == (18, 26)
    assert np.allclose([255 * frame.mean() for _, frame in told], [0, 30, 60, 90, 120], atol=6)
    assert np.allclose(np.diff([time for time, _ in told]), 0.1, atol=0.02)


def test_frames_go_to_a_folder_an_array_or_a_strip(tmp_path):
    times = [0.1, 0.2, 0.3, 0.4, 0.5]
    write_video(tmp_path / "out", iter(frames_of()), times)
    assert [p.name for p in sorted((tmp_path / "out").glob("*.png"))] == [f"frame_00000{i}.png" for i in range(5)]
    stamps = list(
        parts_of(
            Events(*(np.zeros(1, np.int32),) * 2, np.full(1, 0.15), np.ones(1, np.int8), (18, 26)),
            str(tmp_path / "out" / "timestamps.csv"),
        )
    )
    assert [part[0] for part in stamps] == pytest.approx(times[:-1])
    told = list(read_video(tmp_path / "out"))
    assert [round(255 * frame.mean()) for _, frame in told] == [0, 30, 60, 90, 120]
    write_video(tmp_path / "a.npy", iter(frames_of()), times)
    assert np.load(tmp_path / "a.npy").shape == (5, 18, 26)
    write_video(tmp_path / "a.png", iter(frames_of(20)), [0.1 * i for i in range(20)])
    assert Image.open(tmp_path / "a.png").size == (8 * 26, 18)


def test_prediction_of_events_and_of_a_video(model, recording, tmp_path):
    write_events(tmp_path / "a.txt", recording)
    says = TASK.predict(model, META, [tmp_path / "a.txt"], tmp_path / "a.npy", paired=True)
    frames = np.load(tmp_path / "a.npy")
    count = len(list(parts_of(recording, "33ms")))
    assert frames.shape == (count, 24, 80, 3) and "first frame is not known" in says and f"{count} frames" in says
    Image.fromarray(np.full((24, 40), 90, np.uint8)).save(tmp_path / "first.png")
    says = TASK.predict(
        model, META, [tmp_path / "a.txt"], tmp_path / "b.npy", first=tmp_path / "first.png", window="500"
    )
    assert "not known" not in says and not np.array_equal(np.load(tmp_path / "b.npy")[0], frames[0, :, 40:, 0])
    write_video(tmp_path / "pictures", frames_of(4, (24, 40)), [0.0, 0.1, 0.2, 0.3])
    says = TASK.predict(model, META, [tmp_path / "pictures"], tmp_path / "e.npz", events="threshold=0.5")
    told = read_events(tmp_path / "e.npz")
    assert told.size == (24, 40) and (told.p > 0).all() and f"{len(told.t):,} events" in says
    write_video(tmp_path / "one", frames_of(1, (24, 40)), [0.0])
    with pytest.raises(UserError, match="one frame; events come of two or more"):
        TASK.predict(model, META, [tmp_path / "one"], tmp_path / "none.npz")
    TASK.predict(model, META, [tmp_path / "pictures"], tmp_path / "strip.png", window="0.04s")
    assert Image.open(tmp_path / "strip.png").size[1] == 24


def test_steps_and_seeds_of_sampling_are_the_users(model, recording, tmp_path):
    write_events(tmp_path / "a.npz", recording)
    torch.manual_seed(0)
    system = trd_small(low=None, steps=3).eval()
    told = {}
    for how in ("", "steps=3", "steps=1", "seed=1"):
        TASK.predict(system, META, [tmp_path / "a.npz"], tmp_path / "a.npy", events=how)
        told[how] = np.load(tmp_path / "a.npy")
    assert np.array_equal(told[""], told["steps=3"]) and system.steps == 3
    assert not np.array_equal(told[""], told["steps=1"]) and not np.array_equal(told[""], told["seed=1"])
    with pytest.raises(UserError, match="says its frames at once"):
        TASK.predict(model, META, [tmp_path / "a.npz"], tmp_path / "b.npy", events="steps=2")


def test_hot_pixels_are_left_out_and_said(model, recording, tmp_path):
    many = 3000
    hot = Events(
        *(np.concatenate([column, np.full(many, 7, column.dtype)]) for column in recording[:2]),
        np.concatenate([recording.t, np.linspace(0, recording.t[-1], many)]),
        np.concatenate([recording.p, np.ones(many, np.int8)]),
        recording.size,
    )
    write_events(tmp_path / "a.npz", hot)
    says = TASK.predict(model, META, [tmp_path / "a.npz"], tmp_path / "a.png", events="sort=yes")
    assert "1 hot pixel(s) were left out" in says
    assert "left out" not in TASK.predict(
        model, META, [tmp_path / "a.npz"], tmp_path / "b.png", events="sort=yes,hot=0"
    )


def test_predictions_that_make_no_sense_are_refused(model, recording, tmp_path):
    write_events(tmp_path / "a.txt", recording)
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(tmp_path / "small.png")
    tried = [
        (dict(inputs=[tmp_path / "a.txt"] * 2, output=tmp_path / "a.npy"), "one recording or one video, got 2"),
        (dict(inputs=[tmp_path / "a.txt"], output=None), "frames need a path"),
        (dict(inputs=[tmp_path / "a.txt"], output=tmp_path / "a.docx"), "frames are written as"),
        (dict(inputs=[tmp_path / "a.txt"], output=tmp_path / "a.txt"), "the input itself"),
        (dict(inputs=[tmp_path / "a.txt"], output=tmp_path / "b.npy", first=tmp_path / "small.png"), "9×9 pixels, the"),
        (dict(inputs=[tmp_path / "none.txt"], output=tmp_path / "b.npy"), "none.txt cannot be read"),
        (dict(inputs=[tmp_path / "small.png"], output=tmp_path / "b.npy"), "no recording of events"),
    ]
    for given, says in tried:
        with pytest.raises(UserError, match=says):
            TASK.predict(model, META, **given)
    assert not (tmp_path / "b.npy").exists()


def test_without_the_extra_the_refusal_names_it(monkeypatch, tmp_path, model, recording):
    write_events(tmp_path / "a.txt", recording)
    real = builtins.__import__

    def without(name, *rest, **options):
        if name.split(".")[0] in ("av", "h5py"):
            raise ImportError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    for call in (
        lambda: TASK.predict(model, META, [tmp_path / "a.txt"], tmp_path / "a.mp4"),
        lambda: write_events(tmp_path / "a.h5", recording),
    ):
        with pytest.raises(UserError, match=r"pip install 'provenn\[events\]'"):
            call()
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def evreal(folder: Path, count=6, size=(20, 24)) -> Path:
    """A sequence as EVREAL has it."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(count)
    times = np.sort(rng.uniform(0, count - 1, 400))
    np.save(folder / "events_ts.npy", times)
    np.save(folder / "events_xy.npy", np.stack([rng.integers(0, size[1], 400), rng.integers(0, size[0], 400)], 1))
    np.save(folder / "events_p.npy", rng.integers(0, 2, 400))
    np.save(folder / "images.npy", rng.integers(0, 256, (count, *size, 1)).astype(np.uint8))
    np.save(folder / "images_ts.npy", np.arange(count, dtype=np.float64))
    return folder


def test_sequences_of_evreal_are_cut_into_parts_that_lose_nothing(tmp_path):
    folder = evreal(tmp_path / "a")
    clips = list(clips_of(folder, 3, Sensor()))
    assert [len(clip.voxels) for clip in clips] == [3, 2]
    assert torch.equal(clips[0].frames[-1], clips[1].frames[0])
    times = np.load(folder / "events_ts.npy")
    assert sum(float(clip.counts.sum()) for clip in clips) == len(times)
    slider = evreal(tmp_path / "slider_depth")
    cut = list(clips_of(slider, 9, Sensor(), cut=True))
    assert len(cut) == 1 and len(cut[0].frames) == 2  # images at 1 s and at 2 s


def test_the_users_videos_are_split_and_clipped(tmp_path, model):
    for name in "abcd":
        evreal(tmp_path / "data" / name)
    data = TASK.load(tmp_path / "data", windows=2, size=16)
    assert data.train[0][0].shape == (2, 5, 16, 16) and len(data.test) == 1
    held = TASK.held_out(tmp_path / "data", META)
    assert len(held.dataset) == 4 and "true first frame" in held.about
    percentile = TASK.held_out(tmp_path / "data", META, percentile=True)
    assert "percentiles" in percentile.about
    figures = [TASK.evaluate(model, each.dataset)["mse"] for each in (held, percentile)]
    assert figures[0] != figures[1]
    with pytest.raises(UserError, match="no video to train on has 101 frames"):
        TASK.load(tmp_path / "data", windows=100)
    with pytest.raises(UserError, match="holds no video"):
        TASK.load(tmp_path / "data" / "a")
    np.save(tmp_path / "data" / "a" / "images_ts.npy", np.arange(3.0))
    with pytest.raises(UserError, match="6 images and 3 times"):
        TASK.load(tmp_path / "data", windows=2, size=16, seed=1)


def test_the_exported_step_goes_on_as_the_system_does():
    torch.manual_seed(0)
    system = trd_small(low=None, steps=2).eval()
    form = TASK.portable(system, META)
    with torch.no_grad():
        told = form.system(**form.example)
        voxel, noise, last, row = (form.example[name] for name in ("voxel", "noise", "last", "memory"))
        frame, memory = system.step(voxel, system.begin(last), noise)
        again, _ = system.step(voxel, memory, noise)
        exported = form.system(voxel, noise, frame, row)
    assert told[0].shape == frame.shape and not torch.equal(told[0], frame)  # the states say something
    assert torch.equal(exported[0], again)


@pytest.mark.parametrize("size", [(1, 1), (3000, 2), (300, 200)])
def test_pictures_of_any_size_are_tried_in_the_browser(size, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, size[::-1], dtype=np.uint8)).save("given.png")
    told = answer(Trial(TASK, model, META, Path("given.png"), {}, print))
    assert told["kind"] == "compared" and Image.open("before.png").size == Image.open("after.png").size == told["size"]
    assert "simulated events" in told["text"]


def test_what_is_looked_into_has_the_windows_size(recording, tmp_path, model):
    write_events(tmp_path / "a.npz", recording)
    grid = TASK.example(tmp_path / "a.npz", META)
    system = trd_small(low=None, steps=2).eval()
    shown = inspect(system, grid)
    assert {"low", "residual", "frame", "gate.0", "gate.1"} <= shown.keys() and shown["low"].shape == (24, 40)
    assert inspect(e2vid().eval(), grid)["frame"].shape == (24, 40)


def test_pictures_of_results_can_be_drawn(model):
    data = TASK.load("moving", clips=4)
    part = Clips(data.test.clips[:3])
    assert len(evaluated(model, part, TASK.scores(model, part)).axes) == 2
    assert len(TASK.picture(model, data).axes) == 3


def test_a_system_that_has_learned_nothing_of_low_frequencies_is_not_trained(tmp_path):
    from provenn.training.recipes import Recipe

    with pytest.raises(UserError, match="train the preset e2vid first"):
        trd_small(low="").optimizers(Recipe())
    with pytest.raises(UserError, match="no weights at"):
        trd_small(low=str(tmp_path / "none")).optimizers(Recipe())
    system = trd_small()
    before = system.low.network.predict.weight.clone()
    system.optimizers(Recipe())
    assert not torch.equal(system.low.network.predict.weight, before)
    again = trd_small()
    again.load_state_dict(system.state_dict())
    assert again.start is None and not any(p.requires_grad for p in again.low.parameters())
