"""A judge: a language model that answers prompts, run as a command or asked at an OpenAI-compatible address.

A command gets the prompt on standard input and answers on standard output. No shell is involved. An address gets a chat
completion request (`URL/chat/completions`, a system and a user message) without settings of sampling. Its key is read from
the environment variable `TEMPOSAE_JUDGE_KEY`, and sent to this address only: redirects are refused.

A command that fails or takes too long, and an address that doesn't answer or is busy, are asked again after 1, 2, 4 and 8
seconds. Answers are kept in a file by the SHA-256 of judge and prompt, so no prompt is asked twice.
"""

import hashlib
import json
import os
import queue
import re
import shlex
import shutil
import signal
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from ..engine.errors import UserError, shown
from ..engine.process.progress import ProgressBar, progress_bar

KEY = "TEMPOSAE_JUDGE_KEY"
NO_JUDGE = "needs a judge; give --judge-command 'PROGRAM ARGUMENTS', or --judge-url http://HOST/v1 --judge-model NAME"
AT_ONCE = 8  # prompts that an address is sent at once; a command runs once at a time
WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds before an attempt is repeated
LONGEST_WAIT = 60.0  # seconds, if the address says how long to wait
BUSY = (408, 409, 429, 500, 502, 503, 504, 529)  # status codes after which an address is asked again


class Prompt(NamedTuple):
    """A prompt: what the judge is to do, and the case in question."""

    system: str
    user: str


@dataclass(frozen=True)
class Judge:
    """A command, or an address and the model's name there; and of how many `latents` per dictionary it is asked."""

    command: tuple[str, ...] = ()
    url: str | None = None
    model: str | None = None
    timeout: float = 120.0  # seconds for an answer
    latents: int = 20

    @classmethod
    def of(
        cls, command: str | None = None, url: str | None = None, model: str | None = None, **settings: Any
    ) -> "Judge":
        """From a command line, or an address and a model. Raises UserError for anything else."""
        if command is not None and url is not None:
            raise UserError("judge_url: not allowed beside judge_command; give one judge")
        if command is None and url is None:
            raise UserError("judge_model: not allowed alone; give judge_url, the address of the model")
        if (url is None) != (model is None):
            both = "judge_url and judge_model belong together"
            raise UserError(f"judge_model: {'missing' if model is None else 'not allowed with judge_command'}; {both}")
        words = () if command is None else _words(command)
        return cls(words, None if url is None else _address(url), model, **settings)

    def __post_init__(self) -> None:
        if not 0 < self.timeout < float("inf"):
            raise UserError(f"judge_timeout: {self.timeout} is not allowed; it must be above 0")
        if self.latents < 2:
            raise UserError(f"judge_latents: {self.latents} is not allowed; it must be at least 2")

    @property
    def identity(self) -> dict[str, str]:
        """What results say about the judge: a command's program and digest (its arguments may be secret), or an address."""
        if self.url is not None:
            return {"url": self.url, "model": self.model or ""}
        return {"program": Path(self.command[0]).name, "command_sha256": _digest(self.command)}

    def answer(self, prompt: Prompt) -> str:
        """Ask once. Raises `Unanswered` if asking again may help, and UserError if not."""
        return self._run(prompt) if self.url is None else self._request(prompt, os.environ.get(KEY, ""))

    def _run(self, prompt: Prompt) -> str:
        text = f"{prompt.system}\n\n{prompt.user}\n".encode()
        pipe = subprocess.PIPE
        try:  # a session of its own, so that a timeout also ends what the command has started
            process = subprocess.Popen(self.command, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True)
        except OSError as error:
            raise UserError(f"judge_command: {self.command[0]} can't be run ({error.strerror})") from None
        try:
            out, err = process.communicate(text, timeout=self.timeout)
        except BaseException as error:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            if isinstance(error, subprocess.TimeoutExpired):
                raise Unanswered(f"no answer within {self.timeout:g} s") from None
            raise
        if process.returncode:
            lines = err.decode(errors="replace").strip().splitlines()
            raise Unanswered(f"exit status {process.returncode}{': ' * bool(lines)}{lines[-1] if lines else ''}")
        return out.decode(errors="replace").strip()

    def _request(self, prompt: Prompt, key: str) -> str:
        messages = [{"role": "system", "content": prompt.system}, {"role": "user", "content": prompt.user}]
        body = json.dumps({"model": self.model, "messages": messages}).encode()
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        request = urllib.request.Request(f"{self.url}/chat/completions", body, headers)
        try:
            with urllib.request.build_opener(_NoRedirect).open(request, timeout=self.timeout) as response:
                raw = response.read()
        except urllib.error.HTTPError as error:
            reason = _without(key, f"HTTP {error.code} {error.reason}: {_message(error)}")
            if error.code not in BUSY:
                raise UserError(f"judge_url: {self.url} refuses ({reason})") from None
            raise Unanswered(reason, _seconds(error.headers.get("Retry-After"))) from None
        except (OSError, HTTPException) as error:  # URLError and timeouts are OSErrors
            raise Unanswered(_without(key, str(getattr(error, "reason", error)) or type(error).__name__)) from None
        try:
            content = json.loads(raw)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError):
            raise UserError(f"judge_url: {self.url} does not answer with a chat completion") from None
        return "" if content is None else str(content).strip()


