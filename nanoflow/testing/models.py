"""What every model must do: the logits and the tokens of transformers' model of the same config."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nanoflow.core.api.llm import LLM
from nanoflow.core.config.engine_config import Config, EngineConfig, PluginChoice
from nanoflow.core.config.errors import CheckpointError, ConfigError
from nanoflow.core.config.sampling_params import SamplingParams
from nanoflow.core.contracts.attention import AttentionBackend
from nanoflow.core.contracts.attention_context import AttentionContext
from nanoflow.core.contracts.model import ModelArch, ModelContext
from nanoflow.core.data.parallel import SINGLE_RANK, ParallelContext, Shard
from nanoflow.core.kernels.register import select_ops
from nanoflow.core.loading.hf_config import read_config
from nanoflow.core.loading.safetensors import load_weights
from nanoflow.testing.batches import Case, distance
from nanoflow.testing.checkpoints import NUM_OUTPUT_TOKENS, Reference, make_checkpoint, make_reference, oracle_of
from nanoflow.testing.ranks import on_ranks
from nanoflow.testing.suite import Suite

BLOCK_SIZE = 4
SHARD = "20KB"
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
everywhere = pytest.mark.parametrize("device", DEVICES)


class Oracles:
    """Checkpoints of a suite's configs and what transformers says to them, made when they are first asked for."""

    def __init__(self, folder: Path, hf_configs: dict[str, dict[str, Any]]) -> None:
        self.folder = folder
        self.hf_configs = hf_configs
        self.references: dict[str, Reference] = {}
        self.networks: dict[str, Any] = {}

    def checkpoint(self, name: str, **options: Any) -> Path:
        """A folder with one safetensors file, or with several if `max_shard_size` is given."""
        folder = self.folder / "-".join([name, *options])
        return folder if folder.exists() else make_checkpoint(folder, self.hf_configs[name], **options)

    def reference(self, name: str) -> Reference:
        """Prompts and transformers' answers."""
        if name not in self.references:
            self.references[name] = make_reference(self.checkpoint(name))
        return self.references[name]

    def logits(self, name: str, prompt: list[int]) -> torch.Tensor:
        """transformers' logits [L, V] after each of the prompt's tokens."""
        if name not in self.networks:
            self.networks[name] = oracle_of(self.checkpoint(name))
        with torch.inference_mode():
            return self.networks[name](torch.tensor([prompt])).logits[0]


ORACLES = pytest.StashKey[Oracles]()


