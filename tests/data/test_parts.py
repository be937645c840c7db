import threading
from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest
import torch

from llm2clip_plugin.data.loader import Ahead, join_parts


def part(first: int, size: int) -> dict[str, Any]:
    numbers = torch.arange(first, first + size)
    return {"pixels": numbers[:, None].to(torch.uint8), "keys": [str(int(i)) for i in numbers], "broken": ["x"]}


def test_parts_are_joined_in_order_into_memory_of_their_own() -> None:
    parts = [part(0, 3), part(3, 2), part(5, 5), part(10, 4)]
    batches = list(join_parts(parts, 5, pin_memory=False))  # the last part does not fill a batch
    assert [batch["keys"] for batch in batches] == [list("01234"), list("56789")]
    assert [batch["pixels"].flatten().tolist() for batch in batches] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert [batch["broken"] for batch in batches] == [["x", "x"], ["x"]]
    assert batches[1]["pixels"].data_ptr() != parts[2]["pixels"].data_ptr()


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
    assert list(Ahead(iter([1, 2]), threading.Event())) == [1, 2]
    with pytest.raises((AssertionError, AttributeError, RuntimeError)):  # no such GPU
        next(Ahead(iter([1, 2]), threading.Event(), device=99))
