"""The verb that makes a model smaller: prune."""

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from provenn.cli.app import Json, app
from provenn.cli.work import pairs
from provenn.core import progress
from provenn.core.errors import UserError


def _methods(incomplete: str) -> list[tuple[str, str]]:
    from provenn.inference.prune import methods

    return [(name, way.summary) for name, (_, way) in methods().items() if name.startswith(incomplete)]


@app.command()
def prune(
    model: Annotated[
        str,
        typer.Argument(
            help="The model: a paper or a preset whose weights ship, a weight file, the folder of a run, or a folder "
            "that transformers wrote, such as a Swin, ViT or ConvNeXt."
        ),
    ],
    method: Annotated[
        str, typer.Option(help="The method: one that a paper of the catalogue offers.", autocompletion=_methods)
    ],
    ratio: Annotated[
        str,
        typer.Option(
            metavar="SHARE|GROUP=SHARE,…",
            help="Share of the weights to remove, such as 0.35, or one for each group of layers, such as "
            "qkv=0.2,mlp=0.5. A group that is not named loses nothing.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="New folder to write the pruned model to.")],
    preset: Annotated[
        str | None,
        typer.Option(
            "--preset", "--arch", help="The preset that an authors' weight file holds. Ours say it themselves."
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="An option of the method, such as grouping=layer. Repeatable."),
    ] = None,
    packed: Annotated[
        str | None,
        typer.Option(help="Also write the model without its zeros: mask (a bit for each weight) or csr (columns)."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Remove weights from a model, and write what is left, masks, a report and a picture.

    Zeros make no model faster by themselves. Tune what is left by `provenn train --weights OUT`, which keeps the zeros.

    \b
    provenn prune swin_digits --method dimap --ratio 0.35 -o pruned
    provenn prune models/swin --method dimap --ratio qkv=0.2,proj=0.2,mlp=0.5 -o pruned
    """
    import provenn
    from provenn.cli import console
    from provenn.inference.prune import REPORT

    shares = parse_ratio(ratio)
    with progress.shown():
        folder, summary = provenn.prune(
            model,
            out,
            method=method,
            ratio=shares,
            preset=preset,
            overrides=pairs(overrides or [], "--set", "grouping=layer"),
            packed=packed,
        )
    if as_json:
        console.machine({**summary.json(), "folder": str(folder)})
        return
    terminal = console.console()
    rows: list[tuple[str, ...]] = [
        (console.escape(name), f"{of:,}", f"{kept:,}", f"{100 * (1 - kept / of):.2f} %")
        for name, (kept, of) in summary.groups().items()
    ]
    counts = [("all parameters", summary.parameters, summary.kept)]
    if summary.macs is not None and summary.macs_kept is not None:
        counts.append(("multiply-adds", summary.macs, summary.macs_kept))
    rows += [(name, f"{of:,}", f"{kept:,}", f"{100 * (1 - kept / of):.2f} %") for name, of, kept in counts]
    terminal.print(console.table(("", "before", "kept", "removed"), rows))
    if summary.dense:
        first = ", ".join(summary.dense[:4]) + ", …" * (len(summary.dense) > 4)
        terminal.print(f"dense    {len(summary.dense)} layers are not pruned: {console.escape(first)}", soft_wrap=True)
    dense = summary.sizes["dense"]
    sizes = ", ".join(f"{form} {size:,} ({100 * size / dense:.1f} %)" for form, size in summary.sizes.items())
    terminal.print(f"bytes    {sizes}", soft_wrap=True)
    evens = ", ".join(
        f"{form} never" if share is None else f"{form} from {100 * share:.3g} % removed on"
        for form, share in summary.break_even.items()
    )
    terminal.print(f"         smaller than dense: {evens}", soft_wrap=True)
    for file in sorted(file for file in folder.iterdir() if not file.name.startswith(".")):
        terminal.print(f"written  {console.escape(str(file))}", soft_wrap=True)
    terminal.print(f"         {REPORT} has every layer", soft_wrap=True)


def parse_ratio(text: str) -> float | dict[str, Any]:
    """A share, or one for each group.

    >>> parse_ratio("0.35"), parse_ratio("qkv=0.2,mlp=0.5")
    (0.35, {'qkv': 0.2, 'mlp': 0.5})

    Raises:
        UserError: something else, or a share below 0, or of 1 and above.
    """
    shares: dict[str, float] = {}
    for part in text.split(","):
        name, equals, value = part.strip().rpartition("=")
        if bool(equals) != bool(name) or (not equals and "," in text) or name in shares:
            raise UserError(
                f"--ratio takes a share, such as 0.35, or groups once each, such as qkv=0.2,mlp=0.5, got {text!r}"
            )
        try:
            share = float(value)
        except ValueError:
            share = math.nan
        if not 0 <= share < 1:
            raise UserError(f"--ratio must be at least 0 and below 1, the share that goes, got {part.strip()!r}")
        shares[name] = share
    return shares.get("", shares) if "" in shares else shares
