"""How retrieval is measured, of images and of captions; read without torch."""

from dataclasses import dataclass

KS = (1, 5, 10)


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig:
    """How retrieval is measured."""

    kinds: tuple[str, ...] = ()  # only captions of these kinds; empty: all
    languages: tuple[str, ...] = ()  # only captions of these languages; empty: all
    group: str = ""  # JSON field of the samples: images with the same value share their captions; "": no groups
    cluster: str = ""  # JSON field of the samples: resampled together in the bootstrap; "": the group, or the image
    ks: tuple[int, ...] = KS  # k of recall@k: a hit is a correct item in the top k
    parts: bool = True  # also measure each kind and language separately
    control: bool = False  # also measure with captions shuffled among the images, which must give chance
    limit: int = 0  # use the first images, at most this many; 0: all
    batch: int = 64  # images in one call of the tower
    workers: int = 0  # processes that decode images

    def __post_init__(self) -> None:
        if not self.ks or min(self.ks) < 1:
            raise ValueError(f"ks {' '.join(map(str, self.ks)) or 'is empty'}: recall@k needs numbers above 0")


@dataclass(frozen=True, kw_only=True)
class CaptionSetConfig:
    """Which captions retrieve which."""

    captions: str = ""  # captioned images; only the captions are read
    retrieve: tuple[str, ...] = ("short:long",)  # FIRST:SECOND, kinds of captions: the first retrieves the second
    home: str = "en"  # language of these captions, and the target of cross-lingual retrieval
    across: bool = True  # also retrieve from every other language into the home language
    across_kind: str = "short"  # kind of caption for cross-lingual retrieval
    limit: int = 5000  # use the first images, at most this many

    def __post_init__(self) -> None:
        for text in self.retrieve:
            if text.count(":") != 1 or not all(text.split(":")):
                raise ValueError(f"--retrieve expects FIRST:SECOND, such as short:long; got {text!r}")


PROMPT_EOL = 'This sentence: "{caption}" means in one word: "'  # Jiang et al. 2024, arXiv 2307.16645


@dataclass(frozen=True, kw_only=True)
class ReadingConfig:
    """What `evaluate captions --search` tries, besides both attentions, both poolings and every hidden state."""

    fit_on: str = ""  # training captions, which centering and components are fitted on
    fit_captions: int = 2000  # distinct ones of them that are used, at most
    folder: str = ""  # folder to write: every reading tried, and the post-processing of the best
    templates: tuple[str, ...] = ("", PROMPT_EOL)  # chat templates; empty: none
    components: tuple[int, ...] = (0, 1, 2, 3, 5, 10)  # largest principal components that are removed; 0: centering

    def __post_init__(self) -> None:
        if not self.components or min(self.components) < 0 or self.fit_captions < 2:
            raise ValueError(
                f"components are {self.components} and fit_captions {self.fit_captions}; expected one or more numbers "
                "from 0, and at least 2 captions"
            )
