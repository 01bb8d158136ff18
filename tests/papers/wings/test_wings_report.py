"""The forgetting report of Wings, its curves with the learners' matrices, and the router's memory."""

import csv
import json

import pytest
import torch
from torch.nn import functional as F

from provenn import catalog
from provenn.core.errors import UserError
from provenn.nn.decoder import Decoder
from provenn.nn.positions import turn
from provenn.nn.vision_language import small_vision_language_model
from provenn.papers.wings import attach, attention_laws, laws_with_learners, shift_of, wings_small
from provenn.papers.wings.adapter import learner_parameters, wings_blocks
from provenn.papers.wings.bench import divide_talks, forgetting_report, measure_model, router_memory, runs, sweep
from provenn.papers.wings.laws import learner_weights
from provenn.tasks import get_task
from provenn.tasks.base import IGNORED
from provenn.tasks.multimodal_chat import Talks
from provenn.training import weights
from provenn.training.recipes import recipe_of

TASK = get_task("multimodal-chat")
IMAGE, PICTURE = 5, 4  # the placeholder, and the tokens of a picture of 16 pixels


def stirred(model, seed: int = 3):
    """The same model with drawn learners: fresh ones give zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in learner_parameters(model).values():
        parameter.data.normal_(std=0.3, generator=generator)
    return model.eval()


def small(**options):
    torch.manual_seed(0)
    sizes = {"dim": 16, "layers": 3, "heads": 2, "image_size": 16, "rank": 2, "max_len": 64}
    return stirred(wings_small(12, IMAGE, **{**sizes, **options}))


def a_text_with_an_image() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.tensor([[1, 6, 7, *[IMAGE] * PICTURE, 8, 9], [1, *[IMAGE] * PICTURE, 6, 7, 10, 11]])
    return tokens, torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


# Curves with the learners' matrices


@pytest.mark.parametrize(
    "options", [{}, {"system_length": 1}, {"query": "parallel"}, {"routing": "fixed"}, {"as_released": True}]
)
def test_matrices_of_learners_give_what_the_learners_give(options):
    """W_o of (weights × values) is the learner's own answer; with one head, whose mean is itself."""
    torch.manual_seed(0)
    model = small(heads=1, layers=2, **options).model
    tokens, images = a_text_with_an_image()
    with torch.no_grad():
        reading = model.read(tokens, images, layers=True)
        for layer, block in enumerate(wings_blocks(model)):
            found = learner_weights(model, reading, layer)
            x, context = reading.layers[layer], reading.context
            asking = x if options.get("query") == "parallel" else x + block.attention(block.norm1(x), context)[0]
            inputs = context.inputs  # the learners look at what the first layer reads
            for learner, matrix, stream, causal in (
                (block.visual, found.visual, context.shared.visual, False),
                (block.textual, found.textual, context.shared.textual, True),
            ):
                values = inputs + learner.value(inputs)
                actual, _ = block._look(learner, asking, context, stream, None, causal)
                assert torch.allclose(learner.out(matrix @ values), actual, atol=1e-6)
            sums = found.textual.sum(dim=-1)
            assert torch.allclose(found.visual.sum(dim=-1), torch.ones(2, 9), atol=1e-5)
            assert ((sums - 1).abs().lt(1e-5) | (sums == 0)).all()
            assert not found.visual[tokens.ne(IMAGE)[:, None].expand_as(found.visual)].any()
            assert not found.textual[tokens.eq(IMAGE)[:, None].expand_as(found.textual)].any()
            weights_ = block.router(model.decoder.attention_weights(reading, layer)) if block.router else None
            expected = torch.full((2, 9, 2), 0.5) if weights_ is None else weights_
            assert torch.equal(found.router, expected)


