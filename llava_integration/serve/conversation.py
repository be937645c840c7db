"""LLaVA's conversation templates as Jinja chat templates, which servers and transformers read."""

import json
from dataclasses import dataclass

from llm2clip_plugin.options.names import nearest

DEFAULT = "vicuna_v1"  # of LLaVA 1.5, in LLaVA's evaluation scripts
IMAGE = "<image>"

VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
HUMAN = VICUNA.replace("user", "human")
VISUAL = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """The text around the messages: a system sentence, then for each role what precedes and follows a message."""

    system: str = ""
    around_system: tuple[str, str] = ("", "")
    user: tuple[str, str]
    assistant: tuple[str, str]
    first_user: str | None = None  # precedes the first message in place of user[0]
    generation: str = ""  # ends a prompt
    image: str = f"{IMAGE}\n"  # an image, before the text of its message

    def served_template(self, *, bos: bool, space: bool) -> str:
        """``chat_template`` with ``<s>`` first, for a tokenizer that adds it (``bos``).

        vLLM adds no special tokens to what a template renders, and transformers no second ``<s>``. ``space``: the
        tokenizer puts a space before the first word of a text, but not after ``<s>``; it is written as the tokenizer's
        own character, since some strip spaces.
        """
        if not bos:
            return self.chat_template()
        first = self.user[0] if self.first_user is None else self.first_user
        begins = self.around_system[0] + self.system + first  # "": with the image
        return "{{- bos_token -}}\n" + ("{{- '▁' -}}\n" if space and begins else "") + self.chat_template()

    def chat_template(self) -> str:
        """The Jinja template, for ``content`` as a string or as a list of parts (images first, as in LLaVA)."""
        before, after = map(_quoted, self.around_system)
        first = _quoted(self.user[0] if self.first_user is None else self.first_user)
        user, user_end = map(_quoted, self.user)
        assistant, assistant_end = map(_quoted, self.assistant)
        lines = [
            "{%- if messages[0]['role'] == 'system' -%}",
            "{%- set system = messages[0]['content'] -%}",
            "{%- if system is not string -%}{%- set system = system[0]['text'] -%}{%- endif -%}",
            "{%- set turns = messages[1:] -%}",
            "{%- else -%}",
            f"{{%- set system = {_quoted(self.system)} -%}}",
            "{%- set turns = messages -%}",
            "{%- endif -%}",
            f"{{{{- {before} + system + {after} -}}}}",
            "{%- for message in turns -%}",
            "{%- if message['role'] == 'user' -%}",
            f"{{{{- {first} if loop.first else {user} -}}}}",
            "{%- else -%}",
            f"{{{{- {assistant} -}}}}",
            "{%- endif -%}",
            "{%- if message['content'] is string -%}",
            "{{- message['content'] -}}",
            "{%- else -%}",
            "{%- for part in message['content'] -%}",
            f"{{%- if part['type'] != 'text' -%}}{{{{- {_quoted(self.image)} -}}}}{{%- endif -%}}",
            "{%- endfor -%}",
            "{%- for part in message['content'] -%}",
            "{%- if part['type'] == 'text' -%}{{- part['text'] -}}{%- endif -%}",
            "{%- endfor -%}",
            "{%- endif -%}",
            f"{{{{- {user_end} if message['role'] == 'user' else {assistant_end} -}}}}",
            "{%- endfor -%}",
            f"{{%- if add_generation_prompt -%}}{{{{- {_quoted(self.generation)} -}}}}{{%- endif -%}}",
        ]
        return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """A Jinja string literal."""
    return json.dumps(text, ensure_ascii=False)


def _two(system: str) -> Conversation:
    """Vicuna v1's style."""
    return Conversation(
        system=system,
        around_system=("", " "),
        user=("USER: ", " "),
        assistant=("ASSISTANT: ", "</s>"),
        generation="ASSISTANT:",
    )


def _llama_2(system: str) -> Conversation:
    """Llama 2's style. The tokenizer adds the first <s>."""
    return Conversation(
        system=system,
        around_system=("[INST] <<SYS>>\n", "\n<</SYS>>\n\n"),
        user=("<s>[INST] ", " [/INST]"),
        assistant=(" ", " </s>"),
        first_user="",
    )


def _chatml(system: str) -> Conversation:
    return Conversation(
        system=system,
        around_system=("<|im_start|>system\n", "<|im_end|>"),
        user=("<|im_start|>user\n", "<|im_end|>"),
        assistant=("<|im_start|>assistant\n", "<|im_end|>"),
        generation="<|im_start|>assistant\n",
    )


CONVERSATIONS: dict[str, Conversation] = {
    **dict.fromkeys(("v1", "vicuna_v1"), _two(VICUNA)),
    "llava_v1": _two(HUMAN),
    "llava_v0": Conversation(
        system=HUMAN,
        around_system=("", "###"),
        user=("Human: ", "###"),
        assistant=("Assistant: ", "###"),
        generation="Assistant:",
    ),
    "llava_llama_2": _llama_2(VISUAL),
    "mistral_instruct": Conversation(user=("[INST] ", " [/INST]"), assistant=(" ", " </s>")),
    **dict.fromkeys(("chatml_direct", "mistral_direct"), _chatml("Answer the questions.")),
    # pretraining: the image, then its caption
    **dict.fromkeys(("plain", "v0_plain"), Conversation(user=("", ""), assistant=("", "\n"), image=IMAGE)),
}


def conversation_named(name: str) -> Conversation:
    """LLaVA's conversation of that name; ValueError lists the known ones."""
    if name not in CONVERSATIONS:
        raise ValueError(
            f"unknown conversation {name!r}{nearest(name, list(CONVERSATIONS))}; known: {', '.join(CONVERSATIONS)}"
        )
    return CONVERSATIONS[name]


def choose(given: str, recorded: str, *, where: object) -> str:
    """The conversation's name: ``given`` (--conv-mode), or that which the checkpoint was trained with.

    Raises ValueError if the two are different conversations: the prompts would be in a format that the model never saw.
    """
    name = given or recorded or DEFAULT
    chosen = conversation_named(name)
    if recorded in CONVERSATIONS and chosen != CONVERSATIONS[recorded]:
        raise ValueError(
            f"{where} was trained with the conversation {recorded!r}, but --conv-mode is {given!r}; leave it out"
        )
    return name
