"""From what a row asks to the prompt that the student reads: the named templates and format strings."""

import difflib
import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kdkit.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]


class UnusableRow(Exception):
    """This row cannot be used; the text is the reason under which it is counted."""


@dataclass(frozen=True)
class Question:
    """What a row asks: an instruction with an optional input, or the messages before the answer."""

    instruction: str = ""
    input: str = ""
    messages: tuple[Message, ...] = ()

    def flat(self) -> "Question":
        """The same as instruction and input; a lone user message may follow a system message.

        Raises:
            UnusableRow: several turns, which only the chat template can write down.
        """
        if not self.messages:
            return self
        roles = [message["role"] for message in self.messages]
        if roles not in (["user"], ["system", "user"]):
            raise UnusableRow("several turns need template 'chat'")
        return Question("\n\n".join(message["content"] for message in self.messages))

    def as_messages(self) -> list[Message]:
        """The same as a conversation whose last turn is the user's."""
        if self.messages:
            return [dict(message) for message in self.messages]
        content = "\n\n".join(part for part in (self.instruction, self.input) if part)
        return [{"role": "user", "content": content}]


Template = Callable[[Question, "PreTrainedTokenizerBase | None"], str]


def prompt_renderer(template: str, tokenizer: "PreTrainedTokenizerBase | None" = None) -> Callable[[Question], str]:
    """The function that writes a question as a prompt.

    Args:
        template: a name in TEMPLATES, or a format string with {instruction} and optionally {input};
            where it has no {input}, a row's input follows its instruction on a new line.
        tokenizer: whose chat template "chat" uses; the others need none.
    Returns:
        Question -> prompt; raises UnusableRow for a question the template cannot write.
    Raises:
        UserError: unknown name, a format string with other fields, or "chat" without a chat template.
    """
    if template == "chat" and (tokenizer is None or tokenizer.chat_template is None):
        who = "no tokenizer was given" if tokenizer is None else _say_no_chat_template(tokenizer)
        raise UserError(
            f"template 'chat' needs a tokenizer with a chat template, but {who}: "
            f"choose {', '.join(name for name in TEMPLATES if name != 'chat')} or a format string"
        )
    write = TEMPLATES[template] if template in TEMPLATES else _format_template(template)
    return lambda question: write(question, tokenizer)


def _say_no_chat_template(tokenizer: "PreTrainedTokenizerBase") -> str:
    return f"that of '{tokenizer.name_or_path}' has none"


def _alpaca(question: Question, tokenizer: "PreTrainedTokenizerBase | None") -> str:
    flat = question.flat()
    context = f"### Input:\n{flat.input}\n\n" if flat.input else ""
    return f"### Instruction:\n{flat.instruction}\n\n{context}### Response:\n"


def _plain(question: Question, tokenizer: "PreTrainedTokenizerBase | None") -> str:
    flat = question.flat()
    context = f"{flat.input}\n" if flat.input else ""
    return f"{flat.instruction}\n{context}Answer:\n"


def _chat(question: Question, tokenizer: "PreTrainedTokenizerBase | None") -> str:
    from jinja2 import TemplateError

    assert tokenizer is not None  # prompt_renderer has checked
    try:
        text = tokenizer.apply_chat_template(question.as_messages(), tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise UnusableRow(f"refused by the chat template ({error})") from error
    return str(text)


def _format_template(template: str) -> Template:
    fields = _fields(template)
    if "instruction" not in fields or not fields <= {"instruction", "input"}:
        near = difflib.get_close_matches(template, TEMPLATES, n=1)
        hint = f" (did you mean '{near[0]}'?)" if near else ""
        raise UserError(
            f"unknown template {template!r}{hint}: expected {', '.join(TEMPLATES)}, or a format "
            "string with {instruction} and optionally {input}; write other braces twice"
        )

    def write(question: Question, tokenizer: "PreTrainedTokenizerBase | None") -> str:
        flat = question.flat()
        if "input" in fields or not flat.input:
            return template.format(instruction=flat.instruction, input=flat.input)
        return template.format(instruction=f"{flat.instruction}\n{flat.input}")

    return write


def _fields(template: str) -> set[str]:
    """What stands between braces, with its conversion and format; empty where the braces do not match."""
    try:
        parts = [part for part in string.Formatter().parse(template) if part[1] is not None]
        return {f"{name}{'!' if conversion else ''}{conversion or ''}{form}" for _, name, form, conversion in parts}
    except ValueError:
        return set()


TEMPLATES: dict[str, Template] = {"alpaca": _alpaca, "plain": _plain, "chat": _chat}
"""Every template by name: a question, and the tokenizer for `chat`, to a prompt."""