class Unanswered(Exception):
    """An attempt failed, and another one may succeed, after `wait` seconds if the judge says so."""

    def __init__(self, reason: str, wait: float | None = None):
        super().__init__(reason)
        self.wait = wait


class Answers:
    """Answers of a judge, kept in the file `path` (in memory without one). `fresh` forgets earlier answers when the first
    prompt is asked."""

    def __init__(self, judge: Judge, path: Path | None = None, *, fresh: bool = False):
        self.judge, self.path, self.fresh, self.waits = judge, path, fresh, WAITS
        self._known: dict[str, str] = {}
        self._opened = False

    def to(self, prompts: Sequence[Prompt], title: str) -> list[str]:
        """The answer to each prompt. Raises UserError if the judge doesn't answer; earlier answers stay in the file."""
        if not self._opened and self.path is not None:
            if self.fresh:
                self.path.unlink(missing_ok=True)
            self._known, self._opened = _read(self.path), True
        keys = [_digest((self.judge.identity, *prompt)) for prompt in prompts]
        unknown = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in self._known}
        with progress_bar(title, len(unknown), "answers") as bar:
            workers = min(len(unknown), 1 if self.judge.url is None else AT_ONCE)
            if workers > 1:
                self._ask_at_once(unknown, workers, bar)
            else:
                for key, prompt in unknown.items():
                    self._keep(key, self._ask(prompt, threading.Event()), bar)
        return [self._known[key] for key in keys]

    def _ask(self, prompt: Prompt, stop: threading.Event) -> str:
        for wait in (*self.waits, None):
            try:
                return self.judge.answer(prompt)
            except Unanswered as failure:
                if wait is None or stop.wait(wait if failure.wait is None else failure.wait):
                    option = "judge_command" if self.judge.url is None else "judge_url"
                    name = self.judge.url or self.judge.command[0]
                    tries = f"{len(self.waits) + 1} attempts"
                    raise UserError(f"{option}: {name} gives no answer after {tries} ({failure})") from None
        raise AssertionError

    def _ask_at_once(self, unknown: dict[str, Prompt], workers: int, bar: ProgressBar) -> None:
        """Ask in several threads. They are daemons, so that an interrupted process doesn't wait for open requests."""
        waiting, done = queue.SimpleQueue[tuple[str, Prompt]](), queue.SimpleQueue[tuple[str, str | BaseException]]()
        stop = threading.Event()

        def work() -> None:
            while not stop.is_set():
                try:
                    key, prompt = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    done.put((key, self._ask(prompt, stop)))
                except BaseException as error:
                    done.put((key, error))

        for item in unknown.items():
            waiting.put(item)
        for _ in range(workers):
            threading.Thread(target=work, daemon=True).start()
        try:
            for _ in unknown:
                key, answer = done.get()
                if isinstance(answer, BaseException):
                    raise answer
                self._keep(key, answer, bar)
        finally:
            stop.set()

    def _keep(self, key: str, answer: str, bar: ProgressBar) -> None:
        self._known[key] = answer
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:  # one write, so a kill cuts at most the last line
                file.write(json.dumps({"prompt": key, "answer": answer}) + "\n")
        bar.advance(1)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None  # the 3xx response becomes an HTTPError; the key would go to another host


def _words(command: str) -> tuple[str, ...]:
    try:
        words = tuple(shlex.split(command))
    except ValueError as error:
        raise UserError(f"judge_command: {shown(command)} is not allowed; {error}") from None
    if not words or shutil.which(os.path.expanduser(words[0])) is None:
        raise UserError(
            f"judge_command: {shown(words[0] if words else '')} is not allowed; it must begin with a program"
        )
    return os.path.expanduser(words[0]), *words[1:]


def _address(url: str) -> str:
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1)
    except ValueError:
        raise UserError("judge_url: not an address; it must be like http://HOST/v1") from None
    if "@" in parts.netloc or parts.query or parts.fragment:  # may hold a key, so it is not shown
        raise UserError(f"judge_url: user names and queries are not allowed; give the key in the variable {KEY}")
    if not known:
        raise UserError(f"judge_url: {shown(url)} is not allowed; it must be like http://HOST/v1")
    return url.rstrip("/").removesuffix("/chat/completions")


def _read(path: Path) -> dict[str, str]:
    """Answers in a file by their keys. Damaged lines are skipped, so their prompts are asked again."""
    answers: dict[str, str] = {}
    if not path.is_file():
        return answers
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):  # a kill cut the last line
        with path.open("ab") as file:
            file.write(b"\n")
    for line in content.decode("utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        match entry:
            case {"prompt": str(key), "answer": str(answer)}:
                answers[key] = answer
    return answers


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _message(error: urllib.error.HTTPError) -> str:
    """The beginning of an error response, in one line."""
    try:
        return re.sub(r"\s+", " ", error.read(2000).decode(errors="replace")).strip()[:300]
    except (OSError, HTTPException):
        return ""


def _without(key: str, text: str) -> str:
    """The text without the key, which an address may repeat."""
    return text.replace(key, "***") if key else text


def _seconds(header: str | None) -> float | None:
    """The seconds of a Retry-After header, at most `LONGEST_WAIT`; None for a date."""
    return min(float(header), LONGEST_WAIT) if header is not None and header.strip().isdecimal() else None
