"""How long networks take for images: eager, compiled and in ONNX Runtime, in turns, beside a named reference."""

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from provenn.catalog import Card, Preset, cards
from provenn.core import cost, progress
from provenn.core.errors import UserError
from provenn.core.inputs import machine_memory
from provenn.core.names import in_a_line, meant
from provenn.core.narrowing import present
from provenn.experiments.compare.latencies import FORMS, Cost, Latency, LatencyBench
from provenn.inference.onnx import translations
from provenn.nn.fusion import fuse
from provenn.tasks import get_task

THREADS = 64  # that may be asked for where there are fewer cores
SHORT = {"eager": "eager", "compile": "torch.compile", "onnx": "ONNX Runtime"}  # as the command line calls them
Build = Callable[[], nn.Module]


def ours(names: Sequence[str] | None = None, *, size: int = 224, channels: int = 3) -> dict[str, Build]:
    """Classification backbones of the papers: by preset or by slug; by default all with published figures.

    A classifier without `features`, which is no backbone, is taken where its preset is named. Each is built for images
    of `size` and `channels`, where it takes them: small presets take grey ones by default, and some a single size.
    """
    known = {
        preset.name: (card, preset)
        for card in cards().values()
        for preset in card.presets
        if _classifies_images(card.work_of(preset))
    }
    images = {"size": size, "in_channels": channels}
    if names is None:
        chosen = {name: pair for name, pair in known.items() if pair[1].published}
        return {name: partial(_preset, *pair, images) for name, pair in chosen.items() if _is_backbone(*pair)}
    builds: dict[str, Build] = {}
    for name in names:
        mine = [each for each, (card, _) in known.items() if name in (each, card.slug)]
        if not mine:
            every = [*peers(224), *known]
            raise UserError(f"no backbone is called {name!r}{meant(name, every)}; there are: {', '.join(every)}")
        chosen = {each: known[each] for each in mine if name == each or _is_backbone(*known[each])}
        builds |= {each: partial(_preset, *pair, images) for each, pair in chosen.items()}
    return builds


def _classifies_images(task: str | None) -> bool:
    try:
        return task is not None and get_task(task).augments
    except UserError:  # of another package
        return False


def _preset(card: Card, preset: Preset, images: Mapping[str, int]) -> nn.Module:
    build = card.resolve(preset.build)
    known = {*signature(build).parameters, *preset.options}
    return build(**{**preset.options, **{name: value for name, value in images.items() if name in known}})


def _is_backbone(card: Card, preset: Preset) -> bool:
    try:
        with torch.device("meta"):
            return hasattr(_preset(card, preset, {}), "features")
    except Exception:  # what cannot be built without memory, or lacks a package, is none that we know of
        return False


