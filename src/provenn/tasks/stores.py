"""Embeddings of pictures in a file, with a checksum of the network that made them: embed once, search often."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from provenn.core.errors import UserError
from provenn.core.files import atomic_write
from provenn.core.inputs import check_file

ENDINGS = (".npz", ".parquet")
KEYS = ("checksum", "folder", "files", "embeddings")
ABOUT = b"provenn"  # the key of what a parquet file says of itself


@dataclass(frozen=True)
class Store:
    """Embeddings of the pictures of a folder.

    Args:
        checksum: of the network and of how it sees pictures; see `checksum_of`.
        folder: where the pictures lay.
        files: their paths below it, an embedding each.
        embeddings: of length 1.
    """

    checksum: str
    folder: Path
    files: list[str]
    embeddings: Float[Tensor, "pictures dim"]

    def save(self, file: Path) -> None:
        """Write an .npz, or with pyarrow (extra tables) a .parquet with the columns `file` and `embedding`.

        Raises:
            UserError: another ending, or pyarrow is missing.
        """
        check_ending(file)
        with atomic_write(file) as temporary:
            if file.suffix.lower() == ".npz":
                with temporary.open("wb") as handle:  # given a name, NumPy would add an ending
                    np.savez(
                        handle,
                        checksum=np.array(self.checksum),
                        folder=np.array(str(self.folder)),
                        files=np.array(self.files, dtype=np.str_),
                        embeddings=self.embeddings.numpy(),
                    )
            else:
                _write_parquet(temporary, self)

    def check(self, checksum: str, source: str) -> None:
        """Refuse embeddings of another network: their cosines with this one's mean nothing.

        Raises:
            UserError: it is another one.
        """
        if checksum != self.checksum:
            raise UserError(
                f"{source} holds embeddings of another network, or of pictures at another size (checksum "
                f"{self.checksum}, here {checksum}): delete it, or give another file to embed them anew"
            )


@runtime_checkable
class Embeds(Protocol):
    """A task whose systems make embeddings to be compared."""

    def embed(self, model: nn.Module, meta: dict[str, Any], folder: Path, *, batch_size: int = 64) -> Store: ...


def checksum_of(model: nn.Module, meta: dict[str, Any]) -> str:
    """Sixteen hexadecimal digits that depend on every weight, and on what is done to a picture before the network."""
    digest = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        digest.update(values.view(-1).view(torch.uint8).numpy().tobytes() if values.numel() else b"")
    return digest.hexdigest()[:16]


def read_store(file: Path) -> Store:
    """Embeddings that `Store.save` wrote.

    Raises:
        UserError: another ending, a damaged file, or one that holds something else.
    """
    check_ending(file)
    check_file(file)
    try:
        store = _read_npz(file) if file.suffix.lower() == ".npz" else _read_parquet(file)
    except UserError:
        raise
    except Exception as error:  # NumPy, zipfile and pyarrow have many, for files that are no archives of theirs
        raise UserError(f"{file} holds no embeddings: {' '.join(str(error).split())[:200]}") from None
    lengths = store.embeddings.norm(dim=1)
    if len(lengths) != len(store.files) or not len(lengths):
        raise UserError(f"{file} is damaged: {len(store.files)} names beside {len(lengths)} embeddings")
    if not torch.allclose(lengths, torch.ones(()), atol=1e-3):
        raise UserError(f"{file} is damaged: embeddings have the length 1, and these do not")
    return store


def check_ending(file: Path) -> None:
    """Can embeddings be kept in a file of this name?

    Raises:
        UserError: it has another ending.
    """
    if file.suffix.lower() not in ENDINGS:
        raise UserError(f"embeddings are kept in {' or '.join(ENDINGS)}, got {file.name}")


def _read_npz(file: Path) -> Store:
    with np.load(file, allow_pickle=False) as content:
        if missing := [key for key in KEYS if key not in content]:
            raise UserError(f"{file} holds no embeddings: it lacks {', '.join(missing)}")
        checksum, folder = (str(content[key]) for key in ("checksum", "folder"))
        embeddings = torch.from_numpy(content["embeddings"]).float()
        if embeddings.ndim != 2:
            raise UserError(f"{file} is damaged: its embeddings have the shape {tuple(embeddings.shape)}")
        return Store(checksum, Path(folder), [str(name) for name in content["files"]], embeddings)


def _write_parquet(file: Path, store: Store) -> None:
    arrow, parquet = _pyarrow()
    values = store.embeddings.numpy()
    column = arrow.FixedSizeListArray.from_arrays(arrow.array(values.ravel()), values.shape[1])
    about = json.dumps({"checksum": store.checksum, "folder": str(store.folder)})
    table = arrow.table({"file": arrow.array(store.files), "embedding": column})
    parquet.write_table(table.replace_schema_metadata({ABOUT: about}), file)


def _read_parquet(file: Path) -> Store:
    _, parquet = _pyarrow()
    table = parquet.read_table(file)
    about = json.loads((table.schema.metadata or {}).get(ABOUT, b"{}"))
    if not {"checksum", "folder"} <= about.keys() or not {"file", "embedding"} <= set(table.column_names):
        raise UserError(f"{file} holds no embeddings that provenn wrote")
    column = table["embedding"].combine_chunks()
    values = torch.from_numpy(column.flatten().to_numpy(zero_copy_only=False).copy()).float()
    return Store(about["checksum"], Path(about["folder"]), table["file"].to_pylist(), values.reshape(len(table), -1))


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(".parquet needs pyarrow: pip install 'provenn[tables]', or give a .npz") from None
    return pyarrow, pyarrow.parquet


def same_files(store: Store, names: Sequence[str], source: str) -> None:
    """Refuse a store whose pictures are not those of the folder.

    Raises:
        UserError: some were added or are gone.
    """
    added, gone = (len(set(one) - set(other)) for one, other in ((names, store.files), (store.files, names)))
    if added or gone:
        raise UserError(
            f"{source} is of {len(store.files)} pictures; the folder has {added} that it lacks, and {gone} are gone: "
            "delete it to embed them anew, or leave the folder out to search among what it holds"
        )
