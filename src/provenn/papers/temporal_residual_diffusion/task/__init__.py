"""Video from events: the recording of an event camera in, frames out; or a video in, and events of it."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.utils.data import Dataset

from provenn.core import progress
from provenn.core.errors import UserError
from provenn.core.files import check_no_input, check_output
from provenn.core.narrowing import of_kind
from provenn.papers.temporal_residual_diffusion.model import Reconstructor
from provenn.papers.temporal_residual_diffusion.simulator import joined
from provenn.papers.temporal_residual_diffusion.task.clips import (
    SIDE,
    TEST,
    TRAIN,
    VALIDATE,
    WINDOWS,
    Clip,
    Clips,
    flights,
    spreads,
)
from provenn.papers.temporal_residual_diffusion.task.faces import answer, evaluated, picture_of
from provenn.papers.temporal_residual_diffusion.task.files import (
    ENDINGS,
    Reading,
    read_events,
    reading_of,
    write_events,
)
from provenn.papers.temporal_residual_diffusion.task.metrics import NAMES, by_percentile, compared
from provenn.papers.temporal_residual_diffusion.task.portable import one_step
from provenn.papers.temporal_residual_diffusion.task.rebuilding import grid_of, grids_of, rebuilt_frames, sampled_in
from provenn.papers.temporal_residual_diffusion.task.recordings import known_first, parts_of
from provenn.papers.temporal_residual_diffusion.task.sequences import READS, clips_of, simulated, sources_in
from provenn.papers.temporal_residual_diffusion.task.videos import (
    check_written,
    is_video,
    write_video,
)
from provenn.papers.temporal_residual_diffusion.voxels import BINS, without_hot_pixels
from provenn.tasks import Task, TaskData, count_examples, device_of, split_indices
from provenn.tasks.base import HeldOut, Portable, Scores, fingerprint

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLIPS = (240, 40, 60)  # to train on, to validate and to test
LONG = 40  # windows of a part of the user's videos, where they test

__all__ = ["TASK", "answer", "evaluated"]


class EventMeta(BaseModel):
    """Of event video: what its voxel grids are."""

    model_config = ConfigDict(extra="forbid")
    bins: int = Field(ge=1, le=100)
    bounds: bool = True  # whether times are counted from the window's bounds, or from its first and last event
    normalise: bool = False  # as E2VID's released weights want it
    size: int = Field(default=SIDE, ge=16, le=4096)


class EventVideo(Task):
    """Clips of frames and of the events between them; a model goes on from a first frame that is known."""

    name = "event-video"
    metric = "mse"
    higher_is_better = False
    meta_schema = EventMeta
    embedded = {  # noqa: RUF012
        "moving": "clips of 10 frames of a camera that moves over bundled pictures, with simulated events"
    }
    reads = READS

    def load(  # type: ignore[override]  # names its options
        self,
        source: str | Path,
        *,
        seed: int = 0,
        clips: int = CLIPS[0],
        windows: int = WINDOWS,
        size: int = SIDE,
        bounds: bool = True,
        normalise: bool = False,
        threshold: float = 0.2,
    ) -> TaskData:
        """Simulated clips, or those of the user's videos and sequences.

        Args:
            source: "moving", or a folder of videos, of folders of pictures, or of sequences of EVREAL; at least three.
            seed: of ways and cameras, or of the split, by video.
            clips: to train on, at most.
            windows: of a clip to train on.
            size: side of a clip to train on, in pixels; a place in each of the user's is drawn.
            bounds: count times from the bounds of a window; else from its first and last event, as E2VID does.
            normalise: grids whose cells that are not zero have mean 0 and standard deviation 1, as E2VID has them.
            threshold: C of the camera that is simulated of the user's videos.
        """
        if clips < 1 or windows < 1 or not 16 <= size <= 256:
            raise UserError(f"clips and windows are 1 or more, size 16 to 256; got {clips}, {windows} and {size}")
        if not 0.01 <= threshold <= 2:
            raise UserError(f"threshold lies between 0.01 and 2, got {threshold:g}")
        meta = self.default_meta({}) | {"bounds": bounds, "normalise": normalise, "size": size}
        grids = grids_of(meta)
        location = self._named(source)
        if isinstance(location, str):
            counts = (clips, *CLIPS[1:])
            parts = [
                flights(names, count, 3 * seed + number, windows, size, grids)
                for number, (names, count) in enumerate(zip((TRAIN, VALIDATE, TEST), counts, strict=True))
            ]
            about = (
                f"Clips of {windows + 1} frames of {size}×{size} pixels, a camera moving over bundled pictures: "
                f"{clips} over {len(TRAIN)} of them to train on, {counts[1]} over {len(VALIDATE)} others to validate "
                f"and {counts[2]} over {len(TEST)} others to test. Events are simulated, with thresholds from 0.15 to "
                "0.3 that differ by pixel, and noise. They are no recordings."
            )
            return assembled("moving", [Clips(part) for part in parts], meta, about)
        sources = sources_in(location)
        if len(sources) < 3:
            raise UserError(f"{location} holds {len(sources)} video(s); expected three: to train, validate and test")
        tenth = max(1, round(0.15 * len(sources)))
        order = split_indices(len(sources), (1.0,), seed)[0]
        groups = order[2 * tenth :], order[:tenth], order[tenth : 2 * tenth]
        camera = Reading(threshold=threshold).camera()
        rng = np.random.default_rng(seed)
        train: list[Clip] = []
        for index in progress.track(sorted(groups[0]), "reading videos"):
            read = clips_of(sources[index], windows, camera, seed, grids=grids)
            train += [cropped(clip, size, rng) for clip in read]
        whole = [clip for clip in train if len(clip.voxels) == windows and min(clip.frames.shape[-2:]) == size]
        if not whole:
            raise UserError(
                f"{location}: no video to train on has {windows + 1} frames of {size}×{size} pixels; take smaller "
                "windows= or size="
            )
        chosen = [whole[i] for i in sorted(rng.permutation(len(whole))[:clips])]
        rest = [
            [part for i in sorted(group) for part in clips_of(sources[i], LONG, camera, seed, grids=grids)]
            for group in groups[1:]
        ]
        about = (
            f"{len(sources)} videos of {location.name}: {len(chosen)} clips of {len(groups[0])} to train on, "
            f"{len(groups[1])} whole to validate and {len(groups[2])} whole to test, split by seed {seed}, in parts of "
            f"at most {LONG} windows. Events of videos are simulated, with a threshold of {threshold:g}."
        )
        return assembled(str(location), [Clips(chosen), Clips(rest[0]), Clips(rest[1])], meta, about)

    def loss(self, model: nn.Module, batch: Sequence[Tensor]) -> Float[Tensor, ""]:
        """The model's own."""
        return of_kind(model, Reconstructor, "the model").training_loss(batch)

    def scores(self, model: nn.Module, dataset: Dataset, batch_size: int = 256) -> Scores:
        """Of each clip the figures of `metrics.compared`, and the error of each frame, from its true first one on."""
        percentile = of_kind(dataset, Clips, "the data").percentile
        rows: list[dict[str, float]] = []
        by_frame: list[np.ndarray] = []
        for _, truth, told in reconstructed(model, dataset, min(batch_size, 30)):
            told = by_percentile(told) if percentile else told
            rows.append(compared(told, truth))
            by_frame.append((told - truth).double().square().mean((1, 2, 3)).numpy())
        longest = max(map(len, by_frame))
        filled = [np.pad(x, (0, longest - len(x)), constant_values=np.nan) for x in by_frame]
        return {name: np.array([row[name] for row in rows]) for name in NAMES} | {"by_frame": np.stack(filled)}

    def summary(self, scores: Scores) -> dict[str, float]:
        """Means over clips, of those that have a value."""
        return {
            name: float(np.nanmean(scores[name])) if np.isfinite(scores[name]).any() else float("nan") for name in NAMES
        }

    def dummy_baseline(self, data: TaskData) -> float:
        """The error of holding the first frame."""
        values = []
        for index in range(count_examples(data.test)):
            frames = data.test[index][1]
            values.append(float((frames[1:] - frames[:1]).double().square().mean()))
        return float(np.mean(values))

    def held_out(  # type: ignore[override]  # names its options
        self,
        source: str | Path,
        meta: dict[str, Any],
        *,
        seed: int = 0,
        whole: bool = True,
        percentile: bool = False,
        cut: bool = False,
        threshold: float = 0.2,
    ) -> HeldOut:
        """As in `Task`.

        Args:
            source, meta, seed, whole: as there.
            percentile: stretch each frame from its percentiles 1 and 99 to 0…1 before it is compared, as EVREAL does
                with E2VID's.
            cut: of the sequences of ECD and MVSEC take the seconds that EVREAL takes.
            threshold: C of the camera that is simulated of videos.
        """
        location = self._named(source)
        if isinstance(location, str) or not whole:
            kept = {name: meta[name] for name in ("bounds", "normalise", "size")}
            test = self.load(source, seed=seed, clips=1, threshold=threshold, **kept).test  # which is of any count
            clips, about = of_kind(test, Clips, "the data").clips, f"the test split of {source}"
        else:
            camera = Reading(threshold=threshold).camera()
            grids = grids_of(meta)
            clips = [part for each in sources_in(location) for part in clips_of(each, LONG, camera, seed, cut, grids)]
            if not clips:
                raise UserError(f"{location}: no two frames are left of it to compare")
            about = f"all of {location}, in parts of at most {LONG} windows"
        about += ", frames stretched from percentiles 1 and 99" if percentile else ""
        return HeldOut(Clips(clips, percentile), f"{about}; each begins with its true first frame")

    def default_meta(self, options: dict[str, Any]) -> dict[str, Any]:
        return {"bins": BINS, "bounds": True, "normalise": False, "size": SIDE}

    def example(self, file: Path, meta: dict[str, Any]) -> Float[Tensor, "1 bins height width"]:
        """The grid of the fullest window of 33 ms."""
        events = without_hot_pixels(read_events(file))[0]
        fullest = max(parts_of(events, "33ms"), key=lambda part: len(part[2].t))
        return grid_of(fullest, meta)

    def predict(
        self,
        model: nn.Module,
        meta: dict[str, Any],
        inputs: Sequence[Path],
        output: Path | None,
        *,
        window: str = "33ms",
        first: Path | None = None,
        events: str | None = None,
        paired: bool = False,
    ) -> str:
        """Frames of a recording; or, of a video, events, or the frames that are rebuilt from them.

        Args:
            model, meta, inputs, output: as in `Task.predict`. Frames go to .mp4, .avi, .mkv, .mov, .webm, .gif, .npy,
                to a strip as .png, or to a folder. Of a video .txt, .zip, .npy, .npz and .h5 take events.
            window: "33ms" or "0.05s", so many events, "0.35/pixel", or a file with the time stamps of frames.
            first: the frame before the first event; its size is the sensor's.
            events: how they are read or simulated and frames sampled, see `files.reading_of`.
            paired: draw the events beside each frame.
        """
        if len(inputs) != 1:
            raise UserError(f"event-video takes one recording or one video, got {len(inputs)}")
        if output is None:
            raise UserError("frames need a path: give .mp4, .gif, .npy, .png or a folder with -o")
        reading, file = reading_of(events), inputs[0]
        check_output(output, folder=True)
        check_no_input(output, [str(file)])
        lines = []
        of_video = is_video(file)
        to_events = of_video and output.suffix.lower() in ENDINGS
        idle = reading.idle(simulated=of_video, sampled=not to_events)
        if to_events:
            given = {"--window": window != "33ms", "--first": first is not None, "--paired": paired}
            idle += [name for name, there in given.items() if there]
        if idle:
            progress.say(f"{', '.join(idle)}: not used for {'events' if to_events else 'frames'} of {file}")
        if of_video:
            pieces = simulated(file, reading.camera())
            start: Tensor | None = torch.from_numpy(next(pieces)[1]).float()[None, None]
            parts = [part for _, _, part in pieces if part is not None]
            if not parts:
                raise UserError(f"{file} has one frame; events come of two or more")
            told = joined(parts)
            lines.append(f"{file}: {len(told.t):,} events were simulated of it")
            if to_events:
                write_events(output, told)
                return f"{lines[0]}, threshold {reading.threshold:g}, {reading.sensor}\nwrote {output}"
        else:
            told, start = read_events(file, reading), None
            if reading.hot:
                told, hot = without_hot_pixels(told, reading.hot)
                if not len(told.t):
                    raise UserError(f"{file}: all {hot} pixels with events are hot by hot={reading.hot:g}; take more")
                lines += [f"{hot} hot pixel(s) were left out; --events hot=0 keeps them"] if hot else []
        start = start if first is None else known_first(first, told.size)
        check_written(output, told.size)
        cut = list(parts_of(told, window))
        times = [end for _, end, _ in cut]
        began = time.perf_counter()
        network = of_kind(model, Reconstructor, "the model")
        with sampled_in(network, reading.steps):
            write_video(output, rebuilt_frames(network, meta, cut, start, reading.seed, paired), times)
        seconds = time.perf_counter() - began
        wide, high = told.size[1], told.size[0]
        if start is None:
            lines.append("the first frame is not known: what does not move stays grey; --first gives it")
        lines.append(
            f"{len(told.t):,} events of {wide}×{high} pixels in {times[-1] - cut[0][0]:.2f} s, {len(cut)} frames, "
            f"{len(cut) / max(seconds, 1e-9):.1f} a second"
        )
        return "\n".join([*lines, f"wrote {output}"])

    def portable(self, model: nn.Module, meta: dict[str, Any]) -> Portable:
        """One window: grid, last frame, noise and states to the next frame and states, at the size of the training."""
        return one_step(of_kind(model, Reconstructor, "the model"), meta)

    def picture(self, model: nn.Module, data: TaskData) -> "Figure | None":
        """A test clip: events, truth, frames."""
        _, truth, told = next(reconstructed(model, data.test, 1))
        return picture_of(data.test[0][0], truth, told)


