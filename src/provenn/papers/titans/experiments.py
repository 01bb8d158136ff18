"""What the paper says of Titans, and what building it brought to light, as measurements."""

from dataclasses import replace

from provenn.evidence import Benchmark, Drawing, Measurement, Run, Study, Timing, measures
from provenn.nn.mixers import NoMixer
from provenn.papers.titans.layers import frozen_memory
from provenn.papers.titans.rivals import (
    NEEDLE_WIDTH,
    ChunkedDeltaRule,
    attention_with_alibi,
    attention_without_positions,
    reading_needles,
)
from provenn.papers.titans.studies import (
    MEMORY,
    SEGMENT,
    TEXT_MEMORY,
    TEXT_WINDOW,
    TRAINED,
    WINDOW,
    GatedRecurrence,
    bytes_held,
    draw_reading,
    forecasting,
    found_at,
    full_attention,
    inner_fall,
    late_bits,
    memory,
    memory_pass,
    narrow_attention,
    needle_data,
    next_token,
    pairs_data,
    reading,
    recalling,
    right,
    right_beyond,
    right_far,
    right_within,
    series_data,
    small_chunks,
    switched,
    text_data,
    text_memory,
    training_pass,
    window_and_delta,
    window_attention,
    window_of_text,
)
from provenn.training import Recipe

BASELINES = {"attention": ("full attention", full_attention), "rnn": ("linear RNN", GatedRecurrence)}
ONE_PASS = Recipe(epochs=1, batch_size=8, optimizer="adamw", weight_decay=0.01, schedule="onecycle", clip=1.0)

RECALL = Study(
    "recall",
    "recall",
    data=pairs_data,
    variants={
        "lmm": ("LMM", memory("lmm")),
        "mac": ("MAC", memory("mac")),
        "mag": ("MAG", memory("mag")),
        "mal": ("MAL", memory("mal")),
        **BASELINES,
        "window": ("window attention", window_attention),
        "still": ("LMM without momentum", memory("lmm", momentum=False)),
    },
    build=recalling,
    recipe=replace(ONE_PASS, max_steps=4000),
    lrs=(3e-3, 1e-2, 3e-2),
    probes={
        "beyond the window": right_beyond,
        "at 16 times the length": right_far,
        "unwritten": switched(right, frozen_memory),
        "within": right_within,
        "within, unwritten": switched(right_within, frozen_memory),
        "beyond, unwritten": switched(right_beyond, frozen_memory),
        "within, narrow": switched(right_within, narrow_attention),
        "beyond, narrow": switched(right_beyond, narrow_attention),
    },
    about="4 pairs of a key and a value in noise, then the keys: 16 tokens; generated",
    setting={"dim": 32, "blocks": 1, "window": WINDOW, "segment": SEGMENT, **MEMORY},
    note="All variants have 24,000 parameters, by the width of the feed-forward part.",
)

TEXT = Study(
    "reading text",
    "language-modelling",
    data=text_data,
    variants={"lmm": ("LMM", text_memory("lmm")), **BASELINES},
    build=reading,
    recipe=replace(ONE_PASS, max_steps=1000),
    lrs=(3e-3, 1e-2, 3e-2),
    probes={
        "late": late_bits,
        "late, unwritten": switched(late_bits, frozen_memory),
        "late share of the inner loss": inner_fall,
    },
    about="the standard library's source, bytes, windows of 64",
    setting={"dim": 32, "blocks": 1, "chunk": 16, "heads": 2, "probed at": 1024, **TEXT_MEMORY},
    note="All variants have 50,000 parameters, by the width of the feed-forward part.",
    drawing=Drawing(
        "lmm",
        "reading",
        "Along texts of 16 times the training length: writing, momentum off, never written.",
        draw_reading,
    ),
)

BUILT_IN = Study(
    "reading text, with a memory built in",
    "language-modelling",
    data=text_data,
    variants={
        "mac": ("MAC", text_memory("mac")),
        "mag": ("MAG", text_memory("mag")),
        "mal": ("MAL", text_memory("mal")),
        "lmm": ("LMM", text_memory("lmm")),
        "attention": BASELINES["attention"],
        "window": ("window attention", window_of_text),
        "delta": ("window attention with a gated delta rule", window_and_delta),
    },
    build=reading,
    recipe=replace(ONE_PASS, max_steps=1000),
    lrs=(3e-3, 1e-2, 3e-2),
    about="the standard library's source, bytes, windows of 64",
    setting={"dim": 32, "blocks": 1, "chunk": 16, "heads": 2, "window": TEXT_WINDOW, **TEXT_MEMORY},
    note="All variants have 50,000 parameters, by the width of the feed-forward part.",
)

