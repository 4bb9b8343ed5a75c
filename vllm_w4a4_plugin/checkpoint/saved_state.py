# SPDX-License-Identifier: Apache-2.0
"""What lies beside the parameters of a model that were saved as each rank has them: where they came from.

The files themselves have vLLM's names and the plugin's packed weights. How the model's layers are made follows from the
headers of the checkpoint that was loaded; they are kept here.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_w4a4_plugin.constants import SAVED_STATE_FILE

from .description import load_description, read_json_object
from .errors import CheckpointError
from .inventory import Inventory
from .reader import TensorInfo


@dataclass(frozen=True)
class SavedState:
    """The content of SAVED_STATE_FILE.

    Attributes:
        settings: on which the parameters depend, with their values when they were saved.
        tensors: headers of the checkpoint, by name.
        zero_biases: biases of norms in it that are all zero.
    """

    settings: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    zero_biases: Sequence[str]

    def write(self, directory: Path) -> None:
        """Write the file into `directory`."""
        tensors = [asdict(info) for info in self.tensors.values()]
        data = {"settings": dict(self.settings), "zero_biases": list(self.zero_biases), "tensors": tensors}
        (directory / SAVED_STATE_FILE).write_text(json.dumps(data), encoding="utf-8")

    def check_settings(self, directory: str, settings: Mapping[str, Any]) -> None:
        """Raise a CheckpointError if one of `settings` has another value than when the state was saved."""
        for name, value in settings.items():
            if (saved := self.settings.get(name)) != value:
                raise CheckpointError(
                    f"{directory}/{SAVED_STATE_FILE}: expected a state that was saved with {name} = {value}, found "
                    f"{saved}. Start vLLM with the options with which the state was saved, or save it again."
                )


def read_saved_state(directory: Path) -> SavedState | None:
    """The saved state in `directory`, None if there is none.

    Raises:
        CheckpointError: its file is damaged.
    """
    file = directory / SAVED_STATE_FILE
    if not file.is_file():
        return None
    data = read_json_object(file)
    try:
        infos = [TensorInfo(t["name"], t["file"], t["dtype"], tuple(t["shape"])) for t in data["tensors"]]
        return SavedState(dict(data["settings"]), {info.name: info for info in infos}, list(data["zero_biases"]))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{file}: expected settings, zero_biases and tensors ({type(error).__name__}: {error}). "
            "Save the state again."
        ) from None


def saved_inventory(directory: Path, state: SavedState) -> Inventory:
    """That of the checkpoint from which the state was saved. Its description must have been copied beside it."""
    config = directory / "config.json"
    return Inventory(
        load_description(directory), state.tensors, config=read_json_object(config) if config.is_file() else {}
    )
