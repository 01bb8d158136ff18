"""LSceneLLM: a language model looks into a large scene where its own attention says (arXiv:2412.01292)."""

from provenn.papers.lscenellm.layers import (
    Look,
    MagnifiedBlock,
    MagnifiedState,
    Scene,
    SceneMagnifier,
    joint_attention,
    open_regions,
)
from provenn.papers.lscenellm.model import FourierPositions, LSceneLLM, Prompts, lscenellm_7b, lscenellm_rooms
from provenn.papers.lscenellm.tokens import SceneTokens, box_text, build_tokens, dense_around

__all__ = [
    "FourierPositions",
    "LSceneLLM",
    "Look",
    "MagnifiedBlock",
    "MagnifiedState",
    "Prompts",
    "Scene",
    "SceneMagnifier",
    "SceneTokens",
    "box_text",
    "build_tokens",
    "dense_around",
    "joint_attention",
    "lscenellm_7b",
    "lscenellm_rooms",
    "open_regions",
]
