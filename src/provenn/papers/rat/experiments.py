"""What the paper says of RAT, and what building it brought to light, as measurements."""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from provenn.core.cost import count_parameters
from provenn.evidence import Measurement, Run, Study, Timing, measures
from provenn.evidence.experiment import Measure
from provenn.nn.attention import SoftmaxAttention
from provenn.nn.positions import rotate
from provenn.papers.rat.layers import RATMixer, RNNMixer
from provenn.papers.rat.model import attention_small, rat_small, rat_swa_small, rnn_small
from provenn.papers.rat.studies import (
    LENGTH,
    LONG,
    NEEDLES,
    attention,
    count_stream_bytes,
    counted,
    decoder_block,
    loss_rise,
    needles,
    read_needles,
    rnn,
    selection,
    softmax_alone,
    streamed,
    text_data,
    trained,
    window,
)
from provenn.training import Recipe

# Accuracy: models of one size that differ in their token mixers, each at the learning rate that suits it.

SIZE = {"dim": 64, "layers": 2}
TEXT = Study(
    "text",
    "language-modelling",
    data=text_data,
    variants={
        "attention": ("attention", partial(attention_small, heads=4)),
        "rat": ("RAT, chunks of 16", partial(rat_small, heads=4, chunk=16)),
        "rnn": ("RNN", partial(rnn_small, length=LENGTH)),
        "hybrid": ("RAT and window", partial(rat_swa_small, heads=4, chunk=16, window=32)),
    },
    build=lambda model, **options: model(**SIZE, **options),
    recipe=Recipe(
        betas=(0.9, 0.95), weight_decay=0.1, schedule="cosine", warmup_steps=30, clip=1.0, batch_size=4, epochs=1,
        max_steps=1000,
    ),
    lrs=(1.5e-3, 4e-3, 1.2e-2),
    probes={"rise": loss_rise},
    about="the source of Python's standard library, byte by byte",
    kind="model",
    columns={"parameters": lambda model: count_parameters(model(**SIZE))},
    setting={**SIZE, "heads": 4, "tokens": LENGTH, "window": 32, "longer": LONG},
    note="Small models, trained on half a million bytes; what the paper says is about 1.3B and 100 billion tokens.",
)  # fmt: skip

RETRIEVAL = Recipe(clip=1.0, batch_size=8, epochs=1, max_steps=400)
RECALL = Study(
    "needles",
    "recall",
    data=lambda seed, smoke: needles(seed, smoke, RETRIEVAL.batch_size * (RETRIEVAL.max_steps or 0)),
    variants={
        "attention": ("attention", partial(SoftmaxAttention, heads=4, bias=False, rotary=True)),
        "rat4": ("RAT, chunks of 4", partial(RATMixer, heads=4, chunk=4)),
        "rat16": ("RAT, chunks of 16", partial(RATMixer, heads=4, chunk=16)),
        "rnn": ("RNN", partial(RNNMixer, length=NEEDLES["length"])),
    },
    build=read_needles,
    recipe=RETRIEVAL,
    lrs=(1e-3, 3e-3, 1e-2),
    probes={"selection": selection},
    about="12 pairs of key and value among 108 tokens of filler, then the keys",
    kind="mixer",
    setting={**SIZE, "heads": 4, **NEEDLES},
)
FORGETS = "One state for all that was read forgets, says the paper: that is why it attends across chunks."

# Cost.

OPERATIONS = Timing(
    "operations of a decoder block of width 2048",
    {"softmax attention": softmax_alone(2048, 16), "whole block": decoder_block(2048, 16)},
    sizes=(4096, 16_384, 65_536, 98_304),
    quantity="flops",
    note="On both sides the half of the square that a causal kernel leaves out is counted as if it were done.",
)
TRAINING_OPERATIONS = Timing(
    "operations of training a layer of width 2048",
    {
        "attention": counted(attention, 2048, 16),
        "RAT, chunks of 16": counted(RATMixer, 2048, 16),
        "RAT, chunks of 64": counted(partial(RATMixer, chunk=64), 2048, 16),
        "RNN": counted(rnn, 2048, 16),
    },
    sizes=(4096, 8192, 16_384, 32_768, 65_536, 98_304),
    quantity="flops",
    note=OPERATIONS.note,
)
TRAINING = Timing(
    "forward and backward of a layer",
    {
        "attention": trained(attention, 16, 1),
        "RAT, chunks of 16": trained(partial(RATMixer, groups=1), 16, 1),
        "RNN": trained(rnn, 16, 1),
    },
    sizes=(512, 2048, 8192, 32_768),
    rounds=7,
    setting={"dim": 16, "heads": 1, "batch": 1},
)
STREAMS: dict[str, Any] = {"dim": 256, "heads": 8, "slots": 2**16}  # `streamed` takes a dtype too
GENERATION = Timing(
    "a token more in two layers",
    {
        "attention": streamed(attention, attention, **STREAMS),
        "attention and window": streamed(attention, window, **STREAMS),
        "RAT, chunks of 16": streamed(RATMixer, RATMixer, **STREAMS),
        "RAT and window": streamed(RATMixer, window, **STREAMS),
        "RNN": streamed(rnn, rnn, **STREAMS),
    },
    sizes=(1024, 4096, 16_384),
    setting={**STREAMS, "window": 1025},
    note="The longer the streams, the fewer of them: 65,536 tokens are held in all.",
)
XL: dict[str, Any] = {"dim": 2048, "heads": 16}
CACHE = Timing(
    "what a stream holds in two layers of width 2048",
    {
        "attention": count_stream_bytes(attention, attention, **XL),
        "attention and window": count_stream_bytes(attention, window, **XL),
        "RAT, chunks of 4": count_stream_bytes(*[partial(RATMixer, chunk=4)] * 2, **XL),
        "RAT, chunks of 16": count_stream_bytes(RATMixer, RATMixer, **XL),
        "RAT and window": count_stream_bytes(RATMixer, window, **XL),
        "RNN": count_stream_bytes(rnn, rnn, **XL),
    },
    sizes=(1024, 4096, 16_384, 65_536),
    quantity="count",
    of="bytes",
    setting={"type": "bfloat16, running states float32", "window": 1025},
)


