"""Towers, their processors, and the settings of stage 2."""

import json

from bad.planted import (
    Case,
    copy,
    cut,
    edit,
    marked,
    pictures,
    remove,
    shards_without_index,
    text,
)

TRAIN = (
    "train-tower {w}/data --tower {t}/tower --output {t}/new --heads.steps 0 --max-steps 1 "
    "--global-batch 8"
)
IMPORT = "import {t}/tower --output {t}/new"
OURS = "train-tower {w}/data --tower {w}/tower --output {t}/new --global-batch 8"
TOWER = copy("tower", "tower")
WEIGHTS = "tower/model.safetensors"
PROCESSOR = "tower/preprocessor_config.json"
HALVES = [0.5, 0.5, 0.5]


def processor(**fields):
    """A tower and its processor."""
    content = {
        "image_processor_type": "CLIPImageProcessor",
        "image_mean": HALVES,
        "image_std": HALVES,
        "size": {"shortest_edge": 16},
    }
    return (copy("tower", "tower"), text(PROCESSOR, json.dumps(content | fields)))


def setting(words: str, says: str) -> Case:
    return Case(words, f"{OURS} {words}", says)


CASES = [
    Case(
        "deviation of 0",
        TRAIN,
        "...{t}/tower/preprocessor_config.json...image_std...",
        processor(image_std=[0, 0, 0]),
    ),
    Case(
        "deviation of one channel",
        TRAIN,
        "...{t}/tower/preprocessor_config.json...image_std...",
        processor(image_std=[0.5]),
    ),
    Case(
        "mean of words",
        TRAIN,
        "...{t}/tower/preprocessor_config.json...image_mean...",
        processor(image_mean=["a", "b", "c"]),
    ),
    Case(
        "switch that is a text",
        IMPORT,
        "{t}/tower/preprocessor_config.json: do_normalize is 'false', expected a boolean...",
        processor(do_normalize="false"),
    ),
    Case(
        "switch that is a number",
        IMPORT,
        "{t}/tower/preprocessor_config.json: do_rescale is 0, expected a boolean...",
        processor(do_rescale=0),
    ),
    Case(
        "processor with a byte-order mark",
        IMPORT,
        "{t}/tower/preprocessor_config.json starts with a byte-order mark...",
        (*processor(), marked(PROCESSOR)),
    ),
    Case(
        "configuration with a byte-order mark",
        TRAIN,
        "{t}/tower/config.json starts with a byte-order mark...",
        (TOWER, marked("tower/config.json")),
    ),
    Case(
        "shards without an index, imported",
        IMPORT,
        "{t}/tower has weights in shards (model-00001-of-00002.safetensors), but no "
        "model.safetensors.index.json...",
        (TOWER, shards_without_index("tower")),
    ),
    Case(
        "shards without an index",
        TRAIN,
        "{t}/tower has weights in shards...no model.safetensors.index.json...",
        (TOWER, shards_without_index("tower")),
    ),
    *(
        Case(
            f"{fault}, in a run",
            "run {w}/data --llm {w}/llm --tower {t}/tower --output {t}/new --dry-run",
            says,
            (TOWER, *plants),
        )
        for fault, plants, says in (
            (
                "tower in shards without an index",
                [shards_without_index("tower")],
                "{t}/tower has weights in shards...no model.safetensors.index.json...",
            ),
            (
                "tower whose shard is missing",
                [
                    remove("tower/model.safetensors"),
                    text(f"{WEIGHTS}.index.json", '{"weight_map": {"a": "b.bin"}}'),
                ],
                "{t}/tower/b.bin is missing, which the index of the weights names...",
            ),
            (
                "tower that was cut short",
                [cut(WEIGHTS)],
                "{t}/tower/model.safetensors is not a complete safetensors file...",
            ),
            (
                "tower in a torch archive that was cut short",
                [
                    remove(WEIGHTS),
                    text("tower/pytorch_model.bin", "PK\x03\x04 and no end"),
                ],
                "{t}/tower/pytorch_model.bin is not a complete torch checkpoint...",
            ),
        )
    ),
    Case(
        "processor that is no JSON",
        TRAIN,
        "...{t}/tower/preprocessor_config.json...",
        (TOWER, text(PROCESSOR, "{nonsense")),
    ),
    Case(
        "tower without weights",
        TRAIN,
        "...{t}/tower...",
        (TOWER, remove("tower/*.safetensors")),
    ),
    Case(
        "tower with weights that are cut",
        TRAIN,
        "the tower in {t}/tower cannot be used (...file not fully covered...",
        (TOWER, cut("tower/model.safetensors")),
    ),
    Case(
        "tower of another width",
        TRAIN,
        "...{t}/tower...",
        (TOWER, edit("tower/config.json", hidden_size=64)),
    ),
    Case(
        "tower of another patch",
        TRAIN,
        "...{t}/tower...",
        (TOWER, edit("tower/config.json", patch_size=4)),
    ),
    Case(
        "patches of 0 pixels",
        TRAIN,
        "the tower in {t}/tower cannot be used...",
        (TOWER, edit("tower/config.json", patch_size=0)),
    ),
    Case(
        "images of fewer pixels than a patch",
        TRAIN + " --image-size 4",
        "...image...4...",
        (TOWER,),
    ),
    Case(
        "images of no whole patches",
        TRAIN + " --image-size 17",
        "...17...8...",
        (TOWER,),
    ),
    Case(
        "images of 0 pixels",
        TRAIN + " --image-size -8",
        "...image-size...-8...",
        (TOWER,),
    ),
    Case(
        "images of a million pixels a side",
        TRAIN + " --image-size 1000000",
        "...1000000...",
        (TOWER,),
    ),
    Case(
        "tower of an unknown type",
        TRAIN,
        "{t}/tower/config.json: no tower family has model_type 'vit9'; known: ...",
        (TOWER, edit("tower/config.json", model_type="vit9")),
    ),
    Case(
        "tower that is a file",
        "train-tower {w}/data --tower {w}/notes.json --output {t}/new",
        "...{w}/notes.json...",
        (),
    ),
    Case(
        "code of a tower",
        TRAIN,
        "...",
        (
            TOWER,
            edit(
                "tower/config.json",
                model_type="evil",
                auto_map={"AutoModel": "evil.Model"},
            ),
        ),
    ),
    setting("--num-train-epochs inf", "...num...train...epochs...inf..."),
    setting("--num-train-epochs nan", "...num...train...epochs...nan..."),
    setting("--num-train-epochs -1", "...num...train...epochs...-1..."),
    setting("--max-steps 1e400", "...max...steps...1e400..."),
    setting("--max-steps 1000000000000000000000000000000", "...max...steps..."),
    setting("--workers 100000", "...workers...100000..."),
    setting("--seed 1180591620717411303424", "...seed..."),
    setting("--seed -1", "...seed...-1..."),
    setting("--global-batch 0", "...global...batch...0..."),
    setting("--global-batch -8", "...global...batch...-8..."),
    setting("--micro-batch -1", "...micro...batch...-1..."),
    setting("--lr -1", "...lr...-1..."),
    setting("--lr inf", "...lr...inf..."),
    setting("--weight-decay -1", "...weight...decay...-1..."),
    setting("--warmup-ratio 3", "...warmup...ratio...3..."),
    setting("--warmup-steps -1", "...warmup...steps...-1..."),
    setting("--layer-decay 2", "...layer...decay...2..."),
    setting("--layer-decay 0", "...layer...decay...0..."),
    setting("--ema-decay 2", "...ema...decay...2..."),
    setting("--freeze-first-blocks 99", "...99..."),
    setting("--freeze-first-blocks -1", "...-1..."),
    setting("--precision bf17", "...'bf17'..."),
    setting("--schedule zigzag", "...zigzag..."),
    setting("--optimizer adamx", "...adamx..."),
    setting("--save-steps -1", "...save...steps...-1..."),
    setting("--logging-steps 0", "...logging...steps...0..."),
    setting("--max-grad-norm -1", "...max...grad...norm...-1..."),
    setting("--image-size eight", "...image...size...eight..."),
    setting("--heads.steps -1", "...heads.steps...-1..."),
    setting("--heads.lr nan", "...heads.lr...nan..."),
    setting("--loss.terms infonce=-1", "...infonce...-1..."),
    setting("--loss.terms infonce=nan", "...infonce...nan..."),
    setting("--dual.projection-dim 0", "...projection...dim...0..."),
    setting("--dataloader-prefetch-mb -1", "...prefetch...mb...-1..."),
    setting("--deepspeed {t}/none.json", "...{t}/none.json..."),
    setting("--report-to nothing", "...report...to...nothing..."),
    setting("--resume nothing", "...nothing..."),
    setting("--cache {t}/nowhere", "...{t}/nowhere..."),
    setting("--cache {w}/pictures", "...{w}/pictures..."),
    setting("--validation {t}/nowhere", "no data at {t}/nowhere; ..."),
    setting("--data-weights 1 2", "...data...weight..."),
    setting(
        "--caption-weights short=-1",
        "caption weight 'short=-1' is not KIND=WEIGHT with a number above 0...",
    ),
    setting(
        "--augment.scale 2 3",
        "crop scale is (2.0, 3.0), expected two numbers within 0 .. 1...",
    ),
    setting(
        "--augment.ratio 0 0",
        "crop ratio is (0.0, 0.0), expected two numbers above 0...",
    ),
    setting("--betas 2 0.9", "...betas..."),
    setting("--dual.pool nothing", "unknown ...'nothing'; known: ..."),
    setting("--dual.adapter-blocks -1", "...adapter...blocks...-1..."),
    setting(
        "--data-weights -1", "weight of {w}/data is -1.0, expected a number above 0"
    ),
    Case(
        "kinds that no caption has",
        f"{OURS} --kinds nothing",
        "...no caption of kinds ('nothing',)...",
        leaves=("new/run.json",),
    ),
    setting("--ddp-timeout 0", "...ddp...timeout...0..."),
    Case(
        "DeepSpeed JSON that is none",
        OURS + " --deepspeed {t}/zero.json",
        "{t}/zero.json...",
        (text("zero.json", "{nonsense"),),
    ),
    Case(
        "DeepSpeed JSON of stage 7",
        OURS + " --deepspeed {t}/zero.json",
        "{t}/zero.json...7...",
        (text("zero.json", '{"zero_optimization": {"stage": 7}}'),),
    ),
    Case(
        "DeepSpeed JSON that contradicts",
        OURS + " --deepspeed {t}/zero.json",
        "{t}/zero.json conflicts with the run:",
        (text("zero.json", '{"train_batch_size": 7}'),),
    ),
    Case(
        "recipe as configuration",
        "train-tower --config {t}/c.json",
        "...{t}/c.json...",
        (text("c.json", '{"optim": {"lr": "fast"}}'),),
    ),
    Case(
        "import of a text",
        "import {t}/w.pt --output {t}/new",
        "...{t}/w.pt...",
        (text("w.pt", "hello"),),
    ),
    Case(
        "import of nothing known",
        "import {w}/pictures --output {t}/new",
        "...{w}/pictures...",
        (),
    ),
    Case("export of data", "export {w}/data --output {t}/new", "...{w}/data...", ()),
    Case(
        "evaluate without heads", "evaluate {w}/tower {w}/data", "...{w}/tower...", ()
    ),
    Case(
        "evaluate with another LLM",
        "evaluate {w}/run/tower {w}/data --llm {w}/llm",
        "...",
        (),
    ),
    Case(
        "zeroshot without classes",
        "evaluate zeroshot {w}/run/tower {w}/pictures --llm {w}/llm",
        "...",
        (),
    ),
    Case(
        "zeroshot with a file of classes that is not there",
        "evaluate zeroshot {w}/run/tower {t} --llm {w}/llm --classes {t}/none.txt",
        "...{t}/none.txt...",
        (pictures("cats"), pictures("dogs")),
    ),
    Case(
        "probe of one image a class",
        "evaluate probe {w}/tower {w}/pictures {w}/pictures --k 0",
        "...k...0...",
        (),
    ),
    Case(
        "forecast of nothing",
        "forecast {w}/nowhere --data {w}/data --llm {w}/llm",
        "...{w}/nowhere...",
        (),
    ),
    Case(
        "forecast with limit 0",
        "forecast {w}/tower --data {w}/data --llm {w}/llm --limit 0",
        "a forecast needs at least 20 images..., got 0",
        (),
    ),
    Case(
        "search into a folder",
        "search {w}/run/tower {w}/data bird --llm {w}/llm --output {t}",
        "...{t}...",
        (),
    ),
    Case(
        "search for a word that is not UTF-8",
        "search {w}/run/tower {w}/data n\\xe9 --llm {w}/llm --output {t}/p.html",
        "...UTF-8...",
        (),
    ),
    Case(
        "search for -1 images",
        "search {w}/run/tower {w}/data bird --llm {w}/llm --top-k -1 --output {t}/p.html",
        "...top-k...-1...",
        (),
    ),
    Case(
        "search with another LLM than the teacher",
        "search {w}/run/tower {w}/data bird --llm {w}/llm --output {t}/p.html",
        "...teacher...",
        (),
    ),
]
