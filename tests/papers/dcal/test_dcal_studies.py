"""What DCAL's experiments compare: each control does what its name says, and training starts from one network."""

from dataclasses import replace

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from provenn.papers.dcal.experiments import EXPERIMENTS
from provenn.papers.dcal.hosts import host_of
from provenn.papers.dcal.layers import attend_to_pair
from provenn.papers.dcal.model import DCAL
from provenn.papers.dcal.studies import (
    AFTER,
    OBJECT,
    RATES_BEFORE,
    Variant,
    _bank,
    background_share,
    cameras,
    convolutional,
    embedder,
    gap,
    network,
    objects,
    other_regions,
    part_entropy,
    regions,
    trained_anew,
    trained_before,
    tuned,
    with_options,
)
from provenn.tasks import TaskData, get_task
from provenn.training import Fit, Hardware

TASK = get_task("fine-grained")
SHORT = replace(AFTER, epochs=1, max_steps=2, random_erasing=0.0)


@pytest.fixture(scope="module")
def data():
    return regions(0, True)


def made(kind: str, **options) -> torch.nn.Module:
    torch.manual_seed(0)
    model = network(with_options(kind, 64, **options), 64).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, dtype=parameter.dtype))
    return model


def images(count: int = 4) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_the_networks_are_of_about_one_size():
    count = {k: sum(p.numel() for p in network(Variant(k), 64).parameters()) for k in ("plain", "cnn", "dcal", "parts")}
    block = sum(p.numel() for p in network(with_options("plain", layers=5), 64).parameters())
    assert abs(count["cnn"] / count["plain"] - 1) < 0.2 and abs(block / count["dcal"] - 1) < 0.02
    assert count["parts"] == pytest.approx(count["plain"], abs=4)


def test_plain_has_the_plain_loss():
    model, labels = made("plain").train(), torch.arange(4)
    torch.manual_seed(0)
    total = model.training_loss((images(), labels))
    torch.manual_seed(0)
    expected = torch.nn.functional.cross_entropy(model.backbone.head(model.streams(images(), labels).sa), labels)
    torch.testing.assert_close(total, expected)


def test_local_attention_does_not_see_what_was_not_chosen():
    local, whole = made("local"), made("glca")
    whole.load_state_dict(local.state_dict())
    x = host_of(local.backbone).embed(images())
    chosen = torch.arange(3, 10).expand(4, -1)
    changed = x.clone()
    changed[:, 40] = changed[:, 40].flip(-1)
    assert torch.equal(local._attend_locally(x, chosen, 1), local._attend_locally(changed, chosen, 1))
    assert not torch.allclose(whole._attend_locally(x, chosen, 1), whole._attend_locally(changed, chosen, 1))


def test_random_queries_are_the_same_at_each_evaluation_and_others_in_training():
    model = made("random", depth=2)
    assert torch.equal(model.streams(images()).chosen, model.streams(images()).chosen)
    assert torch.equal(model(images()), model(images()))
    rollout = made("glca", depth=2)
    rollout.load_state_dict(model.state_dict())
    assert not torch.allclose(rollout(images()), model(images()))
    model.train()
    assert not torch.equal(
        model.streams(images(), torch.arange(4)).chosen, model.streams(images(), torch.arange(4)).chosen
    )


def test_noise_has_the_batchs_mean_and_deviation_and_no_gradient():
    model = made("noise")
    k = torch.randn(8, 2, 65, 32, dtype=torch.float64, requires_grad=True) * 3 + 1
    k2, _ = model.partner_keys(torch.arange(8))(k, k)
    assert not k2.requires_grad and k2.mean().item() == pytest.approx(1, abs=0.1)
    assert k2.std().item() == pytest.approx(3, rel=0.1)


def test_partners_of_the_same_class_come_from_its_bank():
    model, labels = made("same").train(), torch.tensor([5, 0, 5])
    model.bank = torch.zeros(64, 1, 3, 32, 32, dtype=torch.float64)
    model.bank[5], model.bank[0] = images(1), images(2)[1:]
    for block in model.backbone.blocks:
        block.drop.p = 0.0
    x = images(3)
    found = model.streams(x, labels).pwca
    host = host_of(model.backbone)
    both = host.embed(torch.cat([x, model.bank[labels, 0]]))
    # Batch norms see the partners apart from the batch.
    both = torch.cat([host.embed(x), host.embed(model.bank[labels, 0])])
    order = torch.tensor([3, 4, 5, 0, 1, 2])
    for block in host.blocks:
        both = attend_to_pair(block, both, lambda k, v: (k[order], v[order]))
    torch.testing.assert_close(found, host.norm(both[:3])[:, 0])


