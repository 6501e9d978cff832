"""An engine in another process: the same replies in the same places, and it never outlives who started it."""

import os
import signal
import subprocess
import sys
from functools import partial
from itertools import count
from pathlib import Path

import pytest

from slm_swap.clients.engines import Prompt
from slm_swap.clients.engines.apart import EngineApart
from slm_swap.common.errors import UserError
from slm_swap.common.settings import ROOT
from tests.support.echo_engine import BREAKS, DIES, FAILS, EchoEngine
from tests.support.processes import PATIENCE, wait_until


@pytest.fixture
def engine():
    made = EngineApart(partial(EchoEngine, context=64))
    yield made
    made.close()


def prompt(index: int, *tokens: int, limit: int = 99, **more) -> Prompt:
    return Prompt(index, list(tokens), limit, **more)


def test_each_prompt_gets_its_own_tokens(engine):
    assert (engine.name, engine.context, engine.ends, engine.state()) == ("vllm", 64, (0,), {"engine_start": "eager"})
    assert engine.describe() != {"device": f"process {os.getpid()}"}
    asked = [prompt(number, *range(10, 10 + number % 7 + 1), limit=5) for number in range(3000)]
    made = {one.index: one for one in engine.generate(iter(asked), answered={5, 6})}
    assert set(made) == set(range(3000)) - {5, 6}
    assert all(made[one.index].tokens == one.tokens[:5] for one in asked if one.index in made)
    assert made[0].chances == [(-0.5, 1.5)] and made[0].cached == 0
    engine.forget()
    (one,) = engine.generate(iter([prompt(1, 10)]))
    assert one.cached == 1, "what was forgotten"


def test_prompts_join_while_others_are_under_way_and_none_is_given_back_when_idle(engine):
    given, asked = count(), iter([prompt(0, *range(10, 40)), None, prompt(1, 10), None, None])

    def coming():
        for one in asked:
            next(given)
            yield one
        while True:
            yield None

    found = []
    for made in engine.generate(coming()):
        if made is None:
            break
        found.append(made.index)
    assert found == [1, 0], "the later one is shorter"


def test_a_prompt_that_is_made_again_is_asked_in_its_place(engine):
    def again(made):
        return prompt(made.index, 20, 21, grammar="g") if made.tokens == [10] else None

    asked = [prompt(0, 10, again=again), prompt(1, 11, again=again), prompt(2, 10)]
    made = {one.index: (one.tokens, one.batch) for one in engine.generate(iter(asked))}
    assert made == {0: ([20, 21], "g"), 1: ([11], None), 2: ([10], None)}


def test_what_goes_wrong_there_is_told_here(engine):
    with pytest.raises(UserError, match="the engine cannot start: use another one"):
        EngineApart(partial(EchoEngine, refused=True))
    with pytest.raises(UserError, match=r"^vllm failed \(out of order\)$"):
        list(engine.generate(iter([prompt(0, 10, 11), prompt(1, FAILS)])))
    with pytest.raises(UserError, match="the model's process died"):
        list(engine.generate(iter([prompt(0, 10)])))
    other = EngineApart(EchoEngine)
    with pytest.raises(UserError, match=r"the model's process died \(exit code 7\)"):
        list(other.generate(iter([prompt(0, 10, 11), prompt(1, DIES)])))


def test_why_it_ended_is_told_also_where_prompts_are_being_sent(engine):
    def coming():
        yield prompt(0, 10, 11, 12)
        yield prompt(1, FAILS)
        engine._process.join()
        yield prompt(2, 10)

    with pytest.raises(UserError, match=r"^vllm failed \(out of order\)$"):
        list(engine.generate(coming()))


def test_that_it_died_is_noticed_while_nothing_is_asked(engine):
    def nothing():
        yield None
        engine._process.kill()
        engine._process.join()
        while True:
            yield None

    given = engine.generate(nothing())
    assert next(given) is None
    with pytest.raises(UserError, match=r"the model's process died \(exit code -9\)"):
        next(given)


def test_a_bug_there_keeps_its_traceback_and_shows_no_key(monkeypatch, capfd):
    monkeypatch.setenv("AZURE_API_KEY", "a-key-that-nobody-may-see")
    engine = EngineApart(EchoEngine)
    with pytest.raises(UserError, match=r"the model's process died \(exit code 1\)"):
        list(engine.generate(iter([prompt(0, BREAKS)])))
    told = capfd.readouterr().err
    assert "in generate\n" in told and "ValueError: a bug, and it names ***" in told and "nobody-may-see" not in told


OWNER = """
import sys, time
from functools import partial
from slm_swap.clients.engines.apart import EngineApart
from tests.support.echo_engine import EchoEngine
if __name__ == "__main__":
    engine = EngineApart(EchoEngine)
    print(engine.describe()["device"].split()[1], flush=True)
    time.sleep(float(sys.argv[1]))
"""


def test_sigterm_is_for_who_started_it(engine):
    """A service's manager sends it to all processes, and requests are under way."""
    os.kill(engine._process.pid, signal.SIGTERM)
    assert [made.tokens for made in engine.generate(iter([prompt(0, 10, 11)]))] == [[10, 11]]


@pytest.mark.parametrize("seconds", [600, 0])
def test_it_ends_with_who_started_it(tmp_path, seconds):
    """Who is killed, or comes to its end without closing it."""
    script = tmp_path / "owner.py"
    script.write_text(OWNER)
    owner = subprocess.Popen([sys.executable, script, str(seconds)], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    other = int(owner.stdout.readline())
    if seconds:
        os.kill(other, 0)
        owner.send_signal(signal.SIGKILL)
    assert owner.wait(PATIENCE) == (-signal.SIGKILL if seconds else 0)
    wait_until(lambda: ended(other))
    assert ended(other)


def ended(process: int) -> bool:
    """Whether it has, also where nobody has waited for it yet."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True
