"""Before the first step, all ranks compare what they must have in common; one message names what differs, and where.

Ranks that disagree would train on with plausible losses (one resumes, another starts over) or wait for each other
forever (one evaluates, another does not).
"""

import hashlib
import socket
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from llm2clip_plugin.contracts import canonical_json, sha256_text
from llm2clip_plugin.train.distributed import broadcast_object, gather_objects, on_first_rank, rank, world_size
from llm2clip_plugin.train.errors import DisagreementError

SEEN_WITHIN = 5.0  # seconds after which a file written on one host must be visible on the others
LISTED = 12  # differing facts that a message lists

Facts = Mapping[str, str]  # what is compared -> this rank's value


def refuse_disagreement(facts: Facts, advice: Mapping[str, str]) -> None:
    """Compare the facts of all ranks; every rank must call this.

    ``advice``: the first word of a fact -> what to do if it differs. Raises DisagreementError on every rank, with every
    value and the hosts and ranks that have it.
    """
    digests = gather_objects(sha256_text(canonical_json(dict(facts))))
    if len(set(digests)) > 1:
        raise DisagreementError(disagreement(gather_objects((socket.gethostname(), dict(facts))), advice))


def disagreement(ranks: Sequence[tuple[str, Facts]], advice: Mapping[str, str]) -> str:
    """The message about the facts of all ranks, given as (host, facts) in order of rank."""
    names = dict.fromkeys(name for _, facts in ranks for name in facts)
    differing = [name for name in names if len({facts.get(name) for _, facts in ranks}) > 1]
    lines, advised = ["the ranks disagree before the first step:"], set()
    for name in differing[:LISTED]:
        holders: dict[str, dict[str, list[int]]] = {}  # value -> host -> ranks
        for number, (host, facts) in enumerate(ranks):
            holders.setdefault(facts.get(name, "absent"), {}).setdefault(host, []).append(number)
        groups = [
            f"{value} on " + ", ".join(f"{host} (ranks {', '.join(map(str, own))})" for host, own in hosts.items())
            for value, hosts in holders.items()
        ]
        lines.append(f"  {name}: {'; '.join(groups)}")
        advised.add(advice.get(name.split()[0], ""))
    if len(differing) > LISTED:
        lines.append(f"  and {len(differing) - LISTED} more")
    return "\n".join([*lines, *sorted(advised - {""})])


def shared_folder(folder: Path) -> str:
    """Whether this rank sees what rank 0 writes into ``folder``, as a fact; every rank must call this.

    Raises OSError if rank 0 cannot write there.
    """
    if world_size() == 1:
        return "shared"
    file = folder / broadcast_object(f".shared-{uuid.uuid4().hex[:12]}")

    def write() -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file.touch()
        except OSError as error:
            raise OSError(f"cannot write in --output {folder}: {error.strerror}") from error

    on_first_rank(write)
    seen = _appears(file)
    gather_objects(seen)  # all have looked
    if rank() == 0:
        file.unlink(missing_ok=True)
    return "shared with rank 0" if seen else f"{folder.absolute()} lacks a file that rank 0 has just written"


def _appears(path: Path) -> bool:
    """Whether a file is there, or appears while an NFS client refreshes its view of the folder."""
    deadline = time.monotonic() + SEEN_WITHIN
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def readable_checkpoint(path: Path, state_file: str) -> str:
    """A checkpoint as this rank reads it: the digest of its state, and the sizes of its files."""
    if not _appears(path / state_file):
        return f"{path.name} is missing"
    try:
        digest = hashlib.sha256((path / state_file).read_bytes()).hexdigest()
        sizes = {file.name: file.stat().st_size for file in sorted(path.glob("*.safetensors"))}
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror}"
    return f"{path.name} {digest[:12]}, {', '.join(f'{name} {size} bytes' for name, size in sizes.items())}"
