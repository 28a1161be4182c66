import os
import signal
import threading

import pytest

from tests.train.runs import assert_same_run, checkpoints, lines, train, wait_for


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_ends_with_128_plus_its_number(store, tmp_path, capsys, number):
    run = tmp_path / "run"

    def ask():
        wait_for(lambda: len(lines(run)) > 2)
        os.kill(os.getpid(), number)
        if number == signal.SIGINT:  # a launcher passes on what the terminal has sent already
            os.kill(os.getpid(), number)

    asking = threading.Thread(target=ask)
    asking.start()
    assert train(store, run, steps=100_000) == 128 + number
    asking.join()
    step = lines(run)[-1]["step"]
    assert checkpoints(run) == [f"step-{step:07d}"]
    spoken = capsys.readouterr().err
    assert f"stopped by {signal.Signals(number).name} after step {step}, saved in" in spoken
    assert "run the same command again to go on" in spoken
    if number == signal.SIGTERM:
        assert train(store, run, steps=step + 2) == 0
        assert train(store, tmp_path / "straight", steps=step + 2) == 0
        assert_same_run(run, tmp_path / "straight", step + 2)


def test_a_time_limit_saves_and_ends_like_an_alarm_clock(store, tmp_path, capsys):
    assert train(store, tmp_path / "run", "--time-limit", "0.01", steps=100_000) == 128 + signal.SIGALRM
    assert "stopped by the time limit after step" in capsys.readouterr().err
    assert len(checkpoints(tmp_path / "run")) == 1
