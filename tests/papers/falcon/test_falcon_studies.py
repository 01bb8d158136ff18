"""What FALCON's experiments compare: each rival does what its name says, and data are what they are called."""

from dataclasses import replace

import pytest
import torch

from provenn.core.cost import count_parameters, flops
from provenn.papers.falcon import studies
from provenn.papers.falcon.crops import cut, places_of
from provenn.papers.falcon.experiments import PAIRS, QUESTIONS, SEAMS, SMALL, VIEWS
from provenn.papers.falcon.rivals import Abstractor, AllTokens, MostAttended, PixelShuffle, Pooling, RandomPatches
from provenn.papers.falcon.studies import (
    DIM,
    KINDS,
    MATCHED,
    PATCHES,
    RECIPE,
    SEAM_DIGIT,
    SHUFFLED,
    SIDE,
    Variant,
    _but_the_vit,
    accuracy_of,
    after_singles,
    crop_digits,
    from_crops,
    in_stages,
    lost_at_seams,
    network,
    pairs,
    questions,
    seam_digits,
    singles,
    small_digits,
    tower_of,
    views,
    without_exchange,
)
from provenn.tasks import get_task
from provenn.training import Fit

TASK = get_task("image-classification")
SHORT = replace(RECIPE, epochs=1, max_steps=2)


def made(kind: str, **options) -> torch.nn.Module:
    torch.manual_seed(0)
    model = KINDS[kind](Variant(kind, **options)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, dtype=parameter.dtype))
    return model


