"""ms-swift and LLaMA-Factory on a model of ``vlm build``, with the prompts of its own chat
template.

    python -m llava_integration.serve.trainers swift sft --model vlm/qwen3 ...
    python -m llava_integration.serve.trainers llamafactory train qwen3.yaml

Both have prompts of their own, chosen by name, and none for a new model: trained with another's, it
would be asked in one format and answer in another. Here the parts of the model's template become
theirs; see docs/vlm.md.
"""

# Both are in environments of their own, not where types are checked.
# pyright: reportMissingImports=false

import sys
from dataclasses import dataclass
from typing import Any

IMAGE = "<image>"
NAME = "vlm"  # of the template in ms-swift
TEXTS = ("Question 1", "Answer 1", "Question 2", "Answer 2")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What a chat template writes around questions and answers."""

    prefix: str  # before the first turn: <s>, a default system prompt
    before: str  # a question
    after: str  # a question, up to where the model answers
    end: str  # of an answer

    @classmethod
    def of(cls, tokenizer: Any) -> "Prompt":
        """Raises ValueError for a template whose turns differ in more than their text, or that
        writes no end of an answer (GLM-4's), which a model would not learn."""
        question, answer, other_question, other_answer = TEXTS
        turns = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
            {"role": "user", "content": other_question},
            {"role": "assistant", "content": other_answer},
        ]

        def render(count: int) -> str:
            return tokenizer.apply_chat_template(
                turns[:count], tokenize=False, add_generation_prompt=count % 2 == 1
            )

        start, _, after = render(1).partition(question)
        _, _, tail = render(4).rpartition(other_answer)
        rendered = render(3)
        _, _, behind_answer = rendered.partition(answer)
        between, _, _ = behind_answer.partition(other_question)
        before = between.removeprefix(tail)
        # Phi 3 ends a conversation otherwise than a turn: what both questions have before them
        if before == between:
            before = start
            while not between.endswith(before):
                before = before[1:]
        end = between.removesuffix(before)
        prefix = start.removesuffix(before)
        prompt = cls(prefix=prefix, before=before, after=after, end=end)
        joined = prompt.join(question, answer, other_question)
        if joined != rendered:
            raise ValueError(
                f"the chat template's turns are not alike: it writes {rendered!r}, "
                f"from the first turn follows {joined!r}; "
                "build the model with another (--chat-template FILE)"
            )
        if not end.strip():
            raise ValueError(
                "the chat template writes nothing that ends an answer, so the model would not "
                "learn to stop; build it with another (--chat-template FILE), or train it by "
                "transformers' Trainer with LlavaRows"
            )
        return prompt

    def join(self, *texts: str) -> str:
        """A conversation, up to where the model answers."""
        conversation = self.prefix
        for number, text in enumerate(texts):
            if number % 2:
                conversation += text + self.end
            else:
                conversation += self.before + text + self.after
        return conversation


def image_first(text: str) -> str:
    """A question with one image as the chat template writes it: LLaVA's data has the image at
    either end."""
    if text.count(IMAGE) != 1:
        return text
    return f"{IMAGE}\n{text.replace(IMAGE, '').strip()}"


def register_with_swift() -> None:
    """Give ms-swift the template ``vlm``, which takes its parts from the model's tokenizer."""
    from swift.template import TemplateMeta, register_template
    from swift.template.templates.llava import LlavaHfTemplate

    class VlmTemplate(LlavaHfTemplate):
        def init_processor(self, processor: Any) -> None:
            if processor is not None and not self._processor_inited:
                prompt = Prompt.of(processor.tokenizer)
                meta = self.template_meta
                meta.prefix = [prompt.prefix]
                meta.prompt = [f"{prompt.before}{{{{QUERY}}}}{prompt.after}"]
                meta.chat_sep = [prompt.end]
                meta.suffix = [prompt.end]
            super().init_processor(processor)

        def replace_tag(self, media_type: str, index: int, inputs: Any) -> list[str]:
            return [IMAGE]  # without ms-swift's line break, which image_first has

        def _swift_prepare_inputs(self, inputs: Any) -> None:
            super()._swift_prepare_inputs(inputs)
            for message in inputs.messages:
                if message["role"] == "user":
                    message["content"] = image_first(message["content"])

    template = TemplateMeta(
        NAME, prefix=[], prompt=["{{QUERY}}"], chat_sep=[], template_cls=VlmTemplate
    )
    register_template(template)


def register_with_llamafactory() -> None:
    """Let LLaMA-Factory, without ``template:`` in its YAML, read the model's own template, with
    images."""
    from llamafactory.data import template
    from llamafactory.data.formatter import EmptyFormatter, StringFormatter
    from llamafactory.data.mm_plugin import LlavaPlugin
    from llamafactory.model import loader

    class VlmPlugin(LlavaPlugin):
        def process_messages(
            self, messages: list[dict[str, str]], *media: Any
        ) -> list[dict[str, str]]:
            with_image_first = []
            for message in messages:
                content = image_first(message["content"])
                with_image_first.append({**message, "content": content})
            return super().process_messages(with_image_first, *media)

    read = template.parse_template

    def parse(tokenizer: Any) -> Any:
        template = read(tokenizer)
        prompt = Prompt.of(tokenizer)
        template.format_prefix = EmptyFormatter(
            slots=[prompt.prefix] if prompt.prefix else []
        )
        template.format_user = StringFormatter(
            slots=[f"{prompt.before}{{{{content}}}}{prompt.after}"]
        )
        template.format_assistant = StringFormatter(slots=["{{content}}" + prompt.end])
        template.default_system = ""
        template.mm_plugin = VlmPlugin(
            image_token=IMAGE, video_token=None, audio_token=None
        )
        return template

    template.parse_template = parse
    # saves files of transformers as the code of a model with own code
    loader.register_autoclass = lambda *_: None


def main(script: str = __file__) -> None:
    """Start the program that is named first; without a name, as one of LLaMA-Factory's ranks.

    script: what starts each of these ranks, a file that calls this function.
    """
    if sys.argv[1:2] == ["swift"]:
        from swift.cli.main import cli_main

        words = sys.argv[1:]
        if "--external_plugins" not in words:
            words.append("--external_plugins")
        # the user's own stay
        words.insert(words.index("--external_plugins") + 1, __file__)
        sys.argv[:] = [*words, "--template", NAME, "--model_type", "llava1_5_hf"]
        return cli_main()
    register_code()
    register_with_llamafactory()
    if sys.argv[1:2] != ["llamafactory"]:
        from llamafactory.train.tuner import run_exp

        return run_exp()
    from llamafactory import launcher

    launcher.__file__ = script  # which torchrun then starts on each rank
    del sys.argv[1]
    return launcher.launch()


def register_code() -> None:
    """Towers whose code is saved with models are opened by this package's."""
    from llava_integration.serve.build import register

    register()


if __name__ == "__main__":
    main()
elif __name__.startswith("_swift_external_"):
    register_code()
    register_with_swift()
