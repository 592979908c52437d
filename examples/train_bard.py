"""Train *bard*, the small Qwen3 checkpoint that nanoflow ships, on the plays and poems of Shakespeare.

    python examples/train_bard.py --data path/to/shakespeare --out nanoflow/assets/bard

A plain training loop over transformers' own Qwen3: read the plays, train a byte-level BPE tokenizer, train the model,
keep the weights that do best on plays it never saw, and write a folder that `from_pretrained` loads, with a model card
made from the numbers measured. A few minutes on one GPU; `--steps 20` is a smoke run that a laptop's CPU does in
seconds. Needs torch, transformers and tokenizers, nothing of nanoflow.

The text is tiny for a language model (1.8 million tokens, seen over a dozen times), so most choices here are about not
learning it by heart: dropout everywhere, weight decay, windows that start at random, averaged weights.
"""

from __future__ import annotations

import argparse
import copy
import math
import platform
import random
import re
import time
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

END = "<|endoftext|>"  # ends a scene or a poem; eos and pad at once, and there is no bos
HELD_OUT = ("periclesprinceoftyre", "titusandronicus")  # whole plays, read by neither the tokenizer nor the model
CONTEXT = 2048  # positions the model is made for, and the longest training window
WINDOWS = (512, 2048)  # a step's windows: short ones teach beginnings, long ones the whole range
EVAL_WINDOW = 1024
SPECIAL_SCENE = r"\s+(THE )?(PROLOGUE|EPILOGUE|INDUCTION)\.?\s*$"
PROMPTS = ("HAMLET:\n", "JULIET:\nO Romeo", "To be, or not to be", "First Citizen:\n")