def test_matrices_of_several_heads_are_their_mean():
    model = small(layers=1).model
    tokens, images = a_text_with_an_image()
    with torch.no_grad():
        reading = model.read(tokens, images, layers=True)
        (block,), x, context = wings_blocks(model), reading.layers[0], reading.context
        asking = x + block.attention(block.norm1(x), context)[0]
        q = turn(
            (asking + block.visual.query(asking)).unflatten(-1, (2, 8)).transpose(1, 2), *context.angles
        )  # all tokens keep their positions
        features = context.inputs + block.visual.key(context.inputs)
        k = turn(features.unflatten(-1, (2, 8)).transpose(1, 2), *context.angles)
        scores = (q @ k.mT / 8**0.5).masked_fill(tokens[:, None, None].ne(IMAGE), -torch.inf)
        assert torch.allclose(learner_weights(model, reading, 0).visual, scores.softmax(-1).mean(1), atol=1e-6)


@pytest.mark.parametrize(("options", "factor"), [({}, 1), ({"as_released": True}, 2)])
def test_curves_with_learners_are_those_of_the_sum_of_matrices(options, factor):
    model = small(**options).model
    tokens, images = a_text_with_an_image()
    laws = laws_with_learners(model, tokens, images)
    with torch.no_grad():
        reading = model.read(tokens, images, layers=True)
        for layer in range(3):
            found = learner_weights(model, reading, layer)
            whole = model.decoder.attention_weights(reading, layer).mean(dim=1)
            whole = (
                whole + factor * found.router[..., :1] * found.visual + factor * found.router[..., 1:] * found.textual
            )
            for row, (start, end) in enumerate(((3, 7), (1, 5))):
                parts = (whole[row, :, :start], whole[row, :, start:end], whole[row, :, end:])
                shares = torch.stack([part.sum() for part in parts]) / whole[row].sum()
                actual = torch.stack([curve[layer, row] for curve in laws])
                assert torch.allclose(actual, shares, atol=1e-5)
    main = attention_laws(model, tokens, images)
    assert (laws.image - main.image).abs().min() > 1e-3  # the learners' matrices change every curve


def test_layers_without_learners_keep_their_curves():
    torch.manual_seed(0)
    system = small_vision_language_model(12, IMAGE, image_size=16, dim=16, layers=3, heads=2).eval()
    stirred(attach(system.model, rank=2, max_len=64, layers=(1,), learners="visual"))
    tokens, images = a_text_with_an_image()
    images = images[..., :16, :16]
    main, whole = attention_laws(system.model, tokens, images), laws_with_learners(system.model, tokens, images)
    for layer in (0, 2):
        assert torch.allclose(whole.image[layer], main.image[layer], atol=1e-6)
    # A visual learner alone has the weight 1: as much attention again, and all of it to the image.
    assert torch.allclose(whole.image[1], (main.image[1] + 1) / 2, atol=1e-6)
    assert torch.allclose(whole.before[1], main.before[1] / 2, atol=1e-6)


# The report


@pytest.fixture(scope="module")
def talks(tmp_path_factory) -> Talks:
    """Questions about scenes, some of them told in words and not shown."""
    data = TASK.load("composed", examples=20, text_share=0.5)
    kept = [
        talk for seen in (False, True) for talk in [t for t in data.test.conversations if bool(t.images) is seen][:6]
    ]
    return Talks(kept, data.meta, data.test.pictures)


def system_for(talks: Talks, **options):
    torch.manual_seed(0)
    tokens = talks.chat_tokens
    sizes = {"dim": 16, "layers": 3, "heads": 2, "rank": 2}
    return stirred(wings_small(len(tokens), tokens.image, image_size=64, **{**sizes, **options}))


def plain_for(talks: Talks, seed: int):
    torch.manual_seed(seed)
    tokens = talks.chat_tokens
    return small_vision_language_model(len(tokens), tokens.image, dim=16, layers=3, heads=2).eval()


def perplexity(model, talks: Talks, numbers: list[int]) -> float:
    """exp of the mean loss of the tokens of answers, conversation by conversation."""
    nats, count = 0.0, 0
    for number in numbers:
        images, tokens, targets = talks[number]
        stacked = torch.stack(images) if images else None
        logits = model(tokens[None], stacked, mask=torch.ones_like(tokens[None], dtype=torch.bool))[0]
        nats += F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum").item()
        count += int((targets != IGNORED).sum())
    return float(torch.tensor(nats / count).exp())