def test_stale_partners_stay_embeddings_in_every_block_and_the_stream_goes_on():
    """Each block's output reaches the next; the partner's keys are those of the tokens before the first."""
    model = made("stale").eval()
    host, order = host_of(model.backbone), torch.tensor([1, 2, 3, 0])
    x = first = host.embed(images())
    for block in host.blocks:
        _, k, v = block.project(block.norm1(first[order]))
        x = attend_to_pair(block, x, lambda *_, k=k, v=v: (k, v))
    found = model._attend_pairs(host, first, order)
    torch.testing.assert_close(found, x)
    assert not torch.allclose(found, DCAL._attend_pairs(model, host, first, order))


def test_the_unscaled_rate_is_not_tuned_away():
    """Where a grid is tuned, its best rate undoes the factor: both are trained at their own rate, 32 apart."""
    study = EXPERIMENTS["unscaled_rate"].study
    assert not study.lrs
    used = []

    class Stop(Exception):
        pass

    def stop(begin, task, data, recipe, **options):
        used.append(recipe.lr)
        raise Stop

    for name in ("both", "unscaled"):
        variant = study.variants[name][1]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("provenn.papers.dcal.studies.trained_before", lambda *_: {})
            patch.setattr("provenn.papers.dcal.studies.fit", stop)
            with pytest.raises(Stop):
                tuned(lambda variant=variant: network(variant, 64), TASK, regions(700, True), study.recipe)
    assert used[1] == pytest.approx(32 * used[0])


def test_a_search_starts_anew_with_a_neck_and_in_the_way_of_its_variant(monkeypatch):
    monkeypatch.setattr("provenn.papers.dcal.studies.trained_before", None)  # a call would raise
    task, given, ended = get_task("re-identification"), cameras(700, True), []
    for name, (_, variant) in EXPERIMENTS["cameras_narrow"].study.variants.items():
        torch.manual_seed(0)
        recipe = replace(SHORT, batch_size=4, max_steps=None, epochs=5)
        monkeypatch.setattr(
            "provenn.papers.dcal.studies.fit",
            lambda build, task, data, recipe, **_: ended.append((name, recipe.epochs)) or Fit(build(), {}),  # noqa: B023
        )
        model = trained_anew(lambda variant=variant: embedder(variant, **given.options), task, given, recipe).model
        necks = [module for module in model.modules() if type(module) is torch.nn.BatchNorm1d]
        assert necks and not any(neck.bias.requires_grad for neck in necks)
        seen = model.eval()(torch.randn(3, 3, 64, 32))
        for neck in necks:
            neck.running_mean.fill_(1.0)
        moved = model(torch.randn(3, 3, 64, 32))
        assert seen.logits.shape == (3, len(given.train)) and seen.features.shape == seen.embeddings.shape
        assert not torch.allclose(moved.features, moved.embeddings)
    assert ended == [("plain", 5), ("equal", 11), ("both", 5), ("cnn", 5), ("parts", 5)]


def test_an_epoch_of_a_search_goes_over_its_identities_eight_times():
    once = get_task("re-identification").load("cameras", seed=701).train
    assert len(cameras(701, False).train) == 8 * len(once) == 480


