"""Hold a mechanism or a paper to the checks."""

import dis
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from provenn.catalog import Card, Mechanism, Preset, card
from provenn.catalog.slots import Slot, slot
from provenn.core.errors import UserError
from provenn.core.names import in_a_line
from provenn.testing.common import CHECKS, parameters_on_meta
from provenn.testing.evidence import faults_of_claims, faults_of_evidence, faults_of_experiments
from provenn.testing.golden import GOLDEN, check_case, read_cases
from provenn.testing.probes import faults_of_probes
from provenn.testing.shipped import check_weights, files_of
from provenn.testing.subject import Subject

OF_EVERY_PRESET = ("match-published-counts", "reach-parameters", "build-on-meta", "feed-heads")
OF_BACKBONES = ("feed-heads", "tell-classes")
OF_LARGE_PRESETS = ("match-published-counts", "build-on-meta")
# What another direction of looking may change. How weights are kept, and what is refused, is the same in both.
OF_BOTH_WAYS = (
    "keep-shape", "keep-examples-apart", "mix", "heed-mask", "reach-parameters", "keep-gradients-finite",
    "pass-gradcheck", "differentiate-twice", "differentiate-forward", "train-in-mixed-precision",
    "take-an-empty-batch", "run-in-bfloat16", "build-on-meta", "run-on-another-device", "be-deterministic",
    "train-as-it-evaluates", "leave-its-input", "take-any-layout", "export-open-sizes", "export",
)  # fmt: skip
FAULTS = {
    "claims": faults_of_claims,
    "experiments": faults_of_experiments,
    "evidence": faults_of_evidence,
    "probes": faults_of_probes,
}
FOLLOWS = {"export": "export-open-sizes"}  # what need not be asked where another, asked before it, was kept
TRACED = ("compile", "export", "export-open-sizes")
LARGE = 2**28  # parameters; beyond, weights and gradients are more than a test should hold


class FailedCheck(AssertionError):
    """One or more checks that a mechanism or a preset does not keep, a line for each."""


def check_mechanism(
    factory: Callable[..., Any],
    slot_name: str,
    *,
    expected_failures: Mapping[str, str] | None = None,
    only: Collection[str] | None = None,
) -> None:
    """Hold a mechanism to every check of its slot.

    A token mixer that takes `causal=False` too is held to those of them that this may change once more.

    Args:
        factory: makes it, as the slot says: `factory(dim)`, `factory(channels)`, ...
        slot_name: one of `provenn.catalog.slots.SLOTS`.
        cannot: checks that it cannot keep, each with the reason. One that it does keep is reported as well.
        only: names of the checks to ask for; by default all.

    Raises:
        FailedCheck: one or more checks are broken; a line for each.
    """
    of, expected_failures = slot(slot_name), expected_failures or {}
    name = f"{_called(factory)} as {of.name}"
    _ask(Subject.mechanism(factory, of, name), of.name, expected_failures, only)
    if _looks_both_ways(of.name, expected_failures):
        _ask_both_ways(factory, of, name, expected_failures, only)


def check_paper(paper: str | Card, *, golden: str | Path | None = None) -> None:
    """Hold all that a paper says of itself to what it is.

    - Every mechanism and every preset keeps its checks. The smallest preset of each task is asked for all of them. The
      others are the same code, and are asked for a few. Those with more than 2^28 parameters are asked for what the
      meta device can show.
    - The weights that ship have the metrics that they state.
    - Claims, experiments and what measures them name each other.
    - Effects, intervals and verdicts of the record that ships follow from its values.
    - With the authors' weights our models give the authors' values.

    Args:
        paper: a slug, or the card of a paper that is not installed (`provenn.catalog.read_card`).
        golden: a file of golden values; by default `golden.json` in the paper's folder, where there is one.

    Raises:
        FailedCheck: one or more checks are broken; a line for each.
    """
    broken = []
    for check in checks_of(card(paper) if isinstance(paper, str) else paper, golden=golden).values():
        try:
            check()
        except FailedCheck as error:
            broken.append(str(error))
    if broken:
        raise FailedCheck("\n".join(broken))


