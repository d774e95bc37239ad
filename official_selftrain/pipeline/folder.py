"""The folder of a run: whose settings it holds, and what its training was made of.

It holds `config.yaml`, `checkpoints/`, `tensorboard/`, `history.jsonl`, `model.weights.h5`,
`classes.json` and `metrics.json`, and where asked for `ema.weights.h5` and `best.weights.h5`.
`made_of.json` binds it to its data and its start by their content, so that a folder can be moved
or copied.
"""

import contextlib
import glob
import hashlib
import importlib.metadata as metadata
import json
import logging
import pathlib
import shutil
import subprocess
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from official_selftrain import config as config_lib
from official_selftrain.config import Config
from official_selftrain.config.networks import is_named
from official_selftrain.conversion import checkpoint
from official_selftrain.data.prepared import PreparedData
from official_selftrain.engine import checkpoints
from official_selftrain.engine.distribution import Distribution
from official_selftrain.utils.errors import UserError
from official_selftrain.utils.files import (
    locked,
    read_json_or_none,
    remove_leftovers,
    sha256,
    write_json,
    write_text,
)
from official_selftrain.utils.types import StrPath

# Settings that may differ when a run is resumed, because they do not affect the result.
FREE_TO_CHANGE = ("runtime", "description", "published")
# Where data and weights are; they are compared by their content instead, see `MADE_OF`.
PLACES = ("data_dir", "pseudo.records", "trainer.init")
CONFIG = "config.yaml"
METRICS = "metrics.json"
HISTORY = "history.jsonl"
MADE_OF = "made_of.json"  # what a training or labels were made of
Difference = tuple[str, Any, Any]  # dotted name of a setting, its value before, and now


@contextlib.contextmanager
def working_in(folder: pathlib.Path, distribution: Distribution) -> Iterator[None]:
    """Keeps other processes out of a folder, and deletes partial files of a killed one.

    Raises:
        UserError: if another process works there.
    """
    if not distribution.chief:  # the chief holds the lock for all workers
        yield
        return
    with locked(folder) as known:
        for place in (folder, folder / "data", folder / "checkpoints") if known else ():
            remove_leftovers(place)
        yield


def init_run_folder(config: Config, folder: StrPath) -> None:
    """Writes `config.yaml` into a new folder, or checks that an old one is of the same run.

    The settings can still be changed while nothing has been trained or labeled in the folder.

    Raises:
        UserError: if the folder holds another run, naming what differs, or cannot be written.
    """
    folder = pathlib.Path(folder)
    before = saved_config(folder)
    changed = check_settings(config, folder)
    if changed:
        logging.warning(
            "nothing has been trained in %s yet, so its settings are replaced: %s",
            folder,
            "; ".join(changed[:3]),
        )
        _forget_start(folder)
    elif before is not None and not differences(before, config, FREE_TO_CHANGE):
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror}") from None
    write_text(folder / CONFIG, environment() + config_lib.dump(config))


def check_settings(config: Config, folder: pathlib.Path) -> list[str]:
    """Texts on the settings that differ from those of the run in a folder.

    Raises:
        UserError: if some do, and something has been trained or labeled in the folder.
    """
    before = saved_config(folder)
    changed = [] if before is None else told(differences(before, config))
    if before and changed and _has_results(folder):
        other = "choose another --model_dir"
        if (folder / "teacher" / checkpoints.WEIGHTS).exists():
            other = f"`run --reuse={folder} --model_dir=NEW` keeps its teacher and all that agrees"
        raise UserError(
            f"{folder} holds a run of {before.experiment!r} that differs in "
            f"{'; '.join(changed[:3])}; {other}, or delete the folder"
        )
    return changed


def saved_config(folder: pathlib.Path) -> Config | None:
    """The config of the run in a folder, or None if the folder holds no run."""
    file = folder / CONFIG
    return config_lib.load(file) if file.exists() else None


