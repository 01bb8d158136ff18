"""Embeddings of a folder of pictures, kept in a file that later searches read."""

from pathlib import Path
from typing import TYPE_CHECKING

from provenn.core.errors import UserError
from provenn.core.settings import LARGEST
from provenn.inference.paper import paper

if TYPE_CHECKING:
    from provenn.tasks.stores import Store


def embed(
    slug: str,
    folder: str | Path,
    *,
    output: str | Path | None = None,
    weights: str | Path | None = None,
    preset: str | None = None,
    device: str = "auto",
    batch_size: int = 64,
) -> "Store":
    """The embedding of every picture of a folder, with the checksum of the network that made them.

    A prediction takes the file by its option `store`, and refuses it where the network is another one.

    Args:
        slug: the paper.
        folder: searched whole.
        output: a .npz, or with pyarrow (extra tables) a .parquet.
        weights: a weight file, ours or the authors', or the folder of a run; by default what ships with the package.
        preset: whose weights, where those of several ship; or of an author's file that does not name it.
        device: auto, cpu, cuda, mps or a torch device.
        batch_size: pictures at a time.

    Raises:
        UserError: weights of a task without embeddings, or a folder without pictures.
    """
    from provenn.core.device import choose_device
    from provenn.core.files import check_output
    from provenn.core.finite import finite_outputs
    from provenn.inference.predict import source_of
    from provenn.tasks import get_task
    from provenn.tasks.stores import Embeds, check_ending

    if not 1 <= batch_size <= LARGEST:
        raise UserError(f"batch size must be from 1 to {LARGEST}, got {batch_size}")
    path = None if output is None else Path(output)
    if path is not None:
        check_ending(path)
        check_output(path)
    chosen = paper(slug)
    model, label = chosen.load(weights, preset=preset)
    kind = get_task(label.task)
    if not isinstance(kind, Embeds):
        raise UserError(f"{label.task} gives no embeddings that are compared: `provenn.predict` says what it gives")
    with finite_outputs(model, source_of(chosen, label, weights), str(folder)):
        store = kind.embed(model.to(choose_device(device)), label.meta, Path(folder), batch_size=batch_size)
    if path is not None:
        store.save(path)
    return store
