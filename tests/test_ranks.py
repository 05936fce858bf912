"""One process and its ranks: what is said once, and what a signal asks for."""

import os
import signal

import pytest

import ranks


@pytest.fixture
def own_handlers():
    """The handlers of before, once the test is over."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    handlers = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_asks_and_the_second_kills(own_handlers, number):
    ranks.stop_on_signals()
    assert ranks.stop_requested() is None
    ranks.check_stop()
    os.kill(os.getpid(), number)
    assert ranks.stop_requested() == number
    with pytest.raises(ranks.Stopped, match=number.name):
        ranks.check_stop()
    assert signal.getsignal(number) == signal.SIG_DFL


def test_a_process_alone_is_rank_0(capsys):
    assert ranks.setup().type in ("cpu", "cuda")
    assert (ranks.rank(), ranks.world_size()) == (0, 1)
    assert ranks.from_rank_0("value") == "value" and ranks.gather_objects("value") == ["value"]
    ranks.say("once")
    assert capsys.readouterr().out == "once\n"


def test_other_ranks_are_silent(monkeypatch, capsys):
    monkeypatch.setattr(ranks, "rank", lambda: 1)
    ranks.say("twice")
    bar = ranks.progress(10, "toy", "step")
    assert bar.disable and not capsys.readouterr().out


@pytest.mark.parametrize(("terminal", "seconds"), [(True, 0.1), (False, 60)])
def test_a_log_has_a_line_of_progress_a_minute(monkeypatch, terminal, seconds):
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    bar = ranks.progress(10, "toy", "step", initial=4)
    assert (bar.n, bar.total, bar.mininterval) == (4, 10, seconds)
