"""How fast the language model writes with its cache, beside transformers' own of the same shape."""

from collections.abc import Callable
from typing import Any

import torch

from provenn.evidence import Benchmark, Timing
from provenn.nn.decoder import Decoder

PROMPT = 64  # tokens that are read before the first is written
SHAPE: dict[str, Any] = {"vocab": 512, "dim": 256, "layers": 4, "heads": 8, "kv_heads": 2, "hidden": 688}
PACKAGE = "transformers"


def _ours(count: int, device: str) -> Callable[[], Any]:
    """Greedy tokens of our decoder, weights drawn."""
    torch.manual_seed(0)
    model = Decoder(**SHAPE).eval().to(device)
    prompt = torch.randint(SHAPE["vocab"], (1, PROMPT), device=device)

    def call() -> Any:
        return torch.stack(list(model.generate(prompt, count, temperature=0)), dim=1)

    return call


def _transformers(count: int, device: str) -> Callable[[], Any]:
    """Greedy tokens of transformers' Llama of this shape, by its `generate`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=SHAPE["vocab"],
        hidden_size=SHAPE["dim"],
        num_hidden_layers=SHAPE["layers"],
        num_attention_heads=SHAPE["heads"],
        num_key_value_heads=SHAPE["kv_heads"],
        intermediate_size=SHAPE["hidden"],
        tie_word_embeddings=True,
        eos_token_id=None,
        pad_token_id=0,
    )
    model: Any = LlamaForCausalLM(config).eval().to(device)
    prompt = torch.randint(SHAPE["vocab"], (1, PROMPT), device=device)
    mask = torch.ones_like(prompt)

    def call() -> Any:
        written = model.generate(prompt, attention_mask=mask, max_new_tokens=count, do_sample=False)
        return written[:, PROMPT:]

    return call


GENERATION = Timing(
    "greedy tokens with a cache, a decoder of 4 layers and 256 channels",
    {"ours": _ours, PACKAGE: _transformers},
    sizes=(16, 64, 128),
    unit="tokens written",
    setting={"prompt": PROMPT, "threads": 1},
)
BENCHMARKS = (Benchmark(GENERATION, "ours", PACKAGE, within=1.1, package=PACKAGE),)
