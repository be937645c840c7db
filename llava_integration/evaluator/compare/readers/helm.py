"""HELM (crfm-helm): the folder of a run, ``runs/SUITE/RUN/``, with ``per_instance_stats.json`` next
to ``run_spec.json``, ``stats.json`` and ``scenario_state.json``.

The number is the main metric of the scenario's leaderboard, without perturbations.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llava_integration.evaluator.compare.readers import (
    Choices,
    Log,
    Reader,
    all_answers,
    digest_of,
    negated,
    number,
    short_text,
    shown_texts,
)
from llm2clip_plugin.errors import ContractError, errors_about
from llm2clip_plugin.json_files import read_json_value

STATS = "per_instance_stats.json"
TEST = "test"  # name of a split
# of a run's name, which tells the task: "mmlu:subject=anatomy,model=openai_gpt2"
MODEL_IN_NAME = re.compile(r"(^|[:,])(model|model_deployment)=[^,]*")
# main metrics of HELM's leaderboards (its schema_*.yaml), the first that a run has: those that only
# the runs of one scenario have
OF_ONE_SCENARIO = (
    "wildbench_score_rescaled",
    "omni_math_accuracy",
    "ifeval_strict_accuracy",
    "chain_of_thought_correctness",
    "final_number_exact_match",
    "math_equiv_chain_of_thought",
    "math_equiv",
    "exact_match_indicator",
    "air_score",
    "safety_score",
    "bbq_accuracy",
    "execution_accuracy",
    "ruler_string_match_part",
    "openai_mrcr_accuracy",
    "annotation_financebench_label_correct_answer",
    "program_accuracy",
    "float_equiv",
    "f1_set_match",
    "prometheus_vision",
    "earth_mover_similarity",
    "wer_score",
)
# groups of scenarios whose main metric is another one, though their runs have exact_match, too
QUASI_EXACT = (
    "boolq imdb raft civil_comments wikifact babi_qa synthetic_reasoning legalbench legal_support "
    "lsat_qa med_qa entity_data_imputation entity_matching bbq casehold banking77 vqa viz_wiz"
)
QUASI_PREFIX = (
    "a_okvqa mm_star blink gqa hateful_memes mmmu unicorn pope seed_bench mme pairs fair_face "
    "exams_v vqa_base"
)
F1 = "narrative_qa natural_qa quac natural_qa_closedbook natural_qa_openbook_longans msr_vtt"
ROUGE = "summarization_cnndm summarization_xsum billsum_legal_summarization"
MAIN_OF_GROUP = {
    **dict.fromkeys(QUASI_EXACT.split(), "quasi_exact_match"),
    **dict.fromkeys(QUASI_PREFIX.split(), "quasi_prefix_exact_match"),
    **dict.fromkeys(F1.split(), "f1_score"),
    **dict.fromkeys(ROUGE.split(), "rouge_2"),
    "msmarco_trec": "NDCG@10",
    "msmarco_regular": "RR@10",
    "code_apps": "test_avg",
    "code_humaneval": "pass",
    "wmt_14": "bleu_4",
}
OF_MANY_SCENARIOS = (
    "exact_match",
    "quasi_exact_match",
    "accuracy",
    "f1_score",
    "rouge_l",
)
LOWER_IS_BETTER = ("wer_score", "error_rate", "toxic_frac")


def fits(path: Path) -> bool:
    """It is called as HELM calls it, and lies in a run's folder."""
    return path.name == STATS and path.with_name("run_spec.json").is_file()


def read(path: Path, choices: Choices) -> Iterator[Log]:
    """One run. ContractError names the metrics if the chosen one isn't there."""
    spec_path = path.with_name("run_spec.json")
    with errors_about(spec_path, fix="was the run cut off?"):
        spec = read_json_value(spec_path)
        task, model = named_in(spec)
    with errors_about(path, fix="was the run cut off?"):
        instances = read_json_value(path)
        # metric -> the splits that it is of
        metrics: dict[str, set[str]] = {}
        for instance in instances:
            for stat in instance["stats"]:
                if is_plain(stat):
                    name = stat["name"]["name"]
                    metrics.setdefault(name, set()).add(split_of(stat))
    metric = choices.metric or main_metric(spec.get("groups") or [], list(metrics))
    if metric not in metrics:
        problem = f"{path}: {task} has no {metric or 'metric that is known'}"
        raise ContractError(
            f"{problem}; choose with --metric: {', '.join(sorted(metrics))}"
        )
    # HELM's leaderboards show the test split where there is one
    split = TEST if TEST in metrics[metric] else min(metrics[metric])
    texts = texts_of(path.with_name("scenario_state.json"))
    sign = -1 if metric in LOWER_IS_BETTER else 1
    values: dict[str, list[float]] = {}
    for instance in instances:
        name = str(instance["instance_id"])
        for stat in instance["stats"]:
            is_chosen = stat["name"]["name"] == metric and split_of(stat) == split
            if is_plain(stat) and is_chosen:
                value = number(stat.get("mean"), f"{path}, instance {name}: {metric}")
                values.setdefault(name, []).append(sign * value)
    items = []
    for name, trials in values.items():
        item = {"id": name, "cluster": name, "score": sum(trials) / len(trials)}
        items.append({**item, **texts.get(name, {})})
    log = Log(
        benchmark=f"{task} {metric}",
        metrics={},
        items=items,
        model=model,
        printed=printed_mean(path.with_name("stats.json"), metric, split),
    )
    yield log if sign == 1 else negated(log, metric)


