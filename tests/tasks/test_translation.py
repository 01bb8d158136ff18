"""Sentences become sentences; the numbers are what the two languages call them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from provenn.errors import UserError
from provenn.papers.nprf import nprf_translator_tiny
from provenn.tasks import get_task
from provenn.tasks.translation import END, english, german

TASK = get_task("translation")
WORDS = {
    0: ("zero", "null"),
    1: ("one", "eins"),
    17: ("seventeen", "siebzehn"),
    21: ("twenty-one", "einundzwanzig"),
    30: ("thirty", "dreißig"),
    101: ("one hundred and one", "einhunderteins"),
    676: ("six hundred and seventy-six", "sechshundertsechsundsiebzig"),
    4000: ("four thousand", "viertausend"),
    9316: ("nine thousand three hundred and sixteen", "neuntausenddreihundertsechzehn"),
}


def test_numbers_in_words():
    for number, words in WORDS.items():
        assert (english(number), german(number)) == words
    assert len({german(n) for n in range(10_000)}) == len({english(n) for n in range(10_000)}) == 10_000


class Echo(nn.Module):
    """Writes letter after letter what it reads, and looks at nothing that it may not see."""

    def __init__(self):
        super().__init__()
        self.sure = nn.Parameter(torch.ones(()))

    def forward(self, source, written, mask):
        assert torch.equal(mask, source != END) and (written[:, 0] == END).all()
        letters = F.pad(source, (0, written.shape[1]))[:, : written.shape[1]]
        assert torch.equal(written[:, 1:], letters[:, :-1])  # what was told before
        return self.sure * F.one_hot(letters, 256).float()


def test_what_is_told_right_given_all_before_it_is_what_is_written(tmp_path):
    file = tmp_path / "pairs.tsv"
    file.write_text("".join(f"{word}\t{word}\n" for word in ("a", "bc", "día", "nine of ten") * 10))
    data, model = TASK.load(file), Echo()
    with torch.no_grad():
        assert TASK.evaluate(model, data.test) == {"exact": 1.0, "letters": 1.0}
    assert TASK.predict(model, data.meta, ["día", "bc"], None) == "día\nbc"
    assert TASK.predict(model, data.meta, [str(file)], tmp_path / "out").endswith(f"wrote {tmp_path / 'out'}")
    assert len((tmp_path / "out").read_text().splitlines()) == 40
    with pytest.raises(UserError, match="empty"):
        TASK.predict(model, data.meta, [" "], None)


def test_letters_after_the_end_count_neither_in_the_loss_nor_in_the_metric():
    model = nprf_translator_tiny().eval()
    short, long = torch.tensor([[97, 98, 0]]), torch.tensor([[97, 98, 0, 0, 0, 0]])
    source = torch.tensor([[100, 101, 0]])
    with torch.no_grad():
        torch.testing.assert_close(TASK.loss(model, (source, short)), TASK.loss(model, (source, long)))
        one, other = (TASK.evaluate(model, TensorDataset(source, target)) for target in (short, long))
    assert one == other


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.tsv", "one two\n", "line 1: expected a sentence, a tab"),
        ("a.jsonl", '{"source": "a"}\n', "keys source and target"),
        ("a.jsonl", "[" * 9000, "nested too deeply"),
        ("a.tsv", "a\tb\n", "at least 20 pairs"),
    ],
)
def test_files_that_hold_no_pairs_are_refused(tmp_path, name, text, says):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=says):
        TASK.load(tmp_path / name)
