"""Write a tower directory, and verify it: reload what was written and compare weights and features;
upload it.

| file                           | contents                                                      |
|--------------------------------|---------------------------------------------------------------|
| config.json, model.safetensors | a Hugging Face vision model, the Hub's tensor names           |
| preprocessor_config.json       | CLIPImageProcessor's, crop and shortest edge = the image size |
| text_adapter.safetensors       | text adapter, projection, logit scale (if it has heads)       |
| llm2clip.json                  | the TowerCard                                                 |
| llm2clip_post.safetensors      | the teacher's post-processing (if it has one)                 |
| teacher-adapter/               | adapter and text settings of the teacher (--with-adapter)     |
| README.md                      | model card                                                    |
"""

import dataclasses
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import llm2clip_plugin
from llm2clip_plugin.contracts import POST_FILE, EncoderCard, TowerCard
from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.folders import MODEL_FOLDER, output_folder
from llm2clip_plugin.hashes import sha256_weights
from llm2clip_plugin.hub import check_hub_answers
from llm2clip_plugin.pretrained import AUTO_MAP
from llm2clip_plugin.quiet import quiet_transformers
from llm2clip_plugin.report_text import markdown_table
from llm2clip_plugin.vision.directory import (
    ADAPTER_FILE,
    PREPROCESSOR_FILE,
    TEACHER_ADAPTER,
    WEIGHTS_FILE,
    check_card,
    fetch_directory,
    is_local,
    located,
    published,
    read_json,
    recorded,
    write_json,
)
from llm2clip_plugin.vision.dual import DualEncoder, heads_state, load_dual
from llm2clip_plugin.vision.families import Tower, families, family_of
from llm2clip_plugin.vision.lora import merged
from llm2clip_plugin.vision.parts import eval_mode, tower_in
from llm2clip_plugin.vision.resize import resize_tower, resized_from
from llm2clip_plugin.vision.towers import load_tower, preprocessor_config

# The same code with the same weights: only nondeterministic kernels can differ.
RELATIVE_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def export_tower(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    origin: str,
    teacher: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    metrics: dict[str, float] | None = None,
    adapter: Path | None = None,
    replace: bool = False,
) -> TowerCard:
    """Write ``model`` (a DualEncoder or a tower) to ``directory``, completely or not at all;
    returns its card.

    ``origin``: path or Hub id that the tower started from. ``teacher``: TeacherIdentity as a dict.
    Local paths in them are recorded relative to ``directory``. ``training``: steps, samples, data
    ... ``adapter``: folder of the teacher's adapter, which is copied into the directory, as the
    post-processing is that ``teacher`` names. LoRA layers are merged into a copy; the model itself
    does not change. Raises FileExistsError (directory not empty), ContractError (the reloaded
    directory differs from the model).
    """
    model = merged(model)
    tower = tower_in(model)
    family = family_of(tower)
    config = tower.config
    with output_folder(directory, MODEL_FOLDER, replace=replace) as temporary:
        save_tower(tower, temporary)
        write_json(temporary / PREPROCESSOR_FILE, preprocessor_config(tower))
        teacher = dict(teacher or {})
        final = Path(directory).expanduser().absolute()
        if adapter is not None:
            copy_adapter(adapter, temporary / TEACHER_ADAPTER)
            teacher["adapter"] = str(final / TEACHER_ADAPTER)
        if copy_post(teacher, temporary / POST_FILE):
            teacher["post_file"] = str(final / POST_FILE)
        heads: dict[str, Any] = {}
        if isinstance(model, DualEncoder):
            heads = save_heads(model, temporary)
        training = dict(training or {})
        if resized_from(tower):
            training["resized_from"] = resized_from(tower)
        card = TowerCard(
            family=family.name,
            has_cls=family.has_cls,
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            patch_size=config.patch_size,
            image_size=config.image_size,
            **heads,
            origin=origin,
            weights_sha256=sha256_weights(temporary / WEIGHTS_FILE),
            teacher=teacher,
            training=training,
            metrics=metrics or {},
            versions=library_versions(),
        )
        card = recorded(card, directory)
        card.write(temporary / TowerCard.FILE)
        page = model_card(published(card))
        (temporary / "README.md").write_text(page, encoding="utf-8")
        with eval_mode(model):
            verify_directory(model, temporary)
    return card


