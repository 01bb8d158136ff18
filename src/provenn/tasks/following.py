"""Following a user over time: which crop of each frame of a camera shows them, as a table and as a picture."""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from provenn.core import progress
from provenn.core.files import atomic_write
from provenn.data.camera_sequences import Frame
from provenn.data.tables import write_table
from provenn.nn.following import Sighted, follow

if TYPE_CHECKING:
    from PIL.Image import Image

Embed = Callable[[list[UInt8[Tensor, "3 height width"]]], Float[Tensor, "crops dim"]]
TOGETHER = 64  # crops that are embedded at a time
SHOWN = 24  # frames on a picture
CELL, SPACE, EDGE, LINE = 128, 4, 3, 14  # height of a crop, between two, of a frame around it, and of text, in pixels
FOUND, LOST = "#2a8f3c", "#b00020"
COLUMNS = ["frame", "rank", "crop", "similarity", "user"]
THRESHOLD, MOMENTUM = 0.5, 0.9


def follow_frames(
    embed: Embed,
    user: Float[Tensor, "pictures dim"],
    frames: Sequence[Frame],
    *,
    threshold: float | int = THRESHOLD,
    momentum: float | int = MOMENTUM,
) -> list[Sighted]:
    """What `provenn.nn.following.follow` sees in each frame; crops of several frames are embedded together.

    Args:
        embed: embeds crops.
        user: embeddings of pictures that show whom to follow.
        frames: in their order.
        threshold, momentum: as of `follow`.
    """
    return list(follow(user, _embedded(embed, frames, user.shape[1]), threshold=threshold, momentum=momentum))


def _embedded(embed: Embed, frames: Sequence[Frame], dim: int) -> Iterator[Float[Tensor, "crops dim"]]:
    waiting: list[Frame] = []
    with progress.bar("following", len(frames)) as advance:
        for index, frame in enumerate(frames):
            waiting.append(frame)
            crops = [crop for part in waiting for crop in part.crops]
            if len(crops) >= TOGETHER or index == len(frames) - 1:
                embeddings = embed([crop.pixels() for crop in crops]) if crops else torch.zeros(0, dim)
                yield from embeddings.split([len(part.crops) for part in waiting])
                advance(len(waiting))
                waiting = []


def in_words(frames: Sequence[Frame], seen: Sequence[Sighted]) -> str:
    """In how many frames the user was found, and where they were lost for longest."""
    found = [sighted.crop is not None for sighted in seen]
    said = f"found in {sum(found)} of {len(found)} frames"
    runs = [[index for index, _ in run] for there, run in groupby(enumerate(found), lambda pair: pair[1]) if not there]
    if not runs:
        return said
    longest = max(runs, key=len)
    return f"{said}; lost for longest from {frames[longest[0]].name} to {frames[longest[-1]].name}"


def write_following(file: Path, frames: Sequence[Frame], seen: Sequence[Sighted]) -> None:
    """A row for each crop, the most alike of a frame first; a frame without crops has one row."""
    rows: list[tuple[str, str, str, str, str]] = []
    for frame, sighted in zip(frames, seen, strict=True):
        rows += [
            (frame.name, str(rank), frame.crops[crop].in_words(), f"{value:.6f}", str(int(crop == sighted.crop)))
            for rank, (crop, value) in enumerate(zip(sighted.ranking, sighted.similarities, strict=True), 1)
        ] or [(frame.name, "", "", "", "0")]
    write_table(file, COLUMNS, rows)


def draw_following(file: Path, user: Path, frames: Sequence[Frame], seen: Sequence[Sighted]) -> int:
    """The user, and of frames in even steps the best crop: framed green where it is the user, red where it is not.

    Returns: How many frames are drawn.
    """
    from PIL import Image

    from provenn.tasks.demos import as_shown

    chosen = torch.linspace(0, len(frames) - 1, min(SHOWN, len(frames))).round().long().tolist()
    cells = [_cell(as_shown(user).convert("RGB"), "user", "black")]
    for index in chosen:
        frame, sighted = frames[index], seen[index]
        if not sighted.ranking:
            cells.append(_cell(Image.new("RGB", (CELL // 2, CELL), "#dddddd"), frame.name, LOST))
            continue
        pixels = frame.crops[sighted.ranking[0]].pixels()
        image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        cells.append(
            _cell(image, f"{frame.name} {sighted.similarity:.2f}", FOUND if sighted.crop is not None else LOST)
        )
    sheet = Image.new("RGB", (sum(cell.width + SPACE for cell in cells), CELL + LINE + 2 * EDGE), "white")
    left = 0
    for cell in cells:
        sheet.paste(cell, (left, 0))
        left += cell.width + SPACE
    with atomic_write(file) as temporary:
        sheet.save(temporary)
    return len(chosen)


def _cell(image: "Image", text: str, colour: str) -> "Image":
    from PIL import Image, ImageDraw

    wide = min(max(1, round(image.width * CELL / image.height)), 4 * CELL)
    cell = Image.new("RGB", (max(wide + 2 * EDGE, 7 * len(text)), CELL + LINE + 2 * EDGE), "white")
    cell.paste(Image.new("RGB", (wide + 2 * EDGE, CELL + 2 * EDGE), colour))
    cell.paste(image.resize((wide, CELL)), (EDGE, EDGE))
    ImageDraw.Draw(cell).text((1, CELL + 2 * EDGE), text, fill="black")
    return cell
