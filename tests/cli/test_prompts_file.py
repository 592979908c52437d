"""Prompts from files: what is text in them, and what is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanoflow.cli import prompts_file
from nanoflow.core.config.errors import ConfigError
from nanoflow.core.config.sampling_params import SamplingParams

MARK = "\ufeff"


@pytest.mark.parametrize(("name", "line"), [("p.txt", "HAMLET:"), ("p.jsonl", '{"prompt": "HAMLET:"}')])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, name: str, line: str) -> None:
    """At the beginning of a file; elsewhere it is."""
    file = tmp_path / name
    file.write_bytes(f"{MARK}{line}\n".encode())
    assert prompts_file.read(str(file), SamplingParams())[0] == [{"prompt": "HAMLET:"}]
    (tmp_path / "p.txt").write_bytes(f"{MARK}a\n{MARK}b\n".encode())
    prompts = prompts_file.read(str(tmp_path / "p.txt"), SamplingParams())[0]
    assert prompts == [{"prompt": "a"}, {"prompt": f"{MARK}b"}]


def test_the_place_of_what_is_not_utf_8_counts_the_mark(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_bytes(f"{MARK}ab\n".encode() + b"\xff\n")
    with pytest.raises(ConfigError, match="at byte 6"):
        prompts_file.read(str(file), SamplingParams())
