"""How trainings at the paper's scale are run, whatever they train."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from provenn.core.errors import UserError
from provenn.training import Hardware, Recipe
from provenn.training.options import check_at_least


@dataclass(frozen=True)
class TrainingOptions:
    """What the user says of trainings at the paper's scale: how they run, and not what they train.

    Args:
        hardware: processes, machines and workers; the device is the run's. A batch of the recipe is divided among the
            processes, so that a step is the paper's, however many there are.
        precision: one of the recipe's; None takes the recipe's own.
        save_every: steps between two checkpoints, besides those after each epoch; None writes those alone.
    """

    hardware: Hardware = field(default_factory=Hardware)
    precision: str | None = None
    save_every: int | None = None

    def __post_init__(self) -> None:
        if self.precision is not None:
            Recipe(precision=self.precision)  # which refuses what is none
        if self.save_every is not None:
            check_at_least("save_every", self.save_every, 1)

    def __digest__(self) -> tuple[()]:
        """Nothing: a record is of the same code wherever it was trained."""
        return ()

    def on(self, device: str) -> Hardware:
        """The hardware, with the run's device."""
        return replace(self.hardware, device=device)

    @property
    def departures(self) -> dict[str, Any]:
        """What of the hardware is not the default, by name. The device is left out: it stands in every record."""
        plain = asdict(Hardware())
        return {
            name: value for name, value in asdict(replace(self.hardware, device="cpu")).items() if value != plain[name]
        }

    def recipe_of_each(self, recipe: Recipe) -> Recipe:
        """The recipe of each process: its share of a batch of the whole.

        Raises:
            UserError: the batch cannot be divided evenly.
        """
        shares = self.hardware.processes // self.hardware.context_parallel
        if recipe.batch_size % shares:
            raise UserError(
                f"the recipe's batch of {recipe.batch_size} cannot be divided evenly among {shares} processes: give "
                "another --devices or --num-nodes, or another batch by --set batch_size"
            )
        return replace(recipe, batch_size=recipe.batch_size // shares)
