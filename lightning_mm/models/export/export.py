"""Trained models as folders that transformers and PEFT load without us.

Data flow: live model + processor -> ``export_full`` -> complete Hugging Face folder, adapters merged into the weights;
live model + names of what trained -> ``export_adapter`` -> PEFT adapter folder. ``proof`` then loads either one in a
fresh process and compares logits.

The live model is never changed: merging works on a copy of one adapted layer at a time, and what is written is a plain
model that shares all other tensors with it. A folder appears under its name complete, or not at all.

The model card: a README.md that says where an exported model comes from.

Data flow: ``Origin`` -> README.md in the exported folder, in the form that the hub reads.
"""

import copy
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError
from lightning_mm.core.io import is_absent_or_empty, staged_folder
from lightning_mm.models.lora import ADAPTER, adapted_modules
from lightning_mm.models.processor import save_processor


@dataclass(frozen=True)
class Origin:
    """Where a trained model comes from.

    Args:
        base: Folder or hub name of the model it started from.
        revision: Revision of a hub model.
        facts: What else to say, in this order: {'Policy': ..., 'Layers trained': ..., 'Data': ...}.
    """

    base: str
    revision: str | None = None
    facts: Mapping[str, str] = field(default_factory=dict)


def write_card(folder: Path, origin: Origin, library: Literal["transformers", "peft"]) -> None:
    """Write README.md. The license is the user's to state; none is claimed."""
    header: dict[str, object] = {"library_name": library, "pipeline_tag": "image-text-to-text"}
    if not Path(origin.base).exists():  # the hub knows its own models, not someone's folders
        header["base_model"] = origin.base
    header["tags"] = ["lightning_mm"]
    base = f"{origin.base} at {origin.revision}" if origin.revision else origin.base
    rows = {"Base model": base, **origin.facts}
    lines = [
        "---",
        yaml.safe_dump(header, sort_keys=False).strip(),
        "---",
        "",
        f"# {Path(origin.base).name}, fine-tuned",
        "",
        *(f"- **{name}**: {value}" for name, value in rows.items()),
        "- **License**: not stated; the base model's and the data's licenses apply. Say yours here and in the header.",
        "",
        *_LOADING[library],
    ]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


_LOADING = {
    "transformers": [
        "```python",
        "from transformers import AutoModelForImageTextToText, AutoProcessor",
        "",
        'model = AutoModelForImageTextToText.from_pretrained("this folder")',
        'processor = AutoProcessor.from_pretrained("this folder")',
        "```",
    ],
    "peft": [
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForImageTextToText",
        "",
        'base = AutoModelForImageTextToText.from_pretrained("the base model", dtype="float32")',
        'model = PeftModel.from_pretrained(base, "this folder")',
        "```",
    ],
}


def export_full(model: nn.Module, processor: Any, out: Path | str, origin: Origin) -> Path:
    """Write a complete folder: weights as safetensors, configs, processor with its chat template, model card.

    Adapters (LoRA, rsLoRA, DoRA, any ranks) are merged into the weights. A head that was tied to the embedding and got
    an adapter of its own is written untied. The live model stays as it is, adapters and all.

    Args:
        model: A transformers model, with or without adapters.
        processor: Its processor.
        out: The folder to make; it must not exist or be empty.
        origin: Where the model comes from, for the card.

    Returns:
        ``out``.

    Raises:
        UserError: The model is quantised, an adapter is not finite, or the folder is taken or cannot be written.
    """
    _refuse_quantized(model)
    state = _plain_state(model)
    plain = _plain_model(model, state)
    with _staged(Path(out)) as folder:
        plain.save_pretrained(folder, state_dict=state)
        save_processor(processor, folder)
        write_card(folder, origin, library="transformers")
    return Path(out)


def refuse_taken(out: Path, fix: str = "Name another folder, or remove this one.") -> None:
    """Raise UserError where an export to ``out`` would overwrite something; ``fix`` says what to do instead."""
    if not is_absent_or_empty(out):
        raise UserError(f"{out} is taken.", "An export never overwrites.", fix)


