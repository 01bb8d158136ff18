"""LSceneLLM as a whole: tokens of clouds, placeholders, what a reader points at, writing with a cache, and counts."""

import time
from itertools import combinations

import pytest
import torch
from torch import Tensor

import provenn
from provenn.core.errors import UserError
from provenn.papers.lscenellm.experiments import ROOMS
from provenn.papers.lscenellm.layers import SceneMagnifier
from provenn.papers.lscenellm.model import FourierPositions, LSceneLLM, Prompts, lscenellm_7b, lscenellm_rooms
from provenn.papers.lscenellm.rivals import ROOM, Variant, network, opened_share
from provenn.papers.lscenellm.tokens import SceneTokens, box_text, build_tokens

SMALL = {"features": 6, "dim": 32, "layers": 3, "heads": 4, "hidden": 48, "parents": 5, "group": 12, "children": 2,
         "neighbourhood": 20, "sparse_points": 60, "start_layer": 0, "prompt_tokens": 2}  # fmt: skip


def small(**options: object) -> LSceneLLM:
    torch.manual_seed(0)
    model = lscenellm_7b(30, **{**SMALL, **options})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    return model.eval()


def clouds(batch: int = 2, points: int = 90, features: int = 6) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(batch, points, 3 + features)


def test_groups_have_their_sizes_and_means_are_of_real_points() -> None:
    points = torch.randn(1, 300, 3)
    tokens = build_tokens(points, points, parents=7, group=1, children=3, neighbourhood=3, sparse_points=200)
    # A group of one is its centre, and a dense group of ⌊3 / 3⌋ one of the nearest points.
    assert torch.allclose(tokens.sparse, tokens.centres)
    assert torch.allclose(tokens.dense, tokens.dense_centres, atol=1e-6)
    nearest = torch.cdist(tokens.centres, points).topk(3, largest=False).indices[0]
    expected = {tuple(row) for row in points[0][nearest.flatten()].tolist()}
    assert {tuple(row) for row in tokens.dense[0].flatten(0, 1).tolist()} == expected


def test_tokens_are_those_of_a_loop_over_neighbourhoods() -> None:
    points, features = torch.randn(2, 200, 3), torch.randn(2, 200, 4)
    tokens = build_tokens(points, features, parents=6, group=9, children=2, neighbourhood=21, sparse_points=120)
    for row in range(2):
        few = points[row, :120]
        for k, centre in enumerate(tokens.centres[row]):
            near = (few - centre).norm(dim=1).argsort()[:9]
            assert torch.allclose(tokens.sparse[row, k], features[row][near].mean(0), atol=1e-5)
            hood = (points[row] - centre).norm(dim=1).argsort()[:21]
            local = points[row][hood]
            for child, middle in enumerate(tokens.dense_centres[row, k]):
                members = hood[(local - middle).norm(dim=1).argsort()[:10]]
                assert torch.allclose(tokens.dense[row, k, child], features[row][members].mean(0), atol=1e-5)


def test_shifts_and_scales_change_no_token_and_the_number_of_points_none_of_their_counts() -> None:
    points, features = torch.randn(1, 400, 3), torch.randn(1, 400, 5)
    sizes = {"parents": 8, "group": 20, "children": 4, "neighbourhood": 40}
    one = build_tokens(points, features, **sizes)
    other = build_tokens(4 * points + 2, features, **sizes)
    assert torch.allclose(one.sparse, other.sparse, atol=1e-6)
    assert torch.allclose(one.dense, other.dense, atol=1e-6)
    many = build_tokens(torch.randn(1, 4000, 3), torch.randn(1, 4000, 5), **sizes)
    assert many.sparse.shape == one.sparse.shape
    assert many.dense.shape == one.dense.shape


def test_tokens_of_the_papers_size_take_seconds() -> None:
    points = torch.rand(1, 160_000, 3)
    started = time.process_time()
    tokens = build_tokens(points, torch.rand(1, 160_000, 8))
    assert tokens.dense.shape == (1, 128, 4, 8)
    assert time.process_time() - started < 60


def test_bad_sizes_are_refused() -> None:
    points = torch.randn(1, 10, 3)
    for sizes in ({"parents": 0}, {"parents": 20}, {"children": 11}, {"parents": 5, "sparse_points": 4}):
        with pytest.raises(ValueError, match="at least"):
            build_tokens(points, points, **sizes)
    with pytest.raises(UserError, match="the scene is too small"):
        small()(torch.ones(1, 2, dtype=torch.long), clouds(1, 4))
    with pytest.raises(UserError, match="a point has 8 numbers"):
        small()(torch.ones(1, 2, dtype=torch.long), clouds(1, 90, 5))
    with pytest.raises(UserError, match="2 texts and 1 scenes"):
        small()(torch.ones(2, 2, dtype=torch.long), clouds(1))


