"""One job at a time, in order, and none that hangs or fails keeps the others from their turn."""

import threading

import pytest

from pipeline.runtime.errors import UserError
from view import jobs
from view.jobs import MOST_WAITING, Job, JobQueue, Stopped


@pytest.fixture
def queue():
    queue = JobQueue()
    yield queue
    queue.close()


def until_stopped(job):
    while True:
        job.progress(0.5, "on")
        threading.Event().wait(0.005)


def wait(job, state):
    for _ in range(2000):
        if job.state == state:
            return
        threading.Event().wait(0.005)
    raise AssertionError(f"{job.state}, not {state}")


def test_jobs_run_one_after_the_other_and_know_how_many_are_before_them(queue):
    together, most, order = [], [], []

    def work(number):
        def do(job):
            together.append(number)
            most.append(len(together))
            order.append(number)
            job.show(0, b"png")
            together.remove(number)

        return do

    first = queue.submit(until_stopped, ["a"])
    others = [queue.submit(work(number), ["b"], window=str(number)) for number in range(4)]
    assert [queue.before(job) for job in (first, *others)] == [0, 1, 2, 3, 4]
    first.stop()
    wait(others[-1], "done")
    assert (first.state, order, max(most)) == ("stopped", [0, 1, 2, 3], 1)


def test_a_job_that_is_stopped_while_it_waits_never_begins(queue):
    begun = []
    queue.submit(until_stopped, [])
    second = queue.submit(begun.append, [], window="b")
    queue.stop("b")
    assert second.is_over
    queue.stop("")
    wait(second, "stopped")
    assert begun == []


def test_a_tab_has_one_job_and_a_window_that_is_closed_none(queue):
    first = queue.submit(until_stopped, [], window="a", tab="sample")
    other = queue.submit(until_stopped, [], window="a", tab="stores")
    another = queue.submit(until_stopped, [], window="b", tab="sample")
    second = queue.submit(until_stopped, [], window="a", tab="sample")
    wait(first, "stopped")
    assert (first.replaced, other.replaced) == (True, False)
    wait(other, "running")
    queue.stop("a")
    wait(other, "stopped")
    wait(another, "running")
    assert second.is_over
    queue.stop("b", "sample")
    wait(another, "stopped")


def test_a_mistake_is_its_sentence_and_a_fault_of_ours_names_the_terminal(queue, capsys):
    def mistake(job):
        raise UserError("choose another")

    def fault(job):
        raise KeyError("secret")

    first, second = queue.submit(mistake, []), queue.submit(fault, [], window="b")
    wait(second, "failed")
    assert first.sentence == "choose another"
    assert "KeyError" in second.sentence and "secret" not in second.sentence
    third = queue.submit(lambda job: None, [])
    wait(third, "done")


def test_more_jobs_than_anyone_waits_for_are_refused(queue):
    first = queue.submit(until_stopped, [])
    wait(first, "running")
    waiting = [queue.submit(until_stopped, [], window=str(number)) for number in range(MOST_WAITING)]
    with pytest.raises(UserError, match="16 jobs wait already"):
        queue.submit(until_stopped, [], window="late")
    for job in (first, *waiting):
        job.stop()


def test_a_job_that_nobody_looks_at_any_more_ends(monkeypatch):
    monkeypatch.setattr(jobs, "ABANDONED_SECONDS", 0.05)
    job = Job(until_stopped, [])
    job.run()
    assert job.state == "stopped"
    job = Job(lambda one: None, [])
    threading.Event().wait(0.06)
    with pytest.raises(Stopped):
        job.check()
    job.seen()
    job.check()


def test_closing_ends_what_runs_and_what_waits():
    queue = JobQueue()
    first, second = (queue.submit(until_stopped, [], window=window) for window in "ab")
    wait(first, "running")
    queue.close()
    assert first.state == "stopped"
    assert second.state != "running"
