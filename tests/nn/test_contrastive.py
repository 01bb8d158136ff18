"""CLIP and SigLIP are transformers' own, in outputs, gradients and files, and take more than theirs do."""

import json

import pytest
import torch
from torch import nn

from provenn.core.cost import count_parameters
from provenn.core.errors import UserError
from provenn.nn.contrastive import (
    PRESETS,
    ContrastivePair,
    contrastive_pair,
    sigmoid_loss,
    softmax_loss,
    text_from_huggingface,
    vision_from_huggingface,
)
from provenn.nn.towers import Attention, TextConfig, TextTower, VisionConfig, VisionTower, set_checkpointing

transformers = pytest.importorskip("transformers")

VOCAB, LENGTH, END, PAD = 60, 12, 59, 1
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SIZES, "vocab_size": VOCAB, "max_position_embeddings": LENGTH, "eos_token_id": END, "pad_token_id": PAD}
VISION = {**SIZES, "image_size": 24, "patch_size": 8}
LAYOUTS = ("clip", "siglip")


def theirs(layout: str, **text) -> nn.Module:
    """A model of transformers with random weights, biases and norms among them."""
    torch.manual_seed(0)
    parts = {"text_config": {**TEXT, **text}, "vision_config": dict(VISION)}
    if layout == "clip":
        model = transformers.CLIPModel(transformers.CLIPConfig(**parts, projection_dim=20))
    else:
        model = transformers.SiglipModel(transformers.SiglipConfig(**parts))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module", params=LAYOUTS)
def pair(request, tmp_path_factory):
    """A model of transformers, its folder, and ours of that folder."""
    folder, model = tmp_path_factory.mktemp(request.param), theirs(request.param)
    model.save_pretrained(folder)
    return model, folder, ContrastivePair.from_huggingface(folder)


