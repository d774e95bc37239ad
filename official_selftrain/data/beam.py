"""Writing shards with Apache Beam, on more than one machine; needs the extra `[beam]`."""

import pathlib
from collections.abc import Sequence
from typing import Any, Protocol

from official_selftrain.utils.errors import UserError, one_line
from official_selftrain.utils.extras import import_extra


class Job(Protocol):
    """Writes one shard; it can be pickled, and all workers see `file` under the same path."""

    @property
    def file(self) -> str:
        """Path of the shard."""

    def finished(self) -> Any:
        """The result of the job, or None if the shard is not complete."""

    def write(self) -> Any:
        """Writes the shard."""


def run(jobs: Sequence[Job], arguments: Sequence[str]) -> list[Any]:
    """Runs the jobs that are not finished.

    Args:
        jobs: one per shard.
        arguments: of the pipeline, such as `["--runner=FlinkRunner", ...]`.

    Returns:
        The result of each job, from its `finished`.

    Raises:
        UserError: if the extra is missing, the pipeline fails, or a job raised one.
    """
    beam = import_extra("apache_beam", "beam", "Beam")
    options = import_extra("apache_beam.options.pipeline_options", "beam", "Beam")
    waiting = [job for job in jobs if job.finished() is None]
    for job in waiting:  # errors of an earlier pipeline say nothing about this one
        _fault_file(job).unlink(missing_ok=True)
    try:
        with beam.Pipeline(options=options.PipelineOptions(arguments)) as pipeline:
            # Without reshuffling, Beam may fuse the steps and run all jobs on one worker.
            _ = pipeline | beam.Create(waiting, reshuffle=True) | beam.Map(_run)
    except Exception as error:  # every runner raises its own kinds
        raise UserError(f"Apache Beam stopped: {one_line(error, 500)}") from None
    return [_finished(job) for job in jobs]


def _fault_file(job: Job) -> pathlib.Path:
    return pathlib.Path(f"{job.file}.fault.tmp")


# Not annotated: Beam would check the jobs against the protocol, which Python cannot.
def _run(job):
    """Runs a job, and writes a `UserError` to a file instead of raising it.

    Beam would retry an exception several times, and then report its own stack trace.
    """
    try:
        job.write()
    except UserError as error:
        _fault_file(job).write_text(str(error), encoding="utf-8")


def _finished(job: Job) -> Any:
    """The result of a job after the pipeline; raises the error of the job if there is none."""
    result = job.finished()
    if result is not None:
        return result
    try:
        fault = _fault_file(job).read_text(encoding="utf-8")
    except OSError:
        fault = (
            f"no worker has written {job.file}; do all workers see the output folder under this "
            "path?"
        )
    _fault_file(job).unlink(missing_ok=True)
    raise UserError(fault)
