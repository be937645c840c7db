"""Questions answered by a served model: several requests at a time, failed ones repeated, answers kept as they come."""

import base64
import io
import itertools
import queue
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from llava_integration.answer.answers_file import AnswersFile, entry
from llava_integration.answer.endpoint import Endpoint, EndpointError, PassingError, RefusedError, Reply
from llava_integration.answer.questions import Question
from llm2clip_plugin.outside.pauses import Retry
from llm2clip_plugin.progress import progress_bar

MOST_REFUSED = 10  # requests refused one after another, then the run stops: it is not about single questions
SILENCE = 30.0  # seconds between two messages about retries
ORIENTATION = 0x0112  # EXIF tag, which some servers apply and LLaVA does not


@dataclass(frozen=True, kw_only=True)
class Asking:
    """How a model is asked."""

    model: str  # its name on the server
    image_folder: str
    sampling: dict[str, Any]  # of the request: temperature, max_tokens ...
    concurrency: int  # requests at a time
    retry: Retry = field(default_factory=Retry)  # of a request


def chat_body(question: Question, asking: Asking) -> dict[str, Any]:
    """The request of a question: image, then text, as in LLaVA's prompts; the server applies the chat template."""
    content: Any = question.text
    if question.image:
        url = image_url(question, asking.image_folder)
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question.text}]
    return {"model": asking.model, "messages": [{"role": "user", "content": content}], **asking.sampling}


def image_url(question: Question, folder: str) -> str:
    """The image as a data URL: the file's bytes if any reader sees in them what LLaVA sees, otherwise a PNG.

    A server may rotate by EXIF or put transparent images on white, which LLaVA does not.
    """
    image = question.open_image(folder)
    raw = base64.b64decode(question.image) if question.embedded else (Path(folder) / question.image).read_bytes()
    with Image.open(io.BytesIO(raw)) as source:
        kind, plain = source.format, source.mode == "RGB" and source.getexif().get(ORIENTATION, 1) == 1
    if kind not in ("JPEG", "PNG") or not plain:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        raw, kind = buffer.getvalue(), "PNG"
    return f"data:image/{kind.lower()};base64,{base64.b64encode(raw).decode()}"


class Requests:
    """Threads that ask the server; their results in the order in which they come."""

    def __init__(self, endpoint: Endpoint, asking: Asking, questions: list[Question], indices: list[int]) -> None:
        """``indices``: of the questions to ask."""
        self.endpoint, self.asking, self.questions = endpoint, asking, questions
        self.todo: queue.SimpleQueue[int] = queue.SimpleQueue()
        for index in indices:
            self.todo.put(index)
        self.results: queue.SimpleQueue[tuple[int, Reply | Exception]] = queue.SimpleQueue()
        self.stopped = threading.Event()
        self.answered = 0  # questions
        self._reported = -SILENCE  # time of the last message about a retry

    def start(self) -> None:
        """Start the threads; daemons, since an interrupted run does not wait for a server."""
        for _ in range(min(self.asking.concurrency, self.todo.qsize())):
            threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        while not self.stopped.is_set():
            try:
                index = self.todo.get_nowait()
            except queue.Empty:
                return
            try:
                result: Reply | Exception = self._ask(self.questions[index])
            except (RefusedError, PassingError) as error:  # of this question
                result = error
            except Exception as error:  # of all of them; raised again in the main thread
                result = error
                self.stopped.set()
            self.results.put((index, result))

    def _ask(self, question: Question) -> Reply:
        body = chat_body(question, self.asking)
        retry, before = self.asking.retry, self.answered
        for failures in itertools.count(1):
            try:
                reply = self.endpoint.chat(body)
                self.answered += 1  # threads may lose a count, never all
                return reply
            except PassingError as error:
                if failures >= retry.tries or self.stopped.is_set():
                    if not error.answered and self.answered == before:
                        reason = f"{error}; {failures} attempts failed, and no question succeeded"
                        raise EndpointError(reason) from error
                    raise
                pause = max(retry.pause(failures), error.pause)
                self._report(f"{error}; retrying in {pause:.1f} s ({failures} of {retry.tries - 1})")
                self.stopped.wait(pause)
        raise AssertionError("unreachable")

    def _report(self, text: str) -> None:
        """Print the first retry, then one now and then: all threads fail together."""
        now = time.monotonic()
        if now - self._reported >= SILENCE:
            self._reported = now
            print(text, file=sys.stderr)


def answer_served(
    endpoint: Endpoint, asking: Asking, questions: list[Question], indices: list[int], answers: AnswersFile
) -> list[str]:
    """Ask the questions of these indices and write each answer as it comes; returns a line for each question refused.

    Raises EndpointError if the server is gone or refuses request after request; the answers until then are written.
    """
    requests = Requests(endpoint, asking, questions, indices)
    refused: list[str] = []
    in_a_row = 0
    done = len(questions) - len(indices)
    requests.start()
    try:
        with progress_bar(total=len(questions), initial=done, label="answers", unit="questions") as bar:
            for _ in indices:
                index, result = requests.results.get()
                if isinstance(result, Reply):
                    metadata = {"endpoint": endpoint.url, "finish_reason": result.finish_reason}
                    answers.write({index: entry(questions[index], result.text, asking.model, metadata)})
                    in_a_row = 0
                    bar.update()
                elif isinstance(result, (RefusedError, PassingError)):
                    refused.append(f"question {questions[index].id!r}: {result}")
                    in_a_row += 1
                    if in_a_row >= MOST_REFUSED:
                        raise EndpointError(f"no answer to {in_a_row} requests in a row, last {refused[-1]}")
                else:
                    raise result
    finally:
        requests.stopped.set()
    return refused
