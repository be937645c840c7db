"""What a training listens on, and what its ranks send each other."""

import ast
import json
import math
import os
import socket
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from forked import Script
from tiny_data import make_all
from tower_runs import environment, finish, options, places
from train_helpers import run_ranks

from llm2clip_plugin.train.distributed import (
    broadcast_object,
    free_port,
    gather_objects,
    gather_to_first,
    is_loopback,
    on_first_rank,
    on_one_host,
    own_store,
    use_loopback,
)
from llm2clip_plugin.train.wire import pack, unpack

ROOT = Path(__file__).parents[2]
PACKAGES = ("llm2clip_plugin", "llava_integration", "scripts")
# train-tower, which writes the addresses that its process listens on before the first step
LISTENING = """
import json, os, sys
import psutil
from llm2clip_plugin.cli import leave, run
from llm2clip_plugin.stages.run import TrainingRun

train_to_end = TrainingRun.train_to_end

def listed(self, *arguments, **options):
    sockets = psutil.Process().net_connections("inet")
    addresses = [socket.laddr.ip for socket in sockets if socket.status == psutil.CONN_LISTEN]
    with open(sys.argv[0] + os.environ.get("RANK", ""), "w") as file:
        json.dump(addresses, file)
    return train_to_end(self, *arguments, **options)

TrainingRun.train_to_end = listed
leave(run("train-tower", sys.argv[1:]))
"""
# a rank, which writes what it was told, and what its launcher listens on
LAUNCHED = """
import json, os, sys
import psutil

facts = {name: os.environ[name] for name in ("MASTER_ADDR", "TORCHELASTIC_USE_AGENT_STORE")}
sockets = psutil.Process(os.getppid()).net_connections("inet")
facts["listening"] = [one.laddr.ip for one in sockets if one.status == psutil.CONN_LISTEN]
with open(sys.argv[0] + os.environ["RANK"], "w") as file:
    json.dump(facts, file)
"""
VALUES = [
    *(None, True, 3, -0.5, "Käse", [], {}, [1, [2, "x"]]),
    {"dict": {"tensor": "0"}, "json": [None]},  # looks like the wire's own objects
    1 << 80,
    math.inf,
]


@pytest.mark.parametrize("world", [1, 2])
def test_a_training_on_one_host_listens_on_the_loopback_interface_alone(
    tmp_path: Path, world: int
):
    script = tmp_path / "listening.py"
    script.write_text(LISTENING)
    argv = options(
        make_all(tmp_path / "tiny"),
        tmp_path / "run",
        "--max_steps",
        "1",
        "--heads.steps",
        "1",
    )
    variables = [environment()] if world == 1 else places(world)
    ranks = [Script(script, argv, of_rank, ROOT) for of_rank in variables]
    assert finish(ranks) == [0] * world, ranks[0].output
    listening = [
        json.loads(Path(f"{script}{rank}").read_text()) for rank in range(world)
    ]
    assert {address for of_rank in listening for address in of_rank} <= {"127.0.0.1"}
    # of several ranks, the first holds the store
    assert bool(listening[0]) or world == 1


