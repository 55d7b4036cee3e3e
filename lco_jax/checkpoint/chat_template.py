"""The chat template of a checkpoint that we make: ChatML, with markers where media stand."""

import json

from lco_jax.core.errors import LcoError
from lco_jax.data import foreign

_TEMPLATE = """\
{%- for message in messages -%}
SYSTEM{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
MEDIA{%- else -%}{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""
_SYSTEM = """\
{%- if loop.first and message['role'] != 'system' -%}
{{- BEGINNING -}}
{%- endif -%}
"""
_USER = {"role": "user", "content": "some text of a user"}
_SYSTEM_TURN = {"role": "system", "content": "be brief"}
_ANSWER = {"role": "assistant", "content": "an answer"}
_CHATS = (  # what templates differ in
    [_USER],
    [_SYSTEM_TURN, _USER],
    [_USER, _ANSWER],
    [_USER, _ANSWER, _USER],
)


def chat_template(media: dict[str, str], beginning: str = "", first: str = "") -> str:
    """The template of conversations.

    media: the tokens that stand for each kind of media. beginning: what stands before a
    conversation that has no system turn, such as the system turn of a model's maker. first: what
    stands before any conversation.
    """
    branches = [
        f"if part['type'] == '{kind}' -%}}{{{{- '{tokens}' -}}}}\n"
        for kind, tokens in media.items()
    ]
    system = _SYSTEM.replace("BEGINNING", _quoted(beginning)) if beginning else ""
    template = _TEMPLATE.replace("SYSTEM", system).replace(
        "MEDIA", "{%- " + "{%- el".join(branches)
    )
    return f"{{{{- {_quoted(first)} -}}}}\n{template}" if first else template


def _quoted(text: str) -> str:
    """A text as jinja reads it, which is as JSON but for letters that ASCII takes apart."""
    return json.dumps(text, ensure_ascii=False)


def extended(template: str, tokens: dict[str, str], media: dict[str, str], where: str) -> str:
    """A language model's template with markers of media, which says the same of text.

    tokens: bos_token and so on. media: as `chat_template` has it. where: names the model in errors.
    Raises if the template is not ChatML.
    """

    def before(chat: list[dict[str, str]]) -> str:
        """What the template puts before the turns of a chat."""
        turns = _render(chat_template(media), tokens, chat, True, where)
        return _render(template, tokens, chat, True, where).removesuffix(turns)

    first = before([_SYSTEM_TURN, _USER])
    ours = chat_template(media, before([_USER]).removeprefix(first), first)
    for chat in _CHATS:
        for asks in (True, False):
            theirs = _render(template, tokens, chat, asks, where)
            if _render(ours, tokens, chat, asks, where) != theirs:
                raise LcoError(
                    f"{where}: the chat template is not ChatML (<|im_start|>user …), "
                    "and no other one is supported here"
                )
    return ours


def _render(
    template: str, tokens: dict[str, str], chat: list[dict[str, str]], asks: bool, where: str
) -> str:
    """A chat as text. asks: end where the assistant's answer would begin."""
    settings = {**tokens, "add_generation_prompt": asks}
    (rendered,) = foreign.render(template, [chat], settings, f"{where}: the chat template")
    if isinstance(rendered, LcoError):
        raise rendered
    return rendered
