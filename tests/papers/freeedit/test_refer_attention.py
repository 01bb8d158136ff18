"""Refer-attention: identities of each form, and what goes into a U-Net of diffusers and comes out of it again."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from provenn.core.errors import UserError
from provenn.ops.softmax_attention import softmax_attention
from provenn.papers.freeedit.attaching import attach_refer_attention, self_attentions
from provenn.papers.freeedit.layers import drra, merged_drra, partial_attention, rasa, reference_only

diffusers = pytest.importorskip("diffusers")


def draws(references=5, dtype=torch.float64, factor=1.0):
    draw = torch.Generator().manual_seed(references)
    shapes = [(2, 2, 7, 4)] * 3 + [(2, 2, references, 4)] * 2
    q, k, v, k_r, v_r = (torch.randn(shape, generator=draw, dtype=dtype) for shape in shapes)
    return q, k, v, factor * k_r, v_r


@given(st.integers(1, 12), st.sampled_from([0.0, 0.5, 1.0, 1.2, -2.0]))
def test_two_attentions_give_what_three_do(references, scale):
    given = draws(references)
    torch.testing.assert_close(merged_drra(*given, scale), drra(*given, scale), atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("factor", [30.0, 1e3])
def test_they_do_where_one_side_has_all_the_weight(factor):
    given = draws(factor=factor, dtype=torch.float32)
    torch.testing.assert_close(merged_drra(*given), drra(*given), atol=1e-5, rtol=1e-5)


def test_gradients_of_the_merged_form_are_those_of_the_definition():
    sides = []
    for form in (drra, merged_drra):
        given = [x.requires_grad_() for x in draws()]
        form(*given, 0.7).square().sum().backward()
        sides.append([x.grad for x in given])
    for one, other in zip(*sides):
        torch.testing.assert_close(one, other)


def test_the_log_sum_exp_is_that_of_the_scores():
    q, k, v, *_ = draws()
    fused, explicit = partial_attention(q, k, v), partial_attention(q.requires_grad_(), k, v)
    torch.testing.assert_close(fused.output, explicit.output)
    torch.testing.assert_close(fused.lse, explicit.lse)


def test_it_is_affine_in_its_scale():
    given = draws()
    none, one = drra(*given, 0.0), drra(*given, 1.0)
    torch.testing.assert_close(drra(*given, 1.7), none + 1.7 * (one - none))
    torch.testing.assert_close(one - none, rasa(*given))


def test_tokens_twice_are_as_tokens_once():
    """With the layer's own keys as the reference, or one without weight, the branch is self-attention: (1 + λ) SA."""
    q, k, v, k_r, v_r = draws(7)
    own = softmax_attention(q, k, v)
    torch.testing.assert_close(drra(q, k, v, k, v, 0.5), 1.5 * own)
    torch.testing.assert_close(rasa(q, k, v, k, v), own)
    q = q.abs()
    far = torch.full_like(k_r, -1e4)  # no query gives these weight
    torch.testing.assert_close(drra(q, k, v, far, v_r, 0.5), 1.5 * softmax_attention(q, k, v))


def test_zero_keys_still_take_weight():
    q, k, v, k_r, v_r = draws()
    zeroed = drra(q, k, v, torch.zeros_like(k_r), torch.zeros_like(v_r))
    assert (zeroed - 2 * softmax_attention(q, k, v)).abs().max() > 0.05


def test_the_order_of_the_reference_says_nothing():
    q, k, v, k_r, v_r = draws()
    order = torch.tensor([3, 0, 4, 1, 2])
    for form in (drra, merged_drra):
        torch.testing.assert_close(form(q, k, v, k_r, v_r), form(q, k, v, k_r[:, :, order], v_r[:, :, order]))
    torch.testing.assert_close(reference_only(q, k_r, v_r), reference_only(q, k_r[:, :, order], v_r[:, :, order]))


def unet(channels, seed=0, **sizes):
    torch.manual_seed(seed)
    levels = sizes.pop("levels", 2)
    down, up = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
    options = {
        "sample_size": 8, "out_channels": 3, "block_out_channels": (8, 16)[:levels], "layers_per_block": 1,
        "cross_attention_dim": 12, "attention_head_dim": 2, "norm_num_groups": 4,
        "down_block_types": (down,) * levels, "up_block_types": (up,) * levels,
    }  # fmt: skip
    return diffusers.UNet2DConditionModel(in_channels=channels, **{**options, **sizes}).eval()


def asked(batch=2):
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 6, 8, 8, generator=draw)
    text, picture = torch.randn(batch, 5, 12, generator=draw), torch.randn(batch, 3, 12, 12, generator=draw)
    return x, torch.full((batch,), 300), text, picture


FORMS = [("drra", False, "merged"), ("drra", True, "merged"), ("drra", True, "plain"), ("rasa", False, "plain"),
         ("ref_only", False, "plain"), ("ref_only", True, "plain"), ("self", False, "plain")]  # fmt: skip


