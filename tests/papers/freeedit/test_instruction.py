"""The multi-modal instruction: what S* becomes, what moves behind it, and what is cut."""

import pytest
import torch

from provenn.core.errors import UserError
from provenn.data.edits import check_placeholder
from provenn.nn.towers import TextConfig, TextTower, VisionConfig, VisionTower
from provenn.papers.freeedit.instruction import InstructionEncoder, QFormer, splice

END, PAD, S = 2, 0, 5


class Said(torch.nn.Module):
    """Stands for a Q-Former that says vectors which are known."""

    def __init__(self, vectors):
        super().__init__()
        self.vectors = vectors

    def forward(self, image, noun):
        return self.vectors.expand(len(noun), -1, -1)


def encoder(queries=3, length=12):
    torch.manual_seed(0)
    text = TextTower(TextConfig("clip", 16, 2, 2, vocab=20, max_length=length, end_of_text=END, pad=PAD))
    image = VisionTower(VisionConfig("clip", 8, 1, 2, image=16, patch=8))
    qformer = QFormer(20, 8, 16, queries=queries, dim=16, depth=2, heads=2)
    return InstructionEncoder(text, image, qformer, placeholder=S, end=END, pad=PAD, length=length, size=16).eval()


def tokens(*words):
    return torch.tensor([[1, *words, END, *[PAD] * (8 - len(words))]])


PICTURE, NOUN = torch.rand(1, 3, 16, 16), torch.tensor([[7, PAD]])


@torch.no_grad()
def test_a_word_in_the_place_of_s_star_is_that_word():
    """With the embedding of one ordinary word as O, c_m is what the text encoder says of that word."""
    e = encoder(queries=1)
    e.qformer = Said(e.text.embeddings.token_embedding.weight[9].view(1, 1, -1))
    torch.testing.assert_close(e(tokens(7, S, 8), PICTURE, NOUN), e(tokens(7, 9, 8)))


@torch.no_grad()
def test_what_follows_moves_by_one_less_than_the_queries():
    e = encoder(queries=3)
    x = e.embed(tokens(7, S, 8), PICTURE, NOUN)[0]
    table = e.text.embeddings.token_embedding.weight
    said = e.qformer(e.features(PICTURE), NOUN)[0]
    expected = torch.cat([table[[1, 7]], said, table[[8, END]], table[[PAD] * 5]])
    torch.testing.assert_close(x, expected)


@torch.no_grad()
def test_without_s_star_a_reference_changes_nothing():
    e = encoder()
    torch.testing.assert_close(e(tokens(7, 8), PICTURE, NOUN), e(tokens(7, 8)))


@torch.no_grad()
def test_the_end_stays_where_words_are_cut():
    e = encoder(queries=8)
    x = e.embed(tokens(7, S, 8, 9, 10, 11), PICTURE, NOUN)[0]
    assert x[-1].equal(e.text.embeddings.token_embedding.weight[END]) and len(x) == 12
    many = torch.tensor([[1, *range(6, 19), END]])
    assert e.embed(many)[0, -1].equal(e.text.embeddings.token_embedding.weight[END])


@torch.no_grad()
def test_examples_of_a_batch_have_their_places():
    e = encoder()
    both = torch.cat([tokens(7, S, 8), tokens(S, 9), tokens(6, 7)])
    pictures, nouns = torch.rand(3, 3, 16, 16), torch.tensor([[7, 0], [8, 9], [0, 0]])
    together = e(both, pictures, nouns)
    for k in range(3):
        torch.testing.assert_close(together[k : k + 1], e(both[k : k + 1], pictures[k : k + 1], nouns[k : k + 1]))


@torch.no_grad()
def test_padding_of_a_noun_says_nothing_and_its_words_do():
    e = encoder()
    features = e.features(PICTURE)
    one = e.qformer(features, torch.tensor([[7]]))
    torch.testing.assert_close(one, e.qformer(features, torch.tensor([[7, PAD, PAD]])))
    assert not torch.allclose(one, e.qformer(features, torch.tensor([[8]])))


def test_the_picture_reaches_the_queries_with_a_gradient():
    e = encoder()
    e(tokens(7, S), PICTURE, NOUN).square().mean().backward()
    assert (e.qformer.queries.grad.abs().amax(1) > 0).all()
    assert all(p.grad is None for p in (*e.text.parameters(), *e.image.parameters()))


def test_splice_is_traced_whatever_the_places():
    words, image = torch.randn(2, 5, 4), torch.randn(2, 3, 4)
    for place in ([0, 4], [2, 9]):
        x = splice(words, image, torch.tensor(place), 7)
        for row, at in enumerate(place):
            parts = [words[row, :at], image[row], words[row, at + 1 :]] if at < 5 else [words[row]]
            expected = torch.cat([*parts, torch.zeros(7, 4)])[:7]
            assert x[row].equal(expected)


@pytest.mark.parametrize(
    "instruction, reference, words",
    [
        ("replace the cat", True, "has no S\\*"),
        ("add a S*", False, "there is no reference"),
        ("S* on S*", True, "2 times"),
    ],
)
def test_instruction_and_reference_belong_together(instruction, reference, words):
    with pytest.raises(UserError, match=words) as error:
        check_placeholder(instruction, reference)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("every, own, expected", [(1, False, 118_139_904), (2, False, 101_597_184)])
def test_layers_of_the_published_q_former_are_counted(every, own, expected):
    with torch.device("meta"):
        qformer = QFormer(10, 1024, 768, every=every, own=own)
    assert sum(p.numel() for p in qformer.blocks.parameters()) == expected
