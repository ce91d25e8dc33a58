"""Stage 05, language_model.py and train_lm.py: the model is causal and generates what one pass gives; a run learns,
goes on after a kill with the same bits, and validates on files that it never trained on."""

import dataclasses
import json
import math
import random

import language_model
import pytest
import torch
import train_lm
from language_model import Config, LanguageModel, load, save
from properties import DEVICE
from tfla_lab import lm_report
from torch import nn
from train_lm import Recipe, learning_rate, load_data, split_files, text_files, train

KERNELS = language_model.KERNELS
TINY = {"d_model": 32, "layers": 2, "heads": 2, "d_ff": 48}
WORDS = ["tile", "chunk", "state", "gate", "head", "norm", "query", "value"]


def make(kernel: str, dtype: torch.dtype = torch.float64, **options) -> LanguageModel:
    """A model whose input gates are open enough for every step to be heard."""
    return LanguageModel(Config(kernel, **TINY | {"input_gate_bias": -1.0} | options), seed=1).to(DEVICE, dtype)


def random_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)


@pytest.fixture
def text_folder(tmp_path):
    """Twelve files of random words: a word's first letter is a surprise, the rest of it is not."""
    rng, folder = random.Random(0), tmp_path / "text"
    for number in range(12):
        path = folder / f"part{number % 2}" / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(" ".join(rng.choice(WORDS) for _ in range(300)))
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kernel", KERNELS)
def test_decoding_equals_one_pass(kernel, dtype):
    """A prompt of 70 bytes, more than a chunk, then ten steps: for two sequences at once."""
    model, tokens = make(kernel, dtype), random_tokens(2, 80)
    whole = model(tokens).detach()
    logits, state = model.prefill(tokens[:, :70])
    steps = [logits]
    for t in range(70, 80):
        logits, state = model.step(tokens[:, t], state)
        steps.append(logits)
    error = (torch.stack(steps, dim=1) - whole[:, 69:]).norm() / whole[:, 69:].norm()
    assert error < (1e-10 if dtype == torch.float64 else 1e-4)
    assert whole.dtype == logits.dtype == dtype