def copy_adapter(source: Path, target: Path) -> None:
    """Copy a PEFT adapter with its encoder card; the LLM's local path in them is reduced to its
    name."""
    target.mkdir()
    for name in ("adapter_model.safetensors", POST_FILE):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    config = read_json(source / "adapter_config.json")
    base = str(config.get("base_model_name_or_path") or "")
    # peft would look for a name on the Hub
    config["base_model_name_or_path"] = None if is_local(base) else base
    write_json(target / "adapter_config.json", config)
    if (source / EncoderCard.FILE).is_file():
        card = EncoderCard.read(source / EncoderCard.FILE)
        named = Path(card.base).name if is_local(card.base) else card.base
        dataclasses.replace(card, base=named).write(target / EncoderCard.FILE)


def copy_post(teacher: dict[str, Any], target: Path) -> bool:
    """Copy the post-processing of a teacher's embeddings, if it has one; whether it was copied.
    Without the file that the teacher was read with, texts need ``--post-file``."""
    source = Path(teacher.get("post_file") or "")
    if not source.is_file():
        return False
    shutil.copyfile(source, target)
    if sha256_weights(target) == teacher["post"]:
        return True
    target.unlink()
    return False


def library_versions() -> dict[str, str]:
    """Versions of the libraries that write a tower directory."""
    import transformers

    libraries = {
        library.__name__: library.__version__ for library in (torch, transformers)
    }
    return {"llm2clip-plugin": llm2clip_plugin.__version__, **libraries}


def save_tower(tower: Tower, directory: Path) -> None:
    """config.json and one model.safetensors, with the Hub's tensor names in every version of
    transformers. Code that the source's config.json names is not passed on: whoever opens the
    folder with ``trust_remote_code`` would run it."""
    from safetensors.torch import load_file, save_file

    tower.config._name_or_path = ""  # transformers 4 would write a path of this machine
    vars(tower.config).pop(AUTO_MAP, None)
    with quiet_transformers():
        # one file, one hash
        tower.save_pretrained(
            directory, safe_serialization=True, max_shard_size="1000GB"
        )
    # transformers 5 restores `vision_model.` only in a model made by from_pretrained, not in a
    # resized one
    prefix = family_of(tower).file_prefix
    state = load_file(directory / WEIGHTS_FILE)
    if any(not name.startswith(prefix) for name in state):
        renamed = {prefix + name: value for name, value in state.items()}
        save_file(renamed, directory / WEIGHTS_FILE, {"format": "pt"})


def save_tensors(state: dict[str, Tensor], path: Path) -> None:
    """Copies of tensors, which may share memory, as safetensors."""
    from safetensors.torch import save_file

    copies: dict[str, Tensor] = {}
    for name, value in state.items():
        copies[name] = value.detach().cpu().contiguous().clone()
    save_file(copies, path, metadata={"format": "pt"})


def save_heads(dual: DualEncoder, directory: Path) -> dict[str, Any]:
    """text_adapter.safetensors; returns the card's fields about it."""
    save_tensors(heads_state(dual), directory / ADAPTER_FILE)
    settings: dict[str, Any] = {}
    for name, value in dataclasses.asdict(dual.config).items():
        if value is not None:
            settings[name] = value
    return {
        "projection_dim": dual.config.projection_dim,
        "adapter_sha256": sha256_weights(directory / ADAPTER_FILE),
        "dual": settings,
    }


