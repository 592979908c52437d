"""docs/reading.md: the path is as short as it says, goes through the files that it names, and prints what it shows."""

from __future__ import annotations

import re
import sys
import threading
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from types import FrameType
from typing import Any

import nanoflow
from nanoflow.core.api.llm import LLM
from nanoflow.core.config.sampling_params import SamplingParams

PACKAGE = Path(nanoflow.__file__).parent
GUIDE = PACKAGE.parent / "docs" / "reading.md"
SET_UP = ("core/config/", "core/registry/", "core/loading/")
MOST_LINES = 2500
PROMPTS = ["HAMLET:\n", "JULIET:"]
PARAMS = SamplingParams(temperature=0, max_tokens=8)


def entered(llm: LLM) -> set[str]:
    """Files of the package of which one `generate` calls any function, in any thread."""
    found: set[str] = set()

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(str(PACKAGE)):
            found.add(Path(frame.f_code.co_filename).relative_to(PACKAGE).as_posix())

    before = sys.getprofile()
    threading.setprofile(note)
    sys.setprofile(note)
    try:
        llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    finally:
        sys.setprofile(before)
        threading.setprofile(None)
    return found


def lines(file: str) -> int:
    return len((PACKAGE / file).read_text(encoding="utf-8").splitlines())


def test_the_path_is_short_and_goes_through_the_files_that_the_guide_names() -> None:
    with LLM(accelerate=False) as llm:
        files = entered(llm)
    path = {file for file in files if not file.startswith(SET_UP)}
    for file in sorted(path, key=lines, reverse=True):
        print(f"{lines(file):5} {file}")
    total = sum(map(lines, path))
    print(f"{total:5} in {len(path)} files; set-up apart: {sorted(files - path)}")
    walk = GUIDE.read_text(encoding="utf-8").partition("\n## Beside the path\n")[0]
    assert set(re.findall(r"\(\.\./nanoflow/([\w/]+\.py)\)", walk)) == path
    assert total <= MOST_LINES


def test_it_gives_the_tokens_of_the_accelerated_path() -> None:
    sampled = SamplingParams(seed=1, max_tokens=24)
    found = []
    for accelerate in (True, False):
        with LLM(accelerate=accelerate, dtype="float32", max_num_seqs=4, max_num_batched_tokens=4) as llm:
            outputs = [llm.generate(PROMPTS * 3, params, use_tqdm=False) for params in (PARAMS, sampled)]
        found.append([output["token_ids"] for some in outputs for output in some])
    assert found[0] == found[1]


def test_the_guide_prints_what_it_shows() -> None:
    blocks = re.findall(r"```(python|text)\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    printed = StringIO()
    for kind, block in blocks:
        if kind == "python":
            with redirect_stdout(printed):
                exec(block, names)
        else:
            assert printed.getvalue() == block
            printed = StringIO()
    assert printed.getvalue() == ""
    names["llm"].close()
