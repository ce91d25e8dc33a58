"""Stage 05: trains the language model of language_model.py on bytes of text.

    python 05_mlstmsig/train_lm.py --kernel sig --size base --steps 4000 --seed 0 --output runs/sig_0
    python 05_mlstmsig/train_lm.py --kernel exp --size tiny --steps 200 --output runs/tiny         a minute on a CPU
    python 05_mlstmsig/train_lm.py ... --data my_folder_of_text        instead of Python's standard library
    python 05_mlstmsig/train_lm.py ... --resume                        goes on after a kill, with the same result (but
                                                                       for attention on a GPU: its gradients vary)

The recipe is that of the TFLA paper (arXiv 2503.14376): AdamW with betas 0.9 and 0.95 and weight decay 0.1 on the
weights of linear layers only, gradients clipped at a norm of 0.5, a linear warm-up, a cosine down to a tenth of the
peak, and a linear cooldown to 0. The paper warms up for 750 steps and cools down over 1000; in shorter runs these are
a twentieth and a tenth of all steps here. On a GPU, matrix products and the cell run in bfloat16 and the weights stay
float32.

In the output folder lie afterwards: result.json (what was run on what, and how it went), model.safetensors (for
language_model.load) and checkpoint.pt (what --resume reads).
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import statistics
import sys
import sysconfig
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from language_model import KERNELS, Config, LanguageModel, save
from tfla_lab.record import describe_machine
from torch import Tensor, nn
from tqdm import tqdm


class Size(NamedTuple):
    """A model's size, and how it is trained unless the command line says otherwise."""

    shape: dict[str, int]  # fields of Config
    batch: int
    context: int
    learning_rate: float


SIZES = {
    "tiny": Size({"d_model": 64, "layers": 2, "heads": 2, "d_ff": 128}, 8, 128, 4e-3),
    "small": Size({"d_model": 256, "layers": 2, "heads": 4, "d_ff": 256}, 32, 1024, 2e-3),  # 2 MB in 16 bits
    "base": Size({"d_model": 512, "layers": 8, "heads": 4, "d_ff": 1408}, 16, 2048, 1e-3),
}
VALIDATION_SHARE = 0.05  # of the files
VALIDATION_WINDOWS = 64


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a model is trained: `steps` batches of `batch` windows of `context` bytes."""

    steps: int
    batch: int
    context: int
    learning_rate: float
    weight_decay: float = 0.1
    clip: float = 0.5
    seed: int = 0

    def __post_init__(self):
        for name in ("steps", "batch", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        for name in ("learning_rate", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")
        if self.seed < 0:
            raise ValueError(f"seed must be >= 0, got {self.seed}")


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------
class Data(NamedTuple):
    train: Tensor  # uint8, every file behind a zero byte
    validation: Tensor
    description: dict


def text_files(folder: Path | None) -> dict[str, bytes]:
    """{relative path: bytes}, sorted, of a folder's text files: those without a zero byte, hidden ones left out.

    None is the Python standard library: *.py, without the packages that are installed beside it.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if folder is None else folder
    if not root.is_dir():
        raise ValueError(f"data must be a folder of text, got {root}")
    files = {}
    for path in root.rglob("*.py" if folder is None else "*"):
        parts = path.relative_to(root).parts
        hidden = any(part.startswith(".") or part in ("site-packages", "dist-packages") for part in parts)
        if path.is_file() and not hidden:
            text = path.read_bytes()
            if text and b"\0" not in text:
                files["/".join(parts)] = text
    return dict(sorted(files.items()))


def split_files(names: list[str]) -> tuple[list[str], list[str]]:
    """(train, validation): a hash of its path decides for each file, whatever other files there are.

    Only if that chooses none of a few files, the one with the smallest hash is for validation.
    """
    place = {name: int(hashlib.sha256(name.encode()).hexdigest()[:12], 16) / 16**12 for name in names}
    chosen = {name for name in names if place[name] < VALIDATION_SHARE} or {min(names, key=place.get)}
    return [name for name in names if name not in chosen], [name for name in names if name in chosen]


def load_data(folder: Path | None, context: int, device: str | torch.device) -> Data:
    """Raises ValueError if there is no such folder, or too little text for windows of `context` bytes in each part."""
    files = text_files(folder)
    if len(files) < 2:
        raise ValueError(f"data must have at least 2 files of text, one to validate on, got {len(files)} in {folder}")
    source = "the Python standard library" if folder is None else folder.name
    parts, description = [], {"source": source}
    for part, names in zip(("train", "validation"), split_files(list(files)), strict=True):
        text = b"".join(b"\0" + files[name] for name in names)  # a zero byte says that a file begins
        if len(text) <= context:
            raise ValueError(f"data has {len(text)} bytes for {part}, too few for a context of {context}")
        checksum = hashlib.sha256(text).hexdigest()[:16]
        description[part] = {"files": len(names), "bytes": len(text), "sha256": checksum}
        parts.append(torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device))
    return Data(*parts, description)


def windows(text: Tensor, starts: Tensor, context: int) -> Tensor:
    """(len(starts), context + 1) tokens, int64: each window, and the byte behind it."""
    return text[starts[:, None] + torch.arange(context + 1, device=text.device)].long()


