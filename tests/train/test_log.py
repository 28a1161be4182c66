import time

import pytest

from train.log import Pace, duration


def test_pace_leaves_out_what_is_not_training():
    pace = Pace()
    for _ in range(4):
        pace.step()
    with pace.paused():
        time.sleep(0.3)
    elapsed, per_step, share = pace.look(0.0)
    assert elapsed < 0.2 and per_step == pytest.approx(elapsed / 4) and share == 0
    assert pace.estimate(40) < 2.0


def test_the_share_of_waiting_is_of_the_time_since_the_last_look():
    pace = Pace()
    time.sleep(0.1)
    assert 0.3 < pace.look(0.05)[2] <= 0.5
    time.sleep(0.1)
    assert pace.look(0.05)[2] == 0


@pytest.mark.parametrize(
    ("seconds", "text"), [(59, "59 seconds"), (300, "5.0 minutes"), (9000, "2.5 hours"), (864000, "10.0 days")]
)
def test_times_are_said_in_a_unit_for_people(seconds, text):
    assert duration(seconds) == text