SERIES = Study(
    "forecasting",
    "series-forecasting",
    data=series_data,
    variants={"lmm": ("LMM", memory("lmm")), **BASELINES, "none": ("no mixer", NoMixer)},
    build=forecasting,
    recipe=Recipe(epochs=30, batch_size=16, optimizer="adam", schedule="onecycle", clip=1.0),
    lrs=(1e-3, 3e-3, 1e-2),
    about="airline passengers by month, standardised",
    setting={"dim": 16, "blocks": 1},
    note="One series of 144 months: the seeds differ in where a model starts.",
)

LONGEST = "at 256 times the length"
NEEDLE = Study(
    "a needle in text",
    "recall",
    data=needle_data,
    variants={
        "lmm": ("LMM", memory("lmm")),
        "mac": ("MAC", memory("mac")),
        "delta": ("Gated DeltaNet", ChunkedDeltaRule),
        "bare": ("attention without positions", attention_without_positions),
        "alibi": ("attention with ALiBi", attention_with_alibi),
    },
    build=reading_needles,
    recipe=replace(ONE_PASS, batch_size=16, max_steps=1500),
    lrs=(3e-3, 1e-2, 3e-2),
    probes={"at 16 times the length": found_at(16), LONGEST: found_at(256)},
    about="one key with its value in bytes of the standard library's source, at the end the key; 16 keys, 8 values",
    setting={"tokens": TRAINED, "dim": NEEDLE_WIDTH, "blocks": 1, "segment": SEGMENT, **MEMORY},
    note="All variants have 36,000 parameters. Rates are chosen by validation text of 8 times the training length.",
)

LAYERS = ("LMM", "attention", "linear RNN")
OPERATIONS = Timing(
    "operations of a training pass",
    {name: training_pass(name) for name in LAYERS},
    sizes=(128, 256, 512, 1024, 2048),
    quantity="flops",
    setting={"dim": 64, "chunk": 16},
    note="The linear RNN trains in its parallel form here, a product of tokens × tokens; token by token it is linear.",
)
STEP = Timing(
    "operations of one token more",
    {name: next_token(name) for name in ("LMM", "attention")},
    sizes=(1024, 4096, 16_384),
    quantity="flops",
    unit="tokens before",
    setting={"dim": 64},
)
STATE = Timing(
    "bytes of a stream's state",
    {name: bytes_held(name) for name in ("LMM", "attention")},
    sizes=(2**10, 2**12, 2**14, 2**21),
    quantity="count",
    of="bytes",
    setting={"dim": 8, "chunk": 64},
)
CHUNKS = Timing(
    "time of a training pass",
    {"chunks of 16": small_chunks(16), "token by token": small_chunks(1)},
    sizes=(16, 32, 64),
    rounds=7,
    setting={"dim": 32},
)

OUTSIDE = "what lies outside the window it cannot see"
# Probes that fail where the network is on a GPU, and why.
CPU_ONLY = dict.fromkeys(
    (
        "beyond the window",
        "within",
        "within, unwritten",
        "beyond, unwritten",
        "within, narrow",
        "beyond, narrow",
        "late",
        "late, unwritten",
        "late share of the inner loss",
        "at 16 times the length",
        "at 256 times the length",
    ),
    "the tokens stay on the CPU; the mend asks for records to be repeated, up to 10 minutes of one core each",
)

