"""Recall: what a model can fetch back from its context. Generated, as the field does it, at any length."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from provenn.core.errors import UserError
from provenn.tasks.base import HeldOut, Scores, Task, TaskData, batches, device_of, fingerprint

if TYPE_CHECKING:
    from matplotlib.figure import Figure

IGNORED = -100  # a target that is not asked for
LOGITS = 2**24  # that an evaluation holds at a time


class Examples(NamedTuple):
    """Sequences, the target at each position (`IGNORED` where there is none), and how far back the answer stands."""

    tokens: Int[Tensor, "examples tokens"]
    targets: Int[Tensor, "examples tokens"]
    distances: Int[Tensor, "examples tokens"]


def associative_recall(
    examples: int,
    generator: torch.Generator,
    *,
    length: int = 128,
    pairs: int = 8,
    keys: int = 64,
    values: int = 64,
    power: float = 0.01,
) -> Examples:
    """Multi-query associative recall (Arora et al., 2023, Zoology, arXiv:2312.04927): pairs, then each key again.

    k₁ v₁ k₂ v₂ …, then noise in which every key comes once more; there its value is the target. The position of a
    second coming is drawn with weight ∝ gap^(power − 1), so that most come soon, as words of a text do. Tokens: 0 to
    values − 1 are noise, then come the keys, then the values.
    """
    if length < 4 * pairs:
        raise UserError(f"length must be at least four times the pairs, got {length} and {pairs} pairs")
    if keys < pairs:
        raise UserError(f"keys must be at least the pairs, got {keys} keys and {pairs} pairs")
    tokens = torch.randint(values, (examples, length), generator=generator)  # noise, of as many kinds as values
    chosen = _without_replacement(torch.zeros(examples, keys), pairs, generator)
    values_of = torch.randint(values, (examples, pairs), generator=generator)
    first = 2 * torch.arange(pairs)
    tokens[:, first], tokens[:, first + 1] = values + chosen, values + keys + values_of
    slots = (length - 2 * pairs) // 2
    weights = (power - 1) * torch.arange(1, slots + 1).log()
    positions = 2 * pairs + 2 * _without_replacement(weights.expand(examples, slots), pairs, generator)
    targets, distances = torch.full_like(tokens, IGNORED), torch.zeros_like(tokens)
    tokens.scatter_(1, positions, values + chosen)
    targets.scatter_(1, positions, values + keys + values_of)
    distances.scatter_(1, positions, positions - first)
    return Examples(tokens, targets, distances)


def needle(
    examples: int,
    generator: torch.Generator,
    *,
    length: int = 128,
    pairs: int = 1,
    keys: int = 64,
    values: int = 64,
) -> Examples:
    """A needle in a haystack (as in RULER, Hsieh et al., 2024): noise with key and value somewhere; at its end the key.

    With more pairs the others mislead: one of the keys is asked for. Tokens as in `associative_recall`.
    """
    if length < 2 * pairs + 1:
        raise UserError(f"length must be at least {2 * pairs + 1} for {pairs} pairs and a question, got {length}")
    if keys < pairs:
        raise UserError(f"keys must be at least the pairs, got {keys} keys and {pairs} pairs")
    tokens = torch.randint(values, (examples, length), generator=generator)
    chosen = _without_replacement(torch.zeros(examples, keys), pairs, generator)
    values_of = torch.randint(values, (examples, pairs), generator=generator)
    slots = (length - 1) // 2
    positions = 2 * _without_replacement(torch.zeros(examples, slots), pairs, generator)
    tokens.scatter_(1, positions, values + chosen)
    tokens.scatter_(1, positions + 1, values + keys + values_of)
    targets, distances = torch.full_like(tokens, IGNORED), torch.zeros_like(tokens)
    tokens[:, -1] = values + chosen[:, 0]
    targets[:, -1] = values + keys + values_of[:, 0]
    distances[:, -1] = length - 1 - positions[:, 0]
    return Examples(tokens, targets, distances)


def selective_copy(
    examples: int,
    generator: torch.Generator,
    *,
    length: int = 128,
    pairs: int = 16,
    keys: int = 1,
    values: int = 16,
) -> Examples:
    """Selective copying (Gu and Dao, 2023, Mamba): `pairs` symbols scattered in blanks, to be predicted in their order.

    Tokens: 0 is blank, 1 asks for the next symbol, the symbols follow; `keys` is not used.
    """
    if length < 2 * pairs:
        raise UserError(f"length must be at least twice the symbols, got {length} and {pairs} symbols")
    tokens = torch.zeros(examples, length, dtype=torch.long)
    positions = _without_replacement(torch.zeros(examples, length - pairs), pairs, generator).sort(dim=1).values
    symbols = 2 + torch.randint(values, (examples, pairs), generator=generator)
    tokens.scatter_(1, positions, symbols)
    targets, distances = torch.full_like(tokens, IGNORED), torch.zeros_like(tokens)
    tokens[:, -pairs:] = 1
    targets[:, -pairs:] = symbols
    distances[:, -pairs:] = torch.arange(length - pairs, length) - positions
    return Examples(tokens, targets, distances)


def lookup(
    examples: int,
    generator: torch.Generator,
    *,
    length: int = 64,
    pairs: int = 12,
    keys: int = 32,
    values: int = 8,
) -> Examples:
    """Pairs of key and value, each one token, scattered in noise; then the keys in another order, without values.

    What is recalled takes one step of association, where `associative_recall` first has to join a key to the token
    after it. The token of key k and value v is k · (values + 1) + v; `keys` stands for no key, `values` for no value:
    `PairEmbedding` embeds the two apart.
    """
    if length < 2 * pairs:
        raise UserError(f"length must be at least twice the pairs, got {length} and {pairs} pairs")
    if keys < pairs:
        raise UserError(f"keys must be at least the pairs, got {keys} keys and {pairs} pairs")
    tokens = keys * (values + 1) + torch.randint(values, (examples, length), generator=generator)
    chosen = _without_replacement(torch.zeros(examples, keys), pairs, generator)
    values_of = torch.randint(values, (examples, pairs), generator=generator)
    positions = _without_replacement(torch.zeros(examples, length - pairs), pairs, generator)
    tokens.scatter_(1, positions, chosen * (values + 1) + values_of)
    order = _without_replacement(torch.zeros(examples, pairs), pairs, generator)
    targets, distances = torch.full_like(tokens, IGNORED), torch.zeros_like(tokens)
    tokens[:, -pairs:] = chosen.gather(1, order) * (values + 1) + values
    targets[:, -pairs:] = values_of.gather(1, order)
    distances[:, -pairs:] = torch.arange(length - pairs, length) - positions.gather(1, order)
    return Examples(tokens, targets, distances)


class PairEmbedding(nn.Module):
    """The tokens of `lookup` as the sum of a key's and a value's vector.

    Shapes: (batch, tokens) to (batch, tokens, dim).
    """

    def __init__(self, keys: int, values: int, dim: int):
        super().__init__()
        self.values = values
        self.key = nn.Embedding(keys + 1, dim)
        self.value = nn.Embedding(values + 1, dim)

    def forward(self, tokens: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens dim"]:
        return self.key(tokens // (self.values + 1)) + self.value(tokens % (self.values + 1))


GENERATORS: dict[str, Callable[..., Examples]] = {
    "mqar": associative_recall,
    "needle": needle,
    "selective-copy": selective_copy,
    "lookup": lookup,
}
DEFAULTS = {"mqar": (8, 64), "needle": (1, 64), "selective-copy": (16, 16), "lookup": (12, 8)}  # pairs and values


class Recall(Task):
    """Models take tokens (batch, tokens) and give logits (batch, tokens, vocab); only the asked positions count."""

    name = "recall"
    metric = "accuracy"
    higher_is_better = True
    embedded = {  # noqa: RUF012
        "mqar": "multi-query associative recall: pairs of key and value, then every key again in noise; generated",
        "needle": "a needle in a haystack: a key and its value in noise, the key again at the end; generated",
        "selective-copy": "symbols scattered in blanks, to be told in order; generated",
        "lookup": "pairs of key and value, each one token, in noise, then the keys; generated",
    }
    reads = "nothing: the sequences are generated"
    takes_words = True  # in vain, as `predict` says

    def load(  # type: ignore[override]  # names its options
        self,
        source: str | Path,
        *,
        seed: int = 0,
        length: int = 128,
        pairs: int | None = None,
        keys: int = 64,
        values: int | None = None,
        examples: int = 8192,
        test_examples: int = 512,
    ) -> TaskData:
        """Sequences drawn from the seed.

        Args:
            source: mqar, needle, selective-copy or lookup.
            length: tokens a sequence.
            pairs: pairs of key and value (symbols, for copying); by default 8, 1, 16 and 12.
            keys, values: how many of each there are to draw from; by default 64 of each, 16 symbols,
                8 values of a lookup.
            examples, test_examples: how many to train on, and to validate and to test on.

        Raises:
            UserError: an unknown kind, or sizes that do not fit one another.
        """
        kind = self._named(source)
        if not isinstance(kind, str):
            raise UserError(f"recall reads no files, got {str(source)!r}; there are: {', '.join(self.embedded)}")
        pairs = DEFAULTS[kind][0] if pairs is None else pairs
        values = DEFAULTS[kind][1] if values is None else values
        sizes = {"length": length, "pairs": pairs, "keys": keys, "values": values, "examples": examples}
        for name, size in {**sizes, "test_examples": test_examples}.items():
            if size < 1:
                raise UserError(f"{name} must be at least 1, got {size}")
        generator = torch.Generator().manual_seed(seed)
        make = GENERATORS[kind]
        parts = [
            make(count, generator, length=length, pairs=pairs, keys=keys, values=values)
            for count in (examples, test_examples, test_examples)
        ]
        vocab = {"selective-copy": 2 + values, "lookup": (keys + 1) * (values + 1)}.get(kind, 2 * values + keys)
        setting = f"{length} tokens, {pairs} pairs" if kind != "selective-copy" else f"{length} tokens, {pairs} symbols"
        return recall_data(kind, parts, vocab, f"{self.embedded[kind]}; {setting}")

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Cross-entropy of what is asked for, in nats, the mean over the positions that ask."""
        tokens, targets, _ = batch
        return F.cross_entropy(model(tokens).flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED)

    def _right(self, model: nn.Module, dataset: Dataset, batch_size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Whether each position is predicted right, whether it is asked for, and how far back the answer stands."""
        rows = []
        first: Any = dataset[0][0]
        size = max(1, min(batch_size, LOGITS // (256 * len(first))))
        for tokens, targets, distances in batches(dataset, size, device_of(model)):
            predicted = model(tokens).argmax(-1)
            rows.append([(predicted == targets).cpu(), (targets != IGNORED).cpu(), distances.cpu()])
        right, asked, distances = (torch.cat(parts) for parts in zip(*rows))
        return right, asked, distances

    def scores(self, model: nn.Module, dataset: Dataset, batch_size: int = 256) -> Scores:
        """Of each sequence: asked positions predicted right, asked positions, and whether all are right."""
        right, asked, _ = self._right(model, dataset, batch_size)
        parts = {"right": (right & asked).sum(1), "asked": asked.sum(1), "exact": (right | ~asked).all(1)}
        return {name: part.double().numpy() for name, part in parts.items()}

    def summary(self, scores: Scores) -> dict[str, float]:
        """The share of asked positions predicted right, and of sequences without a mistake."""
        return {
            "accuracy": float(scores["right"].sum() / scores["asked"].sum()),
            "exact": float(scores["exact"].mean()),
        }

    def held_out(self, source: str | Path, meta: dict[str, Any], **options: Any) -> HeldOut:
        """As in `Task`; what is set for the training, such as `length`, is set again for the test."""
        options.pop("whole", None)
        data = self.load(source, **options)
        if data.meta["vocab"] != meta["vocab"]:
            raise UserError(
                f"{source} has {data.meta['vocab']} tokens, the model {meta['vocab']}: give the keys, values and pairs "
                "that it was trained with by --set"
            )
        return HeldOut(data.test, data.about)

    def dummy_baseline(self, data: TaskData) -> float:
        """Accuracy of always saying that answer which stands most often in the sequence, or of guessing evenly.

        It knows what answers look like, and not which of them belongs where. Where a sequence has but one, to find it
        is the task: there it says the commonest answer of training.
        """
        vocab, sequences = data.options["vocab"], partial(batches, batch_size=256, device=torch.device("cpu"))
        train = [(tokens, targets, targets != IGNORED) for tokens, targets, _ in sequences(data.train)]
        frequency = torch.cat([targets[asked] for _, targets, asked in train]).bincount(minlength=vocab)
        # Those of a lookup do not: its tokens are pairs. Then what the sequence asks for are its candidates.
        stand_in_it = all(
            bool((_counts(tokens, vocab).gather(1, targets.clamp_min(0)) > 0)[asked].all())
            for tokens, targets, asked in train
        )
        right = []
        for tokens, targets, _ in sequences(data.test):
            asked = targets != IGNORED
            candidates = _counts(tokens, vocab) * (frequency > 0) if stand_in_it else _counts(targets, vocab, asked)
            guess = torch.where(candidates.sum(1) > 1, candidates.argmax(1), frequency.argmax())
            right.append((targets == guess[:, None])[asked])
        return max(torch.cat(right).double().mean().item(), 1 / int((frequency > 0).sum()))

    def accuracy_by_distance(
        self, model: nn.Module, dataset: Dataset, bins: int = 8, batch_size: int = 256
    ) -> list[tuple[float, float, int]]:
        """For positions whose answers stand about as far back: the distance in tokens, the accuracy, their number."""
        with torch.no_grad():
            right, asked, distances = self._right(model, dataset, batch_size)
        right, far = right[asked].double(), distances[asked].double()
        edges = far.quantile(torch.linspace(0, 1, bins + 1, dtype=torch.float64)).unique()
        group = torch.bucketize(far, edges[1:-1], right=True)
        groups = [(far[group == i], right[group == i]) for i in range(max(len(edges) - 1, 1))]
        return [(d.mean().item(), r.mean().item(), len(r)) for d, r in groups if len(r)]

    def picture(self, model: nn.Module, data: TaskData) -> "Figure":
        """How often the answer is right, over how far back it stands."""
        from matplotlib.figure import Figure

        points = self.accuracy_by_distance(model, data.test)
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        axes.plot([d for d, _, _ in points], [a for _, a, _ in points], marker="o")
        axes.set(xlabel="tokens back", ylabel="accuracy", ylim=(-0.02, 1.02), title=f"{data.name}: test sequences")
        axes.grid(alpha=0.3)
        return figure


TASK = Recall()


def recall_data(name: str, parts: Sequence[Examples], vocab: int, about: str) -> TaskData:
    """Examples for training, validation and test as data of this task, for recall of a paper's own making."""
    train, val, test = (TensorDataset(*part) for part in parts)
    checksum = fingerprint(*(tensor for part in parts for tensor in part))
    return TaskData(name, train, val, test, checksum, {"vocab": vocab}, {"vocab": vocab}, about=about)


def _counts(
    symbols: Int[Tensor, "examples tokens"], vocab: int, counted: Bool[Tensor, "examples tokens"] | None = None
) -> Int[Tensor, "examples vocab"]:
    """How often each symbol stands in each sequence, at the positions that count."""
    weights = torch.ones_like(symbols) if counted is None else counted.long()
    return symbols.new_zeros(len(symbols), vocab).scatter_add_(1, symbols.clamp_min(0), weights)


def _without_replacement(weights: Tensor, count: int, generator: torch.Generator) -> Int[Tensor, "examples count"]:
    """Different indices of each row, drawn with these log weights: the largest sums with Gumbel noise."""
    noise = -(-torch.rand(weights.shape, generator=generator).clamp_min(1e-20).log()).log()
    return (weights + noise).topk(count, dim=1).indices
