"""Scores of all pairs, hosts, losses, counts of the presets, files of the authors' trainers."""

import argparse
import json
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

import provenn
from provenn.core.cost import count_parameters
from provenn.core.errors import UserError
from provenn.data.vocabulary import SPECIAL
from provenn.papers import rcar
from provenn.papers.rcar import RCAR, Ensemble, Matching, Similarity, augment_words, hinge, l2_normalise, mean_table
from provenn.papers.rcar.encoders import RegionEncoder, WordEncoder
from provenn.papers.rcar.official import convert
from provenn.papers.rcar.rivals import loop_over_captions
from provenn.tasks.image_text_retrieval import Pairs
from provenn.testing.seeded import seeded_state

LENGTHS = [7, 3, 5, 1]
KINDS = {
    "base": {}, "rar": {"rar": 3}, "rcr": {"rcr": 2}, "rcar": {"rcr": 1, "rar": 2}, "rcar3": {"rcr": 2, "rar": 3},
    "head": {"host": "alignment"}, "late": {"rcr": 2, "rar": 1},
}  # fmt: skip
HOSTS = [{"host": name} for name in ("max", "sum", "lse", "sgr", "saf")]


def tokens(dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    regions, words = (l2_normalise(torch.randn(*shape, dtype=dtype)) for shape in ((3, 5, 16), (4, 7, 16)))
    return regions, words, torch.arange(7) < torch.tensor(LENGTHS)[:, None]


def made(mode="t2i", **options) -> Similarity:
    torch.manual_seed(1)
    model = Similarity(mode, embed_dim=16, align_dim=8, regions=5, **options).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


@pytest.mark.parametrize("mode", ["t2i", "i2t"])
@pytest.mark.parametrize("kind", KINDS)
def test_all_pairs_are_the_loop_over_captions(mode, kind):
    model, (regions, words, mask) = made(mode, **KINDS[kind]), tokens()
    loop = loop_over_captions(model, regions, words, LENGTHS)
    words = words.masked_fill(~mask[..., None], torch.nan)
    torch.testing.assert_close(model(regions, words, None, mask), loop, rtol=1e-9, atol=1e-9)
    model.numbers = 100  # parts of an image and a few texts
    with torch.no_grad():
        torch.testing.assert_close(model(regions, words, None, mask), loop, rtol=1e-9, atol=1e-9)
    assert loop.std() > 1e-3


@pytest.mark.parametrize("mode", ["t2i", "i2t"])
@pytest.mark.parametrize("options", [*HOSTS, {"host": "saf", "rcr": 1, "rar": 2}, {"host": "lse", "rcr": 1}])
def test_a_pair_is_scored_alike_alone_and_among_others(mode, options):
    model, (regions, words, mask) = made(mode, **options), tokens()
    table = model(regions, words, None, mask)
    for k, length in enumerate(LENGTHS):
        torch.testing.assert_close(model(regions[1:2], words[k : k + 1, :length]), table[1:2, k : k + 1])
    some = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]).bool()
    if options["host"] not in ("sgr", "saf"):
        short = model(regions.masked_fill(~some[..., None], torch.nan), words, some, mask)
        torch.testing.assert_close(short[:1], model(regions[:1, :3], words, None, mask))
    torch.testing.assert_close(model(regions.flip(0), words, None, mask), table.flip(0))


def test_the_hosts_of_scan_aggregate_cosines():
    regions, words, mask = tokens()
    plain = made(host="mean", temperature=9.0)
    cosine = torch.stack([plain(regions, words[:1, :7], None, torch.ones(1, 7, dtype=torch.bool))])
    weights = plain.steps_of(regions[0], words[0])[1][0].weights
    each = torch.nn.functional.cosine_similarity(words[0], weights @ regions[0], dim=-1)
    torch.testing.assert_close(cosine[0, 0, 0], each.mean())
    expected = {"max": each.max(), "sum": each.sum(), "lse": torch.log(torch.exp(6 * each).sum()) / 6}
    for host, value in expected.items():
        torch.testing.assert_close(made(host=host, temperature=9.0)(regions, words, None, mask)[0, 0], value)


def test_zero_output_layers_and_no_steps_are_the_host():
    regions, words, mask = tokens()
    base, fed = made(), made(rcr=3)
    for step in fed.regulate:
        for layer in (step.channels[2], step.sharpness[2]):
            torch.nn.init.zeros_(layer.weight)
            torch.nn.init.zeros_(layer.bias)
    torch.testing.assert_close(fed(regions, words, None, mask), base(regions, words, None, mask))
    assert torch.equal(made(rcr=0)(regions, words, None, mask), base(regions, words, None, mask))


