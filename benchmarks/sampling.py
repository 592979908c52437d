"""What sampling parameters cost: the workload offline256 with each of several, on one engine, in turns.

    python benchmarks/sampling.py --checkpoint qwen3-0.6b --repeats 3

Random weights, so logits are flat: filters find the hardest case, and draws can skip the least.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

from nanoflow import LLM, SamplingParams
from nanoflow.workloads.offline import offline256
from nanoflow.workloads.options import ThroughputOptions

PLAIN = SamplingParams(temperature=0.6, ignore_eos=True)
WAYS = {
    "greedy": replace(PLAIN, temperature=0.0),
    "temperature": PLAIN,
    "top_p 0.95, top_k 50": replace(PLAIN, top_p=0.95, top_k=50),
    "top_p 0.95": replace(PLAIN, top_p=0.95),
    "min_p 0.05": replace(PLAIN, min_p=0.05),
    "presence_penalty 0.5": replace(PLAIN, presence_penalty=0.5),
    "logprobs 5": replace(PLAIN, logprobs=5),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="qwen3-0.6b", help="a folder, or a config that comes with the package")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--num-prompts", type=int, default=256)
    parser.add_argument("--out", type=Path, help="a JSON file")
    args = parser.parse_args()

    seconds: dict[str, list[float]] = {way: [] for way in args.ways}
    options = ThroughputOptions(num_prompts=args.num_prompts)
    with LLM(args.checkpoint, load_format="dummy") as llm:
        vocab_size = llm.engine.vocab_size
        for number in range(args.repeats + 1):  # the first one warms up
            for way in args.ways:
                workload = offline256(options, WAYS[way], vocab_size)
                prompts = workload.round(number * len(WAYS) + args.ways.index(way))
                start = time.perf_counter()
                outputs = llm.generate(prompts, workload.params, use_tqdm=False)
                if number > 0:
                    seconds[way].append(time.perf_counter() - start)
    tokens = sum(len(output["token_ids"]) for output in outputs)
    medians = {way: statistics.median(times) for way, times in seconds.items()}
    first = medians[args.ways[0]]
    print(f"| {tokens:,} tokens | seconds | tok/s | more than {args.ways[0]} |\n| --- | --- | --- | --- |")
    for way, median in medians.items():
        print(f"| {way} | {median:.3f} | {tokens / median:,.0f} | {100 * (median / first - 1):.1f} % |")
    if args.out:
        args.out.write_text(json.dumps({"tokens": tokens, "seconds": seconds}, indent=2))


if __name__ == "__main__":
    main()