def test_the_store_of_one_process_has_no_port_and_that_of_several_is_on_loopback(
    monkeypatch: pytest.MonkeyPatch,
):
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    limit = timedelta(seconds=60)
    assert isinstance(own_store(0, 1, limit), dist.HashStore)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    stores: list[dist.Store | None] = []
    first = threading.Thread(target=lambda: stores.append(own_store(0, 2, limit)))
    first.start()
    other = own_store(1, 2, limit)
    first.join()
    assert stores[0] is not None
    assert other is not None
    stores[0].set("key", "value")
    assert other.get("key") == b"value"
    port = int(os.environ["MASTER_PORT"])
    sockets = [
        connection
        for connection in psutil.Process().net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert [
        connection.laddr.ip for connection in sockets if connection.laddr.port == port
    ] == ["127.0.0.1"]
    with pytest.raises(
        OSError,
        match=f"cannot listen on port {port}: .*; choose another with --master_port",
    ):
        own_store(0, 2, limit)
    # torchrun holds the store
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert own_store(0, 2, limit) is None
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE")
    monkeypatch.setenv("MASTER_PORT", "x")
    with pytest.raises(
        ValueError, match="MASTER_PORT is 'x'; expected a number from a launcher"
    ):
        own_store(0, 2, limit)
    monkeypatch.setenv("MASTER_ADDR", "node-1")
    assert own_store(0, 2, limit) is None  # other hosts must reach it


@pytest.mark.parametrize(
    ("variables", "one_host"),
    [
        ({}, True),
        ({"WORLD_SIZE": "8", "MASTER_ADDR": "127.0.0.1"}, True),
        (
            {"WORLD_SIZE": "8", "MASTER_ADDR": "node-1", "LOCAL_WORLD_SIZE": "8"},
            True,
        ),  # torchrun
        (
            {"WORLD_SIZE": "8", "MASTER_ADDR": "10.0.0.1", "LOCAL_SIZE": "8"},
            True,
        ),  # deepspeed
        ({"WORLD_SIZE": "8", "MASTER_ADDR": "10.0.0.1", "LOCAL_SIZE": "4"}, False),
        ({"WORLD_SIZE": "8", "MASTER_ADDR": "node-1"}, False),
    ],
)
def test_launches_on_one_host_are_told_by_their_variables(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], one_host: bool
):
    for name in ("WORLD_SIZE", "MASTER_ADDR", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert on_one_host() is one_host


def test_gloo_and_nccl_use_the_loopback_interface_unless_the_user_says_another(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth7")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    use_loopback()
    interface = os.environ.pop("GLOO_SOCKET_IFNAME")
    assert "127.0.0.1" in [
        address.address for address in psutil.net_if_addrs()[interface]
    ]
    assert os.environ["NCCL_SOCKET_IFNAME"] == "eth7"


def test_our_launcher_has_no_port_and_leaves_no_file(tmp_path: Path):
    script = tmp_path / "rank.py"
    script.write_text(LAUNCHED)
    variables = environment(TMPDIR=str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    launcher = Script(
        ROOT / "llm2clip_plugin/launch.py",
        ["--nproc_per_node", "2", str(script)],
        variables,
        ROOT,
    )
    assert finish([launcher]) == [0], launcher.output
    facts = [json.loads(Path(f"{script}{rank}").read_text()) for rank in (0, 1)]
    assert (
        facts
        == [
            {
                "MASTER_ADDR": "127.0.0.1",
                "TORCHELASTIC_USE_AGENT_STORE": "False",
                "listening": [],
            }
        ]
        * 2
    )
    assert not list((tmp_path / "temporary").glob("llm2clip-*"))


def test_loopback_addresses():
    assert all(map(is_loopback, ("127.0.0.1", "127.1.2.3", "::1", "localhost")))
    assert not any(
        map(is_loopback, ("", "0.0.0.0", "10.0.0.1", "node-1", socket.gethostname()))
    )


@pytest.mark.parametrize("value", VALUES)
def test_values_survive_packing(value: Any):
    assert unpack(pack(value)) == value


def test_tensors_survive_packing_and_other_objects_are_refused():
    base = torch.arange(6.0).view(2, 3)
    for tensor in (
        base,
        base.T,
        base[1],
        base.half(),
        torch.tensor(True),
        torch.empty(0, 4, dtype=torch.int64),
    ):
        back = unpack(pack({"both": [tensor, (tensor, 1)]}))["both"]
        assert torch.equal(back[0], tensor)
        assert torch.equal(back[1][0], tensor)
        assert back[0].dtype == tensor.dtype
    for refused in (Path("x"), {1: 2}, {"set"}, ValueError("x"), b"bytes"):
        with pytest.raises(TypeError, match="ranks exchange JSON and tensors, not"):
            pack([refused])


def exchange(rank: int, world: int) -> list[Any]:
    """What each kind of exchange returns on this rank, with pickle switched off."""

    def refused(*_: object) -> None:
        raise AssertionError("an object was pickled")

    dist.distributed_c10d._object_to_tensor = refused
    of_rank = {
        "rank": rank,
        "text": "x" * (1 + 1000 * rank),
        "tensor": torch.full((rank + 1,), rank),
    }
    return [
        gather_objects(of_rank),
        gather_to_first([rank, "y" * rank]),
        broadcast_object(of_rank if rank == 0 else None),
        on_first_rank(lambda: [f"of {rank}", torch.ones(2)]),
    ]


def test_two_ranks_exchange_objects_as_json():
    first, second = run_ranks(exchange, 2)
    for gathered, _, broadcast, of_first in (first, second):
        assert [value["rank"] for value in gathered] == [0, 1]
        assert [len(value["text"]) for value in gathered] == [1, 1001]
        assert [value["tensor"].tolist() for value in gathered] == [[0], [1, 1]]
        assert broadcast["rank"] == 0
        assert broadcast["tensor"].tolist() == [0]
        assert of_first[0] == "of 0"
        assert of_first[1].tolist() == [1.0, 1.0]
    assert first[1] == [[0, ""], [1, "y"]]
    assert second[1] == []


def test_no_code_of_ours_exchanges_pickles():
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    names = (
        "all_gather_object",
        "gather_object",
        "scatter_object_list",
        "broadcast_object_list",
    )
    names += (
        "send_object_list",
        "recv_object_list",
        "gather_object_list",
        "scatter_object_output_list",
    )
    used = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {node.attr}"
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in names
    ]
    assert len(files) > 100
    assert not used