def test_one_step_of_rcar_is_one_of_rar_and_steps_share_nothing():
    one, other = RCAR("t2i", 1, embed_dim=16, align_dim=8), RCAR("t2i", 1, regulators="rar", embed_dim=16, align_dim=8)
    other.load_state_dict(one.state_dict())
    regions, words, mask = tokens(torch.float32)
    assert torch.equal(one.eval()(regions, words, None, mask), other.eval()(regions, words, None, mask))
    two = RCAR("t2i", 2, embed_dim=16, align_dim=8)
    assert two.align[0] is not two.align[1] and not torch.equal(*(part.project.weight for part in two.align))
    assert (len(two.align), len(two.regulate), len(two.aggregate)) == (2, 1, 2)
    assert Similarity(rcr=2, tied=True, embed_dim=16, align_dim=8).regulate[1] is not None
    tied = Similarity(rcr=2, rar=3, tied=True, embed_dim=16, align_dim=8)
    assert tied.align[0] is tied.align[2] and tied.aggregate[0] is tied.aggregate[2]


def test_temperatures_are_the_papers():
    assert (RCAR("t2i").temperature, RCAR("i2t").temperature) == (10.0, 3.0)
    with torch.device("meta"):
        hosts = [rcar.scan(mode=mode).matcher.temperature for mode in ("t2i", "i2t")]
        assert (*hosts, rcar.sgraf().matcher.temperature) == (9.0, 4.0, 9.0)
        assert [rcar.scan(mode=mode).matcher.lse for mode in ("t2i", "i2t")] == [6.0, 5.0]


def test_steps_show_where_words_look():
    model, (regions, words, _) = made(rcr=1, rar=2), tokens()
    score, steps = model.steps_of(regions[0], words[0])
    assert len(steps) == 2 and steps[0].weights.shape == (7, 5)
    torch.testing.assert_close(torch.tensor(score).double(), model(regions, words)[0, 0])
    for step in steps:
        torch.testing.assert_close(step.weights.sum(-1), torch.ones(7).double())
        torch.testing.assert_close(step.aggregation.sum(), torch.tensor(1.0).double())
    assert (steps[0].temperature == 10).all() and (steps[1].temperature != 10).any()
    assert made(rcr=1).steps_of(regions[0], words[0])[1][0].aggregation is None


def test_saf_keeps_the_running_figures_of_a_loop_over_captions():
    model, (regions, words, mask) = made(host="saf").train(), tokens()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(module, torch.nn.BatchNorm1d) and module.num_features > 1:
            module.momentum = 0.0
    loop = made(host="saf").train()
    loop.load_state_dict(model.state_dict())
    for module in loop.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    table = model(regions, words, None, mask)
    columns = [loop(regions, words[k : k + 1, :n]) for k, n in enumerate(LENGTHS)]
    torch.testing.assert_close(table, torch.cat(columns, 1))
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(model.gate.norm, name), getattr(loop.gate.norm, name))


def test_statistics_of_a_training_are_of_all_pairs_with_gradients_or_without():
    (regions, words, mask), kept = tokens(), []
    for gradients in (True, False):
        model = made(host="saf", dropout=0.0).train()
        model.numbers = 100  # parts of an image and a few texts
        with torch.set_grad_enabled(gradients):
            kept.append((model(regions, words, None, mask), model.gate.norm.running_mean.clone()))
    torch.testing.assert_close(kept[0], kept[1])


# Counts: those of the authors' code, less what none of its outputs reaches


COUNTS = {
    1: (14_761_690, 15_319_770, 14_761_690),
    2: (14_893_531, 16_272_091, 15_845_852),
    3: (15_025_372, 17_224_412, 16_930_014),
}
NORM, HEAD = 2 * 1024, 257  # a batch norm behind the last layer of the MLP, and a head that cosines do not use