TASK = EventVideo()


def assembled(name: str, parts: Sequence[Clips], meta: dict[str, Any], about: str) -> TaskData:
    """Splits as the task's data, with the spreads of residuals and frames that a system is scaled by."""
    motion, contrast = spreads(parts[0].clips)
    every = (tensor for part in parts for clip in part.clips for tensor in (clip.voxels, clip.frames))
    return TaskData(
        name=name,
        train=parts[0],
        val=parts[1],
        test=parts[2],
        fingerprint=fingerprint(*every),
        options={"motion": round(max(motion, 1e-3), 4), "contrast": round(max(contrast, 1e-3), 4)},
        meta=meta,
        about=about,
    )


def cropped(clip: Clip, size: int, rng: np.random.Generator) -> Clip:
    """A square of a clip, where the rng says; smaller ones as they are."""
    top, left = (int(rng.integers(max(1, length - size + 1))) for length in clip.frames.shape[-2:])
    return Clip(*(part[..., top : top + size, left : left + size].contiguous() for part in clip))


def reconstructed(model: nn.Module, dataset: Dataset, batch_size: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Of each clip its number, the true frames after the first, and the model's, each from its own last one."""
    network, device = of_kind(model, Reconstructor, "the model"), device_of(model)
    waiting: list[int] = []
    count = count_examples(dataset)
    for index in range(count):
        waiting.append(index)
        following = dataset[index + 1][0].shape if index + 1 < count else None
        if len(waiting) < batch_size and following == dataset[index][0].shape:
            continue
        clips = [dataset[i] for i in waiting]
        batch = [torch.stack([clip[i] for clip in clips]).to(device) for i in range(3)]
        told = network.rebuilt(batch, seeds=waiting)
        for row, number in enumerate(waiting):
            yield number, batch[1][row, 1:].cpu(), told[row].cpu()
        waiting = []
