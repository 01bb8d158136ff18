"""Sound: WAV files of the user's, log-mel frames of them, and vowels that are synthesised."""

import warnings
from dataclasses import dataclass
from functools import cache
from math import gcd
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn

from provenn.core.errors import UserError
from provenn.core.inputs import check_file

SUFFIXES = (".wav", ".wave")
UNREAD = (".mp3", ".flac", ".ogg", ".m4a", ".aac", ".opus", ".wma", ".aif", ".aiff")
RATES = (1000, 400_000)  # samples a second that sound is recorded with
QUIETEST = 1e-6  # power of a band, below which silence is silence

# The mean formants of 33 men, in hertz (Peterson and Barney, 1952), by the word they were read in.
FORMANTS = {
    "heed": (270, 2290, 3010),
    "hid": (390, 1990, 2550),
    "head": (530, 1840, 2480),
    "had": (660, 1720, 2410),
    "hod": (730, 1090, 2440),
    "hawed": (570, 840, 2410),
    "hood": (440, 1020, 2240),
    "whod": (300, 870, 2240),
    "hud": (640, 1190, 2390),
    "heard": (490, 1350, 1690),
}
BANDWIDTHS = (60.0, 90.0, 150.0)  # of the formants, in hertz
SHORTER = (1.0, 1.25)  # how much shorter a speaker's vocal tract is than the men's, which raises all formants alike
SCATTER = 0.06  # standard deviation of a formant's logarithm from one vowel to the next
VOWEL_RATE = 8000


@dataclass(frozen=True)
class Frames:
    """How sound becomes frames.

    Args:
        rate: samples a second; other rates are resampled to it.
        mels: bands of a frame.
        window, hop: samples that a frame looks at, and from one frame to the next.
    """

    rate: int
    mels: int
    window: int
    hop: int

    @classmethod
    def of(cls, rate: int, mels: int) -> "Frames":
        """Frames of 25 ms every 10 ms, as is usual for speech."""
        return cls(rate, mels, window=round(0.025 * rate), hop=round(0.01 * rate))

    @property
    def spectrum(self) -> int:
        """Samples that a Fourier transform sees: a power of two, and at least four bins a band of mel."""
        return 1 << (max(self.window, 8 * self.mels) - 1).bit_length()

    def count(self, samples: int) -> int:
        """Frames of so many samples: at least one, the last filled up with silence."""
        return 1 + max(0, samples - self.window + self.hop - 1) // self.hop


def sounds_in(folder: Path) -> list[Path]:
    """The WAV files of a folder and its subfolders, by name.

    Raises:
        UserError: there are none.
    """
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    sounds = [file for file in files if file.suffix.lower() in SUFFIXES]
    if not sounds:
        other = next((file for file in files if file.suffix.lower() in UNREAD), None)
        hint = f"; {other.name} is no WAV file: convert it" if other is not None else ""
        raise UserError(f"{folder} holds no .wav file{hint}")
    return sounds