def load_model(directory: Path, *, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The dual encoder of a tower directory, or the tower if it contains nothing else."""
    has_heads = TowerCard.read(directory / TowerCard.FILE).projection_dim
    if not has_heads:
        return load_tower(directory, dtype=dtype)
    dual, _ = load_dual(directory, dtype=dtype)
    return dual


def reexport(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    image_size: int | None = None,
    adapter: Path | None = None,
    replace: bool = False,
) -> TowerCard:
    """Write a tower directory again with this release: same weights, same card except for the
    versions. ``adapter``: None copies the one in the directory. ``image_size``, in pixels,
    interpolates positions, and the metrics go."""
    directory = fetch_directory(source)
    card = located(TowerCard.read(directory / TowerCard.FILE), directory)
    model = load_model(directory)
    if adapter is None and (inside := directory / TEACHER_ADAPTER).is_dir():
        adapter = inside
    metrics = card.metrics
    if image_size is not None and image_size != card.image_size:
        metrics = {}
        resized = resize_tower(tower_in(model), image_size)
        if isinstance(model, DualEncoder):
            model.tower = resized
        else:
            model = resized
    about: dict[str, Any] = {
        "origin": card.origin,
        "teacher": card.teacher,
        "training": card.training,
    }
    return export_tower(
        model, output, **about, metrics=metrics, adapter=adapter, replace=replace
    )


def probe_images(tower: Tower, *, count: int = 2) -> Tensor:
    """Random images from a fixed seed, (count, 3, S, S) in the tower's dtype and on its device."""
    size = tower.config.image_size
    pixels = torch.randn(
        count, 3, size, size, generator=torch.Generator().manual_seed(0)
    )
    return pixels.to(device=tower.device, dtype=tower.dtype)


def probe_features(model: nn.Module) -> dict[str, Tensor]:
    """Everything that a tower or dual encoder computes for two random images and three random LLM
    embeddings."""
    tower = tower_in(model)
    pixels = probe_images(tower)
    with torch.no_grad():
        output = tower(pixel_values=pixels, output_hidden_states=True)
        features = {
            f"hidden_states[{i}]": state for i, state in enumerate(output.hidden_states)
        }
        features["last_hidden_state"] = output.last_hidden_state
        if output.pooler_output is not None:
            features["pooler_output"] = output.pooler_output
        if isinstance(model, DualEncoder):
            features["encode_image"] = model.encode_image(pixels)
            if model.text_adapter is not None:
                embeddings = torch.randn(
                    3,
                    model.config.llm_width,
                    generator=torch.Generator().manual_seed(0),
                )
                features["encode_text"] = model.encode_text(embeddings.to(tower.device))
    return features


def compare_features(
    expected: dict[str, Tensor], actual: dict[str, Tensor], *, where: str
) -> None:
    """Raise ContractError for a difference, relative to the tensor's largest value, that exceeds
    the tolerance."""
    if set(expected) != set(actual):
        raise ContractError(
            f"{where} computes {sorted(actual)}, expected {sorted(expected)}"
        )
    for name, value in expected.items():
        tolerance = RELATIVE_TOLERANCE[value.dtype]
        scale = max(value.float().abs().max().item(), 1e-6)
        largest = (value.float() - actual[name].float()).abs().max().item()
        difference = largest / scale
        if not difference <= tolerance:  # NaN fails too
            raise ContractError(
                f"{where}: {name} differs by {difference:.2e} of its largest value, above "
                f"{tolerance}"
            )


def verify_directory(model: nn.Module, directory: Path) -> None:
    """Reload a tower directory; raise ContractError unless every weight (bit by bit) and feature is
    ``model``'s."""
    tower = tower_in(model)
    reloaded = load_model(directory, dtype=tower.dtype).to(tower.device).eval()
    before = model.state_dict()
    after = reloaded.state_dict()
    unequal = after.keys() - before.keys()
    for name, value in before.items():
        if name not in after or not torch.equal(value, after[name]):
            unequal.add(name)
    if unequal:
        raise ContractError(
            f"{directory}: tensors differ after reloading: {sorted(unequal)}"
        )
    compare_features(
        probe_features(model), probe_features(reloaded), where=str(directory)
    )


# The README.md of a tower directory, and its upload to the Hub.

BEFORE = "before"  # of a card's training: scores before step 1
LICENSE = """\
## License

Not stated. The tower inherits terms from the weights that it started from, from its teacher LLM \
and from its training data. Complete this section and `license` above before you publish it.
"""
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
DUAL = (
    'dual = load_dual_encoder("PATH_OR_HUB_ID")  '
    "# teacher=PATH: where the LLM is, if not there\n"
    "image_features, text_features = dual.encode_image(pixel_values), "
    'dual.encode_text(["a bird on a wire"])\n'
)


def model_card(card: TowerCard) -> str:
    """Markdown with the Hub's front matter: what the tower is, how it was made, its metrics, how to
    use it."""
    class_tokens = " + 1 class token" if card.has_cls else ", no class token"
    tokens = f"{card.num_patches} patches{class_tokens}"
    teacher = card.teacher
    width = teacher.get("width", "?")
    facts = {
        "started from": f"`{card.origin}`",
        "image size": f"{card.image_size} px, patches of {card.patch_size} px: {tokens}",
        "blocks x width": f"{card.num_layers} x {card.hidden_size}",
        "projection_dim": str(card.projection_dim or ""),
        "teacher LLM": f"`{teacher.get('llm', '')}`, embeddings of width {width}",
        "SHA-256 of the weights": f"`{card.weights_sha256}`",
    }
    if not teacher:
        del facts["teacher LLM"]
    fact_rows = [(name, text) for name, text in facts.items() if text]
    limits = ""
    if reason := beyond_llava(card):
        limits = f"This tower {reason}.\n\n"
    dual = ""
    if card.projection_dim:
        dual = DUAL
        if needs := needs_for_texts(card):
            dual = f"# {needs}\n{DUAL}"
    return PAGE.format(
        family=card.family,
        facts=markdown_table(("", ""), fact_rows),
        training=_training_section(card),
        metrics=_metrics_section(card),
        license=LICENSE,
        limits=limits,
        dual=dual,
    )


def _training_section(card: TowerCard) -> str:
    rows: list[tuple[str, ...]] = []
    for name, value in sorted(card.training.items()):
        if name != BEFORE:
            rows.append((name, str(value)))
    if not rows:
        return ""
    return f"## Training\n\n{markdown_table(('', ''), rows)}\n"


def _metrics_section(card: TowerCard) -> str:
    """Each metric, and what it was before training."""
    before = card.training.get(BEFORE, {})
    rows: list[tuple[str, ...]] = []
    for name, value in sorted(card.metrics.items()):
        at_start = f"{before[name]:.4f}" if name in before else ""
        rows.append((name, at_start, f"{value:.4f}"))
    if not rows:
        return ""
    note = ""
    if before:
        note = "Before: the start tower, frozen, with fitted projection and text adapter.\n\n"
    table = markdown_table(("metric", "before", "after"), rows)
    return f"## Metrics\n\n{note}{table}\n"


def summary(directory: str | os.PathLike[str], card: TowerCard) -> str:
    """A written tower directory in one line; others if LLaVA's pinned environment cannot run it,
    and about texts."""
    verified = (
        f"{card.family} tower, {card.image_size} px, verified by reloading (sha256 "
        f"{card.weights_sha256})"
    )
    lines = filter(None, [verified, beyond_llava(card), needs_for_texts(card)])
    return "\n".join(f"{directory}: {line}" for line in lines)


def beyond_llava(card: TowerCard) -> str:
    """Why LLaVA 1.5 cannot run a tower in its pinned environment; "" if it can."""
    needs = families()[card.family].needs
    if not needs:
        return ""
    pinned = "cannot run in LLaVA 1.5's pinned environment (transformers 4.37.2, timm 0.6.13)"
    return f"needs {needs}: {pinned}; LLaVA runs it in the training environment"


def needs_for_texts(card: TowerCard) -> str:
    """What encode_text needs in addition to the directory; "" for a tower without a teacher that
    has an adapter or post-processing elsewhere."""
    llm = card.teacher.get("llm", "")
    post_file = card.teacher.get("post_file", "")
    if post_file not in ("", f"./{POST_FILE}"):
        return (
            f"texts need the LLM {llm} and its post-processing: pass it with --post-file (it is "
            f"missing, or changed, at {post_file})"
        )
    if not card.teacher.get("adapter_sha256"):
        return ""
    adapter = card.teacher.get("adapter", "")
    if adapter == f"./{TEACHER_ADAPTER}":
        return f"texts need the LLM {llm}; the adapter is in {TEACHER_ADAPTER}/"
    where = f"the adapter {adapter}" if adapter else "its adapter"
    return (
        f"texts need the LLM {llm} and {where}; `llm2clip export --with-adapter` puts the adapter "
        "into the directory"
    )


def push_to_hub(
    directory: str | os.PathLike[str], repository: str, *, private: bool = True
) -> str:
    """Upload a tower directory to the Hub as ``owner/name``, its card and README without local
    paths; the commit's URL.

    Raises ContractError if the weights don't match the card, OSError if the Hub rejects the upload.
    """
    directory = Path(directory)
    card = check_card(directory)
    message = (
        f"LLM2CLIP {card.family} tower, {card.image_size} px, "
        f"sha256 {card.weights_sha256[:12]}"
    )
    public = published(card)
    replaced = {
        TowerCard.FILE: public.to_json().encode(),
        "README.md": model_card(public).encode(),
    }
    return upload(
        directory,
        repository,
        message,
        private=private,
        replaced=replaced if public != card else None,
    )


def upload(
    directory: Path,
    repository: str,
    message: str,
    *,
    private: bool = True,
    replaced: dict[str, bytes] | None = None,
) -> str:
    """Upload a folder to the Hub as ``owner/name`` in one commit; returns its URL. ``replaced``:
    contents in place of files. Raises OSError, whatever the upload fails with: the folder is
    complete and can be uploaded later."""
    from huggingface_hub import CommitOperationAdd, HfApi, constants

    paths = sorted(
        path.relative_to(directory) for path in directory.rglob("*") if path.is_file()
    )
    names = [path.as_posix() for path in paths if not _is_hidden(path)]
    try:
        check_hub_answers(repository)
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        files = [
            CommitOperationAdd(name, (replaced or {}).get(name, directory / name))
            for name in names
        ]
        return str(
            api.create_commit(repository, files, commit_message=message).commit_url
        )
    except Exception as error:
        # an LFS error is a ValueError or RuntimeError, others by the client's version
        texts = [str(error)]
        if error.__cause__ is not None:  # it has the status
            texts.append(str(error.__cause__))
        reason = " ".join(": ".join(texts).split()) or type(error).__name__
        problem = (
            f"cannot push {directory} to {repository} on {constants.ENDPOINT}: {reason}"
        )
        # `hf upload` would send local paths
        again = f"llm2clip export {directory} --output NEW --push {repository}"
        advice = (
            f"check the network, HF_ENDPOINT and `hf auth whoami`, then run `{again}`"
        )
        raise OSError(f"{problem}; the directory is complete: {advice}") from error


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def check_repository(repository: str | None) -> None:
    """Raise ValueError for what cannot be a repository's name; for commands that upload at their
    end."""
    if repository is not None and not re.fullmatch(
        r"[\w-][\w.-]*/[\w-][\w.-]*", repository
    ):
        raise ValueError(
            f"--push {repository!r} is no name of a repository, expected OWNER/NAME"
        )