def test_a_report_has_the_scores_of_texts_and_of_images_and_the_attention_of_each(talks):
    original, plain, wings = plain_for(talks, 1), plain_for(talks, 2), system_for(talks)
    report = forgetting_report(original, {"plain tuning": plain, "Wings": wings}, talks, curves=4)
    said = [n for n, talk in enumerate(talks.conversations) if not talk.images]
    shown = [n for n, talk in enumerate(talks.conversations) if talk.images]
    with torch.no_grad():
        for scores, model in zip((report.original, *report.tuned), (original, plain, wings)):
            assert scores.texts["perplexity"] == pytest.approx(perplexity(model, talks, said), rel=1e-4)
        assert not report.original.pictures and report.original.main is None
        for scores, model in zip(report.tuned, (plain, wings)):
            assert scores.pictures["perplexity"] == pytest.approx(perplexity(model, talks, shown), rel=1e-4)
            assert scores.counts == (6, 6, 4)
            # The curves of the first four, each spread by hand.
            laws, whole, rho = [], [], []
            for number in shown[:4]:
                images, tokens, _ = talks[number]
                patches = 64  # of 8 pixels, in a picture of 64
                spread = tokens.repeat_interleave(torch.where(tokens == talks.chat_tokens.image, patches, 1))[None]
                laws.append(attention_laws(model.model, spread, torch.stack(images)))
                if model is wings:
                    whole.append(laws_with_learners(model.model, spread, torch.stack(images)))
                    reading = model.model.read(spread, torch.stack(images), layers=True)
                    weights_ = [
                        block.router(model.decoder.attention_weights(reading, layer))[0].mean(dim=0)
                        for layer, block in enumerate(wings_blocks(model))
                    ]
                    rho.append(torch.stack(weights_))
            for curves, each in ((scores.main, laws), (scores.with_learners, whole)):
                if not each:
                    assert curves is None and scores.router == []
                    continue
                for name in ("before", "image", "after"):
                    mean = torch.stack([getattr(law, name)[:, 0] for law in each]).mean(dim=0)
                    assert getattr(curves, name) == pytest.approx(mean.tolist(), rel=1e-4)
                assert curves.r == pytest.approx(sum(1 - shift_of(law).item() for law in each) / 4, abs=1e-3)
            if model is wings:
                expected = torch.stack(rho).mean(dim=0)
                assert torch.allclose(torch.tensor(scores.router), expected, atol=1e-5)


def test_a_report_prints_and_saves_each_of_its_numbers(talks, tmp_path):
    report = forgetting_report(
        plain_for(talks, 1), {"plain": plain_for(talks, 2), "Wings": system_for(talks)}, talks, curves=2
    )
    texts, pictures, r, plain, wings = report.tables()
    assert texts.columns == ["metric", "original", "plain", "plain − original", "Wings", "Wings − original"]
    metric, before, after, change, *_ = texts.rows[0]
    assert metric == "perplexity" and before == f"{report.original.texts['perplexity']:.4g}"
    assert after == f"{report.tuned[0].texts['perplexity']:.4g}"
    assert change == f"{report.tuned[0].texts['perplexity'] - report.original.texts['perplexity']:.4g}"
    assert pictures.columns == ["metric", "plain", "Wings"]
    assert [row[0] for row in r.rows] == ["plain", "Wings"] and r.rows[0][2] == "" and r.rows[1][2] != ""
    assert [len(table.rows) for table in (plain, wings)] == [3, 3]
    assert wings.columns[-2:] == ["visual weight", "textual weight"] and "visual weight" not in plain.columns
    assert all(table.caption in str(report) for table in report.tables())
    numbers, picture = report.save(tmp_path / "report")
    assert picture.read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader(numbers.open()))
    read = {(row["model"], row["part"], row["layer"], row["quantity"]): float(row["value"]) for row in rows}
    assert len(read) == len(rows)
    shown = report.tuned[1]
    assert read["Wings", "with the learners", "2", "after"] == pytest.approx(shown.with_learners.after[1])
    assert read["Wings", "router", "3", "visual weight"] == pytest.approx(shown.router[2][0])
    assert read["original", "texts", "", "perplexity"] == pytest.approx(report.original.texts["perplexity"])
    titles = [axes.get_title().partition("\n")[0] for axes in report.picture().axes]
    assert titles == ["plain", "Wings", "Wings, with the learners"]