@pytest.mark.parametrize("steps", COUNTS)
def test_counts_are_those_of_the_authors_code(steps):
    with torch.device("meta"):
        built = [rcar.rar(steps=steps), rcar.rcr(steps=steps), rcar.rcar(steps=steps)]
        for mode in ("t2i", "i2t"):
            assert count_parameters(rcar.rcar(steps=steps, mode=mode)) == COUNTS[steps][2] - NORM
        assert count_parameters(rcar.base()) == 14_367_449 - NORM - HEAD
    found = [count_parameters(model) for model in built]
    assert found == [COUNTS[steps][0] - NORM, COUNTS[steps][1] - NORM - HEAD, COUNTS[steps][2] - NORM]
    parts = built[2].matcher
    assert count_parameters(parts.align[0]) == 262_400 and count_parameters(parts.aggregate[0]) == 131_841
    assert count_parameters(built[1].matcher.regulate[0]) == 689_921
    assert (count_parameters(built[0].image), count_parameters(built[0].text)) == (3_675_648 - NORM, 10_691_544)


def test_presets_have_the_steps_of_the_authors_scripts():
    with torch.device("meta"):
        for mode, expected in (("t2i", ((0, 3), (2, 0), (1, 2))), ("i2t", ((0, 2), (3, 0), (1, 2)))):
            found = [build(mode=mode).matcher for build in (rcar.rar, rcar.rcr, rcar.rcar)]
            assert tuple((each.rcr, each.rar) for each in found) == expected
        coco = provenn.paper("rcar").build("rcar_coco_i2t")
        assert count_parameters(coco) == 15_845_852 - NORM + 861_600
        assert (coco.warm_up, coco.matcher.mode) == (22_125, "i2t")
        whole = rcar.rcar_all()
        assert [part.matcher.mode for part in whole.parts] == ["t2i", "i2t"]


# Losses and batches


def test_the_hinge_by_hand():
    table = torch.tensor([[0.9, 0.8, 0.1], [0.2, 0.5, 0.6], [0.75, 0.0, 0.7]])
    # rows: .1, .3, .25 ; columns: .05, .5, .1
    assert float(hinge(table)) == pytest.approx(0.1 + 0.3 + 0.25 + 0.05 + 0.5 + 0.1)
    more = torch.tensor([[0.5, 0.6, 0.4], [0.0, 0.5, 0.0], [0.0, 0.0, 0.5]])
    assert float(hinge(more, hardest=False)) == pytest.approx(0.3 + 0.1 + 0.3 + 0.1)
    assert float(hinge(more, hardest=True)) == pytest.approx(0.3 + 0.3 + 0.1)
    assert float(hinge(torch.eye(3) * 0.2)) == pytest.approx(0, abs=1e-6)
    assert float(hinge(torch.full((5, 5), 0.3))) == pytest.approx(2 * 5 * 0.2), "where all scores are the same"


def system(**options) -> Matching:
    torch.manual_seed(0)
    similarity = RCAR("t2i", 2, embed_dim=16, align_dim=8, dropout=0.0)
    return Matching(RegionEncoder(12, 16, 8), WordEncoder(20, 16, 6, dropout=0.0), similarity, **options)


def pairs(count: int = 4) -> Pairs:
    generator = torch.Generator().manual_seed(2)
    text = torch.randint(6, 20, (count, 7), generator=generator)
    words = torch.arange(7) < torch.randint(3, 8, (count, 1), generator=generator)
    return Pairs(
        torch.randn(count, 5, 12, generator=generator), torch.ones(count, 5).bool(), text, words, torch.arange(count)
    )


def test_all_negatives_count_in_the_warm_up_and_the_hardest_after():
    model, batch = system(warm_up=2, touched=0.0, margin=0.5), pairs()
    model.train()
    with torch.no_grad():
        table = model(*batch[:1], batch.tokens, batch.regions, batch.words)
        losses = [float(model.training_loss(batch)) for _ in range(3)]
    every, hardest = (float(hinge(table, 0.5, hardest=kind)) for kind in (False, True))
    assert losses == pytest.approx([every, every, hardest]) and every > 1.2 * hardest
    assert int(model.steps_done) == 3
    assert int(model.eval().steps_done) == 3 and float(model.training_loss(batch)) > 0
    assert int(model.steps_done) == 3, "only training counts"
    other = system(warm_up=2)
    other.load_state_dict(model.state_dict())
    assert int(other.steps_done) == 3, "a training that goes on does not warm up again"


def test_every_parameter_learns_but_the_bias_that_a_softmax_takes_out():
    model, batch = system(touched=0.0).train(), pairs()
    model.training_loss(batch).backward()
    still = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 1e-12]
    assert all(name.endswith("score.bias") and "aggregate" in name for name in still), still


