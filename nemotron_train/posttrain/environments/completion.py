"""Between the text of a completion and a message: tags are read strictly. No torch.

A completion is `thinking</think>content`, then any number of `<tool_call>call</tool_call>`. The
opening <think> may stand in the prompt or in the completion. Any other tag, or one twice, is a
fault: a policy that is paid for one of several answers learns to give several.
"""

import re

from nemotron_train.posttrain.environments.protocol import Message

THINK, END_THINK = "<think>", "</think>"
TOOL_CALL, END_TOOL_CALL = "<tool_call>", "</tool_call>"
TOOL_RESPONSE, END_TOOL_RESPONSE = "<tool_response>", "</tool_response>"
IM_START, IM_END = "<|im_start|>", "<|im_end|>"
TAGS = (THINK, END_THINK, TOOL_CALL, END_TOOL_CALL)
TAGS += (TOOL_RESPONSE, END_TOOL_RESPONSE, IM_START, IM_END)

_CALL = re.compile(f"{re.escape(TOOL_CALL)}(.*?){re.escape(END_TOOL_CALL)}", re.DOTALL)


def parse_completion(text: str, thinking: bool = True) -> Message:
    """The assistant's message that a sampled text says.

    text: the decoded completion without its stop token, special tokens as their text. thinking:
    whether the policy was asked to think; if not, the prompt closed the thinking, and a tag of it
    in the completion is a fault.
    """
    thought = None
    if thinking:
        text = text.removeprefix(THINK)
        thought, closed, text = text.rpartition(END_THINK)
        if not closed:
            return _fault("the thinking was not closed")
        if _tag_in(thought):
            return _fault(f"{_tag_in(thought)} inside the thinking")
    content, opened, rest = text.partition(TOOL_CALL)
    calls = _CALL.findall(opened + rest)
    if _CALL.sub("", opened + rest).strip():
        return _fault("text after a tool call, or a call that is not closed")
    for part in (content, *calls):
        if _tag_in(part):
            return _fault(f"{_tag_in(part)} in the answer")
    return Message("assistant", content.strip(), thought, tuple(call.strip() for call in calls))


def completion_text(message: Message) -> str:
    """The text of an assistant's message after the prompt's <think>; `parse_completion` reads it
    back."""
    calls = "".join(f"{TOOL_CALL}{call}{END_TOOL_CALL}" for call in message.tool_calls)
    thought = "" if message.thinking is None else message.thinking + END_THINK
    return thought + message.content + calls


def _tag_in(text: str) -> str:
    return next((tag for tag in TAGS if tag in text), "")


def _fault(reason: str) -> Message:
    return Message("assistant", "", fault=reason)
