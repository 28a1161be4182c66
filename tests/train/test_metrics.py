import pytest

from train.metrics import StepTimer


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test turns, so that a busy machine changes nothing."""
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def turn(seconds):
        now[0] += seconds

    return turn


def test_pace_leaves_out_what_is_not_training(clock):
    pace = StepTimer()
    for _ in range(4):
        pace.step()
        clock(0.5)
    with pace.paused():
        clock(30.0)
    assert pace.look(0.0) == pytest.approx((2.0, 0.5, 0.0))
    assert pace.estimate(40) == pytest.approx(20.0)


def test_the_share_of_waiting_is_of_the_time_since_the_last_look(clock):
    pace = StepTimer()
    clock(0.1)
    assert pace.look(0.05)[2] == pytest.approx(0.5)
    clock(0.1)
    assert pace.look(0.05)[2] == 0