def crops(images: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(images, 3, 48, 48, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return cut(x, (2, 2), SIDE)[:, 1:].flatten(0, 1), places_of((2, 2))[1:].repeat(images, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_every_encoder_leaves_four_tokens_of_a_crop_but_one_that_keeps_all(kind):
    model, (x, places) = made(kind), crops()
    expected = PATCHES if kind == "keep" else 4
    assert model(x, places, 4).shape == (8, expected, DIM)
    reached = x.clone().requires_grad_()
    model(reached, places, 4)[:4].sum().backward()
    assert reached.grad[4:].abs().max() == 0  # no image sees another
    foreign = x.clone().requires_grad_()
    model(foreign, places, 4)[0].sum().backward()
    exchanges = kind in ("falcon", "all tokens", "windows")
    assert (foreign.grad[1:4].abs().amax((1, 2, 3)) > 0).all() == exchanges


def test_variants_of_a_study_are_of_one_size():
    for study, names in (
        (SMALL, list(SMALL.variants)),
        (QUESTIONS, list(QUESTIONS.variants)),
        (PAIRS, ["falcon", "own", "windows"]),
    ):
        sizes = [count_parameters(network(study.variants[name][1], 10)) for name in names]
        assert max(sizes) / min(sizes) < 1.02


def test_resolutions_are_of_one_number_of_operations():
    x, found = torch.zeros(4, 1, 72, 72, device="meta"), {}
    for name in ("72", "36 wide", "18 wide"):
        with torch.device("meta"):
            model = network(VIEWS.variants[name][1], 64)
        found[name] = flops(lambda model=model: model(x))
    assert max(found.values()) / min(found.values()) < 1.05


def test_compressors_are_what_they_are_called():
    vit = made("recompact")
    encoded = vit.encode(*crops(), 4, layers=True)
    square = encoded.patches.unflatten(1, (6, 6))
    torch.testing.assert_close(Pooling(2)(encoded)[:, 1], square[:, :3, 3:].mean((1, 2)))
    shuffle = PixelShuffle(DIM, PATCHES, 2).double()
    block = square[:, 3:, :3].flatten(1, 2).mT.flatten(1)  # channels first, as pixel_unshuffle has them
    torch.testing.assert_close(shuffle(encoded)[:, 2], shuffle.linear(block))
    abstractor = Abstractor(DIM, 2, 4).double()
    moved = encoded._replace(patches=encoded.patches.flip(1))
    torch.testing.assert_close(abstractor(moved), abstractor(encoded))  # a set of tokens, without an order


def test_an_abstractor_reads_registers_too_where_there_are_some():
    encoded = made("recompact").encode(*crops(), 4)
    abstractor = Abstractor(DIM, 2, 4).double()
    with torch.no_grad():
        whole = abstractor(encoded)
        assert not torch.allclose(abstractor(encoded._replace(registers=2 * encoded.registers)), whole)
        assert not torch.allclose(abstractor(encoded._replace(patches=2 * encoded.patches)), whole)


def test_most_attended_patches_are_those_of_the_last_layer():
    vit = made("keep").vit
    encoded = vit.encode(*crops(), 4, layers=True)
    block = vit.blocks[-1]
    x = block.layer_norm1(encoded.layers[-2])
    q, k = (
        linear(x).unflatten(-1, (2, -1)).transpose(1, 2) for linear in (block.self_attn.q_proj, block.self_attn.k_proj)
    )
    share = (q @ k.mT / (DIM // 2) ** 0.5).softmax(-1).mean(1).sum(1)
    wanted = share.argsort(dim=1, descending=True)[:, :4].sort(dim=1).values
    found = MostAttended(vit, 4)(encoded)
    torch.testing.assert_close(found, encoded.patches.gather(1, wanted[..., None].expand(-1, -1, DIM)))


def test_random_patches_are_others_in_training_and_the_same_in_evaluation():
    encoded = made("recompact").encode(*crops(), 4)
    layer = RandomPatches(4).eval()
    assert torch.equal(layer(encoded), layer(encoded))
    layer.train()
    assert not torch.equal(layer(encoded), layer(encoded))


def test_shifted_windows_join_neighbours_and_not_opposite_ends():
    """A patch reaches those of its shifted window alone; one at the outer edge none beyond the end."""
    model = made("windows")
    y = torch.randn(4, PATCHES + 4, DIM, dtype=torch.float64)

    def reached(crop: int, row: int, column: int) -> set[tuple[int, int]]:
        changed = y.clone()
        changed[crop, 6 * row + column] += torch.randn(DIM, dtype=torch.float64)
        moved = (model.exchange(0, changed, 4) - model.exchange(0, y, 4)).abs().amax(2)[:, :PATCHES] > 1e-9
        whole = moved.unflatten(0, (2, 2)).unflatten(2, (6, 6)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
        return {tuple(place) for place in whole.nonzero().tolist()}

    assert reached(0, 4, 4) == {(r, c) for r in range(3, 9) for c in range(3, 9)}
    assert reached(0, 0, 0) == {(r, c) for r in range(3) for c in range(3)}
    assert reached(3, 5, 0) == {(r, c) for r in range(9, 12) for c in range(3, 9)}
    with pytest.raises(ValueError, match="expected 4 crops of each image, got 2"):
        model.exchange(0, y, 2)


def test_attention_over_all_tokens_tells_crops_apart():
    model = made("all tokens")
    assert isinstance(model, AllTokens)
    y = torch.randn(1, PATCHES + 4, DIM, dtype=torch.float64).expand(4, -1, -1)
    told = model.exchange(0, y, 4)
    assert not torch.allclose(told[0], told[1])
    torch.testing.assert_close(model.exchange(0, y.repeat(2, 1, 1), [4, 4])[4:], told)


@pytest.mark.parametrize("draw", [seam_digits, small_digits, pairs, singles, views, questions])
def test_data_are_drawn_again_for_a_seed_and_splits_share_nothing(draw):
    data, again, other = draw(0, True), draw.__wrapped__(0, True), draw(1, True)
    assert data.fingerprint == again.fingerprint != other.fingerprint
    splits = [{x.numpy().tobytes() for x in part.tensors[0]} for part in (data.train, data.val, data.test)]
    assert not splits[0] & splits[1] and not splits[0] & splits[2] and not splits[1] & splits[2]
    assert all(
        int(part.tensors[1].min()) >= 0 and int(part.tensors[1].max()) < data.options["num_classes"]
        for part in (data.train, data.test)
    )


def test_digits_straddle_where_they_are_said_to():
    data = seam_digits(0, True)
    images, across = data.test.tensors[0][:, 0], data.meta["straddles"]
    assert 0.2 < across.float().mean() < 0.8
    edge = images[:, SIDE - 3 : SIDE + 3, SIDE - 3 : SIDE + 3].abs().mean((1, 2))
    energy = torch.stack(
        [images[:, r : r + SIDE, c : c + SIDE].square().sum((1, 2)) for r in (0, SIDE) for c in (0, SIDE)], 1
    )
    share = energy.amax(1) / energy.sum(1)
    assert share[~across].mean() > share[across].mean() + 0.15 and len(edge) == len(across) and SEAM_DIGIT < SIDE


def test_digits_and_grounds_are_of_their_own_split(monkeypatch):
    levels, labels = {"train": 100.0, "val": 200.0, "test": 300.0}, torch.arange(50) % 10
    digits = {split: (torch.full((50, 1, 8, 8), level), labels) for split, level in levels.items()}
    monkeypatch.setattr(studies, "_digits", lambda seed: digits)
    for draw in (seam_digits, pairs, singles):
        data = draw.__wrapped__(0, True)
        for split, level in levels.items():
            assert ((getattr(data, split).tensors[0].amax((1, 2, 3)) - level).abs() < 20).all(), (draw, split)
    grounds = []
    monkeypatch.setattr(
        studies, "wide_patches", lambda split, *_: (grounds.append(split) or torch.zeros(4, 1, 48, 48), None)
    )
    small_digits.__wrapped__(0, True)
    assert grounds == list(levels)


def test_a_digit_across_a_corner_has_6_pixels_at_least_on_either_side_of_each_seam(monkeypatch):
    corners = []
    monkeypatch.setattr(studies, "_paste", lambda canvas, digits, at: corners.append(at))
    across = seam_digits.__wrapped__(0, True).meta["straddles"]
    of_test = corners[-1]
    assert of_test[across].min() >= SIDE - 14 and of_test[across].max() <= SIDE - 6
    assert (of_test[~across] % SIDE <= SIDE - SEAM_DIGIT).all()


def test_pairs_are_two_digits_in_two_crops_half_of_them_alike():
    data, one = pairs(0, True), singles(0, True)
    assert 0.3 < data.train.tensors[1].float().mean() < 0.7
    for drawn, filled in ((data, 2), (one, 1)):
        blocks = drawn.train.tensors[0][:, 0].unflatten(1, (2, SIDE)).unflatten(3, (2, SIDE)).std((2, 4)).flatten(1)
        assert ((blocks > 0.5).sum(1) == filled).float().mean() > 0.95


def test_digits_of_a_pair_are_of_one_class_where_it_is_said(monkeypatch):
    labels = torch.arange(60) % 6
    digits = (100.0 * (labels + 1))[:, None, None, None].expand(-1, 1, 8, 8), labels
    monkeypatch.setattr(studies, "_digits", lambda seed: dict.fromkeys(("train", "val", "test"), digits))
    images, same = pairs.__wrapped__(0, True).train.tensors
    crops_of = images[:, 0].unflatten(1, (2, SIDE)).unflatten(3, (2, SIDE)).amax((2, 4)).flatten(1)
    two = crops_of.topk(2, dim=1).values
    assert torch.equal((two[:, 0] - two[:, 1]).abs() < 50, same.bool()) and (two > 50).all()


def test_views_of_a_region_have_its_label(monkeypatch):
    def marked(name, count, generator):
        """Four regions of a photograph, each with a bright pixel at the place of its number."""
        first = 4 * list(studies.SOURCES).index(name)
        images = torch.zeros(4 * count, 1, studies.VIEW, studies.VIEW)
        numbers = first + torch.arange(4).repeat_interleave(count)
        images[torch.arange(4 * count), 0, 0, numbers] = 9.0
        return images

    monkeypatch.setattr(studies, "VIEWS", {"train": 3, "val": 2, "test": 2})
    monkeypatch.setattr(studies, "_views_of", marked)
    for images, labels in (
        part.tensors for part in (views.__wrapped__(0, False).train, views.__wrapped__(0, False).test)
    ):
        assert torch.equal(images.flatten(1).argmax(1), labels)


def test_questions_are_words_before_the_answer():
    data = questions(0, True)
    images, labels = data.train.tensors
    asked = images[:, 1].flatten(1)[:, :48]
    kinds = asked[:, 0].long()
    assert ((asked >= 0).sum(1) == torch.where(kinds < 2, 2, 1)).all() and kinds.unique().tolist() == [0, 1, 2, 3]
    model = network(Variant("recompact"), **data.options).eval()
    with torch.no_grad():
        together, alone = model(images[:4]), torch.cat([model(image[None]) for image in images[:4]])
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
        other = images[:1].clone()
        other[0, 1, 0, 0] = (other[0, 1, 0, 0] + 1) % 4
        assert not torch.allclose(model(other), model(images[:1])) and labels.unique().numel() > 8


def test_answers_are_true_of_what_is_drawn(monkeypatch):
    monkeypatch.setattr(studies, "NOISE", 0.0)
    data = questions.__wrapped__(0, True)
    digits, labels = studies._digits(0)["test"]

    def what_is_in(crop):
        """The class and the side of a digit in a crop."""
        rows, columns = (crop != 0).any(1).nonzero()[:, 0], (crop != 0).any(0).nonzero()[:, 0]
        if not len(rows):
            return None
        side = next(side for side in studies.ASKED_SIDES if len(rows) <= side)
        top, left = min(int(rows[0]), SIDE - side), min(int(columns[0]), SIDE - side)
        known = studies._enlarged(digits, side)
        apart = (known - crop[top : top + side, left : left + side]).square().sum((1, 2))
        return int(labels[apart.argmin()]), side

    for image, answer, kind in zip(*data.test.tensors, data.meta["kinds"].tolist()):
        question, canvas = image[1, 0, :2].long().tolist(), image[0]
        crops = [what_is_in(canvas[r : r + SIDE, c : c + SIDE]) for r in (0, SIDE) for c in (0, SIDE)]
        there = [found for found in crops if found]
        assert question[0] == kind and len({c for c, _ in there}) == len({s for _, s in there}) == len(there)
        if kind == 0:
            truth = crops[question[1] - studies.FIRST_CROP][0]
        elif kind == 1:
            truth = 5 + [found and found[0] for found in crops].index(question[1] - studies.FIRST_CLASS)
        elif kind == 2:
            truth = 8 + len(there)
        else:
            truth = max((side, digit) for digit, side in there)[1]
        assert truth == int(answer)


def test_who_reads_the_question_alone_is_the_dummy_baseline():
    data = questions(0, False)
    floor = studies.ANSWERING.dummy_baseline(data)
    assert 0.22 < floor < 0.35, "a fifth of five classes, a quarter of four crops, a third of three counts"
    assert floor > get_task("image-classification").dummy_baseline(data)


def test_the_last_stage_adds_exchange_as_a_copy_and_freezes_the_vit():
    model = network(Variant("falcon"), 10)
    exchange = model.encoder.interact
    with torch.no_grad():
        exchange[0].attention.q_proj.weight.zero_()
    with without_exchange(model):
        assert model.encoder.interact is None
    assert model.encoder.interact is exchange
    assert torch.equal(exchange[0].attention.q_proj.weight, model.encoder.blocks[0].self_attn.q_proj.weight)
    learns = {id(parameter) for parameter in _but_the_vit(model)}
    names = {name for name, parameter in model.named_parameters() if id(parameter) not in learns}
    assert names and all(name.startswith("encoder.tower.") for name in names)


def test_stages_train_what_they_say():
    data = seam_digits(0, True)
    torch.manual_seed(0)
    start = network(Variant("falcon"), **data.options).state_dict()
    done = in_stages(lambda: network(Variant("falcon"), **data.options), TASK, data, SHORT).model.state_dict()
    for name in ("encoder.tower.encoder.layers.0.mlp.fc1.weight", "encoder.registers.registers", "head.weight"):
        assert not torch.equal(done[name], start[name])
    pair = pairs(0, True)
    ends = {
        kind: after_singles(
            lambda kind=kind: network(Variant(kind), **pair.options), TASK, pair, SHORT
        ).model.state_dict()
        for kind in ("falcon", "own crop")
    }
    name = "encoder.tower.encoder.layers.1.mlp.fc1.weight"
    assert torch.equal(ends["falcon"][name], ends["own crop"][name])  # one network that tells single digits


def test_crops_are_of_noise_and_of_photographs_by_half():
    images, labels = crop_digits(0, True).train.tensors
    assert images.shape == (48, 1, SIDE, SIDE) and set(labels.tolist()) <= set(range(10))
    again, _ = crop_digits(1, True).train.tensors
    assert not torch.equal(images, again)
    held = crop_digits(0, True).test.tensors[0]
    assert not any(torch.equal(one, other) for one in images for other in held)
    border = torch.cat([images[:, 0, 0], images[:, 0, -1]], dim=1)
    noisy = (border.std(1) - studies.NOISE).abs() < 0.1
    assert 0.25 < noisy.float().mean() < 0.75


def test_variants_begin_with_one_tower_a_seed_and_shape(monkeypatch):
    began = {}

    def noted(build, *rest, **options):
        model = build()
        began[kind, options["seed"]] = model
        return Fit(model, {})

    weights = {seed: {} for seed in (0, 1)}

    def on_crops(seed, short, hardware, dim, wider, recipe):
        assert short and recipe.precision == "bf16-mixed"
        if wider not in weights[seed]:
            torch.manual_seed(100 + seed)
            weights[seed][wider] = tower_of(network(Variant("recompact", dim, wider), 10).encoder).state_dict()
        return weights[seed][wider]

    monkeypatch.setattr(studies, "_on_crops", on_crops)
    data = small_digits(0, True)
    kinds = {"falcon": 0, "keep": 0, "pooling": MATCHED, "shuffle": SHUFFLED, "registers and abstractor": 0}
    for seed in (0, 1):
        for kind, wider in kinds.items():
            variant = Variant(kind, wider=wider)
            recipe = replace(SHORT, precision="bf16-mixed")
            from_crops(lambda variant=variant: network(variant, 10), TASK, data, recipe, seed=seed, train=noted)
    for (kind, seed), model in began.items():
        own = tower_of(model.encoder).state_dict()
        expected = weights[seed][kinds[kind]]
        assert own.keys() == expected.keys() and all(torch.equal(own[name], expected[name]) for name in own)
    exchange = began["falcon", 0].encoder
    for layer, block in zip(exchange.interact, exchange.blocks):
        pairs_of = zip(layer.attention.parameters(), block.self_attn.parameters(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs_of)


def test_a_tower_learns_in_crops():
    weights = studies._on_crops(0, True, studies.ONE_CPU, DIM, 0, studies.ON_CROPS)
    fresh = tower_of(network(Variant("recompact"), 10).encoder).state_dict()
    assert weights.keys() == fresh.keys()
    again = studies._on_crops(0, True, studies.ONE_CPU, DIM, 0, studies.ON_CROPS)
    assert again is weights, "trained once"


def test_two_thirds_are_without_exchange_and_the_last_third_with_a_frozen_vit(monkeypatch):
    data, seen = seam_digits(0, True), []

    def noted(model, planned, **options):
        for stage in planned:
            with stage.learning(model) as inside:
                tower = [p.requires_grad for name, p in inside.named_parameters() if ".tower." in name]
                seen.append((stage.name, stage.recipe.epochs, inside.encoder.interact is None, any(tower)))
        return [Fit(model, {})]

    monkeypatch.setattr(studies, "run_stages", noted)
    for kind in ("falcon", "recompact"):
        done = in_stages(
            lambda kind=kind: network(Variant(kind), **data.options), TASK, data, replace(RECIPE, epochs=6)
        )
        assert 0 <= done.metrics["accuracy"] <= 1
    assert seen == [
        ("crops", 4, True, True), ("exchange", 2, False, False),
        ("crops", 4, True, True), ("exchange", 2, True, False),
    ]  # fmt: skip


class Told(torch.nn.Module):
    """Answers in the order that it is asked."""

    def __init__(self, answers: torch.Tensor, classes: int):
        super().__init__()
        self.answers, self.classes, self.done = answers, classes, 0
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        rows = self.answers[self.done : self.done + len(images)]
        self.done += len(images)
        return torch.nn.functional.one_hot(rows, self.classes).float()


def test_probes_read_off_what_is_lost_and_what_is_asked():
    data = seam_digits(0, True)
    labels, across = data.test.tensors[1], data.meta["straddles"]
    wrong = torch.where(across, (labels + 1) % 10, labels)
    assert lost_at_seams(Told(wrong, 10), data) == 1 and lost_at_seams(Told(labels, 10), data) == 0
    asked = questions(0, True)
    kinds, right = asked.meta["kinds"], asked.test.tensors[1]
    answers = torch.where(kinds == 1, right, (right + 1) % asked.options["num_classes"])
    found = [accuracy_of(kind, Told(answers, asked.options["num_classes"]), asked) for kind in ("digit", "place")]
    assert found == [0, 1]


def test_seams_are_compared_with_equal_layers():
    """The parameter-matched control has ReAtten's parameters, and the deeper reader is the strongest crop by crop."""
    sizes = {name: count_parameters(network(part, 10)) for name, (_, part) in SEAMS.variants.items()}
    assert sizes["falcon"] == sizes["own"] == sizes["windows"] and sizes["deeper"] > sizes["crops"]