EXPERIMENTS = {
    "attention_recalls": RECALL.against("attention", "rnn"),
    "attention_operations": OPERATIONS.grows("attention"),
    "inner_loss_falls": TEXT.figure("lmm", metric="late share of the inner loss", picture=True),
    "chunks_train_faster": CHUNKS.against("chunks of 16", "token by token"),
    "operations": OPERATIONS.grows("LMM"),
    "next_token": STEP.against("LMM", "attention"),
    "recall_attention": RECALL.against("lmm", "attention"),
    "recall_rnn": RECALL.against("lmm", "rnn"),
    "text_attention": TEXT.against("lmm", "attention"),
    "text_rnn": TEXT.against("lmm", "rnn"),
    "forecasting_attention": SERIES.against("lmm", "attention", ratio=True, shown=("none",)),
    "forecasting_rnn": SERIES.against("lmm", "rnn", ratio=True, shown=("none",)),
    "far_attention": RECALL.against("lmm", "attention", metric="at 16 times the length"),
    "far_rnn": RECALL.against("lmm", "rnn", metric="at 16 times the length"),
    "needle_in_text": NEEDLE.against("mac", ("delta", "bare", "alibi"), metric=LONGEST, shown=("lmm",)),
    "gate_beyond_window": RECALL.against("mag", "window", metric="beyond the window", may_guess=OUTSIDE),
    "three_variants": RECALL.against(("mac", "mag", "mal"), "window", shown=("lmm",), may_guess=OUTSIDE),
    "three_window": BUILT_IN.against(("mac", "mag", "mal"), "window"),
    "three_rivals": BUILT_IN.against(("mac", "mag", "mal"), ("lmm", "attention", "delta")),
    "momentum_helps": RECALL.against("lmm", "still"),
}


# The memory alone, beside a port: at its mathematics with one gate of each kind for all layers and channels.

WIDTHS = (64, 128, 256, 384)
PORT = "titans-pytorch"
FORMS = {"one gate": "token", "gates by channel": "layer"}


def beside_the_port(chunk: int, training: bool, batch: int, tokens: int, widths: tuple[int, ...] = WIDTHS) -> Timing:
    return Timing(
        f"a neural memory in chunks of {chunk}, {'forward and backward' if training else 'forward'}",
        {
            label: memory_pass(side, chunk=chunk, batch=batch, tokens=tokens, training=training)
            for label, side in {**FORMS, PORT: PORT}.items()
        },
        sizes=widths,
        unit="width",
        rounds=7,
        setting={"batch": batch, "tokens": tokens},
    )


BENCHMARKS = tuple(
    Benchmark(timing, form, PORT, within=0.8, package=PORT)
    for timing in (
        beside_the_port(chunk, training, *setting)
        for chunk in (16, 64)
        for training in (False, True)
        for setting in ((1, 128), (16, 128, (64, 128)))
    )
    for form in FORMS
)


async def switched_off(
    run: Run, study: Study, variant: str, lost: tuple[str, str], elsewhere: tuple[str, str] | None = None
) -> Measurement:
    """A trained variant's figure with something on and switched off; or what it so loses by two metrics."""
    _, facts = await study.measure(run, [variant])
    trials = await study.trials(run, variant)
    facts["unit"] = study.of_task.metric.replace("_", " ")
    as_it_is, off = ([trial[name] for trial in trials] for name in lost)
    if elsewhere is None:
        return Measurement.paired(as_it_is, off, **facts)
    losses = [a - b for a, b in zip(as_it_is, off)]
    return Measurement.paired(losses, [trial[elsewhere[0]] - trial[elsewhere[1]] for trial in trials], **facts)


@measures("writing_recalls")
async def writing_recalls(run: Run) -> Measurement:
    return await switched_off(run, RECALL, "lmm", ("accuracy", "unwritten"))


@measures("writing_reads")
async def writing_reads(run: Run) -> Measurement:
    return await switched_off(run, TEXT, "lmm", ("late", "late, unwritten"))


FAR, NEAR = "beyond the window", "within"


@measures("memory_is_long")
async def memory_is_long(run: Run) -> Measurement:
    return await switched_off(run, RECALL, "mag", (FAR, "beyond, unwritten"), (NEAR, "within, unwritten"))


@measures("attention_is_short")
async def attention_is_short(run: Run) -> Measurement:
    return await switched_off(run, RECALL, "mag", (NEAR, "within, narrow"), (FAR, "beyond, narrow"))


@measures("state_is_constant")
async def state_is_constant(run: Run) -> Measurement:
    """Growth has no interval where nothing grows, so this is a quotient of counts."""
    held = await STATE.measure(run)
    first, *_, last = (count for (count,) in held["LMM"])
    unit = "bytes at the longest / at the shortest"
    return Measurement.of("exact ratio", [last], [first], unit=unit, **STATE.shown(run, held))