def checks_of(paper: Card, *, golden: str | Path | None = None) -> dict[str, Callable[[], None]]:
    """One check for each mechanism, each of its variants, each preset and each weight file of a paper, by name; and
    for its claims, its experiments, its record and each of its golden values.

    A token mixer that is causal or not, as it is built, has one for each of the two.
    """
    slug = paper.slug
    checks: dict[str, Callable[[], None]] = {}
    for m in paper.mechanisms:
        for variant in ({}, *m.variants):
            checks[f"{slug} {m.name}{_options(variant)}"] = partial(_check_mechanism, paper, m, variant)
            if _looks_both_ways(m.slot, m.expected_failures):
                name = f"{slug} {m.name}{_options({**variant, 'causal': False})}"
                checks[name] = partial(_check_mechanism, paper, m, variant, causal=False)
    checks |= {f"{slug} {p.name}": partial(_check_preset, paper, p) for p in paper.presets}
    for what, faults in FAULTS.items():
        checks[f"{slug} {what}"] = partial(_check_faults, paper, f"{slug} {what}", faults)
    files = {f"{slug} weights/{file.name}": partial(check_weights, paper, file) for file in files_of(paper)}
    cases = {f"{slug} golden/{name}": partial(check_case, paper, case) for name, case in _cases(paper, golden).items()}
    return checks | {name: partial(_check_file, name, check) for name, check in (files | cases).items()}


def _cases(paper: Card, golden: str | Path | None) -> dict[str, dict[str, Any]]:
    file = paper.folder / GOLDEN if golden is None else Path(golden)
    return read_cases(file) if golden is not None or file.exists() else {}


def _options(variant: Mapping[str, Any]) -> str:
    return f" with {', '.join(f'{key}={value!r}' for key, value in variant.items())}" if variant else ""


def _looks_both_ways(slot_name: str, expected_failures: Mapping[str, str]) -> bool:
    """Whether a mechanism is causal or not, as it is built."""
    return slot_name == "token-mixer" and not {"be-causal", "see-both-ways"} & expected_failures.keys()


def _ask_both_ways(
    factory: Callable[..., Any],
    of: Slot,
    name: str,
    expected_failures: Mapping[str, str],
    only: Collection[str] | None = None,
) -> None:
    """What `causal=False` may change, but what the mechanism is excused from as it is."""
    asked = [check for check in OF_BOTH_WAYS if check not in expected_failures and (only is None or check in only)]
    _ask(Subject.mechanism(factory, of, f"{name} with causal=False", causal=False), of.name, {}, asked)


def _check_mechanism(paper: Card, mechanism: Mechanism, variant: Mapping[str, Any], *, causal: bool = True) -> None:
    name = f"{paper.slug} {mechanism.name}{_options(variant)}"
    try:
        of, layer = slot(mechanism.slot), paper.resolve(mechanism.layer)
    except UserError as error:
        raise FailedCheck(f"{name}\n  {error}") from None
    except (ImportError, AttributeError) as error:
        raise FailedCheck(f"{name}\n  {mechanism.layer} cannot be imported: {error}") from error
    arguments = {**mechanism.arguments, **variant}
    # A backbone is a preset too, or made as one: what every system checks is asked of that.
    only = {*OF_BACKBONES, *mechanism.expected_failures} if of.name == "backbone" else None
    factory = partial(layer, **arguments)
    if causal:
        _ask(Subject.mechanism(factory, of, name), of.name, mechanism.expected_failures, only)
    else:
        _ask_both_ways(factory, of, name, mechanism.expected_failures)


def _check_preset(paper: Card, preset: Preset) -> None:
    if paper.work_of(preset) is None and not _is_module(paper, preset):
        return  # a procedure that is called, with no weights, modes or devices
    few = OF_LARGE_PRESETS if LARGE < _size(paper, preset) < math.inf else OF_EVERY_PRESET
    asked = None if preset in smallest_presets(paper) else {*few, *preset.expected_failures}
    _ask(Subject.preset(paper, preset), None, preset.expected_failures, asked)


def _is_module(paper: Card, preset: Preset) -> bool:
    try:
        made = paper.resolve(preset.build)(**preset.options)
    except Exception as error:
        raise FailedCheck(f"{paper.slug} {preset.name}\n  cannot be built: {in_a_line(error)}") from error
    if not callable(made):
        raise FailedCheck(f"{paper.slug} {preset.name}\n  is no module and nothing that can be called: {made!r}")
    return isinstance(made, nn.Module)


