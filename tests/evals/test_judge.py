"""Judges: commands and addresses, what is asked again, what is kept, and that a key goes nowhere else."""

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from temposae.engine.errors import UserError
from temposae.evals import judge as module
from temposae.evals.judge import KEY, Answers, Judge, Prompt, Unanswered

PROMPTS = [Prompt("Say it again.", f"word {i}") for i in range(20)]
SECRET = "sk-very-secret"


def python(folder: Path, source: str) -> Judge:
    """A command that runs a Python script."""
    path = folder / "judge.py"
    path.write_text(source)
    return Judge.of(f"{sys.executable} {path}")


@contextmanager
def served(answer: Callable[[dict[str, Any], int], tuple[int, dict[str, str], str]]) -> Iterator[tuple[str, list]]:
    """An address, and the requests that reach it as (path, Authorization, body); `answer` gets a body and its number and
    returns status, headers and body."""
    requests: list[tuple[str, str | None, dict[str, Any]]] = []
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                requests.append((self.path, self.headers["Authorization"], body))
                status, headers, text = answer(body, len(requests))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text.encode())

        def do_GET(self) -> None:
            requests.append((self.path, self.headers["Authorization"], {}))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", requests
    finally:
        server.shutdown()
        server.server_close()


def completion(text: str | None) -> str:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


def echo(body: dict[str, Any], _: int) -> tuple[int, dict[str, str], str]:
    return 200, {}, completion(f" heard {body['messages'][1]['content']}\n")


@pytest.fixture(autouse=True)
def at_once(monkeypatch) -> None:
    monkeypatch.setattr(module, "WAITS", (0.0, 0.0))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv(KEY, raising=False)


def test_a_command_reads_the_prompt_and_no_shell_reads_the_command(tmp_path):
    judge = python(tmp_path, "import sys\nprint(sys.argv[1:], repr(sys.stdin.read()))")
    judge = Judge((*judge.command, "$HOME;", "a b"))
    assert judge.answer(PROMPTS[0]) == r"['$HOME;', 'a b'] 'Say it again.\n\nword 0\n'"
    assert Judge.of("sh -c 'cat | tail -n 1'").answer(PROMPTS[3]) == "word 3"
    assert Judge.of("true").answer(Prompt("s", "u" * 10**6)) == ""  # it reads nothing


def test_a_command_that_takes_too_long_is_ended_with_what_it_started(tmp_path):
    late = tmp_path / "late"
    judge = Judge.of(f"sh -c 'sleep 2; echo x > {late}' ", timeout=0.3)
    began = time.monotonic()
    with pytest.raises(Unanswered, match=r"^no answer within 0\.3 s$"):
        judge.answer(PROMPTS[0])
    assert time.monotonic() - began < 1.5
    time.sleep(2.2)
    assert not late.exists()


def test_a_command_is_asked_again_and_then_named(tmp_path):
    source = (
        "import pathlib, sys\np = pathlib.Path(__file__).with_name('n')\nn = len(p.read_text()) if p.exists() else 0\n"
        "p.write_text('x' * (n + 1))\nif n < {}: sys.exit('not yet')\nprint('now')"
    )
    assert Answers(python(tmp_path, source.format(2))).to(PROMPTS[:1], "asking") == ["now"]
    (tmp_path / "n").unlink()
    with pytest.raises(
        UserError, match=r"^judge_command: .*python\S* gives no answer after 3 attempts \(exit status 1: not y"
    ):
        Answers(python(tmp_path, source.format(3))).to(PROMPTS[:1], "asking")


def test_answers_are_kept_and_nothing_is_asked_twice(tmp_path):
    source = (
        "import pathlib, sys\np = sys.stdin.read()\nwith open(__file__ + '.log', 'a') as f: f.write(p)\n{}print(len(p))"
    )
    path, log = tmp_path / "run" / "evals" / "judge.jsonl", tmp_path / "judge.py.log"
    failing = python(tmp_path, source.format("if 'word 3' in p: sys.exit(1)\n"))
    with pytest.raises(UserError, match="no answer"):
        Answers(failing, path).to(PROMPTS[:6], "asking")
    assert log.read_text().count("word") == 3 + 3  # three were answered, and the fourth was asked three times
    working = python(tmp_path, source.format(""))
    assert working == failing
    with path.open("a") as file:
        file.write('{"prompt": "cut off')
    log.unlink()
    answers = Answers(working, path)
    assert answers.to([*PROMPTS[:6], PROMPTS[2]], "asking") == ["22"] * 7
    assert [i for i in range(6) if f"word {i}\n" in log.read_text()] == [3, 4, 5]
    log.unlink()
    assert Answers(working, path).to(PROMPTS[:6], "asking") == ["22"] * 6
    assert not log.exists()
    other = Judge((*working.command, "other"))  # another judge answers for itself
    Answers(other, path).to(PROMPTS[:1], "asking")
    assert log.read_text().count("word") == 1
    Answers(working, path, fresh=True).to(PROMPTS[:1], "asking")
    assert log.read_text().count("word") == 2
    assert len(path.read_text().splitlines()) == 1


def test_an_address_is_sent_chat_completions(tmp_path, monkeypatch):
    with served(echo) as (url, requests):
        judge = Judge.of(url=url + "/", model="small")
        assert Answers(judge).to(PROMPTS, "asking") == [f"heard word {i}" for i in range(20)]
        assert {(path, key) for path, key, _ in requests} == {("/v1/chat/completions", None)}
        monkeypatch.setenv(KEY, SECRET)
        answers = Answers(judge, tmp_path / "judge.jsonl")
        answers.to(PROMPTS[:1], "asking")
        assert requests[-1][1:] == (
            f"Bearer {SECRET}",
            {
                "model": "small",
                "messages": [{"role": "system", "content": "Say it again."}, {"role": "user", "content": "word 0"}],
            },
        )
        assert SECRET not in (tmp_path / "judge.jsonl").read_text() + repr(judge) + repr(judge.identity)
        assert len(requests) == 21


