import pytest
import torch
from torch import nn

from provenn.core.errors import UserError
from provenn.nn.language import CausalLM
from provenn.tasks import get_task
from provenn.tasks.recall import IGNORED, PairEmbedding
from provenn.training import Recipe, fit

TASK = get_task("recall")
KINDS = list(TASK.embedded)


def load(kind, **options):
    return TASK.load(kind, **{"length": 40, "pairs": 4, "keys": 8, "values": 6, "examples": 64, **options})


class Oracle(nn.Module):
    """Looks every answer up in the sequence itself."""

    def __init__(self, data, forget=10**9):
        super().__init__()
        self.kind, self.vocab, self.forget = data.name, data.options["vocab"], forget
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, tokens):
        logits = torch.zeros(*tokens.shape, self.vocab)
        for row, sequence in enumerate(tokens.tolist()):
            symbols = [t for t in sequence if t > 1]
            for t, token in enumerate(sequence):
                if self.kind == "selective-copy":
                    asked = sequence[: t + 1].count(1) - 1
                    answer = symbols[max(asked, 0)]
                elif self.kind == "lookup":
                    key = token // 7
                    answer = next((other % 7 for other in sequence[:t] if other // 7 == key), 0)
                else:
                    earlier = [i for i in range(t) if sequence[i] == token and t - i < self.forget]
                    answer = sequence[earlier[0] + 1] if earlier else 0
                logits[row, t, answer] = 1
        return logits


@pytest.mark.parametrize("kind", KINDS)
def test_every_answer_stands_in_the_sequence(kind):
    data = load(kind)
    assert TASK.evaluate(Oracle(data), data.test) == {"accuracy": 1.0, "exact": 1.0}
    tokens, targets, distances = data.test.tensors
    assert tokens.max() < data.options["vocab"] and tokens.min() >= 0
    rows, positions = (targets != IGNORED).nonzero(as_tuple=True)
    back = positions - distances[rows, positions]
    follows = 1 if kind in ("mqar", "needle") else 0
    found = tokens[rows, back + follows]
    assert torch.equal(found % 7 if kind == "lookup" else found, targets[rows, positions])
    assert {"mqar": 4, "needle": 1, "selective-copy": 4, "lookup": 4}[kind] == (targets[0] != IGNORED).sum()


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_fixes_the_sequences_and_the_splits_differ(kind):
    assert load(kind, seed=1).fingerprint == load(kind, seed=1).fingerprint != load(kind, seed=2).fingerprint
    data = load(kind)
    assert not torch.equal(data.train.tensors[0], data.val.tensors[0][:64])


def test_most_questions_come_soon_after_the_pairs():
    _, targets, _ = load("mqar", length=200).test.tensors
    positions = (targets != IGNORED).nonzero(as_tuple=True)[1]
    assert (positions < 60).double().mean() > 0.5 and positions.max() > 150


def test_who_forgets_is_right_near_by_alone():
    data = load("needle", length=64, pairs=1, test_examples=512)
    model = Oracle(data, forget=20)
    points = TASK.accuracy_by_distance(model, data.test)
    assert all(accuracy == 1 for distance, accuracy, _ in points if distance < 15)
    assert all(accuracy < 0.3 for distance, accuracy, _ in points if distance > 28)
    assert sum(count for *_, count in points) == 512
    assert TASK.picture(model, data).axes


def test_attention_learns_to_recall():
    data = load("mqar", pairs=2, length=12, keys=4, values=4, examples=2048)
    result = fit(
        lambda: CausalLM(data.options["vocab"], 32, 2, "softmax", positions="learned", max_length=12),
        TASK,
        data,
        Recipe(epochs=4, batch_size=64, lr=1e-2),
    )
    assert result.metrics["accuracy"] > 0.45  # one of four by chance


@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        ("mqar", {"length": 12}, "four times the pairs"),
        ("mqar", {"keys": 3}, "keys must be at least the pairs"),
        ("needle", {"length": 8}, "length must be at least 9"),
        ("selective-copy", {"length": 7}, "twice the symbols"),
        ("lookup", {"length": 7}, "twice the pairs"),
        ("lookup", {"keys": 3}, "keys must be at least the pairs"),
        ("needle", {"pairs": 0}, "pairs must be at least 1, got 0"),
        ("mqr", {}, "no data at 'mqr'"),
    ],
)
def test_bad_sizes_are_one_line(kind, options, says):
    with pytest.raises(UserError, match=says):
        load(kind, **options)


def test_a_pair_is_the_sum_of_its_parts():
    embed = PairEmbedding(keys=3, values=6, dim=5)
    tokens = torch.tensor([[0, 6, 7 * 2 + 4, 7 * 3 + 1]])
    keys, values = torch.tensor([0, 0, 2, 3]), torch.tensor([0, 6, 4, 1])
    torch.testing.assert_close(embed(tokens)[0], embed.key.weight[keys] + embed.value.weight[values])


@pytest.mark.parametrize("length", [3, 64, 4096])
def test_a_needle_lies_anywhere_in_a_haystack_of_any_length(length):
    data = TASK.load("needle", length=length, examples=8, test_examples=256)
    tokens, targets, distances = data.test.tensors
    assert tokens.shape == (256, length) and (targets[:, -1] != IGNORED).all()
    assert length == 3 or (distances.max() > 0.9 * length and distances[distances > 0].min() < 0.1 * length)
    assert TASK.evaluate(Oracle(data), data.test)["accuracy"] == 1 if length < 4096 else True


def test_there_are_no_files_to_read_or_to_predict(tmp_path):
    with pytest.raises(UserError, match="reads no files"):
        TASK.load(tmp_path)
    with pytest.raises(UserError, match="recall predicts nothing"):
        TASK.predict(nn.Identity(), {}, [], None)