def _has_results(folder):
    """Whether a folder of a training, or of a whole run, holds what took time to make."""
    places = [folder, *(place for place in folder.iterdir() if place.is_dir())]
    return any(
        any(checkpoints.saved_steps(place / "checkpoints"))  # step 0, which is false, cost nothing
        or any(place.glob("*.weights.h5"))
        or any(place.glob("pseudo-*.tfrecord"))
        for place in places
    )


def _forget_start(folder):
    """Removes what was written for other settings before the first step."""
    for step in checkpoints.saved_steps(folder / "checkpoints"):
        (folder / "checkpoints" / f"ckpt-{step:08d}.npz").unlink()
    (folder / MADE_OF).unlink(missing_ok=True)


def differences(
    before: Config, after: Config, ignored: Collection[str] = (*FREE_TO_CHANGE, *PLACES)
) -> list[Difference]:
    """The settings in which two configs differ, as (dotted name, before, after).

    Args:
        before, after: to compare.
        ignored: dotted names of settings or sections that may differ.
    """

    def compare(before, after, prefix):
        # Thresholds by class have numbers as keys, which either side may lack.
        for key in {**before, **after}:
            name, old, new = f"{prefix}{key}", before.get(key), after.get(key)
            if name in ignored:
                continue
            if isinstance(old, dict) and isinstance(new, dict):
                yield from compare(old, new, f"{name}.")
            elif old != new:
                yield name, old, new

    return list(compare(before.model_dump(), after.model_dump(), ""))


def told(changed: Sequence[Difference]) -> list[str]:
    """Differences of settings in words."""
    return [f"{name} ({_short(old)} before, {_short(new)} now)" for name, old, new in changed]


def _short(value):
    return "nothing" if value is None else "a section" if isinstance(value, dict) else repr(value)