def test_a_box_is_written_in_255ths() -> None:
    low, high = torch.tensor([0.0, 0.0, 0.0]), torch.tensor([10.0, 5.0, 2.0])
    text = box_text(low, high, torch.tensor([9.0, 4.0, 1.0]), high)
    assert text == "<obj>242,229,191,25,51,127</obj>"
    with pytest.raises(ValueError, match="wider than 0"):
        box_text(low, low, low, low)


def test_fourier_positions_repeat_with_whole_turns() -> None:
    torch.manual_seed(0)
    positions = FourierPositions(8)
    low, high = torch.zeros(1, 3), torch.full((1, 3), 4.0)
    places = torch.rand(1, 5, 3) * 4
    angles = 2 * torch.pi * (places / 4) @ positions.gauss
    assert torch.allclose(positions(places, low, high), torch.cat([angles.sin(), angles.cos()], -1), atol=1e-6)
    assert torch.isfinite(positions(places, low, low)).all()
    with pytest.raises(ValueError, match="even"):
        FourierPositions(3)


def test_a_scene_stands_at_its_placeholder() -> None:
    """The same model with placeholders gives what it gives with the scene in front, where the text is the same."""
    scenes, words = clouds(), torch.tensor([[3, 4, 5], [6, 7, 8]])
    front = small()
    placed = small(scene_token=28, prompt_token=29)
    placed.load_state_dict(front.state_dict())
    marks = torch.tensor([[28, 29]]).expand(2, -1)
    assert torch.allclose(front(words, scenes), placed(torch.cat([marks, words], 1), scenes)[:, 2:], atol=1e-5)
    for wrong in ([[3, 28, 4, 29], [28, 3, 4, 29]], [[3, 4, 5, 29], [3, 4, 5, 29]], [[28, 28, 3, 29]] * 2):
        with pytest.raises(UserError, match="one placeholder of the scene"):
            placed(torch.tensor(wrong), scenes)
    with pytest.raises(UserError, match="expected it behind"):
        placed(torch.tensor([[29, 28, 3]] * 2), scenes)


def test_clicks_and_boxes_change_the_answer_and_keep_its_positions() -> None:
    scenes, words = clouds(), torch.tensor([[3, 4], [6, 7]])
    model = small()
    click, box = torch.rand(2, 3), torch.randn(2, 6)
    plain = model(words, scenes)
    given = [Prompts(click=click), Prompts(box=box), Prompts(click, box)]
    found = [plain, *(model(words, scenes, prompts=prompts) for prompts in given)]
    for k, one in enumerate(found):
        assert one.shape == plain.shape
        assert all(not torch.allclose(one, other, atol=1e-4) for other in found[:k])
    state = [
        model.read(words, scenes, prompts=prompts, state=model.decoder.init_state(2))[0].state
        for prompts in (None, *given)
    ]
    assert len({tuple(each.next_positions.tolist()) for each in state}) == 1
    with pytest.raises(UserError, match="reads no clicks"):
        small(prompt_tokens=0)(words, scenes, prompts=Prompts(click=click))


