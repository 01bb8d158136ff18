"""Two JSON files a paper: the evidence, small and whole, and the ledger of every trial, which a killed run goes on
from.
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from provenn.catalog import Experiment
from provenn.core.errors import UserError
from provenn.core.files import write_atomically
from provenn.evidence.measurement import Measurement
from provenn.evidence.verdict import Verdict, decide, region_of

SCHEMA_VERSION = 5  # since provenn 0.2; older files are rewritten by scripts/migrate_records.py
OLDEST_VERSION = 2  # of provenn 0.1's files that do not name theirs
WIDEST = 200  # characters of a mapping that stands on one line
WRITTEN = (":!papers/*/evidence.json", ":!papers/*/pictures/*")  # by runs; git's words for all but these
EVIDENCE, LEDGER, PICTURES = "evidence.json", "ledger.json", "pictures"


class Environment(BaseModel):
    """Where a measurement was made, and with what."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    provenn: str
    torch: str
    python: str
    device: str
    threads: int
    system: str
    commit: str = ""


class RecordedRun(BaseModel):
    """What all experiments that were measured together share."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    budget: str
    environment: Environment
    date: datetime


class Repeated(StrEnum):
    """What came of repeating a recorded trial with the code that stands."""

    EXACT = "repeated exactly"
    SCATTER = "within the scatter of its seeds"
    ROUNDING = "the same verdict, other rounding"
    DIFFERS = "differs"


class Verification(BaseModel):
    """A recorded trial, repeated with later code.

    Args:
        outcome: what came of it.
        code: the digest of what measured it again.
        commit, date, device: where and when.
        repeated: what was repeated, what came out, and what the record has, in words.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    outcome: Repeated
    code: str
    commit: str = ""
    date: datetime
    device: str
    repeated: str


class Record(BaseModel):
    """A measurement with its verdict. What the experiment says stands in `paper.toml`; `expects` is the region it was
    held to.

    `code` is the digest of what measured it, `verified` what came of repeating it with later code, `run` the index in
    the evidence's list. `overrides` is what was set
    otherwise than the experiment's own setting: such a record stands beside the experiment's, never for it, and is
    evidence for no claim.
    """

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")

    experiment: str
    run: int = 0
    overrides: dict[str, Any] = {}
    verdict: Verdict
    reason: str = ""
    expects: str = ""
    measurement: Measurement
    code: str = ""
    verified: Verification | None = None
    wall_seconds: float = 0.0
    peak_memory_bytes: int = 0

    @classmethod
    def of(
        cls,
        experiment: Experiment,
        measurement: Measurement,
        *,
        budget: str,
        overrides: dict[str, Any] | None = None,
        **more: Any,
    ) -> "Record":
        """A measurement with its verdict, its curves thinned; at a changed setting it is not at the paper's."""
        if overrides:
            measurement = measurement.model_copy(update={"at_paper_setting": False})
        verdict, reason = decide(experiment, measurement, budget=budget, changed=bool(overrides))
        region = region_of(experiment, measurement)
        thinned = [line.thinned() for line in measurement.series]
        return cls(
            experiment=experiment.id,
            overrides=plain(overrides or {}),
            verdict=verdict,
            reason=reason,
            expects="" if region is None else str(region),
            measurement=measurement.model_copy(update={"series": thinned}),
            **more,
        )


@dataclass(frozen=True)
class Finding:
    """An experiment of a paper and what came of it: what views show. Without a record, nobody has measured it."""

    paper: str
    experiment: Experiment
    record: Record | None = None
    run: RecordedRun | None = None

    @property
    def verdict(self) -> Verdict:
        """The record's; not measured without one, or where the code that stands gives another value."""
        return Verdict.NOT_MEASURED if self.record is None or self.withdrawn else self.record.verdict

    @property
    def withdrawn(self) -> str:
        """What withdraws the record's verdict until it is measured again, or ""."""
        verified = None if self.record is None else self.record.verified
        if verified is None or verified.outcome is not Repeated.DIFFERS:
            return ""
        return f"{verified.repeated}: measure it again with provenn reproduce {self.paper}"

    @property
    def reason(self) -> str:
        """Why there is no verdict."""
        if self.record is not None:
            return self.withdrawn or self.record.reason
        return (
            f"needs {self.experiment.lacks}"
            if self.experiment.lacks
            else f"needs a run: provenn reproduce {self.paper}"
        )

    @property
    def overrides(self) -> dict[str, Any]:
        """What was set otherwise than the experiment's own setting."""
        return {} if self.record is None else self.record.overrides

    @property
    def measurement(self) -> Measurement:
        """The record's; an empty one without."""
        return Measurement() if self.record is None else self.record.measurement