@pytest.mark.parametrize("kernel", ["exp", "sig"])
def test_triton_and_the_reference_give_the_same(kernel, monkeypatch):
    """Prefill and one step of a model in float32; without a GPU, in Triton's interpreter."""
    pytest.importorskip("triton", reason="Triton has no wheels for this system")
    model, tokens, results = make(kernel, torch.float32, heads=1), random_tokens(2, 21), []
    for triton in (False, True):
        monkeypatch.setattr(language_model, "use_triton", lambda *_, triton=triton: triton)
        logits, state = model.prefill(tokens[:, :20])
        results.append((logits, *model.step(tokens[:, 20], state)))
    (prefill, step, state), (triton_prefill, triton_step, triton_state) = results
    torch.testing.assert_close(triton_prefill, prefill, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(triton_step, step, rtol=1e-3, atol=1e-5)
    assert [[x.shape for x in layer] for layer in triton_state] == [[x.shape for x in layer] for layer in state]


def test_attention_knows_distances_alone():
    """Rotated queries and keys: their product depends on how many steps lie between them, not on where they are."""
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def product(step_q: int, step_k: int) -> float:
        rotated = []
        for x, step in ((q, step_q), (k, step_k)):
            cos, sin = language_model.rotary_table(step, step + 1, 16, x)
            rotated.append(x * cos + x.roll(8, dims=-1) * sin)
        return (rotated[0] * rotated[1]).sum().item()

    assert product(0, 0) == pytest.approx((q * k).sum().item(), rel=1e-12)
    assert product(9, 4) == pytest.approx(product(1005, 1000), rel=1e-10)
    assert product(9, 4) != pytest.approx(product(4, 9), rel=1e-3)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_past_matters_and_the_future_does_not(kernel):
    model, tokens = make(kernel), random_tokens(1, 40)
    changed = tokens.clone()
    changed[0, 17] ^= 1
    difference = (model(tokens) - model(changed)).abs().amax(dim=-1)[0]
    assert (difference[:17] == 0).all()
    assert (difference[17:] > 0).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_order_of_the_past_matters(kernel):
    """In one layer: by the forget gates of the mLSTM, by the positions of attention."""
    model, tokens = make(kernel, layers=1), random_tokens(1, 20)
    swapped = tokens[:, [1, 0, *range(2, 20)]]
    assert (model(tokens)[0, -1] - model(swapped)[0, -1]).abs().max() > 1e-9


@pytest.mark.parametrize("kernel", KERNELS)
def test_memory_of_the_state(kernel, monkeypatch):
    """That of the mLSTM is what it was, that of attention grows, in steps."""
    monkeypatch.setattr(language_model, "CACHE_STEP", 8)
    model, tokens, sizes = make(kernel, torch.float32), random_tokens(3, 30), []
    _, state = model.prefill(tokens[:, :10])
    for t in range(10, 30):
        _, state = model.step(tokens[:, t], state)
        sizes.append(lm_report.state_bytes(state) // (4 * 3 * 2 * 2))  # bytes, sequences, layers, heads
    d_qk, d_hv = model.config.d_qk, model.config.d_hv
    if kernel == "attention":
        assert sizes == [2 * d_hv * rows for rows in [18] * 8 + [26] * 8 + [34] * 4]
    else:
        assert set(sizes) == {d_qk * d_hv + (d_qk + 1 if kernel == "exp" else 0)}


@pytest.mark.parametrize("kernel", ["exp", "sig"])
def test_a_state_can_be_continued_twice(kernel):
    model, tokens = make(kernel, torch.float32), random_tokens(1, 20)
    _, state = model.prefill(tokens)
    first, _ = model.step(tokens[:, 3], state)
    model.step(tokens[:, 4], state)
    again, _ = model.step(tokens[:, 3], state)
    assert torch.equal(first, again)


def test_parameters_are_equal():
    shape = train_lm.SIZES["base"].shape
    counts = [sum(x.numel() for x in LanguageModel(Config(kernel, **shape)).parameters()) for kernel in KERNELS]
    assert min(counts) > 20_000_000
    assert max(counts) < 1.01 * min(counts)


@pytest.mark.parametrize("kernel", KERNELS)
def test_weights_come_from_the_seed(kernel):
    config = Config(kernel, **TINY)
    first, same, other = (LanguageModel(config, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.isfinite(x).all() for x in first.values())
    assert all(torch.equal(x, same[name]) for name, x in first.items())
    assert any(not torch.equal(x, other[name]) for name, x in first.items())


def test_gates():
    """They start where the configuration says, are capped, and stay float32 when everything else has 16 bits."""
    model, tokens = make("exp", torch.float32, input_gate_bias=-10.0), random_tokens(2, 50)
    bias = model.blocks[0].mixer.gates.bias.detach()
    assert bias.tolist() == [-10, -10, 3, 6]
    q, k, v, i, f = model.cell_inputs(tokens, 1)
    assert q.shape == k.shape == (2, 2, 50, 8)
    assert v.shape == (2, 2, 50, 16)
    assert i.shape == f.shape == (2, 2, 50)
    assert (i < -5).all()
    assert (f[:, 0].mean() - 15 * math.tanh(3 / 15)).abs() < 0.5
    model.blocks[1].mixer.gates.weight.data *= 1e4
    *_, i, f = model.cell_inputs(tokens, 1)
    assert 14 < max(i.abs().max(), f.abs().max()) <= 15
    q, _, _, i, f = model.to(torch.bfloat16).cell_inputs(tokens, 0)
    assert (q.dtype, i.dtype, f.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        q, _, _, i, f = make("exp", torch.float32).cell_inputs(tokens, 1)
    assert (q.dtype, i.dtype, f.dtype) == (torch.bfloat16, torch.float32, torch.float32)


def test_cell_inputs_are_what_the_cell_gets(monkeypatch):
    model, tokens, seen = make("sig"), random_tokens(1, 30), []

    def cell(config, *arguments):
        seen.append(arguments[:5])
        return original(config, *arguments)

    original = language_model.cell
    monkeypatch.setattr(language_model, "cell", cell)
    model(tokens)
    for layer in range(2):
        assert all(torch.equal(x, y) for x, y in zip(model.cell_inputs(tokens, layer), seen[layer], strict=True))
        q, k, v, *_ = seen[layer]
        assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()


@pytest.mark.parametrize("kernel", KERNELS)
def test_generate(kernel):
    model = make(kernel, torch.float32)
    greedy = model.generate(b"some", 6, temperature=0)
    assert len(greedy) == 6
    for n in range(6):  # each byte is the likeliest after those before it
        tokens = torch.tensor([list(b"some" + greedy[:n])], device=DEVICE)
        assert model(tokens)[0, -1].argmax() == greedy[n]
    assert model.generate(b"some", 6, seed=3) == model.generate(b"some", 6, seed=3)
    assert model.generate(b"some", 6, seed=3) != model.generate(b"some", 6, seed=4)
    assert model.generate(b"some", 0) == b""
    assert len(model.generate(b"s", 2)) == 2


@pytest.mark.parametrize("kernel", KERNELS)
def test_save_and_load(kernel, tmp_path):
    model, path, tokens = make(kernel, torch.float32, eps=1e-5), tmp_path / "model.safetensors", random_tokens(1, 20)
    save(model, path)
    same = load(path, DEVICE)
    assert same.config == model.config
    assert torch.equal(same(tokens), model(tokens))
    save(model, path, torch.bfloat16)
    rounded = load(path, DEVICE, torch.float32)
    assert all(torch.equal(x.bfloat16().float(), y) for x, y in zip(model.parameters(), rounded.parameters()))  # noqa: B905
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_the_small_model_has_less_than_two_megabytes(tmp_path):
    for kernel in KERNELS:
        save(LanguageModel(Config(kernel, **train_lm.SIZES["small"].shape)), tmp_path / "small", torch.bfloat16)
        assert (tmp_path / "small").stat().st_size < 2_000_000


def test_load_names_what_is_wrong(tmp_path):
    from safetensors.torch import save_file

    good, bad = tmp_path / "good", tmp_path / "bad"
    model = make("exp", torch.float32)
    save(model, good)
    tensors = {name: x.cpu().contiguous() for name, x in model.state_dict().items()}
    config = dataclasses.asdict(model.config)

    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message) as caught:
            load(bad)
        assert str(bad) in str(caught.value)

    bad.write_bytes(good.read_bytes()[:-100])
    refused("not a whole safetensors file")
    save_file(tensors, bad)
    refused("metadata have no 'config'")
    save_file(tensors, bad, {"config": json.dumps(config | {"kernel": "gla"})})
    refused("kernel must be one of exp, sig, attention, got 'gla'")
    save_file(tensors, bad, {"config": json.dumps(config | {"width": 3})})
    refused("width")
    save_file(tensors, bad, {"config": json.dumps(config | {"kernel": "attention"})})
    refused("do not fit its configuration.*gates")
    save_file(tensors, bad, {"config": json.dumps(config | {"d_ff": 40})})
    refused("do not fit its configuration.*feed_forward")
    save_file(tensors | {"norm.weight": torch.full((32,), torch.nan)}, bad, {"config": json.dumps(config)})
    refused("not finite: norm.weight")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": "linear"}, "kernel must be one of"),
        ({"layers": 0}, "layers must be a whole number >= 1, got 0"),
        ({"d_ff": 1.5}, "d_ff must be a whole number"),
        ({"d_model": 100, "heads": 8}, "d_model must be a multiple of 2 \\* heads = 16"),
        ({"gate_soft_cap": 0.0}, "gate_soft_cap must be > 0"),
        ({"eps": math.nan}, "eps must be > 0"),
        ({"kernel": "sig", "assume_norm": True}, "assume_norm is for kernel 'exp'"),
        ({"kernel": "attention", "head_norm": False}, "head_norm must be True"),
    ],
)
def test_bad_configurations_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Config(**options)


def test_bad_calls_are_refused():
    model, tokens = make("exp"), random_tokens(1, 4)
    for bad in (tokens[0], tokens[:, :0], tokens.float()):
        with pytest.raises(ValueError, match="tokens must be int64 or int32 of shape"):
            model(bad)
    with pytest.raises(ValueError, match="token must have shape"):
        model.step(tokens, model.prefill(tokens)[1])
    with pytest.raises(ValueError, match="prompt"):
        model.generate(b"", 3)
    with pytest.raises(ValueError, match="temperature must be >= 0"):
        model.generate(b"a", 3, temperature=-1.0)
    with pytest.raises(ValueError, match=r"layer must be in 0 \.\. 1, got 2"):
        model.cell_inputs(tokens, 2)
    with pytest.raises(ValueError, match="attention has no gates"):
        make("attention").cell_inputs(tokens, 0)
    attention = make("attention")
    _, state = attention.prefill(random_tokens(1, 4))
    with pytest.raises(ValueError, match="one step each where a state of attention is given, got 2 steps"):
        attention.stream(random_tokens(1, 2), state)


@pytest.mark.parametrize("head_norm", [True, False])
def test_the_shortcut_is_the_exact_gradient_only_before_a_norm(head_norm):
    """Open input gates: the normalizer is at work. In Triton's interpreter where there is no GPU."""
    pytest.importorskip("triton", reason="Triton has no wheels for this system")
    tokens, gradients = random_tokens(1, 24), []
    for assume_norm in (False, True):
        options = {"head_norm": head_norm, "assume_norm": assume_norm, "input_gate_bias": 2.0, "eps": 1e-12}
        model = make("exp", torch.float32, layers=1, heads=1, **options)
        model(tokens).square().sum().backward()
        gradients.append(model.blocks[0].mixer.projection.weight.grad)
    error = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
    assert error < 1e-3 if head_norm else error > 1e-2


@pytest.mark.parametrize("kernel", KERNELS)
def test_compiles_into_one_graph(kernel, monkeypatch):
    """With the Triton kernels, on a CPU in the interpreter."""
    pytest.importorskip("triton", reason="Triton has no wheels for this system")
    monkeypatch.setattr(language_model, "use_triton", lambda *_: True)
    model, tokens = make(kernel, torch.float32, layers=1, heads=1), random_tokens(1, 20)
    expected = model(tokens)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    actual = compiled(tokens)
    torch.testing.assert_close(actual, expected)
    actual.square().mean().backward()
    assert all(torch.isfinite(x.grad).all() for x in model.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------
def entropy(text: bytes) -> float:
    """Bits per byte for who knows only how frequent each byte is."""
    shares = [text.count(byte) / len(text) for byte in set(text)]
    return -sum(share * math.log2(share) for share in shares)


@pytest.mark.parametrize("kernel", KERNELS)
def test_learns(kernel, text_folder, tmp_path):
    recipe = Recipe(steps=80, batch=8, context=64, learning_rate=1e-2)
    result = train(Config(kernel, **TINY), recipe, tmp_path / "run", data=text_folder)
    unigram = entropy(b"".join(text_files(text_folder).values()))
    assert result["curve"][0][2] == pytest.approx(8, abs=0.2)  # an untrained model thinks all bytes equally likely
    assert result["bits_per_byte"] < 0.6 * unigram
    assert result["curve"][-1][2] == pytest.approx(result["bits_per_byte"], abs=0.2)
    assert result["tokens"] == 80 * 8 * 64 == result["curve"][-1][1]
    assert [step for step, _ in result["validation"]] == list(range(4, 81, 4))
    assert result["gradient_norm"]["max"] >= result["gradient_norm"]["median"] > 0
    saved = (tmp_path / "run" / "result.json").read_text()
    assert json.loads(saved) == result
    assert len(saved) < 60_000
    assert load(tmp_path / "run" / "model.safetensors").config == Config(kernel, **TINY)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_resumed_run_ends_like_one_that_was_never_stopped(kernel, text_folder, tmp_path, monkeypatch):
    recipe = Recipe(steps=8, batch=2, context=32, learning_rate=1e-2, seed=5)
    options = {"data": text_folder, "save_every": 3, "validate_every": 4}
    config = Config(kernel, **TINY)
    whole = train(config, recipe, tmp_path / "whole", **options)

    class Killed(BaseException):
        pass

    def killed_at(last: int):
        def batch_of_step(text, recipe, step):
            if step == last:
                raise Killed
            return original(text, recipe, step)

        return batch_of_step

    original = train_lm.batch_of_step
    for last in (1, 5, 7):  # before the first checkpoint, between two, behind the last before the end
        monkeypatch.setattr(train_lm, "batch_of_step", killed_at(last))
        with pytest.raises(Killed):
            train(config, recipe, tmp_path / "parts", **options, resume=True)
    monkeypatch.setattr(train_lm, "batch_of_step", original)
    parts = train(config, recipe, tmp_path / "parts", **options, resume=True)
    again = train(config, recipe, tmp_path / "parts", **options, resume=True)  # nothing is left to do

    if kernel == "attention" and DEVICE == "cuda":  # its backward pass adds in any order there
        assert parts["bits_per_byte"] == pytest.approx(whole["bits_per_byte"], rel=1e-2)
        return
    for key in ("curve", "validation", "gradient_norm"):
        assert parts[key] == whole[key] == again[key]
    expected, actual = (load(tmp_path / run / "model.safetensors").state_dict() for run in ("whole", "parts"))
    assert all(torch.equal(x, actual[name]) for name, x in expected.items())


def test_a_checkpoint_of_another_run_is_refused(text_folder, tmp_path):
    config, recipe = Config("attention", **TINY), Recipe(steps=1, batch=1, context=16, learning_rate=1e-2)
    train(config, recipe, tmp_path / "run", data=text_folder)
    with pytest.raises(ValueError, match="resume must be given"):
        train(config, recipe, tmp_path / "run", data=text_folder)
    other = dataclasses.replace(recipe, seed=1)
    with pytest.raises(ValueError, match="another run: its recipe differ"):
        train(config, other, tmp_path / "run", data=text_folder, resume=True)
    (text_folder / "part0" / "0.txt").write_text("other words, and enough of them")
    with pytest.raises(ValueError, match="another run: its data differ"):
        train(config, recipe, tmp_path / "run", data=text_folder, resume=True)


@pytest.mark.parametrize("name", ["log_every", "validate_every", "save_every"])
def test_intervals_are_at_least_one_step(name, text_folder, tmp_path):
    recipe = Recipe(steps=2, batch=1, context=16, learning_rate=1e-3)
    with pytest.raises(ValueError, match=f"{name} must be >= 1, got 0"):
        train(Config(**TINY), recipe, tmp_path / "run", data=text_folder, **{name: 0})


def test_a_loss_that_is_not_finite_ends_the_run(text_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(LanguageModel, "logits", lambda self, x: self.norm(x).repeat(1, 1, 8) * math.nan)
    with pytest.raises(FloatingPointError, match="not finite"):
        train(Config("attention", **TINY), Recipe(2, 1, 16, learning_rate=1e-2), tmp_path / "run", data=text_folder)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_learning_rate():
    """Up to the peak, down to a tenth of it, and nearly to 0; a step differs little from the next."""
    for steps in (1, 2, 7, 40, 4000, 100_000):
        rates = [learning_rate(step, steps, 1.0) for step in range(steps)]
        assert max(rates) == 1.0
        assert min(rates) > 0
        warm_up, cooldown = min(750, math.ceil(steps / 20)), min(1000, steps // 10)
        assert rates.index(1.0) == warm_up - 1
        assert rates[:warm_up] == sorted(rates[:warm_up])
        assert rates[warm_up - 1 :] == sorted(rates[warm_up - 1 :], reverse=True)
        if cooldown > 1:
            assert rates[steps - cooldown - 1] == pytest.approx(0.1, rel=5e-2)
            assert rates[-1] == pytest.approx(0.1 / (cooldown + 1))
    rates = [learning_rate(step, 100_000, 1.0) for step in range(100_000)]
    assert rates[374] == pytest.approx(0.5)  # the paper's 750 steps
    assert rates[-500] == pytest.approx(0.05, rel=2e-3)  # and 1000 steps
    assert rates[(750 + 99_000) // 2] == pytest.approx(0.55)


@pytest.mark.parametrize("kernel", KERNELS)
def test_only_linear_weights_decay(kernel):
    model = make(kernel, torch.float32)
    optimizer = train_lm.make_optimizer(model, Recipe(1, 1, 1, learning_rate=1.0, weight_decay=0.3))
    decay = {id(x): group["weight_decay"] for group in optimizer.param_groups for x in group["params"]}
    linear = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    assert decay == {id(x): 0.3 if id(x) in linear else 0.0 for x in model.parameters()}
    assert id(model.embedding.weight) not in linear
    assert all(group["betas"] == (0.9, 0.95) for group in optimizer.param_groups)


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------
def test_no_file_is_in_both_parts(text_folder):
    names = list(text_files(None))
    assert len(names) > 500
    assert not any("-packages" in name for name in names)
    train_names, validation_names = split_files(names)
    assert not set(train_names) & set(validation_names)
    assert sorted(train_names + validation_names) == names
    assert 0.02 < len(validation_names) / len(names) < 0.08
    # A file stays where it is when others come or go.
    half = split_files(names[::2])[1]
    assert set(half) == set(validation_names) & set(names[::2])
    # Of a few files, one.
    data = load_data(text_folder, 16, "cpu")
    files = text_files(text_folder)
    assert data.description["validation"]["files"] == 1
    assert data.description["train"]["files"] == 11
    (name,) = split_files(list(files))[1]
    assert bytes(data.validation.tolist()) == b"\0" + files[name]
    assert files[name] not in bytes(data.train.tolist())


def test_text_files_are_text(text_folder):
    (text_folder / ".hidden").write_text("no")
    (text_folder / "picture.png").write_bytes(b"\x89PNG\0\0")
    (text_folder / "empty.txt").write_text("")
    (text_folder / "latin.txt").write_bytes(b"caf\xe9")
    files = text_files(text_folder)
    assert files["latin.txt"] == b"caf\xe9"
    assert len(files) == 13
    assert list(files) == sorted(files)


def test_batches(text_folder):
    text = load_data(text_folder, 32, "cpu").train
    recipe = Recipe(steps=9, batch=4, context=32, learning_rate=1.0)
    batch = train_lm.batch_of_step(text, recipe, 3)
    assert batch.shape == (4, 33)
    whole = bytes(text.tolist())
    assert all(bytes(row.tolist()) in whole for row in batch)
    assert torch.equal(batch, train_lm.batch_of_step(text, recipe, 3))
    assert not torch.equal(batch, train_lm.batch_of_step(text, recipe, 4))
    assert not torch.equal(batch, train_lm.batch_of_step(text, dataclasses.replace(recipe, seed=1), 3))
    shortest = train_lm.batch_of_step(text[:33], recipe, 0)  # there is one window
    assert torch.equal(shortest, text[:33].long().expand(4, -1))


@pytest.mark.parametrize("size", [17, 18, 100, 16 * 64, 16 * 64 + 1, 5000])
def test_validation_windows_do_not_overlap(size):
    text = torch.zeros(size, dtype=torch.uint8)
    starts = train_lm.validation_starts(text, 16)
    assert len(starts) == min(64, (size - 1) // 16)
    assert starts[0] == 0
    assert (starts.diff() >= 16).all()
    assert starts[-1] + 16 < size
    assert train_lm.windows(text, starts, 16).shape == (len(starts), 17)


def test_validation_is_the_mean_over_all_windows(text_folder):
    """Also where the last batch of them is smaller."""
    text = load_data(text_folder, 64, DEVICE).validation
    model, starts = make("attention", torch.float32), train_lm.validation_starts(text, 64)
    recipe = Recipe(steps=1, batch=7, context=64, learning_rate=1.0)
    assert len(starts) % 7
    tokens = train_lm.windows(text, starts, 64)
    shares = torch.softmax(model(tokens[:, :-1]), dim=-1).gather(-1, tokens[:, 1:, None])  # of the byte that follows
    expected = -shares.log2().mean().item()
    assert train_lm.validate(model, text, recipe) == pytest.approx(expected, rel=1e-3 if DEVICE == "cuda" else 1e-5)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "data must be a folder of text"),
        ({"one.txt": "a" * 99}, "data must have at least 2 files"),
        ({"one.txt": "a" * 99, "two.txt": "b"}, "bytes for (train|validation), too few for a context of 16"),
    ],
)
def test_bad_data_are_refused(files, message, tmp_path):
    folder = tmp_path / "text"
    if files:
        folder.mkdir()
    for name, text in (files or {}).items():
        (folder / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_data(folder, 16, "cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be >= 1"),
        ({"batch": 0}, "batch must be >= 1"),
        ({"context": -1}, "context must be >= 1"),
        ({"learning_rate": math.nan}, "learning_rate must be > 0"),
        ({"clip": 0.0}, "clip must be > 0"),
        ({"seed": -1}, "seed must be >= 0"),
    ],
)
def test_bad_recipes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**{"steps": 1, "batch": 1, "context": 1, "learning_rate": 1.0} | options)


# ---------------------------------------------------------------------------------------------------------------------
# The command line and the report
# ---------------------------------------------------------------------------------------------------------------------
def test_command_line_and_report(text_folder, tmp_path, capsys):
    for kernel in ("exp", "attention"):
        for seed in ("0", "1"):
            arguments = ["--kernel", kernel, "--seed", seed, "--steps", "2", "--layers", "1", "--batch", "2"]
            arguments += ["--context", "32", "--data", str(text_folder), "--output", str(tmp_path / (kernel + seed))]
            assert train_lm.main(arguments) == 0
    assert "bits per byte on 1 files not trained on" in capsys.readouterr().out
    output, figure = tmp_path / "merged.json", tmp_path / "curves.png"
    assert lm_report.main(["runs", str(tmp_path), "--output", str(output), "--figure", str(figure)]) == 0
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 4
    assert "| exp |" in table[2]
    assert "| 2 |" in table[2]
    assert "±" in table[2]
    merged = json.loads(output.read_text())
    assert [run["config"]["kernel"] for run in merged["runs"]] == ["exp", "exp", "attention", "attention"]
    assert [run["recipe"]["seed"] for run in merged["runs"]] == [0, 1, 0, 1]
    assert merged["data"]["train"]["files"] == 11
    assert figure.stat().st_size > 5000

    with pytest.raises(SystemExit):
        train_lm.main([*arguments[:-1], str(tmp_path / "exp0"), "--resume"])
    assert "checkpoint of another run" in capsys.readouterr().err
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "result.json").write_text((tmp_path / "exp0" / "result.json").read_text())
    with pytest.raises(ValueError, match="differ in kernel and seed alone, those of 'exp' do not"):
        lm_report.read_runs(tmp_path)
    with pytest.raises(ValueError, match=r"must hold a result\.json"):
        lm_report.read_runs(text_folder)


def test_generation_is_timed(tmp_path, capsys):
    shape = TINY | {"layers": 1}
    result = lm_report.generation(2, [20, 40], DEVICE, shape)
    states = {(row["kernel"], row["context"]): row["state_bytes"] for row in result["rows"]}
    assert states["exp", 20] == states["exp", 40]
    assert states["sig", 20] == states["sig", 40]
    assert states["attention", 20] < states["attention", 40]
    assert all(row["eager_ms"] > 0 for row in result["rows"])
    assert all(("graph_ms" in row) == (DEVICE == "cuda") for row in result["rows"])
    (tmp_path / "rows.json").write_text(json.dumps(result))
    assert (
        lm_report.main(["generation", "--load", str(tmp_path / "rows.json"), "--figure", str(tmp_path / "figure.png")])
        == 0
    )
    assert "| 20 |" in capsys.readouterr().out
    assert (tmp_path / "figure.png").stat().st_size > 5000
