"""RADIO (C-RADIO, transformers 5): one class token a teacher, registers, positions for any grid, pixels in [0, 1]."""

import functools

from llm2clip_plugin.vision.family import Family, newer_transformers, remove_tokens


@functools.lru_cache(maxsize=1)
def _vision_class() -> type:
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    class RadioModel(newer_transformers("RadioModel", title="RADIO", since="5.24")):  # the Hub's class name
        """RADIO whose states are its first class token and the patches, as timm has it; no norm after the blocks."""

        def forward(self, pixel_values, output_hidden_states=None, return_dict=None):
            """See RadioModel; the pooled output is the first class token, not all of the summary."""
            if output_hidden_states is None:
                output_hidden_states = self.config.output_hidden_states
            states = super().forward(pixel_values, output_hidden_states=output_hidden_states)
            output = BaseModelOutputWithPooling(
                last_hidden_state=states.last_hidden_state,
                pooler_output=states.last_hidden_state[:, 0],
                hidden_states=states.hidden_states,
            )
            output = remove_tokens(output, 1, self.config.num_summary_tokens)
            return output if return_dict is not False else output.to_tuple()

    return RadioModel


FAMILY = Family(
    name="radio",
    model_types=("radio",),
    vision_class=_vision_class,
    has_cls=True,
    positions="",  # one table of the largest size, interpolated in the forward pass
    blocks="encoder.layer",
    embeddings=("embeddings",),
    final_norm="",
    last_state_is_normed=True,  # as far as it ever is
    never_trained=("embeddings.video_patch_projection",),
    mean=(0.0, 0.0, 0.0),  # the model normalizes
    std=(1.0, 1.0, 1.0),
    needs="transformers>=5.24",
    shapes={"nvidia/C-RADIOv4-H": {"image_size": 512}},  # its size in timm; the others are the configuration's defaults
)
