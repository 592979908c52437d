"""The evaluation harness with nanoflow says what it says with transformers, sample by sample."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")
pytest.importorskip("accelerate", reason="the harness's own hf model needs accelerate")

import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

import nanoflow
from nanoflow import NanoflowError
from nanoflow.integrations.lm_eval import NanoflowLM, main

BUNDLED = Path(nanoflow.__file__).parent / "assets" / "bard"
LONGEST = 64  # max_model_len, so short that contexts are cut and texts have several windows

SPEECH = """HAMLET:
To be, or not to be: that is the question:
Whether 'tis nobler in the mind to suffer
The slings and arrows of outrageous fortune,
Or to take arms against a sea of troubles,
And by opposing end them? To die: to sleep;
No more; and by a sleep to say we end
The heart-ache and the thousand natural shocks
That flesh is heir to, 'tis a consummation
Devoutly to be wish'd.
"""
QUESTIONS = [
    {"question": "ROMEO:\nO, speak again, bright", "choices": [" angel", " morning star", "!"], "answer": 0},
    {"question": "JULIET:\nO Romeo, Romeo! wherefore art", "choices": [" thou Romeo?", " he", " thou"], "answer": 0},
    {"question": SPEECH + "OPHELIA:\nGood my", "choices": [" lord,", " dear", " good lord, how does"], "answer": 0},
    {"question": "KING ", "choices": ["RICHARD III:", "HENRY"], "answer": 1},
]
TASKS = {
    "choices": """
        output_type: multiple_choice
        doc_to_text: "{{question}}"
        doc_to_choice: "{{choices}}"
        doc_to_target: "{{answer}}"
        target_delimiter: ""
        metric_list: [{metric: acc}, {metric: acc_norm}]
        """,
    "perplexity": """
        output_type: loglikelihood_rolling
        doc_to_text: ""
        doc_to_target: "{{text}}"
        metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}]
        """,
    "verse": """
        output_type: generate_until
        doc_to_text: "{{question}}"
        doc_to_target: "{{choices[0]}}"
        generation_kwargs: {until: ["\\n\\n", "."], max_gen_toks: 24, do_sample: false}
        metric_list: [{metric: exact_match}]
        """,
}
DOCUMENTS: dict[str, list[Any]] = {
    "choices": QUESTIONS,
    "perplexity": [{"text": SPEECH}, {"text": "JULIET:\nAy me!"}, {"text": SPEECH[::-1]}],
    "verse": QUESTIONS,
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tasks and their documents."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, text in TASKS.items():
        documents = folder / f"{name}.json"
        documents.write_text("\n".join(map(json.dumps, DOCUMENTS[name])))
        lines = [line.strip() for line in text.strip().splitlines()]
        lines += [f"task: {name}", "dataset_path: json", "test_split: test"]
        lines += [f"dataset_kwargs: {{data_files: {{test: {documents}}}, cache_dir: {folder / 'cache'}}}"]
        (folder / f"{name}.yaml").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def ours() -> Iterator[NanoflowLM]:
    lm = NanoflowLM(None, dtype="float32", device="cpu", max_model_len=LONGEST)
    yield lm
    lm.llm.close()


def theirs(max_length: int) -> HFLM:
    model = AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    return HFLM(pretrained=model, tokenizer=tokenizer, max_length=max_length, batch_size=2, device="cpu")


def evaluate(lm: Any, folder: Path, names: list[str], **options: Any) -> dict[str, Any]:
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return simple_evaluate(lm, tasks=names, task_manager=manager, bootstrap_iters=0, **options)


def flat(nested: Any) -> list[float]:
    """Likelihoods, with 1.0 and 0.0 for what is greedy and not."""
    return [x for item in nested for x in flat(item)] if isinstance(nested, list | tuple) else [float(nested)]


def numbers(results: dict[str, Any], name: str) -> dict[str, float]:
    return {metric: value for metric, value in results["results"][name].items() if isinstance(value, float)}


@pytest.mark.parametrize(
    ("names", "options"),
    [
        (["choices", "perplexity"], {}), (["choices"], {"num_fewshot": 1}),
        (["choices"], {"apply_chat_template": True, "system_instruction": "Be brief."}),
    ],
)  # fmt: skip
def test_likelihoods(ours: NanoflowLM, tasks: Path, names: list[str], options: dict[str, Any]) -> None:
    found, expected = (evaluate(lm, tasks, names, **options) for lm in (ours, theirs(max_length=LONGEST - 1)))
    for name in names:
        assert len(numbers(found, name)) >= 2
        assert numbers(found, name) == pytest.approx(numbers(expected, name), rel=1e-4)
        assert len(found["samples"][name]) == len(DOCUMENTS[name])
        for one, other in zip(found["samples"][name], expected["samples"][name], strict=True):
            assert one["arguments"] == other["arguments"]
            assert flat(one["resps"]) == pytest.approx(flat(other["resps"]), abs=1e-3)


def test_generation(ours: NanoflowLM, tasks: Path) -> None:
    found, expected = (evaluate(lm, tasks, ["verse"]) for lm in (ours, theirs(max_length=LONGEST)))
    texts, others = ([sample["resps"] for sample in results["samples"]["verse"]] for results in (found, expected))
    assert texts == others
    assert any(text for ((text,),) in texts)
    assert numbers(found, "verse") == numbers(expected, "verse")


def test_the_command_line(tasks: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "nanoflow.integrations.lm_eval", "--model", "nanoflow", "--tasks", "choices"]
    command += ["--include_path", str(tasks), "--output_path", str(tmp_path), "--log_samples", "--model_args"]
    subprocess.run([*command, "dtype=float32,max_model_len=64", "--device", "cpu"], check=True)
    (results,) = tmp_path.rglob("results_*.json")
    assert json.loads(results.read_text())["results"]["choices"]["acc,none"] >= 0


def test_an_error_is_a_sentence(monkeypatch: pytest.MonkeyPatch, tasks: Path) -> None:
    options = ["--tasks", "choices", "--include_path", str(tasks), "--model_args", "pretrained=/nowhere"]
    monkeypatch.setattr(sys, "argv", ["lm_eval", "--model", "nanoflow", *options])
    with pytest.raises(SystemExit, match="/nowhere"):
        main()


def generation(lm: NanoflowLM, **kwargs: Any) -> list[str]:
    request = Instance("generate_until", {}, ("HAMLET:", kwargs), 0)
    return lm.generate_until([request], disable_tqdm=True)


def test_what_is_refused(ours: NanoflowLM) -> None:
    with pytest.raises(NanoflowError, match="'top_pp' in generation_kwargs is no sampling parameter"):
        generation(ours, until=[], top_pp=0.5)
    with pytest.raises(NanoflowError, match="no room for a context beside an output of 64 tokens"):
        generation(ours, until=[], max_gen_toks=LONGEST)
    with pytest.raises(NanoflowError, match="A continuation has 64 tokens"):
        ours._loglikelihood_tokens([(None, [1], [1] * LONGEST)])


def test_sampling_by_a_task(ours: NanoflowLM) -> None:
    greedy, again = (generation(ours, until="\n\n", max_gen_toks=12) for _ in range(2))
    drawn = generation(ours, until="\n\n", max_gen_toks=12, do_sample=True, temperature=2.0, seed=1)
    assert greedy == again != drawn
