"""Whether text holds up the step loop: many streams that want the text of every step, beside the same batch without.

    python benchmarks/streams.py --streams 256

Qwen3-0.6B's dimensions with random weights and the tokenizer that comes with the package. Prints time, and on a GPU
its idle share over some steps in the middle, from torch.profiler.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import importlib.resources
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity
from torch.profiler import profile as profiling

from nanoflow import AsyncLLM, RequestOutputKind, SamplingParams
from nanoflow.bench import profile

KINDS = (RequestOutputKind.FINAL_ONLY, RequestOutputKind.DELTA, RequestOutputKind.CUMULATIVE)


def make_checkpoint(folder: Path, config: Path | None) -> str:
    """A folder with a config of real dimensions, and the tokenizer that comes with the package."""
    assets = Path(str(importlib.resources.files("nanoflow") / "assets"))
    bard = json.loads((assets / "bard" / "config.json").read_text())
    dims = json.loads((config or assets / "configs" / "qwen3-0.6b" / "config.json").read_text())
    dims |= {key: bard[key] for key in ("vocab_size", "eos_token_id", "bos_token_id") if key in bard}
    (folder / "config.json").write_text(json.dumps(dims))
    for file in (assets / "bard").glob("tokenizer*"):
        shutil.copy(file, folder)
    return str(folder)


async def serve(engine: AsyncLLM, kind: RequestOutputKind, count: int, tokens: int, path: Path | None) -> float:
    """Seconds for `count` streams of so many tokens; with a path, a trace of the middle goes there."""
    params = SamplingParams(temperature=1.0, max_tokens=tokens, ignore_eos=True, output_kind=kind)
    characters = 0

    async def read(number: int) -> None:
        nonlocal characters
        async for output in engine.generate([number + 1] * 64, params):
            characters += len(output["text"])

    start = time.perf_counter()
    tasks = [asyncio.ensure_future(read(number)) for number in range(count)]
    if path is not None:
        await asyncio.sleep(0.6)
        with profiling(activities=[ProfilerActivity.CUDA]) as profiler:
            await asyncio.sleep(1.0)
        profiler.export_chrome_trace(str(path))
    await asyncio.gather(*tasks)
    assert characters > count * tokens
    return time.perf_counter() - start


def steady(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last 0.6 seconds of device work: starting the profiler holds everything up."""
    events = [event for event in events if event.get("cat") in profile.DEVICE_WORK]
    end = max(event["ts"] for event in events)
    return [event for event in events if event["ts"] > end - 0.6e6]


async def measure(args: argparse.Namespace, folder: Path) -> None:
    checkpoint = make_checkpoint(folder, args.config)
    print("| output kind | seconds | tok/s | steps | GPU idle | waiting for the host |")
    print("| --- | --- | --- | --- | --- | --- |")
    async with AsyncLLM(checkpoint, load_format="dummy", max_num_seqs=args.streams) as engine:
        for kind in KINDS:
            before = engine.stats.num_steps
            times = [await serve(engine, kind, args.streams, args.tokens, None) for _ in range(args.repeats + 1)]
            steps = (engine.stats.num_steps - before) / len(times)
            seconds, shares = statistics.median(times[1:]), "- | -"
            if torch.cuda.is_available():
                path = (args.out or folder) / f"streams-{kind.name.lower()}.json.gz"
                await serve(engine, kind, args.streams, args.tokens, path)
                idle = profile.idle(steady(json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]))
                shares = f"{100 * idle.share:.1f} % | {100 * idle.waiting:.1f} %"
            speed = args.streams * args.tokens / seconds
            print(f"| {kind.name} | {seconds:.3f} | {speed:,.0f} | {steps:,.0f} | {shares} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=512, help="in each output")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--config", type=Path, help="a config.json of other dimensions")
    parser.add_argument("--out", type=Path, help="a folder for traces")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(measure(args, Path(folder)))


if __name__ == "__main__":
    main()
