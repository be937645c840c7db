"""Names that several commands choose for the same fields."""

READ_NAMES = {  # of data.sources.base.ReadConfig: field -> name
    "images": "image-folder",
    "kinds": "kinds",
    "languages": "languages",
}
SELECTION = (
    "weight",
    "shuffle_window",
    "kinds",
    "languages",
)  # of SourceConfig; hidden where all captions are read
TRAINING_NAMES = {  # of the training stages: field, or section -> name
    "output_dir": "output",
    "optim.name": "optimizer",
    "optim.args": "optimizer-args",
    "train.dataloader_num_workers": "workers",
    "evaluation.batch": "evaluation.batch-size",
    "evaluation": "evaluation.",
}
EVALUATION_NAMES = {  # of the commands that measure: field -> name
    "json": "output",
    "batch": "batch-size",
    "retrieval.batch": "batch-size",
}


def in_section(section: str, names: dict[str, str]) -> dict[str, str]:
    """The names for the fields of a section, as ``Names`` takes them."""
    return {f"{section}.{field}": name for field, name in names.items()}
