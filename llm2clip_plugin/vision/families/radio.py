"""RADIO (C-RADIO, transformers 5): one class token a teacher, registers, positions for any grid,
pixels in [0, 1]."""

from llm2clip_plugin.vision.families import Family, TowerCode, wrapped

FAMILY = Family(
    name="radio",
    model_types=("radio", "llm2clip_radio"),  # and in an exported LLaVA
    vision_class=wrapped("RadioTower", of="RadioModel", title="RADIO", since="5.24"),
    has_cls=True,
    positions="",  # one table of the largest size, interpolated in the forward pass
    blocks="encoder.layer",
    final_norm="",
    last_state_is_normed=True,  # as far as it ever is
    never_trained=("embeddings.video_patch_projection",),
    mean=(0.0, 0.0, 0.0),  # the model normalizes
    std=(1.0, 1.0, 1.0),
    needs="transformers>=5.24",
    code=TowerCode(
        file="wrapped",
        config="RadioTowerConfig",
        model="RadioTower",
        is_in_transformers=True,
    ),
    # its size in timm; the others are the configuration's defaults
    shapes={"nvidia/C-RADIOv4-H": {"image_size": 512}},
)