def environment() -> str:
    """Versions of the packages, and the git revision of a checkout, as YAML comments."""
    lines = []
    for package in (
        "official_selftrain", "keras", "tensorflow", "tensorflow-cpu", "jax", "numpy", "pillow"
    ):  # fmt: skip
        with contextlib.suppress(metadata.PackageNotFoundError):
            lines.append(f"# {package} {metadata.version(package)}")
    checkout = config_lib.PACKAGE.parent
    if (checkout / ".git").exists() and shutil.which("git"):
        git = subprocess.run(
            ["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True
        )
        if git.returncode == 0:
            lines.append(f"# git {git.stdout.strip()}")
    return "\n".join(lines) + "\n"


# --- What a training has written ----------------------------------------------------------------


def history(folder: pathlib.Path) -> list[dict[str, Any]]:
    """The rows that a training has written; one that a kill left half written is skipped."""
    file, rows = folder / HISTORY, []
    text = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def trained_steps(config: Config, folder: pathlib.Path) -> int:
    """The updates that the weights in a folder have had: the length of the config if unknown."""
    rows = history(folder)
    return rows[-1]["step"] if rows else config.trainer.steps or 0


def chosen(folder: StrPath) -> dict[str, Any] | None:
    """What a finished training has chosen by its selection images; None if it had none.

    Returns:
        A dict: `step`, `metric`, `value` and `averaged` of the best weights; `evaluations`, their
        number; `before`, `after`: the best value before the last quarter of them, and of all;
        `stopped`: whether it stopped before its last step; `converged`.
    """
    best = read_json_or_none(pathlib.Path(folder) / checkpoints.BEST_RECORD)
    return best if isinstance(best, dict) and "converged" in best else None


# --- What a training is made of --------------------------------------------------------------


def content_of(summary: Mapping[str, Any]) -> str:
    """The identity of prepared data: a SHA-256 over its shards."""
    return summary["content"]


def digest(value: Any) -> str:
    """SHA-256 of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def identity(init: str | None) -> str | None:
    """What distinguishes one start of a training from another: a name, or a SHA-256 of weights.

    Raises:
        UserError: if the weights do not exist.
    """
    if not init or is_named(init):
        return init
    path = pathlib.Path(init)
    if checkpoint.is_checkpoint(path):
        if path.is_dir():
            files = sorted(path.glob("*"))
        else:
            files = sorted(path.parent.glob(glob.escape(path.name.removesuffix(".index")) + "*"))
        return digest([sha256(file) for file in files if file.is_file()])
    return sha256(checkpoints.weights_file(path))


def claim_content(config: Config, folder: pathlib.Path, data: PreparedData) -> None:
    """Binds a training to the content of its data and the weights it starts from.

    Metrics of a finished training on other evaluation data are deleted, to be measured again.

    Raises:
        UserError: if the training in the folder has used other data or weights, naming them.
    """
    finished = (folder / checkpoints.WEIGHTS).exists()
    now, before = content_now(config, data), made_of(folder)
    if not finished:
        now["init"] = identity(config.trainer.init)
    elif "init" in before:
        now["init"] = before["init"]
    changed = {key for key in before.keys() & now.keys() if before[key] != now[key]}
    measured_on_the_way = config.trainer.evaluation_interval and "selection" not in data.summaries
    if "evaluation" in changed and (finished or not measured_on_the_way):
        changed.remove("evaluation")
        logging.warning("the evaluation data of %s has changed: it is measured again", folder)
        (folder / METRICS).unlink(missing_ok=True)
    if changed and _has_results(folder):
        texts = content_told(before, now, sorted(changed))
        raise UserError(
            f"{folder} was trained on other data or from other weights, which must not be mixed: "
            f"{'; '.join(texts)}. Restore what the training began with, choose another "
            "--model_dir, or delete the folder"
        )
    if changed:
        logging.warning("nothing has been trained in %s yet, so its data is replaced", folder)
        _forget_start(folder)
    if now != {key: before.get(key) for key in now}:
        write_json(folder / MADE_OF, before | now)


def content_now(config: Config, data: PreparedData) -> dict[str, Any]:
    """`{source: content and counts}` of the data that a training with this config reads."""
    return {
        name: counted(summary)
        for name, summary in data.summaries.items()
        if name != "unlabeled" and getattr(config, name) is not None
    }


def content_told(
    before: Mapping[str, Any], now: Mapping[str, Any], keys: Sequence[str]
) -> list[str]:
    """Texts on the sources or weights `keys`, in which two trainings differ."""
    return [
        f"{key}: {_content_told(before.get(key))} before, {_content_told(now[key])} now"
        for key in keys
    ]


def counted(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The content and the counts of prepared data, as `MADE_OF` holds them."""
    counts = {key: summary[key] for key in ("images", "boxes", "masks")}
    return {"content": content_of(summary)} | counts


def made_of(folder: pathlib.Path) -> dict[str, Any]:
    """What the training in a folder was made of, empty if that is unknown."""
    found = read_json_or_none(folder / MADE_OF)
    return found if isinstance(found, dict) else {}


def _content_told(value):
    """A source or weights of `made_of.json`, in words."""
    if not isinstance(value, dict):
        return "random weights" if value is None else str(value)[:12]
    counts = [f"{value[key]} {key}" for key in ("images", "boxes", "masks") if value.get(key)]
    return f"{', '.join(counts)} ({value['content'][:8]})"


def check_weights(folder: pathlib.Path) -> None:
    """Checks that the weights of a finished training are those that it has written.

    Raises:
        UserError: if they are damaged.
    """
    file, before = folder / checkpoints.WEIGHTS, made_of(folder)
    found = sha256(file)
    if before.setdefault("weights", found) != found:
        raise UserError(
            f"{file} is not as the training has written it (its SHA-256 differs): delete it, and "
            "the same command writes it again from the last checkpoint"
        )
    if before != made_of(folder):
        write_json(folder / MADE_OF, before)


def write_classes(config: Config, folder: pathlib.Path, data: PreparedData) -> None:
    """Writes class count and names beside the weights, as `checkpoints.classes_of` reads them."""
    classes = {"num_classes": config.task.num_classes, "names": data.class_names}
    write_json(folder / checkpoints.CLASSES, classes)
