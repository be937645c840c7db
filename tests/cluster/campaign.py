"""By hand: runs killed at random moments must end with the losses and weights of an undisturbed one, bit for bit.

    PYTHONPATH=tests python tests/cluster/campaign.py --kills 20 --stages 1 3

SIGKILL hits both ranks, or one of those that train (then the other must end by itself), at any moment of the processes:
while they load, train, write a checkpoint in the background, or export. Prints a line a kill and a table of the stages.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path

from tiny_data import make_all
from tower_runs import finish, losses, options, start

STEPS = 60
PATIENCE = 300  # seconds for the rank that is left to end by itself


def kill_at_random(processes: list[subprocess.Popen[bytes]], run: Path, chance: random.Random) -> str:
    """Kill both ranks or one; returns which, and when: "end" if the run was over before."""
    if chance.random() < 0.3:
        time.sleep(chance.random() * 8)
        moment = "start"
    else:
        already = len(losses(run))
        goal = already + chance.randrange(1, 12)
        while len(losses(run)) < goal and all(process.poll() is None for process in processes):
            time.sleep(0.002)
        time.sleep(chance.random() * 0.2)
        moment = "save" if list(run.glob("checkpoints/.step-*")) else "step"
    if all(process.poll() is not None for process in processes):
        return "end"
    together = moment == "start" or chance.random() < 0.5  # a rank alone waits for the other until a timeout
    victims = processes if together else [chance.choice(processes)]
    for victim in victims:
        victim.kill()
    for process in processes:
        process.wait(timeout=PATIENCE)
    return f"{moment}, {'both ranks' if len(victims) == 2 else 'one rank'}"


def digest(run: Path) -> str:
    """Of the last checkpoint's weights and moments."""
    files = [run / f"checkpoints/step-{STEPS:08d}" / name for name in ("model.safetensors", "optimizer.safetensors")]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def campaign(folder: Path, stage: int, kills: int, seed: int) -> bool:
    """Kill a run of ZeRO ``stage`` so often, over as many runs as it takes; True if all equal the undisturbed one."""
    chance, counts, runs, equal = random.Random(seed), Counter[str](), 0, True
    more = ("--max_steps", str(STEPS), "--deepspeed", f"scripts/zero{stage}.json", "--save_steps", "3")
    straight = folder / f"straight-{stage}"
    assert finish(start(options(folder / "tiny", straight, *more), 2)) == [0, 0]
    while counts.total() < kills:
        run, runs = folder / f"killed-{stage}-{runs}", runs + 1
        while not (run / "tower").is_dir() and counts.total() < kills:
            moment = kill_at_random(start(options(folder / "tiny", run, *more), 2), run, chance)
            if moment != "end":
                counts[moment] += 1
                print(f"zero{stage} kill {counts.total()}: {moment}, at step {max(losses(run), default=0)}", flush=True)
        assert finish(start(options(folder / "tiny", run, *more), 2)) == [0, 0], run
        same = losses(run) == losses(straight) and digest(run) == digest(straight)
        print(f"zero{stage}: run {runs} {'equals' if same else 'DIFFERS FROM'} the undisturbed one", flush=True)
        equal = equal and same
    print(f"| {stage} | {counts.total()} | {dict(counts)} | {runs} | {'bit for bit' if equal else 'NO'} |", flush=True)
    return equal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="kills of a run")
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_all(Path(folder) / "tiny")
        results = [campaign(Path(folder), stage, arguments.kills, arguments.seed) for stage in arguments.stages]
    raise SystemExit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
