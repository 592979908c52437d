"""The code in README and docs runs as it stands there."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nanoflow.core.api.llm import LLM
from nanoflow.core.config.engine_config import Config, EngineConfig, PluginChoice
from nanoflow.core.config.sampling_params import SamplingParams
from nanoflow.core.ops import Ops
from nanoflow.core.registry.registry import Registry
from nanoflow.testing.checkpoints import NUM_OUTPUT_TOKENS, make_checkpoint, make_reference

ROOT = Path(__file__).parents[1]


def python_blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)


def test_readme(capsys: pytest.CaptureFixture[str]) -> None:
    for example in python_blocks("README.md"):
        exec(example, {})
    printed = capsys.readouterr().out
    assert "HAMLET:" in printed
    assert "JULIET:\nO Romeo" in printed


def test_sampling_reference(capsys: pytest.CaptureFixture[str]) -> None:
    """Its example runs, and it describes every field with the default that it has."""
    example, _ = python_blocks("docs/sampling.md")
    exec(example, {})
    assert len(capsys.readouterr().out.splitlines()) >= 17
    text = (ROOT / "docs/sampling.md").read_text(encoding="utf-8")
    for field in fields(SamplingParams):
        default = getattr(SamplingParams(), field.name)
        shown = str(default).lower()
        assert f"| `{field.name}` | {shown} |" in text or f"`{field.name}` ({shown})" in text, field.name


def test_own_logits_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example makes a plugin that passes the suite, and does what it says."""
    _, code = python_blocks("docs/sampling.md")
    (tmp_path / "at_most_plugin.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    point = SimpleNamespace(
        name="at_most", dist=SimpleNamespace(name="at-most", version="1"), load=lambda: import_module("at_most_plugin")
    )
    params = [
        SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, logits_processors=named)
        for named in (None, {"at_most": {"times": 1}}, {"at_most": {"times": 2}})
    ]
    with LLM.from_config(Config(), Registry.load(strict=True, extra=[point])) as llm:
        free, once, twice = (o["token_ids"] for o in llm.generate(["HAMLET:\n"] * 3, params, use_tqdm=False))
        with pytest.raises(ValueError, match="at_most needs times"):
            llm.generate("HAMLET:\n", SamplingParams(logits_processors={"at_most": {}}), use_tqdm=False)
    most = [max(Counter(token_ids).values()) for token_ids in (free, once, twice)]
    assert most[0] > 2
    assert most[1:] == [1, 2]


def test_from_vllm(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = python_blocks("docs/from-vllm.md")
    exec(example, {})
    assert capsys.readouterr().out.splitlines()[-1] == "2"


def test_serving(capsys: pytest.CaptureFixture[str]) -> None:
    for example in python_blocks("docs/serving.md"):
        exec(example, {})
    assert "\n2 " in capsys.readouterr().out


def test_operations(capsys: pytest.CaptureFixture[str]) -> None:
    """Its example replaces one, which is used; and all of them are listed."""
    (example,) = (block for block in python_blocks("docs/extension.md") if "nanoflow_operations" in block)
    plugin: dict[str, Any] = {}
    exec(example, plugin)
    assert capsys.readouterr().out.startswith("ours: [1, 4]\ntensor([[0.3780, 0.3780, 0.3780, 1.8898]]")
    point = SimpleNamespace(name="ours", dist=None, load=lambda: SimpleNamespace(**plugin))
    registry = Registry.load(strict=True, extra=[point])
    config = Config(engine=EngineConfig(device="cpu"), plugins={"operations": (PluginChoice("ours"),)})
    with LLM.from_config(config, registry) as llm, LLM(device="cpu") as plain:
        params = SamplingParams(temperature=0, max_tokens=4)
        found, expected = (one.generate("HAMLET:", params, use_tqdm=False)[0]["token_ids"] for one in (llm, plain))
    assert "ours: " in capsys.readouterr().out
    assert found == expected
    text = (ROOT / "docs/ops.md").read_text(encoding="utf-8")
    for field in fields(Ops):
        assert f"`{field.name}`" in text, field.name


def test_evaluation(capsys: pytest.CaptureFixture[str]) -> None:
    for example in python_blocks("docs/evaluation.md"):
        exec(example, {})
    likely, unlikely = (float(line.split()[0]) for line in capsys.readouterr().out.splitlines())
    assert 0 > likely > unlikely


def test_model_tutorial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files make a plugin, whose tokens are those of transformers for the config that its test has."""
    model, plugin, suite = python_blocks("docs/models.md")
    (tmp_path / "seed_oss").mkdir()
    (tmp_path / "seed_oss" / "model.py").write_text(model)
    (tmp_path / "seed_oss" / "__init__.py").write_text(plugin)
    monkeypatch.syspath_prepend(tmp_path)
    point = SimpleNamespace(
        name="seed_oss", dist=SimpleNamespace(name="seed-oss", version="1.0"), load=lambda: import_module("seed_oss")
    )
    scope: dict[str, Any] = {}
    exec(suite, scope)
    (hf_config,) = scope["TestSeedOss"].hf_configs.values()
    reference = make_reference(make_checkpoint(tmp_path / "checkpoint", hf_config))
    config = Config(str(reference.folder), EngineConfig(device="cpu", dtype="float32", num_kv_blocks=64))
    params = SamplingParams(temperature=0, max_tokens=NUM_OUTPUT_TOKENS, ignore_eos=True)
    with LLM.from_config(config, Registry.load(strict=True, extra=[point])) as llm:
        outputs = llm.generate(reference.prompts, params, use_tqdm=False)
        assert llm.describe()["model"] == "seed_oss"
    assert [output.outputs[0].token_ids for output in outputs] == reference.outputs


def test_models_are_listed() -> None:
    """Every built-in model and its architectures, in the docs and in the README."""
    text, readme = ((ROOT / name).read_text(encoding="utf-8") for name in ("docs/models.md", "README.md"))
    for entry in Registry.load(extra=[]).entries("model"):
        architectures = ", ".join(f"`{name}`" for name in entry.component.architectures)
        assert f"| `{entry.component.name}` | {architectures} |" in text
        assert f"`{entry.component.name}`" in readme


def test_the_index_has_every_page() -> None:
    """Each is linked from docs/README.md, with what it is about, and the README leads there."""
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    links = re.finditer(r"^\d+\. \[[^\]]+\]\(([\w.-]+?)(?:#[\w-]+)?\): \S", index, re.MULTILINE)
    linked = {match[1] for match in links}
    assert {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"} <= linked
    assert "(docs/README.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("name", [str(path.relative_to(ROOT)) for path in PAGES])
def test_links(name: str) -> None:
    """A link to a file of the repository leads to one."""
    for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / name).read_text(encoding="utf-8")):
        assert ((ROOT / name).parent / target).exists(), target


@pytest.mark.parametrize("name", ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))])
def test_paths_that_are_named_are_there(name: str) -> None:
    """Files and folders of the package, in links or in code, with or without `nanoflow/` before them."""
    text = (ROOT / name).read_text(encoding="utf-8")
    rooms = "core|plugins|cli|testing|bench|workloads|integrations"
    pattern = rf"(?<![\w/])(?:\.\./)?((?:nanoflow/)?(?:{rooms})/[\w/]*\w(?:\.py)?)"
    named = {path for path in re.findall(pattern, text) if "ROLE" not in path}
    for path in sorted(named):
        inside = ROOT / "nanoflow" / path.removeprefix("nanoflow/")
        assert inside.exists() or inside.with_suffix(".py").exists(), path