def read_sound(file: Path) -> tuple[Float32[np.ndarray, " samples"], int]:
    """The samples of a WAV file from −1 to 1, channels averaged, and its rate.

    Integers of 8, 16, 24 and 32 bits are read, and floats; anything else is refused.

    Raises:
        UserError: no such file, no WAV, one cut short, without a sample to speak of, or with values that are no
            numbers.
    """
    from scipy.io import wavfile

    if not file.is_file():
        raise UserError(f"no sound at {str(file)!r}: expected a WAV file")
    if file.suffix.lower() not in SUFFIXES:
        raise UserError(f"{file}: cannot read sound from {file.suffix or 'a file without suffix'}; expected .wav")
    check_file(file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # chunks of tags that are skipped
            warnings.filterwarnings("error", message="Reached EOF prematurely")
            rate, samples = wavfile.read(file)
    except wavfile.WavFileWarning as error:
        raise UserError(f"{file} is cut short: {' '.join(str(error).split())}") from None
    except Exception as error:  # scipy raises whatever a broken header leads to
        why = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(f"{file} cannot be read as a WAV file: {why}") from None
    if not RATES[0] <= rate <= RATES[1]:
        raise UserError(f"{file} says that it has {rate:,} samples a second: expected {RATES[0]:,} to {RATES[1]:,}")
    if samples.shape[0] < 2:
        count = samples.shape[0]
        raise UserError(f"{file} has {count} sample{'s' * (count != 1)}: too few to hear anything")
    if samples.dtype == np.uint8:
        samples = (samples.astype(np.float32) - 128) / 128
    elif np.issubdtype(samples.dtype, np.integer):
        # 24 bits come as the upper three bytes of 32.
        samples = samples.astype(np.float64) / float(2 ** (8 * samples.dtype.itemsize - 1))
    samples = samples.astype(np.float32)
    if samples.ndim == 2:
        samples = samples.mean(axis=1)
    if not np.isfinite(samples).all():
        raise UserError(f"{file} has samples that are no finite numbers")
    return samples, int(rate)


def resample(samples: Float32[np.ndarray, " samples"], old: int, new: int) -> Float32[np.ndarray, " others"]:
    """At another rate, by a polyphase filter that leaves out what the new rate cannot hold."""
    if old == new:
        return samples
    from scipy.signal import resample_poly

    shared = gcd(old, new)
    return resample_poly(samples, new // shared, old // shared).astype(np.float32)


@cache
def mel_bank(rate: int, bins: int, mels: int) -> Float[Tensor, "mels bins"]:
    """Triangles over the bins of a spectrum, their corners evenly apart in mel = 2595 log10(1 + f / 700)."""
    mel = 2595 * np.log10(1 + rate / 2 / 700)
    corners = 700 * (10 ** (np.linspace(0, mel, mels + 2) / 2595) - 1)
    frequencies = np.linspace(0, rate / 2, bins)
    low, middle, high = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    bank = np.minimum((frequencies - low) / (middle - low), (high - frequencies) / (high - middle)).clip(min=0)
    return torch.from_numpy(bank.astype(np.float32))


def log_mel(samples: Float32[np.ndarray, " samples"], frames: Frames) -> Float[Tensor, "tokens mels"]:
    """The logarithm of the power in each band of each frame.

    Each frame is a Hann window; with four bins of the spectrum for each band no triangle is empty.
    """
    x = torch.from_numpy(samples)
    count = frames.count(len(samples))
    x = torch.nn.functional.pad(x, (0, (count - 1) * frames.hop + frames.window - len(x)))
    size = frames.spectrum
    windows = x.unfold(0, frames.window, frames.hop) * torch.hann_window(frames.window)
    power = torch.fft.rfft(windows, n=size).abs().square() / frames.window
    return (power @ mel_bank(frames.rate, size // 2 + 1, frames.mels).T).clamp(min=QUIETEST).log()


class LogMel(nn.Module):
    """`log_mel` of sounds of one length, its Fourier transform as a convolution: ONNX has that in every runtime.

    Shapes: samples (sounds, length), at least a window less a hop and one, to (sounds, frames, mels).
    """

    waves: Tensor
    bank: Tensor

    def __init__(self, frames: Frames):
        super().__init__()
        self.frames = frames
        size = frames.spectrum
        angles = 2 * torch.pi / size * torch.outer(torch.arange(size // 2 + 1), torch.arange(frames.window)).double()
        waves = torch.cat([angles.cos(), -angles.sin()]) * torch.hann_window(frames.window, dtype=torch.float64)
        self.register_buffer("waves", waves[:, None].float())
        self.register_buffer("bank", mel_bank(frames.rate, size // 2 + 1, frames.mels).T)

    def forward(self, samples: Float[Tensor, "sounds length"]) -> Float[Tensor, "sounds frames mels"]:
        # The last window is filled up with silence.
        x = nn.functional.pad(samples[:, None], (0, self.frames.hop - 1))
        parts = nn.functional.conv1d(x, self.waves, stride=self.frames.hop)
        real, imaginary = parts.chunk(2, dim=1)
        power = (real.square() + imaginary.square()) / self.frames.window
        return (power.mT @ self.bank).clamp(min=QUIETEST).log()


def draw_vowel(rng: np.random.Generator, word: str) -> Float32[np.ndarray, " samples"]:
    """A vowel: glottal pulses through three resonators at its formants, with breath and noise, 8,000 samples a second.

    The speaker's vocal tract is drawn: it scales all formants alike, by 1 to 1.25. How this vowel came out is drawn
    too: each formant moves by 6 %, so that neighbours overlap. So are pitch from 90 to 250 Hz and its slow change,
    loudness, 0.15 to 0.4 seconds of length, silence before and after, and noise 5 to 30 dB below. Formants stand still:
    there are no consonants, no habits of a speaker and no room.
    """
    from scipy.signal import lfilter

    length = int(rng.uniform(0.15, 0.4) * VOWEL_RATE)
    time = np.arange(length) / VOWEL_RATE
    pitch = rng.uniform(90, 250) * (1 + rng.uniform(-0.15, 0.15) * np.linspace(-1, 1, length))
    phase = np.cumsum(pitch * (1 + 0.01 * rng.standard_normal(length))) / VOWEL_RATE
    pulses = np.diff(np.floor(phase), prepend=0.0)
    # −12 dB an octave of the glottis, and +6 of the lips: one pole.
    source = lfilter([1.0], [1.0, -0.9], pulses) + 0.002 * rng.standard_normal(length)
    tract = rng.uniform(*SHORTER)
    sound = source
    for formant, bandwidth in zip(FORMANTS[word], BANDWIDTHS, strict=True):
        radius = np.exp(-np.pi * bandwidth / VOWEL_RATE)
        came_out = formant * tract * np.exp(SCATTER * rng.standard_normal())
        angle = 2 * np.pi * min(came_out, 0.48 * VOWEL_RATE) / VOWEL_RATE
        poles = [1.0, -2 * radius * np.cos(angle), radius**2]
        sound = lfilter([sum(poles)], poles, sound)
    edge = 0.02
    sound = sound * np.minimum(1, np.minimum(time, time[::-1]) / edge)
    sound = sound / np.abs(sound).max() * rng.uniform(0.1, 0.9)
    silence = (rng.uniform(0, 0.08, 2) * VOWEL_RATE).astype(int)
    sound = np.concatenate([np.zeros(silence[0]), sound, np.zeros(silence[1])])
    noise = np.sqrt(np.mean(sound**2)) * 10 ** (-rng.uniform(5, 30) / 20)
    return (sound + noise * rng.standard_normal(len(sound))).astype(np.float32)
