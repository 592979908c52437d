"""Text and token ids: the tokenizer and its chat template, prompts, and text and stop strings of growing outputs."""

from nanoflow.core.text.chats import Message, encode_chat, encode_chats
from nanoflow.core.text.detokenizer import IncrementalDetokenizer
from nanoflow.core.text.prompts import Prompt, encode
from nanoflow.core.text.stop_strings import StopStrings
from nanoflow.core.text.tokenizer import Tokenizer

__all__ = [
    "IncrementalDetokenizer",
    "Message",
    "Prompt",
    "StopStrings",
    "Tokenizer",
    "encode",
    "encode_chat",
    "encode_chats",
]