def test_part_selection_takes_one_patch_of_each_head():
    model = made("parts")
    seen = []
    model.backbone.blocks[-1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    assert model(images()).shape == (4, 64)
    assert seen[0].shape == (4, 1 + 2, 64)


def test_other_regions_are_other_classes():
    before, after = other_regions(0, False), regions(0, False)
    assert len(before.train) == 2 * len(after.train) and before.options["num_classes"] == 128
    assert set(before.train.labels.tolist()) == set(range(128))
    views = {view.numpy().tobytes() for view in after.test.images}
    assert not views & {view.numpy().tobytes() for view in before.train.images}
    splits = [{view.numpy().tobytes() for view in part.images} for part in (before.train, before.val, before.test)]
    assert not splits[0] & splits[1] and not splits[0] & splits[2] and not splits[1] & splits[2]


def test_all_ways_start_from_one_network(data):
    weights = trained_before("plain", 64, 0, True, Hardware())
    for kind, longer in (("plain", 1.0), ("dcal", 1.0), ("same", 1.0), ("plain", 2.0)):
        variant = Variant(kind, 64, longer, faster=1e-30)
        model = tuned(lambda variant=variant: network(variant, **data.options), TASK, data, SHORT, seed=0).model
        for name in ("backbone.blocks.2.mlp.fc1.weight", "backbone.pos_embed"):
            assert torch.equal(model.state_dict()[name], weights[name])


def test_the_training_before_has_the_rate_of_its_kind_and_width(monkeypatch):
    used = {}

    def noted(build, task, given, recipe, **_):
        model = build()
        used[model.variant.kind, model.variant.dim] = given.name, recipe.lr
        return Fit(model, {})

    monkeypatch.setattr("provenn.papers.dcal.studies.fit", noted)
    trained_before.cache_clear()
    for kind, dim in RATES_BEFORE:
        trained_before(kind, dim, 701, True, Hardware())
    trained_before.cache_clear()
    assert used == {start: ("other regions", lr) for start, lr in RATES_BEFORE.items()}
    assert len(set(RATES_BEFORE.values())) > 1


def test_each_study_has_a_rate_for_what_its_variants_start_from():
    studies = [each.study for each in EXPERIMENTS.values() if hasattr(each, "study")]
    parts = [part for study in studies if study.trained is tuned for part in study.variants.values()]
    assert len(parts) > 80
    for label, variant in parts:
        assert ("cnn" if variant.kind == "cnn" else "plain", variant.dim) in RATES_BEFORE, label


def test_partners_of_the_same_class_are_training_images_of_it():
    colours = torch.tensor([0, 1, 2, 0, 1, 2, 2])
    train = TensorDataset(colours.float()[:, None, None, None].expand(-1, 3, 2, 2), colours)
    other = TensorDataset(torch.full((3, 3, 2, 2), 9.0), torch.arange(3))
    bank = _bank(TaskData("colours", train, other, other, "", options={"num_classes": 3}))
    assert bank.shape == (3, 2, 3, 2, 2)
    assert torch.equal(bank, torch.arange(3.0)[:, None, None, None, None].expand_as(bank))


def test_the_gap_is_what_training_images_have_more():
    """Right about bright images, and only those are trained on."""

    class Bright(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.one_hot((x.mean((1, 2, 3)) > 0).long(), 2).float()

    sets = [TensorDataset(torch.full((4, 3, 2, 2), value), torch.ones(4, dtype=torch.long)) for value in (1.0, -1.0)]
    assert gap(Bright(), TaskData("bright", sets[0], sets[1], sets[1], "")) == 1


def test_a_variant_changes_its_own_recipe_alone(data, monkeypatch):
    used = []

    class Stop(Exception):
        pass

    def stop(build, task, data, recipe, **_):
        used.append(recipe)
        raise Stop

    monkeypatch.setattr("provenn.papers.dcal.studies.trained_before", lambda *_: {})
    monkeypatch.setattr("provenn.papers.dcal.studies.fit", stop)
    for variant in (Variant("bare", 64), Variant("bare", 64, 1.85, 32.0, 0.8)):
        with pytest.raises(Stop):
            tuned(lambda variant=variant: network(variant, **data.options), TASK, data, AFTER)
    assert used[0] == AFTER
    assert used[1] == replace(AFTER, epochs=44, lr=32 * AFTER.lr, mixup=0.8, cutmix=0.8)


def test_convolutional_networks_serve_both_tasks():
    sizes = {"num_classes": 7, "image": (32, 32)}
    assert convolutional(64, sizes, "fgvc")(images().float()).shape == (4, 7)
    seen = convolutional(64, sizes, "reid").eval()(images().float())
    assert seen.embeddings.shape == (4, 96) and seen.logits.shape == (4, 7)


def test_objects_stand_where_they_are_noted():
    data = objects(0, True)
    again = objects.__wrapped__(0, True)
    assert data.fingerprint == again.fingerprint != objects(1, True).fingerprint
    pictures, _ = data.test.tensors
    for picture, (top, left) in zip(pictures, data.meta["corners"]):
        inside = torch.zeros(32, 32, dtype=torch.bool)
        inside[top : top + OBJECT, left : left + OBJECT] = True
        assert picture[0][inside].std() > picture[0][~inside].std()


def test_shares_of_the_rollout_are_read_off_objects():
    """Attention on one quarter alone is all on the object and of no entropy; even attention of the object's area."""
    data = objects(0, True)

    class Told(torch.nn.Module):
        def __init__(self, kind: str):
            super().__init__()
            self.kind, self.done = kind, 0

        def streams(self, images: torch.Tensor, show: bool = False):
            row = torch.zeros(len(images), 8, 8)
            for place in range(len(images)):
                top, left = (corner // 4 for corner in data.meta["corners"][self.done + place])
                row[place, top : top + (2 if self.kind == "quarter" else 4), left : left + 2] = 1
            self.done += len(images)
            row = torch.ones_like(row) if self.kind == "even" else row
            return type("S", (), {"row": row.flatten(1)})

    assert background_share(Told("even"), data) == pytest.approx(0.75)
    assert part_entropy(Told("even"), data) == pytest.approx(1.0, abs=1e-6)
    assert background_share(Told("quarter"), data) == pytest.approx(0, abs=1e-6)
    assert part_entropy(Told("quarter"), data) == pytest.approx(0, abs=1e-6)
    assert part_entropy(Told("half"), data) == pytest.approx(0.5, abs=1e-6)
    assert len(list(DataLoader(data.test, 16))) == 2
