"""Messages as token ids, and which of them an answer is made of."""

from pathlib import Path
from typing import Any

import numpy as np

from remit_megatron.errors import UserError
from remit_megatron.posttrain.data import Messages

IGNORED = -100
PROBE = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]


class ChatTokenizer:
    """A tokenizer and its chat template, checked when it is made.

    Raises UserError for a template that is missing, prints today's date, fails, or does not end an answer with the
    end-of-turn token: a model trained on that would never stop.
    """

    def __init__(self, folder: Path, *, needs_template: bool = True):
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.end: str = self.tokenizer.eos_token
        if needs_template:
            self._check_template()

    def _check_template(self) -> None:
        template = self.tokenizer.chat_template
        if template is None:
            raise UserError("the model has no chat template: give a jinja file as chat.template")
        if isinstance(template, dict):
            raise UserError(f"the model has {len(template)} chat templates: give the one to use as chat.template")
        if "strftime_now" in template:
            raise UserError(
                "the chat template prints today's date (strftime_now), so that tokens would change at midnight: give "
                "one with a fixed date as chat.template"
            )
        probe, prompt = self.text(PROBE), self.text(PROBE[:1], prompt=True)
        if not probe.startswith(prompt):
            raise UserError(
                "the chat template words a prompt in another way once an answer follows: the model would be trained on "
                "what it never sees"
            )
        answer = probe[len(prompt) :]
        if self.end not in answer.partition("two")[2]:
            raise UserError(
                f"the chat template does not end an answer with the end-of-turn token {self.end!r} (it ends with "
                f"{answer.partition('two')[2]!r}): set chat.end_of_turn to the token that it ends with, or mend the "
                "template"
            )

    def text(self, messages: Messages, *, prompt: bool = False) -> str:
        """As the template words them; prompt: up to where an answer begins."""
        from jinja2.exceptions import TemplateError

        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
        except TemplateError as error:
            raise UserError(f"the chat template cannot word these messages: {error}") from None

    def ids(self, text: str, *, special: bool = False) -> list[int]:
        """special: with the tokens that the tokenizer adds to a text of its own, as for a prompt without messages."""
        return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def conversation(self, where: str, messages: Messages) -> tuple[np.ndarray, np.ndarray]:
        """(ids, labels) of a conversation, int32 [T]; labels are IGNORED outside of the assistant's answers.

        An answer reaches from the end of its prompt to the end of its turn, whatever the template writes in between.
        Raises UserError where a template words the beginning of a conversation in another way than the whole.
        """
        whole = self.text(messages)
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, after = self.text(messages[:number], prompt=True), self.text(messages[: number + 1])
            after = after[: after.rindex(self.end) + len(self.end)] if self.end in after[len(before) :] else after
            if not (whole.startswith(before) and whole.startswith(after)):
                raise UserError(
                    f"{where}: the chat template words message {number + 1} in another way once others follow: split "
                    "the conversation into one row an answer"
                )
            spans.append((len(before), len(after)))
        encoded = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        ids = np.array(encoded["input_ids"], dtype=np.int32)
        offsets = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        labels = np.full_like(ids, IGNORED)
        for start, end in spans:
            inside = (offsets[:, 0] >= start) & (offsets[:, 1] <= end) & (offsets[:, 1] > offsets[:, 0])
            labels[inside] = ids[inside]
        return ids, labels


def prompt_ids(chat: ChatTokenizer, prompt: Messages | str) -> list[int]:
    """As a model is given it."""
    if isinstance(prompt, str):
        return chat.ids(prompt, special=True)
    return chat.ids(chat.text(prompt, prompt=True))


def column(rows: list[np.ndarray]) -> Any:
    """An arrow column of lists: 4 bytes a token, where Python's lists take 36."""
    import pyarrow

    lengths = np.fromiter((len(row) for row in rows), dtype=np.int64, count=len(rows))
    places = np.concatenate([[0], lengths.cumsum()])
    values = np.concatenate(rows) if rows else np.empty(0, dtype=np.int32)
    return pyarrow.LargeListArray.from_arrays(pyarrow.array(places), pyarrow.array(values))
