"""Whose answers are the blind logs? A log of one side alone is refused, see ``blind.py``: so is one
that may be, as the side or the log names no model, or both sides name the same one."""

from collections.abc import Sequence

from llava_integration.evaluator.compare.sides import Run, Side, model_of
from llm2clip_plugin.errors import ContractError

UNNAMED = ""  # model of a run that names none
WHAT_TO_GIVE = (
    "pass a blind log of each side, or give both sides and a log of a third model the names of "
    "their models (in tables the column model)"
)


def check_models(name: str, base: Side, new: Side, logs: Sequence[Side]) -> list[str]:
    """Notes on what is taken for granted about the models of the blind ``logs``, which all have the
    benchmark. Raises ContractError unless they are of neither side, or, as far as their names tell,
    of both."""
    base_models = models_of(base.runs[name])
    new_models = models_of(new.runs[name])
    blind_models = set().union(*(models_of(log.runs[name]) for log in logs))
    logs = without_copies(name, logs)
    if UNNAMED in base_models | new_models | blind_models:
        return check_unnamed(name, base, new, logs)
    in_both = base_models & new_models & blind_models
    if in_both:
        return check_equal_names(name, sorted(in_both)[0], logs)
    base_has_log = bool(base_models & blind_models)
    new_has_log = bool(new_models & blind_models)
    if base_has_log == new_has_log:
        return []
    with_log, without = (base, new) if base_has_log else (new, base)
    raise ContractError(
        f"there is a blind log of {with_log.name} alone, which would be at a disadvantage on what "
        f"it does not guess; add one of {without.name}, or use one of another model"
    )


def models_of(runs: Sequence[Run]) -> set[str]:
    """The models of runs, without the numbers of seeds and the folders or owners that they lie in,
    which one log may name and another not; UNNAMED for those that name none."""
    return {model_of(run).rstrip("/").rpartition("/")[2].lower() for run in runs}


def without_copies(name: str, logs: Sequence[Side]) -> list[Side]:
    """The logs but for those whose runs have the scores of an earlier one, question by question."""
    distinct: list[Side] = []
    seen = []
    for log in logs:
        scores = [dict(zip(run.ids, run.scores, strict=True)) for run in log.runs[name]]
        if scores not in seen:
            seen.append(scores)
            distinct.append(log)
    return distinct


def check_unnamed(name: str, base: Side, new: Side, logs: Sequence[Side]) -> list[str]:
    """A note that several blind logs are taken for those of both sides; ContractError for one log,
    as nothing tells that it is not that of one side alone."""
    unnamed = []
    for side in (base, new):
        if UNNAMED in models_of(side.runs[name]):
            unnamed.append(side.name)
    named_logs = set()
    unnamed_logs = 0
    for log in logs:
        models = models_of(log.runs[name])
        if UNNAMED in models:
            unnamed_logs += 1
            unnamed.append(f"the blind log {log.path}")
        named_logs |= models - {UNNAMED}
    who = " and ".join(unnamed)
    names = "names no model" if len(unnamed) == 1 else "name no model"
    if len(named_logs) + unnamed_logs < 2:
        raise ContractError(
            f"{who} {names}, so the blind log may be that of one side alone, which would be at a "
            f"disadvantage; {WHAT_TO_GIVE}"
        )
    return [
        f"{who} {names}: the blind logs are taken for those of both sides, or of other models"
    ]


def check_equal_names(name: str, model: str, logs: Sequence[Side]) -> list[str]:
    """A note that the blind logs of ``model``, which both sides are called, are taken for those of
    both; ContractError for one."""
    of_model = [log for log in logs if model in models_of(log.runs[name])]
    if len(of_model) < 2:
        raise ContractError(
            f"both sides and the blind log name the model {model}, so it may be that of one side "
            "alone, which would be at a disadvantage; pass a blind log of each side (--blind LOG "
            "LOG), or one of a third model"
        )
    return [
        f"both sides name the model {model}: its {len(of_model)} blind logs are taken for those of "
        "both sides"
    ]


def check_is_no_side(blind_run: Run, runs: Sequence[Run]) -> None:
    """Raises ContractError if a blind log has the scores of a side's run."""
    if any(blind_run.scores == run.scores for run in runs):
        raise ContractError(
            "a blind log has the scores of a side, question by question; are these answers with "
            "the pictures?"
        )
