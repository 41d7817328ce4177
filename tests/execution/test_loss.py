"""The loss in chunks is the loss: same value, same gradients, and never more than a chunk's logits in memory."""

import pytest
import torch
from torch import Tensor, nn

import lightning_mm.execution.loss as objective
from lightning_mm.core.decisions import decision_log
from lightning_mm.core.errors import UserError
from lightning_mm.data.batch import Batch
from lightning_mm.execution.loss import Chunk, LossOutput, _loss_terms, supervised_nll
from lightning_mm.testing.tiny import FAMILIES
from lightning_mm.training.module import MMModule
from lightning_mm.tuning import Full, IntermediateOnly, LoRA, LoRAOnMiddle, PerRegion, TuningPolicy
from tests.helpers.data import Data, Family, batch_of
from tests.helpers.training import configured

HEADS: dict[str, TuningPolicy] = {
    "trained": PerRegion(layers="3", layers_mode="full", norm="full", head="full"),
    "adapted": PerRegion(layers="3", layers_mode="lora", head="lora", lora=LoRA(r=4, dropout=0.0)),
    "frozen": IntermediateOnly(layers="1-2"),
    "below": LoRAOnMiddle(layers="1-2", lora=LoRA(r=4, dropout=0.1)),
}


def step(module: MMModule, batch: Batch, chunk: Chunk) -> tuple[LossOutput, dict[str, Tensor]]:
    torch.manual_seed(0)
    head = module.model.get_submodule(module.mm.layout.head)
    found = supervised_nll(module.model, head, batch, chunk)
    found.nll.backward()
    gradients = {name: p.grad for name, p in module.trainable.items() if p.grad is not None}
    for parameter in module.trainable.values():
        parameter.grad = None
    return found, gradients


def agree(module: MMModule, batch: Batch, tolerance: float) -> None:
    whole, expected = step(module, batch, "off")
    chunked, gradients = step(module, batch, 3)
    assert chunked.num_tokens == whole.num_tokens > 3
    assert torch.equal(chunked.num_correct, whole.num_correct)
    torch.testing.assert_close(chunked.nll, whole.nll, rtol=tolerance, atol=0)
    assert gradients.keys() == expected.keys()
    for name, value in expected.items():
        limit = tolerance * float(value.abs().max())
        torch.testing.assert_close(gradients[name], value, rtol=0, atol=limit, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family(name: str, family: Family, data: Data) -> None:
    """1e-5 of the largest value of each tensor: sums in another order, in float32."""
    agree(configured(family(name), Full()), batch_of(family(name), data), 1e-5)


@pytest.mark.parametrize("policy", HEADS)
def test_whatever_the_head_does(policy: str, family: Family, data: Data) -> None:
    module = configured(family("llava"), HEADS[policy])
    assert not module.mm.layout.tied_head
    agree(module, batch_of(family("llava"), data), 1e-5)


@pytest.mark.parametrize("policy", HEADS)
def test_under_autocast(policy: str, family: Family, data: Data) -> None:
    """A trained head sums the chunks' gradients in bfloat16: 2^-8 for each of a few."""
    module, batch = configured(family("llava"), HEADS[policy]), batch_of(family("llava"), data)
    with torch.autocast("cpu", torch.bfloat16):
        agree(module, batch, 3e-2)


def test_what_a_model_does_behind_its_head_is_done(family: Family, data: Data) -> None:
    """Soft-capped logits, as Gemma 2 and its kin have them."""
    module, batch = configured(family("llava"), Full()), batch_of(family("llava"), data)
    plain, _ = step(module, batch, "off")
    forward = module.model.forward

    def capped(**inputs: Tensor) -> object:
        output = forward(**inputs)
        output.logits = 0.1 * torch.tanh(output.logits / 0.1)
        return output

    module.model.forward = capped
    agree(module, batch, 1e-5)
    assert not torch.equal(step(module, batch, 3)[0].nll, plain.nll)


def test_logits_of_a_chunk_at_a_time(family: Family, data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    module, batch = configured(family("llava"), Full()), batch_of(family("llava"), data)
    vocabulary, seen = len(module.model.get_output_embeddings().weight), []

    def watch(_: nn.Module, __: object, output: Tensor) -> None:
        seen.append(output.shape[1])

    module.model.get_output_embeddings().register_forward_hook(watch)
    held: list[int] = []

    def save(tensor: Tensor) -> Tensor:
        held.append(tensor.numel())
        return tensor

    monkeypatch.setattr(objective, "_LOGIT_BYTES", 4 * 4 * vocabulary + 1)
    decision_log().clear()
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        found = module.objective(batch)
    found.nll.backward()
    assert max(seen) == 4
    assert sum(seen) == 2 * batch.num_supervised  # once forward, once again in backward
    assert 4 * vocabulary not in held
    said = [str(each) for each in decision_log() if each.name == "model.compute.loss_chunk"]
    assert said == ["model.compute.loss_chunk: 4 positions at a time (logits of a whole batch take more than 0 MiB)"]


def test_without_gradients_nothing_is_kept(family: Family, data: Data) -> None:
    module, batch = configured(family("llava"), Full()), batch_of(family("llava"), data)
    head = module.model.get_output_embeddings()
    with torch.no_grad():
        whole, chunked = supervised_nll(module.model, head, batch, "off"), supervised_nll(module.model, head, batch, 3)
    torch.testing.assert_close(chunked.nll, whole.nll, rtol=1e-6, atol=0)
    assert not chunked.nll.requires_grad


def test_a_head_inside_a_part_is_not_cut_off(family: Family, data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.language_model = inner

        def forward(self, **inputs: Tensor) -> object:
            return self.language_model(**inputs)

    module, batch = configured(family("llava"), Full()), batch_of(family("llava"), data)
    head = module.model.get_output_embeddings()
    whole = supervised_nll(module.model, head, batch, "off")
    monkeypatch.setattr(objective, "_LOGIT_BYTES", 1)
    decision_log().clear()
    assert torch.equal(supervised_nll(Wrapped(module.model), head, batch).nll, whole.nll)
    assert any("head is inside a part" in str(each) for each in decision_log())
    with pytest.raises(UserError, match="loss_chunk: 2 is not available"):
        supervised_nll(Wrapped(module.model), head, batch, 2)


@pytest.mark.parametrize("shape", [(1, 7), (300, 1000)])
def test_the_loss_is_torchs_cross_entropy_bit_for_bit(shape: tuple[int, int]) -> None:
    """What is measured of single tokens comes from within it, and changes neither its value nor its gradient."""
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(shape, generator=generator) * 5).requires_grad_()
    targets = torch.randint(shape[1], shape[:1], generator=generator)
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    nll, count, token_nll, correct = _loss_terms(logits, targets)
    assert torch.equal(nll, expected)
    assert torch.equal(*(torch.autograd.grad(value, logits)[0] for value in (nll, expected)))
    assert torch.equal(token_nll, torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
    assert count == len(token_nll) == shape[0]
    assert torch.equal(correct, logits.argmax(-1) == targets)
    assert not token_nll.requires_grad
