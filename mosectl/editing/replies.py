"""Replies in a chat: facts are edited as a model says them that answers a user's message in a sentence.

A facts file says "The capital of Australia is"; a user asks for the capital of Australia, and a model for chats replies "The
capital of Australia is …". That reply is edited along with the text (contexts.py), so that the fact holds in both.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mosectl.checkpoints.live import note_chat
from mosectl.editing.options import EditOptions, default_options
from mosectl.errors import UsageError
from mosectl.model.tokens import render_chat


def replies_settled(options: EditOptions, tokenizer: Any) -> EditOptions:
    """The options, with replies only where there can be any: prompts are text, and there is a chat template that works."""
    if not options.replies or options.chat or options.published or not getattr(tokenizer, "chat_template", None):
        return replace(options, replies=0)
    try:
        render_chat(tokenizer, "x")
    except UsageError:  # text can be edited all the same
        return replace(options, replies=0)
    return options


def note_text_alone(tokenizer: Any, given: EditOptions, settled: EditOptions) -> None:
    """A Notice where a model that may be one for chats is edited in text alone, unless ``given`` asked for just that."""
    if settled.replies or given.replies_asked or given.replies < default_options(given.method).replies:
        return
    broken = given.replies and not given.published  # the template's error is then what --chat tells
    instead = "give --chat" if given.published or broken else "give --set replies=1"
    note_chat(tokenizer, settled.chat, "edited", instead)
