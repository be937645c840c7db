"""The README.md of an exported model."""

from typing import Any

from llm2clip_plugin.contracts import TowerCard
from llm2clip_plugin.vision.model_card import LICENSE

USE = """\
## Use

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained("PATH_OR_HUB_ID"OPTION)
model = AutoModelForImageTextToText.from_pretrained("PATH_OR_HUB_ID"OPTION)
content = [{"type": "image", "url": "photo.jpg"}, {"type": "text", "text": "What is in this picture?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
print(processor.decode(model.generate(**inputs, max_new_tokens=64)[0], skip_special_tokens=True))
```
"""
SERVED = "\nServed with an OpenAI-compatible API: `vllm serve PATH_OR_HUB_ID`"
STOCK = ("clip_vision_model", "siglip_vision_model")  # towers that vLLM has
PLUGIN = " (`pip install llm2clip-plugin` gives vLLM the vision tower)"
OPTION = ", trust_remote_code=True"  # runs the tower's code, which is saved with the model


def model_card(made: dict[str, Any], tower: TowerCard | None, *, model_type: str, own_code: bool) -> str:
    """Markdown with the Hub's front matter.

    ``made``: the provenance that config.json records; ``model_type``: of the tower; ``own_code``: the tower's code is
    saved with the model.
    """
    rows = {
        "made from": f"the LLaVA 1.5 checkpoint `{made['checkpoint']}` ({made['kind']})",
        "base model": f"`{made['base_model']}`" if made["base_model"] else "",
        "conversation": f"`{made['conversation']}`",
        "images": "padded to squares" if made["image_aspect_ratio"] == "pad" else "resized, center-cropped",
        "dtype": made["dtype"],
    }
    if tower:
        rows["vision tower"] = f"{tower.family}, {tower.image_size} px, started from `{tower.origin}`"
        rows["SHA-256 of the tower"] = f"`{tower.weights_sha256}`"
        rows["tower's teacher LLM"] = f"`{tower.teacher['llm']}`" if tower.teacher.get("llm") else ""
    table = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items() if value), ""]
    head = ["---", "library_name: transformers", "pipeline_tag: image-text-to-text", "license: other"]
    head += ["tags:", "- llava", "- llm2clip", "---", "", f"# {made['checkpoint']}", ""]
    kind = "LLaVA 1.5 with an LLM2CLIP vision tower" if tower else "LLaVA 1.5"
    use = USE.replace("OPTION", OPTION if own_code else "")
    use += f"{SERVED}{'' if model_type in STOCK else PLUGIN}\n"
    return "\n".join([*head, f"{kind}, exported by llm2clip-plugin.", "", *table, *LICENSE, use])
