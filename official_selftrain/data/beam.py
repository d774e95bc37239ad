"""Apache Beam as the engine that writes shards, beyond one machine; extra `[beam]`.

A job writes one shard. It has `file`, `finished()` (None if it is not), `run()`, and can be
pickled. All workers must see the files under the same paths.
"""

import pathlib

from official_selftrain.utils.errors import UserError, one_line
from official_selftrain.utils.extras import import_extra


def run(jobs, arguments):
    """Runs the jobs that are not finished; returns what `finished()` of each then says.

    Args:
        jobs: see above.
        arguments: of the pipeline, such as `["--runner=FlinkRunner", ...]`.

    Raises:
        UserError: without the extra, if the pipeline fails, or with the fault that a worker met.
    """
    beam = import_extra("apache_beam", "beam", "Beam")
    options = import_extra("apache_beam.options.pipeline_options", "beam", "Beam")
    waiting = [job for job in jobs if job.finished() is None]
    for job in waiting:
        _fault_file(job).unlink(missing_ok=True)
    try:
        with beam.Pipeline(options=options.PipelineOptions(arguments)) as pipeline:
            _ = pipeline | beam.Create(waiting, reshuffle=True) | beam.Map(_run)
    except Exception as error:
        raise UserError(f"Apache Beam stopped: {one_line(error, 500)}") from None
    return [_finished(job) for job in jobs]


def _fault_file(job):
    return pathlib.Path(f"{job.file}.fault.tmp")


def _run(job):
    """A fault is written to a file: an exception would be retried, and come back as a stack trace
    of the engine."""
    try:
        job.run()
    except UserError as error:
        _fault_file(job).write_text(str(error), encoding="utf-8")


def _finished(job):
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
