"""Results and references of `dit-evaluate` that go behind a URL: made here as any other, then put there."""

from pipeline.runtime.errors import UserError
from pipeline.runtime.files import remove, write_bytes
from pipeline.runtime.remote_output import RemoteOutput
from sample.evaluate.job import EvaluationJob
from sample.evaluate.reference import read_written
from sample.sidecar import sidecar_of


def bring_here(job: EvaluationJob) -> None:
    """Copy what earlier commands have put there to where this one would make it, to be found finished or refused.

    Raises:
        UserError: an object is in the way that no JSON describes, or one is gone or damaged.
    """
    result, reference = job.remote.get("--out"), job.remote.get("--make-reference")
    if result is not None:
        data = None if job.options.overwrite else result.far.read(result.name)
        if data is not None:
            write_bytes(result.local, data)
        elif not result.begin(job.score_request):
            remove(result.local)  # of another command
    if reference is None:
        return
    sidecar = sidecar_of(reference.local)
    data = None if job.options.overwrite else reference.far.read(sidecar.name)
    if data is None:
        if not job.options.overwrite:
            reference.check_free((reference.name,), job.reference_request)
        if not reference.begin(job.reference_request):
            remove(reference.local)
        return
    write_bytes(sidecar, data)
    size, sha256 = reference.far.size(reference.name), read_written(sidecar).sha256
    if size is None or sha256 is None:
        raise UserError(f"{reference.url} is gone, though its JSON is there; pass --overwrite to make it again")
    reference.far.fetch(reference.name, reference.local, size=size, sha256=sha256)


def put_there(job: EvaluationJob) -> None:
    """Put what was made here there, the JSON of a reference last.

    Raises:
        UserError: something else appeared there meanwhile, or it cannot be put there; what was made stays here.
    """
    for flag, output in job.remote.items():
        _put(output, with_sidecar=flag != "--out", overwrite=job.options.overwrite)


def _put(output: RemoteOutput, *, with_sidecar: bool, overwrite: bool) -> None:
    made = [output.local, sidecar_of(output.local)] if with_sidecar else [output.local]
    with output.alone():
        if all(path.exists() for path in made):  # else another process of this machine has put it there
            counts = made[-1]
            if overwrite or output.far.read(counts.name) != counts.read_bytes():
                output.put({path.name: path for path in made}, overwrite=overwrite)
            output.forget()
