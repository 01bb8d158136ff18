"""One JSON file a paper: its records, and every seed's raw value."""

import json
import os
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from provenn.catalog import Claim
from provenn.errors import UserError
from provenn.evidence.measurement import Measurement
from provenn.evidence.verdict import Verdict, decide, region_of

SCHEMA_VERSION = 1


class Environment(BaseModel):
    """Where a measurement was made."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    provenn: str
    torch: str
    python: str
    device: str
    threads: int
    system: str


class Record(BaseModel):
    """A measurement with its verdict and all that is needed to repeat it. Views read this and compute nothing."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")

    schema_version: int = SCHEMA_VERSION
    paper: str
    claim: str
    kind: str
    origin: str
    says: str
    budget: str
    published: str
    expects: str
    measurement: Measurement
    verdict: Verdict
    reason: str
    wall_seconds: float
    peak_memory_bytes: int
    environment: Environment
    date: datetime

    @classmethod
    def of(
        cls,
        paper: str,
        claim: Claim,
        measurement: Measurement,
        *,
        budget: str,
        environment: Environment,
        wall_seconds: float = 0.0,
        peak_memory_bytes: int = 0,
    ) -> "Record":
        verdict, reason = decide(claim, measurement, budget=budget)
        region = region_of(claim, measurement)
        return cls(
            paper=paper,
            claim=claim.id,
            kind=claim.kind,
            origin=claim.origin,
            says=claim.says,
            budget=budget,
            published=str(claim.published or ""),
            expects="" if region is None else str(region),
            measurement=measurement,
            verdict=verdict,
            reason=reason,
            wall_seconds=wall_seconds,
            peak_memory_bytes=peak_memory_bytes,
            environment=environment,
            date=datetime.now(UTC),
        )


class Trial(BaseModel):
    """One run of one seed, kept as it ended."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")

    key: str
    value: Any
    seconds: float

    @staticmethod
    def question(name: str, seed: int | None, where: str, setting: dict[str, Any]) -> str:
        """What the trial answers, versions included: another provenn or torch is another question."""
        import torch

        import provenn

        versions = f"provenn {provenn.__version__}, torch {torch.__version__}"
        return json.dumps([name, seed, where, versions, setting], sort_keys=True)


class Ledger(BaseModel):
    """The records and trials of one paper in one folder; written whole, atomically, after each change."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")

    schema_version: int = SCHEMA_VERSION
    paper: str
    records: list[Record] = []
    trials: list[Trial] = []

    @classmethod
    def read(cls, file: Path) -> tuple["Ledger | None", str]:
        """The ledger in `file`, or None and why. A file that is not one is moved aside, never overwritten."""
        if not file.exists():
            return None, ""
        try:
            content = file.read_bytes()
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror}; choose another folder with --out") from None
        try:
            ledger = cls.model_validate_json(content)
            if ledger.schema_version > SCHEMA_VERSION:
                raise ValueError(f"written by a newer provenn (schema {ledger.schema_version})")
            return ledger, ""
        except ValueError as error:
            aside = file.with_name(f"{file.name}.corrupt-{datetime.now(UTC):%Y%m%dT%H%M%S%f}")
            os.replace(file, aside)
            reason = _reason(error)
            return None, f"{file} is no record that can be read ({reason}); it was moved to {aside.name}"

    def write(self, file: Path) -> None:
        write_atomically(file, self.model_dump_json(indent=1))

    def put(self, record: Record) -> None:
        """Add a record in the place of an older one of the same claim."""
        claims = [r.claim for r in self.records]
        if record.claim in claims:
            self.records[claims.index(record.claim)] = record
        else:
            self.records.append(record)

    def record(self, claim: str) -> Record | None:
        return next((r for r in self.records if r.claim == claim), None)


def _reason(error: ValueError) -> str:
    """Where and why, in one line."""
    if not isinstance(error, ValidationError):
        return str(error).splitlines()[0]
    first = error.errors()[0]
    return ": ".join([*([".".join(str(part) for part in first["loc"])] if first["loc"] else []), first["msg"]])


def write_atomically(file: Path, text: str) -> None:
    """Replace a file's content in one step: a reader or a crash sees the old text or the new, never a part."""
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        os.chmod(name, 0o644)
        os.replace(name, file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


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

    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else _processor()
    return Environment(
        provenn=provenn.__version__,
        torch=torch.__version__,
        python=platform.python_version(),
        device=f"{device}: {name}",
        threads=torch.get_num_threads(),
        system=platform.system(),
    )


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
