"""Upload of an exported folder to the Hugging Face hub.

Data flow: name of the repository -> ``HubRepo.open`` (checked before anything is trained or written) -> exported folder
-> ``HubRepo.upload`` -> its address. The token is the one that huggingface_hub finds: HF_TOKEN, or ``hf auth login``.
``HF_ENDPOINT`` names another server than huggingface.co.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError


@dataclass(frozen=True)
class HubRepo:
    """A model repository on the hub.

    Args:
        name: Owner and name, such as ``me/my-model``.
        private: Whether a repository that is made is private; True by default, since a model may tell of its data. One
            that is there already stays as it is.
    """

    name: str
    private: bool = True

    @classmethod
    def open(cls, name: str, private: bool = True) -> "HubRepo":
        """A repository to upload to; nothing is sent yet.

        Raises:
            UserError: The name is no repository's, there is no token, or the hub is switched off.
        """
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise _refusal(name, str(error).splitlines()[0], "Name it owner/name, such as me/my-model.") from error
        if "/" not in name:
            raise _refusal(name, "It has no owner.", "Name it owner/name, such as me/my-model.")
        if constants.is_offline_mode():
            raise _refusal(name, "HF_HUB_OFFLINE is set.", "Unset it, or upload later: hf upload REPO FOLDER")
        if get_token() is None:
            raise _refusal(name, "There is no token.", "Set HF_TOKEN, or log in: hf auth login")
        return cls(name, private)

    def upload(self, folder: Path) -> str:
        """Upload a folder in one commit; returns the address of the repository.

        Args:
            folder: The exported folder; it is left as it is.

        Raises:
            UserError: The hub refuses it, or cannot be reached. The folder stays, to be uploaded later.
        """
        api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, library_name="lightning_mm")
        try:
            address = api.create_repo(self.name, private=self.private, exist_ok=True)
            api.upload_folder(
                repo_id=self.name, folder_path=folder, commit_message="Upload a model trained with lightning_mm"
            )
        except Exception as error:  # each HTTP library that the hub's client has used raises its own
            reason = " ".join(str(error).split())
            raise _refusal(self.name, reason, f"The folder is complete: hf upload {self.name} {folder}") from error
        kept = "private" if self.private else "public"
        log_decision("export.push_to_hub", str(address), f"made {kept} if it was not there already")
        return str(address)


def _refusal(name: str, why: str, fix: str) -> UserError:
    return UserError(f"{name} cannot be uploaded to the hub.", why, fix)
