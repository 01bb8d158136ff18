"""WAV files as people have them, frames of them, vowels with exact labels, and predictions on the user's own."""

import struct
import wave

import numpy as np
import pytest
import torch
from scipy.io import wavfile

import provenn
from provenn import catalog
from provenn.core.errors import UserError
from provenn.data.audio import FORMANTS, VOWEL_RATE, Frames, LogMel, draw_vowel, log_mel, mel_bank, read_sound, resample
from provenn.inference import evaluation
from provenn.inference.paper import Paper
from provenn.papers.gaam import AudioClassifier
from provenn.tasks import get_task
from provenn.training import weights

TASK = get_task("audio-classification")
SMALL = {"examples": 30, "test_examples": 20}


def tone(frequency=440.0, rate=16_000, seconds=0.2):
    return (0.5 * np.sin(2 * np.pi * frequency * np.arange(int(rate * seconds)) / rate)).astype(np.float32)


def write_24_bits(file, samples, rate):
    with wave.open(str(file), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(3)
        out.setframerate(rate)
        out.writeframes(b"".join(struct.pack("<i", int(s * (2**23 - 1)))[:3] for s in samples))


def folder_of_tones(root, names=("high", "low"), count=8, rate=16_000):
    for name, frequency in zip(names, (1500, 300, 700)):
        (root / name).mkdir(parents=True)
        for k in range(count):
            wavfile.write(root / name / f"{k}.wav", rate, tone(frequency + 5 * k, rate, 0.1 + 0.01 * k))
    return root


@pytest.mark.parametrize("kind", ["u8", "i16", "i24", "i32", "f32", "f64", "stereo"])
def test_every_usual_width_is_read_from_minus_1_to_1(tmp_path, kind):
    file, samples = tmp_path / "a.wav", tone()
    if kind == "i24":
        write_24_bits(file, samples, 16_000)
    else:
        written = {
            "u8": (128 + 127 * samples).round().astype(np.uint8),
            "i16": (32767 * samples).astype(np.int16),
            "i32": (samples.astype(np.float64) * (2**31 - 1)).astype(np.int32),
            "f32": samples,
            "f64": samples.astype(np.float64),
            "stereo": np.stack([samples, np.zeros_like(samples)], axis=1),
        }[kind]
        wavfile.write(file, 16_000, written)
    read, rate = read_sound(file)
    assert rate == 16_000 and read.dtype == np.float32 and len(read) == len(samples)
    expected = samples / 2 if kind == "stereo" else samples
    np.testing.assert_allclose(read, expected, atol=0.01 if kind == "u8" else 1e-4)


def test_bad_files_are_refused_in_one_line(tmp_path):
    one, none, cut = tmp_path / "one.wav", tmp_path / "none.wav", tmp_path / "cut.wav"
    wavfile.write(one, 8000, np.zeros(1, dtype=np.int16))
    wavfile.write(none, 8000, np.zeros(0, dtype=np.int16))
    cut.write_bytes(one.read_bytes()[:30])
    wavfile.write(tmp_path / "short.wav", 8000, np.zeros(900, dtype=np.int16))
    (tmp_path / "short.wav").write_bytes((tmp_path / "short.wav").read_bytes()[:1000])
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "text.wav").write_text("no sound at all, but words")
    (tmp_path / "song.mp3").write_bytes(b"ID3")
    wavfile.write(tmp_path / "nan.wav", 8000, np.full(9, np.nan, dtype=np.float32))
    for name, message in (
        ("one.wav", "has 1 sample: too few"),
        ("none.wav", "too few to hear|cannot be read as a WAV"),
        ("cut.wav", "cannot be read as a WAV file"),
        ("short.wav", "is cut short"),
        ("empty.wav", "cannot be read as a WAV file"),
        ("text.wav", "cannot be read as a WAV file"),
        ("song.mp3", "cannot read sound from .mp3"),
        ("nan.wav", "no finite numbers"),
        ("missing.wav", "no sound at"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            read_sound(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_another_rate_is_resampled_and_a_tone_keeps_its_band(tmp_path):
    frames = Frames.of(16_000, 40)
    peaks = {}
    for rate in (16_000, 44_100, 8_000, 48_000):
        sound = resample(tone(1000, rate), rate, 16_000)
        assert abs(len(sound) - 3200) <= 2
        peaks[rate] = int(log_mel(sound, frames)[5].argmax())
    assert len(set(peaks.values())) == 1
    assert log_mel(tone(3000), frames)[5].argmax() > peaks[16_000] + 5


def test_frames_are_counted_and_bands_follow_the_mel_scale():
    frames = Frames.of(16_000, 40)
    assert (frames.window, frames.hop) == (400, 160)
    for samples, count in ((2, 1), (400, 1), (401, 2), (560, 2), (561, 3), (16_000, 99)):
        assert frames.count(samples) == count
        assert log_mel(np.zeros(samples, dtype=np.float32), frames).shape == (count, 40)
    bank = mel_bank(16_000, 257, 40)
    centres = bank.argmax(dim=1)
    assert (centres.diff() > 0).all() and (bank.sum(dim=1) > 0).all()
    # A frame twice as loud has four times the power in every band.
    quiet, loud = (
        log_mel(k * np.random.default_rng(0).standard_normal(4000).astype(np.float32), frames) for k in (1, 2)
    )
    torch.testing.assert_close(loud - quiet, torch.full_like(quiet, np.log(4)), atol=1e-3, rtol=0)


def test_vowels_have_their_formants():
    """The spectrum of a drawn vowel is louder around its first formant than an octave and a half above it."""
    rng = np.random.default_rng(0)
    for word, (first, second, _) in FORMANTS.items():
        if second < 3 * first:
            continue
        ratios = []
        for _ in range(12):
            power = np.abs(np.fft.rfft(draw_vowel(rng, word), 2048)) ** 2
            hertz = np.fft.rfftfreq(2048, 1 / VOWEL_RATE)
            low = power[(hertz > 0.8 * first) & (hertz < 1.45 * first)].mean()
            between = power[(hertz > 0.47 * second) & (hertz < 0.8 * second)].mean()
            ratios.append(low / between)
        assert np.median(ratios) > 3, word
    again = draw_vowel(np.random.default_rng(3), "had")
    assert np.array_equal(again, draw_vowel(np.random.default_rng(3), "had")) and np.abs(again).max() < 1.5


def test_vowels_are_split_labelled_and_standardised_by_training():
    data = TASK.load("vowels", seed=1, **SMALL)
    x, lengths, labels = data.train.tensors
    assert labels.bincount().tolist() == [3] * 10 and data.options == {"num_classes": 10, "channels": 32}
    mask = torch.arange(x.shape[1]) < lengths[:, None]
    torch.testing.assert_close(x[mask].mean(dim=0), torch.zeros(32), atol=1e-4, rtol=0)
    assert not x[~mask].any() and x.shape[1] == data.meta["length"]
    assert TASK.load("vowels", seed=2, **SMALL).fingerprint != data.fingerprint
    assert torch.equal(TASK.held_out("vowels", data.meta, seed=1, **SMALL).dataset.tensors[0], data.test.tensors[0])


def test_a_folder_is_cut_class_by_class_and_predicted_at_its_own_rate(tmp_path):
    root = folder_of_tones(tmp_path / "tones")
    data = TASK.load(root, mels=12)
    assert [len(part) for part in (data.train, data.val, data.test)] == [12, 2, 2]
    assert data.meta["classes"] == ["high", "low"] and data.meta["rate"] == 16_000
    torch.manual_seed(0)
    model = AudioClassifier(**data.options, dim=16, encoder_heads=2, hidden=4).eval()
    other = tmp_path / "slow.wav"
    wavfile.write(other, 22_050, tone(300, 22_050, 0.5))  # longer than any that was trained on
    out = tmp_path / "predictions.csv"
    text = TASK.predict(model, data.meta, [root / "low", other], out)
    rows = out.read_text().splitlines()
    assert rows[0] == "file,label,high,low" and len(rows) == 10 and f"wrote {out}" in text
    x, mask = TASK.example(other, data.meta)
    assert x.shape == (1, data.meta["length"], 12) and mask.all()
    with torch.no_grad():
        assert TASK.class_probabilities(model, data.meta, other) == pytest.approx(
            model(x, mask).softmax(-1)[0].tolist()
        )
        assert set(TASK.evaluate(model, data.test)) == {"accuracy", "cross_entropy"}
    assert TASK.picture(model, data) is not None
    held = TASK.held_out(root, data.meta)
    assert len(held.dataset) == 16 and "all of" in held.about
    assert len(TASK.held_out(root, data.meta, whole=False).dataset) == 2
    assert TASK.load(root, mels=12, seconds=0.05).meta["length"] < data.meta["length"]


def test_given_splits_are_honoured(tmp_path):
    for split, count in (("train", 4), ("test", 2)):
        folder_of_tones(tmp_path / split, count=count)
    data = TASK.load(tmp_path, mels=8)
    assert len(data.test) == 4 and len(data.train) + len(data.val) == 8


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda root: folder_of_tones(root, names=("alone",)), {}, "holds one class, 'alone'"),
        (lambda root: folder_of_tones(root, count=2), {}, "needs 3 or more"),
        (lambda root: root.mkdir(), {}, "no .wav file"),
        (lambda root: (folder_of_tones(root / "train"), folder_of_tones(root / "test", ("high", "x"))), {}, "alone"),
        (lambda root: wavfile.write(root, 8000, tone()), {}, "is a file: give a folder"),
        (lambda root: folder_of_tones(root), {"rate": 50}, "from 1,000 to 400,000 samples a second"),
        (lambda root: folder_of_tones(root), {"mels": 0}, "mels must be at least 1"),
        (lambda root: folder_of_tones(root), {"seconds": 0}, "seconds must be more than 0"),
    ],
)
def test_bad_folders_and_options_are_refused(tmp_path, make, options, message):
    root = tmp_path / "sounds"
    make(root)
    with pytest.raises(UserError, match=message) as caught:
        TASK.load(root, **options)
    assert "\n" not in str(caught.value)


