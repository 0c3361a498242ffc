"""The chat format as a Jinja template, for tokenizers that other programs read.

Nothing here renders with it: a template parses special tokens out of what users wrote. For texts
without them it gives the same ids as `render` (a test compares them).
"""

from nemotron_train.data.chat.render import (
    CALL,
    CALL_END,
    END,
    RESPONSE,
    RESPONSE_END,
    START,
    THINK,
    THINK_END,
    TOOLS_HEADER,
)

# Built from lines for reading; Jinja gets them without line breaks, so every line break of the
# format is written as '\n' inside an expression.
CHAT_TEMPLATE = "".join(
    (
        "{%- set first = messages[0] if messages else {} -%}",
        "{%- set has_system = first.role == 'system' -%}",
        "{%- if tools -%}",
        f"{{{{- '{START}system\\n' -}}}}",
        "{%- if has_system -%}{{- first.content + '\\n\\n' -}}{%- endif -%}",
        f"{{{{- '{TOOLS_HEADER}' -}}}}",
        "{%- for tool in tools -%}{{- '\\n' + (tool | tojson) -}}{%- endfor -%}",
        f"{{{{- '{END}\\n' -}}}}",
        "{%- endif -%}",
        "{%- for message in messages -%}",
        "{%- if message.role == 'assistant' -%}",
        "{%- set thinking = message.reasoning_content or message.thinking or '' -%}",
        f"{{{{- '{START}assistant\\n{THINK}' -}}}}",
        "{%- if thinking -%}{{- '\\n' + thinking + '\\n' -}}{%- endif -%}",
        f"{{{{- '{THINK_END}' -}}}}",
        "{%- if message.content -%}{{- '\\n' + message.content -}}{%- endif -%}",
        "{%- for entry in message.tool_calls or [] -%}",
        "{%- if entry is string -%}",
        f"{{{{- '{CALL}' + entry + '{CALL_END}' -}}}}",
        "{%- else -%}",
        "{%- set call = entry.function or entry -%}",
        f"{{{{- '{CALL}{{\"name\": ' + (call.name | tojson) + ', \"arguments\": ' -}}}}",
        f"{{{{- (call.arguments | tojson) + '}}{CALL_END}' -}}}}",
        "{%- endif -%}",
        "{%- endfor -%}",
        f"{{{{- '{END}\\n' -}}}}",
        "{%- elif message.role == 'tool' -%}",
        f"{{{{- '{START}user\\n{RESPONSE}' + message.content + '{RESPONSE_END}{END}\\n' -}}}}",
        "{%- elif not (tools and loop.first and has_system) -%}",
        f"{{{{- '{START}' + message.role + '\\n' + message.content + '{END}\\n' -}}}}",
        "{%- endif -%}",
        "{%- endfor -%}",
        "{%- if add_generation_prompt -%}",
        f"{{{{- '{START}assistant\\n{THINK}' -}}}}",
        f"{{%- if enable_thinking is defined and not enable_thinking -%}}{{{{- '{THINK_END}' -}}}}",
        "{%- endif -%}{%- endif -%}",
    )
)
