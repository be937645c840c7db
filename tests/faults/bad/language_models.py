"""LLMs, tokenizers and adapters."""

import json

from bad.planted import (
    Case,
    copy,
    cut,
    directory,
    edit,
    marked,
    pipe,
    raw,
    remove,
    shards_without_index,
    shrink,
    text,
)

EMBED = "embed {w}/data --llm {t}/llm --cache {t}/new"
LLM = copy("llm", "llm")
CODE = text("llm/modeling_evil.py", "open('executed', 'w')\n")
AUTO_MAP = {
    "AutoConfig": "modeling_evil.Config",
    "AutoModel": "modeling_evil.Model",
    "AutoModelForCausalLM": "modeling_evil.Model",
}


def adapter(**fields):
    content = {
        "peft_type": "LORA",
        "base_model_name_or_path": "elsewhere",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj"],
        "task_type": "CAUSAL_LM",
    }
    return text("adapter/adapter_config.json", json.dumps(content | fields))


ADAPTED = "embed {w}/data --llm {w}/llm --adapter {t}/adapter --cache {t}/new"

CASES = [
    *(
        Case(
            f"{file} with a byte-order mark",
            EMBED,
            f"{{t}}/llm/{file} starts with a byte-order mark...",
            (LLM, marked(f"llm/{file}")),
        )
        for file in ("config.json", "tokenizer.json", "tokenizer_config.json")
    ),
    Case(
        "configuration with a byte-order mark, in a run",
        "run {w}/data --llm {t}/llm --tower {w}/tower --output {t}/new",
        "{t}/llm/config.json starts with a byte-order mark...",
        (LLM, marked("llm/config.json")),
    ),
    Case(
        "weights in shards without an index",
        EMBED,
        "{t}/llm has weights in shards...no model.safetensors.index.json...",
        (LLM, shards_without_index("llm")),
    ),
    *(
        Case(
            f"{fault}, in a run",
            "run {w}/data --llm {t}/llm --tower {w}/tower --output {t}/new",
            says,
            (LLM, plant),
        )
        for fault, plant, says in (
            (
                "LLM in shards without an index",
                shards_without_index("llm"),
                "{t}/llm has weights in shards...no model.safetensors.index.json...",
            ),
            (
                "LLM that was cut short",
                cut("llm/model.safetensors"),
                "{t}/llm/model.safetensors is not a complete safetensors file...",
            ),
            (
                "LLM without weights",
                remove("llm/model.safetensors"),
                "{t}/llm has no weights...",
            ),
            (
                "LLM without a tokenizer",
                remove("llm/tokenizer.json"),
                "the tokenizer in {t}/llm cannot be used...",
            ),
        )
    ),
    Case(
        "code of a folder, unknown type",
        EMBED,
        "...modeling_evil.py...--trust-remote-code...",
        (LLM, CODE, edit("llm/config.json", model_type="evil", auto_map=AUTO_MAP)),
    ),
    Case(
        "code of a folder, known type",
        EMBED + " --max-tokens 1",
        "...max...tokens...",
        (LLM, CODE, edit("llm/config.json", auto_map=AUTO_MAP)),
    ),
    Case(
        "code of a tokenizer",
        EMBED,
        "...trust-remote-code...",
        (
            LLM,
            CODE,
            edit(
                "llm/tokenizer_config.json",
                tokenizer_class="Evil",
                auto_map={"AutoTokenizer": ["modeling_evil.Tokenizer", None]},
            ),
        ),
    ),
    Case(
        "code of a tokenizer, in data check",
        "data check {w}/data --tokenizer {t}/llm",
        "...trust-remote-code...",
        (
            LLM,
            CODE,
            edit(
                "llm/tokenizer_config.json",
                tokenizer_class="Evil",
                auto_map={"AutoTokenizer": ["modeling_evil.Tokenizer", None]},
            ),
        ),
    ),
    Case(
        "code of a folder, in vlm build",
        "vlm build --tower {w}/tower --llm {t}/llm --output {t}/new",
        "{t}/llm needs modeling_evil.py (auto_map in config.json), which is not run; ...",
        (LLM, CODE, edit("llm/config.json", model_type="evil", auto_map=AUTO_MAP)),
    ),
    Case(
        "vocabulary smaller than the tokenizer's",
        EMBED,
        "...vocab...100...",
        (LLM, edit("llm/config.json", vocab_size=100), shrink("llm", 100)),
    ),
    Case(
        "weights as a pickle",
        EMBED,
        "...safetensors...",
        (
            LLM,
            remove("llm/*.safetensors"),
            raw("llm/pytorch_model.bin", b"\x80\x04cposix\nsystem\nq\x00."),
        ),
    ),
    Case("no weights", EMBED, "...{t}/llm...", (LLM, remove("llm/*.safetensors"))),
    Case(
        "weights that are cut",
        EMBED,
        "...{t}/llm/model.safetensors...",
        (LLM, cut("llm/model.safetensors")),
    ),
    Case(
        "weights that are a pipe",
        EMBED,
        "...{t}/llm...",
        (LLM, remove("llm/*.safetensors"), pipe("llm/model.safetensors")),
    ),
    Case(
        "weights of another width",
        EMBED,
        "...{t}/llm...",
        (LLM, edit("llm/config.json", hidden_size=64)),
    ),
    Case(
        "more blocks than weights",
        EMBED,
        "...{t}/llm...",
        (LLM, edit("llm/config.json", num_hidden_layers=9)),
    ),
    Case(
        "index that names a missing file",
        EMBED,
        "...{t}/llm...",
        (
            LLM,
            remove("llm/*.safetensors"),
            text(
                "llm/model.safetensors.index.json",
                '{"weight_map": {"a": "model-1.safetensors"}}',
            ),
        ),
    ),
    Case(
        "config that is no JSON",
        EMBED,
        "{t}/llm/config.json...",
        (LLM, text("llm/config.json", "{nonsense")),
    ),
    Case(
        "config that is a list",
        EMBED,
        "{t}/llm/config.json...",
        (LLM, text("llm/config.json", "[1]")),
    ),
    Case(
        "config without a type",
        EMBED,
        "{t}/llm/config.json...model_type...",
        (LLM, edit("llm/config.json", model_type=None)),
    ),
    Case(
        "config of heads that do not divide",
        EMBED,
        "...{t}/llm...",
        (LLM, edit("llm/config.json", num_attention_heads=5)),
    ),
    Case(
        "an encoder as LLM",
        EMBED,
        "{t}/llm is not a complete BertModel...",
        (LLM, edit("llm/config.json", model_type="bert", architectures=["BertModel"])),
    ),
    Case(
        "a translator as LLM",
        EMBED,
        "{t}/llm is not a complete T5Model...",
        (LLM, edit("llm/config.json", model_type="t5", architectures=["T5Model"])),
    ),
    Case(
        "tokenizer that is no JSON",
        EMBED,
        "...{t}/llm...",
        (LLM, text("llm/tokenizer.json", "{nonsense")),
    ),
    Case(
        "tokenizer that is cut",
        EMBED,
        "...{t}/llm...",
        (LLM, cut("llm/tokenizer.json")),
    ),
    Case(
        "LLM that is a file",
        "embed {w}/data --llm {w}/notes.json --cache {t}/new",
        "...{w}/notes.json...",
        (),
    ),
    Case("LLM that is an empty folder", EMBED, "...{t}/llm...", (directory("llm"),)),
    Case(
        "Hub id of three parts",
        "embed {w}/data --llm a/b/c --cache {t}/new",
        "...a/b/c...",
        (),
    ),
    Case(
        "Hub id that is not cached, offline",
        "embed {w}/data --llm nobody/nothing --cache {t}/new",
        "...nobody/nothing...",
        (),
    ),
    Case(
        "adapter of another width",
        ADAPTED,
        "...{t}/adapter...",
        (
            adapter(),
            copy("llm", "x"),
            raw("adapter/adapter_model.safetensors", b"\x08\0\0\0\0\0\0\0{}      "),
        ),
    ),
    Case("adapter without weights", ADAPTED, "...{t}/adapter...", (adapter(),)),
    Case(
        "adapter of an unknown kind",
        ADAPTED,
        "...{t}/adapter...",
        (
            adapter(peft_type="NONSENSE"),
            raw("adapter/adapter_model.safetensors", b"\x08\0\0\0\0\0\0\0{}      "),
        ),
    ),
    Case(
        "adapter config that is cut",
        ADAPTED,
        "...{t}/adapter...",
        (adapter(), cut("adapter/adapter_config.json")),
    ),
    Case("adapter that is not there", ADAPTED, "no adapter at {t}/adapter; ...", ()),
    Case(
        "pooling that is not known",
        EMBED + " --pooling max",
        "...'max'...mean...last...",
        (LLM,),
    ),
    Case(
        "attention that is not known",
        EMBED + " --attention sideways",
        "...'sideways'...",
        (LLM,),
    ),
    Case(
        "template without a caption",
        EMBED + " --chat-template hello",
        "...{caption}...",
        (LLM,),
    ),
    Case(
        "template that is broken",
        EMBED + " --chat-template user",
        "...",
        (
            LLM,
            edit("llm/tokenizer_config.json", chat_template="{% for %}"),
            remove("llm/chat_template.jinja"),
        ),
    ),
    Case("layer below all", EMBED + " --layer -99", "...-99...", (LLM,)),
    Case("no tokens", EMBED + " --max-tokens 0", "...max...tokens...0...", (LLM,)),
    Case(
        "dtype that is not known",
        EMBED + " --compute-dtype float7",
        "...float7...",
        (LLM,),
    ),
    Case(
        "preset that is not known",
        EMBED + " --preset llm3vec",
        "unknown ...llm3vec...known: ...",
        (LLM,),
    ),
    Case(
        "post-processing that is not there",
        EMBED + " --post-file {t}/no.safetensors",
        "...{t}/no.safetensors...",
        (LLM,),
    ),
    Case(
        "post-processing of another width",
        EMBED + " --post-file {w}/llm/model.safetensors",
        "...{w}/llm/model.safetensors...",
        (LLM,),
    ),
    Case(
        "tokens of a batch below 0",
        EMBED + " --tokens-per-batch -5",
        "...tokens-per-batch...-5...",
        (LLM,),
    ),
    Case(
        "cache in a folder of pictures",
        "embed {w}/data --llm {w}/llm --cache {w}/pictures",
        "...{w}/pictures...",
        (),
    ),
    Case(
        "captions: a kind that is not there",
        "evaluate captions {w}/data --llm {w}/llm --retrieve short:nothing",
        "...nothing...",
        (),
    ),
    Case(
        "captions: limit 0",
        "evaluate captions {w}/data --llm {w}/llm --limit 0",
        "...no image has captions of both kinds...",
        (),
    ),
    Case(
        "stage 1 of one image",
        "finetune-llm {t}/one.jsonl --image-folder {w}/pictures --llm {w}/llm --output {t}/new",
        "...",
        (
            text(
                "one.jsonl", '{"image": "0.png", "caption": "a", "long_caption": "b"}\n'
            ),
        ),
    ),
    Case(
        "stage 1: rank 0",
        "finetune-llm {w}/data --llm {w}/llm --output {t}/new --lora-rank 0",
        "...r...0...",
        (),
    ),
    Case(
        "stage 1: modules that are not there",
        (
            "finetune-llm {w}/data --llm {w}/llm --output {t}/new --global-batch 8 "
            "--lora-targets nothing"
        ),
        "...nothing...",
        (),
    ),
    Case(
        "stage 1: pairs that are not there",
        (
            "finetune-llm {w}/data --llm {w}/llm --global-batch 8 --output {t}/new "
            "--pair-kinds short:nothing"
        ),
        "...nothing...",
        (),
    ),
    Case(
        "merge without an adapter that fits",
        "export-llm --llm {w}/llm --adapter {t}/adapter --output {t}/new",
        "...{t}/adapter...",
        (adapter(),),
    ),
]
