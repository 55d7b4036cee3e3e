"""The chat template of a checkpoint that we make: ChatML, with markers where media stand."""

import json

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


def chat_template(media: dict[str, str], beginning: str = "") -> str:
    """The template of conversations.

    media: the tokens that stand for each kind of media. beginning: what stands before a
    conversation that has no system turn, such as the system turn of a model's maker.
    """
    branches = (
        f"if part['type'] == '{kind}' -%}}{{{{- '{tokens}' -}}}}\n"
        for kind, tokens in media.items()
    )
    system = _SYSTEM.replace("BEGINNING", json.dumps(beginning)) if beginning else ""
    return _TEMPLATE.replace("SYSTEM", system).replace("MEDIA", "{%- " + "{%- el".join(branches))
