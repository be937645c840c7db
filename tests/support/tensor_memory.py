"""Memory of tensors, as torch's allocator counts it: the same on a machine that is busy or short of
memory."""

from collections.abc import Callable

import torch


def peak_bytes(run: Callable[[], object]) -> int:
    """Bytes that tensors take at most during ``run``, beyond what they took before it."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        run()
    assert profiler.profiler is not None
    events = [
        event
        for event in profiler.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    held = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()  # negative where memory is freed
        highest = max(highest, held)
    return highest