def texts(*lengths: int, full: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts of those lengths that end with the end of text, and the mask of what is no padding."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.full((len(lengths), LENGTH if full else max(lengths)), PAD)
    for row, length in zip(tokens, lengths, strict=True):
        row[: length - 1] = torch.randint(2, END, (length - 1,), generator=generator)
        row[length - 1] = END
    return tokens, torch.arange(tokens.shape[1]) < torch.tensor(lengths)[:, None]


def pictures(count: int, *sides: int) -> torch.Tensor:
    return torch.randn(count, 3, *sides, generator=torch.Generator().manual_seed(2))


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("sides", [(24, 24), (40, 24), (32, 32), (30, 27)])
def test_logits_loss_and_gradients_are_those_of_transformers(pair, sides):
    model, _, ours = pair
    images, (tokens, mask) = pictures(3, *sides), texts(5, LENGTH, 8)
    model.zero_grad(), ours.zero_grad()
    # transformers' SigLIP was trained on full texts without a mask; CLIP's mask hides padding.
    hidden = {"attention_mask": mask.long()} if ours.layout == "clip" else {}
    expected = model(input_ids=tokens, pixel_values=images, return_loss=True, interpolate_pos_encoding=True, **hidden)
    logits = ours(images, tokens, mask=mask)
    torch.testing.assert_close(logits, expected.logits_per_image, rtol=1e-5, atol=1e-5)
    loss = ours.loss(logits)
    torch.testing.assert_close(loss, expected.loss, rtol=1e-5, atol=1e-5)
    expected.loss.backward(), loss.backward()
    wanted = gradients(model)
    assert wanted.keys() == gradients(ours).keys() and len(wanted) > 70
    for name, gradient in gradients(ours).items():
        torch.testing.assert_close(
            gradient, wanted[name], rtol=1e-5, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_states_of_chosen_layers_are_those_of_transformers(pair):
    model, _, ours = pair
    images, (tokens, _) = pictures(2, 24, 24), texts(LENGTH, LENGTH)
    expected = model.vision_model(images, output_hidden_states=True)
    seen = ours.vision_model(images, layers=(0, 1, -1, 2))
    first = int(ours.layout == "clip")
    for layer, tokens_of in seen.layers.items():
        assert tokens_of.first.shape[1] == first and tokens_of.extra.shape[1] == 0 and seen.grid == (3, 3)
        state = expected.hidden_states[layer]
        torch.testing.assert_close(tokens_of.patches, state[:, first:], rtol=1e-5, atol=1e-5)
    assert torch.equal(seen.layers[-1].patches, seen.layers[2].patches)
    torch.testing.assert_close(seen.last.patches, expected.last_hidden_state[:, first:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(seen.pooled, expected.pooler_output, rtol=1e-5, atol=1e-5)
    said, read = model.text_model(tokens, output_hidden_states=True), ours.text_model(tokens, layers=(1,))
    torch.testing.assert_close(read.layers[1], said.hidden_states[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(read.last, said.last_hidden_state, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(read.pooled, said.pooler_output, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="between -3 and 2, got 3"):
        ours.vision_model(images, layers=(3,))


def test_transformers_reads_what_we_write(pair, tmp_path):
    model, _, ours = pair
    ours.save_huggingface(tmp_path)
    again, found = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"] and not found["mismatched_keys"]
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    images, (tokens, _) = pictures(2, 24, 24), texts(7, LENGTH)
    expected = model(input_ids=tokens, pixel_values=images).logits_per_image
    assert torch.equal(again.eval()(input_ids=tokens, pixel_values=images).logits_per_image, expected)
    ours_again = ContrastivePair.from_huggingface(tmp_path)
    assert ours_again.vision_model.config == ours.vision_model.config
    assert ours_again.text_model.config == ours.text_model.config


def test_a_tower_at_another_size_is_saved_and_read(pair, tmp_path):
    model, folder, _ = pair
    ours, images = ContrastivePair.from_huggingface(folder), pictures(2, 40, 40)
    flying = ours.encode_image(images)
    ours.vision_model.resize(40)
    assert ours.vision_model.config.image == 40
    assert torch.equal(ours.encode_image(images), flying)
    ours.save_huggingface(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    features = again.get_image_features(images).pooler_output
    torch.testing.assert_close(features, flying, rtol=1e-5, atol=1e-5)
    smooth = ContrastivePair.from_huggingface(folder)
    smooth.vision_model.resize(40, antialias=True)
    assert not torch.allclose(smooth.encode_image(images), flying)
    with pytest.raises(ValueError, match="no patch of 8"):
        ours.vision_model.resize(4)


def test_towers_alone_come_from_a_pair_from_their_own_folder_and_from_a_model(pair, tmp_path):
    model, folder, ours = pair
    images, (tokens, _) = pictures(2, 24, 24), texts(LENGTH, LENGTH)
    model.vision_model.save_pretrained(tmp_path / "vision")
    model.text_model.save_pretrained(tmp_path / "text")
    for source in (folder, tmp_path / "vision", model, model.vision_model):
        assert torch.equal(vision_from_huggingface(source)(images).pooled, ours.vision_model(images).pooled)
    for source in (folder, tmp_path / "text", model, model.text_model):
        assert torch.equal(text_from_huggingface(source)(tokens).pooled, ours.text_model(tokens).pooled)
    copied = ContrastivePair.from_huggingface(model, dtype=torch.float64)
    assert copied.logit_scale.dtype == torch.float64
    with torch.no_grad():
        copied.logit_scale.zero_()
    assert model.logit_scale != 0


def test_other_forms_of_folders_are_read(pair, tmp_path):
    model, _, ours = pair
    tokens, _ = texts(LENGTH, LENGTH)
    expected = ours.encode_text(tokens)
    model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert (tmp_path / "shards/model.safetensors.index.json").exists()
    assert torch.equal(ContrastivePair.from_huggingface(tmp_path / "shards").encode_text(tokens), expected)
    old = tmp_path / "old"
    model.config.save_pretrained(old)
    extra = {"text_model.embeddings.position_ids": torch.arange(LENGTH)[None]}
    torch.save({**model.state_dict(), **extra}, old / "pytorch_model.bin")
    assert torch.equal(ContrastivePair.from_huggingface(old).encode_text(tokens), expected)


def test_the_end_of_text_of_early_configs_is_the_last_token(tmp_path):
    model, (tokens, _) = theirs("clip", eos_token_id=2), texts(5, LENGTH, 8)
    model.save_pretrained(tmp_path)
    ours = ContrastivePair.from_huggingface(tmp_path)
    assert ours.text_model.config.end_of_text == END
    expected = model.get_text_features(tokens).pooler_output
    torch.testing.assert_close(ours.encode_text(tokens), expected, rtol=1e-5, atol=1e-5)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config_dict"], config["text_config"] = config["text_config"], {"hidden_size": 7}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(ContrastivePair.from_huggingface(tmp_path).encode_text(tokens), ours.encode_text(tokens))


def test_padding_never_changes_the_embedding_of_a_text(pair):
    _, _, ours = pair
    (tokens, mask), (alone, _) = texts(5, 9, 7), texts(5)
    assert torch.equal(tokens[:1, :5], alone)
    expected = ours.encode_text(tokens)
    torch.testing.assert_close(ours.encode_text(alone), expected[:1], rtol=1e-5, atol=1e-6)
    full = texts(5, 9, 7, full=True)[0]
    torch.testing.assert_close(ours.encode_text(full), expected, rtol=1e-5, atol=1e-6)
    # Whatever stands there, and before the text as well as after it.
    rubbish = torch.where(mask, tokens, -100)
    torch.testing.assert_close(ours.encode_text(rubbish, mask=mask), expected, rtol=1e-5, atol=1e-6)
    shift = torch.tensor([4, 0, 2])[:, None]
    order = (torch.arange(9) - shift) % 9
    left, left_mask = tokens.gather(1, order), mask.gather(1, order)
    assert not left_mask[0, 0]
    torch.testing.assert_close(ours.encode_text(left, mask=left_mask), expected, rtol=1e-5, atol=1e-6)
    vectors = ours.text_model.embed(tokens).masked_fill(~mask[..., None], torch.nan)
    torch.testing.assert_close(ours.encode_text(embeddings=vectors, mask=mask), expected, rtol=1e-5, atol=1e-6)


def test_learned_vectors_among_words_get_gradients_and_stand_where_they_are_put(pair):
    _, _, ours = pair
    tokens, mask = texts(6, 8)
    words = ours.text_model.embed(tokens)
    prompt = words[:, 1:3].detach().clone().requires_grad_()
    vectors = torch.cat([words[:, :1], prompt, words[:, 3:]], dim=1)
    embedded = ours.encode_text(embeddings=vectors, mask=mask)
    torch.testing.assert_close(embedded, ours.encode_text(tokens, mask=mask), rtol=1e-5, atol=1e-6)
    embedded.square().sum().backward()
    assert (prompt.grad.abs().sum(-1) > 0).all()
    with pytest.raises(ValueError, match="tokens or embeddings, and not both"):
        ours.encode_text(tokens, embeddings=vectors)


def test_extra_tokens_join_the_patches_and_leave_them_alone_where_they_are_masked(pair):
    _, _, ours = pair
    tower, images = ours.vision_model, pictures(2, 24, 24)
    plain, registers = tower(images), torch.randn(2, 4, 32, requires_grad=True)
    seen = tower(images, extra=registers, layers=(0,))
    assert seen.last.extra.shape == (2, 4, 32) and seen.last.patches.shape == plain.last.patches.shape
    assert torch.equal(seen.layers[0].extra, registers)  # without positions, and after the first norm
    assert not torch.allclose(seen.pooled, plain.pooled, atol=1e-4)
    seen.last.extra.sum().backward()
    assert registers.grad.abs().sum() > 0
    mask = torch.ones(2, int(ours.layout == "clip") + 9 + 4, dtype=torch.bool)
    mask[:, -4:] = False
    hidden = tower(images, extra=registers, mask=mask)
    torch.testing.assert_close(hidden.last.patches, plain.last.patches, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(hidden.pooled, plain.pooled, rtol=1e-5, atol=1e-6)
    turned = tower(images, extra=registers.flip(1)).last.extra.flip(1)
    torch.testing.assert_close(turned, seen.last.extra, rtol=1e-4, atol=1e-5)
    shared = torch.zeros(1, 4, 32)
    assert torch.equal(
        ours.encode_image(images, extra=shared), ours.encode_image(images, extra=shared.expand(2, -1, -1))
    )


def test_an_attention_can_be_wrapped_from_outside(pair):
    _, folder, ours = pair
    wrapped, images = ContrastivePair.from_huggingface(folder), pictures(2, 24, 24)

    class Twice(nn.Module):
        def __init__(self, inner: Attention):
            super().__init__()
            self.inner = inner

        def forward(self, x, *, mask=None, causal=False):
            return 2 * self.inner(x, mask=mask, causal=causal)

    block = wrapped.vision_model.encoder.layers[1]
    block.self_attn = Twice(block.self_attn)
    assert not torch.allclose(wrapped.encode_image(images), ours.encode_image(images))


def test_checkpointing_changes_no_gradient(pair):
    _, folder, ours = pair
    other = ContrastivePair.from_huggingface(folder)
    set_checkpointing(other)
    images, (tokens, mask) = pictures(3, 24, 24), texts(5, 9, 7)
    calls = []
    other.vision_model.encoder.layers[0].layer_norm1.register_forward_hook(lambda *_: calls.append(1))
    for model in (ours, other):
        model.zero_grad()
        model.loss(model(images, tokens, mask=mask)).backward()
    assert len(calls) == 2  # once more in the backward pass
    for name, gradient in gradients(other).items():
        torch.testing.assert_close(gradient, gradients(ours)[name], msg=name)


@pytest.mark.parametrize(
    ("preset", "exact", "millions"),
    [
        # Exact: the model cards of the hub. Millions: open_clip's docs/model_profile.csv, of both, images and texts.
        ("clip-vit-base-patch32", 151_277_313, (151.28, 87.85, 63.43)),
        ("clip-vit-base-patch16", 149_620_737, (149.62, 86.19, 63.43)),
        ("clip-vit-large-patch14", 427_616_513, (427.62, 303.97, 123.65)),
        ("clip-vit-large-patch14-336", 427_944_193, (427.94, 304.29, 123.65)),
        ("siglip-base-patch16-224", 203_155_970, (203.16, 92.88, 110.27)),
        ("siglip-large-patch16-384", None, (652.48, 316.28, 336.19)),
        ("siglip-so400m-patch14-384", None, (877.96, 428.23, 449.73)),
    ],
)
def test_released_models_have_their_published_parameters(preset, exact, millions):
    with torch.device("meta"):
        model = contrastive_pair(preset)
    assert exact in (None, count_parameters(model))
    image, text = (
        count_parameters(tower) + (count_parameters(projection) if projection is not None else 0)
        for tower, projection in (
            (model.vision_model, model.visual_projection), (model.text_model, model.text_projection),
        )
    )  # fmt: skip
    assert tuple(round(count / 1e6, 2) for count in (count_parameters(model), image, text)) == millions


def test_texts_are_embedded_on_the_meta_device():
    with torch.device("meta"):
        pair = ContrastivePair(VisionConfig("clip", 8, 1, 1, image=16, patch=8), TextConfig("clip", 8, 1, 1), 8)
        words = torch.zeros(3, 5, 8)
        assert pair.encode_text(embeddings=words).shape == (3, 8)
        assert pair.encode_text(embeddings=words, mask=torch.ones(3, 5, dtype=torch.bool)).shape == (3, 8)


def test_no_text_gives_no_embedding():
    pair = ContrastivePair(VisionConfig("clip", 8, 1, 1, image=16, patch=8), TextConfig("clip", 8, 1, 1), 8)
    none = pair.encode_text(embeddings=torch.zeros(0, 5, 8), mask=torch.ones(0, 5, dtype=torch.bool))
    assert none.shape == (0, 8)


def test_presets_without_their_head_and_at_another_size_are_counted():
    with torch.device("meta"):
        vision = contrastive_pair("siglip-large-patch16-384").vision_model
        plain = VisionTower(VisionConfig("siglip", 1024, 24, 16, image=384, head=False))
        large = contrastive_pair("clip-vit-large-patch14").vision_model
        large.resize(518)
    assert count_parameters(plain) == 303_688_704 and plain.head is None
    assert count_parameters(vision) - count_parameters(plain) == 12_595_200
    assert large.embeddings.position_embedding.weight.shape == (1 + 37 * 37, 1024)
    with pytest.raises(UserError, match=r"^no preset 'clip'; there are clip-vit-base-patch32, [^\n]*$"):
        contrastive_pair("clip")
    assert len(PRESETS) == 7


def small(layout: str) -> ContrastivePair:
    text = TextConfig(layout, 32, 2, 4, vocab=VOCAB, max_length=LENGTH, end_of_text=END)
    return ContrastivePair(VisionConfig(layout, 32, 2, 4, image=24, patch=8), text, 20 if layout == "clip" else None)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_new_models_learn_which_text_belongs_to_which_image(layout):
    torch.manual_seed(0)
    model, images, (tokens, mask) = small(layout), pictures(6, 24, 24), texts(5, 9, 7, 6, 8, 4)
    assert model.vision_model.embeddings.position_embedding.weight.std() > 0.05
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        model.loss(model(images, tokens, mask=mask)).backward()
        optimizer.step()
    logits = model.eval()(images, tokens, mask=mask)
    assert logits.argmax(1).tolist() == logits.argmax(0).tolist() == list(range(6))


def test_losses_by_hand_and_with_several_texts_for_an_image(untyped):
    logits = torch.tensor([[2.0, 0.0, 1.0], [-1.0, 3.0, 0.5]])
    belongs = torch.tensor([[True, False, True], [False, True, False]])
    rows, columns = logits.log_softmax(1), logits.log_softmax(0)
    by_hand = (-(rows[0, 0] + rows[0, 2]) / 2 - rows[1, 1]) / 2 - (columns[0, 0] + columns[1, 1] + columns[0, 2]) / 3
    torch.testing.assert_close(softmax_loss(logits, belongs), by_hand / 2)
    signs = torch.where(belongs, 1.0, -1.0)
    torch.testing.assert_close(sigmoid_loss(logits, belongs), -(signs * logits).sigmoid().log().sum() / 2)
    square = torch.randn(4, 4)
    for loss in (softmax_loss, sigmoid_loss):
        torch.testing.assert_close(loss(square), loss(square, torch.eye(4, dtype=torch.bool)))
        with pytest.raises(ValueError, match="of 2 images and 3 texts, positives must say"):
            loss(logits)
        with pytest.raises(ValueError, match="every image needs a text"):
            loss(logits, belongs & torch.tensor([True, True, False]))
        with pytest.raises(ValueError, match=r"of shape \(4, 4\)"):
            loss(square, torch.eye(3, dtype=torch.bool))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_compiled_pair_gives_the_same(layout, untyped):
    torch.manual_seed(0)
    model, images, (tokens, mask) = small(layout).eval(), pictures(2, 24, 24), texts(5, 9)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images, tokens, mask=mask), model(images, tokens, mask=mask))


# Bad input, one clear line each.


def one_line(folder, match, read=ContrastivePair.from_huggingface):
    with pytest.raises(UserError, match=rf"^[^\n]*{match}[^\n]*$"):
        read(folder)


def changed(folder, where, **options):
    """A copy of a folder whose config says something else, of the whole or of a tower."""
    config = json.loads((folder / "config.json").read_text())
    (config if where == "whole" else config[f"{where}_config"]).update(options)
    return config


def test_bad_folders_are_refused_in_one_line(pair, tmp_path, untyped):
    _, folder, ours = pair
    one_line(tmp_path / "none", "there is no such folder: give a folder of Hugging Face")
    one_line(tmp_path, "its config.json cannot be read: No such file")
    file = tmp_path / "config.json"
    for text, match in (
        ("{", "is no JSON"),
        ("[]", "holds a list"),
        ("{}", "of type None; supported here: clip, siglip"),
    ):
        file.write_text(text)
        one_line(tmp_path, match)
    file.write_text(json.dumps(changed(folder, "whole", model_type="blip")))
    one_line(tmp_path, "holds a model of type 'blip'; supported here: clip, siglip")
    for where, options, match in (
        ("text", {"vocab_size": 0}, "text tower cannot be built: sizes must be at least 1, got vocab=0"),
        ("text", {"num_attention_heads": 5}, "heads must divide dim"),
        ("text", {"hidden_act": "relu"}, "activation must be one of quick_gelu, .* got 'relu'"),
        ("text", {"attention_dropout": 0.1}, "attention_dropout must be 0 here, got 0.1"),
        ("text", {"hidden_size": "wide"}, "text tower cannot be built"),
        ("vision", {"image_size": [24, 32]}, "vision tower cannot be built: image must be a whole number"),
        ("vision", {"image_size": 4}, "an image of 4 pixels has no patch of 8"),
    ):
        file.write_text(json.dumps(changed(folder, where, **options)))
        (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
        one_line(tmp_path, match)
    special = {"clip": "end of text is token 99", "siglip": "padding is token 99"}[ours.layout]
    file.write_text(json.dumps(changed(folder, "text", eos_token_id=99, pad_token_id=99)))
    one_line(tmp_path, f"{special}, and the vocabulary has 60 tokens")
    file.write_text(json.dumps(changed(folder, "text", max_position_embeddings=10)))
    one_line(tmp_path, "have other sizes than its config says for 1 parameters, text_model.embeddings.position")
    file.write_text(json.dumps(changed(folder, "vision", num_hidden_layers=3)))
    one_line(tmp_path, "lack 16 parameters, vision_model.encoder.layers.2")
    file.write_text(json.dumps(changed(folder, "vision", num_hidden_layers=1)))
    one_line(tmp_path, "do not fit: the model lacks 16 parameters, vision_model.encoder.layers.1")


def test_broken_weights_are_refused_in_one_line(pair, tmp_path):
    model, folder, _ = pair
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    one_line(tmp_path, "has no weights: expected model.safetensors, pytorch_model.bin, or the index of either")
    weights = (folder / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    one_line(tmp_path, "model.safetensors is no weight file that can be read")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"logit_scale": "model-1.safetensors"}}')
    one_line(tmp_path, "its index names model-1.safetensors, which is not there")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    one_line(tmp_path, "is no index of weights: expected a 'weight_map'")
    (tmp_path / "model.safetensors.index.json").unlink()
    state = model.state_dict()
    for name, value, match in (
        ("logit_scale", state["logit_scale"] * torch.nan, "logit_scale holds values that are no finite numbers"),
        ("logit_scale", state["logit_scale"].long(), "logit_scale is of type int64 where the model has float32"),
        ("code", print, "it holds more than tensors"),
    ):
        torch.save({**state, name: value}, tmp_path / "pytorch_model.bin")
        one_line(tmp_path, match)
    (tmp_path / "pytorch_model.bin").write_bytes(b"rubbish")
    one_line(tmp_path, "pytorch_model.bin")


def test_vocabularies_without_the_special_tokens_are_refused_in_one_line(pair, tmp_path):
    _, folder, ours = pair
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    purpose, number = ours.text_model.config.special
    words = {f"w{i}": i for i in range(VOCAB) if i != number}
    (tmp_path / "vocab.json").write_text(json.dumps(words))
    one_line(tmp_path, f"vocab.json has no token {number}, the model's {purpose}: bring the model's own tokenizer")
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps({"model": {"vocab": words}, "added_tokens": []}))
    for read in (ContrastivePair.from_huggingface, text_from_huggingface):
        one_line(tmp_path, f"tokenizer.json has no token {number}", read)
    file.write_text("{}")
    one_line(tmp_path, "is no vocabulary that can be read")
    for content in (
        {"model": {"vocab": words}, "added_tokens": [{"id": number, "content": "<|end|>"}]},
        {"model": {"vocab": [[f"w{i}", 0.0] for i in range(VOCAB)]}},
    ):
        file.write_text(json.dumps(content))
        assert ContrastivePair.from_huggingface(tmp_path).layout == ours.layout


def test_bad_texts_and_images_are_refused_in_one_line(pair, untyped):
    _, _, ours = pair
    tokens, mask = texts(5, 9)
    long = torch.cat([tokens[:, :1].expand(-1, LENGTH), tokens], dim=1)
    with pytest.raises(UserError, match=rf"^a text has {LENGTH + 9} tokens, and the tower reads {LENGTH}: cut it"):
        ours.encode_text(long)
    with pytest.raises(UserError, match=r"^text 2 of 2 has a token outside of the vocabulary of 60"):
        ours.encode_text(torch.where(torch.tensor([[False], [True]]) & (tokens != END), 60, tokens))
    with pytest.raises(UserError, match=r"^text 1 of 2 has no "):
        ours.encode_text(tokens, mask=mask & torch.tensor([[False], [True]]))
    if ours.layout == "clip":
        with pytest.raises(
            UserError, match=r"^text 2 of 2 has no end of text \(token 59\): use the model's tokenizer$"
        ):
            ours.encode_text(tokens[:, :8])
    with pytest.raises(ValueError, match="mask must be bool of shape"):
        ours.encode_text(tokens, mask=mask[:, :1].expand(2, 9)[:, :8])
    with pytest.raises(ValueError, match=r"of 3 channels and at least 8 pixels a side, got \(1, 24, 24\)"):
        ours.encode_image(torch.zeros(1, 1, 24, 24))
    with pytest.raises(ValueError, match=r"got \(3, 24, 7\)"):
        ours.encode_image(torch.zeros(1, 3, 24, 7))


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="layout must be one of clip, siglip, got 'blip'"):
        VisionConfig("blip", 32, 2, 4)
    with pytest.raises(ValueError, match="dim must be a whole number, got True"):
        TextConfig("clip", True, 2, 4)
    clip, siglip = small("clip"), small("siglip")
    with pytest.raises(ValueError, match="both towers must be of one layout, got clip and siglip"):
        ContrastivePair(clip.vision_model.config, siglip.text_model.config)
    with pytest.raises(ValueError, match="SigLIP's towers end in their common space"):
        ContrastivePair(siglip.vision_model.config, siglip.text_model.config, 20)
    assert isinstance(TextTower(siglip.text_model.config).head, nn.Linear)


def test_an_end_of_text_that_transformers_reads_otherwise_is_not_saved(tmp_path):
    text = TextConfig("clip", 32, 1, 4, vocab=VOCAB, max_length=LENGTH, end_of_text=2)
    pair = ContrastivePair(VisionConfig("clip", 32, 1, 4, image=16, patch=8), text, 16)
    with pytest.raises(UserError, match="transformers takes token 2 as an end of text for the last one"):
        pair.save_huggingface(tmp_path)
    assert not any(tmp_path.iterdir())
