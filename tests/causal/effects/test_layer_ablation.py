"""Ablation says what whole runs without a layer say, in models of every kind of attention."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor

from lightning_mm.causal.effects.layer_ablation import ablation_curves
from lightning_mm.causal.interventions.activation_cache import cache_activations
from lightning_mm.causal.interventions.interventions import Intervention, mean_ablate, skip_blocks
from lightning_mm.causal.questions.question import EncodedQuestion, Question
from lightning_mm.causal.questions.scoring import Answer
from tests.helpers.causal_models import TEXT, Subject, noise, see_all, subject

CLOSE = {"rel": 1e-4, "abs": 1e-6}


def answer(one: Subject, encoded: EncodedQuestion) -> Answer:
    logits = cache_activations(one.mm, encoded.inputs).logits[0]
    target = int(logits.argmax())
    chance = float(logits.softmax(-1)[target])
    return Answer(encoded, target, chance, chance, True, 1)


def expected(one: Subject, given: Answer, *changes: Intervention) -> float:
    runs = [cache_activations(one.mm, given.encoded.inputs, some).logits[0] for some in ((), changes)]
    before, after = (float(logits.double().log_softmax(-1)[given.target]) for logits in runs)
    return math.exp(after - before) - 1


def curves(one: Subject, *given: Answer) -> dict[str, list[float]]:
    return {kind: [each.value for each in row] for kind, row in ablation_curves(one.mm, given)}


@pytest.mark.parametrize("ahead", [False, True])
def test_equals_whole_runs(
    ahead: bool, family: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = subject(family, "llava", tmp_path)
    if ahead:
        see_all(monkeypatch)
    given = answer(one, one.encode())
    found, layers = curves(one, given), range(one.layout.num_layers)
    assert found["skip"] == pytest.approx([expected(one, given, skip_blocks([i])) for i in layers], **CLOSE)
    blurred = [expected(one, given, mean_ablate("residual", layers[i:], given.encoded.image)) for i in layers]
    assert found["mean/image"] == pytest.approx(blurred, **CLOSE)
    assert max(map(abs, blurred[:-1])) > 1e-5, "what changes nothing shows nothing"


def test_pictures_of_one_token_have_no_mean(family: Callable[[str], Path], tmp_path: Path) -> None:
    one = subject(family, "mllama", tmp_path)
    found = curves(one, answer(one, one.encode()))
    assert set(found) == {"skip", "zero/mlp", "zero/attention"}


def test_every_picture_has_its_own_mean(family: Callable[[str], Path], tmp_path: Path) -> None:
    one = subject(family, "qwen2_5_vl", tmp_path)
    files = tuple(noise(tmp_path / f"{seed}.png", seed) for seed in (0, 1))
    encoded = one.encoder.encode(Question("two", TEXT, files, ()))
    assert isinstance(encoded, EncodedQuestion)
    given, layers = answer(one, encoded), range(one.layout.num_layers)
    half = len(encoded.image) // 2
    parts = encoded.image[:half], encoded.image[half:]
    assert int(parts[1][0] - parts[0][-1]) > 1, "something stands between them"
    apart = [expected(one, given, *(mean_ablate("residual", layers[i:], part) for part in parts)) for i in layers]
    together = [expected(one, given, mean_ablate("residual", layers[i:], encoded.image)) for i in layers]
    found = curves(one, given)["mean/image"]
    assert found == pytest.approx(apart, **CLOSE)
    assert found != pytest.approx(together, **CLOSE)


def test_answers_of_no_probability_are_counted(family: Callable[[str], Path], tmp_path: Path) -> None:
    one = subject(family, "llava", tmp_path)

    def steep(_: object, __: object, logits: Tensor) -> Tensor:
        return logits * 500

    one.model.get_submodule(one.layout.head).register_forward_hook(steep)
    given = answer(one, one.encode())
    logits = cache_activations(one.mm, given.encoded.inputs).logits[0]
    near = replace(given, target=int(logits.argmin()))
    assert float(logits.softmax(-1)[near.target]) == 0.0
    found = curves(one, near)["skip"]
    assert found == pytest.approx([expected(one, near, skip_blocks([i])) for i in range(len(found))], rel=0.1)
    assert all(map(math.isfinite, found))