def test_other_classes_and_options_of_vowels_are_refused(tmp_path):
    with pytest.raises(UserError, match="knows no class 'high'"):
        TASK.held_out(folder_of_tones(tmp_path / "a"), TASK.load("vowels", **SMALL).meta)
    with pytest.raises(UserError, match="vowels have 8,000 samples"):
        TASK.load("vowels", rate=16_000)
    with pytest.raises(UserError, match="no data at"):
        TASK.load("consonants")


def test_frames_by_convolution_are_those_by_fourier_transform():
    frames = Frames.of(8000, 12)
    for samples in (121, 200, 201, 280, 1357):
        sound = tone(700, 8000)[:samples] + 0.1 * np.random.default_rng(0).standard_normal(samples).astype(np.float32)
        torch.testing.assert_close(
            LogMel(frames)(torch.from_numpy(sound)[None])[0], log_mel(sound, frames), atol=2e-3, rtol=0
        )


def test_a_classifier_of_sounds_runs_outside_of_python_at_any_length(tmp_path):
    pytest.importorskip("onnxruntime")
    import onnxruntime

    from provenn.inference.onnx import portable_system

    data = TASK.load("vowels", mels=8, **SMALL)
    torch.manual_seed(0)
    model = AudioClassifier(**data.options, dim=16, layers=4, encoder_heads=2, hidden=4).eval()
    portable_system(model, TASK, data.meta, tmp_path / "a.onnx", {})
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx", providers=["CPUExecutionProvider"])
    for seconds in (0.016, 0.21, 1.0):  # the last is cut
        sound = tone(500, VOWEL_RATE, seconds)
        wavfile.write(tmp_path / "a.wav", VOWEL_RATE, sound)
        (probabilities,) = session.run(None, {"samples": sound[None]})
        assert probabilities[0] == pytest.approx(
            TASK.class_probabilities(model, data.meta, tmp_path / "a.wav"), abs=1e-4
        )


