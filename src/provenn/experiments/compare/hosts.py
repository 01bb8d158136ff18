"""Which host a comparison takes: tasks bring them, by slot."""

from pathlib import Path

from provenn.core.errors import UserError
from provenn.tasks import face_of, get_task, task_names
from provenn.tasks.datasets import in_layout_of
from provenn.tasks.hosts import Host


def hosts_of(slot: str) -> list[Host]:
    """The hosts that tasks have for a slot.

    Raises:
        UserError: none has one.
    """
    faces = [face_of(name) for name in task_names()]
    hosts = [face.resolve(face.hosts[slot]) for face in faces if slot in face.hosts]
    if not hosts:
        known = ", ".join(dict.fromkeys(slot for face in faces for slot in face.hosts))
        raise UserError(f"no host has the slot {slot!r} to compare in; these have: {known}")
    return hosts


def host_for(slot: str, data: str | Path, task: str | None = None) -> Host:
    """The host of a slot that fits the data: by the embedded name, by the layout of a folder, or by its files' names.

    Args:
        slot: to be filled.
        data: an embedded data set's name, or a path.
        task: kind of work of the host, where several read the data.

    Raises:
        UserError: a slot without a host, of this task or at all, an empty folder, or data that is neither embedded nor
            a path.
    """
    hosts = hosts_of(slot)
    if task is not None:
        there = ", ".join(host.task for host in hosts)
        hosts = [host for host in hosts if host.task == get_task(task).name]
        if not hosts:
            raise UserError(f"{task} has no host for {slot}; there are: {there}")
    for host in hosts:
        # A slot with one host has nothing to choose: its task itself says what is wrong with the data.
        if data in get_task(host.task).embedded or len(hosts) == 1:
            return host
    path, tasks = Path(data), [get_task(host.task) for host in hosts]
    laid_out = next((host for host in hosts if in_layout_of(host.task, path)), None)
    if laid_out is not None:
        return laid_out
    remote = str(data).startswith("hf:")
    files = [path] if not path.is_dir() else [file for file in path.rglob("*") if file.is_file()]
    reads = "; or ".join(task.reads for task in tasks)
    if path.is_dir() and not files:
        raise UserError(f"{path} is an empty folder: expected {reads}")
    endings = {"hf:"} if remote else {file.suffix.lower() for file in files}
    fitting = next((host for host in hosts if endings.intersection(host.files)), None)
    if fitting is not None:
        return fitting
    if not path.exists():
        names = ", ".join(name for task in tasks for name in task.embedded)
        raise UserError(f"no data at {str(data)!r}: give a path to {reads}; or an embedded data set: {names}")
    return next((host for host in hosts if not host.files), hosts[-1])
