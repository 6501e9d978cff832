"""The watch beside an endpoint that runs: it takes the small model out of service by itself, and a person lets it back in."""

import json
from dataclasses import replace

from slm_swap.common.settings import PACKAGE
from slm_swap.rows.examples import Example
from slm_swap.serving.state import flag
from tests.support.endpoints import HOSTED_KEY, cascade, serving
from tests.support.processes import Script, run_python, wait_until
from tests.support.scripted import Scripted, plain

WATCH = PACKAGE / "05_serve/watch.py"
REFERENCES = [Example("call Porto", '<tool_call name="check_stock">{"city":"Porto","item":"lamp"}</tool_call>')]
LOCAL, STOPPED = "local; reason=local", "hosted; reason=stopped"


def otherwise(prompt, before, asked, answer):
    """The hosted model now says another city, whatever it is asked."""
    body = json.loads(json.dumps(answer.body).replace("Porto", "Bergen"))
    return replace(answer, body=body)


def test_the_watch_takes_a_small_model_that_disagrees_out_of_service_until_a_person_lets_it_back(tmp_path):
    flags = ("--mode", "cascade", "--cascade", cascade(tmp_path / "cascade.json"), "--audit-share", 1, "--workers", 2, "--deadline", 60)
    with Scripted(REFERENCES, plain, key=HOSTED_KEY) as hosted, serving(tmp_path, *flags, hosted=hosted) as endpoint:
        asked = {}  # who answered each request, by its id

        def ask():
            who, reply = endpoint.ask("call Porto")
            asked[reply.id] = who
            if who == LOCAL:
                wait_until(lambda: any(line["id"] == reply.id for line in endpoint.lines("audits.jsonl")))
            return who

        watch = Script(WATCH, "--state", endpoint.state, log=tmp_path / "watch.log", LANGFUSE_DISABLED="1")
        try:
            assert {ask() for _ in range(20)} == {LOCAL}
            wait_until(lambda: "quiet" in (tmp_path / "watch.log").read_text())
            assert flag(endpoint.state) is None
            hosted.script = otherwise
            wait_until(lambda: ask() == STOPPED)
            assert {ask() for _ in range(20)} == {STOPPED}  # in both workers
            up = flag(endpoint.state)
            assert up["alarms"][0]["kind"] == "disagreement" and "differ from the hosted model's" in up["why"]
            assert up["rows"] and {asked[row] for row in up["rows"]} == {LOCAL}
            wait_until(lambda: "alarm: " in (tmp_path / "watch.log").read_text())
            once = run_python(WATCH, "--state", endpoint.state, "--once", LANGFUSE_DISABLED="1")
            assert once.returncode == 12, once.stderr

            hosted.script = plain
            resumed = run_python(WATCH, "--state", endpoint.state, "--resume", LANGFUSE_DISABLED="1")
            assert resumed.returncode == 0, resumed.stderr
            assert {ask() for _ in range(20)} == {LOCAL}
            once = run_python(WATCH, "--state", endpoint.state, "--once", LANGFUSE_DISABLED="1")
            assert (once.returncode, once.stdout.split(" audited")[0]) == (0, "quiet: 20"), once
            assert watch.poll() is None  # it goes on watching
        finally:
            watch.send_signal(2)
            watch.wait()