def test_writing_with_a_cache_is_reading_anew_each_time() -> None:
    scenes, words = clouds(), torch.tensor([[3, 4, 5], [6, 7, 0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    model = small()
    written = torch.stack(list(model.generate(words, 5, scenes, mask=mask, temperature=0.0)), 1)
    for row in range(2):
        text = words[row][mask[row]][None]
        for token in written[row]:
            likeliest = model(text, scenes[row : row + 1])[:, -1].argmax(-1)
            assert int(likeliest) == int(token)
            text = torch.cat([text, likeliest[:, None]], 1)


def test_a_row_is_what_it_is_alone() -> None:
    scenes, words = clouds(), torch.tensor([[3, 4, 5, 0], [6, 7, 8, 9]])
    mask = torch.tensor([[True, True, True, False], [True] * 4])
    model = small()
    together = model(words, scenes, mask=mask)
    assert torch.allclose(together[:1, :3], model(words[:1, :3], scenes[:1]), atol=1e-5)
    left, right = torch.tensor([[0, 3, 4, 5]]), torch.tensor([[False, True, True, True]])
    assert torch.allclose(model(left, scenes[:1], mask=right)[:, 1:], together[:1, :3], atol=1e-5)


def test_positions_are_added_where_asked() -> None:
    scenes, words = clouds(1), torch.tensor([[3, 4]])
    model = small(use_xyz=True)
    tokens = model.tokenise(scenes)
    moved = tokens._replace(centres=tokens.centres.flip(1))
    assert not torch.allclose(model(words, tokens), model(words, moved), atol=1e-4)
    blind = small()
    assert torch.allclose(blind(words, tokens), blind(words, moved))


def test_counts_are_the_papers() -> None:
    with torch.device("meta"):
        model, plain = lscenellm_7b(), lscenellm_7b(magnify=False)

    def count(part: torch.nn.Module | None) -> int:
        return sum(p.numel() for p in part.parameters()) if part is not None else 0

    assert count(model.decoder) == 7_543_771_136 - 33_554_432
    assert count(model.projector) == 36_712_448
    assert count(model.box) == count(model.click) == 137_400_320
    assert count(plain.xyz) == 1_181_184
    assert model.xyz is None
    assert count(model.decoder) - count(plain.decoder) == 23 * 2 * 4096**2


def test_a_small_model_reads_rooms_and_attaches_to_a_decoder_of_grouped_heads() -> None:
    model = lscenellm_rooms(20, 4)
    assert model(torch.tensor([[1, 2]]), torch.randn(1, 80, 7)).shape == (1, 2, 20)
    grouped = small(kv_heads=2)
    assert grouped(torch.tensor([[1, 2]]), clouds(1)).shape == (1, 2, 30)
    assert isinstance(grouped.magnifier, SceneMagnifier)


@pytest.mark.parametrize(
    "variant",
    [Variant(), Variant(opens="nothing"), Variant(opens="scorer"), Variant(opens="cosine"), Variant(fuses="mean"),
     Variant(fuses="text"), Variant(reads="objects"), Variant(reads="queries"), Variant(opens="random"),
     Variant(opens="nothing", equal=True), Variant(reads="objects", opens="nothing")],
)  # fmt: skip
def test_every_reader_learns_with_all_of_its_parameters(variant: Variant) -> None:
    torch.manual_seed(0)
    scenes = torch.cat([torch.randn(2, 1020, 7), torch.randint(15, (2, 1020, 1)).float()], dim=-1)
    model = network(variant, 20, 4)
    logits = model(torch.randint(8, 20, (2, 6)), scenes)
    logits[:, -1].logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    share = opened_share(model.eval(), torch.randint(8, 20, (2, 6)), scenes, torch.ones(2, 6, dtype=torch.bool))
    assert 0 <= share <= 1
    assert model.sizes["parents"] == ROOM["parents"] * 3 * (5 if variant.equal else 1)


def test_no_two_readers_of_a_study_compute_the_same() -> None:
    scenes = torch.cat([torch.randn(2, 1020, 7), torch.randint(15, (2, 1020, 1)).float()], dim=-1)
    words, logits = torch.randint(8, 20, (2, 6)), {}
    for name, (_, variant) in ROOMS.variants.items():
        torch.manual_seed(0)
        model = network(variant, 20, 4).eval()
        for parameter in model.decoder.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        with torch.no_grad():
            logits[name] = model(words, scenes)[:, -1]
    for one, other in combinations(logits, 2):
        assert not torch.equal(logits[one], logits[other]), (one, other)


def test_a_selection_may_be_fixed_with_a_cache_too() -> None:
    scenes = torch.cat([torch.randn(1, 1020, 7), torch.zeros(1, 1020, 1)], dim=-1)
    torch.manual_seed(0)
    model = network(Variant(opens="cosine"), 20, 4).eval()
    words = torch.randint(8, 20, (1, 5))  # of which the first two are the question: what follows changes none
    whole = model(words, scenes)
    reading, _ = model.read(words[:, :4], scenes, state=model.decoder.init_state(1))
    last = model.decoder.read(model.decoder.embed(words[:, 4:]), state=reading.state)
    assert torch.allclose(model.decoder.logits(last.hidden[:, 0]), whole[:, -1], atol=1e-5)


@pytest.mark.filterwarnings("ignore:threshold=")  # what differs from the training is said
def test_weights_that_ship_open_fewer_regions_at_a_higher_threshold() -> None:
    torch.manual_seed(0)
    scenes, words = torch.randn(2, 200, 58), torch.randint(8, 40, (2, 6))
    mask = torch.ones(2, 6, dtype=torch.bool)
    paper = provenn.paper("lscenellm")
    models = [paper.load(options={"threshold": threshold})[0] for threshold in (64, "160", 255)]
    shares = [opened_share(model, words, scenes, mask) for model in models]
    assert shares[0] > shares[1] > shares[2] == 0
    assert paper.load(options={"threshold": 160})[1].options["threshold"] == 160
    assert "threshold" not in paper.load()[1].options
    for options, says in (
        ({"threshold": 300}, "between 0 and 255, got 300"),
        ({"heads": 2}, "leave heads out; threshold"),
    ):
        with pytest.raises(UserError, match=says):
            paper.load(options=options)
    with pytest.raises(UserError, match=r"has no 'heads'; what can be set: .*threshold"):
        provenn.evaluate("lscenellm", "rooms", overrides={"heads": 2})


def test_scene_tokens_may_be_given() -> None:
    model, words = small(), torch.tensor([[3, 4]])
    tokens = model.tokenise(clouds(1))
    assert isinstance(tokens, SceneTokens)
    assert torch.equal(model(words, tokens), model(words, clouds(1)))
    assert torch.equal(model(words, tokens.sparse, tokens.dense), model(words, tokens))
