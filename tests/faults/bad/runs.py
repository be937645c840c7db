"""`llm2clip run` before its first stage, status, use, and what LLaVA's commands and comparisons
read."""

import json

from bad.planted import DEEP, Case, copy, cut, directory, raw, shrink, text

RUN = "run {w}/data --llm {w}/llm --tower {w}/tower --output {t}/new --dry-run"
ANSWER = (
    "llava evaluate --endpoint http://127.0.0.1:1/v1 --retries 0 --image-folder {w}/pictures "
    "--question-file {t}/q.jsonl --answers-file {t}/new.jsonl"
)
COMPARE = "compare {t}/a.scores.json {t}/b.scores.json --output {t}/new"


def scores(name: str, items: list, **fields):
    content = {
        "kind": "llm2clip-scores",
        "format_version": 1,
        "benchmark": "pope",
        "metrics": {"f1": 0.5},
        "items": items,
    }
    return text(name, json.dumps(content | fields))


def questions(*rows: str):
    return (text("q.jsonl", "".join(row + "\n" for row in rows)),)


ITEMS = [{"id": 1, "score": 1}, {"id": 2, "score": 0}]

CASES = [
    Case(
        "an LLM as tower",
        "run {w}/data --llm {w}/llm --tower {w}/llm --output {t}/new --dry-run",
        "...{w}/llm...model_type 'llama'...",
        (),
    ),
    Case(
        "a tower as LLM",
        "run {w}/data --llm {w}/tower --tower {w}/tower --output {t}/new --dry-run",
        "...{w}/tower...",
        (),
    ),
    Case(
        "nothing to measure with", RUN + " --validation 0.0001", "...validation...", ()
    ),
    Case("nothing to train on", RUN + " --validation 0.9999", "...validation...", ()),
    Case(
        "split by a field that no sample has",
        RUN + " --by nofield",
        "...nofield...",
        (),
    ),
    Case(
        "output is the data",
        "run {w}/data --llm {w}/llm --tower {w}/tower --output {w}/data --dry-run",
        "...{w}/data...",
        (),
    ),
    Case(
        "data in the output",
        "run {w}/data --llm {w}/llm --tower {w}/tower --output {w} --dry-run",
        "...{w}...",
        (),
    ),
    Case(
        "stage 1 and an adapter",
        RUN + " --stage1 --adapter {t}/adapter",
        "...adapter...",
        (copy("llm", "adapter"),),
    ),
    Case("an adapter that is an LLM", RUN + " --adapter {w}/llm", "...{w}/llm...", ()),
    Case("GPUs below 0", RUN + " --num-gpus -3", "...num...gpus...-3...", ()),
    Case("0 GPUs", RUN + " --num-gpus 0", "...num...gpus...0...", ()),
    Case(
        "options that train-tower lacks",
        RUN + " --tower-options=--nonsense",
        "...--nonsense...",
        (),
    ),
    Case("options with an open quote", RUN + " --tower-options=--cache='x", "...", ()),
    Case(
        "a batch of more pairs than images",
        RUN + " --global-batch 4096",
        "...4096...",
        (),
    ),
    Case(
        "a batch below 0", RUN + " --global-batch -4", "...global...batch...-4...", ()
    ),
    Case(
        "epochs without end",
        RUN + " --num-train-epochs inf",
        "...num...train...epochs...inf...",
        (),
    ),
    Case(
        "questions that are not there",
        RUN + " --questions {t}/none.jsonl --llava-llm {w}/llm",
        "...{t}/none.jsonl...",
        (),
    ),
    Case(
        "questions without answers",
        RUN + " --questions {t}/q.jsonl --llava-llm {w}/llm",
        "...{t}/q.jsonl...",
        questions('{"question_id": 1, "image": "0.png", "text": "What?"}'),
    ),
    Case("status of a file", "status {w}/notes.json", "...{w}/notes.json...", ()),
    Case(
        "status of an empty folder",
        "status {t}/empty",
        "...{t}/empty...",
        (directory("empty"),),
    ),
    Case(
        "status of a run whose record is cut",
        "status {t}/run",
        "...{t}/run/run.json is not valid JSON...",
        (copy("run", "run"), cut("run/run.json")),
        status=0,
    ),
    Case("use of a folder that is not there", "use {t}/none", "...{t}/none...", ()),
    Case(
        "use under a name with blanks", "use {w}/run/tower --name a/b", "...a/b...", ()
    ),
    Case(
        "list of towers that is damaged",
        "towers",
        "...towers.json...",
        (text("home/towers.json", "{nonsense"),),
    ),
    Case(
        "list of towers that is a number",
        "use {w}/run/tower",
        "...towers.json...",
        (text("home/towers.json", '{"towers": 5}'),),
    ),
    Case(
        "question without an id",
        ANSWER,
        "{t}/q.jsonl...1...",
        questions('{"image": "0.png", "text": "What?"}'),
    ),
    Case(
        "question without a text",
        ANSWER,
        "{t}/q.jsonl...1...",
        questions('{"question_id": 1, "image": "0.png"}'),
    ),
    Case("question that is no JSON", ANSWER, "{t}/q.jsonl...", questions("{nonsense")),
    Case("deep question", ANSWER, "{t}/q.jsonl...", questions(DEEP)),
    Case("no questions", ANSWER, "{t}/q.jsonl...", questions()),
    Case(
        "temperature below 0",
        ANSWER + " --temperature -1",
        "...temperature...-1...",
        questions('{"question_id": 1, "image": "0.png", "text": "What?"}'),
    ),
    Case(
        "no new tokens",
        ANSWER + " --max_new_tokens 0",
        "...max...new...tokens...0...",
        questions('{"question_id": 1, "image": "0.png", "text": "What?"}'),
    ),
    Case(
        "chunk 3 of 2",
        ANSWER + " --num-chunks 2 --chunk-idx 3",
        "...chunk...",
        questions('{"question_id": 1, "image": "0.png", "text": "What?"}'),
    ),
    Case(
        "endpoint that is a file",
        (
            "llava evaluate --endpoint file:///etc/passwd --question-file {t}/q.jsonl "
            "--answers-file {t}/new.jsonl"
        ),
        "...file:///etc/passwd...",
        questions('{"question_id": 1, "image": "0.png", "text": "What?"}'),
    ),
    Case(
        "benchmarks without data",
        "bench-mllm {t}/none --model-path {w}/llm --output {t}/new",
        "...{t}/none...",
        (),
    ),
    Case(
        "a folder without benchmarks",
        "bench-mllm {w}/pictures --model-path {w}/llm --output {t}/new",
        "...{w}/pictures...",
        (),
    ),
    Case(
        "export of an LLM as LLaVA",
        "llava export {w}/llm --output {t}/new",
        "...{w}/llm...",
        (),
    ),
    Case("bundle of an LLM", "llava bundle {w}/llm", "...{w}/llm...", ()),
    Case(
        "build with a tower that is not there",
        "vlm build --tower {t}/none --llm {w}/llm --output {t}/new",
        "...{t}/none...",
        (),
    ),
    Case(
        "build of an unknown kind",
        "vlm build --tower {w}/tower --llm {w}/llm --arch flamingo --output {t}/new",
        "...flamingo...",
        (),
    ),
    Case(
        "build with an LLM of fewer words than its tokenizer",
        "vlm build --tower {w}/tower --llm {t}/llm --output {t}/new",
        "...vocab...",
        (copy("llm", "llm"), shrink("llm", 100)),
    ),
    Case(
        "scores of one name twice",
        COMPARE,
        "{t}/a.scores.json...",
        (
            scores("a.scores.json", [{"id": 1, "score": 1}] * 2),
            scores("b.scores.json", ITEMS),
        ),
    ),
    Case(
        "scores that are NaN",
        COMPARE,
        "{t}/a.scores.json...",
        (
            text(
                "a.scores.json",
                '{"kind": "llm2clip-scores", "format_version": 1, "benchmark": "pope", '
                '"metrics": {}, "items": [{"id": 1, "score": NaN}]}',
            ),
            scores("b.scores.json", ITEMS),
        ),
    ),
    Case(
        "scores that are words",
        COMPARE,
        "{t}/a.scores.json...",
        (
            scores("a.scores.json", [{"id": 1, "score": "high"}]),
            scores("b.scores.json", ITEMS),
        ),
    ),
    Case(
        "scores of two benchmarks",
        COMPARE,
        "...",
        (
            scores("a.scores.json", ITEMS),
            scores("b.scores.json", ITEMS, benchmark="gqa"),
        ),
    ),
    Case(
        "scores without an item in common",
        COMPARE,
        "...",
        (
            scores("a.scores.json", ITEMS),
            scores("b.scores.json", [{"id": 9, "score": 1}]),
        ),
    ),
    Case(
        "scores of a future version",
        COMPARE,
        "{t}/a.scores.json...99...",
        (
            scores("a.scores.json", ITEMS, format_version=99),
            scores("b.scores.json", ITEMS),
        ),
    ),
    Case(
        "scores without items",
        COMPARE,
        "{t}/a.scores.json...",
        (scores("a.scores.json", []), scores("b.scores.json", [])),
    ),
    Case(
        "deep scores",
        COMPARE,
        "{t}/a.scores.json...",
        (text("a.scores.json", DEEP), scores("b.scores.json", ITEMS)),
    ),
    Case(
        "scores that are cut",
        COMPARE,
        "{t}/a.scores.json...",
        (
            scores("a.scores.json", ITEMS),
            cut("a.scores.json"),
            scores("b.scores.json", ITEMS),
        ),
    ),
    Case(
        "scores that are binary",
        COMPARE,
        "{t}/a.scores.json...",
        (raw("a.scores.json", bytes(range(256))), scores("b.scores.json", ITEMS)),
    ),
    Case(
        "effect of 0",
        COMPARE + " --plan --effect 0",
        "...--effect 0...above 0...",
        (scores("a.scores.json", ITEMS), scores("b.scores.json", ITEMS)),
    ),
    Case(
        "level of 1",
        COMPARE + " --level 1",
        "...level...1...",
        (scores("a.scores.json", ITEMS), scores("b.scores.json", ITEMS)),
    ),
    Case(
        "three names for two sides",
        COMPARE + " --names a b c",
        "...names...",
        (scores("a.scores.json", ITEMS), scores("b.scores.json", ITEMS)),
    ),
    Case(
        "blind answers that do not exist",
        COMPARE + " --blind {t}/c.scores.json",
        "...no score file, log or folder {t}/c.scores.json",
        (scores("a.scores.json", ITEMS), scores("b.scores.json", ITEMS)),
    ),
    Case(
        "blind answers that were given to the pictures",
        COMPARE + " --blind {t}/c.scores.json",
        "...{t}/c.scores.json has answers with the pictures...bench-mllm --blind",
        (
            scores("a.scores.json", ITEMS),
            scores("b.scores.json", ITEMS),
            scores(
                "c.scores.json", ITEMS, provenance={"answer_settings": {"blind": False}}
            ),
        ),
    ),
    Case(
        "a certain guess",
        COMPARE + " --blind {t}/c.scores.json --blind-chance 1",
        "...--blind-chance 1...[0, 1)",
        (scores("a.scores.json", ITEMS), scores("b.scores.json", ITEMS)),
    ),
    Case(
        "drift of three runs",
        COMPARE.replace(" --output", " {t}/a.scores.json --output") + " --drift",
        "...--drift takes two sides, BASE and NEW; got 3",
        (scores("a.scores.json", ITEMS), scores("b.scores.json", ITEMS)),
    ),
    Case(
        "paired runs without a partner",
        "compare {t}/a.csv {t}/b.csv --paired-runs --output {t}/new",
        "...a has 2 runs and b 1; --paired-runs needs one of each seed on both sides",
        (
            text("a.csv", "item,score,run\n1,1,0\n2,0,0\n1,0,1\n2,1,1\n"),
            text("b.csv", "item,score,run\n1,1,0\n2,0,0\n"),
        ),
    ),
    Case(
        "one side",
        "compare {t}/a.scores.json --output {t}/new",
        "...",
        (scores("a.scores.json", ITEMS),),
    ),
    Case(
        "answers of a question that does not exist",
        "score pope {t} --answers {t}/a.jsonl --output {t}/new",
        "...",
        (text("a.jsonl", '{"question_id": 77, "text": "yes"}\n'),),
    ),
    Case(
        "a table of scores without a score",
        "compare {t}/a.csv {t}/b.csv --output {t}/new",
        "...{t}/a.csv...",
        (text("a.csv", "id,name\n1,x\n"), text("b.csv", "id,name\n1,x\n")),
    ),
    Case(
        "a table of scores with an open quote",
        "compare {t}/a.csv {t}/b.csv --output {t}/new",
        "...{t}/a.csv...",
        (text("a.csv", 'id,score\n"1,1\n2,0\n'), text("b.csv", "id,score\n1,1\n2,0\n")),
    ),
    Case(
        "a word that is not UTF-8",
        "embed {t}/n\\xe9 --llm {w}/llm --cache {t}/new",
        "...",
        (),
    ),
]
