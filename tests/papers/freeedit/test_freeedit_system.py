"""FreeEdit whole: counts, sampling and guidance, phases, and what trains when."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch.utils.data import DataLoader, Subset

from provenn.core.errors import UserError
from provenn.papers.freeedit import FreeEdit, Guidance, freeedit_sd15, freeedit_small, inspection, parts_of
from provenn.papers.freeedit.model import Reference, draw_noise
from provenn.papers.freeedit.training import cleanest, phases
from provenn.tasks import get_task
from provenn.training import Recipe, fit_stages

TASK = get_task("image-editing")


@pytest.fixture(scope="module")
def data():
    return TASK.load("tiles", seed=701, examples=40)


@pytest.fixture
def system():
    torch.manual_seed(0)
    return freeedit_small(45, 5).eval()


def request(batch=2):
    draw = torch.Generator().manual_seed(0)
    source, reference = (torch.rand(batch, 3, 16, 16, generator=draw) for _ in range(2))
    tokens = torch.tensor([[1, 31, 5, 2, 0], [1, 31, 12, 2, 0]])[:batch]
    return source, tokens, reference, torch.tensor([[9, 0], [0, 0]])[:batch]


def test_parts_of_the_published_layout():
    with torch.device("meta"):
        parts = parts_of(freeedit_sd15())
    assert parts["denoiser"] == 859_532_484 and parts["detail extractor"] == 859_520_964
    assert parts["refer-attention"] == 49_574_080
    assert [round(parts[name] / 1e6, 1) for name in ("image encoder", "text transformer", "VAE")] == [
        303.2,
        123.1,
        83.7,
    ]
    with torch.device("meta"):
        assert parts_of(freeedit_sd15(share=True))["refer-attention"] == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"vocab_size": 45}, "--set tokenizer=FOLDER"),
        ({"size": 100}, "multiple of 64"),
        ({"size": 0}, "multiple of 64"),
    ],
)
def test_the_paper_s_size_says_what_words_and_pictures_it_reads(options, words):
    with torch.device("meta"), pytest.raises(ValueError, match=words):
        freeedit_sd15(**options)


def test_inspection_sees_a_fresh_branch_add_nothing_and_look_somewhere(system):
    names = ("source", "tokens", "reference", "noun")
    x = dict(zip(names, (part[:1] for part in request()), strict=True))
    found = inspection.inspect(system, x)
    shares = [value for name, value in found.items() if "share" in name]
    assert len(shares) == len(system.refer.layers) and all(0 < share.min() <= share.max() < 1 for share in shares)
    branches = {name for name in found if "branch" in name}
    assert len(branches) == len(shares) and all((found[name] == 0).all() for name in branches)
    with torch.no_grad():
        for layer in system.refer.layers.values():
            layer.to_out.weight.normal_()
    assert all((value > 0).all() for name, value in inspection.inspect(system, x).items() if name in branches)
    with pytest.raises(UserError, match="no reference was given"):
        inspection.inspect(system, {**x, "tokens": torch.tensor([[1, 31, 12, 2, 0]])})
    with pytest.raises(UserError, match="FreeEdit has no refer-attention: take the preset freeedit_small"):
        inspection.inspect(freeedit_small(45, 5, mode="none"), x)


def test_zero_channels_of_the_source_leave_the_prior_as_it_was(system):
    system.take_prior()
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([20, 700])
    text = system.nothing(2)
    both = torch.cat([x, torch.randn(2, 3, 16, 16)], dim=1)
    with torch.no_grad():
        torch.testing.assert_close(system.denoiser(both, t, text)[0], system.extractor(x, t, text)[0])


@torch.no_grad()
def test_a_source_without_s_star_is_edited_as_without_refer_attention(system):
    """The second example has no S*, so λ = 0 there, whatever picture lies beside it; the first changes."""
    for layer in system.refer.layers.values():
        layer.to_out.weight.normal_(std=0.1)
    source, tokens, reference, noun = request()
    on, off = (system.edit(source, tokens, reference, noun, seeds=[0, 1], steps=2, scale=scale) for scale in (1, 0))
    torch.testing.assert_close(on[1], off[1])
    assert not on[0].allclose(off[0], atol=1e-3)
    other = system.edit(source, tokens, torch.zeros_like(reference), noun, seeds=[0, 1], steps=2)
    torch.testing.assert_close(other[1], on[1])


@torch.no_grad()
def test_a_picture_does_not_depend_on_its_batch(system):
    source, tokens, reference, noun = request()
    both = system.edit(source, tokens, reference, noun, seeds=[3, 4], steps=2)
    alone = system.edit(source[1:], tokens[1:], reference[1:], noun[1:], seeds=[4], steps=2)
    torch.testing.assert_close(both[1:], alone)


@pytest.mark.parametrize("with_reference", [True, False])
def test_an_empty_batch_gives_an_empty_batch(system, with_reference):
    source, tokens, reference, noun = (part[:0] for part in request())
    given = (reference, noun) if with_reference else ()
    assert system.edit(source, tokens, *given, seeds=[], steps=2).shape == (0, 3, 16, 16)
    assert system.edit(source, tokens, *given).shape == (0, 3, 16, 16)


@pytest.mark.parametrize("sampler", ["ddim", "euler"])
@torch.no_grad()
def test_guidance_of_one_is_none_and_more_moves_the_picture(system, sampler):
    asked = request()
    plain = system.edit(*asked, seeds=[0, 1], steps=2, guidance=Guidance(1, 1), sampler=sampler)
    torch.testing.assert_close(
        plain, system.edit(*asked, seeds=[0, 1], steps=2, guidance=(1 + 1e-9, 1.0), sampler=sampler), atol=1e-4, rtol=0
    )
    assert not plain.allclose(system.edit(*asked, seeds=[0, 1], steps=2, guidance=(3.0, 1.5), sampler=sampler))


@torch.no_grad()
def test_guidance_is_the_published_formula(system):
    """One step against three passes by hand: nothing, the source alone, and all."""
    source, tokens, reference, noun = request()
    seen, told = 2 * source - 1, system.read(tokens, reference, noun)
    nothing = Reference(system.nothing(2), None, told.present)
    s_t, s_i = 3.0, 1.5
    scheduler = system.scheduler()
    scheduler.set_timesteps(1)
    step = scheduler.timesteps[0]
    x, t = draw_noise(seen, [0, 1]), step.expand(2)
    none = system.predict_noise(x, t, torch.zeros_like(seen), nothing, 0)
    image = system.predict_noise(x, t, seen, nothing, 0)
    full = system.predict_noise(x, t, seen, told, None)
    said = none + s_i * (image - none) + s_t * (full - image)
    expected = system.images(scheduler.step(said, step, x).prev_sample)
    got = system.edit(source, tokens, reference, noun, seeds=[0, 1], steps=1, guidance=(s_t, s_i))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_reference_is_read_once_and_that_changes_nothing(system):
    runs = []
    system.extractor.register_forward_hook(lambda *_: runs.append(1))
    asked = request()
    once = system.edit(*asked, seeds=[0, 1], steps=3)
    assert len(runs) == 1
    assert system.edit(*asked, seeds=[0, 1], steps=3, cached=False).equal(once) and len(runs) == 1 + 4


@pytest.mark.parametrize("steps, sampler", [(0, "ddim"), (1001, "ddim"), (5, "heun")])
def test_sampling_out_of_range_is_refused(system, steps, sampler):
    with pytest.raises(UserError, match=r"steps must lie|one of ddim, euler"):
        system.edit(*request(), steps=steps, sampler=sampler)


def test_phases_train_what_they_should(system, data):
    """Names of parameters that moved in each stage, and that the extractor rests after its own."""
    stages = phases(system, TASK, data, Recipe(epochs=1, max_steps=40, batch_size=4, lr=1e-3))
    assert [stage.name for stage in stages] == ["prior", "instruction", "details", "quality"]
    assert len(stages[3].data.train) == len(cleanest(data).train) < 8 and stages[3].recipe.lr == pytest.approx(3e-4)
    learned = []
    for stage in stages:
        with stage.learning(system) as inside:
            learned.append({name.split(".")[0] for name, p in inside.named_parameters() if p.requires_grad})
            with_branch = any(p.requires_grad for p in system.refer.parameters())
            assert with_branch == (stage.name in ("details", "quality"))
            assert inside.phase == {"quality": "details"}.get(stage.name, stage.name)
    assert learned == [{"extractor", "instruction"}, *[{"denoiser", "instruction"}] * 3]
    assert [stage.name for stage in phases(system, TASK, data, Recipe(), joint=True)] == ["prior", "joint", "quality"]


def test_a_frozen_editor_learns_its_branches_alone(data):
    system = freeedit_small(45, 5, freeze=True)
    details = phases(system, TASK, data, Recipe())[2]
    with details.learning(system) as inside:
        names = {name for name, p in inside.named_parameters() if p.requires_grad and name.startswith("denoiser")}
    assert names and all(".processor." in name for name in names)


@pytest.mark.parametrize("freeze", [True, False])
def test_stage_2_leaves_removals_as_they_were_where_the_denoiser_is_frozen_alone(data, freeze):
    system = freeedit_small(45, 5, freeze=freeze).eval()
    source, tokens, *_ = (part[1:] for part in request())
    before = system.edit(source, tokens, steps=2)
    batch = next(iter(DataLoader(data.train, batch_size=4)))
    with phases(system, TASK, data, Recipe())[2].learning(system) as inside:
        optimizer = torch.optim.SGD([p for p in inside.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            inside.training_loss(batch).backward()
            optimizer.step()
    assert all(layer.to_out.weight.any() for layer in system.refer.layers.values())
    assert system.edit(source, tokens, steps=2).equal(before) == freeze


def test_a_training_of_all_phases_ends_with_a_branch_that_learned(data):
    recipe = Recipe(epochs=1, max_steps=12, batch_size=4, lr=1e-3)
    small = replace(data, test=Subset(data.test, range(6)), val=Subset(data.val, range(4)))
    done = fit_stages(lambda: freeedit_small(45, 5), phases, TASK, small, recipe, seed=700)
    model = done.model
    assert isinstance(model, FreeEdit) and any(layer.to_out.weight.any() for layer in model.refer.layers.values())
    assert {"error_inside", "error_outside", "identity", "instruction", "reference_gap"} <= done.metrics.keys()
    copied = deepcopy(model)
    with torch.no_grad():
        torch.testing.assert_close(copied.edit(*request(), steps=1), model.edit(*request(), steps=1))


def test_the_loss_of_each_phase_has_gradients_where_it_learns(system, data):
    batch = next(iter(DataLoader(data.train, batch_size=4)))
    with system.in_phase("instruction"):
        system.training_loss(batch).backward()
    assert all(p.grad is None for p in system.refer.parameters())
    assert system.instruction.qformer.queries.grad is not None
    with pytest.raises(ValueError, match="phase must be one of"), system.in_phase("last"):
        pass


def test_the_cleanest_are_those_of_the_highest_quality_of_each_kind(data):
    kept, whole = ([(int(edit.kind), float(edit.quality)) for edit in part.train] for part in (cleanest(data), data))
    assert {kind for kind, _ in kept} == {kind for kind, _ in whole} == set(range(4))
    for kind in range(4):
        best = sorted((quality for other, quality in whole if other == kind), reverse=True)
        mine = sorted((quality for other, quality in kept if other == kind), reverse=True)
        assert mine == best[: max(1, round(len(best) / 10))]
