"""Text and token ids: the tokenizer and its chat template, prompts, and stop strings in growing outputs."""

from nanoflow.core.text.prompts import Message, Prompt, encode, encode_chats
from nanoflow.core.text.stop_strings import OutputText
from nanoflow.core.text.tokenizer import IncrementalDetokenizer, Tokenizer

__all__ = [
    "IncrementalDetokenizer",
    "Message",
    "OutputText",
    "Prompt",
    "Tokenizer",
    "encode",
    "encode_chats",
]
