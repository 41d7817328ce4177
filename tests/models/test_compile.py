"""Compiled blocks and Liger's kernels compute the same; where they cannot be had, the error says what to set."""

import sys
from contextlib import ExitStack
from pathlib import Path
from types import MethodType, ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_mm.core.errors import UserError
from lightning_mm.execution.prepare import Compute
from lightning_mm.models.compile import apply_liger, compile_blocks
from lightning_mm.models.hooks import block_io, uncompiled
from lightning_mm.models.loading import Backbone, load_model
from lightning_mm.testing.tiny import build_tiny
from lightning_mm.training.module import MMModule
from lightning_mm.tuning import IntermediateOnly, LateLayers, LoRA, LoRAOnMiddle, TuningPolicy
from tests.helpers.data import Data, Family, batch_of
from tests.helpers.training import scale_of

COMPILED = Compute(compile="blocks")
pytestmark = pytest.mark.filterwarnings("default")
"""The compiler warns of its own doings (old modules that it imports, gradients that it looks at)."""


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The compiler without its C++ part; counts how often compiled code runs."""
    runs: list[int] = []
    compiler = torch.compile

    def backend(graph: Any, _: Any) -> Any:
        def run(*args: Any) -> Any:
            runs.append(1)
            return graph(*args)

        return run

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda fn, **options: compiler(fn, backend=backend, **options))
    return runs


def configured(family: Family, name: str, compute: Compute, tuning: TuningPolicy, **options: bool) -> MMModule:
    torch.manual_seed(0)  # adapters are drawn
    module = MMModule(Backbone(path=str(family(name))), tuning, compute=compute, **options)
    module.configure_model()
    module.eval()
    return module


def step(module: MMModule, batch: Any) -> dict[str, Tensor]:
    objective = module.objective(batch)
    objective.nll.backward()
    return {"loss": objective.nll.detach(), **{n: p.grad for n, p in module.trainable.items() if p.grad is not None}}


@pytest.mark.parametrize(
    ("name", "tuning", "checkpointing"),
    [
        ("llava", IntermediateOnly(layers="1-2"), False),
        ("qwen2_5_vl", IntermediateOnly(layers="1-2"), True),
        ("gemma3", LoRAOnMiddle(layers="1-2", lora=LoRA(r=4)), False),
        ("smolvlm", IntermediateOnly(layers="2", vision="full"), False),
    ],
)
def test_compiled_blocks_compute_the_same(
    name: str, tuning: TuningPolicy, checkpointing: bool, family: Family, data: Data, quick: list[int]
) -> None:
    batch, options = batch_of(family(name), data), {"activation_checkpointing": checkpointing}
    expected = step(configured(family, name, Compute(), tuning, **options), batch)
    module = configured(family, name, COMPILED, tuning, **options)
    found = step(module, batch)
    assert quick
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        torch.testing.assert_close(
            found[key], value, rtol=1e-4, atol=1e-4 * float(scale_of(key, expected).abs().max()), msg=key
        )


def test_only_blocks_that_backward_crosses(family: Family, quick: list[int]) -> None:
    module = configured(family, "llava", COMPILED, LateLayers(budget="1"))
    below = [module.model.get_submodule(name) for name in module.mm.layout.layers[: module.plan.lowest_layer]]
    plain = configured(family, "llava", Compute(), LateLayers(budget="1"))
    assert len(below) == 3
    for one, other in zip(below, plain.mm.layout.layers, strict=False):
        assert getattr(one.forward, "__qualname__", "") == plain.model.get_submodule(other).forward.__qualname__


def test_whoever_looks_sees_every_hook_run(family: Family, data: Data, quick: list[int]) -> None:
    module = configured(family, "llava", COMPILED, IntermediateOnly(layers="1-2"))
    batch = batch_of(family("llava"), data)
    step(module, batch)
    quick.clear()
    seen: list[int] = []
    inner: list[Tensor] = []
    block = module.mm.layout.blocks[1]
    assert block.o_proj is not None
    handle = module.model.get_submodule(block.o_proj).register_forward_hook(lambda *_: inner.append(_[2]))
    with torch.no_grad(), block_io(module.mm, lambda index, hidden: seen.append(index)):
        module.objective(batch)
    assert seen == list(range(module.mm.layout.num_layers + 1))
    assert len(inner) == 1
    assert not quick
    handle.remove()
    with torch.no_grad(), uncompiled(module.model):
        module.objective(batch)
    assert not quick
    step(module, batch)
    assert quick


def test_the_real_compiler(family: Family, data: Data) -> None:
    """One block, with the compiler as users have it: another order of sums in float32."""
    torch._dynamo.reset()
    batch = batch_of(family("llava"), data)
    expected = step(configured(family, "llava", Compute(), LateLayers(budget="1")), batch)
    found = step(configured(family, "llava", COMPILED, LateLayers(budget="1")), batch)
    for key, value in expected.items():
        torch.testing.assert_close(
            found[key], value, rtol=1e-4, atol=1e-4 * float(scale_of(key, expected).abs().max()), msg=key
        )


def test_a_compiler_that_fails_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.config as inductor

    torch._dynamo.reset()
    monkeypatch.setattr(inductor.cpp, "cxx", ("no-such-compiler",))
    monkeypatch.setattr(inductor, "force_disable_caches", True)
    model = nn.Sequential(nn.GELU())  # a matrix product alone needs no C++
    compile_blocks(model, ["0"], ExitStack())
    with pytest.raises(UserError, match=r"could not be compiled[\s\S]*Set model\.compute\.compile off"):
        model(torch.rand(2, 3))


def test_liger_without_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="needs a CUDA device"):
        apply_liger(nn.Linear(1, 1))


class TypedModel(nn.Module):
    config = type("Config", (), {"model_type": "strange"})

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)


def test_liger_is_asked_for_all_but_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in that patches modules as liger_kernel 0.8 does: a bound method in the module's own dictionary."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with monkeypatch.context() as gone:
        gone.setitem(sys.modules, "liger_kernel.transformers", None)
        with pytest.raises(UserError, match="pip install liger-kernel"):
            apply_liger(TypedModel())
    asked: list[dict[str, bool]] = []
    stand_in: Any = ModuleType("liger_kernel.transformers")

    def patch(model: nn.Module, **options: bool) -> None:
        asked.append(options)
        if isinstance(model, nn.Sequential):

            def forward(self: nn.Module, hidden: Tensor) -> Tensor:
                return hidden

            forward.__module__ = "liger_kernel.transformers.rms_norm"
            model[0].__dict__["forward"] = MethodType(forward, model[0])

    stand_in._apply_liger_kernel_to_instance = patch
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", stand_in)
    apply_liger(nn.Sequential(nn.LayerNorm(4)))
    assert asked == [{"cross_entropy": False, "fused_linear_cross_entropy": False}]
    with pytest.raises(UserError, match="does not know models of type strange"):
        apply_liger(TypedModel())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="Liger's kernels run on CUDA")
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "internvl"])
def test_liger_computes_the_same(name: str, family: Family, data: Data) -> None:
    """1e-3: fused float32 kernels sum in another order."""
    pytest.importorskip("liger_kernel")
    batch = batch_of(family(name), data).to("cuda")
    found = []
    for liger in (False, True):
        module = configured(family, name, Compute(liger=liger), IntermediateOnly(layers="1-2")).to("cuda")
        found.append(step(module, batch))
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-3, atol=1e-3 * float(value.abs().max()), msg=key)


@pytest.mark.parametrize(
    ("name", "attention", "why"),
    [
        ("llava", "flex_attention", "no backward pass on this machine"),
        ("qwen2_5_vl", "flex_attention", "does not support an attention implementation through torch's flex_attention"),
        ("mllama", "flash_attention_2", "does not support Flash Attention 2"),
    ],
)
def test_an_attention_kernel_that_cannot_be_had(
    name: str, attention: Any, why: str, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: name != "llava")
    with pytest.raises(UserError, match=rf"model\.backbone\.attention: {attention} cannot be had") as caught:
        load_model(Backbone(path=str(family(name)), attention=attention))
    assert why in caught.value.why
    assert caught.value.fix == "Set model.backbone.attention sdpa."


@pytest.mark.skipif(not torch.cuda.is_available(), reason="flex_attention trains on CUDA")
@pytest.mark.parametrize("name", ["llava", "gemma3", "smolvlm"])
def test_flex_attention_computes_the_same(name: str, data: Data, tmp_path: Path) -> None:
    """With heads of 16, the smallest that it takes."""
    model = build_tiny(name, tmp_path / name, hidden=64)
    batch, found = batch_of(model, data).to("cuda"), []
    for attention in ("sdpa", "flex_attention"):
        backbone: Any = Backbone(path=str(model), attention=attention)  # type: ignore[arg-type]
        module = MMModule(backbone, IntermediateOnly(layers="1-2"))
        module.configure_model()
        found.append(step(module.to("cuda"), batch))
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-3, atol=1e-3 * float(value.abs().max()), msg=key)
