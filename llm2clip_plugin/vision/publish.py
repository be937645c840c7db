"""A tower directory among people: the places that its card names, its README.md, and its upload to the Hub.

A relative path in a card starts with ``./`` or ``../``, so it is never mistaken for a Hub id, and stays right when a
folder with the tower and its teacher is moved.
"""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llm2clip_plugin.contracts import TowerCard
from llm2clip_plugin.files import check_hub_answers
from llm2clip_plugin.vision.directory import check_card
from llm2clip_plugin.vision.families import families

TEACHER_ADAPTER = "teacher-adapter"  # folder in a tower directory: the adapter of its teacher, if it is portable
TEACHER_PLACES = ("llm", "adapter")  # fields of a TeacherIdentity


def is_local(place: str) -> bool:
    """Whether a place is a path of this machine, rather than a Hub id or the name of a model in a library."""
    return place.startswith(("/", "~", "./", "../")) or place in (".", "..") or os.path.exists(place)


def recorded(card: TowerCard, folder: str | os.PathLike[str]) -> TowerCard:
    """The card as it is written into ``folder``: local paths made relative to it, absolute where only / is shared."""
    return _replaced(card, lambda place: _relative(place, Path(folder)) if is_local(place) else place)


def located(card: TowerCard, folder: str | os.PathLike[str]) -> TowerCard:
    """The card that was read from ``folder``, its relative paths made absolute."""
    return _replaced(card, lambda place: _absolute(place, Path(folder)))


def published(card: TowerCard) -> TowerCard:
    """The card without local paths: only the name of a folder is left of the weights', nothing of an adapter's that is
    not in the directory."""

    def is_private(place: str) -> bool:
        return is_local(place) and place != f"./{TEACHER_ADAPTER}"

    named = _replaced(card, lambda place: Path(place).expanduser().absolute().name if is_private(place) else place)
    if is_private(str(card.teacher.get("adapter", ""))):
        del named.teacher["adapter"]  # a copy of the card's
    return named


def _replaced(card: TowerCard, change: Callable[[str], str]) -> TowerCard:
    """The card with ``change`` applied to each place in it; "" stays."""

    def changed(place: Any) -> Any:
        return change(place) if isinstance(place, str) and place else place

    teacher = {name: changed(value) if name in TEACHER_PLACES else value for name, value in card.teacher.items()}
    return dataclasses.replace(card, origin=changed(card.origin), teacher=teacher)


def _relative(place: str, folder: Path) -> str:
    path, folder = Path(place).expanduser().absolute(), folder.expanduser().absolute()
    if os.path.commonpath([path, folder]) == path.anchor:
        return str(path)
    relative = os.path.relpath(path, folder)
    return relative if relative.startswith("..") else f"./{relative}"


def _absolute(place: str, folder: Path) -> str:
    """``place``, from the folder if it is relative to it."""
    if not place.startswith(("./", "../")):
        return place
    return os.path.normpath(folder.expanduser().absolute() / place)


BEFORE = "before"  # of a card's training: scores before step 1
LICENSE = (
    "## License",
    "",
    "Not stated. The tower inherits terms from the weights that it started from, from its teacher LLM and from its "
    "training data. Complete this section and `license` above before you publish it.",
    "",
)
PAGE = """\
---
library_name: transformers
pipeline_tag: image-feature-extraction
license: other
tags:
- llm2clip
- vision
- {family}
---

# LLM2CLIP tower ({family})

{facts}
{training}{metrics}{license}
## Use

{limits}In LLaVA 1.5, with `llm2clip-plugin` installed in the same environment:

```sh
--vision_tower llm2clip:PATH_OR_HUB_ID --mm_vision_select_layer -2
```

In Python:

```python
from llm2clip_plugin import load_dual_encoder, load_tower

tower = load_tower("PATH_OR_HUB_ID")
{dual}```
"""
DUAL = """\
dual = load_dual_encoder("PATH_OR_HUB_ID")
image_features = dual.encode_image(pixel_values)
"""
TEXT = """\
# teacher=PATH: where the LLM is, if not there
text_features = dual.encode_text(["a bird on a wire"])
"""


def model_card(card: TowerCard) -> str:
    """Markdown with the Hub's front matter: what the tower is, how it was made, its metrics, how to use it."""
    tokens = f"{card.num_patches} patches" + (" + 1 class token" if card.has_cls else ", no class token")
    rows = [
        ("started from", f"`{card.origin}`"),
        ("image size", f"{card.image_size} px, patches of {card.patch_size} px: {tokens}"),
        ("blocks x width", f"{card.num_layers} x {card.hidden_size}"),
    ]
    if "resized_from" in card.training:
        rows.append(("positions interpolated from", f"{card.training['resized_from']} px"))
    if card.projection_dim:
        rows.append(("projection_dim", str(card.projection_dim)))
    if needs := families()[card.family].needs:
        rows.append(("additional requirement", f"`pip install '{needs}'`"))
    if card.teacher:
        name, width = card.teacher.get("llm", ""), card.teacher.get("width", "?")
        rows.append(("teacher LLM", f"`{name}`, embeddings of width {width}"))
    rows.append(("SHA-256 of the weights", f"`{card.weights_sha256}`"))
    training = [(name, str(value)) for name, value in sorted(card.training.items()) if name != BEFORE]
    texts = f"# {texts}\n" if (texts := needs_for_texts(card)) else ""
    dual = DUAL + (texts + TEXT if card.teacher else "")
    return PAGE.format(
        family=card.family,
        facts=_table(("", ""), rows),
        training=f"## Training\n\n{_table(('', ''), training)}\n" if training else "",
        metrics=_metrics(card),
        license="\n".join(LICENSE),
        limits=f"This tower {reason}.\n\n" if (reason := beyond_llava(card)) else "",
        dual=dual if card.projection_dim else "",
    )