def batch_of_step(text: Tensor, recipe: Recipe, step: int) -> Tensor:
    """The random windows of a step: the seed and the step alone choose them, so that a resumed run gets the same."""
    rng = np.random.default_rng([recipe.seed, step])
    starts = torch.from_numpy(rng.integers(0, len(text) - recipe.context, recipe.batch))
    return windows(text, starts.to(text.device, non_blocking=True), recipe.context)


def validation_starts(text: Tensor, context: int) -> Tensor:
    """Where the validation windows begin: at most 64, spread over the text; no byte is predicted twice."""
    places = (len(text) - 1) // context
    count = min(VALIDATION_WINDOWS, places)
    return torch.arange(count, device=text.device) * places // count * context


# ---------------------------------------------------------------------------------------------------------------------
# Recipe
# ---------------------------------------------------------------------------------------------------------------------
def learning_rate(step: int, steps: int, peak: float) -> float:
    """The learning rate of a step (from 0): up to the peak, along a cosine to a tenth of it, straight down to 0."""
    warm_up, cooldown = min(750, math.ceil(steps / 20)), min(1000, steps // 10)
    if step < warm_up:
        return peak * (step + 1) / warm_up
    if step >= steps - cooldown:
        return 0.1 * peak * (steps - step) / (cooldown + 1)
    progress = (step - warm_up) / max(1, steps - cooldown - warm_up)
    return peak * (0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2)


def make_optimizer(model: LanguageModel, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; the weights of linear layers decay, embeddings, biases and norms do not."""
    linear = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    others = [x for x in model.parameters() if all(x is not weight for weight in linear)]
    groups = [{"params": linear, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8, fused=linear[0].is_cuda)


def cross_entropy(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean of -log p, in nats, over the bytes tokens[:, 1:], each predicted from those before it: a scalar."""
    with torch.autocast("cuda", torch.bfloat16) if tokens.is_cuda else contextlib.nullcontext():
        logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


@torch.no_grad()
def validate(model: nn.Module, text: Tensor, recipe: Recipe) -> float:
    """Bits per byte over the validation windows."""
    starts = validation_starts(text, recipe.context)
    parts = starts.split(recipe.batch)
    nats = [cross_entropy(model, windows(text, part, recipe.context)) * len(part) for part in parts]
    return torch.stack(nats).sum().item() / len(starts) / math.log(2)


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------
def train(
    config: Config,
    recipe: Recipe,
    output: str | Path,
    *,
    data: str | Path | None = None,
    resume: bool = False,
    compile: bool = False,
    device: str | None = None,
    log_every: int | None = None,
    validate_every: int | None = None,
    save_every: int | None = None,
) -> dict:
    """Trains a model and returns what result.json says; see the top of this file.

    Args:
        output: a folder, made if it is not there.
        data: a folder of text; None is the Python standard library.
        resume: go on from the folder's checkpoint, if there is one. Bit for bit the same as a run that was never
            stopped, where the device's operations are deterministic (attention's backward pass on a GPU is not).
        compile: train through torch.compile.
        device: "cuda" or "cpu"; None is a GPU where there is one.
        log_every, validate_every, save_every: steps; None is a 200th, a 20th and a 10th of all.

    Raises:
        ValueError: for data that is missing or too small, or an output folder whose checkpoint is of another run.
        FloatingPointError: if the loss is no longer finite.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    output, steps = Path(output), recipe.steps
    for name, every in (("log_every", log_every), ("validate_every", validate_every), ("save_every", save_every)):
        if every is not None and every < 1:
            raise ValueError(f"{name} must be >= 1, got {every}")
    log_every, validate_every, save_every = (
        given or math.ceil(steps / share) for given, share in ((log_every, 200), (validate_every, 20), (save_every, 10))
    )
    text = load_data(None if data is None else Path(data), recipe.context, device)
    model = LanguageModel(config, seed=recipe.seed).to(device)
    optimizer = make_optimizer(model, recipe)
    run = {"config": dataclasses.asdict(config), "recipe": dataclasses.asdict(recipe), "data": text.description}
    history = {"curve": [], "validation": [], "norms": [], "tokens_per_s": [], "seconds": 0.0}
    checkpoint, first = output / "checkpoint.pt", 0
    if checkpoint.exists():
        if not resume:
            raise ValueError(f"output must be a new folder, or resume must be given: {checkpoint} exists")
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        different = [name for name in run if saved["run"][name] != run[name]]
        if different:
            raise ValueError(f"output holds the checkpoint of another run: its {', '.join(different)} differ")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        history, first = saved["history"], saved["step"]
    output.mkdir(parents=True, exist_ok=True)
    trained = torch.compile(model) if compile else model
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()

    pending: list[Tensor] = []  # (loss, norm) of the steps since the last log: looking at each would stop the GPU
    tokens_of_step, began, start, start_step = recipe.batch * recipe.context, time.monotonic(), time.monotonic(), first
    bar = tqdm(total=steps, initial=first, unit="step", disable=None)
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, recipe.learning_rate)
        loss = cross_entropy(trained, batch_of_step(text.train, recipe, step))
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        pending.append(torch.stack([loss.detach(), norm]))

        done = step + 1
        log, check, keep = (done == steps or done % every == 0 for every in (log_every, validate_every, save_every))
        if not (log or check or keep):
            continue
        losses, norms = torch.stack(pending).T.tolist()  # waits for the GPU
        speed = (done - start_step) * tokens_of_step / (time.monotonic() - start)
        pending.clear()
        if not all(math.isfinite(x) for x in losses):
            raise FloatingPointError(f"the loss is not finite in the {len(losses)} steps before step {done}")
        history["curve"].append([done, done * tokens_of_step, round(statistics.fmean(losses) / math.log(2), 5)])
        history["norms"] += norms
        history["tokens_per_s"].append(speed)
        bar.set_postfix_str(f"{history['curve'][-1][2]:.3f} bits per byte, {speed:,.0f} tokens/s", refresh=False)
        bar.update(done - bar.n)
        if check:
            history["validation"].append([done, round(validate(trained, text.validation, recipe), 5)])
        if keep:
            seconds = history["seconds"] + time.monotonic() - began
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": done, "run": run}
            torch.save(state | {"history": history | {"seconds": seconds}}, unfinished := f"{checkpoint}.unfinished")
            os.replace(unfinished, checkpoint)  # a kill leaves the old one or the new one, nothing between
        start, start_step = time.monotonic(), done
    bar.close()

    save(model, output / "model.safetensors")
    speeds = history["tokens_per_s"]
    result = describe_machine() | run
    result |= {
        "parameters": sum(x.numel() for x in model.parameters()),
        "tokens": steps * tokens_of_step,
        "bits_per_byte": history["validation"][-1][1],
        "tokens_per_s": round(statistics.median(speeds[1:] or speeds)),  # without what is compiled at the start
        "seconds": round(history["seconds"] + time.monotonic() - began, 1),
        "peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3) if device.type == "cuda" else None,
        "compiled": compile,
        "gradient_norm": {"max": max(history["norms"]), "median": statistics.median(history["norms"])},
        "curve": history["curve"],
        "validation": history["validation"],
    }
    (output / "result.json").write_text(json.dumps(result) + "\n")
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--kernel", choices=KERNELS, default="exp", help="what mixes the steps (default: %(default)s)")
    add("--size", choices=SIZES, default="tiny", help="(default: %(default)s)")
    add("--steps", type=int, required=True, help="batches to train on")
    add("--output", type=Path, required=True, metavar="FOLDER", help="where checkpoint, weights and result go")
    add("--data", type=Path, metavar="FOLDER", help="text to train on (default: the Python standard library)")
    add("--seed", type=int, default=0, help="of the weights and the batches (default: %(default)s)")
    add("--batch", type=int, help="windows in a batch (default: the size's)")
    add("--context", type=int, help="bytes in a window (default: the size's)")
    add("--learning-rate", type=float, help="at the peak (default: the size's)")
    add("--device", choices=["cpu", "cuda"], help="default: a GPU where there is one")
    add("--resume", action="store_true", help="go on from the checkpoint in the output folder")
    add("--compile", action="store_true", help="train through torch.compile")
    add("--log-every", type=int, metavar="STEPS", help="default: a 200th of all steps")
    add("--validate-every", type=int, metavar="STEPS", help="default: a 20th")
    add("--save-every", type=int, metavar="STEPS", help="default: a 10th")
    add("--no-head-norm", action="store_true", help="no norm after the cell (exp and sig)")
    add("--assume-norm", action="store_true", help="leave out the normalizer's gradient (exp)")
    add("--input-gate-bias", type=float, default=-10.0, help="where input gates start (default: %(default)s)")
    add("--layers", type=int, help="(default: the size's)")
    arguments = parser.parse_args(argv)
    size = SIZES[arguments.size]
    if arguments.size == "tiny":
        torch.set_num_threads(1)  # matrices this small gain nothing from more, and lose much on a busy machine
    shape = size.shape | ({} if arguments.layers is None else {"layers": arguments.layers})
    given = {name: getattr(arguments, name) for name in ("batch", "context", "learning_rate")}
    options = {name: getattr(size, name) if value is None else value for name, value in given.items()}
    names = ("data", "resume", "compile", "device", "log_every", "validate_every", "save_every")
    try:
        config = Config(
            arguments.kernel,
            **shape,
            head_norm=not arguments.no_head_norm,
            assume_norm=arguments.assume_norm,
            input_gate_bias=arguments.input_gate_bias,
        )
        recipe = Recipe(arguments.steps, **options, seed=arguments.seed)
        result = train(config, recipe, arguments.output, **{name: getattr(arguments, name) for name in names})
    except ValueError as error:
        parser.error(str(error))
    print(
        f"{result['parameters']:,} parameters, {result['tokens']:,} tokens, {result['tokens_per_s']:,} tokens/s: "
        f"{result['bits_per_byte']:.4f} bits per byte on {result['data']['validation']['files']} files not trained on"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
