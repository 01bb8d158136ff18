"""Slots: shape contracts that make mechanisms interchangeable. This table is data and imports no torch."""

from dataclasses import dataclass, field

from provenn.core.errors import UserError


@dataclass(frozen=True)
class Slot:
    """One shape contract.

    A batch of no example is one too: it gives an output of none, and gradients of zero. What mixes examples may
    say in its paper.toml that it cannot.

    Args:
        name: as papers and the command line write it.
        contract: what a mechanism of this slot takes and gives, in one line.
        factory: how such a mechanism is made.
        inputs: the axes of each tensor it takes, by name; what it gives has the shape of the first.
        width: the axis whose size the factory takes.
        mixes: the axis along which one position may change another; none where each keeps to itself.
        sizes: sizes of the other axes, odd ones too, that every mechanism must take.
    """

    name: str
    contract: str
    factory: str
    inputs: tuple[str, ...]
    width: str
    mixes: str = ""
    sizes: tuple[dict[str, int], ...] = field(default=())

    def shapes(self, **sizes: int) -> list[tuple[int, ...]]:
        """The shape of each input at these sizes.

        >>> SLOTS["cross-mixer"].shapes(batch=2, tokens=3, other=5, dim=8)
        [(2, 3, 8), (2, 5, 8)]
        """
        return [tuple(sizes[axis] for axis in axes.split()) for axes in self.inputs]


SLOTS: dict[str, Slot] = {
    slot.name: slot
    for slot in (
        Slot(
            "token-mixer",
            "(batch, tokens, dim) to the same: forward(x, *, mask=None), mask (batch, tokens), True = may be attended; "
            "where it streams, init_state(batch) and step(x_t, state) → (y_t, state), whose fold is forward",
            "factory(dim, causal=...)",
            ("batch tokens dim",),
            width="dim",
            mixes="tokens",
            sizes=({"tokens": 1}, {"tokens": 2}, {"tokens": 7}, {"tokens": 33}),
        ),
        Slot(
            "channel-gate",
            "(batch, channels, height, width) to the same",
            "factory(channels)",
            ("batch channels height width",),
            width="channels",
            sizes=({"height": 1, "width": 1}, {"height": 5, "width": 8}, {"height": 13, "width": 3}),
        ),
        Slot(
            "map-mixer",
            "(batch, channels, height, width) to the same, mixing space",
            "factory(channels)",
            ("batch channels height width",),
            width="channels",
            mixes="space",
            sizes=({"height": 8, "width": 8}, {"height": 5, "width": 9}, {"height": 17, "width": 12}),
        ),
        Slot(
            "batch-mixer",
            "(batch, dim) to the same, mixing examples",
            "factory(dim)",
            ("batch dim",),
            width="dim",
            mixes="batch",
            sizes=({"batch": 2}, {"batch": 5}),
        ),
        Slot(
            "cross-mixer",
            "(batch, tokens, dim) and (batch, other, dim) to the shape of the first",
            "factory(dim)",
            ("batch tokens dim", "batch other dim"),
            width="dim",
            mixes="other",
            sizes=({"tokens": 1, "other": 1}, {"tokens": 7, "other": 3}, {"tokens": 4, "other": 11}),
        ),
        Slot(
            "residual",
            "how a branch joins its stream: called as (x, f, depth), f the branch and depth how many there are, "
            "it gives the next x, of any shape that f keeps; initialise(f, depth), where it has one, is called before",
            "factory(dim)",
            ("batch dim",),
            width="dim",
            sizes=({"batch": 1}, {"batch": 5}),
        ),
        Slot(
            "backbone",
            "(batch, channels, height, width) to logits (batch, classes), and by features(x) to its pyramid, from fine "
            "to coarse: map i is (batch, widths[i], ⌈height / strides[i]⌉, ⌈width / strides[i]⌉)",
            "factory(num_classes=..., in_channels=...)",
            ("batch channels height width",),
            width="channels",
            sizes=({"height": 32, "width": 32}, {"height": 29, "width": 37}),
        ),
    )
}


def slot(name: str) -> Slot:
    """The slot of that name; an unknown one is answered with those there are."""
    if name not in SLOTS:
        raise UserError(f"no slot is called {name!r}; there are: {', '.join(SLOTS)}")
    return SLOTS[name]