class Evidence(BaseModel):
    """What was measured of one paper, in one folder; written whole, atomically, after each experiment."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")

    schema_version: int = SCHEMA_VERSION
    paper: str
    runs: list[RecordedRun] = []
    records: list[Record] = []

    @classmethod
    def read(cls, file: Path) -> "Evidence":
        """The evidence in `file`.

        Raises:
            ValueError: it is none, with the line and the reason.
        """
        evidence = _parsed(cls, file.read_bytes())
        if any(not 0 <= record.run < len(evidence.runs) for record in evidence.records):
            raise ValueError("a record names a run that is not there")
        return evidence

    def write(self, file: Path) -> None:
        """Small: defaults are left out, drawings keep four digits, and what experiments share is with the first of
        them.
        """
        facts = {"schema_version": SCHEMA_VERSION, **self.model_dump(mode="json", exclude_defaults=True)}
        seen: set[str] = set()
        for record in facts.get("records", []):
            measurement = record["measurement"]
            shortened = {kind: rounded(measurement[kind], 6) for kind in ("setting", "skills") if kind in measurement}
            measurement.update(shortened)  # beside the figures that an interval follows from, which are kept in full
            for kind in ("series", "tables"):
                drawn = [rounded(one) for one in measurement.pop(kind, [])]
                fresh = [one for one in drawn if json.dumps(one) not in seen]
                seen.update(map(json.dumps, fresh))
                measurement.update({kind: fresh} if fresh else {})
        write_atomically(file, compact(facts))

    def put(self, record: Record, run: RecordedRun) -> None:
        """Add a record instead of an older one of the same experiment and setting; runs that no record is left of
        go.
        """
        if run not in self.runs:
            self.runs.append(run)
        record = record.model_copy(update={"run": self.runs.index(run)})
        same = [r.experiment == record.experiment and r.overrides == record.overrides for r in self.records]
        others = [r for r, is_same in zip(self.records, same) if not is_same]
        index = same.index(True) if any(same) else len(others)
        self._keep([*others[:index], record, *others[index:]])

    def keep_experiments(self, experiments: Sequence[str]) -> None:
        """Drop the records of experiments that are no more, and bring the others in this order."""
        order = {experiment: index for index, experiment in enumerate(experiments)}
        known = [record for record in self.records if record.experiment in order]
        self._keep(sorted(known, key=lambda record: order[record.experiment]))

    def _keep(self, records: list[Record]) -> None:
        used = sorted({record.run for record in records})
        self.records = [r.model_copy(update={"run": used.index(r.run)}) for r in records]
        self.runs = [self.runs[i] for i in used]

    def record(self, experiment: str, overrides: dict[str, Any] | None = None) -> Record | None:
        """What was measured of an experiment at its own setting, or at the one that these changes make of it."""
        wanted = plain(overrides or {})
        return next((r for r in self.records if r.experiment == experiment and r.overrides == wanted), None)

    def finding(self, experiment: Experiment, overrides: dict[str, Any] | None = None) -> Finding:
        """An experiment with what was measured of it at its own setting, or at a changed one."""
        record = self.record(experiment.id, overrides)
        return Finding(self.paper, experiment, record, None if record is None else self.runs[record.run])

    def findings(self, experiments: list[Experiment]) -> list[Finding]:
        """Every experiment with what was measured of it at its own setting."""
        return [self.finding(experiment) for experiment in experiments]

    def at_other_settings(self, experiments: list[Experiment]) -> list[Finding]:
        """What was measured of these experiments at settings that a user has changed."""
        return [
            Finding(self.paper, experiment, record, self.runs[record.run])
            for experiment in experiments
            for record in self.records
            if record.experiment == experiment.id and record.overrides
        ]


class Trial(BaseModel):
    """One run of one seed, kept as it ended; `machine` is named where it was not the one that wrote the ledger."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")

    key: str
    value: Any
    seconds: float
    machine: str = ""

    @staticmethod
    def key_of(name: str, seed: int | None, where: str, setting: dict[str, Any]) -> str:
        """The key of a trial. It holds the versions, so that a value of another provenn or torch is not taken."""
        import torch

        import provenn

        versions = f"provenn {provenn.__version__}, torch {torch.__version__}"
        return json.dumps([name, seed, where, versions, setting], sort_keys=True)