class ModelArchSuite(Suite):
    """The model with random weights in float32, on the CPU and on a GPU if there is one.

    Attributes:
        hf_configs: tiny configs by name: `model_type`, by which transformers finds its own model, and what differs from
            its defaults. At least 128 positions and 64 tokens of vocabulary; the smaller the rest, the faster.
        bound: the largest ‖logits - transformers'‖ / ‖transformers'‖.
    """

    role = "model"
    hf_configs: ClassVar[dict[str, dict[str, Any]]]
    bound: ClassVar[float] = 1e-4

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "name" in metafunc.fixturenames:
            metafunc.parametrize("name", self.hf_configs)

    @pytest.fixture
    def oracles(self, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Oracles:
        """The checkpoints that all tests of this class share."""
        self.plugin()
        stash = request.node.getparent(pytest.Class).stash
        if ORACLES not in stash:
            stash[ORACLES] = Oracles(tmp_path_factory.mktemp("checkpoints"), self.hf_configs)
        return stash[ORACLES]

    @classmethod
    def build(
        cls,
        folder: Path,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        parallel: ParallelContext = SINGLE_RANK,
    ) -> ModelArch:
        """The model under test for this checkpoint, without its weights."""
        hf_config = read_config(folder)
        entry, config = cls.registry().model_for(cls.choice(), hf_config.get("architectures") or [])
        place = torch.device(device)
        context = ModelContext(hf_config, dtype, place, max_model_len=128, parallel=parallel, ops=select_ops(place))
        with torch.inference_mode():
            model: ModelArch = entry.component.build(config, context)
        return model

    @classmethod
    def load(
        cls,
        folder: Path,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        parallel: ParallelContext = SINGLE_RANK,
    ) -> ModelArch:
        """The model under test, or a rank's part of it, with this checkpoint's weights."""
        model = cls.build(folder, device, dtype, parallel)
        with torch.inference_mode():
            load_weights(folder, model.weights())
        return model

    @classmethod
    def attention_for(
        cls, model: ModelArch, num_blocks: int, device: str = "cpu", dtype: torch.dtype = torch.float32,
        parallel: ParallelContext = SINGLE_RANK,
    ) -> AttentionBackend:  # fmt: skip
        """The backend `torch` for this model, with a cache."""
        context = AttentionContext(
            num_layers=model.num_layers, num_heads=parallel.share(model.num_heads, "attention heads").length,
            num_kv_heads=parallel.share_kv_heads(model.num_kv_heads).length, head_dim=model.head_dim,
            scale=model.scale, windows=model.windows, block_size=BLOCK_SIZE, dtype=dtype, device=torch.device(device),
        )  # fmt: skip
        entry, config = cls.registry().resolve("attention", PluginChoice("torch"), context)
        backend: AttentionBackend = entry.component.build(config, context)
        backend.allocate(num_blocks)
        return backend

    @classmethod
    def logits(
        cls, model: ModelArch, prompts: list[list[int]], chunk: int, device: str = "cpu",
        dtype: torch.dtype = torch.float32, parallel: ParallelContext = SINGLE_RANK,
    ) -> list[torch.Tensor]:  # fmt: skip
        """The model's logits [L, V] after each of the prompts' tokens, all prompts side by side in chunks."""
        needed = [-(-len(prompt) // BLOCK_SIZE) for prompt in prompts]
        blocks = np.random.default_rng(0).permutation(sum(needed)).astype(np.int32)
        tables = np.zeros((len(prompts), max(needed)), np.int32)
        for row, part in enumerate(np.split(blocks, np.cumsum(needed)[:-1])):
            tables[row, : len(part)] = part
        attention = cls.attention_for(model, len(blocks), device, dtype, parallel)
        found: list[list[torch.Tensor]] = [[] for _ in prompts]
        done = [0] * len(prompts)
        while left := [row for row, prompt in enumerate(prompts) if done[row] < len(prompt)]:
            counts = {row: min(chunk, len(prompts[row]) - done[row]) for row in left}
            left.sort(key=lambda row: counts[row] > 1)
            lens = np.array([counts[row] for row in left])
            case = Case(lens, lens + [done[row] for row in left], tables[left], len(blocks))
            ids = [token for row in left for token in prompts[row][done[row] : done[row] + counts[row]]]
            positions = [place for row in left for place in range(done[row], done[row] + counts[row])]
            with torch.inference_mode():
                attention.plan(case.inputs(BLOCK_SIZE, torch.device(device)))
                hidden = model.forward(
                    torch.tensor(ids, device=device), torch.tensor(positions, device=device), attention
                )
                parts = parallel.all_gather(model.compute_logits(hidden)).cpu().split(lens.tolist())
            for row, part in zip(left, parts, strict=True):
                found[row].append(part)
                done[row] += counts[row]
        return [torch.cat(parts) for parts in found]

    @everywhere
    @pytest.mark.parametrize("chunk", [1, 5, 128])
    def test_logits(self, name: str, chunk: int, device: str, oracles: Oracles) -> None:
        """Prompts side by side, token by token, in chunks and at once."""
        prompts = oracles.reference(name).prompts
        model = self.load(oracles.checkpoint(name), device)
        for prompt, mine in zip(prompts, self.logits(model, prompts, chunk, device), strict=True):
            theirs = oracles.logits(name, prompt)
            assert mine.shape == theirs.shape
            found = distance(mine, theirs)
            assert found < self.bound, f"logits of a prompt of {len(prompt)} tokens are off by {found:.1e}"

    @everywhere
    @pytest.mark.parametrize("num_kv_blocks", [21, 256], ids=["tight", "roomy"])
    @pytest.mark.parametrize("overlap", [False, True], ids=["in_turn", "overlap"])
    def test_tokens(self, name: str, num_kv_blocks: int, overlap: bool, device: str, oracles: Oracles) -> None:
        """In an engine: chunked prefill beside decodes, prefixes found in the cache, preemption."""
        reference = oracles.reference(name)
        engine = EngineConfig(
            dtype="float32", device=device, block_size=BLOCK_SIZE, num_kv_blocks=num_kv_blocks, overlap=overlap,
            max_model_len=128,
        )  # fmt: skip
        config = Config(
            str(reference.folder), engine, {
                "model": self.choice(), "attention": PluginChoice("torch"),
                "scheduler": PluginChoice("fcfs", {"max_num_seqs": 4, "max_num_batched_tokens": 24}),
            },
        )  # fmt: skip
        params = SamplingParams(temperature=0.0, max_tokens=NUM_OUTPUT_TOKENS, ignore_eos=True)
        with LLM.from_config(config, self.registry()) as llm:
            for _ in range(2):
                outputs = llm.generate(reference.prompts, params, use_tqdm=False)
                assert [output.outputs[0].token_ids for output in outputs] == reference.outputs

    def test_attention_is_called_once_a_layer(self, name: str, oracles: Oracles) -> None:
        """With the shapes that the model's attributes say."""
        model = self.load(oracles.checkpoint(name))
        attention = self.attention_for(model, 2)
        calls: list[tuple[Any, ...]] = []

        def recorded(name: str) -> Any:
            method = getattr(attention, name)
            return lambda layer, *args: calls.append((name, layer, *(x.shape for x in args))) or method(layer, *args)

        for method in ("store", "attend"):
            setattr(attention, method, recorded(method))
        case = Case(np.array([1, 3]), np.array([1, 3]), np.array([[0], [1]], np.int32), 2)
        with torch.inference_mode():
            attention.plan(case.inputs(BLOCK_SIZE))
            hidden = model.forward(torch.tensor([1, 2, 3, 4]), torch.tensor([0, 0, 1, 2]), attention)
            logits = model.compute_logits(hidden[:2])
        assert hidden.dim() == 2
        assert (len(hidden), logits.shape) == (4, (2, model.vocab_size))
        query, key = (4, model.num_heads, model.head_dim), (4, model.num_kv_heads, model.head_dim)
        layers = range(model.num_layers)
        assert calls == [call for i in layers for call in (("store", i, key, key), ("attend", i, query))]

    def test_every_parameter_is_loaded(self, name: str, oracles: Oracles) -> None:
        """From the very tensors that transformers saves; nothing is left as it was when it was made."""
        folder = oracles.checkpoint(name)
        model = self.build(folder)
        targets = model.weights()
        needed = {name for name, target in targets.items() if target is not None}
        saved = tensor_names(folder)
        assert saved <= set(targets), f"`weights` has no place for {sorted(saved - set(targets))[:3]}"
        assert needed <= saved, f"`weights` asks for what no checkpoint holds: {sorted(needed - saved)[:3]}"
        parameters = dict(model.named_parameters()) if isinstance(model, torch.nn.Module) else {}
        with torch.inference_mode():
            for tensor in (tensors := parameters | filled_by(targets)).values():
                tensor.fill_(torch.nan)
            load_weights(folder, targets)
        left = [name for name, tensor in tensors.items() if tensor.isnan().any()]
        assert not left, f"not loaded: {left[:3]}"

    def test_sharded_files(self, name: str, oracles: Oracles) -> None:
        """A checkpoint in several files gives the same parameters."""
        whole, sharded = oracles.checkpoint(name), oracles.checkpoint(name, max_shard_size=SHARD)
        assert len(list(sharded.glob("*.safetensors"))) > 1, f"the checkpoint fits into {SHARD}; make it larger"
        one, other = (filled_by(self.load(folder).weights()) for folder in (whole, sharded))
        for key, tensor in one.items():
            assert torch.equal(tensor, other[key]), f"{key} differs"

    def test_split_over_ranks(self, name: str, oracles: Oracles) -> None:
        """Each of two ranks, with a part of the parameters, has the logits of one with all.

        So it is with sums made at once, and with sums left to the norms that follow.
        A model that can't be split raises `ConfigError` where `ModelContext.parallel` has more than one rank.
        """
        folder, prompts = oracles.checkpoint(name), oracles.reference(name).prompts

        def run(parallel: ParallelContext) -> tuple[int, list[torch.Tensor]]:
            model = self.load(folder, parallel=parallel)
            size = sum(tensor.numel() for tensor in filled_by(model.weights()).values())
            return size, self.logits(model, prompts, 8, parallel=parallel)

        size, whole = run(SINGLE_RANK)
        try:
            ranks = [*on_ranks(2, run), *on_ranks(2, run, in_norm=True)]
        except ConfigError as error:
            pytest.skip(str(error))
        for part_size, logits in ranks:
            assert part_size < size, "a rank has as many parameters as the whole model"
            for mine, theirs in zip(logits, whole, strict=True):
                found = distance(mine, theirs)
                assert found < self.bound, f"a rank's logits are off by {found:.1e}"

    @pytest.mark.parametrize("kind", ["missing", "unknown", "misshapen"])
    def test_a_broken_checkpoint_is_refused(self, name: str, kind: str, oracles: Oracles, tmp_path: Path) -> None:
        """A tensor that is missing, one that the model has no place for, or one of another shape."""
        folder = Path(shutil.copytree(oracles.checkpoint(name), tmp_path / "checkpoint"))
        (file,) = folder.glob("*.safetensors")
        tensors = load_file(file)
        targets = self.build(folder).weights()
        victim = next(key for key, target in reversed(targets.items()) if target is not None)
        if kind == "missing":
            del tensors[victim]
        elif kind == "unknown":
            tensors["model.surplus.weight"] = torch.zeros(2)
            victim = "model.surplus.weight"
        else:
            tensors[victim] = torch.zeros(*tensors[victim].shape, 1)
        save_file(tensors, file, {"format": "pt"})
        with pytest.raises(CheckpointError, match=victim.replace(".", r"\.")):
            self.load(folder)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
    def test_half_precision(self, name: str, dtype: torch.dtype, oracles: Oracles) -> None:
        """Parameters and hidden states are of the dtype, and the logits are near."""
        prompts = oracles.reference(name).prompts
        model = self.load(oracles.checkpoint(name), dtype=dtype)
        assert {tensor.dtype for tensor in filled_by(model.weights()).values()} == {dtype}
        for prompt, mine in zip(prompts, self.logits(model, prompts, 8, dtype=dtype), strict=True):
            assert distance(mine, oracles.logits(name, prompt)) < 0.3


def filled_by(targets: Mapping[str, torch.Tensor | Shard | None]) -> dict[str, torch.Tensor]:
    """The tensors that loading fills, by their names in the checkpoint."""
    tensors = {key: target.target if isinstance(target, Shard) else target for key, target in targets.items()}
    return {key: tensor for key, tensor in tensors.items() if tensor is not None}


def tensor_names(folder: Path) -> set[str]:
    """Names of the checkpoint's tensors."""
    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            names |= set(tensors.keys())
    return names