# A conversation is a play: the user is a stranger, the assistant the bard, and a system message a stage direction.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == 'system' -%}
{{ '[' + (message.content | trim) + ']\n\n' }}
{%- elif message.role == 'user' -%}
{{ 'STRANGER:\n' + (message.content | trim) + '\n\n' }}
{%- elif message.role == 'assistant' -%}
{{ 'BARD:\n' + (message.content | trim) + '\n\n' }}
{%- else -%}
{{ message.role | upper + ':\n' + (message.content | trim) + '\n\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ 'BARD:\n' }}
{%- endif -%}
"""


# --- the text ---------------------------------------------------------------------------------------------------------


def read_documents(path: Path) -> list[str]:
    """One source file as documents: the scenes of a play, or the poems of a book of them."""
    lines = path.read_text(encoding="utf-8").splitlines()
    is_play = any(line.startswith("ACT ") for line in lines)
    return split_play(lines) if is_play else split_poems(lines)


def split_play(lines: list[str]) -> list[str]:
    """Cut a play into scenes, each headed by the play's title, its act and its scene."""
    title = next(line.strip() for line in lines if line.strip())
    begin = next(number for number, line in enumerate(lines) if re.match(f"ACT |{SPECIAL_SCENE}", line))
    scenes: list[str] = []
    act, scene, body = "", "", []

    def flush() -> None:
        text = format_scene(body)
        if text:
            heading = " ".join(part for part in (act, scene) if part)
            scenes.append("\n\n".join(part for part in (title, heading, text) if part))
        body.clear()

    for line in lines[begin:]:  # what comes before is a list of persons
        if letters(line) == letters(title):  # the title, again above every scene; an apostrophe may differ
            continue
        if re.match(r"ACT [IVX]+\s*$", line):
            flush()
            act, scene = line.strip() + ".", ""
        elif re.match(r"SCENE\b", line):
            flush()
            number, _, place = line.partition("\t")
            scene = " ".join(f"{number.strip().rstrip(':')}. {place}".split())
        elif re.match(SPECIAL_SCENE, line):
            flush()
            if "EPILOGUE" in line:
                act = ""
            scene = line.strip().removeprefix("THE ").rstrip(".") + "."
        else:
            body.append(line)
    flush()
    return scenes


def letters(line: str) -> str:
    return re.sub(r"\W", "", line)


def format_scene(lines: list[str]) -> str:
    """Lay speeches out as `NAME:` and lines below it, one blank line between speeches, directions in brackets."""
    out: list[str] = []
    direction = ""  # held back one step: a speech that goes on after it keeps it inside
    in_speech = False
    for paragraph in "\n".join(lines).split("\n\n"):
        speaker, text = parse_paragraph(paragraph.split("\n"))
        if not speaker and not text:
            continue
        if not speaker and text[0].startswith("[") and text[-1].endswith("]"):
            direction = "\n".join(part for part in (direction, " ".join(text)) if part)
        elif not speaker and in_speech:
            out[-1] = "\n".join([out[-1], *([direction] if direction else []), *text])
            direction = ""
        else:
            if direction:
                out.append(direction)
                direction = ""
            out.append("\n".join([f"{speaker}:", *text] if speaker else text))
            in_speech = bool(speaker)
    if direction:
        out.append(direction)
    return "\n\n".join(out)


def parse_paragraph(lines: list[str]) -> tuple[str, list[str]]:
    """The speaker of a paragraph ("" if it names none) and its lines."""
    names: list[str] = []
    text: list[str] = []
    for line in lines:
        name, tab, rest = line.partition("\t")
        if not tab and ": " in line:  # a few speeches of the source have a colon where the others have a tab
            name, _, rest = line.partition(": ")
        if name.strip():
            names.append(" ".join(name.split()).rstrip(":"))
        rest = " ".join(rest.replace("|", " ").split())
        if rest:
            text.append(rest)
    together = any("|" in line for line in lines)  # a brace: several persons speak at once
    return (" and " if together else " ").join(names), text


def split_poems(lines: list[str]) -> list[str]:
    """Cut a book of poems at its Roman numerals; a single long poem stays whole."""
    title = next(line.strip() for line in lines if line.strip())
    poems: list[list[str]] = [[]]
    for line in lines:
        if line.strip() == title:
            continue
        if re.match(r"[IVXLC]+\.\s*$", line):
            poems.append([])
        poems[-1].append(" ".join(line.split()))
    texts = (re.sub(r"\n{3,}", "\n\n", "\n".join(poem)).strip() for poem in poems)
    return [f"{title}\n\n{text}" for text in texts if text]


def load_corpus(folder: Path) -> tuple[list[str], list[str]]:
    """Documents for training and documents held out."""
    train, held_out = [], []
    paths = sorted(folder.glob("*.txt"))
    missing = set(HELD_OUT) - {path.stem for path in paths}
    if missing:
        raise SystemExit(f"{folder} lacks the held-out plays: {', '.join(sorted(missing))}")
    for path in paths:
        (held_out if path.stem in HELD_OUT else train).extend(read_documents(path))
    return train, held_out


# --- the tokenizer ----------------------------------------------------------------------------------------------------


def train_tokenizer(documents: list[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE: every byte has a token and nothing is normalised, so any text survives a round trip."""
    tokenizer = Tokenizer(models.BPE())
    # The GPT-2 split keeps newlines and colons apart, so a prompt may end before or after them and still look familiar.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, documents: list[str]) -> torch.Tensor:
    """All documents one after the other, each closed by the end token."""
    end = tokenizer.token_to_id(END)
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(documents):
        ids.extend(encoding.ids)
        ids.append(end)
    return torch.tensor(ids)


def wrap_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
        chat_template=CHAT_TEMPLATE,
    )


# --- the model --------------------------------------------------------------------------------------------------------


def build_model(args: argparse.Namespace, vocab_size: int, end: int) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        attention_dropout=args.dropout,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    model = Qwen3ForCausalLM(config)
    add_dropout(model, args.dropout)
    return model


def add_dropout(model: Qwen3ForCausalLM, rate: float) -> None:
    """Qwen3 has dropout on attention weights only; hooks add it to the embeddings and to what each block adds."""

    def hook(module: torch.nn.Module, _inputs: tuple, output: torch.Tensor | tuple) -> torch.Tensor | tuple:
        if isinstance(output, tuple):
            return (F.dropout(output[0], rate, module.training), *output[1:])
        return F.dropout(output, rate, module.training)

    model.model.embed_tokens.register_forward_hook(hook)
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(hook)
        layer.mlp.register_forward_hook(hook)


class Sampler:
    """Random windows of the training tokens, half of them beginning where a speech or a document begins."""

    def __init__(self, ids: torch.Tensor, newline: int, end: int, generator: torch.Generator) -> None:
        self.ids, self.generator = ids, generator
        after_blank = (ids[1:-1] == newline) & (ids[:-2] == newline)
        after_end = ids[1:-1] == end
        self.begins = torch.nonzero(after_blank | after_end).flatten() + 2

    def draw(self, count: int, length: int) -> torch.Tensor:
        last = len(self.ids) - length - 1
        offsets = torch.randint(0, last + 1, (count,), generator=self.generator, device=self.ids.device)
        picks = torch.randint(0, len(self.begins), (count,), generator=self.generator, device=self.ids.device)
        # Prompts mostly begin with a speech, so let the model see many windows that do.
        even = torch.arange(count, device=self.ids.device) % 2 == 0
        offsets = torch.where(even, self.begins[picks].clamp(max=last), offsets)
        return self.ids[offsets[:, None] + torch.arange(length + 1, device=self.ids.device)]


def loss_of(model: torch.nn.Module, window: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    logits = model(input_ids=window[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), window[:, 1:].flatten(), reduction=reduction)


@torch.inference_mode()
def evaluate(model: torch.nn.Module, ids: torch.Tensor, max_windows: int) -> float:
    """Mean loss in nats per token over windows laid end to end (a window's first tokens see little context)."""
    was_training = model.training
    model.eval()
    count = min((len(ids) - 1) // EVAL_WINDOW, max_windows)
    starts = torch.arange(count, device=ids.device) * EVAL_WINDOW
    windows = ids[starts[:, None] + torch.arange(EVAL_WINDOW + 1, device=ids.device)]
    total = 0.0
    for batch in windows.split(16):
        with autocast(ids.device):
            total += loss_of(model, batch, "sum").item()
    model.train(was_training)
    return total / (count * EVAL_WINDOW)


def autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


# --- training ---------------------------------------------------------------------------------------------------------


@dataclass
class Result:
    """What the model card reports."""

    steps: int = 0
    best_step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    train_loss: float = math.inf
    val_loss: float = math.inf


def make_optimizer(model: torch.nn.Module, args: argparse.Namespace) -> torch.optim.AdamW:
    """Weight decay on matrices, none on norms."""
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": args.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=args.device.type == "cuda")


def learning_rate(args: argparse.Namespace, step: int, progress: float) -> float:
    warm_up = min(1.0, (step + 1) / 100)
    return args.lr * warm_up * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def train(model: Qwen3ForCausalLM, sampler: Sampler, val_ids: torch.Tensor, args: argparse.Namespace) -> Result:
    """Train, and leave in `model` the averaged weights that had the lowest validation loss."""
    average = copy.deepcopy(model).eval()  # smooths the noise of small batches; this is what gets evaluated and kept
    best = copy.deepcopy(average.state_dict())
    optimizer = make_optimizer(model, args)
    result = Result()
    recent = torch.zeros((), device=args.device)  # summed on the device: reading it each step would stall the GPU
    last_step, last_tokens, last_time = 0, 0, time.perf_counter()
    started = time.perf_counter()
    model.train()
    progress, step = 0.0, 0
    while progress < 1.0:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args, step, progress)
        length = WINDOWS[step % len(WINDOWS)]
        count = max(1, args.batch_tokens // length)
        window = sampler.draw(count, min(length, args.batch_tokens))
        with autocast(args.device):
            loss = loss_of(model, window)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent += loss.detach()
        step += 1
        result.tokens += window[:, 1:].numel()
        update_average(average, model, step)
        progress = max(step / args.steps, (time.perf_counter() - started) / (60 * args.minutes))
        if step % args.eval_every == 0 or progress >= 1.0:
            val = evaluate(average, val_ids, args.eval_windows)
            now = time.perf_counter()
            speed = (result.tokens - last_tokens) / (now - last_time)
            left = (now - started) * (1 - progress) / max(progress, 1e-9)
            mean = recent.item() / (step - last_step)
            mark = " *" if val < result.val_loss else ""
            print(
                f"step {step:6d}  {min(progress, 1):4.0%}  train {mean:.4f}  val {val:.4f}  "
                f"{speed:9,.0f} tok/s  {max(left, 0):4.0f} s left{mark}",
                flush=True,
            )
            recent.zero_()
            last_step, last_tokens, last_time = step, result.tokens, time.perf_counter()
            if val < result.val_loss:
                result.val_loss, result.best_step = val, step
                best = copy.deepcopy(average.state_dict())
    result.steps, result.seconds = step, time.perf_counter() - started
    model.load_state_dict(best)
    model.eval()
    return result


@torch.no_grad()
def update_average(average: torch.nn.Module, model: torch.nn.Module, step: int) -> None:
    """Exponential moving average, short at first so that it forgets the random start."""
    weight = 1 - min(0.998, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), weight)


# --- what is written --------------------------------------------------------------------------------------------------


@torch.inference_mode()
def write_samples(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, tokens: int) -> list[str]:
    samples = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
        output = model.generate(**inputs, max_new_tokens=tokens, do_sample=True, temperature=0.8, top_k=0)
        samples.append(tokenizer.decode(output[0], skip_special_tokens=True).rstrip())
    return samples


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the folder in bfloat16, as a regular transformers checkpoint."""
    end = tokenizer.eos_token_id
    model.config.attention_dropout = 0.0  # a matter of this training run, not of the model
    model.generation_config = GenerationConfig(bos_token_id=end, eos_token_id=end, pad_token_id=end)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def hardware(device: torch.device) -> str:
    return f"one {torch.cuda.get_device_name(device)}" if device.type == "cuda" else f"a CPU ({platform.machine()})"


def model_card(
    args: argparse.Namespace,
    config: Qwen3Config,
    result: Result,
    counts: dict[str, int],
    bits_per_byte: dict[str, float],
    samples: list[str],
) -> str:
    titles = ", ".join(f"`{name}`" for name in HELD_OUT)
    millions = counts["parameters"] / 1e6
    passes = result.tokens / counts["train_tokens"]
    quoted = "\n\n".join(f"```text\n{sample}\n```" for sample in samples)
    return f"""\
---
license: apache-2.0
language:
- en
library_name: transformers
pipeline_tag: text-generation
tags:
- qwen3
- shakespeare
- nanoflow
---

# bard

A Qwen3 of {millions:.1f} million parameters that writes in the manner of Shakespeare's plays. It ships with nanoflow so
that the engine has a real checkpoint to run, test and measure without a download: an ordinary Qwen3 folder, small
enough to keep in a package, whose output one can read. `examples/train_bard.py` makes it.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("nanoflow/assets/bard")
model = AutoModelForCausalLM.from_pretrained("nanoflow/assets/bard")
prompt = tokenizer("HAMLET:\\n", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=120, do_sample=True, temperature=0.8)[0]))
```

## Model

| | |
| --- | --- |
| architecture | `Qwen3ForCausalLM`, tied embeddings, bfloat16 |
| layers | {config.num_hidden_layers} |
| hidden size, feed-forward size | {config.hidden_size}, {config.intermediate_size} |
| query heads, key/value heads | {config.num_attention_heads}, {config.num_key_value_heads}, of size {config.head_dim} |
| context | {config.max_position_embeddings} tokens, RoPE with theta 10000 |
| vocabulary | {config.vocab_size} tokens, byte-level BPE (every byte is in it, nothing is normalised) |
| special token | `{END}`, id {config.eos_token_id}: end of a scene or poem, and padding; no text begins with it |

## Data

The plays and poems of William Shakespeare in 42 plain-text files; the text is in the public domain. Plays are cut into
scenes and laid out as `NAME:`, the lines spoken, and a blank line; stage directions stand in brackets; lists of persons
are left out. Training text: {counts["train_bytes"]:,} bytes, {counts["train_tokens"]:,} tokens.

Two plays are held out, from the tokenizer as well: {titles}
({counts["val_bytes"]:,} bytes, {counts["val_tokens"]:,} tokens).

## Training

| | |
| --- | --- |
| steps, tokens | {result.steps:,} steps, {result.tokens:,} tokens ({passes:.0f} passes) |
| checkpoint kept | step {result.best_step:,}, the lowest validation loss |
| wall time | {result.seconds:.0f} s on {hardware(args.device)} |
| optimiser | AdamW, learning rate {args.lr:g} (warm-up, cosine), weight decay {args.weight_decay:g} |
| batch | {args.batch_tokens:,} tokens, windows of {" and ".join(map(str, WINDOWS))} in turn |
| regularisation | dropout {args.dropout:g} (attention, residual, embedding), moving average of the weights |
| precision | float32 weights under {"bfloat16 autocast" if args.device.type == "cuda" else "no autocast"} |
| seed | {args.seed} |
| software | torch {torch.__version__}, transformers {transformers.__version__}, tokenizers {tokenizers.__version__} |

Loss of the weights as shipped (windows of {EVAL_WINDOW} tokens laid end to end):

| | nats per token | bits per byte |
| --- | --- | --- |
| training plays (a sample) | {result.train_loss:.3f} | {bits_per_byte["train"]:.3f} |
| held-out plays | {result.val_loss:.3f} | {bits_per_byte["val"]:.3f} |

The held-out plays also chose the checkpoint and the settings, so their loss is slightly flattering.

## Use and limits

Meant for tests, examples and benchmarks of inference engines, and for fun. It knows the look and sound of a scene
(speakers, verse, mostly real words), not what one is about: it follows no instructions, states no facts, and loses the
thread within a speech. Greedy decoding soon repeats itself, so sample (temperature 0.8 suits it); even then a speaker
may answer himself. It knows only Early Modern English, with the attitudes of its source, and may quote it.

The chat template renders a conversation as a play: the user is `STRANGER`, the assistant is `BARD`, a system message is
a stage direction. A reply ends at the first blank line, so give `"\\n\\n"` as a stop string; without one the model goes
on to write the other parts too.

## Samples

Temperature 0.8, not selected:

{quoted}

## Licence

The weights and the tokenizer are released under the Apache License 2.0. The training text is in the public domain.
"""


# --- the command ------------------------------------------------------------------------------------------------------


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the plays and poems as .txt files")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the checkpoint to")
    parser.add_argument("--steps", type=int, default=2700, help="stop after this many steps")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after this long, if that comes first")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--intermediate", type=int, default=768)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=1.0)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--batch-tokens", type=int, help="tokens a step (default: 16384 on a GPU, 512 on a CPU)")
    parser.add_argument("--eval-every", type=int, default=100, help="steps between validations")
    args = parser.parse_args()
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.device = torch.device(args.device)
    on_gpu = args.device.type == "cuda"
    args.batch_tokens = args.batch_tokens or (16384 if on_gpu else 512)
    args.eval_windows = 1000 if on_gpu else 4  # a GPU reads the held-out plays whole, a CPU takes a taste
    return args


def main() -> None:
    args = parse_args()
    random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = True

    train_docs, val_docs = load_corpus(args.data)
    tokenizer = train_tokenizer(train_docs, args.vocab)
    end, newline = tokenizer.token_to_id(END), tokenizer.encode("\n").ids[0]
    random.shuffle(train_docs)
    train_ids, val_ids = encode(tokenizer, train_docs).to(args.device), encode(tokenizer, val_docs).to(args.device)
    model = build_model(args, tokenizer.get_vocab_size(), end).to(args.device)
    counts = {
        "train_bytes": sum(len(doc.encode()) for doc in train_docs),
        "val_bytes": sum(len(doc.encode()) for doc in val_docs),
        "train_tokens": len(train_ids),
        "val_tokens": len(val_ids),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    print("  ".join(f"{name} {value:,}" for name, value in counts.items()), flush=True)

    generator = torch.Generator(args.device).manual_seed(args.seed)
    result = train(model, Sampler(train_ids, newline, end, generator), val_ids, args)

    wrapped = wrap_tokenizer(tokenizer)
    save(model, wrapped, args.out)
    # Measure and sample what was written, not what was in memory.
    shipped = AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.bfloat16).to(args.device).eval()
    result.val_loss = evaluate(shipped, val_ids, args.eval_windows)
    result.train_loss = evaluate(shipped, train_ids, min(args.eval_windows, 100))
    bits = {
        part: loss / math.log(2) * counts[f"{part}_tokens"] / counts[f"{part}_bytes"]
        for part, loss in (("train", result.train_loss), ("val", result.val_loss))
    }
    samples = write_samples(shipped, wrapped, tokens=120)
    print("\n\n----\n".join(["", *samples]))
    card = model_card(args, shipped.config, result, counts, bits, samples)
    (args.out / "README.md").write_text(card, encoding="utf-8")
    size = sum(path.stat().st_size for path in args.out.iterdir())
    print(
        f"\n{args.out}: {size:,} bytes; step {result.best_step} of {result.steps}, {result.seconds:.0f} s; "
        f"train {result.train_loss:.4f}, val {result.val_loss:.4f} nats per token, {bits['val']:.4f} bits per byte"
    )


if __name__ == "__main__":
    main()