class Ledger(BaseModel):
    """Every trial that has ended, for a run that goes on."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")

    schema_version: int = SCHEMA_VERSION
    paper: str
    trials: list[Trial] = []

    @classmethod
    def read(cls, file: Path) -> "Ledger":
        """The ledger in a file.

        Raises:
            ValueError: it is none, or a newer provenn wrote it.
        """
        return _parsed(cls, file.read_bytes())

    def write(self, file: Path) -> None:
        """Replace the file, atomically."""
        write_atomically(file, compact(self.model_dump(mode="json")))


Kept = TypeVar("Kept", Evidence, Ledger)


def _parsed(kind: type[Kept], content: bytes) -> Kept:
    facts = json.loads(content)
    if isinstance(facts, dict):
        version = facts.get("schema_version", OLDEST_VERSION if "occasions" in facts else SCHEMA_VERSION)
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise ValueError(f"written by a newer provenn (schema {version})")
        if isinstance(version, int) and version < SCHEMA_VERSION:
            raise ValueError(f"written by provenn 0.1 (schema {version}): rewrite it with scripts/migrate_records.py")
    return kind.model_validate(facts)


def read_or_set_aside(kind: type[Kept], file: Path, paper: str) -> tuple[Kept, str]:
    """What lies in `file`, else an empty one and why. A file that is not one is moved aside, never overwritten."""
    if not file.exists():
        return kind(paper=paper), ""
    try:
        return kind.read(file), ""
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}; choose another folder with --out") from None
    except (ValueError, RecursionError) as error:
        aside = file.with_name(f"{file.name}.corrupt-{datetime.now(UTC):%Y%m%dT%H%M%S%f}")
        os.replace(file, aside)
        trouble = f"{file} is no record that can be read ({why_unread(error)}); it was moved to {aside.name}"
        return kind(paper=paper), trouble


def rounded(value: Any, digits: int = 4) -> Any:
    """Numbers that are only drawn, to so many digits; whole ones stay as they are.

    >>> rounded({"y": [0.123456, 12345678.0, 3]})
    {'y': [0.1235, 12345678.0, 3]}
    """
    if isinstance(value, dict):
        return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item, digits) for item in value]
    if isinstance(value, float) and math.isfinite(value) and not value.is_integer():
        return float(f"{value:.{digits}g}")
    return value


def compact(value: Any, indent: str = "") -> str:
    """JSON that people can read and compare: a list of plain values on one line, a mapping where it fits on one."""
    if isinstance(value, dict) and value:
        line = json.dumps(value, ensure_ascii=False)
        if len(line) <= WIDEST and not any(isinstance(item, (dict, list)) for item in value.values()):
            return line
        inner = indent + " "
        lines = (f"{inner}{json.dumps(key)}: {compact(item, inner)}" for key, item in value.items())
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
        inner = indent + " "
        return "[\n" + ",\n".join(inner + compact(item, inner) for item in value) + f"\n{indent}]"
    return json.dumps(value, ensure_ascii=False)


def why_unread(error: Exception) -> str:
    """Why a file is no record, and where, in one line."""
    if not isinstance(error, ValidationError):
        return (str(error).splitlines() or [type(error).__name__])[0]
    first = error.errors()[0]
    return ": ".join([*([".".join(str(part) for part in first["loc"])] if first["loc"] else []), first["msg"]])


def plain(value: Any) -> Any:
    """The value as JSON gives it back: tuples become lists, arrays and numpy numbers Python's."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return value.tolist()
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    return json.loads(json.dumps(value, default=str))


def here(device: str) -> Environment:
    """The machine and the versions of this process."""
    import platform

    import torch

    import provenn

    return Environment(
        provenn=provenn.__version__,
        torch=torch.__version__,
        python=platform.python_version(),
        device=machine(device),
        threads=torch.get_num_threads(),
        system=platform.system(),
        commit=commit(),
    )


def machine(device: str) -> str:
    """The device and what it is on this machine, such as `cpu: AMD EPYC 7B13`."""
    import torch

    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else _processor()
    return f"{device}: {name}"


def commit(package: Path = Path(__file__).parents[1]) -> str:
    """The commit of the checkout that this code lies in, "+" where the package differs from it; "" where it is none.

    Records themselves do not count: a run may write them where they ship.
    """
    import subprocess

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(package), *words], capture_output=True, text=True, timeout=10)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        head = git("rev-parse", "--short=12", "HEAD")
        return head + "+" * bool(head and git("status", "--porcelain", "--untracked-files=no", "--", ".", *WRITTEN))
    except (OSError, subprocess.SubprocessError):
        return ""


def _processor() -> str:
    import platform

    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def peak_memory(device: str) -> int:
    """Bytes: the allocator's peak on a GPU, the process's resident peak so far elsewhere."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows keeps no such count
        return 0
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
