"""What a command shows and heeds, without a terminal and on one."""

import threading
import warnings

import pytest
from rich.console import Console

from kvlock_jax.cli import terminal
from kvlock_jax.sampling.stepwise import Step


@pytest.fixture
def screen(monkeypatch, tmp_path):
    """A terminal that records its output."""
    with open(tmp_path / "screen", "w+") as file:
        console = Console(file=file, force_terminal=True, force_interactive=True, width=90)
        monkeypatch.setattr(terminal, "Console", lambda stderr: console)
        yield file


def shown(screen) -> str:
    screen.seek(0)
    text = screen.read()
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # the cursor is back
    return text


def test_steps_without_a_terminal(capsys):
    with terminal.ticking(50) as tick:
        for step in range(50):
            tick(Step(step, None, None))
    assert capsys.readouterr().err.splitlines() == [f"step {n} of 50" for n in range(5, 51, 5)]


def test_steps_on_a_terminal(screen):
    with terminal.ticking(3) as tick:
        for step in range(3):
            tick(Step(step, None, None))
    text = shown(screen)
    assert "sampling" in text and "3/3" in text


def test_edits_without_a_terminal(capsys):
    with terminal.counting(20) as tell:
        threads = [threading.Thread(target=tell, args=(f"[{n}] done",)) for n in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[0] for line in lines] == [f"{n} of 20" for n in range(1, 21)]
    assert {line.split(": ")[1] for line in lines} == {f"[{n}] done" for n in range(20)}


def test_edits_on_a_terminal(screen):
    with terminal.counting(2) as tell:
        tell("one done")
        tell(f"two failed: {'x' * 100} [bold]")
    text = shown(screen)
    assert "editing" in text and "2/2" in text and "one done" in text
    assert f"two failed: {'x' * 100} [bold]" in text  # neither cut nor taken for markup


def test_warnings(capsys):
    with terminal.warnings_as_lines():
        for text in ("a", "b", "a"):
            warnings.warn(text, stacklevel=1)
    assert capsys.readouterr().err == "warning: a\nwarning: b\n"


def test_work_in_another_thread():
    assert terminal.interruptibly(threading.get_ident) != threading.get_ident()
    with pytest.raises(ZeroDivisionError):
        terminal.interruptibly(lambda: 1 / 0)
    with pytest.raises(KeyboardInterrupt):
        terminal.interruptibly(lambda: (_ for _ in ()).throw(KeyboardInterrupt))
