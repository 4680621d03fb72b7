"""Replies in a chat: facts are edited as a model says them that answers a user's message in a sentence.

A facts file says "The capital of Australia is"; a user asks for the capital of Australia, and a model for chats replies "The
capital of Australia is …". That reply is edited along with the text (contexts.py), so that the fact holds in both.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mosectl.checkpoints.live import note_chat
from mosectl.editing.methods import DEFAULT
from mosectl.editing.options import EditOptions
from mosectl.errors import UsageError
from mosectl.model.tokens import render_chat


def replies_wanted(options: EditOptions, template: bool) -> int:
    """1 where facts shall be edited as replies, too: prompts are text, and the tokenizer has a chat ``template``."""
    asked = options.method == DEFAULT if options.replies is None else options.replies
    return int(bool(asked) and template and not options.chat and not options.published)


def replies_settled(options: EditOptions, tokenizer: Any) -> EditOptions:
    """The options, with replies only where they are wanted and the chat template works."""
    wanted = replies_wanted(options, bool(getattr(tokenizer, "chat_template", None)))
    if wanted:
        try:
            render_chat(tokenizer, "x")
        except UsageError:  # text can be edited all the same
            wanted = 0
    return replace(options, replies=wanted)


def note_text_alone(tokenizer: Any, given: EditOptions, settled: EditOptions) -> None:
    """A Notice where a model that may be one for chats is edited in text alone, unless ``given`` asked for just that."""
    if settled.replies or given.replies == 0:
        return
    broken = replies_wanted(given, template=True)  # the template's error is then what --chat tells
    instead = "give --chat" if given.published or broken else "give --set replies=1"
    note_chat(tokenizer, settled.chat, "edited", instead)
