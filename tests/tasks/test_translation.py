"""Sentences become sentences; the numbers are what the two languages call them."""

import itertools
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from provenn.core.errors import UserError
from provenn.papers.nprf import nprf_translator_tiny
from provenn.tasks import get_task
from provenn.tasks.translation import END, english, german, translate

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
        assert torch.equal(written[:, 1:], letters[:, :-1])  # the targets before
        return self.sure * F.one_hot(letters, 256).float()


def test_what_is_predicted_right_given_all_before_it_is_what_is_written(tmp_path):
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


class Fixed(nn.Module):
    """Words with given chances: what comes next follows from the word before alone."""

    def __init__(self, chances):
        super().__init__()
        self.log = nn.Parameter(torch.tensor(chances).log())

    def forward(self, source, written, mask):
        return self.log[written]


def test_a_beam_finds_what_greed_misses():
    # From the start 1 is likelier than 2, but what follows 2 is certain.
    chances = [[1e-9, 0.6, 0.4, 1e-9], [0.3, 0.35, 1e-9, 0.35], [1e-9, 1e-9, 1e-9, 1.0], [1.0, 1e-9, 1e-9, 1e-9]]
    model, source = Fixed(chances), torch.tensor([[1, 0], [2, 0]])
    assert translate(model, source, 5, beam=4, penalty=0.0) == [[2, 3]] * 2
    assert translate(model, source, 5, beam=1, penalty=0.0)[0][0] == 1
    assert translate(model, source, 1, beam=4, penalty=0.0) == [[1]] * 2, "cut at the length"


def test_every_translation_is_weighed_where_the_beam_is_wide_enough():
    torch.manual_seed(0)
    model = Fixed(torch.rand(4, 4).softmax(-1).tolist())
    log = model.log.log_softmax(-1).tolist()
    length, penalty = 3, 1.2
    scored = {}
    for count in range(length + 1):
        for words in itertools.product((1, 2, 3), repeat=count):
            ended = (*words, 0)[:length]
            score = sum(log[a][b] for a, b in pairwise((0, *ended)))
            scored[words] = score / len(ended) ** penalty
    best = max(scored, key=scored.get)
    assert translate(model, torch.tensor([[1, 0]]), length, beam=64, penalty=penalty) == [list(best)]


def corpus(folder, sentences=("a b c d e", "f g@@ h i j k", "l m n o p")):
    folder.mkdir()
    for split in ("train", "valid", "test"):
        for language in ("de", "en"):
            (folder / f"{split}.{language}").write_text("".join(f"{line}\n" for line in sentences))
    return folder


def test_a_folder_of_two_languages_is_read_in_its_splits_and_compared_by_bleu(tmp_path):
    data = TASK.load(corpus(tmp_path / "de-en"))
    assert data.options == {"vocab": 18} and data.meta["words"][:2] == ["", "<unk>"]
    assert [len(part) for part in (data.train, data.val, data.test)] == [3, 3, 3]

    class Copies(nn.Module):
        def __init__(self, wrong=None):
            super().__init__()
            self.sure, self.wrong = nn.Parameter(torch.tensor(9.0)), wrong

        def forward(self, source, written, mask):
            letters = F.pad(source, (0, written.shape[1]))[:, : written.shape[1]]
            if self.wrong is not None:
                letters = torch.where(letters == self.wrong, 1, letters)
            return self.sure * F.one_hot(letters, 18).float()

    with torch.no_grad():
        right = TASK.evaluate(Copies(), data.test)
        assert right == {"exact": 1.0, "letters": 1.0, "bleu": pytest.approx(100.0)}
        assert "bleu" not in TASK.evaluate(Copies(), data.val), "each epoch's validation writes nothing"
        number = data.meta["words"].index("c")
        scores = TASK.scores(Copies(wrong=number), data.test)
    # Of 15 words 14 are right ("g@@ h" is one), of 12 pairs 10, of 9 triples 6, of 6 fours 4.
    wanted = 100 * (14 / 15 * 10 / 12 * 6 / 9 * 4 / 6) ** 0.25
    assert TASK.summary(scores)["bleu"] == pytest.approx(wanted)
    assert TASK.predict(Copies(), data.meta, ["f g@@ h i"], None) == "f gh i"
    again = TASK.held_out(tmp_path / "de-en", data.meta)
    torch.testing.assert_close(again.dataset.tensors, data.test.tensors)


def test_folders_that_are_no_corpus_are_refused(tmp_path):
    folder = corpus(tmp_path / "text")
    with pytest.raises(UserError, match="from what into what"):
        TASK.load(folder)
    assert TASK.load(folder, languages="de-en").test is not None
    with pytest.raises(UserError, match=r"lacks train.fr: expected train, valid and test of fr and en"):
        TASK.load(folder, languages="fr-en")
    (folder / "valid.en").write_text("a\n")
    with pytest.raises(UserError, match=r"valid.de has 3 lines, valid.en 1: expected as many"):
        TASK.load(folder, languages="de-en")
    with pytest.raises(UserError, match="languages is of a folder"):
        TASK.load("numbers", languages="de-en")
    with pytest.raises(UserError, match="these weights translate letters, got a folder of words"):
        TASK.held_out(folder, {"length": 9})