def named_in(spec: dict[str, Any]) -> tuple[str, str]:
    """The task, which is the run's name without the model, and the model."""
    task = MODEL_IN_NAME.sub(lambda match: ":" if match[1] == ":" else "", spec["name"])
    task = task.replace(":,", ":").rstrip(":,")
    return task, str(spec["adapter_spec"].get("model", ""))


def is_plain(stat: dict[str, Any]) -> bool:
    """Whether a statistic is of the questions as they are, not perturbed, and of some of them."""
    return not stat["name"].get("perturbation") and bool(stat.get("count"))


def split_of(stat: dict[str, Any]) -> str:
    """The split that a statistic is of: test, valid; "" if it does not say."""
    return str(stat["name"].get("split") or "")


def main_metric(groups: Sequence[str], metrics: Sequence[str]) -> str:
    """The metric that HELM's leaderboards show; "" if none of the ``metrics`` is known."""
    of_groups = [MAIN_OF_GROUP[group] for group in groups if group in MAIN_OF_GROUP]
    for name in (*OF_ONE_SCENARIO, *of_groups, *OF_MANY_SCENARIOS):
        if name in metrics:
            return name
    return ""


def texts_of(path: Path) -> dict[str, dict[str, Any]]:
    """Question, answer, truth and picture of each instance; empty without the file of requests."""
    if not path.is_file():
        return {}
    states_of: dict[str, list[dict[str, Any]]] = {}
    with errors_about(path):
        for state in read_json_value(path)["request_states"]:
            if not state["instance"].get("perturbation"):
                name = str(state["instance"].get("id"))
                states_of.setdefault(name, []).append(state)
        return {name: texts_in(states) for name, states in states_of.items()}


def texts_in(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The texts of an instance, which may have been asked in several trials."""
    instance = states[0]["instance"]
    right = []
    options = []
    for reference in instance.get("references") or []:
        option = reference["output"].get("text", "")
        options.append(option)
        if "correct" in reference.get("tags", ()):
            right.append(option)
    answers = [answer_of(state) for state in states]
    texts = {
        **shown_texts(instance["input"].get("text"), answers[0]),
        **all_answers(answers),
        "truth": right,
    }
    prompts = [(state.get("request") or {}).get("prompt") for state in states]
    if any(prompts):
        texts["prompt_hash"] = digest_of(prompts)
    if len(options) > len(right):  # else these are several right answers
        texts["choices"] = [short_text(option) for option in options]
    if picture := picture_of(instance["input"]):
        texts["cluster"] = picture
    return texts


def answer_of(state: dict[str, Any]) -> str | None:
    """What the model said; of a letter with the option that it stands for. None if it said nothing,
    as where the likelihood of each option was asked."""
    completions = (state.get("result") or {}).get("completions") or [{}]
    text = completions[0].get("text")
    if not isinstance(text, str) or state.get("reference_index") is not None:
        return None
    option = (state.get("output_mapping") or {}).get(text.strip())
    return f"{text.strip()}. {option}" if option else text


def picture_of(content: dict[str, Any]) -> str:
    """The picture, sound or video of a question; "" if there is none."""
    media = (content.get("multimedia_content") or {}).get("media_objects") or []
    for part in media:
        if part.get("location") and "text" not in part.get("content_type", ""):
            return str(part["location"])
    return ""


def printed_mean(path: Path, metric: str, split: str) -> float | None:
    """The number of the run's statistics."""
    if not path.is_file():
        return None
    with errors_about(path):
        for stat in read_json_value(path):
            is_chosen = stat["name"]["name"] == metric and split_of(stat) == split
            if is_chosen and is_plain(stat):
                return float(stat["mean"])
    return None


READER = Reader(
    name="HELM",
    endings=(STATS,),
    fits=fits,
    read=read,
    choices=("metric",),
)