def test_a_busy_address_is_asked_again(monkeypatch):
    waited: list[float] = []
    monkeypatch.setattr(threading.Event, "wait", lambda self, seconds=None: waited.append(seconds) and False)
    replies = [(503, {}, "busy"), (429, {"Retry-After": "7"}, "slow"), (200, {}, completion("yes"))]
    judge = Judge.of(url="http://127.0.0.1:1/v1", model="m")
    with served(lambda _, n: replies[n - 1]) as (url, requests):
        assert Answers(Judge.of(url=url, model="m")).to(PROMPTS[:1], "asking") == ["yes"]
    assert len(requests) == 3
    assert [wait for wait in waited if wait in (0.0, 7.0)] == [0.0, 7.0]
    with pytest.raises(
        UserError, match=r"^judge_url: http://127\.0\.0\.1:1/v1 gives no answer after 3 attempts \(.*refused"
    ):
        Answers(judge).to(PROMPTS[:1], "asking")


def test_an_address_that_refuses_is_asked_once_and_the_key_is_not_shown(monkeypatch):
    monkeypatch.setenv(KEY, SECRET)
    with served(lambda _, n: (401, {}, f"wrong key:\n{SECRET}")) as (url, requests):
        with pytest.raises(UserError) as error:
            Answers(Judge.of(url=url, model="m")).to(PROMPTS[:1], "asking")
        assert str(error.value) == f"judge_url: {url} refuses (HTTP 401 Unauthorized: wrong key: ***)"
        assert len(requests) == 1
    for text in ("<html>", "[]", '{"choices": []}'):
        no_completion = pytest.raises(UserError, match="does not answer with a chat completion")
        with served(lambda _, n, text=text: (200, {}, text)) as (url, _), no_completion:
            Answers(Judge.of(url=url, model="m")).to(PROMPTS[:1], "asking")
    with served(lambda _, n: (200, {}, completion(None))) as (url, _):
        assert Answers(Judge.of(url=url, model="m")).to(PROMPTS[:1], "asking") == [""]


def test_the_key_is_not_sent_where_an_address_redirects_to(monkeypatch):
    monkeypatch.setenv(KEY, SECRET)
    with served(echo) as (other, reached), served(lambda _, n: (302, {"Location": other}, "")) as (url, _):
        with pytest.raises(UserError, match="refuses .HTTP 302"):
            Answers(Judge.of(url=url, model="m")).to(PROMPTS[:1], "asking")
        assert reached == []


def test_one_failure_of_many_requests_ends_the_others():
    many = [Prompt("Say it again.", f"word {i}") for i in range(400)]

    def third_refused(body: dict[str, Any], n: int) -> tuple[int, dict[str, str], str]:
        time.sleep(0.01)  # one request after another, so all of them would take 4 seconds
        return (400, {}, "no") if n == 3 else echo(body, n)

    with served(third_refused) as (url, requests):
        with pytest.raises(UserError, match="HTTP 400"):
            Answers(Judge.of(url=url, model="m")).to(many, "asking")
        time.sleep(1)
        assert len(requests) < 200


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"command": "a 'b"}, 'judge_command: "a \'b" is not allowed; No closing quotation'),
        ({"command": " "}, "judge_command: '' is not allowed; it must begin with a program"),
        (
            {"command": "no-such-program x"},
            "judge_command: 'no-such-program' is not allowed; it must begin with a program",
        ),
        ({"command": "cat", "url": "http://a"}, "judge_url: not allowed beside judge_command; give one judge"),
        (
            {"command": "cat", "model": "m"},
            "judge_model: not allowed with judge_command; judge_url and judge_model belong",
        ),
        ({"url": "http://a/v1"}, "judge_model: missing; judge_url and judge_model belong together"),
        ({"model": "m"}, "judge_model: not allowed alone; give judge_url, the address of the model"),
        ({"url": "ftp://a", "model": "m"}, "judge_url: 'ftp://a' is not allowed; it must be like http://HOST/v1"),
        ({"url": "http://a:x/v1", "model": "m"}, "judge_url: not an address; it must be like http://HOST/v1"),
        ({"command": "cat", "timeout": 0}, "judge_timeout: 0 is not allowed; it must be above 0"),
        ({"command": "cat", "latents": 1}, "judge_latents: 1 is not allowed; it must be at least 2"),
    ],
)
def test_a_judge_that_is_not_allowed_is_named(given, message):
    with pytest.raises(UserError) as error:
        Judge.of(**given)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("url", [f"http://me:{SECRET}@a/v1", f"http://a/v1?key={SECRET}", f"http://a/#{SECRET}"])
def test_an_address_with_a_secret_is_refused_and_not_shown(url):
    with pytest.raises(UserError, match="^judge_url: user names and queries are not allowed") as error:
        Judge.of(url=url, model="m")
    assert SECRET not in str(error.value)


def test_results_do_not_name_the_arguments_of_a_command():
    one, two = (Judge.of(f"cat --key {key}") for key in (SECRET, "other"))
    assert SECRET not in str(one.identity)
    assert one.identity["program"] == two.identity["program"] == "cat"
    assert one.identity != two.identity