def _check_faults(paper: Card, name: str, faults: Callable[[Card], Iterator[str]]) -> None:
    lines = list(faults(paper))
    if lines:
        raise FailedCheck("\n  ".join([name, *lines]))


def _check_file(name: str, check: Callable[[], None]) -> None:
    try:
        check()
    except (AssertionError, UserError) as error:
        raise FailedCheck(f"{name}\n  {error}") from error
    except (KeyError, TypeError, IndexError, ValueError, RuntimeError) as error:
        raise FailedCheck(f"{name}\n  {in_a_line(error)}") from error


def smallest_presets(paper: Card) -> list[Preset]:
    """The preset with the fewest parameters for each kind of work."""
    smallest: dict[str | None, Preset] = {}
    for preset in sorted(paper.presets, key=lambda preset: _size(paper, preset)):
        smallest.setdefault(paper.work_of(preset), preset)
    return list(smallest.values())


_SIZES: dict[tuple[str, str, str], int | float] = {}


def _size(paper: Card, preset: Preset) -> int | float:
    """How many parameters a preset has, found once; infinitely many where it cannot be built, as its check will say."""
    key = (paper.package, preset.build, repr(preset.options))
    if key not in _SIZES:
        try:
            _SIZES[key] = parameters_on_meta(Subject.preset(paper, preset))
        except Exception:
            _SIZES[key] = math.inf
    return _SIZES[key]


def _refuses(error: Exception, check: str) -> bool:
    """Whether a check was seen not to be kept, or refused in words, rather than missed by an accident on the way.

    A refusal is a `raise` with a message, not an operation that went wrong. Of torch's own only a tracer's counts. Of
    what is traced, another output is never excused.
    """
    if check in TRACED and _is_of_tracer(error):
        return True
    if isinstance(error, AssertionError):
        return check not in TRACED
    if not isinstance(error, ValueError | TypeError | NotImplementedError | RuntimeError) or not str(error):
        return False
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    assert frame is not None
    code, module = frame.tb_frame.f_code, frame.tb_frame.f_globals.get("__name__", "")
    raised = dis.opname[code.co_code[frame.tb_lasti]] == "RAISE_VARARGS"
    return raised and not module.startswith("torch.")


def _is_of_tracer(error: Exception) -> bool:
    """Whether torch says that it expected_failures trace this code, or that what it traced is not for this size."""
    from torch._dynamo.exc import Unsupported
    from torch._dynamo.exc import UserError as TracerError
    from torch.fx.experimental.symbolic_shapes import ConstraintViolationError, GuardOnDataDependentSymNode

    if isinstance(error, AssertionError):
        return str(error).startswith("Guard failed: ")  # what an exported module says of a size outside its conditions
    return isinstance(error, Unsupported | TracerError | ConstraintViolationError | GuardOnDataDependentSymNode)


def _called(factory: Callable[..., Any]) -> str:
    inner = factory.func if isinstance(factory, partial) else factory
    return getattr(inner, "__name__", repr(inner))


def _ask(
    subject: Subject, slot_name: str | None, expected_failures: Mapping[str, str], only: Collection[str] | None = None
) -> None:
    asked = {name: check for name, check in CHECKS.items() if check.concerns(slot_name)}
    unknown = [name for name in (*expected_failures, *(only or ())) if name not in asked]
    if unknown:
        raise FailedCheck(f"{subject.name}: there is no check {unknown[0]!r} here; there are: {', '.join(asked)}")
    broken: list[tuple[str, Exception | None]] = []
    kept: set[str] = set()
    for name, check in asked.items():
        if only is not None and name not in only:
            continue
        if name not in expected_failures and FOLLOWS.get(name) in kept:
            continue
        try:
            check.check(subject)
        except Exception as error:
            reason = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
            if name not in expected_failures:
                broken.append((f"  {name}: {reason.strip() or 'broken'}", error))
            elif not _refuses(error, name):
                broken.append(
                    (f"  {name}: listed in expected_failures, but this is an accident, no refusal: {reason}", error)
                )
        else:
            kept.add(name)
            if name in expected_failures:
                broken.append((f"  {name}: passes: take it out of expected_failures ({expected_failures[name]})", None))
    if broken:
        raise FailedCheck("\n".join([subject.name, *(line for line, _ in broken)])) from broken[0][1]
