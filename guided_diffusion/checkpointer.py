"""
The checkpoints of one run in its folder: who may write there, which to go on from, sets written in the background, and
the best kept apart. Knows file names and states, not what is in them. Rank 0 does all of it.
"""

import contextlib
import os
import re
import secrets
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch as th

from . import cards, checkpoint, dist_util, files, logger, trained_flags
from .checkpoint_sets import check_one_run, find_newest, prune, steps


def snapshot(state: Any) -> Any:
    """:return: a state with contiguous copies of its tensors, on the CPU; nothing done to the state shows in it."""
    if isinstance(state, th.Tensor):
        return state.detach().to("cpu", copy=True, memory_format=th.contiguous_format)
    if isinstance(state, dict):
        return {key: snapshot(value) for key, value in state.items()}
    return [snapshot(value) for value in state] if isinstance(state, (list, tuple)) else state


class Checkpointer:
    """
    The checkpoints of one run. The with block holds the folder's lock, and its end waits for what is being written; it
    raises where that fails, unless another error is on its way. All methods but `save`, `wait` and `check` are
    collective.

    :param folder: the run's local folder; "" where begin is to name it.
    :param keep: how many sets stay, the newest; None keeps all. The best is kept apart.
    """

    def __init__(self, folder: str = "", keep: int | None = None) -> None:
        self.folder = folder
        self.keep = keep
        self.best: dict[str, float] = {}  # "step" and "val_loss" of what lies in best/, on every rank
        self.changes: list[str] = []  # flags that differ from what the run had before, in words
        self.run_id = ""
        self.facts: dict[str, str] = {}
        self._config: dict[str, Any] | None = None
        self._card: Callable[[int, dict[str, float]], str] | None = None
        self._lock = contextlib.ExitStack()
        self._claimed = False
        self._pool = ThreadPoolExecutor(2, "checkpointer")  # the newest and the best
        self._pending: dict[str, Future] = {}  # folder -> the set that is being written there

    # ---- the folder ----

    def __enter__(self) -> "Checkpointer":
        _on_rank_0(lambda: self._claim() if os.path.isdir(self.folder) else None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()
        self._lock.close()
        if error is None:
            self.check()

    def _claim(self) -> None:
        self._lock.enter_context(files.locked(self.folder, "OPENAI_LOGDIR"))
        self._claimed = True
        for folder in (self.folder, os.path.join(self.folder, checkpoint.BEST)):
            files.remove_leftovers(folder)

    def find(
        self,
        wanted: str,
        flags: Mapping[str, Any],
        changeable: Collection[str],
        facts: Mapping[str, str],
        defaults: Mapping[str, Any] | None = None,
    ) -> str:
        """
        Say which model to go on from: by the same command, the newest whole one of the run in the folder; by a command
        that is given another one by hand, that.

        :param wanted: --resume_checkpoint.
        :param flags: this run's flags -> values; they must be those of the run in the folder.
        :param changeable: flags that may differ.
        :param facts: "data", "unlabelled" and "held_out", the fingerprints of what is trained on, with masks and
            without, and validated on: they count, rather than the paths in --data_dir and --unlabelled_dir.
        :param defaults: flag -> what a run has had that began before there was this flag.
        :return: the path of a model; "" to begin at step 0.
        :raises ValueError: where the folder holds another run, naming the flag.
        """
        self.facts = {**facts, "init": _content_id(flags.get("init_checkpoint", ""))}
        return _on_rank_0(lambda: self._find(wanted, flags, changeable, defaults or {}))

    def _find(
        self, wanted: str, flags: Mapping[str, Any], changeable: Collection[str], defaults: Mapping[str, Any]
    ) -> str:
        found = steps(self.folder) if self.folder else []
        if not found:
            return wanted
        before = trained_flags.load_config(os.path.join(self.folder, checkpoint.model_name(found[-1]))) or {}
        self._compare({**defaults, **before} if before else {}, flags, changeable)
        if wanted and wanted != before.get("resume_checkpoint"):
            return wanted  # a run of its own from here on
        self.run_id = before.get("run", {}).get("id", "")
        newest = find_newest(self.folder, self.run_id)
        if not newest and not wanted:
            raise ValueError(f"the checkpoints in {self.folder} are not of the run in its config.json: move them away")
        self.run_id = self.run_id or (checkpoint.run_of(newest) if newest else "")
        return newest or wanted

    def _compare(self, before: dict[str, Any], flags: Mapping[str, Any], changeable: Collection[str]) -> None:
        facts = before.get("run", {})
        allowed = set(changeable) | ({"data_dir"} if facts.get("data") else set())
        if facts.get("init"):
            self.facts["init"] = self.facts["init"] or facts["init"]  # its file may have gone since
            allowed |= {"init_checkpoint"} if self.facts["init"] == facts["init"] else set()
        if facts.get("unlabelled", "") != self.facts.get("unlabelled", ""):
            raise ValueError(
                f"--unlabelled_dir {flags.get('unlabelled_dir', '')!r} does not hold the images that the run in "
                f"{self.folder} began with, in {before.get('unlabelled_dir', '')!r}: give those; or, to go "
                "on with others, its last model by --resume_checkpoint and another OPENAI_LOGDIR"
            )
        allowed |= {"unlabelled_dir"}
        for name, value in flags.items():
            old = before.get(name, value)
            if name == "resume_checkpoint" or trained_flags.meaning(old) == trained_flags.meaning(value):
                continue
            if name not in allowed:
                raise ValueError(
                    f"OPENAI_LOGDIR {self.folder} has a run with --{name} {old!r}, this one has --{name} {value!r}: "
                    "give the same, or another OPENAI_LOGDIR"
                )
            self.changes.append(f"--{name} {value}, before it was {old}")
        if facts.get("data") and any(facts[name] != self.facts[name] for name in ("data", "held_out")):
            raise ValueError(
                f"--data_dir {flags['data_dir']} does not hold the images that the run in {self.folder} began with, in "
                f"{before['data_dir']}: give those, or another OPENAI_LOGDIR"
            )

    def begin(
        self,
        folder: str = "",
        config: dict[str, Any] | None = None,
        card: Callable[[int, dict[str, float]], str] | None = None,
    ) -> None:
        """
        Begin to write: claim the folder if it is new, write config.json, and see which is the best so far.

        :param folder: the run's folder, where none was given before.
        :param config: the resolved flags, written beside the weights; None writes none.
        :param card: makes the card that is written beside each set, of its step and of `best`; None writes none.
        """
        self.folder, self._card = self.folder or folder, card
        _on_rank_0(lambda: self._begin(config))
        self.best = dist_util.all_gather(self.best)[0]
        for change in self.changes:
            logger.log(f"going on with {change}")

    def _begin(self, config: dict[str, Any] | None) -> None:
        if not self._claimed:
            self._claim()
            if steps(self.folder):
                raise ValueError(f"another run has ended in {self.folder} meanwhile: the same command goes on from it")
        self.run_id = self.run_id or secrets.token_hex(8)
        if config is not None:
            self._config = {**config, "run": {"id": self.run_id, **self.facts}}
            files.write_json(os.path.join(self.folder, trained_flags.CONFIG_NAME), self._config)
        self.best = self._read_best()

    def _read_best(self) -> dict[str, float]:
        """What the state in best/ says of itself, if it is of this run, and was measured on the samples of now."""
        folder = os.path.join(self.folder, checkpoint.BEST)
        for step in reversed(steps(folder)):
            path = os.path.join(folder, checkpoint.state_name(step))
            if checkpoint.run_of(os.path.join(folder, checkpoint.model_name(step))) not in ("", self.run_id):
                continue  # the run that this one went back from
            with contextlib.suppress(ValueError):
                check_one_run(os.path.join(folder, checkpoint.model_name(step)))
                best = checkpoint.parse(path, path).get("best", {}) if files.is_file(path) else {}
                if best and best.pop("held_out", None) == self.facts.get("held_out", ""):
                    return best
        return {}

    # ---- writing ----

    def save(self, states: dict[str, dict], then: Callable[[], None] = lambda: None) -> None:
        """
        Take a copy of a set, and write it while the caller goes on; waits for the set before.

        :param states: file name -> state, in the order of writing; the model's is the last.
        :param then: called when all is written, by the writing thread.
        :raises OSError: where the set before could not be written.
        """
        self._submit(self.folder, states, self.keep, then)

    def save_best(self, step: int, val_loss: float, states: Callable[[], dict[str, dict]]) -> None:
        """
        Put a set in the place of the best, with links to it: modelbest.pt, ema_RATE_best.pt, optbest.pt.

        :param states: makes what `save` takes; rank 0's is written.
        """
        self.best = {"step": step, "val_loss": val_loss}
        if dist_util.rank():
            return
        files_of_set = states()
        files_of_set[checkpoint.state_name(step)] |= {"best": {**self.best, "held_out": self.facts.get("held_out", "")}}
        self._submit(os.path.join(self.folder, checkpoint.BEST), files_of_set, 1, lambda: None)

    def _submit(self, folder: str, states: dict[str, dict], keep: int | None, then: Callable[[], None]) -> None:
        if folder in self._pending:
            self._pending.pop(folder).result()
        copies = {name: snapshot(state) for name, state in states.items()}
        card = self._card(checkpoint.parse_step([*states][-1]), dict(self.best)) if self._card else ""
        self._pending[folder] = self._pool.submit(self._write, folder, copies, card, keep, then)

    def wait(self) -> None:
        """
        Wait until everything is written.

        :raises OSError: where it could not be.
        """
        for folder in list(self._pending):
            self._pending.pop(folder).result()

    def check(self) -> None:
        """:raises OSError: where writing has failed, without waiting for what is being written."""
        for folder in [folder for folder, future in self._pending.items() if future.done()]:
            self._pending.pop(folder).result()

    def _write(
        self, folder: str, states: dict[str, dict], card: str, keep: int | None, then: Callable[[], None]
    ) -> None:
        os.makedirs(folder, exist_ok=True)
        *parts, model = states
        # Where this step has a set already, its model vouches for what is now overwritten: it goes first.
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(folder, model))
        if self._config is not None and folder != self.folder:
            files.write_json(os.path.join(folder, trained_flags.CONFIG_NAME), self._config)
        if card:  # before the model, with which all is there: a run that goes on from it need not write it again
            files.write_text(os.path.join(folder, cards.NAME), card)
        for name in (*parts, model):
            checkpoint.save(states[name], folder, name, self.run_id)
        if folder != self.folder:
            self._link_best(states)
        if keep is not None:
            prune(folder, keep, newest=checkpoint.parse_step(model))
        then()

    def _link_best(self, names: Collection[str]) -> None:
        links = {re.sub(r"\d+(?=\.pt$)", checkpoint.BEST, name): name for name in names if not name.startswith("state")}
        for link, name in links.items():
            files.write_link(os.path.join(self.folder, link), os.path.join(checkpoint.BEST, name))
        for path in Path(self.folder).glob(f"*{checkpoint.BEST}.pt"):
            if path.is_symlink() and path.name not in links:  # of a rate that there is no average of any more
                path.unlink()


def _content_id(path: str) -> str:
    """What tells the weights to begin with from others; "" where that is not known."""
    known = path and not files.is_remote(path)
    return _on_rank_0(lambda: checkpoint.content_id(path) if known and files.is_file(path) else "")


def _on_rank_0(function: Callable[[], Any]) -> Any:
    """Call a function on rank 0 alone; :return: its result, on every rank. Collective; raises alike everywhere."""
    return dist_util.all_gather(dist_util.agree(lambda: None if dist_util.rank() else function()))[0]
