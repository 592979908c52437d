"""The command `nanoflow bench` and its subcommands."""

from __future__ import annotations

from functools import partial

from nanoflow.cli.bench import job
from nanoflow.cli.errors import UsageError
from nanoflow.cli.hydra import app
from nanoflow.cli.hydra.command import HydraCommand
from nanoflow.core.config.errors import did_you_mean

COMMANDS = {
    "throughput": "many requests at once: output tokens a second",
    "latency": "few requests at once: time of a decode step, to the first token, or to start",
    "serving": "requests that arrive over time: percentiles of what each waits",
}
USAGE = "\n".join(
    [
        "Usage: nanoflow bench COMMAND [flags] [GROUP=OPTION ...] [KEY=VALUE ...]",
        "",
        "Commands:",
        *(f"  {name:<12}{line}" for name, line in COMMANDS.items()),
        "",
        "The engine's groups and keys are those of `nanoflow run`, and -m sweeps over them.",
        "`nanoflow bench COMMAND --help` says more.",
    ]
)
INTROS = {
    "throughput": """\
Usage: nanoflow bench throughput [flags] [GROUP=OPTION ...] [KEY=VALUE ...]

Measures the output tokens a second of many requests at once.

  nanoflow bench throughput checkpoint=qwen3-8b engine.load_format=dummy bench.output=8b.json
  nanoflow bench throughput bench.num_prompts=16 bench.max_input_len=200 bench.max_output_len=200
  nanoflow bench throughput -m scheduler.max_num_seqs=64,256    a job for each value, and a table of them all
""",
    "latency": """\
Usage: nanoflow bench latency [flags] [GROUP=OPTION ...] [KEY=VALUE ...]

Measures the time of a decode step, of the first token of a prompt, or from the start of a process to its first token.

  nanoflow bench latency checkpoint=qwen3-0.6b engine.load_format=dummy bench.batch_sizes=[1,8,64]
  nanoflow bench latency bench.workload=start
  nanoflow bench latency -m attention=triton,flash 'bench.batch_sizes=[1]'     a job for each, and a table of them all
""",
    "serving": """\
Usage: nanoflow bench serving [flags] [GROUP=OPTION ...] [KEY=VALUE ...]

Hands requests over when their time has come, and measures how long each waits: for its first token (TTFT), between the
later ones (TPOT), and for its end (E2E).

  nanoflow bench serving bench.rate=20 bench.output=serving.json
  nanoflow bench serving bench.workload=file prompts_file=in.jsonl bench.rate=2
  nanoflow bench serving bench.step_ms=2      in virtual time: what the scheduler decides, whatever the machine
  nanoflow bench serving -m scheduler=fcfs,priority,sjf,lpm block_manager=plain,prefix,radix    a table of them all
""",
}


def main(argv: list[str]) -> int:
    """Run the command with its arguments and return the exit code."""
    if not argv or argv[0] in ("--help", "-h"):
        print(USAGE)
        return 0
    name, *arguments = argv
    if name not in COMMANDS:
        raise UsageError(
            f"There is no command 'bench {name}'; there are: {', '.join(COMMANDS)}.{did_you_mean(name, COMMANDS)}"
        )
    once, run = partial(job.once, name), partial(job.run, name)
    return app.main(HydraCommand(f"bench {name}", name, INTROS[name], once, run), arguments)