def _metrics(card: TowerCard) -> str:
    """The scores, next to those before training if these were measured."""
    before, metrics = card.training.get(BEFORE, {}), sorted(card.metrics.items())
    if not before or not metrics:
        rows = [(name, f"{value:.4f}") for name, value in metrics]
        return f"## Metrics\n\n{_table(('metric', 'value'), rows)}\n" if rows else ""
    text = "On held-out data. Before: the start tower, frozen, with fitted projection and text adapter."
    rows = [(name, f"{before[name]:.4f}" if name in before else "", f"{value:.4f}") for name, value in metrics]
    return f"## Metrics\n\n{text}\n\n{_table(('metric', 'before', 'after'), rows)}\n"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:], ""])


def summary(place: str | os.PathLike[str], card: TowerCard) -> str:
    """A written tower directory in one line; others if LLaVA's pinned environment cannot run it, and about texts."""
    lines = [f"{card.family} tower, {card.image_size} px, verified by reloading (sha256 {card.weights_sha256})"]
    return "\n".join(f"{place}: {line}" for line in [*lines, beyond_llava(card), needs_for_texts(card)] if line)


def beyond_llava(card: TowerCard) -> str:
    """Why LLaVA 1.5 cannot run a tower in its pinned environment; "" if it can."""
    needs = families()[card.family].needs
    pinned = "cannot run in LLaVA 1.5's pinned environment (transformers 4.37.2, timm 0.6.13)"
    return f"needs {needs}: {pinned}; LLaVA runs it in the training environment" if needs else ""


def needs_for_texts(card: TowerCard) -> str:
    """What encode_text needs in addition to the directory; "" for a tower without a teacher that has an adapter."""
    if not card.teacher.get("adapter_sha256"):
        return ""
    llm, adapter = card.teacher.get("llm", ""), card.teacher.get("adapter", "")
    if adapter == f"./{TEACHER_ADAPTER}":
        return f"texts need the LLM {llm}; the adapter is in {TEACHER_ADAPTER}/"
    where = f"the adapter {adapter}" if adapter else "its adapter"
    return f"texts need the LLM {llm} and {where}; `llm2clip export --with-adapter` puts the adapter into the directory"


def push_to_hub(directory: str | os.PathLike[str], repository: str, *, private: bool = True) -> str:
    """Upload a tower directory to the Hub as ``owner/name``; returns the URL of the commit.

    The uploaded card and README name no local path: of the weights' and the LLM's only the folder's name is left, of
    the adapter's nothing. The directory itself does not change.

    Raises ContractError if the weights don't match the card, OSError if the Hub rejects the upload.
    """
    directory = Path(directory)
    card = check_card(directory)
    message = f"LLM2CLIP {card.family} tower, {card.image_size} px, sha256 {card.weights_sha256[:12]}"
    public = published(card)
    replaced = {TowerCard.FILE: public.to_json().encode(), "README.md": model_card(public).encode()}
    return upload(directory, repository, message, private=private, replaced=replaced if public != card else None)


def upload(
    directory: Path, repository: str, message: str, *, private: bool = True, replaced: dict[str, bytes] | None = None
) -> str:
    """Upload a folder to the Hub as ``owner/name`` in one commit; returns its URL.

    ``replaced``: contents that are uploaded in place of files. Raises OSError, whatever the upload fails with: the
    folder is complete and can be uploaded later.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, constants

    replaced = replaced or {}
    try:
        check_hub_answers(repository)
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        files = [CommitOperationAdd(name, replaced.get(name, directory / name)) for name in sorted(_files(directory))]
        return str(api.create_commit(repository, files, commit_message=message).commit_url)
    except Exception as error:  # an LFS error is a ValueError or RuntimeError, others by the client's version
        said = ": ".join(str(each) for each in (error, error.__cause__) if each is not None)  # the cause has the status
        reason = " ".join(said.split()) or type(error).__name__
        raise OSError(
            f"cannot push {directory} to {repository} on {constants.ENDPOINT}: {reason}; the directory is complete: "
            f"check the network, HF_ENDPOINT and `hf auth whoami`, then run `hf upload {repository} {directory}`"
        ) from error


def check_repository(repository: str | None) -> None:
    """Raise ValueError for what cannot be a repository's name; for commands that upload at their end."""
    from huggingface_hub.utils import validate_repo_id

    if repository is None:
        return
    try:
        validate_repo_id(repository)
    except ValueError as error:
        raise ValueError(f"--push {repository!r}: {str(error).splitlines()[0]}") from error
    if "/" not in repository:
        raise ValueError(f"--push {repository!r} names no owner, expected OWNER/NAME")


def _files(directory: Path) -> list[str]:
    """The files of a directory by their paths in it, without hidden ones."""
    paths = [path.relative_to(directory) for path in directory.rglob("*") if path.is_file()]
    return [path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts)]