def test_words_are_touched_as_often_as_the_authors_touch_them():
    torch.manual_seed(0)
    start, end, mask = 1, 2, SPECIAL.index("<mask>")
    text = torch.full((400, 22), 9)
    text[:, 0], text[:, 21] = start, end
    touched, there = augment_words(text, torch.ones_like(text).bool(), vocab_size=1000, mask=mask, kept=(start, end))
    assert (touched[:, 0] == start).all()
    assert (touched.gather(1, there.sum(1, keepdim=True) - 1) == end).all(), "what is left keeps its order"
    count = 400 * 20
    removed = count + 800 - int(there.sum())
    masked = int(((touched == mask) & there).sum())
    replaced = int(((touched > mask) & (touched != 9) & there).sum())
    assert (removed / count, masked / count, replaced / count) == pytest.approx((0.08, 0.1, 0.02), abs=0.008)
    same, whole = augment_words(text, text > 0, vocab_size=20, mask=mask, kept=(1, 2), share=0.0)
    assert torch.equal(same, text) and whole.all()


def test_a_file_of_words_says_which_of_them_masks(tmp_path, monkeypatch):
    words = ["<pad>", "<start>", "<end>", "<unk>", *(f"w{k}" for k in range(14)), "<mask>", "last"]
    file, seen = tmp_path / "vocab.json", []
    file.write_text(json.dumps({"word2idx": {word: number for number, word in enumerate(words)}}))
    monkeypatch.setattr("provenn.papers.rcar.model.augment_words", lambda *x, **given: seen.append(given) or x)
    for options in ({"vocabulary": str(file)}, {}):
        system(**options).train().training_loss(pairs())
    assert [(given["mask"], given["kept"]) for given in seen] == [(18, (1, 2)), (SPECIAL.index("<mask>"), (1, 2))]
    with pytest.raises(UserError, match=r"gone\.json"):
        system(vocabulary=str(tmp_path / "gone.json")).train().training_loss(pairs())
    preset = rcar.rcar(20, vocabulary=str(file), features=12, embed_dim=16, align_dim=8)
    assert preset.special == (18, 1, 2)


def test_the_second_direction_starts_at_the_last_real_word():
    encoder = WordEncoder(20, 16, 6).double().eval()
    text = torch.randint(6, 20, (3, 7))
    words = torch.arange(7) < torch.tensor([7, 4, 1])[:, None]
    found = encoder(text, words)
    for k, length in enumerate((7, 4, 1)):
        alone = encoder(text[k : k + 1, :length])
        torch.testing.assert_close(found[k, :length], alone[0])
    both = torch.nn.GRU(6, 16, batch_first=True, bidirectional=True).double()
    both.load_state_dict(
        {**encoder.ahead.state_dict(), **{f"{n}_reverse": v for n, v in encoder.back.state_dict().items()}}
    )
    plain = both(encoder.embed(text))[0].unflatten(2, (2, 16)).mean(2)
    torch.testing.assert_close(encoder(text), plain / plain.norm(dim=-1, keepdim=True))


