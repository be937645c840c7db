import threading
from collections.abc import Iterator
from itertools import count

import pytest

from llm2clip_plugin.data.loader import Ahead


def test_one_item_is_made_ahead_and_no_more() -> None:
    made = threading.Semaphore(0)

    def numbers() -> Iterator[int]:
        for number in count():
            made.release()
            yield number

    ahead = Ahead(numbers(), threading.Event())
    assert made.acquire(timeout=10)  # before anybody asks
    assert [next(ahead) for _ in range(3)] == [0, 1, 2]
    for _ in range(3):
        assert made.acquire(timeout=10)  # 1, 2, and 3 ahead
    assert not made.acquire(timeout=0.1)
    ahead.close()
    assert not ahead._thread.is_alive()


def test_an_error_of_the_thread_is_raised_in_its_place() -> None:
    def numbers() -> Iterator[int]:
        yield 0
        raise OSError("the disk is gone")

    ahead = Ahead(numbers(), threading.Event())
    assert next(ahead) == 0
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            next(ahead)