class _Logits(nn.Module):
    """A classifier of transformers that gives a tensor."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        return self.model(image).logits


def peers(size: int) -> dict[str, Build]:
    """Networks of transformers with random weights, by name; none where it is not installed."""
    if find_spec("transformers") is None:
        return {}

    def made(kind: str, **options: Any) -> nn.Module:
        import transformers

        config = getattr(transformers, f"{kind}Config")(num_labels=1000, **options)
        return _Logits(getattr(transformers, f"{kind}ForImageClassification")(config))

    return {
        "mobilenet_v2": partial(made, "MobileNetV2"),
        "mobilevitv2": partial(made, "MobileViTV2", image_size=size),
        "resnet50": partial(made, "ResNet"),
        "swin_tiny": partial(made, "Swin", image_size=size),
    }


def choose(names: Sequence[str], size: int) -> dict[str, Build]:
    """Networks of those names, ours and peers; `all` stands for every one. Peers come with any choice of ours."""
    beside = peers(size)
    if list(names) == ["all"]:
        return {**beside, **ours(size=size)}
    own = [name for name in names if name not in beside]
    chosen = {name: beside[name] for name in names if name in beside}
    return {**(chosen or beside), **(ours(own, size=size) if own else {})}


def measure(
    networks: Mapping[str, Build],
    *,
    size: int = 224,
    channels: int = 3,
    batches: Sequence[int] = (1, 32),
    threads: Sequence[int] = (1, 2),
    rounds: int = 15,
    reference: str | None = None,
    forms: Sequence[str] = FORMS,
) -> LatencyBench:
    """Time every network on the CPU in every form: all in turns, so that what else the machine does meets all alike.

    What fails is said, and the others go on.

    Args:
        networks: makes each, from random weights; fused where they can be traced.
        size, channels: of the images.
        batches, threads: every pair of them.
        rounds: how often each is timed; 6 is the fewest that give a 95 % interval.
        reference: whose time ratios are to; the first by default.
        forms: some of `FORMS`; compiling takes most of the time, a minute and more for a large network.

    Raises:
        UserError: a number below 1, a form or a reference that is not there, or no network that runs.
    """
    for name, numbers in {"size": [size], "batch": batches, "threads": threads, "rounds": [rounds]}.items():
        if not numbers or min(numbers) < 1:
            raise UserError(f"{name} must be at least 1, got {', '.join(map(str, numbers)) or 'nothing'}")
    cores = os.cpu_count() or 1
    if max(threads) > max(cores, THREADS):
        raise UserError(f"threads must be at most {max(cores, THREADS)}, got {max(threads)}: there are {cores} cores")
    bytes_needed = 4 * max(batches) * channels * size * size
    if bytes_needed > machine_memory():
        raise UserError(
            f"{max(batches)} images of {size}×{size} pixels do not fit into the memory of this machine: "
            "give a smaller batch or size"
        )
    odd = next((form for form in forms if form not in FORMS), None)
    if odd is not None or not forms:
        raise UserError(f"forms are {', '.join(FORMS)}; got {odd or 'none'}")
    if reference is not None and reference not in networks:
        raise UserError(f"the reference {reference!r} is none of the networks: {', '.join(networks)}")
    models: dict[str, nn.Module] = {}
    costs: dict[str, Cost] = {}
    troubles: dict[str, str] = {}
    with progress.bar("building", len(networks)) as advance:
        for name, build in networks.items():
            try:
                models[name], costs[name] = _prepare(build, torch.zeros(2, channels, size, size))
            except Exception as error:  # one network's trouble costs no other
                troubles[name] = _trouble(error)
                progress.say(f"{name}: left out: {troubles[name]}")
            advance(1, name)
    if not models:
        raise UserError(f"none of the networks runs: {'; '.join(f'{n}: {t}' for n, t in troubles.items())}")
    first = next(iter(models)) if reference is None else reference
    if first not in models:
        raise UserError(f"the reference {first} does not run: {troubles[first]}")
    latencies: list[Latency] = []
    cells = [(batch, count) for count in threads for batch in batches]
    with progress.bar("latency", len(cells) * len(models) * len(forms) * (rounds + 1)) as advance:
        for batch, count in cells:
            image = torch.rand(batch, channels, size, size)
            latencies += _time(models, image, count, rounds, first, forms, advance)
    return LatencyBench(first, size, costs, tuple(latencies), troubles)


def _prepare(build: Build, image: Tensor) -> tuple[nn.Module, Cost]:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = build().eval()
        parameters = cost.count_parameters(model)
        macs = cost.macs(lambda: model(image[:1]))
        try:
            return fuse(model, image), Cost(parameters, macs, True)
        except Exception:  # a tracer fails in many ways
            return model, Cost(parameters, macs, False)


def _time(
    models: Mapping[str, nn.Module],
    image: Tensor,
    threads: int,
    rounds: int,
    reference: str,
    forms: Sequence[str],
    advance: Callable[..., None],
) -> Iterator[Latency]:
    """Each network in each form, at one batch and number of threads."""
    makers = {"eager": _eager, "torch.compile": _compiled, "ONNX Runtime": _onnx}
    calls: dict[tuple[str, str], Callable[[], object]] = {}
    troubles: dict[tuple[str, str], str] = {}
    with _threads(threads), torch.no_grad():
        for name, model in models.items():
            for form in forms:
                advance(0, f"{name}: {form}, making it ready")  # compiling takes a minute and more
                try:
                    call = makers[form](model, image, threads)
                    call()
                except Exception as error:  # one form's trouble costs no other
                    troubles[name, form] = _trouble(error)
                    progress.say(f"{name}, {form}, batch {len(image)}: {troubles[name, form]}")
                    advance(rounds + 1, f"{name}: {form}")
                    continue
                calls[name, form] = _counted(call, partial(advance, 1, f"{name}: {form}"))
        times = cost.interleaved(calls, rounds=rounds, threads=threads) if calls else {}
    torch.compiler.reset()
    for name in models:
        for form in forms:
            latency = Latency(name, form, len(image), threads, trouble=troubles.get((name, form), ""))
            if (name, form) in times:
                latency = replace(latency, seconds=tuple(times[name, form]))
                if (reference, form) in times:
                    ratio = cost.Comparison.of(times[name, form], times[reference, form])
                    latency = replace(latency, ratio=ratio.ratio, interval=ratio.interval if rounds >= 6 else None)
            yield latency


def _counted(call: Callable[[], object], advance: Callable[[], None]) -> Callable[[], object]:
    def counted() -> object:
        result = call()
        advance()
        return result

    return counted


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _eager(model: nn.Module, image: Tensor, threads: int) -> Callable[[], object]:
    return partial(model, image)


def _compiled(model: nn.Module, image: Tensor, threads: int) -> Callable[[], object]:
    from torch._dynamo import config as dynamo
    from torch._inductor import config as inductor

    call = torch.compile(model, fullgraph=True, dynamic=False)
    # Networks of one class share a code object, whose count of variants would soon fall back to eager; and compiled
    # loops have their number of threads written into them.
    many = dynamo.patch(recompile_limit=10_000, accumulated_recompile_limit=10_000)
    with many, inductor.patch({"cpp.threads": threads}):
        call(image)
    return partial(call, image)


def _onnx(model: nn.Module, image: Tensor, threads: int) -> Callable[[], object]:
    for package in ("onnxscript", "onnxruntime"):
        if find_spec(package) is None:
            raise UserError(f"{package} is not installed: pip install 'provenn[onnx]'")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    # Threads that wait by spinning would take time from whoever is timed next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    with tempfile.TemporaryDirectory() as folder, progress.quiet_loggers("torch.onnx", "onnxscript", "onnx_ir"):
        program = torch.onnx.export(
            model, (image,), dynamo=True, verbose=False, custom_translation_table=translations()
        )
        file = Path(folder) / "network.onnx"
        present(program, "program").save(str(file))
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return partial(session.run, None, {session.get_inputs()[0].name: image.numpy()})


def _trouble(error: Exception) -> str:
    """An error's kind and the beginning of what it says."""
    words = in_a_line(error)
    if "compiler" in words.lower() and "found" in words.lower():
        return f"no compiler: {words[:120]}"
    return words[:180]
