"""What only a CUDA device can show; run with `pytest -m gpu` on a machine that has one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from short_runs import advance, log_of, settings, task_batches
from two_devices import check_two_devices, on_two_devices, shared_recipe, terms_of

from bitdistill.config import load_config
from bitdistill.data import TaskBatches
from bitdistill.quantize import BitLinear
from bitdistill.recipe import train
from bitdistill.schema import Config
from bitdistill.training import Fit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


def test_integer_product_is_exact_on_cuda() -> None:
    """Same integers and trits, so fp32 on the GPU differs from the CPU by the scaling alone."""
    torch.manual_seed(0)
    layer, x = BitLinear(1024, 512), torch.randn(64, 1024)
    expected = layer(x)
    layer.freeze()  # the mean of |W| may round to another bf16 on another device
    actual = layer.cuda()(x.cuda()).cpu()
    torch.testing.assert_close(actual, expected, rtol=3e-7, atol=0.0)


def test_integer_products_against_bfloat16_ones() -> None:
    """In mixed precision: forward exactly what fp32 gives, gradients to the rounding of bf16."""
    torch.manual_seed(0)
    layer, x = BitLinear(256, 128).cuda(), torch.randn(4, 32, 256, device="cuda")
    upstream = torch.randn(4, 32, 128, device="cuda")

    def run(integer: bool, mixed: bool) -> list[torch.Tensor]:
        layer.zero_grad()
        layer.integer = integer
        inputs = x.clone().requires_grad_()
        with torch.autocast("cuda", torch.bfloat16, enabled=mixed):
            y = layer(inputs)
        y.backward(upstream)
        assert layer.weight.grad is not None
        assert inputs.grad is not None
        return [y.detach(), layer.weight.grad.clone(), inputs.grad]

    exact, integer, rounded = run(False, False), run(True, True), run(False, True)
    assert torch.equal(integer[0], exact[0])
    torch.testing.assert_close(rounded[0], exact[0], rtol=2**-8, atol=0.0)
    for mine, reference in zip(integer[1:], exact[1:], strict=True):
        assert float((mine - reference).norm() / reference.norm()) < 2**-7


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("tokens", [1, 16, 17])
def test_integer_products_of_few_rows(tokens: int, compiled: bool) -> None:
    torch.manual_seed(0)
    layer, x = BitLinear(256, 128).cuda(), torch.randn(1, tokens, 256, device="cuda")
    expected = layer(x)
    layer.integer = True
    run = torch.compile(layer) if compiled else layer
    torch.testing.assert_close(run(x), expected, rtol=3e-7, atol=0.0)


def test_compiled_bfloat16_training_learns(tmp_path: Path) -> None:
    """Layers and losses compiled, steps replayed: what `auto` means on CUDA."""
    options = [f"{stage}.steps=40" for stage in ("base", "teacher", "distill")]
    options += ["bitnet_sft.enabled=false", "distill.anneal=0", "machine.pad_multiple=64"]
    train(load_config("tiny", options), tmp_path, quiet=True)
    # forty steps leave the task itself unlearnt (its plateau is longer): a student's cross-entropy
    # stays where its teacher's is, and its relations are what approaches the teacher's
    for stage, term in (("base", "ce"), ("teacher", "ce"), ("student", "relations")):
        losses = [record[term] for record in log_of(tmp_path) if record["stage"] == stage]
        assert losses[-1] < 0.8 * losses[0], stage


@pytest.mark.parametrize(
    ("switch", "multiple"),
    [({}, 8), ({"recompute": True}, 8), ({"compile": True}, 16)],
    ids=["plain", "recompute", "compile"],
)
def test_replayed_steps_equal_launched_ones(
    start: Callable[..., Fit], switch: dict[str, bool], multiple: int
) -> None:
    """In fp32, with two lengths or one, and quantisation that sets in: the same terms.

    Both ways compiled, or neither: compiled sums round otherwise, so that after a few steps some
    activation falls on the other side of a rounding, and relations are a percent apart.
    """
    options = settings(steps=16, learning_rate=1e-4)

    def run(**machine: bool) -> list[dict[str, float]]:
        batches = TaskBatches(task_batches().rows, 0, 4, multiple=multiple)
        fit = start(options, batches, device="cuda", **machine)
        with fit.engine.stream():
            fit.fit_relation_weight()
            if machine.get("compile"):
                fit.objective.compile()
            terms = advance(fit, 16)
        graphs = fit.engine._graphs
        assert graphs is None or any(captured.graph is not None for captured in graphs.values())
        return terms

    plain, replayed = run(graphs=False, **switch), run(graphs=True, **switch)
    for step, (one, two) in enumerate(zip(plain, replayed, strict=True)):
        assert two == pytest.approx(one, rel=1e-2, abs=1e-6), step


@two_gpus
def test_two_gpus_train_as_one(recipe: Callable[..., Config], tmp_path: Path) -> None:
    """In fp32: the same steps at the same global batch, and a state that changes hands."""
    plain = ("device=cuda", "precision=float32", "compile=false")
    options = [f"machine.{option}" for option in plain]
    check_two_devices(shared_recipe(recipe, *options), tmp_path)


@two_gpus
def test_two_gpus_train_as_one_to_bfloat16_noise(
    recipe: Callable[..., Config], tmp_path: Path
) -> None:
    """As users run it: compiled, in mixed precision."""
    config = shared_recipe(recipe, "machine.device=cuda", "pretrain.enabled=false")
    train(config, tmp_path / "one", quiet=True)
    done = on_two_devices(config, tmp_path / "two")
    assert done.returncode == 0, done.stderr[-3000:]
    pairs = zip(terms_of(tmp_path / "one"), terms_of(tmp_path / "two"), strict=True)
    for alone, shared in pairs:
        assert shared[:2] == alone[:2]
        assert shared[2:] == pytest.approx(alone[2:], rel=0.05), alone


def test_a_saved_state_is_exact_on_cuda(tmp_path: Path) -> None:
    """Weights, moments and step on the device, and the device's random state."""
    from bitdistill.training_state import States

    def make() -> tuple[torch.nn.Linear, torch.optim.AdamW]:
        layer = torch.nn.Linear(64, 64).cuda()
        rate = torch.tensor(1e-3, device="cuda")
        return layer, torch.optim.AdamW(layer.parameters(), rate, fused=True, capturable=True)

    def step(layer: torch.nn.Linear, optimizer: torch.optim.AdamW) -> None:
        layer(torch.randn(8, 64, device="cuda")).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    layer, optimizer = make()
    step(layer, optimizer)
    states = States(tmp_path / "states", {"stage": "test"}, 2, print)
    states.save(1, dict(layer.named_parameters()), optimizer, {"data": None})
    step(layer, optimizer)
    torch.cuda.manual_seed(99)
    again, resumed = make()
    parts = dict(again.named_parameters())
    assert states.restore(parts, resumed) == {"step": 1, "data": None}
    step(again, resumed)
    for mine, theirs in zip(again.parameters(), layer.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        for key, value in resumed.state[mine].items():
            assert torch.equal(value, optimizer.state[theirs][key])
            assert value.device == optimizer.state[theirs][key].device
