"""lmms-eval on an exported folder of any family, as its model `exported`; all other options are lmms-eval's own.

    python lmms_eval_export.py --model exported --model_args pretrained=runs/first/export --tasks mme --batch_size 1

Data flow: a task's documents -> messages with pictures -> `ExportedModel` -> answers -> the task's scores.
"""

from typing import Any

from exported import ExportedModel
from lmms_eval.api.model import lmms
from lmms_eval.cli.dispatch import main
from lmms_eval.models import MODEL_REGISTRY_V2
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages


class Exported(lmms):
    """A complete folder as a chat model of lmms-eval, one question at a time, in one process.

    Args:
        pretrained: The exported folder.
        device: Of `--device`; None: CUDA where there is one.
        dtype: Dtype of the weights; 'auto': that of the files.
        batch_size: Of `--batch_size`; questions are asked one at a time, so that padding changes no answer.
    """

    is_simple = False

    def __init__(self, pretrained: str, device: str | None = None, dtype: str = "auto", batch_size: int = 1) -> None:
        super().__init__()
        if int(batch_size) != 1:
            raise ValueError("exported asks one question at a time: --batch_size 1")
        self.exported = ExportedModel(pretrained, device, dtype)

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Answers to open questions, in the order of the requests."""
        answers = []
        for request in requests:
            _, to_messages, settings, index, task, split = request.args
            messages = ChatMessages(messages=to_messages(self.task_dict[task][split][index])).to_hf_messages()
            answers.append(self.exported.answer(messages, settings))
        return answers

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Refuse tasks of the output types loglikelihood and multiple_choice."""
        raise NotImplementedError("exported answers questions; it gives no log-likelihoods")

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        """Refuse tasks that ask in several rounds."""
        raise NotImplementedError("exported answers in one round")


MODEL_REGISTRY_V2.register_manifest(ModelManifest("exported", chat_class_path=f"{__name__}.Exported"))

if __name__ == "__main__":
    main()
