"""Checkpoints of a run, by orbax: the model and its optimizer, and the objective's state.

A checkpoint is there as a whole or not at all: orbax writes it beside, and renames it. The newest two stay.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

import jaxreg as jr

ABOUT = "run.json"


class Checkpoints:
    """What a run left behind it, and goes on from.

    Args:
      folder: where they are.
      about: what the run is of; a run of something else is not gone on with.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        # It takes a second, which only a run with checkpoints pays.
        import orbax.checkpoint as ocp  # type: ignore[import-untyped,unused-ignore]

        self._ocp, self._folder = ocp, folder.resolve()
        self._folder.mkdir(parents=True, exist_ok=True)
        options = ocp.CheckpointManagerOptions(max_to_keep=2)
        self._manager = ocp.CheckpointManager(
            self._folder, options=options, item_names=("model", "objective")
        )
        self._check(dict(about))

    def _check(self, about: dict[str, Any]) -> None:
        path = self._folder / ABOUT
        if self.latest is None:
            path.write_text(json.dumps(about))
            return
        known = json.loads(path.read_text()) if path.is_file() else {}
        for name, value in about.items():
            if known.get(name, value) != value:
                raise ValueError(
                    f"{self._folder} has checkpoints of a run with --{name} {known[name]}, not {value}: go "
                    f"on with that, or say another --out"
                )

    @property
    def latest(self) -> int | None:
        """How many steps the newest checkpoint has behind it; None where there is none."""
        step: int | None = self._manager.latest_step()
        return step

    def save(self, steps: int, model: Any, state: Any) -> None:
        """Keep what there is after so many steps."""
        save = self._ocp.args.StandardSave
        items = {"model": save(model)}
        if state:  # where nothing is remembered it is empty, which orbax takes for a mistake
            items["objective"] = save(state)
        self._manager.save(steps, args=self._ocp.args.Composite(**items))
        self._manager.wait_until_finished()  # or the next step would donate what is being written

    def restore(self, model: Any, objective: jr.CompositeLoss) -> tuple[Any, Any]:
        """The newest model, of the structure of this one, and the state as this objective takes it.

        What changed since is said: a term that is new begins with its first state.
        """
        restore, step = self._ocp.args.StandardRestore, self.latest
        items = {"model": restore(jax.tree.map(self._ocp.utils.to_shape_dtype_struct, model))}
        if (self._folder / str(step) / "objective").is_dir():
            items["objective"] = restore()
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*[Ss]harding")  # one device: this one
                found = self._manager.restore(step, args=self._ocp.args.Composite(**items))
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"the checkpoint {self._folder / str(step)} cannot be read; without it the run goes on from "
                f"the one before ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
            ) from error
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", jr.StateChangedWarning)
            state = objective.restored(found.get("objective") or {})
        for what in told:
            print(what.message)
        return found["model"], state