def test_texts_alone_and_a_bare_decoder_make_a_report(talks, tmp_path):
    said, shown = divide_talks(talks)
    assert not any(talk.images for talk in said.conversations) and all(talk.images for talk in shown.conversations)
    system = system_for(talks)
    torch.manual_seed(1)
    decoder = Decoder(len(talks.chat_tokens), 16, 1, 2).train()
    report = forgetting_report(decoder, {"Wings": system}, said)
    assert decoder.training and not system.training  # as they were
    numbers = list(range(len(said)))
    with torch.no_grad():
        expected = perplexity(lambda tokens, images, mask: decoder(tokens, mask=mask), said, numbers)
    assert report.original.texts["perplexity"] == pytest.approx(expected, rel=1e-4)
    assert len(report.tables()) == 1 and report.picture() is None
    assert [file.name for file in report.save(tmp_path)] == ["forgetting.csv"]
    with pytest.raises(UserError, match="no conversation without an image"):
        forgetting_report(decoder, {"Wings": system}, shown)
    # Texts of one source and images of another.
    both = measure_model("Wings", system, said, shown, curves=1)
    assert both.counts == (6, 6, 1) and both.pictures


def test_questions_are_scored_by_their_own_metric(talks):
    task = get_task("visual-question-answering")
    data = task.load("composed", examples=20, text_share=0.5)
    kept = [q for seen in (False, True) for q in [t for t in data.test.conversations if bool(t.images) is seen][:4]]
    asked = Talks(kept, data.meta, data.test.pictures)
    system = system_for(asked)
    scores = measure_model("Wings", system, asked, task=task.name, curves=1)
    said, shown = divide_talks(asked)
    assert scores.texts == task.evaluate(system, said) and scores.pictures == task.evaluate(system, shown)
    assert "accuracy" in scores.texts


def test_the_command_line_makes_the_report_of_trained_weights(talks, tmp_path):
    tokens = talks.chat_tokens
    models = {"chat": {"learners": "textual"}, "both": {}}
    for name, options in models.items():
        chosen = {"dim": 16, "layers": 2, "heads": 2, "rank": 2, "image_size": 64, **options}
        model = stirred(wings_small(len(tokens), tokens.image, **chosen))
        known = {"vocab_size": len(tokens), "image_token": tokens.image, **chosen}
        label = weights.Label("wings", "wings_small", "multimodal-chat", known, talks.meta)
        (tmp_path / name).mkdir()
        weights.save(model, tmp_path / name / weights.FILE, label)
    wanted = sweep(
        original=tmp_path / "chat", tuned=f"{tmp_path / 'chat'},{tmp_path / 'both'}", text_share=0.5, curves=1,
        budget="smoke",
    )  # fmt: skip
    assert [point.label for point in wanted.points] == ["original", "chat", "both"]
    rows = wanted.run(tmp_path / "out")
    table, *_ = wanted.tables(rows)
    assert table.columns[:2] == ["metric", "original"] and table.columns[-2] == "both"
    assert table.rows[0][3] == "0" and table.rows[0][5] != "0"  # a model forgets nothing of itself
    original, same, both = (row["scores"] for row in rows)
    assert original["texts"] == same["texts"] and original["pictures"] == {} and same["router"][0] == [0.0, 1.0]
    assert both["counts"] == [8, 8, 1]
    assert wanted.picture(rows) is not None
    loaded = runs.load_model(tmp_path / "both")
    assert torch.equal(loaded.decoder.embed.weight, model.decoder.embed.weight)
    asked = sweep(
        original=tmp_path / "chat", tuned=str(tmp_path / "both"), text_share=0.5, curves=1, budget="smoke",
        task="visual-question-answering",
    )  # fmt: skip
    assert "accuracy" in asked.points[0].measure()["scores"]["texts"]
    said = [{"question": f"what is {number} ?", "answer": "red"} for number in range(3)]
    (tmp_path / "said.json").write_text(json.dumps(said))
    own = sweep(
        original=tmp_path / "chat", tuned=str(tmp_path / "both"), texts=str(tmp_path / "said.json"), curves=1,
        budget="smoke",
    )  # fmt: skip
    assert own.points[1].measure()["scores"]["counts"] == (3, 8, 1)  # all of the file, and images of the scenes
    with pytest.raises(UserError, match="image-classification has no conversations"):
        sweep(original=tmp_path / "chat", tuned=str(tmp_path / "both"), task="image-classification")
    for options, words in (({"tuned": "x"}, "both"), ({"original": tmp_path, "tuned": "x"}, "holds no")):
        with pytest.raises(UserError, match=words):
            sweep(**options)


