"""The authors' names: every one is known, what nothing reads is left out, and other models are refused."""

import pytest
import torch

from provenn.core.errors import UserError
from provenn.papers.lscenellm.model import lscenellm_7b
from provenn.papers.lscenellm.official import convert, rename, unread

NAMES = {
    "decoder.head.": "llm.lm_head.", "decoder.embed.": "llm.model.embed_tokens.",
    "decoder.blocks.": "llm.model.layers.",
    "decoder.norm.": "llm.model.norm.", ".norm1.": ".input_layernorm.", ".norm2.": ".post_attention_layernorm.",
    ".attention.query.": ".self_attn.q_proj.", ".attention.key.": ".self_attn.k_proj.",
    ".attention.value.": ".self_attn.v_proj.", ".attention.out.": ".self_attn.o_proj.",
    ".dense_key.": ".self_attn.k_proj_hd.", ".dense_value.": ".self_attn.v_proj_hd.",
    ".feedforward.gate.": ".mlp.gate_proj.", ".feedforward.linear1.": ".mlp.up_proj.",
    ".feedforward.linear2.": ".mlp.down_proj.", "projector.": "encoder_to_llm_projection.", "xyz.": "xyz_projection.",
    "box.": "box_prompt_projector.", "click.": "click_prompt_projector.", "positions.gauss": "pos_emb3d.gauss_B",
}  # fmt: skip


def released(magnify: bool = True) -> dict[str, torch.Tensor]:
    """A state dict as the authors' code writes it, small."""
    model = lscenellm_7b(
        30, features=6, dim=32, layers=3, heads=4, hidden=48, start_layer=1, prompt_tokens=2, magnify=magnify,
        use_xyz=True,
    )  # fmt: skip
    state = {}
    for name, value in model.state_dict().items():
        for ours, theirs in NAMES.items():
            name = theirs + name.removeprefix(ours) if name.startswith(ours) and not ours.startswith(".") else name
            name = name.replace(ours, theirs) if ours.startswith(".") else name
        state[name] = value
    if magnify:
        for part in ("k_proj_hd", "v_proj_hd"):
            state[f"llm.model.layers.1.self_attn.{part}.weight"] = torch.randn(32, 32)
    return state


@pytest.mark.parametrize("magnify", [True, False])
def test_a_state_comes_back_with_its_sizes(magnify: bool) -> None:
    state = {f"module.{name}": value for name, value in released(magnify).items()}
    state["module.llm.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    preset, options, ours = convert(state, heads=4)
    assert preset == "lscenellm_7b"
    assert options["magnify"] is magnify
    assert options.get("start_layer", 1) == 1
    model = lscenellm_7b(**options)
    model.load_state_dict(ours)
    assert (model.xyz is None) is magnify


def test_what_is_never_read_is_named() -> None:
    names = unread(released())
    assert names == [
        *(f"xyz_projection.{k}.{part}" for k in (0, 2) for part in ("weight", "bias")),
        "llm.model.layers.1.self_attn.k_proj_hd.weight",
        "llm.model.layers.1.self_attn.v_proj_hd.weight",
    ]
    assert unread(released(False)) == []


def test_other_states_are_refused() -> None:
    with pytest.raises(UserError, match="no parameter of LSceneLLM"):
        rename({"vision_model.layers.0.weight": 0})
    with pytest.raises(UserError, match="bring its base_model"):
        convert({"llm.lm_head.weight": torch.ones(3, 2)})
    with pytest.raises(UserError, match="give their number, heads="):
        convert(released())
