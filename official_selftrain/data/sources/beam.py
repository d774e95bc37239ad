"""Apache Beam as the engine that writes shards, beyond one machine; extra `[beam]`."""

import json
import pathlib

from official_selftrain.errors import UserError


def run(jobs, arguments):
    """Tallies of all jobs, those of finished shards without doing them again.

    Args:
        jobs: of `prepare`.
        arguments: of the pipeline, such as `["--runner=FlinkRunner", ...]`.

    Raises:
        UserError: without the extra, if the pipeline fails, or with the fault that a worker met.
    """
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ModuleNotFoundError:
        raise UserError("Beam needs the extra: pip install 'official_selftrain[beam]'") from None
    waiting = [job for job in jobs if job.finished() is None]
    try:
        with beam.Pipeline(options=PipelineOptions(arguments)) as pipeline:
            _ = pipeline | beam.Create(waiting, reshuffle=True) | beam.Map(_run)
    except Exception as error:
        raise UserError(f"Apache Beam stopped: {' '.join(str(error).split())[:500]}") from None
    return [_tally(job) for job in jobs]


def _run(job):
    """A fault is written in place of the tally: an exception would be retried, and come back as a
    stack trace of the engine."""
    try:
        job.run()
    except UserError as error:
        pathlib.Path(job.tally_file).write_text(json.dumps({"fault": str(error)}), encoding="utf-8")


def _tally(job):
    tally = job.finished()
    if tally is not None:
        return tally
    try:
        fault = json.loads(pathlib.Path(job.tally_file).read_text(encoding="utf-8"))["fault"]
    except (OSError, ValueError, KeyError):
        fault = (
            f"no worker has written {job.file}; do all workers see the output folder under this "
            "path?"
        )
    raise UserError(fault)
