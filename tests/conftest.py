"""Settings for all tests: where Triton runs, how hard Hypothesis tries, and poisoned memory."""

import os

import hypothesis
import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # Without a GPU the same tests run in Triton's interpreter. It is chosen when Triton is first imported.
    os.environ["TRITON_INTERPRET"] = "1"
# Small tensors on two cores: threads cost more than they bring, and notebooks run beside the tests.
torch.set_num_threads(1)

# Shrinking a failure takes minutes in the interpreter: only "dev" does it.
FAST = [hypothesis.Phase.explicit, hypothesis.Phase.reuse, hypothesis.Phase.generate]
COMMON = {"deadline": None, "print_blob": True, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("dev", max_examples=20, **COMMON)
hypothesis.settings.register_profile("ci", max_examples=20, derandomize=True, phases=FAST, **COMMON)
hypothesis.settings.register_profile("gpu", max_examples=60, derandomize=True, phases=FAST, **COMMON)
default = "gpu" if HAS_GPU else "ci" if os.environ.get("CI") else "dev"
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", default))


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Buffers that torch hands out uninitialized are filled with NaN, so that reading what was never written shows."""

    def poisoned(make):
        def wrapper(*args, **kwargs):
            x = make(*args, **kwargs)
            if x.is_floating_point() and x.device.type != "meta" and not torch.compiler.is_compiling():
                with torch.no_grad():
                    x.fill_(float("nan"))
            return x

        return wrapper

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