def test_padded_regions_are_in_no_statistics():
    encoder = RegionEncoder(12, 16, 8).double().train()
    x = torch.randn(3, 5, 12, dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor([5, 2, 3])[:, None]
    found = encoder(x.masked_fill(~mask[..., None], 1e6), mask)
    rows = encoder.linear(x[mask]) + encoder.mlp(x[mask])
    torch.testing.assert_close(found[mask], rows / rows.norm(dim=-1, keepdim=True))


def test_an_ensemble_averages_tables():
    one, other = system(), system()
    torch.nn.init.normal_(other.matcher.score.weight)
    both, batch = Ensemble([one, other]).eval(), pairs()
    tables = [part(batch.images, batch.tokens, None, batch.words) for part in both.parts]
    torch.testing.assert_close(both(batch.images, batch.tokens, None, batch.words), (tables[0] + tables[1]) / 2)
    assert not torch.allclose(*tables)
    loss = both.train().training_loss(batch)
    assert loss.isfinite() and int(both.parts[1].steps_done) == 1
    with pytest.raises(UserError, match=r"that have one size, images × texts, got 2×3 and 4×3"):
        mean_table([torch.zeros(4, 3), torch.zeros(2, 3)])


# Files


CASES = json.loads(Path(__file__).with_name("golden.json").read_text())["cases"]


def theirs(number: int) -> dict[str, torch.Tensor]:
    case = CASES[number]
    return seeded_state({name: tuple(shape) for name, shape in case["shapes"].items()}, case["seed"])


def test_checkpoints_load_as_the_trainers_write_them(tmp_path):
    """RCAR's with its Namespace of options; a list of parts, as SGRAF and SCAN have it."""
    opt = argparse.Namespace(attn_type="i2t", self_regulator="coop_rcar", i2t_smooth=3.0, no_imgnorm=False)
    state = {"epoch": 3, "model": OrderedDict(theirs(4)), "best_rsum": 1.0, "opt": opt, "Eiters": 7}
    torch.save(state, tmp_path / "model_best.pth")
    model = provenn.from_official("rcar", tmp_path / "model_best.pth")
    assert (model.matcher.mode, model.matcher.rcr, model.matcher.rar) == ("i2t", 1, 2)
    assert int(model.steps_done) >= model.warm_up
    parts: list[dict[str, torch.Tensor]] = [{}, {}]
    for name, value in theirs(10).items():
        parts[int(name[0])][name[2:]] = value
    opt = argparse.Namespace(cross_attn="t2i", agg_func="LogSumExp", lambda_softmax=9.0, lambda_lse=6.0, bi_gru=True)
    torch.save({"model": parts, "opt": opt}, tmp_path / "scan.pth.tar")
    model = provenn.from_official("rcar", tmp_path / "scan.pth.tar")
    assert (model.matcher.host, model.matcher.lse, model.matcher.temperature) == ("lse", 6.0, 9.0)


def test_what_weights_do_not_say_is_asked_for():
    bare = {name.removeprefix("module."): value for name, value in theirs(0).items()}
    with pytest.raises(UserError, match=r"which side looks at which, .* give mode=t2i or mode=i2t"):
        convert(bare)
    assert convert(bare, mode="i2t")[0] == "rcar_i2t" and convert(bare, preset="rcar_t2i")[1]["mode"] == "t2i"
    with pytest.raises(UserError, match="the checkpoint has attn_type=t2i, got mode=i2t"):
        convert(bare, {"attn_type": "t2i"}, mode="i2t")
    with pytest.raises(UserError, match="t2i_smooth=9"):
        convert(bare, {"attn_type": "t2i", "t2i_smooth": 9.0})
    with pytest.raises(UserError, match="how SCAN aggregates"):
        convert(theirs(10), mode="t2i")
    with pytest.raises(UserError, match="no parameter of RCAR, SGRAF or SCAN"):
        convert({"conv.weight": torch.zeros(1)})
    one_way = {name: value for name, value in bare.items() if "_reverse" not in name}
    with pytest.raises(UserError, match="a GRU of one direction"):
        convert(one_way, mode="t2i")
    with pytest.raises(UserError, match="no_imgnorm"):
        convert(bare, {"attn_type": "t2i", "no_imgnorm": True})
    with pytest.raises(UserError, match="a GRU of several layers"):
        convert({**bare, "txt_enc.rnn.weight_ih_l1": torch.zeros(1)}, mode="t2i")


def test_what_cannot_be_is_refused(untyped):
    for make, words in (
        (lambda: RCAR("t2i", 0), "steps must be at least 1, got 0"),
        (lambda: RCAR("t2i", 2, regulators="both"), "regulators must be rcr, rar or rcar"),
        (lambda: RCAR("i2i"), "mode must be one of t2i, i2t, got 'i2i'"),
        (lambda: Similarity(host="median"), "host must be one of mean, max"),
        (lambda: Similarity(rcr=-1), "rcr must be at least 0, got -1"),
        (lambda: Similarity(lse=0.0), "lse must be a positive number"),
        (lambda: made()(torch.zeros(1, 2, 8), torch.zeros(1, 2, 16)), r"regions must be \(sets, tokens, 16\)"),
        (lambda: made()(*tokens()[:2], None, torch.ones(4, 6).bool()), r"word_mask must be \(4, 7\), got \(4, 6\)"),
        (lambda: made(host="saf")(torch.zeros(1, 4, 16).double(), tokens()[1]), "batch norm is of 5 regions, got 4"),
        (lambda: system(touched=1.5), "touched must be a share"),
        (lambda: Ensemble([]), "at least one system"),
        (lambda: rcar.rcar_small(features=0), "features must be at least 1, got 0"),
        (lambda: rcar.sgraf(host="mean"), "host must be sgr or saf"),
        (lambda: system()(torch.zeros(1, 5, 11), torch.zeros(1, 3).long()), "expected regions of 12 numbers"),
    ):
        with pytest.raises(ValueError, match=words):
            make()
