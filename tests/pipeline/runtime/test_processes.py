import os
import signal

import pytest

from pipeline.runtime.errors import UserError
from pipeline.runtime.processes import Launch, StopRequest, launch


def test_alone_without_a_launcher():
    assert launch({}) == Launch(rank=0, world_size=1, local_rank=0, reason="no launcher")


def test_a_launchers_variables_are_read():
    place = launch({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"})
    assert (place.rank, place.world_size, place.local_rank, place.is_main) == (3, 4, 1, False)


@pytest.mark.parametrize("environment", [{"RANK": "4", "WORLD_SIZE": "4"}, {"RANK": "x", "WORLD_SIZE": "4"}])
def test_contradicting_variables_are_refused(environment):
    with pytest.raises(UserError, match="RANK"):
        launch(environment)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_stop_is_noted_and_handlers_are_given_back(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.signal is None and stop.exit_status == 0
        os.kill(os.getpid(), number)
        assert stop.signal == number and stop.exit_status == 128 + number
    assert signal.getsignal(number) == before


def test_a_second_interrupt_interrupts_at_once():
    with pytest.raises(KeyboardInterrupt), StopRequest():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