@pytest.mark.parametrize("mode, share, form", FORMS)
@torch.no_grad()
def test_it_goes_in_and_comes_out_without_a_trace(mode, share, form):
    """No reference, λ = 0 and detached: the same to the bit. `separate` begins with nothing added, whatever λ is."""
    denoiser, extractor = unet(6), unet(3, seed=1)
    before, theirs = copy.deepcopy(denoiser.state_dict()), copy.deepcopy(extractor.state_dict())
    processors = dict(denoiser.attn_processors)
    x, t, text, picture = asked()
    plain = denoiser(x, t, text).sample
    attached = attach_refer_attention(denoiser, extractor, mode, share=share, form=form)
    features = attached.extract(picture, torch.zeros(2, 1, 12))
    assert features.keys() == self_attentions(denoiser).keys()
    assert denoiser(x, t, text).sample.equal(plain)
    with attached.using(features, 0):
        assert denoiser(x, t, text).sample.equal(plain)
    with attached.using(features, 1.2):
        changed = denoiser(x, t, text).sample
    assert changed.equal(plain) == (mode != "rasa" and not share)
    with attached.using(features, torch.tensor([0.0, 1.0])):
        mixed = denoiser(x, t, text).sample
    assert mixed[0].equal(plain[0])
    assert {id(p) for p in denoiser.parameters()} == {
        *(id(p) for p in attached.parameters()), *(id(p) for n, p in denoiser.named_parameters() if n in before)
    }  # fmt: skip
    attached.detach()
    after = denoiser.state_dict()
    assert list(after) == list(before) and all(after[name].equal(value) for name, value in before.items())
    assert all(denoiser.attn_processors[name] is old for name, old in processors.items())
    assert denoiser(x, t, text).sample.equal(plain)
    assert all(value.equal(theirs[name]) for name, value in extractor.state_dict().items())


@torch.no_grad()
def test_layouts_of_later_models_have_their_sites():
    """Linear projections and several blocks a level, as SD 2.1 and XL have them."""
    sizes = {"use_linear_projection": True, "transformer_layers_per_block": [1, 2], "attention_head_dim": [1, 2]}
    denoiser, extractor = unet(6, **sizes), unet(3, seed=1, **sizes)
    attached = attach_refer_attention(denoiser, extractor, share=True)
    assert len(attached.layers) == 1 + 2 + 2 + 2 * 2 + 2 * 1  # down, middle, up
    x, t, text, picture = asked()
    plain = denoiser(x, t, text).sample
    with attached.using(attached.extract(picture, torch.zeros(2, 1, 12))):
        assert not denoiser(x, t, text).sample.equal(plain)


@torch.no_grad()
def test_merged_and_plain_give_the_same_net():
    results = []
    for form in ("merged", "plain"):
        denoiser, extractor = unet(6), unet(3, seed=1)
        attached = attach_refer_attention(denoiser, extractor, share=True, form=form)
        x, t, text, picture = asked()
        with attached.using(attached.extract(picture, torch.zeros(2, 1, 12)), torch.tensor([0.5, 1.0])):
            results.append(denoiser(x, t, text).sample)
    torch.testing.assert_close(*results)


def test_gradients_reach_the_output_first_and_then_all():
    """W_O' is zero, so it alone has a gradient at step 0. The extractor never has one."""
    denoiser, extractor = unet(6), unet(3, seed=1)
    attached = attach_refer_attention(denoiser, extractor)
    x, t, text, picture = asked()

    def gradients():
        features = attached.extract(picture, torch.zeros(2, 1, 12))
        with attached.using(features):
            denoiser(x, t, text).sample.square().mean().backward()
        return {
            name: any(layer.get_parameter(name).grad.abs().max() > 0 for layer in attached.layers.values())
            for name in ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.weight")
        }

    first = gradients()
    assert first == {"to_q.weight": False, "to_k.weight": False, "to_v.weight": False, "to_out.weight": True}
    optimizer = torch.optim.SGD(attached.parameters(), lr=10.0)
    optimizer.step()
    optimizer.zero_grad()
    assert all(gradients().values())
    assert all(p.grad is None for p in extractor.parameters())


def test_it_begins_anew_as_the_attention_that_stands():
    denoiser, extractor = unet(6), unet(3, seed=1)
    attached = attach_refer_attention(denoiser, extractor)
    with torch.no_grad():
        for p in denoiser.parameters():
            p.add_(1.0)
    attached.reset()
    for name, layer in attached.layers.items():
        assert layer.to_q.weight.equal(self_attentions(denoiser)[name].to_q.weight)
        assert not layer.to_out.weight.any() and not layer.to_out.bias.any()


def test_a_checkpointed_net_does_not_run_the_extractor_again():
    denoiser, extractor = unet(6).train(), unet(3, seed=1)
    denoiser.enable_gradient_checkpointing()
    attached = attach_refer_attention(denoiser, extractor, share=True, form="plain")
    x, t, text, picture = asked()
    runs = []
    extractor.register_forward_hook(lambda *_: runs.append(1))
    with attached.using(attached.extract(picture, torch.zeros(2, 1, 12))):
        denoiser(x, t, text).sample.mean().backward()
    assert len(runs) == 1


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda d, e: attach_refer_attention(d, d), "one module"),
        (lambda d, e: attach_refer_attention(d, e, "drrra"), "mode is one of drra, rasa, ref_only, self"),
        (lambda d, e: attach_refer_attention(torch.nn.Linear(2, 2), e), "no self-attention"),
        (lambda d, e: attach_refer_attention(d, unet(3, block_out_channels=(8, 24))), "of one layout"),
        (lambda d, e: [attach_refer_attention(d, e) for _ in range(2)], "already"),
        (lambda d, e: (d.set_attention_slice(1), attach_refer_attention(d, e)), "SlicedAttnProcessor"),
        (lambda d, e: (d.fuse_qkv_projections(), attach_refer_attention(d, e)), "unfuse_qkv_projections"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(change, words):
    with pytest.raises(UserError, match=words) as error:
        change(unet(6), unet(3, seed=1))
    assert "\n" not in str(error.value)


def test_references_of_another_batch_are_refused():
    denoiser, extractor = unet(6), unet(3, seed=1)
    attached = attach_refer_attention(denoiser, extractor)
    x, t, text, picture = asked()
    with attached.using(attached.extract(picture[:1], torch.zeros(1, 1, 12))), pytest.raises(UserError, match="order"):
        denoiser(x, t, text)