# The router's memory


def test_the_fused_router_holds_no_number_for_each_pair_of_tokens():
    """Not even a byte for each pair: a mask of tokens × tokens would have as many."""
    tokens, sizes = 2048, {"dim": 16, "heads": 2, "batch": 1}
    row = router_memory.measure_router(tokens, **sizes)
    for held in row["bytes"].values():
        assert held["fused"] < tokens**2 < 2 * 4 * tokens**2 <= held["explicit"]
        assert held["alone"] < held["fused"]
    again = router_memory.measure_router(tokens, **sizes)
    assert again == row


def test_the_ways_to_the_router_give_the_same():
    calls = router_memory.router_calls(64, dim=16, heads=2, batch=2)
    with torch.no_grad():
        (alone, none), (fused, rho), (explicit, expected) = (calls[way]() for way in ("alone", "fused", "explicit"))
    assert none is None and torch.allclose(alone, fused, atol=1e-6) and torch.allclose(alone, explicit, atol=1e-6)
    assert torch.allclose(rho, expected, atol=1e-6) and rho.shape == (2, 64, 2)


def test_the_sweep_of_memory_has_a_row_for_each_length_and_says_what_did_not_fit(tmp_path):
    wanted = sweep(length="32,64", dim=16, heads=2)
    rows = wanted.run(tmp_path)
    for table, name in zip(wanted.tables(rows), ("forward", "training")):
        held = rows[1]["bytes"][name]
        assert [row[0] for row in table.rows] == [32, 64]
        assert table.rows[1][1:4] == [f"{held[way] / 1e6:.2f}" for way in ("alone", "fused", "explicit")]
        assert table.rows[1][4] == f"{held['explicit'] / held['fused']:.2f}"
    assert wanted.picture(rows) is not None and wanted.picture(rows[:1]) is None
    full = [rows[0], {**rows[1], "status": "out of memory"}]
    assert wanted.tables(full)[0].rows[1][1] == "out of memory"
    json.dumps(rows)
    for options, words in (
        ({"length": "2"}, "--length"),
        ({"length": "a"}, "--length"),
        ({"heads": 3}, "--heads"),
        ({"batch": 0}, "--batch"),
    ):
        with pytest.raises(UserError, match=words):
            sweep(**options)


# Recipes


def test_recipes_are_those_of_the_authors_scripts():
    card = catalog.card("wings")
    first, second = (recipe_of(card.recipes[name]) for name in ("stage1", "stage2"))
    assert (first.lr, first.batch_size, first.weight_decay) == (2e-5, 8 * 4 * 8, 1e-9)
    assert (second.lr, second.batch_size, second.weight_decay) == (2e-6, 4 * 2 * 8, 1e-8)
    for recipe, examples in ((first, 1_000_000), (second, 600_000)):
        assert recipe.warmup_steps == int(0.03 * examples / recipe.batch_size)
        assert recipe.schedule == "cosine" and recipe.clip == 1.0 and recipe.epochs == 1
    assert card.preset("wings_qwen1_5_7b").recipe == card.recipes["stage2"]