def test_a_folder_is_tested_on_and_those_beside_it_are_trained_on(tmp_path):
    for session in ("one", "two", "three"):
        folder_of_tones(tmp_path / session, count=3)
    classes, parts = TASK.files(tmp_path / "two", siblings=True)
    assert classes == ["high", "low"] and [len(part) for part in parts] == [10, 2, 6]
    assert {file.parent.parent.name for file, _ in parts[2]} == {"two"}
    assert {file.parent.parent.name for file, _ in (*parts[0], *parts[1])} == {"one", "three"}
    with pytest.raises(UserError, match="no folders beside it to train on"):
        TASK.load(folder_of_tones(tmp_path / "one" / "alone" / "a"), siblings=True)


def test_a_session_that_a_training_left_out_is_tested_whole_by_its_weights(tmp_path, monkeypatch):
    for session in ("one", "two", "three"):
        folder_of_tones(tmp_path / session, count=3)
    data = TASK.load(tmp_path / "two", siblings=True)
    trained_on = {"options": {"siblings": True}, "seed": 0, "fingerprint": data.fingerprint}
    label = weights.Label("gaam", "any", TASK.name, meta=data.meta, trained_on=trained_on)
    monkeypatch.setattr(Paper, "load", lambda *_, **__: (torch.nn.Identity(), label))
    monkeypatch.setattr(weights, "label_of", lambda _: label)
    monkeypatch.setattr(type(catalog.card("gaam")), "preset", lambda *_: None)
    monkeypatch.setattr(evaluation, "published_of", lambda *_: [])
    monkeypatch.setattr(evaluation, "evaluate", lambda model, kind, held_out, **_: held_out.dataset.tensors)
    with pytest.warns(UserWarning, match="as in the training: siblings=True"):
        tested = provenn.evaluate("gaam", tmp_path / "two", weights="run", device="cpu")
    assert all(torch.equal(*pair) for pair in zip(tested, data.test.tensors, strict=True))