def export_adapter(model: nn.Module, out: Path | str, origin: Origin, fully_trained: Collection[str] = ()) -> Path:
    """Write a PEFT folder that ``PeftModel.from_pretrained(base, out)`` loads.

    Tensors that were trained at full rank beside LoRA (a connector, norms) go in by PEFT's ``modules_to_save``, under
    the fully-qualified name of the module that owns them.

    Args:
        model: A transformers model with LoRA adapters.
        out: The folder to make; it must not exist or be empty.
        origin: The base model that the adapter belongs to.
        fully_trained: Names of parameters, as in the plain model, that were trained at full rank.

    Returns:
        ``out``.

    Raises:
        UserError: PEFT alone could not restore this model; format 'model' can. Or the folder is taken or cannot be
            written.
    """
    if ADAPTER not in getattr(model, "peft_config", {}):
        raise _not_an_adapter("The model has no LoRA adapter.")
    from peft import get_peft_model_state_dict

    owners = _owners(model, fully_trained)
    # save_embedding_layers would look the base up on the hub; what trained is listed here, nothing else is meant.
    state = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    for owner in owners:
        state |= {f"{owner}.{name}": tensor for name, tensor in model.get_submodule(owner).state_dict().items()}
    with _staged(Path(out)) as folder:
        tensors = {f"base_model.model.{name}": tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        _adapter_config(model, owners, origin).save_pretrained(str(folder))
        write_card(folder, origin, library="peft")
    return Path(out)


def _adapter_config(model: Any, owners: list[str], origin: Origin) -> Any:
    config = copy.deepcopy(model.peft_config[ADAPTER])
    config.base_model_name_or_path, config.revision = origin.base, origin.revision
    config.modules_to_save, config.inference_mode = owners or None, True
    return config


def _plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict as it would be without adapters; all but the merged tensors share memory with the live model."""
    adapted = adapted_modules(model)
    inside = tuple(f"{name}." for name in adapted)
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(inside)}
    for name, layer in adapted.items():
        state |= {f"{name}.{key}": tensor for key, tensor in _merged(name, layer).state_dict().items()}
    if adapted:
        log_decision("export", f"{len(adapted)} adapters merged", "a complete folder has plain weights")
    return state


def _merged(name: str, layer: Any) -> nn.Module:
    twin = copy.deepcopy(layer)
    try:
        twin.merge(safe_merge=True)
    except ValueError as error:
        raise UserError(
            f"The adapter of {name} cannot be merged.",
            "Merging it gives weights that are not finite.",
            "Export an earlier checkpoint; training went astray before this one.",
        ) from error
    return twin.get_base_layer()


def _plain_model(model: Any, state: dict[str, Tensor]) -> Any:
    """A model of the same class, without adapters or hooks, around ``state``; strict: no tensor is left out or over."""
    config = copy.deepcopy(model.config)
    if _tied(model) and not _tied_in(model, state):
        config.tie_word_embeddings = config.get_text_config(decoder=True).tie_word_embeddings = False
        log_decision(
            "export", "head untied from embedding", "they were one tensor; an adapter changed only one of the two"
        )
    with torch.device("meta"):
        plain = type(model)(config)
    plain.load_state_dict(state, strict=True, assign=True)
    plain.generation_config = model.generation_config
    # The names that the checkpoint had when it was loaded, which save_pretrained goes back to.
    plain._weight_conversions = getattr(model, "_weight_conversions", None)
    return plain


def _tied(model: Any) -> bool:
    embedding, head = _ends(model)
    return head is not None and head.weight is embedding.weight


def _tied_in(model: Any, state: dict[str, Tensor]) -> bool:
    names = {id(module): name for name, module in model.named_modules()}
    first, second = (state[f"{names[id(end)]}.weight"] for end in _ends(model))
    return first.data_ptr() == second.data_ptr()


def _ends(model: Any) -> tuple[Any, Any]:
    return model.get_input_embeddings(), model.get_output_embeddings()


def _owners(model: nn.Module, parameters: Collection[str]) -> list[str]:
    """The modules that hold these parameters, none inside another: what PEFT is to keep a trained copy of."""
    names = {name.rpartition(".")[0] for name in parameters}
    owners = sorted(name for name in names if not any(name.startswith(f"{other}.") for other in names))
    adapted = adapted_modules(model)
    for owner in owners:
        module = model.get_submodule(owner)
        if owner == "" or any(name.startswith(f"{owner}.") or name == owner for name in adapted):
            raise _not_an_adapter(f"{owner or 'The model'} itself holds fully trained tensors, and has LoRA inside.")
        if isinstance(module, nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict):
            raise _not_an_adapter(f"{owner} holds fully trained tensors, but is a list: PEFT cannot replace it.")
        if any(module is end for end in _ends(model)) and _tied(model):
            raise _not_an_adapter("The token embedding was fully trained, and the head is tied to it.")
        # PEFT goes by how names end.
        if strays := [n for n, _ in model.named_modules() if n != owner and n.endswith(owner)]:
            raise _not_an_adapter(f"PEFT would take {strays[0]} for {owner}, which was fully trained.")
    return owners


def _not_an_adapter(why: str) -> UserError:
    return UserError("This model cannot be written as an adapter.", why, "Use format 'model', a complete folder.")


def _refuse_quantized(model: nn.Module) -> None:
    if getattr(model, "hf_quantizer", None) is not None:
        raise UserError(
            "A quantised model cannot be exported as a complete folder.",
            "Its frozen weights are held in 4 or 8 bits; the originals are in the base model.",
            "lightning-mm export puts the trained tensors on them; from Python, load with quantization='none'.",
        )


@contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """A hidden folder beside ``out`` that takes its name when all is written, and vanishes when something fails."""
    refuse_taken(out)
    try:
        with staged_folder(out) as folder:
            yield folder
            _share_permissions(folder)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{out} cannot be written.", str(error), "Free space there, or name a folder you may write to."
        ) from error


def _share_permissions(folder: Path) -> None:
    """Weights readable for whom the rest is: safetensors makes its files for the owner only."""
    mode = (folder / "README.md").stat().st_mode
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)