# The paper's figures, on a GPU: as many tokens in all at every length.

ON_GPU: dict[str, Any] = {"dtype": torch.bfloat16, **XL}
GPU: dict[str, Any] = {"gpu": "a CUDA GPU with 40 GB (the paper's is a GH200)", "at_paper_setting": True}
GPU_TRAINING = Timing(
    "forward and backward of a layer of width 2048",
    {
        "attention": trained(attention, tokens=2**18, **ON_GPU),
        "RAT, chunks of 16": trained(RATMixer, tokens=2**18, **ON_GPU),
    },
    sizes=(4096, 16_384, 65_536, 131_072),
    rounds=9,
    setting={**XL, "type": "bfloat16", "tokens in all": 2**18},
    **GPU,
)
GPU_GENERATION = Timing(
    "a token more in a layer of width 2048",
    {
        "attention": streamed(attention, slots=2**21, **ON_GPU),
        "RAT, chunks of 16": streamed(RATMixer, slots=2**21, **ON_GPU),
    },
    sizes=(4096,),
    rounds=41,
    setting={**XL, "type": "bfloat16", "streams": 512},
    **GPU,
)

EXPERIMENTS: dict[str, Measure] = {
    "softmax_share": OPERATIONS.against("softmax attention", "whole block"),
    "training_operations": TRAINING_OPERATIONS.against("attention", "RAT, chunks of 16"),
    "training_speed": TRAINING.against("attention", "RAT, chunks of 16"),
    "generation_speed": GENERATION.against("attention", "RAT, chunks of 16", at=4096),
    "hybrid_generation": GENERATION.against("attention", "RAT and window", at=4096),
    "hybrid_generation_window": GENERATION.against("attention and window", "RAT and window", at=4096),
    "cache_dial": CACHE.against("RAT, chunks of 4", "RAT, chunks of 16", at=4096),
    "hybrid_cache": CACHE.against("RAT and window", "attention", at=4096),
    "hybrid_cache_window": CACHE.against("RAT and window", "attention and window", at=4096),
    "text_on_par": TEXT.against("rat", "attention", shown=["rnn"]),
    "text_rnn": TEXT.against("rat", "rnn"),
    "text_hybrid": TEXT.against("hybrid", "attention"),
    "longer_than_trained": TEXT.against("hybrid", "attention", metric="rise", shown=TEXT.variants),
    "needles_on_par": RECALL.against("rat16", "attention", shown=RECALL.variants),
    "needles_chunks": RECALL.against("rat4", "rat16"),
    "needles_rnn": RECALL.against("rat16", "rnn", may_guess=FORGETS),
    "gates_select": RECALL.figure("rat16", metric="selection"),
    "training_speed_gpu": GPU_TRAINING.against("attention", "RAT, chunks of 16"),
    "generation_speed_gpu": GPU_GENERATION.against("attention", "RAT, chunks of 16"),
}


# The dial: attention at one end, a gated RNN at the other.


def randomise_weights(layer: Any) -> Any:  # the layer itself, of whatever class
    """In float64, with weights so large that gates and softmax are far from even."""
    for i, parameter in enumerate(layer.parameters()):
        parameter.data = normal(*parameter.shape, seed=i) * 0.4
    return layer.eval()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@measures("one_chunk_is_the_rnn")
def one_chunk_is_the_rnn(run: Run) -> Measurement:
    """Queries and keys are 100 times as large in a second turn: a softmax over one score does not see them."""
    worst = 0.0
    for tokens in (1, 16, 61):
        rat, rnn_mixer = randomise_weights(RATMixer(24, 4, chunk=tokens)), randomise_weights(RNNMixer(24))
        rnn_mixer.project.weight.data = rat.project.weight.data[: 3 * 24].clone()
        rnn_mixer.gate_bias.data, rnn_mixer.out.weight.data = rat.gate_bias.data, rat.out.weight.data
        x = normal(2, tokens, 24)
        for _ in range(2):
            worst = max(worst, (rat(x) - rnn_mixer(x)).abs().max().item())
            rat.project.weight.data[3 * 24 :] *= 100
    return Measurement.exact(worst, "largest difference, float64", setting={"tokens": [1, 16, 61]})


@measures("chunks_of_one_are_attention")
def chunks_of_one_are_attention(run: Run) -> Measurement:
    """Softmax attention with token positions over (1 − g) ⊙ k and (1 − g) ⊙ v, written out."""
    layer, x = randomise_weights(RATMixer(24, 4, chunk=1)), normal(2, 61, 24)
    z, v, g, q, k = layer._project(x)
    q, k, v = (tensor.unflatten(-1, (4, -1)).transpose(1, 2) for tensor in (q, (1 - g) * k, (1 - g) * v))
    token = torch.arange(61)
    y = F.scaled_dot_product_attention(rotate(q, token), rotate(k, token), v, is_causal=True)
    expected = layer.out(z * y.transpose(1, 2).flatten(2))
    return Measurement.exact((layer(x) - expected).abs().max().item(), "largest difference, float64")
