"""Which suites there are, which files each one needs, where these are to be had and where to put them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llm2clip_plugin.evaluate.listing import ListedSource, Row
from llm2clip_plugin.evaluate.suites import readers


@dataclass(frozen=True, kw_only=True)
class Needed:
    """A file or folder of a suite."""

    names: tuple[str, ...]  # below the suite's folder; any one of them will do
    get: str  # where it is to be had


@dataclass(frozen=True, kw_only=True)
class Suite:
    """One benchmark: ``read`` turns its folder into rows."""

    name: str  # also the name of its folder below the root
    title: str
    needs: tuple[Needed, ...]
    read: Callable[[Path], list[Row]]
    images: int  # of the published test set; another number is reported
    rule: str = "recall"  # recall | pairs (SugarCrepe)
    by_language: bool = False  # the headline is the mean over languages

    def missing(self, root: Path) -> list[str]:
        """One line for each file or folder that isn't there: what, where to put it, where it is to be had."""
        folder = root / self.name
        return [
            f"{self.title}: {' or '.join(str(folder / name) for name in need.names)} is missing; get it from {need.get}"
            for need in self.needs
            if not any((folder / name).exists() for name in need.names)
        ]

    def open(self, root: Path) -> ListedSource:
        """The suite as a data set. Raises FileNotFoundError that lists all that is missing."""
        if lines := self.missing(root):
            raise FileNotFoundError("\n".join(lines))
        return ListedSource(self.name, root / self.name, self.read(root / self.name))


KARPATHY = "caption_datasets.zip of https://cs.stanford.edu/people/karpathy/deepimagesent/"
FLICKR_IMAGES = "https://shannon.cs.illinois.edu/DenotationGraph/ (on request)"
COCO_2014 = "http://images.cocodataset.org/zips/val2014.zip"
COCO_2014_TRAIN = "http://images.cocodataset.org/zips/train2014.zip"
COCO_2017 = "http://images.cocodataset.org/zips/val2017.zip"
SUGAR = "https://github.com/RAIVNLab/sugar-crepe (folder data)"


def _suites() -> list[Suite]:
    """All suites, in the order of the paper's table."""
    return [
        Suite(
            name="flickr30k",
            title="Flickr30k (Karpathy test)",
            needs=(
                Needed(names=("dataset_flickr30k.json",), get=KARPATHY),
                Needed(names=("flickr30k-images",), get=FLICKR_IMAGES),
            ),
            read=readers.flickr30k,
            images=1000,
        ),
        Suite(
            name="coco",
            title="COCO (Karpathy test, 5k)",
            needs=(
                Needed(names=("dataset_coco.json",), get=KARPATHY),
                Needed(names=("val2014",), get=COCO_2014),
            ),
            read=readers.coco,
            images=5000,
        ),
        Suite(
            name="sharegpt4v-1k",
            title="ShareGPT4V-1k",
            needs=(
                Needed(names=(readers.SHAREGPT4V,), get="https://huggingface.co/datasets/Lin-Chen/ShareGPT4V"),
                Needed(
                    names=("sam", "data/sam"),
                    get="SA-1B, the images that the ShareGPT4V page lists, as sam/images/sa_*.jpg",
                ),
            ),
            read=readers.sharegpt4v,
            images=1000,
        ),
        Suite(
            name="urban-1k",
            title="Urban-1k",
            needs=(
                Needed(names=("image",), get="https://huggingface.co/datasets/BeichenZhang/Urban1k"),
                Needed(names=("caption",), get="https://huggingface.co/datasets/BeichenZhang/Urban1k"),
            ),
            read=readers.urban,
            images=1000,
        ),
        Suite(
            name="docci",
            title="DOCCI (test)",
            needs=(
                Needed(
                    names=("docci_descriptions.jsonlines",),
                    get="https://storage.googleapis.com/docci/data/docci_descriptions.jsonlines",
                ),
                Needed(names=("images",), get="https://storage.googleapis.com/docci/data/docci_images.tar.gz"),
            ),
            read=readers.docci,
            images=5000,
        ),
        Suite(
            name="flickr30k-cn",
            title="Flickr30k-CN (test)",
            needs=(
                Needed(
                    names=readers.FLICKR_CN,
                    get="https://github.com/li-xirong/cross-lingual-cap, or Flickr30k-CNA of https://zero.so.com",
                ),
                Needed(names=("flickr30k-images", "../flickr30k/flickr30k-images"), get=FLICKR_IMAGES),
            ),
            read=readers.flickr30k_cn,
            images=1000,
        ),
        Suite(
            name="coco-cn",
            title="COCO-CN (test)",
            needs=(
                Needed(names=("coco-cn_test.txt",), get="https://github.com/li-xirong/coco-cn (on request)"),
                Needed(
                    names=("imageid.human-written-caption.txt",),
                    get="https://github.com/li-xirong/coco-cn (on request)",
                ),
                Needed(names=("val2014", "../coco/val2014"), get=COCO_2014),
                Needed(names=("train2014", "../coco/train2014"), get=COCO_2014_TRAIN),
            ),
            read=readers.coco_cn,
            images=1000,
        ),
        Suite(
            name="xm3600",
            title="XM3600 (36 languages)",
            needs=(
                Needed(
                    names=("captions.jsonl",),
                    get="https://google.github.io/crossmodal-3600/web-data/captions.zip",
                ),
                Needed(
                    names=("images",),
                    get="https://open-images-dataset.s3.amazonaws.com/crossmodal-3600/images.tgz",
                ),
            ),
            read=readers.xm3600,
            images=3600,
            by_language=True,
        ),
        Suite(
            name="sugarcrepe",
            title="SugarCrepe",
            needs=(
                *(Needed(names=names, get=SUGAR) for names in readers.SUGARCREPE.values()),
                Needed(names=("val2017", "../coco/val2017"), get=COCO_2017),
            ),
            read=readers.sugarcrepe,
            images=0,
            rule="pairs",
        ),
    ]


SETS = {  # names that stand for several suites
    "paper": ("flickr30k", "coco", "sharegpt4v-1k", "urban-1k", "docci", "flickr30k-cn", "coco-cn", "xm3600"),
    "all": (),
}


def suites() -> dict[str, Suite]:
    """Every suite by its name."""
    return {suite.name: suite for suite in _suites()}


def chosen(names: str) -> list[Suite]:
    """The suites of a comma-separated list of names and sets; ValueError lists the known ones."""
    known = suites()
    picked: dict[str, Suite] = {}
    for name in filter(None, (part.strip() for part in names.split(","))):
        if name not in known and name not in SETS:
            raise ValueError(f"unknown suite {name!r}; known: {', '.join([*SETS, *known])}")
        for one in (SETS[name] or tuple(known)) if name in SETS else (name,):
            picked[one] = known[one]
    return list(picked.values())
